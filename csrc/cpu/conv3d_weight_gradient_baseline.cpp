#define GPLWS_ISA baseline
#include "conv3d_weight_gradient_kernel.h"
