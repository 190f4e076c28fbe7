#include <immintrin.h>

#define GPLWS_ISA avx512bf16
#define GPLWS_GROUP_POINTWISE_SCHEMES {}, kKernel<Pairs>
#include "group_pointwise_conv3d_kernel.h"
