#include "launcher/test/runner.hpp"

#include "launcher/run.hpp"
#include "launcher/test/child.hpp"
#include "launcher/test/console_watch.hpp"
#include "launcher/test/judge.hpp"
#include "launcher/test/output_file.hpp"
#include "vmm/error.hpp"
#include "vmm/kvm/kvm.hpp"
#include "vmm/loader/memory_size.hpp"
#include "vmm/traits.hpp"

#include <poll.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <set>
#include <sstream>
#include <system_error>
#include <thread>
#include <utility>

#include <fmt/core.h>

namespace umbra {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr std::size_t kept_errors = std::size_t{256} << 10;
/// More than the result of any run: hundreds of counters and instructions' names.
constexpr std::size_t longest_result = std::size_t{1} << 20;
constexpr milliseconds tick_interval{100};

// --- What this host has

std::optional<std::uint64_t> read_number(const char* path) {
    std::ifstream file(path);
    std::uint64_t number = 0;
    return file >> number ? std::optional(number) : std::nullopt; // "max" is none
}

/// Bytes, also where a container has less than its host.
std::uint64_t available_memory() {
    std::uint64_t available = ~std::uint64_t{0};
    std::ifstream file("/proc/meminfo");
    std::string key, unit;
    for (std::uint64_t kilobytes = 0; file >> key >> kilobytes; std::getline(file, unit))
        if (key == "MemAvailable:")
            available = kilobytes << 10;
    const auto most = read_number("/sys/fs/cgroup/memory.max"),
               used = read_number("/sys/fs/cgroup/memory.current");
    if (most && used)
        available = std::min(available, *most - std::min(*most, *used));
    return available;
}

/// Bytes that a guest may come to need, with its shadow tables and umbra itself.
std::uint64_t needed_memory(const TestCase& test) {
    constexpr std::uint64_t umbra_itself = std::uint64_t{32} << 20;
    try {
        const std::uint64_t bytes =
            parse_memory_size(test.memory.empty() ? RunOptions().memory : test.memory);
        return bytes + bytes / 32 + umbra_itself;
    } catch (const StartupError&) { // umbra run will say what is wrong with it
        return umbra_itself;
    }
}

// --- Folders of cases

/// A name for a folder that any file system takes, and people recognise.
std::string folder_name(const std::string& case_name) {
    constexpr std::size_t longest = 150;
    constexpr std::string_view plain =
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.=,+[]";
    std::string name = case_name.substr(0, longest);
    std::ranges::replace_if(
        name, [&](char c) { return plain.find(c) == std::string_view::npos; }, '_');
    if (name.empty() || name.front() == '.')
        name.insert(0, 1, '_');
    return name;
}

std::vector<std::string> folder_names(const std::vector<TestCase>& cases) {
    std::set<std::string> taken;
    std::vector<std::string> names;
    for (const TestCase& test : cases) {
        const std::string plain = folder_name(test.name);
        std::string name = plain;
        for (unsigned i = 2; !taken.insert(name).second; ++i)
            name = fmt::format("{}-{}", plain, i);
        names.push_back(std::move(name));
    }
    return names;
}

constexpr std::string_view attempt_mark = ".attempt-";

/// Removes what a run before left in `folder`, and the folder, unless there is something else in it.
void remove_results(const fs::path& folder) {
    std::error_code ignored; // what is in the way is told when it is written
    for (const char* const file : {case_files::console, case_files::errors, case_files::result,
                                   case_files::rerun, case_files::debug, case_files::trace, case_files::core})
        fs::remove(folder / file, ignored);
    fs::remove(folder, ignored);
}

/// What `umbra run` has said of a trace or a core that it could not write, the disk being full.
std::optional<std::string> unwritten_file(const std::string& errors) {
    std::istringstream stream(errors);
    for (std::string line; std::getline(stream, line);)
        if (line.starts_with("umbra: no core was written") ||
            (line.starts_with("umbra: the trace ") && line.find(" is incomplete") != std::string::npos))
            return line.substr(std::string_view("umbra: ").size());
    return std::nullopt;
}

// --- A run

struct Run {
    /// StartupError as ConsoleWatch.
    Run(const TestCase& run_test, std::size_t case_index, unsigned run_attempt, std::uint64_t memory_bytes)
        : test(run_test), index(case_index), attempt(run_attempt), memory(memory_bytes) {}

