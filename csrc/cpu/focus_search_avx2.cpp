#include <immintrin.h>

#define GPLWS_ISA avx2
#include "focus_search_kernel.h"
