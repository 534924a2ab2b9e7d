# The boot processor starts all others by INIT and SIPI, at 0x10000 in 16-bit mode, then spins.
        .set    ICR, 0xfee00300         # the local APIC's interrupt command register, low half
        .set    OTHERS, 0xc4000         # to all but this one; level: assert
        .code64
        .globl  _start
_start:
        mov     $ICR, %ebx
        movl    $(OTHERS | 0x500), (%rbx)       # INIT
        movl    $(OTHERS | 0x600 | 0x10), (%rbx) # start-up, at page 0x10
1:      jmp     1b
