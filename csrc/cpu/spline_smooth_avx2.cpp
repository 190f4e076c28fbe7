#include <immintrin.h>

#define GPLWS_ISA avx2
#include "spline_smooth_kernel.h"
