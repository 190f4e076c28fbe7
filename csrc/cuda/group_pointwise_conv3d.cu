// The general kernel, for what group_pointwise_conv3d_quads.cu does not do.
//
// One block computes all channels of a tile of output pixels: first the grouped conv, a few middle
// channels at a time, into shared memory, then what these contribute to every output channel.
//
// A warp holds 32 pixels of a row, one per thread, times kFrames frames times a few rows, and of
// them a *slot* of kBlock consecutive middle channels of one group (later a slot of output
// channels), all in registers. The four warps of a block divide into `slot_warps` neighbouring
// slots times `pixel_warps` bands of rows. Where the slots outnumber the warps, the block makes
// several passes. There is no limit on the number of channels: after each pass but the last the
// partial sums of the pointwise conv wait in y, where the thread that wrote them picks them up.
//
// Every element is summed in one fixed order (input channel, column, frame and row of the kernel;
// middle channel), whatever the tile, the pass or the warp that it falls into, in float32 with
// fused multiply-adds.
#include "cuda/group_pointwise_conv3d.h"

#include <climits>

#include "cuda/device.h"
#include "cuda/group_pointwise_conv3d_quads.h"

namespace gplws::cuda {
namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kLanes;
constexpr int kTaps = 27;
constexpr int kMaxSharedBytes = 48 * 1024;  // what every device grants without asking

// Two frames per tile read four: 2 instead of 3 frames of input per frame of output, and every
// value read from shared memory serves two frames. More frames would not fit in the registers.
constexpr int kFrames = 2;
constexpr int kInputFrames = kFrames + 2;

constexpr int round_up_to_vector(int channels) {
  return channels == 1 ? 1 : (channels + 3) / 4 * 4;
}

template <int kStride, int kBlock>
struct Shape {
  // Registers at kStride 1, kBlock 8: 64 sums, 24 inputs, 8 weights, so four blocks of 128 threads
  // fit into the 64 K registers of a multiprocessor. At stride 2 the rows of input between two rows
  // of output cost as much as two more rows of output.
  static constexpr int kRows = kStride == 1 ? 4 : 2;
  static constexpr int kInputRows = (kRows - 1) * kStride + 3;
  static constexpr int kInputColumns = (kLanes - 1) * kStride + 3;
  static constexpr int kPixels = kFrames * kRows;  // of a thread

  // Even and odd columns of the input lie apart at stride 2, so that a warp reads 32 banks.
  static constexpr int kEvenColumns = (kInputColumns + 1) / 2;

  // Weights of a slot are read as vectors of four, hence padded.
  static constexpr int kPitch = round_up_to_vector(kBlock);
  static constexpr int kOutBlock = kBlock == 1 ? 4 : kBlock;
  static constexpr int kOutPitch = round_up_to_vector(kOutBlock);

  // Depthwise and three-channel blocks need few registers; more warps then hide the latencies.
  static constexpr int kBlocksPerProcessor = kBlock <= 3 ? 5 : 4;

  static constexpr __host__ __device__ int input_rows(int pixel_warps) {
    return (pixel_warps * kRows - 1) * kStride + 3;
  }
  // Floats of one channel of the input tile: 816 (stride 1) or 1300 (stride 2) with one band of
  // rows.
  static constexpr __host__ __device__ int input_channel(int pixel_warps) {
    return kInputFrames * input_rows(pixel_warps) * kInputColumns;
  }

