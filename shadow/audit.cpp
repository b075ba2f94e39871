// The audit: that the tables are what their parts say of them.
#include "shadow/entry_access.hpp"
#include "shadow/shadow_tables.hpp"

#include <algorithm>

#include <fmt/core.h>

namespace umbra {
namespace {

using Finding = std::optional<std::string>;

class Audit {
  public:
    explicit Audit(const ShadowParts& parts)
        : parts_(parts), store_(parts.store), references_(parts.store.pool().capacity()),
          oldest_(parts.store.pool().capacity(), ~std::uint64_t{0}) {}

    [[nodiscard]] Finding run();

  private:
    [[nodiscard]] Finding check_entries(TableIndex table);
    [[nodiscard]] Finding check_leaf(TableIndex table, unsigned slot, ShadowEntry entry) const;
    [[nodiscard]] Finding check_link(TableIndex table, unsigned slot, ShadowEntry entry);
    [[nodiscard]] Finding check_order(TableIndex table);
    [[nodiscard]] Finding check_uses(TableIndex table) const;
    [[nodiscard]] Finding check_links(TableIndex table) const;
    /// The first finding of `check` on a table; of `level` only, unless that is 0.
    template<class Check>
    [[nodiscard]] Finding first(unsigned level, Check check) const {
        Finding finding;
        store_.for_each([&](TableIndex table) {
            if (!finding && (level == 0 || store_[table].key.level == level))
                finding = check(table);
        });
        return finding;
    }

    const ShadowParts& parts_;
    const TableStore& store_;
    std::vector<std::uint32_t> references_; ///< to each table
    std::vector<std::uint64_t> oldest_;     ///< as of when is all in step that lies at or below each table
};

Finding Audit::check_leaf(TableIndex table, unsigned slot, ShadowEntry entry) const {
    const TableKey& key = store_[table].key;
    const std::size_t number = TablePool::number(table);
    const Level& level = paging_4_level.level(key.level);
    const MachineFrame frame = entry.page(level);
    const GuestFrame guest(frame.number());
    const bool small = level.number == 1;
    const bool ram = parts_.memory.contains(guest.base(), level.span());
    if (!ram && !(small && frame <= parts_.config.nothing))
        return fmt::format("entry {} of table {} maps frame {:#x}, which is not the guest's", slot, number,
                           frame.number());
    const bool writes_tables =
        small ? parts_.tracker.is_protected(frame) : !parts_.leaves.may_be_large(guest, level);
    const Guard guard = small ? parts_.guards.on_entry(key.role.guarded, slot, frame) : Guard{};
    const bool unseen = !small && !parts_.leaves.may_be_large(table, slot, guest);
    if (guard.read || (guard.write && entry.writable()) || (guard.fetch && !entry.no_execute()) ||
        (unseen && !writes_tables))
        return fmt::format("entry {} of table {} lets the guest use a guarded page unseen", slot, number);
    if (entry.writable() && writes_tables)
        return fmt::format("entry {} of table {} makes a protected table of the guest writable", slot,
                           number);
    const auto known = small ? store_.reverse().small(frame) : store_.reverse().large(frame, level.number);
    if ((!small || store_.reverse().tracked(frame)) &&
        std::ranges::count(known, ShadowSlot{table, slot}) != 1)
        return fmt::format("the reverse map does not know entry {} of table {}", slot, number);
    return std::nullopt;
}

Finding Audit::check_link(TableIndex table, unsigned slot, ShadowEntry entry) {
    const std::size_t number = TablePool::number(table);
    const auto child = store_.child(table, entry);
    if (!child || !store_.knows(*child))
        return fmt::format("entry {} of table {} refers to no live table", slot, number);
    const unsigned expected = store_[table].key.level - 1;
    if (store_[*child].key.level != expected)
        return fmt::format("entry {} of table {} refers to a table of level {} instead of {}", slot, number,
                           store_[*child].key.level, expected);
    ++references_[TablePool::number(*child)];
    return std::nullopt;
}

Finding Audit::check_entries(TableIndex table) {
    const std::size_t number = TablePool::number(table);
    const unsigned reserved = store_.reserved_slot();
    if (store_[table].key.level == root_level &&
        load_entry(store_.entries(table)[reserved]) != store_.switcher())
        return fmt::format("root table {} does not carry the switcher in slot {}", number, reserved);
    Finding finding;
    store_.for_each_entry(table, [&](unsigned slot, ShadowEntry entry) {
        if (finding)
            return;
        if (!entry.user())
            finding = fmt::format("entry {} of table {} is not accessible at CPL 3", slot, number);
        else if (store_.is_leaf(table, entry))
            finding = check_leaf(table, slot, entry);
        else
            finding = check_link(table, slot, entry);
    });
    return finding;
}

/// After all tables of lower levels.
Finding Audit::check_order(TableIndex table) {
    const Table& subject = store_[table];
    std::uint64_t& oldest = oldest_[TablePool::number(table)];
    if (subject.guest != GuestTableIndex::none && !parts_.tracker.is_protected(table))
        oldest = subject.compared;
    store_.for_each_entry(table, [&](unsigned, ShadowEntry entry) {
        if (const auto child = store_.child(table, entry))
            oldest = std::min(oldest, oldest_[TablePool::number(*child)]);
    });
    if (oldest < subject.epoch)
        return fmt::format("a table at or below table {} is behind it", TablePool::number(table));
    return parts_.tracker.audit(table);
}

Finding Audit::check_uses(TableIndex table) const {
    const std::size_t number = TablePool::number(table);
    if (store_[table].uses != references_[number])
        return fmt::format("table {} counts {} uses but {} entries refer to it", number, store_[table].uses,
                           references_[number]);
    return std::nullopt;
}

Finding Audit::check_links(TableIndex table) const {
    unsigned links = 0;
    store_.for_each_entry(table, [&](unsigned, ShadowEntry entry) {
        if (store_.child(table, entry))
            ++links;
    });
    if (store_[table].links != links)
        return fmt::format("table {} counts {} links but has {}", TablePool::number(table),
                           store_[table].links, links);
    return std::nullopt;
}

Finding Audit::run() {
    if (auto finding = first(0, [this](TableIndex table) { return check_entries(table); }))
        return finding;
    for (unsigned level = 1; level <= root_level; ++level) {
        if (auto finding = first(level, [this](TableIndex table) { return check_order(table); }))
            return finding;
    }
    if (auto finding = parts_.tracker.audit_settled())
        return finding;
    if (auto finding = first(0, [this](TableIndex table) { return check_uses(table); }))
        return finding;
    if (auto finding = first(0, [this](TableIndex table) { return check_links(table); }))
        return finding;
    std::size_t live = 0, idle = 0, unused = 0;
    store_.for_each([&](TableIndex table) {
        ++live;
        unused += store_[table].uses == 0 ? 1 : 0;
    });
    store_.find_idle([&](TableIndex table) {
        ++idle;
        return !store_.knows(table) || store_[table].uses != 0 || idle > live;
    });
    if (idle != unused)
        return fmt::format("{} tables are idle, but {} unused", idle, unused);
    const std::size_t pages = store_.pool().in_use();
    if (live != pages || live != store_.size())
        return fmt::format("{} tables live, {} pages in use, {} keys known", live, pages, store_.size());
    return std::nullopt;
}

} // namespace

std::optional<std::string> audit(const ShadowParts& parts) {
    return Audit(parts).run();
}

} // namespace umbra
