// The kernels behind group_pointwise_conv3d_half.h, compiled once for each 16-bit type.
//
// A block takes a tile of output columns and rows and walks through the frames. Of each input frame
// it copies the tile with its border into a ring in shared memory, asynchronously, one or two
// frames ahead. A warp holds the sums of three output frames at once: each input frame is what the
// next, this and the last output frame see of it, so that it is loaded from shared memory only
// once. When an input frame has been added, the last output frame is complete; the sums move up.
//
// The 3x3x3 conv is a product of matrices: rows are 16 neighbouring pixels, columns the channels
// out of a slab, and the inner dimension runs through the columns of the kernel and the channels in
// of the slab, for each row and frame of the kernel. Operands of one input row serve the three rows
// of the kernel. A slab is as many groups as waste the fewest products when padded to eight
// channels. The middle result goes to shared memory, 16-bit, where each warp picks up 16 pixels of
// all channels and multiplies them by the pointwise weights.
//
// A lane holds 2 * tiles consecutive channels (columns of a product may stand for any channels), so
// that the four lanes of a pixel store neighbours, together whole sectors of memory.
//
// Every element is summed in one fixed order (frame of the kernel from the last to the first;
// column and channel, 16 together; row of the kernel; middle channels, 16 together), whatever the
// tile or the warp that it falls into.
#pragma once

#include "cuda/device.h"
#include "cuda/group_pointwise_conv3d_half.h"

