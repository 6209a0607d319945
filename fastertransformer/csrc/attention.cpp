// Turns fused query-key-value rows into attention outputs, on a CPU and, through ATen, on CUDA.
#include "attention.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/_efficient_attention_forward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "attention_kernel.h"

namespace fastertransformer {
namespace {

using Kernel = void (*)(const HeadTask&, float*);

// ATen's own choice of instruction set, so that ATEN_CPU_CAPABILITY governs this kernel too.
Kernel choose_kernel() {
#if defined(__x86_64__)
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") {
    return attend_head_avx512;
  }
  if (capability == "AVX2") {
    return attend_head_avx2;
  }
#endif
  return attend_head_default;
}

double scale_of(HeadShape head) { return 1.0 / std::sqrt(static_cast<double>(head.size)); }

int64_t find_longest(const std::vector<Span>& spans) {
  int64_t longest = 0;
  for (const Span& span : spans) {
    longest = std::max(longest, span.length);
  }
  return longest;
}

// Heads are the outer axis of the tasks: each thread then gets some heads of every sequence, and one long sequence
// among short ones doesn't leave the other threads idle.
void attend_float(const float* qkv, float* output, const std::vector<Span>& spans, HeadShape head) {
  static const Kernel kernel = choose_kernel();
  const int64_t hidden = head.heads * head.size, count = static_cast<int64_t>(spans.size());
  const int64_t scratch_floats = count_scratch(find_longest(spans), head.size);
  at::parallel_for(0, head.heads * count, 1, [&](int64_t begin, int64_t end) {
    // One vector per thread for the library's life: it grows to the longest sequence seen.
    thread_local std::vector<float> scratch;
    if (static_cast<int64_t>(scratch.size()) < scratch_floats) {
      scratch.resize(scratch_floats);
    }
    for (int64_t task = begin; task < end; ++task) {
      const Span& span = spans[task % count];
      const float* query = qkv + span.begin * 3 * hidden + task / count * head.size;
      const HeadTask one{query,      query + hidden, query + 2 * hidden,
                         output + span.begin * hidden + task / count * head.size,
                         3 * hidden, hidden,         span.length,
                         head.size,  static_cast<float>(scale_of(head))};
      kernel(one, scratch.data());
    }
  });
}

}  // namespace

at::Tensor attend_spans_cpu(const at::Tensor& qkv, const std::vector<Span>& spans, HeadShape head) {
  const at::Tensor input = qkv.to(at::kFloat).contiguous();
  int64_t covered = 0;
  for (const Span& span : spans) {
    covered += span.length;
  }
  const std::vector<int64_t> shape{input.size(0), head.heads * head.size};
  const bool all_rows = covered == input.size(0);
  at::Tensor output = all_rows ? at::empty(shape, input.options()) : at::zeros(shape, input.options());
  if (covered > 0) {
    attend_float(input.const_data_ptr<float>(), output.mutable_data_ptr<float>(), spans, head);
  }
  return output.to(qkv.scalar_type());
}

bool has_flash(const at::Tensor& like, HeadShape head) {
  if (!like.is_cuda() || like.scalar_type() == at::kFloat || head.size % 8 != 0 || head.size > 256) {
    return false;
  }
  // Flash is 1 and cuDNN 3 among PyTorch's choices; cuDNN's is preferred only where flash runs as well.
  const at::Tensor probe = at::empty({1, head.heads, 8, head.size}, like.options());
  const int64_t choice = at::_fused_sdp_choice(probe, probe, probe);
  return choice == 1 || choice == 3;
}

at::Tensor attend_spans_cuda(const at::Tensor& qkv, const at::Tensor& offsets, int64_t longest, HeadShape head,
                             bool flash) {
  const at::Tensor parts = qkv.view({qkv.size(0), 3, head.heads, head.size});
  const at::Tensor query = parts.select(1, 0), key = parts.select(1, 1), value = parts.select(1, 2);
  if (flash) {
    const at::Tensor output = std::get<0>(at::_flash_attention_forward(
        query, key, value, offsets, offsets, longest, longest, /*dropout_p=*/0.0, /*is_causal=*/false,
        /*return_debug_mask=*/false, scale_of(head)));
    return output.reshape({qkv.size(0), head.heads * head.size});
  }
  const at::Tensor output = std::get<0>(at::_efficient_attention_forward(
      query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), /*bias=*/std::nullopt, offsets, offsets, longest,
      longest, /*dropout_p=*/0.0, /*custom_mask_type=*/0, /*compute_log_sumexp=*/false, scale_of(head)));
  return output.reshape({qkv.size(0), head.heads * head.size});
}

at::Tensor attend_masked(const at::Tensor& qkv, const at::Tensor& mask, HeadShape head) {
  const int64_t batch = qkv.size(0), length = qkv.size(1);
  const at::Tensor parts = qkv.view({batch, length, 3, head.heads, head.size}).permute({2, 0, 3, 1, 4});
  // -10000 as in the interface: exp of it is 0 in every dtype, and a row without a valid column stays finite.
  const at::Tensor bias = mask.to(qkv.scalar_type()).sub(1.0).mul(10000.0);
  const at::Tensor output = at::scaled_dot_product_attention(parts.select(0, 0), parts.select(0, 1),
                                                             parts.select(0, 2), bias, 0.0, false, scale_of(head));
  return output.transpose(1, 2).reshape({batch, length, head.heads * head.size});
}

}  // namespace fastertransformer
