# Loads and stores of every size at 0xd0000000, where there is no RAM.
        .code64
        .globl  _start
_start:
        mov     $0xd0000000, %ebx
        movb    $0x11, 0x10(%rbx)
        movw    $0x2233, 0x12(%rbx)
        movl    $0x44556677, 0x14(%rbx)
        mov     $0x8899aabbccddeeff, %rax
        mov     %rax, 0x18(%rbx)

        mov     (%rbx), %eax            # what it loads is stored again, inverted
        not     %eax
        mov     %eax, 4(%rbx)

        xor     %eax, %eax
        mov     1(%rbx), %al            # one byte: the rest of rax stays clear
        mov     %rax, 8(%rbx)
        hlt
