// `umbra run` of the hello guest from fork to exit, against a KVM program that does next to nothing.

#include "tests/bench/result.hpp"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <string>

namespace umbra::bench {
namespace {

constexpr unsigned runs = 30;

struct Process {
    double nanoseconds = 0;
    double resident_bytes = 0; ///< at most, at one time
};

/// Runs a program to its end, its output discarded; nothing unless it ends with 0.
std::optional<Process> run(std::vector<std::string> command) {
    std::vector<char*> arguments;
    arguments.reserve(command.size() + 1);
    for (std::string& argument : command)
        arguments.push_back(argument.data());
    arguments.push_back(nullptr);
    const auto start = std::chrono::steady_clock::now();
    // Not vfork or posix_spawn: the kernel would count this process's own memory as the child's.
    const pid_t child = ::fork();
    if (child == 0) {
        const int null = ::open("/dev/null", O_RDWR | O_CLOEXEC);
        for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO})
            (void)::dup2(null, fd);
        ::execv(arguments[0], arguments.data());
        ::_exit(127);
    }
    int status = 0;
    rusage usage{};
    if (child < 0 || ::wait4(child, &status, 0, &usage) != child || status != 0)
        return std::nullopt;
    const std::chrono::duration<double, std::nano> time = std::chrono::steady_clock::now() - start;
    return Process{time.count(), static_cast<double>(usage.ru_maxrss) * 1024};
}

struct Startup {
    std::vector<double> times, sizes, bare_times, bare_sizes;
};

std::optional<Startup> start_programs() {
    const std::filesystem::path build = std::filesystem::read_symlink("/proc/self/exe").parent_path();
    Startup startup;
    for (unsigned i = 0; i < runs; ++i) {
        const auto umbra = run({build / "umbra", "run", build / "guest/hello"});
        const auto bare = run({build / "umbra_bench_bare"});
        if (!umbra || !bare)
            return std::nullopt;
        startup.times.push_back(umbra->nanoseconds);
        startup.sizes.push_back(umbra->resident_bytes);
        startup.bare_times.push_back(bare->nanoseconds);
        startup.bare_sizes.push_back(bare->resident_bytes);
    }
    return startup;
}

/// Made once, by the first benchmark that asks.
const std::optional<Startup>& startup() {
    static const std::optional<Startup> made = start_programs();
    return made;
}

void compare(benchmark::State& state, Unit unit, std::vector<double> Startup::*of_umbra,
             std::vector<double> Startup::*of_bare, double most) {
    for ([[maybe_unused]] auto _ : state)
        benchmark::DoNotOptimize(startup());
    if (!startup())
        return state.SkipWithError("umbra, guest/hello or umbra_bench_bare, beside this program, failed");
    const double measured = median(*startup().*of_umbra), baseline = median(*startup().*of_bare);
    const Goal goal{.of = Goal::Of::measured, .bound = Goal::Bound::at_most, .value = most};
    report(state, {unit, measured, baseline, measured / baseline, goal});
}

} // namespace

void startup_time(benchmark::State& state) {
    constexpr double most = 15e6;
    compare(state, Unit::nanoseconds, &Startup::times, &Startup::bare_times, most);
}

void startup_resident(benchmark::State& state) {
    constexpr double most = 20e6;
    compare(state, Unit::bytes, &Startup::sizes, &Startup::bare_sizes, most);
}

} // namespace umbra::bench
