# COUNT stores to ADDRESS, where there is no RAM, then status 0 to pyvmm's exit port.
        .include "pvh.inc"
        .code64
        .globl  _start
_start:
        mov     $ADDRESS, %ebx
        mov     $COUNT, %ecx
        xor     %eax, %eax
store:
        mov     %eax, (%rbx)
        dec     %ecx
        jnz     store
        out     %al, $0xf4
        hlt
