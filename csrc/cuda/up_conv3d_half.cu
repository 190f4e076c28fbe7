// A product of 16 x 16 by 16 x 8 makes two channels out of one input frame, for one of the three
// output frames it belongs to, at 16 neighbouring input pixels. Its rows are those pixels. Its
// inner dimension is the four input pixels that the 2 x 2 output pixels see (here, right, below,
// below and right) times the four channels in; its columns are the 2 x 2 output pixels times the
// two channels out. A lane's part of the left operand is then four channels of one pixel, as they
// lie in memory where channels are nearest: no way through shared memory. 108 of the 384 products
// are not padding, of which tensor cores have more than enough: what limits this op is memory.
//
// A warp makes four channels out, two such products, and walks through the frames with the sums of
// three output frames in registers. A block has all channels of its pixels: where channels are
// nearest, whole lines of the residual come into a ring in shared memory some frames ahead, the
// result takes its place there, and leaves in whole lines.
#include "cuda/up_conv3d_half.h"

#include <algorithm>

#include "cuda/device.h"
#include "cuda/group_pointwise_conv3d_half.h"

// To be set for experiments.
#ifndef GPLWS_UP_WARPS
#define GPLWS_UP_WARPS 6  // of a block, where its channels do not ask for more
#endif
#ifndef GPLWS_UP_RING
#define GPLWS_UP_RING 4  // frames of the residual in shared memory, 2 or more
#endif
#ifndef GPLWS_UP_RESIDENT
#define GPLWS_UP_RESIDENT 24  // warps of a multiprocessor: registers are bounded for so many
#endif

namespace gplws::cuda {
namespace {

constexpr int kRing = GPLWS_UP_RING;
constexpr int kPixels = 16;      // input pixels of a warp
constexpr int kChannelsOut = 4;  // of a warp
constexpr int kMaxChunks = 16;   // warps side by side in a block: 64 channels out
constexpr int kGranule = 16;     // bytes of a copy

struct Plan {
  int chunks, rows;  // warps of a block: pieces of four channels out, input rows
  int threads;
  int64_t column_tiles, row_tiles, segments, frames_per_segment;
  int64_t blocks;
  int pixel_bytes, pitch, stage_bytes;  // of the result in shared memory: a pixel, a row, a frame
};

#if defined(GPLWS_CUDA_EMULATION) || GPLWS_HAS_TENSOR_KERNELS

constexpr int kTaps = 27;
constexpr int kPlaneTaps = 9;

// The tap by which an input pixel (here, right, below, below and right) reaches an output pixel
// (even row and column, odd column, odd row, both odd); -1: none.
__device__ inline int tap_between(int source, int target) {
  for (int tap = 0; tap < kPlaneTaps; ++tap)
    if ((0x001001223ll >> (4 * tap) & 3) == source && (0x323101323ll >> (4 * tap) & 3) == target)
      return tap;
  return -1;
}

// A lane's part of the weights: [pair of channels out][frame of the kernel].
using Weights = uint2[2][3];

template <class T>
__device__ void load_weights(const UpConv3dParams& p, int channel, int group, int quarter,
                             Weights& weights) {
  const int tap = tap_between(quarter, group / 2);
#pragma unroll
  for (int pair = 0; pair < 2; ++pair)
#pragma unroll
    for (int kn = 0; kn < 3; ++kn) {
      uint32_t word = 0;
      if (tap >= 0) {
        const T* w = static_cast<const T*>(p.weight) +
                     (channel + 4 * pair + 2 * (group % 2)) * kTaps + kn * kPlaneTaps + tap;
        word = static_cast<uint32_t>(w[0].bits) | static_cast<uint32_t>(w[kTaps].bits) << 16;
      }
      // Each channel out sees two of the four channels in.
      weights[pair][kn] = group % 2 == 0 ? make_uint2(word, 0) : make_uint2(0, word);
    }
}

// Eight channels of a pixel.
template <class T, bool kDense>
__device__ uint4 load_pixel(const T* x, int64_t channel_stride) {
  if constexpr (kDense) {
    return *reinterpret_cast<const uint4*>(x);
  } else {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      words[i] = static_cast<uint32_t>(x[2 * i * channel_stride].bits) |
                 static_cast<uint32_t>(x[(2 * i + 1) * channel_stride].bits) << 16;
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// What a lane reads of a frame: one of the four input pixels for each of two rows of the product.
struct Inputs {
  uint4 upper, lower;
};

// Sums of an output frame: [pair of channels][row of the product, channel of the pair].
using Sums = float[2][4];

template <class T>
__device__ void add_frame(const Inputs& x, const Weights& weights, Sums (&sums)[3]) {
  const MatrixA first{{x.upper.x, x.lower.x, x.upper.y, x.lower.y}};
  const MatrixA second{{x.upper.z, x.lower.z, x.upper.w, x.lower.w}};
#pragma unroll
  for (int kn = 0; kn < 3; ++kn) {
    multiply_add_16(T{}, first, weights[0][kn], sums[kn][0]);
    multiply_add_16(T{}, second, weights[1][kn], sums[kn][1]);
  }
}

template <class T>
__device__ float low_half(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word)});
}
template <class T>
__device__ float high_half(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word >> 16)});
}

