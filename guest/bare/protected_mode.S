# The state of the PVH boot ABI: 32-bit flat segments, no paging, ebx = start info, an active TSS.
        .code32
        .globl  _start
_start:
        mov     %ebx, %eax              # hvm_start_info, as the boot ABI passes it
        out     %eax, $0x80
        mov     %cr0, %eax
        and     $0x80000001, %eax       # PG and PE
        out     %eax, $0x80
        mov     %cr4, %eax
        out     %eax, $0x80
        str     %eax
        out     %eax, $0x80
        pushf
        pop     %eax
        and     $0x20300, %eax          # VM, IF, TF
        out     %eax, $0x80
        movl    $0x12345678, 0x180000   # flat data: without paging the address is physical
        mov     %es:0x180000, %eax
        out     %eax, $0x80
        hlt
