// How runs end: exit codes and verdicts, of guests that end themselves and of guests that are ended.
#include "tests/integration/child.hpp"
#include "tests/integration/files.hpp"
#include "tests/integration/host.hpp"
#include "tests/integration/machine_code.hpp"

#include <chrono>
#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace umbra {
namespace {

using namespace std::chrono_literals;
using namespace machine_code;

class VerdictTest : public EngineTest {
  protected:
    Ended run(const Code& code, std::vector<std::string> options = {}) const {
        options.insert(options.begin(), {"run", "--engine", GetParam()});
        options.push_back(folder_.write("kernel", elf_kernel(code)));
        return run_umbra(options);
    }

    TemporaryFolder folder_;
};

TEST_P(VerdictTest, ExitPortPassesWithZero) {
    const Ended ended = run(exit(0));
    EXPECT_EQ(ended.exit_code, 0) << ended;
    EXPECT_EQ(ended.err, "umbra: passed\n");
    EXPECT_EQ(ended.out, "");
}

TEST_P(VerdictTest, ExitPortFailsWithAnythingElse) {
    for (const auto& [value, verdict] :
         {std::pair{1U, "failed with code 1 (0x1)"}, std::pair{0x80U, "failed with code 128 (0x80)"},
          std::pair{0xffffffffU, "failed with code 4294967295 (0xffffffff)"}}) {
        const Ended ended = run(exit(value));
        EXPECT_EQ(ended.exit_code, 1) << ended;
        EXPECT_EQ(ended.verdict(), verdict);
    }
}

TEST_P(VerdictTest, QemuExitCodesAreQemus) {
    for (const auto& [value, exit_code] : {std::pair{0U, 1}, std::pair{1U, 3}, std::pair{0x10U, 0x21},
                                           std::pair{0x7fU, 0xff}, std::pair{0x80U, 1}}) {
        const Ended ended = run(exit(value), {"--qemu-exit"});
        EXPECT_EQ(ended.exit_code, exit_code) << "for " << value << ": " << ended;
    }
}

TEST_P(VerdictTest, QemuExitCodesAreForTheExitPortOnly) {
    const Ended off = run(mov_dx(0x604) + mov_eax(0x2000) + out_dx_ax + spin, {"--qemu-exit"});
    EXPECT_EQ(off.exit_code, 0) << off;
    const Ended panic = run(ud2, {"--qemu-exit"});
    EXPECT_EQ(panic.exit_code, 3) << panic;
    const Ended late = run(spin, {"--qemu-exit", "--timeout", "0.3"});
    EXPECT_EQ(late.exit_code, 124) << late;
}

TEST_P(VerdictTest, InitSentToItselfResets) {
    const Code init{0xb9, 0,    0,    0xe0, 0xfe,                       // mov ecx, the local APIC
                    0xc7, 0x81, 0xf0, 0,    0,    0, 0xff, 0x01, 0, 0,  // spurious vector: enabled
                    0xc7, 0x81, 0x10, 3,    0,    0, 0,    0,    0, 0,  // to APIC 0
                    0xc7, 0x81, 0,    3,    0,    0, 0,    0x45, 0, 0}; // INIT, asserted
    const Ended ended = run(init + spin, {"--timeout", "60"});
    EXPECT_EQ(ended.exit_code, 3) << ended;
    EXPECT_TRUE(ended.verdict().starts_with("the guest reset the machine")) << ended;
    EXPECT_EQ(ended.err.find("Guest report"), std::string::npos) << ended;
}

TEST_P(VerdictTest, PowerOffPasses) {
    for (const std::uint16_t port : {std::uint16_t{0x604}, std::uint16_t{0xb004}}) {
        const Ended ended = run(mov_dx(port) + mov_eax(0x2000) + out_dx_ax + spin);
        EXPECT_EQ(ended.exit_code, 0) << ended;
        EXPECT_EQ(ended.verdict(), "passed: the guest powered off");
    }
}

/// A guest that asked for S3 waits to be woken up, which nothing here does.
TEST_P(VerdictTest, OtherSleepsStop) {
    for (const std::uint16_t port : {std::uint16_t{0x604}, std::uint16_t{0xb004}}) {
        const Ended ended = run(mov_dx(port) + mov_eax(0x2400) + out_dx_ax + spin);
        EXPECT_EQ(ended.exit_code, 3) << ended;
        EXPECT_TRUE(ended.err.starts_with("umbra: stopped: the guest asked for ACPI sleep type 1, "
                                          "but umbra does not suspend"))
            << ended;
    }
}

/// Guests that write a failure to isa-debug-exit where QEMU has it by default, and power off then.
TEST_P(VerdictTest, DefaultExitPortFails) {
    const Ended ended =
        run(mov_dx(0x501) + mov_eax(42) + out_dx_ax + mov_dx(0x604) + mov_eax(0x2000) + out_dx_ax + spin);
    EXPECT_EQ(ended.exit_code, 1) << ended;
    EXPECT_EQ(ended.verdict(), "failed with code 42 (0x2a)");
}

TEST_P(VerdictTest, ResetIsAPanic) {
    for (const Code& reset : {write_port(0x64, 0xfe), write_port(0x92, 0x01), write_port(0xcf9, 0x06)}) {
        const Ended ended = run(reset + spin);
        EXPECT_EQ(ended.exit_code, 3) << ended;
        EXPECT_TRUE(ended.verdict().starts_with("the guest reset the machine")) << ended;
    }
}

TEST_P(VerdictTest, TripleFaultIsAPanic) {
    const Ended ended = run(ud2);
    EXPECT_EQ(ended.exit_code, 3) << ended;
    EXPECT_TRUE(ended.err.starts_with("umbra: triple fault")) << ended;
}

TEST_P(VerdictTest, InstructionOutsideOfMemoryIsAPanic) {
    const Code fetch = mov_eax(0x10000000) + Code{0xff, 0xe0};   // jmp *%rax
    const Code load = mov_eax(0x10000000) + Code{0xdb, 0, 0x90}; // fildl (%rax), which KVM does not emulate
    for (const Code& code : {fetch, load}) {
        const Ended ended = run(code + spin, {"--timeout", "100"});
        EXPECT_EQ(ended.exit_code, 3) << ended;
    }
}

TEST_P(VerdictTest, TimeoutEndsWhateverTheGuestDoes) {
    for (const Code& code : {spin, halt, halt_for_ever, for_ever(write_port(0x80, 0))}) {
        const auto start = std::chrono::steady_clock::now();
        const Ended ended = run(code, {"--timeout", "0.4"});
        EXPECT_GE(std::chrono::steady_clock::now() - start, 400ms);
        EXPECT_EQ(ended.exit_code, 124) << ended;
        EXPECT_EQ(ended.err, "umbra: timed out\n");
    }
}

TEST_P(VerdictTest, TimeoutDoesNotTouchAFasterGuest) {
    const Ended ended = run(exit(0), {"--timeout", "100000"});
    EXPECT_EQ(ended.exit_code, 0) << ended;
}

TEST_P(VerdictTest, SignalsInterruptWhateverTheGuestDoes) {
    for (const int signal : {SIGINT, SIGTERM, SIGHUP}) {
        for (const Code& code : {spin, halt, halt_for_ever}) {
            Child child(
                umbra_command({"run", "--engine", GetParam(),
                               folder_.write("kernel", elf_kernel(print('!') + print('\n') + code))}));
            ASSERT_TRUE(child.wait_for("!")) << child.end(0s);
            child.run_for(20ms);
            child.send_signal(signal);
            const Ended& ended = child.end();
            EXPECT_EQ(ended.exit_code, 130) << ended;
            EXPECT_EQ(ended.err, "umbra: interrupted\n");
        }
    }
}

TEST_P(VerdictTest, SignalBeforeTheGuestRunsEndsAsCleanly) {
    const std::string kernel = folder_.write("kernel", elf_kernel(spin));
    for (const auto delay : {1ms, 3ms, 6ms, 10ms, 15ms, 25ms, 40ms}) {
        Child child(umbra_command({"run", "--engine", GetParam(), kernel}));
        child.run_for(delay);
        child.send_signal(SIGINT);
        const Ended& ended = child.end();
        EXPECT_FALSE(ended.overran) << "after " << delay.count() << " ms: " << ended;
        EXPECT_TRUE(ended.signal == SIGINT || ended.exit_code == 130)
            << "after " << delay.count() << " ms: " << ended;
    }
}

TEST_P(VerdictTest, ExpectedTextPasses) {
    const Ended ended = run_umbra(
        {"run", "--engine", GetParam(), "--expect", "going ro", "--timeout", "100", guest_file("spin")});
    EXPECT_EQ(ended.exit_code, 0) << ended;
    EXPECT_EQ(ended.verdict(), "passed: the console printed what was expected");
    EXPECT_EQ(ended.out, "spin: going round\n");
}

TEST_P(VerdictTest, ExpectedTextIsFoundWithoutTheEndOfItsLine) {
    Code prompt;
    for (const char c : {'l', 'o', 'g', 'i', 'n', ':', ' '})
        prompt = prompt + print(c);
    for (const Code& wait : {halt, spin}) {
        const Ended ended = run(prompt + wait, {"--expect", "login: ", "--timeout", "30"});
        EXPECT_EQ(ended.exit_code, 0) << ended;
        EXPECT_EQ(ended.out, "login: ");
    }
}

TEST_P(VerdictTest, ExpectedTextThatDoesNotComeIsNoPass) {
    const Ended ended = run_umbra(
        {"run", "--engine", GetParam(), "--expect", "going  round", "--timeout", "0.5", guest_file("spin")});
    EXPECT_EQ(ended.exit_code, 124) << ended;
}

TEST_P(VerdictTest, LogLevelSaysHowMuchIsTold) {
    EXPECT_EQ(run(exit(0), {"--log-level", "warning"}).err, "");
    EXPECT_EQ(run(exit(5), {"--log-level", "error"}).err, "umbra: failed with code 5 (0x5)\n");
    const Ended silent = run(exit(5), {"--log-level", "off"});
    EXPECT_EQ(silent.err, "");
    EXPECT_EQ(silent.exit_code, 1);
    EXPECT_NE(run(exit(0), {"--log-level", "debug"}).err.find("umbra: passed\n"), std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(Engines, VerdictTest, engines(), engine_name);

} // namespace
} // namespace umbra
