# What a stock kernel needs and an incomplete KVM lacks, each tried from an entry of its own.
# pyvmm/x86/trial.py holds the bytes and says what they answer; the offsets are a contract with it.
        .code64
        .globl  _start
        .set    REPORT, 0xf4
        .set    PIC_COMMAND, 0x20
        .set    PIC_DATA, 0x21
_start:
try_iretq:                              # 0x00: return to the next instruction
        mov     %ss, %eax
        mov     %rsp, %rcx
        push    %rax
        push    %rcx
        pushfq
        mov     %cs, %eax
        push    %rax
        lea     returned(%rip), %rax
        push    %rax
        iretq

        .org    0x20
returned:                               # 0x20: all parts end here
        mov     $'R', %al
        out     %al, $REPORT
        hlt

        .org    0x30
try_int3:                               # 0x30: a software breakpoint, as kernels patch code
        int3
        jmp     returned

        .org    0x40
try_interrupt:                          # 0x40: IRQ 5 of the 8259 as vector 0x25
        mov     $0x11, %al              # ICW1: edge-triggered, cascaded, ICW4 follows
        out     %al, $PIC_COMMAND
        mov     $0x20, %al              # ICW2: vectors from 0x20
        out     %al, $PIC_DATA
        mov     $0x04, %al              # ICW3: slave at line 2
        out     %al, $PIC_DATA
        mov     $0x01, %al              # ICW4: 8086 mode
        out     %al, $PIC_DATA
        mov     $0xdf, %al              # OCW1: all but line 5 masked
        out     %al, $PIC_DATA
        mov     $'W', %al               # waiting: now send it
        out     %al, $REPORT
        sti
        hlt
        jmp     returned

        .org    0x70
handler:                                # 0x70: of the breakpoint and of the interrupt
        mov     $0x20, %al              # end of interrupt; harmless without one
        out     %al, $PIC_COMMAND
        mov     $'H', %al
        out     %al, $REPORT
        iretq

        .org    0x80
try_xsave:                              # 0x80: save the FPU as kernels do, if CPUID says so
        mov     $1, %eax
        cpuid
        bt      $26, %ecx
        jnc     returned
        mov     %cr4, %rax
        or      $0x40200, %eax          # OSXSAVE, OSFXSR
        mov     %rax, %cr4
        xor     %ecx, %ecx
        xgetbv                          # XCR0 is x87 alone after a reset: set it again
        xsetbv
        mov     $0x14000, %edi
        xsave64 (%rdi)
        jmp     returned
