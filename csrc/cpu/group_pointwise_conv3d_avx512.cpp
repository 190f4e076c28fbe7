#define GPLWS_ISA avx512
#include "group_pointwise_conv3d_kernel.h"
