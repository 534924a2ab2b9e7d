# Sends INIT to all others, and start-up too if there is code for them at 0x10000; then halts with
# interrupts off.  It says nothing of that to anybody.
        .set    ICR, 0xfee00300         # the local APIC's interrupt command register, low half
        .set    OTHERS, 0xc4000         # to all but this one; level: assert
        .code64
        .globl  _start
_start:
        mov     $ICR, %ebx
        movl    $(OTHERS | 0x500), (%rbx)       # INIT
        cmpb    $0, 0x10000
        je      1f
        movl    $(OTHERS | 0x600 | 0x10), (%rbx) # start-up, at page 0x10
1:      cli
        hlt
        jmp     1b
