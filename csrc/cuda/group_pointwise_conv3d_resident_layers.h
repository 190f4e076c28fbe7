// The layers that the resident kernels are compiled for, and what follows from their sizes.
#pragma once

#include "cuda/device.h"

// Elsewhere blocks have too little shared memory for most layers: their code would only take time
// to compile. serves_capability() says the same of a device.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 800 || \
    (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200)
#define GPLWS_HAS_RESIDENT_KERNELS 1
#else
#define GPLWS_HAS_RESIDENT_KERNELS 0
#endif

namespace gplws::cuda {

// The capability as in DeviceLimits.
constexpr bool serves_capability(int capability) {
  return capability == 80 || (capability >= 90 && capability < 120);
}

// How the first operand of a product is read from shared memory: as 8 x 8 matrices, whose rows are
// 16-byte aligned, or as words of two values by each lane, for windows that begin anywhere.
enum class Operand { kMatrices, kWords };

// How an input frame gets into shared memory: by asynchronous copies of so many bytes, to where
// they are read; or from planes of channels, which are then put side by side.
enum class Loading { kCopies16, kCopies8, kCopies4, kPlanes };

// Sizes of a layer, and how it is shared out among the warps of a block.
struct ResidentLayerSizes {
  int inputs, groups, group_outputs;
  int channels_out;  // of the pointwise conv; 0: there is none
  int stride;
  int slices;          // of the channels in, summed by different warps
  int parts;           // of the channels out, by different blocks
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
      return {3, 1, 3, 12, 1, 1, 1, 4, 2, 4, 2, kWords, kPlanes};
    case k12:
      return {12, 4, 3, 12, 1, 1, 1, 4, 1, 2, 2, kWords, kCopies4};
    case kHead:
      return {12, 4, 3, 1, 1, 1, 1, 4, 1, 2, 2, kWords, kCopies4};
    case k24:
      return {24, 4, 6, 24, 1, 1, 1, 4, 1, 2, 2, kMatrices, kCopies4};
    case k48:
      return {48, 4, 12, 48, 1, 1, 1, 4, 1, 1, 1, kMatrices, kCopies8};
    case k96:
      return {96, 4, 24, 96, 1, 1, 1, 2, 1, 1, 1, kMatrices, kCopies16};
    case kDown12:
      return {12, 1, 24, 0, 2, 1, 1, 4, 1, 2, 2, kMatrices, kCopies16};
    case kDown24:
      return {24, 1, 48, 0, 2, 1, 1, 2, 1, 1, 2, kMatrices, kCopies16};
    default:
      return {48, 1, 96, 0, 2, 2, 2, 4, 1, 1, 1, kMatrices, kCopies16};
  }
}

constexpr int kUnits = 16;    // rows of a product: pixels, or pairs of them
constexpr int kTileSize = 8;  // columns of a product: channels out, or those of a pair
constexpr int kTaps9 = 9;     // rows times frames of the kernel
constexpr int kRing = 3;      // stages of input frames, sums of output frames, and middle results

// Of an input tile and one step of its threads through it, at most.
constexpr int kMostLines = 32;

constexpr int kBankBytes = 128;  // of shared memory: what lies so far apart meets the same bank

// The least size of `bytes` and more that moves what lies so far apart by an odd multiple of `step`
// along the banks; 0: `bytes`.
constexpr int spread(int bytes, int step) {
  return step == 0 ? bytes : bytes + ((step - bytes) % (2 * step) + 2 * step) % (2 * step);
}

template <ResidentLayer kLayer>
struct LayerGeometry {
  static constexpr ResidentLayerSizes kSizes = sizes_of<kLayer>();
  static constexpr bool kPointwise = kSizes.channels_out > 0;
  static constexpr int kStride = kSizes.stride, kRows = kSizes.rows;
  static constexpr bool kWords = kSizes.operand == Operand::kWords;
  static constexpr bool kDirect = kSizes.loading != Loading::kPlanes;
  // What the layer before wrote last is most likely still in the L2 cache, of which an image of 12
  // or 24 channels takes more than half: layers that follow upon each other in the network walk
  // through their tiles in turns from the first to the last one and back.
  static constexpr bool kBackwards = kLayer == ResidentLayer::k12 || kLayer == ResidentLayer::k24;
  // Activations that these kernels are made for.
  static constexpr bool kRelu = kPointwise, kPointwiseRelu = kSizes.channels_out > 1;

