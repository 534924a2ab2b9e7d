# 16-bit mode: segment arithmetic and port output.
        .code16
        .globl  _start
_start:
        mov     $0x1234, %ax
        mov     %ax, %es
        movb    $0x5a, %es:0x10         # linear 0x12350
        xor     %ax, %ax
        mov     %ax, %ds
        mov     $0x1235, %ax
        mov     %ax, %fs
        mov     %fs:0, %al              # the same byte
        mov     $0x3f8, %dx
        out     %al, %dx
        hlt
