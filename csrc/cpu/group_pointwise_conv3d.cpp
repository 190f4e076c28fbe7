#include "group_pointwise_conv3d.h"

#include "select_isa.h"

namespace gplws::cpu {

GPLWS_DECLARE_VARIANTS(GroupPointwiseConv3dTable, kGroupPointwiseConv3d)
#if defined(__x86_64__)
GPLWS_DECLARE_VARIANT(avx512bf16, GroupPointwiseConv3dTable, kGroupPointwiseConv3d)
#endif

const GroupPointwiseConv3dKernel& group_pointwise_conv3d_kernel(bool bfloat16) {
  if (!bfloat16) return GPLWS_SELECT_VARIANT(kGroupPointwiseConv3d).float32;
#if defined(__x86_64__)
  if (cpu_has_avx512bf16()) return avx512bf16::kGroupPointwiseConv3d.bfloat16;
#endif
  return GPLWS_SELECT_VARIANT(kGroupPointwiseConv3d).bfloat16;
}

}  // namespace gplws::cpu
