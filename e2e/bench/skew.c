// A wrong wall clock for one process: LD_PRELOAD this, and CLOCK_SKEW says by how many seconds.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>

int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    const int failed = real(id, now);
    const char *skew = getenv("CLOCK_SKEW");
    if (!failed && id == CLOCK_REALTIME && skew) now->tv_sec += atol(skew);
    return failed;
}
