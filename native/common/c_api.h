// C interface of the library as a whole. Called through ctypes, as are search/c_api.h and
// kernels/c_api.h: everything is a pointer, an integer or a float, and strings are static.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define DROP_API __declspec(dllexport)
#else
#define DROP_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Version of the C interface: of the three headers together. Raised by every change that a Python
// side built for the old one would not survive; the loader refuses another number than its own.
#define DROP_VERSION 5
DROP_API int drop_version(void);

// Whose threads do the work: "openmp" or "std::thread" (threads.h).
DROP_API const char* drop_thread_pool(void);

#ifdef __cplusplus
}
#endif
