// What the integration tests need of the machine they run on.
#pragma once

#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace umbra {

/// In continuous integration a test must not be skipped because something is missing that could be there.
[[nodiscard]] bool in_ci();
/// The host's own CPU is QEMU's software emulation, some of whose instructions are not exact: the environment
/// says so by UMBRA_EMULATED_HOST.
[[nodiscard]] bool emulated_host();
/// What a shipped guest is to be told of that on its command line (guest/runtime/boot.hpp): words that come
/// last on umbra's own; none on exact hosts.
[[nodiscard]] std::vector<std::string> words_for_guest(const std::string& engine);
/// By `umbra probe`: this KVM interprets the machine's ring 0, so the native engine cannot run there.
[[nodiscard]] bool interprets_ring0();

/// By `umbra probe`: this KVM shadows the tables of its guests, instead of letting the CPU walk them.
[[nodiscard]] bool shadows_tables();

/// For what is missing and could be there: fails in continuous integration, otherwise skips the test.
#define UMBRA_MISSING(what)                                                                                  \
    do {                                                                                                     \
        if (::umbra::in_ci())                                                                                \
            FAIL() << (what) << ", and this is CI";                                                          \
        GTEST_SKIP() << (what);                                                                              \
    } while (false)

/// A test that needs KVM.
class KvmTest : public testing::Test {
  protected:
    void SetUp() override;
};

/// A test that is run on each engine that this host can have.
class EngineTest : public KvmTest, public testing::WithParamInterface<std::string> {
  protected:
    void SetUp() override;
};
/// Its parameters, and how they appear in tests' names.
[[nodiscard]] inline auto engines() {
    return testing::Values("shadow", "native");
}
[[nodiscard]] inline std::string engine_name(const testing::TestParamInfo<std::string>& engine) {
    return engine.param;
}
/// To be called by SetUp(): skips the test where this host cannot have the engine.
void require_engine(const std::string& engine);

} // namespace umbra
