// Body of the filters of focus measures, compiled once per ISA (GPLWS_ISA): each reads the image
// once and writes its result once, where stock ops take a pass for each tap.
#include "local_filters.h"

#include <stddef.h>
#include <stdint.h>

namespace gplws::cpu::GPLWS_ISA {

#include "vec.h"
//
#include "mirror.h"
#include "sizes.h"

namespace {

int64_t margin(const LocalFilterParams& p) { return round_up(p.reach); }

// Floats of one line with its margins; whole vectors are read up to the reach behind the last
// pixel.
int64_t line_size(const LocalFilterParams& p) {
  return plane_size(2 * margin(p) + p.width + kLanes);
}

const float* row_of(const LocalFilterParams& p, int64_t image, int64_t y) {
  return p.images + (image * p.height + mirrored(y, p.height)) * p.width;
}

// A tap of a quarter of the filter: which sums of two rows, how far left and right.
struct Tap {
  const float* line;
  int64_t distance;
  float weight;
};

int64_t tap_floats(const LocalFilterParams& p) {
  const int64_t taps = (p.reach + 1) * (p.reach + 1);
  return ceil_div(taps * static_cast<int64_t>(sizeof(Tap)), 64) * 16;
}

int64_t symmetric_scratch(const LocalFilterParams& p) {
  return tap_floats(p) + (p.reach + 1) * line_size(p);
}

// Sums of the rows above and below first, then of the columns left and right. The middle row and
// column are taken twice at half their weights: that rounds nothing.
void symmetric_rows(const LocalFilterParams& p, int64_t begin, int64_t end, float* scratch) {
  Tap* taps = reinterpret_cast<Tap*>(scratch);
  float* lines = scratch + tap_floats(p) + margin(p);
  int64_t count = 0;
  for (int64_t dy = 0; dy <= p.reach; ++dy) {
    for (int64_t dx = 0; dx <= p.reach; ++dx) {
      const float weight = p.weights[dy * (p.reach + 1) + dx];
      const float share = (dy == 0 ? 0.5f : 1.0f) * (dx == 0 ? 0.5f : 1.0f);
      if (weight != 0) taps[count++] = {lines + dy * line_size(p), dx, weight * share};
    }
  }
  for (int64_t at = begin; at < end; ++at) {
    const int64_t image = at / p.height, y = at % p.height;
    for (int64_t dy = 0; dy <= p.reach; ++dy) {
      const float* above = row_of(p, image, y - dy);
      const float* below = row_of(p, image, y + dy);
      float* line = lines + dy * line_size(p);
      int64_t x = 0;
      for (; x + kLanes <= p.width; x += kLanes) store(line + x, load(above + x) + load(below + x));
      for (; x < p.width; ++x) line[x] = above[x] + below[x];
      mirror_ends(line, p.width, p.reach);
    }
    float* result = p.result + at * p.width;
    for (int64_t x = 0; x < p.width; x += kLanes) {
      Vec sum{};
      for (int64_t i = 0; i < count; ++i) {
        const float* middle = taps[i].line + x;
        const int64_t distance = taps[i].distance;
        sum += (load(middle - distance) + load(middle + distance)) * broadcast(taps[i].weight);
      }
      store_first(result + x, sum, static_cast<int>(min64(kLanes, p.width - x)));
    }
  }
}

int64_t differences_scratch(const LocalFilterParams& p) {
  return (2 * p.reach + 2) * line_size(p);  // the rows around, and the sums
}

void differences_rows(const LocalFilterParams& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t rows = 2 * p.reach + 1, size = line_size(p);
  float* sums = scratch;
  float* lines = scratch + size + margin(p);
  const auto line = [&](int64_t y) { return lines + (y + p.reach) % rows * size; };
  const auto fill = [&](int64_t image, int64_t y) {
    float* target = line(y);
    __builtin_memcpy(target, row_of(p, image, y), static_cast<size_t>(p.width) * sizeof(float));
    mirror_ends(target, p.width, p.reach);
  };
  for (int64_t at = begin; at < end; ++at) {
    const int64_t image = at / p.height, y = at % p.height;
    // Of the row before all are there but the last.
    const bool goes_on = at > begin && y > 0;
    for (int64_t dy = goes_on ? p.reach : -p.reach; dy <= p.reach; ++dy) fill(image, y + dy);
    const float* here = line(y);
    float* result = p.result + at * p.width;
    for (int64_t i = 0; i < p.shift_count; ++i) {
      const int64_t dy = p.shifts[2 * i], dx = p.shifts[2 * i + 1];
      const float* before = line(y - dy) - dx;
      const float* behind = line(y + dy) + dx;
      const auto difference = [&](int64_t x) {
        const Vec middle = load(here + x);
        return magnitude((middle + middle) - load(behind + x) - load(before + x));
      };
      int64_t x = 0;
      if (i == 0) {
        for (; x < p.width; x += kLanes) store(sums + x, difference(x));
      } else {
        for (; x < p.width; x += kLanes) store(sums + x, load(sums + x) + difference(x));
      }
    }
    for (int64_t x = 0; x < p.width; x += kLanes)
      store_first(result + x, load(sums + x), static_cast<int>(min64(kLanes, p.width - x)));
  }
}

}  // namespace

extern const LocalFilterKernel kLocalFilters;
const LocalFilterKernel kLocalFilters{symmetric_scratch, differences_scratch, symmetric_rows,
                                      differences_rows};

}  // namespace gplws::cpu::GPLWS_ISA
