// The kernels behind group_pointwise_conv3d_resident.h, compiled once for each 16-bit type.
//
// A block takes a tile of the output and walks through the frames. A warp has one share of the
// channels out, whose weights it keeps in registers, for 16 units (pixels, or pairs of them) times
// kRows rows. It holds the sums of three output frames: each input frame is what the next, this and
// the last output frame see of it. One barrier a frame: behind it lie the input frame, and the
// middle result of the output frame that was completed one step before, as operands of the
// pointwise conv; each warp multiplies some rows of that, all channels, and stores them.
//
// Every element is summed in one fixed order (bias; frame of the kernel from the last to the first;
// column and channel, 16 together; row of the kernel; middle channels, 16 together).
#pragma once

#include "cuda/group_pointwise_conv3d_resident.h"
#include "cuda/group_pointwise_conv3d_resident_layers.h"

namespace gplws::cuda {
namespace {

constexpr int kPackThreads = 256;

// One word of the packed weights of the 3x3x3 conv: conv[part][share][word of the warp][lane].
template <class T, ResidentLayer kLayer>
__device__ uint32_t packed_conv_word(const GroupPointwiseConv3dHalfParams& p, int64_t word) {
  using G = LayerGeometry<kLayer>;
  const int lane = static_cast<int>(word % kLanesPerWarp);
  int rest = static_cast<int>(word / kLanesPerWarp);
  const int step_word = rest % G::kStepWords;
  rest /= G::kStepWords;
  const int kernel_plane = rest % kTaps9;  // row of the kernel, then frame
  rest /= kTaps9;
  const int warp_plane = rest % G::kWarpPlanes;
  rest /= G::kWarpPlanes;
  const int share = rest % G::kShares, part = rest / G::kShares;
  const int tile = share % G::kGroupTiles;
  const int plane = share / G::kGroupTiles * G::kWarpPlanes + warp_plane;
  const int group = plane / G::kSizes.slices, slice = plane % G::kSizes.slices;
  const auto column = G::column_of(part * G::kGroupTiles + tile, lane / 4);
  const int step = step_word / 2, half = step_word % 2, quarter = lane % 4;
  const bool words = G::kSizes.operand == Operand::kWords && step < G::kFullSteps;
  const int first = 16 * step + (words ? 4 * quarter + 2 * half : 8 * half + 2 * quarter);
  uint32_t packed = 0;
  for (int i = 0; i < 2; ++i) {
    const auto tap = G::tap_of(first + i, lane / 4);
    if (tap.column < 0 || column.channel < 0) continue;
    const int m = group * G::kSizes.group_outputs + column.channel;
    const int channel = slice * G::kPlaneChannels + tap.channel;
    const int at = (m * (G::kPlaneChannels * G::kSizes.slices) + channel) * 27 +
                   kernel_plane % 3 * 9 + kernel_plane / 3 * 3 + tap.column;
    packed |= static_cast<uint32_t>(static_cast<const T*>(p.weight)[at].bits) << (16 * i);
  }
  return packed;
}

// The same for the pointwise conv: pointwise[step][tile of channels out][lane][half].
template <class T, ResidentLayer kLayer>
__device__ uint32_t packed_pointwise_word(const GroupPointwiseConv3dHalfParams& p, int word) {
  using G = LayerGeometry<kLayer>;
  const int half = word % 2, lane = word / 2 % kLanesPerWarp;
  const int rest = word / (2 * kLanesPerWarp);
  const int out_tile = rest % G::kOutTiles, step = rest / G::kOutTiles;
  const int place = out_tile / G::kOutGroup * G::kOutGroup * kTileSize +
                    G::place_in_group(out_tile % G::kOutGroup, lane / 4);
  const int middle_tile = 2 * step + half;
  if (place >= G::kUnitOutputs || middle_tile >= G::kTiles) return 0;
  uint32_t packed = 0;
  for (int i = 0; i < 2; ++i) {
    const auto column = G::column_of(middle_tile % G::kGroupTiles, 2 * (lane % 4) + i);
    if (column.channel < 0 || column.pixel != place / G::kSizes.channels_out) continue;
    const int m = middle_tile / G::kGroupTiles * G::kSizes.group_outputs + column.channel;
    const int at = place % G::kSizes.channels_out * static_cast<int>(p.middle) + m;
    packed |= static_cast<uint32_t>(static_cast<const T*>(p.pointwise_weight)[at].bits) << (16 * i);
  }
  return packed;
}

// Weights in the order in which the lanes of a product hold them, padded with zeros.
template <class T, ResidentLayer kLayer>
__global__ void __launch_bounds__(kPackThreads)
    pack_resident_weights_kernel(const __grid_constant__ GroupPointwiseConv3dHalfParams p,
                                 uint32_t* packed) {
  using G = LayerGeometry<kLayer>;
  const int64_t word = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
  if (word < G::kConvWords) {
    packed[word] = packed_conv_word<T, kLayer>(p, word);
  } else if (word < G::kConvWords + G::kPointwiseWords) {
    packed[word] = packed_pointwise_word<T, kLayer>(p, static_cast<int>(word - G::kConvWords));
  }
}

#if defined(GPLWS_CUDA_EMULATION) || GPLWS_HAS_TENSOR_KERNELS

// Two words of a unit of shared memory that hold three neighbouring values of 16 bits and a zero,
// from value `first` of `words` on.
__device__ inline uint2 three_values(const uint32_t* words, int first) {
  const uint32_t low = words[first / 2], high = words[first / 2 + 1];
  return first % 2 == 0 ? make_uint2(low, high & 0xffffu)
                        : make_uint2(low >> 16 | high << 16, high >> 16);
}

// Values of one pair of 16 bits from each of three planes of channels, as two pixels.
__device__ inline uint4 pixels_of_planes(const uint32_t (&planes)[3]) {
  return make_uint4((planes[0] & 0xffffu) | planes[1] << 16, planes[2] & 0xffffu,
                    planes[0] >> 16 | (planes[1] & 0xffff0000u), planes[2] >> 16);
}

// What a thread of a block does with one tile.
template <class T, ResidentLayer kLayer>
struct ResidentWarp {
  using G = LayerGeometry<kLayer>;
  static constexpr bool kRegroup = G::kSizes.loading == Loading::kRegroup;

