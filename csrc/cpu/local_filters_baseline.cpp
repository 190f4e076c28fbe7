#define GPLWS_ISA baseline
#include "local_filters_kernel.h"