  // A plane of shared memory holds the channels in of a group, or of a slice.
  static constexpr int kPlanes = kSizes.groups * kSizes.slices;
  static constexpr int kPlaneChannels = kSizes.inputs / kPlanes;
  // With three or twelve channels out, two neighbouring pixels share a row of the product: fewer
  // of its columns are padding.
  static constexpr int kPair =
      kStride == 1 && kPlaneChannels % 12 != 6 && kPlaneChannels <= 12 ? 2 : 1;
  // Values of a pixel in the inner dimension, and what it takes in shared memory.
  static constexpr int kPadded = kPlaneChannels == 3 ? 4 : kPlaneChannels == 6 ? 8 : kPlaneChannels;
  static constexpr int kPixelBytes = kWords ? 4 : 2 * kPadded;
  // Words of two channels lie apart: those of all pixels side by side.
  static constexpr int kSubplanes = kWords ? kPadded / 2 : 1;
  // At stride 2 even and odd columns lie apart, unless neighbouring rows of the product meet
  // different banks of shared memory anyway.
  static constexpr bool kSplit = kStride == 2 && kPlaneChannels == 24;
  static constexpr int kPitch = kSplit ? kPixelBytes : kPixelBytes * kStride * kPair;

  // The inner dimension runs through the columns that a row of the product sees, and the channels.
  // A window of 12 channels at stride 2 begins one pixel earlier, to be aligned.
  static constexpr int kSkipped = kStride == 2 && kPlaneChannels == 12 ? 1 : 0;
  static constexpr int kColumns = 2 + kPair + kSkipped;
  static constexpr int kValues = kColumns * kPadded;
  static constexpr int kFullSteps = kValues / 16;
  static constexpr bool kHalfStep = kValues % 16 != 0;
  static constexpr int kSteps = kFullSteps + (kHalfStep ? 1 : 0);
  static constexpr int kStepWords = 2 * kFullSteps + (kHalfStep ? 1 : 0);

  // The products' columns. A warp has one tile of a plane: its share. Three channels of each pixel
  // of a pair are padded to four, as the pixels are.
  static constexpr int kPadOutputs = kPlaneChannels == 3 ? 4 : kSizes.group_outputs;
  static constexpr int kGroupTiles =
      (kPair * kPadOutputs / kSizes.parts + kTileSize - 1) / kTileSize;
  static constexpr int kTiles = kSizes.groups * kGroupTiles;  // of a block
  static constexpr int kShares = kPlanes * kGroupTiles;
  static constexpr int kWarpWords = kTaps9 * kStepWords;
  static constexpr int kWarpFours = (kWarpWords + 3) / 4;

  // Pixels.
  static constexpr int kPositions = kSizes.sets_w * kSizes.sets_h;
  static constexpr int kWarps = kShares * kPositions;
  static constexpr int kThreads = kWarps * kLanesPerWarp;
  static constexpr int kTileRows = kSizes.sets_h * kRows;
  static constexpr int kTileColumns = kSizes.sets_w * kUnits * kPair;
  static constexpr int kInputRows = (kTileRows - 1) * kStride + 3;
  static constexpr int kWarpInputRows = (kRows - 1) * kStride + 3;
  // Input columns in shared memory; so many lie before the first of the tile times the stride.
  // From planes, columns come in pairs.
  static constexpr int kLead = kDirect ? 1 + kSkipped : 2;
  static constexpr int kInputColumns = (kTileColumns - 1) * kStride + 3 + (kDirect ? kSkipped : 2);
  static constexpr int kOddPlace = (kInputColumns + 1) / 2;
  static constexpr int kRowBytes = kInputColumns * kPixelBytes;
  // Copies of words go to all planes at a time: those of one pixel, and of as many pixels as there
  // are lanes, are to meet different banks (of k24's, 32 words take two turns).
  static constexpr int kSubplaneBytes =
      spread(kInputRows * kRowBytes, (kWords && kDirect) ? kBankBytes / 8 : 0);
  static constexpr int kPlaneBytes =
      spread(kSubplanes * kSubplaneBytes,
             !kWords && kSizes.loading == Loading::kCopies4 ? kBankBytes / 4 : 0);
  static constexpr int kStageBytes = kPlanes * kPlaneBytes;
  // Where the window of the first unit begins in a row.
  static constexpr int kWindowOffset = (kLead - 1 - kSkipped) * kPixelBytes;

