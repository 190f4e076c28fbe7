// The kernels behind group_pointwise_conv3d_resident.h, compiled once for each 16-bit type.
//
// A block takes a tile of the output and walks through the frames. A warp has one share of the
// channels out, whose weights it keeps in registers, for 16 units (pixels, or pairs of them) times
// kRows rows. It holds the sums of three output frames: each input frame is what the next, this and
// the last output frame see of it. One barrier a frame: behind it lie the input frame, and the
// middle result of the output frame that was completed one step before, as operands of the
// pointwise conv, of which each warp multiplies one row; or results, to be stored in whole lines.
//
// Every element is summed in one fixed order: bias; frame of the kernel; column and channel, 16
// together; row of the kernel; then middle channels, 16 together.
#pragma once

#include "cuda/group_pointwise_conv3d_resident.h"
#include "cuda/group_pointwise_conv3d_resident_layers.h"

namespace gplws::cuda {
namespace {

constexpr int kPackThreads = 256;

// One word of the packed weights of the 3x3x3 conv: conv[part][share][four words of the
// warp][lane][word].
template <class T, ResidentLayer kLayer>
__device__ uint32_t packed_conv_word(const GroupPointwiseConv3dHalfParams& p, int word) {
  using G = LayerGeometry<kLayer>;
  const int lane = word / 4 % kLanesPerWarp;
  int rest = word / (4 * kLanesPerWarp);
  const auto place = G::weight_of(rest % G::kWarpFours * 4 + word % 4);
  if (place.kernel_plane < 0) return 0;
  const int kernel_plane = place.kernel_plane, step_word = place.step_word;
  rest /= G::kWarpFours;
  const int share = rest % G::kShares, part = rest / G::kShares;
  const int plane = share / G::kGroupTiles;
  const int group = plane / G::kSizes.slices, slice = plane % G::kSizes.slices;
  const int tile = part * G::kGroupTiles + share % G::kGroupTiles;
  const auto column = G::column_of(tile, lane / 4);
  const int step = step_word / 2, half = step_word % 2, quarter = lane % 4;
  // Lanes that read words hold four values of a pixel, else two of each of two matrices.
  const int first = 16 * step + (G::kWords ? 4 * quarter + 2 * half : 8 * half + 2 * quarter);
  uint32_t packed = 0;
  for (int i = 0; i < 2; ++i) {
    const auto tap = G::tap_of(plane, first + i, column.pixel);
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
  constexpr int kOutTiles = G::kPointwise ? G::kOutTiles : 1;
  const int out_tile = rest % kOutTiles, step = rest / kOutTiles;
  constexpr int kChannelsOut = G::kPointwise ? G::kSizes.channels_out : 1;
  const int place = out_tile / G::kOutGroup * G::kOutGroup * kTileSize +
                    G::place_in_group(out_tile % G::kOutGroup, lane / 4);
  const int middle_tile = 2 * step + half;
  if (place >= G::kUnitOutputs || middle_tile >= G::kTiles) return 0;
  uint32_t packed = 0;
  for (int i = 0; i < 2; ++i) {
    const auto column = G::column_of(middle_tile % G::kGroupTiles, 2 * (lane % 4) + i);
    if (column.channel < 0 || column.pixel != place / kChannelsOut) continue;
    const int m = middle_tile / G::kGroupTiles * G::kSizes.group_outputs + column.channel;
    const int at = place % kChannelsOut * static_cast<int>(p.middle) + m;
    packed |= static_cast<uint32_t>(static_cast<const T*>(p.pointwise_weight)[at].bits) << (16 * i);
  }
  return packed;
}

// Bias of column `column` of the products of the pointwise conv.
template <class T, ResidentLayer kLayer>
__device__ float packed_pointwise_bias(const GroupPointwiseConv3dHalfParams& p, int column) {
  using G = LayerGeometry<kLayer>;
  const int tile = column / kTileSize;
  const int place = tile / G::kOutGroup * G::kOutGroup * kTileSize +
                    G::place_in_group(tile % G::kOutGroup, column % kTileSize);
  if (!p.pointwise_bias || place >= G::kUnitOutputs) return 0.0f;
  constexpr int kChannelsOut = G::kPointwise ? G::kSizes.channels_out : 1;
  return to_float(static_cast<const T*>(p.pointwise_bias)[place % kChannelsOut]);
}

// Value `number` of the bias of the 3x3x3 conv: bias[part][share][lane][column].
template <class T, ResidentLayer kLayer>
__device__ float packed_bias(const GroupPointwiseConv3dHalfParams& p, int number) {
  using G = LayerGeometry<kLayer>;
  const int lane = number / 2 % kLanesPerWarp;
  const int rest = number / (2 * kLanesPerWarp);
  const int share = rest % G::kShares, part = rest / G::kShares;
  const int plane = share / G::kGroupTiles, tile = part * G::kGroupTiles + share % G::kGroupTiles;
  const auto at = G::column_of(tile, 2 * (lane % 4) + number % 2);
  // Of several slices, the first one begins with the bias.
  if (!p.bias || at.channel < 0 || plane % G::kSizes.slices != 0) return 0.0f;
  const int m = plane / G::kSizes.slices * G::kSizes.group_outputs + at.channel;
  return to_float(static_cast<const T*>(p.bias)[m]);
}

// Weights in the order in which the lanes of a product hold them, padded with zeros, and biases.
template <class T, ResidentLayer kLayer>
__global__ void __launch_bounds__(kPackThreads)
    pack_resident_kernel(const __grid_constant__ GroupPointwiseConv3dHalfParams p,
                         uint32_t* packed) {
  using G = LayerGeometry<kLayer>;
  const int word = static_cast<int>(blockIdx.x) * kPackThreads + static_cast<int>(threadIdx.x);
  if (word >= G::kPackedWords) return;
  constexpr int kBiases = G::kConvWords + G::kPointwiseWords;
  constexpr int kConvBiases = G::kConvWords + G::kSharedWords;
  float value;
  if (word < G::kConvWords) {
    packed[word] = packed_conv_word<T, kLayer>(p, word);
    return;
  }
  if (word < kBiases) {
    packed[word] = packed_pointwise_word<T, kLayer>(p, word - G::kConvWords);
    return;
  }
  if (word < kConvBiases) {
    value = packed_pointwise_bias<T, kLayer>(p, word - kBiases);
  } else {
    value = packed_bias<T, kLayer>(p, word - kConvBiases);
  }
  reinterpret_cast<float*>(packed)[word] = value;
}

#if GPLWS_HAS_RESIDENT_KERNELS

// What a thread of a block does with one tile.
template <class T, ResidentLayer kLayer>
struct ResidentWarp {
  using G = LayerGeometry<kLayer>;
  static constexpr int kPixelElements = G::kDirect ? G::kSizes.inputs : 1;

  const GroupPointwiseConv3dHalfParams& p;
  const ResidentPlan& plan;
  unsigned char* const shared;
  const int lane;
  int share, set_w, set_h, position;  // of the warp
  bool conv_first;                    // in a step
  // What this thread loads of the input: a piece of row `row` and of every kRowStep-th one behind
  // it, and one of the edge of a row. -1: nothing.
  struct Piece {
    int row;
    int offset;  // elements from the first column that the tile needs
    int place;   // bytes from the first stage to where it goes
  };
  Piece pieces, edge;
  int to_edge;                    // elements from the first piece to the one of the edge
  const unsigned char* operands;  // the lane's part of the first row of the warp's window

  // Of the tile.
  int first, end;  // frames of the output
  int row, column;
  const uint16_t* source;  // the first piece of the next input frame to be copied
  unsigned pieces_inside;  // bit i: whether piece i lies in the image; then the one of the edge
  uint16_t* target;        // what the thread stores first of the next frame to be stored
  bool target_inside[2];   // whether the lane's units are in the image, lane / 4 and that + 8
  int gathered[G::kPointwise ? 1 : G::kGathered];  // elements from `target`; -1: outside

  uint32_t weights[kTaps9][G::kStepWords];
  float bias[4];  // what a product begins with
  float sums[kRing][G::kRows][4];

  __device__ ResidentWarp(const GroupPointwiseConv3dHalfParams& params,
                          const ResidentPlan& resident_plan)
      : p(params),
        plan(resident_plan),
        shared(dynamic_shared_memory()),
        lane(static_cast<int>(threadIdx.x) % kLanesPerWarp) {
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kLanesPerWarp;
    share = warp % G::kShares;
    position = warp / G::kShares;
    set_w = position % G::kSizes.sets_w;
    set_h = position / G::kSizes.sets_w;
    conv_first = warp >= G::kWarps / 2;

    const int row = thread / G::kRowPieces;
    pieces = piece_of(row < G::kRowStep ? row : -1, thread % G::kRowPieces);
    if constexpr (G::kEdgePieces > 0) {
      const int edge_row = thread / G::kEdgePieces;
      edge =
          piece_of(edge_row < G::kInputRows ? edge_row : -1, G::kThreads + thread % G::kEdgePieces);
      to_edge =
          (edge.row - pieces.row) * static_cast<int>(p.x_strides.row) + edge.offset - pieces.offset;
    }

    const int unit = set_w * kUnits + (G::kWords ? lane / 4 : lane % 16);
    operands = shared + G::kStageOffset + share / G::kGroupTiles * G::kPlaneBytes +
               set_h * G::kRows * G::kStride * G::kRowBytes + G::kWindowOffset + unit * G::kPitch +
               (G::kWords ? lane % 4 * 4 : lane / 16 * 16);
  }

  // Piece number `piece` of a row.
  __device__ static Piece piece_of(int row, int piece) {
    const int first = row * G::kRowBytes;
    if constexpr (G::kRaw)
      return {row, piece * (G::kPieceBytes / 2), first + piece * G::kPieceBytes};
    if constexpr (!G::kDirect)
      return {row, piece * G::kPair, first + piece * G::kPair * G::kPixelBytes};
    const int pixel = piece / G::kPixelPieces, within = piece - pixel * G::kPixelPieces;
    const int plane = within / G::kPlanePieces, number = within - plane * G::kPlanePieces;
    const int place = plane * G::kPlaneBytes +
                      (G::kSplit ? pixel % 2 * G::kOddPlace + pixel / 2 : pixel) * G::kPixelBytes +
                      number * (G::kWords ? G::kSubplaneBytes : G::kPieceBytes);
    return {row, pixel * G::kSizes.inputs + (G::first_piece(plane) + number) * (G::kPieceBytes / 2),
            first + place};
  }

  // ---- what stays from tile to tile

  // Starts loading weights: those of the conv to registers, the others to shared memory, as a part
  // of the first batch of copies.
  __device__ void load_weights(const uint32_t* packed) {
    const int part = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x);
    const int number = part * G::kShares + share;
    const auto* fours =
        reinterpret_cast<const uint4*>(packed) + number * (G::kWarpFours * kLanesPerWarp) + lane;
#pragma unroll
    for (int i = 0; i < G::kWarpFours; ++i) {
      const uint4 four = fours[i * kLanesPerWarp];
      set_weight<0>(i, four.x);
      set_weight<1>(i, four.y);
      set_weight<2>(i, four.z);
      set_weight<3>(i, four.w);
    }

    const auto* biases = reinterpret_cast<const float2*>(packed + G::kConvWords + G::kSharedWords);
    const float2 two = biases[number * kLanesPerWarp + lane];
    bias[0] = bias[2] = two.x;
    bias[1] = bias[3] = two.y;

    const auto* from = reinterpret_cast<const uint4*>(packed + G::kConvWords);
    auto* to = reinterpret_cast<uint4*>(shared + G::kPointwiseOffset);
    constexpr int kCopied = G::kSharedWords / 4;
#pragma unroll
    for (int i = 0; i < (kCopied + G::kThreads - 1) / G::kThreads; ++i) {
      const int piece = thread + i * G::kThreads;
      copy_async_if<16>(piece < kCopied, to + piece, from + piece, 1u);
    }
  }

  template <int kWord>
  __device__ void set_weight(int four, uint32_t word) {
    const auto place = G::weight_of(4 * four + kWord);
    if (place.kernel_plane >= 0) weights[place.kernel_plane][place.step_word] = word;
  }

  __device__ void enter_tile(int number) {
    const auto take = [&number](const Divider& divider) {
      const int quotient = divider.quotient(number), rest = number - quotient * divider.divisor;
      number = quotient;
      return rest;
    };
    if (G::kBackwards) number = plan.tiles - 1 - number;
    column = take(plan.tiles_w) * G::kTileColumns;
    row = take(plan.tiles_h) * G::kTileRows;
    first = take(plan.segments) * plan.frames_per_segment;
    const int64_t image = number;
    end = min(first + plan.frames_per_segment, static_cast<int>(p.frames));

    const int offset = (column * G::kStride - G::kLead) * kPixelElements;
    const int line = row * G::kStride - 1;
    source = static_cast<const uint16_t*>(p.x) + image * p.x_strides.batch +
             max(first - 1, 0) * p.x_strides.frame + (line + pieces.row) * p.x_strides.row +
             offset + pieces.offset;
    const auto lies_inside = [&](int y, int x) {
      return y >= 0 && y < p.height && x >= 0 && x < static_cast<int>(p.width) * kPixelElements;
    };
    pieces_inside = 0;
#pragma unroll
    for (int i = 0; i < G::kPieces; ++i)
      if (lies_inside(line + pieces.row + i * G::kRowStep, offset + pieces.offset))
        pieces_inside |= 1u << i;
    if constexpr (G::kEdgePieces > 0)
      if (lies_inside(line + edge.row, offset + edge.offset)) pieces_inside |= 1u << G::kPieces;

    if constexpr (G::kPointwise) {
      const int h = set_h * G::kRows + (G::kExchange ? share % G::kRows : 0);
      const int unit = set_w * kUnits + lane / 4;
      const int group = G::kExchange ? share / G::kRows : 0;
      constexpr int kLaneValues = G::kOutGroup == 3 ? 4 : 2 * G::kOutGroup;
      target = static_cast<uint16_t*>(p.y) + image * p.y_strides.batch + first * p.y_strides.frame +
               (row + h) * p.y_strides.row + (column + unit * G::kPair) * G::kSizes.channels_out +
               group * G::kOutGroup * kTileSize + lane % 4 * kLaneValues;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int w = column + (unit + 8 * half) * G::kPair;
        target_inside[half] = (!G::kExchange || row + h < p.height_out) && w < p.width_out;
      }
    } else {
      target = static_cast<uint16_t*>(p.y) + image * p.y_strides.batch + first * p.y_strides.frame +
               static_cast<int>(blockIdx.y) * G::kPartOutputs;
#pragma unroll
      for (int i = 0; i < G::kGathered; ++i) {
        const int number = static_cast<int>(threadIdx.x) + i * G::kThreads;
        const int pixel = number / G::kGatherPieces, piece = number - pixel * G::kGatherPieces;
        const int unit = pixel % kUnits, line = pixel / kUnits;
        const int set = line / G::kRows;
        const int y = row + set / G::kSizes.sets_w * G::kRows + line % G::kRows;
        const int x = column + set % G::kSizes.sets_w * kUnits + unit;
        const bool exists = line < G::kPositions * G::kRows && y < p.height_out && x < p.width_out;
        gathered[i] = exists ? y * static_cast<int>(p.y_strides.row) +
                                   x * static_cast<int>(p.y_strides.column) + piece * 8
                             : -1;
      }
    }
  }

