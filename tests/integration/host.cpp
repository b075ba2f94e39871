#include "tests/integration/host.hpp"

#include "tests/integration/child.hpp"

#include <unistd.h>

#include <cstdlib>

#include <nlohmann/json.hpp>

namespace umbra {

bool in_ci() {
    return std::getenv("CI") != nullptr;
}

bool emulated_host() {
    return std::getenv("UMBRA_TEST_EMULATED_HOST") != nullptr;
}

std::vector<std::string> words_for_guest(const std::string& engine) {
    if (!emulated_host())
        return {};
    return {"--", engine == "native" ? "qemu" : "qemu-host"};
}

bool interprets_ring0() {
    static const bool interprets = [] {
        const Ended probe = run_umbra({"probe", "--json"});
        EXPECT_EQ(probe.exit_code, 0) << probe;
        const auto json = nlohmann::json::parse(probe.out, nullptr, false);
        EXPECT_FALSE(json.is_discarded()) << probe;
        return json.is_object() && json.value("resume", "") == "system_registers";
    }();
    return interprets;
}

void require_engine(const std::string& engine) {
    if (engine == "native" && interprets_ring0())
        GTEST_SKIP() << "this KVM interprets the machine's ring 0: too slow for guests, and not exact";
}

void KvmTest::SetUp() {
    if (::access("/dev/kvm", R_OK | W_OK) != 0)
        UMBRA_MISSING("/dev/kvm cannot be opened");
}

void EngineTest::SetUp() {
    KvmTest::SetUp();
    if (!IsSkipped() && !HasFatalFailure())
        require_engine(GetParam());
}

} // namespace umbra
