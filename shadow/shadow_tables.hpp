// The shadow tables: the cache of tables that the machine really runs on, shared by all vCPUs.
//
// Reading order: MmuConfig; install (how tables are filled); bring_in_step (how they keep up with the guest);
// GuestTable and protect (tables that need no comparing); allocate (what goes when memory is short).
//
// Tables are shared: one for each (guest table, level, role), referred to by every parent whose guest parent
// refers to it, with the exact count of those references. So a change of a kernel mapping touches one table,
// not every address space.
//
// The guest writes to its tables at will. What a shadow entry was made from is remembered in the table's
// snapshot, and after a flush a table is compared with it: an entry whose origin is unchanged stays, any
// other goes. A table that keeps quiet for as long as comparing it has cost what a trap costs is
// write-protected instead, and then is in step without a look, until the guest's next write to it traps
// (Sync). When that has not happened for a while, its snapshot goes: the guest's memory is what its shadows
// were made from.
#pragma once

#include "shadow/debt.hpp"
#include "shadow/reverse_map.hpp"
#include "shadow/role.hpp"
#include "shadow/snapshots.hpp"

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <unordered_map>
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

/// A guest table's entry that was found changed.
struct TableWrite {
    GuestPhys slot;
    unsigned level = 0;
    GuestEntry before, after;
};

/// Accesses that must not go unseen.
struct Guard {
    bool read = false, write = false, fetch = false;

    /// x86 has no pages to write to or execute alone: where reads are guarded, nothing is let through.
    [[nodiscard]] bool forbids(const Access& access) const {
        return read || (access.fetch ? fetch : access.write && write);
    }
    friend Guard operator|(Guard left, Guard right) {
        return {left.read || right.read, left.write || right.write, left.fetch || right.fetch};
    }
    bool operator==(const Guard&) const = default;
};

/// Whose guards: each has its own, and all are in force.
enum class GuardOwner : std::uint8_t {
    debugger,
    guest, ///< its debug registers
};
inline constexpr std::size_t guard_owners = 2;

/// Guards by frame, whatever address leads there, and by address (of the page's first byte), whatever is
/// mapped there in any address space; but from `executable` frames, fetches at that address are let through.
struct Guards {
    std::map<GuestFrame, Guard> frames;
    std::map<GuestVirt, Guard> pages;
    std::set<std::pair<GuestVirt, GuestFrame>> executable;

    [[nodiscard]] Guard on_page(GuestVirt page, const Guard& guard, GuestFrame frame) const {
        return {guard.read, guard.write, guard.fetch && !executable.contains({page, frame})};
    }

    bool operator==(const Guards&) const = default;
};

/// All that the vCPUs' Mmus do here, they do inside `edit`.
class ShadowTables {
  public:
    /// `memory` and `pool` outlive this. `switcher` is the entry that every root carries in the reserved
    /// slot.
    ShadowTables(const GuestMemory& memory, TablePool& pool, MmuConfig config, ShadowEntry switcher);
    ~ShadowTables();
    ShadowTables(const ShadowTables&) = delete;
    ShadowTables& operator=(const ShadowTables&) = delete;
    ShadowTables(ShadowTables&&) = delete;
    ShadowTables& operator=(ShadowTables&&) = delete;

    [[nodiscard]] const MmuConfig& config() const { return config_; }
    [[nodiscard]] const GuestMemory& memory() const { return memory_; }
    [[nodiscard]] const TablePool& pool() const { return pool_; }
    [[nodiscard]] const MmuCounters& counters() const { return counters_; }
    /// The top-level slot that the switcher is in now. Moves only inside Mmu::fault.
    [[nodiscard]] unsigned reserved_slot() const { return slot_; }

    /// umbra itself has written to guest memory: what traps when the guest does it. With Sync::trap, says
    /// what has changed in tables of the guest.
    [[nodiscard]] std::vector<TableWrite> wrote(GuestPhys at, std::size_t size);

    /// The shadow entries that map `frame`, of any size. Looks through all tables unless the frame is that of
    /// a protected table.
    [[nodiscard]] std::vector<ShadowSlot> mappings(GuestFrame frame);

    /// The first invariant found broken, in words; nothing if all hold. Walks everything: for debug builds
    /// and tests.
    [[nodiscard]] std::optional<std::string> audit() const;

  private:
    friend class Mmu;

    /// While it exists, this thread alone works on the tables, and may write to them.
    struct Editing {
        std::unique_lock<std::mutex> lock;
        EditScope scope;
    };
    [[nodiscard]] Editing edit() const { return {std::unique_lock(mutex_), pool_.edit()}; }

    /// What one vCPU owes its machine.
    struct Ledger {
        explicit Ledger(std::size_t pages) : owed(pages) {}
        Debt debt;
        std::vector<bool> owed;             ///< by pool page: is in debt.tables
        std::atomic<bool> in_guest = false; ///< may use what the tables refer to
    };

