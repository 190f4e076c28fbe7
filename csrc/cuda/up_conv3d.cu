// One thread walks through the frames at one input pixel and makes the 2 x 2 output pixels there:
// with stride 2 an even row or column of the result sees one tap of the kernel, an odd one two. An
// input frame is read once and added to the output frames before, at and behind it. Where channels
// lie side by side a thread takes two channels out and the four channels in that they come from, so
// that a warp reads and writes whole lines; the weights, as floats, are in shared memory. Where
// columns do, a block has one channel out of two channels in, whose weights all its threads read at
// once, and inputs are two frames ahead. Summed in one fixed order.
#include "cuda/up_conv3d.h"

#include <algorithm>
#include <bit>

#include "cuda/device.h"
#include "cuda/up_conv3d_half.h"

// To be set for experiments.
#ifndef GPLWS_UP_PLANAR_BLOCKS
#define GPLWS_UP_PLANAR_BLOCKS 3  // of a multiprocessor: bounds the registers
#endif

namespace gplws::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTaps = 27;
constexpr int kPlaneTaps = 9;
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
constexpr int kMaxSharedBytes = 48 * 1024;  // what every device grants without asking
// Frames are shared out among threads until each multiprocessor has so many: twice what it holds.
constexpr int64_t kEnoughThreads = 4096;

constexpr int kPlanarTaps = 28;  // of a channel in shared memory: whole fours
constexpr int64_t kMaxPlanarPixels = (int64_t{1} << 31) - 1024;  // counted in 32 bits
constexpr int64_t kEnoughPlanarThreads = 2048;                   // hold more registers: as above

struct Plan {
  int64_t channel_blocks;
  int64_t segments, frames_per_segment;
  int64_t pixel_blocks;   // of a channel
  int64_t items;          // pieces of work, one for a thread
  bool channels_nearest;  // neighbouring threads take neighbouring channels, else columns
  bool pairs;             // y holds neighbouring columns side by side, aligned as pairs
};

// Of the four input pixels (here, right, below, below and right) the one that a tap reads, and of
// the four output pixels (even row and column, odd column, odd row, both odd) the one it adds to;
// one hexadecimal digit for each tap.
__host__ __device__ constexpr int source_of(int tap) { return 0x001001223ll >> (4 * tap) & 3; }
__host__ __device__ constexpr int target_of(int tap) { return 0x323101323ll >> (4 * tap) & 3; }

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

template <class T>
__device__ Pair<T> pair_of(float first, float second) {
  return {from_float<T>(first), from_float<T>(second)};
}

__device__ inline void read_four(const float* x, float (&values)[4]) {
  const float4 four = __ldg(reinterpret_cast<const float4*>(x));
  values[0] = four.x;
  values[1] = four.y;
  values[2] = four.z;
  values[3] = four.w;
}
template <class T>
__device__ void read_four(const T* x, float (&values)[4]) {
  const uint2 words = __ldg(reinterpret_cast<const uint2*>(x));
  values[0] = to_float(T{static_cast<uint16_t>(words.x)});
  values[1] = to_float(T{static_cast<uint16_t>(words.x >> 16)});
  values[2] = to_float(T{static_cast<uint16_t>(words.y)});
  values[3] = to_float(T{static_cast<uint16_t>(words.y >> 16)});
}

// Sums of the output frames before, at and behind the input frame: [frame][output pixel][channel].
template <int kOut>
using Sums = float[3][4][kOut];

// Adds an input frame at `x`: two channels out from two channels in each.
template <class T>
__device__ void add_frame_of_pairs(const UpConv3dParams& p, const T* x, bool right, bool below,
                                   const float* weights, Sums<2>& sums) {
  float inputs[4][4] = {};
  read_four(x, inputs[0]);
  if (right) read_four(x + p.x_strides.column, inputs[1]);
  if (below) read_four(x + p.x_strides.row, inputs[2]);
  if (right && below) read_four(x + p.x_strides.row + p.x_strides.column, inputs[3]);
  // First one channel in of both, then the other: as the sums of other layouts run.
#pragma unroll
  for (int c = 0; c < 2; ++c)
#pragma unroll
    for (int kn = 0; kn < 3; ++kn)
#pragma unroll
      for (int tap = 0; tap < kPlaneTaps; ++tap) {
        const float2 w = *reinterpret_cast<const float2*>(
            weights + ((c * 3 + kn) * kPlaneTaps + tap) * p.channels_out);
        const float (&input)[4] = inputs[source_of(tap)];
        float (&sum)[2] = sums[kn][target_of(tap)];
        sum[0] = fmaf(w.x, input[c], sum[0]);
        sum[1] = fmaf(w.y, input[2 + c], sum[1]);
      }
}

