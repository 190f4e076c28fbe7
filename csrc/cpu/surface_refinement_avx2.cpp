#include <immintrin.h>

#define GPLWS_ISA avx2
#include "surface_refinement_kernel.h"