  // ---- input

  __device__ bool has_piece(int i) const {
    const bool last = (i + 1) * G::kRowStep > G::kInputRows;  // the others exist for all rows
    return (G::kRowPieces >= G::kThreads || pieces.row >= 0) &&
           (!last || pieces.row + i * G::kRowStep < G::kInputRows);
  }

  // Not zero: piece `i` lies in the image.
  __device__ unsigned is_inside(int i) const { return pieces_inside & (1u << i); }

  // Where a piece of this thread goes in the stage of a slot.
  __device__ unsigned char* stage_place(int place, int slot) const {
    return shared + G::kStageOffset + place + slot * G::kStageBytes;
  }

  // Where piece `i` of this thread lies in slot `slot` until channels are put side by side.
  __device__ unsigned char* own_place(int i, int slot) const {
    const int number = (slot * G::kPieces + i) * G::kThreads + static_cast<int>(threadIdx.x);
    return shared + G::kOwnOffset + number * (G::kOwnWords * 4);
  }

  // Starts copying the next input frame, number `frame`, to slot `slot`; none behind `last`.
  __device__ void copy_frame(int frame, int last, int slot) {
    if (frame <= last) {
      const uint16_t* piece = source;
#pragma unroll
      for (int i = 0; i < G::kPieces; ++i) {
        if constexpr (G::kDirect) {
          unsigned char* to = stage_place(pieces.place, slot) + i * (G::kRowStep * G::kRowBytes);
          copy_async_if<G::kPieceBytes>(has_piece(i), to, piece, is_inside(i));
        } else {
#pragma unroll
          for (int k = 0; k < 3; ++k)
            copy_async_if<4>(has_piece(i), own_place(i, slot) + k * 4,
                             piece + k * p.x_strides.channel, is_inside(i));
        }
        piece += G::kRowStep * static_cast<int>(p.x_strides.row);
      }
      if constexpr (G::kEdgePieces > 0)
        copy_async_if<G::kPieceBytes>(edge.row >= 0, stage_place(edge.place, slot),
                                      source + to_edge, is_inside(G::kPieces));
      source += p.x_strides.frame;
    }
    commit_copies();  // an empty batch as well: batches are counted
  }

