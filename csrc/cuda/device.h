// The few instructions that the kernels need beyond CUDA C++: matrix products on tensor cores,
// loads of their operands, asynchronous copies, 16-bit floats. tests/cuda_emulation puts functions
// of the same names in their place and runs the kernels on the CPU.
#pragma once

#ifdef GPLWS_CUDA_EMULATION
#include "emulated_device.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace gplws::cuda {

constexpr int kLanesPerWarp = 32;

// 16-bit floats as they lie in memory.
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Four registers of a lane: 16 x 16 values of an operand, or 16 x 8 sums, over a warp.
struct MatrixA {
  uint32_t words[4];
};

#ifdef GPLWS_CUDA_EMULATION
GPLWS_EMULATED_DEVICE_FUNCTIONS
#else

// Older devices have neither these products nor, therefore, the half-precision kernels: the
// launcher asks.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define GPLWS_HAS_TENSOR_KERNELS 1
#else
#define GPLWS_HAS_TENSOR_KERNELS 0
#endif

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(Bfloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
__device__ inline float to_float(Float16 value) {
  return __half2float(__ushort_as_half(value.bits));
}

template <class T>
__device__ T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline Bfloat16 from_float<Bfloat16>(float value) {
  // __bfloat16_as_ushort() has no code for devices before 8.0 in CUDA 12.0 and 12.1.
  return {static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(value)).x};
}
template <>
__device__ inline Float16 from_float<Float16>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}

// Shared memory of the block, as many bytes as its launch asked for.
__device__ inline unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(16) unsigned char gplws_dynamic_shared_memory[];
  return gplws_dynamic_shared_memory;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four aligned floats from shared memory, read each time: a plain load that is the same in each
// turn of a loop goes to registers, and out of them to the stack if they are too few.
__device__ inline float4 reload_four(const float* shared) {
  float4 four;
  asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(four.x), "=f"(four.y), "=f"(four.z), "=f"(four.w)
               : "r"(shared_address(shared)));
  return four;
}

#if GPLWS_HAS_TENSOR_KERNELS

// Loads 8 x 8 matrices of 16-bit values from shared memory: lanes 8 i .. 8 i + 7 name the rows, 16
// aligned bytes each, of matrix i. Lane l then holds values 2 (l % 4) and 2 (l % 4) + 1 of row l /
// 4 of each.
__device__ inline MatrixA load_four_matrices(const void* row) {
  MatrixA a;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a.words[0]), "=r"(a.words[1]), "=r"(a.words[2]), "=r"(a.words[3])
               : "r"(shared_address(row))
               : "memory");
  return a;
}

// The first two of the four; lanes 16 to 31 name no rows.
__device__ inline MatrixA load_two_matrices(const void* row) {
  MatrixA a{};
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(a.words[0]), "=r"(a.words[1])
               : "r"(shared_address(row))
               : "memory");
  return a;
}

// products (16 x 8) = a (16 x 16) b (16 x 8) + sums, in float32.
__device__ inline void multiply_16(Bfloat16, const MatrixA& a, uint2 b, const float (&sums)[4],
                                   float (&products)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};"
      : "=f"(products[0]), "=f"(products[1]), "=f"(products[2]), "=f"(products[3])
      : "r"(a.words[0]), "r"(a.words[1]), "r"(a.words[2]), "r"(a.words[3]), "r"(b.x), "r"(b.y),
        "f"(sums[0]), "f"(sums[1]), "f"(sums[2]), "f"(sums[3]));
}
__device__ inline void multiply_16(Float16, const MatrixA& a, uint2 b, const float (&sums)[4],
                                   float (&products)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};"
      : "=f"(products[0]), "=f"(products[1]), "=f"(products[2]), "=f"(products[3])
      : "r"(a.words[0]), "r"(a.words[1]), "r"(a.words[2]), "r"(a.words[3]), "r"(b.x), "r"(b.y),
        "f"(sums[0]), "f"(sums[1]), "f"(sums[2]), "f"(sums[3]));
}

// sums += a b.
template <class T>
__device__ void multiply_add_16(T type, const MatrixA& a, uint2 b, float (&sums)[4]) {
  multiply_16(type, a, b, sums, sums);
}

// The same with a (16 x 8), its first two registers, and b (8 x 8).
__device__ inline void multiply_add_8(Bfloat16, const MatrixA& a, uint32_t b, float (&sums)[4]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a.words[0]), "r"(a.words[1]), "r"(b));
}
__device__ inline void multiply_add_8(Float16, const MatrixA& a, uint32_t b, float (&sums)[4]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a.words[0]), "r"(a.words[1]), "r"(b));
}

// Two values in one register, the first in its low half, and what is negative becomes zero; NaN
// stays.
template <class T>
__device__ inline uint32_t pack_two_relu(float first, float second) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, Bfloat16>) {
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  }
  return packed;
}

