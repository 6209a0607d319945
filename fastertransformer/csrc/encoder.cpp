// Turns hidden states, packed or padded, into those of the next layer: post-norm BERT with erf GELU.
#include "encoder.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/cummax.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <utility>

namespace fastertransformer {
namespace {

// The interface has no field for it; every published BERT uses 1e-12 (trace.py refuses another).
constexpr double kLayerNormEpsilon = 1e-12;

const std::array<const char*, kTensors> kNames = {
    "query kernel",         "query bias",        "key kernel",       "key bias",           "value kernel",
    "value bias",           "output kernel",     "output bias",      "output norm gamma",  "output norm beta",
    "intermediate kernel",  "intermediate bias", "layer kernel",     "layer bias",         "layer norm gamma",
    "layer norm beta",      "amax list"};

void check_scalars(const LayerScalars& s) {
  TORCH_CHECK_VALUE(s.head_num > 0 && s.head_size > 0, "FasterTransformer.Encoder: expected positive head_num and ",
                    "head_size, got ", s.head_num, " and ", s.head_size);
  TORCH_CHECK_NOT_IMPLEMENTED(s.int8_mode == 0, "FasterTransformer.Encoder: int8_mode ", s.int8_mode,
                              " is not supported by this library, only 0; trace the model again with fp32, fp16 or ",
                              "bf16, or load the library that the file was traced with");
  TORCH_CHECK_VALUE(s.layer_num > 0 && s.layer_idx >= 0 && s.layer_idx < s.layer_num,
                    "FasterTransformer.Encoder: expected layer_idx from 0 to layer_num - 1, got layer_idx ",
                    s.layer_idx, " and layer_num ", s.layer_num);
}

// Expected shapes follow from the hidden size and the intermediate bias.
void check_tensors(const LayerTensors& tensors, int64_t hidden) {
  TORCH_CHECK_VALUE(tensors[11].dim() == 1, "FasterTransformer.Encoder: expected an intermediate bias of one ",
                    "dimension, got shape ", tensors[11].sizes());
  const int64_t inner = tensors[11].size(0);
  const std::vector<std::vector<int64_t>> expected = {
      {hidden, hidden}, {hidden}, {hidden, hidden}, {hidden}, {hidden, hidden}, {hidden}, {hidden, hidden}, {hidden},
      {hidden}, {hidden}, {hidden, inner}, {inner}, {inner, hidden}, {hidden}, {hidden}, {hidden}};
  const auto dtype = tensors[0].scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16,
                   "FasterTransformer.Encoder: expected weights of float32, float16 or bfloat16, got ", dtype);
  for (size_t i = 0; i < expected.size(); ++i) {
    TORCH_CHECK_VALUE(tensors[i].sizes() == c10::IntArrayRef(expected[i]), "FasterTransformer.Encoder: ", kNames[i],
                      " (tensor ", i, "): expected shape ", c10::IntArrayRef(expected[i]), ", got ",
                      tensors[i].sizes(), "; kernels are (in, out), the transpose of nn.Linear's weight");
    TORCH_CHECK_TYPE(tensors[i].scalar_type() == dtype, "FasterTransformer.Encoder: ", kNames[i], " (tensor ", i,
                     "): expected dtype ", dtype, " like the query kernel, got ", tensors[i].scalar_type());
    TORCH_CHECK_VALUE(tensors[i].device() == tensors[0].device(), "FasterTransformer.Encoder: ", kNames[i],
                      " (tensor ", i, "): expected device ", tensors[0].device(), " like the query kernel, got ",
                      tensors[i].device());
    TORCH_CHECK_TYPE(tensors[i].layout() == at::kStrided, "FasterTransformer.Encoder: ", kNames[i], " (tensor ", i,
                     "): expected a dense tensor, got layout ", tensors[i].layout());
  }
}

at::Tensor normalise(const at::Tensor& rows, const at::Tensor& gamma, const at::Tensor& beta) {
  return at::layer_norm(rows, {rows.size(-1)}, gamma, beta, kLayerNormEpsilon);
}

}  // namespace