namespace gplws::cuda {
namespace {

constexpr int kMaxWarps = 8;
constexpr int kMaxThreads = kMaxWarps * kLanesPerWarp;
constexpr int kPixels = 16;       // rows of a product
constexpr int kKernelPlanes = 9;  // rows times frames of the kernel
constexpr int kPackThreads = 256;
constexpr int kMaxOutGroup = 4;

// Channel that column `column` of tile `tile` stands for, among 8 * tiles of them.
__host__ __device__ constexpr int channel_of(int tiles, int tile, int column) {
  return 2 * tiles * (column / 2) + 2 * tile + column % 2;
}

// A slab's share: which channels of x and of the middle a warp works on.
struct SlabShare {
  int input;         // slab of input
  int first_output;  // channel of the middle
  int outputs;       // how many exist; may be 0
};

__device__ inline SlabShare share_of(const HalfPlan& plan, int slab) {
  SlabShare share;
  share.input = slab / plan.parts;
  const int part = slab - share.input * plan.parts;
  share.first_output = share.input * plan.slab_outputs + part * plan.tiles * 8;
  const int end = share.input * plan.slab_outputs + plan.slab_outputs;
  int outputs = slab < plan.slabs ? end - share.first_output : 0;
  if (outputs > plan.tiles * 8) outputs = plan.tiles * 8;
  share.outputs = outputs > 0 ? outputs : 0;
  return share;
}

// One word of the packed weights of the 3x3x3 conv: rows 2 (lane % 4) and the next of a product's
// second operand. conv[slab][pair][row, frame of the kernel][tile][lane][half].
template <class T>
__device__ uint32_t packed_conv_word(const GroupPointwiseConv3dHalfParams& p, const HalfPlan& plan,
                                     int64_t word) {
  const int half = static_cast<int>(word % 2);
  const int lane = static_cast<int>(word / 2 % kLanesPerWarp);
  int64_t rest = word / (2 * kLanesPerWarp);
  const int tile = static_cast<int>(rest % plan.tiles);
  rest /= plan.tiles;
  const int plane = static_cast<int>(rest % kKernelPlanes);
  rest /= kKernelPlanes;
  const int pair = static_cast<int>(rest % plan.pairs);
  const SlabShare share = share_of(plan, static_cast<int>(rest / plan.pairs));
  const int output = channel_of(plan.tiles, tile, lane / 4);
  const int unit = 2 * pair + half;  // a column of the kernel and a chunk of channels
  const int column = unit / plan.chunks;
  const int first = (unit - column * plan.chunks) * 8 + 2 * (lane % 4);
  if (output >= share.outputs || column > 2) return 0;
  const int64_t m = share.first_output + output;
  const int64_t group_inputs = p.channels / p.groups, group_outputs = p.middle / p.groups;
  const int64_t group = m / group_outputs - share.input * (plan.slab_channels / group_inputs);
  const T* weight = static_cast<const T*>(p.weight) + m * group_inputs * 27 + plane % 3 * 9 +
                    plane / 3 * 3 + column;
  uint32_t packed = 0;
  for (int i = 0; i < 2; ++i) {
    const int64_t c = first + i - group * group_inputs;
    if (c >= 0 && c < group_inputs)
      packed |= static_cast<uint32_t>(weight[c * 27].bits) << (16 * i);
  }
  return packed;
}

// The same for the pointwise conv: pointwise[pair][tile of channels out][lane][half].
template <class T>
__device__ uint32_t packed_pointwise_word(const GroupPointwiseConv3dHalfParams& p,
                                          const HalfPlan& plan, int64_t word) {
  const int half = static_cast<int>(word % 2);
  const int lane = static_cast<int>(word / 2 % kLanesPerWarp);
  const int64_t rest = word / (2 * kLanesPerWarp);
  const int out_tile = static_cast<int>(rest % plan.out_tiles);
  const int pair = static_cast<int>(rest / plan.out_tiles);
  const int group = out_tile / plan.out_group;
  const int64_t k = group * plan.out_group * 8 +
                    channel_of(plan.out_group, out_tile - group * plan.out_group, lane / 4);
  uint32_t packed = 0;
  for (int i = 0; i < 2; ++i) {
    const int row = pair * 16 + half * 8 + 2 * (lane % 4) + i;
    const SlabShare share = share_of(plan, row / (plan.tiles * 8));
    const int output = row % (plan.tiles * 8);
    if (k >= p.channels_out || output >= share.outputs) continue;
    const T* weight = static_cast<const T*>(p.pointwise_weight);
    packed |= static_cast<uint32_t>(weight[k * p.middle + share.first_output + output].bits)
              << (16 * i);
  }
  return packed;
}

// Weights in the order in which the lanes of a product hold them, padded with zeros.
template <class T>
__global__ void __launch_bounds__(kPackThreads)
    pack_weights_kernel(const __grid_constant__ GroupPointwiseConv3dHalfParams p,
                        const __grid_constant__ HalfPlan plan, uint32_t* packed) {
  const int64_t word = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
  if (word < plan.conv_words) {
    packed[word] = packed_conv_word<T>(p, plan, word);
  } else if (word < plan.conv_words + plan.pointwise_words) {
    packed[word] = packed_pointwise_word<T>(p, plan, word - plan.conv_words);
  }
}

#if defined(GPLWS_CUDA_EMULATION) || GPLWS_HAS_TENSOR_KERNELS

struct BlockTile {
  int64_t image;
  int first_frame, end_frame;  // of the output
  int row, column;
  int first_slab;
  int first_channel, channels;  // of x, that the block reads
};

__device__ inline BlockTile block_tile(const GroupPointwiseConv3dHalfParams& p,
                                       const HalfPlan& plan) {
  BlockTile tile;
  int64_t rest = blockIdx.x;
  tile.first_slab = static_cast<int>(rest % plan.slab_sets) * plan.block_slabs;
  rest /= plan.slab_sets;
  tile.column = static_cast<int>(rest % plan.tiles_w) * plan.tile_columns;
  rest /= plan.tiles_w;
  tile.row = static_cast<int>(rest % plan.tiles_h) * plan.tile_rows;
  rest /= plan.tiles_h;
  tile.first_frame = static_cast<int>(rest % plan.segments * plan.frames_per_segment);
  const int64_t end = tile.first_frame + plan.frames_per_segment;
  tile.end_frame = static_cast<int>(end < p.frames ? end : p.frames);
  tile.image = rest / plan.segments;
  tile.first_channel = tile.first_slab / plan.parts * plan.slab_channels;
  const int channels = plan.block_inputs * plan.slab_channels;
  const int left = static_cast<int>(p.channels) - tile.first_channel;
  tile.channels = channels < left ? channels : left;
  return tile;
}

// Place of column `column` of the input tile in a row of shared memory: at stride 2, even columns
// lie before odd ones, so that neighbouring pixels of the result read neighbouring places.
template <int kStride>
__device__ int place_of(const HalfPlan& plan, int column) {
  return kStride == 1 ? column : column % 2 * plan.odd_columns + column / 2;
}

// How the threads of a block share out rows of `width` items: lane_width threads to a row.
struct RowThreads {
  int lane, lane_width, row, row_step;
};

__device__ inline RowThreads row_threads(int width) {
  const int threads = static_cast<int>(blockDim.x);
  int lane_width = (width + kLanesPerWarp - 1) / kLanesPerWarp * kLanesPerWarp;
  if (lane_width > threads) lane_width = threads;
  const int thread = static_cast<int>(threadIdx.x);
  const int row = thread / lane_width;
  return {thread - row * lane_width, lane_width, row, threads / lane_width};
}

// Copies input frame `frame` of the tile in pieces of kBytes; zeros outside the image.
template <int kStride, int kBytes>
__device__ void copy_frame(const GroupPointwiseConv3dHalfParams& p, const HalfPlan& plan,
                           const BlockTile& tile, int frame, unsigned char* stage) {
  const int pieces = tile.channels * 2 / kBytes;
  const int width = plan.input_columns * pieces;
  const int slab_bytes = 2 * plan.slab_channels;
  const int row_bytes = plan.positions * plan.pixel_bytes;
  const RowThreads threads = row_threads(width);
  if (threads.row >= threads.row_step) return;
  const auto* x = static_cast<const uint16_t*>(p.x);
  const uint16_t* source = x + tile.image * p.x_strides.batch + frame * p.x_strides.frame;
  for (int i = threads.lane; i < width; i += threads.lane_width) {
    const int column = i / pieces;
    const int byte = (i - column * pieces) * kBytes;
    const int slab = byte / slab_bytes;
    const int64_t w = static_cast<int64_t>(tile.column) * kStride - 1 + column;
    const bool inside_w = w >= 0 && w < p.width;
    unsigned char* destination = stage + place_of<kStride>(plan, column) * plan.pixel_bytes +
                                 slab * plan.chunks * 16 + (byte - slab * slab_bytes);
    const uint16_t* pixel = source + w * p.x_strides.column + tile.first_channel + byte / 2;
    for (int row = threads.row; row < plan.input_rows; row += threads.row_step) {
      const int64_t h = static_cast<int64_t>(tile.row) * kStride - 1 + row;
      const bool inside = inside_w && h >= 0 && h < p.height;
      copy_async<kBytes>(destination + row * row_bytes, inside ? pixel + h * p.x_strides.row : x,
                         inside);
    }
  }
}

// The same element by element, for any strides.
template <int kStride>
__device__ void copy_frame_of_elements(const GroupPointwiseConv3dHalfParams& p,
                                       const HalfPlan& plan, const BlockTile& tile, int frame,
                                       unsigned char* stage) {
  const int width = plan.input_columns * tile.channels;
  const int row_bytes = plan.positions * plan.pixel_bytes;
  const RowThreads threads = row_threads(width);
  if (threads.row >= threads.row_step) return;
  const auto* x = static_cast<const uint16_t*>(p.x);
  const uint16_t* source = x + tile.image * p.x_strides.batch + frame * p.x_strides.frame;
  for (int i = threads.lane; i < width; i += threads.lane_width) {
    // Neighbouring threads read what lies nearest in memory.
    const int channel = plan.channels_nearest ? i % tile.channels : i / plan.input_columns;
    const int column = plan.channels_nearest ? i / tile.channels : i % plan.input_columns;
    const int slab = channel / plan.slab_channels;
    const int64_t w = static_cast<int64_t>(tile.column) * kStride - 1 + column;
    const bool inside_w = w >= 0 && w < p.width;
    unsigned char* destination = stage + place_of<kStride>(plan, column) * plan.pixel_bytes +
                                 slab * plan.chunks * 16 +
                                 (channel - slab * plan.slab_channels) * 2;
    const uint16_t* pixel =
        source + w * p.x_strides.column + (tile.first_channel + channel) * p.x_strides.channel;
    for (int row = threads.row; row < plan.input_rows; row += threads.row_step) {
      const int64_t h = static_cast<int64_t>(tile.row) * kStride - 1 + row;
      const bool inside = inside_w && h >= 0 && h < p.height;
      *reinterpret_cast<uint16_t*>(destination + row * row_bytes) =
          inside ? pixel[h * p.x_strides.row] : uint16_t{0};
    }
  }
}

template <int kStride>
__device__ void load_frame(const GroupPointwiseConv3dHalfParams& p, const HalfPlan& plan,
                           const BlockTile& tile, int frame, unsigned char* stages) {
  if (frame >= 0 && frame < p.frames && frame <= tile.end_frame) {
    unsigned char* stage = stages + (frame - tile.first_frame + 1) % plan.stages * plan.stage_bytes;
    switch (plan.granule) {
      case 16:
        copy_frame<kStride, 16>(p, plan, tile, frame, stage);
        break;
      case 8:
        copy_frame<kStride, 8>(p, plan, tile, frame, stage);
        break;
      case 4:
        copy_frame<kStride, 4>(p, plan, tile, frame, stage);
        break;
      default:
        copy_frame_of_elements<kStride>(p, plan, tile, frame, stage);
    }
  }
  commit_copies();  // an empty batch as well: batches are counted
}

// 2 * kTiles values of neighbouring channels of one pixel, from channel `first` on, to y; of them
// only `left` exist.
template <class T, int kTiles>
__device__ void store_channels(const GroupPointwiseConv3dHalfParams& p, const HalfPlan& plan,
                               int64_t image, int frame, int row, int column, int first, int left,
                               float (&values)[2 * kTiles]) {
  const auto offset = [&](const Strides5& strides) {
    return image * strides.batch + frame * strides.frame + row * strides.row +
           column * strides.column + first * strides.channel;
  };
  if (p.residual) {
    const T* residual = static_cast<const T*>(p.residual) + offset(p.residual_strides);
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      if (i >= left) continue;
      values[i] += to_float(residual[i * p.residual_strides.channel]);
      if (p.residual_relu) values[i] = relu_of(values[i]);
    }
  }
  T* y = static_cast<T*>(p.y) + offset(p.y_strides);
  uint32_t words[kTiles];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) words[t] = pack_two<T>(values[2 * t], values[2 * t + 1]);
  const bool whole = 2 * kTiles <= left;
  if constexpr (kTiles == 4) {
    if (whole && plan.store_bytes >= 16) {
      *reinterpret_cast<uint4*>(y) = make_uint4(words[0], words[1], words[2], words[3]);
      return;
    }
  }
  if constexpr (kTiles == 2) {
    if (whole && plan.store_bytes >= 8) {
      *reinterpret_cast<uint2*>(y) = make_uint2(words[0], words[1]);
      return;
    }
  }
  if (whole && plan.store_bytes >= 4) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) reinterpret_cast<uint32_t*>(y)[t] = words[t];
    return;
  }
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i)
    if (i < left)
      y[i * p.y_strides.channel] = T{static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)))};
}

