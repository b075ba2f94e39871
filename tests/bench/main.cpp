// umbra's benchmarks: one table of what was measured, what it is compared with, and what is asked for.
//
// Options are Google Benchmark's; --benchmark_out=FILE writes the numbers as JSON. A missed goal is no
// failure: times depend on the machine and on what else it does.

#include "tests/bench/result.hpp"

namespace umbra::bench {
namespace {

// In the order in which they are run. Starting programs comes first, while this process is small: a child's
// resident memory begins with its parent's. One iteration takes as many samples as its median needs.
BENCHMARK(startup_time)->Name("umbra run hello: time")->Iterations(1);
BENCHMARK(startup_resident)->Name("umbra run hello: resident")->Iterations(1);
BENCHMARK(emulated_instruction)->Name("trap: emulated instruction")->Iterations(1);
BENCHMARK(hidden_fault)->Name("trap: hidden fault")->Iterations(1);
BENCHMARK(hidden_fault_in_umbra)->Name("hidden fault: in umbra")->Iterations(1);
BENCHMARK(mmu_fault)->Name("hidden fault: Mmu::fault alone");
BENCHMARK(guest_walk)->Name("guest walk, 4 levels");
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
