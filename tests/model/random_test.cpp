// Random programs on the reference model and on the real thing.
//
// UMBRA_MODEL_ACCESSES   accesses for each paging mode (default 1000000)
// UMBRA_MODEL_SEED       only the program with this seed; without it, seeds count from 1
// UMBRA_MODEL_FIRST      or from here
#include "tests/model/generator.hpp"
#include "tests/model/runner.hpp"

#include <array>
#include <atomic>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <string>
#include <type_traits>

#include <fmt/core.h>
#include <gtest/gtest-spi.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

namespace umbra::model {
namespace {

constexpr unsigned steps = 3000; ///< of one program

std::optional<std::uint64_t> number_from(const char* variable) {
    const char* const value = std::getenv(variable);
    return value != nullptr ? std::optional(std::strtoull(value, nullptr, 0)) : std::nullopt;
}

/// What was running when the process dies.
std::atomic<std::uint64_t> running_seed = 0;
static_assert(std::atomic<std::uint64_t>::is_always_lock_free, "read by a signal handler");

extern "C" void tell_seed(int signal) {
    char text[] = "while running the program of UMBRA_MODEL_SEED=00000000000000000000\n";
    char* digit = text + sizeof(text) - 3;
    for (std::uint64_t seed = running_seed; seed != 0; seed /= 10)
        *digit-- = static_cast<char>('0' + seed % 10);
    (void)!write(STDERR_FILENO, text, sizeof(text) - 1);
    std::signal(signal, SIG_DFL);
    (void)std::raise(signal);
}

/// What guests do: everything; what the shadow MMU offers; the same, under a TlbSanitizer.
enum class Guests : std::uint8_t { all, shadowed, sanitized };

struct Totals {
    std::uint64_t accesses = 0, stale_hits = 0, stale_reports = 0;
    MmuCounters counters;
};

void add(Totals& totals, const Runner& runner) {
    totals.accesses += runner.accesses();
    totals.stale_hits += runner.stale_hits();
    totals.stale_reports += runner.stale_reports();
    const MmuCounters* const counters = runner.machine().counters();
    if (counters == nullptr)
        return;
    MmuCounters& sum = totals.counters;
    sum.fills += counters->fills;
    sum.guest_faults += counters->guest_faults;
    sum.upgrades += counters->upgrades;
    sum.tables_reused += counters->tables_reused;
    sum.tables_recycled += counters->tables_recycled;
    sum.tables_protected += counters->tables_protected;
    sum.table_writes += counters->table_writes;
    sum.prefetched += counters->prefetched;
    sum.splits += counters->splits;
    sum.slot_moves += counters->slot_moves;
}

/// Makes up the program of a seed as it runs. `started` is called before each operation.
template<class Started>
std::optional<std::string> run_generated(Generator& generator, const MachineMaker& make_machine,
                                         Totals& totals, Started&& started) {
    ::testing::TestPartResultArray results;
    const ::testing::ScopedFakeTestPartResultReporter intercept(
        ::testing::ScopedFakeTestPartResultReporter::INTERCEPT_ONLY_CURRENT_THREAD, &results);
    Runner runner(generator.setup(), make_machine);
    std::optional<std::string> wrong;
    for (unsigned step = 0; step < steps && !wrong; ++step) {
        const Operation operation = generator.next(runner.reference());
        started(operation);
        wrong = runner.execute(operation);
        if (!wrong && step % 256 == 255)
            wrong = runner.check_everything();
        if (!wrong && results.size() > 0)
            wrong = results.GetTestPartResult(0).message();
    }
    if (!wrong)
        wrong = runner.check_everything();
    add(totals, runner);
    return wrong;
}

/// Fails with the shortest part of the program that does.
void report(const Setup& setup, std::uint64_t seed, const std::vector<Operation>& program,
            const std::string& wrong, const Run& run) {
    const std::vector<Operation> shortest = shrink(program, run);
    const auto failure = run(shortest);
    FAIL() << wrong << "\nafter " << program.size() << " operations; again with UMBRA_MODEL_SEED=" << seed
           << "\n\n"
           << text(setup) << '\n'
           << text(shortest)
           << (failure ? failure->what : "(of the whole program only; it depends on when all is compared)");
}

void run_seed(Mode mode, std::uint64_t seed, const MachineMaker& make_machine, Guests guests,
              Totals& totals) {
    running_seed = seed;
    Generator generator(mode, seed, guests != Guests::all, guests == Guests::sanitized);
    std::vector<Operation> program;
    const auto wrong = run_generated(generator, make_machine, totals,
                                     [&](const Operation& operation) { program.push_back(operation); });
    if (wrong) {
        report(generator.setup(), seed, program, *wrong, [&](const std::vector<Operation>& candidate) {
            return run(generator.setup(), candidate, make_machine);
        });
    }
}

/// In a process of its own, which tells its operations by a pipe: for programs that crash.
void run_seed_apart(Mode mode, std::uint64_t seed, const MachineMaker& make_machine, Guests guests) {
    Generator generator(mode, seed, guests != Guests::all, guests == Guests::sanitized);
    std::array<int, 2> ends{};
    ASSERT_EQ(pipe(ends.data()), 0);
    const pid_t child = fork();
    if (child == 0) {
        static_assert(std::is_trivially_copyable_v<Operation>);
        Totals totals;
        (void)run_generated(generator, make_machine, totals, [&](const Operation& operation) {
            (void)!write(ends[1], &operation, sizeof(operation));
        });
        _exit(0);
    }
    close(ends[1]);
    std::vector<Operation> program;
    std::array<std::byte, sizeof(Operation)> bytes{};
    for (std::size_t filled = 0;;) {
        const ssize_t got = read(ends[0], bytes.data() + filled, bytes.size() - filled);
        if (got <= 0)
            break;
        filled += static_cast<std::size_t>(got);
        if (filled == bytes.size()) {
            std::memcpy(&program.emplace_back(), bytes.data(), bytes.size());
            filled = 0;
        }
    }
    close(ends[0]);
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    if (!WIFSIGNALED(status))
        return;
    report(generator.setup(), seed, program, fmt::format("dies of signal {}", WTERMSIG(status)),
           [&](const std::vector<Operation>& candidate) {
               return run_apart(generator.setup(), candidate, make_machine);
           });
}

void run_all(Mode mode, const MachineMaker& make_machine, Guests guests, Totals& totals) {
    for (const int signal : {SIGSEGV, SIGABRT, SIGBUS, SIGILL})
        std::signal(signal, tell_seed);
    if (const auto seed = number_from("UMBRA_MODEL_SEED")) {
        run_seed_apart(mode, *seed, make_machine, guests);
        if (!::testing::Test::HasFailure())
            run_seed(mode, *seed, make_machine, guests, totals);
        return;
    }
    const std::uint64_t accesses = number_from("UMBRA_MODEL_ACCESSES").value_or(1'000'000);
    const std::uint64_t first = number_from("UMBRA_MODEL_FIRST").value_or(1);
    std::uint64_t seed = first;
    for (; totals.accesses < accesses && !::testing::Test::HasFailure(); ++seed)
        run_seed(mode, seed, make_machine, guests, totals);
    std::cout << "[ programs ] seeds " << first << " to " << seed - 1 << ", " << totals.accesses
              << " accesses, " << totals.stale_hits << " by old translations\n";
}

struct ModeName {
    Mode mode;
    const char* name;
};
std::string name_of(const ::testing::TestParamInfo<ModeName>& tested) {
    return tested.param.name;
}

class RandomPrograms : public ::testing::TestWithParam<ModeName> {};

TEST_P(RandomPrograms, TheShadowMmuIsACpu) {
    Totals totals;
    run_all(GetParam().mode, make_shadow_machine, Guests::shadowed, totals);
    if (HasFailure() || totals.accesses < 200'000)
        return;
    // The guests have been everywhere.
    const MmuCounters& counters = totals.counters;
    EXPECT_GT(counters.fills, totals.accesses / 50);
    if (GetParam().mode == Mode::off)
        return;
    EXPECT_GT(totals.stale_hits, totals.accesses / 500) << "old translations were used before their flush";
    EXPECT_GT(counters.guest_faults, totals.accesses / 50);
    EXPECT_GT(counters.upgrades, 1'000U);
    EXPECT_GT(counters.tables_reused, 1'000U);
    EXPECT_GT(counters.tables_recycled, 1'000U);
    EXPECT_GT(counters.tables_protected, 1'000U);
    EXPECT_GT(counters.table_writes, 1'000U);
    EXPECT_GT(counters.prefetched, 1'000U);
    EXPECT_GT(counters.splits, 5U);
    if (GetParam().mode == Mode::four_level) {
        EXPECT_GT(counters.slot_moves, 10U);
    }
}

/// Programs that once went wrong.
TEST(KnownPrograms, AreRight) {
    Totals totals;
    // PDPTE registers changed while no root led to the table that was made from them.
    run_seed(Mode::pae, 4432, make_shadow_machine, Guests::shadowed, totals);
    // A table changed after INVLPG had had it compared for another root than the one that relied on it next.
    run_seed(Mode::four_level, 25526, make_shadow_machine, Guests::shadowed, totals);
}

INSTANTIATE_TEST_SUITE_P(Modes, RandomPrograms,
                         ::testing::Values(ModeName{Mode::four_level, "FourLevel"},
                                           ModeName{Mode::pae, "Pae"}, ModeName{Mode::legacy, "Legacy"},
                                           ModeName{Mode::off, "Off"}),
                         name_of);

class SanitizedPrograms : public ::testing::TestWithParam<ModeName> {};

/// What the sanitizer reports a CPU may do; what it is told to keep, too; and it misses none that the machine
/// does.
TEST_P(SanitizedPrograms, TheSanitizerInventsNothing) {
    Totals totals;
    run_all(GetParam().mode, make_shadow_machine, Guests::sanitized, totals);
    if (!HasFailure() && totals.accesses >= 200'000) {
        EXPECT_GT(totals.stale_reports, totals.accesses / 500);
        EXPECT_GT(totals.stale_hits, totals.accesses / 500);
    }
}

INSTANTIATE_TEST_SUITE_P(Modes, SanitizedPrograms,
                         ::testing::Values(ModeName{Mode::four_level, "FourLevel"},
                                           ModeName{Mode::pae, "Pae"}, ModeName{Mode::legacy, "Legacy"}),
                         name_of);

class RandomWalks : public ::testing::TestWithParam<ModeName> {};

/// The walker alone; also what the shadow MMU does not offer.
TEST_P(RandomWalks, TheWalkerIsACpu) {
    Totals totals;
    run_all(GetParam().mode, make_walker_machine, Guests::all, totals);
}

INSTANTIATE_TEST_SUITE_P(Modes, RandomWalks,
                         ::testing::Values(ModeName{Mode::five_level, "FiveLevel"},
                                           ModeName{Mode::four_level, "FourLevel"},
                                           ModeName{Mode::pae, "Pae"}, ModeName{Mode::legacy, "Legacy"}),
                         name_of);

} // namespace
} // namespace umbra::model