  // Shared memory at its most, in floats: the weights of four slots and four input channels, then
  // the middle result (4 slots of 256 pixels: 32 KB with kBlock 8) in the same place as the input
  // of four channels (12.8 KB, 20.3 KB at stride 2). Fewer and taller bands share their border
  // rows.
  static constexpr int kMaxWeights = kWarps * kWarps * kTaps * kPitch;
  static constexpr int kMaxMiddle = kWarps * kBlock * kPixels * kLanes;
  static constexpr int kMaxInput = kWarps * input_channel(1);
  static_assert((kMaxWeights + (kMaxMiddle > kMaxInput ? kMaxMiddle : kMaxInput)) *
                    int{sizeof(float)} <=
                kMaxSharedBytes);
};

struct Plan {
  int slot_warps, pixel_warps;
  int slots_per_group, slots;
  int passes;
  int chunk;          // input channels of each group per step
  int weight_floats;  // shared memory in front of the input tile
  int shared_bytes;
  int64_t tiles_w, tiles_h, tiles_n;
  int64_t tiles;  // without pointwise conv each pass is a tile of its own
};

// What one pass computes: `slots` consecutive slots, which lie in the groups from first_group on.
struct Pass {
  int first_slot, first_group, group_count;
};

struct TileOrigin {
  int image, frame, row, column;  // of the output
};

// A slot of channels: the first one and how many there really are (0 beyond the last slot).
struct Slot {
  int group, first_channel, channels;
};

__device__ Slot middle_slot(const GroupPointwiseConv3dParams& p, const Plan& plan, int slot,
                            int block) {
  const int group = slot / plan.slots_per_group;
  const int first = (slot - group * plan.slots_per_group) * block;
  const int middle_per_group = static_cast<int>(p.middle / p.groups);
  const int channels = slot < plan.slots ? min(block, middle_per_group - first) : 0;
  return {group, group * middle_per_group + first, max(channels, 0)};
}

template <int kPitch>
__device__ void read_weights(const float* shared, float (&weights)[kPitch]) {
  if constexpr (kPitch == 1) {
    weights[0] = shared[0];
  } else {
#pragma unroll
    for (int i = 0; i < kPitch; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(shared + i);
      weights[i] = four.x;
      weights[i + 1] = four.y;
      weights[i + 2] = four.z;
      weights[i + 3] = four.w;
    }
  }
}

template <int kPitch>
__device__ void write_weights(const float (&weights)[kPitch], float* shared) {
  if constexpr (kPitch == 1) {
    shared[0] = weights[0];
  } else {
#pragma unroll
    for (int i = 0; i < kPitch; i += 4)
      *reinterpret_cast<float4*>(shared + i) =
          make_float4(weights[i], weights[i + 1], weights[i + 2], weights[i + 3]);
  }
}

// tile[group][channel][frame][row][column] of the input around the output tile; zero outside it.
template <class S, int kStride>
__device__ void load_input(const GroupPointwiseConv3dParams& p, const Plan& plan,
                           const TileOrigin& origin, const Pass& pass, int first_channel,
                           int channels, float* tile) {
  const int rows = S::input_rows(plan.pixel_warps);
  const int size = S::input_channel(plan.pixel_warps);
  const int64_t group_stride = p.channels / p.groups * p.x_strides.channel;
  const float* image = p.x + origin.image * p.x_strides.batch + pass.first_group * group_stride +
                       first_channel * p.x_strides.channel;
  for (int i = threadIdx.x; i < size; i += kThreads) {
    const int line = i / S::kInputColumns;
    const int column = i - line * S::kInputColumns;
    const int frame = line / rows;
    const int row = line - frame * rows;
    const int n = origin.frame - 1 + frame;
    const int h = origin.row * kStride - 1 + row;
    const int w = origin.column * kStride - 1 + column;
    const bool inside = n >= 0 && n < p.frames && h >= 0 && h < p.height && w >= 0 && w < p.width;
    const int64_t offset = n * p.x_strides.frame + h * p.x_strides.row + w * p.x_strides.column;
    const int at = kStride == 1 ? column : column % 2 * S::kEvenColumns + column / 2;
    float* destination = tile + line * S::kInputColumns + at;
    for (int g = 0; g < pass.group_count; ++g) {
      const int64_t group_offset = offset + g * group_stride;
      for (int c = 0; c < channels; ++c) {
        *destination = inside ? __ldg(image + group_offset + c * p.x_strides.channel) : 0.0f;
        destination += size;
      }
    }
  }
}

// shared[slot][channel][tap][kPitch] of the pass's slots; zero where a slot has fewer channels.
template <class S, int kBlock>
__device__ void load_weights(const GroupPointwiseConv3dParams& p, const Plan& plan,
                             const Pass& pass, int first_channel, int channels, float* shared) {
  const int64_t row = p.channels / p.groups * kTaps;  // of the weights of a middle channel
  const int taps = channels * kTaps;
  for (int i = threadIdx.x; i < plan.slot_warps * taps; i += kThreads) {
    const int warp = i / taps;
    const Slot slot = middle_slot(p, plan, pass.first_slot + warp, kBlock);
    const float* source =
        p.weight + slot.first_channel * row + first_channel * kTaps + (i - warp * taps);
    float weights[S::kPitch] = {};
#pragma unroll
    for (int m = 0; m < kBlock; ++m)
      if (m < slot.channels) weights[m] = __ldg(source + m * row);
    write_weights(weights, shared + i * S::kPitch);
  }
}

// sums += conv of `channels` channels. `tile` points to the thread's first input of the first one.
template <class S, int kStride, int kBlock>
__device__ void convolve(const float* tile, int channel_size, int frame_size, int channels,
                         const float* shared_weights, float (&sums)[kFrames][S::kRows][kBlock]) {
  for (int c = 0; c < channels; ++c) {
#pragma unroll
    for (int kw = 0; kw < 3; ++kw) {
      const int column = kStride == 1 ? kw : kw % 2 * S::kEvenColumns + kw / 2;
      float inputs[kInputFrames][S::kInputRows];
#pragma unroll
      for (int n = 0; n < kInputFrames; ++n)
#pragma unroll
        for (int h = 0; h < S::kInputRows; ++h)
          inputs[n][h] = tile[n * frame_size + h * S::kInputColumns + column];
#pragma unroll
      for (int kn = 0; kn < 3; ++kn)
#pragma unroll
        for (int kh = 0; kh < 3; ++kh) {
          float weights[S::kPitch];
          read_weights(shared_weights + ((kn * 3 + kh) * 3 + kw) * S::kPitch, weights);
#pragma unroll
          for (int n = 0; n < kFrames; ++n)
#pragma unroll
            for (int h = 0; h < S::kRows; ++h)
#pragma unroll
              for (int m = 0; m < kBlock; ++m)
                sums[n][h][m] = fmaf(weights[m], inputs[n + kn][h * kStride + kh], sums[n][h][m]);
        }
    }
    tile += channel_size;
    shared_weights += kTaps * S::kPitch;
  }
}

// The pixels of a thread that exist: `frames` times `rows`, from these offsets on.
struct ThreadPixels {
  int64_t y_offset, residual_offset;
  int frames, rows;

