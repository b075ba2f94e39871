// The pool of pages that shadow tables are made of.
//
// Table pages come in contiguous groups (the page-table cache of the "x86, mm: Use cache of page tables"
// RFC): pages of one group are neighbours in memory, so a group is one object to protect and to map. A freed
// page is the next one handed out, while its lines are still in the cache. Entries are written inside an
// EditScope only (shadow/edit_scope.hpp).
#pragma once

#include "shadow/edit_scope.hpp"
#include "shadow/format.hpp"

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

namespace umbra {

/// A page of the pool, by its position in it.
enum class TableIndex : std::uint32_t {};

class TablePool {
  public:
    static constexpr std::size_t group_pages = 16;

    /// `memory` is where the machine sees frames from `first` on; it is page aligned, a whole number of
    /// groups, zeroed, and outlives the pool. Pages are touched only when handed out. `guard`: what keeps
    /// `memory` from being written outside edit scopes, outliving the pool; nullptr if nothing does.
    TablePool(MachineFrame first, std::span<std::byte> memory, PoolGuard* guard = nullptr);

    /// A page of zeroes; nothing when the pool is exhausted.
    [[nodiscard]] std::optional<TableIndex> allocate();
    /// Zeroes `page` and makes it the next to be handed out.
    void release(TableIndex page);

    /// While what it returns exists, this thread may write to the entries.
    [[nodiscard]] EditScope edit() const { return EditScope(guard_); }
    /// To be read by anyone; to be written inside a scope from `edit`.
    [[nodiscard]] std::span<ShadowEntry, entries_per_table> entries(TableIndex page) const {
        return std::span<ShadowEntry, entries_per_table>(reinterpret_cast<ShadowEntry*>(memory_.data()) +
                                                             number(page) * entries_per_table,
                                                         entries_per_table);
    }
    [[nodiscard]] MachineFrame frame(TableIndex page) const { return first_ + number(page); }
    /// The page that has this frame; nothing for a frame outside the pool.
    [[nodiscard]] std::optional<TableIndex> page_of(MachineFrame frame) const {
        const std::uint64_t index = frame - first_; // wraps for lower frames: then beyond the end
        if (index >= capacity())
            return std::nullopt;
        return static_cast<TableIndex>(index);
    }

    [[nodiscard]] std::size_t capacity() const { return memory_.size() / page_size; }
    [[nodiscard]] std::size_t in_use() const { return in_use_; }
    [[nodiscard]] std::size_t high_water() const { return high_water_; }
    /// What guards the pool; nullptr if nothing does.
    [[nodiscard]] const PoolGuard* guard() const { return guard_; }

    static constexpr std::size_t number(TableIndex page) { return static_cast<std::size_t>(page); }

  private:
    MachineFrame first_;
    std::span<std::byte> memory_;
    PoolGuard* guard_;
    std::vector<TableIndex> free_; ///< last in, first out
    std::size_t next_group_ = 0;   ///< groups below this one have been opened
    std::size_t in_use_ = 0;
    std::size_t high_water_ = 0;
};

} // namespace umbra
