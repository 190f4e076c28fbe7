// One block computes a tile of output pixels: first the grouped conv, whose middle result goes to
// shared memory, then the pointwise conv.
//
// A thread holds four neighbouring columns of one row times kFrames frames, and of them the kSlot
// channels of one slot, all in registers. What it reads once it uses often: six columns of an input
// row serve the three columns of the kernel, an input frame the three frames of the kernel, and the
// weights of a row of the kernel all pixels of the thread. Five frames make 720 multiply-adds of 14
// + 9 loads (kSlot 4).
//
// The input channels come one after the other (one of each group), the next one by asynchronous
// copies while this one is multiplied.
//
// Every element is summed in one fixed order (input channel, row, frame and column of the kernel;
// middle channel), whatever the tile or the thread that it falls into, in float32 with fused
// multiply-adds.
#include "cuda/group_pointwise_conv3d_quads.h"

#include <climits>

#include "cuda/device.h"

// For measurements: the most threads of a block with slots of four channels, which a multiprocessor
// holds 384 of. 192 makes two blocks of them, whose beginnings and ends overlap.
#ifndef GPLWS_QUADS_THREADS
#define GPLWS_QUADS_THREADS 384
#endif

// For measurements: up to so many input channels of a group slots have three channels where they
// may as well have four. 24 makes all layers of the network with stride 1 do so.
#ifndef GPLWS_QUADS_FEW_INPUTS
#define GPLWS_QUADS_FEW_INPUTS 6
#endif

