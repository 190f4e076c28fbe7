#include <immintrin.h>

#define GPLWS_ISA avx512
#include "conv3d_weight_gradient_kernel.h"
