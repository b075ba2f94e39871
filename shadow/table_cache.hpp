// The cache of shadow tables: where a table comes from that is wanted, and which goes when memory is short.
//
// Tables are cached by their keys, page directories and all (lguest caches four; here it is as many as the
// pool holds): a return to an address space finds what it had. What is found is brought in step; what is not
// is made. The pool's pages run out one day: idle tables go first, then an eighth of those in use, by age.
#pragma once

#include "shadow/leaves.hpp"
#include "shadow/tracker.hpp"

#include <optional>
#include <span>

namespace umbra {

class TableCache {
  public:
    /// All of them outlive this.
    TableCache(TablePool& pool, TableStore& store, Tracker& tracker, Leaves& leaves, const MmuConfig& config,
               MmuCounters& counters)
        : pool_(pool), store_(store), tracker_(tracker), leaves_(leaves), config_(config),
          counters_(counters) {}

    /// The root for `key`, in step with the guest's tables as of epoch `since` at least. Nothing when the
    /// pool is exhausted and every table is in use.
    [[nodiscard]] std::optional<TableIndex> root(const TableKey& key, std::uint64_t since);
    /// Makes entry `slot` of `parent` refer to the table for `key`, for a fill that goes through it. Nothing
    /// when the pool is exhausted.
    [[nodiscard]] std::optional<TableIndex> link(TableIndex parent, unsigned slot, const TableKey& key,
                                                 std::uint64_t rights);
    /// A fill goes through this table.
    void pass_through(TableIndex table);
    /// Makes way for large pages where no table has been protected for a while.
    void merge_quiet_memory();

  private:
    [[nodiscard]] std::optional<TableIndex> obtain(const TableKey& key);
    [[nodiscard]] std::optional<TableIndex> child_table(TableIndex parent, unsigned slot,
                                                        const TableKey& key);
    [[nodiscard]] std::optional<TableIndex> allocate();
    void evict();
    void fill_direct(TableIndex table);
    void protect(std::span<const GuestTableIndex> pages);
    void split(TableIndex table, unsigned slot);

    TablePool& pool_;
    TableStore& store_;
    Tracker& tracker_;
    Leaves& leaves_;
    const MmuConfig& config_;
    MmuCounters& counters_;
};

} // namespace umbra
