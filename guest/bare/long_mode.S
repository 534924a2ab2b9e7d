# 64-bit registers, the stack and the addresses above 2 GiB work.
        .code64
        .globl  _start
_start:
        mov     %rsi, %rax              # boot_params, as the boot protocol passes it
        out     %eax, $0x80
        movabs  $0x123456789abcdef0, %rax
        push    %rax
        pop     %r9
        ror     $32, %r9
        mov     %r9, %rax
        out     %eax, $0x80             # the upper half: 0x12345678
        mov     %cs, %eax
        out     %eax, $0x80
        mov     %ds, %eax
        out     %eax, $0x80
        pushfq
        pop     %rax
        and     $0x200, %eax            # the interrupt flag
        out     %eax, $0x80
        call    print_sum
        hlt
print_sum:
        movabs  $0x100000000, %rcx      # needs 33 bits
        lea     -1(%rcx), %rax
        out     %eax, $0x80             # 0xffffffff
        ret
