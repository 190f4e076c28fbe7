#include "group_pointwise_conv3d.h"

#include "select_isa.h"

namespace gplws::cpu {

GPLWS_DECLARE_VARIANTS(GroupPointwiseConv3dKernel, kGroupPointwiseConv3d)

const GroupPointwiseConv3dKernel& group_pointwise_conv3d_kernel() {
  return GPLWS_SELECT_VARIANT(kGroupPointwiseConv3d);
}

}  // namespace gplws::cpu
