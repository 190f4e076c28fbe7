#include "regularise_surface.h"

#include "select_isa.h"

namespace gplws::cpu {

GPLWS_DECLARE_VARIANTS(RegulariseSurfaceKernel, kRegulariseSurface)

const RegulariseSurfaceKernel& regularise_surface_kernel() {
  return GPLWS_SELECT_VARIANT(kRegulariseSurface);
}

}  // namespace gplws::cpu