  const GroupPointwiseConv3dHalfParams& p;
  const ResidentPlan& plan;
  unsigned char* const shared;
  const int lane, part;
  int share, set_w, set_h;  // of the warp
  int position;

  // Of the tile.
  int first, end;  // frames of the output
  int row, column;
  const uint16_t* source;  // input frame 0 of the image
  uint16_t* target;        // output frame 0 of the image
  int pieces[G::kPieces];  // elements from `source` where a piece of the input lies; -1: zeros
  uint32_t staged[G::kAsync ? 1 : G::kPieces][kRegroup ? 12 : 3];  // of the next input frame

  uint32_t weights[G::kWarpPlanes][kTaps9][G::kStepWords];
  float bias[G::kWarpPlanes][2];  // of the lane's columns
  float sums[3][G::kRows][G::kWarpPlanes][4];

  __device__ ResidentWarp(const GroupPointwiseConv3dHalfParams& params,
                          const ResidentPlan& resident_plan)
      : p(params),
        plan(resident_plan),
        shared(dynamic_shared_memory()),
        lane(static_cast<int>(threadIdx.x) % kLanesPerWarp),
        part(static_cast<int>(blockIdx.y)) {
    const int warp = static_cast<int>(threadIdx.x) / kLanesPerWarp;
    share = warp % G::kShares;
    position = warp / G::kShares;
    set_w = position % G::kSizes.sets_w;
    set_h = position / G::kSizes.sets_w;
  }

  // ---- what stays from tile to tile

