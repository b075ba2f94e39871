// An ELF core file of the guest, for gdb (System V ABI, "Object Files" and its AMD64 supplement).
//
// Always of ELFCLASS64 and EM_X86_64. RAM is in the file once, pages of zeros as holes. A PT_LOAD for each
// range that the guest maps shows it at its virtual addresses; further ones show all RAM at physical_window +
// its physical address, which is no address of any guest.
#pragma once

#include "shadow/guest_memory.hpp"
#include "shadow/guest_walk.hpp"
#include "vmm/cpu.hpp"
#include "vmm/kvm/kvm.hpp"

#include <optional>
#include <string>

namespace umbra {

/// Not canonical.
inline constexpr GuestVirt physical_window{0x4000'0000'0000'0000};

/// Replaces the regular file `path` when all is written; only the user may read it. `extended`: may be null.
/// What went wrong, if anything did, in a line without its end: `path` is as it was then, and nothing else is
/// left. Ranges beyond RangeLimits are left out with a warning in the log.
[[nodiscard]] std::optional<std::string> write_core(const std::string& path, const VirtualCpu& cpu,
                                                    const ExtendedState* extended, const GuestMemory& memory,
                                                    const GuestPaging& paging);

} // namespace umbra
