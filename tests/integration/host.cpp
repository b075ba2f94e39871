#include "tests/integration/host.hpp"

#include "tests/integration/child.hpp"

#include <unistd.h>

#include <cstdlib>
#include <utility>

#include <nlohmann/json.hpp>

namespace umbra {

bool in_ci() {
    return std::getenv("CI") != nullptr;
}

bool emulated_host() {
    return std::getenv("UMBRA_EMULATED_HOST") != nullptr;
}

std::vector<std::string> words_for_guest(const std::string& engine) {
    if (!emulated_host())
        return {};
    return {"--", engine == "native" ? "qemu" : "qemu-host"};
}

namespace {

/// What `umbra probe` says, asked once.
const nlohmann::json& probe() {
    static const nlohmann::json answer = [] {
        const Ended ended = run_umbra({"probe", "--json"});
        EXPECT_EQ(ended.exit_code, 0) << ended;
        auto json = nlohmann::json::parse(ended.out, nullptr, false);
        EXPECT_TRUE(json.is_object()) << ended;
        return json.is_object() ? std::move(json) : nlohmann::json::object();
    }();
    return answer;
}

} // namespace

bool interprets_ring0() {
    return probe().value("ring0", "") == "interpreted";
}

bool shadows_tables() {
    return probe().value("present_entries", "") == "republish";
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
