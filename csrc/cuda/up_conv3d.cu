// One thread per input pixel and output channel makes the 2 x 2 output pixels there: with stride 2
// an even row or column of the result sees one tap of the kernel, an odd one two. Neighbouring
// threads read neighbouring pixels and write neighbouring pairs, so memory sees whole lines; the
// rows below and the frames around come from the cache. Summed in one fixed order.
#include "cuda/up_conv3d.h"

namespace gplws::cuda {
namespace {

constexpr int kThreads = 256;  // at some 40 registers, the maximum of threads per multiprocessor
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

__global__ void __launch_bounds__(kThreads)
    up_conv3d_kernel(const __grid_constant__ UpConv3dParams p) {
  const int64_t plane = p.height * p.width;
  const int64_t total = p.batch * p.channels_out * p.frames * plane;
  const int64_t ratio = p.channels / p.channels_out;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += step) {
    const int64_t column = i % p.width;
    const int64_t row = i / p.width % p.height;
    const int64_t frame = i / plane % p.frames;
    const int64_t map = i / plane / p.frames;  // image and output channel
    const int64_t k = map % p.channels_out;
    const bool right = column + 1 < p.width, below = row + 1 < p.height;

    const float bias = p.bias ? __ldg(p.bias + k) : 0.0f;
    float even_even = bias, even_odd = bias, odd_even = bias, odd_odd = bias;
    for (int64_t c = 0; c < ratio; ++c) {
      const float* weight = p.weight + (k * ratio + c) * 27;
      for (int kn = 0; kn < 3; ++kn) {
        const int64_t n = frame + 1 - kn;
        if (n < 0 || n >= p.frames) continue;
        // Channels of an image are as many as `ratio` per output channel: map * ratio + c counts
        // through the images as well.
        const float* x = p.x + ((map * ratio + c) * p.frames + n) * plane + row * p.width + column;
        const float* w = weight + kn * 9;
        const float here = __ldg(x);
        even_even = fmaf(__ldg(w + 4), here, even_even);
        even_odd = fmaf(__ldg(w + 5), here, even_odd);
        odd_even = fmaf(__ldg(w + 7), here, odd_even);
        odd_odd = fmaf(__ldg(w + 8), here, odd_odd);
        if (right) {
          const float value = __ldg(x + 1);
          even_odd = fmaf(__ldg(w + 3), value, even_odd);
          odd_odd = fmaf(__ldg(w + 6), value, odd_odd);
        }
        if (below) {
          const float value = __ldg(x + p.width);
          odd_even = fmaf(__ldg(w + 1), value, odd_even);
          odd_odd = fmaf(__ldg(w + 2), value, odd_odd);
          if (right) odd_odd = fmaf(__ldg(w), __ldg(x + p.width + 1), odd_odd);
        }
      }
    }

    // Rows of the result have an even number of columns, so pairs are aligned.
    const int64_t at = (map * p.frames + frame) * 4 * plane + 4 * row * p.width + 2 * column;
    float2 even = make_float2(even_even, even_odd), odd = make_float2(odd_even, odd_odd);
    if (p.residual) {
      const float2 even_residual = __ldg(reinterpret_cast<const float2*>(p.residual + at));
      const float2 odd_residual =
          __ldg(reinterpret_cast<const float2*>(p.residual + at + 2 * p.width));
      even.x += even_residual.x;
      even.y += even_residual.y;
      odd.x += odd_residual.x;
      odd.y += odd_residual.y;
    }
    *reinterpret_cast<float2*>(p.y + at) = even;
    *reinterpret_cast<float2*>(p.y + at + 2 * p.width) = odd;
  }
}

}  // namespace

cudaError_t launch_up_conv3d(const UpConv3dParams& p, cudaStream_t stream) {
  const int64_t total = p.batch * p.channels_out * p.frames * p.height * p.width;
  if (total == 0) return cudaSuccess;
  const int64_t blocks = (total + kThreads - 1) / kThreads;
  up_conv3d_kernel<<<static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), kThreads, 0,
                     stream>>>(p);
  return cudaGetLastError();
}

}  // namespace gplws::cuda