  __device__ void load_weights(const uint32_t* packed) {
    const uint32_t* words =
        packed + static_cast<int64_t>(part * G::kShares + share) * G::kWarpWords * kLanesPerWarp;
#pragma unroll
    for (int i = 0; i < G::kWarpPlanes; ++i)
#pragma unroll
      for (int k = 0; k < kTaps9; ++k)
#pragma unroll
        for (int s = 0; s < G::kStepWords; ++s)
          weights[i][k][s] = words[((i * kTaps9 + k) * G::kStepWords + s) * kLanesPerWarp + lane];

#pragma unroll
    for (int i = 0; i < G::kWarpPlanes; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int plane = share / G::kGroupTiles * G::kWarpPlanes + i;
        const auto at =
            G::column_of(part * G::kGroupTiles + share % G::kGroupTiles, 2 * (lane % 4) + j);
        const int m = plane / G::kSizes.slices * G::kSizes.group_outputs + at.channel;
        const bool has = p.bias && at.channel >= 0 && plane % G::kSizes.slices == 0;
        bias[i][j] = has ? to_float(static_cast<const T*>(p.bias)[m]) : 0.0f;
      }

    if constexpr (G::kPointwise) {
      const auto* from = reinterpret_cast<const uint4*>(packed + G::kConvWords);
      auto* to = reinterpret_cast<uint4*>(shared + G::kPointwiseOffset);
      for (int i = static_cast<int>(threadIdx.x); i < G::kPointwiseWords / 4; i += G::kThreads)
        to[i] = from[i];
      // In the order of the columns of the products.
      auto* pointwise_bias = reinterpret_cast<float*>(shared + G::kPointwiseBiasOffset);
      for (int i = static_cast<int>(threadIdx.x); i < G::kOutTiles * kTileSize; i += G::kThreads) {
        const int tile = i / kTileSize;
        const int place = tile / G::kOutGroup * G::kOutGroup * kTileSize +
                          G::place_in_group(tile % G::kOutGroup, i % kTileSize);
        const bool has = p.pointwise_bias && place < G::kUnitOutputs;
        const auto* values = static_cast<const T*>(p.pointwise_bias);
        pointwise_bias[i] = has ? to_float(values[place % G::kSizes.channels_out]) : 0.0f;
      }
    }
    // What the last half of a product reaches behind a row meets weights of zero, but must be
    // finite.
    constexpr int kUsed = G::kInputColumns * G::kPixelBytes;
    constexpr int kTail = (G::kRowBytes - kUsed) / 4;
    if constexpr (kTail > 0) {
      for (int i = static_cast<int>(threadIdx.x);
           i < G::kStages * G::kPlanes * G::kInputRows * kTail; i += G::kThreads)
        *reinterpret_cast<uint32_t*>(shared + G::kStageOffset + i / kTail * G::kRowBytes + kUsed +
                                     i % kTail * 4) = 0;
    }
  }

  // ---- input

  // Row, and piece in the row, of piece `i` of this thread; false: there is none.
  __device__ bool piece_of(int i, int* piece_row, int* piece) const {
    const int number = static_cast<int>(threadIdx.x) + i * G::kThreads;
    *piece_row = number / G::kRowPieces;
    *piece = number - *piece_row * G::kRowPieces;
    return number < G::kInputRows * G::kRowPieces;
  }

  __device__ void enter_tile(int64_t number) {
    int64_t rest = number;
    column = static_cast<int>(rest % plan.tiles_w) * G::kTileColumns;
    rest /= plan.tiles_w;
    row = static_cast<int>(rest % plan.tiles_h) * G::kTileRows;
    rest /= plan.tiles_h;
    first = static_cast<int>(rest % plan.segments) * plan.frames_per_segment;
    const int64_t image = rest / plan.segments;
    end = min(first + plan.frames_per_segment, static_cast<int>(p.frames));
    source = static_cast<const uint16_t*>(p.x) + image * p.x_strides.batch;
    target = static_cast<uint16_t*>(p.y) + image * p.y_strides.batch;
    constexpr int kPiecePixels = G::kAsync ? 1 : 16 / G::kPixelBytes;
    constexpr int kPixelPieces = G::kAsync ? G::kSizes.inputs * 2 / G::kPieceBytes : 1;
#pragma unroll
    for (int i = 0; i < G::kPieces; ++i) {
      int piece_row, piece;
      const bool exists = piece_of(i, &piece_row, &piece);
      const int h = row * G::kStride - 1 + piece_row;
      const int place = piece / kPixelPieces;
      const int w = column * G::kStride - G::kLead + place * kPiecePixels;
      const bool inside = exists && h >= 0 && h < p.height && w >= 0 && w < p.width;
      const int within = (piece - place * kPixelPieces) * (G::kPieceBytes / 2);
      pieces[i] = inside ? h * static_cast<int>(p.x_strides.row) +
                               w * static_cast<int>(p.x_strides.column) + within
                         : -1;
    }
#pragma unroll
    for (int slot = 0; slot < 3; ++slot) reset(slot);
  }

  __device__ bool has_input(int frame) const {
    return frame >= 0 && frame < p.frames && frame <= end;
  }

