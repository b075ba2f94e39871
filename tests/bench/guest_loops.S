# The code that the benchmarks time. It is position independent and needs nothing but a stack, so that the very same
# bytes run in a guest of umbra, in a bare machine and, where they are not about traps, in the benchmark's own process.

#include "tests/bench/guest_loops.h"

        .text
        .balign 4096
        .globl  bench_guest_begin, bench_guest_end
        .globl  bench_sensitive, bench_touch, bench_hash, bench_memory
        .globl  bench_write, bench_switch, bench_change, bench_invlpg, bench_write_entry

# The guest's entry: calls the routine in the mailbox, notes the time it took, tells the host by a line on the debug
# console, and begins again, until the mailbox says that it was the last time.
bench_guest_begin:
        mov     $BENCH_MAILBOX, %ebx
1:      mov     BENCH_FIRST(%rbx), %rdi
        mov     BENCH_SECOND(%rbx), %rsi
        call    bench_ticks
        mov     %rax, %r12
        call    *BENCH_ROUTINE(%rbx)
        call    bench_ticks
        sub     %r12, %rax
        mov     %rax, BENCH_TICKS(%rbx)
        mov     $'\n', %al
        out     %al, $0xe9
        decq    BENCH_REMAINING(%rbx)
        jnz     1b
        xor     %eax, %eax
        out     %al, $0xf4
        ud2

bench_ticks:
        lfence
        rdtsc
        lfence
        shl     $32, %rdx
        or      %rdx, %rax
        ret

# (times): as many sensitive instructions, one that traps at CPL 3 whatever IOPL is.
        .balign 64
bench_sensitive:
1:      mov     %cr0, %rax
        dec     %rdi
        jnz     1b
        ret

# (address, pages): reads from as many pages.
        .balign 64
bench_touch:
1:      mov     (%rdi), %rax
        add     $4096, %rdi
        dec     %rsi
        jnz     1b
        ret

# (address, pages): writes to as many pages, with a trap before and after, again and again.
        .balign 64
bench_write:
        mov     %rdi, %r8
        mov     %rsi, %r9
1:      mov     %cr0, %rax
2:      mov     %rsi, (%rdi)
        add     $4096, %rdi
        dec     %rsi
        jnz     2b
        mov     %cr0, %rax
        mov     %r8, %rdi
        mov     %r9, %rsi
        jmp     1b

# (array of CR3 values, its length): loads one after the other, and reads what each space has for itself and what all
# have in common.
        .balign 64
bench_switch:
        mov     $BENCH_PRIVATE, %r8
        mov     $BENCH_KERNEL, %r9
1:      mov     (%rdi), %rax
        mov     %rax, %cr3
        mov     (%r8), %rax
        mov     (%r9), %rax
        add     $8, %rdi
        dec     %rsi
        jnz     1b
        ret

# (page-table entry of BENCH_KERNEL, times): maps another page there, and reads it.
        .balign 64
bench_change:
        mov     $BENCH_KERNEL, %r9
1:      xorq    $0x1000, (%rdi)
        invlpg  (%r9)
        mov     (%r9), %rax
        dec     %rsi
        jnz     1b
        ret

# (address, times)
        .balign 64
bench_invlpg:
1:      invlpg  (%rdi)
        dec     %rsi
        jnz     1b
        ret

# (page-table entry, times): changes a bit of it that the CPU ignores, and flushes twice: once to see the change, and
# once to see that there is no other.
        .balign 64
bench_write_entry:
        mov     %cr3, %rdx
1:      xorq    $0x200, (%rdi)
        mov     %rdx, %cr3
        mov     %rdx, %cr3
        dec     %rsi
        jnz     1b
        ret

# (times, seed): arithmetic in registers, Knuth's MMIX generator with its state folded.
        .balign 64
bench_hash:
        mov     $6364136223846793005, %r8
        mov     $1442695040888963407, %r9
        mov     %rsi, %rax
1:      imul    %r8, %rax
        add     %r9, %rax
        mov     %rax, %rdx
        shr     $29, %rdx
        xor     %rdx, %rax
        rol     $17, %rax
        dec     %rdi
        jnz     1b
        ret

# (buffer, times): changes words of the buffer in an order that no prefetcher knows, each depending on the last.
        .balign 64
bench_memory:
        mov     $6364136223846793005, %r8
        mov     $1442695040888963407, %r9
        xor     %eax, %eax
1:      imul    %r8, %rax
        add     %r9, %rax
        mov     %rax, %rdx
        shr     $32, %rdx
        and     $(BENCH_MEMORY_BYTES - 8), %edx
        add     %rax, (%rdi,%rdx)
        xor     (%rdi,%rdx), %rax
        dec     %rsi
        jnz     1b
        ret
bench_guest_end:

        .section .note.GNU-stack, "", @progbits
