// The one page-table walker.
//
// A walk goes down the tables for a range of addresses and calls a visitor for each entry that it meets; the
// visitor says how to go on. What the levels are comes from the format's table of per-level data; where
// entries come from is the reader's affair. A single translation is the range of one address; the debugger's
// map listing is the range of all. The idea is mini-os's generic walker (one walk, a table of per-level data,
// a callback).
#pragma once

#include "shadow/format.hpp"

#include <algorithm>
#include <concepts>

namespace umbra {

enum class WalkNext {
    descend, ///< go into the table that the entry refers to; on a leaf: go on with the next entry
    skip,    ///< go on with the next entry
    stop,    ///< end the whole walk
};

/// What a visitor is shown: one entry, its level, where it lies, and the first address that it translates.
template<class Space>
struct WalkStep {
    const Level* level = nullptr;
    Address<Space> slot;
    Entry<Space> entry;
    GuestVirt
        address; ///< inside the walked range: the range's start, or the first address of the entry's span
};

/// Fetches an entry of level.entry_bytes: called once for each visit, and the visitor's copy is what is used.
template<class Read, class Space>
concept EntryReader = std::same_as<std::invoke_result_t<Read&, const Level&, Address<Space>>, Entry<Space>>;

template<class Visit, class Space>
concept EntryVisitor = requires(Visit& visit, const WalkStep<Space>& step) {
    { visit(step) } -> std::same_as<WalkNext>;
};

/// Walks [first, last] (both inclusive; canonical, and within one half of the canonical space) below `table`,
/// a table of format.levels[depth]. A format without levels has nothing to visit. False if the visitor
/// stopped the walk.
template<class Space, EntryReader<Space> Read, EntryVisitor<Space> Visit>
bool walk(const PagingFormat& format, Frame<Space> table, GuestVirt first, GuestVirt last, Read&& read,
          Visit&& visit, std::size_t depth = 0) {
    if (depth == format.levels.size())
        return true;
    const Level& level = format.levels[depth];
    for (GuestVirt at = first;;) {
        const Address<Space> slot = table.base() + std::uint64_t{level.index(at)} * level.entry_bytes;
        const WalkStep<Space> step{&level, slot, read(level, slot), at};
        const GuestVirt end =
            GuestVirt(at.value() | (level.span() - 1)); // last address this entry translates
        const WalkNext next = visit(step);
        if (next == WalkNext::stop)
            return false;
        if (next == WalkNext::descend && step.entry.present() && !step.entry.leaf(level)) {
            if (!walk(format, step.entry.table(), at, std::min(end, last), read, visit, depth + 1))
                return false;
        }
        if (end >= last)
            return true;
        at = end + 1;
    }
}

} // namespace umbra
