#include <immintrin.h>

#define GPLWS_ISA avx512
#include "focus_search_kernel.h"
