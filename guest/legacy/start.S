// The header and the first instructions of a 32-bit guest kernel, assembled for each format with one of
//   LEGACY_MULTIBOOT1    multiboot 1: the Multiboot Specification 0.6.96
//   LEGACY_KLUDGE        the same with addresses in the header ("a.out kludge"), for a file that is no ELF
//   LEGACY_MULTIBOOT2    multiboot 2: the Multiboot2 Specification 2.0
//   LEGACY_RELOCATABLE   the same with a relocatable header tag, for an address that the image is not linked at
//   LEGACY_PVH           the ELF note of the x86/HVM direct boot ABI (Xen, docs/misc/pvh.pandoc)
//   LEGACY_PVH64         the same as it is in 64-bit ELF files
//   LEGACY_ELF32         nothing
//   LEGACY_FLAT          nothing, for a file that is no ELF, and with an entry that is not its first byte
#define MULTIBOOT1_MAGIC 0x1badb002
#define MULTIBOOT1_FLAGS 0x00000003 // modules at pages, memory map
#define MULTIBOOT1_KLUDGE_FLAGS 0x00010003
#define MULTIBOOT2_MAGIC 0xe85250d6
#define RELOCATED_FROM 0x400000 // where LEGACY_RELOCATABLE asks to be: far below the address that it is linked at
#define RELOCATED_TO 0x0ffffff

    .section .header, "a", @progbits
#if defined LEGACY_MULTIBOOT1
    .balign 4
    .long MULTIBOOT1_MAGIC, MULTIBOOT1_FLAGS, -(MULTIBOOT1_MAGIC + MULTIBOOT1_FLAGS)
#elif defined LEGACY_KLUDGE
    .balign 4
1:  .long MULTIBOOT1_MAGIC, MULTIBOOT1_KLUDGE_FLAGS, -(MULTIBOOT1_MAGIC + MULTIBOOT1_KLUDGE_FLAGS)
    .long 1b, image_begin, image_end, memory_end, _start
#elif defined LEGACY_MULTIBOOT2 || defined LEGACY_RELOCATABLE
    .balign 8
1:  .long MULTIBOOT2_MAGIC, 0, 2f - 1b, -(MULTIBOOT2_MAGIC + (2f - 1b))
    .short 1, 0                 // information request: command line, memory sizes, memory map
    .long 20, 1, 4, 6
    .balign 8
    .short 1, 1                 // another, optional: loader, modules, framebuffer
    .long 20, 2, 3, 8
    .balign 8
    .short 5, 1                 // framebuffer, optional
    .long 20, 80, 25, 0
    .balign 8
    .short 6, 0                 // modules at pages
    .long 8
#ifdef LEGACY_RELOCATABLE
    .short 10, 0                // lowest and highest address, alignment, preference: the lowest
    .long 24, RELOCATED_FROM, RELOCATED_TO, 0x10000, 1
#endif
    .short 0, 0
    .long 8
2:
#elif defined LEGACY_PVH || defined LEGACY_PVH64
    .section .note.Xen, "a", @note
    .balign 4
#ifdef LEGACY_PVH64
    .long 4, 8, 18
    .asciz "Xen"
    .long _start, 0
#else
    .long 4, 4, 18
    .asciz "Xen"
    .long _start
#endif
#elif defined LEGACY_FLAT
    .fill 16, 1, 0xcc           // int3
#elif !defined LEGACY_ELF32
#error no format
#endif

    .section .text.entry, "ax"
    .code32
    .globl _start
_start:
#ifdef LEGACY_RELOCATABLE
    // There is no stack: the only memory that is known is the boot information. Its first word serves as one.
    mov (%ebx), %edx
    lea 4(%ebx), %esp
    call 1f
1:  pop %ebp
    mov %edx, (%ebx)
    sub $1b, %ebp               // from the linked address to where the image is
    cld
    lea image_begin(%ebp), %esi
    mov $image_begin, %edi
    mov $image_end, %ecx
    sub %edi, %ecx
    rep movsb
    mov $2f, %ecx
    jmp *%ecx
2:  mov %ebp, load_offset
#endif
#if defined LEGACY_RELOCATABLE || defined LEGACY_FLAT
    mov %eax, %edx
    cld                         // nobody has cleared this memory
    xor %eax, %eax
    mov $image_end, %edi
    mov $memory_end, %ecx
    sub %edi, %ecx
    rep stosb
    mov %edx, %eax
#endif
    mov $stack_top, %esp
    pushf                       // of these, nothing that matters has been changed
    popl entry_flags
    mov %cr0, %ecx
    mov %ecx, entry_cr0
    mov %cr4, %ecx
    mov %ecx, entry_cr4
    cld
    xor %ebp, %ebp
#if defined LEGACY_ELF32 || defined LEGACY_FLAT
    push %esi
#else
    push %ebx
#endif
    push %eax
    call kernel_main            // int kernel_main(uint32_t eax, uint32_t information)
    push %eax
    call exit_guest             // [[noreturn]]

    .data                       // not .bss: written before that is cleared
    .globl load_offset, entry_flags, entry_cr0, entry_cr4
    .balign 4
load_offset: .long 0
entry_flags: .long 0
entry_cr0: .long 0
entry_cr4: .long 0

    .bss
    .balign 16
    .skip 16384
stack_top:
    .section .note.GNU-stack, "", @progbits
