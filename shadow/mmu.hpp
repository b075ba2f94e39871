// The shadow MMU: builds and keeps the tables that the machine really runs on.
//
// Reading order: TableKey and Role (what a shadow table is built for), Debt (what must be done before the
// guest runs again), Mmu::fault (how tables are filled), Mmu::flush and Mmu::invalidate (how they keep up
// with the guest).
//
// Contract: the machine on these tables behaves as a CPU whose TLB starts empty at each flush. Guest tables
// are plain memory that the guest writes at will; nothing here is told of it. What a shadow entry was made
// from is remembered in the table's snapshot, and a flush compares: an entry whose origin is unchanged stays,
// any other goes. So a guest that returns to a known address space finds it filled. Tables are shared: one
// for each (guest table frame, level, role), referred to by every parent whose guest parent refers to it,
// with the exact count of those references.
#pragma once

#include "shadow/guest_walk.hpp"
#include "shadow/table_pool.hpp"

#include <array>
#include <list>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

namespace umbra {

/// The conditions that a shadow table was built for: a table serves only guests' accesses under these.
struct Role {
    bool user = false;         ///< maps what virtual CPL 3 may use; otherwise what virtual CPL 0 to 2 may
    bool write_protect = true; ///< CR0.WP; always true for user tables
    bool no_execute = true;    ///< EFER.NXE: decides which entries are valid
    bool user_pages_nx =
        false;             ///< kernel tables: pages of the guest's programs cannot be fetched from (CR4.SMEP)
    bool user_path = true; ///< every guest entry above this table has U/S set
    bool direct = false;   ///< a piece of a large guest page: no guest table lies behind it

    bool operator==(const Role&) const = default;
};

/// What identifies a shadow table. `frame`: the guest table; for a direct table, the first frame that it
/// maps.
struct TableKey {
    GuestFrame frame;
    unsigned level = 0;
    Role role;

    bool operator==(const TableKey&) const = default;
};

struct TableKeyHash {
    std::size_t operator()(const TableKey& key) const noexcept;
};

/// What the shadow MMU has changed that the machine may not have noticed, and which must be paid before the
/// guest runs.
struct Debt {
    /// Tables with a change to a present entry, for hosts whose KVM believes them write-protected and does
    /// not see stores by userspace: ring-0 code of the VM must touch each (DESIGN section 8, and
    /// vmm/switcher.hpp).
    std::vector<TableIndex> tables;
    bool flush = false; ///< the machine's TLB may hold what was taken away
    /// A root is gone that the machine may have loaded: even ring-0 code, which every root maps, cannot run
    /// on it.
    bool root_gone = false;

    [[nodiscard]] bool none() const { return tables.empty() && !flush; }
};

/// A range of guest-physical frames that is not RAM but may be mapped: KVM answers there, or exits.
struct DeviceWindow {
    GuestFrame first;
    std::uint64_t count = 0;
};

struct MmuConfig {
    std::vector<DeviceWindow> devices;
    MachineFrame nothing;       ///< where all other guest frames lead: a machine frame that no memory answers
    bool gigabyte_pages = true; ///< the machine can map 1 GB
    bool stores_seen = false; ///< host trait: a userspace store to a present entry is seen after a TLB flush
    unsigned first_slot = 0;  ///< the reserved top-level slot at the start
    std::vector<bool> usable_slots = std::vector<bool>(entries_per_table, true); ///< where that slot may go
};

enum class Miss {
    filled,      ///< hidden fault: the access will now succeed, or get further
    guest_fault, ///< the guest's own tables ask for the fault
    no_slot,     ///< the guest uses every top-level slot: there is no room for the switcher
};

struct MissResult {
    Miss outcome = Miss::filled;
    PageFault fault; ///< only for guest_fault
    /// With guest_fault: the guest's tables allow the fetch; only trap_user_fetch stands against it.
    bool trapped_user_fetch = false;
};

/// Events since the start, each counted where it happens.
struct MmuCounters {
    std::uint64_t fills = 0; ///< leaf entries made
    std::uint64_t upgrades =
        0; ///< of these: an entry given more rights (mostly: first write to a clean page)
    std::uint64_t guest_faults = 0;
    std::uint64_t flushes = 0;         ///< CR3 loads and the like
    std::uint64_t invalidations = 0;   ///< INVLPG
    std::uint64_t tables_compared = 0; ///< guest tables compared with their snapshots
    std::uint64_t tables_changed = 0;  ///< of these: found different
    std::uint64_t entries_dropped = 0;
    std::uint64_t tables_built = 0;
    std::uint64_t tables_reused = 0;   ///< found in the cache by their key
    std::uint64_t tables_recycled = 0; ///< taken from the cache when the pool ran out
    std::uint64_t slot_moves = 0;      ///< the reserved slot had to make room for the guest
};

class Mmu {
  public:
    /// `memory` and `pool` outlive the Mmu. `switcher` is the entry that every root carries in the reserved
    /// slot.
    Mmu(const GuestMemory& memory, TablePool& pool, MmuConfig config, ShadowEntry switcher);

    /// The paging state that later calls are about. A change of rights (WP, NXE, SMEP) or of the root takes
    /// effect with the next `root` and `fault`; what the change flushes must be said by `flush`.
    void set_paging(const GuestPaging& paging) { paging_ = paging; }
    [[nodiscard]] const GuestPaging& paging() const { return paging_; }

