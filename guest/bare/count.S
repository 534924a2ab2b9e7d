# Counts at 0x180000 for as long as it runs, with any other vCPU that does.
        .code64
        .globl  _start
_start:
        mov     $0x180000, %ebx
1:      lock incl (%rbx)
        jmp     1b
