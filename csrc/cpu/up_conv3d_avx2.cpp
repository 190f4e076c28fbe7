#include <immintrin.h>

#define GPLWS_ISA avx2
#include "up_conv3d_kernel.h"
