#include "tests/bench/result.hpp"

#include <algorithm>
#include <array>
#include <string>
#include <string_view>

#include <fmt/core.h>

namespace umbra::bench {
namespace {

using Counters = benchmark::UserCounters;

// The names of the counters that carry a Result: each quantity's begins with what it is and ends with its
// unit.
constexpr std::string_view measured_name = "measured_", baseline_name = "baseline_";
constexpr const char* ratio = "ratio";
constexpr const char* goal_met = "goal_met";
constexpr std::array units{Unit::nanoseconds, Unit::bytes, Unit::count, Unit::percent};

std::string counter(std::string_view what, Unit unit) {
    const auto suffix = [unit]() -> std::string_view {
        switch (unit) {
        case Unit::nanoseconds:
            return "ns";
        case Unit::bytes:
            return "bytes";
        case Unit::count:
            return "count";
        case Unit::percent:
            return "percent";
        }
        __builtin_unreachable();
    };
    return std::string(what).append(suffix());
}

std::optional<double> value(const Counters& counters, const std::string& name) {
    const auto found = counters.find(name);
    return found == counters.end() ? std::nullopt : std::optional<double>(found->second.value);
}

std::string quantity(Unit unit, double number) {
    switch (unit) {
    case Unit::nanoseconds:
        if (number < 1e3)
            return fmt::format("{:.1f} ns", number);
        return number < 1e6 ? fmt::format("{:.2f} us", number / 1e3) : fmt::format("{:.2f} ms", number / 1e6);
    case Unit::bytes:
        return fmt::format("{:.1f} MB", number / 1e6);
    case Unit::count:
        return fmt::format("{:.6g}", number);
    case Unit::percent:
        return fmt::format("{:.3f} %", number);
    }
    __builtin_unreachable();
}

std::string describe(const Goal& goal, Unit unit) {
    const char* bound = goal.bound == Goal::Bound::at_most ? "at most" : "at least";
    return goal.of == Goal::Of::ratio ? fmt::format("ratio {} {}", bound, goal.value)
                                      : fmt::format("{} {}", bound, quantity(unit, goal.value));
}

std::string cell(const Counters& counters, std::string_view what) {
    for (const Unit unit : units) {
        if (const auto number = value(counters, counter(what, unit)))
            return quantity(unit, *number);
    }
    return "-";
}

void print(std::ostream& out, const std::string& name, const std::string& measured,
           const std::string& baseline, const std::string& quotient, const std::string& verdict,
           const std::string& goal) {
    out << fmt::format("{:<58} {:>10} {:>10} {:>7}  {:<6} {}", name, measured, baseline, quotient, verdict,
                       goal)
        << std::endl; // at once: the next line may take seconds
}

} // namespace

void report(benchmark::State& state, const Result& result) {
    state.counters[counter(measured_name, result.unit)] = result.measured;
    if (result.baseline) {
        state.counters[counter(baseline_name, result.unit)] = *result.baseline;
        state.counters[ratio] = result.ratio;
    }
    std::string label = result.note;
    if (result.goal) {
        const double counted = result.goal->of == Goal::Of::ratio ? result.ratio : result.measured;
        const bool met = result.goal->bound == Goal::Bound::at_most ? counted <= result.goal->value
                                                                    : counted >= result.goal->value;
        state.counters[goal_met] = met ? 1 : 0;
        label = describe(*result.goal, result.unit) + (label.empty() ? "" : "; ") + label;
    }
    state.SetLabel(label);
}

double median(std::vector<double> samples) {
    const auto middle = samples.begin() + static_cast<std::ptrdiff_t>(samples.size() / 2);
    std::ranges::nth_element(samples, middle);
    return *middle;
}

bool TableReporter::ReportContext(const Context& /*context*/) {
    print(GetOutputStream(), "benchmark", "measured", "baseline", "ratio", "", "goal");
    return true;
}

void TableReporter::ReportRuns(const std::vector<Run>& runs) {
    for (const Run& run : runs) {
        if (run.run_type == Run::RT_Aggregate)
            continue;
        std::string name = run.run_name.function_name;
        if (!run.run_name.args.empty())
            name += ", " + run.run_name.args;
        if (run.error_occurred) {
            failed_ = true;
            GetOutputStream() << fmt::format("{:<58} could not run: {}", name, run.error_message)
                              << std::endl;
            continue;
        }
        const auto quotient = value(run.counters, ratio);
        const auto met = value(run.counters, goal_met);
        print(GetOutputStream(), name, cell(run.counters, measured_name), cell(run.counters, baseline_name),
              quotient ? fmt::format("{:.3f}", *quotient) : "-",
              !met        ? ""
              : *met == 1 ? "ok"
                          : "missed",
              run.report_label);
    }
}

} // namespace umbra::bench