  // Puts the channels of input frame `frame`, which is in slot `slot`, side by side.
  __device__ void interleave_frame(int frame, int last, int slot) const {
    if (frame > last) return;
#pragma unroll
    for (int i = 0; i < G::kPieces; ++i) {
      if (!has_piece(i)) continue;
      unsigned char* to = stage_place(pieces.place, slot) + i * (G::kRowStep * G::kRowBytes);
      const auto* words = reinterpret_cast<const uint32_t*>(own_place(i, slot));
      const uint32_t a = words[0], b = words[1], c = words[2];
      *reinterpret_cast<uint2*>(to) =
          make_uint2((a & 0xffffu) | b << 16, a >> 16 | (b & 0xffff0000u));
      *reinterpret_cast<uint2*>(to + G::kSubplaneBytes) = make_uint2(c & 0xffffu, c >> 16);
    }
  }

  // Zeros in what copies leave out of the padded pixels.
  __device__ void clear_padding() const {
    constexpr int kCopied = G::kPlanePieces * G::kPieceBytes, kPixels = G::kPlaneBytes / G::kPitch;
    if constexpr (!G::kWords && G::kDirect && kCopied < G::kPixelBytes) {
      static_assert(G::kPixelBytes - kCopied == 4 && G::kPitch == G::kPixelBytes);
      for (int i = static_cast<int>(threadIdx.x); i < kRing * G::kPlanes * kPixels;
           i += G::kThreads) {
        const int plane = i / kPixels, pixel = i - plane * kPixels;
        *reinterpret_cast<uint32_t*>(shared + G::kStageOffset + plane * G::kPlaneBytes +
                                     pixel * G::kPixelBytes + kCopied) = 0u;
      }
    }
  }

