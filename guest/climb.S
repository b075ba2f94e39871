// climb: as most 64-bit kernels of one's own are, a 64-bit ELF that boot loaders enter in 32-bit protected mode, by
// multiboot 1, multiboot 2 or PVH, and whose 64-bit code is linked in the highest 2 GB. What debuggers are tried on that
// connect before the climb to long mode. Outcome: passed.

#define PAGE_PRESENT_WRITABLE 3
#define PAGE_LARGE 0x80
#define CR4_PAE (1 << 5)
#define CR0_PG (1 << 31)
#define EFER 0xc0000080
#define EFER_LME (1 << 8)
#define CODE64 0x08

    .section .boot.header, "a", @progbits
    .balign 8
1:  .long 0xe85250d6, 0, 2f - 1b, -(0xe85250d6 + (2f - 1b)) // multiboot 2, without tags
    .short 0, 0
    .long 8
2:  .long 0x1badb002, 0, -0x1badb002 // multiboot 1

    .section .note.Xen, "a", @note
    .balign 4
    .long 4, 8, 18              // XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad _start

    .section .boot.text, "ax", @progbits
    .code32
    .globl _start
    .type _start, @function
_start:
    mov $0x11223344, %ecx       // what debuggers look at on both sides of the switch
    mov $0x55667788, %esi
    mov $low_stack_top, %esp
    push $0x1234
    .globl low_code
low_code:
    inc %ecx
    dec %ecx
    mov $tables_begin, %edi
    mov $low_level3 + PAGE_PRESENT_WRITABLE, %eax
    mov %eax, (%edi)            // the first GB at 0,
    mov $high_level3 + PAGE_PRESENT_WRITABLE, %eax
    mov %eax, 511*8(%edi)       // and at -2 GB
    movl $level2 + PAGE_PRESENT_WRITABLE, low_level3
    movl $level2 + PAGE_PRESENT_WRITABLE, high_level3 + 510*8
    mov $PAGE_PRESENT_WRITABLE | PAGE_LARGE, %eax
    mov $level2, %ebx
1:  mov %eax, (%ebx)
    add $8, %ebx
    add $0x200000, %eax
    cmp $0x40000000, %eax
    jb 1b
    mov %edi, %cr3
    mov %cr4, %eax
    or $CR4_PAE, %eax
    mov %eax, %cr4
    mov %ecx, %ebp
    mov $EFER, %ecx
    rdmsr
    or $EFER_LME, %eax
    wrmsr
    mov %ebp, %ecx
    xor %ebp, %ebp
    mov %cr0, %eax
    or $CR0_PG, %eax
    mov %eax, %cr0              // compatibility mode from here
    lgdt gdt_pointer
    ljmp $CODE64, $low_code64
    .size _start, . - _start

    .code64
    .globl low_code64
low_code64:
    movabs $high_code, %rax
    jmp *%rax

    .balign 8
gdt:
    .quad 0, 0x00209b0000000000, 0x00cf93000000ffff
gdt_pointer:
    .short . - gdt - 1
    .long gdt

    .section .boot.bss, "aw", @nobits
    .balign 4096
tables_begin:
    .skip 4096
low_level3:
    .skip 4096
high_level3:
    .skip 4096
level2:
    .skip 4096
    .skip 4096
low_stack_top:

    .text
    .globl high_code
    .type high_code, @function
high_code:
    xor %eax, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $high_stack_top, %rsp
    movabs $0x0123456789abcdef, %r15
    call climb_main             // [[noreturn]]
    .size high_code, . - high_code

    .bss
    .balign 16
    .skip 4096
high_stack_top:
    .section .note.GNU-stack, "", @progbits
