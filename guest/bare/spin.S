# Never leaves the guest by itself.
        .code64
        .globl  _start
_start:
        jmp     _start
