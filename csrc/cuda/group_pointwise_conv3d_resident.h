// CUDA kernels of group_pointwise_conv3d for the layers of GPLWS-Net in 16 bits, on tensor cores
// (compute capability 8.0, and 9.0 to 11), without torch. Sizes of the layer are compiled in; the
// weights stay in registers while a block walks through the frames. docs/kernels.md tells how.
#pragma once

#include "cuda/divider.h"
#include "cuda/group_pointwise_conv3d_half.h"

namespace gplws::cuda {

// Layers that there are kernels for: channels in (-> channels out).
enum class ResidentLayer { kNone, kStem, k12, kHead, k24, k48, k96, kDown12, kDown24, kDown48 };

// How a call is shared out.
struct ResidentPlan {
  ResidentLayer layer;
  Divider tiles_w, tiles_h;  // of the output image
  Divider segments;
  int frames_per_segment;
  int tiles;          // of all images and segments
  int blocks, parts;  // of the grid; a part has some of the channels out
  int64_t packed_bytes;
};

// The layer that has these sizes, if there are kernels for it and room for them on the device.
ResidentLayer resident_layer(const GroupPointwiseConv3dHalfParams& params,
                             const DeviceLimits& limits);

// Plans a call, which must have a result that is not empty. False: these kernels cannot do it.
bool plan_resident(const GroupPointwiseConv3dHalfParams& params, const DeviceLimits& limits,
                   ResidentPlan* plan);

// Bytes of the packed weights and biases of a layer.
int64_t packed_bytes(ResidentLayer layer);

// Queues the packing of the weights and biases of `params`, of which only sizes matter beside them,
// into `packed`, 16-byte aligned, and returns its launch error.
cudaError_t pack_resident(const GroupPointwiseConv3dHalfParams& params, FloatType type,
                          ResidentLayer layer, void* packed, cudaStream_t stream);

// Queues the kernel on `stream` of the current device and returns its launch error. `y` must not
// overlap any input. `ready`: what was packed was complete before anything that is still running.
cudaError_t launch_resident(const GroupPointwiseConv3dHalfParams& params, FloatType type,
                            const ResidentPlan& plan, const void* packed, bool ready,
                            cudaStream_t stream);

// The parts of both for one type.
template <class T>
cudaError_t pack_resident_type(const GroupPointwiseConv3dHalfParams& params, ResidentLayer layer,
                               void* packed, cudaStream_t stream);
template <class T>
cudaError_t launch_resident_type(const GroupPointwiseConv3dHalfParams& params,
                                 const ResidentPlan& plan, const void* packed, bool ready,
                                 cudaStream_t stream);

}  // namespace gplws::cuda