    /// Whether a kernel-mode fetch from a page of the guest's programs must trap, though the guest's CPU
    /// would allow it: that is how a host is told of an `iretq` to user code that does not trap by itself.
    /// Takes effect as set_paging does.
    void set_trap_user_fetch(bool trap) { trap_user_fetch_ = trap; }

    /// The machine root for virtual CPL 3 (`user`) or 0: in step with the guest's tables as of the last
    /// flush.
    [[nodiscard]] MachineFrame root(bool user);

    /// Resolves a page fault of the machine at a canonical address. `access.user`: the virtual CPL was 3.
    [[nodiscard]] MissResult fault(GuestVirt at, Access access);

    /// CR3 load, or anything else after which old translations must not be used (Intel SDM vol.
    /// 3A, 4.10.4.1).
    void flush();
    /// INVLPG: drops translations of `at` that the guest's tables no longer give.
    void invalidate(GuestVirt at);
    /// Forgets every table.
    void reset();

    [[nodiscard]] const Debt& debt() const { return debt_; }
    /// The caller has paid all of debt().
    void debt_paid();

    /// The top-level slot that the switcher is in now. Moves only inside `fault`.
    [[nodiscard]] unsigned reserved_slot() const { return slot_; }

    /// The entries that translate `at` in the machine's tables, root first (for reports and the debugger).
    [[nodiscard]] std::vector<WalkStep<MachinePhysSpace>> shadow_walk(GuestVirt at, bool user);

    [[nodiscard]] const MmuCounters& counters() const { return counters_; }
    [[nodiscard]] const TablePool& pool() const { return pool_; }

    /// The first invariant found broken, in words; nothing if all hold. Walks everything: for debug builds
    /// and tests.
    [[nodiscard]] std::optional<std::string> audit() const;

  private:
    struct Table {
        TableKey key;
        std::uint32_t uses = 0; ///< exact number of present shadow entries that refer to this table
        bool live = false;
        bool owed = false;                    ///< is in debt_.tables
        std::uint64_t epoch = 0;              ///< when its entries were last compared
        std::list<TableIndex>::iterator idle; ///< place in idle_, while uses == 0
    };

    [[nodiscard]] Table& table(TableIndex index) { return tables_[TablePool::number(index)]; }
    [[nodiscard]] const Table& table(TableIndex index) const { return tables_[TablePool::number(index)]; }
    [[nodiscard]] std::span<GuestEntry, entries_per_table> snapshot(TableIndex index) const {
        return std::span<GuestEntry, entries_per_table>(reinterpret_cast<GuestEntry*>(snapshots_.get()) +
                                                            TablePool::number(index) * entries_per_table,
                                                        entries_per_table);
    }
    [[nodiscard]] Role role(bool user) const;
    [[nodiscard]] static bool is_leaf(const Table& table, ShadowEntry entry) {
        return entry.leaf(paging_4_level.level(table.key.level));
    }

    [[nodiscard]] TableIndex root_table(bool user);
    [[nodiscard]] std::optional<TableIndex> obtain(const TableKey& key);
    [[nodiscard]] std::optional<TableIndex> child_table(TableIndex parent, unsigned slot,
                                                        const TableKey& key);
    [[nodiscard]] std::optional<TableIndex> allocate();
    void destroy(TableIndex index);
    void set_entry(TableIndex index, unsigned slot, ShadowEntry value);
    void drop_reference(ShadowEntry entry, std::list<TableIndex>::iterator place);
    void owe(TableIndex index);
    void compare(TableIndex index);
    void compare_tree(TableIndex index);
    bool compare_entry(TableIndex index, unsigned slot, GuestEntry now);
    [[nodiscard]] bool install(const GuestWalk& walk, GuestVirt at, bool user);
    [[nodiscard]] bool install_leaf(TableIndex index, const GuestWalk::Step& leaf, GuestVirt at,
                                    std::uint64_t rights);
    [[nodiscard]] MachineFrame machine_frame(GuestFrame frame) const;
    [[nodiscard]] std::optional<unsigned> free_slot() const;
    [[nodiscard]] bool move_slot();

    const GuestMemory& memory_;
    TablePool& pool_;
    MmuConfig config_;
    ShadowEntry switcher_;
    unsigned slot_;

    GuestPaging paging_;
    bool trap_user_fetch_ = false;
    std::uint64_t epoch_ = 1;   ///< counts flushes and INVLPGs
    std::uint64_t flushed_ = 1; ///< the epoch that the last flush began
    std::vector<Table> tables_; ///< by pool page
    /// By pool page: what each shadow entry was made from, as raw GuestEntry values. Bare numbers, so that
    /// nothing touches a page of it before its table is used.
    std::unique_ptr<std::uint64_t[]> snapshots_;
    std::unordered_map<TableKey, TableIndex, TableKeyHash> by_key_;
    std::list<TableIndex>
        idle_; ///< tables that nothing refers to (roots among them), least recently used first
    std::array<std::optional<TableIndex>, 2> current_; ///< roots that must not be recycled: kernel, user
    Debt debt_;
    MmuCounters counters_;
};

} // namespace umbra
