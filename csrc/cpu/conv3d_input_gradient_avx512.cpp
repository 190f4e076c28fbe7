#include <immintrin.h>

#define GPLWS_ISA avx512
#include "conv3d_input_gradient_kernel.h"