    /// One page of guest memory that tables of the guest lie in.
    struct GuestTable {
        GuestFrame frame;
        std::vector<TableIndex> shadows; ///< made from it
        unsigned quiet = 0;              ///< comparisons in a row that found no change
        unsigned patience = 1;           ///< factor: how much longer to watch it before it is protected again
        bool is_protected = false;       ///< no shadow entry maps it writable: its shadows are in step
        bool open = false;               ///< but for one write, which is under way (Sync::trap)
        bool candidate = false;          ///< is in candidates_
        bool is_snapshot = false;        ///< protected; its shadows have no snapshots but itself
        bool settling = false;           ///< is in settling_
        std::uint64_t checksum = 0;      ///< as of when it became that; for the audit
        std::uint64_t since = 0;         ///< epoch of its protection
    };

    struct Table {
        TableKey key;
        std::uint32_t uses = 0;  ///< exact number of present shadow entries that refer to this table
        std::uint32_t pins = 0;  ///< vCPUs whose current root this is
        std::uint16_t links = 0; ///< present entries that refer to tables
        bool live = false;
        std::uint64_t compared = 0; ///< the epoch as of which its own entries are known to be in step
        std::uint64_t epoch = 0;    ///< the epoch as of which it and all below it were brought in step
        std::uint64_t visited = 0;
        std::uint64_t filled = 0;               ///< when a fill last went through it, by clock_
        GuestTable* guest = nullptr;            ///< null: made from no table in RAM
        std::list<TableIndex>::iterator idle{}; ///< place in idle_, while uses == 0
    };

    /// The tables below a root that must be compared after a flush, as of `structure`: those that refer to
    /// others, and those of level 1.
    struct View {
        std::uint64_t structure = 0;
        std::vector<TableIndex> upper, lowest;
    };
    enum class Collect : bool { list, compare };

    [[nodiscard]] Table& table(TableIndex index) { return tables_[TablePool::number(index)]; }
    [[nodiscard]] const Table& table(TableIndex index) const { return tables_[TablePool::number(index)]; }
    [[nodiscard]] std::span<std::byte> snapshot(TableIndex index) const {
        return std::as_writable_bytes(snapshots_.of(index)).first(shape_of(table(index).key).bytes());
    }
    [[nodiscard]] static bool is_leaf(const Table& table, ShadowEntry entry) {
        return entry.leaf(paging_4_level.level(table.key.level));
    }
    [[nodiscard]] bool is_switcher(const Table& table, unsigned slot) const {
        return table.key.level == paging_4_level.root().number && slot == slot_;
    }
    [[nodiscard]] bool is_protected(MachineFrame frame) const;
    [[nodiscard]] static bool has_snapshot(const Table& table) {
        return table.guest == nullptr || !table.guest->is_snapshot;
    }

    // Tables
    [[nodiscard]] std::optional<TableIndex> root(const TableKey& key, std::uint64_t since);
    [[nodiscard]] std::optional<TableIndex> obtain(const TableKey& key);
    [[nodiscard]] TableIndex make(const TableKey& key, TableIndex page);
    [[nodiscard]] std::optional<TableIndex> child_table(TableIndex parent, unsigned slot,
                                                        const TableKey& key);
    [[nodiscard]] std::optional<TableIndex> link(TableIndex parent, unsigned slot, const TableKey& key,
                                                 std::uint64_t rights);
    [[nodiscard]] std::optional<TableIndex> allocate();
    void evict();
    void destroy(TableIndex index);
    void reset();
    void forget_entries();
    void set_entry(TableIndex index, unsigned slot, ShadowEntry value);
    void drop_reference(ShadowEntry entry, std::list<TableIndex>::iterator place);
    void note_leaf(TableIndex index, unsigned slot, ShadowEntry entry, bool added);
    void owe(TableIndex index, bool root_gone = false);
    void stop_others();

    // Keeping up with the guest
    void bring_in_step(TableIndex root, std::uint64_t since);
    [[nodiscard]] View& view_of(TableIndex root);
    void collect(TableIndex index, View* view, Collect how);
    void compare(TableIndex index, std::vector<TableWrite>* writes = nullptr);
    void invalidate(TableIndex root, GuestVirt at);
    bool compare_entry(TableIndex index, unsigned number, GuestEntry now, std::vector<TableWrite>* writes);
    void drop_entry(TableIndex index, unsigned slot);
    void set_registers(TableIndex root, std::span<const std::uint64_t, 4> pdptes);
    [[nodiscard]] GuestEntry remembered(TableIndex index, unsigned number) const;
    void remember(TableIndex index, unsigned number, GuestEntry entry);
    void remember_all(TableIndex index);