  // ---- the 3x3x3 conv

  // First operand of a step of the inner dimension for an input row.
  template <int kStep>
  __device__ static MatrixA load_operand(const unsigned char* at) {
    if constexpr (G::kWords) {
      static_assert(kStep == 0 && !G::kHalfStep);
      constexpr int kEight = 8 * G::kPitch;
      const auto word = [at](int offset) {
        return *reinterpret_cast<const uint32_t*>(at + offset);
      };
      return {{word(0), word(kEight), word(G::kSubplaneBytes), word(G::kSubplaneBytes + kEight)}};
    } else {
      at += G::step_offset(kStep);
      return kStep == G::kFullSteps ? load_two_matrices(at) : load_four_matrices(at);
    }
  }

  // Adds what a step gives; kPhase: slot of this frame's sums. Those of the next frame begin here.
  template <int kPhase, int kStep>
  __device__ void add_step(const unsigned char* at) {
    // Row after row, each for all rows of the kernel: few operands are alive at a time.
#pragma unroll
    for (int r = 0; r < G::kWarpInputRows; ++r) {
      const MatrixA a = load_operand<kStep>(at + r * G::kRowBytes);
#pragma unroll
      for (int kn = 0; kn < 3; ++kn)
#pragma unroll
        for (int kh = 0; kh < 3; ++kh) {
          const int h = (r - kh) / G::kStride;
          if (r < kh || (r - kh) % G::kStride != 0 || h >= G::kRows) continue;
          const uint32_t* b = &weights[kh * 3 + kn][2 * kStep];
          float (&to)[4] = sums[(kPhase + 4 - kn) % kRing][h];
          if constexpr (kStep == G::kFullSteps) {
            multiply_add_8(T{}, a, b[0], to);
          } else if (kn == 0 && kh == 0 && kStep == 0) {
            multiply_16(T{}, a, make_uint2(b[0], b[1]), bias, to);
          } else {
            multiply_add_16(T{}, a, make_uint2(b[0], b[1]), to);
          }
        }
    }
    if constexpr (kStep + 1 < G::kSteps) add_step<kPhase, kStep + 1>(at);
  }

