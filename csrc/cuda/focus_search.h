// CUDA kernel of focus_search, without torch. docs/design.md defines the op.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/float_type.h"

namespace gplws::cuda {

enum class FocusRefinement { kNone = 0, kParabola = 1, kGaussian = 2 };

struct FocusSearchParams {
  const void* volume;      // (batch, frames, height, width) of volume_type
  const float* positions;  // (frames,) or (batch, frames), contiguous
  float* depth;            // (batch, height, width), contiguous, as the three below
  int64_t* index;
  float* peak;
  float* confidence;
  int64_t batch_stride, frame_stride, row_stride, column_stride;  // of the volume, in elements
  int64_t position_stride;               // between the positions of two images; 0: all share them
  int64_t batch, frames, height, width;  // 1 to 2^24 frames
  int64_t group_size;                    // frames per group, 1 to frames
  int64_t radius;  // frames on each side of the winner that enter the fit, 1 to frames
  FocusRefinement refinement;
  FloatType volume_type;
  bool log_scale;
};

// Queues the kernel on `stream` of the current device and returns its launch error. An empty result
// launches nothing.
cudaError_t launch_focus_search(const FocusSearchParams& params, cudaStream_t stream);

}  // namespace gplws::cuda
