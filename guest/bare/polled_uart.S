# A UART driver that polls: 400 characters, each after a look at LSR.  Then three without a look,
# which KVM alone knows of, and never another access.
        .code64
        .globl  _start
_start:
        xor     %ecx, %ecx
next:
        mov     $0x3fd, %edx
wait:
        in      %dx, %al
        test    $0x20, %al
        jz      wait
        mov     %ecx, %eax
        and     $15, %eax
        add     $'a', %eax
        mov     $0x3f8, %edx
        out     %al, %dx
        inc     %ecx
        cmp     $400, %ecx
        jb      next
        mov     $'!', %al
        out     %al, %dx
        out     %al, %dx
        out     %al, %dx
spin:
        jmp     spin
