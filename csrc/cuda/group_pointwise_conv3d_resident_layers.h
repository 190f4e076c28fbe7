// The layers that the resident kernels are compiled for, and what follows from their sizes.
#pragma once

#include "cuda/device.h"

namespace gplws::cuda {

// Where the first operand of a product comes from in shared memory: 8 x 8 matrices, whose rows are
// 16-byte aligned, or words of four values by each lane, which need be aligned to 8 bytes only.
enum class Operand { kMatrices, kWords };

// How an input frame gets into shared memory: by asynchronous copies of 16 or 8 bytes; through
// registers, where channels of a group are set apart and padded; or so from planes of channels.
enum class Loading { kCopies16, kCopies8, kRegroup, kPlanes };

// Sizes of a layer, and how it is shared out among the warps of a block.
struct ResidentLayerSizes {
  int inputs, groups, group_outputs;
  int channels_out;  // of the pointwise conv; 0: there is none
  int stride;
  int slices;          // of the channels in, summed by different warps
  int parts;           // of the channels out, by different blocks
  int warp_planes;     // groups that a warp computes
  int rows;            // of the output that a warp holds
  int sets_w, sets_h;  // positions of warps in a block
  int blocks;          // on a multiprocessor, as registers are to allow
  Operand operand;
  Loading loading;
};

template <ResidentLayer kLayer>
constexpr ResidentLayerSizes sizes_of() {
  using enum ResidentLayer;
  using enum Operand;
  using enum Loading;
  switch (kLayer) {
    case kStem:
      return {3, 1, 3, 12, 1, 1, 1, 1, 4, 2, 4, 1, kWords, kPlanes};
    case k12:
      return {12, 4, 3, 12, 1, 1, 1, 1, 4, 2, 2, 1, kWords, kRegroup};
    case kHead:
      return {12, 4, 3, 1, 1, 1, 1, 1, 4, 2, 2, 1, kWords, kRegroup};
    case k24:
      return {24, 4, 6, 24, 1, 1, 1, 1, 4, 2, 2, 1, kMatrices, kRegroup};
    case k48:
      return {48, 4, 12, 48, 1, 1, 1, 1, 4, 1, 2, 1, kWords, kCopies8};
    case k96:
      return {96, 4, 24, 96, 1, 1, 1, 1, 4, 1, 1, 1, kMatrices, kCopies16};
    case kDown12:
      return {12, 1, 24, 0, 2, 1, 1, 1, 4, 2, 2, 1, kMatrices, kCopies8};
    case kDown24:
      return {24, 1, 48, 0, 2, 1, 1, 1, 4, 2, 1, 1, kMatrices, kCopies16};
    default:
      return {48, 1, 96, 0, 2, 2, 2, 1, 4, 1, 1, 1, kMatrices, kCopies16};
  }
}

constexpr int kUnits = 16;    // rows of a product: pixels, or pairs of them
constexpr int kTileSize = 8;  // columns of a product: channels out, or those of a pair
constexpr int kTaps9 = 9;     // rows times frames of the kernel

template <ResidentLayer kLayer>
struct LayerGeometry {
  static constexpr ResidentLayerSizes kSizes = sizes_of<kLayer>();
  static constexpr bool kPointwise = kSizes.channels_out > 0;
  static constexpr int kStride = kSizes.stride, kRows = kSizes.rows;

  // A plane of shared memory holds the channels in of a group, or of a slice.
  static constexpr int kPlanes = kSizes.groups * kSizes.slices;
  static constexpr int kPlaneChannels = kSizes.inputs / kPlanes;
  // With three channels, two neighbouring pixels share a row of the product.
  static constexpr int kPair = kPlaneChannels == 3 ? 2 : 1;
  static constexpr int kPadded = kPlaneChannels == 3 ? 4 : kPlaneChannels == 6 ? 8 : kPlaneChannels;
  static constexpr int kPixelBytes = 2 * kPadded;
  // At stride 2 even and odd columns lie apart, unless neighbouring rows of the product meet
  // different banks of shared memory anyway.
  static constexpr bool kSplit = kStride == 2 && kPlaneChannels == 24;
  static constexpr int kPitch = kSplit ? kPixelBytes : kPixelBytes * kStride * kPair;

