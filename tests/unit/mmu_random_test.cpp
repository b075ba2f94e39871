// The shadow MMU against a model of the CPU: random guests change their tables, flush or forget to, and use
// memory; each access must end as the model says.
//
// The model is Intel SDM vol. 3A, chapter 4, once more, in numbers and without anything of shadow/: a walk,
// its marks, and a TLB that is not one list of entries but the question whether a CPU might have cached this
// translation. It might if it is made of values that the guest's entries had since the address was last
// flushed (4.10.2, 4.10.3: the values of one walk need not be of one time, for the paging-structure caches
// hold some).
#include "tests/unit/fake_machine.hpp"

#include <algorithm>
#include <array>
#include <map>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include <gtest/gtest.h>

namespace umbra {
namespace {

using test::FakeMachine;

class Model {
  public:
    static constexpr std::uint64_t p = 1, rw = 2, us = 4, accessed = 0x20, dirty = 0x40, ps = 0x80,
                                   xd = std::uint64_t{1} << 63;
    static constexpr std::uint64_t address_mask = 0xf'ffff'ffff'f000;
    static constexpr std::uint64_t reserved = 0xf'0000'0000'0000; ///< a CPU with 48 physical address bits

    struct Walk {
        std::array<std::uint64_t, 5> slot{}; ///< by level: where the entry lies; 0 if not reached
        unsigned last = 4;                   ///< the lowest level reached
        std::optional<std::uint32_t> error_code;
        std::uint64_t physical = 0;
        bool user_page = false;
    };

    // Control state.
    std::uint64_t cr3 = 0;
    bool wp = true, nxe = true, smep = false, gigabyte_pages = true;

    // ---- memory

