# An invalid opcode while the IDT is empty: #UD, then #GP, then a double fault, then shutdown.
        .code64
        .globl  _start
_start:
        ud2