// Bias and pointwise activation of 16 pixels times 16 * kGroup channels in kGroup products each.
template <class T, int kGroup>
__device__ void store_products(const GroupPointwiseConv3dHalfParams& p, const HalfPlan& plan,
                               const BlockTile& tile, int frame, int row, int column, int first,
                               const float (&sums)[kMaxOutGroup][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kLanesPerWarp;
  const int channel = first + 2 * kGroup * (lane % 4);
  if (channel >= p.channels_out) return;
  const T* bias = static_cast<const T*>(p.pointwise_bias);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int w = column + lane / 4 + 8 * half;
    if (w >= p.width_out) continue;
    float values[2 * kGroup];
#pragma unroll
    for (int i = 0; i < 2 * kGroup; ++i) {
      float value = sums[i / 2][2 * half + i % 2];
      if (bias && channel + i < p.channels_out) value += to_float(bias[channel + i]);
      values[i] = p.pointwise_relu ? relu_of(value) : value;
    }
    store_channels<T, kGroup>(p, plan, tile.image, frame, row, w, channel,
                              static_cast<int>(p.channels_out) - channel, values);
  }
}

// The pointwise conv of one output frame: each warp takes 16 pixels at a time.
template <class T>
__device__ void multiply_pointwise(const GroupPointwiseConv3dHalfParams& p, const HalfPlan& plan,
                                   const BlockTile& tile, int frame, const unsigned char* middle,
                                   const uint2* weights) {
  const int lane = static_cast<int>(threadIdx.x) % kLanesPerWarp;
  const int warp = static_cast<int>(threadIdx.x) / kLanesPerWarp;
  for (int set = warp; set < plan.tile_rows * plan.sets_w; set += plan.warps) {
    const int row = tile.row + set / plan.sets_w;
    const int column = tile.column + set % plan.sets_w * kPixels;
    if (row >= p.height_out || column >= p.width_out) continue;
    const unsigned char* pixel =
        middle + (set * kPixels + lane % 16) * plan.middle_bytes + lane / 16 * 16;
    for (int first = 0; first < plan.out_tiles; first += plan.out_group) {
      float sums[kMaxOutGroup][4] = {};
      for (int pair = 0; pair < plan.middle_pairs; ++pair) {
        const MatrixA a = load_four_matrices(pixel + pair * 32);
        const uint2* b = weights + (pair * plan.out_tiles + first) * kLanesPerWarp + lane;
#pragma unroll
        for (int j = 0; j < kMaxOutGroup; ++j)
          if (j < plan.out_group) multiply_add_16(T{}, a, b[j * kLanesPerWarp], sums[j]);
      }
      if (plan.out_group == 4) {
        store_products<T, 4>(p, plan, tile, frame, row, column, first * 8, sums);
      } else if (plan.out_group == 2) {
        store_products<T, 2>(p, plan, tile, frame, row, column, first * 8, sums);
      } else {
        store_products<T, 1>(p, plan, tile, frame, row, column, first * 8, sums);
      }
    }
  }
}

