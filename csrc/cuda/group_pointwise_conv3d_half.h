// CUDA kernels of group_pointwise_conv3d for 16-bit floats on tensor cores (compute capability 8.0
// and above), without torch. docs/design.md defines the op, docs/kernels.md tells how they work.
#pragma once

#include "cuda/float_type.h"
#include "cuda/group_pointwise_conv3d.h"

namespace gplws::cuda {

// The same members as GroupPointwiseConv3dParams; all tensors hold 16-bit floats.
struct GroupPointwiseConv3dHalfParams {
  const void* x;                 // (batch, channels, frames, height, width)
  const void* weight;            // (middle, channels / groups, 3, 3, 3), contiguous
  const void* bias;              // (middle,), contiguous; null: none
  const void* pointwise_weight;  // (channels_out, middle), contiguous
  const void* pointwise_bias;    // (channels_out,), contiguous; null: none
  const void* residual;          // shape of y; null: none
  void* y;                       // (batch, channels_out, frames, height_out, width_out)
  Strides5 x_strides, residual_strides, y_strides;
  int64_t batch, channels, frames, height, width;
  int64_t middle, channels_out, height_out, width_out;
  int64_t groups;
  int64_t stride;  // 1 or 2, of rows and columns
  bool pointwise;
  bool relu, pointwise_relu, residual_relu;
};

// What the plan needs to know about a device.
struct DeviceLimits {
  int capability;     // 10 * major + minor, of the device or of the code, whichever is older
  int processors;     // multiprocessors
  int shared_bytes;   // of one block, at most
  int shared_memory;  // of one multiprocessor
};

// Where the weights of a warp's products come from.
enum class WeightPlace { kRegisters, kShared, kGlobal };

// How a call is cut into blocks, warps and matrix products.
struct HalfPlan {
  // Channels: a slab is a set of groups whose channels share the rows of a product, padded to
  // chunks of eight; its channels out are cut into parts of `tiles` times eight, one for each warp.
  int slab_channels, slab_outputs, chunks;
  int parts, tiles;
  int slabs;         // warps' shares: slabs of input times parts
  int block_slabs;   // of them in one block
  int block_inputs;  // slabs of input in one block
  int slab_sets;     // blocks that share a tile of pixels
  int pairs;         // products of 16 along a row of the kernel; the last may be one of 8

  // Pixels: a warp holds 16 columns times `rows`; sets of warps lie side by side in a block.
  int rows, sets_w, sets_h, warps;
  int tile_columns, tile_rows;
  int64_t tiles_w, tiles_h, segments;
  int64_t frames_per_segment;
  int64_t blocks;

  // Input tile of one frame in shared memory.
  int input_rows, input_columns, positions;  // rows, columns, and places of columns in a row
  int odd_columns;                           // place of column 1 at stride 2
  int pixel_bytes, stage_bytes, stages;
  int granule;            // bytes of one copy; 2: element by element, any strides
  bool channels_nearest;  // neighbouring channels lie side by side in x

  // Middle result in shared memory, and the pointwise products.
  int middle_bytes;  // of one pixel
  int middle_pairs, out_tiles, out_group;
  int store_bytes;  // that a store of neighbouring channels of y may have

  WeightPlace weights;
  int64_t conv_words, pointwise_words;  // packed weights, in words of 32 bits
  int weight_offset, pointwise_offset, middle_offset, stage_offset;  // in shared memory
  int shared_bytes;
  int granted_bytes;  // that the kernel asks for: the same in every plan of a device
};

// Plans a call, which must have a result that is not empty. False: these kernels cannot do it.
bool plan_group_pointwise_conv3d_half(const GroupPointwiseConv3dHalfParams& params,
                                      const DeviceLimits& limits, HalfPlan* plan);

// Limits of the current device.
cudaError_t device_limits(DeviceLimits* limits);

// Bytes of scratch in global memory, 16-byte aligned, that a launch with this plan needs.
int64_t scratch_bytes(const HalfPlan& plan);

// Queues the kernels on `stream` of the current device and returns their launch error. `y` must
// not overlap any input.
cudaError_t launch_group_pointwise_conv3d_half(const GroupPointwiseConv3dHalfParams& params,
                                               FloatType type, const HalfPlan& plan, void* scratch,
                                               cudaStream_t stream);

// The part of the launch for one type.
template <class T>
cudaError_t launch_half(const GroupPointwiseConv3dHalfParams& params, const HalfPlan& plan,
                        void* scratch, cudaStream_t stream);

}  // namespace gplws::cuda
