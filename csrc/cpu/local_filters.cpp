#include "local_filters.h"

#include "select_isa.h"

namespace gplws::cpu {

GPLWS_DECLARE_VARIANTS(LocalFilterKernel, kLocalFilters)

const LocalFilterKernel& local_filter_kernel() { return GPLWS_SELECT_VARIANT(kLocalFilters); }

}  // namespace gplws::cpu