    const TestCase& test;
    const std::size_t index; ///< of `test`
    const unsigned attempt;
    const std::uint64_t memory;
    fs::path folder; ///< has been made for the trace or the core; empty: has not

    ConsoleWatch watch{test};
    KeptText console{kept_console}, errors{kept_errors};
    RunFacts facts;
    std::string to_send;
    Clock::time_point begun, deadline;
    std::optional<ChildProcess> child;
};

/// Signals that end the tests, taken as long as this lives.
class EndingSignals {
  public:
    EndingSignals() {
        sigemptyset(&set_);
        for (const int signal : {SIGINT, SIGTERM, SIGHUP})
            sigaddset(&set_, signal);
        (void)::pthread_sigmask(SIG_BLOCK, &set_, &before_);
        file_ = File(::signalfd(-1, &set_, SFD_CLOEXEC | SFD_NONBLOCK));
    }
    EndingSignals(const EndingSignals&) = delete;
    EndingSignals& operator=(const EndingSignals&) = delete;
    EndingSignals(EndingSignals&&) = delete;
    EndingSignals& operator=(EndingSignals&&) = delete;
    ~EndingSignals() {
        while (take()) { // one that came late must not end the process before its results are told
        }
        (void)::pthread_sigmask(SIG_SETMASK, &before_, nullptr);
    }
    [[nodiscard]] int fd() const { return file_.get(); }
    [[nodiscard]] bool take() {
        signalfd_siginfo info{};
        return ::read(file_.get(), &info, sizeof(info)) == sizeof(info);
    }

  private:
    sigset_t set_{}, before_{};
    File file_;
};

class Runner {
  public:
    Runner(const std::vector<TestCase>& cases, const RunnerConfig& config, std::span<ResultSink* const> sinks)
        : cases_(cases), config_(config), sinks_(sinks), folders_(folder_names(cases)),
          jobs_(config.jobs != 0 ? config.jobs : std::max(1U, std::thread::hardware_concurrency())),
          memory_(config.memory != 0 ? config.memory : available_memory()) {
        if (std::ranges::any_of(cases, [](const TestCase& test) { return !test.hosts.empty(); }))
            traits_ = find_host_traits();
        std::error_code error;
        program_ = config.program == "/proc/self/exe" ? fs::read_symlink(config.program, error).string()
                                                      : fs::absolute(config.program, error).string();
        folder_ = fs::current_path(error).string();
    }

    RunSummary run() {
        prepare_output();
        const std::size_t runs = config_.until_failure ? 0 : cases_.size() * config_.repeat;
        for (ResultSink* const sink : sinks_)
            sink->plan({runs, std::chrono::system_clock::now()});
        while (true) {
            while (start_next()) {
            }
            if (running_.empty())
                break;
            wait();
            if (config_.tick)
                config_.tick();
        }
        summary_.duration = Clock::now() - begun_;
        for (ResultSink* const sink : sinks_)
            sink->finished(summary_);
        return summary_;
    }

  private:
    // --- What is next

    /// There is nothing to start any more, or not to be started.
    [[nodiscard]] bool over() const {
        if (cases_.empty())
            return true;
        if (!config_.until_failure)
            return attempt_ > config_.repeat;
        const bool ending = summary_.failed != 0 || summary_.interrupted || idle_round_;
        return next_ == 0 && attempt_ > 1 && ending;
    }
    void advance() {
        if (++next_ < cases_.size())
            return;
        next_ = 0;
        ++attempt_;
        idle_round_ = !started_in_round_;
        started_in_round_ = false;
    }

    CaseResult new_result(const TestCase& test, unsigned attempt) const {
        CaseResult result;
        result.test = test;
        result.attempt = attempt;
        result.attempts = config_.until_failure ? 0 : config_.repeat;
        result.start = std::chrono::duration_cast<milliseconds>(Clock::now() - begun_);
        return result;
    }

    /// Does what there is to do about the next attempt; false if there is none, or it has to wait.
    bool start_next() {
        // The failures of a round are known at its end only.
        if (config_.until_failure && next_ == 0 && !running_.empty())
            return false;
        if (over())
            return false;
        const TestCase& test = cases_[next_];
        if (summary_.interrupted || (config_.fail_fast && summary_.failed != 0)) {
            CaseResult result = new_result(test, attempt_);
            result.problems.emplace_back(summary_.interrupted ? "interrupted before its turn came"
                                                              : "another case failed before its turn came");
            tell(result);
            advance();
            return true;
        }
        if (const std::string missing = missing_traits(test); !missing.empty()) {
            CaseResult result = new_result(test, attempt_);
            result.verdict = CaseVerdict::skipped;
            result.problems.push_back("this host is not what the case needs (see umbra probe): " + missing);
            tell(result);
            advance();
            return true;
        }
        const std::uint64_t memory = needed_memory(test);
        if (!running_.empty() &&
            (running_.size() >= jobs_ || memory > memory_ - std::min(memory_, memory_used_)))
            return false;
        if (!start(test, memory))
            return false;
        started_in_round_ = true;
        advance();
        return true;
    }

