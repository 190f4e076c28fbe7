// Picks the variant of a kernel table for the ISA in use. Each table is defined once per ISA, in
// the namespace of that ISA; on other machines than x86-64 only the baseline exists.
#pragma once

#include "isa.h"

#define GPLWS_DECLARE_VARIANT(isa, Type, table) \
  namespace isa {                               \
  extern const Type table;                      \
  }

#if defined(__x86_64__)
#define GPLWS_DECLARE_VARIANTS(Type, table)    \
  GPLWS_DECLARE_VARIANT(baseline, Type, table) \
  GPLWS_DECLARE_VARIANT(avx2, Type, table)     \
  GPLWS_DECLARE_VARIANT(avx512, Type, table)
#define GPLWS_SELECT_VARIANT(table)          \
  (cpu_isa() == Isa::kAvx512 ? avx512::table \
   : cpu_isa() == Isa::kAvx2 ? avx2::table   \
                             : baseline::table)
#else
#define GPLWS_DECLARE_VARIANTS(Type, table) GPLWS_DECLARE_VARIANT(baseline, Type, table)
#define GPLWS_SELECT_VARIANT(table) (baseline::table)
#endif
