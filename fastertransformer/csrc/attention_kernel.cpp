// Turns query, key and value of one head of one sequence (fp32) into its attention output.
//
// Compiled once per instruction set (build.py passes the flags and FT_KERNEL_NAME); attention.cpp picks one at run
// time. Includes nothing that has inline functions: a template instantiated here with AVX-512 could otherwise be the
// copy the linker keeps for the whole library, and crash elsewhere.
#include "attention_kernel.h"

namespace fastertransformer {
namespace {

// 16 floats: one AVX-512 register, two AVX ones or four SSE ones; the compiler splits it.
typedef float Vec __attribute__((vector_size(64)));
typedef float LooseVec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int IntVec __attribute__((vector_size(64)));

constexpr int64_t kLanes = 16;
constexpr int64_t kRows = 4;
constexpr int64_t kColumns = 2 * kLanes;

inline __attribute__((always_inline)) Vec load(const float* from) {
  return *reinterpret_cast<const LooseVec*>(from);
}

inline __attribute__((always_inline)) void store(float* to, Vec value) {
  *reinterpret_cast<LooseVec*>(to) = value;
}

// e^x for x <= 0, relative error below 2e-7: 2^n times a polynomial on [-ln2/2, ln2/2].
inline __attribute__((always_inline)) Vec exp_nonpositive(Vec x) {
  const Vec lowest = Vec{} - 87.0f;
  x = x < lowest ? lowest : x;  // in this order a NaN stays one
  const Vec magic = Vec{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vec n = (x * 1.44269504088896341f + magic) - magic;
  Vec r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec p = Vec{} + 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const IntVec exponent = (__builtin_convertvector(n, IntVec) + 127) << 23;
  return p * reinterpret_cast<const Vec&>(exponent);
}

// scores[r][j] = sum_d queries[r][d] * transposed_keys[d][j], four rows and 32 columns at a time.
inline __attribute__((always_inline)) void score_rows(const float* queries, const float* transposed_keys,
                                                      int64_t padded_length, int64_t size, float* scores) {
  for (int64_t j = 0; j < padded_length; j += kColumns) {
    Vec sum[kRows][2] = {};
    for (int64_t d = 0; d < size; ++d) {
      const Vec left = load(transposed_keys + d * padded_length + j);
      const Vec right = load(transposed_keys + d * padded_length + j + kLanes);
      for (int64_t r = 0; r < kRows; ++r) {
        const float query = queries[r * size + d];
        sum[r][0] += query * left;
        sum[r][1] += query * right;
      }
    }
    for (int64_t r = 0; r < kRows; ++r) {
      store(scores + r * padded_length + j, sum[r][0]);
      store(scores + r * padded_length + j + kLanes, sum[r][1]);
    }
  }
}

// Replaces one row of scores by unnormalised probabilities and returns the reciprocal of their sum.
inline __attribute__((always_inline)) float soften(float* row, int64_t length, int64_t padded_length) {
  for (int64_t j = length; j < padded_length; ++j) {
    row[j] = -3.0e38f;
  }
  Vec highest = load(row);
  for (int64_t j = kLanes; j < padded_length; j += kLanes) {
    const Vec value = load(row + j);
    highest = value > highest ? value : highest;
  }
  float maximum = highest[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) {
    maximum = highest[lane] > maximum ? highest[lane] : maximum;
  }
  Vec total = {};
  for (int64_t j = 0; j < padded_length; j += kLanes) {
    const Vec value = exp_nonpositive(load(row + j) - maximum);
    store(row + j, value);
    total += value;
  }
  // The padded columns are at most 31 times e^-87: nothing beside the maximum's own 1.
  float sum = 0.0f;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    sum += total[lane];
  }
  return 1.0f / sum;
}

// mixed[r][d] = sum_j weights[r][j] * values[j][d], four rows and 32 columns at a time.
inline __attribute__((always_inline)) void mix_rows(const float* weights, const float* values, int64_t length,
                                                    int64_t padded_length, int64_t padded_size, float* mixed) {
  for (int64_t d = 0; d < padded_size; d += kColumns) {
    Vec sum[kRows][2] = {};
    for (int64_t j = 0; j < length; ++j) {
      const Vec left = load(values + j * padded_size + d);
      const Vec right = load(values + j * padded_size + d + kLanes);
      for (int64_t r = 0; r < kRows; ++r) {
        const float weight = weights[r * padded_length + j];
        sum[r][0] += weight * left;
        sum[r][1] += weight * right;
      }
    }
    for (int64_t r = 0; r < kRows; ++r) {
      store(mixed + r * padded_size + d, sum[r][0]);
      store(mixed + r * padded_size + d + kLanes, sum[r][1]);
    }
  }
}

inline int64_t round_up(int64_t value) { return (value + kColumns - 1) / kColumns * kColumns; }

}  // namespace

void FT_KERNEL_NAME(const HeadTask& task, float* scratch) {
  const int64_t length = task.length, size = task.size;
  const int64_t padded_length = round_up(length), padded_size = round_up(size);
  float* transposed_keys = scratch;
  float* values = transposed_keys + size * padded_length;
  float* scores = values + length * padded_size;
  float* queries = scores + kRows * padded_length;
  float* mixed = queries + kRows * size;

  for (int64_t j = 0; j < length; ++j) {
    for (int64_t d = 0; d < size; ++d) {
      transposed_keys[d * padded_length + j] = task.key[j * task.stride + d];
      values[j * padded_size + d] = task.value[j * task.stride + d];
    }
    for (int64_t d = size; d < padded_size; ++d) {
      values[j * padded_size + d] = 0.0f;
    }
  }
  for (int64_t d = 0; d < size; ++d) {
    for (int64_t j = length; j < padded_length; ++j) {
      transposed_keys[d * padded_length + j] = 0.0f;
    }
  }
  for (int64_t first = 0; first < length; first += kRows) {
    const int64_t rows = length - first < kRows ? length - first : kRows;
    for (int64_t r = 0; r < kRows; ++r) {
      const float* query = task.query + (first + (r < rows ? r : 0)) * task.stride;
      for (int64_t d = 0; d < size; ++d) {
        queries[r * size + d] = query[d] * task.scale;
      }
    }
    score_rows(queries, transposed_keys, padded_length, size, scores);
    float reciprocals[kRows];
    for (int64_t r = 0; r < kRows; ++r) {
      reciprocals[r] = soften(scores + r * padded_length, length, padded_length);
    }
    mix_rows(scores, values, length, padded_length, padded_size, mixed);
    for (int64_t r = 0; r < rows; ++r) {
      float* output = task.output + (first + r) * task.output_stride;
      for (int64_t d = 0; d < size; ++d) {
        output[d] = mixed[r * padded_size + d] * reciprocals[r];
      }
    }
  }
}

}  // namespace fastertransformer
