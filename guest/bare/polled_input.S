# A guest that polls a UART for input, with no interrupt enabled, and echoes: a line that it looks at
# LSR for, FIFO off, then one that it reads out of RBR without a look, FIFO on.  Each begins with a
# prompt; after them it writes 42 to the debug exit.
        .code64
        .globl  _start
_start:
        mov     $0x3f8, %edi            # RBR, THR
        lea     1(%rdi), %edx           # IER: nothing
        xor     %eax, %eax
        out     %al, %dx
        mov     $'?', %al
        call    send
looked:
        lea     5(%rdi), %edx           # LSR
        in      %dx, %al
        test    $1, %al                 # DR
        jz      looked
        mov     %edi, %edx
        in      %dx, %al
        call    send
        cmp     $'\n', %al
        jne     looked

        lea     2(%rdi), %edx           # FCR: on, and cleared
        mov     $7, %al
        out     %al, %dx
        mov     $'!', %al
        call    send
blind:
        mov     %edi, %edx
        in      %dx, %al
        test    %al, %al
        jz      blind
        call    send
        cmp     $'\n', %al
        jne     blind

        mov     $42, %al
        mov     $0xf4, %edx
        out     %al, %dx
        hlt

send:                                   # %al, after a look at THRE
        mov     %eax, %ecx
        lea     5(%rdi), %edx
1:      in      %dx, %al
        test    $0x20, %al
        jz      1b
        mov     %ecx, %eax
        mov     %edi, %edx
        out     %al, %dx
        ret
