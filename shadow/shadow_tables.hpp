// The shadow tables: the cache of tables that the machine really runs on, shared by all vCPUs.
//
// They are several parts, each a file that can be read alone, in this order (shadow/README.md has the
// picture):
//
//   table_store   which tables there are, what refers to what; the only place where an entry changes
//   tracker       how they keep up with the guest's writes to its own tables
//   guards        accesses that must not go unseen
//   leaves        what a leaf may be, by all of the above
//   table_cache   where a table comes from that is wanted, and which goes
//   filler        how tables are filled after a fault
//
// ShadowTables has them, and the lock: who wants a part has to ask for it by `edit`.
#pragma once

#include "shadow/filler.hpp"

#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace umbra {

/// What works together on the tables.
struct ShadowParts {
    ShadowParts(const GuestMemory& guest, TablePool& pool, MmuConfig how, ShadowEntry switcher);

    /// Forgets every table.
    void reset();
    /// The guest has begun to use the reserved slot: moves the switcher to another, in every root. False if
    /// the guest uses them all.
    [[nodiscard]] bool move_slot(const GuestPaging& paging);
    void set_guards(Guards wanted, GuardOwner owner);
    void close_guards();

    const GuestMemory& memory;
    MmuConfig config;
    MmuCounters counters;
    TableStore store;
    Tracker tracker;
    GuardSet guards;
    Leaves leaves;
    TableCache cache;
    Filler filler;
    std::uint64_t resets = 0;
};

/// The first invariant found broken, in words; nothing if all hold. Walks everything.
[[nodiscard]] std::optional<std::string> audit(const ShadowParts& parts);

class ShadowTables {
  public:
    /// `memory` and `pool` outlive this. `switcher` is the entry that every root carries in the reserved
    /// slot.
    ShadowTables(const GuestMemory& memory, TablePool& pool, MmuConfig config, ShadowEntry switcher)
        : parts_(memory, pool, std::move(config), switcher) {}
    ~ShadowTables() = default;
    ShadowTables(const ShadowTables&) = delete;
    ShadowTables& operator=(const ShadowTables&) = delete;
    ShadowTables(ShadowTables&&) = delete;
    ShadowTables& operator=(ShadowTables&&) = delete;

    [[nodiscard]] const MmuConfig& config() const { return parts_.config; }
    [[nodiscard]] const TablePool& pool() const { return parts_.store.pool(); }
    [[nodiscard]] const MmuCounters& counters() const { return parts_.counters; }
    /// The top-level slot that the switcher is in now. Moves only inside Mmu::fault.
    [[nodiscard]] unsigned reserved_slot() const { return parts_.store.reserved_slot(); }

    /// While it exists, this thread alone works on the tables, and may write to them.
    class Editing {
      public:
        explicit Editing(ShadowTables& tables)
            : lock_(tables.mutex_), scope_(tables.pool().edit()), parts_(tables.parts_) {}

        ShadowParts* operator->() const { return &parts_; }
        ShadowParts& operator*() const { return parts_; }

      private:
        std::unique_lock<std::mutex> lock_;
        EditScope scope_;
        ShadowParts& parts_;
    };
    [[nodiscard]] Editing edit() { return Editing(*this); }

    /// umbra itself has written to guest memory: what traps when the guest does it. With Sync::trap, says
    /// what has changed in tables of the guest.
    [[nodiscard]] std::vector<TableWrite> wrote(GuestPhys at, std::size_t size);
    /// The shadow entries that map `frame`, of any size. Looks through all tables unless the frame is that of
    /// a protected table.
    [[nodiscard]] std::vector<ShadowSlot> mappings(GuestFrame frame) const;
    /// `audit` of the parts: for debug builds and tests.
    [[nodiscard]] std::optional<std::string> audit() const;

  private:
    mutable std::mutex mutex_;
    ShadowParts parts_;
};

} // namespace umbra
