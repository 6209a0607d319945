// A linear layer whose weight is packed for the processor it runs on.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastertransformer {

class Linear {
 public:
  Linear() = default;
  // kernel: (in, out), bias: (out). On a CPU the kernel is repacked for oneDNN where that computes this dtype, so the
  // caller's copy isn't kept.
  Linear(const at::Tensor& kernel, const at::Tensor& bias);

  at::Tensor apply(const at::Tensor& input) const;                                  // x W + b
  at::Tensor apply_gelu(const at::Tensor& input) const;                             // gelu(x W + b), by erf
  at::Tensor apply_add(const at::Tensor& input, const at::Tensor& residual) const;  // x W + b + residual
  at::Tensor kernel() const;                                                        // (in, out), as it was given
  const at::Tensor& bias() const { return bias_; }

 private:
  at::Tensor weight_;  // packed: opaque (out, in); otherwise the dense (in, out) kernel
  at::Tensor bias_;
  bool packed_ = false;
};

// The dtype in which a CPU computes with weights of this one: fp32 where it has no faster arithmetic of its own.
at::ScalarType choose_compute_dtype(const at::Tensor& weight);

}  // namespace fastertransformer
