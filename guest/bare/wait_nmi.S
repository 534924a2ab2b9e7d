# Halts with interrupts off, and counts the NMIs that wake it in %rbp.  At 0x10000: what to put into
# LINT0, LINT1 (local APIC) and the IOAPIC's entry of pin 4; the PIT ticks 18 times a second.
        .set    LAPIC, 0xfee00000
        .set    IOAPIC, 0xfec00000
        .code64
        .globl  _start
_start:
        lea     stack(%rip), %rsp
        xor     %ebp, %ebp
        lea     idt(%rip), %rdi                 # entry 2: an interrupt gate to count
        lea     count(%rip), %rax
        mov     %ax, 32(%rdi)
        mov     %cs, 34(%rdi)
        movw    $0x8e00, 36(%rdi)
        shr     $16, %rax
        mov     %ax, 38(%rdi)
        mov     %rdi, idtr+2(%rip)
        lidt    idtr(%rip)
        mov     $LAPIC, %ebx
        movl    $0x1ff, 0xf0(%rbx)              # on
        mov     0x10000, %eax
        mov     %eax, 0x350(%rbx)
        mov     0x10004, %eax
        mov     %eax, 0x360(%rbx)
        mov     $IOAPIC, %ebx
        movl    $0x19, (%rbx)                   # to local APIC 0
        movl    $0, 0x10(%rbx)
        movl    $0x18, (%rbx)
        mov     0x10008, %eax
        mov     %eax, 0x10(%rbx)
        mov     $0x34, %al                      # PIT channel 0: rate generator, 65536
        out     %al, $0x43
        xor     %eax, %eax
        out     %al, $0x40
        out     %al, $0x40
        cli
1:      hlt
        jmp     1b
count:
        inc     %rbp
        iretq

        .balign 16
idtr:   .word   511
        .quad   0
        .balign 16
idt:    .fill   512, 1, 0
        .fill   1024, 1, 0
stack:
