// What a kernel's developer is shown when the guest cannot go on.
#pragma once

#include "shadow/guest_walk.hpp"
#include "shadow/walker.hpp"
#include "vmm/cpu.hpp"
#include "vmm/symbols.hpp"
#include "vmm/trap_log.hpp"

#include <string>
#include <string_view>
#include <vector>

namespace umbra {

/// The access whose translation a report shows: that of the last page fault that was not hidden from the
/// guest, if one is among the remembered traps; otherwise the fetch at RIP.
struct ReportSubject {
    GuestVirt address;
    Access access;
    bool page_fault = false; ///< otherwise RIP
    std::size_t traps_since = 0;
};
[[nodiscard]] ReportSubject report_subject(const VirtualCpu& cpu, const TrapLog& log);

struct ReportInput {
    std::string_view why; ///< one line
    const VirtualCpu& cpu;
    const GuestMemory& memory;
    const GuestPaging& paging; ///< of `cpu`
    const TrapLog& log;
    const Symbols& symbols;
    /// Mmu::shadow_walk of the report_subject()'s address, for its access.user; empty: left out.
    std::vector<WalkStep<MachinePhysSpace>> shadow;
    double ticks_per_us = 1; ///< of the log's times: ticks_per_microsecond()
};

/// Several lines of plain ASCII, each of at most about 110 columns and ended by a newline. Reads guest memory
/// and changes nothing in it, not even accessed bits.
[[nodiscard]] std::string report(const ReportInput& input);

/// Sections of the report: registers of every kind; the last `count` traps.
[[nodiscard]] std::string report_registers(const ReportInput& input);
[[nodiscard]] std::string report_traps(const ReportInput& input, std::size_t count);

/// "kernel rw-, user r--": what a completed walk permits (Intel SDM vol. 3A, 4.6.1).
[[nodiscard]] std::string rights(const GuestWalk& walk, const GuestPaging& paging);
/// Why `walk`, which has met a fault, ended as it did: "the PDE is not present".
[[nodiscard]] std::string why_faulted(const GuestMemory& memory, const GuestPaging& paging,
                                      const GuestWalk& walk, Access access);

/// The flags of a paging-structure entry in words, in fixed columns: "P W U A D G NX", a dash for each that
/// is clear or means nothing at this level; then PWT, PCD and PAT if set. Guest's and machine's entries alike
/// (Intel SDM vol. 3A, tables 4-15 to 4-20).
template<class Space>
[[nodiscard]] std::string entry_flags(Entry<Space> entry, const Level& level);
extern template std::string entry_flags(GuestEntry, const Level&);
extern template std::string entry_flags(ShadowEntry, const Level&);

} // namespace umbra
