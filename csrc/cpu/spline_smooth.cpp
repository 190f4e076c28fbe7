#include "spline_smooth.h"

#include "select_isa.h"

namespace gplws::cpu {

GPLWS_DECLARE_VARIANTS(SplineSmoothKernel, kSplineSmooth)

const SplineSmoothKernel& spline_smooth_kernel() { return GPLWS_SELECT_VARIANT(kSplineSmooth); }

}  // namespace gplws::cpu
