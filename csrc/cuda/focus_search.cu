// A thread walks down the frames at one, two or four neighbouring pixels, as many as alignment
// allows and as leave the device enough threads. Two blocks of frames are in registers: while one
// is looked at, the other is on its way. The responses beside the winner are carried along, so that
// a radius of 1 reads nothing again; a larger one does, once the winner is known.
#include "cuda/focus_search.h"

#include <bit>
#include <cmath>

#include "cuda/device.h"

// To be set for experiments.
#ifndef GPLWS_SEARCH_PIXELS
#define GPLWS_SEARCH_PIXELS 4  // of a thread, at most: 1, 2 or 4
#endif
#ifndef GPLWS_SEARCH_FRAMES
#define GPLWS_SEARCH_FRAMES 5  // of a block
#endif
#ifndef GPLWS_SEARCH_THREADS
#define GPLWS_SEARCH_THREADS 128
#endif
#ifndef GPLWS_SEARCH_BLOCKS
#define GPLWS_SEARCH_BLOCKS 5  // of a multiprocessor at least, with four pixels a thread
#endif
#ifndef GPLWS_SEARCH_ENOUGH
#define GPLWS_SEARCH_ENOUGH 256  // threads of a multiprocessor that several pixels each must leave
#endif
#ifndef GPLWS_SEARCH_STREAMING
#define GPLWS_SEARCH_STREAMING 1  // loads that do not stay in the caches
#endif

namespace gplws::cuda {
namespace {

constexpr int kThreads = GPLWS_SEARCH_THREADS;
// A multiprocessor's share of 512 x 512 pixels keeps 40 to 80 KB in flight with two blocks of five,
// whatever number of pixels a thread takes; ten frames, the usual stack, are two whole blocks.
constexpr int kFrames = GPLWS_SEARCH_FRAMES;
// Blocks that a multiprocessor must be able to hold: bounds the registers.
constexpr int min_blocks(int pixels) {
  return pixels == 4 ? GPLWS_SEARCH_BLOCKS : (pixels == 2 ? 6 : 8) * 128 / kThreads;
}
constexpr int kMaxLines = 65535;        // limit of gridDim.y
constexpr int64_t kTableFrames = 2048;  // up to so many positions are held in shared memory
constexpr float kLogFloor = 1e-6f;      // smallest share of the peak that enters a logarithm
constexpr float kFlatness = 1e-5f;      // share of its terms below which a curvature is rounding
constexpr float kGapRatio = 16.0f;      // of neighbouring gaps, beyond which that may happen
constexpr float kSafe = 1e30f;          // beyond it, or its inverse, products may not be normal

// What is loaded or stored at once: n neighbouring values.
template <int kBytes>
struct WordsOf {
  using Type = uint4;
};
template <>
struct WordsOf<8> {
  using Type = uint2;
};
template <>
struct WordsOf<4> {
  using Type = uint32_t;
};
template <>
struct WordsOf<2> {
  using Type = uint16_t;
};
template <class T, int n>
struct Pack {
  T values[n];
};

template <class T, int n>
__device__ Pack<T, n> load_pack(const T* pointer) {
  using Words = typename WordsOf<sizeof(Pack<T, n>)>::Type;
  const auto* words = reinterpret_cast<const Words*>(pointer);
#if GPLWS_SEARCH_STREAMING
  return std::bit_cast<Pack<T, n>>(__ldcs(words));
#else
  return std::bit_cast<Pack<T, n>>(*words);
#endif
}

template <class T, int n>
__device__ void store_pack(T* pointer, const T (&values)[n]) {
  constexpr int kPiece = n * sizeof(T) <= 16 ? n : static_cast<int>(16 / sizeof(T));
  using Words = typename WordsOf<sizeof(Pack<T, kPiece>)>::Type;
#pragma unroll
  for (int i = 0; i < n; i += kPiece) {
    Pack<T, kPiece> piece;
#pragma unroll
    for (int j = 0; j < kPiece; ++j) piece.values[j] = values[i + j];
    __stcs(reinterpret_cast<Words*>(pointer + i), std::bit_cast<Words>(piece));
  }
}

struct Winner {
  int frame;
  float peak, runner_up;
  float before, after;  // the responses beside the peak, -inf or NaN where there is none
};

// The responses of one pixel.
template <class T>
struct Responses {
  const T* first;
  int64_t stride;
  int frames;

