// LANES floats in a register, and a thread's memory: what all kernels are written with.
#pragma once
#include <cstdint>
#include <cstdlib>

namespace {

typedef float Vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<Vec*>(to) = value; }
inline Vec relu(Vec value) { return value < 0.0f ? Vec{} : value; }  // NaN stays NaN

inline Vec larger(Vec a, Vec b) { return a > b || a != a ? a : b; }  // NaN wins, as in PyTorch's maxima

// Memory that a thread keeps between calls: asking the system for it anew costs a page fault per 4 KiB.
template <typename T>
struct Scratch {
  T* values = nullptr;
  int64_t size = 0;
  // Null if there is no memory.
  T* at_least(int64_t wanted) {
    if (wanted > size) {
      std::free(values);
      values = static_cast<T*>(std::aligned_alloc(64, (wanted * sizeof(T) + 63) / 64 * 64));
      size = values ? wanted : 0;
    }
    return values;
  }
  ~Scratch() { std::free(values); }
};

}  // namespace