  __device__ unsigned char* stage_of(int frame) const {
    return shared + G::kStageOffset + (frame - first + 1) % G::kStages * G::kStageBytes;
  }

  // Starts copying input frame `frame` to its stage.
  __device__ void copy_frame(int frame) {
    if constexpr (G::kAsync) {
      if (has_input(frame)) {
        const uint16_t* from = source + frame * p.x_strides.frame;
        unsigned char* stage = stage_of(frame);
        constexpr int kPixelPieces = G::kSizes.inputs * 2 / G::kPieceBytes;
        constexpr int kPlanePieces = kPixelPieces / G::kPlanes;
#pragma unroll
        for (int i = 0; i < G::kPieces; ++i) {
          int piece_row, piece;
          if (!piece_of(i, &piece_row, &piece)) continue;
          const int pixel = piece / kPixelPieces, within = piece - pixel * kPixelPieces;
          const int place = G::kSplit ? pixel % 2 * G::kOddPlace + pixel / 2 : pixel;
          const int plane = within / kPlanePieces;
          unsigned char* to = stage + plane * G::kPlaneBytes + piece_row * G::kRowBytes +
                              place * G::kPixelBytes +
                              (within - plane * kPlanePieces) * G::kPieceBytes;
          const bool inside = pieces[i] >= 0;
          copy_async<G::kPieceBytes>(to, inside ? from + pieces[i] : source, inside);
        }
      }
      commit_copies();  // an empty batch as well: batches are counted
    }
  }

  // Starts loading input frame `frame` into registers.
  __device__ void load_frame(int frame) {
    if constexpr (!G::kAsync) {
      if (!has_input(frame)) return;
      const uint16_t* from = source + frame * p.x_strides.frame;
#pragma unroll
      for (int i = 0; i < G::kPieces; ++i) {
        if (pieces[i] < 0) {
#pragma unroll
          for (uint32_t& word : staged[i]) word = 0;
        } else if constexpr (kRegroup) {
          const auto* words = reinterpret_cast<const uint4*>(from + pieces[i]);
#pragma unroll
          for (int j = 0; j < 3; ++j) {
            const uint4 four = __ldg(words + j);
            staged[i][4 * j] = four.x;
            staged[i][4 * j + 1] = four.y;
            staged[i][4 * j + 2] = four.z;
            staged[i][4 * j + 3] = four.w;
          }
        } else {
#pragma unroll
          for (int c = 0; c < 3; ++c)
            staged[i][c] = __ldg(
                reinterpret_cast<const uint32_t*>(from + pieces[i] + c * p.x_strides.channel));
        }
      }
    }
  }

  // Writes input frame `frame` from registers to its stage, each group apart.
  __device__ void store_frame(int frame) {
    if constexpr (!G::kAsync) {
      if (!has_input(frame)) return;
      unsigned char* stage = stage_of(frame);
#pragma unroll
      for (int i = 0; i < G::kPieces; ++i) {
        int piece_row, piece;
        if (!piece_of(i, &piece_row, &piece)) continue;
        unsigned char* to = stage + piece_row * G::kRowBytes + piece * 16;
        if constexpr (kRegroup) {
#pragma unroll
          for (int g = 0; g < G::kPlanes; ++g) {
            uint4 unit;
            if constexpr (G::kPair == 2) {
              const uint2 a = three_values(staged[i], 3 * g);
              const uint2 b = three_values(staged[i] + 6, 3 * g);
              unit = make_uint4(a.x, a.y, b.x, b.y);
            } else {
              unit = make_uint4(staged[i][3 * g], staged[i][3 * g + 1], staged[i][3 * g + 2], 0u);
            }
            *reinterpret_cast<uint4*>(to + g * G::kPlaneBytes) = unit;
          }
        } else {
          *reinterpret_cast<uint4*>(to) = pixels_of_planes(staged[i]);
        }
      }
    }
  }

  // ---- the 3x3x3 conv

