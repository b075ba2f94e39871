// umbra's benchmarks: one table of what was measured, what it is compared with, and what is asked for.
//
// Options are Google Benchmark's; --benchmark_out=FILE writes the numbers as JSON. A missed goal is no
// failure: times depend on the machine and on what else it does.

#include "shadow/shadow_tables.hpp"
#include "tests/bench/result.hpp"

#include <algorithm>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

namespace umbra::bench {
namespace {

// In the order in which they are run. Starting programs comes first, while this process is small: a child's
// resident memory begins with its parent's. One iteration takes as many samples as its median needs.
BENCHMARK(startup_time)->Name("umbra run hello: time")->Iterations(1);
BENCHMARK(startup_resident)->Name("umbra run hello: resident")->Iterations(1);
BENCHMARK_CAPTURE(runner_overhead, plain, false)->Name("umbra test: over umbra run, a case")->Iterations(1);
BENCHMARK_CAPTURE(runner_overhead, traces, true)
    ->Name("umbra test: over umbra run, a case, traced")
    ->Iterations(1);
const auto processors = static_cast<std::int64_t>(std::max(1U, std::thread::hardware_concurrency()));
BENCHMARK_CAPTURE(guest_starts, pc, "pc", "tcg")
    ->Name("umbra test: starts, against QEMU")
    ->ArgName("at once")
    ->Arg(1)
    ->Arg(processors)
    ->Iterations(1);
BENCHMARK_CAPTURE(guest_starts, microvm, "microvm", "tcg")
    ->Name("umbra test: starts, against QEMU microvm")
    ->ArgName("at once")
    ->Arg(1)
    ->Arg(processors)
    ->Iterations(1);
BENCHMARK_CAPTURE(guest_starts, kvm, "microvm", "kvm")
    ->Name("umbra test: starts, against QEMU microvm on KVM")
    ->ArgName("at once")
    ->Arg(1)
    ->Arg(processors)
    ->Iterations(1);
BENCHMARK(guests_at_once)
    ->Name("umbra test: memory of waiting guests")
    ->ArgName("at once")
    ->Arg(50)
    ->Iterations(1);
BENCHMARK(emulated_instruction)->Name("trap: emulated instruction")->Iterations(1);
BENCHMARK(hidden_fault)->Name("trap: hidden fault")->Iterations(1);
BENCHMARK(hidden_fault_in_umbra)->Name("hidden fault: in umbra")->Iterations(1);
BENCHMARK(guest_switch)->Name("trap: MOV CR3")->ArgName("spaces")->Arg(1)->Arg(16)->Arg(256)->Iterations(1);
BENCHMARK(guest_kernel_change)
    ->Name("trap: kernel mapping change")
    ->ArgName("spaces")
    ->Arg(1)
    ->Arg(16)
    ->Arg(256)
    ->Iterations(1);
BENCHMARK(guest_invlpg)->Name("trap: INVLPG")->Iterations(1);
BENCHMARK(table_write_trap)->Name("table write: trap, and protected again")->Iterations(1);
BENCHMARK(trap_cost)->Name("table write: trap, in comparisons")->Iterations(1);
BENCHMARK(dirty_log_write)->Name("table write: first to a page in KVM's dirty log")->Iterations(1);
BENCHMARK(dirty_log_fetch)
    ->Name("KVM's dirty log of 64 MB")
    ->ArgName("written")
    ->Arg(1)
    ->Arg(512)
    ->Iterations(1);

// Counted, not timed.
BENCHMARK_CAPTURE(counted_traps, spaces, "spaces")->Name("traps of guest spaces")->Iterations(1);
BENCHMARK_CAPTURE(counted_traps, paging, "paging")->Name("traps of guest paging")->Iterations(1);
BENCHMARK_CAPTURE(counted_traps, user, "user")->Name("traps of guest user")->Iterations(1);
BENCHMARK_CAPTURE(counted_traps, access, "access")->Name("traps of guest access")->Iterations(1);

// Over gdb's remote protocol.
const std::vector<std::string> busy{"wait"}, halted{"ticks", "idle"};
BENCHMARK_CAPTURE(debug_stop, busy, busy, false)->Name("gdb: Ctrl-C to stop, busy guest")->Iterations(1);
BENCHMARK_CAPTURE(debug_stop, busy_worst, busy, true)
    ->Name("gdb: Ctrl-C to stop, busy guest: worst")
    ->Iterations(1);
BENCHMARK_CAPTURE(debug_stop, halted, halted, false)
    ->Name("gdb: Ctrl-C to stop, halted guest")
    ->Iterations(1);
BENCHMARK_CAPTURE(debug_stop, halted_worst, halted, true)
    ->Name("gdb: Ctrl-C to stop, halted guest: worst")
    ->Iterations(1);
BENCHMARK(debug_condition)->Name("gdb: breakpoint, condition false")->Iterations(1);
BENCHMARK(debug_watchpoints)->Name("gdb: guest mmufuzz, 100 watchpoints untouched")->Iterations(1);

BENCHMARK(guest_walk)->Name("guest walk, 4 levels");

// The Mmu alone.
constexpr auto compare = static_cast<std::int64_t>(Sync::compare),
               protect = static_cast<std::int64_t>(Sync::protect),
               adaptive = static_cast<std::int64_t>(Sync::adaptive);
BENCHMARK(mmu_fault)->Name("Mmu: hidden fault")->ArgName("MB")->Arg(16)->Arg(64)->Arg(256)->Iterations(1);
BENCHMARK(mmu_fill)
    ->Name("Mmu: fill, a page")
    ->ArgNames({"MB", "prefetch"})
    ->ArgsProduct({{16, 64, 256}, {16, 512}})
    ->Iterations(1);
BENCHMARK(mmu_resync)
    ->Name("Mmu: resync, a table")
    ->ArgNames({"MB", "changed"})
    ->ArgsProduct({{16, 128, 1024}, {0, 1}})
    ->Iterations(1);
BENCHMARK(mmu_flush)
    ->Name("Mmu: whole flush")
    ->ArgNames({"MB", "sync"})
    ->ArgsProduct({{16, 128, 1024}, {compare, protect, adaptive}})
    ->Iterations(1);
BENCHMARK(mmu_switch)
    ->Name("Mmu: switch, nothing changed")
    ->ArgNames({"spaces", "MB", "sync"})
    ->ArgsProduct({{1, 16, 256}, {4, 128}, {compare, protect, adaptive}})
    ->Iterations(1);
BENCHMARK(mmu_switch_after_new_table)
    ->Name("Mmu: switch after a new table")
    ->ArgNames({"spaces", "MB", "sync"})
    ->ArgsProduct({{1, 16, 256}, {4, 128}, {compare, protect}})
    ->Iterations(1);
BENCHMARK(mmu_kernel_change)
    ->Name("Mmu: kernel mapping change")
    ->ArgNames({"spaces", "sync"})
    ->ArgsProduct({{1, 16, 256}, {compare, protect}})
    ->Iterations(1);
BENCHMARK(mmu_switch_after_kernel_change)
    ->Name("Mmu: first switch after that")
    ->ArgNames({"spaces", "sync"})
    ->ArgsProduct({{1, 16, 256}, {compare, protect}})
    ->Iterations(1);
BENCHMARK(mmu_invalidate)
    ->Name("Mmu: INVLPG")
    ->ArgNames({"MB", "sync"})
    ->ArgsProduct({{16, 128, 1024}, {compare, protect}})
    ->Iterations(1);
BENCHMARK(mmu_eviction)
    ->Name("Mmu: fill in half the memory")
    ->ArgName("tables")
    ->Arg(64)
    ->Arg(256)
    ->Arg(1024)
    ->Iterations(1);
BENCHMARK(mmu_memory)
    ->Name("Mmu: shadow of used memory")
    ->ArgName("MB")
    ->Arg(64)
    ->Arg(256)
    ->Arg(1024)
    ->Iterations(1);

BENCHMARK(guest_arithmetic)->Name("guest code: arithmetic")->Iterations(1);
BENCHMARK(guest_memory)->Name("guest code: 4 MB of memory")->Iterations(1);

} // namespace
} // namespace umbra::bench

int main(int argc, char** argv) {
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv))
        return 2;
    umbra::bench::TableReporter table;
    benchmark::RunSpecifiedBenchmarks(&table);
    benchmark::Shutdown();
    return table.failed() ? 1 : 0;
}
