// What the reference model's caches may hold and what not: the sentences of Intel SDM vol. 3A, 4.10, one by
// one.
#include "tests/model/reference_mmu.hpp"

#include <gtest/gtest.h>

namespace umbra::model {
namespace {

constexpr std::uint64_t p = 1, rw = 2, us = 4, accessed = 0x20, dirty = 0x40, g = 0x100;
constexpr std::uint64_t all = p | rw | us;

/// Two roots with the same tables below, which map three pages: `a` and `b` by one PTE each of the same
/// table, `c` by another table.
class Caches : public ::testing::Test {
  protected:
    static constexpr std::uint64_t root = 0x1000, other_root = 0x2000, pdpt = 0x3000, pd = 0x4000,
                                   pt = 0x5000, pt_2 = 0x6000;
    static constexpr std::uint64_t a = 0x0000, b = 0x1000, c = 0x20'0000;
    static constexpr std::uint64_t first = 0x10000, second = 0x20000; ///< pages

    Caches() {
        mmu.store(root, pdpt | all);
        mmu.store(other_root, pdpt | all);
        mmu.store(pdpt, pd | all);
        mmu.store(pd, pt | all);
        mmu.store(pd + 8, pt_2 | all);
        mmu.store(pt, first | all);
        mmu.store(pt + 8, first | all);
        mmu.store(pt_2, first | all);
        mmu.store(pt_2 + 8, second | all);
        Cpu cpu;
        cpu.root = root;
        EXPECT_TRUE(mmu.start(cpu));
    }

    void enable(bool pge, bool pcide) {
        Cpu cpu = mmu.cpu();
        cpu.pge = pge;
        cpu.pcide = pcide;
        EXPECT_TRUE(mmu.set_control(cpu));
    }
    /// An access that the tables allow, made by a walk.
    void touch(std::uint64_t at, Kind kind = Kind::read) {
        const Walk walk = mmu.walk(at, {.kind = kind});
        ASSERT_FALSE(walk.error_code);
        mmu.mark(walk, kind == Kind::write);
    }
    [[nodiscard]] bool may_reach(std::uint64_t at, std::uint64_t physical, Access access = {}) const {
        return mmu.may_have_cached(at, access,
                                   [physical](std::uint64_t got, bool) { return got == physical; });
    }