  // ---- a complete frame of the middle, or of the result

  __device__ unsigned char* middle_of(int slot) const {
    return shared + G::kMiddleOffset + slot * G::kMiddleBytes;
  }

  __device__ static uint32_t middle_word(float first_value, float second_value) {
    return G::kRelu ? pack_two_relu<T>(first_value, second_value)
                    : pack_two<T>(first_value, second_value);
  }

  // Hands the sums of a slot over to the next step.
  template <int kSlot>
  __device__ void hand_over() {
    unsigned char* middle = middle_of(kSlot);
    const int line = position * G::kRows;
    if constexpr (G::kExchange) {
      unsigned char* to = middle + line * (G::kMiddleSteps * kLanesPerWarp * 16) +
                          share / 2 * kLanesPerWarp * 16 + lane * 16 + share % 2 * 8;
#pragma unroll
      for (int h = 0; h < G::kRows; ++h) {
        const float (&values)[4] = sums[kSlot][h];
        *reinterpret_cast<uint2*>(to + h * (G::kMiddleSteps * kLanesPerWarp * 16)) =
            make_uint2(middle_word(values[0], values[1]), middle_word(values[2], values[3]));
      }
    } else if constexpr (!G::kPointwise) {
      const int channel = share % G::kGroupTiles * kTileSize + lane % 4 * 2;
      unsigned char* to = middle + share / G::kGroupTiles * G::kSliceBytes +
                          (line * kUnits + lane / 4) * G::kGatherPitch +
                          channel * (G::kGatherSums ? 4 : 2);
#pragma unroll
      for (int h = 0; h < G::kRows; ++h)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float a = sums[kSlot][h][2 * half], b = sums[kSlot][h][2 * half + 1];
          unsigned char* at = to + (h * kUnits + half * 8) * G::kGatherPitch;
          if constexpr (G::kGatherSums) {
            *reinterpret_cast<float2*>(at) = make_float2(a, b);
          } else {
            *reinterpret_cast<uint32_t*>(at) = middle_word(a, b);
          }
        }
    }
  }

