// What a guest pays for working on its page tables, on real KVM, against the traps that it takes at least.

#include "tests/bench/trap_floor.hpp"
#include "vmm/loader/boot_params.hpp"

#include <fmt/core.h>

namespace umbra::bench {
namespace {

constexpr unsigned slices = 60;

/// In the guest's memory: what bench_switch goes through, and the tables of its address spaces.
constexpr GuestPhys roots{0x300000}, space_tables{0x400000}, kernel_tables{0x900000}, frames{0x1000000};
constexpr std::size_t tables_a_space = 4;

void set(const GuestMemory& memory, GuestPhys table, std::size_t slot, GuestPhys target) {
    constexpr std::uint64_t rights = entry_bit::present | entry_bit::writable;
    (void)memory.write(table + slot * sizeof(GuestEntry), GuestEntry(target.frame(), rights));
}

/// Makes so many address spaces: each has a page of its own at BENCH_PRIVATE, and in common with the others
/// the identity map and a page at BENCH_KERNEL.
void make_spaces(const GuestMemory& memory, unsigned spaces) {
    const auto slot_of = [](std::uint64_t at) { return paging_4_level.root().index(GuestVirt(at)); };
    for (unsigned level = 0; level < 2; ++level)
        set(memory, kernel_tables + level * page_size, 0, kernel_tables + (level + 1) * page_size);
    set(memory, kernel_tables + 2 * page_size, 0, frames);
    for (unsigned space = 0; space < spaces; ++space) {
        const GuestPhys root = space_tables + space * tables_a_space * page_size;
        (void)memory.write(root, memory.read<std::uint64_t>(BootArea{}.page_tables()).value());
        set(memory, root, slot_of(BENCH_PRIVATE), root + page_size);
        set(memory, root, slot_of(BENCH_KERNEL), kernel_tables);
        set(memory, root + page_size, 0, root + 2 * page_size);
        set(memory, root + 2 * page_size, 0, root + 3 * page_size);
        set(memory, root + 3 * page_size, 0, frames + (2 + space) * page_size);
        (void)memory.write(roots + space * sizeof(std::uint64_t), root.value());
    }
}

struct Work {
    std::size_t loop = 0;
    std::uint64_t argument = 0;
    std::uint64_t times = 0; ///< the loop goes round in one slice
    double traps = 1;        ///< of each time, at least
};

struct Times {
    double measured = 0, floor = 0; ///< nanoseconds for each time round
    double traps = 0;               ///< taken for each, counted
};

std::string traps_note(const Times& times) {
    return fmt::format("{:.2f} traps each", times.traps);
}

Work switches(unsigned spaces) {
    return {.loop = loop_offset(bench_switch), .argument = roots.value(), .times = spaces};
}

/// Has the guest switch round all spaces so often, and then time `work`. Nothing if the guest or the bare
/// machine failed.
std::optional<Times> time_work(const Kvm& kvm, MonitorOptions options, unsigned spaces, const Work& work) {
    constexpr unsigned rounds = 3;
    LoopGuest guest(kvm, probe_traits(kvm), options);
    BareTraps bare(kvm);
    start_instruction_traps(bare);
    make_spaces(guest.memory(), spaces);
    LoopGuest::Mailbox& mailbox = guest.mailbox();
    const auto give = [&](const Work& next) {
        mailbox.routine = BENCH_IMAGE + next.loop;
        mailbox.first = next.argument;
        mailbox.second = next.times;
    };
    const Work warm_up = switches(spaces);
    give(warm_up);
    unsigned calls = 0;
    std::uint64_t before = 0;
    std::vector<double> ticks;
    const bool passed = guest.run(warm_up.loop, rounds + slices, [&] {
        if (++calls <= rounds) {
            before = guest.log().added();
            return give(calls < rounds ? warm_up : work);
        }
        ticks.push_back(static_cast<double>(mailbox.ticks));
        time_instruction_traps(bare);
    });
    if (!passed || !bare.ok())
        return std::nullopt;
    const auto times = static_cast<double>(work.times);
    const auto traps = static_cast<double>(guest.log().added() - before - slices); // each call ends with one
    return Times{nanoseconds(median(std::move(ticks))) / times, work.traps * per_trap(bare.median_ticks()),
                 traps / (slices * times)};
}

void run_work(benchmark::State& state, const Kvm& kvm, unsigned spaces, const Work& work) {
    const auto times = time_work(kvm, {}, spaces, work);
    if (!times)
        return state.SkipWithError("the guest or the bare machine failed");
    report(state, {.measured = times->measured,
                   .baseline = times->floor,
                   .ratio = times->measured / times->floor,
                   .note = traps_note(*times)});
}

constexpr GuestPhys kernel_entry = kernel_tables + 2 * page_size;

/// What a change of an entry and two flushes take in such a guest, in nanoseconds.
std::optional<Times> write_entry(const Kvm& kvm, Sync sync) {
    MonitorOptions options;
    options.sync = sync;
    return time_work(
        kvm, options, 1,
        {.loop = loop_offset(bench_write_entry), .argument = kernel_entry.value(), .times = traps_a_slice});
}

/// A write to a protected table, and protecting the table again, beyond a write to one that is compared: in
/// nanoseconds, the median of several machines. Some hosts' KVM takes very different times for it in one
/// machine and the next.
struct ProtectedWrite {
    double cost = 0, least = 0, most = 0;
    double floor = 0; ///< of one trap
};

std::optional<ProtectedWrite> protected_write(const Kvm& kvm) {
    constexpr unsigned machines = 5;
    std::vector<double> costs, floors;
    for (unsigned i = 0; i < machines; ++i) {
        const auto trapped = write_entry(kvm, Sync::protect), compared = write_entry(kvm, Sync::compare);
        if (!trapped || !compared)
            return std::nullopt;
        costs.push_back(trapped->measured - compared->measured);
        floors.push_back(trapped->floor);
    }
    const auto [least, most] = std::ranges::minmax(costs);
    return ProtectedWrite{median(costs), least, most, median(floors)};
}

} // namespace

// (spaces): MOV CR3, round all of them.
void guest_switch(benchmark::State& state) {
    with_kvm(state, [](const Kvm& kvm, benchmark::State& inner) {
        const auto spaces = static_cast<unsigned>(inner.range(0));
        run_work(inner, kvm, spaces, switches(spaces));
    });
}

// (spaces): one entry of the kernel's changed, INVLPG, and the page read: two traps.
void guest_kernel_change(benchmark::State& state) {
    with_kvm(state, [](const Kvm& kvm, benchmark::State& inner) {
        run_work(inner, kvm, static_cast<unsigned>(inner.range(0)),
                 {.loop = loop_offset(bench_change),
                  .argument = kernel_entry.value(),
                  .times = traps_a_slice,
                  .traps = 2});
    });
}

void guest_invlpg(benchmark::State& state) {
    with_kvm(state, [](const Kvm& kvm, benchmark::State& inner) {
        run_work(inner, kvm, 1,
                 {.loop = loop_offset(bench_invlpg), .argument = BENCH_KERNEL, .times = traps_a_slice});
    });
}

// What a write to a protected table costs more than one to a table that is compared. The baseline is the
// host's trap.
void table_write_trap(benchmark::State& state) {
    with_kvm(state, [](const Kvm& kvm, benchmark::State& inner) {
        const auto write = protected_write(kvm);
        if (!write)
            return inner.SkipWithError("the guest or the bare machine failed");
        report(inner, {.measured = write->cost,
                       .baseline = write->floor,
                       .ratio = write->cost / write->floor,
                       .note = fmt::format("{:.0f} to {:.0f} us", write->least / 1e3, write->most / 1e3)});
    });
}

// The same in comparisons of a table: what MmuConfig::trap_cost should be on this host.
void trap_cost(benchmark::State& state) {
    with_kvm(state, [](const Kvm& kvm, benchmark::State& inner) {
        constexpr std::size_t tables = 64;
        const auto write = protected_write(kvm);
        if (!write)
            return inner.SkipWithError("the guest or the bare machine failed");
        const double cost = write->cost / resync_time(tables, 0);
        report(inner, {.unit = Unit::count,
                       .measured = cost,
                       .baseline = {},
                       .note = "flushes for each write to a table: below it comparing is cheapest, above it "
                               "trapping"});
    });
}

} // namespace umbra::bench
