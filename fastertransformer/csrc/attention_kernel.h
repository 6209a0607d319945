// What one task of the CPU attention is, and its kernel compiled for three instruction sets.
#pragma once

#include <stdint.h>

namespace fastertransformer {

// One head of one sequence: row t of query, key and value starts `stride` floats after row t - 1.
struct HeadTask {
  const float* query;
  const float* key;
  const float* value;
  float* output;
  int64_t stride;
  int64_t output_stride;
  int64_t length;  // tokens of the sequence
  int64_t size;    // floats of a head
  float scale;
};

// Floats of scratch memory that a task of this length and head size needs.
static inline int64_t count_scratch(int64_t length, int64_t size) {
  const int64_t padded_length = (length + 31) / 32 * 32, padded_size = (size + 31) / 32 * 32;
  return size * padded_length + length * padded_size + 4 * (padded_length + size + padded_size);
}

void attend_head_default(const HeadTask& task, float* scratch);
#if defined(__x86_64__)
void attend_head_avx2(const HeadTask& task, float* scratch);
void attend_head_avx512(const HeadTask& task, float* scratch);
#endif

}  // namespace fastertransformer
