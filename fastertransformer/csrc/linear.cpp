// Turns (rows, in) into (rows, out) with oneDNN's packed weights on a CPU, and with addmm elsewhere.
#include "linear.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/gelu.h>

#include <optional>
#include <string_view>

namespace fastertransformer {
namespace {

using Scalars = c10::List<std::optional<at::Scalar>>;
using Pack = at::Tensor(const at::Tensor&, std::optional<int64_t>);
using Unary = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, std::string_view,
                         Scalars, std::optional<std::string_view>);
using Binary = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                          std::string_view);

// oneDNN's fused linear is an operator of PyTorch without a C++ header; builds without oneDNN lack it.
template <class Signature>
std::optional<c10::TypedOperatorHandle<Signature>> find(const char* name, const char* overload) {
  const auto found = c10::Dispatcher::singleton().findSchema({name, overload});
  if (!found.has_value() || !found->hasKernelForDispatchKey(c10::DispatchKey::CPU)) {
    return std::nullopt;
  }
  return found->typed<Signature>();
}

const auto& unary_operator() {
  static const auto found = find<Unary>("mkldnn::_linear_pointwise", "");
  return found;
}

const auto& binary_operator() {
  static const auto found = find<Binary>("mkldnn::_linear_pointwise", "binary");
  return found;
}

const auto& pack_operator() {
  static const auto found = find<Pack>("mkldnn::_reorder_linear_weight", "");
  return found;
}

bool can_pack() { return unary_operator() && binary_operator() && pack_operator(); }

at::Tensor run_unary(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                     std::string_view activation) {
  return unary_operator()->call(input, weight, bias, activation, Scalars(), "none");
}

}  // namespace

at::ScalarType choose_compute_dtype(const at::Tensor& weight) {
  if (!weight.is_cpu() || weight.scalar_type() == at::kFloat) {
    return weight.scalar_type();
  }
  const char* question = weight.scalar_type() == at::kBFloat16 ? "mkldnn::_is_mkldnn_bf16_supported"
                                                               : "mkldnn::_is_mkldnn_fp16_supported";
  const auto found = c10::Dispatcher::singleton().findSchema({question, ""});
  const bool fast = can_pack() && found.has_value() && found->typed<bool()>().call();
  return fast ? weight.scalar_type() : at::kFloat;
}

Linear::Linear(const at::Tensor& kernel, const at::Tensor& bias) : weight_(kernel), bias_(bias) {
  // Packing pays at any number of rows: at 15, 136 and 1024 the four products of a MiniLM layer took 0.3 to 0.55 of the
  // time of torch.addmm (torch.ops.mkldnn._linear_pointwise on packed weights, two threads, AVX-512).
  if (kernel.is_cpu() && can_pack()) {
    weight_ = pack_operator()->call(kernel.t().contiguous(), std::nullopt);
    packed_ = true;
  }
}

at::Tensor Linear::apply(const at::Tensor& input) const {
  return packed_ ? run_unary(input, weight_, bias_, "none") : at::addmm(bias_, input, weight_);
}

at::Tensor Linear::apply_gelu(const at::Tensor& input) const {
  return packed_ ? run_unary(input, weight_, bias_, "gelu") : at::gelu(at::addmm(bias_, input, weight_), "none");
}

at::Tensor Linear::apply_add(const at::Tensor& input, const at::Tensor& residual) const {
  return packed_ ? binary_operator()->call(input, residual, weight_, bias_, "add")
                 : at::addmm(bias_, input, weight_).add_(residual);
}

at::Tensor Linear::kernel() const { return packed_ ? weight_.to_dense().t().contiguous() : weight_; }

}  // namespace fastertransformer