  // Stores 16 units times one group of channels from row `to` on.
  __device__ void store_products(uint16_t* to, const float (&products)[G::kOutGroup][4]) const {
    const int quarter = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!target_inside[half]) continue;
      uint32_t words[G::kOutGroup];
#pragma unroll
      for (int t = 0; t < G::kOutGroup; ++t) {
        const float low = products[t][2 * half], high = products[t][2 * half + 1];
        words[t] = G::kPointwiseRelu ? pack_two_relu<T>(low, high) : pack_two<T>(low, high);
      }
      uint16_t* at = to + 8 * half * G::kUnitOutputs;
      if constexpr (G::kOutGroup == 4) {
        *reinterpret_cast<uint4*>(at) = make_uint4(words[0], words[1], words[2], words[3]);
      } else if constexpr (G::kOutGroup == 2) {
        *reinterpret_cast<uint2*>(at) = make_uint2(words[0], words[1]);
      } else if constexpr (G::kOutGroup == 3) {
        *reinterpret_cast<uint2*>(at) = make_uint2(words[0], words[1]);
        *reinterpret_cast<uint32_t*>(at + 16 - 2 * quarter) = words[2];
      } else if (2 * quarter < G::kUnitOutputs) {
        *reinterpret_cast<uint32_t*>(at) = words[0];
      }
    }
  }

  // What a product of `group` begins with.
  __device__ void begin_products(int group, float (&products)[G::kOutGroup][4]) const {
    const auto* pairs = reinterpret_cast<const float2*>(shared + G::kPointwiseBiasOffset) +
                        group * G::kOutGroup * 4 + lane % 4;
#pragma unroll
    for (int t = 0; t < G::kOutGroup; ++t) {
      const float2 two = pairs[t * 4];
      products[t][0] = products[t][2] = two.x;
      products[t][1] = products[t][3] = two.y;
    }
  }

  // The pointwise conv of the frame that was handed over in `slot` one step before.
  __device__ void multiply_pointwise(int slot) const {
    const int group = share / G::kRows, line = position * G::kRows + share % G::kRows;
    const auto* a = reinterpret_cast<const uint4*>(middle_of(slot)) +
                    line * (G::kMiddleSteps * kLanesPerWarp) + lane;
    const auto* b = reinterpret_cast<const uint2*>(shared + G::kPointwiseOffset) +
                    group * G::kOutGroup * kLanesPerWarp + lane;
    float products[G::kOutGroup][4];
    begin_products(group, products);
#pragma unroll
    for (int step = 0; step < G::kMiddleSteps; ++step) {
      const uint4 four = a[step * kLanesPerWarp];
#pragma unroll
      for (int t = 0; t < G::kOutGroup; ++t)
        multiply_add_16(T{}, MatrixA{{four.x, four.y, four.z, four.w}},
                        b[(step * G::kOutTiles + t) * kLanesPerWarp], products[t]);
    }
    store_products(target, products);
  }

  // The same without an exchange: all that the pointwise conv needs is in the sums of this warp.
  template <int kSlot>
  __device__ void multiply_own() {
    const auto* b = reinterpret_cast<const uint2*>(shared + G::kPointwiseOffset) + lane;
    uint16_t* to = target;
#pragma unroll
    for (int h = 0; h < G::kRows; ++h) {
      const float (&values)[4] = sums[kSlot][h];
      const MatrixA a{{middle_word(values[0], values[1]), middle_word(values[2], values[3])}};
      float products[G::kOutGroup][4];
      begin_products(0, products);
#pragma unroll
      for (int t = 0; t < G::kOutGroup; ++t)
        multiply_add_8(T{}, a, b[t * kLanesPerWarp].x, products[t]);
      if (row + set_h * G::kRows + h < p.height_out) store_products(to, products);
      to += static_cast<int>(p.y_strides.row);
    }
  }

  // Stores in whole lines what all warps handed over in `slot` one step before.
  __device__ void store_gathered(int slot) const {
#pragma unroll
    for (int i = 0; i < G::kGathered; ++i) {
      if (gathered[i] < 0) continue;
      const int number = static_cast<int>(threadIdx.x) + i * G::kThreads;
      const int pixel = number / G::kGatherPieces, piece = number - pixel * G::kGatherPieces;
      const unsigned char* at = middle_of(slot) + pixel * G::kGatherPitch;
      auto* to = reinterpret_cast<uint4*>(target + gathered[i]);
      if constexpr (!G::kGatherSums) {
        *to = *reinterpret_cast<const uint4*>(at + piece * 16);
      } else {
        float values[8] = {};
#pragma unroll
        for (int s = 0; s < G::kSizes.slices; ++s)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float4 four =
                *reinterpret_cast<const float4*>(at + s * G::kSliceBytes + piece * 32 + j * 16);
            values[4 * j] += four.x;
            values[4 * j + 1] += four.y;
            values[4 * j + 2] += four.z;
            values[4 * j + 3] += four.w;
          }
        *to = make_uint4(middle_word(values[0], values[1]), middle_word(values[2], values[3]),
                         middle_word(values[4], values[5]), middle_word(values[6], values[7]));
      }
    }
  }

  // Stores the next frame, which was handed over in `slot` one step before.
  __device__ void finish(int slot) {
    if constexpr (G::kExchange) {
      multiply_pointwise(slot);
    } else if constexpr (!G::kPointwise) {
      store_gathered(slot);
    }
    if constexpr (G::kExchange || !G::kPointwise) target += p.y_strides.frame;
  }

  // The sums of a slot are those of a complete frame.
  template <int kSlot>
  __device__ void complete() {
    if constexpr (G::kPointwise && !G::kExchange) {
      multiply_own<kSlot>();
      target += p.y_strides.frame;
    } else {
      hand_over<kSlot>();
    }
  }

  // ---- the walk

  // Input frame `frame` of slot kPhase: output frame `frame - 1` becomes complete, and the one
  // before is stored.
  template <int kPhase>
  __device__ void step(int frame, int last) {
    constexpr int kBefore = (kPhase + 2) % kRing;
    if constexpr (G::kDirect) wait_for_copies<kRing - 2>();
    __syncthreads();  // input frame `frame` is here, and all warps are done with the one before
    if (!conv_first) do_all_but_conv<kPhase>(frame, last);
    add_step<kPhase, 0>(operands + kPhase * G::kStageBytes);
    if (frame - 1 >= first) complete<kBefore>();
    if (conv_first) do_all_but_conv<kPhase>(frame, last);
  }

  // What a step does for the frames around the one that is multiplied.
  template <int kPhase>
  __device__ void do_all_but_conv(int frame, int last) {
    constexpr int kNext = (kPhase + 1) % kRing, kBefore = (kPhase + 2) % kRing;
    if constexpr (G::kDirect) {
      copy_frame(frame + 2, last, kBefore);
    } else {
      wait_for_copies<kRing - 2>();  // what this thread copied of the next frame
      interleave_frame(frame + 1, last, kNext);
      copy_frame(frame + 3, last, kPhase);
    }
    if (frame - 2 >= first) finish(kNext);
  }

  // After the last input frame, of slot kPhase: what the stack's end completes, and what is left.
  template <int kPhase>
  __device__ void leave_tile(int last) {
    constexpr int kBefore = (kPhase + 2) % kRing;
    constexpr bool kPending = G::kExchange || !G::kPointwise;
    if (last < end) {
      if constexpr (kPending) {
        __syncthreads();
        if (last > first) finish(kBefore);
      }
      complete<kPhase>();
      if constexpr (kPending) {
        __syncthreads();
        finish(kPhase);
      }
    } else if constexpr (kPending) {
      __syncthreads();
      finish(kBefore);
    }
  }

  __device__ void walk() {
    int frame = max(first - 1, 0);
    const int last = min(end, static_cast<int>(p.frames) - 1);
    copy_frame(frame, last, 0);
    copy_frame(frame + 1, last, 1);
    if constexpr (!G::kDirect) {
      copy_frame(frame + 2, last, 2);
      wait_for_copies<kRing - 1>();
      interleave_frame(frame, last, 0);
    }
    // Of the first frame nothing begins them; of the one before, nothing will be stored.
#pragma unroll
    for (int slot = 0; slot < kRing; ++slot)
#pragma unroll
      for (int h = 0; h < G::kRows; ++h)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[slot][h][j] = bias[j];
    for (;; frame += kRing) {
      step<0>(frame, last);
      if (frame == last) return leave_tile<0>(last);
      step<1>(frame + 1, last);
      if (frame + 1 == last) return leave_tile<1>(last);
      step<2>(frame + 2, last);
      if (frame + 2 == last) return leave_tile<2>(last);
    }
  }
};

