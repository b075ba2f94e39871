// How shadow tables keep up with the guest's writes to its own.
//
// The guest writes to its tables at will. What a shadow entry was made from is remembered in the table's
// snapshot, and after a flush a table is compared with it: an entry whose origin is unchanged stays, any
// other goes. A table that keeps quiet (no comparison finds a change) for as long as comparing it has cost
// what a trap costs is write-protected instead, and then is in step without a look, until the guest's next
// write to it traps (Sync). When that has not happened for a while it has settled: its snapshot goes, and the
// guest's memory is what its shadows were made from.
//
// Words:
//   epoch       counts flushes and INVLPGs. A table is in step as of an epoch: nothing that the guest wrote
//               before it is missed.
//   quiet       comparisons in a row that found no change.
//   patience    how much longer than usual a table must keep quiet, because it did not keep the peace before.
//   candidate   has been quiet for long enough, and waits for others to be protected with.
//   settling    protected, with its snapshot still there.
#pragma once

#include "shadow/guest_memory.hpp"
#include "shadow/snapshots.hpp"
#include "shadow/table_store.hpp"

#include <cstdint>
#include <optional>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

namespace umbra {

/// A guest table's entry that was found changed.
struct TableWrite {
    GuestPhys slot;
    unsigned level = 0;
    GuestEntry before, after;
};

class Tracker {
  public:
    /// All of them outlive this.
    Tracker(const GuestMemory& memory, TableStore& store, const MmuConfig& config, MmuCounters& counters);

    /// `table` has just been made: in step. Its key's origin, if it lies in RAM, is tracked from now on.
    void begin(TableIndex table);
    /// `table` is about to be destroyed.
    void end(TableIndex table);
    /// All are.
    void clear();

    // --- In step

    [[nodiscard]] std::uint64_t next_epoch() { return ++epoch_; }
    /// Brings `table` and all below it in step with the guest's tables as of now.
    void renew(TableIndex table);
    /// The same for a root, unless it is so as of epoch `since`: false then.
    [[nodiscard]] bool bring_in_step(TableIndex root, std::uint64_t since);
    /// INVLPG.
    void invalidate(TableIndex root, GuestVirt at);
    /// PAE: the registers that the third level is made from (Intel SDM vol. 3A, 4.4.1).
    void set_registers(TableIndex root, std::span<const std::uint64_t, 4> pdptes);

    /// What the slots of entry `number` were made from.
    [[nodiscard]] GuestEntry remembered(TableIndex table, unsigned number) const;
    void remember(TableIndex table, unsigned number, GuestEntry entry);

    // --- Write protection

    [[nodiscard]] bool is_protected(MachineFrame frame) const;
    [[nodiscard]] bool is_protected(TableIndex table) const {
        const GuestTableIndex page = store_[table].guest;
        return page != GuestTableIndex::none && at(page).is_protected;
    }
    /// Whether a protected table lies in the large page of `level` that begins at `first`.
    [[nodiscard]] bool has_protected(GuestFrame first, unsigned level) const {
        return (level == 2 ? protected_2mb_ : protected_1gb_).contains(first.number());
    }

    /// Tables of the guest that are better protected now, several at a time; mostly none.
    [[nodiscard]] std::vector<GuestTableIndex> take_candidates();
    /// Protected pages are in step: what their shadows were made from can be read there. Gives up the
    /// snapshots of some of those that have been protected for long enough.
    void release_snapshots();
    /// Two steps, for pages that are not protected, with every vCPU out of the guest. First the reverse map
    /// learns what maps them; then, when no large page does any more, writes to them trap.
    void track(std::span<const GuestTableIndex> pages);
    void protect(std::span<const GuestTableIndex> pages);
    [[nodiscard]] GuestFrame frame_of(GuestTableIndex page) const { return at(page).frame; }

    // Of protected pages:
    /// The guest writes to it: it is compared at flushes again.
    void unprotect(GuestFrame page);
    /// Forgets what was made from it, and lets the guest write to it, until a fill goes through it again.
    void give_up(GuestFrame page);
    /// Whether the machine can reach a shadow of it from the roots in use. What it cannot reach may be no
    /// table of the guest any more.
    [[nodiscard]] bool is_live(GuestFrame page);
    /// Sync::trap: lets writes through until `close`; every vCPU is out of the guest then. False if it is no
    /// table.
    [[nodiscard]] bool open(GuestFrame page);
    void close(GuestFrame page, std::vector<TableWrite>& writes);
    /// umbra itself has written to guest memory. With Sync::trap, appends what has changed.
    void wrote(GuestPhys start, std::size_t size, std::vector<TableWrite>& writes);
    /// The CPU has set accessed and dirty bits.
    void marked(const GuestWalk& walk);

