// Copies of the guest's tables: for each shadow table, the entries that it was made from.
//
// One page for each page of the pool. Most of a guest's tables are left alone for long, and are
// write-protected then: they need no copy, and its memory goes back to the host.
#pragma once

#include "shadow/table_pool.hpp"

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace umbra {

class Snapshots {
  public:
    /// Address space for so many; memory as they are written to. Throws std::bad_alloc if it is not to be
    /// had.
    explicit Snapshots(std::size_t pages);
    ~Snapshots();
    Snapshots(const Snapshots&) = delete;
    Snapshots& operator=(const Snapshots&) = delete;
    Snapshots(Snapshots&&) = delete;
    Snapshots& operator=(Snapshots&&) = delete;

    [[nodiscard]] std::span<std::uint64_t, entries_per_table> of(TableIndex table) const {
        return std::span<std::uint64_t, entries_per_table>(
            memory_ + TablePool::number(table) * entries_per_table, entries_per_table);
    }
    /// Gives back the memory of these, whose content is lost. They may be written to again.
    void release(std::vector<TableIndex> tables);

  private:
    std::size_t bytes_;
    std::uint64_t* memory_;
};

} // namespace umbra
