// Unit tests of shadow/mmu.hpp: what it tells the TLB sanitizer, and what it makes of the answers.
#include "tests/unit/mmu_machine.hpp"

#include <functional>
#include <vector>

#include <gtest/gtest.h>

namespace umbra::test {
namespace {

/// A machine that shows the sanitizer all that it uses.
class MmuSanitize : public ::testing::Test {
  public:
    MmuSanitize() : m({.sync = Sync::trap}), sanitizer(m.memory) { watch(TlbPolicy::drop); }
    void watch(TlbPolicy policy) {
        m.mmu.sanitize(sanitizer, policy, [this](const StaleUse& use) { uses.push_back(use); });
    }
    /// The page is used, and its entry changed, and nothing flushed.
    GuestFrame replace(GuestVirt address = at) {
        const GuestFrame page = m.new_frame();
        m.map(address, page, user_bits);
        m.enter();
        return page;
    }
    Machine m;
    TlbSanitizer sanitizer;
    std::vector<StaleUse> uses;
};

TEST_F(MmuSanitize, EachPageIsSeenAfterEachFlush) {
    m.map_new(at, user_bits | a | d);
    m.map_new(kernel_at, user_bits | a | d);
    const GuestFrame space = m.new_space();
    const auto expect_misses = [&](unsigned wanted) {
        for (const GuestVirt address : {at, kernel_at}) {
            m.read(address);
            EXPECT_EQ(m.misses(), wanted) << address.value();
        }
    };
    expect_misses(1);
    expect_misses(0);
    m.load_cr3(m.root);
    expect_misses(1);
    m.invlpg(far);
    expect_misses(1);
    m.mmu.invalidate(at, 7, false);
    m.enter();
    expect_misses(1);
    m.mmu.flush({.all_contexts = true});
    m.enter();
    expect_misses(1);
    m.switch_to(space, 3); // which shares a table
    m.read(kernel_at);
    EXPECT_EQ(m.misses(), 1U);
    m.switch_to(m.root, 0);
    expect_misses(1);
    m.set_control(); // no other space
    expect_misses(0);
    EXPECT_TRUE(uses.empty());
}

TEST_F(MmuSanitize, StaleUseIsToldOnce) {
    const GuestFrame old = m.map_new(at);
    m.read(at);
    const GuestFrame changed = replace();
    EXPECT_EQ(m.read(at), mapped(changed)) << "dropped when the guest changed it";
    ASSERT_EQ(uses.size(), 1U);
    EXPECT_EQ(uses[0].address, at);
    EXPECT_EQ(uses[0].harm, StaleUse::Harm::other_page);
    EXPECT_EQ(uses[0].before.address, old.base());
    EXPECT_EQ(uses[0].now.address, changed.base());
    m.read(at);
    EXPECT_EQ(uses.size(), 1U);
}

TEST_F(MmuSanitize, FlushOfAnyKindMakesItRight) {
    struct Flush {
        const char* name;
        std::function<void()> make;
    };
    const std::vector<Flush> flushes{
        {"CR3", [this] { m.load_cr3(m.root); }},
        {"INVLPG", [this] { m.invlpg(at); }},
        {"INVPCID 0", [this] { m.mmu.invalidate(at, 0, false); }},
        {"INVPCID 1", [this] { m.mmu.flush({.pcid = 0}); }},
        {"INVPCID 2", [this] { m.mmu.flush({.all_contexts = true, .globals = true}); }},
        {"INVPCID 3", [this] { m.mmu.flush({.all_contexts = true}); }},
    };
    m.map_new(at);
    for (const Flush& flush : flushes) {
        SCOPED_TRACE(flush.name);
        m.read(at);
        const GuestFrame changed = replace();
        flush.make();
        m.enter();
        EXPECT_EQ(m.read(at), mapped(changed));
        EXPECT_TRUE(uses.empty());
    }
}

TEST_F(MmuSanitize, FlushesOfOthersDoNot) {
    struct Flush {
        const char* name;
        std::function<void()> make;
    };
    const std::vector<Flush> flushes{
        {"INVLPG", [this] { m.invlpg(neighbour); }},
        {"INVPCID 0 of another", [this] { m.mmu.invalidate(at, 5, false); }},
        {"INVPCID 1 of another", [this] { m.mmu.flush({.pcid = 5}); }},
    };
    m.map_new(at);
    for (const Flush& flush : flushes) {
        SCOPED_TRACE(flush.name);
        uses.clear();
        m.read(at);
        replace();
        flush.make();
        m.enter();
        m.read(at);
        EXPECT_EQ(uses.size(), 1U);
        m.load_cr3(m.root);
    }
}

TEST_F(MmuSanitize, GlobalPageOutlivesCr3) {
    m.paging.global_pages = true;
    m.set_control();
    m.map_new(at, user_bits | entry_bit::global);
    m.read(at);
    const GuestFrame changed = replace();
    m.load_cr3(m.root);
    EXPECT_EQ(m.read(at), mapped(changed));
    EXPECT_EQ(uses.size(), 1U);
    m.mmu.flush({.all_contexts = true, .globals = true});
    m.enter();
    m.read(at);
    EXPECT_EQ(uses.size(), 1U);
}

TEST_F(MmuSanitize, KeepGoesOnWithTheOldTranslationUntilTheFlush) {
    watch(TlbPolicy::keep);
    const GuestFrame old = m.map_new(at);
    m.write(at);
    const GuestFrame changed = replace();
    EXPECT_EQ(m.read(at), mapped(old));
    EXPECT_EQ(m.write(at), mapped(old));
    EXPECT_FALSE(m.entry(at).accessed()) << "no walk was made";
    m.invlpg(neighbour);
    EXPECT_EQ(m.read(at), mapped(old)) << "this does not cover it";
    EXPECT_FALSE(uses.empty());
    m.invlpg(at);
    uses.clear();
    EXPECT_EQ(m.read(at), mapped(changed));
    EXPECT_TRUE(uses.empty());
    EXPECT_TRUE(m.entry(at).accessed());
}

TEST_F(MmuSanitize, KeepLetsAccessesPassThatTheTablesForbid) {
    watch(TlbPolicy::keep);
    const GuestFrame page = m.map_new(at);
    m.write(at);
    m.change(at, p | rw, 0);
    m.enter();
    EXPECT_EQ(m.write(at), mapped(page));
    ASSERT_EQ(uses.size(), 1U);
    EXPECT_EQ(uses[0].harm, StaleUse::Harm::fault_missed);
    m.load_cr3(m.root);
    EXPECT_EQ(m.write(at), fault(write));
}

TEST_F(MmuSanitize, KeepReusesUpperEntriesOnly) {
    // A directory entry is replaced; another page below it is used for the first time.
    watch(TlbPolicy::keep);
    const GuestFrame old = m.map_new(at), old_next = m.map_new(neighbour);
    m.read(at);
    m.set_entry(at, 0, 2);
    const GuestFrame changed = m.map_new(at), next = m.map_new(neighbour);
    m.enter();
    EXPECT_EQ(m.read(at), mapped(old));
    EXPECT_EQ(m.read(neighbour), mapped(old_next)) << "through the cached directory entry";
    ASSERT_FALSE(uses.empty());
    EXPECT_TRUE(uses.back().through_structure_cache);
    m.invlpg(at);
    EXPECT_EQ(m.read(at), mapped(changed));
    uses.clear();
    m.load_cr3(m.root);
    EXPECT_EQ(m.read(neighbour), mapped(next));
    EXPECT_TRUE(uses.empty());
}

TEST_F(MmuSanitize, MorePresenceAndRightsAreNothingToTell) {
    m.map_new(at, p | us);
    EXPECT_EQ(m.read(neighbour), fault(0));
    m.read(at);
    const GuestFrame page = m.map_new(neighbour);
    m.change(at, rw, rw);
    EXPECT_EQ(m.read(neighbour), mapped(page));
    EXPECT_NE(m.write(at).address, std::nullopt);
    EXPECT_TRUE(uses.empty());
}

} // namespace
} // namespace umbra::test
