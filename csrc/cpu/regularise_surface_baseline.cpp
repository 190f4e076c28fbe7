#define GPLWS_ISA baseline
#include "regularise_surface_kernel.h"
