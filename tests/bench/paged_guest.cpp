#include "tests/bench/paged_guest.hpp"

#include <algorithm>
#include <chrono>

namespace umbra::bench {
namespace {

constexpr MachineFrame pool_first{std::uint64_t{1} << 30};

/// Tables of levels 2 and 3 above so many of level 1.
std::size_t directories(std::size_t tables) {
    return (tables + entries_per_table - 1) / entries_per_table;
}

std::size_t table_pages(const PagedGuest::Shape& shape) {
    const auto with_upper = [](std::size_t tables) { return tables + directories(tables) + 1; };
    return shape.spaces * (1 + with_upper(shape.private_tables)) + with_upper(shape.kernel_tables);
}

} // namespace

PagedGuest::PagedGuest(const Shape& shape)
    : shape_(shape),
      // One page for what `remap` maps, and the first page, which nothing lies in.
      ram_(
          (table_pages(shape) + 2 + std::max(shape.private_tables, shape.kernel_tables) * entries_per_table) *
              page_size,
          HostMemory::Pages::small, "a guest"),
      memory_({{GuestPhys(0), ram_.bytes()}}), data_((table_pages(shape) + 1) * page_size) {
    for (unsigned space = 0; space < shape.spaces; ++space) {
        roots_.push_back(new_tables(1));
        private_entries_.push_back(map(roots_[space], GuestVirt(0), shape.private_tables));
        if (space == 0) {
            kernel_entries_ = map(roots_[0], kernel_begin, shape.kernel_tables);
            continue;
        }
        const std::uint64_t slot = paging_4_level.root().index(kernel_begin) * sizeof(GuestEntry);
        (void)memory_.write(roots_[space] + slot, memory_.read<std::uint64_t>(roots_[0] + slot).value());
    }
}

GuestPaging PagedGuest::paging(unsigned space) const {
    GuestPaging paging;
    paging.root = roots_[space].frame();
    return paging;
}

void PagedGuest::remap(GuestPhys entry) const {
    const GuestEntry before(memory_.read<std::uint64_t>(entry).value());
    const GuestPhys end =
        data_ + std::max(private_pages(), shape_.kernel_tables * entries_per_table) * page_size;
    const GuestPhys target = before.table() == end.frame() ? data_ : end;
    (void)memory_.write(entry, GuestEntry(target.frame(), before.raw() & ~entry_bit::frame_mask));
}

GuestPhys PagedGuest::new_tables(std::size_t count) {
    const GuestPhys first = next_table_;
    next_table_ += count * page_size;
    return first;
}

void PagedGuest::set(GuestPhys table, std::size_t slot, GuestPhys target, std::uint64_t bits) const {
    constexpr std::uint64_t rights = entry_bit::present | entry_bit::writable | entry_bit::user;
    (void)memory_.write(table + slot * sizeof(GuestEntry), GuestEntry(target.frame(), rights | bits));
}

/// Maps the data by so many tables of level 1. Says where the first of their entries lies; the others follow.
GuestPhys PagedGuest::map(GuestPhys root, GuestVirt begin, std::size_t tables) {
    const std::uint64_t accessed = shape_.used ? entry_bit::accessed : 0;
    const std::uint64_t leaf = shape_.used ? entry_bit::accessed | entry_bit::dirty : 0;
    const GuestPhys third = new_tables(1), second = new_tables(directories(tables)),
                    first = new_tables(tables);
    set(root, paging_4_level.root().index(begin), third, accessed);
    for (std::size_t i = 0; i < directories(tables); ++i)
        set(third, i, second + i * page_size, accessed);
    for (std::size_t i = 0; i < tables; ++i)
        set(second, i, first + i * page_size, accessed);
    for (std::size_t i = 0; i < tables * entries_per_table; ++i)
        set(first, i, data_ + i * page_size, leaf);
    return first;
}

ShadowedGuest::ShadowedGuest(const PagedGuest& guest, const MmuConfig& config, std::size_t pool_pages)
    : guest_(guest), pool_memory_((pool_pages != 0 ? pool_pages : table_pages(guest.shape()) + 64) /
                                      TablePool::group_pages * TablePool::group_pages * page_size,
                                  HostMemory::Pages::small, "shadow tables"),
      pool_(pool_first, pool_memory_.bytes()), tables_(guest.memory(), pool_, config, ShadowEntry()),
      mmu_(tables_) {
    mmu_.set_paging(guest.paging(0));
    enter();
}

bool ShadowedGuest::mapped(GuestVirt at) {
    MachineState state = mmu_.enter(false);
    state.debt.paid();
    const auto read = [this](const Level&, MachinePhys slot) {
        const auto index = pool_.page_of(slot.frame());
        return index ? pool_.entries(*index)[slot.page_offset() / sizeof(ShadowEntry)] : ShadowEntry();
    };
    bool found = false;
    walk(paging_4_level, state.root, at, at, read, [&](const WalkStep<MachinePhysSpace>& step) {
        if (!step.entry.present())
            return WalkNext::stop;
        found = step.entry.leaf(*step.level);
        return WalkNext::descend;
    });
    return found;
}

void ShadowedGuest::populate(std::size_t spare) {
    const PagedGuest::Shape& shape = guest_.shape();
    const auto use = [this](GuestVirt at) {
        if (!mapped(at))
            fault(at, {.write = true});
    };
    for (unsigned space = 0; space < shape.spaces; ++space) {
        load(space);
        for (std::size_t table = 0; table < shape.private_tables - spare; ++table)
            use(PagedGuest::private_page(table * entries_per_table));
        for (std::size_t table = 0; table < shape.kernel_tables; ++table)
            use(PagedGuest::kernel_page(table * entries_per_table));
    }
}

bool ShadowedGuest::settle() {
    constexpr std::chrono::seconds patience{4};
    const auto start = std::chrono::steady_clock::now();
    while (std::chrono::steady_clock::now() - start < patience) {
        const std::uint64_t before = counters().tables_compared;
        for (unsigned space = 0; space < guest_.shape().spaces; ++space)
            load(space);
        if (counters().tables_compared == before)
            return true;
    }
    return false;
}

} // namespace umbra::bench
