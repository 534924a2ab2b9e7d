# Waits for interrupts, of which there are none: idle, but not halted for good.
        .code64
        .globl  _start
_start:
        sti
        hlt
        jmp     _start