    // Write protection
    void protect_candidates();
    void protect(std::vector<GuestTable*> pages);
    void track(std::span<GuestTable* const> pages);
    void release_snapshots();
    [[nodiscard]] std::uint64_t checksum(const GuestTable& page) const;
    void unprotect(GuestTable& page);
    void drop_written(const GuestTable& page, GuestPhys at, std::size_t size);
    void marked(const GuestWalk& walk);
    void compare_shadows(GuestTable& page, std::vector<TableWrite>& writes);
    void restrict_mappings(GuestTable& page);
    void forget(GuestTable& page);
    [[nodiscard]] bool is_live(const GuestTable& page);
    void give_up(GuestTable& page);
    [[nodiscard]] unsigned quiet_needed(const GuestTable& page) const;
    void split(TableIndex index, unsigned slot);
    void merge_quiet_pages();
    void count_protected(GuestFrame frame, int change);

    // Guards
    void set_guards(Guards guards, GuardOwner owner);
    [[nodiscard]] Guard guard_on(GuestVirt at, GuestFrame frame) const;
    [[nodiscard]] bool has_guard(GuestVirt at, const Level& level) const;
    void open_guard(GuestVirt at, GuestFrame frame);
    void close_guards();
    [[nodiscard]] Guard guard_of_entry(const Table& table, unsigned slot, MachineFrame frame) const;
    [[nodiscard]] ShadowEntry guarded_entry(TableIndex index, unsigned slot, MachineFrame frame,
                                            std::uint64_t rights);

    // Filling
    /// Whether what is installed is what the guest's tables say, or an old translation.
    enum class Remember : bool { no, yes };
    [[nodiscard]] bool install(TableIndex root, const GuestPaging& paging, const GuestWalk& walk,
                               GuestVirt at, Remember remembering);
    void pass_through(TableIndex index);
    [[nodiscard]] bool install_leaf(TableIndex index, unsigned number, GuestFrame frame, GuestVirt at,
                                    std::uint64_t rights);
    void remember_for(TableIndex index, unsigned slot, GuestEntry entry);
    void prefetch(TableIndex index, const GuestPaging& paging, const GuestWalk::Step& leaf, GuestVirt at);
    void fill_direct(TableIndex index);
    [[nodiscard]] MachineFrame machine_frame(GuestFrame frame) const;
    [[nodiscard]] bool may_be_large(GuestFrame first, const Level& level) const;
    [[nodiscard]] bool may_be_large(const Table& table, unsigned slot, GuestFrame first) const;
    [[nodiscard]] std::optional<unsigned> free_slot(const GuestPaging& paging) const;
    [[nodiscard]] bool move_slot(const GuestPaging& paging);

    const GuestMemory& memory_;
    TablePool& pool_;
    MmuConfig config_;
    ShadowEntry switcher_;
    unsigned slot_;

    mutable std::mutex mutex_;
    std::vector<Ledger*> ledgers_;

    std::uint64_t epoch_ = 1;     ///< counts flushes and INVLPGs
    std::uint64_t structure_ = 1; ///< counts changes of links between tables, and of what is protected
    std::uint64_t clock_ = 0;     ///< counts fills
    std::uint64_t visits_ = 0;
    std::uint64_t resets_ = 0;
    std::vector<Table> tables_; ///< by pool page
    Snapshots snapshots_;
    std::unordered_map<TableKey, TableIndex, TableKeyHash> by_key_;
    std::unordered_map<GuestFrame, GuestTable> guest_tables_;
    std::unordered_map<TableIndex, View> views_; ///< of roots
    std::list<TableIndex>
        idle_; ///< tables that nothing refers to (roots among them), least recently used first

    std::array<Guards, guard_owners> owned_guards_; ///< by GuardOwner
    Guards guards_;                                 ///< all of them
    /// By level, 1 to 4, and slot: what lies in a guarded page, by all such pages' addresses.
    std::array<std::array<Guard, entries_per_table>, 4> guarded_slots_{};
    std::set<std::pair<GuestVirt, GuestFrame>> open_pages_; ///< not guarded until close_guards
    std::vector<ShadowSlot> opened_;                        ///< entries that have more rights for it

    ReverseMap reverse_;
    std::vector<GuestTable*> candidates_; ///< have been quiet for long enough
    std::size_t spent_on_candidates_ = 0; ///< comparisons of them since
    std::vector<GuestTable*> settling_;   ///< have been protected, and not released since
    std::uint64_t next_release_ = 0;      ///< epoch at which they are looked at
    /// Protected tables in each 2 MB and each 1 GB of guest memory, by the first frame.
    std::unordered_map<std::uint64_t, unsigned> protected_2mb_, protected_1gb_;
    std::unordered_map<std::uint64_t, std::uint64_t>
        to_merge_; ///< 2 MB without protected tables, since this epoch
    MmuCounters counters_;
};

} // namespace umbra