namespace gplws::cuda {
namespace {

constexpr int kQuad = 4;  // columns of a thread
constexpr int kTaps = 27;
constexpr int kRowTaps = 9;  // frames times columns of the kernel
constexpr int kOutPad = 4;

// The weights of a slot for one row of the kernel, read as vectors of four.
constexpr int row_weights(int slot) { return (kRowTaps * slot + 3) / 4 * 4; }
constexpr int slot_weights(int slot) { return 3 * row_weights(slot); }

// Registers: 60 sums, 27 weights, inputs and addresses fit into 128; 80 sums and 36 weights into
// 168. The longer rows of input at stride 2 do not fit into 128.
constexpr int max_threads(int slot) { return slot == 3 ? 256 : 384; }
constexpr int blocks_per_processor(int64_t stride, int slot) {
  return stride == 1 && slot == 3 ? 2 : 1;
}

// Where a thread stands in the tile.
struct Place {
  int quad, row, slot;
};

struct TileOrigin {
  int set, image, frame, row, column;  // of the output
};

__device__ TileOrigin tile_origin(const QuadsPlan& plan, unsigned tile) {
  const auto take = [&](int count) {
    const unsigned rest = tile / static_cast<unsigned>(count);
    const int index = static_cast<int>(tile - rest * static_cast<unsigned>(count));
    tile = rest;
    return index;
  };
  TileOrigin origin;
  origin.set = take(plan.sets);
  origin.column = take(plan.tiles_w) * (kQuad * plan.quads);
  origin.row = take(plan.tiles_h) * plan.rows;
  origin.frame = take(plan.tiles_n) * plan.frames;
  origin.image = static_cast<int>(tile);
  return origin;
}

// A slot's channels of the middle: the first one and how many there really are.
struct Slot {
  int group, first_channel, channels;
};

template <int kSlot>
__device__ Slot slot_of(const QuadsPlan& plan, int slot) {
  const int group = slot / plan.slots_per_group;
  const int exist = slot < plan.slots ? kSlot : 0;
  if (plan.full_slots) return {group, slot * kSlot, exist};
  const int first = (slot - group * plan.slots_per_group) * kSlot;
  return {group, group * plan.group_outputs + first, min(exist, plan.group_outputs - first)};
}

__device__ void read_four(const float* shared, float* values) {
  const float4 four = *reinterpret_cast<const float4*>(shared);
  values[0] = four.x;
  values[1] = four.y;
  values[2] = four.z;
  values[3] = four.w;
}

// Where column `column` of the input tile lies in its row. At stride 2 neighbouring threads read
// vectors that are 32 bytes apart; in every other 128 bytes neighbouring vectors are swapped, so
// that eight threads meet all banks of shared memory.
template <int kStride>
__device__ int column_offset(int column) {
  if constexpr (kStride == 1) return column;
  return column ^ (column / 8 & kQuad);
}

// Queues the copies of one input channel of each group of the block, with its border; zeros outside
// the image. tile[group][frame][row][row_pitch] begins two columns left of what the first output
// has in its middle: columns come in pairs, and a pair at once (kBytes 8) where it may. A thread
// keeps to one pair, so that nothing is divided on the way. kGroups: of the block; 0 for any
// number.
template <int kStride, int kBytes, int kGroups>
__device__ void copy_lines(const GroupPointwiseConv3dParams& p, const QuadsPlan& plan,
                           const TileOrigin& origin, int first_group, int channel, float* tile) {
  const int thread = static_cast<int>(threadIdx.x);
  const int line = thread / plan.input_pairs;
  const int column = 2 * (thread - line * plan.input_pairs);
  if (line >= plan.line_step) return;
  int frame = line / plan.input_rows;
  int row = line - frame * plan.input_rows;
  const int groups =
      kGroups != 0 ? kGroups : min(plan.block_groups, static_cast<int>(p.groups) - first_group);
  const int w = origin.column * kStride - 2 + column;
  const int top = origin.row * kStride - 1, front = origin.frame - 1;
  const auto width = static_cast<unsigned>(p.width), height = static_cast<unsigned>(p.height);
  const auto frames = static_cast<unsigned>(p.frames);
  const bool first_inside = static_cast<unsigned>(w) < width;
  const bool second_inside = static_cast<unsigned>(w + 1) < width;
  // Outside the image it points to nothing, and is not read.
  const float* source = p.x + origin.image * p.x_strides.batch + first_group * plan.group_stride +
                        channel * p.x_strides.channel + w * p.x_strides.column +
                        (top + row) * p.x_strides.row + (front + frame) * p.x_strides.frame;
  float* destination = tile + line * plan.row_pitch + column_offset<kStride>(column);
  while (frame < plan.frames + 2) {
    const bool inside =
        static_cast<unsigned>(top + row) < height && static_cast<unsigned>(front + frame) < frames;
    const float* from = source;
    float* to = destination;
#pragma unroll(kGroups != 0 ? kGroups : 1)
    for (int g = 0; g < groups; ++g) {
      if constexpr (kBytes == 8) {
        copy_async<8>(to, from, inside && first_inside);
      } else {
        copy_async<4>(to, from, inside && first_inside);
        copy_async<4>(to + 1, from + p.x_strides.column, inside && second_inside);
      }
      from += plan.group_stride;
      to += plan.channel_floats;
    }
    destination += plan.line_step * plan.row_pitch;
    source += plan.input_step;
    frame += plan.step_frames;
    row += plan.step_rows;
    if (row >= plan.input_rows) {
      row -= plan.input_rows;
      source += plan.input_wrap;
      ++frame;
    }
  }
}

template <int kStride>
__device__ void copy_input(const GroupPointwiseConv3dParams& p, const QuadsPlan& plan,
                           const TileOrigin& origin, int first_group, int channel, float* tile) {
  if (!plan.input_vectors) {
    copy_lines<kStride, 4, 0>(p, plan, origin, first_group, channel, tile);
  } else if (plan.block_groups == 4 && plan.sets == 1) {  // as the networks have it
    copy_lines<kStride, 8, 4>(p, plan, origin, first_group, channel, tile);
  } else {
    copy_lines<kStride, 8, 0>(p, plan, origin, first_group, channel, tile);
  }
}

// Queues the copies of the weights that meet this channel. shared[slot][row of the kernel][frame,
// column of the kernel][channel of the slot]; zero where a slot has fewer channels.
template <int kSlot>
__device__ void copy_weights(const GroupPointwiseConv3dParams& p, const QuadsPlan& plan,
                             int first_slot, int channel, float* shared) {
  const int warps = plan.threads / kLanesPerWarp;
  const int tap = static_cast<int>(threadIdx.x) % kLanesPerWarp;
  if (tap >= kTaps) return;
  const int64_t row = int64_t{plan.group_inputs} * kTaps;  // of the weights of a middle channel
  const int at = tap / 3 % 3 * row_weights(kSlot) + (tap / kRowTaps * 3 + tap % 3) * kSlot;
  for (int s = static_cast<int>(threadIdx.x) / kLanesPerWarp; s < plan.block_slots; s += warps) {
    const Slot slot = slot_of<kSlot>(plan, first_slot + s);
    // Beyond the last channel it points to nothing, and is not read.
    const float* source = p.weight + slot.first_channel * row + channel * kTaps + tap;
    float* destination = shared + s * slot_weights(kSlot) + at;
#pragma unroll
    for (int m = 0; m < kSlot; ++m) {
      copy_async<4>(destination + m, source, m < slot.channels);
      source += row;
    }
  }
}

// Queues the copies of all pointwise weights. shared[middle channel][out_pitch]; zero beyond the
// last channel out.
__device__ void copy_pointwise_weights(const GroupPointwiseConv3dParams& p, const QuadsPlan& plan,
                                       float* shared) {
  const int middle = static_cast<int>(p.middle);
  const int outs = plan.out_pitch - kOutPad;
  for (int i = threadIdx.x; i < middle * outs; i += plan.threads) {
    const int k = i / middle;
    const int m = i - k * middle;
    const bool real = k < p.channels_out;
    copy_async<4>(shared + m * plan.out_pitch + k, p.pointwise_weight + (real ? i : 0), real);
  }
}

// Where the vectors lie that four outputs see of a row of the input tile.
template <int kStride>
struct Vectors {
  int offsets[kStride + 1];

