// One thread walks through the frames at one input pixel and makes the 2 x 2 output pixels there:
// with stride 2 an even row or column of the result sees one tap of the kernel, an odd one two. An
// input frame is read once and added to the output frames before, at and behind it. Where channels
// lie side by side a thread takes two channels out and the four channels in that they come from, so
// that a warp reads and writes whole lines; the weights, as floats, are in shared memory. Summed in
// one fixed order.
#include "cuda/up_conv3d.h"

#include "cuda/device.h"
#include "cuda/up_conv3d_half.h"

namespace gplws::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTaps = 27;
constexpr int kPlaneTaps = 9;
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
constexpr int kMaxSharedBytes = 48 * 1024;  // what every device grants without asking
// Frames are shared out among threads until there are so many: twice what a large GPU holds.
constexpr int64_t kEnoughThreads = int64_t{1} << 19;

struct Plan {
  int64_t channel_blocks;
  int64_t segments, frames_per_segment;
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
#pragma unroll
  for (int kn = 0; kn < 3; ++kn)
#pragma unroll
    for (int tap = 0; tap < kPlaneTaps; ++tap) {
      const float4 w =
          *reinterpret_cast<const float4*>(weights + (kn * kPlaneTaps + tap) * p.channels);
      const float (&input)[4] = inputs[source_of(tap)];
      float (&sum)[2] = sums[kn][target_of(tap)];
      sum[0] = fmaf(w.y, input[1], fmaf(w.x, input[0], sum[0]));
      sum[1] = fmaf(w.w, input[3], fmaf(w.z, input[2], sum[1]));
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
    // weights[tap][channel]
    for (int i = static_cast<int>(threadIdx.x); i < p.channels * kTaps; i += kThreads) {
      const int channel = i / kTaps, tap = i - channel * kTaps;
      shared[tap * p.channels + channel] = read_float(static_cast<const T*>(p.weight) + i);
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
          add_frame_of_pairs(p, frame, right, below, shared + k * 2, sums);
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

// Whether all of `strides` but that of the channels, and the pointer, allow pieces of so many
// elements.
template <class T>
bool aligned(const void* pointer, const Strides5& strides, int64_t elements) {
  return reinterpret_cast<uintptr_t>(pointer) % (sizeof(T) * static_cast<size_t>(elements)) == 0 &&
         strides.batch % elements == 0 && strides.frame % elements == 0 &&
         strides.row % elements == 0 && strides.column % elements == 0;
}

template <class T, int kOut>
cudaError_t launch_blocks(const UpConv3dParams& p, Plan plan, int shared_bytes,
                          cudaStream_t stream) {
  plan.channel_blocks = p.channels_out / kOut;
  const int64_t pixels = p.batch * p.height * p.width * plan.channel_blocks;
  plan.segments = (kEnoughThreads + pixels - 1) / pixels;
  if (plan.segments > p.frames) plan.segments = p.frames;
  plan.frames_per_segment = (p.frames + plan.segments - 1) / plan.segments;
  plan.segments = (p.frames + plan.frames_per_segment - 1) / plan.frames_per_segment;
  plan.items = pixels * plan.segments;
  const int64_t blocks = (plan.items + kThreads - 1) / kThreads;
  return launch(up_conv3d_kernel<T, kOut>,
                dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks)), kThreads,
                shared_bytes, stream, p, plan);
}

template <class T>
cudaError_t launch_type(const UpConv3dParams& p, cudaStream_t stream) {
  Plan plan{};
  plan.channels_nearest = p.y_strides.channel == 1;
  plan.pairs = p.y_strides.column == 1 && p.y_strides.channel % 2 == 0 &&
               p.y_strides.batch % 2 == 0 && p.y_strides.frame % 2 == 0 &&
               p.y_strides.row % 2 == 0 && reinterpret_cast<uintptr_t>(p.y) % (2 * sizeof(T)) == 0;
  const int64_t shared_bytes = p.channels * kTaps * int64_t{sizeof(float)};
  const bool by_pairs = plan.channels_nearest && p.x_strides.channel == 1 &&
                        p.channels == 2 * p.channels_out && p.channels_out % 2 == 0 &&
                        shared_bytes <= kMaxSharedBytes && aligned<T>(p.x, p.x_strides, 4) &&
                        aligned<T>(p.y, p.y_strides, 2);
  return by_pairs ? launch_blocks<T, 2>(p, plan, static_cast<int>(shared_bytes), stream)
                  : launch_blocks<T, 1>(p, plan, 0, stream);
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
