#include "surface_refinement.h"

#include "select_isa.h"

namespace gplws::cpu {

GPLWS_DECLARE_VARIANTS(SurfaceRefinementKernel, kSurfaceRefinement)

const SurfaceRefinementKernel& surface_refinement_kernel() {
  return GPLWS_SELECT_VARIANT(kSurfaceRefinement);
}

}  // namespace gplws::cpu
