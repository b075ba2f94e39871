// What a leaf of the shadow tables may be: the guest's page, as far as isolation, write-protected tables of
// the guest, and guards allow.
#pragma once

#include "shadow/frames.hpp"
#include "shadow/guards.hpp"
#include "shadow/rights.hpp"
#include "shadow/tracker.hpp"

namespace umbra {

class Leaves {
  public:
    /// All of them outlive this.
    Leaves(const GuestMemory& memory, const TableStore& store, const Tracker& tracker, GuardSet& guards,
           const MmuConfig& config)
        : memory_(memory), store_(store), tracker_(tracker), guards_(guards), config_(config) {}

    /// The level-1 entry at `slot` of `table` for the guest's `frame`, with these rights but for what must
    /// trap.
    [[nodiscard]] ShadowEntry page(TableIndex table, unsigned slot, GuestFrame frame, std::uint64_t rights) {
        const MachineFrame target = machine_frame(config_, frame);
        if (tracker_.is_protected(target))
            rights &= ~entry_bit::writable;
        if (guards_.none())
            return {target, rights};
        guards_.note({table, slot});
        const Guard guard = guards_.on_entry(store_[table].key.role.guarded, slot, target);
        if (guard.read) // x86 has no pages to write to or execute alone
            return {};
        if (guard.write)
            rights &= ~entry_bit::writable;
        if (guard.fetch)
            rights |= entry_bit::no_execute;
        return {target, rights};
    }

    /// Whether one entry of `level`, above 1, can map the guest's memory from `first` on.
    [[nodiscard]] bool may_be_large(GuestFrame first, const Level& level) const {
        return memory_.contains(first.base(), level.span()) && !guards_.lies_in(first, frames_of(level)) &&
               (level.number == 2 || (level.number == 3 && config_.gigabyte_pages)) &&
               !tracker_.has_protected(first, level.number);
    }
    /// Whether the one at `slot` of `table` can.
    [[nodiscard]] bool may_be_large(TableIndex table, unsigned slot, GuestFrame first) const {
        const TableKey& key = store_[table].key;
        return !(key.role.guarded && guards_.lies_below(slot, key.level)) &&
               may_be_large(first, paging_4_level.level(key.level));
    }

  private:
    const GuestMemory& memory_;
    const TableStore& store_;
    const Tracker& tracker_;
    GuardSet& guards_;
    const MmuConfig& config_;
};

} // namespace umbra