// What a warp computes: 16 columns times kRows rows of the channels of its slab.
template <class T, int kStride, int kTiles, int kRows, WeightPlace kPlace>
struct Warp {
  static constexpr int kInputRows = (kRows - 1) * kStride + 3;

  float sums[3][kRows][kTiles][4] = {};  // of the output frames before, at and behind the input
  uint2 pair_weights[kPlace == WeightPlace::kRegisters ? kKernelPlanes : 1];
  uint32_t last_weights[kPlace == WeightPlace::kRegisters ? kKernelPlanes : 1];

  // With weights in registers there are three columns of one chunk: a pair and a single one.
  __device__ void load_weights(const uint2* weights) {
    if constexpr (kPlace == WeightPlace::kRegisters) {
#pragma unroll
      for (int plane = 0; plane < kKernelPlanes; ++plane) {
        pair_weights[plane] = weights[plane * kLanesPerWarp];
        last_weights[plane] = weights[(kKernelPlanes + plane) * kLanesPerWarp].x;
      }
    }
  }

  // Adds what input rows `a` give in one pair (or, with kLast, in its first half) of a row of the
  // kernel. kAll: all three output frames are wanted, else those of `wanted`.
  template <bool kAll, bool kLast>
  __device__ void add_pair(const MatrixA (&a)[kInputRows], const uint2* weights,
                           const bool (&wanted)[3]) {
#pragma unroll
    for (int kh = 0; kh < 3; ++kh) {
#pragma unroll
      for (int kn = 0; kn < 3; ++kn) {
        if (!kAll && !wanted[kn]) continue;
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          uint2 b;
          if constexpr (kPlace == WeightPlace::kRegisters) {
            b = kLast ? make_uint2(last_weights[kh * 3 + kn], 0u) : pair_weights[kh * 3 + kn];
          } else {
            b = weights[((kh * 3 + kn) * kTiles + t) * kLanesPerWarp];
          }
#pragma unroll
          for (int h = 0; h < kRows; ++h) {
            if constexpr (kLast) {
              multiply_add_8(T{}, a[h * kStride + kh], b.x, sums[2 - kn][h][t]);
            } else {
              multiply_add_16(T{}, a[h * kStride + kh], b, sums[2 - kn][h][t]);
            }
          }
        }
      }
    }
  }

  // Adds an input frame; `pixel` is where the lane's row of the first operand begins in it.
  template <bool kAll>
  __device__ void add_frame(const HalfPlan& plan, const unsigned char* pixel, const uint2* weights,
                            const bool (&wanted)[3]) {
    const int lane = static_cast<int>(threadIdx.x) % kLanesPerWarp;
    const int row_bytes = plan.positions * plan.pixel_bytes;
    const int units = 3 * plan.chunks;
    // Lanes 16 to 31 name the rows of the second unit of a pair.
    int column = 0, chunk = lane / 16;
    const auto row_of_operand = [&] {
      while (chunk >= plan.chunks) {
        chunk -= plan.chunks;
        ++column;
      }
      return pixel + place_of<kStride>(plan, column) * plan.pixel_bytes + chunk * 16;
    };
    MatrixA a[kInputRows];
    for (int pair = 0; pair < units / 2; ++pair) {
      const unsigned char* operand = row_of_operand();
#pragma unroll
      for (int row = 0; row < kInputRows; ++row)
        a[row] = load_four_matrices(operand + row * row_bytes);
      add_pair<kAll, false>(a, weights, wanted);
      weights += kKernelPlanes * kTiles * kLanesPerWarp;
      chunk += 2;
    }
    if (units % 2 == 1) {
      const unsigned char* operand = row_of_operand();
#pragma unroll
      for (int row = 0; row < kInputRows; ++row)
        a[row] = load_two_matrices(operand + row * row_bytes);
      add_pair<kAll, true>(a, weights, wanted);
    }
  }

  // The sums of the output frames move up by one.
  __device__ void advance() {
#pragma unroll
    for (int h = 0; h < kRows; ++h)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[0][h][t][i] = sums[1][h][t][i];
          sums[1][h][t][i] = sums[2][h][t][i];
          sums[2][h][t][i] = 0.0f;
        }
  }
};

