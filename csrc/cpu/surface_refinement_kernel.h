// Body of the refinement along a surface, compiled once per ISA (GPLWS_ISA). Three passes over the
// image, each of which holds what it makes of a few pixels in registers; in stock ops they are some
// 350, 120 and 140 passes.
#include "surface_refinement.h"

#include <math.h>
#include <stdint.h>

namespace gplws::cpu::GPLWS_ISA {

#include "vec.h"
//
#include "sizes.h"

namespace {

// The mean of the depths around: a Gaussian of 2 pixels over 7 x 7 of them.
constexpr int kReach = 3;
constexpr int kRows = 2 * kReach + 1;
constexpr float kInverseVariance = 1.0f / (2.0f * 2.0f);

constexpr float kTiny = 1e-20f;
constexpr float kLeastWeight = 1e-6f;    // of the samples of a pixel and those around
constexpr float kLogFloor = 1e-6f;       // smallest share of the peak that enters a logarithm
constexpr float kFewestSamples = 1e-6f;  // determinant below which no parabola is defined

GPLWS_INLINE Vec clamp(Vec v, Vec low, Vec high) { return minimum(high, maximum(low, v)); }

// Floats of one line, and of its margins.
int64_t line_size(int64_t width) { return plane_size(width + 2 * kReach + kLanes); }

int64_t smooth_scratch(const SmoothSurfaceParams& p) { return kRows * line_size(p.width); }

// Row y of the image, beyond whose edges the last row and column go on.
void fill_line(const SmoothSurfaceParams& p, int64_t y, float* line) {
  const float* row = p.depth + max64(0, min64(y, p.height - 1)) * p.width;
  for (int64_t x = -kReach; x < 0; ++x) line[kReach + x] = row[0];
  __builtin_memcpy(line + kReach, row, static_cast<size_t>(p.width) * sizeof(float));
  for (int64_t x = p.width; x < p.width + kReach + kLanes; ++x) line[kReach + x] = row[p.width - 1];
}

// Tukey's biweight of the difference times a Gaussian of the distance.
void smooth_rows(const SmoothSurfaceParams& p, int64_t begin, int64_t end, float* scratch) {
  float near[kReach + 1][kReach + 1];
  for (int dy = 0; dy <= kReach; ++dy) {
    for (int dx = 0; dx <= kReach; ++dx)
      near[dy][dx] = expf(-0.5f * kInverseVariance * static_cast<float>(dy * dy + dx * dx));
  }
  const int64_t size = line_size(p.width);
  const auto line = [&](int64_t y) { return scratch + (y + kReach) % kRows * size; };
  for (int64_t y = begin - kReach; y < begin + kReach; ++y) fill_line(p, y, line(y));
  const Vec scale = broadcast(1 / p.limit);
  for (int64_t y = begin; y < end; ++y) {
    fill_line(p, y + kReach, line(y + kReach));
    for (int64_t x = 0; x < p.width; x += kLanes) {
      const Vec here = load(line(y) + kReach + x);
      Vec change{}, total{};
      for (int dy = -kReach; dy <= kReach; ++dy) {
        const float* row = line(y + dy) + x;
        const float* share = near[dy < 0 ? -dy : dy];
#pragma GCC unroll 7
        for (int dx = -kReach; dx <= kReach; ++dx) {
          const Vec difference = load(row + kReach + dx) - here;
          const Vec relative = difference * scale;
          const Vec inside = maximum(Vec{}, broadcast(1.0f) - relative * relative);
          const Vec weight = inside * inside * broadcast(share[dx < 0 ? -dx : dx]);
          change += weight * difference;
          total += weight;
        }
      }
      const int count = static_cast<int>(min64(kLanes, p.width - x));
      store_first(p.result + y * p.width + x, here + change / total, count);
    }
  }
}

// p[row[i] * stride + i] in lane i < count, 0 behind them.
GPLWS_INLINE Vec response_at(const float* p, IntVec row, int64_t stride, int count, bool is_near) {
  if (!is_near || count < kLanes) return gather_rows(p, row, stride, count);
  IntVec lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return gather(p, row * static_cast<int32_t>(stride) + lanes);
}

void sample_pixels(const SampleSurfaceParams& p, int64_t begin, int64_t end) {
  const bool is_near = p.frames * p.pixels < INT32_MAX;  // offsets fit in 32 bits
  const Vec one = broadcast(1.0f);
  const Vec last = broadcast(static_cast<float>(p.frames - 1));
  const Vec upmost = maximum(Vec{}, last - one);
  const Vec inverse = broadcast(1 / p.spacing);
  const IntVec lower_end = __builtin_convertvector(upmost, IntVec);
  const IntVec upper_end = __builtin_convertvector(last, IntVec);
  for (int64_t x = begin; x < end; x += kLanes) {
    const int count = static_cast<int>(min64(kLanes, end - x));
    const Vec here = load_first(p.surface + x, count);
    const Vec farthest = maximum(broadcast(2.0f), minimum(here, last - here) * inverse) + one;
#pragma GCC unroll 7
    for (int i = 0; i < kSurfaceSampleCount; ++i) {
      const int k = i - kSurfaceSamples;
      const Vec wanted = here + broadcast(static_cast<float>(k) * p.spacing);
      const Vec place = clamp(wanted, Vec{}, last);
      const Vec within = maximum(Vec{}, one - magnitude(wanted - place) * inverse);
      const Vec weight =
          within * clamp(farthest - broadcast(static_cast<float>(k < 0 ? -k : k)), Vec{}, one);
      // Whatever the surface is, NaN too, only frames of the stack are read.
      IntVec lower = __builtin_convertvector(place, IntVec);
      lower = lower > 0 ? lower : IntVec{};
      lower = lower < lower_end ? lower : lower_end;
      IntVec upper = lower + 1;
      upper = upper < upper_end ? upper : upper_end;
      const Vec share = place - __builtin_convertvector(lower, Vec);
      const Vec before = response_at(p.responses + x, lower, p.pixels, count, is_near);
      const Vec after = response_at(p.responses + x, upper, p.pixels, count, is_near);
      const int64_t at = i * p.pixels + x;
      store_first(p.values + at, (before + share * (after - before)) * weight, count);
      store_first(p.distances + at, (place - here) * inverse, count);
      store_first(p.weights + at, weight, count);
    }
  }
}

GPLWS_INLINE void store_flags(bool* p, IntVec flags, int count) {
  for (int i = 0; i < count; ++i) p[i] = flags[i] != 0;
}

void fit_pixels(const FitPeakParams& p, int64_t begin, int64_t end) {
  const auto fit = [&](int64_t x, int count, const auto& get) __attribute__((always_inline)) {
    const bool alike = p.weights == nullptr;
    Vec values[kSurfaceSampleCount];
    for (int i = 0; i < kSurfaceSampleCount; ++i) values[i] = get(p.values, i);
    if (!alike) {
      const Vec middle = values[kSurfaceSamples];
      for (int i = 0; i < kSurfaceSampleCount; ++i)
        values[i] = values[i] * middle / maximum(broadcast(kTiny), get(p.middle, i));
    }
    Vec highest = values[0];
    for (int i = 1; i < kSurfaceSampleCount; ++i) highest = maximum(highest, values[i]);
    highest = maximum(broadcast(kTiny), highest);
    Vec s0{}, s1{}, s2{}, s3{}, s4{}, y0{}, y1{}, y2{};
#pragma GCC unroll 7
    for (int i = 0; i < kSurfaceSampleCount; ++i) {
      const Vec relative = maximum(broadcast(kLogFloor), values[i] / highest);
      Vec weight = relative * relative;
      Vec t = broadcast(static_cast<float>(i - kSurfaceSamples));
      if (!alike) {
        const Vec given = get(p.weights, i);
        t = get(p.distances, i) / maximum(broadcast(kLeastWeight), given);
        weight = weight * given;
      }
      const Vec weighted = weight * log_positive(relative);
      const Vec square = t * t;
      s0 += weight;
      s1 += weight * t;
      s2 += weight * square;
      s3 += weight * square * t;
      s4 += weight * square * square;
      y0 += weighted;
      y1 += weighted * t;
      y2 += weighted * square;
    }
    // Cramer's rule for the slope and curvature; a vertex needs their quotient only.
    const Vec slope =
        s0 * (y1 * s4 - s3 * y2) - y0 * (s1 * s4 - s3 * s2) + s2 * (s1 * y2 - y1 * s2);
    const Vec curvature =
        s0 * (s2 * y2 - y1 * s3) - s1 * (s1 * y2 - y1 * s2) + y0 * (s1 * s3 - s2 * s2);
    const Vec determinant =
        s0 * (s2 * s4 - s3 * s3) - s1 * (s1 * s4 - s3 * s2) + s2 * (s1 * s3 - s2 * s2);
    const IntVec concave =
        (determinant > broadcast(kFewestSamples) * s0 * s0 * s0) & (curvature < Vec{});
    const Vec limit = broadcast(static_cast<float>(kSurfaceSamples));
    const Vec vertex = concave ? -slope / (broadcast(2.0f) * curvature) : Vec{};
    store_first(p.vertex + x, clamp(vertex, -limit, limit), count);
    store_flags(p.concave + x, concave, count);
  };
  int64_t x = begin;
  for (; x + kLanes <= end; x += kLanes)
    fit(x, kLanes, [&](const float* maps, int i) { return load(maps + i * p.pixels + x); });
  const int rest = static_cast<int>(end - x);
  if (rest > 0)
    fit(x, rest,
        [&](const float* maps, int i) { return load_first(maps + i * p.pixels + x, rest); });
}

}  // namespace

extern const SurfaceRefinementKernel kSurfaceRefinement;
const SurfaceRefinementKernel kSurfaceRefinement{smooth_scratch, smooth_rows, sample_pixels,
                                                 fit_pixels};

}  // namespace gplws::cpu::GPLWS_ISA
