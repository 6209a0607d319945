// One BERT encoder layer behind the interface of torch.classes.FasterTransformer.Encoder.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>

#include <array>
#include <optional>
#include <vector>

#include "attention.h"
#include "linear.h"

namespace fastertransformer {

// The interface's 17 tensors: query, key, value and attention-output kernel and bias, layer norm gamma and beta,
// intermediate and output kernel and bias, layer norm gamma and beta, amax list. Kernels are (in, out).
constexpr size_t kTensors = 17;
using LayerTensors = std::array<at::Tensor, kTensors>;

// The eight scalars, in the order of the constructor and of the pickled int64 tensor.
struct LayerScalars {
  int64_t head_num;
  int64_t head_size;
  int64_t remove_padding;
  int64_t int8_mode;
  int64_t layer_num;
  int64_t layer_idx;
  int64_t allow_gemm_test;
  int64_t use_trt_kernel;
};

class Encoder : public torch::CustomClassHolder {
 public:
  Encoder(const LayerTensors& tensors, const LayerScalars& scalars);

  // hidden_states: (T, H) packed with offsets (B + 1), or (B, S, H) with offsets (2B + 1) that alternate valid and
  // padded spans; returns the same shape.
  at::Tensor forward(const at::Tensor& hidden_states, const at::Tensor& attention_mask, const at::Tensor& offsets,
                     const at::Tensor& sequence_id_offset) const;

  // The 17 tensors as they were given, then the eight scalars: what a pickle holds.
  std::vector<at::Tensor> state() const;
  static c10::intrusive_ptr<Encoder> restore(const std::vector<at::Tensor>& state);

 private:
  int64_t hidden() const { return scalars_.head_num * scalars_.head_size; }
  HeadShape head() const { return {scalars_.head_num, scalars_.head_size}; }
  void check_inputs(const at::Tensor& hidden_states, const at::Tensor& mask, const at::Tensor& offsets) const;
  std::vector<Span> read_spans(const at::Tensor& offsets, int64_t rows, int64_t longest) const;
  at::Tensor attend(const at::Tensor& qkv, const at::Tensor& mask, const at::Tensor& offsets) const;

  LayerScalars scalars_;
  at::ScalarType dtype_;    // of the tensors given, and of the hidden states
  at::ScalarType compute_;  // in which the layer is computed
  bool flash_ = false;
  Linear query_key_value_;
  Linear attention_output_;
  Linear intermediate_;
  Linear output_;
  at::Tensor attention_gamma_, attention_beta_, output_gamma_, output_beta_, amax_;
};

}  // namespace fastertransformer