  __device__ float at(int frame) const { return load_float(first + frame * stride); }
};

// What is known of a pixel after some of its frames. NaN loses all comparisons, and no maximum
// takes it, so that it counts as -inf without being replaced.
template <bool kNear>
struct Search {
  float before = -INFINITY, here = -INFINITY;  // the last two frames
  float best = -INFINITY, best_before = -INFINITY, best_after = -INFINITY;
  int best_frame = 0;
  float group_peak = -INFINITY;                      // highest peak of the group so far
  float highest = -INFINITY, runner_up = -INFINITY;  // of the peaks of the groups before

  // Judges the frame `here`, for which the one behind it must be known, and moves on. The highest
  // response is a peak by itself; of the peaks that are not, only the height is asked for.
  __device__ void step(float ahead, int frame) {
    if (!(before > here || ahead > here)) group_peak = fmaxf(group_peak, here);
    if (here > best) {
      best = here;
      best_frame = frame;
      if constexpr (kNear) {
        best_before = before;
        best_after = ahead;
      }
    }
    before = here;
    here = ahead;
  }

  __device__ void end_group() {
    runner_up = fmaxf(runner_up, fminf(group_peak, highest));
    highest = fmaxf(highest, group_peak);
    group_peak = -INFINITY;
  }
};

// The frames from `first` on; -inf behind the last.
template <class T, int kPixels>
__device__ void load_block(const T* volume, int64_t stride, int first, int frames,
                           Pack<T, kPixels> (&block)[kFrames]) {
  if (first >= frames) return;  // nobody looks at it
  const T* frame = volume + first * stride;
  if (first + kFrames <= frames) {
#pragma unroll
    for (int i = 0; i < kFrames; ++i) block[i] = load_pack<T, kPixels>(frame + i * stride);
    return;
  }
#pragma unroll
  for (int i = 0; i < kFrames; ++i)
#pragma unroll
    for (int j = 0; j < kPixels; ++j) block[i].values[j] = from_float<T>(-INFINITY);
#pragma unroll
  for (int i = 0; i < kFrames; ++i)
    if (first + i < frames) block[i] = load_pack<T, kPixels>(frame + i * stride);
}

template <class T, int kPixels, bool kNear>
__device__ void find_winners(const FocusSearchParams& p, const T* volume,
                             Winner (&winners)[kPixels]) {
  const int frames = static_cast<int>(p.frames), group_size = static_cast<int>(p.group_size);
  Search<kNear> searches[kPixels];
  Pack<T, kPixels> blocks[2][kFrames];
  load_block(volume, p.frame_stride, 0, frames, blocks[0]);
  load_block(volume, p.frame_stride, kFrames, frames, blocks[1]);
  int frame = -1, group_end = group_size - 1;  // the frame that is judged next: none yet
  for (int first = 0; first < frames; first += 2 * kFrames) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (first + half * kFrames >= frames) break;
#pragma unroll
      for (int i = 0; i < kFrames; ++i) {
#pragma unroll
        for (int j = 0; j < kPixels; ++j)
          searches[j].step(to_float(blocks[half][i].values[j]), frame);
        if (frame == group_end) {
#pragma unroll
          for (int j = 0; j < kPixels; ++j) searches[j].end_group();
          group_end += group_size;
        }
        ++frame;
      }
      load_block(volume, p.frame_stride, first + (2 + half) * kFrames, frames, blocks[half]);
    }
  }
#pragma unroll
  for (int j = 0; j < kPixels; ++j) {
    Search<kNear>& s = searches[j];
    s.step(-INFINITY, frame);
    s.end_group();
    winners[j] = {s.best_frame, s.best, s.runner_up, s.best_before, s.best_after};
  }
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

// Focus positions of an image: in shared memory, where the frames are few enough.
struct Positions {
  const float* table;  // null: none
  const float* global;