// The same for one channel out and any number of channels in, in any layout.
template <class T>
__device__ void add_frame(const UpConv3dParams& p, const T* x, bool right, bool below,
                          const T* weights, int64_t ratio, Sums<1>& sums) {
  for (int64_t c = 0; c < ratio; ++c) {
    float inputs[4] = {};
    inputs[0] = read_float(x);
    if (right) inputs[1] = read_float(x + p.x_strides.column);
    if (below) inputs[2] = read_float(x + p.x_strides.row);
    if (right && below) inputs[3] = read_float(x + p.x_strides.row + p.x_strides.column);
#pragma unroll
    for (int kn = 0; kn < 3; ++kn)
#pragma unroll
      for (int tap = 0; tap < kPlaneTaps; ++tap) {
        float& sum = sums[kn][target_of(tap)][0];
        sum = fmaf(read_float(weights + kn * kPlaneTaps + tap), inputs[source_of(tap)], sum);
      }
    x += p.x_strides.channel;
    weights += kTaps;
  }
}

// Bias and residual, then the four output pixels of a complete frame to memory.
template <class T, int kOut>
__device__ void store_frame(const UpConv3dParams& p, const Plan& plan, int64_t y_offset,
                            int64_t residual_offset, const float (&bias)[kOut],
                            const float (&sums)[4][kOut]) {
  float values[4][kOut];
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int k = 0; k < kOut; ++k) {
      values[i][k] = sums[i][k] + bias[k];
      if (p.residual) {
        const T* residual = static_cast<const T*>(p.residual) + residual_offset +
                            i / 2 * p.residual_strides.row + i % 2 * p.residual_strides.column;
        values[i][k] += read_float(residual + k * p.residual_strides.channel);
      }
    }
  T* y = static_cast<T*>(p.y) + y_offset;
  if constexpr (kOut == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      *reinterpret_cast<Pair<T>*>(y + i / 2 * p.y_strides.row + i % 2 * p.y_strides.column) =
          pair_of<T>(values[i][0], values[i][1]);
  } else if (plan.pairs) {
    *reinterpret_cast<Pair<T>*>(y) = pair_of<T>(values[0][0], values[1][0]);
    *reinterpret_cast<Pair<T>*>(y + p.y_strides.row) = pair_of<T>(values[2][0], values[3][0]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      y[i / 2 * p.y_strides.row + i % 2 * p.y_strides.column] = from_float<T>(values[i][0]);
  }
}

