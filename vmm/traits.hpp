// What kind of KVM host this is, found by trying, never by a vendor's name.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace umbra {

class Kvm;

/// The traits that umbra chooses its strategies by.
struct HostTraits {
    bool stores_seen = false;   ///< a userspace store to a present table entry is seen after a CR3 load
    bool iopl_honoured = false; ///< IOPL 3 at CPL 3: cli, sti, pushf, popf, in, out run natively and exactly
    bool own_gdt =
        false; ///< CPL 3 consults the GDT and LDT that the VM set, and faults where they are not mapped
    bool rpl_hidden = false; ///< code at CPL 3 may read CS and SS with RPL 0
    bool syscall_to_ring0 =
        false; ///< `syscall` reaches LSTAR at CPL 0; otherwise a fault on LSTAR's page is the trap
    bool cpuid_intercepted = false; ///< CPUID at CPL 3 shows what the VM set
    bool native_ring0 = false;      ///< the CPU runs the machine's ring 0; otherwise KVM interprets it
    /// The host's CPU is not QEMU's software emulation, which is not exact: it says so itself.
    bool exact_cpu = true;
};

/// Finds the traits by a few instructions in a scratch VM. About a millisecond. StartupError if KVM cannot
/// run even those.
[[nodiscard]] HostTraits probe_traits(const Kvm& kvm);

} // namespace umbra
