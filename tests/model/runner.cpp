#include "tests/model/runner.hpp"

#include <algorithm>
#include <csignal>
#include <cstdio>

#include <fmt/core.h>
#include <gtest/gtest-spi.h>
#include <sys/wait.h>
#include <unistd.h>

namespace umbra::model {

Runner::Runner(const Setup& setup, const MachineMaker& make_machine)
    : machine_(make_machine(setup)), sanitize_(setup.sanitize) {
    Cpu cpu = setup.cpu;
    cpu.pcid = 0;
    reference_.start(cpu); // PAE: with empty memory, which is well-formed
    machine_->start(reference_.cpu());
}

std::optional<std::string> Runner::execute(const Operation& operation) {
    const Cpu before = reference_.cpu();
    const std::uint64_t at = operation.address;
    switch (operation.kind) {
    case Operation::Kind::write: {
        if (!reference_.in_ram(at))
            return std::nullopt;
        const std::uint64_t value = (reference_.load(at) & ~operation.clear) | operation.set;
        reference_.store(at, value);
        machine_->store(at, value);
        return std::nullopt;
    }
    case Operation::Kind::access:
        return access(at, operation.access);
    case Operation::Kind::invlpg:
        reference_.invlpg(at);
        machine_->invlpg(at);
        return std::nullopt;
    case Operation::Kind::load_cr3: {
        const bool loaded = reference_.load_cr3(at, operation.pcid, operation.flag);
        if (before.mode == Mode::pae) {
            const auto pdptes = umbra::load_pdptes(machine_->memory(), at, before.maxphyaddr);
            if (pdptes.has_value() != loaded || (pdptes && *pdptes != reference_.cpu().pdpte))
                return "load_pdptes: not the registers of the model";
        }
        if (loaded)
            machine_->load_cr3(reference_.cpu(), operation.flag && before.pcide);
        return std::nullopt;
    }
    case Operation::Kind::invpcid:
        if (reference_.invpcid(operation.type, operation.pcid, at))
            machine_->invpcid(operation.type, operation.pcid, at);
        return std::nullopt;
    case Operation::Kind::control:
        if (reference_.set_control(operation.cpu))
            machine_->set_control(before, reference_.cpu());
        return std::nullopt;
    case Operation::Kind::mode: {
        Cpu cpu = before;
        cpu.mode = operation.cpu.mode;
        cpu.pse = operation.cpu.pse;
        cpu.root = operation.cpu.root;
        cpu.pcide = false;
        cpu.pcid = 0;
        if (reference_.start(cpu))
            machine_->start(reference_.cpu());
        return std::nullopt;
    }
    case Operation::Kind::trap_user_fetch:
        trap_user_fetch_ = operation.flag;
        machine_->set_trap_user_fetch(operation.flag);
        return std::nullopt;
    }
    return std::nullopt;
}

std::optional<std::string> Runner::access(std::uint64_t at, Access access) {
    ++accesses_;
    const bool trapping = trap_user_fetch_ && access.kind == Kind::fetch && !access.user;
    constexpr unsigned patience = test::FakeMachine::patience;
    for (unsigned misses = 0; misses <= patience; ++misses) {
        if (const auto hit = machine_->lookup(at, access)) {
            const auto wanted = [&](std::uint64_t physical, bool user_page) {
                return Machine::bus(physical) == *hit && !(trapping && user_page);
            };
            // A page hidden by SMAP that SMEP lets the kernel execute can be read when it has been executed.
            const bool execute_only = reference_.cpu().smap && !reference_.cpu().smep && !access.user;
            Access as_if = access;
            as_if.ac |= execute_only && access.kind != Kind::write;
            if (sanitize_ != Sanitize::keep && !reference_.may_have_cached(at, as_if, wanted))
                return fmt::format("reached {:#x}, which no CPU would", *hit);
            const Walk now = reference_.walk(at, access);
            const bool stale = now.error_code || Machine::bus(now.physical) != *hit;
            stale_hits_ += stale ? 1 : 0;
            if (stale && sanitize_ == Sanitize::drop && !execute_only)
                return fmt::format("reached {:#x} by an old translation, unseen by the sanitizer", *hit);
            return std::nullopt;
        }
        const Walk wanted = reference_.walk(at, access);
        const Missed missed = machine_->miss(at, access);
        if (missed.no_slot)
            return "no room for the switcher";
        if (missed.stale) {
            if (auto wrong = stale_use(at, access, *missed.stale))
                return wrong;
            if (sanitize_ == Sanitize::keep && missed.filled)
                continue;
            if (sanitize_ == Sanitize::keep && missed.trapped_user_fetch)
                return std::nullopt;
        }
        if (wanted.error_code) {
            if (missed.filled || missed.trapped_user_fetch)
                return fmt::format("no #PF, though the tables ask for {:#x}", *wanted.error_code);
            if (missed.error_code != *wanted.error_code || missed.address != at)
                return fmt::format("#PF {:#x} at {:#x} instead of {:#x} at {:#x}", missed.error_code,
                                   missed.address, *wanted.error_code, at);
            for (unsigned i = 0; i < wanted.count; ++i) {
                if (auto wrong = check_slot(wanted.steps[i].slot))
                    return wrong;
            }
            return std::nullopt;
        }
        reference_.mark(wanted, access.kind == Kind::write);
        for (unsigned i = 0; i < wanted.count; ++i) {
            if (auto wrong = check_slot(wanted.steps[i].slot))
                return wrong;
        }
        if (trapping && wanted.user_page) {
            if (!missed.trapped_user_fetch)
                return "the fetch was not trapped";
            return std::nullopt;
        }
        if (!missed.filled)
            return fmt::format("#PF {:#x}, though the tables allow the access", missed.error_code);
    }
    return "filled, and still a miss";
}

/// A sanitizer's report must be of what a CPU may do. With TlbPolicy::keep the machine does it.
std::optional<std::string> Runner::stale_use(std::uint64_t at, Access access, const StaleUse& use) {
    ++stale_reports_;
    ReferenceMmu after = reference_;
    // What was read now, below a cached entry, is marked; what was cached was marked already.
    const auto steps = use.before.visited();
    for (std::size_t i = 0; use.through_structure_cache && i < steps.size(); ++i) {
        const bool written = access.kind == Kind::write && i + 1 == steps.size();
        const std::uint64_t flags = entry_bit::accessed | (written ? entry_bit::dirty : std::uint64_t{0});
        Walk one;
        one.count = 1;
        one.steps[0] = {steps[i].level->number, steps[i].slot.value(), steps[i].entry.raw()};
        if (!steps[i].entry.has(flags))
            after.mark(one, written);
    }
    const auto wanted = [&](std::uint64_t physical, bool) { return physical == use.before.address.value(); };
    if (!after.may_have_cached(at, access, wanted))
        return fmt::format("reports a use of {:#x}, which no CPU would make", use.before.address.value());
    if (sanitize_ == Sanitize::keep)
        reference_ = after;
    return std::nullopt;
}

std::optional<std::string> Runner::check_slot(std::uint64_t slot) const {
    const std::uint64_t at = slot & ~std::uint64_t{7};
    const auto held = machine_->memory().read<std::uint64_t>(GuestPhys(at));
    if (!held || *held == reference_.load(at))
        return std::nullopt;
    return fmt::format("the entry at {:#x} holds {:#x} instead of {:#x}", slot, *held, reference_.load(at));
}

std::optional<std::string> Runner::check_everything() const {
    std::optional<std::string> wrong;
    reference_.contents([&](std::uint64_t at, std::uint64_t) {
        if (!wrong)
            wrong = check_slot(at);
    });
    if (!wrong)
        wrong = machine_->audit();
    return wrong;
}

std::optional<Failure> run(const Setup& setup, const std::vector<Operation>& program,
                           const MachineMaker& make_machine) {
    ::testing::TestPartResultArray results;
    const ::testing::ScopedFakeTestPartResultReporter intercept(
        ::testing::ScopedFakeTestPartResultReporter::INTERCEPT_ONLY_CURRENT_THREAD, &results);
    Runner runner(setup, make_machine);
    for (std::size_t i = 0; i < program.size(); ++i) {
        auto wrong = runner.execute(program[i]);
        if (!wrong && results.size() > 0)
            wrong = results.GetTestPartResult(0).message();
        if (wrong)
            return Failure{i, *wrong};
    }
    if (auto wrong = runner.check_everything())
        return Failure{program.empty() ? 0 : program.size() - 1, *wrong};
    return std::nullopt;
}

std::optional<Failure> run_apart(const Setup& setup, const std::vector<Operation>& program,
                                 const MachineMaker& make_machine) {
    constexpr unsigned patience = 20; // seconds
    const pid_t child = fork();
    if (child == 0) {
        for (const int signal : {SIGSEGV, SIGABRT, SIGBUS, SIGILL})
            std::signal(signal, SIG_DFL);
        (void)std::freopen("/dev/null", "w", stderr);
        alarm(patience);
        _exit(run(setup, program, make_machine) ? 1 : 0);
    }
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) != child)
        return Failure{program.size(), "cannot make a process"};
    if (WIFSIGNALED(status))
        return Failure{program.size(), fmt::format("dies of signal {}", WTERMSIG(status))};
    return WEXITSTATUS(status) == 0 ? std::nullopt : run(setup, program, make_machine);
}

std::vector<Operation> shrink(std::vector<Operation> program, const Run& run, unsigned runs) {
    const auto fails = [&](const std::vector<Operation>& candidate) {
        --runs;
        return run(candidate);
    };
    // What comes after the failure goes first; then ever smaller pieces.
    if (const auto failure = fails(program))
        program.resize(std::min(program.size(), failure->operation + 1));
    for (std::size_t piece = std::max<std::size_t>(program.size() / 2, 1); runs > 0;) {
        bool shrunk = false;
        for (std::size_t end = program.size(); end > 0 && runs > 0;) {
            const std::size_t begin = end > piece ? end - piece : 0;
            std::vector<Operation> candidate;
            for (std::size_t i = 0; i < program.size(); ++i) {
                if (i < begin || i >= end)
                    candidate.push_back(program[i]);
            }
            if (fails(candidate)) {
                program = std::move(candidate);
                shrunk = true;
            }
            end = begin;
        }
        if (piece == 1 && !shrunk)
            break;
        piece = std::max<std::size_t>(piece / 2, 1);
    }
    return program;
}

} // namespace umbra::model