  // The inner dimension runs through the columns that a row of the product sees, and the channels.
  static constexpr int kValues = (kPair == 2 ? 4 : 3) * kPadded;
  static constexpr int kFullSteps = kValues / 16;
  static constexpr bool kHalfStep = kValues % 16 != 0;
  static constexpr int kStepWords = 2 * kFullSteps + (kHalfStep ? 1 : 0);

  // The products' columns. A warp has one tile of each of its planes.
  static constexpr int kWarpPlanes = kSizes.warp_planes;
  static constexpr int kGroupTiles =
      kPair == 2 ? 1 : (kSizes.group_outputs / kSizes.parts + kTileSize - 1) / kTileSize;
  static constexpr int kTiles = kSizes.groups * kGroupTiles;  // of a block
  static constexpr int kShares = kPlanes * kGroupTiles / kWarpPlanes;
  static constexpr int kWarpWords = kWarpPlanes * kTaps9 * kStepWords;

  // Pixels.
  static constexpr int kPositions = kSizes.sets_w * kSizes.sets_h;
  static constexpr int kWarps = kShares * kPositions;
  static constexpr int kThreads = kWarps * kLanesPerWarp;
  static constexpr int kTileRows = kSizes.sets_h * kRows;
  static constexpr int kTileColumns = kSizes.sets_w * kUnits * kPair;
  static constexpr int kInputRows = (kTileRows - 1) * kStride + 3;
  static constexpr int kWarpInputRows = (kRows - 1) * kStride + 3;
  // The first column in shared memory is so many before the first of the tile times the stride.
  static constexpr int kLead = kPair;
  static constexpr int kInputColumns = (kTileColumns - 1) * kStride + 1 + 2 * kLead;
  static constexpr int kOddPlace = (kInputColumns + 1) / 2;
  // The last half of a product may reach into the pixel behind what is seen: one more.
  static constexpr int kRowBytes =
      ((kInputColumns + (kValues % 8 != 0 ? 1 : 0)) * kPixelBytes + 15) / 16 * 16;
  static constexpr int kPlaneBytes = kInputRows * kRowBytes;
  static constexpr int kStageBytes = kPlanes * kPlaneBytes;
  static constexpr bool kAsync =
      kSizes.loading == Loading::kCopies16 || kSizes.loading == Loading::kCopies8;
  static constexpr int kStages = kAsync ? 3 : 2;
  // Pieces of an input row: of so many bytes, or units of shared memory.
  static constexpr int kPieceBytes = kSizes.loading == Loading::kCopies8 ? 8 : 16;
  static constexpr int kRowPieces =
      kAsync ? kInputColumns * kSizes.inputs * 2 / kPieceBytes : kInputColumns / (16 / kPixelBytes);
  static constexpr int kPieces = (kInputRows * kRowPieces + kThreads - 1) / kThreads;

  // The middle result, as operands of the pointwise conv: 16 bytes of each lane.
  static constexpr bool kExchange = kPointwise && kTiles > 1;
  static constexpr int kMiddleSteps = (kTiles + 1) / 2;
  static constexpr int kUnitOutputs = kPair * kSizes.channels_out;
  static constexpr int kOutGroup = kUnitOutputs < 8 ? 1 : kUnitOutputs % 32 == 0 ? 4 : 3;
  static constexpr int kOutTiles = (kUnitOutputs + kTileSize - 1) / kTileSize;
  static constexpr int kOutGroups = kPointwise ? kOutTiles / kOutGroup : 1;
  // Rows of the output times groups of channels, shared out among the warps of a position.
  static constexpr int kItems = kExchange ? kRows * kOutGroups / kShares : kRows;
  static constexpr int kPointwiseWords =
      kPointwise ? kMiddleSteps * kOutTiles * kLanesPerWarp * 2 : 0;
  static constexpr int kExchangeBytes =
      kExchange ? kPositions * kRows * kMiddleSteps * kLanesPerWarp * 16 : 0;

