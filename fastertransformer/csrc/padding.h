// Removes the padding of a batch, and puts it back.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace fastertransformer {

// input (B, S, H), sequence_lengths int32 (B) -> packed rows (T, H), and int32 (T): how many padding rows of the
// batch lie before each.
std::vector<at::Tensor> build_mask_remove_padding(const at::Tensor& input, const at::Tensor& sequence_lengths);

// input (T, H), sequence_id_offset int32 (T), attention_mask (B, 1, S, S) -> (B, S, H), zero where padding was.
at::Tensor rebuild_padding(const at::Tensor& input, const at::Tensor& sequence_id_offset,
                           const at::Tensor& attention_mask, int64_t int8_mode);

}  // namespace fastertransformer
