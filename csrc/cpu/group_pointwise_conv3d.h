// Grouped 3x3x3 conv + pointwise conv on the CPU, float32 and bfloat16: what op and kernels agree
// on.
#pragma once
#include <cstdint>

namespace gplws::cpu {

// All tensors contiguous, in the axis order that docs/design.md gives; optional ones may be null.
struct GroupPointwiseConv3dParams {
  const void* x;                // (batch, channels, frames, height, width)
  const float* packed;          // both weights, as `pack` wrote them
  const float* bias;            // (middle)
  const float* pointwise_bias;  // (channels_out)
  const void* residual;         // shape of y
  void* y;                      // (batch, channels_out, frames, height_out, width_out)
  int64_t batch, channels, middle, channels_out;
  int64_t frames, height, width, height_out, width_out;
  int64_t groups, stride;
  bool pointwise, relu, pointwise_relu, residual_relu;
};

// How the output is cut into independent tasks. A task is a tile of up to `tile_height` x
// `tile_width` pixels of one image over some of its frames, with all channels.
struct GroupPointwiseConv3dPlan {
  int64_t tile_height, tile_width;
  int64_t tiles_h, tiles_w, tiles_n;
  int64_t tasks;
  int64_t scratch_floats;  // per thread, 64-byte aligned
};

struct GroupPointwiseConv3dKernel {
  // Floats needed for the packed weights.
  int64_t (*packed_size)(const GroupPointwiseConv3dParams&);
  // weight (middle, channels / groups, 3, 3, 3), pointwise_weight (channels_out, middle) or null.
  void (*pack)(const GroupPointwiseConv3dParams&, const float* weight,
               const float* pointwise_weight, float* packed);
  GroupPointwiseConv3dPlan (*plan)(const GroupPointwiseConv3dParams&, int64_t threads);
  // Computes tasks [begin, end). Tasks write disjoint parts of y.
  void (*run)(const GroupPointwiseConv3dParams&, const GroupPointwiseConv3dPlan&, int64_t begin,
              int64_t end, float* scratch);
};

// By the dtype of x, residual and y; weights and biases are float32 for both. A variant that only
// adds a better bfloat16 kernel leaves the other empty.
struct GroupPointwiseConv3dTable {
  GroupPointwiseConv3dKernel float32, bfloat16;
};

// The kernels of the ISA in use. bfloat16 is multiplied as such where the CPU can (AVX512-BF16),
// else in float32.
const GroupPointwiseConv3dKernel& group_pointwise_conv3d_kernel(bool bfloat16);

}  // namespace gplws::cpu
