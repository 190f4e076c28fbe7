// Gradient of the input of a grouped 3x3x3 conv with stride 2 on the CPU, float32: what op and
// kernels agree on.
#pragma once
#include <cstdint>

namespace gplws::cpu {

// All tensors contiguous and not empty.
struct Conv3dInputGradientParams {
  const float* grad;      // (batch, channels_out, frames, height_out, width_out)
  const float* packed;    // the weight, as `pack` wrote it
  float* input_gradient;  // (batch, channels, frames, height, width)
  int64_t batch, channels, channels_out;
  int64_t frames, height, width, height_out, width_out;
  int64_t groups;
};

// How the work is cut: a task makes the gradient at the input pixels under a block of rows of grad,
// in two frames, for all channels of a group of one image.
struct Conv3dInputGradientPlan {
  int64_t rows, row_blocks;  // of grad, in a task and of an image
  int64_t tasks;
  int64_t scratch_floats;  // per thread, 64-byte aligned
};

struct Conv3dInputGradientKernel {
  // Floats needed for the packed weight.
  int64_t (*packed_size)(const Conv3dInputGradientParams&);
  // weight (channels_out, channels / groups, 3, 3, 3).
  void (*pack)(const Conv3dInputGradientParams&, const float* weight, float* packed);
  Conv3dInputGradientPlan (*plan)(const Conv3dInputGradientParams&, int64_t threads);
  // Computes tasks [begin, end). Tasks write disjoint parts of the gradient.
  void (*run)(const Conv3dInputGradientParams&, const Conv3dInputGradientPlan&, int64_t begin,
              int64_t end, float* scratch);
};

// The kernel of the ISA in use.
const Conv3dInputGradientKernel& conv3d_input_gradient_kernel();

}  // namespace gplws::cpu
