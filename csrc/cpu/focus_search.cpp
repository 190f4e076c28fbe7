#include "focus_search.h"

#include <cmath>

#include "select_isa.h"

namespace gplws::cpu {

GPLWS_DECLARE_VARIANTS(FocusSearchKernel, kFocusSearch)

namespace {

// Below this ratio of two neighbouring gaps, the curvature of a parabola through three frames is
// always more than the 1e-5 of its terms that docs/design.md asks for.
constexpr float kLargestRatio = 16.0f;

}  // namespace

bool fill_focus_tables(const float* positions, int64_t frames, float* tables) {
  const int64_t size = focus_table_size(frames);
  float *position = tables, *half_gap = tables + size, *ratio = tables + 2 * size;
  bool regular = true;
  for (int64_t n = 0; n < size; ++n) {
    position[n] = n < frames ? positions[n] : 0.0f;
    half_gap[n] = 0.0f;
    ratio[n] = 1.0f;
    if (n == 0 || n + 1 >= frames) continue;
    const float gap = positions[n] - positions[n - 1];
    half_gap[n] = gap / 2;
    ratio[n] = (positions[n + 1] - positions[n]) / gap;
    regular = regular && ratio[n] >= 1 / kLargestRatio && ratio[n] <= kLargestRatio;
  }
  return regular;
}

const FocusSearchKernel& focus_search_kernel() { return GPLWS_SELECT_VARIANT(kFocusSearch); }

}  // namespace gplws::cpu
