# The switcher's ring-0 code: the only code of the machine that is not the guest's.
#
# It is position independent: the launcher copies [umbra_switcher_begin, umbra_switcher_end) into monitor memory, which
# every shadow root maps, supervisor-only, in the reserved top-level slot. Some hosts interpret ring-0 code at half a
# microsecond an instruction, so a trap is one instruction here: the address of the `out` tells the vector, the
# machine's own push on the entry stack is the frame, and KVM hands over the registers.

#include "vmm/switcher_layout.h"

        .section .rodata.switcher, "a", @progbits
        .balign 4096
        .globl  umbra_switcher_begin, umbra_switcher_end
        .hidden umbra_switcher_begin, umbra_switcher_end
        .globl  umbra_switcher_syscall, umbra_switcher_done, umbra_switcher_return
        .hidden umbra_switcher_syscall, umbra_switcher_done, umbra_switcher_return
        .globl  umbra_switcher_republish, umbra_switcher_switch
        .hidden umbra_switcher_republish, umbra_switcher_switch
        .globl  umbra_switcher_in8, umbra_switcher_in16, umbra_switcher_in32
        .hidden umbra_switcher_in8, umbra_switcher_in16, umbra_switcher_in32
        .globl  umbra_switcher_out8, umbra_switcher_out16, umbra_switcher_out32
        .hidden umbra_switcher_out8, umbra_switcher_out16, umbra_switcher_out32

# One stub a vector, STUB_SIZE bytes apart. Where the monitor resumes, it sets RIP: nothing follows the `out`.
umbra_switcher_begin:
        .rept   256
        .balign STUB_SIZE
        out     %al, $TRAP_PORT
        .endr

# LSTAR. Where `syscall` reaches ring 0 it arrives with the guest's stack, which nothing here may touch.
        .balign STUB_SIZE
umbra_switcher_syscall:
        out     %al, $TRAP_PORT

# What ring 0 does for the monitor before the guest goes on: routines that find what they need on the stack, and go on by
# `ret` to the next one. They do not keep RCX, RDX and RDI.

# The last one, where the monitor itself resumes the guest.
        .balign STUB_SIZE
umbra_switcher_done:
        out     %al, $TRAP_PORT

# The last one, where ring 0 does.
        .balign STUB_SIZE
umbra_switcher_return:
        pop     %rdi
        pop     %rdx
        pop     %rcx
        iretq

# Makes KVM look again at RCX tables. On the stack for each: an address in the table that straddles two entries, and the
# eight bytes that are there already. A store across entries makes a KVM that shadows the table forget it as a whole (it
# takes the page for one that is no longer a table), whatever userspace changed.
        .balign STUB_SIZE
umbra_switcher_republish:
        pop     %rdi
        pop     (%rdi)
        loop    umbra_switcher_republish
        ret

# Loads the root on the stack, which empties the machine's TLB.
        .balign STUB_SIZE
umbra_switcher_switch:
        pop     %rdi
        mov     %rdi, %cr3
        ret

# Port accesses that KVM's own devices answer, made for a guest whose CPL 3 may not: port in DX.
        .balign STUB_SIZE
umbra_switcher_in8:
        in      %dx, %al
        ret
        .balign STUB_SIZE
umbra_switcher_in16:
        in      %dx, %ax
        ret
        .balign STUB_SIZE
umbra_switcher_in32:
        in      %dx, %eax
        ret
        .balign STUB_SIZE
umbra_switcher_out8:
        out     %al, %dx
        ret
        .balign STUB_SIZE
umbra_switcher_out16:
        out     %ax, %dx
        ret
        .balign STUB_SIZE
umbra_switcher_out32:
        out     %eax, %dx
        ret
umbra_switcher_end:

        .section .note.GNU-stack, "", @progbits
