# Reads the generation of a device's configuration, two fields of it and the generation again, as a
# driver does, from a register page at 0xd0000000, again and again.  A pair of fields that are not
# equal though the generation is ends it: the device shows no such pair.
        .code64
        .globl  _start
_start:
        mov     $0xd0000000, %edi
        mov     $200000, %esi           # how many pairs are taken
next:
        mov     0xfc(%rdi), %eax
        movzwl  0x100(%rdi), %ecx
        movzwl  0x102(%rdi), %edx
        mov     0xfc(%rdi), %ebx
        cmp     %eax, %ebx
        jne     next
        cmp     %ecx, %edx
        jne     torn
        dec     %esi
        jnz     next
        mov     $'W', %al               # whole, all of them
        out     %al, $0xf4
        hlt
torn:
        mov     $'T', %al
        out     %al, $0xf4
        hlt
