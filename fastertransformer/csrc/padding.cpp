// Turns padded batches into packed rows and back, by copying whole rows.
#include "padding.h"

#include <ATen/Functions.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include <cstring>

namespace fastertransformer {
namespace {

void check_lengths(const at::Tensor& input, const at::Tensor& lengths) {
  TORCH_CHECK_VALUE(input.dim() == 3, "build_mask_remove_padding: expected input (batch, length, hidden), got shape ",
                    input.sizes());
  TORCH_CHECK_TYPE(lengths.scalar_type() == at::kInt, "build_mask_remove_padding: expected int32 sequence_lengths, ",
                   "got ", lengths.scalar_type());
  TORCH_CHECK_VALUE(lengths.dim() == 1 && lengths.size(0) == input.size(0), "build_mask_remove_padding: expected ",
                    "sequence_lengths of shape [", input.size(0), "] for input of shape ", input.sizes(), ", got ",
                    lengths.sizes());
  TORCH_CHECK_VALUE(lengths.device() == input.device(), "build_mask_remove_padding: expected sequence_lengths on ",
                    input.device(), " like the input, got ", lengths.device());
}

int64_t check_length(int64_t length, int64_t longest, int64_t row) {
  TORCH_CHECK_INDEX(length >= 0 && length <= longest, "build_mask_remove_padding: expected sequence_lengths from 0 to ",
                    longest, ", got ", length, " at position ", row);
  return length;
}

std::vector<at::Tensor> pack_on_cpu(const at::Tensor& input, const at::Tensor& lengths) {
  const int64_t batch = input.size(0), longest = input.size(1);
  const int32_t* length = lengths.const_data_ptr<int32_t>();
  int64_t tokens = 0;
  for (int64_t b = 0; b < batch; ++b) {
    tokens += check_length(length[b], longest, b);
  }
  at::Tensor packed = at::empty({tokens, input.size(2)}, input.options());
  at::Tensor offsets = at::empty({tokens}, lengths.options());
  const size_t row_bytes = input.size(2) * input.element_size();
  const char* from = static_cast<const char*>(input.const_data_ptr());
  char* to = static_cast<char*>(packed.mutable_data_ptr());
  int32_t* offset = offsets.mutable_data_ptr<int32_t>();
  int64_t done = 0;
  for (int64_t b = 0; b < batch; ++b) {
    std::memcpy(to + done * row_bytes, from + b * longest * row_bytes, length[b] * row_bytes);
    for (int64_t i = 0; i < length[b]; ++i, ++done) {
      offset[done] = static_cast<int32_t>(b * longest + i - done);
    }
  }
  return {packed, offsets};
}

std::vector<at::Tensor> pack_on_device(const at::Tensor& input, const at::Tensor& lengths) {
  const int64_t longest = input.size(1);
  const at::Tensor positions = at::arange(longest, lengths.options());
  // nonzero has to wait for the device (the count of tokens is a shape), so the lengths are checked for free.
  const at::Tensor on_host = lengths.cpu();
  for (int64_t b = 0; b < on_host.size(0); ++b) {
    check_length(on_host.const_data_ptr<int32_t>()[b], longest, b);
  }
  const at::Tensor kept = positions.unsqueeze(0).lt(lengths.unsqueeze(1)).flatten().nonzero().squeeze(1);
  const at::Tensor offsets = kept.sub(at::arange(kept.size(0), kept.options())).to(at::kInt);
  return {input.reshape({-1, input.size(2)}).index_select(0, kept), offsets};
}

}  // namespace

std::vector<at::Tensor> build_mask_remove_padding(const at::Tensor& input, const at::Tensor& sequence_lengths) {
  const c10::NoGradGuard no_grad;
  check_lengths(input, sequence_lengths);
  const at::Tensor rows = input.contiguous(), lengths = sequence_lengths.contiguous();
  return rows.is_cpu() ? pack_on_cpu(rows, lengths) : pack_on_device(rows, lengths);
}

at::Tensor rebuild_padding(const at::Tensor& input, const at::Tensor& sequence_id_offset,
                           const at::Tensor& attention_mask, int64_t int8_mode) {
  const c10::NoGradGuard no_grad;
  TORCH_CHECK_NOT_IMPLEMENTED(int8_mode == 0, "rebuild_padding: int8_mode ", int8_mode,
                              " is not supported by this library, only 0");
  TORCH_CHECK_VALUE(input.dim() == 2, "rebuild_padding: expected input (tokens, hidden), got shape ", input.sizes());
  TORCH_CHECK_TYPE(sequence_id_offset.scalar_type() == at::kInt, "rebuild_padding: expected int32 sequence_id_offset, ",
                   "got ", sequence_id_offset.scalar_type());
  TORCH_CHECK_VALUE(sequence_id_offset.dim() == 1 && sequence_id_offset.size(0) == input.size(0), "rebuild_padding: ",
                    "expected sequence_id_offset of shape [", input.size(0), "] for input of shape ", input.sizes(),
                    ", got ", sequence_id_offset.sizes());
  TORCH_CHECK_VALUE(sequence_id_offset.device() == input.device(), "rebuild_padding: expected sequence_id_offset on ",
                    input.device(), " like the input, got ", sequence_id_offset.device());
  TORCH_CHECK_VALUE(attention_mask.dim() == 4, "rebuild_padding: expected an attention_mask ",
                    "(batch, 1, length, length), got shape ", attention_mask.sizes());
  const int64_t batch = attention_mask.size(0), length = attention_mask.size(3), tokens = input.size(0);
  at::Tensor output = at::zeros({batch * length, input.size(1)}, input.options());
  if (input.is_cpu()) {
    const at::Tensor rows = input.contiguous(), offsets = sequence_id_offset.contiguous();
    const size_t row_bytes = rows.size(1) * rows.element_size();
    const char* from = static_cast<const char*>(rows.const_data_ptr());
    char* to = static_cast<char*>(output.mutable_data_ptr());
    const int32_t* offset = offsets.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t place = i + offset[i];
      TORCH_CHECK_INDEX(place >= 0 && place < batch * length, "rebuild_padding: sequence_id_offset ", offset[i],
                        " at position ", i, " points to row ", place, ", outside 0 to ", batch * length - 1,
                        " (a mask of shape ", attention_mask.sizes(), ")");
      std::memcpy(to + place * row_bytes, from + i * row_bytes, row_bytes);
    }
  } else {
    // index_copy_ checks its index on the device itself.
    const at::Tensor place = at::arange(tokens, input.options().dtype(at::kLong)).add(sequence_id_offset);
    output.index_copy_(0, place, input);
  }
  return output.view({batch, length, input.size(1)});
}

}  // namespace fastertransformer
