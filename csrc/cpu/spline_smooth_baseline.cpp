#define GPLWS_ISA baseline
#include "spline_smooth_kernel.h"
