// The way into a program of cpufuzz and back: stubs for all vectors, system calls and call gates that save every register
// where no stack is needed, for the program's may be of no use. See machine.hpp.

    .text

// Exceptions and interrupts: 256 stubs of 32 bytes.
    .balign 32
    .global fuzz_stubs
fuzz_stubs:
    .set vector, 0
    .rept 256
    .balign 32
    movq $vector, fuzz_vector
    jmp fuzz_entered
    .set vector, vector + 1
    .endr

// What enters the kernel without a frame of an exception; numbers as in machine.hpp.
    .macro entry name, number
    .global \name
\name:
    movq $\number, fuzz_vector
    jmp fuzz_entered
    .endm
    entry fuzz_syscall_64, 256
    entry fuzz_syscall_32, 257
    entry fuzz_sysenter, 258
    entry fuzz_call_gate, 259

    .macro each_register, what
    \what %rax, 0
    \what %rcx, 1
    \what %rdx, 2
    \what %rbx, 3
    \what %rbp, 5
    \what %rsi, 6
    \what %rdi, 7
    \what %r8, 8
    \what %r9, 9
    \what %r10, 10
    \what %r11, 11
    \what %r12, 12
    \what %r13, 13
    \what %r14, 14
    \what %r15, 15
    .endm
    .macro store register, number
    mov \register, fuzz_registers + 8 * \number
    .endm
    .macro load register, number
    mov fuzz_registers + 8 * \number, \register
    .endm

fuzz_entered:
    each_register store
    mov %rsp, fuzz_registers + 8 * 4
    mov fuzz_harness_stack, %rsp
    pushq $2                    // a trap gate leaves IF, a call gate NT
    popfq
    and $-16, %rsp
    call fuzz_on_entry          // returns how to go on: machine.hpp, enum class Way
    mov %eax, fuzz_way
    each_register load
    cmpl $1, fuzz_way
    jb 4f
    je 1f
    mov fuzz_registers + 8 * 4, %rsp
    cmpl $2, fuzz_way
    jne 2f
    sysretq
2:  sysretl
1:  mov fuzz_registers + 8 * 4, %rsp
    iretq
4:  mov fuzz_harness_stack, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret

// void fuzz_enter(): goes on with fuzz_registers and the frame in fuzz_frame_with_room; returns when the program has ended.
    .global fuzz_enter
fuzz_enter:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, fuzz_harness_stack
    each_register load
    mov $fuzz_frame_with_room + 64 * 8, %rsp
    iretq

    .section .note.GNU-stack, "", @progbits