    ReferenceMmu mmu{{{0, 0x10'0000}}};
};

TEST_F(Caches, NothingBeforeAccessedIsSet) {
    EXPECT_FALSE(may_reach(a, first));
    touch(a);
    EXPECT_TRUE(may_reach(a, first));
    EXPECT_FALSE(may_reach(b, first)) << "its PTE's accessed flag is clear";
}

TEST_F(Caches, WritesNeedTheDirtyFlag) {
    touch(a);
    EXPECT_FALSE(may_reach(a, first, {.kind = Kind::write}));
    touch(a, Kind::write);
    EXPECT_TRUE(may_reach(a, first, {.kind = Kind::write}));
    mmu.store(pt, mmu.load(pt) & ~dirty);
    EXPECT_TRUE(may_reach(a, first, {.kind = Kind::write})) << "the TLB does not look again";
    mmu.invlpg(a);
    EXPECT_FALSE(may_reach(a, first, {.kind = Kind::write}));
}

TEST_F(Caches, OldAndNewUntilInvlpg) {
    touch(a);
    mmu.store(pt, second | all | accessed);
    EXPECT_TRUE(may_reach(a, first));
    EXPECT_TRUE(may_reach(a, second));
    mmu.invlpg(b);
    EXPECT_TRUE(may_reach(a, first)) << "of another page";
    mmu.invlpg(a);
    EXPECT_FALSE(may_reach(a, first));
    EXPECT_TRUE(may_reach(a, second));
}

TEST_F(Caches, OldUpperEntriesWithNewLowerOnes) {
    touch(a);
    mmu.store(pd, pt_2 | all | accessed);
    mmu.store(pt, second | all | accessed);
    EXPECT_TRUE(may_reach(a, second)) << "the old PDE leads to a table that was changed after it was cached";
}

TEST_F(Caches, NeverOldLowerEntriesWithNewUpperOnes) {
    constexpr std::uint64_t marked = accessed | dirty, page = 0x2000;
    touch(c); // marks the two upper levels
    mmu.store(pd, pt | p | us | accessed);
    mmu.store(pt + 16, first | all | marked);
    mmu.store(pt + 16, second | all | marked);
    mmu.store(pd, pt | all | accessed); // R/W when the PTE has changed already
    EXPECT_TRUE(may_reach(page, first));
    EXPECT_FALSE(may_reach(page, first, {.kind = Kind::write}));
    EXPECT_TRUE(may_reach(page, second, {.kind = Kind::write}));
}

TEST_F(Caches, InvlpgEmptiesThePagingStructureCaches) {
    touch(a);
    touch(c);
    mmu.store(pd, pt_2 | all | accessed);
    mmu.store(pt + 8, second | all | accessed);
    EXPECT_TRUE(may_reach(b, second)) << "by the PDE's old value";
    mmu.invlpg(c);
    EXPECT_TRUE(may_reach(a, first)) << "a TLB entry as a whole";
    mmu.store(pt + 8, (first + 0x5000) | all | accessed);
    EXPECT_FALSE(may_reach(b, first + 0x5000)) << "a new walk by the PDE's old value";
}

TEST_F(Caches, InvpcidOfOneAddressLeavesOtherStructures) {
    touch(a);
    mmu.store(pd, pt_2 | all | accessed);
    EXPECT_TRUE(mmu.invpcid(0, 0, c));
    mmu.store(pt + 8, second | all | accessed);
    EXPECT_TRUE(may_reach(b, second));
}

TEST_F(Caches, Cr3LoadsDropAllButGlobals) {
    for (const bool pge : {false, true}) {
        enable(pge, false);
        mmu.store(pt, first | all | g);
        mmu.store(pt + 8, first | all);
        touch(a);
        touch(b);
        mmu.store(pt, 0);
        mmu.store(pt + 8, 0);
        EXPECT_TRUE(may_reach(a, first) && may_reach(b, first));
        EXPECT_TRUE(mmu.load_cr3(other_root, 0, false));
        EXPECT_EQ(may_reach(a, first), pge);
        EXPECT_FALSE(may_reach(b, first));
        mmu.invlpg(a);
        EXPECT_FALSE(may_reach(a, first));
    }
}

TEST_F(Caches, EntriesBelongToTheirPcid) {
    enable(false, true);
    touch(a);
    mmu.store(pt, second | all);
    EXPECT_TRUE(mmu.load_cr3(root, 1, true));
    EXPECT_FALSE(may_reach(a, first)) << "of PCID 0";
    EXPECT_TRUE(mmu.load_cr3(root, 0, true));
    EXPECT_TRUE(may_reach(a, first));
    EXPECT_TRUE(mmu.load_cr3(root, 1, false));
    EXPECT_TRUE(mmu.load_cr3(root, 0, true));
    EXPECT_TRUE(may_reach(a, first)) << "only PCID 1 was flushed";
    EXPECT_TRUE(mmu.invpcid(1, 1, 0));
    EXPECT_TRUE(may_reach(a, first));
    EXPECT_TRUE(mmu.invpcid(3, 0, 0));
    EXPECT_FALSE(may_reach(a, first));
}

TEST_F(Caches, WhatAnotherPcidReadIsNotThere) {
    enable(false, true);
    EXPECT_TRUE(mmu.load_cr3(root, 1, true));
    touch(a);
    mmu.store(pt, second | all | accessed); // all while PCID 1 is current
    EXPECT_TRUE(mmu.load_cr3(root, 0, true));
    EXPECT_FALSE(may_reach(a, first));
    EXPECT_TRUE(may_reach(a, second));
}

TEST_F(Caches, AnotherRootOfTheSamePcid) {
    enable(false, true);
    mmu.store(other_root, 0);
    EXPECT_TRUE(mmu.load_cr3(other_root, 0, false));
    mmu.store(pt, first | all | accessed);
    mmu.store(pt, second | all | accessed); // nothing leads there yet
    mmu.store(pdpt, mmu.load(pdpt) | accessed);
    EXPECT_TRUE(mmu.load_cr3(root, 0, true));
    mmu.store(root, mmu.load(root) | accessed);
    mmu.store(pd, mmu.load(pd) | accessed);
    EXPECT_FALSE(may_reach(a, first));
    EXPECT_TRUE(may_reach(a, second));
}

TEST_F(Caches, GlobalsServeEveryPcidButNotEveryFlush) {
    enable(true, true);
    mmu.store(pt, first | all | g);
    touch(a);
    mmu.store(pt, 0);
    EXPECT_TRUE(mmu.load_cr3(other_root, 3, false));
    EXPECT_TRUE(may_reach(a, first));
    EXPECT_TRUE(mmu.invpcid(0, 0, a) && mmu.invpcid(1, 0, 0) && mmu.invpcid(3, 0, 0));
    EXPECT_TRUE(may_reach(a, first));
    EXPECT_TRUE(mmu.invpcid(2, 0, 0));
    EXPECT_FALSE(may_reach(a, first));
}

TEST_F(Caches, ControlBitsThatFlush) {
    const auto flushes = [&](auto&& change) {
        mmu.store(pt, first | all);
        touch(a);
        mmu.store(pt, 0);
        Cpu cpu = mmu.cpu();
        change(cpu);
        EXPECT_TRUE(mmu.set_control(cpu));
        return !may_reach(a, first);
    };
    EXPECT_FALSE(flushes([](Cpu& cpu) { cpu.wp = false; }));
    EXPECT_FALSE(flushes([](Cpu& cpu) { cpu.nxe = false; }));
    EXPECT_TRUE(flushes([](Cpu& cpu) { cpu.pge = true; }));
    EXPECT_TRUE(flushes([](Cpu& cpu) { cpu.pge = false; }));
    EXPECT_TRUE(flushes([](Cpu& cpu) { cpu.smep = true; }));
    EXPECT_FALSE(flushes([](Cpu& cpu) { cpu.smep = false; }));
    EXPECT_FALSE(flushes([](Cpu& cpu) { cpu.pcide = true; }));
    EXPECT_TRUE(flushes([](Cpu& cpu) { cpu.pcide = false; }));
}

TEST_F(Caches, RightsAreThoseOfTheEntryAndOfNow) {
    touch(a);
    mmu.store(pt, first | p | accessed); // no longer for users
    EXPECT_TRUE(may_reach(a, first, {.user = true})) << "the TLB's U/S";
    Cpu cpu = mmu.cpu();
    cpu.smap = true;
    EXPECT_TRUE(mmu.set_control(cpu));
    mmu.invlpg(a);
    EXPECT_FALSE(may_reach(a, first, {.user = true}));
    mmu.store(pt, first | all | accessed);
    mmu.invlpg(a);
    EXPECT_FALSE(may_reach(a, first)) << "SMAP of now";
    EXPECT_TRUE(may_reach(a, first, {.ac = true}));
}

TEST_F(Caches, ExecuteDisableIsReservedWhenItIsRead) {
    constexpr std::uint64_t xd = std::uint64_t{1} << 63;
    const auto set_nxe = [this](bool nxe) {
        Cpu cpu = mmu.cpu();
        cpu.nxe = nxe;
        EXPECT_TRUE(mmu.set_control(cpu));
    };
    mmu.store(pt, first | all | xd);
    touch(a);
    set_nxe(false);
    EXPECT_TRUE(may_reach(a, first)) << "read while NXE was 1";
    mmu.invlpg(a);
    EXPECT_FALSE(may_reach(a, first));
    set_nxe(true);
    EXPECT_TRUE(may_reach(a, first));
    EXPECT_FALSE(may_reach(a, first, {.kind = Kind::fetch}));
}

TEST_F(Caches, GeneralProtection) {
    EXPECT_FALSE(mmu.invpcid(0, 1, a)) << "PCIDE is 0";
    EXPECT_FALSE(mmu.invpcid(4, 0, a));
    Cpu cpu = mmu.cpu();
    cpu.mode = Mode::pae;
    mmu.store(0x7000, 0x8000 | p | rw); // reserved in a PDPTE
    cpu.root = 0x7000;
    EXPECT_FALSE(mmu.start(cpu));
    EXPECT_EQ(mmu.cpu().mode, Mode::four_level);
}

} // namespace
} // namespace umbra::model
