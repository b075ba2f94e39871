// The way into the kernel from exceptions and interrupts, and to programs of ring 3 and back. 32-bit.
    .text
    .code32

    // Vectors with an error code of their own: #DF, #TS, #NP, #SS, #GP, #PF, #AC, #CP (Intel SDM vol. 3A table 6-1).
    .balign 16
    .globl trap_stubs
trap_stubs:                     // 16 bytes each
    vector = 0
    .rept 256
    .balign 16
    .if (vector != 8) && (vector < 10 || vector > 14) && (vector != 17) && (vector != 21)
    push $0
    .endif
    push $vector
    jmp common
    vector = vector + 1
    .endr

common:
    pusha
    push %ds
    push %es
    mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    cld
    push %esp
    call on_trap                // void on_trap(Trap&)
    add $4, %esp
    pop %es
    pop %ds
    popa
    add $8, %esp                // vector and error code
    iret

// void enter_user(uint32_t eip, uint32_t ecx, uint32_t eflags): returns when leave_user() is called.
    .globl enter_user
enter_user:
    mov 4(%esp), %eax
    mov 8(%esp), %ecx
    mov 12(%esp), %edx
    push %ebp
    push %ebx
    push %esi
    push %edi
    mov %esp, kernel_stack
    push $0x23
    push $user_stack_top
    push %edx
    push $0x1b
    push %eax
    mov $0x23, %eax
    mov %eax, %ds
    mov %eax, %es
    iret

// [[noreturn]] void leave_user(): from within on_trap(); the kernel goes on behind enter_user().
    .globl leave_user
leave_user:
    mov kernel_stack, %esp
    pop %edi
    pop %esi
    pop %ebx
    pop %ebp
    ret

    .bss
    .balign 16
kernel_stack: .long 0
    .skip 8188
    .globl trap_stack_top
trap_stack_top:                 // of traps that come from ring 3

// --- what programs of ring 3 do: one thing, then int $0x80

    .section .user, "ax"        // and written: who may write is up to the kernel's page tables
    .globl user_read, user_write, user_fetch, user_call, user_hlt, user_cli, user_cr0, user_out, user_int
    .globl user_segment, user_far, user_loop
user_read:
    mov (%ecx), %eax
    int $0x80
user_write:
    mov %ecx, (%ecx)
    int $0x80
user_fetch:
    jmp *%ecx
user_call:                      // 0x81 returns, and has doubled EAX
    mov %ecx, %eax
    push $0x5678                // this stack is there afterwards
    int $0x81
    int $0x81
    pop %edx
    int $0x80
user_hlt:
    hlt
    int $0x80
user_cli:
    cli
    int $0x80
user_cr0:
    mov %cr0, %eax
    int $0x80
user_out:
    out %al, $0x80
    int $0x80
user_int:                       // a gate that is not for programs
    int $0x20
    int $0x80
user_segment:                   // a segment of the kernel's
    mov $0x10, %eax
    mov %eax, %es
    int $0x80
user_far:
    ljmp $0x08, $user_loop
user_loop:
    inc %eax
    jmp user_loop
    .balign 16
    .skip 256
user_stack_top:
    .section .note.GNU-stack, "", @progbits
