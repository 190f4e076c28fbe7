// Body of the focus search, compiled once per ISA (GPLWS_ISA).
//
// One vector holds neighbouring pixels and walks down the frames. A stack of many frames would be
// as many streams from memory, all of them a multiple of a page apart; so a run of pixels walks
// down a few frames at a time, keeps its state in cache and prefetches the frames that come next.
#include "focus_search.h"

#include <math.h>
#include <stdint.h>

namespace gplws::cpu::GPLWS_ISA {

#include "vec.h"

namespace {

constexpr float kLogFloor = 1e-6f;  // smallest share of the peak that enters a logarithm
constexpr float kFlatness = 1e-5f;  // share of its terms below which a curvature is rounding

#if defined(__AVX512F__)
constexpr int kStrips = 2;  // vectors side by side, as many as the registers hold the state of
#else
constexpr int kStrips = 1;
#endif
constexpr int kBlockFrames = 16;      // streams that a run reads at once
constexpr int kRunPixels = 1024;      // long pieces for the memory, whose frames still fit into L2
constexpr int kShortRunPixels = 512;  // where a block holds all frames, which come and go faster

// How the depth comes from the winner.
enum class Fit { kNone, kThreeFrames, kWindow };

// One vector of pixels between two frames: frame `here` is judged once `after` is known.
struct Walk {
  Vec before, here;
  Vec group_peak;  // highest peak of the group that is being walked
  Vec settled;     // highest peak of the groups before
  Vec runner_up;
  Vec peak;  // the winner so far, its frame and the responses beside it
  IntVec frame;
  Vec left, right;
};

// A frame is a peak where it is no lower than both neighbours. A comparison with NaN neither makes
// a peak of the NaN nor keeps its neighbour from being one; the lowest frame wins ties. The winner
// is the highest response, which is a peak.
template <bool kNeighbours>
GPLWS_INLINE void judge(Walk& w, Vec after, IntVec number) {
  const Mask top = not_less(not_less(w.here, w.before), w.here, after);
  const Mask best = greater(w.here, w.peak);
  w.group_peak = maximum_where(top, w.here, w.group_peak);
  w.peak = maximum(w.here, w.peak);
  w.frame = select(best, number, w.frame);
  if (kNeighbours) {
    w.left = select(best, w.before, w.left);
    w.right = select(best, after, w.right);
  }
  w.before = w.here;
  w.here = after;
}

struct Block {
  int64_t first, last;  // frames [first, last)
  int64_t group_end;    // of the group that holds `first`
};

// Walks down a block of frames, from frame `first` on; `load_frame(n, i)` is vector i of frame n,
// `fetch_ahead(n, i)` asks for what the walk needs a block later.
template <bool kNeighbours, int kCount, typename LoadFrame, typename FetchAhead>
GPLWS_INLINE void walk(Walk* state, const Block& block, int64_t frames, int64_t group_size,
                       LoadFrame load_frame, FetchAhead fetch_ahead) {
  const Vec lowest = broadcast(-INFINITY);
  Walk w[kCount];
  for (int i = 0; i < kCount; ++i) {
    if (block.first > 0) {
      w[i] = state[i];
    } else {
      w[i].before = w[i].group_peak = w[i].settled = w[i].runner_up = w[i].peak = lowest;
      w[i].left = w[i].right = lowest;
      w[i].frame = IntVec{};
      w[i].here = load_frame(0, i);
    }
  }
  int64_t group_end = block.group_end;
  for (int64_t n = block.first; n < block.last; ++n) {
    const bool last = n + 1 == frames;
    const IntVec number = IntVec{} + static_cast<int32_t>(n);
    for (int i = 0; i < kCount; ++i) {
      fetch_ahead(n, i);
      judge<kNeighbours>(w[i], last ? lowest : load_frame(n + 1, i), number);
    }
    if (n + 1 == group_end || last) {
      for (int i = 0; i < kCount; ++i) {
        w[i].runner_up = maximum(w[i].runner_up, minimum(w[i].group_peak, w[i].settled));
        w[i].settled = maximum(w[i].settled, w[i].group_peak);
        w[i].group_peak = lowest;
      }
      group_end += group_size;
    }
  }
  for (int i = 0; i < kCount; ++i) state[i] = w[i];
}

GPLWS_INLINE Vec clamp01(Vec v) { return minimum(maximum(v, broadcast(0.0f)), broadcast(1.0f)); }

GPLWS_INLINE Vec confidence(const Walk& w, bool log_scale) {
  const Vec zero = broadcast(0.0f), one = broadcast(1.0f);
  const IntVec finite = (w.peak < broadcast(INFINITY)) & (w.peak > broadcast(-INFINITY));
  if (log_scale) {
    const Vec c = one - exp_negative(finite ? w.runner_up - w.peak : zero);
    return finite ? c : zero;
  }
  const IntVec rated = finite & (w.peak > zero);
  const Vec c = one - maximum(w.runner_up, zero) / (rated ? w.peak : one);
  return rated ? clamp01(c) : zero;
}

// Response on the scale that the parabola is fitted in, relative to the peak.
GPLWS_INLINE Vec relative(Vec y, Vec y0, Refinement refinement) {
  const Vec linear = y - y0;
  if (refinement != Refinement::kGaussian) return linear;
  const IntVec logs = y0 > broadcast(0.0f);
  const Vec safe = logs ? y0 : broadcast(1.0f);
  return logs ? log_positive(maximum(y, broadcast(kLogFloor) * safe) / safe) : linear;
}

// Values at `frame` of a table of FocusSearchParams::tables.
GPLWS_INLINE Vec look_up(const float* table, IntVec frame, [[maybe_unused]] int64_t frames) {
#if defined(__AVX512F__)
  if (frames <= 2 * kLanes)
    return _mm512_permutex2var_ps(load(table), reinterpret_cast<__m512i>(frame),
                                  load(table + kLanes));
#endif
  return gather(table, frame);
}

// Depth by the parabola through three frames, which meets them exactly. With y = 0 at the winner
// and y <= 0 beside it, its vertex divides the two gaps as the weighted responses do. Where their
// sum exceeds a float, depth stays at the winner.
GPLWS_INLINE Vec fit_three_frames(const FocusSearchParams& p, const float* tables, const Walk& w) {
  const Vec zero = broadcast(0.0f), one = broadcast(1.0f), lowest = broadcast(-INFINITY);
  const Vec z0 = look_up(tables, w.frame, p.frames);
  const Vec half_gap = look_up(tables + p.table_size, w.frame, p.frames);
  const Vec ratio = look_up(tables + 2 * p.table_size, w.frame, p.frames);
  const IntVec whole = (w.left > lowest) & (w.right > lowest) & (w.peak < broadcast(INFINITY));
  const Vec left = ratio * relative(w.left, w.peak, p.refinement);
  const Vec sum = left + relative(w.right, w.peak, p.refinement);
  const IntVec bends = whole & (sum < zero) & (sum > lowest);  // -inf: too steep for a float
  const Vec vertex = left / (bends ? sum : one) * (ratio + one) - one;
  return z0 + (bends ? half_gap * vertex : zero);
}

// Depth by the least-squares parabola around each winner; docs/design.md has the formulas.
static Vec fit_window(const FocusSearchParams& p, const float* volume, const float* z,
                      const Walk& w, int count) {
  const Vec zero = broadcast(0.0f), one = broadcast(1.0f);
  const int32_t last_frame = static_cast<int32_t>(p.frames - 1);
  const int32_t radius = static_cast<int32_t>(p.radius);
  const auto clamped = [&](int32_t d) {
    const IntVec f = w.frame + d;
    const IntVec from_first = f < 0 ? IntVec{} : f;
    return from_first > last_frame ? IntVec{} + last_frame : from_first;
  };
  const IntVec first = clamped(-radius), last = clamped(radius);
  const Vec z0 = gather(z, w.frame);
  const Vec range = magnitude(gather(z, last) - gather(z, first));
  const IntVec spread = range > zero;
  const Vec scale =
      spread ? range / __builtin_convertvector(spread ? last - first : IntVec{} + 1, Vec) : one;

  const IntVec finite_peak = (w.peak < broadcast(INFINITY)) & (w.peak > broadcast(-INFINITY));
  const Vec y0 = finite_peak ? w.peak : zero;
  Vec n = zero, t1 = zero, t2 = zero, t3 = zero, t4 = zero, s0 = zero, s1 = zero, s2 = zero;
  for (int32_t d = -radius; d <= radius; ++d) {
    const IntVec frame = clamped(d);
    const Vec response = gather_rows(volume, frame, p.pixels, count);
    const IntVec inside = (frame == w.frame + d) & (response < broadcast(INFINITY)) &
                          (response > broadcast(-INFINITY));
    const Vec t = inside ? (gather(z, frame) - z0) / scale : zero;
    const Vec y = inside ? relative(inside ? response : zero, y0, p.refinement) : zero;
    const Vec tt = t * t;
    n += inside ? one : zero;
    t1 += t;
    t2 += tt;
    t3 += tt * t;
    t4 += tt * tt;
    s0 += y;
    s1 += t * y;
    s2 += tt * y;
  }
  // Cramer's rule; the common determinant cancels in b / a and is positive.
  const Vec a0 = s0 * (t1 * t3 - t2 * t2), a1 = s1 * (n * t3 - t1 * t2),
            a2 = s2 * (n * t2 - t1 * t1);
  const Vec a = a0 - a1 + a2;
  const Vec b = s1 * (n * t4 - t2 * t2) - s0 * (t1 * t4 - t2 * t3) - s2 * (n * t3 - t1 * t2);
  const Vec flat = broadcast(-kFlatness) * (magnitude(a0) + magnitude(a1) + magnitude(a2));
  const IntVec bends = (n > broadcast(2.5f)) & (a < flat) & finite_peak;
  const Vec vertex = bends ? b / (broadcast(-2.0f) * (bends ? a : -one)) : zero;
  const Vec before = gather(z, clamped(-1)), after = gather(z, clamped(1));
  return minimum(maximum(z0 + scale * vertex, minimum(before, after)), maximum(before, after));
}

// Stores frames past the caches; `p` is aligned to a vector.
GPLWS_INLINE void stream_frames(int64_t* p, IntVec frames) {
#if defined(__AVX512F__) && !defined(__SANITIZE_ADDRESS__)
  const __m512i v = reinterpret_cast<__m512i>(frames);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p),
                      _mm512_cvtepi32_epi64(_mm512_castsi512_si256(v)));
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p + kLanes / 2),
                      _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(v, 1)));