// kOut: channels out of a thread; 2 asks for two channels in for each, aligned in fours.
template <class T, int kOut>
__global__ void __launch_bounds__(kThreads)
    up_conv3d_kernel(const __grid_constant__ UpConv3dParams p, const __grid_constant__ Plan plan) {
  const int64_t ratio = p.channels / p.channels_out;
  auto* shared = reinterpret_cast<float*>(dynamic_shared_memory());
  if constexpr (kOut == 2) {
    // weights[channel in of two][tap][channel out]
    for (int i = static_cast<int>(threadIdx.x); i < p.channels * kTaps; i += kThreads) {
      const int channel = i / kTaps, tap = i - channel * kTaps;
      shared[(channel % 2 * kTaps + tap) * p.channels_out + channel / 2] =
          read_float(static_cast<const T*>(p.weight) + i);
    }
    __syncthreads();
  }
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < plan.items;
       i += step) {
    int64_t rest = i, channel_block, column;
    if (plan.channels_nearest) {
      channel_block = rest % plan.channel_blocks;
      rest /= plan.channel_blocks;
      column = rest % p.width;
      rest /= p.width;
    } else {
      column = rest % p.width;
      rest /= p.width;
      channel_block = rest % plan.channel_blocks;
      rest /= plan.channel_blocks;
    }
    const int64_t row = rest % p.height;
    rest /= p.height;
    const int64_t first = rest % plan.segments * plan.frames_per_segment;
    const int64_t end = min(first + plan.frames_per_segment, p.frames);
    const int64_t image = rest / plan.segments;
    const bool right = column + 1 < p.width, below = row + 1 < p.height;
    const int64_t k = channel_block * kOut;

    const T* x = static_cast<const T*>(p.x) + image * p.x_strides.batch + row * p.x_strides.row +
                 column * p.x_strides.column + k * ratio * p.x_strides.channel;
    const auto offset = [&](const Strides5& strides) {
      return image * strides.batch + k * strides.channel + 2 * row * strides.row +
             2 * column * strides.column;
    };
    const int64_t y_offset = offset(p.y_strides), residual_offset = offset(p.residual_strides);
    float bias[kOut];
#pragma unroll
    for (int o = 0; o < kOut; ++o)
      bias[o] = p.bias ? read_float(static_cast<const T*>(p.bias) + k + o) : 0.0f;

    Sums<kOut> sums = {};
    for (int64_t n = first - 1; n <= end; ++n) {
      if (n >= 0 && n < p.frames) {
        const T* frame = x + n * p.x_strides.frame;
        if constexpr (kOut == 2) {
          add_frame_of_pairs(p, frame, right, below, shared + k, sums);
        } else {
          add_frame(p, frame, right, below, static_cast<const T*>(p.weight) + k * ratio * kTaps,
                    ratio, sums);
        }
      }
      if (n > first)
        store_frame<T, kOut>(p, plan, y_offset + (n - 1) * p.y_strides.frame,
                             residual_offset + (n - 1) * p.residual_strides.frame, bias, sums[0]);
#pragma unroll
      for (int o = 0; o < 4; ++o)
#pragma unroll
        for (int c = 0; c < kOut; ++c) {
          sums[0][o][c] = sums[1][o][c];
          sums[1][o][c] = sums[2][o][c];
          sums[2][o][c] = 0.0f;
        }
    }
  }
}

template <class T>
struct PairWord {
  using Type = uint32_t;
};
template <>
struct PairWord<float> {
  using Type = float2;
};

// Two neighbouring columns that are read once.
template <class T>
__device__ Pair<T> load_pair(const T* pointer) {
  return std::bit_cast<Pair<T>>(
      __ldcs(reinterpret_cast<const typename PairWord<T>::Type*>(pointer)));
}
template <class T>
__device__ void store_pair(T* pointer, float first, float second) {
  using Word = typename PairWord<T>::Type;
  __stcs(reinterpret_cast<Word*>(pointer), std::bit_cast<Word>(pair_of<T>(first, second)));
}

__device__ inline float load_value(const float* pointer) { return __ldg(pointer); }
template <class T>
__device__ T load_value(const T* pointer) {
  return {__ldg(&pointer->bits)};
}

// A frame as it comes: two channels of four input pixels; 2 x 2 pixels of the residual.
template <class T>
struct PlanarInputs {
  T values[2][4];
};
template <class T>
struct PlanarResidual {
  Pair<T> upper, lower;
};

