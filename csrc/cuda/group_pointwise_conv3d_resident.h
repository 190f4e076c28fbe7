// CUDA kernels of group_pointwise_conv3d for the layers of GPLWS-Net in 16 bits, on tensor cores
// (compute capability 8.0 and above), without torch. Sizes of the layer are compiled in; the
// weights stay in registers while a block walks through the frames. docs/kernels.md tells how.
#pragma once

#include "cuda/group_pointwise_conv3d_half.h"

namespace gplws::cuda {

// Layers that there are kernels for: channels in (-> channels out).
enum class ResidentLayer { kNone, kStem, k12, kHead, k24, k48, k96, kDown12, kDown24, kDown48 };

// How a call is shared out.
struct ResidentPlan {
  ResidentLayer layer;
  int tiles_w, tiles_h;  // of the output image
  int segments, frames_per_segment;
  int64_t tiles;                        // of all images and segments
  int blocks, parts;                    // of the grid; a part has some of the channels out
  int64_t conv_words, pointwise_words;  // packed weights, in words of 32 bits
};

// Plans a call, which must have a result that is not empty. False: these kernels cannot do it.
bool plan_resident(const GroupPointwiseConv3dHalfParams& params, const DeviceLimits& limits,
                   ResidentPlan* plan);

// Bytes of scratch in global memory, 16-byte aligned, that a launch with this plan needs.
int64_t scratch_bytes(const ResidentPlan& plan);

// Queues the kernels on `stream` of the current device and returns their launch error. `y` must
// not overlap any input.
cudaError_t launch_resident(const GroupPointwiseConv3dHalfParams& params, FloatType type,
                            const ResidentPlan& plan, void* scratch, cudaStream_t stream);

// The part of the launch for one type.
template <class T>
cudaError_t launch_resident_type(const GroupPointwiseConv3dHalfParams& params,
                                 const ResidentPlan& plan, void* scratch, cudaStream_t stream);

}  // namespace gplws::cuda