#elif defined(__AVX2__) && !defined(__SANITIZE_ADDRESS__)
  const __m256i v = reinterpret_cast<__m256i>(frames);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_cvtepi32_epi64(_mm256_castsi256_si128(v)));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p + kLanes / 2),
                      _mm256_cvtepi32_epi64(_mm256_extracti128_si256(v, 1)));
#else
  store_first(p, frames, kLanes);
#endif
}

// Whether vectors of the results from pixel `at` on can be stored past the caches: else each of
// their lines would be read from memory before it is overwritten.
bool aligned(const FocusSearchParams& p, int64_t at) {
  const auto floats = reinterpret_cast<uintptr_t>(p.depth + at) |
                      reinterpret_cast<uintptr_t>(p.peak + at) |
                      reinterpret_cast<uintptr_t>(p.confidence + at);
  return (floats | reinterpret_cast<uintptr_t>(p.index + at)) % GPLWS_VEC_BYTES == 0;
}

// Results of up to one vector of pixels, from pixel `at` of the flattened (batch, pixels) on.
template <Fit kFit>
GPLWS_INLINE void finish(const FocusSearchParams& p, int64_t image, const float* volume,
                         const Walk& w, int64_t at, int count, bool past_caches) {
  const float* tables = p.tables + image * p.table_stride;
  Vec depth;
  if constexpr (kFit == Fit::kNone) {
    depth = look_up(tables, w.frame, p.frames);
  } else if constexpr (kFit == Fit::kThreeFrames) {
    depth = fit_three_frames(p, tables, w);
  } else {
    depth = fit_window(p, volume, tables, w, count);
  }
  const IntVec found = w.peak > broadcast(-INFINITY);
  if (past_caches) {
    stream(p.depth + at, found ? depth : broadcast(NAN));
    stream(p.peak + at, w.peak);
    stream(p.confidence + at, confidence(w, p.log_scale));
    stream_frames(p.index + at, w.frame);
    return;
  }
  store_first(p.depth + at, found ? depth : broadcast(NAN), count);
  store_first(p.peak + at, w.peak, count);
  store_first(p.confidence + at, confidence(w, p.log_scale), count);
  store_first(p.index + at, w.frame, count);
}

