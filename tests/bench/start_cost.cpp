// Tells what a command costs from its start to its exit: the time for which its process has had the CPU, in
// nanoseconds, which are instructions where the clock counts those. What it waits for is left out: much of
// that ends with a timer tick of the host, and would hide small changes.
//
//   umbra_bench_start TIMES COMMAND [ARGUMENTS]
//
// After the commands' own output: "costs: start: 1 in T ticks", T the median of so many starts. Exits with 1
// if one fails, with 2 for bad usage.
#include <sys/personality.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <optional>
#include <vector>

namespace {

/// What one start costs; nothing if the command fails.
std::optional<std::uint64_t> start(char** command) {
    const pid_t child = ::fork();
    if (child < 0)
        return std::nullopt;
    if (child == 0) {
        ::personality(ADDR_NO_RANDOMIZE); // other addresses take more or fewer page tables
        ::execv(*command, command);
        ::_exit(127);
    }
    siginfo_t ended{};
    clockid_t clock{};
    timespec time{};
    // The process has ended, but keeps its clock until it is waited for once more.
    const bool known = ::waitid(P_PID, static_cast<id_t>(child), &ended, WEXITED | WNOWAIT) == 0 &&
                       ::clock_getcpuclockid(child, &clock) == 0 && ::clock_gettime(clock, &time) == 0;
    int status = 0;
    if (::waitpid(child, &status, 0) != child || status != 0 || !known)
        return std::nullopt;
    return static_cast<std::uint64_t>(time.tv_sec) * 1'000'000'000 + static_cast<std::uint64_t>(time.tv_nsec);
}

} // namespace

int main(int count, char** arguments) {
    const std::size_t times = count < 3 ? 0 : std::strtoul(arguments[1], nullptr, 10);
    if (times == 0) {
        std::fputs("usage: umbra_bench_start TIMES COMMAND [ARGUMENTS]\n", stderr);
        return 2;
    }
    std::vector<std::uint64_t> costs;
    while (costs.size() < times) {
        const auto cost = start(arguments + 2);
        if (!cost) {
            std::fprintf(stderr, "umbra_bench_start: %s failed\n", arguments[2]);
            return 1;
        }
        costs.push_back(*cost);
    }
    const auto middle = costs.begin() + static_cast<std::ptrdiff_t>(times / 2);
    std::nth_element(costs.begin(), middle, costs.end());
    std::printf("costs: start: 1 in %llu ticks\n", static_cast<unsigned long long>(*middle));
    return 0;
}