  __device__ bool contains(int n, int h) const { return n < frames && h < rows; }
};

template <class S>
__device__ ThreadPixels thread_pixels(const GroupPointwiseConv3dParams& p, const TileOrigin& origin,
                                      int pixel_warp) {
  const int row = origin.row + pixel_warp * S::kRows;
  const int column = origin.column + static_cast<int>(threadIdx.x) % kLanes;
  const auto offset = [&](const Strides5& strides) {
    return origin.image * strides.batch + origin.frame * strides.frame + row * strides.row +
           column * strides.column;
  };
  return {offset(p.y_strides), offset(p.residual_strides),
          static_cast<int>(p.frames) - origin.frame,
          column < p.width_out ? static_cast<int>(p.height_out) - row : 0};
}

__device__ int64_t at(const Strides5& strides, int64_t channel, int64_t n, int64_t h) {
  return channel * strides.channel + n * strides.frame + h * strides.row;
}

// Bias, activation and residual, then to memory.
template <class S, int kChannels>
__device__ void store_result(const GroupPointwiseConv3dParams& p, const ThreadPixels& pixels,
                             int first_channel, int channels, const float* bias, bool activate,
                             const float (&sums)[kFrames][S::kRows][kChannels]) {
#pragma unroll
  for (int n = 0; n < kFrames; ++n)
#pragma unroll
    for (int h = 0; h < S::kRows; ++h) {
      if (!pixels.contains(n, h)) continue;
      float* y = p.y + pixels.y_offset + at(p.y_strides, first_channel, n, h);
      const float* residual = nullptr;
      if (p.residual)
        residual =
            p.residual + pixels.residual_offset + at(p.residual_strides, first_channel, n, h);
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        if (k >= channels) continue;
        float value = sums[n][h][k];
        if (bias) value += __ldg(bias + first_channel + k);
        if (activate) value = relu_of(value);
        if (residual) {
          value += __ldg(residual + k * p.residual_strides.channel);
          if (p.residual_relu) value = relu_of(value);
        }
        y[k * p.y_strides.channel] = value;
      }
    }
}

