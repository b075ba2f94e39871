// A walk through long mode, from 32-bit code and back.
    .text
    .code32

// uint32_t walk_through_64_bit_code(uint32_t value): to be called in compatibility mode. Returns value * 3 + 1, computed
// in the upper halves of registers, if two exceptions have come through 64-bit gates, one from each kind of code.
    .globl walk_through_64_bit_code
walk_through_64_bit_code:
    mov 4(%esp), %ecx
    push %ebx
    push %esi
    push %edi
    push %ebp
    sidt legacy_idt
    lidt long_idt
    ljmp $0x30, $1f

    .code64
1:  xor %r12d, %r12d
    mov %rcx, %r8
    shl $32, %r8
    lea (%r8,%r8,2), %r15
    movabs $0x100000000, %r9
    add %r9, %r15
    ud2
    shr $32, %r15
    mov %r15d, %ebx             // what 32-bit code can see
    mov %r12d, %edi
    ljmp *back_to_32_bit_code(%rip)

    .code32
2:  lea -1(%edi), %eax          // 0, if the first exception has come
    xor %esi, %esi
    ud2
    dec %esi                    // the same of the second
    or %esi, %eax
    neg %eax
    add %ebx, %eax
    lidt legacy_idt
    pop %ebp
    pop %edi
    pop %esi
    pop %ebx
    ret

    .code64
    .globl long_trap            // #UD: counted in both registers that are looked at
long_trap:
    addq $2, (%rsp)             // behind the instruction
    inc %r12d
    inc %esi
    iretq

    .data
    .balign 8
back_to_32_bit_code:
    .long 2b
    .short 0x08
    .balign 8
    .short 0
    .globl long_idt
long_idt:
    .short 7 * 16 - 1           // up to #UD
    .long long_gates, 0
    .balign 8
    .short 0
legacy_idt:
    .short 0
    .long 0
    .bss
    .balign 16
    .globl long_gates
long_gates:
    .skip 7 * 16
    .section .note.GNU-stack, "", @progbits