// kDense: channels are nearest in all tensors, rows of the residual and of y without gaps, and all
// of it in whole granules.
template <class T, bool kDense>
__device__ void walk_through_frames(const UpConv3dParams& p, const Plan& plan) {
  // In 32 bits, whose divisions are short.
  unsigned rest = blockIdx.x;
  const auto next_part = [&rest](int64_t size) {
    const auto parts = static_cast<unsigned>(size);
    const unsigned index = rest % parts;
    rest /= parts;
    return static_cast<int>(index);
  };
  const int64_t first_column = int64_t{next_part(plan.column_tiles)} * kPixels;
  const int64_t first_row = int64_t{next_part(plan.row_tiles)} * plan.rows;
  const int segment_frames = static_cast<int>(plan.frames_per_segment);
  const int first = next_part(plan.segments) * segment_frames;
  const int end = min(first + segment_frames, static_cast<int>(p.frames));
  const int64_t image = rest;
  // The frames of the input that these see.
  const int begin = max(first - 1, 0), last = min(end, static_cast<int>(p.frames) - 1);

  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kLanesPerWarp, lane = thread % kLanesPerWarp;
  const int group = lane / 4, quarter = lane % 4;
  const int chunk = warp % plan.chunks, tile_row = warp / plan.chunks;

  // The input pixels that this lane reads, and the output pixel that it makes of each.
  const int64_t row = first_row + tile_row, column = first_column + group;
  const int64_t x_row = row + quarter / 2, x_column = column + quarter % 2;
  // Pointers walk along, each to the frame that is next to be read or written.
  const T* x = static_cast<const T*>(p.x) + image * p.x_strides.batch + begin * p.x_strides.frame +
               x_row * p.x_strides.row + x_column * p.x_strides.column +
               8 * chunk * p.x_strides.channel;
  const bool upper_inside = x_row < p.height && x_column < p.width;
  const bool lower_inside = x_row < p.height && x_column + 8 < p.width;
  const auto load = [&](Inputs& inputs) {  // what lies outside stays zero
    if (upper_inside) inputs.upper = load_pixel<T, kDense>(x, p.x_strides.channel);
    if (lower_inside)
      inputs.lower = load_pixel<T, kDense>(x + 8 * p.x_strides.column, p.x_strides.channel);
    x += p.x_strides.frame;
  };

  // The granule of each frame that this thread brings and takes away.
  unsigned char* const ring = dynamic_shared_memory();
  const T* residual = static_cast<const T*>(p.residual ? p.residual : p.x);  // or not read
  T* y = static_cast<T*>(p.y);
  int granule_at = 0;
  bool brings = false;
  if constexpr (kDense) {
    const int granules = kChannelsOut * plan.chunks * 4;  // of an output row of the tile
    const int tile_y_row = thread / granules, granule = thread % granules;
    const int64_t y_row = 2 * first_row + tile_y_row;
    const int64_t element = 2 * first_column * p.channels_out + 8 * granule;  // of the row
    brings = y_row < 2 * p.height && element < 2 * p.width * p.channels_out;
    granule_at = tile_y_row * plan.pitch + granule * kGranule;
    residual += image * p.residual_strides.batch + first * p.residual_strides.frame +
                y_row * p.residual_strides.row + element;
    y += image * p.y_strides.batch + first * p.y_strides.frame + y_row * p.y_strides.row + element;
  }
  wait_for_kernel_before();
  const bool with_residual = brings && p.residual != nullptr;
  const auto bring = [&](int frame, int stage) {
    if (frame < end)
      copy_async<kGranule>(ring + stage * plan.stage_bytes + granule_at, residual, with_residual);
    residual += p.residual_strides.frame;
    commit_copies();
  };
  const auto take_away = [&](int stage) {
    if (brings)
      __stcs(reinterpret_cast<uint4*>(y),
             *reinterpret_cast<const uint4*>(ring + stage * plan.stage_bytes + granule_at));
    y += p.y_strides.frame;
  };
  if constexpr (kDense) {
#pragma unroll
    for (int i = 0; i < kRing - 1; ++i) bring(first + i, i);
  }
  Inputs inputs[2] = {};
  load(inputs[0]);
  if (begin < last) load(inputs[1]);

  Weights weights;
  load_weights<T>(p, 8 * chunk, group, quarter, weights);
  float bias[kChannelsOut];
#pragma unroll
  for (int i = 0; i < kChannelsOut; ++i)
    bias[i] = p.bias ? load_float(static_cast<const T*>(p.bias) + kChannelsOut * chunk + i) : 0.0f;
  // Of the pixel of the product's upper row; that of the lower row is 16 columns on.
  const int tile_pixel_at = (2 * tile_row + quarter / 2) * plan.pitch +
                            (2 * group + quarter % 2) * plan.pixel_bytes + 8 * chunk;

  Sums sums[3] = {};
  int stage = 0;
  const auto store = [&](int frame) {  // of which sums[0] is complete
    if constexpr (kDense) {
      wait_for_copies<kRing - 2>();
      __syncthreads();  // the residual is there, and the result of the frame before
      const int last_stage = stage == 0 ? kRing - 1 : stage - 1;
      if (frame > first) take_away(last_stage);
      bring(frame + kRing - 1, last_stage);
      unsigned char* place = ring + stage * plan.stage_bytes + tile_pixel_at;
#pragma unroll
      for (int half = 0; half < 2; ++half, place += 16 * plan.pixel_bytes) {
        const uint2 taken = *reinterpret_cast<const uint2*>(place);
        const float (&s)[2][4] = sums[0];
        *reinterpret_cast<uint2*>(place) =
            make_uint2(pack_two<T>(s[0][2 * half] + bias[0] + low_half<T>(taken.x),
                                   s[0][2 * half + 1] + bias[1] + high_half<T>(taken.x)),
                       pack_two<T>(s[1][2 * half] + bias[2] + low_half<T>(taken.y),
                                   s[1][2 * half + 1] + bias[3] + high_half<T>(taken.y)));
      }
      stage = stage + 1 == kRing ? 0 : stage + 1;
    } else {
      const auto offset = [&](const Strides5& strides, int half) {
        return image * strides.batch + kChannelsOut * chunk * strides.channel +
               frame * strides.frame + (2 * row + quarter / 2) * strides.row +
               (2 * (column + 8 * half) + quarter % 2) * strides.column;
      };
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (row >= p.height || column + 8 * half >= p.width) continue;
        T* pixel = y + offset(p.y_strides, half);
        const T* taken = residual + offset(p.residual_strides, half);
#pragma unroll
        for (int i = 0; i < kChannelsOut; ++i) {
          const float added =
              p.residual ? load_float(taken + i * p.residual_strides.channel) : 0.0f;
          pixel[i * p.y_strides.channel] =
              from_float<T>(sums[0][i / 2][2 * half + i % 2] + bias[i] + added);
        }
      }
    }
  };
  const auto step = [&](int n, Inputs& here) {
    add_frame<T>(here, weights, sums);
    if (n + 2 <= last) load(here);
    if (n > first) store(n - 1);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[0][pair][i] = sums[1][pair][i];
        sums[1][pair][i] = sums[2][pair][i];
        sums[2][pair][i] = 0.0f;
      }
  };
  // By twos: inputs that are on their way cannot move from one register to another.
  for (int n = begin; n <= last; n += 2) {
    step(n, inputs[0]);
    if (n < last) step(n + 1, inputs[1]);
  }
  if (last < end) store(last);  // the last frame of all: none behind it adds to it
  if constexpr (kDense) {
    wait_for_copies<0>();
    __syncthreads();
    take_away(stage == 0 ? kRing - 1 : stage - 1);
  }
}