  __device__ float operator()(int frame) const { return table ? table[frame] : global[frame]; }
};

// Vertex of the least-squares parabola through the window around the winner, as a focus position.
template <class T>
__device__ float fitted_depth(const Responses<T>& v, const Positions& position, int frame,
                              float peak, int radius, bool gaussian) {
  const float z0 = position(frame);
  const int first = max(frame - radius, 0);
  const int last = min(frame + radius, v.frames - 1);
  const float range = fabsf(position(last) - position(first));
  const float scale = range > 0.0f ? range / static_cast<float>(last - first) : 1.0f;
  const bool logarithms = gaussian && peak > 0.0f;

  // Sums of t^k and of y t^k over the window, y and t measured from the winner.
  float count = 0.0f, t1 = 0.0f, t2 = 0.0f, t3 = 0.0f, t4 = 0.0f;
  float y0 = 0.0f, y1 = 0.0f, y2 = 0.0f;
  for (int n = first; n <= last; ++n) {
    const float value = v.at(n);
    if (!isfinite(value)) continue;
    const float y = logarithms ? logf(fmaxf(value, kLogFloor * peak) / peak) : value - peak;
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

  const float before = position(max(frame - 1, 0));
  const float after = position(min(frame + 1, v.frames - 1));
  return fminf(fmaxf(depth, fminf(before, after)), fmaxf(before, after));
}

// The same for a radius of 1, where the parabola goes through all three points: the vertex divides
// the two gaps as the weighted drops beside the winner do. Every rounding is spelt out: the result
// does not depend on what a compiler fuses. NaN, which no depth is, where the general fit must do
// it.
__device__ inline float near_depth(const Positions& position, const Winner& winner, bool gaussian) {
  const float z0 = position(winner.frame);
  if (!isfinite(winner.peak) || !isfinite(winner.before) || !isfinite(winner.after)) return z0;
  const bool logarithms = gaussian && winner.peak > 0.0f;
  const auto drop = [&](float value) {
    return logarithms ? -logf(fmaxf(value, kLogFloor * winner.peak) / winner.peak)
                      : winner.peak - value;
  };
  const float drop_before = drop(winner.before), drop_after = drop(winner.after);
  if (drop_before == 0.0f && drop_after == 0.0f) return z0;
  const float gap_before = z0 - position(winner.frame - 1);
  const float gap_after = position(winner.frame + 1) - z0;
  const float left = drop_before * gap_after;
  const float sum = fmaf(drop_after, gap_before, left);
  const bool safe = fabsf(sum) < kSafe && fabsf(sum) > 1.0f / kSafe &&
                    fabsf(gap_before) <= kGapRatio * fabsf(gap_after) &&
                    fabsf(gap_after) <= kGapRatio * fabsf(gap_before);
  return safe ? fmaf(0.5f, fmaf(gap_before + gap_after, left / sum, -gap_before), z0) : NAN;
}

template <class T, int kPixels, bool kNear>
__global__ void __launch_bounds__(kThreads, min_blocks(kPixels))
    focus_search_kernel(const __grid_constant__ FocusSearchParams p) {
  auto* table = reinterpret_cast<float*>(dynamic_shared_memory());
  const bool tabled = p.frames <= kTableFrames;
  int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kPixels;
  const bool inside = column < p.width;
  if (!inside) column = 0;  // goes along, as all threads meet at the barriers
  let_next_kernel_start();
  wait_for_kernel_before();
  for (int64_t line = blockIdx.y; line < p.batch * p.height; line += gridDim.y) {
    const int64_t image = p.height == 1 ? line : line / p.height;
    const int64_t row = line - image * p.height;
    const float* positions = p.positions + image * p.position_stride;
    // On its way before the volume, waited for behind it.
    const int my_frame = static_cast<int>(threadIdx.x);
    const float my_position = my_frame < p.frames ? positions[my_frame] : 0.0f;
    const T* volume = static_cast<const T*>(p.volume) + image * p.batch_stride +
                      row * p.row_stride + column * p.column_stride;
    Winner winners[kPixels];
    find_winners<T, kPixels, kNear>(p, volume, winners);
    if (tabled) {
      if (line != blockIdx.y) __syncthreads();  // the last line is done with its positions
      if (my_frame < p.frames) table[my_frame] = my_position;
      for (int i = my_frame + kThreads; i < p.frames; i += kThreads) table[i] = positions[i];
      __syncthreads();
    }
    if (!inside) continue;

    const bool gaussian = p.refinement == FocusRefinement::kGaussian;
    const Positions position{tabled ? table : nullptr, positions};
    float depth[kPixels], peak[kPixels], confidence[kPixels];
    int64_t index[kPixels];
    unsigned to_fit = 0;  // one bit for each pixel
#pragma unroll
    for (int j = 0; j < kPixels; ++j) {
      const Winner& winner = winners[j];
      index[j] = winner.frame;
      peak[j] = winner.peak;
      confidence[j] = confidence_of(winner, p.log_scale);
      if constexpr (kNear) {
        depth[j] = near_depth(position, winner, gaussian);
        if (isnan(depth[j])) to_fit |= 1u << j;
      } else {
        depth[j] = position(winner.frame);
        if (p.refinement != FocusRefinement::kNone && isfinite(winner.peak)) to_fit |= 1u << j;
      }
      if (!(winner.peak > -INFINITY)) depth[j] = NAN;
    }
    const int64_t at = line * p.width + column;
    store_pack(p.index + at, index);
    store_pack(p.peak + at, peak);
    store_pack(p.confidence + at, confidence);
    store_pack(p.depth + at, depth);

    // Behind all that, as its registers would cost every thread: with a radius of 1 few come here.
#pragma unroll 1
    for (int j = 0; to_fit != 0; ++j, to_fit >>= 1) {
      if ((to_fit & 1) == 0) continue;
      const Responses<T> v{volume + j * p.column_stride, p.frame_stride,
                           static_cast<int>(p.frames)};
      p.depth[at + j] = fitted_depth(v, position, static_cast<int>(p.index[at + j]), p.peak[at + j],
                                     static_cast<int>(p.radius), gaussian);
    }
  }
}

// Whether so many neighbouring pixels can be read and written at once.
bool aligned(const FocusSearchParams& p, int64_t element_bytes, int64_t pixels) {
  const auto fits = [](const void* pointer, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
  };
  const int64_t bytes = 4 * pixels;
  return p.column_stride == 1 && p.width % pixels == 0 && p.frame_stride % pixels == 0 &&
         (p.height == 1 || p.row_stride % pixels == 0) &&
         (p.batch == 1 || p.batch_stride % pixels == 0) && fits(p.volume, element_bytes * pixels) &&
         fits(p.depth, bytes) && fits(p.peak, bytes) && fits(p.confidence, bytes) &&
         fits(p.index, 16);
}

template <class T, int kPixels>
cudaError_t launch_pixels(const FocusSearchParams& p, cudaStream_t stream) {
  constexpr int64_t kColumns = int64_t{kThreads} * kPixels;
  const int64_t blocks = (p.width + kColumns - 1) / kColumns;
  const int64_t lines = p.batch * p.height;
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>(lines < kMaxLines ? lines : kMaxLines));
  const int shared_bytes =
      p.frames <= kTableFrames ? static_cast<int>(p.frames * int64_t{sizeof(float)}) : 0;
  const bool near = p.refinement != FocusRefinement::kNone && p.radius == 1;
  const auto kernel =
      near ? focus_search_kernel<T, kPixels, true> : focus_search_kernel<T, kPixels, false>;
  return launch(kernel, grid, kThreads, shared_bytes, stream, can_start_early(kernel), p);
}

template <class T>
cudaError_t launch_type(const FocusSearchParams& p, cudaStream_t stream) {
  int processors = 0;
  const cudaError_t error = count_processors(&processors);
  if (error != cudaSuccess) return error;
  const int64_t threads = int64_t{GPLWS_SEARCH_ENOUGH} * processors;
  const auto use = [&](int64_t pixels) {
    return GPLWS_SEARCH_PIXELS >= pixels && p.batch * p.height * p.width >= pixels * threads &&
           aligned(p, sizeof(T), pixels);
  };
  if (use(4)) return launch_pixels<T, 4>(p, stream);
  if (use(2)) return launch_pixels<T, 2>(p, stream);
  return launch_pixels<T, 1>(p, stream);
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
  switch (p.volume_type) {
    case FloatType::kBfloat16:
      return launch_type<Bfloat16>(p, stream);
    case FloatType::kFloat16:
      return launch_type<Float16>(p, stream);
    default:
      return launch_type<float>(p, stream);
  }
}

}  // namespace gplws::cuda
