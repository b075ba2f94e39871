// umbra's benchmarks: one table of what was measured, what it is compared with, and what is asked for.
//
// Options are Google Benchmark's; --benchmark_out=FILE writes the numbers as JSON. A missed goal is no
// failure: times depend on the machine and on what else it does.

#include "tests/bench/result.hpp"

int main(int argc, char** argv) {
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv))
        return 2;
    umbra::bench::register_startup_benchmarks();
    umbra::bench::register_trap_benchmarks();
    umbra::bench::register_shadow_benchmarks();
    umbra::bench::register_cpu_benchmarks();
    umbra::bench::TableReporter table;
    benchmark::RunSpecifiedBenchmarks(&table);
    benchmark::Shutdown();
    return table.failed() ? 1 : 0;
}
