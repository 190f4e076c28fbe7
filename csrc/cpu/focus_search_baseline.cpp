#define GPLWS_ISA baseline
#include "focus_search_kernel.h"
