#include "shadow/shadow_tables.hpp"

#include <algorithm>
#include <cstring>
#include <unordered_set>
#include <utility>

#include <fmt/core.h>

namespace umbra {
namespace {

constexpr unsigned root_level = 4;

/// What every present shadow entry has. U/S: guest code of any virtual privilege runs at CPL 3. Accessed and
/// dirty are set beforehand, so that neither the CPU nor a KVM that shadows these tables in turn has a reason
/// to write to them.
constexpr std::uint64_t base_rights =
    entry_bit::present | entry_bit::user | entry_bit::accessed | entry_bit::dirty;
constexpr std::uint64_t all_rights = base_rights | entry_bit::writable;

/// Whether the CPU itself may have turned `before` into `now`: accessed or dirty was set, nothing else.
bool only_marked(GuestEntry before, GuestEntry now) {
    constexpr std::uint64_t marks = entry_bit::accessed | entry_bit::dirty;
    return ((before.raw() ^ now.raw()) & ~marks) == 0 && (before.raw() & ~now.raw()) == 0;
}

/// Whether `now` is the same leaf with more rights. A fault on the old one makes any CPU, and any KVM, look
/// again.
bool is_upgrade(ShadowEntry before, ShadowEntry now) {
    const std::uint64_t gained = now.raw() & ~before.raw();
    const std::uint64_t lost = before.raw() & ~now.raw();
    return (gained & ~entry_bit::writable) == 0 && (lost & ~entry_bit::no_execute) == 0;
}

/// The rights that an entry of a table with this role passes on.
std::uint64_t rights_of(GuestEntry entry, const Role& role) {
    std::uint64_t rights = base_rights;
    if (entry.writable() || !role.write_protect)
        rights |= entry_bit::writable;
    if (entry.no_execute())
        rights |= entry_bit::no_execute;
    return rights;
}

std::uint64_t leaf_rights(GuestEntry entry, const Role& role) {
    std::uint64_t rights = rights_of(entry, role);
    if (!entry.dirty()) // the first write must fault, so that dirty is set when a CPU would
        rights &= ~entry_bit::writable;
    const bool user_page = role.user_path && entry.user();
    if (role.user_pages_nx && user_page)
        rights |= entry_bit::no_execute;
    if (role.user_pages_hidden && user_page) // there only for a fetch, which shall not let a write pass
        rights &= ~entry_bit::writable;
    return rights;
}

/// One load: the guest may write at the same time, and the copy is what counts.
GuestEntry load_entry(std::span<const std::byte> table, unsigned number, unsigned entry_bytes) {
    auto* at = const_cast<std::byte*>(table.data()) + std::size_t{number} * entry_bytes;
    if (entry_bytes == 4)
        return GuestEntry(std::atomic_ref<std::uint32_t>(*reinterpret_cast<std::uint32_t*>(at))
                              .load(std::memory_order_relaxed));
    return GuestEntry(std::atomic_ref<std::uint64_t>(*reinterpret_cast<std::uint64_t*>(at))
                          .load(std::memory_order_relaxed));
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

ShadowEntry load_entry(const ShadowEntry& entry) {
    return std::atomic_ref<ShadowEntry>(const_cast<ShadowEntry&>(entry)).load(std::memory_order_relaxed);
}

void store_entry(ShadowEntry& entry, ShadowEntry value) {
    static_assert(std::atomic_ref<ShadowEntry>::is_always_lock_free);
    std::atomic_ref<ShadowEntry>(entry).store(value, std::memory_order_release);
}

MachineFrame same_frame(GuestFrame frame) {
    return MachineFrame(frame.number());
}

/// One more than the last frame of RAM.
std::uint64_t frames_of(const GuestMemory& memory) {
    std::uint64_t end = 0;
    for (const GuestMemory::Region& region : memory.regions())
        end = std::max(end, region.base.frame().number() + region.bytes.size() / page_size);
    return end;
}

/// The first frame of the large page of `level` that holds `frame`.
GuestFrame first_of(GuestFrame frame, unsigned level) {
    return GuestFrame(frame.number() & ~((paging_4_level.level(level).span() >> page_shift) - 1));
}

} // namespace

std::size_t TableKeyHash::operator()(const TableKey& key) const noexcept {
    const Role& role = key.role;
    std::uint64_t bits = static_cast<std::uint64_t>(role.mode) << 3 | key.level;
    for (const bool flag :
         {role.user, role.write_protect, role.no_execute, role.large_pages, role.user_pages_nx,
          role.user_pages_hidden, role.user_path, role.direct, role.guarded})
        bits = bits << 1 | std::uint64_t{flag};
    // Origins are multiples of 32, and below 2^52.
    return static_cast<std::size_t>((key.origin.value() << 11 ^ bits) * 0x9e37'79b9'7f4a'7c15U >> 16);
}

ShadowTables::ShadowTables(const GuestMemory& memory, TablePool& pool, MmuConfig config, ShadowEntry switcher)
    : memory_(memory), pool_(pool), config_(std::move(config)), switcher_(switcher),
      slot_(config_.first_slot), tables_(pool.capacity()), snapshots_(pool.capacity()),
      reverse_(frames_of(memory)) {}

ShadowTables::~ShadowTables() = default;

/// Returns when no other vCPU is in the guest; none enters before the caller gives the lock back.
void ShadowTables::stop_others() {
    const auto in_guest = [](const Ledger* ledger) { return ledger->in_guest.load(); };
    if (std::ranges::none_of(ledgers_, in_guest))
        return;
    if (config_.kick)
        config_.kick();
    for (const Ledger* ledger : ledgers_)
        ledger->in_guest.wait(true);
}

// --- Tables

/// A free page of the pool, if need be by giving up tables.
std::optional<TableIndex> ShadowTables::allocate() {
    if (auto page = pool_.allocate())
        return page;
    stop_others(); // the page has a past
    for (int attempt = 0; attempt < 2; ++attempt) {
        for (const TableIndex candidate : idle_) { // least recently used first
            if (table(candidate).pins != 0)
                continue;
            destroy(candidate);
            ++counters_.tables_recycled;
            return pool_.allocate();
        }
        evict();
    }
    return std::nullopt;
}

/// Takes an eighth of the tables that are in use from their parents: those that no fill went through for the
/// longest time. They are idle then. What the present fill goes through stays.
void ShadowTables::evict() {
    std::vector<TableIndex> victims;
    for (std::size_t i = 0; i < tables_.size(); ++i) {
        if (tables_[i].live && tables_[i].uses != 0 && tables_[i].filled != clock_)
            victims.push_back(static_cast<TableIndex>(i));
    }
    const auto by_age = [this](TableIndex a, TableIndex b) { return table(a).filled < table(b).filled; };
    const std::size_t count = (victims.size() + 7) / 8;
    std::ranges::nth_element(victims, victims.begin() + static_cast<std::ptrdiff_t>(count), by_age);
    victims.resize(count);
    const std::unordered_set<TableIndex> chosen(victims.begin(), victims.end());
    for (std::size_t i = 0; i < tables_.size() && !chosen.empty(); ++i) {
        const auto parent = static_cast<TableIndex>(i);
        if (!tables_[i].live || tables_[i].links == 0)
            continue;
        for (unsigned slot = 0; slot < entries_per_table; ++slot) {
            const ShadowEntry entry = pool_.entries(parent)[slot];
            if (!entry.present() || is_leaf(tables_[i], entry))
                continue;
            if (const auto child = pool_.page_of(entry.table()); child && chosen.contains(*child))
                set_entry(parent, slot, ShadowEntry());
        }
    }
}

/// The root for `key`, in step with the guest's tables as of epoch `since` at least. Nothing when the pool is
/// exhausted and every table is in use.
std::optional<TableIndex> ShadowTables::root(const TableKey& key, std::uint64_t since) {
    const auto found = by_key_.find(key);
    if (found == by_key_.end())
        return obtain(key);
    const TableIndex index = found->second;
    ++counters_.tables_reused;
    idle_.splice(idle_.end(), idle_, table(index).idle); // now the most recently used
    bring_in_step(index, since);
    return index;
}

/// The table for `key`, from the cache or new, to be referred to anew; it and all below it are in step with
/// the guest's as of now. A CPU reads the entries of a walk from the root down: it has none below a new link
/// that is older than the link. Nothing when the pool is exhausted and every table is in use.
std::optional<TableIndex> ShadowTables::obtain(const TableKey& key) {
    if (const auto found = by_key_.find(key); found != by_key_.end()) {
        const TableIndex index = found->second;
        if (table(index).uses == 0) {
            ++counters_.tables_reused;
            idle_.splice(idle_.end(), idle_, table(index).idle);
        }
        ++epoch_;
        ++visits_;
        // Of registers (PAE) nothing is there to compare: they may have changed while no root led here.
        if (key.role.mode == GuestMode::pae && key.level == 3) {
            for (unsigned slot = 0; slot < GuestPaging{}.pdptes.size(); ++slot)
                drop_entry(index, slot);
        }
        collect(index, nullptr, Collect::compare);
        return index;
    }
    const auto page = allocate();
    if (!page)
        return std::nullopt;
    return make(key, *page);
}

TableIndex ShadowTables::make(const TableKey& key, TableIndex page) {
    ++counters_.tables_built;
    by_key_.emplace(key, page);
    Table& made = table(page);
    made = {.key = key, .live = true, .compared = epoch_, .epoch = epoch_, .filled = clock_};
    made.idle = idle_.insert(idle_.end(), page);
    if (key.level == root_level)
        store_entry(pool_.entries(page)[slot_], switcher_);
    if (key.role.direct)
        fill_direct(page);
    const TableShape shape = shape_of(key);
    const auto guest = memory_.range(key.origin, shape.bytes());
    if (shape.entries == 0 || guest.empty())
        return page;
    GuestTable& origin = guest_tables_[key.origin.frame()];
    origin.frame = key.origin.frame();
    origin.shadows.push_back(page);
    made.guest = &origin;
    if (has_snapshot(made))
        remember_all(page);
    return page;
}

/// The table for `key` that entry `slot` of table `parent` refers to, or is to refer to.
std::optional<TableIndex> ShadowTables::child_table(TableIndex parent, unsigned slot, const TableKey& key) {
    const ShadowEntry entry = pool_.entries(parent)[slot];
    if (entry.present() && !is_leaf(table(parent), entry)) {
        if (const auto linked = pool_.page_of(entry.table()); linked && table(*linked).key == key)
            return linked;
    }
    return obtain(key);
}

/// Makes entry `slot` of `parent` refer to the table for `key`, for a fill that goes through it. Nothing when
/// the pool is exhausted.
std::optional<TableIndex> ShadowTables::link(TableIndex parent, unsigned slot, const TableKey& key,
                                             std::uint64_t rights) {
    const auto child = child_table(parent, slot, key);
    if (!child)
        return std::nullopt;
    pass_through(*child);
    const ShadowEntry old = pool_.entries(parent)[slot];
    const ShadowEntry now(pool_.frame(*child), rights);
    if (old.present() && old.table() == now.table() && old != now) { // as good as new: see obtain
        ++epoch_;
        ++visits_;
        collect(*child, nullptr, Collect::compare);
    }
    set_entry(parent, slot, now);
    return child;
}

/// Returns an idle table's page to the pool. The tables that are idle without it are the next to go.
void ShadowTables::destroy(TableIndex index) {
    Table& dead = table(index);
    for (unsigned slot = 0; slot < entries_per_table; ++slot) {
        const ShadowEntry entry = pool_.entries(index)[slot];
        if (!entry.present() || is_switcher(dead, slot))
            continue;
        if (is_leaf(dead, entry))
            note_leaf(index, slot, entry, false);
        else
            drop_reference(entry, idle_.begin());
    }
    by_key_.erase(dead.key);
    idle_.erase(dead.idle);
    views_.erase(index);
    if (dead.guest != nullptr) {
        std::erase(dead.guest->shadows, index);
        if (dead.guest->shadows.empty())
            forget(*dead.guest);
        dead.guest = nullptr;
    }
    dead.live = false;
    ++structure_;
    pool_.release(index);
    owe(index, dead.key.level == root_level); // the page may serve again before the machine has forgotten it
}

/// `place`: where in idle_ the table goes if this was the last reference.
void ShadowTables::drop_reference(ShadowEntry entry, std::list<TableIndex>::iterator place) {
    const auto child = pool_.page_of(entry.table());
    if (!child)
        return;
    Table& orphan = table(*child);
    if (--orphan.uses == 0)
        orphan.idle = idle_.insert(place, *child);
}

/// Keeps the reverse map.
void ShadowTables::note_leaf(TableIndex index, unsigned slot, ShadowEntry entry, bool added) {
    const unsigned level = table(index).key.level;
    const MachineFrame frame = entry.page(paging_4_level.level(level));
    const ShadowSlot place{index, slot};
    if (level == 1) {
        if (reverse_.tracked(frame))
            added ? reverse_.add(frame, place) : reverse_.remove(frame, place);
    } else {
        added ? reverse_.add_large(frame, level, place) : reverse_.remove_large(frame, level, place);
    }
}

/// The one place where an entry of a shadow table changes.
void ShadowTables::set_entry(TableIndex index, unsigned slot, ShadowEntry value) {
    ShadowEntry& entry = pool_.entries(index)[slot];
    const ShadowEntry old = entry;
    if (old == value)
        return;
    Table& parent = table(index);
    const bool leaf = value.present() && is_leaf(parent, value);
    const bool was_leaf = old.present() && is_leaf(parent, old);
    if (value.present() && !leaf) {
        if (const auto page = pool_.page_of(value.table()); page && table(*page).uses++ == 0)
            idle_.erase(table(*page).idle);
        ++parent.links;
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
        drop_reference(old, idle_.end());
        --parent.links;
        ++structure_;
    }
    if (leaf && was_leaf && is_upgrade(old, value)) {
        ++counters_.upgrades;
        return;
    }
    owe(index);
}

/// Every vCPU must take note of a change to a present entry of this table.
void ShadowTables::owe(TableIndex index, bool root_gone) {
    for (Ledger* ledger : ledgers_) {
        ledger->debt.flush = true;
        ledger->debt.root_gone |= root_gone;
        if (config_.stores_seen || ledger->owed[TablePool::number(index)])
            continue;
        ledger->owed[TablePool::number(index)] = true;
        ledger->debt.tables.push_back(index);
    }
}

/// Forgets every table.
void ShadowTables::reset() {
    stop_others();
    by_key_.clear();
    idle_.clear();
    views_.clear();
    candidates_.clear();
    settling_.clear();
    for (const auto& [frame, page] : guest_tables_)
        reverse_.untrack(same_frame(frame));
    guest_tables_.clear();
    opened_.clear();
    reverse_.clear_large();
    protected_2mb_.clear();
    protected_1gb_.clear();
    to_merge_.clear();
    for (std::size_t i = 0; i < tables_.size(); ++i) {
        if (!tables_[i].live)
            continue;
        tables_[i] = {};
        pool_.release(static_cast<TableIndex>(i));
        owe(static_cast<TableIndex>(i), true);
    }
    ++structure_;
    ++resets_;
}

/// Empties every table; the machine must ask for each translation again.
void ShadowTables::forget_entries() {
    for (const auto& [key, index] : by_key_) {
        for (unsigned slot = 0; slot < entries_per_table; ++slot) {
            if (pool_.entries(index)[slot].present() && !is_switcher(table(index), slot))
                set_entry(index, slot, ShadowEntry());
        }
    }
}

// --- Keeping up with the guest

/// What the slots of entry `number` were made from.
GuestEntry ShadowTables::remembered(TableIndex index, unsigned number) const {
    const TableShape shape = shape_of(table(index).key);
    if (!has_snapshot(table(index)))
        return load_entry(memory_.range(table(index).key.origin, shape.bytes()), number, shape.entry_bytes);
    const auto page = snapshots_.of(index);
    if (shape.entry_bytes != 4)
        return GuestEntry(page[number]);
    return GuestEntry(number % 2 == 0 ? page[number / 2] & 0xffff'ffff : page[number / 2] >> 32);
}

void ShadowTables::remember(TableIndex index, unsigned number, GuestEntry entry) {
    if (!has_snapshot(table(index)))
        return; // the guest's table itself is what it is made from
    const auto page = snapshots_.of(index);
    if (shape_of(table(index).key).entry_bytes != 4) {
        page[number] = entry.raw();
        return;
    }
    const unsigned shift = number % 2 * 32;
    page[number / 2] = (page[number / 2] & ~(std::uint64_t{0xffff'ffff} << shift)) | entry.raw() << shift;
}

/// Makes the snapshot of a table that is in step.
void ShadowTables::remember_all(TableIndex index) {
    const TableKey& key = table(index).key;
    const TableShape shape = shape_of(key);
    const auto guest = memory_.range(key.origin, shape.bytes());
    for (unsigned number = 0; number < shape.entries; ++number)
        remember(index, number, load_entry(guest, number, shape.entry_bytes));
}

void ShadowTables::drop_entry(TableIndex index, unsigned slot) {
    if (!pool_.entries(index)[slot].present() || is_switcher(table(index), slot))
        return; // the switcher's entry was not made from the guest's
    set_entry(index, slot, ShadowEntry());
    ++counters_.entries_dropped;
}

/// Drops what was made from entry `number` if it is not that any more. True if the guest has changed it.
bool ShadowTables::compare_entry(TableIndex index, unsigned number, GuestEntry now,
                                 std::vector<TableWrite>* writes) {
    const GuestEntry before = remembered(index, number);
    if (before == now)
        return false;
    remember(index, number, now);
    if (only_marked(before, now))
        return false;
    const TableKey& key = table(index).key;
    const TableShape shape = shape_of(key);
    if (writes != nullptr)
        writes->push_back({key.origin + std::size_t{number} * shape.entry_bytes, key.level, before, now});
    for (unsigned i = 0; i < shape.slots_per_entry; ++i)
        drop_entry(index, number * shape.slots_per_entry + i);
    return true;
}

/// Brings the entries of one table in step; not what lies below it. Appends what the guest has changed to
/// `writes`.
void ShadowTables::compare(TableIndex index, std::vector<TableWrite>* writes) {
    Table& subject = table(index);
    subject.compared = epoch_;
    if (subject.guest == nullptr || !has_snapshot(subject))
        return;
    const TableShape shape = shape_of(subject.key);
    const auto guest = memory_.range(subject.key.origin, shape.bytes());
    ++counters_.tables_compared;
    bool changed = false;
    const auto before = snapshot(index);
    constexpr std::size_t line = 64; // mostly one entry has changed: only its cache line is looked through
    for (std::size_t at = unchanged(guest, before) ? shape.bytes() : 0; at < shape.bytes(); at += line) {
        if (unchanged(guest.subspan(at, line), before.subspan(at, line)))
            continue;
        for (std::size_t number = at / shape.entry_bytes; number < (at + line) / shape.entry_bytes;
             ++number) {
            const auto entry = static_cast<unsigned>(number);
            changed |= compare_entry(index, entry, load_entry(guest, entry, shape.entry_bytes), writes);
        }
    }
    GuestTable& page = *subject.guest;
    if (changed) {
        ++counters_.tables_changed;
        page.quiet = 0;
        return;
    }
    if (page.is_protected || ++page.quiet < quiet_needed(page))
        return;
    ++spent_on_candidates_;
    if (!page.candidate) {
        page.candidate = true;
        candidates_.push_back(&page);
    }
}

/// Calls for each table below and including `index` that is not in step by being write-protected. Compare:
/// brings it in step with the guest's.
void ShadowTables::collect(TableIndex index, View* view, Collect how) {
    Table& subject = table(index);
    if (subject.visited == visits_)
        return;
    subject.visited = visits_;
    if (subject.guest != nullptr && !subject.guest->is_protected) {
        if (view != nullptr)
            (subject.key.level == 1 ? view->lowest : view->upper).push_back(index);
        if (how == Collect::compare && subject.compared < epoch_)
            compare(index);
    }
    unsigned links = subject.links;
    for (const ShadowEntry& entry : pool_.entries(index)) {
        if (links == 0)
            break;
        if (!entry.present() || is_leaf(subject, entry))
            continue;
        if (const auto child = pool_.page_of(entry.table())) {
            --links;
            collect(*child, view, how);
        }
    }
    if (how == Collect::compare)
        subject.epoch = epoch_;
}

/// The list of what must be compared below `root`. Remembered, for as long as tables are neither linked nor
/// unlinked nor change their protection: most switches of address space find it so, and pay for what is in
/// it, not for looking.
ShadowTables::View& ShadowTables::view_of(TableIndex root) {
    View& view = views_[root];
    if (view.structure != structure_) {
        view.upper.clear();
        view.lowest.clear();
        ++visits_;
        collect(root, &view, Collect::list);
        view.structure = structure_;
    }
    return view;
}

/// Brings a root and all below it in step with the guest's tables, unless they are as of epoch `since`.
void ShadowTables::bring_in_step(TableIndex root, std::uint64_t since) {
    if (table(root).epoch >= since)
        return;
    // All of them, also those that were compared for another root in this epoch: the guest may have written
    // to them since, and a CPU that has forgotten everything under this root reads them now.
    const View& view = view_of(root);
    for (const auto* list : {&view.upper, &view.lowest}) {
        for (const TableIndex index : *list)
            compare(index);
    }
    table(root).epoch = epoch_;
    if (!candidates_.empty())
        protect_candidates();
    if (!settling_.empty())
        release_snapshots();
}

/// INVLPG. Of the level-1 tables only the entry for `at` is compared, for the TLB may keep other pages'
/// translations; of those above, all entries, for the paging-structure caches are emptied.
void ShadowTables::invalidate(TableIndex root, GuestVirt at) {
    for (const TableIndex index : view_of(root).upper)
        compare(index);
    const auto read = [this](const Level&, MachinePhys slot) {
        return pool_.entries(*pool_.page_of(slot.frame()))[slot.page_offset() / sizeof(ShadowEntry)];
    };
    const auto visit = [&](const WalkStep<MachinePhysSpace>& step) {
        const auto index = pool_.page_of(step.slot.frame());
        if (!step.entry.present() || is_switcher(table(*index), step.level->index(at)))
            return WalkNext::stop;
        const Table& subject = table(*index);
        if (step.level->number == 1 && subject.guest != nullptr && !subject.guest->is_protected) {
            const TableShape shape = shape_of(subject.key);
            const unsigned number = step.level->index(at) / shape.slots_per_entry;
            const auto guest = memory_.range(subject.key.origin, shape.bytes());
            (void)compare_entry(*index, number, load_entry(guest, number, shape.entry_bytes), nullptr);
        }
        return WalkNext::descend;
    };
    walk(paging_4_level, pool_.frame(root), at, at, read, visit);
}

/// PAE: the registers that the third level is made from (Intel SDM vol. 3A, 4.4.1).
void ShadowTables::set_registers(TableIndex root, std::span<const std::uint64_t, 4> pdptes) {
    const ShadowEntry link = pool_.entries(root)[0];
    const auto third = link.present() ? pool_.page_of(link.table()) : std::nullopt;
    if (!third)
        return;
    for (unsigned i = 0; i < pdptes.size(); ++i) {
        if (remembered(*third, i).raw() != pdptes[i])
            drop_entry(*third, i);
    }
}

// --- Write protection

bool ShadowTables::is_protected(MachineFrame frame) const {
    if (!reverse_.tracked(frame))
        return false;
    const auto found = guest_tables_.find(GuestFrame(frame.number()));
    return found != guest_tables_.end() && found->second.is_protected && !found->second.open;
}

/// After how many comparisons without a change a table is better protected. Comparing it as often as one trap
/// costs, and then protecting it, costs at most twice what knowing the future would. Whoever does not keep
/// the peace is watched for longer the next time.
unsigned ShadowTables::quiet_needed(const GuestTable& page) const {
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
void ShadowTables::protect_candidates() {
    constexpr std::size_t comparisons = 4;
    std::erase_if(candidates_, [this](GuestTable* page) { // changed since then, or protected by a fill
        page->candidate = !page->is_protected && page->quiet >= quiet_needed(*page);
        return !page->candidate;
    });
    if (candidates_.empty())
        return;
    const bool known = std::ranges::all_of(
        candidates_, [this](const GuestTable* page) { return reverse_.tracked(same_frame(page->frame)); });
    if (config_.sync == Sync::adaptive && !known && spent_on_candidates_ < comparisons * pool_.in_use())
        return;
    spent_on_candidates_ = 0;
    std::vector<GuestTable*> chosen;
    std::swap(chosen, candidates_);
    for (GuestTable* page : chosen)
        page->candidate = false;
    protect(std::move(chosen));
}

/// From now on the guest's writes to these pages trap. No table is given up here: a large page that cannot be
/// split for want of memory is dropped.
void ShadowTables::protect(std::vector<GuestTable*> pages) {
    stop_others();
    track(pages);
    for (GuestTable* page : pages) {
        for (const unsigned level : {2U, 3U}) {
            const auto large = reverse_.large(same_frame(first_of(page->frame, level)), level);
            for (const ShadowSlot place : std::vector(large.begin(), large.end()))
                split(place.table, place.slot);
        }
        restrict_mappings(*page);
        page->is_protected = true;
        page->since = epoch_;
        count_protected(page->frame, 1);
        ++counters_.tables_protected;
        for (const TableIndex index : page->shadows)
            compare(index);
    }
    ++structure_;
    if (config_.sync == Sync::trap)
        return; // what a write has changed is to be told
    for (GuestTable* page : pages) {
        if (!std::exchange(page->settling, true))
            settling_.push_back(page);
    }
}

/// Protected pages are in step: what their shadows were made from can be read there. Of those that have been
/// for long enough, some.
void ShadowTables::release_snapshots() {
    constexpr std::size_t at_a_time = 64; // tables: as long as a few traps take
    if (epoch_ < next_release_)
        return;
    std::vector<TableIndex> released;
    std::erase_if(settling_, [&](GuestTable* page) {
        if (released.size() >= at_a_time ||
            (page->is_protected && epoch_ - page->since < config_.settled_after))
            return false;
        page->settling = false;
        if (page->is_protected) {
            page->is_snapshot = true;
            page->checksum = checksum(*page);
            released.insert(released.end(), page->shadows.begin(), page->shadows.end());
        }
        return true;
    });
    if (released.size() < at_a_time)
        next_release_ = epoch_ + config_.settled_after;
    snapshots_.release(std::move(released));
}

/// Of all of the page but the accessed and dirty bits of 4-byte and 8-byte entries, which a CPU may set.
std::uint64_t ShadowTables::checksum(const GuestTable& page) const {
    constexpr std::uint64_t marks = entry_bit::accessed | entry_bit::dirty;
    constexpr std::uint64_t prime = 0x100'0000'01b3; // FNV-1a's
    const auto bytes = memory_.range(page.frame.base(), page_size);
    std::uint64_t sum = 0;
    for (unsigned number = 0; number < entries_per_table; ++number)
        sum = (sum ^ (load_entry(bytes, number, 8).raw() & ~(marks | marks << 32))) * prime;
    return sum;
}

/// Makes the reverse map know these pages' mappings.
void ShadowTables::track(std::span<GuestTable* const> pages) {
    std::unordered_set<std::uint64_t> fresh;
    for (const GuestTable* page : pages) {
        const MachineFrame frame = same_frame(page->frame);
        if (!reverse_.tracked(frame) && reverse_.track(frame))
            fresh.insert(frame.number());
    }
    if (fresh.empty())
        return;
    for (std::size_t i = 0; i < tables_.size(); ++i) {
        if (!tables_[i].live || tables_[i].key.level != 1)
            continue;
        const auto entries = pool_.entries(static_cast<TableIndex>(i));
        for (unsigned slot = 0; slot < entries_per_table; ++slot) {
            const ShadowEntry entry = entries[slot];
            if (!entry.present())
                continue;                             // most are not
            const MachineFrame frame = entry.table(); // the frame, at level 1
            if (reverse_.tracked(frame) && fresh.contains(frame.number()))
                reverse_.add(frame, {static_cast<TableIndex>(i), slot});
        }
    }
}

/// Takes the right to write from all that maps `page`.
void ShadowTables::restrict_mappings(GuestTable& page) {
    for (const ShadowSlot place : reverse_.small(same_frame(page.frame))) {
        const ShadowEntry entry = pool_.entries(place.table)[place.slot];
        if (entry.writable())
            set_entry(place.table, place.slot, ShadowEntry(entry.raw() & ~entry_bit::writable));
    }
}

/// The guest writes to `page`: it is compared at flushes again.
void ShadowTables::unprotect(GuestTable& page) {
    constexpr unsigned most_patience = 64;
    ++counters_.table_writes;
    const bool kept_peace = epoch_ - page.since > std::uint64_t{4} * quiet_needed(page);
    page.patience = kept_peace ? std::max(page.patience / 2, 1U) : std::min(page.patience * 2, most_patience);
    page.is_protected = false;
    page.quiet = 0;
    const bool was_snapshot = std::exchange(page.is_snapshot, false);
    for (const TableIndex index : page.shadows) {
        table(index).compared = epoch_;
        if (was_snapshot)
            remember_all(index);
    }
    count_protected(page.frame, -1);
    ++structure_;
}

/// umbra itself has written to a protected page: what was made from the entries there is old, and nothing
/// tells so any more. A CPU may forget translations at any time.
void ShadowTables::drop_written(const GuestTable& page, GuestPhys at, std::size_t size) {
    for (const TableIndex index : page.shadows) {
        const TableKey& key = table(index).key;
        const TableShape shape = shape_of(key);
        for (unsigned slot = 0; slot < shape.entries * shape.slots_per_entry; ++slot) {
            const GuestPhys entry =
                key.origin + std::size_t{slot} / shape.slots_per_entry * shape.entry_bytes;
            if (entry < at + size && at < entry + shape.entry_bytes)
                drop_entry(index, slot);
        }
    }
}

/// No shadow table is made from `page` any more.
void ShadowTables::forget(GuestTable& page) {
    if (page.is_protected)
        count_protected(page.frame, -1);
    if (page.candidate)
        std::erase(candidates_, &page);
    if (page.settling)
        std::erase(settling_, &page);
    reverse_.untrack(same_frame(page.frame));
    guest_tables_.erase(page.frame);
}

/// Whether the machine can reach a shadow of `page` from the roots in use. What it cannot reach may be no
/// table of the guest any more.
bool ShadowTables::is_live(const GuestTable& page) {
    ++visits_;
    for (const TableIndex root : idle_) {
        if (table(root).pins != 0)
            collect(root, nullptr, Collect::list);
    }
    return std::ranges::any_of(page.shadows,
                               [this](TableIndex index) { return table(index).visited == visits_; });
}

/// Forgets what was made from `page`, and lets the guest write to it, until a fill goes through it again.
void ShadowTables::give_up(GuestTable& page) {
    for (const TableIndex index : page.shadows) {
        for (unsigned slot = 0; slot < entries_per_table; ++slot)
            drop_entry(index, slot);
    }
    unprotect(page);
}

void ShadowTables::count_protected(GuestFrame frame, int change) {
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

/// Puts pieces in the place of a large page: a table that maps the same.
void ShadowTables::split(TableIndex index, unsigned slot) {
    const unsigned number = table(index).key.level;
    const ShadowEntry entry = pool_.entries(index)[slot];
    const GuestPhys first(entry.page(paging_4_level.level(number)).base().value());
    ++counters_.splits;
    const TableKey key{first, number - 1, Role{.direct = true}};
    std::optional<TableIndex> pieces;
    if (number == 2) {
        if (const auto found = by_key_.find(key); found != by_key_.end())
            pieces = found->second;
        else if (pool_.in_use() < pool_.capacity())
            pieces = obtain(key);
    }
    if (!pieces) {
        set_entry(index, slot, ShadowEntry());
        return;
    }
    constexpr std::uint64_t kept = all_rights | entry_bit::no_execute;
    set_entry(index, slot, ShadowEntry(pool_.frame(*pieces), entry.raw() & kept));
}

/// Makes way for large pages where no table has been protected for a while.
void ShadowTables::merge_quiet_pages() {
    constexpr std::uint64_t while_epochs = 256;
    for (auto at = to_merge_.begin(); at != to_merge_.end();) {
        const auto [first, since] = *at;
        if (epoch_ - since < while_epochs) {
            ++at;
            continue;
        }
        at = to_merge_.erase(at);
        const GuestFrame frame(first);
        const auto pieces = by_key_.find({frame.base(), 1, Role{.direct = true}});
        if (pieces == by_key_.end() || !may_be_large(frame, paging_4_level.level(2)))
            continue;
        const MachineFrame table_frame = pool_.frame(pieces->second);
        for (std::size_t i = 0; i < tables_.size(); ++i) {
            if (!tables_[i].live || tables_[i].key.level != 2 || tables_[i].links == 0)
                continue;
            const auto entries = pool_.entries(static_cast<TableIndex>(i));
            for (unsigned slot = 0; slot < entries_per_table; ++slot) {
                const ShadowEntry entry = entries[slot];
                if (entry.present() && !is_leaf(tables_[i], entry) && entry.table() == table_frame) {
                    set_entry(static_cast<TableIndex>(i), slot,
                              ShadowEntry(same_frame(frame),
                                          (entry.raw() & ~entry_bit::frame_mask) | entry_bit::page_size));
                    ++counters_.merges;
                }
            }
        }
    }
}

/// An accessed or dirty bit that is set in a table of 32-bit paging is another bit of an 8-byte entry, if the
/// page is, or was, a table of such as well.
void ShadowTables::marked(const GuestWalk& walk) {
    for (const GuestWalk::Step& step : walk.visited()) {
        if (step.level->entry_bytes != 4)
            return; // no level has, then
        const auto found = guest_tables_.find(step.slot.frame());
        if (found == guest_tables_.end() || !found->second.is_protected)
            continue;
        for (const TableIndex index : std::vector(found->second.shadows)) {
            if (shape_of(table(index).key).entry_bytes != 8)
                continue;
            compare(index);
            if (!has_snapshot(table(index))) // whether it has changed now cannot be told
                drop_entry(index, static_cast<unsigned>(step.slot.page_offset() / sizeof(GuestEntry)));
        }
    }
}

/// Tables made from the same entries, for different roles, have seen the same change.
void ShadowTables::compare_shadows(GuestTable& page, std::vector<TableWrite>& writes) {
    std::unordered_set<std::uint64_t> told;
    for (const TableIndex index : page.shadows) {
        const bool first = told.insert(table(index).key.origin.value()).second;
        compare(index, first ? &writes : nullptr);
    }
}

std::vector<TableWrite> ShadowTables::wrote(GuestPhys at, std::size_t size) {
    std::vector<TableWrite> writes;
    if (size == 0)
        return writes;
    const auto editing = edit();
    for (GuestFrame frame = at.frame(); frame <= (at + (size - 1)).frame(); frame = frame + 1) {
        if (!is_protected(same_frame(frame)))
            continue;
        GuestTable& page = guest_tables_.at(frame);
        if (config_.sync == Sync::trap) {
            compare_shadows(page, writes);
        } else {
            drop_written(page, at, size);
            unprotect(page);
        }
    }
    return writes;
}

std::vector<ShadowSlot> ShadowTables::mappings(GuestFrame frame) {
    const std::lock_guard lock(mutex_);
    std::vector<ShadowSlot> found;
    for (const unsigned level : {2U, 3U}) {
        const auto large = reverse_.large(same_frame(first_of(frame, level)), level);
        found.insert(found.end(), large.begin(), large.end());
    }
    if (reverse_.tracked(same_frame(frame))) {
        const auto small = reverse_.small(same_frame(frame));
        found.insert(found.end(), small.begin(), small.end());
        return found;
    }
    for (std::size_t i = 0; i < tables_.size(); ++i) {
        if (!tables_[i].live || tables_[i].key.level != 1)
            continue;
        for (unsigned slot = 0; slot < entries_per_table; ++slot) {
            const ShadowEntry entry = pool_.entries(static_cast<TableIndex>(i))[slot];
            if (entry.present() && entry.table() == same_frame(frame))
                found.push_back({static_cast<TableIndex>(i), slot});
        }
    }
    return found;
}

// --- Guards

/// What one owner lets be executed, another may guard.
static Guards together(const std::array<Guards, guard_owners>& owned) {
    Guards all;
    for (const Guards& own : owned) {
        for (const auto& [frame, guard] : own.frames)
            all.frames[frame] = all.frames[frame] | guard;
        for (const auto& [page, guard] : own.pages)
            all.pages[page] = all.pages[page] | guard;
    }
    const auto guarded = [](const Guards& own, const std::pair<GuestVirt, GuestFrame>& place) {
        const auto found = own.pages.find(place.first);
        return found != own.pages.end() && own.on_page(place.first, found->second, place.second).fetch;
    };
    for (const Guards& own : owned) {
        for (const auto& place : own.executable) {
            if (std::ranges::none_of(owned, [&](const Guards& other) { return guarded(other, place); }))
                all.executable.insert(place);
        }
    }
    return all;
}

void ShadowTables::set_guards(Guards guards, GuardOwner owner) {
    Guards& owned = owned_guards_[static_cast<std::size_t>(owner)];
    if (guards == owned)
        return;
    owned = std::move(guards);
    Guards all = together(owned_guards_);
    if (all == guards_)
        return;
    guards_ = std::move(all);
    guarded_slots_ = {};
    for (const auto& [page, guard] : guards_.pages) {
        for (const Level& level : paging_4_level.levels) {
            Guard& slot = guarded_slots_[level.number - 1][level.index(page)];
            slot = slot | guard;
        }
    }
    reset(); // the places of guards are part of tables' keys
}

/// The guard on entry `slot` of a level-1 table that translates guarded pages. Such tables are shared, so it
/// is that of all guarded pages with this entry, `of_all`, but for what may be executed.
static Guard guard_of_slot(const Guards& guards, const Guard& of_all, unsigned slot, GuestFrame frame) {
    if (!of_all.fetch || guards.executable.empty())
        return of_all;
    Guard guard;
    for (const auto& [page, on_page] : guards.pages) {
        if (paging_4_level.level(1).index(page) == slot)
            guard = guard | guards.on_page(page, on_page, frame);
    }
    return guard;
}

/// What must not go unseen of accesses to this frame by this address. No less than guard_of_entry forbids:
/// an access that its entry does not let through would miss for ever.
Guard ShadowTables::guard_on(GuestVirt at, GuestFrame frame) const {
    Guard guard;
    if (open_pages_.contains({at.page_base(), frame}))
        return guard;
    if (const auto found = guards_.frames.find(frame); found != guards_.frames.end())
        guard = found->second;
    if (!has_guard(at, paging_4_level.level(2)))
        return guard;
    const unsigned slot = paging_4_level.level(1).index(at);
    return guard | guard_of_slot(guards_, guarded_slots_[0][slot], slot, frame);
}

/// Whether an entry of `level` translates a guarded page, where `at` is translated.
bool ShadowTables::has_guard(GuestVirt at, const Level& level) const {
    if (guards_.pages.empty())
        return false;
    const GuestVirt first(at.value() & ~(level.span() - 1));
    const auto guard = guards_.pages.lower_bound(first);
    return guard != guards_.pages.end() && guard->first - first < level.span();
}

/// Until close_guards, what is guarded of this page, at this address and of this frame, is let through.
void ShadowTables::open_guard(GuestVirt at, GuestFrame frame) {
    open_pages_.emplace(at.page_base(), frame);
}

void ShadowTables::close_guards() {
    open_pages_.clear();
    for (const ShadowSlot place : std::exchange(opened_, {})) {
        if (table(place.table).live)
            drop_entry(place.table, place.slot);
    }
}

/// The guard on a level-1 entry that maps `frame`.
Guard ShadowTables::guard_of_entry(const Table& table, unsigned slot, MachineFrame frame) const {
    Guard guard;
    if (guards_.frames.empty() && !table.key.role.guarded)
        return guard;
    const auto opens = [&](const auto& open) {
        return paging_4_level.level(1).index(open.first) == slot && machine_frame(open.second) == frame;
    };
    if (std::ranges::any_of(open_pages_, opens))
        return guard;
    const GuestFrame same(frame.number());
    if (const auto found = guards_.frames.find(same); found != guards_.frames.end())
        guard = found->second;
    if (!table.key.role.guarded)
        return guard;
    return guard | guard_of_slot(guards_, guarded_slots_[0][slot], slot, same);
}

/// The level-1 entry for `frame` with these rights, but for what the guards in force forbid.
ShadowEntry ShadowTables::guarded_entry(TableIndex index, unsigned slot, MachineFrame frame,
                                        std::uint64_t rights) {
    if (guards_.frames.empty() && guards_.pages.empty())
        return {frame, rights};
    if (!open_pages_.empty())
        opened_.push_back({index, slot}); // may have been let through
    const Guard guard = guard_of_entry(table(index), slot, frame);
    if (guard.read) // x86 has no pages to write to or execute alone
        return {};
    if (guard.write)
        rights &= ~entry_bit::writable;
    if (guard.fetch)
        rights |= entry_bit::no_execute;
    return {frame, rights};
}

// --- Filling

/// The isolation boundary: no other frame number than what this returns ever enters a leaf.
MachineFrame ShadowTables::machine_frame(GuestFrame frame) const {
    return std::min(same_frame(frame), config_.nothing);
}

/// Whether one entry of `level` can map the guest's memory from `first` on.
bool ShadowTables::may_be_large(GuestFrame first, const Level& level) const {
    if (!memory_.contains(first.base(), level.span()))
        return false;
    const auto guard = guards_.frames.lower_bound(first);
    if (guard != guards_.frames.end() && guard->first - first < level.span() >> page_shift)
        return false;
    if (level.number == 2)
        return !protected_2mb_.contains(first.number());
    return level.number == 3 && config_.gigabyte_pages && !protected_1gb_.contains(first.number());
}

bool ShadowTables::may_be_large(const Table& table, unsigned slot, GuestFrame first) const {
    const bool guarded = table.key.role.guarded && guarded_slots_[table.key.level - 1][slot] != Guard{};
    return !guarded && may_be_large(first, paging_4_level.level(table.key.level));
}

/// A fill goes through this table.
void ShadowTables::pass_through(TableIndex index) {
    Table& subject = table(index);
    subject.filled = clock_;
    if (config_.sync == Sync::trap && subject.guest != nullptr && !subject.guest->is_protected)
        protect({subject.guest});
}

/// Makes the tables below `root` translate `at` as `walk` did. False if the pool is exhausted; what was made
/// so far stays.
bool ShadowTables::install(TableIndex root, const GuestPaging& paging, const GuestWalk& walk, GuestVirt at,
                           Remember remembering) {
    TableIndex index = root;
    const Role& root_role = table(root).key.role;
    pass_through(root);
    if (walk.depth == 0) // without paging: one page of everything, in pieces
        return install_leaf(root, root_level, GuestFrame(at.value() >> 39 << (39 - page_shift)), at,
                            all_rights);

    // The levels above those that the guest has.
    for (unsigned number = root_level; number > walk.steps[0].level->number; --number) {
        TableKey key{table(index).key.origin, number - 1, root_role};
        if (root_role.mode == GuestMode::bits_32 && number == 3) // a quarter of the page directory maps 1 GB
            key.origin += (at.value() >> 30) * shape_of({{}, 2, root_role}).bytes();
        key.role.guarded = has_guard(at, paging_4_level.level(number));
        const unsigned slot = paging_4_level.level(number).index(at);
        const auto next = link(index, slot, key, all_rights);
        if (!next)
            return false;
        index = *next;
    }
    for (const GuestWalk::Step& step : walk.visited()) {
        const TableKey& above = table(index).key;
        const Level& level = paging_4_level.level(above.level);
        const unsigned slot = level.index(at);
        if (remembering == Remember::yes)
            remember_for(index, slot, step.entry);

        if (step.entry.leaf(*step.level)) {
            // A 4 MB page is two slots.
            const std::uint64_t within = at.value() & (step.level->span() - 1) & ~(level.span() - 1);
            const GuestFrame frame = step.entry.page(*step.level) + (within >> page_shift);
            if (!install_leaf(index, above.level, frame, at, leaf_rights(step.entry, above.role)))
                return false;
            if (above.level == 1)
                prefetch(index, paging, step, at);
            return true;
        }
        TableKey key{child_origin(above.role.mode, step.entry, step.level->number, at), above.level - 1,
                     above.role};
        key.role.guarded = has_guard(at, level);
        std::uint64_t rights = all_rights;
        if (!step.level->in_registers) {
            key.role.user_path = above.role.user_path && step.entry.user();
            rights = rights_of(step.entry, above.role);
        }
        const auto next = link(index, slot, key, rights);
        if (!next)
            return false;
        index = *next;
    }
    return true;
}

/// Remembers the entry that `slot` is about to be made from. What other slots were made from it must not be
/// taken for made from this value.
void ShadowTables::remember_for(TableIndex index, unsigned slot, GuestEntry entry) {
    const unsigned slots = shape_of(table(index).key).slots_per_entry;
    const unsigned number = slot / slots;
    const GuestEntry before = remembered(index, number);
    remember(index, number, entry);
    if (slots == 1 || before == entry || only_marked(before, entry))
        return;
    for (unsigned other = number * slots; other < (number + 1) * slots; ++other) {
        if (other != slot)
            drop_entry(index, other);
    }
}

/// Maps the guest's page, of the size of an entry of level `number`, by one entry where the memory under it
/// allows, in pieces elsewhere. `frame`: the first one.
bool ShadowTables::install_leaf(TableIndex index, unsigned number, GuestFrame frame, GuestVirt at,
                                std::uint64_t rights) {
    for (;; --number) {
        const Level& level = paging_4_level.level(number);
        const unsigned slot = level.index(at);
        if (number == 1) {
            const MachineFrame target = machine_frame(frame);
            if (is_protected(target))
                rights &= ~entry_bit::writable;
            set_entry(index, slot, guarded_entry(index, slot, target, rights));
            return true;
        }
        if (may_be_large(table(index), slot, frame)) {
            set_entry(index, slot, ShadowEntry(same_frame(frame), rights | entry_bit::page_size));
            return true;
        }
        const Role role{.direct = true, .guarded = has_guard(at, level)};
        const auto next = link(index, slot, {frame.base(), number - 1, role}, rights);
        if (!next)
            return false;
        index = *next;
        rights = all_rights;
        const Level& below = paging_4_level.level(number - 1);
        frame = frame + (below.index(at) * below.span() >> page_shift);
    }
}

/// The pieces of a large page have its rights, which stand above them: all can be there at once.
void ShadowTables::fill_direct(TableIndex index) {
    const TableKey& key = table(index).key;
    if (key.level != 1)
        return;
    for (unsigned slot = 0; slot < entries_per_table; ++slot) {
        const MachineFrame target = machine_frame(key.origin.frame() + slot);
        const std::uint64_t rights = is_protected(target) ? base_rights : all_rights;
        set_entry(index, slot, guarded_entry(index, slot, target, rights));
    }
}

/// Fills what lies around `leaf` in its table. Only what the guest has accessed before: a CPU that looks
/// ahead marks nothing as accessed, and what it marks it has used.
void ShadowTables::prefetch(TableIndex index, const GuestPaging& paging, const GuestWalk::Step& leaf,
                            GuestVirt at) {
    const Table& subject = table(index);
    if (config_.prefetch <= 1 || config_.sync == Sync::trap || subject.guest == nullptr)
        return; // where the guest is watched, only what it uses is there
    const Role& role = subject.key.role;
    const TableShape shape = shape_of(subject.key);
    const auto guest = memory_.range(subject.key.origin, shape.bytes());
    const unsigned first = paging_4_level.level(1).index(at) & ~(config_.prefetch - 1);
    for (unsigned slot = first; slot < first + config_.prefetch; ++slot) {
        if (pool_.entries(index)[slot].present())
            continue;
        const GuestEntry entry = load_entry(guest, slot, shape.entry_bytes);
        constexpr std::uint64_t used = entry_bit::present | entry_bit::accessed;
        const bool user_page = role.user_path && entry.user();
        if (!entry.has(used) || (entry.raw() & reserved_bits(paging, *leaf.level, entry)) != 0 ||
            (role.user ? !entry.user() : role.user_pages_hidden && user_page))
            continue;
        remember(index, slot, entry);
        (void)install_leaf(
            index, 1, entry.page(*leaf.level),
            GuestVirt((at.value() & ~((std::uint64_t{1} << 21) - 1)) | std::uint64_t{slot} << page_shift),
            leaf_rights(entry, role));
        ++counters_.prefetched;
    }
}

/// A top-level slot that neither the guest's root nor any known one uses.
std::optional<unsigned> ShadowTables::free_slot(const GuestPaging& paging) const {
    std::vector<bool> free = config_.usable_slots;
    free[slot_] = false;
    const auto exclude = [&](GuestPhys root) {
        const auto guest = memory_.range(root, page_size);
        for (unsigned slot = 0; slot < entries_per_table && !guest.empty(); ++slot) {
            if (load_entry(guest, slot, 8).present())
                free[slot] = false;
        }
    };
    if (guest_mode(*paging.format) == GuestMode::bits_64) // others use the first slot only
        exclude(paging.root.base());
    for (std::size_t i = 0; i < tables_.size(); ++i) {
        if (!tables_[i].live || tables_[i].key.level != root_level)
            continue;
        if (tables_[i].guest != nullptr)
            exclude(tables_[i].key.origin);
        for (unsigned slot = 0; slot < entries_per_table; ++slot) {
            if (pool_.entries(static_cast<TableIndex>(i))[slot].present())
                free[slot] = false;
        }
    }
    const auto found =
        std::find(free.rbegin(), free.rend(), true); // from the top: rarely used by small kernels
    if (found == free.rend())
        return std::nullopt;
    return static_cast<unsigned>(std::distance(found, free.rend()) - 1);
}

/// The guest has begun to use the reserved slot: moves the switcher to another, in every root.
bool ShadowTables::move_slot(const GuestPaging& paging) {
    stop_others();
    auto target = free_slot(paging);
    if (!target) { // roots of other address spaces stand in the way, perhaps: without them it is this one's
        reset();
        target = free_slot(paging);
    }
    if (!target)
        return false;
    for (std::size_t i = 0; i < tables_.size(); ++i) {
        if (!tables_[i].live || tables_[i].key.level != root_level)
            continue;
        const auto index = static_cast<TableIndex>(i);
        store_entry(pool_.entries(index)[*target], switcher_);
        store_entry(pool_.entries(index)[slot_], ShadowEntry());
        owe(index);
    }
    slot_ = *target;
    ++counters_.slot_moves;
    return true;
}

// --- The audit

std::optional<std::string> ShadowTables::audit() const {
    const std::lock_guard lock(mutex_);
    std::vector<std::uint32_t> references(tables_.size(), 0);
    std::size_t live = 0;
    for (std::size_t i = 0; i < tables_.size(); ++i) {
        const Table& parent = tables_[i];
        if (!parent.live)
            continue;
        ++live;
        const bool root = parent.key.level == root_level;
        const auto entries = pool_.entries(static_cast<TableIndex>(i));
        if (root && load_entry(entries[slot_]) != switcher_)
            return fmt::format("root table {} does not carry the switcher in slot {}", i, slot_);
        for (unsigned slot = 0; slot < entries_per_table; ++slot) {
            const ShadowEntry entry = entries[slot];
            if (!entry.present() || (root && slot == slot_))
                continue;
            if (!entry.user())
                return fmt::format("entry {} of table {} is not accessible at CPL 3", slot, i);
            const Level& level = paging_4_level.level(parent.key.level);
            if (is_leaf(parent, entry)) {
                const MachineFrame frame = entry.page(level);
                const bool ram = memory_.contains(GuestPhys(frame.base().value()), level.span());
                const bool small = level.number == 1 && frame <= config_.nothing;
                if (!ram && !small)
                    return fmt::format("entry {} of table {} maps frame {:#x}, which is not the guest's",
                                       slot, i, frame.number());
                const bool writes_tables = level.number == 1
                                               ? is_protected(frame)
                                               : !may_be_large(GuestFrame(frame.number()), level);
                const Guard guard = level.number == 1 ? guard_of_entry(parent, slot, frame) : Guard{};
                const bool unseen =
                    level.number != 1 && !may_be_large(parent, slot, GuestFrame(frame.number()));
                if (guard.read || (guard.write && entry.writable()) || (guard.fetch && !entry.no_execute()) ||
                    (unseen && !writes_tables))
                    return fmt::format("entry {} of table {} lets the guest use a guarded page unseen", slot,
                                       i);
                if (entry.writable() && writes_tables)
                    return fmt::format("entry {} of table {} makes a protected table of the guest writable",
                                       slot, i);
                const ShadowSlot place{static_cast<TableIndex>(i), slot};
                const auto known =
                    level.number == 1 ? reverse_.small(frame) : reverse_.large(frame, level.number);
                if ((level.number > 1 || reverse_.tracked(frame)) && std::ranges::count(known, place) != 1)
                    return fmt::format("the reverse map does not know entry {} of table {}", slot, i);
                continue;
            }
            const auto child = pool_.page_of(entry.table());
            if (!child || !table(*child).live)
                return fmt::format("entry {} of table {} refers to no live table", slot, i);
            if (table(*child).key.level + 1 != parent.key.level)
                return fmt::format("entry {} of table {} refers to a table of level {} instead of {}", slot,
                                   i, table(*child).key.level, parent.key.level - 1);
            ++references[TablePool::number(*child)];
        }
    }
    // From the lowest level up: as of when is all in step that lies at or below each table?
    std::vector<std::uint64_t> oldest(tables_.size(), ~std::uint64_t{0});
    std::vector<unsigned> links(tables_.size(), 0);
    for (unsigned level = 1; level <= root_level; ++level) {
        for (std::size_t i = 0; i < tables_.size(); ++i) {
            const Table& subject = tables_[i];
            if (!subject.live || subject.key.level != level)
                continue;
            const auto index = static_cast<TableIndex>(i);
            if (subject.guest != nullptr && !subject.guest->is_protected)
                oldest[i] = subject.compared;
            unsigned count = 0;
            for (unsigned slot = 0; slot < entries_per_table; ++slot) {
                const ShadowEntry entry = pool_.entries(index)[slot];
                if (!entry.present() || is_leaf(subject, entry) || is_switcher(subject, slot))
                    continue;
                ++count;
                oldest[i] = std::min(oldest[i], oldest[TablePool::number(*pool_.page_of(entry.table()))]);
            }
            links[i] = count;
            if (oldest[i] < subject.epoch)
                return fmt::format("a table at or below table {} is behind it", i);
            if (subject.guest == nullptr || !subject.guest->is_protected || subject.guest->open ||
                !has_snapshot(subject))
                continue;
            const TableShape shape = shape_of(subject.key);
            const auto guest = memory_.range(subject.key.origin, shape.bytes());
            for (unsigned number = 0; number < shape.entries; ++number) {
                const GuestEntry before = remembered(index, number);
                const GuestEntry now = load_entry(guest, number, shape.entry_bytes);
                if (before != now && !only_marked(before, now))
                    return fmt::format(
                        "entry {} of the guest's table behind table {} changed under protection", number, i);
            }
        }
    }
    for (const auto& [frame, page] : guest_tables_) {
        if (page.is_snapshot && page.checksum != checksum(page))
            return fmt::format("the guest's table in frame {:#x} changed under protection", frame.number());
    }
    for (std::size_t i = 0; i < tables_.size(); ++i) {
        const Table& subject = tables_[i];
        if (subject.live && subject.uses != references[i])
            return fmt::format("table {} counts {} uses but {} entries refer to it", i, subject.uses,
                               references[i]);
    }
    for (std::size_t i = 0; i < tables_.size(); ++i) {
        if (tables_[i].live && tables_[i].links != links[i])
            return fmt::format("table {} counts {} links but has {}", i, tables_[i].links, links[i]);
    }
    if (live != pool_.in_use() || live != by_key_.size())
        return fmt::format("{} tables live, {} pages in use, {} keys known", live, pool_.in_use(),
                           by_key_.size());
    return std::nullopt;
}

} // namespace umbra