  __device__ void reset(int slot) {
#pragma unroll
    for (int h = 0; h < G::kRows; ++h)
#pragma unroll
      for (int i = 0; i < G::kWarpPlanes; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[slot][h][i][j] = bias[i][j % 2];
  }

  // First operand of step `step` for an input row that begins at `at` for this lane.
  template <int kStep>
  __device__ static MatrixA load_operand(const unsigned char* at) {
    constexpr bool kHalf = kStep == G::kFullSteps;
    at += G::step_offset(kStep);
    if constexpr (G::kSizes.operand == Operand::kMatrices) {
      return kHalf ? load_two_matrices(at) : load_four_matrices(at);
    } else {
      MatrixA a{};
      if constexpr (kHalf) {
        a.words[0] = *reinterpret_cast<const uint32_t*>(at);
        a.words[1] = *reinterpret_cast<const uint32_t*>(at + 8 * G::kPitch);
      } else {
        const uint2 low = *reinterpret_cast<const uint2*>(at);
        const uint2 high = *reinterpret_cast<const uint2*>(at + 8 * G::kPitch);
        a.words[0] = low.x;
        a.words[1] = high.x;
        a.words[2] = low.y;
        a.words[3] = high.y;
      }
      return a;
    }
  }

  // Where this lane's part of the operand begins in a row; in the half step lanes read less far.
  __device__ int operand_offset(bool half) const {
    const int units = set_w * kUnits;
    int offset = (G::kLead - 1) * G::kPixelBytes;
    if constexpr (G::kSizes.operand == Operand::kMatrices) {
      offset += (units + lane % 16) * G::kPitch + (half ? 0 : lane / 16 * 16);
    } else {
      offset += (units + lane / 4) * G::kPitch + lane % 4 * (half ? 4 : 8);
    }
    return offset;
  }

  // Adds what one step of the inner dimension gives; kPhase: slot of the sums of this frame.
  template <int kPhase, int kStep, bool kAll>
  __device__ void add_step(const unsigned char* plane, int i, const bool (&wanted)[3]) {
    constexpr bool kHalf = kStep == G::kFullSteps;
    const unsigned char* at = plane + operand_offset(kHalf);
    // Row after row, each for all rows of the kernel: few operands are alive at a time.
#pragma unroll
    for (int r = 0; r < G::kWarpInputRows; ++r) {
      const MatrixA a = load_operand<kStep>(at + r * G::kRowBytes);
#pragma unroll
      for (int kn = 0; kn < 3; ++kn) {
        if (!kAll && !wanted[kn]) continue;
#pragma unroll
        for (int kh = 0; kh < 3; ++kh) {
          const int h = (r - kh) / G::kStride;
          if (r < kh || (r - kh) % G::kStride != 0 || h >= G::kRows) continue;
          const uint32_t* b = &weights[i][kh * 3 + kn][2 * kStep];
          float (&to)[4] = sums[(kPhase + 4 - kn) % 3][h][i];
          if constexpr (kHalf) {
            multiply_add_8(T{}, a, b[0], to);
          } else {
            multiply_add_16(T{}, a, make_uint2(b[0], b[1]), to);
          }
        }
      }
    }
  }

  template <int kPhase, bool kAll, int kStep = 0>
  __device__ void add_plane(const unsigned char* plane, int i, const bool (&wanted)[3]) {
    if constexpr (kStep < G::kFullSteps + (G::kHalfStep ? 1 : 0)) {
      add_step<kPhase, kStep, kAll>(plane, i, wanted);
      add_plane<kPhase, kAll, kStep + 1>(plane, i, wanted);
    }
  }

  template <int kPhase, bool kAll>
  __device__ void add_frame(int frame, const bool (&wanted)[3]) {
    const unsigned char* stage = stage_of(frame) + set_h * (G::kRows * G::kStride * G::kRowBytes);
    const int first_plane = share / G::kGroupTiles * G::kWarpPlanes;
#pragma unroll
    for (int i = 0; i < G::kWarpPlanes; ++i)
      add_plane<kPhase, kAll>(stage + (first_plane + i) * G::kPlaneBytes, i, wanted);
  }

  // ---- a complete frame of the middle, or of the result

  __device__ unsigned char* middle_of(int frame) const {
    return shared + G::kMiddleOffset + frame % 2 * G::kMiddleBytes;
  }

  __device__ uint32_t middle_word(float first_value, float second_value) const {
    return p.relu ? pack_two_relu<T>(first_value, second_value)
                  : pack_two<T>(first_value, second_value);
  }

  // Hands the sums of a slot over to the next step.
  template <int kSlot>
  __device__ void hand_over(int frame) {
    unsigned char* middle = middle_of(frame);
#pragma unroll
    for (int h = 0; h < G::kRows; ++h) {
      const int line = position * G::kRows + h;
      if constexpr (G::kExchange) {
        unsigned char* operand = middle + (line * G::kMiddleSteps * kLanesPerWarp + lane) * 16;
        uint32_t words[G::kWarpPlanes][2];
#pragma unroll
        for (int i = 0; i < G::kWarpPlanes; ++i) {
          const float (&values)[4] = sums[kSlot][h][i];
          words[i][0] = middle_word(values[0], values[1]);
          words[i][1] = middle_word(values[2], values[3]);
        }
        if constexpr (G::kWarpPlanes == 2) {
          *reinterpret_cast<uint4*>(operand + share * kLanesPerWarp * 16) =
              make_uint4(words[0][0], words[0][1], words[1][0], words[1][1]);
        } else {
          *reinterpret_cast<uint2*>(operand + share / 2 * kLanesPerWarp * 16 + share % 2 * 8) =
              make_uint2(words[0][0], words[0][1]);
        }
      } else {
        const int tile = share % G::kGroupTiles, slice = share / G::kGroupTiles;
        auto* at = reinterpret_cast<float*>(middle) + slice * G::kSliceFloats +
                   (line * kUnits + lane / 4) * G::kSumPitch + tile * kTileSize + lane % 4 * 2;
        const float (&values)[4] = sums[kSlot][h][0];
        *reinterpret_cast<float2*>(at) = make_float2(values[0], values[1]);
        *reinterpret_cast<float2*>(at + 8 * G::kSumPitch) = make_float2(values[2], values[3]);
      }
    }
  }

  // Stores the 16 units times one group of channels of a row; `products` has no bias yet.
  __device__ void store_products(uint16_t* frame_target, int h, int group,
                                 const float (&products)[G::kOutGroup][4]) const {
    const int y = row + set_h * G::kRows + h;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int x = column + (set_w * kUnits + lane / 4 + 8 * half) * G::kPair;
      if (y >= p.height_out || x >= p.width_out) continue;
      uint32_t words[G::kOutGroup];
#pragma unroll
      for (int t = 0; t < G::kOutGroup; ++t) {
        const float low = products[t][2 * half], high = products[t][2 * half + 1];
        words[t] = p.pointwise_relu ? pack_two_relu<T>(low, high) : pack_two<T>(low, high);
      }
      uint16_t* to = frame_target + y * static_cast<int>(p.y_strides.row) +
                     x * G::kSizes.channels_out + group * G::kOutGroup * kTileSize;
      const int quarter = lane % 4;
      if constexpr (G::kOutGroup == 4) {
        *reinterpret_cast<uint4*>(to + 8 * quarter) =
            make_uint4(words[0], words[1], words[2], words[3]);
      } else if constexpr (G::kOutGroup == 3) {
        *reinterpret_cast<uint2*>(to + 4 * quarter) = make_uint2(words[0], words[1]);
        *reinterpret_cast<uint32_t*>(to + 16 + 2 * quarter) = words[2];
      } else if (2 * quarter < G::kUnitOutputs) {
        *reinterpret_cast<uint32_t*>(to + 2 * quarter) = words[0];
      }
    }
  }

