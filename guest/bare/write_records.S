# Writes records to the disk in the first slot and has each made durable: record N fills sector N
# with N, a flush follows, and only then the guest says "aN" at the UART, in eight hex digits.  If
# either fails it says "eN" in its place, and goes on.  The host sets, at the end of the code, the
# number of the first record, that behind the last one, and whether the ring is packed.  At the end
# the guest reports status 0.
#include "disk.inc"
        .code64
        .globl  _start
        .set    FEATURE_FLUSH, 1 << 9
_start:
        lea     stack_top(%rip), %rsp
        take_interrupts
        start_disk FEATURE_FLUSH        # without it the device has each write durable
        mov     $101, %al
        cmpl    $15, 0x70(%r13)
        jne     report

record:
        mov     first(%rip), %eax
        cmp     end(%rip), %eax
        je      finish
        mov     %eax, 8(%rbp)           # the sector
        lea     0x200(%rbp), %rdi
        mov     $128, %ecx
        rep stosl
        movl    $1, (%rbp)              # VIRTIO_BLK_T_OUT
        mov     $16, %r9d
        lea     0x200(%rbp), %rsi
        mov     $512, %r10d
        xor     %r8d, %r8d
        call    request
        mov     %al, %r12b
        movl    $4, (%rbp)              # VIRTIO_BLK_T_FLUSH
        movl    $0, 8(%rbp)
        mov     $8, %r9d                # there is no data: the header is in two pieces
        lea     8(%rbp), %rsi
        mov     $8, %r10d
        call    request
        or      %al, %r12b
        mov     $'a', %al
        jz      1f
        mov     $'e', %al
1:      mov     $COM1, %edx
        out     %al, %dx
        mov     first(%rip), %edi
        mov     $8, %ecx
2:      rol     $4, %edi
        mov     %edi, %eax
        and     $0xf, %al
        cmp     $10, %al
        jb      3f
        add     $'a' - '0' - 10, %al
3:      add     $'0', %al
        out     %al, %dx
        loop    2b
        mov     $'\n', %al
        out     %al, %dx
        incl    first(%rip)
        jmp     record

finish:
        xor     %eax, %eax
report: out     %al, $0xf4
        hlt

        disk_routines
        disk_storage
        .balign 4
first:
        .long   0
end:
        .long   1
is_packed:
        .long   0