  // Threads share out a row of the input as pieces, and as many rows as there are threads for. What
  // is left where there are too few for a row, its edge, is shared out over all rows.
  static constexpr int kPieceBytes = kSizes.loading == Loading::kCopies8   ? 8
                                     : kSizes.loading == Loading::kCopies4 ? 4
                                                                           : 16;
  // Pieces that hold the channels of a plane, and how many channels before them the first one holds
  // (their weights are zero).
  static constexpr int kPlanePieces = (2 * kPlaneChannels + kPieceBytes - 1) / kPieceBytes;
  static constexpr int first_piece(int plane) { return 2 * kPlaneChannels * plane / kPieceBytes; }
  static constexpr int channels_before(int plane) {
    return kDirect ? kPlaneChannels * plane - first_piece(plane) * (kPieceBytes / 2) : 0;
  }
  static constexpr int kPixelPieces = kPlanes * kPlanePieces;
  static constexpr bool kRaw = kDirect && kPlanes == 1 && !kSplit;  // rows as they lie in memory
  static constexpr int kRowPieces = kRaw      ? kRowBytes / kPieceBytes
                                    : kDirect ? kInputColumns * kPixelPieces
                                              : kInputColumns / kPair;
  static constexpr int kRowStep = kThreads < kRowPieces ? 1 : kThreads / kRowPieces;
  static constexpr int kPieces = (kInputRows + kRowStep - 1) / kRowStep;  // of a thread
  static_assert(kInputRows + kRowStep <= kMostLines);
  static constexpr int kEdgePieces = kThreads < kRowPieces ? kRowPieces - kThreads : 0;
  // From planes, each thread copies its pieces to a place of its own first, and puts their channels
  // side by side: two pixels of three planes.
  static constexpr int kOwnWords = kDirect ? 0 : 3;
  static constexpr int kOwnBytes = kPieces * kOwnWords * 4 * kThreads;

  // The middle result, as operands of the pointwise conv: 16 bytes of each lane. A warp multiplies
  // one row and one group of channels out.
  static constexpr bool kExchange = kPointwise && kTiles > 1;
  static constexpr int kMiddleSteps = (kTiles + 1) / 2;
  static constexpr int kUnitOutputs = kPair * kSizes.channels_out;
  static constexpr int kOutTiles = (kUnitOutputs + kTileSize - 1) / kTileSize;
  static constexpr int kOutGroup = kExchange    ? kOutTiles * kRows / kShares
                                   : kPointwise ? kOutTiles
                                                : 1;
  static constexpr int kOutGroups = kPointwise ? kOutTiles / kOutGroup : 1;
  static constexpr int kPointwiseWords =
      kPointwise ? kMiddleSteps * kOutTiles * kLanesPerWarp * 2 : 0;
  static constexpr int kExchangeBytes =
      kExchange ? kPositions * kRows * kMiddleSteps * kLanesPerWarp * 16 : 0;

  // Without a pointwise conv results are gathered to be stored in whole lines: in 16 bits, or as
  // the float32 sums of each slice.
  static constexpr bool kGatherSums = kSizes.slices > 1;
  static constexpr int kPartOutputs = kSizes.groups * kSizes.group_outputs / kSizes.parts;
  static constexpr int kGatherPitch =  // bytes of a pixel
      kGatherSums ? 4 * (kPartOutputs + 8) : 2 * kPartOutputs + (kPartOutputs % 32 == 16 ? 16 : 0);
  static constexpr int kGatherPieces = kPartOutputs / 8;  // of a pixel, 16 bytes of the result
  static constexpr int kGathered =                        // pieces of a thread
      (kPositions * kRows * kUnits * kGatherPieces + kThreads - 1) / kThreads;
  static constexpr int kSliceBytes = kPositions * kRows * kUnits * kGatherPitch;
  static constexpr int kGatherBytes = kPointwise ? 0 : kSizes.slices * kSliceBytes;