  __device__ void begin_products(int group, float (&products)[G::kOutGroup][4]) const {
    const auto* bias_pairs = reinterpret_cast<const float2*>(shared + G::kPointwiseBiasOffset) +
                             group * G::kOutGroup * 4 + lane % 4;
#pragma unroll
    for (int t = 0; t < G::kOutGroup; ++t) {
      const float2 two = bias_pairs[t * 4];
      products[t][0] = products[t][2] = two.x;
      products[t][1] = products[t][3] = two.y;
    }
  }

  // The pointwise conv of a frame that was handed over one step before.
  __device__ void multiply_pointwise(int frame) const {
    const unsigned char* middle = middle_of(frame);
    const int group = share / G::kRows;
    const auto* b = reinterpret_cast<const uint2*>(shared + G::kPointwiseOffset) +
                    group * G::kOutGroup * kLanesPerWarp + lane;
    float products[G::kItems][G::kOutGroup][4];
#pragma unroll
    for (int i = 0; i < G::kItems; ++i) begin_products(group, products[i]);
#pragma unroll
    for (int step = 0; step < G::kMiddleSteps; ++step) {
      uint2 column[G::kOutGroup];
#pragma unroll
      for (int t = 0; t < G::kOutGroup; ++t)
        column[t] = b[(step * G::kOutTiles + t) * kLanesPerWarp];
#pragma unroll
      for (int i = 0; i < G::kItems; ++i) {
        const int line = position * G::kRows + (share + i * G::kShares) % G::kRows;
        const uint4 four = *reinterpret_cast<const uint4*>(
            middle + ((line * G::kMiddleSteps + step) * kLanesPerWarp + lane) * 16);
        const MatrixA a{{four.x, four.y, four.z, four.w}};
#pragma unroll
        for (int t = 0; t < G::kOutGroup; ++t) multiply_add_16(T{}, a, column[t], products[i][t]);
      }
    }
    uint16_t* frame_target = target + frame * p.y_strides.frame;
#pragma unroll
    for (int i = 0; i < G::kItems; ++i)
      store_products(frame_target, (share + i * G::kShares) % G::kRows, group, products[i]);
  }

