#include "shadow/tracker.hpp"

#include "shadow/entry_access.hpp"
#include "shadow/frames.hpp"
#include "shadow/rights.hpp"
#include "shadow/walker.hpp"

#include <algorithm>
#include <cstring>
#include <unordered_set>

#include <fmt/core.h>

namespace umbra {
namespace {

std::size_t hash_of(GuestFrame frame) {
    return static_cast<std::size_t>(frame.number() * 0x9e37'79b9'7f4a'7c15U >> 32);
}

/// Whether a table's bytes are still those of its snapshot. A write that happens meanwhile is a race that the
/// guest has with itself: it belongs to before or after the flush, as it falls.
bool unchanged(std::span<const std::byte> table, std::span<const std::byte> snapshot) {
#ifdef __SANITIZE_THREAD__
    for (std::size_t at = 0; at < table.size(); at += 8) { // memcmp's loads would be reported
        std::uint64_t before = 0;
        std::memcpy(&before, snapshot.data() + at, sizeof(before));
        if (load_entry(table.subspan(at), 0, 8).raw() != before)
            return false;
    }
    return true;
#else
    return std::memcmp(table.data(), snapshot.data(), table.size()) == 0;
#endif
}

} // namespace

Tracker::Tracker(const GuestMemory& memory, TableStore& store, const MmuConfig& config, MmuCounters& counters)
    : memory_(memory), store_(store), config_(config), counters_(counters),
      snapshots_(store.pool().capacity()), by_frame_(store.pool().capacity()) {
    pages_.reserve(store.pool().capacity()); // each has a shadow table
}

// --- The guest's tables

Tracker::GuestTable* Tracker::find(GuestFrame frame) {
    const auto found =
        by_frame_.find(hash_of(frame), [&](std::uint32_t page) { return pages_[page].frame == frame; });
    return found ? &pages_[*found] : nullptr;
}

const Tracker::GuestTable* Tracker::find(GuestFrame frame) const {
    return const_cast<Tracker*>(this)->find(frame);
}

GuestTableIndex Tracker::obtain(GuestFrame frame) {
    if (const GuestTable* const known = find(frame))
        return static_cast<GuestTableIndex>(known - pages_.data());
    if (free_pages_.empty()) {
        free_pages_.push_back(static_cast<GuestTableIndex>(pages_.size()));
        pages_.emplace_back();
    }
    const GuestTableIndex page = free_pages_.back();
    free_pages_.pop_back();
    at(page) = {.frame = frame};
    by_frame_.insert(hash_of(frame), static_cast<std::uint32_t>(page));
    return page;
}

/// No shadow table is made from `page` any more.
void Tracker::forget(GuestTableIndex page) {
    GuestTable& gone = at(page);
    if (gone.is_protected)
        count_protected(gone.frame, -1);
    if (gone.candidate)
        std::erase(candidates_, page);
    if (gone.settling)
        std::erase(settling_, page);
    store_.reverse().untrack(same_frame(gone.frame));
    by_frame_.erase(static_cast<std::uint32_t>(page),
                    [this](std::uint32_t other) { return hash_of(pages_[other].frame); });
    free_pages_.push_back(page);
}

template<class Visit>
void Tracker::for_each_shadow(const GuestTable& page, Visit visit) const {
    for (TableIndex shadow = page.shadows; shadow != no_table; shadow = store_[shadow].sibling)
        visit(shadow);
}

void Tracker::begin(TableIndex table) {
    Table& made = store_[table];
    made.compared = made.epoch = epoch_;
    if (shape_of(made.key).entries == 0 || guest(table).empty())
        return;
    made.guest = obtain(made.key.origin.frame());
    TableIndex* last = &at(made.guest).shadows;
    while (*last != no_table)
        last = &store_[*last].sibling;
    *last = table;
    if (has_snapshot(table))
        remember_all(table);
}

void Tracker::end(TableIndex table) {
    views_.erase(table);
    const Table& dead = store_[table];
    if (dead.guest == GuestTableIndex::none)
        return;
    GuestTable& page = at(dead.guest);
    TableIndex* link = &page.shadows;
    while (*link != table)
        link = &store_[*link].sibling;
    *link = dead.sibling;
    if (page.shadows == no_table)
        forget(dead.guest);
}

void Tracker::clear() {
    store_.for_each([this](TableIndex table) {
        if (store_[table].guest != GuestTableIndex::none)
            store_.reverse().untrack(same_frame(store_[table].key.origin.frame()));
    });
    views_.clear();
    pages_.clear();
    free_pages_.clear();
    by_frame_.clear();
    candidates_.clear();
    settling_.clear();
    protected_2mb_.clear();
    protected_1gb_.clear();
    to_merge_.clear();
}

// --- Snapshots

GuestEntry Tracker::remembered(TableIndex table, unsigned number) const {
    const unsigned entry_bytes = shape_of(store_[table].key).entry_bytes;
    if (!has_snapshot(table))
        return load_entry(guest(table), number, entry_bytes);
    const auto page = snapshots_.of(table);
    if (entry_bytes != 4)
        return GuestEntry(page[number]);
    return GuestEntry(number % 2 == 0 ? page[number / 2] & 0xffff'ffff : page[number / 2] >> 32);
}

void Tracker::remember(TableIndex table, unsigned number, GuestEntry entry) {
    if (!has_snapshot(table))
        return; // the guest's table itself is what it is made from
    const auto page = snapshots_.of(table);
    if (shape_of(store_[table].key).entry_bytes != 4) {
        page[number] = entry.raw();
        return;
    }
    const unsigned shift = number % 2 * 32;
    page[number / 2] = (page[number / 2] & ~(std::uint64_t{0xffff'ffff} << shift)) | entry.raw() << shift;
}

/// Makes the snapshot of a table that is in step: the same bytes, two entries at a time if they have 4.
void Tracker::remember_all(TableIndex table) {
    const auto entries = guest(table);
    const auto page = snapshots_.of(table);
    for (unsigned number = 0; number < entries.size() / sizeof(GuestEntry); ++number)
        page[number] = load_entry(entries, number, sizeof(GuestEntry)).raw();
}

void Tracker::release_snapshots() {
    constexpr std::size_t at_a_time = 64; // tables: as long as a few traps take
    if (settling_.empty() || epoch_ < next_release_)
        return;
    std::vector<TableIndex> released;
    std::erase_if(settling_, [&](GuestTableIndex number) {
        GuestTable& page = at(number);
        if (released.size() >= at_a_time ||
            (page.is_protected && epoch_ - page.since < config_.settled_after))
            return false;
        page.settling = false;
        if (page.is_protected) {
            page.is_snapshot = true;
            page.checksum = checksum(page);
            for_each_shadow(page, [&](TableIndex shadow) { released.push_back(shadow); });
        }
        return true;
    });
    if (released.size() < at_a_time)
        next_release_ = epoch_ + config_.settled_after;
    snapshots_.release(std::move(released));
}

/// Of all of the page but the accessed and dirty bits of 4-byte and 8-byte entries, which a CPU may set.
std::uint64_t Tracker::checksum(const GuestTable& page) const {
    constexpr std::uint64_t marks = entry_bit::accessed | entry_bit::dirty;
    constexpr std::uint64_t prime = 0x100'0000'01b3; // FNV-1a's
    const auto bytes = memory_.range(page.frame.base(), page_size);
    std::uint64_t sum = 0;
    for (unsigned number = 0; number < entries_per_table; ++number)
        sum = (sum ^ (load_entry(bytes, number, 8).raw() & ~(marks | marks << 32))) * prime;
    return sum;
}

// --- In step

/// Drops what was made from entry `number` if it is not that any more. True if the guest has changed it.
bool Tracker::compare_entry(TableIndex table, unsigned number, std::vector<TableWrite>* writes) {
    const TableKey& key = store_[table].key;
    const TableShape shape = shape_of(key);
    const GuestEntry now = load_entry(guest(table), number, shape.entry_bytes);
    const GuestEntry before = remembered(table, number);
    if (before == now)
        return false;
    remember(table, number, now);
    if (only_marked(before, now))
        return false;
    if (writes != nullptr)
        writes->push_back({key.origin + std::size_t{number} * shape.entry_bytes, key.level, before, now});
    for (unsigned i = 0; i < shape.slots_per_entry; ++i)
        store_.drop_entry(table, number * shape.slots_per_entry + i);
    return true;
}

/// Brings the entries of one table in step; not what lies below it. Appends what the guest has changed to
/// `writes`.
void Tracker::compare(TableIndex table, std::vector<TableWrite>* writes) {
    Table& subject = store_[table];
    subject.compared = epoch_;
    if (subject.guest == GuestTableIndex::none || !has_snapshot(table))
        return;
    const TableShape shape = shape_of(subject.key);
    const auto now = guest(table);
    const auto before = std::as_writable_bytes(snapshots_.of(table)).first(shape.bytes());
    ++counters_.tables_compared;
    bool changed = false;
    constexpr std::size_t line = 64; // mostly one entry has changed: only its cache line is looked through
    for (std::size_t at = unchanged(now, before) ? shape.bytes() : 0; at < shape.bytes(); at += line) {
        if (unchanged(now.subspan(at, line), before.subspan(at, line)))
            continue;
        for (std::size_t number = at / shape.entry_bytes; number < (at + line) / shape.entry_bytes; ++number)
            changed |= compare_entry(table, static_cast<unsigned>(number), writes);
    }
    if (changed) {
        ++counters_.tables_changed;
        at(subject.guest).quiet = 0;
    } else {
        note_quiet(subject.guest);
    }
}

/// A comparison has found no change.
void Tracker::note_quiet(GuestTableIndex number) {
    GuestTable& page = at(number);
    if (page.is_protected || ++page.quiet < quiet_needed(page))
        return;
    ++spent_on_candidates_;
    if (!std::exchange(page.candidate, true))
        candidates_.push_back(number);
}

/// Calls for each table below and including `table` that is not in step by being write-protected. Compare:
/// brings it in step with the guest's.
void Tracker::collect(TableIndex table, View* view, Collect how) {
    Table& subject = store_[table];
    if (subject.visited == visits_)
        return;
    subject.visited = visits_;
    if (subject.guest != GuestTableIndex::none && !is_protected(table)) {
        if (view != nullptr)
            (subject.key.level == 1 ? view->lowest : view->upper).push_back(table);
        if (how == Collect::compare && subject.compared < epoch_)
            compare(table);
    }
    store_.for_each_child(table, [&](unsigned, TableIndex child) { collect(child, view, how); });
    if (how == Collect::compare)
        subject.epoch = epoch_;
}

/// The list of what must be compared below `root`. Remembered, for as long as tables are neither linked nor
/// unlinked nor change their protection: most switches of address space find it so, and pay for what is in
/// it, not for looking.
Tracker::View& Tracker::view_of(TableIndex root) {
    View& view = views_[root];
    if (view.structure != store_.structure()) {
        view.upper.clear();
        view.lowest.clear();
        ++visits_;
        collect(root, &view, Collect::list);
        view.structure = store_.structure();
    }
    return view;
}

void Tracker::renew(TableIndex table) {
    ++epoch_;
    ++visits_;
    collect(table, nullptr, Collect::compare);
}

bool Tracker::bring_in_step(TableIndex root, std::uint64_t since) {
    if (store_[root].epoch >= since)
        return false;
    // All of them, also those that were compared for another root in this epoch: the guest may have written
    // to them since, and a CPU that has forgotten everything under this root reads them now.
    const View& view = view_of(root);
    for (const auto* list : {&view.upper, &view.lowest}) {
        for (const TableIndex table : *list)
            compare(table);
    }
    store_[root].epoch = epoch_;
    return true;
}

/// Of the level-1 tables only the entry for `at` is compared, for the TLB may keep other pages' translations;
/// of those above, all entries, for the paging-structure caches are emptied.
void Tracker::invalidate(TableIndex root, GuestVirt at) {
    for (const TableIndex table : view_of(root).upper)
        compare(table);
    const auto read = [this](const Level&, MachinePhys slot) {
        return store_.entries(*store_.pool().page_of(slot.frame()))[slot.page_offset() / sizeof(ShadowEntry)];
    };
    const auto visit = [&](const WalkStep<MachinePhysSpace>& step) {
        const TableIndex table = *store_.pool().page_of(step.slot.frame());
        if (!step.entry.present() || store_.is_switcher(table, step.level->index(at)))
            return WalkNext::stop;
        if (step.level->number == 1 && store_[table].guest != GuestTableIndex::none && !is_protected(table))
            (void)compare_entry(table, step.level->index(at) / shape_of(store_[table].key).slots_per_entry,
                                nullptr);
        return WalkNext::descend;
    };
    walk(paging_4_level, store_.pool().frame(root), at, at, read, visit);
}

void Tracker::set_registers(TableIndex root, std::span<const std::uint64_t, 4> pdptes) {
    const auto third = store_.child(root, store_.entries(root)[0]);
    if (!third)
        return;
    for (unsigned i = 0; i < pdptes.size(); ++i) {
        if (remembered(*third, i).raw() != pdptes[i])
            store_.drop_entry(*third, i);
    }
}

// --- Write protection

bool Tracker::is_protected(MachineFrame frame) const {
    if (!store_.reverse().tracked(frame))
        return false;
    const GuestTable* const page = find(GuestFrame(frame.number()));
    return page != nullptr && page->is_protected && !page->open;
}

/// After how many comparisons without a change a table is better protected. Comparing it as often as one trap
/// costs, and then protecting it, costs at most twice what knowing the future would. Whoever does not keep
/// the peace is watched for longer the next time.
unsigned Tracker::quiet_needed(const GuestTable& page) const {
    constexpr unsigned never = ~0U;
    switch (config_.sync) {
    case Sync::compare:
        return never;
    case Sync::protect:
    case Sync::trap:
        return 1;
    case Sync::adaptive:
        return config_.trap_cost * page.patience;
    }
    return never;
}

/// To look through all tables for mappings of the candidates costs as much as some comparisons of each: it is
/// done for many candidates at once, when comparing them has cost as much.
std::vector<GuestTableIndex> Tracker::take_candidates() {
    constexpr std::size_t comparisons = 4;
    std::erase_if(candidates_, [this](GuestTableIndex number) { // changed since then, or protected by a fill
        GuestTable& page = at(number);
        page.candidate = !page.is_protected && page.quiet >= quiet_needed(page);
        return !page.candidate;
    });
    const auto known = [this](GuestTableIndex page) {
        return store_.reverse().tracked(same_frame(at(page).frame));
    };
    if (config_.sync == Sync::adaptive && !std::ranges::all_of(candidates_, known) &&
        spent_on_candidates_ < comparisons * store_.pool().in_use())
        return {};
    if (!candidates_.empty())
        spent_on_candidates_ = 0;
    for (const GuestTableIndex page : candidates_)
        at(page).candidate = false;
    return std::exchange(candidates_, {});
}

void Tracker::track(std::span<const GuestTableIndex> pages) {
    std::unordered_set<std::uint64_t> fresh;
    for (const GuestTableIndex page : pages) {
        const MachineFrame frame = same_frame(at(page).frame);
        if (!store_.reverse().tracked(frame) && store_.reverse().track(frame))
            fresh.insert(frame.number());
    }
    if (fresh.empty())
        return;
    store_.for_each_of_level(1, [&](TableIndex table) {
        store_.for_each_entry(table, [&](unsigned slot, ShadowEntry entry) {
            const MachineFrame frame = entry.table(); // the page's, at level 1
            if (store_.reverse().tracked(frame) && fresh.contains(frame.number()))
                store_.reverse().add(frame, {table, slot});
        });
    });
}

void Tracker::protect(std::span<const GuestTableIndex> pages) {
    for (const GuestTableIndex number : pages) {
        GuestTable& page = at(number);
        restrict_mappings(page);
        page.is_protected = true;
        page.since = epoch_;
        count_protected(page.frame, 1);
        ++counters_.tables_protected;
        for_each_shadow(page, [this](TableIndex shadow) { compare(shadow); });
        const bool may_settle = config_.sync != Sync::trap; // where what a write has changed is to be told
        if (may_settle && !std::exchange(page.settling, true))
            settling_.push_back(number);
    }
    store_.note_change();
}

/// Takes the right to write from all that maps `page`.
void Tracker::restrict_mappings(const GuestTable& page) {
    for (const ShadowSlot place : store_.reverse().small(same_frame(page.frame))) {
        const ShadowEntry entry = store_.entries(place.table)[place.slot];
        if (entry.writable())
            store_.set_entry(place.table, place.slot, ShadowEntry(entry.raw() & ~entry_bit::writable));
    }
}

void Tracker::unprotect(GuestFrame page) {
    unprotect(*find(page));
}

void Tracker::unprotect(GuestTable& page) {
    constexpr unsigned most_patience = 64;
    ++counters_.table_writes;
    const bool kept_peace = epoch_ - page.since > std::uint64_t{4} * quiet_needed(page);
    page.patience = kept_peace ? std::max(page.patience / 2, 1U) : std::min(page.patience * 2, most_patience);
    page.is_protected = false;
    page.quiet = 0;
    const bool was_snapshot = std::exchange(page.is_snapshot, false);
    for_each_shadow(page, [&](TableIndex shadow) {
        store_[shadow].compared = epoch_;
        if (was_snapshot)
            remember_all(shadow);
    });
    count_protected(page.frame, -1);
    store_.note_change();
}

void Tracker::give_up(GuestFrame frame) {
    GuestTable& page = *find(frame);
    for_each_shadow(page, [this](TableIndex shadow) {
        for (unsigned slot = 0; slot < entries_per_table; ++slot)
            store_.drop_entry(shadow, slot);
    });
    unprotect(page);
}

bool Tracker::is_live(GuestFrame frame) {
    ++visits_;
    store_.find_idle([this](TableIndex root) {
        if (store_[root].pins != 0)
            collect(root, nullptr, Collect::list);
        return false;
    });
    bool reached = false;
    for_each_shadow(*find(frame), [&](TableIndex shadow) { reached |= store_[shadow].visited == visits_; });
    return reached;
}

bool Tracker::open(GuestFrame frame) {
    GuestTable* const page = find(frame);
    if (page == nullptr)
        return false;
    ++counters_.table_writes;
    page->open = true;
    return true;
}

void Tracker::close(GuestFrame frame, std::vector<TableWrite>& writes) {
    GuestTable* const page = find(frame);
    if (page == nullptr)
        return;
    page->open = false;
    restrict_mappings(*page);
    compare_shadows(*page, writes);
}

/// Tables made from the same entries, for different roles, have seen the same change.
void Tracker::compare_shadows(GuestTable& page, std::vector<TableWrite>& writes) {
    std::unordered_set<std::uint64_t> told;
    for_each_shadow(page, [&](TableIndex shadow) {
        const bool first = told.insert(store_[shadow].key.origin.value()).second;
        compare(shadow, first ? &writes : nullptr);
    });
}

void Tracker::wrote(GuestPhys start, std::size_t size, std::vector<TableWrite>& writes) {
    if (size == 0)
        return;
    for (GuestFrame frame = start.frame(); frame <= (start + (size - 1)).frame(); frame = frame + 1) {
        if (!is_protected(same_frame(frame)))
            continue;
        GuestTable& page = *find(frame);
        if (config_.sync == Sync::trap) {
            compare_shadows(page, writes);
        } else {
            drop_written(page, start, size);
            unprotect(page);
        }
    }
}

/// umbra itself has written to a protected page: what was made from the entries there is old, and nothing
/// tells so any more. A CPU may forget translations at any time.
void Tracker::drop_written(const GuestTable& page, GuestPhys start, std::size_t size) {
    for_each_shadow(page, [&](TableIndex shadow) {
        const TableKey& key = store_[shadow].key;
        const TableShape shape = shape_of(key);
        for (unsigned slot = 0; slot < shape.entries * shape.slots_per_entry; ++slot) {
            const GuestPhys entry =
                key.origin + std::size_t{slot} / shape.slots_per_entry * shape.entry_bytes;
            if (entry < start + size && start < entry + shape.entry_bytes)
                store_.drop_entry(shadow, slot);
        }
    });
}

/// A bit that is set in a table of 32-bit paging is another bit of an 8-byte entry, if the page is, or was, a
/// table of such as well.
void Tracker::marked(const GuestWalk& walk) {
    for (const GuestWalk::Step& step : walk.visited()) {
        if (step.level->entry_bytes != 4)
            return; // no level has, then
        const GuestTable* const page = find(step.slot.frame());
        if (page == nullptr || !page->is_protected)
            continue;
        for_each_shadow(*page, [&](TableIndex shadow) {
            if (shape_of(store_[shadow].key).entry_bytes != 8)
                return;
            compare(shadow);
            if (!has_snapshot(shadow)) // whether it has changed now cannot be told
                store_.drop_entry(shadow,
                                  static_cast<unsigned>(step.slot.page_offset() / sizeof(GuestEntry)));
        });
    }
}

void Tracker::count_protected(GuestFrame frame, int change) {
    for (auto* counts : {&protected_2mb_, &protected_1gb_}) {
        const std::uint64_t first = first_of(frame, counts == &protected_2mb_ ? 2 : 3).number();
        unsigned& count = (*counts)[first];
        count += static_cast<unsigned>(change);
        if (count != 0)
            continue;
        counts->erase(first);
        if (counts == &protected_2mb_)
            to_merge_[first] = epoch_;
    }
}

std::vector<GuestFrame> Tracker::take_quiet_memory() {
    constexpr std::uint64_t while_epochs = 256;
    std::vector<GuestFrame> quiet;
    std::erase_if(to_merge_, [&](const auto& memory) {
        const auto [first, since] = memory;
        if (epoch_ - since < while_epochs)
            return false;
        quiet.emplace_back(first);
        return true;
    });
    return quiet;
}

// --- For the audit

std::optional<std::string> Tracker::audit(TableIndex table) const {
    const Table& subject = store_[table];
    if (subject.guest == GuestTableIndex::none || !is_protected(table) || at(subject.guest).open ||
        !has_snapshot(table))
        return std::nullopt;
    const TableShape shape = shape_of(subject.key);
    for (unsigned number = 0; number < shape.entries; ++number) {
        const GuestEntry before = remembered(table, number);
        const GuestEntry now = load_entry(guest(table), number, shape.entry_bytes);
        if (before != now && !only_marked(before, now))
            return fmt::format("entry {} of the guest's table behind table {} changed under protection",
                               number, TablePool::number(table));
    }
    return std::nullopt;
}

std::optional<std::string> Tracker::audit_settled() const {
    for (const GuestTable& page : pages_) {
        const bool used = page.shadows != no_table;
        if (used && page.is_snapshot && page.checksum != checksum(page))
            return fmt::format("the guest's table in frame {:#x} changed under protection",
                               page.frame.number());
    }
    return std::nullopt;
}

} // namespace umbra
