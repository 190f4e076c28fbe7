#include <immintrin.h>

#define GPLWS_ISA avx2
#include "regularise_surface_kernel.h"
