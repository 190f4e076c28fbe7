// CUDA kernel of up_conv3d, without torch. docs/design.md defines the op.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/float_type.h"
#include "cuda/strides.h"

namespace gplws::cuda {

struct UpConv3dParams {
  const void* x;         // (batch, channels, frames, height, width)
  const void* weight;    // (channels, 1, 3, 3, 3), contiguous
  const void* bias;      // (channels_out,), contiguous; null: none
  const void* residual;  // shape of y; null: none
  void* y;               // (batch, channels_out, frames, 2 height, 2 width)
  Strides5 x_strides, residual_strides, y_strides;
  int64_t batch, channels, channels_out;
  int64_t frames, height, width;  // up to kMaxAxis frames
  FloatType type;                 // of all tensors
};

// Queues the kernel on `stream` of the current device and returns its launch error. An empty result
// launches nothing. `y` must not overlap any input.
cudaError_t launch_up_conv3d(const UpConv3dParams& params, cudaStream_t stream);

}  // namespace gplws::cuda
