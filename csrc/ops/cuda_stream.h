// Where the CUDA ops run: on the device of their input and on torch's current stream there.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cstdint>
#include <stdexcept>

#include "tensors.h"

namespace gplws {

// While it lives, the device of `t` is the current one.
class CudaStream {
 public:
  explicit CudaStream(const Tensor& t) : guard_(t.get_device_index()) {
    // This library carries a CUDA runtime of its own, with its own idea of the current device.
    STD_CUDA_CHECK(cudaSetDevice(t.get_device_index()));
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t get() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// An uninitialised tensor on the device of `t`. torch's C interface drops the message of a failed
// allocation (it prints it to stderr); this says at least what it was about.
inline Tensor empty_on_device_of(const Tensor& t, const std::vector<int64_t>& sizes,
                                 ScalarType dtype, MemoryFormat format = MemoryFormat::Contiguous) {
  try {
    return torch::stable::empty(sizes, dtype, std::nullopt, t.device(), std::nullopt, format);
  } catch (const std::runtime_error& error) {
    int64_t elements = 1;
    for (const int64_t size : sizes) elements *= size;
    STD_TORCH_CHECK(false, "CUDA out of memory: no room for a result of ", elements, " elements (",
                    error.what(), ")");
  }
}

inline void check_float32_on_cuda(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, op, ": x must be float32 on CUDA");
}

// Contiguous, and aligned for loads of two floats; a view may start at an odd element.
inline Tensor aligned_contiguous(const Tensor& t) {
  const Tensor dense = torch::stable::contiguous(t);
  const bool aligned = reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 8 == 0;
  return aligned ? dense : torch::stable::clone(dense);
}

}  // namespace gplws
