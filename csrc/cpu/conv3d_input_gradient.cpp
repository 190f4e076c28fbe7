#include "conv3d_input_gradient.h"

#include "select_isa.h"

namespace gplws::cpu {

GPLWS_DECLARE_VARIANTS(Conv3dInputGradientKernel, kConv3dInputGradient)

const Conv3dInputGradientKernel& conv3d_input_gradient_kernel() {
  return GPLWS_SELECT_VARIANT(kConv3dInputGradient);
}

}  // namespace gplws::cpu