template <Fit kFit>
void search(const FocusSearchParams& p, int64_t begin, int64_t end) {
  constexpr bool kNeighbours = kFit == Fit::kThreeFrames;
  constexpr int kStripPixels = kStrips * kLanes;
  Walk state[kRunPixels / kLanes];
  const int64_t blocks = (p.frames + kBlockFrames - 1) / kBlockFrames;
  const int64_t run_pixels = blocks == 1 ? kShortRunPixels : kRunPixels;
  // State that waits for the next block of frames; without one, the same place serves all pixels.
  const auto state_at = [&](int64_t done) { return blocks == 1 ? state : state + done / kLanes; };
  for (int64_t at = begin; at < end;) {
    const int64_t image = at / p.pixels, pixel = at % p.pixels;
    const int64_t left = end - at < p.pixels - pixel ? end - at : p.pixels - pixel;
    const int64_t here = run_pixels - pixel % run_pixels;
    const int64_t run = here < left ? here : left;
    const float* volume = p.volume + image * p.frames * p.pixels + pixel;
    const bool past_caches = aligned(p, at);
    const auto block_start = [&](int64_t b) { return b * p.frames / blocks; };
    for (int64_t b = 0; b < blocks; ++b) {
      Block block;
      block.first = block_start(b);
      block.last = block_start(b + 1);
      block.group_end = (block.first / p.group_size + 1) * p.group_size;
      const bool ends = block.last == p.frames;
      // What comes next: the next frames of these pixels, or the first frames of the next pixels.
      const int64_t ahead = ends ? run : block.last * p.pixels;
      const int64_t ahead_frames = !ends             ? block_start(b + 2) - block.last
                                   : 2 * run <= left ? block_start(1)
                                                     : 0;
      int64_t done = 0;
      for (; done + kStripPixels <= run; done += kStripPixels) {
        const float* strip = volume + done;
        const auto load_frame = [&](int64_t n, int i) {
          return load(strip + n * p.pixels + i * kLanes);
        };
        const auto fetch_ahead = [&](int64_t n, int i) {
          if (n - block.first < ahead_frames)
            __builtin_prefetch(strip + ahead + (n - block.first) * p.pixels + i * kLanes, 0, 2);
        };
        Walk* w = state_at(done);
        walk<kNeighbours, kStrips>(w, block, p.frames, p.group_size, load_frame, fetch_ahead);
        if (!ends) continue;
        for (int i = 0; i < kStrips; ++i)
          finish<kFit>(p, image, strip + i * kLanes, w[i], at + done + i * kLanes, kLanes,
                       past_caches);
      }
      for (; done < run; done += kLanes) {
        const int count = run - done < kLanes ? static_cast<int>(run - done) : kLanes;
        const auto load_frame = [&](int64_t n, int) {
          return load_first(volume + done + n * p.pixels, count);
        };
        Walk* w = state_at(done);
        walk<kNeighbours, 1>(w, block, p.frames, p.group_size, load_frame, [](int64_t, int) {});
        if (ends) finish<kFit>(p, image, volume + done, *w, at + done, count, false);
      }
    }
    at += run;
  }
  finish_streaming();
}

void run(const FocusSearchParams& p, int64_t begin, int64_t end) {
  if (p.refinement == Refinement::kNone) {
    search<Fit::kNone>(p, begin, end);
  } else if (p.radius == 1 && p.regular) {
    search<Fit::kThreeFrames>(p, begin, end);
  } else {
    search<Fit::kWindow>(p, begin, end);
  }
}

}  // namespace

extern const FocusSearchKernel kFocusSearch;
const FocusSearchKernel kFocusSearch{run};

}  // namespace gplws::cpu::GPLWS_ISA
