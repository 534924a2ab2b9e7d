# The shortest guest.
        .code64
        .globl  _start
_start:
        hlt