  static constexpr int kPointwiseOffset = 0;
  static constexpr int kPointwiseBiasOffset = kPointwiseOffset + kPointwiseWords * 4;
  static constexpr int kMiddleOffset =
      kPointwiseBiasOffset + (kPointwise ? kOutTiles * kTileSize * 4 : 0);
  static constexpr int kMiddleBytes = kExchangeBytes + kGatherBytes;
  static constexpr int kStageOffset = kMiddleOffset + kRing * kMiddleBytes;
  static constexpr int kOwnOffset = kStageOffset + kRing * kStageBytes;
  static constexpr int kSharedBytes = kOwnOffset + kRing * kOwnBytes;

  // What is packed: weights of the conv in the order of registers; those of the pointwise conv and
  // its bias as they go to shared memory; the conv's bias, two values of each lane.
  static constexpr int kConvWords = kSizes.parts * kShares * kWarpFours * 4 * kLanesPerWarp;
  static constexpr int kSharedWords = kPointwise ? kPointwiseWords + kOutTiles * kTileSize : 0;
  static constexpr int kBiasWords = kSizes.parts * kShares * kLanesPerWarp * 2;
  static constexpr int kPackedWords = kConvWords + kSharedWords + kBiasWords;

  static_assert(kSharedWords % 4 == 0 && kConvWords % 4 == 0);
  static_assert(!kExchange || kRows * kOutGroups == kShares);
  static_assert(!kPointwise || (kOutGroup >= 1 && kOutGroup <= 4));
  static_assert(kEdgePieces == 0 || (kDirect && kEdgePieces * kInputRows <= kThreads));
  static_assert(kPieces <= 31 && kThreads <= 1024);
  static_assert(kMiddleOffset % 16 == 0 && kPointwiseBiasOffset % 16 == 0);
  static_assert(kMiddleBytes % 16 == 0 && kStageBytes % 16 == 0);
  static_assert(kWords || (kRowBytes % 16 == 0 && kPlaneBytes % 16 == 0));
  static_assert(kSharedBytes <= 227 * 1024);

  // Byte at which step `step` of the inner dimension begins, from the window's first one.
  static constexpr int step_offset(int step) {
    return kSplit && step >= 3 ? kOddPlace * kPixelBytes + 32 * (step - 3) : 32 * step;
  }

  struct Tap {
    int column, channel;  // of the kernel, of the plane; -1: none
  };
  // What value `value` of the inner dimension is multiplied by, for pixel `pixel` of a pair.
  static constexpr Tap tap_of(int plane, int value, int pixel) {
    const int place = value / kPadded, channel = value % kPadded - channels_before(plane);
    // Split columns: those of the even places lie side by side, 0 and 2, then 1.
    const int column = kSplit ? 2 * place % 3 : place - kSkipped - pixel;
    const bool exists =
        place < kColumns && column >= 0 && column < 3 && channel >= 0 && channel < kPlaneChannels;
    return exists ? Tap{column, channel} : Tap{-1, -1};
  }
  // Where word `number` of a warp's weights belongs: those of whole steps come first, so that the
  // two of a product lie in neighbouring registers.
  struct Weight {
    int kernel_plane, step_word;  // row and frame of the kernel; -1: none
  };
  static constexpr Weight weight_of(int number) {
    constexpr int kFullWords = 2 * kFullSteps;
    if (number < kTaps9 * kFullWords) return {number / kFullWords, number % kFullWords};
    return number < kWarpWords ? Weight{number - kTaps9 * kFullWords, kFullWords} : Weight{-1, -1};
  }

  // Pixel of a pair and channel out of its group that column `n` of a group's tile stands for.
  struct Column {
    int pixel, channel;  // -1: none
  };
  static constexpr Column column_of(int tile, int n) {
    const int number = tile * kTileSize + n;
    const int pixel = number / kPadOutputs, channel = number % kPadOutputs;
    return {pixel, pixel < kPair && channel < kSizes.group_outputs ? channel : -1};
  }
  // Place among the values of a unit that column `n` of tile `tile` of a group of them stands for:
  // a lane's columns 2 (lane % 4) and the next of all tiles are to lie side by side.
  static constexpr int place_in_group(int tile, int n) {
    if constexpr (kOutGroup % 2 == 0) return 2 * kOutGroup * (n / 2) + 2 * tile + n % 2;
    if constexpr (kOutGroup == 3)
      return tile < 2 ? 4 * (n / 2) + 2 * tile + n % 2 : 16 + 2 * (n / 2) + n % 2;
    return n;
  }
};

}  // namespace gplws::cuda
