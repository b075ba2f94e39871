// What the shadow of a guest's memory takes.

#include "tests/bench/paged_guest.hpp"
#include "tests/bench/result.hpp"

#include <fstream>
#include <string>
#include <string_view>

#include <fmt/core.h>
#include <malloc.h>

namespace umbra::bench {
namespace {

/// Bytes of memory that this process has now, but for pages of files: its code comes in when it first runs.
/// Anonymous of /proc/self/smaps_rollup (proc(5)), which is exact where the counters of other files lag
/// behind. Free memory that malloc keeps is given back before.
double resident_bytes() {
    ::malloc_trim(0);
    std::ifstream file("/proc/self/smaps_rollup");
    std::string line;
    while (std::getline(file, line)) {
        constexpr std::string_view field = "Anonymous:";
        if (line.starts_with(field))
            return std::stod(line.substr(field.size())) * 1024;
    }
    return 0;
}

} // namespace

// (MB mapped by 4 KB pages, all of them used by the guest's kernel). Everything counts that the shadow MMU
// has made this process's memory grow by: table pages, snapshots, and its own records. Measured once the
// guest has let its tables be for so many flushes that they are write-protected, and 1000 more. Before, each
// has a snapshot.
void mmu_memory(benchmark::State& state) {
    constexpr std::int64_t mb = 1 << 20;
    const PagedGuest guest({.private_tables = static_cast<std::size_t>(state.range(0)) / 2, .used = true});
    double settled = 0, fresh = 0, tables = 0;
    for ([[maybe_unused]] auto _ : state) {
        const double before = resident_bytes();
        MmuConfig config;
        config.prefetch = entries_per_table;
        ShadowedGuest shadowed(guest, config);
        shadowed.populate();
        const auto mapped = static_cast<double>(state.range(0) * mb);
        fresh = 100 * (resident_bytes() - before) / mapped;
        if (!shadowed.settle())
            return state.SkipWithError("tables are still compared");
        for (unsigned flushes = 0; flushes < 1000; ++flushes)
            shadowed.load(0);
        settled = 100 * (resident_bytes() - before) / mapped;
        tables = 100 * static_cast<double>(shadowed.mmu().pool().in_use() * page_size) / mapped;
    }
    constexpr Goal goal{.of = Goal::Of::measured, .bound = Goal::Bound::at_most, .value = 0.4};
    report(state, {.unit = Unit::percent,
                   .measured = settled,
                   .baseline = tables,
                   .ratio = settled / tables,
                   .goal = goal,
                   .note = fmt::format(
                       "with quiet tables, {:.3f} % with new ones; baseline: table pages alone", fresh)});
}

} // namespace umbra::bench
