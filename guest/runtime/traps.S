// The way into the kernel and back: 256 trap stubs, the system call entry, and the switch to user mode. All of them build
// or unwind the same TrapFrame (traps.hpp), so that C++ sees one kind of trap.

    .set frame_vector, 15 * 8
    .set frame_rip, 17 * 8
    .set frame_cs, 18 * 8
    .set frame_rflags, 19 * 8
    .set frame_rsp, 20 * 8

    .text

    .macro push_registers
    push %rax
    push %rbx
    push %rcx
    push %rdx
    push %rsi
    push %rdi
    push %rbp
    push %r8
    push %r9
    push %r10
    push %r11
    push %r12
    push %r13
    push %r14
    push %r15
    .endm

    .macro pop_registers
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %r11
    pop %r10
    pop %r9
    pop %r8
    pop %rbp
    pop %rdi
    pop %rsi
    pop %rdx
    pop %rcx
    pop %rbx
    pop %rax
    .endm

    .balign 16
    .global trap_stubs
trap_stubs:
    .set vector, 0
    .rept 256
    .balign 16
    // These push an error code (SDM vol. 3A table 6-1); the others get a zero in its place.
    .if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30)
    pushq $0
    .endif
    pushq $vector
    jmp trap_entry
    .set vector, vector + 1
    .endr

    .balign 16
trap_entry:
    push_registers
    testb $3, frame_cs(%rsp)
    jz 1f
    swapgs
1:  cld
    mov %rsp, %rdi
    mov %rsp, %rbx
    and $-16, %rsp              // the frame is 22 words: the stack's alignment depends on who pushed it
    call dispatch_trap
    mov %rbx, %rsp
    testb $3, frame_cs(%rsp)
    jz 2f
    swapgs
2:  pop_registers
    add $16, %rsp               // vector and error code
    iretq

// Where LSTAR points. The CPU has saved RIP in RCX and RFLAGS in R11, and nothing else.
    .balign 16
    .global syscall_entry
syscall_entry:
    swapgs
    mov %rsp, %gs:8
    mov %gs:0, %rsp
    push %gs:24                 // SS
    push %gs:8                  // RSP
    push %r11                   // RFLAGS
    push %gs:16                 // CS
    push %rcx                   // RIP
    pushq $0                    // error code
    pushq $256                  // vector_syscall
    push_registers
    mov %rsp, %rdi
    call dispatch_trap          // does not return: system calls end run_user()
    ud2

// void enter_user(const TrapFrame* frame, bool by_sysret, std::uint64_t* saved_stack)
// Goes to user mode. The caller gets control back from leave_user(*saved_stack).
    .global enter_user
enter_user:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdx)
    swapgs
    test %sil, %sil
    mov %rdi, %rsp
    jnz 1f
    pop_registers
    add $16, %rsp               // vector and error code
    iretq
1:  pop_registers
    mov frame_rip - frame_vector(%rsp), %rcx
    mov frame_rflags - frame_vector(%rsp), %r11
    mov frame_rsp - frame_vector(%rsp), %rsp
    sysretq

// [[noreturn]] void leave_user(std::uint64_t saved_stack)
    .global leave_user
leave_user:
    mov %rdi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret

    .section .note.GNU-stack, "", @progbits
