#include "shadow/mmu.hpp"

#include <cstring>

#include <fmt/format.h>

namespace umbra {
namespace {

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

GuestEntry load_entry(std::span<const std::byte> table, unsigned slot) {
    // The guest may write at the same time: one load, and the copy is what counts.
    auto* raw = reinterpret_cast<std::uint64_t*>(const_cast<std::byte*>(table.data())) + slot;
    return GuestEntry(std::atomic_ref<std::uint64_t>(*raw).load(std::memory_order_relaxed));
}

void store_entry(ShadowEntry& entry, ShadowEntry value) {
    static_assert(std::atomic_ref<ShadowEntry>::is_always_lock_free);
    std::atomic_ref<ShadowEntry>(entry).store(value, std::memory_order_release);
}

} // namespace

std::size_t TableKeyHash::operator()(const TableKey& key) const noexcept {
    const Role& role = key.role;
    const std::uint64_t bits = std::uint64_t{key.level} | std::uint64_t{role.user} << 3 |
                               std::uint64_t{role.write_protect} << 4 | std::uint64_t{role.no_execute} << 5 |
                               std::uint64_t{role.user_pages_nx} << 6 | std::uint64_t{role.user_path} << 7 |
                               std::uint64_t{role.direct} << 8;
    return static_cast<std::size_t>((key.frame.number() << 9 | bits) * 0x9e37'79b9'7f4a'7c15U >> 16);
}

Mmu::Mmu(const GuestMemory& memory, TablePool& pool, MmuConfig config, ShadowEntry switcher)
    : memory_(memory), pool_(pool), config_(std::move(config)), switcher_(switcher),
      slot_(config_.first_slot), tables_(pool.capacity()),
      snapshots_(std::make_unique_for_overwrite<std::uint64_t[]>(pool.capacity() * entries_per_table)) {}

Role Mmu::role(bool user) const {
    return Role{.user = user,
                .write_protect = user || paging_.write_protect,
                .no_execute = paging_.no_execute,
                .user_pages_nx = !user && (paging_.smep || trap_user_fetch_)};
}

// --- Tables

std::optional<TableIndex> Mmu::allocate() {
    if (auto page = pool_.allocate())
        return page;
    for (const TableIndex candidate : idle_) { // least recently used first
        if (candidate == current_[0] || candidate == current_[1])
            continue;
        destroy(candidate);
        ++counters_.tables_recycled;
        return pool_.allocate();
    }
    return std::nullopt;
}

/// The table for `key`, from the cache or new; it and all below it are in step with the guest's as of now:
/// INVLPG has not reached what the current roots did not refer to. Nothing when the pool is exhausted and
/// every table is in use.
std::optional<TableIndex> Mmu::obtain(const TableKey& key) {
    if (const auto found = by_key_.find(key); found != by_key_.end()) {
        const TableIndex index = found->second;
        if (table(index).uses == 0) {
            ++counters_.tables_reused;
            idle_.splice(idle_.end(), idle_, table(index).idle); // now the most recently used
        }
        compare_tree(index);
        return index;
    }
    const auto index = allocate();
    if (!index)
        return std::nullopt;
    ++counters_.tables_built;
    by_key_.emplace(key, *index);
    Table& made = table(*index);
    made.key = key;
    made.live = true;
    made.epoch = epoch_;
    made.idle = idle_.insert(idle_.end(), *index);
    if (key.level == paging_4_level.root().number)
        store_entry(pool_.entries(*index)[slot_], switcher_);
    if (const auto guest = memory_.range(key.frame.base(), page_size); !key.role.direct && !guest.empty()) {
        for (unsigned i = 0; i < entries_per_table; ++i)
            snapshot(*index)[i] = load_entry(guest, i);
    }
    return index;
}

/// The table for `key` that entry `slot` of table `parent` refers to, or is to refer to.
std::optional<TableIndex> Mmu::child_table(TableIndex parent, unsigned slot, const TableKey& key) {
    const ShadowEntry entry = pool_.entries(parent)[slot];
    if (entry.present() && !is_leaf(table(parent), entry)) {
        if (const auto linked = pool_.page_of(entry.table()); linked && table(*linked).key == key)
            return linked;
    }
    return obtain(key);
}

/// Returns an idle table's page to the pool. The tables that are idle without it are the next to go.
void Mmu::destroy(TableIndex index) {
    Table& dead = table(index);
    for (const ShadowEntry entry : pool_.entries(index)) {
        if (entry.present() && !is_leaf(dead, entry))
            drop_reference(entry, idle_.begin());
    }
    by_key_.erase(dead.key);
    idle_.erase(dead.idle);
    dead.live = false;
    debt_.root_gone |= dead.key.level == paging_4_level.root().number;
    pool_.release(index);
    owe(index); // the page may serve again before the machine has forgotten what it held
}

/// `place`: where in idle_ the table goes if this was the last reference.
void Mmu::drop_reference(ShadowEntry entry, std::list<TableIndex>::iterator place) {
    const auto child = pool_.page_of(entry.table());
    if (!child) // the switcher's
        return;
    Table& orphan = table(*child);
    if (--orphan.uses == 0)
        orphan.idle = idle_.insert(place, *child);
}

/// The one place where an entry of a shadow table changes.
void Mmu::set_entry(TableIndex index, unsigned slot, ShadowEntry value) {
    ShadowEntry& entry = pool_.entries(index)[slot];
    const ShadowEntry old = entry;
    if (old == value)
        return;
    const Table& parent = table(index);
    const bool leaf = value.present() && is_leaf(parent, value);
    if (value.present() && !leaf) {
        if (const auto page = pool_.page_of(value.table()); page && table(*page).uses++ == 0)
            idle_.erase(table(*page).idle);
    }
    store_entry(entry, value);
    if (!old.present())
        return; // nobody caches an absence
    const bool was_leaf = is_leaf(parent, old);
    if (!was_leaf)
        drop_reference(old, idle_.end());
    if (leaf && was_leaf && is_upgrade(old, value)) {
        ++counters_.upgrades;
        return;
    }
    owe(index);
}

void Mmu::owe(TableIndex index) {
    debt_.flush = true;
    if (config_.stores_seen || table(index).owed)
        return;
    table(index).owed = true;
    debt_.tables.push_back(index);
}

void Mmu::debt_paid() {
    for (const TableIndex index : debt_.tables)
        table(index).owed = false;
    debt_.tables.clear();
    debt_.flush = debt_.root_gone = false;
}

void Mmu::reset() {
    current_ = {};
    by_key_.clear();
    idle_.clear();
    for (std::size_t i = 0; i < tables_.size(); ++i) {
        Table& dead = tables_[i];
        if (!dead.live)
            continue;
        dead.live = false;
        dead.uses = 0;
        pool_.release(static_cast<TableIndex>(i));
        owe(static_cast<TableIndex>(i));
    }
    debt_.root_gone = true;
}

// --- Keeping up with the guest

void Mmu::flush() {
    ++counters_.flushes;
    flushed_ = ++epoch_; // every table is compared again before it is next relied on
}

/// Drops the shadow entry if the guest's entry is no longer what it was made from. True if it was dropped.
bool Mmu::compare_entry(TableIndex index, unsigned slot, GuestEntry now) {
    GuestEntry& before = snapshot(index)[slot];
    if (before == now)
        return false;
    const bool keep = only_marked(before, now);
    before = now;
    if (keep || !pool_.entries(index)[slot].present())
        return false;
    if (table(index).key.level == paging_4_level.root().number && slot == slot_)
        return false; // the switcher's entry was not made from the guest's
    set_entry(index, slot, ShadowEntry());
    ++counters_.entries_dropped;
    return true;
}

void Mmu::compare(TableIndex index) {
    Table& subject = table(index);
    subject.epoch = epoch_;
    if (subject.key.role.direct)
        return; // made from the large page's entry, which is compared where it stands
    const auto guest = memory_.range(subject.key.frame.base(), page_size);
    if (guest.empty())
        return;
    ++counters_.tables_compared;
    if (std::memcmp(guest.data(), snapshot(index).data(), page_size) == 0)
        return;
    ++counters_.tables_changed;
    for (unsigned slot = 0; slot < entries_per_table; ++slot)
        compare_entry(index, slot, load_entry(guest, slot));
}

/// Brings `index` and all tables below it in step with the guest's. No table is behind one that refers to it.
void Mmu::compare_tree(TableIndex index) {
    if (table(index).epoch == epoch_)
        return;
    compare(index);
    if (table(index).key.level == 1)
        return;
    for (const ShadowEntry entry : pool_.entries(index)) {
        if (!entry.present() || is_leaf(table(index), entry))
            continue;
        if (const auto child = pool_.page_of(entry.table()))
            compare_tree(*child);
    }
}

void Mmu::invalidate(GuestVirt at) {
    ++counters_.invalidations;
    ++epoch_; // what the current roots do not refer to now is compared before they do
    for (const auto& root : current_) {
        if (!root)
            continue;
        const auto visit = [&](const WalkStep<MachinePhysSpace>& step) {
            const auto index = pool_.page_of(step.slot.frame());
            if (!index || !step.entry.present())
                return WalkNext::stop;
            const unsigned slot = step.level->index(at);
            const auto guest = memory_.range(table(*index).key.frame.base(), page_size);
            if (!table(*index).key.role.direct && !guest.empty() &&
                compare_entry(*index, slot, load_entry(guest, slot)))
                return WalkNext::stop;
            return WalkNext::descend;
        };
        const auto read = [this](MachinePhys slot) {
            return pool_.entries(*pool_.page_of(slot.frame()))[slot.page_offset() / sizeof(ShadowEntry)];
        };
        if (paging_4_level.root().index(at) != slot_)
            walk(paging_4_level, pool_.frame(*root), at, at, read, visit);
    }
}

TableIndex Mmu::root_table(bool user) {
    const TableKey key{paging_.root, paging_4_level.root().number, role(user)};
    auto& current = current_[user ? 1 : 0];
    if (current && table(*current).key == key && table(*current).epoch >= flushed_)
        return *current; // INVLPG has reached it
    current.reset();
    auto index = obtain(key);
    if (!index) { // every page is below the other root
        reset();
        index = obtain(key);
    }
    current = index;
    return *index;
}

MachineFrame Mmu::root(bool user) {
    return pool_.frame(root_table(user));
}

// --- Filling

/// The isolation boundary: no other frame number than what this returns ever enters a leaf.
MachineFrame Mmu::machine_frame(GuestFrame frame) const {
    if (memory_.contains(frame.base(), page_size))
        return MachineFrame(frame.number());
    for (const DeviceWindow& window : config_.devices) {
        if (frame - window.first < window.count)
            return MachineFrame(frame.number());
    }
    return config_.nothing;
}

MissResult Mmu::fault(GuestVirt at, Access access) {
    const GuestWalk walk = translate(memory_, paging_, at, access);
    if (walk.fault) {
        ++counters_.guest_faults;
        return {.outcome = Miss::guest_fault, .fault = *walk.fault};
    }
    if (access.fetch && !access.user && walk.user && trap_user_fetch_) {
        const std::uint32_t code = PageFault::present | PageFault::fetch;
        return {.outcome = Miss::guest_fault, .fault = {at, code}, .trapped_user_fetch = true};
    }
    if (paging_4_level.root().index(at) == slot_ && !move_slot())
        return {.outcome = Miss::no_slot, .fault = {}};
    if (!install(walk, at, access.user)) {
        reset(); // the pool is exhausted by the current address space alone: start it over
        (void)install(walk, at, access.user);
    }
    ++counters_.fills;
    return {.outcome = Miss::filled, .fault = {}};
}

/// Makes the shadow tables translate `at` as `walk` did. False if the pool is exhausted; what was made so far
/// stays.
bool Mmu::install(const GuestWalk& walk, GuestVirt at, bool user) {
    TableIndex index = root_table(user);
    for (const GuestWalk::Step& step : walk.visited()) {
        const Role role = table(index).key.role;
        const unsigned slot = step.level->index(at);
        std::uint64_t rights = base_rights;
        if (step.entry.writable() || !role.write_protect)
            rights |= entry_bit::writable;
        if (step.entry.no_execute())
            rights |= entry_bit::no_execute;
        snapshot(index)[slot] = step.entry;

        if (step.entry.leaf(*step.level)) {
            if (!step.entry.dirty()) // the first write must fault, so that dirty is set when a CPU would
                rights &= ~entry_bit::writable;
            if (role.user_pages_nx && role.user_path && step.entry.user())
                rights |= entry_bit::no_execute;
            return install_leaf(index, step, at, rights);
        }
        TableKey key{step.entry.table(), step.level->number - 1, role};
        key.role.user_path = role.user_path && step.entry.user();
        const auto next = child_table(index, slot, key);
        if (!next)
            return false;
        set_entry(index, slot, ShadowEntry(pool_.frame(*next), rights));
        index = *next;
    }
    return true;
}

/// Maps the guest's page by an entry of its own size where the memory under it allows, in pieces elsewhere.
bool Mmu::install_leaf(TableIndex index, const GuestWalk::Step& leaf, GuestVirt at, std::uint64_t rights) {
    GuestFrame frame = leaf.entry.page(*leaf.level); // first frame of what the entry of this level maps
    for (unsigned number = leaf.level->number;; --number) {
        const Level& level = paging_4_level.level(number);
        const unsigned slot = level.index(at);
        if (number == 1) {
            set_entry(index, slot, ShadowEntry(machine_frame(frame), rights));
            return true;
        }
        if (memory_.contains(frame.base(), level.span()) && (number < 3 || config_.gigabyte_pages)) {
            set_entry(index, slot, ShadowEntry(MachineFrame(frame.number()), rights | entry_bit::page_size));
            return true;
        }
        const auto next = child_table(index, slot, {frame, number - 1, Role{.direct = true}});
        if (!next)
            return false;
        set_entry(index, slot, ShadowEntry(pool_.frame(*next), rights));
        index = *next;
        rights = all_rights;
        const Level& below = paging_4_level.level(number - 1);
        frame = frame + (below.index(at) * below.span() >> page_shift);
    }
}

/// A top-level slot that neither the guest's root nor any known one uses.
std::optional<unsigned> Mmu::free_slot() const {
    std::vector<bool> free = config_.usable_slots;
    free[slot_] = false;
    const auto exclude = [&](GuestFrame root) {
        const auto guest = memory_.range(root.base(), page_size);
        for (unsigned slot = 0; slot < entries_per_table && !guest.empty(); ++slot) {
            if (load_entry(guest, slot).present())
                free[slot] = false;
        }
    };
    exclude(paging_.root);
    for (std::size_t i = 0; i < tables_.size(); ++i) {
        if (!tables_[i].live || tables_[i].key.level != paging_4_level.root().number)
            continue;
        exclude(tables_[i].key.frame);
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
bool Mmu::move_slot() {
    auto target = free_slot();
    if (!target) { // roots of other address spaces stand in the way, perhaps: without them it is this one's
        reset();
        target = free_slot();
    }
    if (!target)
        return false;
    for (std::size_t i = 0; i < tables_.size(); ++i) {
        if (!tables_[i].live || tables_[i].key.level != paging_4_level.root().number)
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

// --- Looking

std::vector<WalkStep<MachinePhysSpace>> Mmu::shadow_walk(GuestVirt at, bool user) {
    std::vector<WalkStep<MachinePhysSpace>> steps;
    const auto read = [this](MachinePhys slot) {
        const auto index = pool_.page_of(slot.frame());
        return index ? pool_.entries(*index)[slot.page_offset() / sizeof(ShadowEntry)] : ShadowEntry();
    };
    walk(paging_4_level, root(user), at, at, read, [&](const WalkStep<MachinePhysSpace>& step) {
        steps.push_back(step);
        return WalkNext::descend;
    });
    return steps;
}

std::optional<std::string> Mmu::audit() const {
    std::vector<std::uint32_t> references(tables_.size(), 0);
    std::size_t live = 0;
    for (std::size_t i = 0; i < tables_.size(); ++i) {
        const Table& parent = tables_[i];
        if (!parent.live)
            continue;
        ++live;
        const bool root = parent.key.level == paging_4_level.root().number;
        const auto entries = pool_.entries(static_cast<TableIndex>(i));
        if (root && entries[slot_] != switcher_)
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
                const bool small = level.number == 1 && (frame == config_.nothing ||
                                                         machine_frame(GuestFrame(frame.number())) == frame);
                if (!ram && !small)
                    return fmt::format("entry {} of table {} maps frame {:#x}, which is not the guest's",
                                       slot, i, frame.number());
                continue;
            }
            const auto child = pool_.page_of(entry.table());
            if (!child || !table(*child).live)
                return fmt::format("entry {} of table {} refers to no live table", slot, i);
            if (table(*child).key.level + 1 != parent.key.level)
                return fmt::format("entry {} of table {} refers to a table of level {} instead of {}", slot,
                                   i, table(*child).key.level, parent.key.level - 1);
            if (table(*child).epoch < parent.epoch)
                return fmt::format("table {} is behind table {}, which refers to it",
                                   TablePool::number(*child), i);
            ++references[TablePool::number(*child)];
        }
    }
    for (std::size_t i = 0; i < tables_.size(); ++i) {
        if (tables_[i].live && tables_[i].uses != references[i])
            return fmt::format("table {} counts {} uses but {} entries refer to it", i, tables_[i].uses,
                               references[i]);
    }
    if (live != pool_.in_use() || live != by_key_.size())
        return fmt::format("{} tables live, {} pages in use, {} keys known", live, pool_.in_use(),
                           by_key_.size());
    return std::nullopt;
}

} // namespace umbra
