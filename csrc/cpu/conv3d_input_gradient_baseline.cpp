#define GPLWS_ISA baseline
#include "conv3d_input_gradient_kernel.h"
