// CUDA kernels of group_pointwise_conv3d, without torch. docs/design.md defines the op.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/strides.h"

namespace gplws::cuda {

// No axis is longer than kMaxAxis, nor are there more groups.
struct GroupPointwiseConv3dParams {
  const float* x;                 // (batch, channels, frames, height, width)
  const float* weight;            // (middle, channels / groups, 3, 3, 3), contiguous
  const float* bias;              // (middle,), contiguous; null: none
  const float* pointwise_weight;  // (channels_out, middle), contiguous
  const float* pointwise_bias;    // (channels_out,), contiguous; null: none
  const float* residual;          // shape of y; null: none
  float* y;                       // (batch, channels_out, frames, height_out, width_out)
  Strides5 x_strides, residual_strides, y_strides;
  int64_t batch, channels, frames, height, width;
  int64_t middle, channels_out, height_out, width_out;
  int64_t groups;
  int64_t stride;  // 1 or 2, of rows and columns
  bool pointwise;  // else channels_out = middle; a pointwise_weight of no elements may be null
  bool relu, pointwise_relu, residual_relu;
};

// Whether sums wait in `y` while the kernel runs, as the middle channels take it several passes.
cudaError_t sums_wait_in_result(const GroupPointwiseConv3dParams& params, bool* wait);

// Queues the kernel on `stream` of the current device and returns its launch error. An empty result
// launches nothing. `y` must not overlap any input, but for a residual that begins where it begins,
// unless sums wait there.
cudaError_t launch_group_pointwise_conv3d(const GroupPointwiseConv3dParams& params,
                                          cudaStream_t stream);

}  // namespace gplws::cuda
