#include "shadow/filler.hpp"

#include "shadow/entry_access.hpp"

namespace umbra {

bool Filler::install(TableIndex root, const GuestPaging& paging, const GuestWalk& walk, GuestVirt at,
                     Remember remembering) {
    cache_.pass_through(root);
    if (walk.depth == 0) // without paging: one page of everything, in pieces
        return install_leaf(root, root_level, GuestFrame(at.value() >> 39 << (39 - page_shift)), at,
                            all_rights);
    auto table = descend_to_guest(root, walk.steps[0].level->number, at);
    for (const GuestWalk::Step& step : walk.visited()) {
        if (!table)
            return false;
        const TableKey above = store_[*table].key;
        const Level& level = paging_4_level.level(above.level);
        const unsigned slot = level.index(at);
        if (remembering == Remember::yes)
            remember_for(*table, slot, step.entry);

        if (step.entry.leaf(*step.level)) {
            // A 4 MB page is two slots.
            const std::uint64_t within = at.value() & (step.level->span() - 1) & ~(level.span() - 1);
            const GuestFrame frame = step.entry.page(*step.level) + (within >> page_shift);
            if (!install_leaf(*table, above.level, frame, at, leaf_rights(step.entry, above.role)))
                return false;
            if (above.level == 1)
                prefetch(*table, paging, step, at);
            return true;
        }
        TableKey key{child_origin(above.role.mode, step.entry, step.level->number, at), above.level - 1,
                     above.role};
        key.role.guarded = guards_.lies_below(at, level);
        std::uint64_t rights = all_rights;
        if (!step.level->in_registers) {
            key.role.user_path = above.role.user_path && step.entry.user();
            rights = rights_of(step.entry, above.role);
        }
        table = cache_.link(*table, slot, key, rights);
    }
    return table.has_value();
}

/// Through the levels above those that the guest has, to the table of `level`. Nothing if the pool is
/// exhausted.
std::optional<TableIndex> Filler::descend_to_guest(TableIndex root, unsigned level, GuestVirt at) {
    std::optional<TableIndex> table = root;
    const Role role = store_[root].key.role;
    for (unsigned number = root_level; table && number > level; --number) {
        TableKey key{store_[*table].key.origin, number - 1, role};
        if (role.mode == GuestMode::bits_32 && number == 3) // a quarter of the page directory maps 1 GB
            key.origin += (at.value() >> 30) * shape_of({{}, 2, role}).bytes();
        const Level& above = paging_4_level.level(number);
        key.role.guarded = guards_.lies_below(at, above);
        table = cache_.link(*table, above.index(at), key, all_rights);
    }
    return table;
}

/// Remembers the entry that `slot` is about to be made from. What other slots were made from it must not be
/// taken for made from this value.
void Filler::remember_for(TableIndex table, unsigned slot, GuestEntry entry) {
    const unsigned slots = shape_of(store_[table].key).slots_per_entry;
    const unsigned number = slot / slots;
    const GuestEntry before = tracker_.remembered(table, number);
    tracker_.remember(table, number, entry);
    if (slots == 1 || before == entry || only_marked(before, entry))
        return;
    for (unsigned other = number * slots; other < (number + 1) * slots; ++other) {
        if (other != slot)
            store_.drop_entry(table, other);
    }
}

/// Maps the guest's page, of the size of an entry of level `number`, by one entry where the memory under it
/// allows, in pieces elsewhere. `frame`: the first one.
bool Filler::install_leaf(TableIndex table, unsigned number, GuestFrame frame, GuestVirt at,
                          std::uint64_t rights) {
    for (; number > 1; --number) {
        const Level& level = paging_4_level.level(number);
        const unsigned slot = level.index(at);
        if (leaves_.may_be_large(table, slot, frame)) {
            store_.set_entry(table, slot, ShadowEntry(same_frame(frame), rights | entry_bit::page_size));
            return true;
        }
        const Role role{.direct = true, .guarded = guards_.lies_below(at, level)};
        const auto next = cache_.link(table, slot, {frame.base(), number - 1, role}, rights);
        if (!next)
            return false;
        table = *next;
        rights = all_rights;
        const Level& below = paging_4_level.level(number - 1);
        frame = frame + below.index(at) * frames_of(below);
    }
    const unsigned slot = paging_4_level.level(1).index(at);
    store_.set_entry(table, slot, leaves_.page(table, slot, frame, rights));
    return true;
}

/// Fills what lies around `leaf` in its table. Only what the guest has accessed before: a CPU that looks
/// ahead marks nothing as accessed, and what it marks it has used.
void Filler::prefetch(TableIndex table, const GuestPaging& paging, const GuestWalk::Step& leaf,
                      GuestVirt at) {
    const TableKey key = store_[table].key;
    if (config_.prefetch <= 1 || config_.sync == Sync::trap || store_[table].guest == GuestTableIndex::none)
        return; // where the guest is watched, only what it uses is there
    const TableShape shape = shape_of(key);
    const auto guest = memory_.range(key.origin, shape.bytes());
    const unsigned first = paging_4_level.level(1).index(at) & ~(config_.prefetch - 1);
    for (unsigned slot = first; slot < first + config_.prefetch; ++slot) {
        if (store_.entries(table)[slot].present())
            continue;
        const GuestEntry entry = load_entry(guest, slot, shape.entry_bytes);
        constexpr std::uint64_t used = entry_bit::present | entry_bit::accessed;
        const bool user_page = key.role.user_path && entry.user();
        if (!entry.has(used) || (entry.raw() & reserved_bits(paging, *leaf.level, entry)) != 0 ||
            (key.role.user ? !entry.user() : key.role.user_pages_hidden && user_page))
            continue;
        tracker_.remember(table, slot, entry);
        store_.set_entry(table, slot,
                         leaves_.page(table, slot, entry.page(*leaf.level), leaf_rights(entry, key.role)));
        ++counters_.prefetched;
    }
}

} // namespace umbra