    /// 2 MB of guest memory, by their first frames, in which no table has been protected for a while.
    [[nodiscard]] std::vector<GuestFrame> take_quiet_memory();

    // --- For the audit

    /// What is broken, in words.
    [[nodiscard]] std::optional<std::string> audit(TableIndex table) const;
    [[nodiscard]] std::optional<std::string> audit_settled() const;

  private:
    struct GuestTable {
        GuestFrame frame;
        TableIndex shadows = no_table; ///< the first; the others are its siblings. None: the place is free
        unsigned quiet = 0;
        unsigned patience = 1;
        bool is_protected = false;  ///< no shadow entry maps it writable: its shadows are in step
        bool open = false;          ///< but for one write, which is under way (Sync::trap)
        bool candidate = false;     ///< is in candidates_
        bool settling = false;      ///< is in settling_
        bool is_snapshot = false;   ///< protected; its shadows have no snapshots but itself
        std::uint64_t checksum = 0; ///< as of when it became that; for the audit
        std::uint64_t since = 0;    ///< epoch of its protection
    };

    /// The tables below a root that must be compared after a flush, as of `structure`: those that refer to
    /// others, and those of level 1.
    struct View {
        std::uint64_t structure = 0;
        std::vector<TableIndex> upper, lowest;
    };
    enum class Collect : bool { list, compare };

    [[nodiscard]] GuestTable& at(GuestTableIndex page) { return pages_[static_cast<std::size_t>(page)]; }
    [[nodiscard]] const GuestTable& at(GuestTableIndex page) const {
        return pages_[static_cast<std::size_t>(page)];
    }
    [[nodiscard]] GuestTable* find(GuestFrame frame);
    [[nodiscard]] const GuestTable* find(GuestFrame frame) const;
    [[nodiscard]] GuestTableIndex obtain(GuestFrame frame);
    void forget(GuestTableIndex page);
    template<class Visit>
    void for_each_shadow(const GuestTable& page, Visit visit) const;

    [[nodiscard]] std::span<std::byte> guest(TableIndex table) const {
        const TableKey& key = store_[table].key;
        return memory_.range(key.origin, shape_of(key).bytes());
    }
    [[nodiscard]] bool has_snapshot(TableIndex table) const {
        const GuestTableIndex page = store_[table].guest;
        return page == GuestTableIndex::none || !at(page).is_snapshot;
    }
    void remember_all(TableIndex table);
    void collect(TableIndex table, View* view, Collect how);
    [[nodiscard]] View& view_of(TableIndex root);
    void compare(TableIndex table, std::vector<TableWrite>* writes = nullptr);
    bool compare_entry(TableIndex table, unsigned number, std::vector<TableWrite>* writes);
    void note_quiet(GuestTableIndex page);
    void compare_shadows(GuestTable& page, std::vector<TableWrite>& writes);
    [[nodiscard]] unsigned quiet_needed(const GuestTable& page) const;
    void restrict_mappings(const GuestTable& page);
    void unprotect(GuestTable& page);
    void drop_written(const GuestTable& page, GuestPhys start, std::size_t size);
    [[nodiscard]] std::uint64_t checksum(const GuestTable& page) const;
    void count_protected(GuestFrame frame, int change);

    const GuestMemory& memory_;
    TableStore& store_;
    const MmuConfig& config_;
    MmuCounters& counters_;

    std::uint64_t epoch_ = 1;
    std::uint64_t visits_ = 0;
    Snapshots snapshots_;
    std::unordered_map<TableIndex, View> views_; ///< of roots
    std::vector<GuestTable> pages_;
    std::vector<GuestTableIndex> free_pages_; ///< places in pages_
    FlatIndex by_frame_;
    std::vector<GuestTableIndex> candidates_;
    std::size_t spent_on_candidates_ = 0; ///< comparisons of them since the last were taken
    std::vector<GuestTableIndex> settling_;
    std::uint64_t next_release_ = 0; ///< epoch at which they are looked at
    /// Protected tables in each 2 MB and each 1 GB of guest memory, by the first frame.
    std::unordered_map<std::uint64_t, unsigned> protected_2mb_, protected_1gb_;
    std::unordered_map<std::uint64_t, std::uint64_t> to_merge_; ///< 2 MB without, since this epoch
};

} // namespace umbra
