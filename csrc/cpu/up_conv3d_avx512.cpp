#include <immintrin.h>

#define GPLWS_ISA avx512
#include "up_conv3d_kernel.h"
