// The float32 conv of the widths that networks have: a thread computes four neighbouring columns.
#pragma once

#include "cuda/group_pointwise_conv3d.h"
#include "cuda/group_pointwise_conv3d_half.h"

namespace gplws::cuda {

// How a conv is cut. A *slot* is a few consecutive middle channels of one group.
struct QuadsPlan {
  int frames, slot_channels;        // of a thread, which has four columns of one row
  int out_channels;                 // of a thread in the pointwise conv
  int quads, rows;                  // tile: 4 * quads columns
  int group_inputs, group_outputs;  // channels of x and of the middle
  int slots_per_group, slots;
  bool full_slots;                // none has fewer channels than the others
  int block_slots, block_groups;  // of one block; all, where there is a pointwise conv
  int sets;                       // blocks side by side on one tile
  int threads;
  int input_pairs, input_rows;  // of the input tile
  int row_pitch, channel_floats;
  int line_step, step_frames, step_rows;  // lines of the tile that are copied at once
  int weight_floats;                      // of one input channel of each group
  int stage_floats;
  int out_pitch, pointwise_floats;
  int shared_bytes;
  int granted_bytes;  // that the kernel asks for: the same in every plan of a device
  // Distances in x: of lines copied at once, from the end of a frame to the next one, of groups.
  int64_t input_step, input_wrap, group_stride;
  bool input_vectors;                    // x gives 8 bytes at once along W
  bool column_vectors, channel_vectors;  // y takes 16 bytes at once along W, or along C
  int tiles_w, tiles_h, tiles_n;
  int64_t tiles;  // of all images and sets: the blocks
};

// False where the general kernel has to do it. That depends on channels, groups, stride and device
// only: every size and layout of x is summed in the same order.
bool plan_group_pointwise_conv3d_quads(const GroupPointwiseConv3dParams& params,
                                       const DeviceLimits& limits, QuadsPlan* plan);

cudaError_t launch_group_pointwise_conv3d_quads(const GroupPointwiseConv3dParams& params,
                                                const QuadsPlan& plan, cudaStream_t stream);

}  // namespace gplws::cuda
