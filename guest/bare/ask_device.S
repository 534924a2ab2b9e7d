# Drives a virtio device that it knows nothing of but what it was told on the command line: the last
# virtio_mmio.device=4K@0xBASE:GSI there.  It sends one chain, "hello" to be read and 64 bytes to be
# written, waits in HLT for the interrupt, prints what was written on the UART, and reports how many
# devices the command line announced as its exit status.
        .code64
        .globl  _start
        .set    VECTOR, 0x40
        .set    QUEUE, 0x400000         # descriptors, avail at +0x1000, used at +0x2000
        .set    ANSWER, 0x403000
        .set    COM1, 0x3f8
_start:
        lea     stack_top(%rip), %rsp
        mov     0x228(%rsi), %esi       # boot_params.hdr.cmd_line_ptr
        xor     %r12d, %r12d            # devices seen; %r13 base, %r14 line of the last one
scan:
        movzbl  (%rsi), %eax
        test    %al, %al
        jz      scanned
        inc     %rsi
        cmpl    $0x30404b34, -1(%rsi)   # "4K@0", an x comes next
        jne     scan
        add     $4, %rsi                # behind "4K@0x"
        inc     %r12d
        xor     %r13d, %r13d
base:
        movzbl  (%rsi), %eax
        inc     %rsi
        sub     $'0', %eax
        cmp     $10, %eax
        jb      base_digit
        sub     $'a' - '0' - 10, %eax   # ':' is far below 'a'
        cmp     $16, %eax
        jae     line_begins
base_digit:
        shl     $4, %r13
        add     %rax, %r13
        jmp     base
line_begins:
        xor     %r14d, %r14d
line:
        movzbl  (%rsi), %eax
        sub     $'0', %eax
        cmp     $10, %eax
        jae     scan
        imul    $10, %r14d
        add     %eax, %r14d
        inc     %rsi
        jmp     line

scanned:
        mov     $1, %al                 # no device at all, or none at that address
        test    %r12d, %r12d
        jz      fail
        mov     $2, %al
        cmpl    $0x74726976, (%r13)     # MagicValue
        jne     fail

        # The interrupt: a gate, the 8259 pair off, the local APIC, the IOAPIC's pin of that line.
        lea     interrupted(%rip), %rax
        lea     idt + 16 * VECTOR(%rip), %rdi
        mov     %ax, (%rdi)
        movw    $0x10, 2(%rdi)          # __BOOT_CS
        movw    $0x8e00, 4(%rdi)        # present, 64-bit interrupt gate
        shr     $16, %rax
        mov     %ax, 6(%rdi)
        lea     idt(%rip), %rax
        mov     %rax, idtr + 2(%rip)
        lidt    idtr(%rip)
        mov     $0xff, %al
        out     %al, $0x21
        out     %al, $0xa1
        mov     $0xfee00000, %r15d      # the local APIC
        movl    $0x1ff, 0xf0(%r15)      # on
        mov     $0xfec00000, %edi       # the IOAPIC
        lea     0x11(,%r14,2), %eax
        mov     %eax, (%rdi)
        movl    $0, 0x10(%rdi)          # to the first CPU
        dec     %eax
        mov     %eax, (%rdi)
        movl    $VECTOR, 0x10(%rdi)     # fixed, edge, active high, not masked

        # 3.1.1 "Device Initialization", with one split queue of 8.
        mov     %r13, %rdi
        movl    $0, 0x70(%rdi)          # Status
        movl    $1, 0x70(%rdi)
        movl    $3, 0x70(%rdi)
        movl    $1, 0x24(%rdi)          # DriverFeaturesSel
        movl    $1, 0x20(%rdi)          # VIRTIO_F_VERSION_1
        movl    $11, 0x70(%rdi)
        movl    $0, 0x30(%rdi)          # QueueSel
        movl    $8, 0x38(%rdi)          # QueueNum
        movl    $QUEUE, 0x80(%rdi)
        movl    $QUEUE + 0x1000, 0x90(%rdi)
        movl    $QUEUE + 0x2000, 0xa0(%rdi)
        movl    $1, 0x44(%rdi)          # QueueReady
        movl    $15, 0x70(%rdi)
        mov     $3, %al
        cmpl    $15, 0x70(%rdi)
        jne     fail

        mov     $QUEUE, %ebx
        lea     question(%rip), %rax
        mov     %rax, (%rbx)            # "hello", then descriptor 1
        movl    $5, 8(%rbx)
        movl    $1 << 16 | 1, 12(%rbx)
        movq    $ANSWER, 16(%rbx)       # to be written
        movl    $64, 24(%rbx)
        movl    $2, 28(%rbx)
        movl    $1 << 16, 0x1000(%rbx)  # avail.idx is 1, its first entry descriptor 0
        movl    $0, 0x50(%rdi)          # QueueNotify
wait:
        cli
        cmpl    $0, interrupts(%rip)
        jne     answered
        sti
        hlt
        jmp     wait

answered:
        mov     $4, %al
        cmpw    $1, 0x2002(%rbx)        # used.idx
        jne     fail
        mov     0x2008(%rbx), %ecx      # bytes written
        mov     $ANSWER, %esi
        mov     $COM1, %edx
        rep outsb
        mov     %r12d, %eax
        out     %al, $0xf4
        hlt

fail:                                   # 101 and so on: why
        add     $100, %al
        out     %al, $0xf4
        hlt

interrupted:
        push    %rax
        mov     0x60(%r13), %eax        # InterruptStatus
        mov     %eax, 0x64(%r13)        # InterruptACK
        incl    interrupts(%rip)
        movl    $0, 0xb0(%r15)          # end of interrupt
        pop     %rax
        iretq

        .balign 16
question:
        .ascii  "hello"
        .balign 16
interrupts:
        .long   0
idtr:
        .word   16 * (VECTOR + 1) - 1
        .quad   0
        .balign 16
idt:
        .fill   16 * (VECTOR + 1)
        .fill   256
stack_top:
