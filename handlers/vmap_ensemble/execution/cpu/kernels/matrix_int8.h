// Turns rows and a matrix of 8 bits into their product: weights have a scale per output, each row gets one when it
// comes. CPUs with VNNI multiply the 8-bit numbers themselves; others widen a block of weights, as exact and less wide in
// memory than floats.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "matrix.h"
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#include <immintrin.h>
#define INTEGER_PRODUCTS 1
#endif

namespace {

typedef int32_t Ints __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
constexpr int DEEP = 4;  // inputs of an output that lie together
constexpr float MOST = 127.0f;

thread_local Scratch<float> int8_scratch;

struct Int8Matrix {
  const int8_t* weights;  // panels of PANEL outputs, in each DEEP inputs by DEEP inputs, output by output
  const float *scales, *sums, *bias;  // `sums` of an output's weights, as rows are shifted to be positive
  int64_t inputs, outputs;
  int64_t panels() const { return outputs / PANEL; }

  static int64_t floats(int64_t inputs, int64_t outputs) { return inputs * outputs / DEEP + 2 * outputs; }

  // All of it one behind the other; moves `at` behind them.
  static Int8Matrix take(const float*& at, int64_t inputs, int64_t outputs) {
    const int8_t* weights = reinterpret_cast<const int8_t*>(at);
    const float* scales = at + inputs * outputs / DEEP;
    at += floats(inputs, outputs) + outputs;
    return {weights, scales, scales + outputs, scales + 2 * outputs, inputs, outputs};
  }

  static void pack(const int8_t* weight, const float* scales, float* to, int64_t inputs, int64_t outputs) {
    int8_t* packed = reinterpret_cast<int8_t*>(to);
    for (int64_t panel = 0; panel < outputs; panel += PANEL)
      for (int64_t k = 0; k < inputs; k += DEEP)
        for (int64_t n = panel; n < panel + PANEL; n++)
          for (int64_t i = 0; i < DEEP; i++) *packed++ = weight[n * inputs + k + i];
    to += inputs * outputs / DEEP;
    for (int64_t n = 0; n < outputs; n++) {
      to[n] = scales[n];
      int32_t sum = 0;
      for (int64_t k = 0; k < inputs; k++) sum += weight[n * inputs + k];
      to[outputs + n] = sum;
    }
  }
};

// One row in 8 bits, symmetric: whole numbers and what they are multiples of. Not finite: all of it becomes NaN.
template <typename Number>
float round_row(const float* x, int64_t size, Number* to, float shift) {
  Vec most = {};
  for (int64_t i = 0; i < size; i += LANES) {
    const Vec value = load(x + i);
    most = larger(value < 0.0f ? -value : value, most);
  }
  float highest = 0.0f;
  for (int lane = 0; lane < LANES; lane++) highest = most[lane] > highest || most[lane] != most[lane] ? most[lane] : highest;
  const bool finite = highest <= std::numeric_limits<float>::max();
  const float inverse = finite && highest > 0.0f ? MOST / highest : 0.0f;
  const Vec magic = Vec{} + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  for (int64_t i = 0; i < size; i += LANES) {
    const Vec value = finite ? (load(x + i) * inverse + magic) - magic + shift : Vec{} + shift;
    for (int lane = 0; lane < LANES; lane++) to[i + lane] = static_cast<Number>(value[lane]);
  }
  return finite ? highest / MOST : std::numeric_limits<float>::quiet_NaN();
}

#ifdef INTEGER_PRODUCTS
// To each sum DEEP products of positive 8-bit numbers and signed ones.
inline Ints add_products(Ints sum, Ints positive, Ints weights) {
#if defined(__AVX512VNNI__) && LANES == 16
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(positive),
                                                    reinterpret_cast<__m512i>(weights)));
#elif defined(__AVXVNNI__) && LANES == 8
  return reinterpret_cast<Ints>(_mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sum), reinterpret_cast<__m256i>(positive),
                                                        reinterpret_cast<__m256i>(weights)));
#else  // for tests of what is around it
  for (int i = 0; i < DEEP; i++) sum += (positive >> (8 * i) & 0xff) * (weights << (24 - 8 * i) >> 24);
  return sum;
#endif
}

