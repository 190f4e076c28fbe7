// One thread per pixel walks down the frames, a warp reading neighbouring pixels; nothing but the
// three frames around the current one is kept. The few frames that enter the fit are read again,
// mostly from the L1 cache, once the winner is known.
#include "cuda/focus_search.h"

#include <cmath>

#include "cuda/device.h"

namespace gplws::cuda {
namespace {

// 256 threads at 32 to 40 registers let a multiprocessor hold its maximum of threads.
constexpr int kThreads = 256;
// Frames loaded before the first of them is used: 8 x 4 bytes in flight per thread.
constexpr int kAhead = 8;
constexpr int kMaxLines = 65535;    // limit of gridDim.y
constexpr float kLogFloor = 1e-6f;  // smallest share of the peak that enters a logarithm
constexpr float kFlatness = 1e-5f;  // share of its terms below which a curvature is rounding

struct Winner {
  int frame;
  float peak, runner_up;
};

// The responses of one pixel.
template <class T>
struct Responses {
  const T* first;
  int64_t stride;
  int frames;

  // NaN, and what lies before or behind the stack, counts as -inf.
  __device__ float at(int frame) const {
    if (frame < 0 || frame >= frames) return -INFINITY;
    const float value = read_float(first + frame * stride);
    return isnan(value) ? -INFINITY : value;
  }
};

template <class T>
__device__ Winner find_winner(const Responses<T>& v, int group_size) {
  Winner winner{0, -INFINITY, -INFINITY};
  float group_peak = -INFINITY;
  int group_frame = 0, group_end = group_size - 1;
  float before = -INFINITY, here = v.at(0);
  for (int first = 0; first < v.frames; first += kAhead) {
    float ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) ahead[i] = v.at(first + 1 + i);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int frame = first + i;
      if (frame >= v.frames) break;
      if (here >= before && here >= ahead[i] && here > group_peak) {
        group_peak = here;
        group_frame = frame;
      }
      if (frame == group_end || frame == v.frames - 1) {
        if (group_peak > winner.peak) {
          winner = {group_frame, group_peak, winner.peak};
        } else {
          winner.runner_up = fmaxf(winner.runner_up, group_peak);
        }
        group_peak = -INFINITY;
        group_end += group_size;
      }
      before = here;
      here = ahead[i];
    }
  }
  return winner;
}

__device__ float confidence_of(const Winner& winner, bool log_scale) {
  if (!isfinite(winner.peak)) return 0.0f;
  float confidence;
  if (log_scale) {
    confidence = 1.0f - expf(winner.runner_up - winner.peak);
  } else {
    if (!(winner.peak > 0.0f)) return 0.0f;
    confidence = 1.0f - fmaxf(winner.runner_up, 0.0f) / winner.peak;
  }
  return fminf(fmaxf(confidence, 0.0f), 1.0f);
}

// Vertex of the least-squares parabola through the window around the winner, as a focus position.
template <class T>
__device__ float refined_depth(const FocusSearchParams& p, const Responses<T>& v,
                               const float* positions, const Winner& winner) {
  const auto position = [&](int frame) { return __ldg(positions + frame); };
  const float z0 = position(winner.frame);
  if (p.refinement == FocusRefinement::kNone || !isfinite(winner.peak)) return z0;
  const int radius = static_cast<int>(p.radius);
  const int first = max(winner.frame - radius, 0);
  const int last = min(winner.frame + radius, v.frames - 1);
  const float range = fabsf(position(last) - position(first));
  const float scale = range > 0.0f ? range / static_cast<float>(last - first) : 1.0f;
  const bool logarithms = p.refinement == FocusRefinement::kGaussian && winner.peak > 0.0f;

  // Sums of t^k and of y t^k over the window, y and t measured from the winner.
  float count = 0.0f, t1 = 0.0f, t2 = 0.0f, t3 = 0.0f, t4 = 0.0f;
  float y0 = 0.0f, y1 = 0.0f, y2 = 0.0f;
  for (int n = first; n <= last; ++n) {
    const float value = v.at(n);
    if (!isfinite(value)) continue;
    const float y = logarithms ? logf(fmaxf(value, kLogFloor * winner.peak) / winner.peak)
                               : value - winner.peak;
    const float t = (position(n) - z0) / scale;
    const float squared = t * t;
    count += 1.0f;
    t1 += t;
    t2 += squared;
    t3 += squared * t;
    t4 += squared * squared;
    y0 += y;
    y1 += t * y;
    y2 += squared * y;
  }
  if (count < 3.0f) return z0;

  // Cramer's rule; the common determinant cancels in b / a and is positive.
  const float a0 = y0 * (t1 * t3 - t2 * t2);
  const float a1 = y1 * (count * t3 - t1 * t2);
  const float a2 = y2 * (count * t2 - t1 * t1);
  const float a = a0 - a1 + a2;
  if (!(a < -kFlatness * (fabsf(a0) + fabsf(a1) + fabsf(a2)))) return z0;
  const float b =
      y1 * (count * t4 - t2 * t2) - y0 * (t1 * t4 - t2 * t3) - y2 * (count * t3 - t1 * t2);
  const float depth = z0 - scale * b / (2.0f * a);

  const float before = position(max(winner.frame - 1, 0));
  const float after = position(min(winner.frame + 1, v.frames - 1));
  return fminf(fmaxf(depth, fminf(before, after)), fmaxf(before, after));
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    focus_search_kernel(const __grid_constant__ FocusSearchParams p) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= p.width) return;
  for (int64_t line = blockIdx.y; line < p.batch * p.height; line += gridDim.y) {
    const int64_t image = line / p.height;
    const int64_t row = line - image * p.height;
    const Responses<T> v{static_cast<const T*>(p.volume) + image * p.batch_stride +
                             row * p.row_stride + column * p.column_stride,
                         p.frame_stride, static_cast<int>(p.frames)};
    const float* positions = p.positions + image * p.position_stride;
    const Winner winner = find_winner(v, static_cast<int>(p.group_size));
    const int64_t at = line * p.width + column;
    p.index[at] = winner.frame;
    p.peak[at] = winner.peak;
    p.confidence[at] = confidence_of(winner, p.log_scale);
    p.depth[at] = winner.peak > -INFINITY ? refined_depth(p, v, positions, winner) : NAN;
  }
}

}  // namespace

cudaError_t launch_focus_search(const FocusSearchParams& params, cudaStream_t stream) {
  if (params.batch == 0 || params.height == 0 || params.width == 0) return cudaSuccess;
  FocusSearchParams p = params;
  if (p.row_stride == p.width * p.column_stride) {
    // Rows that follow one another are one long row: no thread idles at the end of a short one.
    p.width *= p.height;
    p.height = 1;
  }
  const int64_t blocks = (p.width + kThreads - 1) / kThreads;
  const int64_t lines = p.batch * p.height;
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>(lines < kMaxLines ? lines : kMaxLines));
  switch (p.volume_type) {
    case FloatType::kBfloat16:
      return launch(focus_search_kernel<Bfloat16>, grid, kThreads, 0, stream, p);
    case FloatType::kFloat16:
      return launch(focus_search_kernel<Float16>, grid, kThreads, 0, stream, p);
    default:
      return launch(focus_search_kernel<float>, grid, kThreads, 0, stream, p);
  }
}

}  // namespace gplws::cuda
