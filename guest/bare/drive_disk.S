# Drives the disk in the first slot, round after round: writes a sector, waits in HLT for the
# interrupt, reads it back and compares.  A round counts at COUNTER.  The host sets, at the end of
# the code, how many rounds there are, whether the ring is packed, and whether there is a second
# vCPU, which then counts in 16-bit mode for ever.  At the end the guest says what it has received
# at the UART, which interrupts once its pin is unmasked, and reports status 0.
        .code64
        .globl  _start
        .set    VECTOR, 0x40            # the disk's; the UART's is the next one
        .set    QUEUE, 0x400000         # descriptors, avail at +0x1000, used at +0x2000
        .set    DATA, 0x404000          # header; written at +0x200, read at +0x400; status at +0x600
        .set    COUNTER, 0x180000
        .set    OTHER_COUNTER, 0x18000
        .set    OTHER_ENTRY, 0x10000
        .set    COM1, 0x3f8
        .set    DISK, 0xd0000000
        .set    DISK_LINE, 5
        .set    UART_LINE, 4
        .set    IOAPIC, 0xfec00000
        .set    LAPIC, 0xfee00000
_start:
        lea     stack_top(%rip), %rsp
        mov     $DISK, %r13d
        mov     $LAPIC, %r15d
        lea     disk_interrupted(%rip), %rax
        lea     idt + 16 * VECTOR(%rip), %rdi
        call    set_gate
        lea     uart_interrupted(%rip), %rax
        lea     idt + 16 * (VECTOR + 1)(%rip), %rdi
        call    set_gate
        lea     idt(%rip), %rax
        mov     %rax, idtr + 2(%rip)
        lidt    idtr(%rip)
        mov     $0xff, %al              # the 8259 pair is off
        out     %al, $0x21
        out     %al, $0xa1
        movl    $0x1ff, 0xf0(%r15)      # the local APIC is on
        mov     $IOAPIC, %edi
        movl    $0x11 + 2 * DISK_LINE, (%rdi)
        movl    $0, 0x10(%rdi)          # to the first CPU
        movl    $0x10 + 2 * DISK_LINE, (%rdi)
        movl    $VECTOR, 0x10(%rdi)     # fixed, edge, active high, not masked
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

disk:   # 3.1.1 "Device Initialization"
        movl    $0, 0x70(%r13)          # Status
        movl    $1, 0x70(%r13)
        movl    $3, 0x70(%r13)
        movl    $1, 0x24(%r13)          # DriverFeaturesSel
        mov     is_packed(%rip), %eax
        lea     1(,%rax,4), %eax        # VIRTIO_F_VERSION_1, and RING_PACKED
        mov     %eax, 0x20(%r13)
        movl    $11, 0x70(%r13)
        movl    $0, 0x30(%r13)          # QueueSel
        mov     $4, %eax                # QueueNum
        cmpl    $0, is_packed(%rip)
        je      1f
        mov     $3, %eax                # then each request begins at the first descriptor
1:      mov     %eax, 0x38(%r13)
        movl    $QUEUE, 0x80(%r13)
        movl    $QUEUE + 0x1000, 0x90(%r13)
        movl    $QUEUE + 0x2000, 0xa0(%r13)
        movl    $1, 0x44(%r13)          # QueueReady
        movl    $15, 0x70(%r13)
        mov     $101, %al
        cmpl    $15, 0x70(%r13)
        jne     fail
        mov     $QUEUE, %ebx
        mov     $DATA, %ebp
        mov     $1, %r14d               # the packed ring's wrap counter

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
        lea     0x400(%rbp), %rdi
        mov     $-1, %eax
        mov     $128, %ecx
        rep stosl
        movl    $0, (%rbp)              # VIRTIO_BLK_T_IN
        lea     0x400(%rbp), %rsi
        mov     $2, %r8d                # the device writes it
        call    request
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

# One request: the header at %rbp, data at %rsi with flags %r8d, and the status.
request:
        movb    $0xff, 0x600(%rbp)
        cmpl    $0, is_packed(%rip)
        jne     packed
        mov     %rbp, (%rbx)            # header, then descriptor 1
        movl    $16, 8(%rbx)
        movl    $1 << 16 | 1, 12(%rbx)
        mov     %rsi, 16(%rbx)          # data, then descriptor 2
        movl    $512, 24(%rbx)
        lea     2 << 16 | 1(%r8), %eax
        mov     %eax, 28(%rbx)
        lea     0x600(%rbp), %rax
        mov     %rax, 32(%rbx)
        movl    $1, 40(%rbx)
        movl    $2, 44(%rbx)
        incw    0x1002(%rbx)            # avail.idx; all of its entries are descriptor 0
        movl    $0, 0x50(%r13)          # QueueNotify
split_wait:
        cli
        mov     0x1002(%rbx), %ax
        cmp     %ax, 0x2002(%rbx)       # used.idx
        je      served
        sti
        hlt
        jmp     split_wait

packed:
        mov     %r14d, %ecx             # AVAIL is the wrap counter, USED the opposite
        mov     $0x8000, %eax
        test    %ecx, %ecx
        jz      1f
        mov     $0x80, %eax
1:      lea     0x600(%rbp), %rdx
        mov     %rdx, 32(%rbx)
        movl    $1, 40(%rbx)
        lea     2(%rax), %edx
        shl     $16, %edx               # flags are behind the id, which is 0
        mov     %edx, 44(%rbx)
        mov     %rsi, 16(%rbx)
        movl    $512, 24(%rbx)
        lea     1(%rax,%r8), %edx
        shl     $16, %edx
        mov     %edx, 28(%rbx)
        mov     %rbp, (%rbx)
        movl    $16, 8(%rbx)
        lea     1(%rax), %edx
        shl     $16, %edx
        mov     %edx, 12(%rbx)          # the first one last
        movl    $0, 0x50(%r13)
packed_wait:
        cli
        movzwl  14(%rbx), %eax
        shr     $15, %eax               # USED
        cmp     %r14d, %eax
        je      wrapped
        sti
        hlt
        jmp     packed_wait
wrapped:
        xor     $1, %r14d
served:
        sti
        mov     $103, %al
        cmpb    $0, 0x600(%rbp)
        jne     fail
        ret

fail:                                   # why: 101 and so on
        out     %al, $0xf4
        hlt

set_gate:                               # at %rdi, to %rax
        mov     %ax, (%rdi)
        movw    $0x10, 2(%rdi)          # __BOOT_CS
        movw    $0x8e00, 4(%rdi)        # present, 64-bit interrupt gate
        shr     $16, %rax
        mov     %ax, 6(%rdi)
        ret

disk_interrupted:
        push    %rax
        mov     0x60(%r13), %eax        # InterruptStatus
        mov     %eax, 0x64(%r13)        # InterruptACK
        movl    $0, 0xb0(%r15)          # end of interrupt
        pop     %rax
        iretq

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

        .balign 16
uart_interrupts:
        .long   0
idtr:
        .word   16 * (VECTOR + 2) - 1
        .quad   0
        .balign 16
idt:
        .fill   16 * (VECTOR + 2)
        .fill   256
stack_top:
        .balign 4
rounds:
        .long   1
is_packed:
        .long   0
has_other:
        .long   0
