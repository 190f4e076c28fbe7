#define GPLWS_ISA baseline
#include "up_conv3d_kernel.h"
