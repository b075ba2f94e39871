# The first program of the emulated machine, as it was linked.

        .section .rodata.init, "a", @progbits
        .globl  umbra_init_begin, umbra_init_end
        .hidden umbra_init_begin, umbra_init_end
umbra_init_begin:
        .incbin UMBRA_INIT
umbra_init_end:
        .section .note.GNU-stack, "", @progbits
