#include "c_api.h"

#include "threads.h"

int drop_version(void) { return DROP_VERSION; }
const char* drop_thread_pool(void) { return drop::thread_pool_kind(); }
