// Turns rows and a matrix, packed in the order in which it is read, into their product with what follows it.
#pragma once
#include <algorithm>

#include "vector.h"

namespace {

// Sums that are held in registers: ROWS rows by COLUMNS vectors of outputs.
constexpr int ROWS = LANES == 16 ? 14 : 6, COLUMNS = 2, PANEL = COLUMNS * LANES;
constexpr int64_t DEPTH = 256;  // inputs of a block of weights, which stays in the cache nearest to the core
constexpr int FLOATS_PER_LINE = 16;

enum Activation { NONE, RELU, GELU, GELU_TANH };

// exp(x), relative error below 3e-7, for x <= 88: 2^n times a polynomial on [-ln2/2, ln2/2]. Below -87 it is e^-87.
inline Vec exponential(Vec x) {
  typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
  const Vec lowest = Vec{} - 87.0f, magic = Vec{} + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  x = x < lowest ? lowest : x;                                    // in this order NaN stays NaN
  const Vec n = (x * 1.44269504088896341f + magic) - magic;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln2 in two parts, of which the first is exact
  Vec p = Vec{} + 1.0f / 5040;
  for (float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + coefficient;
  return p * reinterpret_cast<Vec>((__builtin_convertvector(n, Ints) + 127) << 23);
}

// x * P(X <= x), X normal: by Abramowitz and Stegun 7.1.26, absolute error below 2e-7.
inline Vec gelu(Vec x) {
  const Vec z = x * 0.70710678118654752f, size = z < 0.0f ? -z : z;
  const Vec t = 1.0f / (1.0f + 0.3275911f * size);
  Vec p = Vec{} + 1.061405429f;
  for (float coefficient : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = p * t + coefficient;
  const Vec half_tail = 0.5f * p * t * exponential(-z * z);
  return x * (x < 0.0f ? half_tail : 1.0f - half_tail);
}

inline Vec gelu_tanh(Vec x) {
  const Vec twice = -1.5957691216057308f * (x + 0.044715f * x * x * x), most = Vec{} + 87.0f;
  return x / (1.0f + exponential(twice > most ? most : twice));
}

inline Vec activate(Vec x, Activation activation) {
  switch (activation) {
    case RELU: return relu(x);
    case GELU: return gelu(x);
    case GELU_TANH: return gelu_tanh(x);
    default: return x;
  }
}

// (rows, inputs) times a matrix that `pack_matrix` made, plus a bias (null: none).
struct Matrix {
  const float *weights, *bias;
  int64_t inputs, outputs;
  int64_t panels() const { return outputs / PANEL; }

  // Weights and biases one behind the other; moves `at` behind them.
  static Matrix take(const float*& at, int64_t inputs, int64_t outputs) {
    const float* weights = at;
    at += (inputs + 1) * outputs;
    return {weights, at - outputs, inputs, outputs};
  }
};

// Blocks of DEPTH inputs, in each panels of PANEL outputs, in each input by input. Outputs beyond `outputs` are 0.
template <typename Element>
void pack_matrix(int64_t inputs, int64_t outputs, Element element, float* to) {
  for (int64_t first = 0; first < inputs; first += DEPTH)
    for (int64_t panel = 0; panel < outputs; panel += PANEL)
      for (int64_t k = first; k < std::min(inputs, first + DEPTH); k++)
        for (int64_t n = panel; n < panel + PANEL; n++) *to++ = n < outputs ? element(k, n) : 0.0f;
}

// R rows of a panel: y = (from, or what is in y) + x w. Weights that will be wanted next are asked for on the way.
template <int R>
void multiply_tile(const float* x, int64_t x_row, const float* w, int64_t depth, const float* next, int64_t next_step,
                   const float* bias, bool begins, float* y, int64_t y_row) {
  Vec sum[R][COLUMNS];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < COLUMNS; c++)
      sum[r][c] = !begins ? load(y + r * y_row + c * LANES) : bias ? load(bias + c * LANES) : Vec{};
  for (int64_t k = 0; k < depth; k++) {
    for (int line = 0; line < PANEL; line += FLOATS_PER_LINE) __builtin_prefetch(next + k * next_step + line, 0, 2);
    const Vec left = load(w + k * PANEL), right = load(w + k * PANEL + LANES);
    for (int r = 0; r < R; r++) {
      sum[r][0] += x[r * x_row + k] * left;
      sum[r][1] += x[r * x_row + k] * right;
    }
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < COLUMNS; c++) store(y + r * y_row + c * LANES, sum[r][c]);
}

template <int R = ROWS>
void multiply_rows(int rows, const float* x, int64_t x_row, const float* w, int64_t depth, const float* next,
                   int64_t next_step, const float* bias, bool begins, float* y, int64_t y_row) {
  if constexpr (R > 1)
    if (rows < R) return multiply_rows<R - 1>(rows, x, x_row, w, depth, next, next_step, bias, begins, y, y_row);
  multiply_tile<R>(x, x_row, w, depth, next, next_step, bias, begins, y, y_row);
}

// What happens to a product of which all inputs are summed: an activation, or other rows added (null: none).
struct Finish {
  Activation activation = NONE;
  const float* other = nullptr;
  int64_t other_row = 0;

  void operator()(float* y, int64_t y_row, int64_t rows, int64_t column) const {
    if (activation == NONE && !other) return;
    for (int64_t r = 0; r < rows; r++)
      for (int64_t n = 0; n < PANEL; n += LANES) {
        float* at = y + r * y_row + n;
        store(at, activate(load(at), activation) + (other ? load(other + r * other_row + column + n) : Vec{}));
      }
  }
};

// Panels [begin, end) of the product; column n of the matrix goes to column n - begin * PANEL of y. False: no memory.
bool multiply(const Matrix& matrix, int64_t begin, int64_t end, const float* x, int64_t x_row, int64_t rows, float* y,
              int64_t y_row, const Finish& finish = {}) {
  const int64_t tiles = (rows + ROWS - 1) / ROWS;
  for (int64_t first = 0; first < matrix.inputs; first += DEPTH) {
    const int64_t depth = std::min(DEPTH, matrix.inputs - first);
    const float* block = matrix.weights + first * matrix.panels() * PANEL;
    for (int64_t panel = begin; panel < end; panel++) {
      const float *w = block + panel * depth * PANEL, *next = w + depth * PANEL;
      float* to = y + (panel - begin) * PANEL;
      for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t row = tile * rows / tiles, count = (tile + 1) * rows / tiles - row;
        multiply_rows(count, x + row * x_row + first, x_row, w, depth, next + tile * depth * PANEL / tiles, PANEL / tiles,
                      matrix.bias ? matrix.bias + panel * PANEL : nullptr, first == 0, to + row * y_row, y_row);
      }
      if (first + depth == matrix.inputs) finish(to, y_row, rows, (panel - begin) * PANEL);
    }
  }
  return true;
}

}  // namespace
