// The numbers of a run, for `--stats`.
#pragma once

#include "shadow/mmu.hpp"
#include "vmm/devices/platform.hpp"
#include "vmm/trap_log.hpp"

#include <optional>
#include <string>
#include <vector>

namespace umbra {

struct Stats {
    /// Traps of one reason that met one action, of which there was at least one.
    struct Traps {
        TrapReason reason{};
        TrapAction action{};
        std::uint64_t count = 0;
        double microseconds = 0; ///< in umbra: from the guest's stop until it could go on
    };
    struct Shadow {
        MmuCounters counters;
        std::size_t pages_in_use = 0; ///< of the table pool, 4 KB each
        std::size_t pages_high_water = 0;
        std::size_t pages_capacity = 0;
    };

    double wall_seconds = 0;                        ///< of the guest's run
    std::uint64_t exits = 0;                        ///< Vcpu::exits
    std::vector<Traps> traps;                       ///< by time in umbra, most first
    std::vector<TrapLog::Instruction> instructions; ///< that trapped, most frequent first
    std::uint64_t ahead = 0;                        ///< TrapLog::ahead
    std::optional<Shadow> shadow;                   ///< only of an engine with shadow tables
    UnclaimedAccesses unclaimed;
};

/// `mmu`: nullptr for an engine without one. `ticks_per_us`: ticks_per_microsecond().
[[nodiscard]] Stats gather_stats(const TrapLog& log, const Mmu* mmu, const UnclaimedAccesses& unclaimed,
                                 std::uint64_t exits, double wall_seconds, double ticks_per_us);

/// Tables for people, at most about 100 columns.
[[nodiscard]] std::string stats_text(const Stats& stats);

/// One JSON object, indented; its keys do not change from one version of umbra to the next, though new ones
/// may come:
///   wall_seconds
///   exits    returns of KVM_RUN; what KVM does by itself is not among them
///   traps    count, microseconds, by_reason: [{reason, action, count, microseconds}]
///   instructions  {mnemonic: count}, of those that trapped
///   instructions_ahead  emulated behind them, before they could trap
///   shadow   one number for each of MmuCounters, and table_pages {in_use, high_water, capacity}; absent
///            without shadow tables
///   unclaimed_accesses  port_reads, port_writes, mmio_reads, mmio_writes
[[nodiscard]] std::string stats_json(const Stats& stats);

} // namespace umbra
