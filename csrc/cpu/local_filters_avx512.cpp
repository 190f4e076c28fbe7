#include <immintrin.h>

#define GPLWS_ISA avx512
#include "local_filters_kernel.h"
