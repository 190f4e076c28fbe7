#define GPLWS_ISA avx2
#include "group_pointwise_conv3d_kernel.h"