    [[nodiscard]] std::string missing_traits(const TestCase& test) const {
        std::string missing;
        for (const std::string& wanted : test.hosts) {
            const bool negated = wanted.starts_with('!');
            const bool has = std::ranges::find(traits_, wanted.substr(negated ? 1 : 0)) != traits_.end();
            if (has == negated)
                missing += (missing.empty() ? "" : ", ") + wanted;
        }
        return missing;
    }

    /// False if the system has no room for it now, and may have later.
    bool start(const TestCase& test, std::uint64_t memory) {
        std::unique_ptr<Run> run;
        try {
            run = std::make_unique<Run>(test, next_, attempt_, memory);
        } catch (const StartupError& error) {
            CaseResult result = new_result(test, attempt_);
            result.verdict = CaseVerdict::failed;
            result.problems.emplace_back(error.what());
            tell(result);
            return true;
        }
        std::vector<std::string> arguments{"umbra", "run"};
        std::ranges::move(guest_arguments(test), std::back_inserter(arguments));
        arguments.push_back(fmt::format("--result=/proc/self/fd/{}", ChildProcess::result_fd));
        add_kept_files(*run, arguments);
        run->begun = Clock::now();
        run->deadline = run->begun + test.timeout + config_.overrun_grace;
        try {
            run->child.emplace(config_.program, arguments, !test.conversation.empty());
        } catch (const std::system_error& error) {
            if (!run->folder.empty())
                remove_results(run->folder);
            if (!running_.empty()) { // too many processes or open files
                jobs_ = static_cast<unsigned>(running_.size());
                return false;
            }
            CaseResult result = new_result(test, attempt_);
            result.verdict = CaseVerdict::failed;
            result.problems.push_back(fmt::format("umbra could not be started: {}", error.what()));
            tell(result);
            return true;
        }
        memory_used_ += memory;
        for (ResultSink* const sink : sinks_)
            sink->started(test, attempt_);
        running_.push_back(std::move(run));
        return true;
    }

    // --- What runs

    void wait() {
        std::vector<pollfd> events{{signals_.fd(), POLLIN, 0}};
        const Clock::time_point now = Clock::now();
        Clock::time_point until = config_.tick ? now + tick_interval : Clock::time_point::max();
        for (const auto& run : running_) {
            const ChildProcess& child = *run->child;
            until = std::min(until, run->deadline);
            for (const int fd : {child.handle(), child.console.get(), child.errors.get(), child.result.get()})
                events.push_back({fd, POLLIN, 0});
            events.push_back({run->to_send.empty() ? -1 : child.input.get(), POLLOUT, 0});
        }
        const auto left = std::chrono::ceil<milliseconds>(until - now).count();
        constexpr std::int64_t most = 3'600'000;
        (void)::poll(events.data(), events.size(), static_cast<int>(std::clamp<std::int64_t>(left, 0, most)));
        if ((events[0].revents & POLLIN) != 0)
            interrupt();

        std::size_t at = 1;
        for (auto& run : running_) {
            constexpr std::size_t each = 5;
            const std::span<const pollfd> own = std::span(events).subspan(at, each);
            at += each;
            if (std::ranges::any_of(own.subspan(1), [](const pollfd& event) { return event.revents != 0; }))
                attend(*run, false);
            if (own[0].revents != 0) {
                end(*run);
                run.reset();
                continue;
            }
            if (run->watch.forbidden())
                ask_to_end(*run, RunFacts::EndedFor::forbidden_pattern);
            if (Clock::now() >= run->deadline)
                overrun(*run);
        }
        std::erase(running_, nullptr);
    }

