// The /init of a Linux that is measured: what single operations cost its programs, by the TSC, in the lines
// of guest/costs.cpp. Words of the kernel's command line: NAME=BATCHES, to measure this operation. Static,
// and without what a C++ library would do at its start: each exec starts it once more.
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <x86intrin.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr std::size_t most_batches = 256;
constexpr std::size_t warm_ups = 8; // batches before those that count
constexpr char self[] = "/init";

/// Without a power-off, which would mean that all went well.
[[noreturn]] void fail(const char* what) {
    std::perror(what);
    std::fflush(stderr);
    ::reboot(RB_AUTOBOOT);
    std::abort();
}

int must(int result, const char* what) {
    if (result < 0)
        fail(what);
    return result;
}

/// Runs batches of so many repetitions, of which the median counts: batches that are short against the time
/// between two ticks of the kernel's timer, so that in most of them there is none.
template<class Action>
void measure(const char* name, std::size_t batches, unsigned repetitions, Action action) {
    std::array<std::uint64_t, warm_ups + most_batches> ticks{};
    for (std::size_t batch = 0; batch < warm_ups + batches; ++batch) {
        const std::uint64_t start = __rdtsc();
        for (unsigned i = 0; i < repetitions; ++i)
            action();
        ticks[batch] = __rdtsc() - start;
    }
    const auto first = ticks.begin() + warm_ups, middle = first + static_cast<std::ptrdiff_t>(batches / 2);
    std::nth_element(first, middle, first + static_cast<std::ptrdiff_t>(batches));
    std::printf("costs: %s: %u in %llu ticks\n", name, repetitions, static_cast<unsigned long long>(*middle));
}

void getpid(const char* name, std::size_t batches) {
    measure(name, batches, 64, [] { (void)::syscall(SYS_getpid); });
}

/// First writes to pages that the kernel has yet to find memory for; they stay, for giving them back costs,
/// too.
void page_touch(const char* name, std::size_t batches) {
    constexpr unsigned repetitions = 16;
    constexpr std::size_t page = 4096;
    const std::size_t bytes = (warm_ups + batches) * repetitions * page;
    void* const mapped = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED)
        fail("mmap");
    (void)::madvise(mapped, bytes, MADV_NOHUGEPAGE); // fails where no kernel has them
    auto* next = static_cast<volatile char*>(mapped);
    measure(name, batches, repetitions, [&next] {
        *next = 1;
        next += page;
    });
}

/// A byte to another process and back.
void pipe_round_trip(const char* name, std::size_t batches) {
    std::array<int, 2> there{}, back{};
    must(::pipe(there.data()), "pipe");
    must(::pipe(back.data()), "pipe");
    const pid_t child = must(::fork(), "fork");
    char byte = 0;
    if (child == 0) {
        ::close(there[1]);
        while (::read(there[0], &byte, 1) == 1 && ::write(back[1], &byte, 1) == 1) {
        }
        ::_exit(0);
    }
    measure(name, batches, 4, [&] {
        if (::write(there[1], &byte, 1) != 1 || ::read(back[0], &byte, 1) != 1)
            fail("pipe round trip");
    });
    ::close(there[1]);
    must(::waitpid(child, nullptr, 0), "waitpid");
}

template<class Child>
void fork_and_wait(Child child) {
    const pid_t process = must(::fork(), "fork");
    if (process == 0) {
        child();
        ::_exit(1);
    }
    int status = 0;
    must(::waitpid(process, &status, 0), "waitpid");
    if (status != 0)
        fail("a child failed");
}

void fork(const char* name, std::size_t batches) {
    measure(name, batches, 1, [] { fork_and_wait([] { ::_exit(0); }); });
}

void fork_exec(const char* name, std::size_t batches) {
    measure(name, batches, 1, [] { fork_and_wait([] { ::execl(self, self, "exit", nullptr); }); });
}

struct Operation {
    const char* name;
    void (*run)(const char* name, std::size_t batches);
};
constexpr std::array<Operation, 5> operations{{
    {"getpid", getpid},
    {"pipe-round-trip", pipe_round_trip},
    {"fork", fork},
    {"fork-exec", fork_exec},
    {"page-touch", page_touch}, // last: what it has mapped, a fork would copy
}};

} // namespace

int main(int count, char** arguments) {
    if (count == 2 && std::strcmp(arguments[1], "exit") == 0)
        return 0;
    std::puts("costs: init");
    std::fflush(stdout);
    for (const Operation& operation : operations) {
        const char* const word =
            std::getenv(operation.name); // the kernel makes variables of words that it does not know
        const std::size_t batches = word != nullptr ? std::strtoul(word, nullptr, 10) : 0;
        if (batches > most_batches)
            fail(word);
        if (batches != 0)
            operation.run(operation.name, batches);
    }
    std::puts("costs: passed");
    std::fflush(stdout);
    ::reboot(RB_POWER_OFF);
    fail("power-off");
}
