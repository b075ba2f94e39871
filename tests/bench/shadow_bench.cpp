// The shadow MMU alone, over tables in memory: no machine, no trap.

#include "tests/bench/paged_guest.hpp"
#include "tests/bench/result.hpp"

#include <algorithm>
#include <numeric>

namespace umbra::bench {
namespace {

/// Of level 1, each of which maps 2 MB.
std::size_t tables_of(std::int64_t megabytes) {
    return static_cast<std::size_t>(megabytes) / 2;
}

constexpr Goal at_most(double nanoseconds) {
    return {.of = Goal::Of::measured, .bound = Goal::Bound::at_most, .value = nanoseconds};
}
constexpr double switch_goal = 1000, resync_goal = 300, fault_goal = 500;

template<class Work>
double time(Work&& work) {
    const std::uint64_t start = timestamp();
    work();
    return static_cast<double>(timestamp() - start);
}

/// The median of what `work` takes, in nanoseconds; `before` is done each time, and not timed.
template<class Before, class Work>
double median_time(unsigned times, Before&& before, Work&& work) {
    std::vector<double> samples;
    for (unsigned i = 0; i < times; ++i) {
        before();
        samples.push_back(time(work));
    }
    return nanoseconds(median(std::move(samples)));
}
void nothing() {}

/// A page for each number below `pages`, a power of two, in an order that is not that of the tables.
std::size_t scattered(std::size_t number, std::size_t pages) {
    constexpr std::size_t odd = 7919;
    return number * odd % pages;
}

MmuConfig with(Sync sync) {
    MmuConfig config;
    config.sync = sync;
    return config;
}

Sync sync_of(std::int64_t argument) {
    return static_cast<Sync>(argument);
}

/// How a benchmark that is about settled tables says that they were not.
std::string settled_note(bool settled) {
    return settled ? "" : "never settled: tables are still compared";
}

/// Tables as they are once the policy has done what it does.
bool prepare(ShadowedGuest& shadowed, std::size_t spare = 0) {
    shadowed.populate(spare);
    return shadowed.tables().config().sync == Sync::compare || shadowed.settle();
}

/// Nanoseconds of the Mmu for each page, when all are read in order.
double fill_all(const PagedGuest& guest, unsigned prefetch) {
    MmuConfig config;
    config.prefetch = prefetch;
    ShadowedGuest shadowed(guest, config);
    double ticks = 0;
    for (std::size_t page = 0; page < guest.private_pages(); ++page) {
        const GuestVirt at = PagedGuest::private_page(page);
        if (!shadowed.mapped(at))
            ticks += time([&] { shadowed.fault(at); });
    }
    return nanoseconds(ticks) / static_cast<double>(guest.private_pages());
}

/// The median switch, round all spaces.
double switch_time(ShadowedGuest& shadowed) {
    const unsigned spaces = shadowed.guest().shape().spaces;
    const unsigned times = std::max(512U, 2 * spaces);
    unsigned space = 0;
    return median_time(times, nothing, [&] { shadowed.load(space++ % spaces); });
}

/// The address spaces of the benchmarks about switches: a small process or a large one, and a kernel of 32
/// MB.
PagedGuest::Shape spaces_shape(std::int64_t spaces, std::int64_t megabytes) {
    return {
        .spaces = static_cast<unsigned>(spaces), .private_tables = tables_of(megabytes), .kernel_tables = 16};
}

} // namespace

double resync_time(std::size_t tables, std::size_t changes) {
    constexpr unsigned rounds = 200;
    const PagedGuest guest({.private_tables = tables});
    ShadowedGuest shadowed(guest, with(Sync::compare));
    shadowed.populate();
    const std::uint64_t before = shadowed.counters().tables_compared;
    shadowed.load(0);
    const auto compared = static_cast<double>(shadowed.counters().tables_compared - before);
    const auto change = [&] {
        for (std::size_t table = 0; table < tables; ++table) {
            for (std::size_t i = 0; i < changes; ++i)
                guest.remap(guest.private_entry(0, table * entries_per_table + i));
        }
    };
    return median_time(rounds, change, [&] { shadowed.load(0); }) / compared;
}

void guest_walk(benchmark::State& state) {
    const PagedGuest guest({.private_tables = 32});
    const GuestPaging paging = guest.paging(0);
    constexpr std::size_t batch = 1024;
    std::vector<double> times;
    std::size_t number = 0;
    for ([[maybe_unused]] auto _ : state) {
        times.push_back(time([&] {
                            for (std::size_t i = 0; i < batch; ++i) {
                                const std::size_t page = scattered(number++, guest.private_pages());
                                benchmark::DoNotOptimize(
                                    walk_guest(guest.memory(), paging, PagedGuest::private_page(page), {}));
                            }
                        }) /
                        batch);
    }
    report(state, {.measured = nanoseconds(median(times)), .baseline = {}, .goal = at_most(50)});
}

// (MB mapped)
void mmu_fault(benchmark::State& state) {
    constexpr unsigned rounds = 5;
    std::vector<double> times;
    for ([[maybe_unused]] auto _ : state) {
        for (unsigned round = 0; round < rounds; ++round) {
            const PagedGuest guest({.private_tables = tables_of(state.range(0))});
            ShadowedGuest shadowed(guest, {});
            for (std::size_t i = 0; i < guest.private_pages(); ++i) {
                const GuestVirt at = PagedGuest::private_page(scattered(i, guest.private_pages()));
                times.push_back(time([&] { shadowed.fault(at); }));
            }
        }
    }
    report(state, {.measured = nanoseconds(median(times)), .baseline = {}, .goal = at_most(fault_goal)});
}

// (MB mapped, entries looked at)
void mmu_fill(benchmark::State& state) {
    const PagedGuest guest({.private_tables = tables_of(state.range(0)), .used = true});
    constexpr unsigned rounds = 5;
    std::vector<double> with_prefetch, without;
    for ([[maybe_unused]] auto _ : state) {
        for (unsigned round = 0; round < rounds; ++round) {
            with_prefetch.push_back(fill_all(guest, static_cast<unsigned>(state.range(1))));
            without.push_back(fill_all(guest, 1));
        }
    }
    const double measured = median(with_prefetch), baseline = median(without);
    report(state, {.measured = measured, .baseline = baseline, .ratio = measured / baseline});
}

// (MB mapped, entries changed in each table)
void mmu_resync(benchmark::State& state) {
    double measured = 0;
    for ([[maybe_unused]] auto _ : state)
        measured = resync_time(tables_of(state.range(0)), static_cast<std::size_t>(state.range(1)));
    report(state, {.measured = measured, .baseline = {}, .goal = at_most(resync_goal)});
}

// (MB mapped, Sync)
void mmu_flush(benchmark::State& state) {
    const PagedGuest guest({.private_tables = tables_of(state.range(0))});
    constexpr unsigned rounds = 300;
    double measured = 0;
    bool settled = false;
    for ([[maybe_unused]] auto _ : state) {
        ShadowedGuest shadowed(guest, with(sync_of(state.range(1))));
        settled = prepare(shadowed);
        measured = median_time(rounds, nothing, [&] {
            shadowed.mmu().flush({.all_contexts = true, .globals = true});
            shadowed.enter();
        });
    }
    report(state, {.measured = measured, .baseline = {}, .note = settled_note(settled)});
}

// (spaces, MB mapped in each, Sync); the baseline is one space.
void mmu_switch(benchmark::State& state) {
    const PagedGuest guest(spaces_shape(state.range(0), state.range(1)));
    const PagedGuest alone(spaces_shape(1, state.range(1)));
    double measured = 0, baseline = 0;
    bool settled = false;
    for ([[maybe_unused]] auto _ : state) {
        ShadowedGuest one(alone, with(sync_of(state.range(2))));
        settled = prepare(one);
        baseline = switch_time(one);
        ShadowedGuest all(guest, with(sync_of(state.range(2))));
        settled &= prepare(all);
        measured = switch_time(all);
    }
    report(state, {.measured = measured,
                   .baseline = baseline,
                   .ratio = measured / baseline,
                   .goal = at_most(switch_goal),
                   .note = settled_note(settled)});
}

// (spaces, MB mapped in each, Sync): back to a space that has used a page by a new table since its last
// switch. The baseline is one that has not.
void mmu_switch_after_new_table(benchmark::State& state) {
    constexpr std::size_t spare = 16; // tables that are not used at first
    PagedGuest::Shape shape = spaces_shape(state.range(0), state.range(1));
    shape.private_tables += spare;
    const PagedGuest guest(shape);
    double measured = 0, baseline = 0;
    bool settled = false;
    for ([[maybe_unused]] auto _ : state) {
        ShadowedGuest shadowed(guest, with(sync_of(state.range(2))));
        settled = prepare(shadowed, spare);
        baseline = switch_time(shadowed);
        std::vector<double> times;
        for (std::size_t table = shape.private_tables - spare; table < shape.private_tables; ++table) {
            for (unsigned space = 0; space < shape.spaces; ++space) {
                shadowed.load(space);
                shadowed.fault(PagedGuest::private_page(table * entries_per_table));
            }
            for (unsigned space = 0; space < shape.spaces; ++space)
                times.push_back(time([&] { shadowed.load(space); }));
        }
        measured = nanoseconds(median(std::move(times)));
    }
    report(state, {.measured = measured,
                   .baseline = baseline,
                   .ratio = measured / baseline,
                   .note = settled_note(settled)});
}

// (spaces, Sync): the guest changes one entry, flushes that page and uses it. The baseline is the same change
// of a page that no other space has.
void mmu_kernel_change(benchmark::State& state) {
    const PagedGuest guest(spaces_shape(state.range(0), 4));
    constexpr unsigned rounds = 300;
    double measured = 0, baseline = 0;
    for ([[maybe_unused]] auto _ : state) {
        ShadowedGuest shadowed(guest, with(sync_of(state.range(1))));
        (void)prepare(shadowed);
        shadowed.load(0);
        const auto change = [&](GuestPhys entry, GuestVirt at) {
            return median_time(rounds, nothing, [&] {
                (void)shadowed.tables().wrote(entry, sizeof(GuestEntry)); // traps if it is protected
                guest.remap(entry);
                shadowed.invalidate(at);
                shadowed.fault(at);
            });
        };
        baseline = change(guest.private_entry(0, 0), PagedGuest::private_page(0));
        measured = change(guest.kernel_entry(0), PagedGuest::kernel_page(0));
    }
    report(state, {.measured = measured, .baseline = baseline, .ratio = measured / baseline});
}

// (spaces, Sync): the next switch to each space, on the average. The baseline is a switch when nothing has
// changed.
void mmu_switch_after_kernel_change(benchmark::State& state) {
    const PagedGuest guest(spaces_shape(state.range(0), 4));
    const unsigned spaces = guest.shape().spaces;
    constexpr unsigned rounds = 9;
    double measured = 0, baseline = 0;
    bool settled = false;
    for ([[maybe_unused]] auto _ : state) {
        ShadowedGuest shadowed(guest, with(sync_of(state.range(1))));
        settled = prepare(shadowed);
        baseline = switch_time(shadowed);
        measured = median_time(
                       rounds,
                       [&] {
                           shadowed.load(0);
                           (void)shadowed.tables().wrote(guest.kernel_entry(0), sizeof(GuestEntry));
                           guest.remap(guest.kernel_entry(0));
                           shadowed.invalidate(PagedGuest::kernel_page(0));
                           shadowed.fault(PagedGuest::kernel_page(0));
                       },
                       [&] {
                           for (unsigned space = 0; space < spaces; ++space)
                               shadowed.load(space);
                       }) /
                   spaces;
    }
    report(state, {.measured = measured,
                   .baseline = baseline,
                   .ratio = measured / baseline,
                   .goal = at_most(switch_goal),
                   .note = settled_note(settled)});
}

// (MB mapped, Sync)
void mmu_invalidate(benchmark::State& state) {
    const PagedGuest guest({.private_tables = tables_of(state.range(0))});
    constexpr unsigned rounds = 1000;
    double measured = 0;
    for ([[maybe_unused]] auto _ : state) {
        ShadowedGuest shadowed(guest, with(sync_of(state.range(1))));
        (void)prepare(shadowed);
        measured = median_time(rounds, nothing, [&] { shadowed.invalidate(PagedGuest::private_page(0)); });
    }
    report(state, {.measured = measured, .baseline = {}});
}

// (tables): each fill when the guest goes round so many tables and half of them fit the pool. The baseline is
// a pool with room for all of them, which are to be made all the same.
void mmu_eviction(benchmark::State& state) {
    const PagedGuest guest({.private_tables = static_cast<std::size_t>(state.range(0))});
    const std::size_t tables = guest.shape().private_tables;
    const auto round = [&](ShadowedGuest& shadowed) {
        const std::uint64_t before = shadowed.counters().fills;
        double ticks = 0;
        for (std::size_t table = 0; table < tables; ++table) {
            const GuestVirt at = PagedGuest::private_page(table * entries_per_table);
            if (!shadowed.mapped(at))
                ticks += time([&] { shadowed.fault(at); });
        }
        return nanoseconds(ticks) / static_cast<double>(shadowed.counters().fills - before);
    };
    constexpr unsigned rounds = 30;
    std::vector<double> tight, roomy;
    for ([[maybe_unused]] auto _ : state) {
        ShadowedGuest cramped(guest, {}, tables / 2), free(guest, {});
        (void)round(cramped); // memory is touched for the first time
        (void)round(free);
        for (unsigned i = 0; i < rounds; ++i) {
            tight.push_back(round(cramped));
            free.mmu().reset();
            roomy.push_back(round(free));
        }
    }
    const double measured = median(tight), baseline = median(roomy);
    report(state, {.measured = measured, .baseline = baseline, .ratio = measured / baseline});
}

} // namespace umbra::bench