  __device__ explicit Vectors(int quad) {
#pragma unroll
    for (int i = 0; i <= kStride; ++i)
      offsets[i] = column_offset<kStride>((quad * kStride + i) * kQuad);
  }
};

// What four outputs see of a row.
template <int kStride>
struct Span {
  float values[4 * kStride + 4];  // of the first vector, only the last three

  __device__ void read(const float* row, const Vectors<kStride>& vectors) {
#pragma unroll
    for (int i = 0; i <= kStride; ++i) read_four(row + vectors.offsets[i], values + i * kQuad);
  }
  __device__ float at(int column, int kw) const { return values[1 + column * kStride + kw]; }
};

// sums += conv of one channel. `row` is the first row of input that the thread sees.
template <int kStride, int kFrames, int kSlot>
__device__ void convolve(const float* row, const Vectors<kStride>& vectors,
                         const float* shared_weights, const QuadsPlan& plan,
                         float (&sums)[kFrames][kSlot][kQuad]) {
  const int frame_floats = plan.input_rows * plan.row_pitch;
  // Not unrolled: the body is some 750 instructions, three of them would leave the first cache.
#pragma unroll 1
  for (int kh = 0; kh < 3; ++kh) {
    float weights[row_weights(kSlot)];
#pragma unroll
    for (int i = 0; i < row_weights(kSlot); i += 4) read_four(shared_weights + i, weights + i);
#pragma unroll
    for (int input = 0; input < kFrames + 2; ++input) {
      Span<kStride> span;
      span.read(row + input * frame_floats, vectors);
#pragma unroll
      for (int kn = 0; kn < 3; ++kn) {
        const int n = input - kn;
        if (n < 0 || n >= kFrames) continue;
#pragma unroll
        for (int kw = 0; kw < 3; ++kw)
#pragma unroll
          for (int m = 0; m < kSlot; ++m)
#pragma unroll
            for (int i = 0; i < kQuad; ++i)
              sums[n][m][i] =
                  fmaf(weights[(kn * 3 + kw) * kSlot + m], span.at(i, kw), sums[n][m][i]);
      }
    }
    row += plan.row_pitch;
    shared_weights += row_weights(kSlot);
  }
}

// Bias, activation and residual of up to kChannels channels of four columns, then to memory. The
// first column, row and frame exist.
template <int kChannels>
__device__ void store_result(const GroupPointwiseConv3dParams& p, const QuadsPlan& plan, int image,
                             int n, int h, int w, int first_channel, int channels,
                             const float* bias, bool activate, float (&values)[kChannels][kQuad]) {
  const auto offset = [&](const Strides5& s) {
    return image * s.batch + first_channel * s.channel + n * s.frame + h * s.row + w * s.column;
  };
  const int columns = min(static_cast<int>(p.width_out) - w, kQuad);
  const float* residual = p.residual ? p.residual + offset(p.residual_strides) : nullptr;
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    if (k >= channels) continue;
    const float shift = bias ? __ldg(bias + first_channel + k) : 0.0f;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      float value = values[k][i] + shift;
      if (activate) value = relu_of(value);
      if (residual && i < columns) {
        value += __ldg(residual + k * p.residual_strides.channel + i * p.residual_strides.column);
        if (p.residual_relu) value = relu_of(value);
      }
      values[k][i] = value;
    }
  }
  float* y = p.y + offset(p.y_strides);
  if (plan.column_vectors) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k)
      if (k < channels)
        *reinterpret_cast<float4*>(y + k * p.y_strides.channel) =
            make_float4(values[k][0], values[k][1], values[k][2], values[k][3]);
    return;
  }
  if constexpr (kChannels % 4 == 0) {
    if (plan.channel_vectors && channels == kChannels) {
#pragma unroll
      for (int i = 0; i < kQuad; ++i)
#pragma unroll
        for (int k = 0; k < kChannels; k += 4)
          if (i < columns)
            *reinterpret_cast<float4*>(y + i * p.y_strides.column + k) =
                make_float4(values[k][i], values[k + 1][i], values[k + 2][i], values[k + 3][i]);
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < kChannels; ++k)
#pragma unroll
    for (int i = 0; i < kQuad; ++i)
      if (k < channels && i < columns)
        y[k * p.y_strides.channel + i * p.y_strides.column] = values[k][i];
}

