// CUDA kernel of up_conv3d, without torch. docs/design.md defines the op.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace gplws::cuda {

struct UpConv3dParams {
  const float* x;         // (batch, channels, frames, height, width), contiguous
  const float* weight;    // (channels, 1, 3, 3, 3), contiguous
  const float* bias;      // (channels_out,), contiguous; null: none
  const float* residual;  // shape of y, contiguous; null: none
  float* y;               // (batch, channels_out, frames, 2 height, 2 width), contiguous
  int64_t batch, channels, channels_out;
  int64_t frames, height, width;
};

// Queues the kernel on `stream` of the current device and returns its launch error. An empty result
// launches nothing.
cudaError_t launch_up_conv3d(const UpConv3dParams& params, cudaStream_t stream);

}  // namespace gplws::cuda
