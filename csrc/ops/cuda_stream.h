// Where the CUDA ops run: on the device of their input and on torch's current stream there.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

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
    check(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) == 0,
          "torch has no current stream for CUDA device ", t.get_device_index());
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t get() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

inline int32_t aoti_dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    default:
      return aoti_torch_dtype_float32();
  }
}

// An uninitialised tensor on the device of `t`, 5-D where it is to be channels_last_3d. torch's C
// interface drops the message of a failed allocation (it prints it to stderr); this says at least
// what it was about.
inline Tensor empty_on_device_of(const Tensor& t, const std::vector<int64_t>& sizes,
                                 ScalarType dtype, MemoryFormat format = MemoryFormat::Contiguous) {
  std::vector<size_t> order;  // axes from the nearest on
  if (format == MemoryFormat::ChannelsLast3d) {
    order = {1, 4, 3, 2, 0};
  } else {
    for (size_t axis = sizes.size(); axis-- > 0;) order.push_back(axis);
  }
  std::vector<int64_t> strides(sizes.size());
  int64_t elements = 1, step = 1;
  for (const size_t axis : order) {
    strides[axis] = step;
    step *= sizes[axis] > 1 ? sizes[axis] : 1;
    elements *= sizes[axis];
  }
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error = aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), aoti_dtype_of(dtype),
      aoti_torch_device_type_cuda(), t.get_device_index(), &handle);
  check(error == 0, "CUDA out of memory: no room for a result of ", elements, " elements");
  return Tensor(handle);
}

inline cuda::FloatType float_type_of(const Tensor& t) {
  if (t.scalar_type() == ScalarType::BFloat16) return cuda::FloatType::kBfloat16;
  if (t.scalar_type() == ScalarType::Half) return cuda::FloatType::kFloat16;
  return cuda::FloatType::kFloat32;
}

inline cuda::Strides5 strides_of(const Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2), t.stride(3), t.stride(4)};
}

// Of sizes that kernels count in 32 bits.
inline void check_axes(const char* op, std::initializer_list<int64_t> sizes) {
  for (const int64_t size : sizes)
    check(size <= cuda::kMaxAxis, op, ": no axis may be longer than ", cuda::kMaxAxis,
          " on CUDA, got ", size);
}

inline const void* data_or_null(const OptionalTensor& t) {
  return t ? t->const_data_ptr() : nullptr;
}

}  // namespace gplws