// middle[channel of the pass][band][frame][row][lane]; zero where a slot has fewer channels.
template <class S, int kBlock>
__device__ void store_middle(const GroupPointwiseConv3dParams& p, const Plan& plan,
                             const Slot& slot, int slot_warp, int pixel_warp,
                             const float (&sums)[kFrames][S::kRows][kBlock], float* middle) {
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int m = 0; m < kBlock; ++m) {
    const bool real = m < slot.channels;
    const float bias = real && p.bias ? __ldg(p.bias + slot.first_channel + m) : 0.0f;
    float* row = middle +
                 ((slot_warp * kBlock + m) * plan.pixel_warps + pixel_warp) * S::kPixels * kLanes +
                 lane;
#pragma unroll
    for (int n = 0; n < kFrames; ++n)
#pragma unroll
      for (int h = 0; h < S::kRows; ++h) {
        float value = sums[n][h][m] + bias;
        if (p.relu) value = relu_of(value);
        row[(n * S::kRows + h) * kLanes] = real ? value : 0.0f;
      }
  }
}

// shared[channel of the pass][output slot][kOutPitch] from output channel first_out on.
template <class S, int kBlock>
__device__ void load_pointwise_weights(const GroupPointwiseConv3dParams& p, const Plan& plan,
                                       const Pass& pass, int first_out, float* shared) {
  const int rows = plan.slot_warps * kBlock;
  for (int i = threadIdx.x; i < rows * plan.slot_warps; i += kThreads) {
    const int out_slot = i / rows;
    const int row = i - out_slot * rows;
    const int warp = row / kBlock;
    const int m = row - warp * kBlock;
    const Slot slot = middle_slot(p, plan, pass.first_slot + warp, kBlock);
    const int64_t first = first_out + out_slot * S::kOutBlock;
    float weights[S::kOutPitch] = {};
    if (m < slot.channels) {
      const float* source = p.pointwise_weight + first * p.middle + slot.first_channel + m;
#pragma unroll
      for (int k = 0; k < S::kOutBlock; ++k)
        if (first + k < p.channels_out) weights[k] = __ldg(source + k * p.middle);
    }
    write_weights(weights, shared + (row * plan.slot_warps + out_slot) * S::kOutPitch);
  }
}