  // Without a pointwise conv: sums of each slice, to be stored together.
  static constexpr int kPartOutputs = kSizes.groups * kSizes.group_outputs / kSizes.parts;
  static constexpr int kSumPitch = kPartOutputs + (kPartOutputs % 32 == 16 ? 8 : 0);
  static constexpr int kSliceFloats = kPositions * kRows * kUnits * kSumPitch;
  static constexpr int kSumBytes = kPointwise ? 0 : kSizes.slices * kSliceFloats * 4;

  static constexpr int kPointwiseOffset = 0;
  static constexpr int kPointwiseBiasOffset = kPointwiseOffset + kPointwiseWords * 4;
  static constexpr int kMiddleOffset =
      kPointwiseBiasOffset + (kPointwise ? kOutTiles * kTileSize * 4 : 0);
  static constexpr int kMiddleBytes = kExchangeBytes + kSumBytes;  // twice: one frame behind
  static constexpr int kStageOffset = kMiddleOffset + 2 * kMiddleBytes;
  static constexpr int kSharedBytes = kStageOffset + kStages * kStageBytes;
  static constexpr int64_t kConvWords =
      int64_t{kSizes.parts} * kShares * kWarpWords * kLanesPerWarp;

  static_assert(kPlanes * kGroupTiles % kWarpPlanes == 0);
  static_assert(!kExchange || kRows * kOutGroups % kShares == 0);
  static_assert(!kExchange || kItems == 1 || kOutGroups == 1);
  static_assert(kMiddleOffset % 16 == 0 && kPointwiseBiasOffset % 16 == 0 &&
                kMiddleBytes % 16 == 0 && kStageBytes % 16 == 0);
  static_assert(kSharedBytes <= 227 * 1024);

  // Byte of a row at which step `step` of the inner dimension begins, from the row's first one.
  static constexpr int step_offset(int step) {
    return kSplit && step >= 3 ? kOddPlace * kPixelBytes + 32 * (step - 3) : 32 * step;
  }

  struct Tap {
    int column, channel;  // of the kernel, of the plane; -1: none
  };
  // What value `value` of the inner dimension is multiplied by, for column `n` of the product.
  static constexpr Tap tap_of(int value, int n) {
    if constexpr (kPair == 2) {
      const int column = value / kPadded - n / kPadded, channel = value % kPadded;
      return column >= 0 && column < 3 && channel < kPlaneChannels ? Tap{column, channel}
                                                                   : Tap{-1, -1};
    } else {
      const int place = value / kPadded, channel = value % kPadded;
      if (place >= 3 || channel >= kPlaneChannels) return {-1, -1};
      // Split columns: those of the even places lie side by side, 0 and 2, then 1.
      return {kSplit ? (2 * place) % 3 : place, channel};
    }
  }
  // Pixel of a pair and channel out of its group that column `n` of a group's tile stands for.
  struct Column {
    int pixel, channel;  // -1: none
  };
  static constexpr Column column_of(int tile, int n) {
    const int channel = kPair == 2 ? n % kPadded : tile * kTileSize + n;
    const int count = kSizes.group_outputs;
    return {kPair == 2 ? n / kPadded : 0, channel < count ? channel : -1};
  }
  // Place among the values of a unit that column `n` of tile `tile` of a group of them stands for:
  // a lane's columns 2 (lane % 4) and the next of all tiles are to lie side by side.
  static constexpr int place_in_group(int tile, int n) {
    if constexpr (kOutGroup == 4) return 8 * (n / 2) + 2 * tile + n % 2;
    if constexpr (kOutGroup == 3)
      return tile < 2 ? 4 * (n / 2) + 2 * tile + n % 2 : 16 + 2 * (n / 2) + n % 2;
    return n;
  }
};

}  // namespace gplws::cuda
