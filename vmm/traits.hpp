// What kind of KVM host this is, found by trying (DESIGN section 8), never by a vendor's name.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace umbra {

class Kvm;

/// How the machine is put back into guest code after a trap.
enum class ResumeBy : std::uint8_t {
    iretq,            ///< by an `iretq` of the switcher
    system_registers, ///< by synchronised registers straight to CPL 3: fewer instructions for a KVM that
                      ///< interprets ring 0
};

/// The traits that umbra chooses its strategies by.
struct HostTraits {
    bool stores_seen = false;   ///< a userspace store to a present table entry is seen after a CR3 load
    bool iopl_honoured = false; ///< IOPL 3 at CPL 3: cli, sti, pushf, popf, in, out run natively and exactly
    bool own_gdt = false;       ///< segment loads at CPL 3 consult the GDT that the VM set
    bool syscall_to_ring0 =
        false; ///< `syscall` reaches LSTAR at CPL 0; otherwise a fault on LSTAR's page is the trap
    bool cpuid_intercepted = false; ///< CPUID at CPL 3 shows what the VM set
    ResumeBy resume = ResumeBy::iretq;
};

/// Finds the traits by a few instructions in a scratch VM. About a millisecond. StartupError if KVM cannot
/// run even those.
[[nodiscard]] HostTraits probe_traits(const Kvm& kvm);

} // namespace umbra