// What the middle channels of a pass contribute to every output channel.
template <class S, int kBlock>
__device__ void add_pointwise(const GroupPointwiseConv3dParams& p, const Plan& plan,
                              const Pass& pass, const ThreadPixels& pixels, int slot_warp,
                              int pixel_warp, bool first_pass, bool last_pass, const float* middle,
                              float* shared) {
  constexpr int kOut = S::kOutBlock;
  const int rows = plan.slot_warps * kBlock;
  const float* inputs = middle + pixel_warp * S::kPixels * kLanes + threadIdx.x % kLanes;
  const int row_size = plan.pixel_warps * S::kPixels * kLanes;
  for (int64_t first_out = 0; first_out < p.channels_out; first_out += plan.slot_warps * kOut) {
    __syncthreads();  // the middle is complete, and the last weights are no longer needed
    load_pointwise_weights<S, kBlock>(p, plan, pass, static_cast<int>(first_out), shared);
    __syncthreads();
    const int out = static_cast<int>(first_out) + slot_warp * kOut;
    const int channels = static_cast<int>(min(p.channels_out - out, static_cast<int64_t>(kOut)));
    if (channels <= 0) continue;

    float sums[kFrames][S::kRows][kOut] = {};
    if (!first_pass) {
#pragma unroll
      for (int n = 0; n < kFrames; ++n)
#pragma unroll
        for (int h = 0; h < S::kRows; ++h) {
          if (!pixels.contains(n, h)) continue;
          const float* y = p.y + pixels.y_offset + at(p.y_strides, out, n, h);
#pragma unroll
          for (int k = 0; k < kOut; ++k)
            if (k < channels) sums[n][h][k] = y[k * p.y_strides.channel];
        }
    }
    for (int row = 0; row < rows; ++row) {
      float weights[S::kOutPitch];
      read_weights(shared + (row * plan.slot_warps + slot_warp) * S::kOutPitch, weights);
#pragma unroll
      for (int n = 0; n < kFrames; ++n)
#pragma unroll
        for (int h = 0; h < S::kRows; ++h) {
          const float input = inputs[row * row_size + (n * S::kRows + h) * kLanes];
#pragma unroll
          for (int k = 0; k < kOut; ++k) sums[n][h][k] = fmaf(weights[k], input, sums[n][h][k]);
        }
    }
    if (last_pass) {
      store_result<S, kOut>(p, pixels, out, channels, p.pointwise_bias, p.pointwise_relu, sums);
    } else {
#pragma unroll
      for (int n = 0; n < kFrames; ++n)
#pragma unroll
        for (int h = 0; h < S::kRows; ++h) {
          if (!pixels.contains(n, h)) continue;
          float* y = p.y + pixels.y_offset + at(p.y_strides, out, n, h);
#pragma unroll
          for (int k = 0; k < kOut; ++k)
            if (k < channels) y[k * p.y_strides.channel] = sums[n][h][k];
        }
    }
  }
}

