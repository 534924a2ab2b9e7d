# Prints dots, a few at a time where instructions are interpreted.
        .code64
        .globl  _start
_start:
        mov     $0x3f8, %edx
        mov     $'.', %al
        outb    %al, %dx
        mov     $5000, %ecx
1:      dec     %ecx
        jnz     1b
        jmp     _start
