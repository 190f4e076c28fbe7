#include "conv3d_weight_gradient.h"

#include "select_isa.h"

namespace gplws::cpu {

GPLWS_DECLARE_VARIANTS(Conv3dWeightGradientKernel, kConv3dWeightGradient)

const Conv3dWeightGradientKernel& conv3d_weight_gradient_kernel() {
  return GPLWS_SELECT_VARIANT(kConv3dWeightGradient);
}

}  // namespace gplws::cpu