template <class T, int kStride, int kTiles, int kRows, WeightPlace kPlace>
__device__ void convolve_tile(const GroupPointwiseConv3dHalfParams& p, const HalfPlan& plan,
                              const uint32_t* packed) {
  unsigned char* shared = dynamic_shared_memory();
  unsigned char* stages = shared + plan.stage_offset;
  unsigned char* middle = shared + plan.middle_offset;
  const BlockTile tile = block_tile(p, plan);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % kLanesPerWarp, warp = thread / kLanesPerWarp;

  // Places of channels that do not exist are zero throughout; so is all else at first.
  for (int i = plan.middle_offset + thread * 16; i < plan.shared_bytes; i += threads * 16)
    *reinterpret_cast<uint4*>(shared + i) = make_uint4(0u, 0u, 0u, 0u);
  const int slab_words = plan.pairs * kKernelPlanes * kTiles * kLanesPerWarp * 2;
  const uint32_t* conv_source = packed + static_cast<int64_t>(tile.first_slab) * slab_words;
  const uint32_t* pointwise_source = packed + plan.conv_words;
  int slabs_here = plan.slabs - tile.first_slab;
  if (slabs_here > plan.block_slabs) slabs_here = plan.block_slabs;
  if constexpr (kPlace == WeightPlace::kShared) {
    for (int i = thread * 4; i < slabs_here * slab_words; i += threads * 4)
      *reinterpret_cast<uint4*>(shared + plan.weight_offset + i * 4) =
          *reinterpret_cast<const uint4*>(conv_source + i);
  }
  if constexpr (kPlace != WeightPlace::kGlobal) {
    for (int i = thread * 4; i < plan.pointwise_words; i += threads * 4)
      *reinterpret_cast<uint4*>(shared + plan.pointwise_offset + i * 4) =
          *reinterpret_cast<const uint4*>(pointwise_source + i);
  }
  const auto* pointwise_weights = reinterpret_cast<const uint2*>(pointwise_source);
  if constexpr (kPlace != WeightPlace::kGlobal)
    pointwise_weights = reinterpret_cast<const uint2*>(shared + plan.pointwise_offset);

  const int local_slab = warp % plan.block_slabs, set = warp / plan.block_slabs;
  const int slab = tile.first_slab + local_slab;
  const SlabShare share = share_of(plan, slab);
  const bool works = share.outputs > 0;
  const int set_row = set / plan.sets_w * kRows, set_column = set % plan.sets_w * kPixels;
  const auto* weights = reinterpret_cast<const uint2*>(conv_source) +
                        static_cast<int64_t>(local_slab) * (slab_words / 2) + lane;
  if constexpr (kPlace == WeightPlace::kShared)
    weights = reinterpret_cast<const uint2*>(shared + plan.weight_offset) +
              local_slab * (slab_words / 2) + lane;

  Warp<T, kStride, kTiles, kRows, kPlace> state;
  if (works) state.load_weights(weights);
  const int first_input = share.input - tile.first_slab / plan.parts;
  const int pixel_offset =
      (set_row * kStride * plan.positions + set_column + lane % 16) * plan.pixel_bytes +
      first_input * plan.chunks * 16;
  const int channel = 2 * kTiles * (lane % 4);  // the lane's first one in the slab
  float bias[2 * kTiles];
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const bool exists = p.bias && channel + i < share.outputs;
    bias[i] =
        exists ? to_float(static_cast<const T*>(p.bias)[share.first_output + channel + i]) : 0.0f;
  }
  __syncthreads();

  for (int ahead = 0; ahead < plan.stages - 1; ++ahead)
    load_frame<kStride>(p, plan, tile, tile.first_frame - 1 + ahead, stages);
  for (int n = tile.first_frame - 1; n <= tile.end_frame; ++n) {
    if (plan.stages == 3) {
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    __syncthreads();  // frame n is here, and all warps are done with frame n - 1
    load_frame<kStride>(p, plan, tile, n + plan.stages - 1, stages);
    if (works && n >= 0 && n < p.frames) {
      const unsigned char* pixel =
          stages + (n - tile.first_frame + 1) % plan.stages * plan.stage_bytes + pixel_offset;
      const bool owned = n >= tile.first_frame && n < tile.end_frame;
      const bool wanted[3] = {n + 1 < tile.end_frame, owned, n > tile.first_frame};
      if (wanted[0] && wanted[1] && wanted[2]) {
        state.template add_frame<true>(plan, pixel, weights, wanted);
      } else {
        state.template add_frame<false>(plan, pixel, weights, wanted);
      }
    }
    if (n > tile.first_frame) {
      const int frame = n - 1;  // complete
#pragma unroll
      for (int h = 0; h < kRows; ++h) {
        const int row = tile.row + set_row + h;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int pixel = lane / 4 + 8 * half;
          const int column = tile.column + set_column + pixel;
          float values[2 * kTiles];
#pragma unroll
          for (int i = 0; i < 2 * kTiles; ++i) {
            const float value = state.sums[0][h][i / 2][2 * half + i % 2] + bias[i];
            values[i] = p.relu ? relu_of(value) : value;
            // Neighbours of a group may be NaN, and zero times NaN is not zero.
            if (channel + i >= share.outputs) values[i] = 0.0f;
          }
          if (p.pointwise) {
            const int place =
                ((set_row + h) * plan.sets_w + set_column / kPixels) * kPixels + pixel;
            auto* words = reinterpret_cast<uint32_t*>(middle + place * plan.middle_bytes +
                                                      (local_slab * kTiles * 8 + channel) * 2);
#pragma unroll
            for (int t = 0; t < kTiles; ++t)
              words[t] = pack_two<T>(values[2 * t], values[2 * t + 1]);
          } else if (row < p.height_out && column < p.width_out && channel < share.outputs) {
            store_channels<T, kTiles>(p, plan, tile.image, frame, row, column,
                                      share.first_output + channel, share.outputs - channel,
                                      values);
          }
        }
      }
      if (p.pointwise) {
        __syncthreads();  // the middle result is complete
        multiply_pointwise<T>(p, plan, tile, frame, middle, pointwise_weights);
      }
    }
    state.advance();
  }
}

