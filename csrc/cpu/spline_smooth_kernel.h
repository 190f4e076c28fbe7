// Body of the smoothing by a cubic B-spline, compiled once per ISA (GPLWS_ISA).
//
//   line[x] = (1, 4, 6, 4, 1) / 16 over rows y - 2 s .. y + 2 s of the image, s = spacing
//   result[y][x] = the same over columns x - 2 s .. x + 2 s of line
//
// A row of the result needs five rows of the image, which stay in cache from row to row, and one
// line of scratch: the image is read once and written once, where one axis at a time in stock ops
// takes a dozen passes. Beyond the borders the image is mirrored, without repeating its edge.
#include "spline_smooth.h"

#include <stdint.h>

namespace gplws::cpu::GPLWS_ISA {

#include "vec.h"
//
#include "mirror.h"
#include "sizes.h"

namespace {

// Pixels beside a line that its neighbours reach.
int64_t margin(const SplineSmoothParams& p) { return 2 * p.spacing; }

// In this order nothing is rounded where all five are equal: 1 + 1 + 2 + 4 + 4 + 4 taps have the
// sums 2, 4, 8 and 16. So a constant stays, and no result leaves the range of its neighbours.
GPLWS_INLINE Vec spline(Vec a, Vec b, Vec c, Vec d, Vec e) {
  const Vec ends = (a + e) + c * broadcast(2.0f);
  return (ends + c * broadcast(4.0f) + (b + d) * broadcast(4.0f)) * broadcast(1.0f / 16);
}

int64_t scratch_floats(const SplineSmoothParams& p) {
  // Whole vectors are read up to a margin behind the last pixel.
  return round_up(margin(p)) + round_up(p.width) + margin(p) + kLanes;
}

void smooth_rows(const SplineSmoothParams& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t width = p.width, spacing = p.spacing, reach = margin(p);
  float* line = scratch + round_up(reach);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t y = at % p.height;
    const float* image = p.images + (at - y) * width;
    const float* row[5];
    for (int64_t k = 0; k < 5; ++k)
      row[k] = image + mirrored(y + (k - 2) * spacing, p.height) * width;
    int64_t x = 0;
    for (; x + kLanes <= width; x += kLanes) {
      store(line + x, spline(load(row[0] + x), load(row[1] + x), load(row[2] + x), load(row[3] + x),
                             load(row[4] + x)));
    }
    if (x < width) {
      const int rest = static_cast<int>(width - x);
      store(line + x, spline(load_first(row[0] + x, rest), load_first(row[1] + x, rest),
                             load_first(row[2] + x, rest), load_first(row[3] + x, rest),
                             load_first(row[4] + x, rest)));
    }
    mirror_ends(line, width, reach);
    float* result = p.result + at * width;
    const auto across = [&](int64_t x) {
      const float* middle = line + x;
      return spline(load(middle - 2 * spacing), load(middle - spacing), load(middle),
                    load(middle + spacing), load(middle + 2 * spacing));
    };
    for (x = 0; x + kLanes <= width; x += kLanes) store(result + x, across(x));
    if (x < width) store_first(result + x, across(x), static_cast<int>(width - x));
  }
}

}  // namespace

extern const SplineSmoothKernel kSplineSmooth;
const SplineSmoothKernel kSplineSmooth{scratch_floats, smooth_rows};

}  // namespace gplws::cpu::GPLWS_ISA
