// What csrc/cuda/device.h has as instructions of the GPU, as functions on the CPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda_runtime_api.h"

using std::isfinite;
using std::isnan;
using std::max;
using std::min;
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

namespace emulation {
void check_aligned(const void* pointer, size_t bytes);
}

template <class T>
T __ldg(const T* pointer) {
  emulation::check_aligned(pointer, sizeof(T));
  return *pointer;
}

// Streaming hides the latency of memory on a GPU; nothing to emulate.
template <class T>
T __ldcs(const T* pointer) {
  return __ldg(pointer);
}
template <class T>
void __stcs(T* pointer, T value) {
  emulation::check_aligned(pointer, sizeof(T));
  *pointer = value;
}

namespace gplws::cuda {
struct Bfloat16;
struct Float16;
struct MatrixA;
}  // namespace gplws::cuda

namespace emulation {

unsigned char* shared_memory();
// A product of one warp; `inner` is 16 or 8. Collective: all lanes of a warp meet in it.
void multiply_add(const uint32_t* a, const uint32_t* b, int inner, bool bfloat16, float (&sums)[4]);
// Rows of 8 x 8 matrices from shared memory, collective as well.
void load_matrices(const void* row, int count, uint32_t* words);
void copy_async(void* shared, const void* source, int bytes, bool inside);
void commit_copies();
void wait_for_copies(int pending);
float float_of(uint16_t bits, bool bfloat16);
uint16_t bits_of(float value, bool bfloat16);

}  // namespace emulation

// The functions themselves need the types of csrc/cuda/device.h, which includes this file first.
#define GPLWS_EMULATED_DEVICE_FUNCTIONS                                                       \
  inline float to_float(float value) { return value; }                                        \
  inline float to_float(Bfloat16 value) { return emulation::float_of(value.bits, true); }     \
  inline float to_float(Float16 value) { return emulation::float_of(value.bits, false); }     \
  template <class T>                                                                          \
  T from_float(float value);                                                                  \
  template <>                                                                                 \
  inline float from_float<float>(float value) {                                               \
    return value;                                                                             \
  }                                                                                           \
  template <>                                                                                 \
  inline Bfloat16 from_float<Bfloat16>(float value) {                                         \
    return {emulation::bits_of(value, true)};                                                 \
  }                                                                                           \
  template <>                                                                                 \
  inline Float16 from_float<Float16>(float value) {                                           \
    return {emulation::bits_of(value, false)};                                                \
  }                                                                                           \
  inline unsigned char* dynamic_shared_memory() { return emulation::shared_memory(); }        \
  inline float4 reload_four(const float* shared) {                                            \
    return __ldg(reinterpret_cast<const float4*>(shared));                                    \
  }                                                                                           \
  inline MatrixA load_four_matrices(const void* row) {                                        \
    MatrixA a;                                                                                \
    emulation::load_matrices(row, 4, a.words);                                                \
    return a;                                                                                 \
  }                                                                                           \
  inline MatrixA load_two_matrices(const void* row) {                                         \
    MatrixA a{};                                                                              \
    emulation::load_matrices(row, 2, a.words);                                                \
    return a;                                                                                 \
  }                                                                                           \
  template <class T>                                                                          \
  void multiply_add_16(T, const MatrixA& a, uint2 b, float (&sums)[4]) {                      \
    const uint32_t words[2] = {b.x, b.y};                                                     \
    emulation::multiply_add(a.words, words, 16, std::is_same_v<T, Bfloat16>, sums);           \
  }                                                                                           \
  template <class T>                                                                          \
  void multiply_16(T, const MatrixA& a, uint2 b, const float (&sums)[4], float (&products)[4]) {\
    for (int i = 0; i < 4; ++i) products[i] = sums[i];                                        \
    multiply_add_16(T{}, a, b, products);                                                     \
  }                                                                                           \
  template <class T>                                                                          \
  void multiply_add_8(T, const MatrixA& a, uint32_t b, float (&sums)[4]) {                    \
    emulation::multiply_add(a.words, &b, 8, std::is_same_v<T, Bfloat16>, sums);               \
  }                                                                                           \
  inline void let_next_kernel_start() {}                                                      \
  inline void wait_for_kernel_before() {}                                                     \
  template <class T>                                                                          \
  uint32_t pack_two_relu(float first, float second) {                                         \
    const float a = first < 0.0f ? 0.0f : first, b = second < 0.0f ? 0.0f : second;           \
    return static_cast<uint32_t>(from_float<T>(a).bits) |                                     \
           static_cast<uint32_t>(from_float<T>(b).bits) << 16;                                \
  }                                                                                           \
  template <int kBytes>                                                                       \
  void copy_async(void* shared, const void* source, bool inside) {                            \
    emulation::copy_async(shared, source, kBytes, inside);                                    \
  }                                                                                           \
  template <int kBytes, bool kCached = true>                                                  \
  void copy_async_if(bool exists, void* shared, const void* source, unsigned inside) {        \
    if (exists) emulation::copy_async(shared, source, kBytes, inside != 0);                   \
  }                                                                                           \
  inline void commit_copies() { emulation::commit_copies(); }                                 \
  template <int kPending>                                                                     \
  void wait_for_copies() {                                                                    \
    emulation::wait_for_copies(kPending);                                                     \
  }