// middle[channel][frame][row][column] of the tile, after bias and activation.
template <int kFrames, int kSlot>
__device__ void store_middle(const GroupPointwiseConv3dParams& p, const QuadsPlan& plan,
                             const Place& place, const Slot& slot,
                             const float (&sums)[kFrames][kSlot][kQuad], float* middle) {
  const int frame_floats = plan.rows * plan.quads * kQuad;
#pragma unroll
  for (int m = 0; m < kSlot; ++m) {
    if (m >= slot.channels) continue;
    const int channel = slot.first_channel + m;
    const float bias = p.bias ? __ldg(p.bias + channel) : 0.0f;
    float* to =
        middle + channel * kFrames * frame_floats + (place.row * plan.quads + place.quad) * kQuad;
#pragma unroll
    for (int n = 0; n < kFrames; ++n) {
      float values[kQuad];
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        values[i] = sums[n][m][i] + bias;
        if (p.relu) values[i] = relu_of(values[i]);
      }
      *reinterpret_cast<float4*>(to + n * frame_floats) =
          make_float4(values[0], values[1], values[2], values[3]);
    }
  }
}

// A thread takes four columns and kOut channels at a time: fewer pixels and more channels than in
// the conv, as no value of the middle serves more than one pixel.
template <int kOut>
__device__ void pointwise(const GroupPointwiseConv3dParams& p, const QuadsPlan& plan,
                          const TileOrigin& origin, const float* middle, const float* weights) {
  const int tile_quads = plan.frames * plan.rows * plan.quads;
  const int blocks = (plan.out_pitch - kOutPad) / kOut;
  const int channels = static_cast<int>(p.middle);
  for (int i = threadIdx.x; i < tile_quads * blocks; i += plan.threads) {
    const int block = i / tile_quads;
    const int at = i - block * tile_quads;
    const int line = at / plan.quads;
    const int frame = line / plan.rows;
    const int n = origin.frame + frame, h = origin.row + line - frame * plan.rows;
    const int w = origin.column + (at - line * plan.quads) * kQuad;
    if (n >= p.frames || h >= p.height_out || w >= p.width_out) continue;
    float sums[kOut][kQuad] = {};
    const float* from = middle + at * kQuad;
    const float* row = weights + block * kOut;
#pragma unroll 2
    for (int m = 0; m < channels; ++m) {
      float inputs[kQuad], factors[kOut];
      read_four(from, inputs);
#pragma unroll
      for (int k = 0; k < kOut; k += 4) read_four(row + k, factors + k);
#pragma unroll
      for (int k = 0; k < kOut; ++k)
#pragma unroll
        for (int c = 0; c < kQuad; ++c) sums[k][c] = fmaf(factors[k], inputs[c], sums[k][c]);
      from += tile_quads * kQuad;
      row += plan.out_pitch;
    }
    const int first = block * kOut;
    store_result<kOut>(p, plan, origin.image, n, h, w, first,
                       min(static_cast<int>(p.channels_out) - first, kOut), p.pointwise_bias,
                       p.pointwise_relu, sums);
  }
}