  // The same without an exchange: all that the pointwise conv needs is in the sums of this warp.
  template <int kSlot>
  __device__ void multiply_own(int frame) const {
    const auto* b = reinterpret_cast<const uint2*>(shared + G::kPointwiseOffset) + lane;
    uint16_t* frame_target = target + frame * p.y_strides.frame;
#pragma unroll
    for (int h = 0; h < G::kRows; ++h) {
      const float (&values)[4] = sums[kSlot][h][0];
      const MatrixA a{{middle_word(values[0], values[1]), middle_word(values[2], values[3])}};
      float products[G::kOutGroup][4];
      begin_products(0, products);
#pragma unroll
      for (int t = 0; t < G::kOutGroup; ++t)
        multiply_add_8(T{}, a, b[t * kLanesPerWarp].x, products[t]);
      store_products(frame_target, h, 0, products);
    }
  }

  // Stores the sums of all slices of a frame that were handed over one step before.
  __device__ void store_sums(int frame) const {
    constexpr int kPixelPieces = G::kPartOutputs / 8;
    constexpr int kPixels = G::kPositions * G::kRows * kUnits;
    const auto* middle = reinterpret_cast<const float*>(middle_of(frame));
    uint16_t* frame_target = target + frame * p.y_strides.frame + part * G::kPartOutputs;
    for (int i = static_cast<int>(threadIdx.x); i < kPixels * kPixelPieces; i += G::kThreads) {
      const int pixel = i / kPixelPieces, piece = i - pixel * kPixelPieces;
      const int unit = pixel % kUnits, line = pixel / kUnits;
      const int h = line % G::kRows, set = line / G::kRows;
      const int y = row + set / G::kSizes.sets_w * G::kRows + h;
      const int x = column + set % G::kSizes.sets_w * kUnits + unit;
      if (y >= p.height_out || x >= p.width_out) continue;
      float values[8] = {};
#pragma unroll
      for (int s = 0; s < G::kSizes.slices; ++s) {
        const auto* four = reinterpret_cast<const float4*>(middle + s * G::kSliceFloats +
                                                           pixel * G::kSumPitch + piece * 8);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float4 some = four[j];
          values[4 * j] += some.x;
          values[4 * j + 1] += some.y;
          values[4 * j + 2] += some.z;
          values[4 * j + 3] += some.w;
        }
      }
      uint16_t* to = frame_target + y * static_cast<int>(p.y_strides.row) +
                     x * static_cast<int>(p.y_strides.column) + piece * 8;
      *reinterpret_cast<uint4*>(to) =
          make_uint4(middle_word(values[0], values[1]), middle_word(values[2], values[3]),
                     middle_word(values[4], values[5]), middle_word(values[6], values[7]));
    }
  }

  // ---- the walk

