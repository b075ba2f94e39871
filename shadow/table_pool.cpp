#include "shadow/table_pool.hpp"

#include <algorithm>

namespace umbra {
namespace {

constexpr std::size_t group_bytes = TablePool::group_pages * page_size;

} // namespace

TablePool::TablePool(MachineFrame first, std::span<std::byte> memory, PoolGuard* guard)
    : first_(first), memory_(memory.first(memory.size() / group_bytes * group_bytes)), guard_(guard) {}

std::optional<TableIndex> TablePool::allocate() {
    if (free_.empty()) {
        const std::size_t begin = next_group_ * group_pages;
        if (begin + group_pages > capacity())
            return std::nullopt;
        ++next_group_;
        for (std::size_t i = group_pages; i-- > 0;) // so that the group's first page is handed out first
            free_.push_back(static_cast<TableIndex>(begin + i));
    }
    const TableIndex page = free_.back();
    free_.pop_back();
    high_water_ = std::max(high_water_, ++in_use_);
    return page;
}

void TablePool::release(TableIndex page) {
    const EditScope scope = edit();
    std::ranges::fill(entries(page), ShadowEntry());
    free_.push_back(page);
    --in_use_;
}

} // namespace umbra