#endif

// Two bounds on the threads: a wide block holds all of a multiprocessor's share of registers, and
// narrow ones would be bounded by its needs.
template <class T, bool kDense, int kMaxWarps>
__global__ void __launch_bounds__(kMaxWarps* kLanesPerWarp,
                                  kMaxWarps > GPLWS_UP_RESIDENT ? 1 : GPLWS_UP_RESIDENT / kMaxWarps)
    up_conv3d_half_kernel(const __grid_constant__ UpConv3dParams p,
                          const __grid_constant__ Plan plan) {
#if defined(GPLWS_CUDA_EMULATION) || GPLWS_HAS_TENSOR_KERNELS
  let_next_kernel_start();
  walk_through_frames<T, kDense>(p, plan);
#endif
}

template <class T>
bool dense(const UpConv3dParams& p) {
  constexpr int64_t kElements = kGranule / sizeof(T);
  const auto whole = [](const void* pointer, const Strides5& s) {
    return s.channel == 1 && reinterpret_cast<uintptr_t>(pointer) % kGranule == 0 &&
           s.batch % kElements == 0 && s.frame % kElements == 0 && s.row % kElements == 0;
  };
  return whole(p.x, p.x_strides) && p.x_strides.column % kElements == 0 &&
         whole(p.y, p.y_strides) && p.y_strides.column == p.channels_out &&
         (!p.residual ||
          (whole(p.residual, p.residual_strides) && p.residual_strides.column == p.channels_out));
}

