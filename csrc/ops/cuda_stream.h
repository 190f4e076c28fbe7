// Where the CUDA ops run: on the device of their input and on torch's current stream there.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cstdint>
#include <stdexcept>

#include "cuda/float_type.h"
#include "cuda/strides.h"
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

inline cuda::FloatType float_type_of(const Tensor& t) {
  if (t.scalar_type() == ScalarType::BFloat16) return cuda::FloatType::kBfloat16;
  if (t.scalar_type() == ScalarType::Half) return cuda::FloatType::kFloat16;
  return cuda::FloatType::kFloat32;
}

inline cuda::Strides5 strides_of(const Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2), t.stride(3), t.stride(4)};
}

inline const void* data_or_null(const OptionalTensor& t) {
  return t ? t->const_data_ptr() : nullptr;
}

}  // namespace gplws
