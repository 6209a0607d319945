// Attention over packed tokens: every span of rows attends to itself alone.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace fastertransformer {

// Rows [begin, begin + length) of the packed tokens are one sequence.
struct Span {
  int64_t begin;
  int64_t length;
};

struct HeadShape {
  int64_t heads;
  int64_t size;
};

// qkv: (T, 3 * heads * size), the three projections side by side; returns (T, heads * size). Rows outside all spans
// become zero.
at::Tensor attend_spans_cpu(const at::Tensor& qkv, const std::vector<Span>& spans, HeadShape head);

// The same on CUDA through PyTorch's variable-length kernels. offsets: int32 (spans + 1) on the device; longest: an
// upper bound of the spans' lengths, known without asking the device.
at::Tensor attend_spans_cuda(const at::Tensor& qkv, const at::Tensor& offsets, int64_t longest, HeadShape head,
                             bool flash);

// Whether this device has flash attention for such heads (fp16 or bf16, compute capability 8.0 or higher).
bool has_flash(const at::Tensor& like, HeadShape head);

// qkv: (B, S, 3 * heads * size); mask: (B, 1, S, S), 1 where a row may look at a column. Any device.
at::Tensor attend_masked(const at::Tensor& qkv, const at::Tensor& mask, HeadShape head);

}  // namespace fastertransformer