#endif  // has tensor kernels

// With few channels two blocks share a multiprocessor: one computes while the other waits.
template <class T, int kStride, int kTiles, int kRows, WeightPlace kPlace>
__global__ void __launch_bounds__(kMaxThreads, kPlace == WeightPlace::kRegisters ? 2 : 1)
    group_pointwise_conv3d_half_kernel(const __grid_constant__ GroupPointwiseConv3dHalfParams p,
                                       const __grid_constant__ HalfPlan plan,
                                       const uint32_t* packed) {
#if defined(GPLWS_CUDA_EMULATION) || GPLWS_HAS_TENSOR_KERNELS
  convolve_tile<T, kStride, kTiles, kRows, kPlace>(p, plan, packed);
#endif
}

template <class T, int kStride, int kTiles, int kRows, WeightPlace kPlace>
cudaError_t launch_tiles(const GroupPointwiseConv3dHalfParams& p, const HalfPlan& plan,
                         const uint32_t* packed, cudaStream_t stream) {
  const auto kernel = group_pointwise_conv3d_half_kernel<T, kStride, kTiles, kRows, kPlace>;
  // The limit belongs to the kernel, not to the launch: another thread that asked for less would
  // take it from this one.
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.granted_bytes);
  if (error != cudaSuccess) return error;
  return launch(kernel, dim3(static_cast<unsigned>(plan.blocks)), plan.warps * kLanesPerWarp,
                plan.shared_bytes, stream, p, plan, packed);
}