    [[nodiscard]] static bool ram(std::uint64_t physical) {
        return physical < FakeMachine::hole || (physical >= 0x10'0000 && physical < FakeMachine::low_end) ||
               (physical >= FakeMachine::high && physical < FakeMachine::high_end);
    }
    /// Where the machine's bus leads: equal addresses for RAM and the device window.
    [[nodiscard]] static std::uint64_t machine(std::uint64_t physical) {
        const std::uint64_t frame = physical >> 12;
        const bool window =
            frame >= FakeMachine::window.number() && frame < FakeMachine::behind_window.number();
        return ram(physical) || window ? physical : FakeMachine::nothing.number() << 12 | (physical & 0xfff);
    }
    [[nodiscard]] std::uint64_t load(std::uint64_t slot) const {
        const auto found = values_.find(slot);
        if (found != values_.end())
            return found->second.back().value;
        return ram(slot) ? 0 : ~std::uint64_t{0};
    }
    void store(std::uint64_t slot, std::uint64_t value) {
        auto& values = values_[slot];
        if (values.empty())
            values.push_back({0, 0});
        values.push_back({++now_, value});
    }
    /// Calls `each(slot, value)` for all that was stored.
    template<class Each>
    void contents(Each each) const {
        for (const auto& [slot, values] : values_)
            each(slot, values.back().value);
    }

    // ---- flushes

    void flush() {
        flushed_ = ++now_;
        invlpgs_.clear();
        for (auto& [slot, values] : values_)
            values.erase(values.begin(), values.end() - 1);
    }
    void invlpg(std::uint64_t at) { invlpgs_[at >> 12] = ++now_; }

    // ---- translation

    /// 4.5, 4.6 and 4.7.
    [[nodiscard]] Walk walk(std::uint64_t at, Access access) const {
        Walk result;
        const std::uint32_t code =
            (access.write ? 2U : 0U) | (access.user ? 4U : 0U) | (access.fetch && (nxe || smep) ? 16U : 0U);
        std::uint64_t table = cr3, all = rw | us, any = 0;
        for (unsigned level = 4;; --level) {
            result.last = level;
            result.slot[level] = table + index(at, level) * 8;
            const std::uint64_t entry = load(result.slot[level]);
            if ((entry & p) == 0) {
                result.error_code = code;
                return result;
            }
            if (malformed(entry, level)) {
                result.error_code = code | 9;
                return result;
            }
            all &= entry;
            any |= entry;
            if (level == 1 || (entry & ps) != 0) {
                result.physical = page(entry, level) + offset(at, level);
                result.user_page = (all & us) != 0;
                if (!allowed(all, any, access))
                    result.error_code = code | 1;
                return result;
            }
            table = entry & address_mask;
        }
    }

    /// What the CPU writes when it uses the walk (4.8).
    void mark(const Walk& walk, bool write) {
        for (unsigned level = 4; level >= walk.last; --level) {
            const std::uint64_t entry = load(walk.slot[level]);
            const std::uint64_t marked =
                entry | accessed | (write && level == walk.last ? dirty : std::uint64_t{0});
            if (marked != entry)
                store(walk.slot[level], marked);
        }
    }

    /// Whether the CPU's caches may give this access this translation. `user_page` restricts it to pages that
    /// are, or are not, of the guest's programs.
    [[nodiscard]] bool may_have_cached(std::uint64_t at, Access access, std::uint64_t machine_address,
                                       std::optional<bool> user_page) const {
        for (unsigned leaf = 1; leaf <= 3; ++leaf) {
            const Query query{at, access, machine_address, user_page, leaf, last_flush(at, leaf)};
            if (search(query, 4, cr3, rw | us, 0))
                return true;
        }
        return false;
    }

  private:
    struct Value {
        std::uint64_t since = 0;
        std::uint64_t value = 0;
    };
    struct Query {
        std::uint64_t at = 0;
        Access access;
        std::uint64_t machine_address = 0;
        std::optional<bool> user_page;
        unsigned leaf = 1; ///< the page's level
        std::uint64_t flushed = 0;
    };

    static std::uint64_t index(std::uint64_t at, unsigned level) { return at >> (3 + 9 * level) & 511; }
    static std::uint64_t size(unsigned level) { return std::uint64_t{1} << (3 + 9 * level); }
    static std::uint64_t offset(std::uint64_t at, unsigned level) { return at & (size(level) - 1); }
    static std::uint64_t page(std::uint64_t entry, unsigned level) {
        return entry & address_mask & ~(size(level) - 1);
    }
    /// Tables 4-15 to 4-20: reserved bits.
    [[nodiscard]] bool malformed(std::uint64_t entry, unsigned level) const {
        if ((entry & reserved) != 0 || ((entry & xd) != 0 && !nxe))
            return true;
        if (level == 1 || (entry & ps) == 0)
            return false;
        if (level == 4 || (level == 3 && !gigabyte_pages))
            return true;
        return (entry & (size(level) - 1) & ~std::uint64_t{0x1fff}) != 0;
    }
    /// 4.6.1. `all`: the AND of the entries; `any`: the OR.
    [[nodiscard]] bool allowed(std::uint64_t all, std::uint64_t any, Access access) const {
        const bool user_page = (all & us) != 0;
        if (access.user && !user_page)
            return false;
        if (access.write && (all & rw) == 0 && (access.user || wp))
            return false;
        if (access.fetch && (any & xd) != 0)
            return false;
        return !(access.fetch && !access.user && user_page && smep);
    }
    /// When a translation of `at` by a page of this level was last flushed.
    [[nodiscard]] std::uint64_t last_flush(std::uint64_t at, unsigned level) const {
        std::uint64_t last = flushed_;
        const std::uint64_t first = (at & ~(size(level) - 1)) >> 12;
        for (auto i = invlpgs_.lower_bound(first);
             i != invlpgs_.end() && i->first < first + (size(level) >> 12); ++i)
            last = std::max(last, i->second);
        return last;
    }
    [[nodiscard]] bool search(const Query& query, unsigned level, std::uint64_t table, std::uint64_t all,
                              std::uint64_t any) const {
        const auto found = values_.find(table + index(query.at, level) * 8);
        if (found == values_.end())
            return false; // nothing was ever there: zeroes, or all ones outside RAM
        const std::vector<Value>& values = found->second;
        for (std::size_t i = values.size(); i-- > 0;) {
            if (usable(query, level, values[i].value, all, any))
                return true;
            if (values[i].since <= query.flushed)
                return false; // older ones were gone by then
        }
        return false;
    }
    [[nodiscard]] bool usable(const Query& query, unsigned level, std::uint64_t entry, std::uint64_t all,
                              std::uint64_t any) const {
        if ((entry & p) == 0 || (entry & accessed) == 0 || malformed(entry, level))
            return false;
        const bool leaf = level == 1 || (entry & ps) != 0;
        if (leaf != (level == query.leaf))
            return false;
        if (!leaf)
            return search(query, level - 1, entry & address_mask, all & entry, any | entry);
        if (query.access.write && (entry & dirty) == 0)
            return false;
        if (query.user_page && *query.user_page != ((all & entry & us) != 0))
            return false;
        return machine(page(entry, level) + offset(query.at, level)) == query.machine_address &&
               allowed(all & entry, any | entry, query.access);
    }

    std::unordered_map<std::uint64_t, std::vector<Value>> values_; ///< by slot, oldest first
    std::map<std::uint64_t, std::uint64_t> invlpgs_;               ///< by page, since the last flush
    std::uint64_t now_ = 0;
    std::uint64_t flushed_ = 0;
};

/// A guest that does random things, on the shadow and on the model at once.
class RandomGuest {
  public:
    explicit RandomGuest(std::uint64_t seed)
        : seed_(seed), random_(seed), trap_allowed_(chance(30)),
          machine_({.pool_pages = pick(std::array<std::size_t, 4>{16, 32, 48, 256}),
                    .stores_seen = chance(50),
                    .gigabyte_pages = chance(50),
                    .first_slot = pick(std::array{3U, 300U}),
                    .audits = false}) {
        model_.gigabyte_pages = machine_.paging.gigabyte_pages = chance(75);
        for (unsigned level = 1; level <= 4; ++level) {
            for (unsigned i = 0; i < tables_per_level[level]; ++i)
                tables_[level].push_back(machine_.new_frame().base().value());
        }
        for (int i = 0; i < 6; ++i)
            pages_.push_back(machine_.new_frame().base().value());
        for (unsigned level = 1; level <= 4; ++level) {
            for (const std::uint64_t table : tables_[level]) {
                for (const unsigned slot : indices[level]) {
                    if (chance(95))
                        store(slot_of(table, slot), random_entry(level));
                }
            }
        }
        for (const std::uint64_t root : tables_[4]) // the kernel's
            store(slot_of(root, 511), tables_[3][0] | Model::p | Model::rw | (chance(50) ? Model::us : 0));
        load_cr3(tables_[4][0]);
    }

