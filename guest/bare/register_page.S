# Reads and writes of a device whose registers are a read-only memory slot at 0xd0000000,
# with an ioeventfd on writes of 1 to offset 0x50: only the last two stores are seen in user space.
        .code64
        .globl  _start
_start:
        mov     $0xd0000000, %ebx
        mov     (%rbx), %eax            # no exit: the page is memory
        mov     0x60(%rbx), %ecx
        movl    $1, 0x50(%rbx)          # no exit: the kernel signals an eventfd
        movl    $1, 0x50(%rbx)
        movl    $2, 0x50(%rbx)          # not the value the eventfd wants: an exit
        add     %ecx, %eax
        mov     %eax, 0x70(%rbx)        # an exit that shows what the loads gave
        hlt
