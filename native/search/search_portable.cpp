// The search with 4 rows in a vector; see search_core.h.
#define DROP_LANES 4
#include "search_core.h"

void drop::search_rows_portable(const Problem& p, int64_t first, int64_t last, int64_t* changed) {
  search_rows(p, first, last, changed);
}