template <int kStride, int kFrames, int kSlot>
__global__ void __launch_bounds__(max_threads(kSlot), blocks_per_processor(kStride, kSlot))
    group_pointwise_conv3d_quads_kernel(const __grid_constant__ GroupPointwiseConv3dParams p,
                                        const __grid_constant__ QuadsPlan plan) {
  auto* pointwise_weights = reinterpret_cast<float*>(dynamic_shared_memory());
  // The stages, and after them, in the same place, the middle result.
  float* stages = pointwise_weights + plan.pointwise_floats;
  Place place;
  place.quad = static_cast<int>(threadIdx.x) % plan.quads;
  const int line = static_cast<int>(threadIdx.x) / plan.quads;
  place.slot = line / plan.rows;
  place.row = line - place.slot * plan.rows;
  const int channels = plan.group_inputs;
  const TileOrigin origin = tile_origin(plan, blockIdx.x);
  const int first_slot = origin.set * plan.block_slots;
  const int first_group = first_slot / plan.slots_per_group;
  const bool busy = place.slot < plan.block_slots;
  const Slot slot = slot_of<kSlot>(plan, busy ? first_slot + place.slot : plan.slots);
  const auto copy_stage = [&](int channel, float* stage) {
    copy_weights<kSlot>(p, plan, first_slot, channel, stage);
    copy_input<kStride>(p, plan, origin, first_group, channel, stage + plan.weight_floats);
    commit_copies();
  };

  float sums[kFrames][kSlot][kQuad] = {};
  if (p.pointwise) copy_pointwise_weights(p, plan, pointwise_weights);
  copy_stage(0, stages);
  const float* weights = stages + place.slot * slot_weights(kSlot);
  const float* row = stages + plan.weight_floats +
                     (slot.group - first_group) * plan.channel_floats +
                     place.row * kStride * plan.row_pitch;
  const Vectors<kStride> vectors(place.quad);
  int stage = 0;  // where channel c lies, in floats
  for (int c = 0; c < channels; ++c) {
    wait_for_copies<0>();
    __syncthreads();  // channel c is here, and all threads are done with channel c - 1
    if (c + 1 < channels) copy_stage(c + 1, stages + plan.stage_floats - stage);
    if (slot.channels > 0)
      convolve<kStride, kFrames, kSlot>(row + stage, vectors, weights + stage, plan, sums);
    stage = plan.stage_floats - stage;
  }

  if (p.pointwise) {
    __syncthreads();  // the middle takes the place of the stages
    store_middle<kFrames, kSlot>(p, plan, place, slot, sums, stages);
    __syncthreads();
    if (plan.out_channels == 12) {
      pointwise<12>(p, plan, origin, stages, pointwise_weights);
    } else {
      pointwise<4>(p, plan, origin, stages, pointwise_weights);
    }
    return;
  }
  const int h = origin.row + place.row, w = origin.column + place.quad * kQuad;
  if (slot.channels == 0 || h >= p.height_out || w >= p.width_out) return;
#pragma unroll
  for (int n = 0; n < kFrames; ++n)
    if (origin.frame + n < p.frames)
      store_result<kSlot>(p, plan, origin.image, origin.frame + n, h, w, slot.first_channel,
                          slot.channels, p.bias, p.relu, sums[n]);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Three or four channels: what leaves the fewest places empty. Where there are few input channels,
// slots of three, of which two blocks fit: their copies and products overlap.
int choose_slot(const GroupPointwiseConv3dParams& p) {
  const int64_t outputs = p.middle / p.groups;
  const int64_t threes = ceil_div(outputs, 3) * 3, fours = ceil_div(outputs, 4) * 4;
  if (threes != fours) return threes < fours ? 3 : 4;
  return p.stride == 1 && p.channels / p.groups <= GPLWS_QUADS_FEW_INPUTS ? 3 : 4;
}

int threads_of_block(int slot) {
  return slot == 4 && GPLWS_QUADS_THREADS < max_threads(slot) ? GPLWS_QUADS_THREADS
                                                              : max_threads(slot);
}

struct Arrangement {
  int frames, quads, rows, slots;
};

// Lays out a block; false where it is too large.
bool fits(const GroupPointwiseConv3dParams& p, const DeviceLimits& limits, const Arrangement& a,
          QuadsPlan& plan) {
  if (p.pointwise ? a.slots != plan.slots
                  : a.slots % plan.slots_per_group != 0 && plan.slots_per_group % a.slots != 0)
    return false;
  const int stride = static_cast<int>(p.stride);
  const int64_t threads = ceil_div(int64_t{a.slots} * a.quads * a.rows, kLanesPerWarp);
  if (threads * kLanesPerWarp > threads_of_block(plan.slot_channels)) return false;
  plan.frames = a.frames;
  plan.quads = a.quads;
  plan.rows = a.rows;
  plan.block_slots = a.slots;
  plan.block_groups = a.slots < plan.slots_per_group ? 1 : a.slots / plan.slots_per_group;
  plan.sets = static_cast<int>(ceil_div(plan.slots, a.slots));
  plan.threads = static_cast<int>(threads) * kLanesPerWarp;
  const int columns = kQuad * a.quads;
  plan.input_pairs = columns * stride / 2 + (stride == 1 ? 2 : 1);
  plan.input_rows = (a.rows - 1) * stride + 3;
  plan.line_step = plan.threads / plan.input_pairs;
  if (plan.line_step == 0) return false;
  plan.step_frames = plan.line_step / plan.input_rows;
  plan.step_rows = plan.line_step % plan.input_rows;
  plan.input_step = plan.step_frames * p.x_strides.frame + plan.step_rows * p.x_strides.row;
  plan.input_wrap = p.x_strides.frame - plan.input_rows * p.x_strides.row;
  plan.row_pitch = columns * stride + kQuad * stride;  // at stride 2 the last vector may be swapped
  plan.channel_floats = (a.frames + 2) * plan.input_rows * plan.row_pitch;
  plan.weight_floats = a.slots * slot_weights(plan.slot_channels);
  const int64_t stage = plan.weight_floats + int64_t{plan.block_groups} * plan.channel_floats;
  int64_t floats = 2 * stage;
  if (p.pointwise) {
    const int64_t middle = p.middle * a.frames * a.rows * columns;
    floats = (middle > floats ? middle : floats) + p.middle * plan.out_pitch;
  }
  if (floats > limits.shared_bytes / static_cast<int>(sizeof(float))) return false;
  plan.stage_floats = static_cast<int>(stage);
  plan.pointwise_floats = p.pointwise ? static_cast<int>(p.middle) * plan.out_pitch : 0;
  plan.shared_bytes = static_cast<int>(floats) * static_cast<int>(sizeof(float));
  plan.granted_bytes = limits.shared_bytes;
  const int64_t tiles_w = ceil_div(p.width_out, columns), tiles_h = ceil_div(p.height_out, a.rows);
  const int64_t tiles_n = ceil_div(p.frames, a.frames);
  plan.tiles_w = static_cast<int>(tiles_w);
  plan.tiles_h = static_cast<int>(tiles_h);
  plan.tiles_n = static_cast<int>(tiles_n);
  plan.tiles = tiles_w * tiles_h * tiles_n * plan.sets;
  // No result of this size fits into a GPU.
  if (plan.tiles > INT_MAX || plan.tiles * p.batch > INT_MAX) return false;
  plan.tiles *= p.batch;
  return true;
}

// Instructions of the busiest multiprocessor, as if each of its lanes did one at a time. The
// factors are estimates.
double cost_of(const GroupPointwiseConv3dParams& p, const DeviceLimits& limits,
               const QuadsPlan& plan) {
  constexpr double kCopy = 8.0;          // a pair of values copied
  constexpr double kBlock = 3000 * 128;  // beginning and end of a block, 128 lanes idle
  constexpr double kBusyWarps = 12.0;    // fewer do not hide the latencies
  const double products = 1.1 * kTaps * kQuad * plan.frames * plan.slot_channels * plan.threads;
  const double copies =
      kCopy * plan.input_pairs * (plan.frames + 2) * plan.input_rows * plan.block_groups;
  double block = plan.group_inputs * (products + copies) + kBlock;
  if (p.pointwise)
    block += 1.3 * static_cast<double>(p.middle) * (plan.out_pitch - kOutPad) * kQuad * plan.quads *
             plan.rows * plan.frames;
  const int64_t share = ceil_div(plan.tiles, limits.processors);
  int64_t resident = limits.shared_memory / (plan.shared_bytes + 1024);
  const int by_registers = blocks_per_processor(p.stride, plan.slot_channels) *
                           max_threads(plan.slot_channels) / plan.threads;
  if (resident > by_registers) resident = by_registers;
  if (resident > share) resident = share;
  const double warps = static_cast<double>(resident < 1 ? 1 : resident) * plan.threads / 32;
  const double idle = warps < kBusyWarps ? 1.0 - warps / kBusyWarps : 0.0;
  // Rows of 16 columns meet the same banks of shared memory.
  const double conflicts = plan.quads < 8 ? 1.1 : 1.0;
  return static_cast<double>(share) * block * (1.0 + idle) * conflicts;
}

// Whether all numbers of floats, and the address, are multiples of so many bytes.
template <class... Floats>
bool aligned(int bytes, const float* address, Floats... floats) {
  uint64_t all = reinterpret_cast<uintptr_t>(address);
  ((all |= static_cast<uint64_t>(floats) * sizeof(float)), ...);
  return all % static_cast<uint64_t>(bytes) == 0;
}

void plan_accesses(const GroupPointwiseConv3dParams& p, QuadsPlan& plan) {
  const Strides5 &x = p.x_strides, &y = p.y_strides;
  plan.input_vectors =
      x.column == 1 && p.width % 2 == 0 && aligned(8, p.x, x.batch, x.channel, x.frame, x.row);
  plan.column_vectors = y.column == 1 && p.width_out % kQuad == 0 &&
                        aligned(16, p.y, y.batch, y.channel, y.frame, y.row);
  // Slots begin at a multiple of four channels, if groups do.
  plan.channel_vectors = y.channel == 1 && (p.pointwise || plan.group_outputs % 4 == 0) &&
                         aligned(16, p.y, y.batch, y.frame, y.row, y.column);
}

template <int kStride, int kFrames, int kSlot>
cudaError_t launch_kernel(const GroupPointwiseConv3dParams& p, const QuadsPlan& plan,
                          cudaStream_t stream) {
  const auto kernel = group_pointwise_conv3d_quads_kernel<kStride, kFrames, kSlot>;
  // The limit belongs to the kernel, not to the launch: another thread that asked for less would
  // take it from this one.
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.granted_bytes);
  if (error != cudaSuccess) return error;
  return launch(kernel, dim3(static_cast<unsigned>(plan.tiles)), plan.threads, plan.shared_bytes,
                stream, p, plan);
}

