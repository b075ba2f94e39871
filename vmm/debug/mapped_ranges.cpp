#include "vmm/debug/mapped_ranges.hpp"

namespace umbra {
namespace {

/// The rights of the entries above a table.
struct Rights {
    bool user = true, writable = true, executable = true;
};

class Enumerator {
  public:
    Enumerator(const GuestMemory& memory, const GuestPaging& paging, RangeLimits limits)
        : memory_(&memory), paging_(&paging), limits_(limits), left_(limits.entries) {}

    MappedRanges run() && {
        const PagingFormat& format = *paging_->format;
        if (format.levels.empty()) {
            list_ram();
            return std::move(result_);
        }
        const std::uint64_t half = std::uint64_t{1} << (format.address_bits() - 1);
        if (!format.long_mode())
            (void)walk_between(GuestVirt(0), GuestVirt(2 * half - 1));
        else if (walk_between(GuestVirt(0), GuestVirt(half - 1)))
            (void)walk_between(format.sign_extend(half), GuestVirt(~std::uint64_t{0}));
        return std::move(result_);
    }

  private:
    void list_ram() {
        constexpr std::uint64_t end = std::uint64_t{1} << 32;
        for (const GuestMemory::Region& region : memory_->regions()) {
            const std::uint64_t base = region.base.value();
            if (base < end)
                (void)add({GuestVirt(base), std::min<std::uint64_t>(region.bytes.size(), end - base),
                           region.base, true, true, true, false, page_size});
        }
    }

    [[nodiscard]] bool walk_between(GuestVirt first, GuestVirt last) {
        const PagingFormat& format = *paging_->format;
        const auto read = [this](const Level& level, GuestPhys slot) { return load(level, slot); };
        const auto visit = [this](const WalkStep<GuestPhysSpace>& step) { return look(step); };
        return walk(format, paging_->root, first, last, read, visit);
    }

    /// PAE's root is in registers: its slots' numbers lie in the low bits of the address.
    [[nodiscard]] GuestEntry load(const Level& level, GuestPhys slot) const {
        if (level.in_registers)
            return GuestEntry(paging_->pdptes.at((slot - paging_->root.base()) / level.entry_bytes));
        if (level.entry_bytes == sizeof(std::uint32_t))
            return GuestEntry(memory_->read<std::uint32_t>(slot).value_or(~std::uint32_t{0}));
        return GuestEntry(memory_->read<std::uint64_t>(slot).value_or(~std::uint64_t{0}));
    }

    WalkNext look(const WalkStep<GuestPhysSpace>& step) {
        if (left_ == 0) {
            result_.truncated = true;
            return WalkNext::stop;
        }
        --left_;
        const Level& level = *step.level;
        const GuestEntry entry = step.entry;
        if (!entry.present() || (entry.raw() & reserved_bits(*paging_, level, entry)) != 0)
            return WalkNext::skip;
        // Entries of 4 bytes have no bit 63. A walk is depth first: what is above this level is of this
        // branch.
        Rights rights =
            level.number < paging_->format->root().number ? above_.at(level.number + 1) : Rights{};
        if (!level.in_registers) {
            rights.user &= entry.user();
            rights.writable &= entry.writable();
            rights.executable &= !entry.no_execute();
        }
        above_.at(level.number) = rights;
        if (!entry.leaf(level))
            return WalkNext::descend;
        const bool global = paging_->global_pages && entry.has(entry_bit::global);
        return add({step.address, level.span(), entry.page(level).base(), rights.user, rights.writable,
                    rights.executable, global, level.span()})
                   ? WalkNext::skip
                   : WalkNext::stop;
    }

    /// False: the list is full.
    [[nodiscard]] bool add(const MappedRange& page) {
        if (!result_.ranges.empty()) {
            MappedRange& last = result_.ranges.back();
            MappedRange joined = page;
            joined.start = last.start;
            joined.size = last.size;
            joined.physical = last.physical;
            if (joined == last && last.start + last.size == page.start &&
                last.physical + last.size == page.physical) {
                last.size += page.size;
                return true;
            }
        }
        if (result_.ranges.size() == limits_.ranges) {
            result_.truncated = true;
            return false;
        }
        result_.ranges.push_back(page);
        return true;
    }

    const GuestMemory* memory_;
    const GuestPaging* paging_;
    RangeLimits limits_;
    std::size_t left_;              ///< entries that may still be read
    std::array<Rights, 6> above_{}; ///< by level: of the entry last descended through, and those above it
    MappedRanges result_;
};

} // namespace

MappedRanges guest_ranges(const GuestMemory& memory, const GuestPaging& paging, RangeLimits limits) {
    return Enumerator(memory, paging, limits).run();
}

} // namespace umbra