template <int kStride, int kBlock>
__global__ void __launch_bounds__(kThreads, Shape<kStride, kBlock>::kBlocksPerProcessor)
    group_pointwise_conv3d_kernel(const __grid_constant__ GroupPointwiseConv3dParams p,
                                  const __grid_constant__ Plan plan) {
  using S = Shape<kStride, kBlock>;
  auto* shared = reinterpret_cast<float*>(dynamic_shared_memory());
  float* weights = shared;
  float* tile = shared + plan.weight_floats;  // the input, and after it the middle result
  const int lane = threadIdx.x % kLanes;
  const int slot_warp = threadIdx.x / kLanes % plan.slot_warps;
  const int pixel_warp = threadIdx.x / kLanes / plan.slot_warps;
  const int channels_per_group = static_cast<int>(p.channels / p.groups);
  const int channel_size = S::input_channel(plan.pixel_warps);
  const int frame_size = channel_size / kInputFrames;

  for (int64_t t = blockIdx.x; t < plan.tiles; t += gridDim.x) {
    int64_t rest = t;
    int first_pass = 0, end_pass = plan.passes;
    if (!p.pointwise) {
      first_pass = static_cast<int>(rest % plan.passes);
      end_pass = first_pass + 1;
      rest /= plan.passes;
    }
    TileOrigin origin;
    origin.column = static_cast<int>(rest % plan.tiles_w) * kLanes;
    rest /= plan.tiles_w;
    origin.row = static_cast<int>(rest % plan.tiles_h) * (plan.pixel_warps * S::kRows);
    rest /= plan.tiles_h;
    origin.frame = static_cast<int>(rest % plan.tiles_n) * kFrames;
    origin.image = static_cast<int>(rest / plan.tiles_n);
    const ThreadPixels pixels = thread_pixels<S>(p, origin, pixel_warp);

    for (int i = first_pass; i < end_pass; ++i) {
      Pass pass;
      pass.first_slot = i * plan.slot_warps;
      pass.first_group = pass.first_slot / plan.slots_per_group;
      const int last_slot = min(pass.first_slot + plan.slot_warps, plan.slots) - 1;
      pass.group_count = last_slot / plan.slots_per_group - pass.first_group + 1;
      const Slot slot = middle_slot(p, plan, pass.first_slot + slot_warp, kBlock);

      float sums[kFrames][S::kRows][kBlock] = {};
      for (int c = 0; c < channels_per_group; c += plan.chunk) {
        const int channels = min(plan.chunk, channels_per_group - c);
        __syncthreads();  // what the last step left in shared memory is no longer needed
        load_input<S, kStride>(p, plan, origin, pass, c, channels, tile);
        load_weights<S, kBlock>(p, plan, pass, c, channels, weights);
        __syncthreads();
        if (slot.channels > 0) {
          const float* inputs = tile + (slot.group - pass.first_group) * channels * channel_size +
                                pixel_warp * S::kRows * kStride * S::kInputColumns + lane;
          convolve<S, kStride, kBlock>(inputs, channel_size, frame_size, channels,
                                       weights + slot_warp * channels * kTaps * S::kPitch, sums);
        }
      }
      if (p.pointwise) {
        __syncthreads();  // the middle takes the place of the input
        store_middle<S, kBlock>(p, plan, slot, slot_warp, pixel_warp, sums, tile);
        add_pointwise<S, kBlock>(p, plan, pass, pixels, slot_warp, pixel_warp, i == 0,
                                 i == plan.passes - 1, tile, weights);
      } else {
        store_result<S, kBlock>(p, pixels, slot.first_channel, slot.channels, p.bias, p.relu, sums);
      }
    }
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct SlotPlan {
  int64_t slots_per_group, slots, slot_warps, passes;
};

SlotPlan plan_slots(const GroupPointwiseConv3dParams& p, int block) {
  SlotPlan s;
  s.slots_per_group = ceil_div(p.middle / p.groups, block);
  if (s.slots_per_group == 0) s.slots_per_group = 1;  // no middle channels: one empty slot
  s.slots = p.groups * s.slots_per_group;
  s.slot_warps = s.slots >= 3 ? 4 : s.slots;
  s.passes = ceil_div(s.slots, s.slot_warps);
  return s;
}

// The most groups that the slots of one pass lie in.
int64_t groups_of_pass(const SlotPlan& s, int64_t groups) {
  int64_t reach = (s.slot_warps + s.slots_per_group - 2) / s.slots_per_group + 1;
  // Passes that begin and end with a group reach no further.
  if (s.slots_per_group % s.slot_warps == 0) reach = 1;
  if (s.slot_warps % s.slots_per_group == 0) reach = s.slot_warps / s.slots_per_group;
  if (reach > s.slot_warps) reach = s.slot_warps;
  return reach < groups ? reach : groups;
}

template <int kStride, int kBlock>
cudaError_t launch_block(const GroupPointwiseConv3dParams& p, cudaStream_t stream) {
  using S = Shape<kStride, kBlock>;
  const SlotPlan s = plan_slots(p, kBlock);
  Plan plan;
  plan.slot_warps = static_cast<int>(s.slot_warps);
  plan.pixel_warps = kWarps / plan.slot_warps;
  plan.slots_per_group = static_cast<int>(s.slots_per_group);
  plan.slots = static_cast<int>(s.slots);
  plan.passes = static_cast<int>(s.passes);

  // The tile holds at most one channel per slot warp, shared out among the groups of a pass.
  const int64_t groups = groups_of_pass(s, p.groups);
  const int64_t chunk = s.slot_warps / groups;
  const int64_t channels_per_group = p.channels / p.groups;
  plan.chunk = static_cast<int>(chunk < channels_per_group ? chunk : channels_per_group);
  if (plan.chunk == 0) plan.chunk = 1;

  int weights = plan.slot_warps * plan.chunk * kTaps * S::kPitch;
  int tile = static_cast<int>(groups) * plan.chunk * S::input_channel(plan.pixel_warps);
  if (p.pointwise) {
    const int pointwise = plan.slot_warps * kBlock * plan.slot_warps * S::kOutPitch;
    if (pointwise > weights) weights = pointwise;
    const int middle = plan.slot_warps * kBlock * plan.pixel_warps * S::kPixels * kLanes;
    if (middle > tile) tile = middle;
  }
  plan.weight_floats = (weights + 3) / 4 * 4;
  plan.shared_bytes = (plan.weight_floats + tile) * static_cast<int>(sizeof(float));

  plan.tiles_w = ceil_div(p.width_out, kLanes);
  plan.tiles_h = ceil_div(p.height_out, plan.pixel_warps * S::kRows);
  plan.tiles_n = ceil_div(p.frames, kFrames);
  plan.tiles = p.batch * plan.tiles_n * plan.tiles_h * plan.tiles_w;
  if (!p.pointwise) plan.tiles *= plan.passes;
  const unsigned blocks = static_cast<unsigned>(plan.tiles < INT_MAX ? plan.tiles : INT_MAX);
  return launch(group_pointwise_conv3d_kernel<kStride, kBlock>, dim3(blocks), kThreads,
                plan.shared_bytes, stream, p, plan);
}

// The block of channels that costs least: each pass takes time for its channels and, about as much
// as two of them, for reading the input; slots that stay empty count as well.
int choose_block(const GroupPointwiseConv3dParams& p) {
  int best = 0;
  int64_t best_cost = 0;
  for (const int block : {8, 6, 3, 1}) {
    const SlotPlan s = plan_slots(p, block);
    const int64_t cost = s.passes * s.slot_warps * (block + 2);
    if (best == 0 || cost < best_cost) {
      best = block;
      best_cost = cost;
    }
  }
  return best;
}

template <int kStride>
cudaError_t launch_stride(const GroupPointwiseConv3dParams& p, cudaStream_t stream) {
  switch (choose_block(p)) {
    case 8:
      return launch_block<kStride, 8>(p, stream);
    case 6:
      return launch_block<kStride, 6>(p, stream);
    case 3:
      return launch_block<kStride, 3>(p, stream);
    default:
      return launch_block<kStride, 1>(p, stream);
  }
}

}  // namespace

cudaError_t sums_wait_in_result(const GroupPointwiseConv3dParams& p, bool* wait) {
  DeviceLimits limits;
  const cudaError_t error = device_limits(&limits);
  if (error != cudaSuccess) return error;
  QuadsPlan plan;
  *wait = p.pointwise && plan_slots(p, choose_block(p)).passes > 1 &&
          !plan_group_pointwise_conv3d_quads(p, limits, &plan);
  return cudaSuccess;
}

cudaError_t launch_group_pointwise_conv3d(const GroupPointwiseConv3dParams& p,
                                          cudaStream_t stream) {
  if (p.batch == 0 || p.channels_out == 0 || p.frames == 0 || p.height_out == 0 || p.width_out == 0)
    return cudaSuccess;
  DeviceLimits limits;
  const cudaError_t error = device_limits(&limits);
  if (error != cudaSuccess) return error;
  QuadsPlan plan;
  if (plan_group_pointwise_conv3d_quads(p, limits, &plan))
    return launch_group_pointwise_conv3d_quads(p, plan, stream);
  return p.stride == 1 ? launch_stride<1>(p, stream) : launch_stride<2>(p, stream);
}

}  // namespace gplws::cuda
