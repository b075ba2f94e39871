// Every combination of entry bits, accesses and control bits: the walker against the reference model, in
// result, error code, and accessed and dirty bits.
#include "shadow/guest_walk.hpp"
#include "tests/model/convert.hpp"

#include <array>
#include <iostream>
#include <string>
#include <vector>

#include <fmt/core.h>
#include <gtest/gtest.h>

namespace umbra::model {
namespace {

constexpr std::uint64_t gb = std::uint64_t{1} << 30;
constexpr std::uint64_t p = 1, rw = 2, us = 4, accessed = 0x20, dirty = 0x40, ps = 0x80, g = 0x100;
constexpr std::uint64_t xd = std::uint64_t{1} << 63, key_1 = std::uint64_t{1} << 59;

/// One chain of tables for one address. Each table is at a multiple of 1 GB, so that its entry can be the
/// leaf's as well. Only the entries that the walk can meet have memory, in one page for each table.
class Chain final : public Memory {
  public:
    explicit Chain(Mode mode) : mode_(mode) {
        cpu.mode = mode;
        cpu.root = table(top_level(mode));
        at = mode == Mode::five_level   ? 0x00ab'1234'5678'9abc
             : mode == Mode::four_level ? 0x1234'5678'9abc
                                        : 0x5678'9abc;
        std::vector<GuestMemory::Region> regions;
        for (unsigned level = 1; level <= top_level(mode); ++level)
            regions.push_back({GuestPhys(table(level)), std::as_writable_bytes(std::span(pages_.at(level)))});
        memory = GuestMemory(regions);
    }

