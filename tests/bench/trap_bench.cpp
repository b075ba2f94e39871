// A trap's round trip through umbra against the bare minimum, and what umbra itself adds to it.

#include "tests/bench/trap_floor.hpp"
#include "vmm/loader/boot_params.hpp"

namespace umbra::bench {
namespace {

constexpr unsigned slices = 300;
static_assert(std::size_t{slices} * (traps_a_slice + 1) <= BareMachine::pages);

constexpr Goal trap_goal{.of = Goal::Of::ratio, .bound = Goal::Bound::at_most, .value = 1.15};

void report_traps(benchmark::State& state, const std::vector<double>& times, const BareTraps& bare) {
    const double measured = per_trap(median(times)), baseline = per_trap(bare.median_ticks());
    report(state, {Unit::nanoseconds, measured, baseline, measured / baseline, trap_goal});
}

void time_emulated_instruction(const Kvm& kvm, benchmark::State& state) {
    LoopGuest guest(kvm, probe_traits(kvm));
    BareTraps bare(kvm);
    start_instruction_traps(bare);
    guest.mailbox().first = traps_a_slice;
    std::vector<double> times;
    const bool passed = guest.run(loop_offset(bench_sensitive), slices, [&] {
        times.push_back(static_cast<double>(guest.mailbox().ticks));
        time_instruction_traps(bare);
    });
    if (!passed || !bare.ok())
        return state.SkipWithError("the guest or the bare machine failed");
    report_traps(state, times, bare);
}

/// Guest page tables for the pages that the guest is to touch, as a BareMachine maps its own.
void map_guest_pages(const GuestMemory& memory) {
    constexpr GuestPhys pdpt{0x400000}, directory{0x401000}, tables{0x402000}, frames{0x500000};
    constexpr std::uint64_t rights = entry_bit::present | entry_bit::writable;
    const auto entry = [&](GuestPhys table, std::size_t slot, GuestPhys target) {
        (void)memory.write(table + slot * sizeof(GuestEntry), GuestEntry(target.frame(), rights));
    };
    entry(BootArea{}.page_tables(), paging_4_level.root().index(BareMachine::pages_begin), pdpt);
    entry(pdpt, 0, directory);
    for (std::size_t i = 0; i < BareMachine::pages / entries_per_table; ++i)
        entry(directory, i, tables + i * page_size);
    for (std::size_t i = 0; i < BareMachine::pages; ++i)
        entry(tables, i, frames + i % BareMachine::frames * page_size);
}

struct FaultTimes {
    std::vector<double> round_trips; ///< in the guest, traps_a_slice each
    std::vector<double> in_umbra;    ///< each, in umbra's own record
};

/// Has the guest touch pages, `between` after each slice. False if it failed.
template<class Between>
bool touch_pages(LoopGuest& guest, FaultTimes& times, Between&& between) {
    map_guest_pages(guest.memory());
    LoopGuest::Mailbox& mailbox = guest.mailbox();
    mailbox.first = BareMachine::pages_begin.value();
    mailbox.second = traps_a_slice;
    return guest.run(loop_offset(bench_touch), slices, [&] {
        times.round_trips.push_back(static_cast<double>(mailbox.ticks));
        for (const TrapRecord& record : guest.log().last()) {
            if (record.action == TrapAction::fill && record.address >= BareMachine::pages_begin)
                times.in_umbra.push_back(static_cast<double>(record.end - record.start));
        }
        mailbox.first += traps_a_slice * page_size;
        between();
    });
}

void time_hidden_fault(const Kvm& kvm, benchmark::State& state) {
    LoopGuest guest(kvm, probe_traits(kvm));
    BareTraps bare(kvm);
    bare.start([](BareMachine& machine) {
        machine.start(loop_offset(bench_touch), BareMachine::pages_begin.value(), ~std::uint64_t{0});
    });
    FaultTimes times;
    std::size_t page = 0;
    const bool passed = touch_pages(guest, times, [&] {
        const std::size_t first = page;
        bare.time([&](BareMachine& machine) {
            page = first;
            return time_traps([&] {
                const bool trapped = machine.run();
                machine.map(page++);
                machine.resume(0);
                return trapped;
            });
        });
    });
    if (!passed || !bare.ok())
        return state.SkipWithError("the guest or the bare machine failed");
    report_traps(state, times.round_trips, bare);
}

void time_hidden_fault_in_umbra(const Kvm& kvm, benchmark::State& state) {
    LoopGuest guest(kvm, probe_traits(kvm));
    FaultTimes times;
    if (!touch_pages(guest, times, [] {}))
        return state.SkipWithError("the guest failed");
    constexpr Goal goal{.of = Goal::Of::measured, .bound = Goal::Bound::at_most, .value = 1000};
    report(state, {Unit::nanoseconds, nanoseconds(median(times.in_umbra)), {}, 0, goal});
}

} // namespace

void emulated_instruction(benchmark::State& state) {
    with_kvm(state, time_emulated_instruction);
}
void hidden_fault(benchmark::State& state) {
    with_kvm(state, time_hidden_fault);
}
void hidden_fault_in_umbra(benchmark::State& state) {
    with_kvm(state, time_hidden_fault_in_umbra);
}

} // namespace umbra::bench
