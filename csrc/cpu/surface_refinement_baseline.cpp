#define GPLWS_ISA baseline
#include "surface_refinement_kernel.h"
