# A jump to 0xd0000000, where there is nothing to execute.
        .code64
        .globl  _start
_start:
        mov     $0xd0000000, %eax
        mov     $0x1234, %ebx           # to be recognised in the registers
        jmp     *%rax