    /// The table of `level`; the page is where that of level 0 would be.
    [[nodiscard]] std::uint64_t table(unsigned level) const {
        // All of them below 4 GB in the modes whose entries reach no further.
        return entry_bytes(mode_) == 4 ? gb * (3 - level) : gb * (level + 1);
    }
    [[nodiscard]] std::uint64_t slot(unsigned level) const {
        const unsigned index_bits = mode_ == Mode::legacy ? 10 : 9;
        const std::uint64_t index = at >> (12 + index_bits * (level - 1)) & ((1U << index_bits) - 1);
        return table(level) + index * entry_bytes(mode_);
    }
    [[nodiscard]] bool is_register(unsigned level) const { return mode_ == Mode::pae && level == 3; }
    void set(unsigned level, std::uint64_t bits_of_entry) { put(level, bits_of_entry | table(level - 1)); }
    void put(unsigned level, std::uint64_t entry) {
        if (is_register(level)) {
            cpu.pdpte.at(at >> 30 & 3) = entry;
            return;
        }
        std::uint64_t& whole = word(slot(level));
        if (entry_bytes(mode_) == 8)
            whole = entry;
        else if ((slot(level) & 4) != 0)
            whole = (whole & 0xffff'ffff) | entry << 32;
        else
            whole = (whole & ~std::uint64_t{0xffff'ffff}) | (entry & 0xffff'ffff);
    }

    [[nodiscard]] std::uint64_t load(std::uint64_t where) const override {
        const std::uint64_t* const page = find(where);
        return page != nullptr ? page[where % page_size / 8] : ~std::uint64_t{0};
    }
    void store(std::uint64_t where, std::uint64_t value) override {
        if (find(where) != nullptr)
            word(where) = value;
    }

    /// The 8 bytes around each entry of the chain.
    using Entries = std::array<std::uint64_t, 6>;
    [[nodiscard]] Entries entries() const {
        Entries all{};
        for (unsigned level = 1; level <= top_level(mode_); ++level)
            all.at(level) = load(slot(level) & ~std::uint64_t{7});
        return all;
    }
    void restore(const Entries& all) {
        for (unsigned level = 1; level <= top_level(mode_); ++level)
            word(slot(level) & ~std::uint64_t{7}) = all.at(level);
    }

    Cpu cpu;
    std::uint64_t at = 0;
    GuestMemory memory;

  private:
    [[nodiscard]] const std::uint64_t* find(std::uint64_t where) const {
        for (unsigned level = 1; level <= top_level(mode_); ++level) {
            if (where - table(level) < page_size)
                return pages_.at(level).data();
        }
        return nullptr;
    }
    std::uint64_t& word(std::uint64_t where) {
        return const_cast<std::uint64_t*>(find(where))[where % page_size / 8];
    }

    Mode mode_;
    std::array<std::vector<std::uint64_t>, 6> pages_ = [] {
        std::array<std::vector<std::uint64_t>, 6> pages;
        pages.fill(std::vector<std::uint64_t>(page_size / 8));
        return pages;
    }();
};

constexpr std::array all_accesses{
    Access{Kind::read, false, false}, Access{Kind::read, false, true},   Access{Kind::write, false, false},
    Access{Kind::write, false, true}, Access{Kind::fetch, false, false}, Access{Kind::fetch, false, true},
    Access{Kind::read, true, false},  Access{Kind::write, true, false},  Access{Kind::fetch, true, false},
    Access{Kind::read, true, true},   Access{Kind::write, true, true},   Access{Kind::fetch, true, true}};

/// Compares one access. Leaves the chain as it was.
class Comparison {
  public:
    explicit Comparison(Chain& chain) : chain_(&chain) {}

    [[nodiscard]] bool same(Access access) {
        ++count_;
        const Chain::Entries before = chain_->entries();
        const Walk wanted = walk(chain_->cpu, *chain_, chain_->at, access);
        if (!wanted.error_code)
            mark(chain_->cpu, *chain_, wanted, access.kind == Kind::write);
        const Chain::Entries marked = chain_->entries();
        chain_->restore(before);
        const GuestPaging paging = to_paging(chain_->cpu);
        const GuestWalk got = translate(chain_->memory, paging, GuestVirt(chain_->at), to_access(access));
        const Chain::Entries after = chain_->entries();
        chain_->restore(before);
        const bool outcome = wanted.error_code ? got.fault && got.fault->error_code == *wanted.error_code &&
                                                     got.fault->address == GuestVirt(chain_->at)
                                               : !got.fault && got.address == GuestPhys(wanted.physical) &&
                                                     got.user == wanted.user_page;
        if (outcome && got.depth == wanted.count && after == marked)
            return true;
        ADD_FAILURE() << describe(access, before) << ": expected "
                      << outcome_text(wanted.error_code, wanted.physical) << entries_text(marked) << ", got "
                      << outcome_text(got.fault ? std::optional(got.fault->error_code) : std::nullopt,
                                      got.address.value())
                      << entries_text(after);
        return false;
    }
    [[nodiscard]] bool all_same() {
        for (const Access access : all_accesses) {
            if (!same(access))
                return false;
        }
        return true;
    }
    [[nodiscard]] std::uint64_t count() const { return count_; }

  private:
    static std::string outcome_text(std::optional<std::uint32_t> code, std::uint64_t physical) {
        return code ? fmt::format("#PF {:#x}", *code) : fmt::format("{:#x}", physical);
    }
    [[nodiscard]] std::string entries_text(const Chain::Entries& entries) const {
        std::string text;
        for (unsigned level = top_level(chain_->cpu.mode); level > 0; --level)
            text +=
                fmt::format(" {:#x}", chain_->is_register(level) ? chain_->cpu.pdpte.at(chain_->at >> 30 & 3)
                                                                 : entries.at(level));
        return text;
    }
    [[nodiscard]] std::string describe(Access access, const Chain::Entries& entries) const {
        return fmt::format("{}, {}, entries{}", text(access), text(chain_->cpu), entries_text(entries));
    }

    Chain* chain_;
    std::uint64_t count_ = 0;
};

/// WP, NXE, SMEP, SMAP in all combinations, and for each what `keys` says of PKE and PKRU.
struct Keys {
    bool pke;
    std::uint32_t pkru;
};
constexpr std::array with_keys{Keys{false, ~0U}, Keys{true, 0x4}, Keys{true, 0x8}, Keys{true, 0x3}};
constexpr std::array without_keys{Keys{false, ~0U}};

template<std::size_t n, class Check>
bool for_each_control(Cpu& cpu, const std::array<Keys, n>& keys, Check&& check) {
    for (unsigned control = 0; control < 16; ++control) {
        cpu.wp = (control & 1) != 0;
        cpu.nxe = (control & 2) != 0;
        cpu.smep = (control & 4) != 0;
        cpu.smap = (control & 8) != 0;
        for (const Keys& key : keys) {
            cpu.pke = key.pke;
            cpu.pkru = key.pkru;
            if (!check())
                return false;
        }
    }
    return true;
}

struct Format {
    Mode mode;
    bool pse;
    const char* name;
};

class Enumerator : public ::testing::TestWithParam<Format> {
  protected:
    void report(std::uint64_t combinations) {
        std::cout << "[ combinations ] " << combinations << '\n';
        RecordProperty("combinations", std::to_string(combinations));
    }
    static bool long_mode(Mode mode) { return mode == Mode::four_level || mode == Mode::five_level; }
};

/// One entry takes every combination of its bits, at each level, below and above entries that permit all.
TEST_P(Enumerator, EveryBitAtEachLevel) {
    const auto [mode, pse, name] = GetParam();
    Chain chain(mode);
    chain.cpu.pse = pse;
    chain.cpu.maxphyaddr = 46;
    Comparison comparison(chain);
    // Reserved in any entry, or in that of a large page.
    const std::uint64_t reserved = mode == Mode::legacy ? std::uint64_t{1} << 21 : std::uint64_t{1} << 50;
    const std::array all_bits{p, rw, us, ps, accessed, dirty, g, reserved, xd, key_1};
    const std::size_t bit_count = mode == Mode::legacy ? 8 : 10;
    for (unsigned level = 1; level <= top_level(mode); ++level) {
        for (unsigned leaf = 1; leaf <= std::min(level, 3U); ++leaf) {
            for (unsigned other = 1; other <= top_level(mode); ++other)
                chain.set(other, p | (chain.is_register(other) ? 0 : rw | us) |
                                     (other == leaf && leaf > 1 ? ps : 0));
            for (unsigned combination = 0; combination < 1U << bit_count; ++combination) {
                std::uint64_t entry = 0;
                for (unsigned i = 0; i < bit_count; ++i)
                    entry |= (combination >> i & 1) != 0 ? all_bits.at(i) : 0;
                if (level == leaf && leaf > 1 && (entry & ps) == 0)
                    continue; // a chain with a smaller leaf
                chain.set(level, entry);
                // Without P nothing else counts: fewer control words will do.
                const bool ok = for_each_control(chain.cpu, with_keys, [&] {
                    if ((entry & p) == 0 && (chain.cpu.wp || chain.cpu.pke))
                        return true;
                    return comparison.all_same();
                });
                if (!ok)
                    return;
            }
        }
    }
    report(comparison.count());
}

/// All entries at once: every combination of P, R/W, U/S and XD along the chain.
TEST_P(Enumerator, RightsOfAllLevelsTogether) {
    const auto [mode, pse, name] = GetParam();
    Chain chain(mode);
    chain.cpu.pse = pse;
    Comparison comparison(chain);
    constexpr std::array rights{rw, us, xd, p};
    const std::size_t kinds = mode == Mode::legacy ? 2 : 3; // those that add up; P ends the walk
    const unsigned levels = top_level(mode);
    for (unsigned leaf = 1; leaf <= std::min(levels, 3U); ++leaf) {
        const unsigned depth = levels + 1 - leaf;
        for (std::uint64_t combination = 0; combination < std::uint64_t{1} << (kinds * depth);
             ++combination) {
            for (unsigned i = 0; i < depth; ++i) {
                const unsigned level = leaf + i;
                std::uint64_t entry = p | (level == leaf && leaf > 1 ? ps : 0);
                for (unsigned kind = 0; kind < kinds; ++kind)
                    entry |= (combination >> (kinds * i + kind) & 1) != 0 ? rights.at(kind) : 0;
                chain.set(level, entry);
            }
            if (!for_each_control(chain.cpu, without_keys, [&] { return comparison.all_same(); }))
                return;
        }
    }
    report(comparison.count());
}

/// Each reserved bit by itself, on CPUs with all numbers of address bits, in tables and in leaves.
TEST_P(Enumerator, EachBitAlone) {
    const auto [mode, pse, name] = GetParam();
    Chain chain(mode);
    chain.cpu.pse = pse;
    Comparison comparison(chain);
    for (unsigned maxphyaddr = 36; maxphyaddr <= 52; ++maxphyaddr) {
        chain.cpu.maxphyaddr = maxphyaddr;
        for (const bool gigabyte_pages : {false, true}) {
            chain.cpu.gigabyte_pages = gigabyte_pages;
            for (unsigned leaf = 1; leaf <= std::min(top_level(mode), 3U); ++leaf) {
                for (unsigned level = leaf; level <= top_level(mode); ++level) {
                    for (unsigned number = 0; number < 8 * entry_bytes(mode); ++number) {
                        for (unsigned other = leaf; other <= top_level(mode); ++other)
                            chain.set(other, p | (chain.is_register(other) ? 0 : rw | us) |
                                                 (other == leaf && leaf > 1 ? ps : 0));
                        const std::uint64_t plain =
                            p | rw | us | (level == leaf && leaf > 1 ? ps : 0) | chain.table(level - 1);
                        chain.put(level, plain ^ std::uint64_t{1} << number);
                        for (const bool nxe : {false, true}) {
                            chain.cpu.nxe = nxe;
                            if (!comparison.all_same())
                                return;
                        }
                    }
                }
            }
        }
    }
    report(comparison.count());
}

INSTANTIATE_TEST_SUITE_P(Modes, Enumerator,
                         ::testing::Values(Format{Mode::five_level, false, "FiveLevel"},
                                           Format{Mode::four_level, false, "FourLevel"},
                                           Format{Mode::pae, false, "Pae"},
                                           Format{Mode::legacy, false, "Legacy"},
                                           Format{Mode::legacy, true, "LegacyWithPse"}),
                         [](const auto& format) { return std::string(format.param.name); });

} // namespace
} // namespace umbra::model
