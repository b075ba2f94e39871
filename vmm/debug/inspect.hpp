// What a debugger's user is shown of the guest's memory management: the texts of gdb's `monitor` commands
// that only look. Lines of plain ASCII, of at most about 110 columns; nothing in the guest changes.
#pragma once

#include "shadow/mmu.hpp"
#include "vmm/cpu.hpp"
#include "vmm/symbols.hpp"
#include "vmm/trap_log.hpp"

#include <cstddef>
#include <string>

namespace umbra {

struct InspectInput {
    const VirtualCpu& cpu;
    const GuestMemory& memory;
    const GuestPaging& paging; ///< of `cpu`
    const TrapLog& log;
    const Symbols& symbols;
    Mmu& mmu;
    double ticks_per_us = 1; ///< of the log's times
};

/// `pt`: the entries that translate the address in the guest's tables and in the machine's, side by side.
[[nodiscard]] std::string inspect_translation(const InspectInput& input, GuestVirt at);

enum class MapsOf : std::uint8_t { guest, shadow };
/// `maps`: ranges of pages with equal rights.
[[nodiscard]] std::string inspect_maps(const InspectInput& input, MapsOf what);

/// `vtop`, `ptov`: from virtual to physical addresses and back, in the current address space.
[[nodiscard]] std::string inspect_vtop(const InspectInput& input, GuestVirt at);
[[nodiscard]] std::string inspect_ptov(const InspectInput& input, GuestPhys at);

/// `traps`: the last ones, as far as they are remembered.
[[nodiscard]] std::string inspect_traps(const InspectInput& input, std::size_t count);
/// `regs`
[[nodiscard]] std::string inspect_registers(const InspectInput& input);

} // namespace umbra
