// Gradient of the weight of a grouped 3x3x3 conv on the CPU, float32: what op and kernels agree on.
#pragma once
#include <cstdint>

namespace gplws::cpu {

// All tensors contiguous and not empty.
struct Conv3dWeightGradientParams {
  const float* x;          // (batch, channels, frames, height, width)
  const float* grad;       // (batch, channels_out, frames, height_out, width_out)
  float* partial;          // sums of the tasks, as the plan asks for
  float* weight_gradient;  // (channels_out, channels / groups, 3, 3, 3)
  int64_t batch, channels, channels_out;
  int64_t frames, height, width, height_out, width_out;
  int64_t groups, stride;
};

// How the work is cut. A piece is a block of rows of a pair of frames of one image; a channel block
// some channels of x and of grad of one group. A task sums one channel block over one slice of all
// pieces. Nothing here depends on the number of threads, so neither does the order of the sums.
struct Conv3dWeightGradientPlan {
  int64_t block_in, block_out;    // channels of a channel block, at most
  int64_t blocks_in, blocks_out;  // channel blocks of a group
  int64_t blocks;                 // of all groups
  int64_t rows, row_blocks;       // of grad, in a piece and of an image
  int64_t pieces, chunk_pieces;   // all of them, and those in scratch at a time
  int64_t slices;
  int64_t partial_floats;  // of one of blocks x slices tasks
  int64_t scratch_floats;  // per thread, 64-byte aligned
};

struct Conv3dWeightGradientKernel {
  Conv3dWeightGradientPlan (*plan)(const Conv3dWeightGradientParams&);
  // Computes the sums of tasks [begin, end) of blocks x slices.
  void (*accumulate)(const Conv3dWeightGradientParams&, const Conv3dWeightGradientPlan&,
                     int64_t begin, int64_t end, float* scratch);
  // Adds up the slices of channel blocks [begin, end) and writes their part of the gradient.
  void (*finish)(const Conv3dWeightGradientParams&, const Conv3dWeightGradientPlan&, int64_t begin,
                 int64_t end);
};

// The kernel of the ISA in use.
const Conv3dWeightGradientKernel& conv3d_weight_gradient_kernel();

}  // namespace gplws::cpu