    void run(unsigned steps) {
        for (step_ = 0; step_ < steps && !::testing::Test::HasFailure(); ++step_) {
            SCOPED_TRACE(fmt::format("seed {} step {}", seed_, step_));
            act();
            if (step_ % 256 == 255)
                check_everything();
        }
    }

    [[nodiscard]] std::uint64_t accesses() const { return accesses_; }
    [[nodiscard]] std::uint64_t stale_hits() const { return stale_hits_; }
    [[nodiscard]] const FakeMachine& machine() const { return machine_; }

  private:
    static constexpr std::array<unsigned, 5> tables_per_level{0, 6, 4, 3, 4};
    static inline const std::array<std::vector<unsigned>, 5> indices{
        {{}, {0, 2, 0xa0, 0xb8, 511}, {0, 1, 5}, {0, 1}, {0, 3, 511}}};

    // ---- dice

    std::uint64_t below(std::uint64_t bound) { return random_() % bound; }
    bool chance(unsigned percent) { return below(100) < percent; }
    template<class Container>
    typename Container::value_type pick(const Container& from) {
        return from[below(from.size())];
    }
    static constexpr std::uint64_t slot_of(std::uint64_t table, std::uint64_t index) {
        return table + index * 8;
    }
    std::uint64_t random_address() {
        std::uint64_t at = 0;
        for (unsigned level = 1; level <= 4; ++level)
            at |= std::uint64_t{pick(indices[level])} << (3 + 9 * level);
        return (at & std::uint64_t{1} << 47) != 0 ? at | 0xffff'0000'0000'0000 : at;
    }
    std::uint64_t random_table(unsigned level) {
        if (chance(95))
            return pick(tables_[level]);
        if (chance(80))
            return pick(tables_[1 + below(4)]); // of another level, perhaps
        return pick(std::array<std::uint64_t, 3>{FakeMachine::hole, FakeMachine::low_end, pages_[0]});
    }
    std::uint64_t random_page() {
        if (chance(70))
            return pick(pages_);
        return pick(std::array<std::uint64_t, 6>{
            FakeMachine::hole, FakeMachine::window.base().value(), FakeMachine::low_end, FakeMachine::high,
            pick(tables_[1 + below(4)]), FakeMachine::pool_first.base().value() & 0xffff'ffff'f000});
    }
    std::uint64_t random_entry(unsigned level) {
        constexpr std::uint64_t mb = FakeMachine::mb, gb = FakeMachine::gb;
        const auto bit = [this](unsigned percent, std::uint64_t value) {
            return chance(percent) ? value : 0;
        };
        // Write-through, cache disable, global and the bits for software mean nothing here.
        std::uint64_t entry = (random_() & 0x07f0'0000'0000'0f18) | bit(96, Model::p) | bit(93, Model::rw) |
                              bit(92, Model::us) | bit(3, Model::xd) | bit(30, Model::accessed) |
                              bit(30, Model::dirty) | (below(300) == 0 ? std::uint64_t{1} << 50 : 0);
        if (level == 1)
            return entry | random_page() | bit(10, Model::ps); // PAT, at this level
        if (level == 2 && chance(25))
            return entry | Model::ps | bit(20, 0x1000) | bit(1, 0x4000) |
                   pick(std::array<std::uint64_t, 5>{0, 2 * mb, 30 * mb, FakeMachine::low_end,
                                                     FakeMachine::high});
        if (level == 3 && chance(15))
            return entry | Model::ps | bit(20, 0x1000) | bit(1, 0x4000) |
                   pick(std::array<std::uint64_t, 4>{0, gb, FakeMachine::high, FakeMachine::high_end});
        return entry | random_table(level - 1) | (below(200) == 0 ? Model::ps : 0);
    }

    // ---- what the guest does

    void store(std::uint64_t slot, std::uint64_t value) {
        if (!machine_.memory.write(GuestPhys(slot), value))
            return; // nobody answers there
        model_.store(slot, value);
    }
    void load_cr3(std::uint64_t root) {
        model_.cr3 = root;
        model_.flush();
        machine_.load_cr3(GuestPhys(root).frame());
    }
    void invlpg(std::uint64_t at) {
        model_.invlpg(at);
        machine_.invlpg(GuestVirt(at));
    }
    void set_control() {
        machine_.paging.write_protect = model_.wp;
        machine_.paging.no_execute = model_.nxe;
        machine_.paging.smep = model_.smep;
        machine_.set_control();
    }

    void act() {
        const std::uint64_t dice = below(1000);
        if (dice < 800) {
            access(random_address());
        } else if (dice < 910) {
            change(random_address());
        } else if (dice < 920) {
            const auto level = static_cast<unsigned>(1 + below(4));
            store(slot_of(pick(tables_[level]), pick(indices[level])), random_entry(level));
        } else if (dice < 935) {
            invlpg(random_address());
        } else if (dice < 955) {
            load_cr3(chance(97) ? pick(tables_[4]) : random_table(1));
        } else if (dice < 960) {
            load_cr3(model_.cr3);
        } else if (dice < 985) {
            machine_.set_user(!machine_.user());
        } else {
            toggle();
        }
    }

    /// Changes an entry on the way to `at`, and flushes as careful kernels do, or does not.
    void change(std::uint64_t at) {
        const Model::Walk walk = model_.walk(at, {});
        const unsigned level = walk.last + static_cast<unsigned>(below(5 - walk.last));
        const std::uint64_t slot = walk.slot[level], old = model_.load(slot);
        switch (below(4)) {
        case 0: // another page or table
            store(slot, random_entry(level));
            break;
        case 1: { // other rights
            constexpr std::uint64_t rights = Model::p | Model::rw | Model::us | Model::xd;
            store(slot, (old & ~rights) | (random_entry(level) & rights));
            break;
        }
        case 2: // marks cleared
            store(slot,
                  old & ~pick(std::array{Model::accessed, Model::dirty, Model::accessed | Model::dirty}));
            break;
        default: // taken away, and back
            store(slot, old & ~Model::p);
            if (chance(50))
                invlpg(at);
            if (level > 1 && chance(50))
                change(random_address());
            store(slot, old);
        }
        if (chance(60))
            invlpg(at);
        access(at);
    }

    void toggle() {
        switch (below(4)) {
        case 0:
            model_.wp = !model_.wp;
            break;
        case 1:
            model_.nxe = !model_.nxe;
            break;
        case 2:
            model_.smep = !model_.smep;
            if (model_.smep) { // "changes the value of CR4.SMEP from 0 to 1": 4.10.4.1
                model_.flush();
                machine_.mmu.flush();
            }
            break;
        default:
            trap_user_fetch_ = trap_allowed_ && !trap_user_fetch_;
            machine_.mmu.set_trap_user_fetch(trap_user_fetch_);
        }
        set_control();
    }

    void access(std::uint64_t at) {
        const std::uint64_t kind = below(3);
        const Access access{.write = kind == 1, .fetch = kind == 2, .user = machine_.user()};
        SCOPED_TRACE(fmt::format("{} at {:#x} by {}",
                                 kind == 0   ? "read"
                                 : kind == 1 ? "write"
                                             : "fetch",
                                 at, access.user ? "user" : "kernel"));
        ++accesses_;
        const bool trapping = trap_user_fetch_ && access.fetch && !access.user;
        at += below(page_size);
        for (unsigned misses = 0; misses <= FakeMachine::patience; ++misses) {
            if (const auto hit = machine_.lookup(GuestVirt(at), access)) {
                const auto user_page = trapping ? std::optional(false) : std::nullopt;
                ASSERT_TRUE(model_.may_have_cached(at, access, hit->value(), user_page))
                    << fmt::format("reached {:#x}, which no CPU would", hit->value());
                const Model::Walk now = model_.walk(at, access);
                stale_hits_ += now.error_code || Model::machine(now.physical) != hit->value() ? 1 : 0;
                return;
            }
            const Model::Walk wanted = model_.walk(at, access);
            const MissResult miss = machine_.mmu.fault(GuestVirt(at), access);
            machine_.enter();
            if (wanted.error_code) {
                ASSERT_EQ(miss.outcome, Miss::guest_fault) << "the guest's tables do not allow it";
                ASSERT_FALSE(miss.trapped_user_fetch);
                ASSERT_EQ(miss.fault.error_code, *wanted.error_code);
                ASSERT_EQ(miss.fault.address, GuestVirt(at));
                return;
            }
            model_.mark(wanted, access.write);
            check_walk(wanted);
            if (trapping && wanted.user_page) {
                ASSERT_EQ(miss.outcome, Miss::guest_fault);
                ASSERT_TRUE(miss.trapped_user_fetch);
                return;
            }
            ASSERT_EQ(miss.outcome, Miss::filled) << "the guest's tables allow it";
        }
        FAIL() << "filled, and still a miss";
    }

    // ---- comparisons

    void check_slot(std::uint64_t slot, std::uint64_t value) {
        EXPECT_EQ(machine_.memory.read<std::uint64_t>(GuestPhys(slot)), value)
            << fmt::format("entry at {:#x}", slot);
    }
    void check_walk(const Model::Walk& walk) {
        for (unsigned level = 4; level >= walk.last; --level)
            check_slot(walk.slot[level], model_.load(walk.slot[level]));
    }
    void check_everything() {
        ASSERT_EQ(machine_.mmu.audit(), std::nullopt);
        model_.contents([this](std::uint64_t slot, std::uint64_t value) { check_slot(slot, value); });
    }

    std::uint64_t seed_;
    std::mt19937_64 random_;
    bool trap_allowed_;
    bool trap_user_fetch_ = false;
    FakeMachine machine_;
    Model model_;
    std::array<std::vector<std::uint64_t>, 5> tables_; ///< by level
    std::vector<std::uint64_t> pages_;
    unsigned step_ = 0;
    std::uint64_t accesses_ = 0;
    std::uint64_t stale_hits_ = 0;
};

TEST(MmuRandom, BehavesAsACpu) {
    std::uint64_t accesses = 0, stale_hits = 0;
    MmuCounters sum;
    for (std::uint64_t seed = 1; seed <= 200 && !HasFailure(); ++seed) {
        RandomGuest guest(seed);
        guest.run(3000);
        accesses += guest.accesses();
        stale_hits += guest.stale_hits();
        const MmuCounters& counters = guest.machine().mmu.counters();
        sum.fills += counters.fills;
        sum.guest_faults += counters.guest_faults;
        sum.upgrades += counters.upgrades;
        sum.tables_reused += counters.tables_reused;
        sum.tables_recycled += counters.tables_recycled;
        sum.slot_moves += counters.slot_moves;
    }
    if (HasFailure())
        return;
    // The guests have been everywhere.
    EXPECT_GT(accesses, 200'000U);
    EXPECT_GT(stale_hits, 1'000U) << "old translations were used before their flush";
    EXPECT_GT(sum.fills, 20'000U);
    EXPECT_GT(sum.guest_faults, 20'000U);
    EXPECT_GT(sum.upgrades, 1'000U);
    EXPECT_GT(sum.tables_reused, 1'000U);
    EXPECT_GT(sum.tables_recycled, 1'000U);
    EXPECT_GT(sum.slot_moves, 10U);
    RecordProperty("accesses", std::to_string(accesses));
    RecordProperty("stale_hits", std::to_string(stale_hits));
}

} // namespace
} // namespace umbra