    /// Takes in what is there, at most a little of each at a time unless it is the `last` time: guests that
    /// print without end must not keep the runner from the others.
    static void attend(Run& run, bool last) {
        ChildProcess& child = *run.child;
        const auto drain = [last](File& file, const auto& take) {
            std::array<char, 65536> buffer{};
            while (file.get() >= 0) {
                const ssize_t got = ::read(file.get(), buffer.data(), buffer.size());
                if (got > 0)
                    take(std::string_view(buffer.data(), static_cast<std::size_t>(got)));
                else if (got == 0 || (errno != EAGAIN && errno != EINTR))
                    file = File();
                if (got < 0 || !last)
                    return;
            }
        };
        drain(child.console, [&](std::string_view text) {
            run.console.add(text);
            run.to_send += run.watch.add(text);
        });
        drain(child.errors, [&](std::string_view text) { run.errors.add(text); });
        drain(child.result, [&](std::string_view text) {
            run.facts.result +=
                text.substr(0, longest_result - std::min(longest_result, run.facts.result.size()));
        });
        while (!run.to_send.empty() && child.input.get() >= 0) {
            const ssize_t sent = ::write(child.input.get(), run.to_send.data(), run.to_send.size());
            if (sent > 0)
                run.to_send.erase(0, static_cast<std::size_t>(sent));
            else if (sent < 0 && errno == EPIPE)
                child.input = File(); // what is not sent stays to be told
            else
                break;
        }
    }

    void ask_to_end(Run& run, RunFacts::EndedFor why) const {
        if (run.facts.ended_for != RunFacts::EndedFor::nothing)
            return;
        run.facts.ended_for = why;
        run.child->send_signal(SIGTERM);
        run.deadline = Clock::now() + config_.end_grace;
    }

    static void overrun(Run& run) {
        if (run.facts.ended_for == RunFacts::EndedFor::nothing)
            run.facts.ended_for = RunFacts::EndedFor::overrun;
        run.child->send_signal(SIGKILL);
        run.deadline = Clock::time_point::max();
    }

    void interrupt() {
        while (signals_.take()) {
            for (const auto& run : running_) {
                if (summary_.interrupted)
                    run->child->send_signal(SIGKILL);
                ask_to_end(*run, RunFacts::EndedFor::interrupt);
            }
            summary_.interrupted = true;
        }
    }

    /// The process has ended.
    void end(Run& run) {
        attend(run, true);
        const auto wall = Clock::now() - run.begun;
        const ChildEnd ended = run.child->reap();
        memory_used_ -= run.memory;
        run.watch.finish();
        RunFacts& facts = run.facts;
        facts.exit_code = ended.exit_code;
        facts.signal = ended.signal;
        facts.errors = run.errors.text();
        facts.required_found = run.watch.required_found();
        facts.exchanges_met = run.watch.exchanges_met();
        facts.all_sent = run.to_send.empty();
        facts.forbidden = run.watch.forbidden();
        facts.required_near_miss = run.watch.required_near_miss();
        facts.exchange_near_miss = run.watch.exchange_near_miss();

        CaseResult result = new_result(run.test, run.attempt);
        result.start = std::chrono::duration_cast<milliseconds>(run.begun - begun_);
        result.wall = std::chrono::duration_cast<std::chrono::microseconds>(wall);
        result.console = run.console.text();
        result.console_bytes = run.console.bytes();
        judge(facts, !run.test.hosts.empty(), result);
        keep(run, result);
        tell(result);
    }

    void tell(const CaseResult& result) {
        switch (result.verdict) {
        case CaseVerdict::passed:
            ++summary_.passed;
            break;
        case CaseVerdict::failed:
            ++summary_.failed;
            break;
        case CaseVerdict::skipped:
            ++summary_.skipped;
            break;
        case CaseVerdict::not_run:
            ++summary_.not_run;
            break;
        }
        for (ResultSink* const sink : sinks_)
            sink->ended(result);
    }

    // --- What is kept

    void warn(const std::string& text) {
        if (!std::exchange(warned_, true) && config_.warn)
            config_.warn(text);
    }

    bool make_folder(const fs::path& folder) {
        std::error_code error;
        fs::create_directories(folder, error);
        if (error)
            warn(fmt::format("results cannot be kept in '{}': {}", folder.string(), error.message()));
        return !error;
    }

    void prepare_output() {
        if (config_.output.empty())
            return;
        if (!make_folder(config_.output))
            return;
        std::error_code error;
        std::vector<fs::path> old;
        const std::set<std::string> own(folders_.begin(), folders_.end());
        for (fs::directory_iterator at(config_.output, error), end; !error && at != end;
             at.increment(error)) {
            const std::string name = at->path().filename();
            if (own.contains(name.substr(0, name.rfind(attempt_mark))))
                old.push_back(at->path());
        }
        std::ranges::for_each(old, remove_results);
    }

