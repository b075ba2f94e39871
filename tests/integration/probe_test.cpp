// `umbra probe` on this host's KVM, whatever kind it is.
#include "launcher/probe.hpp"
#include "tests/integration/host.hpp"
#include "vmm/kvm/kvm.hpp"

#include <map>
#include <set>
#include <string>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

namespace umbra {
namespace {

/// All experiments are made once, by the first test that asks.
const HostReport& this_host() {
    static const HostReport report = probe_host(Kvm());
    return report;
}

class ProbeTest : public KvmTest {
  protected:
    void SetUp() override {
        KvmTest::SetUp();
        if (IsSkipped() || HasFatalFailure())
            return;
        report_ = &this_host();
        for (const TraitReport& trait : report_->details)
            values_[trait.id] = trait.value;
    }

    const HostReport* report_ = nullptr;
    std::map<std::string, std::string> values_;
};

TEST_F(ProbeTest, EveryTraitHasAnAnswer) {
    std::set<std::string> ids;
    for (const TraitReport& trait : report_->details) {
        EXPECT_TRUE(ids.insert(trait.id).second) << trait.id << " is there twice";
        EXPECT_FALSE(trait.question.empty()) << trait.id;
        EXPECT_FALSE(trait.value.empty()) << trait.id;
        const bool unknown = trait.value.starts_with("unknown: ");
        EXPECT_EQ(trait.meaning.empty(), unknown) << trait.id << ": " << trait.value;
    }
}

TEST_F(ProbeTest, WhatEveryHostMustDoIsDone) {
    EXPECT_EQ(values_.at("store_fill"), "seen");
    EXPECT_EQ(values_.at("store_upgrade"), "seen");
    EXPECT_EQ(values_.at("ring0_change"), "seen");
    EXPECT_EQ(values_.at("mmio"), "exits");
    EXPECT_EQ(values_.at("single_step"), "raises #DB");
    EXPECT_EQ(values_.at("interrupts"), "arrive as IF admits");
    EXPECT_TRUE(values_.at("slots").starts_with("all"));
}

TEST_F(ProbeTest, TraitsAgreeWithEachOther) {
    const HostTraits& traits = report_->traits;
    EXPECT_EQ(values_.at("store_change") == "seen", traits.stores_seen);
    EXPECT_EQ(values_.at("pushf_if") == "exact", traits.iopl_honoured);
    EXPECT_EQ(values_.at("popf_if") == "changes it", traits.iopl_honoured);
    EXPECT_EQ(values_.at("mov_cs") == "0x33", !traits.own_gdt);
    EXPECT_EQ(values_.at("mov_cs") == "0x10", traits.rpl_hidden);
    // Timing is not compared: a busy host would make it lie.
    EXPECT_GT(std::stod(values_.at("trap")), 0);
}

TEST_F(ProbeTest, TraitsAreTheSameEveryTime) {
    const Kvm kvm;
    for (int i = 0; i < 5; ++i) {
        const HostTraits again = probe_traits(kvm);
        EXPECT_EQ(again.stores_seen, report_->traits.stores_seen);
        EXPECT_EQ(again.iopl_honoured, report_->traits.iopl_honoured);
        EXPECT_EQ(again.own_gdt, report_->traits.own_gdt);
        EXPECT_EQ(again.syscall_to_ring0, report_->traits.syscall_to_ring0);
        EXPECT_EQ(again.cpuid_intercepted, report_->traits.cpuid_intercepted);
        EXPECT_EQ(again.rpl_hidden, report_->traits.rpl_hidden);
        EXPECT_EQ(again.native_ring0, report_->traits.native_ring0);
    }
}

TEST_F(ProbeTest, TableHasALineForEachTrait) {
    const std::string table = probe_table(*report_);
    EXPECT_TRUE(table.starts_with("umbra changes present entries by "));
    EXPECT_NE(table.find("this KVM " + report_->kind), std::string::npos);
    for (const TraitReport& trait : report_->details)
        EXPECT_NE(table.find("\n" + trait.question + " "), std::string::npos) << trait.id;
}

TEST_F(ProbeTest, JsonHasEveryKey) {
    const auto json = nlohmann::json::parse(probe_json(*report_));
    EXPECT_EQ(json.at("kind"), report_->kind);
    EXPECT_EQ(json.at("ring0") == "native", report_->traits.native_ring0);
    EXPECT_EQ(json.at("present_entries") == "store", report_->traits.stores_seen);
    EXPECT_EQ(json.at("traits").size(), report_->details.size());
    for (const TraitReport& trait : report_->details) {
        const auto& entry = json.at("traits").at(trait.id);
        EXPECT_EQ(entry.at("question"), trait.question);
        EXPECT_EQ(entry.at("value"), trait.value);
        EXPECT_EQ(entry.at("meaning"), trait.meaning);
    }
}

} // namespace
} // namespace umbra
