#include "shadow/mmu.hpp"

namespace umbra {

Mmu::Mmu(ShadowTables& tables, unsigned number)
    : tables_(tables), number_(number), ledger_(tables.pool().capacity()) {
    const auto editing = tables_.edit();
    tables_.ledgers_.push_back(&ledger_);
}

Mmu::~Mmu() {
    const auto editing = tables_.edit();
    for (auto& current : current_)
        pin(current, std::nullopt);
    std::erase(tables_.ledgers_, &ledger_);
    ledger_.debt.paid(); // the vCPU does not run again
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
    const auto editing = edit();
    // Tables that both spaces share may hold what the old one has used since the new one was left. No CPU
    // caches that for the new one, whether or not the switch flushes.
    required_ = ++tables_.epoch_;
    if (sanitizer_ != nullptr)
        tables_.forget_entries(); // what both share would serve the new one unseen
}

void Mmu::sanitize(TlbSanitizer& sanitizer, TlbPolicy policy,
                   std::function<void(const StaleUse&)> stale_use) {
    sanitizer_ = &sanitizer;
    policy_ = policy;
    stale_use_ = std::move(stale_use);
}

/// Makes `root` the current one, which is not recycled.
void Mmu::pin(std::optional<TableIndex>& current, std::optional<TableIndex> root) {
    if (resets_ != tables_.resets_) { // pins went with the tables
        current_ = {};
        resets_ = tables_.resets_;
    }
    if (current)
        --tables_.table(*current).pins;
    current = root;
    if (current)
        ++tables_.table(*current).pins;
}

TableIndex Mmu::root_table(bool user) {
    const TableKey key = root_key(user);
    auto& current = current_[user ? 1 : 0];
    const bool valid = current && resets_ == tables_.resets_;
    if (!valid || tables_.table(*current).key != key || tables_.table(*current).epoch < required_) {
        pin(current, std::nullopt);
        // INVLPG has not reached roots that were not current.
        auto root = tables_.root(key, std::max(required_, invalidated_));
        if (!root) { // every page is below the other root
            tables_.reset();
            root = tables_.root(key, required_);
        }
        pin(current, root);
        if (key.role.mode == GuestMode::pae) // loaded by what also flushes
            tables_.set_registers(*current, paging_.pdptes);
    }
    return *current;
}

MachineState Mmu::enter(bool user) {
    const auto editing = edit();
    MachineState state;
    if (!std::exchange(just_exposed_, false)) {
        for (const GuestVirt at : exposed_)
            hide_exposed(at);
        exposed_.clear();
    }
    state.root = tables_.pool_.frame(root_table(user));
    state.reserved_slot = tables_.slot_;
    state.debt = std::move(ledger_.debt);
    for (const TableIndex index : state.debt.tables)
        ledger_.owed[TablePool::number(index)] = false;
    ledger_.in_guest = true;
    return state;
}

void Mmu::left() {
    ledger_.in_guest = false;
    ledger_.in_guest.notify_all();
}

MissResult Mmu::fault(GuestVirt at, Access access) {
    const auto editing = edit();
    const std::optional<GuestWalk> stale = sanitizer_ != nullptr ? stale_walk(at, access) : std::nullopt;
    const GuestWalk walk = stale ? *stale : translate(tables_.memory_, paging_, at, access);
    tables_.marked(walk);
    if (walk.fault) {
        if (sanitizer_ != nullptr)
            sanitizer_->faulted(at, paging_);
        ++tables_.counters_.guest_faults;
        return {.outcome = Miss::guest_fault, .fault = *walk.fault};
    }
    const bool kernel_fetches_user_page = access.fetch && !access.user && walk.user && walk.depth != 0;
    if (kernel_fetches_user_page && trap_user_fetch_) {
        const std::uint32_t code = PageFault::present | PageFault::fetch;
        return {.outcome = Miss::guest_fault, .fault = {at, code}, .trapped_user_fetch = true};
    }
    if (paging_4_level.root().index(at) == tables_.slot_ && !tables_.move_slot(paging_))
        return {.outcome = Miss::no_slot};
    if (tables_.guard_on(at, walk.address.frame()).forbids(access)) {
        guarded_ = AskedAccess{at, walk.address.frame()};
        return {.outcome = Miss::guarded, .address = walk.address};
    }
    if (access.write && tables_.is_protected(MachineFrame(walk.address.frame().number()))) {
        ShadowTables::GuestTable& page = tables_.guest_tables_.at(walk.address.frame());
        const bool watched = tables_.config_.sync == Sync::trap;
        if (watched && tables_.is_live(page)) {
            asked_ = AskedWrite{at, access.user, stale.has_value(), walk};
            return {.outcome = Miss::table_write, .address = walk.address};
        }
        watched ? tables_.give_up(page) : tables_.unprotect(page);
    }
    if (sanitizer_ != nullptr && !stale)
        sanitizer_->used(at, walk, paging_);
    fill(walk, at, access.user, stale ? ShadowTables::Remember::no : ShadowTables::Remember::yes);
    if (kernel_fetches_user_page && role(false).user_pages_hidden) {
        exposed_.push_back(at);
        just_exposed_ = true;
    }
    return {.outcome = Miss::filled};
}

/// Takes back what was filled for a kernel's fetch of a user page that is hidden from it (Role).
void Mmu::hide_exposed(GuestVirt at) {
    if (resets_ != tables_.resets_ || !current_[0])
        return;
    TableIndex index = *current_[0];
    for (const Level& level : paging_4_level.levels) {
        const unsigned slot = level.index(at);
        const ShadowEntry entry = tables_.pool_.entries(index)[slot];
        if (!entry.present() || tables_.is_switcher(tables_.table(index), slot))
            return;
        const auto next = entry.leaf(level) ? std::nullopt : tables_.pool_.page_of(entry.table());
        if (!next || tables_.table(*next).key.role.direct) {
            tables_.drop_entry(index, slot);
            return;
        }
        index = *next;
    }
}

/// What the CPU's TLB may still hold for this access, if that is not what the tables say and the policy is to
/// go on using it.
std::optional<GuestWalk> Mmu::stale_walk(GuestVirt at, Access access) {
    const GuestWalk fresh = walk_guest(tables_.memory_, paging_, at, access);
    std::optional<StaleUse> use = sanitizer_->check(at, access, fresh, paging_);
    if (!use)
        return std::nullopt;
    stale_use_(*use);
    if (policy_ != TlbPolicy::keep)
        return std::nullopt;
    // What was read through a cached entry is marked as used; a cached translation is so already.
    if (use->through_structure_cache && !set_accessed_dirty(tables_.memory_, use->before, access.write))
        return std::nullopt;
    return use->before;
}

void Mmu::fill(const GuestWalk& walk, GuestVirt at, bool user, ShadowTables::Remember remember) {
    ++tables_.counters_.fills;
    ++tables_.clock_;
    if (tables_.install(root_table(user), paging_, walk, at, remember))
        return;
    tables_.reset(); // the pool is exhausted by what this fill needs: start over
    (void)tables_.install(root_table(user), paging_, walk, at, remember);
}

void Mmu::begin_table_write() {
    const auto editing = edit();
    if (!asked_)
        return;
    const AskedWrite write = *std::exchange(asked_, std::nullopt);
    const GuestFrame frame = write.walk.address.frame();
    if (const auto found = tables_.guest_tables_.find(frame); found != tables_.guest_tables_.end()) {
        ++tables_.counters_.table_writes;
        found->second.open = true;
        open_.push_back(frame);
    }
    if (sanitizer_ != nullptr && !write.stale)
        sanitizer_->used(write.at, write.walk, paging_);
    fill(write.walk, write.at, write.user,
         write.stale ? ShadowTables::Remember::no : ShadowTables::Remember::yes);
}

std::vector<TableWrite> Mmu::finish_table_write() {
    const auto editing = edit();
    std::vector<TableWrite> writes;
    if (!open_.empty())
        tables_.stop_others(); // a page that is open is so for all, and their TLBs know it as writable
    for (const GuestFrame frame : open_) {
        const auto found = tables_.guest_tables_.find(frame);
        if (found == tables_.guest_tables_.end())
            continue;
        ShadowTables::GuestTable& page = found->second;
        page.open = false;
        tables_.restrict_mappings(page);
        tables_.compare_shadows(page, writes);
    }
    open_.clear();
    return writes;
}

void Mmu::set_guards(Guards guards, GuardOwner owner) {
    const auto editing = edit();
    tables_.set_guards(std::move(guards), owner);
}

void Mmu::begin_guarded_access() {
    const auto editing = edit();
    guard_open_ = true;
    if (const auto access = std::exchange(guarded_, std::nullopt))
        tables_.open_guard(access->at, access->frame);
}

void Mmu::finish_guarded_access() {
    if (!std::exchange(guard_open_, false))
        return;
    const auto editing = edit();
    tables_.close_guards();
}

void Mmu::flush(const FlushScope& scope) {
    const auto editing = edit();
    ++tables_.counters_.flushes;
    // Tables are compared again before they are next relied on. What another context had: when it comes back.
    if (scope.all_contexts || scope.pcid == paging_.pcid)
        required_ = ++tables_.epoch_;
    if (!tables_.to_merge_.empty())
        tables_.merge_quiet_pages();
    if (tables_.config_.virtual_tlb)
        tables_.forget_entries();
    if (sanitizer_ == nullptr)
        return;
    if (scope.globals)
        sanitizer_->flush_everything();
    else if (scope.all_contexts)
        sanitizer_->flush_all_contexts();
    else
        sanitizer_->flush_context(scope.pcid);
    tables_.forget_entries();
}

void Mmu::invalidate(GuestVirt at, std::uint16_t pcid, bool globals) {
    const auto editing = edit();
    ++tables_.counters_.invalidations;
    if (sanitizer_ != nullptr) {
        if (globals)
            sanitizer_->invalidate(at, paging_);
        else
            sanitizer_->invalidate_in(pcid, at, paging_);
        tables_.forget_entries();
    }
    if (pcid != paging_.pcid)
        return;
    invalidated_ = ++tables_.epoch_; // what the current roots do not refer to now is compared before they do
    if (resets_ != tables_.resets_)
        return;
    for (const auto& root : current_) {
        if (root)
            tables_.invalidate(*root, at);
    }
}

void Mmu::reset() {
    const auto editing = edit();
    tables_.reset();
}

std::vector<WalkStep<MachinePhysSpace>> Mmu::shadow_walk(GuestVirt at, bool user) {
    const auto editing = edit();
    std::vector<WalkStep<MachinePhysSpace>> steps;
    const auto read = [this](const Level&, MachinePhys slot) {
        const auto index = tables_.pool_.page_of(slot.frame());
        return index ? tables_.pool_.entries(*index)[slot.page_offset() / sizeof(ShadowEntry)]
                     : ShadowEntry();
    };
    const MachineFrame root = tables_.pool_.frame(root_table(user));
    walk(paging_4_level, root, at, at, read, [&](const WalkStep<MachinePhysSpace>& step) {
        steps.push_back(step);
        return WalkNext::descend;
    });
    return steps;
}

} // namespace umbra