Encoder::Encoder(const LayerTensors& tensors, const LayerScalars& scalars) : scalars_(scalars) {
  const c10::NoGradGuard no_grad;
  check_scalars(scalars);
  check_tensors(tensors, hidden());
  dtype_ = tensors[0].scalar_type();
  compute_ = choose_compute_dtype(tensors[0]);
  const auto take = [&](size_t i) { return tensors[i].detach().to(compute_); };
  query_key_value_ = Linear(at::cat({take(0), take(2), take(4)}, 1), at::cat({take(1), take(3), take(5)}, 0));
  attention_output_ = Linear(take(6).contiguous(), take(7).contiguous());
  intermediate_ = Linear(take(10).contiguous(), take(11).contiguous());
  output_ = Linear(take(12).contiguous(), take(13).contiguous());
  attention_gamma_ = take(8).contiguous();
  attention_beta_ = take(9).contiguous();
  output_gamma_ = take(14).contiguous();
  output_beta_ = take(15).contiguous();
  amax_ = tensors[16].detach();
  flash_ = has_flash(attention_gamma_, head());
}

void Encoder::check_inputs(const at::Tensor& hidden_states, const at::Tensor& mask, const at::Tensor& offsets) const {
  const bool packed = scalars_.remove_padding != 0;
  const char* expected = packed ? "(tokens, hidden) as padding is removed" : "(batch, length, hidden)";
  TORCH_CHECK_VALUE(hidden_states.dim() == (packed ? 2 : 3) && hidden_states.size(-1) == hidden(),
                    "FasterTransformer.Encoder.forward: expected hidden states ", expected, " with hidden ", hidden(),
                    ", got shape ", hidden_states.sizes());
  TORCH_CHECK_TYPE(hidden_states.scalar_type() == dtype_, "FasterTransformer.Encoder.forward: expected hidden states ",
                   "of ", dtype_, " like the weights, got ", hidden_states.scalar_type());
  const auto device = attention_gamma_.device();
  for (const auto& [name, tensor] : {std::pair<const char*, const at::Tensor&>{"hidden states", hidden_states},
                                     {"attention_mask", mask},
                                     {"trt_seqlen_offset", offsets}}) {
    TORCH_CHECK_VALUE(tensor.device() == device, "FasterTransformer.Encoder.forward: expected ", name, " on ", device,
                      " like the weights, got ", tensor.device());
  }
  TORCH_CHECK_VALUE(mask.dim() == 4 && mask.size(2) == mask.size(3),
                    "FasterTransformer.Encoder.forward: expected an attention_mask (batch, 1, length, length), got ",
                    "shape ", mask.sizes());
  const int64_t batch = mask.size(0), count = packed ? batch + 1 : 2 * batch + 1;
  TORCH_CHECK_VALUE(packed || (hidden_states.size(0) == batch && hidden_states.size(1) == mask.size(3)),
                    "FasterTransformer.Encoder.forward: hidden states of shape ", hidden_states.sizes(),
                    " don't fit an attention_mask of shape ", mask.sizes());
  TORCH_CHECK_TYPE(offsets.scalar_type() == at::kInt, "FasterTransformer.Encoder.forward: expected int32 ",
                   "trt_seqlen_offset, got ", offsets.scalar_type());
  TORCH_CHECK_VALUE(offsets.dim() == 1 && offsets.size(0) == count,
                    "FasterTransformer.Encoder.forward: expected trt_seqlen_offset of shape [", count, "] (",
                    packed ? "batch + 1" : "2 * batch + 1", " for a mask of shape ", mask.sizes(), "), got ",
                    offsets.sizes());
}

// Reads offsets on the host, checked against the rows they index; padded spans are left out.
std::vector<Span> Encoder::read_spans(const at::Tensor& offsets, int64_t rows, int64_t longest) const {
  const at::Tensor host = offsets.to(at::kCPU).contiguous();
  const int32_t* value = host.const_data_ptr<int32_t>();
  const int64_t count = host.size(0) - 1, step = scalars_.remove_padding != 0 ? 1 : 2;
  TORCH_CHECK_INDEX(value[0] == 0 && value[count] == rows, "FasterTransformer.Encoder.forward: expected ",
                    "trt_seqlen_offset from 0 to ", rows, " (the rows of the hidden states), got ", value[0], " to ",
                    value[count]);
  std::vector<Span> spans;
  spans.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t length = static_cast<int64_t>(value[i + 1]) - value[i];
    TORCH_CHECK_INDEX(length >= 0 && length <= longest && value[i + 1] <= rows, "FasterTransformer.Encoder.forward: ",
                      "expected trt_seqlen_offset to rise by 0 to ", longest, " up to ", rows, ", got ", value[i],
                      " then ", value[i + 1], " at position ", i);
    if (length > 0 && i % step == 0) {
      spans.push_back({value[i], length});
    }
  }
  return spans;
}

