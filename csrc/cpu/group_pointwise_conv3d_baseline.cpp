#define GPLWS_ISA baseline
#include "group_pointwise_conv3d_kernel.h"
