// Guards: accesses that must not go unseen, by frame and by address.
//
// Watchpoints and breakpoints are made of them: the debugger's, and those of the guest's debug registers. A
// guard is kept by what it takes from the level-1 entries that would let the access through
// (shadow/leaves.hpp), and it opens for one instruction.
#pragma once

#include "shadow/guest_walk.hpp"
#include "shadow/mmu_config.hpp"
#include "shadow/reverse_map.hpp"

#include <array>
#include <map>
#include <set>
#include <utility>
#include <vector>

namespace umbra {

/// Accesses that must not go unseen.
struct Guard {
    bool read = false, write = false, fetch = false;

    /// x86 has no pages to write to or execute alone: where reads are guarded, nothing is let through.
    [[nodiscard]] bool forbids(const Access& access) const {
        return read || (access.fetch ? fetch : access.write && write);
    }
    friend Guard operator|(Guard left, Guard right) {
        return {left.read || right.read, left.write || right.write, left.fetch || right.fetch};
    }
    bool operator==(const Guard&) const = default;
};

/// Whose guards: each has its own, and all are in force.
enum class GuardOwner : std::uint8_t {
    debugger,
    guest, ///< its debug registers
};
inline constexpr std::size_t guard_owners = 2;

/// Guards by frame, whatever address leads there, and by address (of the page's first byte),
/// whatever is mapped there in any address space; but from `executable` frames, fetches at that address are
/// let through.
struct Guards {
    std::map<GuestFrame, Guard> frames;
    std::map<GuestVirt, Guard> pages;
    std::set<std::pair<GuestVirt, GuestFrame>> executable;

    [[nodiscard]] Guard on_page(GuestVirt page, const Guard& guard, GuestFrame frame) const {
        return {guard.read, guard.write, guard.fetch && !executable.contains({page, frame})};
    }

    bool operator==(const Guards&) const = default;
};

/// The guards in force.
class GuardSet {
  public:
    /// `config` outlives this.
    explicit GuardSet(const MmuConfig& config) : config_(config) {}

    /// From now on these are in force, in place of the owner's earlier ones. False if nothing changes by
    /// that. The caller forgets every table otherwise: the places of guards are part of tables' keys
    /// (Role::guarded).
    [[nodiscard]] bool set(Guards guards, GuardOwner owner);
    [[nodiscard]] bool none() const { return guards_.frames.empty() && guards_.pages.empty(); }

    /// What must not go unseen of accesses to this frame by this address. No less than on_entry forbids: an
    /// access that its entry does not let through would miss for ever.
    [[nodiscard]] Guard on(GuestVirt at, GuestFrame frame) const;
    /// The guard on a level-1 entry at `slot`, of a table that translates guarded pages (`guarded`) or one
    /// that does not, that maps `frame`.
    [[nodiscard]] Guard on_entry(bool guarded, unsigned slot, MachineFrame frame) const;
    /// Whether an entry of `level` translates a guarded page, where `at` is translated.
    [[nodiscard]] bool lies_below(GuestVirt at, const Level& level) const;
    /// Whether an entry at `slot` of a table of `level` that translates guarded pages may be of one.
    [[nodiscard]] bool lies_below(unsigned slot, unsigned level) const {
        return guarded_slots_[level - 1][slot] != Guard{};
    }
    /// Whether one of these frames is guarded.
    [[nodiscard]] bool lies_in(GuestFrame first, std::uint64_t frames) const {
        const auto guard = guards_.frames.lower_bound(first);
        return guard != guards_.frames.end() && guard->first - first < frames;
    }

    /// Until `close`, what is guarded of this page, at this address and of this frame, is let through.
    void open(GuestVirt at, GuestFrame frame) { open_pages_.emplace(at.page_base(), frame); }
    /// An entry is made, which may have more rights for that.
    void note(ShadowSlot place) {
        if (!open_pages_.empty())
            opened_.push_back(place);
    }
    /// Returns the entries that were noted: they have to go.
    [[nodiscard]] std::vector<ShadowSlot> close();
    /// No table is there any more.
    void forget_entries() { opened_.clear(); }

  private:
    [[nodiscard]] Guard on_slot(unsigned slot, GuestFrame frame) const;

    const MmuConfig& config_;
    std::array<Guards, guard_owners> owned_; ///< by GuardOwner
    Guards guards_;                          ///< all of them together
    /// By level, 1 to 4, and slot: what lies in a guarded page, by all such pages' addresses.
    std::array<std::array<Guard, entries_per_table>, 4> guarded_slots_{};
    std::set<std::pair<GuestVirt, GuestFrame>> open_pages_;
    std::vector<ShadowSlot> opened_;
};

} // namespace umbra