at::Tensor Encoder::attend(const at::Tensor& qkv, const at::Tensor& mask, const at::Tensor& offsets) const {
  const int64_t longest = mask.size(3);
  if (scalars_.remove_padding == 0 && scalars_.use_trt_kernel == 0) {
    TORCH_CHECK_VALUE(mask.size(1) == 1, "FasterTransformer.Encoder.forward: expected an attention_mask ",
                      "(batch, 1, length, length), got shape ", mask.sizes());
    return attend_masked(qkv, mask, head());
  }
  const at::Tensor rows = qkv.view({-1, qkv.size(-1)});
  at::Tensor output;
  if (rows.is_cpu()) {
    output = attend_spans_cpu(rows, read_spans(offsets, rows.size(0), longest), head());
  } else {
    // Reading the offsets waits for the device: the first layer does, right after packing waited anyway. The others
    // bound them on the device, so that wrong ones given to a later layer alone still read nothing out of range.
    if (scalars_.layer_idx == 0) {
      read_spans(offsets, rows.size(0), longest);
    }
    const at::Tensor bounded =
        std::get<0>(at::cummax(offsets.clamp(0, rows.size(0)), 0)).to(at::kInt).contiguous();
    output = attend_spans_cuda(rows, bounded, longest, head(), flash_);
  }
  std::vector<int64_t> shape = qkv.sizes().vec();
  shape.back() = hidden();
  return output.view(shape);
}

at::Tensor Encoder::forward(const at::Tensor& hidden_states, const at::Tensor& attention_mask,
                            const at::Tensor& offsets, const at::Tensor& /*sequence_id_offset*/) const {
  const c10::NoGradGuard no_grad;
  check_inputs(hidden_states, attention_mask, offsets);
  if (hidden_states.numel() == 0) {
    return hidden_states.clone();
  }
  const at::Tensor input = hidden_states.to(compute_).contiguous();
  const at::Tensor context = attend(query_key_value_.apply(input), attention_mask, offsets);
  const at::Tensor attended =
      normalise(attention_output_.apply_add(context, input), attention_gamma_, attention_beta_);
  const at::Tensor inner = intermediate_.apply_gelu(attended);
  return normalise(output_.apply_add(inner, attended), output_gamma_, output_beta_).to(dtype_);
}

std::vector<at::Tensor> Encoder::state() const {
  const c10::NoGradGuard no_grad;
  const auto give = [&](const at::Tensor& tensor) { return tensor.to(dtype_).contiguous(); };
  const auto kernels = query_key_value_.kernel().chunk(3, 1), biases = query_key_value_.bias().chunk(3, 0);
  std::vector<at::Tensor> tensors = {
      give(kernels[0]), give(biases[0]), give(kernels[1]), give(biases[1]), give(kernels[2]), give(biases[2])};
  for (const at::Tensor& tensor :
       {attention_output_.kernel(), attention_output_.bias(), attention_gamma_, attention_beta_,
        intermediate_.kernel(), intermediate_.bias(), output_.kernel(), output_.bias(), output_gamma_, output_beta_}) {
    tensors.push_back(give(tensor));
  }
  tensors.push_back(amax_);
  const LayerScalars& s = scalars_;
  tensors.push_back(at::tensor({s.head_num, s.head_size, s.remove_padding, s.int8_mode, s.layer_num, s.layer_idx,
                                s.allow_gemm_test, s.use_trt_kernel},
                               at::kLong));
  return tensors;
}

c10::intrusive_ptr<Encoder> Encoder::restore(const std::vector<at::Tensor>& state) {
  TORCH_CHECK_VALUE(state.size() == kTensors + 1, "FasterTransformer.Encoder: this file was traced with another ",
                    "version of the class: expected a state of ", kTensors + 1, " tensors, got ", state.size(),
                    "; trace the model again, or load the library that the file was traced with");
  const at::Tensor scalars = state[kTensors].to(at::kCPU).contiguous();
  TORCH_CHECK_VALUE(scalars.scalar_type() == at::kLong && scalars.dim() == 1 && scalars.size(0) == 8,
                    "FasterTransformer.Encoder: this file was traced with another version of the class: expected an ",
                    "int64 tensor of 8 scalars at the end of the state, got ", scalars.scalar_type(), " of shape ",
                    scalars.sizes(), "; trace the model again, or load the library that the file was traced with");
  const int64_t* s = scalars.const_data_ptr<int64_t>();
  LayerTensors tensors;
  std::copy_n(state.begin(), kTensors, tensors.begin());
  return c10::make_intrusive<Encoder>(tensors, LayerScalars{s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]});
}

}  // namespace fastertransformer
