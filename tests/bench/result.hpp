// What a benchmark has found: one line of the table that umbra_bench prints.
#pragma once

#include "vmm/trap_log.hpp"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include <benchmark/benchmark.h>

namespace umbra::bench {

enum class Unit { nanoseconds, bytes };

/// What the issue or the user asks of a benchmark.
struct Goal {
    enum class Of { measured, ratio } of = Of::ratio;
    enum class Bound { at_most, at_least } bound = Bound::at_most;
    double value = 0; ///< of the measurement: in its unit
};

struct Result {
    Unit unit = Unit::nanoseconds;
    double measured = 0;
    std::optional<double> baseline;
    double ratio = 0; ///< only with a baseline: as the goal counts it
    Goal goal;
};

/// Hands `result` to the reporter, as counters of the benchmark: --benchmark_out has them, too.
void report(benchmark::State& state, const Result& result);

/// `samples` must not be empty.
[[nodiscard]] double median(std::vector<double> samples);

/// Prints the table. `failed` becomes true when a benchmark could not run.
class TableReporter final : public benchmark::BenchmarkReporter {
  public:
    bool ReportContext(const Context& context) override;
    void ReportRuns(const std::vector<Run>& runs) override;
    [[nodiscard]] bool failed() const { return failed_; }

  private:
    bool failed_ = false;
};

// The benchmarks.
void startup_time(benchmark::State& state);
void startup_resident(benchmark::State& state);
void emulated_instruction(benchmark::State& state);
void hidden_fault(benchmark::State& state);
void hidden_fault_in_umbra(benchmark::State& state);
void mmu_fault(benchmark::State& state);
void guest_walk(benchmark::State& state);
void guest_arithmetic(benchmark::State& state);
void guest_memory(benchmark::State& state);

/// Ticks of timestamp() as nanoseconds.
[[nodiscard]] inline double nanoseconds(double ticks) {
    static const double per_microsecond = ticks_per_microsecond();
    return ticks / per_microsecond * 1000;
}

} // namespace umbra::bench
