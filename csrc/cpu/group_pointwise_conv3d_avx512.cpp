#include <immintrin.h>

#define GPLWS_ISA avx512
#define GPLWS_GROUP_POINTWISE_SCHEMES kKernel<Float32>, kKernel<Widened>
#include "group_pointwise_conv3d_kernel.h"