  // Input frame `frame`, output frame `frame - 1` becomes complete, and `frame - 2` is stored.
  template <int kPhase>
  __device__ void step(int frame) {
    if constexpr (G::kAsync) {
      wait_for_copies<G::kStages - 2>();
      __syncthreads();  // input frame `frame` is here, and all warps are done with the one before
      copy_frame(frame + G::kStages - 1);
    } else {
      __syncthreads();
      store_frame(frame + 1);
      load_frame(frame + 2);
    }
    if (frame >= first + 2) {
      if constexpr (G::kExchange) {
        multiply_pointwise(frame - 2);
      } else if constexpr (!G::kPointwise) {
        store_sums(frame - 2);
      }
    }
    if (has_input(frame)) {
      const bool wanted[3] = {frame + 1 < end, frame >= first && frame<end, frame> first};
      if (wanted[0] && wanted[1] && wanted[2]) {
        add_frame<kPhase, true>(frame, wanted);
      } else {
        add_frame<kPhase, false>(frame, wanted);
      }
    }
    constexpr int kComplete = (kPhase + 2) % 3;
    if (frame > first && frame <= end) {
      if constexpr (G::kPointwise && !G::kExchange) {
        multiply_own<kComplete>(frame - 1);
      } else {
        hand_over<kComplete>(frame - 1);
      }
    }
    reset(kComplete);
  }

  __device__ void walk() {
    if constexpr (G::kAsync) {
#pragma unroll
      for (int i = 0; i < G::kStages - 1; ++i) copy_frame(first - 1 + i);
    } else {
      load_frame(first - 1);
      store_frame(first - 1);
      load_frame(first);
    }
    for (int frame = first - 1; frame <= end + 1; frame += 3) {
      step<0>(frame);
      if (frame + 1 <= end + 1) step<1>(frame + 1);
      if (frame + 2 <= end + 1) step<2>(frame + 2);
    }
  }
};

#endif  // has tensor kernels

template <class T, ResidentLayer kLayer>
__global__ void __launch_bounds__(LayerGeometry<kLayer>::kThreads,
                                  LayerGeometry<kLayer>::kSizes.blocks)
    group_pointwise_conv3d_resident_kernel(const __grid_constant__ GroupPointwiseConv3dHalfParams p,
                                           const __grid_constant__ ResidentPlan plan,
                                           const uint32_t* packed) {
#if defined(GPLWS_CUDA_EMULATION) || GPLWS_HAS_TENSOR_KERNELS
  ResidentWarp<T, kLayer> warp(p, plan);
  warp.load_weights(packed);
  for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    warp.enter_tile(tile);
    __syncthreads();  // shared memory is written, or all warps are done with the last tile
    warp.walk();
  }
#endif
}

template <class T, ResidentLayer kLayer>
cudaError_t launch_layer(const GroupPointwiseConv3dHalfParams& p, const ResidentPlan& plan,
                         uint32_t* packed, cudaStream_t stream) {
  using G = LayerGeometry<kLayer>;
  constexpr int64_t kWords = G::kConvWords + G::kPointwiseWords;
  cudaError_t error =
      launch(pack_resident_weights_kernel<T, kLayer>,
             dim3(static_cast<unsigned>((kWords + kPackThreads - 1) / kPackThreads)), kPackThreads,
             0, stream, p, packed);
  if (error != cudaSuccess) return error;
  const auto kernel = group_pointwise_conv3d_resident_kernel<T, kLayer>;
  error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, G::kSharedBytes);
  if (error != cudaSuccess) return error;
  const uint32_t* weights = packed;
  return launch(kernel, dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.parts)),
                G::kThreads, G::kSharedBytes, stream, p, plan, weights);
}

}  // namespace

template <class T>
cudaError_t launch_resident_type(const GroupPointwiseConv3dHalfParams& p, const ResidentPlan& plan,
                                 void* scratch, cudaStream_t stream) {
  auto* packed = static_cast<uint32_t*>(scratch);
  using enum ResidentLayer;
  switch (plan.layer) {
    case kStem:
      return launch_layer<T, kStem>(p, plan, packed, stream);
    case k12:
      return launch_layer<T, k12>(p, plan, packed, stream);
    case kHead:
      return launch_layer<T, kHead>(p, plan, packed, stream);
    case k24:
      return launch_layer<T, k24>(p, plan, packed, stream);
    case k48:
      return launch_layer<T, k48>(p, plan, packed, stream);
    case k96:
      return launch_layer<T, k96>(p, plan, packed, stream);
    case kDown12:
      return launch_layer<T, kDown12>(p, plan, packed, stream);
    case kDown24:
      return launch_layer<T, kDown24>(p, plan, packed, stream);
    case kDown48:
      return launch_layer<T, kDown48>(p, plan, packed, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace gplws::cuda
