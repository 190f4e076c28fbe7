// Body of the focus search, compiled once per ISA (GPLWS_ISA).
//
// One vector holds neighbouring pixels and walks down the frames; frame numbers are kept as floats
// (exact up to 2^24 frames), so that a comparison selects response and number alike. The fit then
// gathers the frames around each pixel's winner, which are still in cache.
#include "focus_search.h"

#include <math.h>
#include <stdint.h>

namespace gplws::cpu::GPLWS_ISA {

#include "vec.h"

namespace {

constexpr float kLogFloor = 1e-6f;  // smallest share of the peak that enters a logarithm
constexpr float kFlatness = 1e-5f;  // share of its terms below which a curvature is rounding

constexpr int kStrips = 4;  // vectors searched side by side: enough loads in flight

struct Winner {
  Vec peak, runner_up, frame;
};

// Frame n is a peak where v[n] >= v[n-1] and v[n] >= v[n+1]: known one frame later, so the loop
// judges frame n - 1 when it has read frame n. `load_frame(n, i)` is vector i of frame n.
template <int kCount, typename LoadFrame>
GPLWS_INLINE void find_winners(LoadFrame load_frame, int64_t frames, int64_t group_size,
                               Winner* winners) {
  const Vec lowest = broadcast(-INFINITY);
  Vec peak[kCount], runner_up[kCount], frame[kCount], group_peak[kCount], group_frame[kCount],
      before[kCount], here[kCount];
  for (int i = 0; i < kCount; ++i) {
    peak[i] = runner_up[i] = group_peak[i] = before[i] = lowest;
    frame[i] = group_frame[i] = broadcast(0.0f);
    here[i] = maximum(load_frame(0, i), lowest);  // NaN becomes the lowest
  }
  int64_t group_end = group_size;
  for (int64_t n = 0; n < frames; ++n) {
    const Vec number = broadcast(static_cast<float>(n));
    const bool last = n + 1 == frames;
    for (int i = 0; i < kCount; ++i) {
      const Vec after = last ? lowest : maximum(load_frame(n + 1, i), lowest);
      const Vec candidate = here[i] >= maximum(before[i], after) ? here[i] : lowest;
      // A frame that only ties with the group's peak does not replace it: the lowest frame wins.
      group_frame[i] = candidate > group_peak[i] ? number : group_frame[i];
      group_peak[i] = maximum(candidate, group_peak[i]);
      before[i] = here[i];
      here[i] = after;
    }
    if (n + 1 == group_end || last) {
      for (int i = 0; i < kCount; ++i) {
        runner_up[i] = maximum(runner_up[i], minimum(group_peak[i], peak[i]));
        frame[i] = group_peak[i] > peak[i] ? group_frame[i] : frame[i];
        peak[i] = maximum(group_peak[i], peak[i]);
        group_peak[i] = lowest;
      }
      group_end += group_size;
    }
  }
  for (int i = 0; i < kCount; ++i) winners[i] = Winner{peak[i], runner_up[i], frame[i]};
}

GPLWS_INLINE Vec clamp01(Vec v) { return minimum(maximum(v, broadcast(0.0f)), broadcast(1.0f)); }

GPLWS_INLINE Vec confidence(const Winner& w, bool log_scale) {
  const Vec zero = broadcast(0.0f), one = broadcast(1.0f);
  const IntVec finite = (w.peak < broadcast(INFINITY)) & (w.peak > broadcast(-INFINITY));
  Vec c;
  if (log_scale) {
    float lanes[kLanes];
    store(lanes, finite ? w.runner_up - w.peak : zero);
    for (int i = 0; i < kLanes; ++i) lanes[i] = 1.0f - expf(lanes[i]);
    c = clamp01(load(lanes));
  } else {
    const IntVec positive = w.peak > zero;
    const Vec safe = positive ? w.peak : one;
    c = positive ? clamp01(one - maximum(w.runner_up, zero) / safe) : zero;
  }
  return finite ? c : zero;
}

// Depth by the least-squares parabola around each winner; docs/design.md has the formulas.
static Vec refine(const FocusSearchParams& p, const float* volume, const float* z, const Winner& w,
                  int count) {
  float frame_lanes[kLanes], z0_lanes[kLanes], scale_lanes[kLanes], low_lanes[kLanes],
      high_lanes[kLanes];
  store(frame_lanes, w.frame);
  const int64_t last_frame = p.frames - 1;
  for (int i = 0; i < kLanes; ++i) {
    const int64_t f = static_cast<int64_t>(frame_lanes[i]);
    z0_lanes[i] = z[f];
    const int64_t first = f > p.radius ? f - p.radius : 0;
    const int64_t last = f + p.radius < last_frame ? f + p.radius : last_frame;
    const float range = fabsf(z[last] - z[first]);
    scale_lanes[i] = range > 0 ? range / static_cast<float>(last - first) : 1.0f;
    const float before = z[f > 0 ? f - 1 : 0], after = z[f < last_frame ? f + 1 : last_frame];
    low_lanes[i] = before < after ? before : after;
    high_lanes[i] = before < after ? after : before;
  }
  const Vec z0 = load(z0_lanes), scale = load(scale_lanes);
  if (p.refinement == Refinement::kNone) return z0;

  const Vec zero = broadcast(0.0f), one = broadcast(1.0f);
  const IntVec finite_peak = (w.peak < broadcast(INFINITY)) & (w.peak > broadcast(-INFINITY));
  const Vec y0 = finite_peak ? w.peak : zero;
  const IntVec logs = p.refinement == Refinement::kGaussian ? y0 > zero : zero > zero;
  const Vec safe = logs ? y0 : one;
  Vec n = zero, t1 = zero, t2 = zero, t3 = zero, t4 = zero, s0 = zero, s1 = zero, s2 = zero;
  for (int64_t d = -p.radius; d <= p.radius; ++d) {
    float y_lanes[kLanes], z_lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int64_t f = static_cast<int64_t>(frame_lanes[i]) + d;
      const bool exists = f >= 0 && f <= last_frame && i < count;
      y_lanes[i] = exists ? volume[f * p.pixels + i] : INFINITY;
      z_lanes[i] = exists ? z[f] : 0.0f;
    }
    Vec y = load(y_lanes);
    const IntVec inside = (y < broadcast(INFINITY)) & (y > broadcast(-INFINITY));
    const Vec t = inside ? (load(z_lanes) - z0) / scale : zero;
    const Vec linear = y - y0;
    if (p.refinement == Refinement::kGaussian) {
      const Vec floored = maximum(inside ? y : zero, broadcast(kLogFloor) * safe);
      y = logs ? log_positive(floored / safe) : linear;
    } else {
      y = linear;
    }
    y = inside ? y : zero;
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
  return minimum(maximum(z0 + scale * vertex, load(low_lanes)), load(high_lanes));
}

// Results of up to one vector of pixels, from pixel `at` of the flattened (batch, pixels) on.
GPLWS_INLINE void finish_pixels(const FocusSearchParams& p, const float* volume, const float* z,
                                const Winner& w, int64_t at, int count) {
  const IntVec found = w.peak > broadcast(-INFINITY);
  const Vec depth = found ? refine(p, volume, z, w, count) : broadcast(NAN);
  store_first(p.depth + at, depth, count);
  store_first(p.peak + at, w.peak, count);
  store_first(p.confidence + at, confidence(w, p.log_scale), count);
  for (int i = 0; i < count; ++i) p.index[at + i] = static_cast<int64_t>(w.frame[i]);
}

void search(const FocusSearchParams& p, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end;) {
    const int64_t image = at / p.pixels, pixel = at % p.pixels;
    const int64_t left = (image + 1) * p.pixels < end ? p.pixels - pixel : end - at;
    const float* volume = p.volume + image * p.frames * p.pixels + pixel;
    const float* z = p.positions + image * p.position_stride;
    Winner winners[kStrips];
    if (left >= kStrips * kLanes) {
      const auto load_frame = [&](int64_t n, int i) {
        return load(volume + n * p.pixels + i * kLanes);
      };
      find_winners<kStrips>(load_frame, p.frames, p.group_size, winners);
      for (int i = 0; i < kStrips; ++i)
        finish_pixels(p, volume + i * kLanes, z, winners[i], at + i * kLanes, kLanes);
      at += kStrips * kLanes;
    } else {
      const int count = left < kLanes ? static_cast<int>(left) : kLanes;
      const auto load_frame = [&](int64_t n, int) {
        return load_first(volume + n * p.pixels, count);
      };
      find_winners<1>(load_frame, p.frames, p.group_size, winners);
      finish_pixels(p, volume, z, winners[0], at, count);
      at += count;
    }
  }
}

}  // namespace

extern const FocusSearchTable kFocusSearch;
const FocusSearchTable kFocusSearch{search};

}  // namespace gplws::cpu::GPLWS_ISA
