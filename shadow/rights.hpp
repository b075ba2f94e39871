// What rights a shadow entry has: those of the guest's entry that it is made from, under the role of its
// table.
#pragma once

#include "shadow/role.hpp"

namespace umbra {

/// What every present shadow entry has. U/S: guest code of any virtual privilege runs at CPL 3. Accessed and
/// dirty are set beforehand, so that neither the CPU nor a KVM that shadows these tables in turn has a reason
/// to write to them.
inline constexpr std::uint64_t base_rights =
    entry_bit::present | entry_bit::user | entry_bit::accessed | entry_bit::dirty;
inline constexpr std::uint64_t all_rights = base_rights | entry_bit::writable;

/// The rights that the guest's entry passes on through a table with this role.
[[nodiscard]] constexpr std::uint64_t rights_of(GuestEntry entry, const Role& role) {
    std::uint64_t rights = base_rights;
    if (entry.writable() || !role.write_protect)
        rights |= entry_bit::writable;
    if (entry.no_execute())
        rights |= entry_bit::no_execute;
    return rights;
}

/// Those of the leaf that it is.
[[nodiscard]] constexpr std::uint64_t leaf_rights(GuestEntry entry, const Role& role) {
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

/// Whether `now` is the same leaf as `before` with more rights. A fault on the old one makes any CPU, and any
/// KVM, look again.
[[nodiscard]] constexpr bool is_upgrade(ShadowEntry before, ShadowEntry now) {
    const std::uint64_t gained = now.raw() & ~before.raw();
    const std::uint64_t lost = before.raw() & ~now.raw();
    return (gained & ~entry_bit::writable) == 0 && (lost & ~entry_bit::no_execute) == 0;
}

/// Whether the CPU itself may have turned `before` into `now`: accessed or dirty was set, nothing else.
[[nodiscard]] constexpr bool only_marked(GuestEntry before, GuestEntry now) {
    constexpr std::uint64_t marks = entry_bit::accessed | entry_bit::dirty;
    return ((before.raw() ^ now.raw()) & ~marks) == 0 && (before.raw() & ~now.raw()) == 0;
}

} // namespace umbra