    /// Absolute, or empty.
    [[nodiscard]] fs::path folder_of(const Run& run) const {
        std::string name = folders_[run.index];
        if (config_.until_failure || config_.repeat != 1)
            name += fmt::format("{}{}", attempt_mark, run.attempt);
        return fs::path(folder_) / config_.output / name;
    }

    /// What the guest's run writes itself. Where that cannot be, the run goes without it.
    void add_kept_files(Run& run, std::vector<std::string>& arguments) {
        if (config_.output.empty() || (!config_.trace && !config_.core))
            return;
        const fs::path folder = folder_of(run);
        if (!make_folder(folder))
            return;
        run.folder = folder;
        if (config_.trace) {
            const std::string file = folder / case_files::trace;
            if (const auto problem = replace_file(file, ""))
                return warn(*problem);
            arguments.push_back("--trace=" + file);
        }
        if (config_.core)
            arguments.push_back("--core-on-failure=" + (folder / case_files::core).string());
    }

    void keep(Run& run, CaseResult& result) {
        const bool wanted = result.verdict == CaseVerdict::failed ||
                            (config_.keep_passed && result.verdict == CaseVerdict::passed);
        if (!wanted || config_.output.empty()) {
            if (!run.folder.empty())
                remove_results(run.folder);
            return;
        }
        const fs::path folder = folder_of(run);
        if (!make_folder(folder))
            return;
        result.folder = folder;
        std::error_code error;
        const bool core = fs::exists(folder / case_files::core, error);
        struct Part {
            const char* name;
            std::string contents;
            mode_t mode;
        };
        constexpr mode_t file = 0, script = 0755;
        const std::array<Part, 5> parts{{
            {case_files::console, result.console, file},
            {case_files::errors, run.facts.errors, file},
            {case_files::rerun, rerun_script(run.test, program_, folder_), script},
            {case_files::debug, debug_script(run.test, program_, folder_, core), script},
            {case_files::result, result_json(result) + "\n", file},
        }};
        for (const Part& part : parts) {
            const std::string path = folder / part.name;
            if (const auto problem = replace_file(path, part.contents)) {
                warn(*problem);
                continue;
            }
            if (part.mode != file)
                (void)::chmod(path.c_str(), part.mode);
        }
        if (const auto problem = unwritten_file(run.facts.errors))
            warn(*problem);
    }

    const std::vector<TestCase>& cases_;
    const RunnerConfig& config_;
    std::span<ResultSink* const> sinks_;
    std::vector<std::string> folders_; ///< the cases' names of folders
    std::size_t jobs_;
    std::uint64_t memory_, memory_used_ = 0;
    std::vector<std::string> traits_;
    std::string program_, folder_; ///< for scripts; absolute
    const Clock::time_point begun_ = Clock::now();
    EndingSignals signals_;

    std::size_t next_ = 0; ///< of cases_
    unsigned attempt_ = 1;
    bool started_in_round_ = false, idle_round_ = false; ///< in which nothing could run
    std::vector<std::unique_ptr<Run>> running_;
    bool warned_ = false;
    RunSummary summary_;
};

} // namespace

std::vector<std::string> find_host_traits() {
    try {
        const HostTraits traits = probe_traits(Kvm());
        // Under KVM's nested paging it is the CPU that walks the native engine's tables; under its shadow
        // paging it is KVM, which then injects page faults. Of QEMU's emulation, either has a fault.
        const std::array<bool, host_trait_names.size()> has{traits.native_ring0,
                                                            traits.iopl_honoured,
                                                            traits.cpuid_intercepted,
                                                            traits.stores_seen,
                                                            traits.own_gdt,
                                                            traits.exact_cpu,
                                                            traits.exact_cpu || !traits.stores_seen,
                                                            traits.exact_cpu || traits.stores_seen};
        std::vector<std::string> names;
        for (std::size_t i = 0; i < has.size(); ++i)
            if (has.at(i))
                names.emplace_back(host_trait_names.at(i));
        return names;
    } catch (const StartupError&) { // nor will it run any case, which says so
        return {};
    }
}

RunSummary run_cases(const std::vector<TestCase>& cases, const RunnerConfig& config,
                     std::span<ResultSink* const> sinks) {
    return Runner(cases, config, sinks).run();
}

} // namespace umbra
