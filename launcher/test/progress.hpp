// How far a run of tests is: one live line on a terminal, plain lines in a log, and the summary at its end.
#pragma once

#include "launcher/test/sink.hpp"

#include <chrono>
#include <cstddef>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace umbra {

struct ProgressState {
    struct Running {
        std::string name;
        std::chrono::nanoseconds age{};
    };
    std::size_t total = 0; ///< 0: not known
    std::size_t done = 0, failed = 0;
    std::vector<Running> running; ///< oldest first
    std::chrono::nanoseconds elapsed{};
};

/// "[ 12/200] 1 failed, 40 s left: mem/oom (3 s), boot/hello" in at most `columns` columns. The time left is
/// by the rate so far.
[[nodiscard]] std::string progress_line(const ProgressState& state, std::size_t columns);

/// "0.12 s", "12 s", "3 min 5 s", "2 h 3 min".
[[nodiscard]] std::string duration_text(std::chrono::nanoseconds duration);

/// What the user's environment variable COLUMNS says, or 80. A terminal that is narrower cuts the live line
/// itself.
[[nodiscard]] std::size_t terminal_columns();

/// What is to be said when all is over: each failure with all its problems and what the guest printed last,
/// the rates of flaky cases, the reasons of skips, and last the numbers.
class Summary {
  public:
    /// Of how many failed cases the console is shown, and how much of it: a log is to be read.
    static constexpr std::size_t shown_consoles = 10, shown_lines = 8, shown_columns = 200;

    void add(const CaseResult& result);
    [[nodiscard]] std::string text(const RunSummary& summary) const;

  private:
    struct Attempts {
        std::size_t runs = 0, failed = 0;
        std::vector<std::string> problems; ///< of the first failure, as the rest
        std::string console, folder;
    };
    std::map<std::string, Attempts> failing_or_repeated_;
    std::map<std::string, std::size_t> skips_; ///< by reason
};

/// On a terminal (`live`) it keeps its last line up to date, and what did not pass is told above that. In a
/// log, the end of each run is a line; so is what runs when nothing has ended for `log_interval`, for CI
/// servers that take silence for a hang. Nothing that it writes begins with "::", so that GitHub takes
/// nothing of it for a command.
class Progress final : public ResultSink {
  public:
    using Clock = std::function<std::chrono::steady_clock::time_point()>;
    static constexpr std::chrono::seconds log_interval{30};
    static constexpr std::chrono::milliseconds draw_interval{50};

    /// `fd` stays the caller's. That it cannot be written to is of no concern to the tests.
    Progress(int fd, bool live, std::size_t columns, Clock clock = std::chrono::steady_clock::now);

    void plan(const RunPlan& plan) override;
    void started(const TestCase& test, unsigned attempt) override;
    void ended(const CaseResult& result) override;
    /// Takes the live line away, and tells the summary.
    void finished(const RunSummary& summary) override;
    [[nodiscard]] std::optional<std::string> problem() const override { return std::nullopt; }

    /// To be called now and then, some ten times a second with `live`: time passes.
    void tick();
    /// A line of the runner's own.
    void say(std::string_view line);

  private:
    struct Running {
        std::string name;
        unsigned attempt = 0;
        std::chrono::steady_clock::time_point since;
    };
    [[nodiscard]] ProgressState state() const;
    void draw();
    void write(std::string text);

    int fd_;
    bool live_;
    std::size_t columns_;
    Clock clock_;
    std::chrono::steady_clock::time_point begun_, told_;
    std::size_t total_ = 0, done_ = 0, failed_ = 0;
    std::vector<Running> running_;
    Summary summary_;
};

} // namespace umbra