template <class T>
cudaError_t launch_type(const UpConv3dParams& p, const DeviceLimits& limits, cudaStream_t stream) {
  Plan plan{};
  plan.chunks = static_cast<int>(p.channels_out / kChannelsOut);
  plan.rows = plan.chunks < GPLWS_UP_WARPS ? GPLWS_UP_WARPS / plan.chunks : 1;
  if (plan.rows > p.height) plan.rows = static_cast<int>(p.height);
  const int warps = plan.chunks * plan.rows;
  plan.threads = warps * kLanesPerWarp;
  plan.column_tiles = (p.width + kPixels - 1) / kPixels;
  plan.row_tiles = (p.height + plan.rows - 1) / plan.rows;
  const int64_t tiles = p.batch * plan.column_tiles * plan.row_tiles;
  // Segments read two frames more each: only as many as find room at once.
  const int64_t room = int64_t{limits.processors} * GPLWS_UP_RESIDENT / warps;
  plan.segments = std::clamp(room / tiles, int64_t{1}, p.frames);
  plan.frames_per_segment = (p.frames + plan.segments - 1) / plan.segments;
  plan.segments = (p.frames + plan.frames_per_segment - 1) / plan.frames_per_segment;
  plan.blocks = tiles * plan.segments;
  if (plan.blocks > (int64_t{1} << 31) - 1) return cudaErrorInvalidConfiguration;
  // What the rows are apart keeps the four lanes of an input pixel, two of each row, in different
  // banks.
  plan.pixel_bytes = static_cast<int>(p.channels_out * sizeof(T));
  plan.pitch = 2 * kPixels * plan.pixel_bytes + (plan.pixel_bytes % 16 == 8 ? 64 : 16);
  plan.stage_bytes = 2 * plan.rows * plan.pitch;

  const auto start = [&](auto kernel, int shared_bytes) {
    cudaError_t error = cudaSuccess;
    if (shared_bytes > 48 * 1024)  // what every device grants without asking
      error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
    return launch(kernel, dim3(static_cast<unsigned>(plan.blocks)), plan.threads, shared_bytes,
                  stream, can_start_early(kernel), p, plan);
  };
  const int ring_bytes = kRing * plan.stage_bytes;
  constexpr int kFew = GPLWS_UP_WARPS < 6 ? 6 : GPLWS_UP_WARPS;
  if (dense<T>(p))
    return warps <= kFew ? start(up_conv3d_half_kernel<T, true, kFew>, ring_bytes)
           : warps <= 12 ? start(up_conv3d_half_kernel<T, true, 12>, ring_bytes)
                         : start(up_conv3d_half_kernel<T, true, kMaxChunks>, ring_bytes);
  return start(up_conv3d_half_kernel<T, false, kMaxChunks>, 0);
}

}  // namespace

bool up_conv3d_half_fits(const UpConv3dParams& p) {
  DeviceLimits limits;
  return p.channels == 2 * p.channels_out && p.channels_out % kChannelsOut == 0 &&
         p.channels_out <= kMaxChunks * kChannelsOut && device_limits(&limits) == cudaSuccess &&
         limits.capability >= 80;
}

cudaError_t launch_up_conv3d_half(const UpConv3dParams& p, cudaStream_t stream) {
  DeviceLimits limits;
  const cudaError_t error = device_limits(&limits);
  if (error != cudaSuccess) return error;
  return p.type == FloatType::kBfloat16 ? launch_type<Bfloat16>(p, limits, stream)
                                        : launch_type<Float16>(p, limits, stream);
}

}  // namespace gplws::cuda
