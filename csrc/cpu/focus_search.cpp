#include "focus_search.h"

#include "select_isa.h"

namespace gplws::cpu {

GPLWS_DECLARE_VARIANTS(FocusSearchTable, kFocusSearch)

FocusSearchKernel focus_search_kernel() { return GPLWS_SELECT_VARIANT(kFocusSearch).run; }

}  // namespace gplws::cpu
