// The first instructions of every guest kernel. The loader enters here in 64-bit mode, with interrupts off and the
// boot parameters' address in RDI; it has already cleared .bss, as for any ELF segment.
    .section .text.entry, "ax"
    .global _start
_start:
    mov $boot_stack_top, %esp   // the entry state's own stack is small and shares a page with other things
    xor %ebp, %ebp              // the end of every stack trace
    call kernel_main            // int kernel_main(const BootParams&)
    mov %eax, %edi
    call exit_guest             // [[noreturn]]

    .section .bss, "aw", @nobits
    .balign 16
    .skip 32768
boot_stack_top:

    .section .note.GNU-stack, "", @progbits
