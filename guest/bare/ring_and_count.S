# Counts at 0x180000 and rings the doorbell at port 0x3f0, with any other vCPU that does.
        .code64
        .globl  _start
_start:
        mov     $0x180000, %ebx
        mov     $0x3f0, %edx
1:      lock incl (%rbx)
        out     %al, %dx
        jmp     1b
