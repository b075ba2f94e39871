/* What the benchmarks' guest and its host side agree on. */
#ifndef UMBRA_BENCH_GUEST_LOOPS_H
#define UMBRA_BENCH_GUEST_LOOPS_H

/* Guest-physical addresses: where the guest's code is loaded, and the page of its orders and answers. */
#define BENCH_IMAGE 0x100000
#define BENCH_MAILBOX 0x200000

/* The fields of the mailbox. */
#define BENCH_ROUTINE 0
#define BENCH_FIRST 8
#define BENCH_SECOND 16
#define BENCH_REMAINING 24
#define BENCH_TICKS 32

/* Bytes of the instruction that bench_sensitive is about. */
#define BENCH_SENSITIVE_SIZE 3

/* What bench_switch reads in each address space, and what bench_change's entry maps: top-level slots 1 and 2. */
#define BENCH_PRIVATE 0x8000000000
#define BENCH_KERNEL 0x10000000000

/* What bench_memory works on: a power of two. */
#define BENCH_MEMORY_BYTES 0x400000

#endif
