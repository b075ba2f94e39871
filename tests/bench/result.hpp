// What a benchmark has found: one line of the table that umbra_bench prints.
#pragma once

#include "vmm/trap_log.hpp"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <benchmark/benchmark.h>

namespace umbra::bench {

enum class Unit { nanoseconds, bytes, count, percent };

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
    std::optional<Goal> goal{};
    std::string note{}; ///< what else the reader must know
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
/// `traces`: with what the runner keeps of each guest unless told otherwise.
void runner_overhead(benchmark::State& state, bool traces);
/// Against starts of QEMU, of this machine on this accelerator.
void guest_starts(benchmark::State& state, const char* machine, const char* accelerator);
void guests_at_once(benchmark::State& state);
void emulated_instruction(benchmark::State& state);
void hidden_fault(benchmark::State& state);
void hidden_fault_in_umbra(benchmark::State& state);
void mmu_fault(benchmark::State& state);
void mmu_fill(benchmark::State& state);
void mmu_resync(benchmark::State& state);
void mmu_flush(benchmark::State& state);
void mmu_switch(benchmark::State& state);
void mmu_switch_after_new_table(benchmark::State& state);
void mmu_kernel_change(benchmark::State& state);
void mmu_switch_after_kernel_change(benchmark::State& state);
void mmu_invalidate(benchmark::State& state);
void mmu_eviction(benchmark::State& state);
void mmu_memory(benchmark::State& state);
void counted_traps(benchmark::State& state, const char* guest);
void guest_switch(benchmark::State& state);
void guest_kernel_change(benchmark::State& state);
void guest_invlpg(benchmark::State& state);
void table_write_trap(benchmark::State& state);
void trap_cost(benchmark::State& state);
void dirty_log_fetch(benchmark::State& state);
void dirty_log_write(benchmark::State& state);
void guest_walk(benchmark::State& state);
void guest_arithmetic(benchmark::State& state);
void guest_memory(benchmark::State& state);
/// `words`: for the guest `debug`; `worst`: of all stops, in place of the median.
void debug_stop(benchmark::State& state, const std::vector<std::string>& words, bool worst);
void debug_condition(benchmark::State& state);
void debug_watchpoints(benchmark::State& state);

/// What it takes, after a flush, to compare one of so many tables of level 1, in nanoseconds; `changes`:
/// entries of each that the guest has changed.
[[nodiscard]] double resync_time(std::size_t tables, std::size_t changes);

/// Ticks of timestamp() as nanoseconds.
[[nodiscard]] inline double nanoseconds(double ticks) {
    static const double per_microsecond = ticks_per_microsecond();
    return ticks / per_microsecond * 1000;
}

} // namespace umbra::bench