template <class T, int kStride, WeightPlace kPlace>
cudaError_t launch_place(const GroupPointwiseConv3dHalfParams& p, const HalfPlan& plan,
                         const uint32_t* packed, cudaStream_t stream) {
  constexpr int kTall = kStride == 1 ? 4 : 2;
  switch (plan.tiles) {
    case 1:
      return launch_tiles<T, kStride, 1, kTall, kPlace>(p, plan, packed, stream);
    case 2:
      return launch_tiles<T, kStride, 2, kTall, kPlace>(p, plan, packed, stream);
    default:
      return launch_tiles<T, kStride, 3, 2, kPlace>(p, plan, packed, stream);
  }
}

template <class T, int kStride>
cudaError_t launch_stride(const GroupPointwiseConv3dHalfParams& p, const HalfPlan& plan,
                          const uint32_t* packed, cudaStream_t stream) {
  if constexpr (kStride == 1) {
    if (plan.weights == WeightPlace::kRegisters)
      return launch_tiles<T, 1, 1, 4, WeightPlace::kRegisters>(p, plan, packed, stream);
  }
  if (plan.weights == WeightPlace::kShared)
    return launch_place<T, kStride, WeightPlace::kShared>(p, plan, packed, stream);
  return launch_place<T, kStride, WeightPlace::kGlobal>(p, plan, packed, stream);
}

}  // namespace

template <class T>
cudaError_t launch_half(const GroupPointwiseConv3dHalfParams& p, const HalfPlan& plan,
                        void* scratch, cudaStream_t stream) {
  auto* packed = static_cast<uint32_t*>(scratch);
  const int64_t blocks = (plan.conv_words + plan.pointwise_words + kPackThreads - 1) / kPackThreads;
  const cudaError_t error = launch(pack_weights_kernel<T>, dim3(static_cast<unsigned>(blocks)),
                                   kPackThreads, 0, stream, p, plan, packed);
  if (error != cudaSuccess) return error;
  const uint32_t* weights = packed;
  return p.stride == 1 ? launch_stride<T, 1>(p, plan, weights, stream)
                       : launch_stride<T, 2>(p, plan, weights, stream);
}

}  // namespace gplws::cuda
