#include <immintrin.h>

#define GPLWS_ISA avx512
#include "spline_smooth_kernel.h"
