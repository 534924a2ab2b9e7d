# Leaves traces all over the CPU and the chips, counts in %rbx until port 0x80 reads other than 0,
# then reports what is left of them at the same port and ends at port 0xf4.
        .set    LAPIC, 0xfee00000
        .set    IOAPIC, 0xfec00000
        .code64
        .globl  _start
_start:
        mov     %cr4, %rax                      # OSFXSR and OSXMMEXCPT
        or      $0x600, %rax
        mov     %rax, %cr4
        fxrstor fxstate(%rip)                   # not ldmxcsr or movq: KVM's emulator has none
        mov     $0x123456, %eax
        mov     %rax, %dr0
        cmpl    $0, has_chips(%rip)
        je      count

        mov     $0xab, %al                      # the PICs' masks
        out     %al, $0x21
        mov     $0xcd, %al
        out     %al, $0xa1
        mov     $0x34, %al                      # PIT channel 0: rate generator, 0x1234
        out     %al, $0x43
        mov     $0x34, %al
        out     %al, $0x40
        mov     $0x12, %al
        out     %al, $0x40
        mov     $IOAPIC, %edi
        movl    $0x18, (%rdi)                   # pin 4: masked, vector 0x33
        movl    $0x10033, 0x10(%rdi)
        mov     $LAPIC, %edi
        movl    $0x1ff, 0xf0(%rdi)              # on
        movl    $0x20, 0x80(%rdi)               # task priority
        movl    $0x400ef, 0x320(%rdi)           # timer: TSC deadline, vector 0xef
        rdtsc
        add     $0x100, %edx                    # in some minutes
        mov     $0x6e0, %ecx
        wrmsr

count:  xor     %ebx, %ebx
1:      inc     %rbx
        in      $0x80, %al
        test    %al, %al
        jz      1b

        mov     %ebx, %eax
        out     %eax, $0x80
        lea     fxstate(%rip), %rdi
        movl    $0, 24(%rdi)
        fxsave  (%rdi)
        mov     24(%rdi), %eax                  # MXCSR
        out     %eax, $0x80
        mov     32(%rdi), %eax                  # ST0
        out     %eax, $0x80
        mov     272(%rdi), %eax                 # XMM7
        out     %eax, $0x80
        mov     %dr0, %rax
        out     %eax, $0x80
        cmpl    $0, has_chips(%rip)
        je      end

        xor     %eax, %eax
        in      $0xa1, %al
        out     %eax, $0x80
        mov     $LAPIC, %edi
        mov     0x80(%rdi), %eax
        out     %eax, $0x80
        mov     $IOAPIC, %edi
        movl    $0x18, (%rdi)
        mov     0x10(%rdi), %eax
        out     %eax, $0x80
end:    out     %al, $0xf4
        hlt

        .balign 16
fxstate:
        .word   0x37f, 0                        # FCW, FSW
        .byte   0x01, 0                         # FTW: ST0 is in use
        .word   0
        .quad   0, 0
        .long   0x5f80, 0                       # MXCSR: all masked, rounded up
        .quad   0x8123456789abcdef, 0x3fff      # ST0
        .fill   112, 1, 0                       # the other seven
        .fill   112, 1, 0                       # XMM0 to XMM6
        .quad   0x1122334455667788, 0           # XMM7
        .fill   224, 1, 0
has_chips: .long 1
