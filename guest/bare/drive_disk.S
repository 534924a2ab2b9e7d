# Drives the disk in the first slot, round after round: writes a sector, waits in HLT for the
# interrupt, reads it back and compares.  A round counts at COUNTER.  The host sets, at the end of
# the code, how many rounds there are, whether the ring is packed, and whether there is a second
# vCPU, which then counts in 16-bit mode for ever.  At the end the guest says what it has received
# at the UART, which interrupts once its pin is unmasked, and reports status 0.
#include "disk.inc"
        .code64
        .globl  _start
        .set    COUNTER, 0x180000
        .set    OTHER_COUNTER, 0x18000
        .set    OTHER_ENTRY, 0x10000
        .set    UART_LINE, 4
_start:
        lea     stack_top(%rip), %rsp
        lea     uart_interrupted(%rip), %rax
        lea     idt + 16 * (VECTOR + 1)(%rip), %rdi
        call    set_gate
        take_interrupts
        movl    $0x11 + 2 * UART_LINE, (%rdi)
        movl    $0, 0x10(%rdi)
        movl    $0x10 + 2 * UART_LINE, (%rdi)
        movl    $0x18000 + VECTOR + 1, 0x10(%rdi)       # level, and masked until the end
        mov     $COM1 + 1, %edx
        mov     $1, %al                 # IER: received data interrupts
        out     %al, %dx

        cmpl    $0, has_other(%rip)
        je      disk
        lea     other(%rip), %rsi
        mov     $OTHER_ENTRY, %edi
        mov     $other_end - other, %ecx
        rep movsb
        movl    $0xc4500, 0x300(%r15)   # INIT, to all but this one
        movl    $0xc4610, 0x300(%r15)   # start-up, at page 0x10

disk:   start_disk
        mov     $101, %al
        cmpl    $15, 0x70(%r13)
        jne     fail
        mov     $16, %r9d
        mov     $512, %r10d

round:
        mov     COUNTER, %eax
        cmp     rounds(%rip), %eax
        je      finish
        and     $0x3f, %eax
        mov     %eax, 8(%rbp)           # of 64
        mov     COUNTER, %eax
        inc     %eax
        lea     0x200(%rbp), %rdi
        mov     $128, %ecx
        rep stosl
        movl    $1, (%rbp)              # VIRTIO_BLK_T_OUT
        lea     0x200(%rbp), %rsi
        xor     %r8d, %r8d              # the device reads it
        call    request
        test    %al, %al
        jnz     broken
        lea     0x400(%rbp), %rdi
        mov     $-1, %eax
        mov     $128, %ecx
        rep stosl
        movl    $0, (%rbp)              # VIRTIO_BLK_T_IN
        lea     0x400(%rbp), %rsi
        mov     $2, %r8d                # the device writes it
        call    request
        test    %al, %al
        jnz     broken
        lea     0x200(%rbp), %rsi
        lea     0x400(%rbp), %rdi
        mov     $128, %ecx
        repe cmpsl
        mov     $102, %al
        jne     fail
        incl    COUNTER
        jmp     round

finish:
        cmpl    $0, has_other(%rip)
        je      2f
        mov     OTHER_COUNTER, %eax
1:      pause                           # until the other vCPU has counted on
        cmp     OTHER_COUNTER, %eax
        je      1b
2:      mov     $IOAPIC, %edi
        movl    $0x10 + 2 * UART_LINE, (%rdi)
        movl    $0x8000 + VECTOR + 1, 0x10(%rdi)
3:      cli
        cmpl    $0, uart_interrupts(%rip)
        jne     4f
        sti
        hlt
        jmp     3b
4:      xor     %eax, %eax
        out     %al, $0xf4
        hlt

broken:
        mov     $103, %al
fail:                                   # why: 101 and so on
        out     %al, $0xf4
        hlt

        disk_routines

uart_interrupted:
        push    %rax
        push    %rdx
        mov     $COM1 + 5, %edx
1:      in      %dx, %al                # LSR
        test    $1, %al
        jz      2f
        mov     $COM1, %edx
        in      %dx, %al
        out     %al, %dx
        mov     $COM1 + 5, %edx
        jmp     1b
2:      incl    uart_interrupts(%rip)
        movl    $0, 0xb0(%r15)
        pop     %rdx
        pop     %rax
        iretq

        .code16
other:
        mov     $OTHER_COUNTER >> 4, %ax
        mov     %ax, %ds
1:      lock incl 0
        jmp     1b
other_end:
        .code64

        .balign 4
uart_interrupts:
        .long   0
        disk_storage
        .balign 4
rounds:
        .long   1
is_packed:
        .long   0
has_other:
        .long   0
