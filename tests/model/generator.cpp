#include "tests/model/generator.hpp"

#include "tests/unit/fake_machine.hpp"

#include <algorithm>

namespace umbra::model {
namespace {

using test::FakeMachine;

constexpr std::uint64_t p = 1, rw = 2, us = 4, accessed = 0x20, dirty = 0x40, ps = 0x80, g = 0x100;
constexpr std::uint64_t xd = std::uint64_t{1} << 63;
constexpr std::uint64_t mb = FakeMachine::mb, gb = FakeMachine::gb;

/// The entries that are used in a table of `level`: few, so that addresses meet, and those at the ends.
const std::vector<unsigned>& indices(Mode mode, unsigned level) {
    static const std::vector<unsigned> legacy_1{0, 2, 0xa0, 511, 512, 1023}, legacy_2{0, 1, 5, 768, 1023};
    static const std::vector<unsigned> pae_3{0, 1, 3};
    static const std::vector<unsigned> level_1{0, 2, 0xa0, 0xb8, 511}, level_2{0, 1, 5}, level_3{0, 1},
        level_4{0, 3, 511}, level_5{0, 255, 511};
    if (mode == Mode::legacy)
        return level == 1 ? legacy_1 : legacy_2;
    switch (level) {
    case 1:
        return level_1;
    case 2:
        return level_2;
    case 3:
        return mode == Mode::pae ? pae_3 : level_3;
    case 4:
        return level_4;
    default:
        return level_5;
    }
}

unsigned shift(Mode mode, unsigned level) {
    return 12 + (mode == Mode::legacy ? 10 : 9) * (level - 1);
}

std::uint64_t slot_of(Mode mode, std::uint64_t table, unsigned index) {
    return table + std::uint64_t{index} * entry_bytes(mode);
}

} // namespace

Generator::Generator(Mode mode, std::uint64_t seed, bool shadowed, bool sanitized)
    : random_(seed), shadowed_(shadowed), smap_(chance(30)), global_(chance(40)), pcids_(chance(40)),
      trapping_(chance(30)), keys_(!shadowed && chance(50)),
      next_frame_(chance(50) ? mb
                             : 2 * mb) { // the latter: where a large page of the machine can lie over them
    setup_.pool_pages = pick(std::array<std::size_t, 4>{16, 32, 48, 256});
    setup_.stores_seen = chance(50);
    setup_.gigabyte_pages = chance(50);
    setup_.first_slot = pick(std::array{3U, 300U});
    setup_.sync = pick(std::array{Sync::compare, Sync::protect, Sync::adaptive, Sync::trap});
    setup_.trap_cost = pick(std::array{1U, 4U, 20U});
    setup_.prefetch = pick(std::array{1U, 16U, 512U});
    if (sanitized) {
        setup_.sync = Sync::trap;
        setup_.sanitize = chance(50) ? Sanitize::drop : Sanitize::keep;
    }
    setup_.cpu.gigabyte_pages = chance(75);
    setup_.cpu.maxphyaddr = pick(std::array{40U, 46U, 48U});
    setup_.cpu.mode = mode;
    setup_.cpu.pse = mode == Mode::legacy && chance(70);
    for (int i = 0; i < 6; ++i)
        pages_.push_back(new_frame());
    if (mode != Mode::off)
        make_space(mode);
    if (mode == Mode::off || chance(30)) // another mode to go to
        make_space(pick(std::array{Mode::legacy, Mode::pae, Mode::four_level}));
    if (mode != Mode::off)
        setup_.cpu.root = spaces_.front().tables[top_level(mode)].front();
    std::reverse(queue_.begin(), queue_.end());
    if (mode == Mode::pae) // its registers were loaded before there were tables
        queue_.insert(queue_.begin(),
                      Operation{.kind = Operation::Kind::load_cr3, .address = setup_.cpu.root});
}

std::uint64_t Generator::new_frame() {
    return std::exchange(next_frame_, next_frame_ + page_size);
}

/// Tables of a mode, and the stores that fill them.
void Generator::make_space(Mode mode) {
    constexpr std::array<unsigned, 6> how_many{0, 6, 4, 3, 4, 3};
    Space made{.mode = mode, .tables = {}};
    const unsigned top = top_level(mode);
    for (unsigned level = 1; level <= top; ++level) {
        const bool pdpt = mode == Mode::pae && level == 3;
        const std::uint64_t shared = pdpt ? new_frame() : 0; // four PDPTs in a page
        for (unsigned i = 0; i < how_many.at(level); ++i)
            made.tables.at(level).push_back(pdpt ? shared + 32 * i : new_frame());
    }
    spaces_.push_back(made);
    for (unsigned level = 1; level <= top; ++level) {
        for (const std::uint64_t table : made.tables.at(level)) {
            for (const unsigned index : indices(mode, level)) {
                if (chance(95))
                    queue_.push_back(
                        whole_write(mode, slot_of(mode, table, index), level, random_entry(made, level)));
            }
        }
    }
    // The kernel's: the same in all spaces.
    for (const std::uint64_t root : made.tables.at(top)) {
        const unsigned last = indices(mode, top).back();
        const bool pdpt = mode == Mode::pae;
        queue_.push_back(
            whole_write(mode, slot_of(mode, root, last), top,
                        made.tables.at(top - 1).front() | p | (pdpt ? 0 : rw | (chance(50) ? us : 0))));
    }
}

const Generator::Space& Generator::space(Mode mode) const {
    for (const Space& known : spaces_) {
        if (known.mode == mode)
            return known;
    }
    return spaces_.front();
}

std::uint64_t Generator::random_root(Mode mode) {
    if (mode == Mode::off)
        return 0;
    const Space& here = space(mode);
    return chance(97) ? pick(here.tables.at(top_level(mode))) : random_table(here, 1) & ~(page_size - 1);
}

std::uint64_t Generator::random_address(Mode mode) {
    const std::uint64_t offset = below(page_size);
    if (mode == Mode::off)
        return pick(std::array<std::uint64_t, 5>{random_page(), below(FakeMachine::low_end), gb, 0x7fff'f000,
                                                 0xffff'f000}) %
                   (4 * gb) / page_size * page_size +
               offset;
    std::uint64_t at = 0;
    for (unsigned level = 1; level <= top_level(mode); ++level)
        at |= std::uint64_t{pick(indices(mode, level))} << shift(mode, level);
    if (mode == Mode::four_level && (at >> 47 & 1) != 0)
        at |= 0xffff'0000'0000'0000;
    if (mode == Mode::five_level && (at >> 56 & 1) != 0)
        at |= 0xfe00'0000'0000'0000;
    return at + offset;
}

std::uint64_t Generator::random_page() {
    if (chance(70))
        return pick(pages_);
    const Space& any = pick(spaces_);
    return pick(std::array<std::uint64_t, 7>{
        FakeMachine::hole, FakeMachine::window.base().value(), FakeMachine::low_end, FakeMachine::high,
        pick(any.tables[1]) & ~(page_size - 1), pick(any.tables[2]) & ~(page_size - 1),
        FakeMachine::pool_first.base().value() & 0xff'ffff'f000});
}

std::uint64_t Generator::random_table(const Space& here, unsigned level) {
    if (chance(95))
        return pick(here.tables.at(level));
    if (chance(80)) // of another level, perhaps
        return pick(here.tables.at(1 + below(top_level(here.mode))));
    return pick(std::array<std::uint64_t, 3>{FakeMachine::hole, FakeMachine::low_end, pages_[0]});
}

std::uint64_t Generator::random_entry(const Space& here, unsigned level) {
    const auto bit = [this](unsigned percent, std::uint64_t value) { return chance(percent) ? value : 0; };
    const auto rarely = [this](unsigned one_in, std::uint64_t value) {
        return below(one_in) == 0 ? value : 0;
    };
    const bool legacy = here.mode == Mode::legacy, pae = here.mode == Mode::pae;
    constexpr std::uint64_t table_mask = ~(page_size - 1);
    if (pae && level == 3) {
        return (random_table(here, 2) & table_mask) | bit(95, p) | bit(10, 0x18) | rarely(150, rw);
    }
    // Write-through, cache disable and the bits for software mean nothing here.
    std::uint64_t entry = (random_() & 0xe18) | bit(96, p) | bit(93, rw) | bit(92, us) | bit(30, accessed) |
                          bit(30, dirty) | bit(global_ ? 25 : 3, g);
    if (!legacy)
        entry |= bit(3, xd) | rarely(300, std::uint64_t{1} << 50);
    if (!legacy && !pae)
        entry |= random_() & (keys_ ? 0x1ff0'0000'0000'0000 : 0x07f0'0000'0000'0000);
    if (level == 1) {
        const std::uint64_t page = random_page();
        return entry | (legacy ? page & 0xffff'f000 : page) | bit(10, ps); // PAT, at this level
    }
    if (level == 2 && chance(25)) {
        if (legacy) // the last of these: PSE-36, at 4 GB
            return entry | ps | bit(20, 0x1000) | rarely(100, 0x20'0000) |
                   pick(std::array<std::uint64_t, 6>{0, 0, 4 * mb, 28 * mb, FakeMachine::low_end, 0x2000});
        return entry | ps | bit(20, 0x1000) | rarely(100, 0x4000) |
               pick(std::array<std::uint64_t, 6>{0, 2 * mb, 2 * mb, 30 * mb, FakeMachine::low_end,
                                                 FakeMachine::high});
    }
    if (level == 3 && chance(15))
        return entry | ps | bit(20, 0x1000) | rarely(100, 0x4000) |
               pick(std::array<std::uint64_t, 4>{0, gb, FakeMachine::high, FakeMachine::high_end});
    return entry | (random_table(here, level - 1) & table_mask) | rarely(200, ps);
}

// ---- operations

/// A store to an entry, which may be half of the 8 bytes that an operation writes.
Operation Generator::entry_write(Mode mode, std::uint64_t slot, unsigned level, std::uint64_t clear,
                                 std::uint64_t set) {
    const unsigned up = entry_bytes(mode) == 4 && (slot & 4) != 0 ? 32 : 0;
    return {.kind = Operation::Kind::write,
            .address = slot & ~std::uint64_t{7},
            .clear = clear << up,
            .set = set << up,
            .level = level};
}

Operation Generator::whole_write(Mode mode, std::uint64_t slot, unsigned level, std::uint64_t value) {
    const std::uint64_t all = entry_bytes(mode) == 4 ? 0xffff'ffff : ~std::uint64_t{0};
    return entry_write(mode, slot, level, all, value);
}

Operation Generator::access(std::uint64_t at) {
    return {.kind = Operation::Kind::access,
            .address = at,
            .access = {.kind = pick(std::array{Kind::read, Kind::write, Kind::fetch}),
                       .user = user_,
                       .ac = smap_ && ac_}};
}

Operation Generator::invalidation(const Cpu& cpu, std::uint64_t at) {
    if (!pcids_ || chance(70))
        return {.kind = Operation::Kind::invlpg, .address = at};
    return {.kind = Operation::Kind::invpcid,
            .address = at,
            .pcid = cpu.pcide && chance(30) ? static_cast<std::uint16_t>(below(4)) : cpu.pcid,
            .type = chance(70) ? 0U : static_cast<unsigned>(1 + below(3))};
}

/// Changes an entry on the way to `at`, and flushes as careful kernels do, or does not.
void Generator::change(const ReferenceMmu& now, std::uint64_t at) {
    const Cpu& cpu = now.cpu();
    const Walk walk = now.walk(at, {});
    if (walk.count == 0)
        return;
    const Step& step = walk.steps[below(walk.count)];
    const bool is_register = cpu.mode == Mode::pae && step.level == 3;
    const std::uint64_t slot = is_register ? cpu.root + 8 * (at >> 30 & 3) : step.slot;
    const unsigned level = step.level;
    const auto write = [&](std::uint64_t clear, std::uint64_t set) {
        return entry_write(cpu.mode, slot, level, clear, set);
    };
    std::vector<Operation> operations;
    switch (below(4)) {
    case 0: // another page or table
        operations.push_back(whole_write(cpu.mode, slot, level, random_entry(space(cpu.mode), level)));
        break;
    case 1: { // other rights
        const std::uint64_t rights = p | rw | us | (entry_bytes(cpu.mode) == 8 ? xd : 0);
        operations.push_back(write(rights, random_entry(space(cpu.mode), level) & rights));
        break;
    }
    case 2: // marks cleared
        operations.push_back(write(pick(std::array{accessed, dirty, accessed | dirty}), 0));
        break;
    default: // taken away, and back
        operations.push_back(write(p, 0));
        if (chance(50))
            operations.push_back(invalidation(cpu, at));
        operations.push_back(write(0, p));
    }
    if (chance(60))
        operations.push_back(invalidation(cpu, at));
    operations.push_back(access(at));
    queue_.insert(queue_.end(), operations.rbegin(), operations.rend());
}

Operation Generator::load_cr3(const Cpu& cpu) {
    return {.kind = Operation::Kind::load_cr3,
            .address = chance(15) ? cpu.root : random_root(cpu.mode),
            .pcid = static_cast<std::uint16_t>(cpu.pcide ? below(4) : 0),
            .flag = chance(60)};
}

Operation Generator::control(Cpu cpu) {
    switch (below(8)) {
    case 0:
    case 1:
        cpu.wp = !cpu.wp;
        break;
    case 2:
        cpu.nxe = !cpu.nxe;
        break;
    case 3:
        cpu.smep = !cpu.smep;
        break;
    case 4:
        cpu.smap = smap_ && !cpu.smap;
        break;
    case 5:
        cpu.pge = global_ && (!cpu.pge || chance(30));
        break;
    case 6:
        cpu.pcide = pcids_ && (!cpu.pcide || chance(30));
        break;
    default:
        cpu.pke = keys_ && chance(80);
        cpu.pkru = static_cast<std::uint32_t>(random_());
    }
    return {.kind = Operation::Kind::control, .cpu = cpu};
}

Operation Generator::other_mode(const Cpu& cpu) {
    Cpu to = cpu;
    // Back to where the program belongs, mostly; else off, or to the other space.
    to.mode = cpu.mode != setup_.cpu.mode ? setup_.cpu.mode : chance(50) ? Mode::off : pick(spaces_).mode;
    to.pse = to.mode == Mode::legacy && chance(70);
    to.root = random_root(to.mode);
    return {.kind = Operation::Kind::mode, .cpu = to};
}

Operation Generator::next(const ReferenceMmu& now) {
    if (!queue_.empty()) {
        const Operation next = queue_.back();
        queue_.pop_back();
        return next;
    }
    const Cpu& cpu = now.cpu();
    const Mode mode = cpu.mode;
    if (mode != setup_.cpu.mode && chance(2))
        return other_mode(cpu);
    const std::uint64_t dice = below(1000);
    if (dice < 790)
        return access(random_address(mode));
    if (dice < 900) {
        change(now, random_address(mode));
        return next(now);
    }
    if (dice < 910) {
        const Space& here = space(mode);
        const auto level = static_cast<unsigned>(1 + below(top_level(here.mode)));
        return whole_write(here.mode,
                           slot_of(here.mode, pick(here.tables.at(level)), pick(indices(here.mode, level))),
                           level, random_entry(here, level));
    }
    if (dice < 930)
        return invalidation(cpu, random_address(mode));
    if (dice < 955)
        return load_cr3(cpu);
    if (dice < 985) {
        user_ = !user_;
        ac_ = chance(30);
        return access(random_address(mode));
    }
    if (dice < 997)
        return control(cpu);
    if (dice < 998 && trapping_) {
        trap_ = !trap_;
        return {.kind = Operation::Kind::trap_user_fetch, .flag = trap_};
    }
    return other_mode(cpu);
}

} // namespace umbra::model
