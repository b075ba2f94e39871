// The store of shadow tables: which there are, what refers to what, and the only place where an entry
// changes.
//
// Invariants (shadow/audit.cpp looks):
//   - a key has one table, whoever refers to it: a change of a kernel mapping touches one table, not every
//     address space;
//   - Table::uses is the exact number of present entries that refer to the table, Table::links that of its
//     own entries that refer to others. Without uses, and only then, it is idle: roots always are;
//   - the reverse map knows every leaf of 2 MB and 1 GB, and those of 4 KB that map tracked frames;
//   - every root carries the switcher's entry in the reserved slot, which counts for none of the above;
//   - a present entry that changes, other than by gaining rights, is owed by every vCPU (Ledger).
//
// All metadata lies in flat arrays by the number of the pool's page.
#pragma once

#include "shadow/flat_index.hpp"
#include "shadow/ledger.hpp"
#include "shadow/mmu_config.hpp"
#include "shadow/reverse_map.hpp"
#include "shadow/role.hpp"

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace umbra {

inline constexpr unsigned root_level = 4;

/// No table.
inline constexpr TableIndex no_table{~std::uint32_t{0}};

/// A page of guest memory that tables of the guest lie in, by its number in the Tracker.
enum class GuestTableIndex : std::uint32_t { none = ~std::uint32_t{0} };

struct Table {
    TableKey key;
    std::uint32_t uses = 0;
    std::uint32_t pins = 0; ///< vCPUs whose current root this is
    std::uint16_t links = 0;
    bool live = false;
    std::uint64_t filled = 0;                      ///< when a fill last went through it: TableStore::clock
    TableIndex older = no_table, newer = no_table; ///< neighbours, while it is idle

    // The Tracker's:
    GuestTableIndex guest = GuestTableIndex::none; ///< none: made from no table in RAM
    TableIndex sibling = no_table;                 ///< the next one made from that page
    std::uint64_t compared = 0; ///< the epoch as of which its own entries are known to be in step
    std::uint64_t epoch = 0;    ///< the epoch as of which it and all below it were brought in step
    std::uint64_t visited = 0;
};

class TableStore {
  public:
    /// All but `switcher`, the entry of the reserved slot, outlives this. `frames`: one more than the last
    /// frame of guest memory.
    TableStore(TablePool& pool, const MmuConfig& config, MmuCounters& counters, ShadowEntry switcher,
               std::uint64_t frames);

    // --- Tables

    [[nodiscard]] Table& operator[](TableIndex index) { return tables_[TablePool::number(index)]; }
    [[nodiscard]] const Table& operator[](TableIndex index) const {
        return tables_[TablePool::number(index)];
    }
    /// Whether a live table has this page of the pool.
    [[nodiscard]] bool knows(TableIndex index) const {
        return TablePool::number(index) < tables_.size() && (*this)[index].live;
    }
    [[nodiscard]] const TablePool& pool() const { return pool_; }
    [[nodiscard]] std::optional<TableIndex> find(const TableKey& key) const;
    /// How many there are.
    [[nodiscard]] std::size_t size() const { return by_key_.size(); }
    /// `visit(index)` for each; it may change entries, but neither make nor destroy.
    template<class Visit>
    void for_each(Visit visit) const {
        for (std::size_t i = 0; i < tables_.size(); ++i) {
            if (tables_[i].live)
                visit(static_cast<TableIndex>(i));
        }
    }
    template<class Visit>
    void for_each_of_level(unsigned level, Visit visit) const {
        for_each([&](TableIndex index) {
            if ((*this)[index].key.level == level)
                visit(index);
        });
    }

    /// A page of the pool for a new table, if there is one.
    [[nodiscard]] std::optional<TableIndex> free_page() { return pool_.allocate(); }
    /// The table for `key`, which has none, in this page: empty, but for the switcher in a root; idle.
    TableIndex make(const TableKey& key, TableIndex page);
    /// Returns an idle table's page to the pool. The tables that are idle without it are the next to go.
    void destroy(TableIndex index);
    /// Destroys every table; no vCPU is in the guest.
    void clear();
    /// Empties every table: the machine must ask for each translation again.
    void forget_entries();

    // --- Entries

    [[nodiscard]] std::span<const ShadowEntry, entries_per_table> entries(TableIndex index) const {
        return pool_.entries(index);
    }
    void set_entry(TableIndex index, unsigned slot, ShadowEntry value);
    /// It was made from what is not there any more.
    void drop_entry(TableIndex index, unsigned slot);
    [[nodiscard]] bool is_leaf(TableIndex index, ShadowEntry entry) const {
        return entry.leaf(paging_4_level.level((*this)[index].key.level));
    }
    [[nodiscard]] bool is_switcher(TableIndex index, unsigned slot) const {
        return slot == slot_ && (*this)[index].key.level == root_level;
    }
    /// The table that this entry of `index` refers to; nothing for one that is absent, a leaf, or the
    /// switcher's.
    [[nodiscard]] std::optional<TableIndex> child(TableIndex index, ShadowEntry entry) const {
        if (!entry.present() || is_leaf(index, entry))
            return std::nullopt;
        return pool_.page_of(entry.table());
    }
    /// `visit(slot, entry)` for each present entry but the switcher's, as it is then.
    template<class Visit>
    void for_each_entry(TableIndex index, Visit visit) const {
        const auto table = entries(index);
        for (unsigned slot = 0; slot < entries_per_table; ++slot) {
            const ShadowEntry entry = table[slot];
            if (entry.present() && !is_switcher(index, slot))
                visit(slot, entry);
        }
    }
    /// `visit(slot, child)` for each entry that refers to a table; looks no further than to the last.
    template<class Visit>
    void for_each_child(TableIndex index, Visit visit) const {
        const auto table = entries(index);
        unsigned links = (*this)[index].links;
        for (unsigned slot = 0; links != 0 && slot < entries_per_table; ++slot) {
            const ShadowEntry entry = table[slot];
            if (!entry.present())
                continue; // most are not
            if (const auto below = child(index, entry)) {
                --links;
                visit(slot, *below);
            }
        }
    }

    [[nodiscard]] unsigned reserved_slot() const { return slot_; }
    [[nodiscard]] ShadowEntry switcher() const { return switcher_; }
    /// In every root; `slot` is used by none. No vCPU is in the guest.
    void move_switcher(unsigned slot);

    /// Counts changes of links between tables, and what else `note_change` tells.
    [[nodiscard]] std::uint64_t structure() const { return structure_; }
    void note_change() { ++structure_; }

    ReverseMap& reverse() { return reverse_; }
    [[nodiscard]] const ReverseMap& reverse() const { return reverse_; }

    // --- Which goes first when memory is short

    /// A fill begins.
    void tick() { ++clock_; }
    [[nodiscard]] std::uint64_t clock() const { return clock_; }
    void used(TableIndex index) { (*this)[index].filled = clock_; }
    /// This idle table is the last to go.
    void touch(TableIndex index);
    /// `visit(index)` for each idle table, the first to go first, until it returns true.
    template<class Visit>
    void find_idle(Visit visit) const {
        for (TableIndex at = oldest_; at != no_table; at = (*this)[at].newer) {
            if (visit(at))
                return;
        }
    }

    // --- The vCPUs

    void add(Ledger& ledger) { ledgers_.push_back(&ledger); }
    void remove(Ledger& ledger) { std::erase(ledgers_, &ledger); }
    /// Returns when no other vCPU is in the guest; none enters before the caller gives the lock back.
    void stop_others() const;

  private:
    void append_idle(TableIndex index);
    void prepend_idle(TableIndex index);
    void remove_idle(TableIndex index);
    void add_reference(ShadowEntry entry);
    /// If this was the last reference, whether the table is the next to go, or the last.
    enum class Next : bool { last, first };
    void drop_reference(ShadowEntry entry, Next next);
    void note_leaf(TableIndex index, unsigned slot, ShadowEntry entry, bool added);
    void owe(TableIndex index, bool root_gone = false);

    TablePool& pool_;
    const MmuConfig& config_;
    MmuCounters& counters_;
    ShadowEntry switcher_;
    unsigned slot_;
    std::vector<Table> tables_; ///< by pool page, as far as there have been tables
    FlatIndex by_key_;
    TableIndex oldest_ = no_table, newest_ = no_table; ///< ends of the idle tables' list
    std::uint64_t structure_ = 1;
    std::uint64_t clock_ = 0;
    ReverseMap reverse_;
    std::vector<Ledger*> ledgers_;
};

} // namespace umbra
