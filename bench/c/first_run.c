/*
 * LD_PRELOAD into a VMM: when its first guest instruction has been executed.
 *
 * The first KVM_RUN returns when the guest has done something that needs the VMM; for the guest of
 * guests/first_instruction.S that is its second instruction.  That moment goes, as CLOCK_MONOTONIC
 * nanoseconds in decimal, to the file descriptor named by FIRST_RUN_FD.  All other calls of ioctl()
 * pass through, so nothing of the VMM is changed, whichever language it is written in.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

int ioctl(int fd, unsigned long request, ...)
{
    static int (*next)(int, unsigned long, ...);
    static int reported;
    va_list args;

    va_start(args, request);
    void *argument = va_arg(args, void *);
    va_end(args);
    if (!next)
        *(void **)&next = dlsym(RTLD_NEXT, "ioctl");
    int result = next(fd, request, argument);
    /* A plain test would do for one vCPU; two could both come first. */
    if (request == KVM_RUN && result == 0 && !__atomic_exchange_n(&reported, 1, __ATOMIC_RELAXED)) {
        const char *to = getenv("FIRST_RUN_FD");
        struct timespec time;
        clock_gettime(CLOCK_MONOTONIC, &time);
        if (to)
            dprintf(atoi(to), "%lld\n", time.tv_sec * 1000000000ll + time.tv_nsec);
    }
    return result;
}
