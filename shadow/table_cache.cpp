#include "shadow/table_cache.hpp"

#include <algorithm>
#include <unordered_set>
#include <vector>

namespace umbra {

std::optional<TableIndex> TableCache::root(const TableKey& key, std::uint64_t since) {
    const auto found = store_.find(key);
    if (!found)
        return obtain(key);
    ++counters_.tables_reused;
    store_.touch(*found);
    if (tracker_.bring_in_step(*found, since)) {
        if (const auto pages = tracker_.take_candidates(); !pages.empty())
            protect(pages);
        tracker_.release_snapshots();
    }
    return found;
}

/// The table for `key`, from the cache or new, to be referred to anew; it and all below it are in step with
/// the guest's as of now. A CPU reads the entries of a walk from the root down: it has none below a new link
/// that is older than the link. Nothing when the pool is exhausted and every table is in use.
std::optional<TableIndex> TableCache::obtain(const TableKey& key) {
    if (const auto found = store_.find(key)) {
        if (store_[*found].uses == 0) {
            ++counters_.tables_reused;
            store_.touch(*found);
        }
        // Of registers (PAE) nothing is there to compare: they may have changed while no root led here.
        if (key.role.mode == GuestMode::pae && key.level == 3) {
            for (unsigned slot = 0; slot < GuestPaging{}.pdptes.size(); ++slot)
                store_.drop_entry(*found, slot);
        }
        tracker_.renew(*found);
        return found;
    }
    const auto page = allocate();
    if (!page)
        return std::nullopt;
    ++counters_.tables_built;
    const TableIndex made = store_.make(key, *page);
    if (key.role.direct)
        fill_direct(made);
    tracker_.begin(made);
    return made;
}

/// The table for `key` that entry `slot` of table `parent` refers to, or is to refer to.
std::optional<TableIndex> TableCache::child_table(TableIndex parent, unsigned slot, const TableKey& key) {
    const auto linked = store_.child(parent, store_.entries(parent)[slot]);
    return linked && store_[*linked].key == key ? linked : obtain(key);
}

std::optional<TableIndex> TableCache::link(TableIndex parent, unsigned slot, const TableKey& key,
                                           std::uint64_t rights) {
    const auto child = child_table(parent, slot, key);
    if (!child)
        return std::nullopt;
    pass_through(*child);
    const ShadowEntry old = store_.entries(parent)[slot];
    const ShadowEntry now(pool_.frame(*child), rights);
    if (old.present() && old.table() == now.table() && old != now) // as good as new: see obtain
        tracker_.renew(*child);
    store_.set_entry(parent, slot, now);
    return child;
}

void TableCache::pass_through(TableIndex table) {
    store_.used(table);
    const GuestTableIndex page = store_[table].guest;
    if (config_.sync == Sync::trap && page != GuestTableIndex::none && !tracker_.is_protected(table))
        protect({&page, 1});
}

// --- Memory

/// A free page of the pool, if need be by giving up tables.
std::optional<TableIndex> TableCache::allocate() {
    if (const auto page = store_.free_page())
        return page;
    store_.stop_others(); // the page has a past
    for (int attempt = 0; attempt < 2; ++attempt) {
        std::optional<TableIndex> victim;
        store_.find_idle([&](TableIndex table) {
            if (store_[table].pins == 0)
                victim = table;
            return victim.has_value();
        });
        if (victim) {
            tracker_.end(*victim);
            store_.destroy(*victim);
            ++counters_.tables_recycled;
            return store_.free_page();
        }
        evict();
    }
    return std::nullopt;
}

/// Takes an eighth of the tables that are in use from their parents: those that no fill went through for the
/// longest time. They are idle then. What the present fill goes through stays.
void TableCache::evict() {
    std::vector<TableIndex> victims;
    store_.for_each([&](TableIndex table) {
        if (store_[table].uses != 0 && store_[table].filled != store_.clock())
            victims.push_back(table);
    });
    const auto by_age = [this](TableIndex a, TableIndex b) { return store_[a].filled < store_[b].filled; };
    const std::size_t count = (victims.size() + 7) / 8;
    std::ranges::nth_element(victims, victims.begin() + static_cast<std::ptrdiff_t>(count), by_age);
    const std::unordered_set<TableIndex> chosen(victims.begin(),
                                                victims.begin() + static_cast<std::ptrdiff_t>(count));
    if (chosen.empty())
        return;
    store_.for_each([&](TableIndex parent) {
        store_.for_each_child(parent, [&](unsigned slot, TableIndex child) {
            if (chosen.contains(child))
                store_.set_entry(parent, slot, ShadowEntry());
        });
    });
}

// --- Large pages and their pieces

/// The pieces of a large page have its rights, which stand above them: all can be there at once.
void TableCache::fill_direct(TableIndex table) {
    const TableKey key = store_[table].key;
    if (key.level != 1)
        return;
    for (unsigned slot = 0; slot < entries_per_table; ++slot)
        store_.set_entry(table, slot, leaves_.page(table, slot, key.origin.frame() + slot, all_rights));
}

/// From now on the guest's writes to these pages trap. No table is given up here: a large page that cannot be
/// split for want of memory is dropped.
void TableCache::protect(std::span<const GuestTableIndex> pages) {
    store_.stop_others();
    tracker_.track(pages);
    for (const GuestTableIndex page : pages) {
        for (const unsigned level : {2U, 3U}) {
            const MachineFrame first = same_frame(first_of(tracker_.frame_of(page), level));
            const auto large = store_.reverse().large(first, level);
            for (const ShadowSlot place : std::vector(large.begin(), large.end()))
                split(place.table, place.slot);
        }
    }
    tracker_.protect(pages);
}

/// Puts pieces in the place of a large page: a table that maps the same.
void TableCache::split(TableIndex table, unsigned slot) {
    const unsigned number = store_[table].key.level;
    const ShadowEntry entry = store_.entries(table)[slot];
    const GuestPhys first(entry.page(paging_4_level.level(number)).base().value());
    ++counters_.splits;
    const TableKey key{first, number - 1, Role{.direct = true}};
    std::optional<TableIndex> pieces;
    if (number == 2) {
        pieces = store_.find(key);
        if (!pieces && pool_.in_use() < pool_.capacity())
            pieces = obtain(key);
    }
    if (!pieces) {
        store_.set_entry(table, slot, ShadowEntry());
        return;
    }
    constexpr std::uint64_t kept = all_rights | entry_bit::no_execute;
    store_.set_entry(table, slot, ShadowEntry(pool_.frame(*pieces), entry.raw() & kept));
}

void TableCache::merge_quiet_memory() {
    for (const GuestFrame first : tracker_.take_quiet_memory()) {
        const auto pieces = store_.find({first.base(), 1, Role{.direct = true}});
        if (!pieces || !leaves_.may_be_large(first, paging_4_level.level(2)))
            continue;
        store_.for_each_of_level(2, [&](TableIndex table) {
            store_.for_each_child(table, [&](unsigned slot, TableIndex child) {
                if (child != *pieces)
                    return;
                const std::uint64_t rights = store_.entries(table)[slot].raw() & ~entry_bit::frame_mask;
                store_.set_entry(table, slot, ShadowEntry(same_frame(first), rights | entry_bit::page_size));
                ++counters_.merges;
            });
        });
    }
}

} // namespace umbra
