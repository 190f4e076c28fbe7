// Tensors of 16-bit floats from one memory format to the other, without torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace gplws::cuda {

// Both tensors are dense and have elements: one contiguous, one channels_last_3d.
struct MemoryFormatParams {
  const void* from;  // (batch, channels, frames, height, width)
  void* to;
  int64_t batch, channels, frames;
  int64_t pixels;  // height times width
};

// Queue the kernel on `stream` of the current device and return its launch error.
cudaError_t launch_to_channels_last(const MemoryFormatParams& params, cudaStream_t stream);
cudaError_t launch_to_contiguous(const MemoryFormatParams& params, cudaStream_t stream);

}  // namespace gplws::cuda