// One channel out of two channels in, columns side by side. The sums are those of up_conv3d_kernel
// in the same order.
template <class T>
__global__ void __launch_bounds__(kThreads, GPLWS_UP_PLANAR_BLOCKS)
    up_conv3d_planar_kernel(const __grid_constant__ UpConv3dParams p,
                            const __grid_constant__ Plan plan) {
  // In 32 bits, whose divisions are short.
  unsigned rest = blockIdx.x;
  const auto next_part = [&rest](int64_t size) {
    const auto parts = static_cast<unsigned>(size);
    const unsigned index = rest % parts;
    rest /= parts;
    return static_cast<int>(index);
  };
  const int pixel = next_part(plan.pixel_blocks) * kThreads + static_cast<int>(threadIdx.x);
  const int64_t channel = next_part(p.channels_out);
  const int segment_frames = static_cast<int>(plan.frames_per_segment);
  const int first = next_part(plan.segments) * segment_frames;
  const int end = min(first + segment_frames, static_cast<int>(p.frames));
  const int64_t image = rest;
  // The frames of the input that these see.
  const int begin = max(first - 1, 0), last = min(end, static_cast<int>(p.frames) - 1);

  auto* weights = reinterpret_cast<float*>(dynamic_shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < 2 * kTaps)
    weights[thread / kTaps * kPlanarTaps + thread % kTaps] =
        read_float(static_cast<const T*>(p.weight) + 2 * channel * kTaps + thread);
  __syncthreads();
  if (pixel >= p.height * p.width) return;

  const int width = static_cast<int>(p.width);
  const int64_t row = pixel / width, column = pixel % width;
  const bool right = column + 1 < p.width, below = row + 1 < p.height;
  // Pointers walk along, each to the frame that is next to be read or written.
  const T* x = static_cast<const T*>(p.x) + image * p.x_strides.batch +
               2 * channel * p.x_strides.channel + begin * p.x_strides.frame +
               row * p.x_strides.row + column * p.x_strides.column;
  const auto offset = [&](const Strides5& strides) {
    return image * strides.batch + channel * strides.channel + first * strides.frame +
           2 * row * strides.row + 2 * column;
  };
  T* y = static_cast<T*>(p.y) + offset(p.y_strides);
  const T* residual =
      p.residual ? static_cast<const T*>(p.residual) + offset(p.residual_strides) : nullptr;
  const float bias = p.bias ? read_float(static_cast<const T*>(p.bias) + channel) : 0.0f;

  const auto load = [&](PlanarInputs<T>& inputs) {  // what lies outside stays zero
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const T* at = x + c * p.x_strides.channel;
      inputs.values[c][0] = load_value(at);
      if (right) inputs.values[c][1] = load_value(at + p.x_strides.column);
      if (below) inputs.values[c][2] = load_value(at + p.x_strides.row);
      if (right && below)
        inputs.values[c][3] = load_value(at + p.x_strides.row + p.x_strides.column);
    }
    x += p.x_strides.frame;
  };
  const auto load_residual = [&](int frame, PlanarResidual<T>& taken) {
    if (frame < first || frame >= end || residual == nullptr) return;
    taken = {load_pair(residual), load_pair(residual + p.residual_strides.row)};
    residual += p.residual_strides.frame;
  };
  PlanarInputs<T> inputs[2] = {};
  PlanarResidual<T> taken[2] = {};
  load(inputs[0]);
  load_residual(begin - 1, taken[0]);
  if (begin < last) load(inputs[1]);
  load_residual(begin, taken[1]);

  float sums[3][4] = {};
  const auto store = [&](const PlanarResidual<T>& r) {
    float added[4] = {to_float(r.upper.first), to_float(r.upper.second), to_float(r.lower.first),
                      to_float(r.lower.second)};
#pragma unroll
    for (int i = 0; i < 4; ++i) added[i] = sums[0][i] + bias + added[i];
    store_pair(y, added[0], added[1]);
    store_pair(y + p.y_strides.row, added[2], added[3]);
    y += p.y_strides.frame;
  };
  const auto step = [&](int n, PlanarInputs<T>& here, PlanarResidual<T>& added) {
  // The weights are read for each frame, one address for a whole warp: the registers that all 54
  // of them would take are worth more as inputs that are on their way.
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float values[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] = to_float(here.values[c][i]);
#pragma unroll
      for (int four = 0; four < kTaps; four += 4) {
        const float4 w = reload_four(weights + c * kPlanarTaps + four);
        const float ws[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int i = 0; i < 4 && four + i < kTaps; ++i) {
          const int kn = (four + i) / kPlaneTaps, tap = (four + i) % kPlaneTaps;
          float& sum = sums[kn][target_of(tap)];
          sum = fmaf(ws[i], values[source_of(tap)], sum);
        }
      }
    }
    if (n + 2 <= last) load(here);
    if (n > first) store(added);
    load_residual(n + 1, added);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[0][i] = sums[1][i];
      sums[1][i] = sums[2][i];
      sums[2][i] = 0.0f;
    }
  };
  // By twos: inputs that are on their way cannot move from one register to another.
  for (int n = begin; n <= last; n += 2) {
    step(n, inputs[0], taken[0]);
    if (n < last) step(n + 1, inputs[1], taken[1]);
  }
  if (last < end) {  // the last frame of all: none behind it adds to it
    if ((last - begin) % 2 != 0) {
      store(taken[0]);
    } else {
      store(taken[1]);
    }
  }
}

// Whether all of `strides` but that of the channels, and the pointer, allow pieces of so many
// elements.
template <class T>
bool aligned(const void* pointer, const Strides5& strides, int64_t elements) {
  return reinterpret_cast<uintptr_t>(pointer) % (sizeof(T) * static_cast<size_t>(elements)) == 0 &&
         strides.batch % elements == 0 && strides.frame % elements == 0 &&
         strides.row % elements == 0 && strides.column % elements == 0;
}

