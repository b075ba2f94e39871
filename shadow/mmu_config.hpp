// How the shadow MMU works on this host, and what it counts.
#pragma once

#include "shadow/format.hpp"

#include <cstdint>
#include <functional>
#include <vector>

namespace umbra {

/// How shadow tables learn of the guest's writes to its tables.
enum class Sync : std::uint8_t {
    compare,  ///< by comparing with the snapshot after each flush
    protect,  ///< by write protection as soon as a table has kept quiet once
    adaptive, ///< by comparing, until that has cost as much as a trap; then by write protection
    trap,     ///< by write protection from the first use on; each write is shown to the caller
              ///< (Miss::table_write)
};

struct MmuConfig {
    /// Below it the machine has nothing that the guest may not have: its RAM, KVM's interrupt controllers,
    /// and else no memory, where an access exits with the address that the guest used. Guest frames lead to
    /// the machine frames of equal number; those from here on, all to this one, which no memory answers.
    MachineFrame nothing;
    bool gigabyte_pages = true; ///< the machine can map 1 GB
    bool stores_seen = false; ///< host trait: a userspace store to a present entry is seen after a TLB flush
    unsigned first_slot = 0;  ///< the reserved top-level slot at the start
    std::vector<bool> usable_slots = std::vector<bool>(entries_per_table, true); ///< where that slot may go
    Sync sync = Sync::adaptive;
    unsigned trap_cost = 300; ///< of the host, in comparisons of one table
    /// Flushes, about, that a table has been protected for when its snapshot is given up: so many that a
    /// system call, and the copying when the guest writes to the table again, do not count.
    unsigned settled_after = 256;
    /// Entries looked at when one is filled: a power of two up to 512. Neighbours that the guest has accessed
    /// before are filled too.
    unsigned prefetch = 16;
    bool virtual_tlb = false; ///< every flush forgets all translations: the baseline of tests/bench
    /// Asks all other vCPUs to leave the guest, and returns at once. Needed where there are several.
    std::function<void()> kick;
};

/// Events since the start, each counted where it happens.
struct MmuCounters {
    std::uint64_t fills = 0;    ///< hidden faults
    std::uint64_t upgrades = 0; ///< entries given more rights (mostly: first write to a clean page)
    std::uint64_t prefetched = 0;
    std::uint64_t guest_faults = 0;
    std::uint64_t flushes = 0;         ///< CR3 loads and the like
    std::uint64_t invalidations = 0;   ///< INVLPG
    std::uint64_t tables_compared = 0; ///< guest tables compared with their snapshots
    std::uint64_t tables_changed = 0;  ///< of these: found different
    std::uint64_t tables_protected = 0;
    std::uint64_t table_writes = 0; ///< traps of writes to protected tables
    std::uint64_t entries_dropped = 0;
    std::uint64_t tables_built = 0;
    std::uint64_t tables_reused = 0;   ///< found in the cache by their key
    std::uint64_t tables_recycled = 0; ///< taken away when the pool ran out
    std::uint64_t splits = 0;          ///< large pages taken to pieces for a protected table in them
    std::uint64_t merges = 0;          ///< and put together again
    std::uint64_t slot_moves = 0;      ///< the reserved slot had to make room for the guest
};

} // namespace umbra
