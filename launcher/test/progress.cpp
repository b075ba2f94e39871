#include "launcher/test/progress.hpp"

#include "launcher/test/output_file.hpp"
#include "launcher/test/text.hpp"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <iterator>

#include <fmt/core.h>
#include <fmt/ranges.h>

namespace umbra {
namespace {

using namespace std::chrono_literals;

/// ECMA-48 and DEC's private modes: a line that is wider than the terminal is cut there and not continued on
/// the next.
constexpr std::string_view no_wrapping = "\r\x1b[?7l", clear_and_wrap = "\x1b[K\x1b[?7h",
                           clear_line = "\r\x1b[K";

std::string position(std::size_t done, std::size_t total) {
    const std::string of = fmt::format("{}", total);
    return total == 0 ? fmt::format("[{}]", done) : fmt::format("[{:>{}}/{}]", done, of.size(), of);
}

std::string run_name(const CaseResult& result) {
    const std::string name = printable_line(result.test.name);
    return result.attempts == 1 ? name : fmt::format("{} (run {})", name, result.attempt);
}

std::string first_problem(const CaseResult& result) {
    return result.problems.empty() ? std::string() : printable_line(result.problems.front());
}

} // namespace

std::string duration_text(std::chrono::nanoseconds duration) {
    const double seconds = std::chrono::duration<double>(duration).count();
    if (seconds < 9.995)
        return fmt::format("{:.2f} s", seconds);
    const auto whole = std::chrono::round<std::chrono::seconds>(duration).count();
    if (whole < 60)
        return fmt::format("{} s", whole);
    if (whole < 3600)
        return fmt::format("{} min {} s", whole / 60, whole % 60);
    return fmt::format("{} h {} min", whole / 3600, whole % 3600 / 60);
}

std::string progress_line(const ProgressState& state, std::size_t columns) {
    constexpr std::size_t named = 16; // more fit on no terminal
    std::string line = position(state.done, state.total);
    if (state.failed != 0)
        line += fmt::format(" {} failed", state.failed);
    if (state.done != 0 && state.done < state.total && state.elapsed >= 1s) {
        const double left = static_cast<double>(state.total - state.done) / static_cast<double>(state.done);
        const auto rounded = std::chrono::ceil<std::chrono::seconds>(state.elapsed * left);
        line += fmt::format("{} {} left", state.failed != 0 ? "," : "",
                            rounded < 60s ? fmt::format("{} s", rounded.count()) : duration_text(rounded));
    }
    for (std::size_t i = 0; i < std::min(state.running.size(), named); ++i) {
        const ProgressState::Running& running = state.running[i];
        line += (i == 0 ? ": " : ", ") + printable_line(running.name);
        if (running.age >= 1s)
            line += fmt::format(" ({} s)", std::chrono::floor<std::chrono::seconds>(running.age).count());
    }
    return clipped(line, columns);
}

std::size_t terminal_columns() {
    constexpr std::size_t usual = 80, least = 20, most = 1000;
    const char* const text = std::getenv("COLUMNS"); // NOLINT(concurrency-mt-unsafe): nobody sets it
    if (text == nullptr)
        return usual;
    const std::string_view view(text);
    std::size_t columns = 0;
    const auto [end, error] = std::from_chars(view.data(), view.data() + view.size(), columns);
    return error == std::errc{} && end == view.data() + view.size() && columns >= least && columns <= most
               ? columns
               : usual;
}

// --- summary

namespace {

/// Of a console, as much as is shown in a log: each line behind a mark, so that none is taken for umbra's.
std::string last_lines(std::string_view console) {
    constexpr std::size_t enough = Summary::shown_lines * Summary::shown_columns;
    const std::string text = printable(console.substr(console.size() - std::min(console.size(), enough)));
    std::vector<std::string_view> lines;
    for (std::string_view rest = text; !rest.empty();) {
        const std::size_t size = std::min(rest.find('\n'), rest.size());
        lines.push_back(rest.substr(0, size));
        rest.remove_prefix(std::min(size + 1, rest.size()));
    }
    std::string last;
    for (std::size_t i = lines.size() - std::min(lines.size(), Summary::shown_lines); i < lines.size(); ++i)
        last += fmt::format("        | {}\n", clipped(lines[i], Summary::shown_columns));
    return last;
}

} // namespace

void Summary::add(const CaseResult& result) {
    if (result.verdict == CaseVerdict::skipped)
        ++skips_[first_problem(result)];
    const bool failed = result.verdict == CaseVerdict::failed;
    if (!failed && (result.verdict != CaseVerdict::passed || result.attempts == 1))
        return;
    Attempts& attempts = failing_or_repeated_[printable_line(result.test.name)];
    ++attempts.runs;
    if (failed && attempts.failed++ == 0) {
        std::ranges::transform(result.problems, std::back_inserter(attempts.problems), printable_line);
        attempts.console = last_lines(result.console);
        attempts.folder = printable_line(result.folder);
    }
}

std::string Summary::text(const RunSummary& summary) const {
    std::string text;
    const auto put = [&text]<class... Args>(fmt::format_string<Args...> format, Args&&... args) {
        text += fmt::format(format, std::forward<Args>(args)...);
    };
    std::size_t consoles = 0;
    for (const auto& [name, attempts] : failing_or_repeated_) {
        if (attempts.failed == 0)
            continue;
        const bool flaky = attempts.failed != attempts.runs;
        put("{} {}: {}\n", flaky ? "flaky " : "failed", name, fmt::join(attempts.problems, "\n        "));
        if (consoles++ < shown_consoles)
            text += attempts.console;
        if (attempts.runs != 1)
            put("        {} of {} runs failed ({:.3g} %)\n", attempts.failed, attempts.runs,
                100 * static_cast<double>(attempts.failed) / static_cast<double>(attempts.runs));
        if (!attempts.folder.empty())
            put("        in {}\n", attempts.folder);
    }
    for (const auto& [reason, count] : skips_)
        put("skipped {}: {}\n", count, reason);
    put("{}{} in {}: {} passed, {} failed, {} skipped", summary.interrupted ? "interrupted: " : "",
        summary.passed + summary.failed + summary.skipped, duration_text(summary.duration), summary.passed,
        summary.failed, summary.skipped);
    if (summary.not_run != 0)
        put(", {} not run", summary.not_run);
    return text + "\n";
}

// --- progress

Progress::Progress(int fd, bool live, std::size_t columns, Clock clock)
    : fd_(fd), live_(live), columns_(columns), clock_(std::move(clock)), begun_(clock_()), told_(begun_) {}

void Progress::plan(const RunPlan& plan) {
    total_ = plan.runs;
    begun_ = told_ = clock_();
}

void Progress::started(const TestCase& test, unsigned attempt) {
    running_.push_back({test.name, attempt, clock_()});
    tick();
}

void Progress::ended(const CaseResult& result) {
    std::erase_if(running_, [&result](const Running& running) {
        return running.name == result.test.name && running.attempt == result.attempt;
    });
    summary_.add(result);
    if (result.verdict ==
        CaseVerdict::not_run) // thousands, all with one reason: the summary has their number
        return;
    ++done_;
    failed_ += result.verdict == CaseVerdict::failed ? 1 : 0;
    if (!live_ || result.verdict != CaseVerdict::passed) {
        const std::string problem = first_problem(result);
        say(fmt::format("{} {:7} {} ({}){}{}", position(done_, total_), name(result.verdict),
                        run_name(result), duration_text(result.wall), problem.empty() ? "" : ": ", problem));
    }
    tick();
}

void Progress::finished(const RunSummary& summary) {
    running_.clear();
    write(fmt::format("{}{}", live_ ? clear_line : std::string_view(), summary_.text(summary)));
}

void Progress::tick() {
    const auto now = clock_();
    if (live_ && now - told_ >= draw_interval)
        draw();
    else if (!live_ && now - told_ >= log_interval && !running_.empty())
        say(progress_line(state(), std::size_t{1} << 12));
}

void Progress::say(std::string_view line) {
    write(fmt::format("{}{}\n", live_ ? clear_line : std::string_view(), line));
    if (live_)
        draw();
    told_ = clock_();
}

ProgressState Progress::state() const {
    const auto now = clock_();
    ProgressState state{total_, done_, failed_, {}, now - begun_};
    for (const Running& running : running_)
        state.running.push_back({running.name, now - running.since});
    return state;
}

void Progress::draw() {
    // The last column stays free: some terminals go on to the next line once it is written to.
    write(fmt::format("{}{}{}", no_wrapping, progress_line(state(), columns_ - 1), clear_and_wrap));
    told_ = clock_();
}

void Progress::write(std::string text) {
    // "##[NAME]" is the older form of GitHub's commands, anywhere in a line: a guest may have printed it.
    constexpr std::string_view command = "##[";
    for (std::size_t at = text.find(command); at != std::string::npos; at = text.find(command, at))
        text.insert(at + 2, 1, ' ');
    (void)write_all(fd_, text);
}

} // namespace umbra