#endif  // has resident kernels

template <class T, ResidentLayer kLayer>
__global__ void __launch_bounds__(LayerGeometry<kLayer>::kThreads,
                                  LayerGeometry<kLayer>::kSizes.blocks)
    group_pointwise_conv3d_resident_kernel(const __grid_constant__ GroupPointwiseConv3dHalfParams p,
                                           const __grid_constant__ ResidentPlan plan,
                                           const uint32_t* packed, bool ready) {
#if GPLWS_HAS_RESIDENT_KERNELS
  ResidentWarp<T, kLayer> warp(p, plan);
  let_next_kernel_start();
  if (!ready) wait_for_kernel_before();
  warp.load_weights(packed);
  int tile = static_cast<int>(blockIdx.x);
  warp.enter_tile(tile);  // while weights are on their way
  warp.clear_padding();
  wait_for_kernel_before();
  for (;;) {
    warp.walk();
    tile += static_cast<int>(gridDim.x);
    if (tile >= plan.tiles) return;
    warp.enter_tile(tile);
    __syncthreads();  // all warps are done with the last tile
  }
#endif
}

template <class T, ResidentLayer kLayer>
struct LayerLauncher {
  using G = LayerGeometry<kLayer>;

  static cudaError_t pack(const GroupPointwiseConv3dHalfParams& p, uint32_t* packed,
                          cudaStream_t stream) {
    constexpr unsigned kBlocks = (G::kPackedWords + kPackThreads - 1) / kPackThreads;
    return launch(pack_resident_kernel<T, kLayer>, dim3(kBlocks), kPackThreads, 0, stream, p,
                  packed);
  }

