#include "shadow/mmu.hpp"

namespace umbra {

Mmu::Mmu(ShadowTables& tables, unsigned number)
    : tables_(tables), number_(number), ledger_(tables.pool().capacity()) {
    tables_.edit()->store.add(ledger_);
}

Mmu::~Mmu() {
    const auto shadow = tables_.edit();
    for (auto& current : current_)
        pin(*shadow, current, std::nullopt);
    shadow->store.remove(ledger_);
    ledger_.close();
}

/// A vCPU whose thread works on the tables is not in the guest.
ShadowTables::Editing Mmu::edit() {
    left();
    return tables_.edit();
}

Role Mmu::role(bool user) const {
    Role role;
    role.mode = guest_mode(*paging_.format);
    if (role.mode == GuestMode::off)
        return role;
    role.user = user;
    role.write_protect = user || paging_.write_protect;
    role.no_execute = paging_.no_execute;
    role.large_pages = role.mode != GuestMode::bits_32 || paging_.format->root().may_be_leaf;
    role.user_pages_nx = !user && (paging_.smep || trap_user_fetch_);
    role.user_pages_hidden = !user && paging_.smap && !alignment_check_;
    return role;
}

TableKey Mmu::root_key(bool user) const {
    const Role wanted = role(user);
    GuestPhys origin = paging_.root.base();
    if (wanted.mode == GuestMode::off)
        origin = GuestPhys(0);
    if (wanted.mode == GuestMode::pae)
        origin = GuestPhys(number_);
    return {origin, paging_4_level.root().number, wanted};
}

void Mmu::set_paging(const GuestPaging& paging) {
    // With PAE the registers, not the root, say where the tables lie.
    const bool other_registers =
        guest_mode(*paging.format) == GuestMode::pae && paging.pdptes != paging_.pdptes;
    const bool other_space = paging.root != paging_.root || paging.pcid != paging_.pcid || other_registers;
    paging_ = paging;
    if (!other_space)
        return;
    const auto shadow = edit();
    // Tables that both spaces share may hold what the old one has used since the new one was left. No CPU
    // caches that for the new one, whether or not the switch flushes.
    required_ = shadow->tracker.next_epoch();
    if (sanitizer_ != nullptr)
        shadow->store.forget_entries(); // what both share would serve the new one unseen
}

void Mmu::sanitize(TlbSanitizer& sanitizer, TlbPolicy policy,
                   std::function<void(const StaleUse&)> stale_use) {
    sanitizer_ = &sanitizer;
    policy_ = policy;
    stale_use_ = std::move(stale_use);
}

/// Makes `root` the current one, which is not recycled.
void Mmu::pin(ShadowParts& shadow, std::optional<TableIndex>& current, std::optional<TableIndex> root) {
    if (resets_ != shadow.resets) { // pins went with the tables
        current_ = {};
        resets_ = shadow.resets;
    }
    if (current)
        --shadow.store[*current].pins;
    current = root;
    if (current)
        ++shadow.store[*current].pins;
}

TableIndex Mmu::root_table(ShadowParts& shadow, bool user) {
    const TableKey key = root_key(user);
    auto& current = current_[user ? 1 : 0];
    const bool valid = current && resets_ == shadow.resets;
    if (!valid || shadow.store[*current].key != key || shadow.store[*current].epoch < required_) {
        pin(shadow, current, std::nullopt);
        // INVLPG has not reached roots that were not current.
        auto root = shadow.cache.root(key, std::max(required_, invalidated_));
        if (!root) { // every page is below the other root
            shadow.reset();
            root = shadow.cache.root(key, required_);
        }
        pin(shadow, current, root);
        if (key.role.mode == GuestMode::pae) // loaded by what also flushes
            shadow.tracker.set_registers(*current, paging_.pdptes);
    }
    return *current;
}

MachineState Mmu::enter(bool user) {
    const auto shadow = edit();
    MachineState state;
    if (!std::exchange(just_exposed_, false)) {
        for (const GuestVirt at : exposed_)
            hide_exposed(*shadow, at);
        exposed_.clear();
    }
    state.root = shadow->store.pool().frame(root_table(*shadow, user));
    state.reserved_slot = shadow->store.reserved_slot();
    state.debt = ledger_.take();
    ledger_.enter();
    return state;
}

void Mmu::left() {
    ledger_.leave();
}

MissResult Mmu::fault(GuestVirt at, Access access) {
    const auto shadow = edit();
    const std::optional<GuestWalk> stale =
        sanitizer_ != nullptr ? stale_walk(shadow->memory, at, access) : std::nullopt;
    const GuestWalk walk = stale ? *stale : translate(shadow->memory, paging_, at, access);
    shadow->tracker.marked(walk);
    if (walk.fault) {
        if (sanitizer_ != nullptr)
            sanitizer_->faulted(at, paging_);
        ++shadow->counters.guest_faults;
        return {.outcome = Miss::guest_fault, .fault = *walk.fault};
    }
    const bool kernel_fetches_user_page = access.fetch && !access.user && walk.user && walk.depth != 0;
    if (kernel_fetches_user_page && trap_user_fetch_) {
        const std::uint32_t code = PageFault::present | PageFault::fetch;
        return {.outcome = Miss::guest_fault, .fault = {at, code}, .trapped_user_fetch = true};
    }
    if (paging_4_level.root().index(at) == shadow->store.reserved_slot() && !shadow->move_slot(paging_))
        return {.outcome = Miss::no_slot};
    if (shadow->guards.on(at, walk.address.frame()).forbids(access)) {
        guarded_ = AskedAccess{at, walk.address.frame()};
        return {.outcome = Miss::guarded, .address = walk.address};
    }
    const GuestFrame target = walk.address.frame();
    if (access.write && shadow->tracker.is_protected(same_frame(target))) {
        const bool watched = shadow->config.sync == Sync::trap;
        if (watched && shadow->tracker.is_live(target)) {
            asked_ = AskedWrite{at, access.user, stale.has_value(), walk};
            return {.outcome = Miss::table_write, .address = walk.address};
        }
        watched ? shadow->tracker.give_up(target) : shadow->tracker.unprotect(target);
    }
    if (sanitizer_ != nullptr && !stale)
        sanitizer_->used(at, walk, paging_);
    fill(*shadow, walk, at, access.user, stale ? Filler::Remember::no : Filler::Remember::yes);
    if (kernel_fetches_user_page && role(false).user_pages_hidden) {
        exposed_.push_back(at);
        just_exposed_ = true;
    }
    return {.outcome = Miss::filled};
}

/// Takes back what was filled for a kernel's fetch of a user page that is hidden from it (Role).
void Mmu::hide_exposed(ShadowParts& shadow, GuestVirt at) const {
    if (resets_ != shadow.resets || !current_[0])
        return;
    TableIndex index = *current_[0];
    for (const Level& level : paging_4_level.levels) {
        const unsigned slot = level.index(at);
        const auto next = shadow.store.child(index, shadow.store.entries(index)[slot]);
        if (!next || shadow.store[*next].key.role.direct) {
            shadow.store.drop_entry(index, slot);
            return;
        }
        index = *next;
    }
}

/// What the CPU's TLB may still hold for this access, if that is not what the tables say and the policy is to
/// go on using it.
std::optional<GuestWalk> Mmu::stale_walk(const GuestMemory& memory, GuestVirt at, Access access) {
    const GuestWalk fresh = walk_guest(memory, paging_, at, access);
    std::optional<StaleUse> use = sanitizer_->check(at, access, fresh, paging_);
    if (!use)
        return std::nullopt;
    stale_use_(*use);
    if (policy_ != TlbPolicy::keep)
        return std::nullopt;
    // What was read through a cached entry is marked as used; a cached translation is so already.
    if (use->through_structure_cache && !set_accessed_dirty(memory, use->before, access.write))
        return std::nullopt;
    return use->before;
}

void Mmu::fill(ShadowParts& shadow, const GuestWalk& walk, GuestVirt at, bool user,
               Filler::Remember remember) {
    ++shadow.counters.fills;
    shadow.store.tick();
    if (shadow.filler.install(root_table(shadow, user), paging_, walk, at, remember))
        return;
    shadow.reset(); // the pool is exhausted by what this fill needs: start over
    (void)shadow.filler.install(root_table(shadow, user), paging_, walk, at, remember);
}

void Mmu::begin_table_write() {
    const auto shadow = edit();
    if (!asked_)
        return;
    const AskedWrite write = *std::exchange(asked_, std::nullopt);
    const GuestFrame frame = write.walk.address.frame();
    if (shadow->tracker.open(frame))
        open_.push_back(frame);
    if (sanitizer_ != nullptr && !write.stale)
        sanitizer_->used(write.at, write.walk, paging_);
    fill(*shadow, write.walk, write.at, write.user,
         write.stale ? Filler::Remember::no : Filler::Remember::yes);
}

std::vector<TableWrite> Mmu::finish_table_write() {
    const auto shadow = edit();
    std::vector<TableWrite> writes;
    if (!open_.empty())
        shadow->store.stop_others(); // a page that is open is so for all, and their TLBs know it as writable
    for (const GuestFrame frame : open_)
        shadow->tracker.close(frame, writes);
    open_.clear();
    return writes;
}

void Mmu::set_guards(Guards guards, GuardOwner owner) {
    edit()->set_guards(std::move(guards), owner);
}

void Mmu::begin_guarded_access() {
    const auto shadow = edit();
    guard_open_ = true;
    if (const auto access = std::exchange(guarded_, std::nullopt))
        shadow->guards.open(access->at, access->frame);
}

void Mmu::finish_guarded_access() {
    if (std::exchange(guard_open_, false))
        edit()->close_guards();
}

void Mmu::flush(const FlushScope& scope) {
    const auto shadow = edit();
    ++shadow->counters.flushes;
    // Tables are compared again before they are next relied on. What another context had: when it comes back.
    if (scope.all_contexts || scope.pcid == paging_.pcid)
        required_ = shadow->tracker.next_epoch();
    shadow->cache.merge_quiet_memory();
    if (shadow->config.virtual_tlb)
        shadow->store.forget_entries();
    if (sanitizer_ == nullptr)
        return;
    if (scope.globals)
        sanitizer_->flush_everything();
    else if (scope.all_contexts)
        sanitizer_->flush_all_contexts();
    else
        sanitizer_->flush_context(scope.pcid);
    shadow->store.forget_entries();
}

void Mmu::invalidate(GuestVirt at, std::uint16_t pcid, bool globals) {
    const auto shadow = edit();
    ++shadow->counters.invalidations;
    if (sanitizer_ != nullptr) {
        if (globals)
            sanitizer_->invalidate(at, paging_);
        else
            sanitizer_->invalidate_in(pcid, at, paging_);
        shadow->store.forget_entries();
    }
    if (pcid != paging_.pcid)
        return;
    // What the current roots do not refer to now is compared before they do.
    invalidated_ = shadow->tracker.next_epoch();
    if (resets_ != shadow->resets)
        return;
    for (const auto& root : current_) {
        if (root)
            shadow->tracker.invalidate(*root, at);
    }
}

void Mmu::reset() {
    edit()->reset();
}

std::vector<WalkStep<MachinePhysSpace>> Mmu::shadow_walk(GuestVirt at, bool user) {
    const auto shadow = edit();
    std::vector<WalkStep<MachinePhysSpace>> steps;
    const TablePool& pool = shadow->store.pool();
    const auto read = [&pool](const Level&, MachinePhys slot) {
        const auto index = pool.page_of(slot.frame());
        return index ? pool.entries(*index)[slot.page_offset() / sizeof(ShadowEntry)] : ShadowEntry();
    };
    const MachineFrame root = pool.frame(root_table(*shadow, user));
    walk(paging_4_level, root, at, at, read, [&](const WalkStep<MachinePhysSpace>& step) {
        steps.push_back(step);
        return WalkNext::descend;
    });
    return steps;
}

} // namespace umbra
