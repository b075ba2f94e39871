#include "tests/bench/result.hpp"

#include <algorithm>
#include <string>

#include <fmt/format.h>

namespace umbra::bench {
namespace {

using Counters = benchmark::UserCounters;

// The names of the counters that carry a Result.
constexpr const char* measured_ns = "measured_ns";
constexpr const char* measured_bytes = "measured_bytes";
constexpr const char* baseline_ns = "baseline_ns";
constexpr const char* baseline_bytes = "baseline_bytes";
constexpr const char* ratio = "ratio";
constexpr const char* goal_met = "goal_met";

std::optional<double> value(const Counters& counters, const char* name) {
    const auto found = counters.find(name);
    return found == counters.end() ? std::nullopt : std::optional<double>(found->second.value);
}

std::string quantity(Unit unit, double number) {
    if (unit == Unit::bytes)
        return fmt::format("{:.1f} MB", number / 1e6);
    if (number < 1e3)
        return fmt::format("{:.1f} ns", number);
    return number < 1e6 ? fmt::format("{:.2f} us", number / 1e3) : fmt::format("{:.2f} ms", number / 1e6);
}

std::string describe(const Goal& goal, Unit unit) {
    const char* bound = goal.bound == Goal::Bound::at_most ? "at most" : "at least";
    return goal.of == Goal::Of::ratio ? fmt::format("ratio {} {}", bound, goal.value)
                                      : fmt::format("{} {}", bound, quantity(unit, goal.value));
}

std::string cell(const Counters& counters, const char* ns, const char* bytes) {
    if (const auto number = value(counters, ns))
        return quantity(Unit::nanoseconds, *number);
    if (const auto number = value(counters, bytes))
        return quantity(Unit::bytes, *number);
    return "-";
}

void print(std::ostream& out, const std::string& name, const std::string& measured,
           const std::string& baseline, const std::string& quotient, const std::string& goal,
           const std::string& verdict) {
    out << fmt::format("{:<32} {:>10} {:>10} {:>6}  {:<21} {}", name, measured, baseline, quotient, goal,
                       verdict)
        << std::endl; // at once: the next line may take seconds
}

} // namespace

void report(benchmark::State& state, const Result& result) {
    const bool time = result.unit == Unit::nanoseconds;
    state.counters[time ? measured_ns : measured_bytes] = result.measured;
    if (result.baseline) {
        state.counters[time ? baseline_ns : baseline_bytes] = *result.baseline;
        state.counters[ratio] = result.ratio;
    }
    const double counted = result.goal.of == Goal::Of::ratio ? result.ratio : result.measured;
    const bool met = result.goal.bound == Goal::Bound::at_most ? counted <= result.goal.value
                                                               : counted >= result.goal.value;
    state.counters[goal_met] = met ? 1 : 0;
    state.SetLabel(describe(result.goal, result.unit));
}

double median(std::vector<double> samples) {
    const auto middle = samples.begin() + static_cast<std::ptrdiff_t>(samples.size() / 2);
    std::ranges::nth_element(samples, middle);
    return *middle;
}

bool TableReporter::ReportContext(const Context& /*context*/) {
    print(GetOutputStream(), "benchmark", "measured", "baseline", "ratio", "goal", "");
    return true;
}

void TableReporter::ReportRuns(const std::vector<Run>& runs) {
    for (const Run& run : runs) {
        if (run.run_type == Run::RT_Aggregate)
            continue;
        const std::string name = run.run_name.function_name;
        if (run.error_occurred) {
            failed_ = true;
            GetOutputStream() << fmt::format("{:<32} could not run: {}", name, run.error_message)
                              << std::endl;
            continue;
        }
        const auto quotient = value(run.counters, ratio);
        print(GetOutputStream(), name, cell(run.counters, measured_ns, measured_bytes),
              cell(run.counters, baseline_ns, baseline_bytes),
              quotient ? fmt::format("{:.3f}", *quotient) : "-", run.report_label,
              value(run.counters, goal_met) == 1 ? "ok" : "missed");
    }
}

} // namespace umbra::bench
