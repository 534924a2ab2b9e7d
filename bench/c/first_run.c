/*
 * LD_PRELOAD into a VMM: when its first guest instruction has been executed.
 *
 * The first KVM_RUN returns when the guest has done something that needs the VMM; for the guest of
 * guests/first_instruction.S that is its second instruction.  That moment goes, as CLOCK_MONOTONIC
 * nanoseconds, into the first eight bytes of the memory file with the number FIRST_RUN_FD.  It is
 * mapped before the VMM begins, because a jailed one has closed what it inherited, and may make no
 * system call but its own.  All other calls of ioctl() pass through, so nothing of the VMM is
 * changed, whichever language it is written in.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

static long long *first_run_ns;

__attribute__((constructor)) static void map_memory(void)
{
    const char *from = getenv("FIRST_RUN_FD");
    void *place = MAP_FAILED;

    if (from)
        place = mmap(NULL, sizeof *first_run_ns, PROT_READ | PROT_WRITE, MAP_SHARED, atoi(from), 0);
    if (place != MAP_FAILED)
        first_run_ns = place;
}

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
        struct timespec time;
        clock_gettime(CLOCK_MONOTONIC, &time);
        if (first_run_ns)
            *first_run_ns = time.tv_sec * 1000000000ll + time.tv_nsec;
    }
    return result;
}
