// Makes the class and the operators known to PyTorch under the names that traced files hold.
#include <torch/custom_class.h>
#include <torch/library.h>

#include "encoder.h"
#include "padding.h"

namespace fastertransformer {
namespace {

using T = at::Tensor;

c10::intrusive_ptr<Encoder> make_encoder(T t0, T t1, T t2, T t3, T t4, T t5, T t6, T t7, T t8, T t9, T t10, T t11,
                                         T t12, T t13, T t14, T t15, T t16, int64_t head_num, int64_t head_size,
                                         bool remove_padding, int64_t int8_mode, int64_t layer_num, int64_t layer_idx,
                                         bool allow_gemm_test, bool use_trt_kernel) {
  return c10::make_intrusive<Encoder>(
      LayerTensors{t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15, t16},
      LayerScalars{head_num, head_size, remove_padding, int8_mode, layer_num, layer_idx, allow_gemm_test,
                   use_trt_kernel});
}

const auto encoder_class =
    torch::class_<Encoder>("FasterTransformer", "Encoder")
        .def(torch::init(&make_encoder))
        .def("forward", [](const c10::intrusive_ptr<Encoder>& self, T hidden_states, T attention_mask,
                           T trt_seqlen_offset, T sequence_id_offset) {
          return self->forward(hidden_states, attention_mask, trt_seqlen_offset, sequence_id_offset);
        })
        .def_pickle([](const c10::intrusive_ptr<Encoder>& self) { return self->state(); },
                    [](std::vector<T> state) { return Encoder::restore(state); });

}  // namespace

TORCH_LIBRARY(fastertransformer, library) {
  library.def("build_mask_remove_padding(Tensor input, Tensor sequence_lengths) -> Tensor[]",
              torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(build_mask_remove_padding)));
  library.def(
      "rebuild_padding(Tensor input, Tensor sequence_id_offset, Tensor attention_mask, int int8_mode) -> Tensor",
      torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(rebuild_padding)));
}

}  // namespace fastertransformer
