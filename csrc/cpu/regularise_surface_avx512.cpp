#include <immintrin.h>

#define GPLWS_ISA avx512
#include "regularise_surface_kernel.h"
