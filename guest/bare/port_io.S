# Port I/O of every size, both directions, single and repeated.
        .code64
        .globl  _start
_start:
        mov     $0x11, %eax
        out     %al, $0x80              # one byte, port in the instruction
        mov     $0x3f8, %edx
        mov     $0x2233, %eax
        out     %ax, %dx                # two bytes, port in dx
        mov     $0x44556677, %eax
        out     %eax, %dx               # four bytes

        in      $0x60, %al              # what it reads comes out again, plus one
        inc     %al
        out     %al, $0x80

        mov     $text, %esi             # five bytes, as one exit or several
        mov     $5, %ecx
        cld
        rep outsb

        mov     $buffer, %edi           # three bytes in, and out again
        mov     $3, %ecx
        rep insb
        mov     $buffer, %esi
        mov     $3, %ecx
        rep outsb

        hlt
text:   .ascii  "hello"
buffer: .skip   3
