#include "up_conv3d.h"

#include "select_isa.h"

namespace gplws::cpu {

GPLWS_DECLARE_VARIANTS(UpConv3dTable, kUpConv3d)

const UpConv3dKernel& up_conv3d_kernel(bool bfloat16) {
  const UpConv3dTable& table = GPLWS_SELECT_VARIANT(kUpConv3d);
  return bfloat16 ? table.bfloat16 : table.float32;
}

}  // namespace gplws::cpu