  static cudaError_t run(const GroupPointwiseConv3dHalfParams& p, const ResidentPlan& plan,
                         const uint32_t* packed, bool ready, cudaStream_t stream) {
    const auto kernel = group_pointwise_conv3d_resident_kernel<T, kLayer>;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, G::kSharedBytes);
    if (error != cudaSuccess) return error;
    const bool early = can_start_early(kernel);
    const dim3 grid(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.parts));
    return launch(kernel, grid, G::kThreads, G::kSharedBytes, stream, early, p, plan, packed,
                  ready);
  }
};

// Calls action(launcher) for the launcher of a layer.
template <class T, class Action>
cudaError_t with_launcher(ResidentLayer layer, Action action) {
  using enum ResidentLayer;
  switch (layer) {
    case kStem:
      return action(LayerLauncher<T, kStem>{});
    case k12:
      return action(LayerLauncher<T, k12>{});
    case kHead:
      return action(LayerLauncher<T, kHead>{});
    case k24:
      return action(LayerLauncher<T, k24>{});
    case k48:
      return action(LayerLauncher<T, k48>{});
    case k96:
      return action(LayerLauncher<T, k96>{});
    case kDown12:
      return action(LayerLauncher<T, kDown12>{});
    case kDown24:
      return action(LayerLauncher<T, kDown24>{});
    case kDown48:
      return action(LayerLauncher<T, kDown48>{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

template <class T>
cudaError_t pack_resident_type(const GroupPointwiseConv3dHalfParams& p, ResidentLayer layer,
                               void* packed, cudaStream_t stream) {
  return with_launcher<T>(layer, [&](auto launcher) {
    return launcher.pack(p, static_cast<uint32_t*>(packed), stream);
  });
}

template <class T>
cudaError_t launch_resident_type(const GroupPointwiseConv3dHalfParams& p, const ResidentPlan& plan,
                                 const void* packed, bool ready, cudaStream_t stream) {
  return with_launcher<T>(plan.layer, [&](auto launcher) {
    return launcher.run(p, plan, static_cast<const uint32_t*>(packed), ready, stream);
  });
}

}  // namespace gplws::cuda