template <int kStride, int kFrames>
cudaError_t launch_slot(const GroupPointwiseConv3dParams& p, const QuadsPlan& plan,
                        cudaStream_t stream) {
  return plan.slot_channels == 3 ? launch_kernel<kStride, kFrames, 3>(p, plan, stream)
                                 : launch_kernel<kStride, kFrames, 4>(p, plan, stream);
}

template <int kStride>
cudaError_t launch_frames(const GroupPointwiseConv3dParams& p, const QuadsPlan& plan,
                          cudaStream_t stream) {
  return plan.frames == 3 ? launch_slot<kStride, 3>(p, plan, stream)
                          : launch_slot<kStride, 5>(p, plan, stream);
}

}  // namespace

bool plan_group_pointwise_conv3d_quads(const GroupPointwiseConv3dParams& p,
                                       const DeviceLimits& limits, QuadsPlan* plan) {
  constexpr int64_t kMaxChannels = 4096;  // beyond it, numbers of weights would need 64 bits
  *plan = QuadsPlan{};
  // Depthwise convs and pairs of channels would leave most of a slot empty.
  if (p.channels == 0 || p.middle / p.groups < 3 || p.channels > kMaxChannels ||
      p.middle > kMaxChannels || p.channels_out > kMaxChannels)
    return false;
  QuadsPlan trial{};
  trial.slot_channels = choose_slot(p);
  trial.group_stride = p.channels / p.groups * p.x_strides.channel;
  trial.group_inputs = static_cast<int>(p.channels / p.groups);
  trial.group_outputs = static_cast<int>(p.middle / p.groups);
  trial.slots_per_group = static_cast<int>(ceil_div(trial.group_outputs, trial.slot_channels));
  trial.slots = trial.slots_per_group * static_cast<int>(p.groups);
  trial.full_slots = trial.group_outputs % trial.slot_channels == 0;
  if (p.pointwise) {
    trial.out_channels = p.channels_out > 8 ? 12 : 4;
    // The four more let the copies of neighbouring middle channels meet different banks.
    trial.out_pitch =
        static_cast<int>(ceil_div(p.channels_out, trial.out_channels)) * trial.out_channels +
        kOutPad;
  }
  plan_accesses(p, trial);
  double best = 0.0;
  const int most = threads_of_block(trial.slot_channels) / 4;
  for (int slots = p.pointwise ? trial.slots : 1; slots <= trial.slots && slots <= most; ++slots)
    for (const int frames : {5, 3})
      for (const int quads : {8, 4})
        for (const int rows : {1, 2, 4, 8, 16, 32}) {
          if (!fits(p, limits, {frames, quads, rows, slots}, trial)) continue;
          const double cost = cost_of(p, limits, trial);
          if (best != 0.0 && cost >= best) continue;
          best = cost;
          *plan = trial;
        }
  return best != 0.0;
}

cudaError_t launch_group_pointwise_conv3d_quads(const GroupPointwiseConv3dParams& p,
                                                const QuadsPlan& plan, cudaStream_t stream) {
  return p.stride == 1 ? launch_frames<1>(p, plan, stream) : launch_frames<2>(p, plan, stream);
}

}  // namespace gplws::cuda
