// `umbra test`: what it adds to each `umbra run`, starts of guests against starts of QEMU, and the memory of
// many guests at once.
//
// Both sides of a comparison take turns, so that what else the machine does hits both. UMBRA_BENCH_STARTS
// says how many guests are started where that matters (100).

#include "tests/bench/result.hpp"
#include "vmm/kvm/file.hpp"

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>

#include <fmt/core.h>

namespace umbra::bench {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;
using Command = std::vector<std::string>;
using std::chrono::milliseconds;
using std::chrono::seconds;

/// A folder of its own, for as long as this lives.
class Scratch {
  public:
    Scratch() {
        std::string name = fs::temp_directory_path() / "umbra-bench.XXXXXX";
        if (::mkdtemp(name.data()) == nullptr)
            throw std::system_error(errno, std::generic_category(), name);
        path_ = name;
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    Scratch(Scratch&&) = delete;
    Scratch& operator=(Scratch&&) = delete;
    ~Scratch() {
        std::error_code ignored;
        fs::remove_all(path_, ignored);
    }
    [[nodiscard]] std::string file(const std::string& name) const { return path_ / name; }

  private:
    fs::path path_;
};

/// What is built beside this program.
std::string built(const std::string& name) {
    return fs::read_symlink("/proc/self/exe").parent_path() / name;
}

// --- Processes

constexpr int not_ended_well = -1;

/// A program whose output goes to `output`; killed and waited for at the latest when this goes.
class Process {
  public:
    /// With pid() < 0 if it cannot be started.
    explicit Process(const Command& command, const std::string& output = "/dev/null") {
        std::vector<char*> arguments;
        arguments.reserve(command.size() + 1);
        for (const std::string& argument : command)
            arguments.push_back(const_cast<char*>(argument.c_str()));
        arguments.push_back(nullptr);
        posix_spawn_file_actions_t files;
        ::posix_spawn_file_actions_init(&files);
        ::posix_spawn_file_actions_addopen(&files, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
        ::posix_spawn_file_actions_addopen(&files, STDOUT_FILENO, output.c_str(),
                                           O_WRONLY | O_CREAT | O_TRUNC, 0600);
        ::posix_spawn_file_actions_addopen(&files, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
        if (::posix_spawnp(&pid_, arguments[0], &files, nullptr, arguments.data(), environ) != 0)
            pid_ = -1;
        ::posix_spawn_file_actions_destroy(&files);
    }
    Process(const Process&) = delete;
    Process& operator=(const Process&) = delete;
    Process(Process&& other) noexcept : pid_(std::exchange(other.pid_, -1)) {}
    Process& operator=(Process&&) = delete;
    ~Process() {
        send(SIGKILL);
        (void)wait();
    }
    [[nodiscard]] pid_t pid() const { return pid_; }
    void send(int signal) const {
        if (pid_ > 0)
            (void)::kill(pid_, signal);
    }
    /// Its exit code.
    int wait() {
        int status = 0;
        const pid_t pid = std::exchange(pid_, -1);
        if (pid < 0 || ::waitpid(pid, &status, 0) != pid || !WIFEXITED(status))
            return not_ended_well;
        return WEXITSTATUS(status);
    }
    /// The same, when it ends within `limit`.
    int wait(seconds limit) {
        if (pid_ < 0)
            return not_ended_well;
        const File handle(static_cast<int>(::syscall(SYS_pidfd_open, pid_, 0)));
        pollfd ended{handle.get(), POLLIN, 0};
        if (::poll(&ended, 1, static_cast<int>(milliseconds(limit).count())) != 1)
            send(SIGKILL);
        return wait();
    }

  private:
    pid_t pid_ = -1;
};

double since(Clock::time_point start) {
    return std::chrono::duration<double, std::nano>(Clock::now() - start).count();
}

/// Runs `command` so often, `at_once` at a time; nanoseconds in all. Nothing unless all exit with `code`.
std::optional<double> run_all(const Command& command, unsigned times, unsigned at_once, int code) {
    const auto start = Clock::now();
    std::atomic<unsigned> begun = 0;
    std::atomic<bool> well = true;
    const auto run_some = [&] {
        while (well && begun++ < times)
            if (Process(command).wait() != code)
                well = false;
    };
    {
        std::vector<std::jthread> others;
        for (unsigned i = 1; i < at_once; ++i)
            others.emplace_back(run_some);
        run_some();
    }
    return well ? std::optional(since(start)) : std::nullopt;
}

/// Nanoseconds that the children which have been waited for, and theirs, have had of processors.
double processor_time() {
    rusage usage{};
    (void)::getrusage(RUSAGE_CHILDREN, &usage);
    const auto nanoseconds = [](const timeval& time) {
        return static_cast<double>(time.tv_sec) * 1e9 + static_cast<double>(time.tv_usec) * 1e3;
    };
    return nanoseconds(usage.ru_utime) + nanoseconds(usage.ru_stime);
}

/// What guests take, each, in nanoseconds.
struct Samples {
    std::vector<double> times, processor;

    /// By running `command` so often for so many guests; false unless all pass.
    bool add(const Command& command, unsigned times_run, unsigned guests) {
        const double before = processor_time();
        const auto time = run_all(command, times_run, 1, 0);
        if (!time)
            return false;
        times.push_back(*time / guests);
        processor.push_back((processor_time() - before) / guests);
        return true;
    }
};

/// Of samples that the rest of the machine can only have made larger.
double lower_quartile(std::vector<double> samples) {
    const auto at = samples.begin() + static_cast<std::ptrdiff_t>(samples.size() / 4);
    std::ranges::nth_element(samples, at);
    return *at;
}

std::string contents(const std::string& path) {
    std::ifstream file(path);
    return {std::istreambuf_iterator<char>(file), {}};
}

/// What `command` prints, if it exits with `code` in time.
std::optional<std::string> output_of(const Command& command, int code, const Scratch& scratch) {
    constexpr seconds limit{30};
    const std::string file = scratch.file("output");
    if (Process(command, file).wait(limit) != code)
        return std::nullopt;
    return contents(file);
}

// --- Commands

constexpr unsigned memory_mb = 64;

/// The same kernel for everybody who boots multiboot.
std::string multiboot_kernel() {
    return built("guest/legacy_hello");
}

Command umbra_test(const std::string& cases, unsigned repeat, unsigned at_once, const std::string& output) {
    return {
        built("umbra"),       "test", fmt::format("--repeat={}", repeat), fmt::format("--jobs={}", at_once),
        "--output=" + output, cases};
}

/// The kernel as a case, with `append` as its command line.
std::string write_manifest(const Scratch& scratch, const char* append) {
    std::string path = scratch.file("umbra.toml");
    std::ofstream(path) << fmt::format(
        "[[case]]\nname = 'hello'\nkernel = '{}'\nmemory = '{}M'\nappend = '{}'\ntimeout = 600\n",
        multiboot_kernel(), memory_mb, append);
    return path;
}

constexpr int qemu_exit = 1; ///< for a guest that ends by 0

Command qemu(const char* machine, const char* accelerator, const char* append) {
    return {"qemu-system-x86_64",
            "-machine",
            machine,
            "-accel",
            accelerator,
            "-nodefaults",
            "-m",
            fmt::format("{}M", memory_mb),
            "-kernel",
            multiboot_kernel(),
            "-append",
            append,
            "-display",
            "none",
            "-serial",
            "stdio",
            "-no-reboot",
            "-device",
            "isa-debug-exit,iobase=0xf4,iosize=4"};
}

/// How many guests to start; nothing if the environment says what is no such number.
std::optional<unsigned> starts() {
    constexpr unsigned fewest = 10, most = 1'000'000, usual = 100;
    const char* const asked = std::getenv("UMBRA_BENCH_STARTS");
    if (asked == nullptr)
        return usual;
    const std::string_view text(asked);
    unsigned number = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    const bool well = error == std::errc() && end == text.data() + text.size();
    return well && number >= fewest && number <= most ? std::optional(number) : std::nullopt;
}

// --- Memory

std::vector<pid_t> children_of(pid_t pid) {
    std::ifstream file(fmt::format("/proc/{}/task/{}/children", pid, pid));
    return {std::istream_iterator<pid_t>(file), {}};
}

/// Bytes of memory that a process has, its part of what it shares with others: Pss of proc(5).
double proportional_bytes(pid_t pid) {
    std::ifstream file(fmt::format("/proc/{}/smaps_rollup", pid));
    for (std::string line; std::getline(file, line);) {
        constexpr std::string_view field = "Pss:";
        if (line.starts_with(field))
            return std::stod(line.substr(field.size())) * 1024;
    }
    return 0;
}

struct Held {
    double guests = 0, all = 0; ///< bytes, at most at one time
};

/// Watches `guests` until there are `count` that have not grown for seconds; nothing if that does not come.
std::optional<Held> watch(std::size_t count, const std::function<std::vector<pid_t>()>& guests,
                          std::optional<pid_t> runner) {
    constexpr milliseconds interval{200};
    constexpr unsigned quiet_samples = 15;
    constexpr double growth = 1.005;
    const auto limit = Clock::now() + seconds(60);
    Held most;
    for (unsigned quiet = 0; quiet < quiet_samples;) {
        if (Clock::now() > limit)
            return std::nullopt;
        std::this_thread::sleep_for(interval);
        const std::vector<pid_t> pids = guests();
        Held now;
        for (const pid_t pid : pids)
            now.guests += proportional_bytes(pid);
        now.all = now.guests + (runner ? proportional_bytes(*runner) : 0);
        quiet = pids.size() == count && now.all < most.all * growth ? quiet + 1 : 0;
        most = {std::max(most.guests, now.guests), std::max(most.all, now.all)};
    }
    return most;
}

/// So many waiting guests below one `umbra test`.
std::optional<Held> hold_in_umbra(unsigned count, std::size_t text_size) {
    const Scratch scratch;
    const std::string events = scratch.file("events");
    Command command = umbra_test(write_manifest(scratch, "wait"), count, count, "none");
    command.insert(command.end(), {"--memory=64G", "--json=" + events});
    Process runner(command);
    const auto held = watch(
        count, [&] { return children_of(runner.pid()); }, runner.pid());
    runner.send(SIGTERM);
    (void)runner.wait(seconds(30));
    // Each of them had got as far as to wait.
    const std::string told = contents(events), sign = fmt::format("\"console_bytes\":{},", text_size);
    unsigned ready = 0;
    for (std::size_t at = told.find(sign); at != std::string::npos; at = told.find(sign, at + 1))
        ++ready;
    return ready == count ? held : std::nullopt;
}

std::optional<Held> hold_in_qemu(unsigned count, std::size_t text_size) {
    const Scratch scratch;
    const auto output = [&](unsigned number) { return scratch.file(fmt::format("{}", number)); };
    std::vector<Process> all;
    std::vector<pid_t> pids;
    for (unsigned i = 0; i < count; ++i) {
        all.emplace_back(qemu("pc", "tcg", "wait"), output(i));
        if (all.back().pid() < 0)
            return std::nullopt;
        pids.push_back(all.back().pid());
    }
    const auto held = watch(
        count, [&] { return pids; }, std::nullopt);
    for (unsigned i = 0; i < count; ++i)
        if (contents(output(i)).size() != text_size)
            return std::nullopt;
    return held;
}

} // namespace

// Counts the runner's own start, too: a twentieth of it.
void runner_overhead(benchmark::State& state, bool traces) {
    constexpr unsigned pieces = 16, cases = 20;
    const Scratch scratch;
    const std::string kernel = built("guest/hello");
    Command runner = umbra_test(kernel, cases, 1, scratch.file("results"));
    Command direct{built("umbra"),
                   "run",
                   kernel,
                   "--end-stuck",
                   "--timeout=60.000",
                   "--result=" + scratch.file("result")};
    if (traces)
        direct.insert(direct.end(),
                      {"--trace=" + scratch.file("trace"), "--core-on-failure=" + scratch.file("core")});
    else
        runner.insert(runner.end(), {"--no-trace", "--no-core"});

    Samples tested, run;
    for ([[maybe_unused]] auto _ : state)
        for (unsigned i = 0; i < 2 * pieces; ++i) {
            const bool by_runner = (i + 1) / 2 % 2 == 0; // each comes first as often as the other
            if (!(by_runner ? tested.add(runner, 1, cases) : run.add(direct, cases, cases)))
                return state.SkipWithError("umbra, beside this program, does not run guest/hello");
        }
    constexpr Goal goal{.of = Goal::Of::measured, .bound = Goal::Bound::at_most, .value = 2e6};
    const double baseline = lower_quartile(run.times);
    const double measured = lower_quartile(tested.times) - baseline;
    report(state,
           {.measured = measured,
            .baseline = baseline,
            .ratio = measured / baseline,
            .goal = goal,
            .note = fmt::format("{:+.2f} ms of processor time; baseline: umbra run, with the same options",
                                (lower_quartile(tested.processor) - lower_quartile(run.processor)) / 1e6)});
}

void guest_starts(benchmark::State& state, const char* machine, const char* accelerator) {
    const auto count = starts();
    if (!count)
        return state.SkipWithError("UMBRA_BENCH_STARTS is not from 10 to 1000000");
    constexpr unsigned pieces = 10;
    const auto at_once = static_cast<unsigned>(state.range(0));
    const Scratch scratch;
    const std::string manifest = write_manifest(scratch, "");
    const auto text = output_of({built("umbra"), "run", multiboot_kernel(), "--memory=64M"}, 0, scratch);
    if (!text || text->empty())
        return state.SkipWithError("umbra, beside this program, does not run guest/legacy_hello");
    const Command other = qemu(machine, accelerator, "");
    const bool comparable = output_of(other, qemu_exit, scratch) == text;

    double ours = 0, theirs = 0;
    for ([[maybe_unused]] auto _ : state)
        for (unsigned i = 0; i < pieces; ++i) {
            const unsigned piece = *count * (i + 1) / pieces - *count * i / pieces;
            const auto time = run_all(umbra_test(manifest, piece, at_once, "none"), 1, 1, 0);
            const auto baseline =
                comparable ? run_all(other, piece, at_once, qemu_exit) : std::optional<double>(0);
            if (!time || !baseline)
                return state.SkipWithError("a start failed");
            ours += *time;
            theirs += *baseline;
        }
    Result result;
    result.measured = ours;
    result.note = fmt::format("{} starts", *count);
    if (comparable) {
        result.baseline = theirs;
        result.ratio = ours / theirs;
    } else {
        result.note += fmt::format("; QEMU ({}, {}) does not run the kernel here", machine, accelerator);
    }
    report(state, result);
}

void guests_at_once(benchmark::State& state) {
    const auto count = static_cast<unsigned>(state.range(0));
    const Scratch scratch;
    const auto text = output_of({built("umbra"), "run", multiboot_kernel(), "--memory=64M"}, 0, scratch);
    if (!text || text->empty())
        return state.SkipWithError("umbra, beside this program, does not run guest/legacy_hello");
    std::optional<Held> ours, theirs;
    for ([[maybe_unused]] auto _ : state) {
        ours = hold_in_umbra(count, text->size());
        theirs = hold_in_qemu(count, text->size());
    }
    if (!ours)
        return state.SkipWithError("not all guests came as far as to wait");
    Result result;
    result.unit = Unit::bytes;
    result.measured = ours->all;
    result.note = fmt::format("{:.2f} MB a guest of {} MB, the runner {:.1f} MB", ours->guests / count / 1e6,
                              memory_mb, (ours->all - ours->guests) / 1e6);
    if (theirs) {
        result.baseline = theirs->all;
        result.ratio = ours->all / theirs->all;
        result.note += "; baseline: as many of QEMU";
    }
    report(state, result);
}

} // namespace umbra::bench
