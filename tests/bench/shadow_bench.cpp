// The shadow MMU alone, over tables in memory: no machine, no trap.

#include "shadow/mmu.hpp"
#include "tests/bench/result.hpp"
#include "vmm/host_memory.hpp"

#include <cstring>

namespace umbra::bench {
namespace {

/// A guest of 64 MB whose tables map as much, in 4 KB pages, from address 0.
class PagedGuest {
  public:
    static constexpr std::uint64_t bytes = std::uint64_t{64} << 20;
    static constexpr std::size_t pages = bytes / page_size;

    PagedGuest() {
        constexpr std::uint64_t rights = entry_bit::present | entry_bit::writable | entry_bit::user;
        const auto entry = [&](GuestPhys table, std::size_t slot, GuestPhys target) {
            (void)memory.write(table + slot * sizeof(GuestEntry), GuestEntry(target.frame(), rights));
        };
        entry(root, 0, pdpt);
        entry(pdpt, 0, directory);
        for (std::size_t page = 0; page < pages; ++page) {
            const std::size_t table = page / entries_per_table;
            entry(directory, table, tables + table * page_size);
            entry(tables, page, GuestPhys(page * page_size));
        }
        paging.root = root.frame();
    }

  private:
    static constexpr GuestPhys root{0x1000}, pdpt{0x2000}, directory{0x3000}, tables{0x4000};
    HostMemory ram_{bytes, HostMemory::Pages::huge, "a guest"};

  public:
    GuestMemory memory{{{GuestPhys(0), ram_.bytes()}}};
    GuestPaging paging;
};

/// A page for each number, in an order that is not that of the tables.
GuestVirt scattered(std::size_t number) {
    constexpr std::size_t odd = 7919;
    return GuestVirt(number * odd % PagedGuest::pages * page_size + number % page_size);
}

} // namespace

void guest_walk(benchmark::State& state) {
    const PagedGuest guest;
    constexpr std::size_t batch = 1024;
    std::vector<double> times;
    std::size_t number = 0;
    for ([[maybe_unused]] auto _ : state) {
        const std::uint64_t start = timestamp();
        for (std::size_t i = 0; i < batch; ++i)
            benchmark::DoNotOptimize(walk_guest(guest.memory, guest.paging, scattered(number++), {}));
        times.push_back(static_cast<double>(timestamp() - start) / batch);
    }
    constexpr Goal goal{.of = Goal::Of::measured, .bound = Goal::Bound::at_most, .value = 50};
    report(state, {Unit::nanoseconds, nanoseconds(median(times)), {}, 0, goal});
}

void mmu_fault(benchmark::State& state) {
    const PagedGuest guest;
    constexpr std::size_t pool_bytes = std::size_t{2} << 20;
    const HostMemory pool_memory(pool_bytes, HostMemory::Pages::small, "shadow tables");
    std::vector<double> times;
    for ([[maybe_unused]] auto _ : state) {
        std::memset(pool_memory.bytes().data(), 0, pool_bytes);
        TablePool pool(MachineFrame(std::uint64_t{1} << 30), pool_memory.bytes());
        Mmu mmu(guest.memory, pool, {}, ShadowEntry());
        mmu.set_paging(guest.paging);
        for (std::size_t page = 0; page < PagedGuest::pages; ++page) {
            const GuestVirt at = scattered(page);
            const std::uint64_t start = timestamp();
            benchmark::DoNotOptimize(mmu.fault(at, {}));
            times.push_back(static_cast<double>(timestamp() - start));
        }
    }
    constexpr Goal goal{.of = Goal::Of::measured, .bound = Goal::Bound::at_most, .value = 1000};
    report(state, {Unit::nanoseconds, nanoseconds(median(times)), {}, 0, goal});
}

} // namespace umbra::bench
