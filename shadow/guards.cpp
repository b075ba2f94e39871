#include "shadow/guards.hpp"

#include "shadow/frames.hpp"

#include <algorithm>

namespace umbra {
namespace {

/// What one owner lets be executed, another may guard.
Guards together(const std::array<Guards, guard_owners>& owned) {
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

} // namespace

bool GuardSet::set(Guards guards, GuardOwner owner) {
    Guards& owned = owned_[static_cast<std::size_t>(owner)];
    if (guards == owned)
        return false;
    owned = std::move(guards);
    Guards all = together(owned_);
    if (all == guards_)
        return false;
    guards_ = std::move(all);
    guarded_slots_ = {};
    for (const auto& [page, guard] : guards_.pages) {
        for (const Level& level : paging_4_level.levels) {
            Guard& slot = guarded_slots_[level.number - 1][level.index(page)];
            slot = slot | guard;
        }
    }
    return true;
}

/// The guard on entry `slot` of a level-1 table that translates guarded pages. Such tables are shared, so it
/// is that of all guarded pages with this entry, but for what may be executed.
Guard GuardSet::on_slot(unsigned slot, GuestFrame frame) const {
    const Guard of_all = guarded_slots_[0][slot];
    if (!of_all.fetch || guards_.executable.empty())
        return of_all;
    Guard guard;
    for (const auto& [page, on_page] : guards_.pages) {
        if (paging_4_level.level(1).index(page) == slot)
            guard = guard | guards_.on_page(page, on_page, frame);
    }
    return guard;
}

Guard GuardSet::on(GuestVirt at, GuestFrame frame) const {
    Guard guard;
    if (open_pages_.contains({at.page_base(), frame}))
        return guard;
    if (const auto found = guards_.frames.find(frame); found != guards_.frames.end())
        guard = found->second;
    if (!lies_below(at, paging_4_level.level(2)))
        return guard;
    return guard | on_slot(paging_4_level.level(1).index(at), frame);
}

Guard GuardSet::on_entry(bool guarded, unsigned slot, MachineFrame frame) const {
    Guard guard;
    if (guards_.frames.empty() && !guarded)
        return guard;
    const auto opens = [&](const auto& open) {
        return paging_4_level.level(1).index(open.first) == slot &&
               machine_frame(config_, open.second) == frame;
    };
    if (std::ranges::any_of(open_pages_, opens))
        return guard;
    const GuestFrame same(frame.number());
    if (const auto found = guards_.frames.find(same); found != guards_.frames.end())
        guard = found->second;
    return guarded ? guard | on_slot(slot, same) : guard;
}

bool GuardSet::lies_below(GuestVirt at, const Level& level) const {
    if (guards_.pages.empty())
        return false;
    const GuestVirt first(at.value() & ~(level.span() - 1));
    const auto guard = guards_.pages.lower_bound(first);
    return guard != guards_.pages.end() && guard->first - first < level.span();
}

std::vector<ShadowSlot> GuardSet::close() {
    open_pages_.clear();
    return std::exchange(opened_, {});
}

} // namespace umbra
