#include <immintrin.h>

#define GPLWS_ISA avx512
#include "surface_refinement_kernel.h"
