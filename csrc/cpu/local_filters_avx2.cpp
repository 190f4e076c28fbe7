#include <immintrin.h>

#define GPLWS_ISA avx2
#include "local_filters_kernel.h"
