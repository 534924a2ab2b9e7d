/*
 * The least a VMM can do between two MMIO exits: nothing.
 *
 *   mmio_exits GUEST
 *
 * GUEST is guests/mmio_loop.S as a flat binary for 0x100000.  It runs in 64-bit mode, set up as
 * pyvmm/x86/cpu.py does, and every store it makes is an exit to this loop, which goes straight
 * back.  Its first port access ends it.  One line comes out: "exits N".
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

enum { RAM = 2 << 20, ENTRY = 0x100000, PML4 = 0x9000, PDPT = 0xa000 };

static void die(const char *what)
{
    fprintf(stderr, "mmio_exits: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int try(int result, const char *what)
{
    if (result < 0)
        die(what);
    return result;
}

static void *map(size_t size, int flags, int fd)
{
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);

    if (at == MAP_FAILED)
        die("mmap");
    return at;
}

/* The first 4 GiB onto themselves, in 2 MiB pages. */
static void write_page_tables(uint8_t *ram)
{
    uint64_t *pml4 = (void *)(ram + PML4), *pdpt = (void *)(ram + PDPT);

    pml4[0] = PDPT | 3;
    for (uint64_t gib = 0; gib < 4; gib++) {
        uint64_t directory = PDPT + 0x1000 * (gib + 1);
        pdpt[gib] = directory | 3;
        for (uint64_t page = 0; page < 512; page++)
            ((uint64_t *)(ram + directory))[page] = (gib << 30 | page << 21) | 0x83;
    }
}

static void enter_long_mode(int vcpu)
{
    struct kvm_sregs sregs;
    struct kvm_segment code = { .limit = 0xffffffff, .selector = 0x10, .type = 0xb, .present = 1,
                                .s = 1, .l = 1, .g = 1 };
    struct kvm_segment data = { .limit = 0xffffffff, .selector = 0x18, .type = 0x3, .present = 1,
                                .s = 1, .db = 1, .g = 1 };
    struct kvm_regs regs = { .rip = ENTRY, .rsp = 0x1fff0, .rflags = 2 };

    try(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
    sregs.cs = code;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.cr3 = PML4;
    sregs.cr4 = 1 << 5;                                  /* PAE */
    sregs.cr0 = 1u << 31 | 1 << 5 | 1 << 4 | 1 << 1 | 1; /* PG NE ET MP PE */
    sregs.efer = 1 << 10 | 1 << 8;                       /* LMA LME */
    try(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
    try(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

/* What this host can do: a CPU without long mode cannot be put into it. */
static void set_cpuid(int kvm, int vcpu)
{
    enum { ENTRIES = 256 };
    struct kvm_cpuid2 *cpuid = calloc(1, sizeof *cpuid + ENTRIES * sizeof *cpuid->entries);

    if (!cpuid)
        die("calloc");
    cpuid->nent = ENTRIES;
    try(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid), "KVM_GET_SUPPORTED_CPUID");
    try(ioctl(vcpu, KVM_SET_CPUID2, cpuid), "KVM_SET_CPUID2");
    free(cpuid);
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fputs("usage: mmio_exits GUEST\n", stderr);
        return 1;
    }
    int guest = try(open(argv[1], O_RDONLY), argv[1]);
    int kvm = try(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
    int vm = try(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    uint8_t *ram = map(RAM, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    struct kvm_userspace_memory_region slot = { .memory_size = RAM,
                                                .userspace_addr = (uintptr_t)ram };

    try(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000), "KVM_SET_TSS_ADDR");
    try(ioctl(vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
    try(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot), "KVM_SET_USER_MEMORY_REGION");
    try(read(guest, ram + ENTRY, RAM - ENTRY), argv[1]);
    write_page_tables(ram);
    int vcpu = try(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    int size = try(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
    const struct kvm_run *run = map(size, MAP_SHARED, vcpu);
    set_cpuid(kvm, vcpu);
    enter_long_mode(vcpu);

    uint64_t exits = 0;
    do {
        try(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
        exits++;
    } while (run->exit_reason == KVM_EXIT_MMIO);
    if (run->exit_reason != KVM_EXIT_IO) {
        fprintf(stderr, "mmio_exits: exit reason %u\n", run->exit_reason);
        return 1;
    }
    printf("exits %llu\n", (unsigned long long)exits);
    return 0;
}
