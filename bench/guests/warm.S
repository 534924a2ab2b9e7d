# Says that it is warm, once, at pyvmm's warm port; each time that it goes on from there, it marks
# the moment at the boot timer.  Then it does nothing, without an exit.
        .include "pvh.inc"
        .code64
        .globl  _start
_start:
        mov     $1, %al
        out     %al, $0xf9
        mov     $2, %al
        out     %al, $0xf8
1:      pause
        jmp     1b