template <int R>
void multiply_tile(const uint8_t* x, const float* x_scales, const Int8Matrix& matrix, int64_t panel, float* y, int64_t y_row) {
  Ints sum[R][COLUMNS] = {};
  const int8_t* w = matrix.weights + panel * PANEL * matrix.inputs;
  for (int64_t k = 0; k < matrix.inputs; k += DEEP) {
    Ints weights[COLUMNS];
    for (int c = 0; c < COLUMNS; c++) {
      weights[c] = *reinterpret_cast<const Ints*>(w + (k * PANEL + c * LANES * DEEP));
      __builtin_prefetch(w + k * PANEL + c * LANES * DEEP + PANEL * matrix.inputs, 0, 2);
    }
    for (int r = 0; r < R; r++) {
      int32_t four;
      std::memcpy(&four, x + r * matrix.inputs + k, sizeof four);
      for (int c = 0; c < COLUMNS; c++) sum[r][c] = add_products(sum[r][c], Ints{} + four, weights[c]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < COLUMNS; c++) {
      const int64_t n = panel * PANEL + c * LANES;
      const Ints shifted = sum[r][c] - 128 * __builtin_convertvector(load(matrix.sums + n), Ints);
      store(y + r * y_row + c * LANES,
            __builtin_convertvector(shifted, Vec) * (x_scales[r] * load(matrix.scales + n)) + load(matrix.bias + n));
    }
}

template <int R = ROWS>
void multiply_rows(int rows, const uint8_t* x, const float* x_scales, const Int8Matrix& matrix, int64_t panel, float* y,
                   int64_t y_row) {
  if constexpr (R > 1)
    if (rows < R) return multiply_rows<R - 1>(rows, x, x_scales, matrix, panel, y, y_row);
  multiply_tile<R>(x, x_scales, matrix, panel, y, y_row);
}

// As for `Matrix`.
bool multiply(const Int8Matrix& matrix, int64_t begin, int64_t end, const float* x, int64_t x_row, int64_t rows, float* y,
              int64_t y_row, const Finish& finish = {}) {
  float* x_scales = int8_scratch.at_least(rows + rows * matrix.inputs / DEEP);
  if (!x_scales) return false;
  uint8_t* whole = reinterpret_cast<uint8_t*>(x_scales + rows);
  for (int64_t r = 0; r < rows; r++)
    x_scales[r] = round_row(x + r * x_row, matrix.inputs, whole + r * matrix.inputs, 128.0f);
  const int64_t tiles = (rows + ROWS - 1) / ROWS;
  for (int64_t panel = begin; panel < end; panel++) {
    float* to = y + (panel - begin) * PANEL;
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t row = tile * rows / tiles, count = (tile + 1) * rows / tiles - row;
      multiply_rows(count, whole + row * matrix.inputs, x_scales + row, matrix, panel, to + row * y_row, y_row);
    }
    finish(to, y_row, rows, (panel - begin) * PANEL);
  }
  return true;
}
#else
// A block of a panel's weights as floats, input by input.
inline void widen(const int8_t* weights, int64_t depth, float* to) {
  for (int64_t k = 0; k < depth; k += DEEP)
    for (int c = 0; c < COLUMNS; c++) {
      const Ints four = *reinterpret_cast<const Ints*>(weights + k * PANEL + c * LANES * DEEP);
      for (int i = 0; i < DEEP; i++)
        store(to + (k + i) * PANEL + c * LANES, __builtin_convertvector(four << (24 - 8 * i) >> 24, Vec));
    }
}

// As for `Matrix`.
bool multiply(const Int8Matrix& matrix, int64_t begin, int64_t end, const float* x, int64_t x_row, int64_t rows, float* y,
              int64_t y_row, const Finish& finish = {}) {
  float* x_scales = int8_scratch.at_least(rows + rows * matrix.inputs + DEPTH * PANEL);
  if (!x_scales) return false;
  float *whole = x_scales + rows, *block = whole + rows * matrix.inputs;
  for (int64_t r = 0; r < rows; r++) x_scales[r] = round_row(x + r * x_row, matrix.inputs, whole + r * matrix.inputs, 0.0f);
  const int64_t tiles = (rows + ROWS - 1) / ROWS;
  for (int64_t panel = begin; panel < end; panel++) {
    float* to = y + (panel - begin) * PANEL;
    for (int64_t first = 0; first < matrix.inputs; first += DEPTH) {
      const int64_t depth = std::min(DEPTH, matrix.inputs - first);
      const int8_t* weights = matrix.weights + (panel * matrix.inputs + first) * PANEL;
      widen(weights, depth, block);
      const float* next = reinterpret_cast<const float*>(weights + depth * PANEL);
      for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t row = tile * rows / tiles, count = (tile + 1) * rows / tiles - row;
        multiply_rows(count, whole + row * matrix.inputs + first, matrix.inputs, block, depth,
                      next + tile * depth * PANEL / DEEP / tiles, PANEL / DEEP / tiles, nullptr, first == 0, to + row * y_row, y_row);
      }
    }
    for (int64_t r = 0; r < rows; r++)
      for (int64_t n = 0; n < PANEL; n += LANES) {
        float* at = to + r * y_row + n;
        store(at, load(at) * (x_scales[r] * load(matrix.scales + panel * PANEL + n)) + load(matrix.bias + panel * PANEL + n));
      }
    finish(to, y_row, rows, (panel - begin) * PANEL);
  }
  return true;
}
#endif

}  // namespace
