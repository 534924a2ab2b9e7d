# All vCPUs, which begin here together, compare their TSCs for ever with the highest that any of them
# has read, and count when their own is less.  Nobody waits for another.
        .set    NUMBERS, 0x3004         # handed out so far
        .set    BACKWARDS, 0x3008
        .set    WORST, 0x3010           # the longest step backwards, in ticks
        .set    LAST, 0x3018            # the highest TSC so far
        .set    COUNTS, 0x3040          # how often each vCPU has read its own
        .code64
        .globl  _start
_start:
        mov     $1, %esi
        lock xadd %esi, NUMBERS
read:   mov     LAST, %rbx
        lfence
        rdtsc
        lfence
        shl     $32, %rdx
        lea     (%rdx, %rax), %rcx
        mov     %rbx, %rax
        sub     %rcx, %rbx              # how far another one is ahead
        ja      less
        lock cmpxchg %rcx, LAST         # unless another one was faster
again:  incl    COUNTS(, %rsi, 4)
        jmp     read
less:   lock incl BACKWARDS
        cmp     WORST, %rbx
        jbe     again
        mov     %rbx, WORST
        jmp     again
