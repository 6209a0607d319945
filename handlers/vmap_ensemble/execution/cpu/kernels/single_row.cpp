// Turns one row per member and the members' matrices into products, reading only those rows of a matrix whose input
// isn't 0. Behind a relu most inputs are: of a trained MNIST network 85 %. Memory is the limit of a single row, so
// what isn't read is what is won.
#include <algorithm>
#include <cstring>

#include "vector.h"

namespace {

typedef uint16_t Half __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));

constexpr int MOST_VECTORS = 8;  // sums in registers
constexpr int AHEAD = 32;        // rows between a prefetch and its use: the CPU's own is late, even where rows follow on

struct Bfloat16 {
  uint16_t bits;
};

inline float widen(float value) { return value; }
inline float widen(Bfloat16 value) {
  uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
inline Vec load(const Bfloat16* from) {
  return reinterpret_cast<Vec>(__builtin_convertvector(*reinterpret_cast<const Half*>(from), Bits) << 16);
}
inline void store(Bfloat16* to, Vec value) {  // to the nearest, ties to even; NaN stays NaN
  Bits bits = reinterpret_cast<Bits>(value);
  bits = value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : bits >> 16 | 0x40;
  *reinterpret_cast<Half*>(to) = __builtin_convertvector(bits, Half);
}

struct Input {
  float value;
  int32_t index;
};
thread_local Scratch<Input> scratch;

template <typename T>
struct Product {
  const T *x, *weights, *bias;
  T* y;
  int64_t columns, filters;
  bool relu;

  // A row that will be needed is on its way to the cache; where it lies beyond the weights, nothing happens.
  template <int C>
  static void fetch(const T* row) {
    for (int64_t byte = 0; byte < C * LANES * int64_t(sizeof(T)); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(row) + byte);
  }

  template <int C>
  static void add(Vec* sums, float input, const T* row) {
    for (int c = 0; c < C; c++) sums[c] += input * load(row + c * LANES);
  }

  // Sums of C vectors of filters over the listed inputs, or over all in order.
  template <int C>
  void sum(const T* x, const Input* inputs, int64_t count, const T* weights, const T* bias, T* y) const {
    Vec sums[C] = {};
    if (inputs)
      for (int64_t i = 0; i < count; i++) {
        fetch<C>(weights + inputs[std::min(i + AHEAD, count - 1)].index * (C * LANES));
        add<C>(sums, inputs[i].value, weights + inputs[i].index * (C * LANES));
      }
    else
      for (int64_t i = 0; i < columns; i++) {
        fetch<C>(weights + (i + AHEAD) * (C * LANES));
        add<C>(sums, widen(x[i]), weights + i * (C * LANES));
      }
    for (int c = 0; c < C; c++) {
      Vec value = sums[c] + (bias ? load(bias + c * LANES) : Vec{});
      store(y + c * LANES, relu ? ::relu(value) : value);
    }
  }

  template <int C>
  void sum_columns(int vectors, const T* x, const Input* inputs, int64_t count, const T* weights, const T* bias, T* y) const {
    if constexpr (C > 1)
      if (vectors < C) return sum_columns<C - 1>(vectors, x, inputs, count, weights, bias, y);
    sum<C>(x, inputs, count, weights, bias, y);
  }

  // One member's filters from `first` on.
  bool run(int64_t member, int64_t first) const {
    const T* own = x + member * columns;
    Input* inputs = scratch.at_least(columns);
    if (!inputs) return false;
    int64_t count = 0;
    for (int64_t i = 0; i < columns; i++) {
      inputs[count] = {widen(own[i]), static_cast<int32_t>(i)};
      count += inputs[count].value != 0.0f;
    }
    if (2 * count > columns) inputs = nullptr;  // leaving rows out would save less than reading in order does
    const int vectors = std::min<int64_t>(MOST_VECTORS, (filters - first) / LANES);
    const int64_t at = member * filters + first;
    sum_columns<MOST_VECTORS>(vectors, own, inputs, count, weights + at * columns, bias ? bias + at : nullptr, y + at);
    return true;
  }
};

template <typename T>
int multiply(const void* x, const void* weights, const void* bias, void* y, const int64_t* sizes, int relu, int threads) {
  const int64_t members = sizes[0], filters = sizes[2], panel = MOST_VECTORS * LANES;
  const int64_t panels = (filters + panel - 1) / panel;
  Product<T> product{static_cast<const T*>(x), static_cast<const T*>(weights), static_cast<const T*>(bias),
                     static_cast<T*>(y), sizes[1], filters, relu != 0};
  bool enough = true;
#pragma omp parallel for num_threads(threads) if (threads > 1) reduction(&& : enough)
  for (int64_t job = 0; job < members * panels; job++)
    enough = product.run(job / panels, job % panels * panel) && enough;
  return enough;
}

}  // namespace

extern "C" {

int single_row_panel() { return MOST_VECTORS * LANES; }

// (members, columns) x (members, panels, columns, up to a panel of filters) -> (members, filters); `sizes` are members,
// columns and filters, a multiple of LANES. All tensors are bfloat16 or all float32. 0 if there is no memory.
int single_row_multiply(int is_bfloat16, const void* x, const void* weights, const void* bias, void* y,
                        const int64_t* sizes, int relu, int threads) {
  return is_bfloat16 ? multiply<Bfloat16>(x, weights, bias, y, sizes, relu, threads)
                     : multiply<float>(x, weights, bias, y, sizes, relu, threads);
}
}
