/* What the switcher's assembly and its C++ agree on. */
#ifndef UMBRA_SWITCHER_LAYOUT_H
#define UMBRA_SWITCHER_LAYOUT_H

/* Bytes between the stubs of two vectors. */
#define STUB_SIZE 16

/* The port of every trap: one that no in-kernel device of KVM answers. */
#define TRAP_PORT 0xe0

#endif