// Copies kBytes (4, 8 or 16, aligned) from global to shared memory behind the back of the thread;
// zeros where `inside` is false, and `source` is then not read: it may point anywhere.
template <int kBytes>
__device__ inline void copy_async(void* shared, const void* source, bool inside) {
  const int bytes = inside ? kBytes : 0;
  if constexpr (kBytes == 16) {  // past the L1 cache: it is read once
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(source), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(source), "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}

// The same where `exists`, without a branch. `inside`: not zero.
template <int kBytes>
__device__ inline void copy_async_if(bool exists, void* shared, const void* source,
                                     unsigned inside) {
  if constexpr (kBytes == 16) {
    asm volatile(
        "{ .reg .pred exists, outside; setp.ne.b32 exists, %2, 0; setp.eq.b32 outside, %3, 0;\n"
        "@exists cp.async.cg.shared.global [%0], [%1], 16, outside; }" ::"r"(
            shared_address(shared)),
        "l"(source), "r"(static_cast<int>(exists)), "r"(inside)
        : "memory");
  } else {
    asm volatile(
        "{ .reg .pred exists, outside; setp.ne.b32 exists, %2, 0; setp.eq.b32 outside, %3, 0;\n"
        "@exists cp.async.ca.shared.global [%0], [%1], %4, outside; }" ::"r"(
            shared_address(shared)),
        "l"(source), "r"(static_cast<int>(exists)), "r"(inside), "n"(kBytes)
        : "memory");
  }
}

// Ends a batch of copies of this thread.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the last kPending batches of this thread have arrived.
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#else

// Older devices have no such copies: they are done at once.
template <int kBytes>
__device__ inline void copy_async(void* shared, const void* source, bool inside) {
  using Piece =
      std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, uint32_t> >;
  *static_cast<Piece*>(shared) = inside ? *static_cast<const Piece*>(source) : Piece{};
}
__device__ inline void commit_copies() {}
template <int kPending>
__device__ inline void wait_for_copies() {}

#endif  // GPLWS_HAS_TENSOR_KERNELS

// The next kernel's blocks may start from now on, if it was queued so, where there is room.
__device__ inline void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the kernel before has ended, and what it wrote is to be seen.
__device__ inline void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#endif  // GPLWS_CUDA_EMULATION

// Two values in one register, the first in its low half.
template <class T>
__device__ inline uint32_t pack_two(float first, float second) {
  return static_cast<uint32_t>(from_float<T>(first).bits) |
         static_cast<uint32_t>(from_float<T>(second).bits) << 16;
}

// A value that nobody writes while the kernel runs.
__device__ inline float read_float(const float* pointer) { return __ldg(pointer); }
template <class T>
__device__ float read_float(const T* pointer) {
  return to_float(T{__ldg(&pointer->bits)});
}

// The same in a kernel that starts early: what the kernel before it writes is no read-only memory.
__device__ inline float load_float(const float* pointer) { return *pointer; }
template <class T>
__device__ float load_float(const T* pointer) {
  return to_float(*pointer);
}

// Unlike fmaxf this lets NaN through, as torch does.
__device__ inline float relu_of(float value) { return value < 0.0f ? 0.0f : value; }

// Multiprocessors of the current device.
inline cudaError_t count_processors(int* processors) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(processors, cudaDevAttrMultiProcessorCount, device);
}

// Queues kernel(arguments...) and returns its launch error. `early`: blocks may start when those of
// the kernel before have, and call wait_for_kernel_before() until they need what it leaves.
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes,
                   cudaStream_t stream, bool early, const Parameters&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
#ifndef GPLWS_CUDA_EMULATION
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
#else
  static_cast<void>(early);
#endif
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes,
                   cudaStream_t stream, const Parameters&... arguments) {
  return launch(kernel, grid, threads, shared_bytes, stream, false, arguments...);
}

// 10 * major + minor of the architecture that the code of `kernel` on the current device was
// written for. It is older than the device where that runs machine code of another minor version,
// or PTX.
template <class Kernel>
cudaError_t code_capability(Kernel kernel, int* capability) {
#ifndef GPLWS_CUDA_EMULATION
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) *capability = attributes.ptxVersion;
  return error;
#else
  static_cast<void>(kernel);
  static_cast<void>(capability);
  return cudaSuccess;
#endif
}

// Whether `kernel`, as it was compiled for the current device, waits for the kernel before by
// itself.
template <class Kernel>
bool can_start_early(Kernel kernel) {
#ifndef GPLWS_CUDA_EMULATION
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90 &&
         attributes.binaryVersion >= 90;
#else
  static_cast<void>(kernel);
  return true;
#endif
}

}  // namespace gplws::cuda