template <class T>
bool pairs_of_columns(const void* pointer, const Strides5& strides) {
  return strides.column == 1 && strides.channel % 2 == 0 && strides.batch % 2 == 0 &&
         strides.frame % 2 == 0 && strides.row % 2 == 0 &&
         reinterpret_cast<uintptr_t>(pointer) % (2 * sizeof(T)) == 0;
}

// Frames are cut into segments where there are not `enough` threads without.
void cut_frames(const UpConv3dParams& p, int64_t threads, int64_t enough, Plan* plan) {
  plan->segments = std::max((enough + threads - 1) / threads, int64_t{1});
  if (plan->segments > p.frames) plan->segments = p.frames;
  plan->frames_per_segment = (p.frames + plan->segments - 1) / plan->segments;
  plan->segments = (p.frames + plan->frames_per_segment - 1) / plan->frames_per_segment;
}

template <class T>
cudaError_t launch_planar(const UpConv3dParams& p, Plan plan, int processors, cudaStream_t stream) {
  plan.pixel_blocks = (p.height * p.width + kThreads - 1) / kThreads;
  cut_frames(p, p.batch * p.channels_out * p.height * p.width, kEnoughPlanarThreads * processors,
             &plan);
  const int64_t blocks = plan.pixel_blocks * p.channels_out * plan.segments * p.batch;
  if (blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  return launch(up_conv3d_planar_kernel<T>, dim3(static_cast<unsigned>(blocks)), kThreads,
                2 * kPlanarTaps * static_cast<int>(sizeof(float)), stream, p, plan);
}

template <class T, int kOut>
cudaError_t launch_blocks(const UpConv3dParams& p, Plan plan, int processors, int shared_bytes,
                          cudaStream_t stream) {
  plan.channel_blocks = p.channels_out / kOut;
  const int64_t pixels = p.batch * p.height * p.width * plan.channel_blocks;
  cut_frames(p, pixels, kEnoughThreads * processors, &plan);
  plan.items = pixels * plan.segments;
  const int64_t blocks = (plan.items + kThreads - 1) / kThreads;
  return launch(up_conv3d_kernel<T, kOut>,
                dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks)), kThreads,
                shared_bytes, stream, p, plan);
}

template <class T>
cudaError_t launch_type(const UpConv3dParams& p, cudaStream_t stream) {
  int processors = 0;
  const cudaError_t error = count_processors(&processors);
  if (error != cudaSuccess) return error;
  Plan plan{};
  plan.channels_nearest = p.y_strides.channel == 1;
  plan.pairs = pairs_of_columns<T>(p.y, p.y_strides);
  if (plan.pairs && p.channels == 2 * p.channels_out && p.height * p.width < kMaxPlanarPixels &&
      (!p.residual || pairs_of_columns<T>(p.residual, p.residual_strides)))
    return launch_planar<T>(p, plan, processors, stream);
  const int64_t shared_bytes = p.channels * kTaps * int64_t{sizeof(float)};
  const bool by_pairs = plan.channels_nearest && p.x_strides.channel == 1 &&
                        p.channels == 2 * p.channels_out && p.channels_out % 2 == 0 &&
                        shared_bytes <= kMaxSharedBytes && aligned<T>(p.x, p.x_strides, 4) &&
                        aligned<T>(p.y, p.y_strides, 2);
  return by_pairs ? launch_blocks<T, 2>(p, plan, processors, static_cast<int>(shared_bytes), stream)
                  : launch_blocks<T, 1>(p, plan, processors, 0, stream);
}

}  // namespace

cudaError_t launch_up_conv3d(const UpConv3dParams& p, cudaStream_t stream) {
  if (p.batch * p.channels_out * p.frames * p.height * p.width == 0) return cudaSuccess;
  if (p.type != FloatType::kFloat32 && up_conv3d_half_fits(p))
    return launch_up_conv3d_half(p, stream);
  switch (p.type) {
    case FloatType::kBfloat16:
      return launch_type<Bfloat16>(p, stream);
    case FloatType::kFloat16:
      return launch_type<Float16>(p, stream);
    default:
      return launch_type<float>(p, stream);
  }
}

}  // namespace gplws::cuda
