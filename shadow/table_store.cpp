#include "shadow/table_store.hpp"

#include "shadow/entry_access.hpp"
#include "shadow/rights.hpp"

#include <algorithm>

namespace umbra {
namespace {

std::size_t hash_of(const TableKey& key) {
    const Role& role = key.role;
    std::uint64_t bits = static_cast<std::uint64_t>(role.mode) << 3 | key.level;
    for (const bool flag :
         {role.user, role.write_protect, role.no_execute, role.large_pages, role.user_pages_nx,
          role.user_pages_hidden, role.user_path, role.direct, role.guarded})
        bits = bits << 1 | std::uint64_t{flag};
    // Origins are multiples of 32, and below 2^52.
    return static_cast<std::size_t>((key.origin.value() << 11 ^ bits) * 0x9e37'79b9'7f4a'7c15U >> 32);
}

} // namespace

TableStore::TableStore(TablePool& pool, const MmuConfig& config, MmuCounters& counters, ShadowEntry switcher,
                       std::uint64_t frames)
    : pool_(pool), config_(config), counters_(counters), switcher_(switcher), slot_(config.first_slot),
      by_key_(pool.capacity()), reverse_(frames) {
    tables_.reserve(pool.capacity());
}

// --- Tables

std::optional<TableIndex> TableStore::find(const TableKey& key) const {
    const auto found =
        by_key_.find(hash_of(key), [&](std::uint32_t number) { return tables_[number].key == key; });
    return found ? std::optional(static_cast<TableIndex>(*found)) : std::nullopt;
}

TableIndex TableStore::make(const TableKey& key, TableIndex page) {
    const std::size_t number = TablePool::number(page);
    if (number >= tables_.size())
        tables_.resize(number + 1);
    tables_[number] = {.key = key, .live = true, .filled = clock_};
    by_key_.insert(hash_of(key), static_cast<std::uint32_t>(number));
    append_idle(page);
    if (key.level == root_level)
        store_entry(pool_.entries(page)[slot_], switcher_);
    return page;
}

void TableStore::destroy(TableIndex index) {
    Table& dead = (*this)[index];
    for_each_entry(index, [&](unsigned slot, ShadowEntry entry) {
        if (is_leaf(index, entry))
            note_leaf(index, slot, entry, false);
        else
            drop_reference(entry, Next::first);
    });
    by_key_.erase(static_cast<std::uint32_t>(TablePool::number(index)),
                  [this](std::uint32_t number) { return hash_of(tables_[number].key); });
    remove_idle(index);
    const bool root = dead.key.level == root_level;
    dead = {};
    ++structure_;
    pool_.release(index);
    owe(index, root); // the page may serve again before the machine has forgotten it
}

void TableStore::clear() {
    by_key_.clear();
    oldest_ = newest_ = no_table;
    reverse_.clear_large();
    for_each([this](TableIndex index) {
        (*this)[index] = {};
        pool_.release(index);
        owe(index, true);
    });
    ++structure_;
}

void TableStore::forget_entries() {
    for_each([this](TableIndex index) {
        for_each_entry(index, [&](unsigned slot, ShadowEntry) { set_entry(index, slot, ShadowEntry()); });
    });
}

void TableStore::move_switcher(unsigned slot) {
    for_each_of_level(root_level, [&](TableIndex root) {
        store_entry(pool_.entries(root)[slot], switcher_);
        store_entry(pool_.entries(root)[slot_], ShadowEntry());
        owe(root);
    });
    slot_ = slot;
}

// --- Entries

void TableStore::set_entry(TableIndex index, unsigned slot, ShadowEntry value) {
    ShadowEntry& entry = pool_.entries(index)[slot];
    const ShadowEntry old = entry;
    if (old == value)
        return;
    const bool leaf = value.present() && is_leaf(index, value);
    const bool was_leaf = old.present() && is_leaf(index, old);
    if (value.present() && !leaf) {
        add_reference(value);
        ++(*this)[index].links;
        ++structure_;
    }
    store_entry(entry, value);
    const bool same_page = leaf && was_leaf && ((old.raw() ^ value.raw()) & entry_bit::frame_mask) == 0;
    if (was_leaf && !same_page)
        note_leaf(index, slot, old, false);
    if (leaf && !same_page)
        note_leaf(index, slot, value, true);
    if (!old.present())
        return; // nobody caches an absence
    if (!was_leaf) {
        drop_reference(old, Next::last);
        --(*this)[index].links;
        ++structure_;
    }
    if (leaf && was_leaf && is_upgrade(old, value)) {
        ++counters_.upgrades;
        return;
    }
    owe(index);
}

void TableStore::drop_entry(TableIndex index, unsigned slot) {
    if (!entries(index)[slot].present() || is_switcher(index, slot))
        return; // the switcher's entry was not made from the guest's
    set_entry(index, slot, ShadowEntry());
    ++counters_.entries_dropped;
}

void TableStore::add_reference(ShadowEntry entry) {
    if (const auto child = pool_.page_of(entry.table()); child && (*this)[*child].uses++ == 0)
        remove_idle(*child);
}

void TableStore::drop_reference(ShadowEntry entry, Next next) {
    const auto child = pool_.page_of(entry.table());
    if (child && --(*this)[*child].uses == 0)
        next == Next::first ? prepend_idle(*child) : append_idle(*child);
}

/// Keeps the reverse map.
void TableStore::note_leaf(TableIndex index, unsigned slot, ShadowEntry entry, bool added) {
    const unsigned level = (*this)[index].key.level;
    const MachineFrame frame = entry.page(paging_4_level.level(level));
    const ShadowSlot place{index, slot};
    if (level == 1) {
        if (reverse_.tracked(frame))
            added ? reverse_.add(frame, place) : reverse_.remove(frame, place);
    } else {
        added ? reverse_.add_large(frame, level, place) : reverse_.remove_large(frame, level, place);
    }
}

// --- Idle tables

void TableStore::append_idle(TableIndex index) {
    Table& last = (*this)[index];
    last.older = newest_;
    last.newer = no_table;
    (newest_ == no_table ? oldest_ : (*this)[newest_].newer) = index;
    newest_ = index;
}

void TableStore::prepend_idle(TableIndex index) {
    Table& first = (*this)[index];
    first.older = no_table;
    first.newer = oldest_;
    (oldest_ == no_table ? newest_ : (*this)[oldest_].older) = index;
    oldest_ = index;
}

void TableStore::remove_idle(TableIndex index) {
    const Table& leaving = (*this)[index];
    (leaving.older == no_table ? oldest_ : (*this)[leaving.older].newer) = leaving.newer;
    (leaving.newer == no_table ? newest_ : (*this)[leaving.newer].older) = leaving.older;
}

void TableStore::touch(TableIndex index) {
    remove_idle(index);
    append_idle(index);
}

// --- The vCPUs

void TableStore::stop_others() const {
    if (std::ranges::none_of(ledgers_, [](const Ledger* ledger) { return ledger->in_guest(); }))
        return;
    if (config_.kick)
        config_.kick();
    for (const Ledger* ledger : ledgers_)
        ledger->wait_until_left();
}

/// Every vCPU must take note of a change to a present entry of this table.
void TableStore::owe(TableIndex index, bool root_gone) {
    for (Ledger* ledger : ledgers_)
        ledger->owe(index, root_gone, config_.stores_seen);
}

} // namespace umbra
