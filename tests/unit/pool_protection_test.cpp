// Tests of vmm/pool_protection.hpp and of the monitor memory that it protects. They are part of the
// integration tests too: those run where the CPU has protection keys.
#include "shadow/table_pool.hpp"
#include "vmm/monitor_memory.hpp"

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <functional>
#include <latch>
#include <optional>
#include <thread>
#include <vector>

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>

namespace umbra {
namespace {

constexpr std::size_t pool_bytes = std::size_t{2} << 20;
constexpr MachinePhys base{std::uint64_t{1} << 45};
constexpr ShadowEntry entry{MachineFrame(0x1234), entry_bit::present};

/// A pool of protected tables, with one table in it.
struct ProtectedPool {
    explicit ProtectedPool(PoolProtection kind)
        : memory(base, pool_bytes, kind), pool(memory.pool_base().frame(), memory.pool(), memory.guard()),
          page(pool.allocate().value()) {}

    void write(unsigned slot) const {
        *static_cast<volatile std::uint64_t*>(static_cast<void*>(&pool.entries(page)[slot])) = entry.raw();
    }
    /// The entry as the machine sees it.
    [[nodiscard]] ShadowEntry seen_by_machine(unsigned slot) const {
        const auto offset = pool.frame(page).base() - memory.base() + slot * sizeof(ShadowEntry);
        return *reinterpret_cast<const ShadowEntry*>(memory.all().data() + offset);
    }

    MonitorMemory memory;
    TablePool pool;
    TableIndex page;
};

/// The signal that ends a process which does this; 0 if it lives.
int signal_of(const std::function<void()>& deed) {
    const pid_t child = fork();
    if (child == 0) {
        (void)std::signal(SIGSEGV, SIG_DFL); // not a sanitizer's report
        deed();
        _exit(0);
    }
    int status = -1;
    EXPECT_EQ(waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFSIGNALED(status) || status == 0) << status;
    return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

class PoolProtectionTest : public testing::TestWithParam<PoolProtection> {
  protected:
    void SetUp() override {
        if (GetParam() == PoolProtection::protection_key &&
            best_pool_protection() != PoolProtection::protection_key)
            GTEST_SKIP() << "no protection keys on this machine";
        pool.emplace(GetParam());
    }
    [[nodiscard]] int stray_write() const {
        return signal_of([this] { pool->write(7); });
    }

    std::optional<ProtectedPool> pool;
};

TEST_P(PoolProtectionTest, StrayWriteDies) {
    EXPECT_NE(pool->pool.guard(), nullptr);
    EXPECT_EQ(stray_write(), SIGSEGV);
}

TEST_P(PoolProtectionTest, WritePassesInsideAScope) {
    {
        const EditScope scope = pool->pool.edit();
        EXPECT_EQ(stray_write(), 0);
        pool->write(7);
    }
    EXPECT_EQ(pool->pool.entries(pool->page)[7], entry) << "reading needs no scope";
    EXPECT_EQ(pool->seen_by_machine(7), entry);
    EXPECT_EQ(stray_write(), SIGSEGV) << "the scope has ended";
}

TEST_P(PoolProtectionTest, ScopesNest) {
    {
        const EditScope outer = pool->pool.edit();
        {
            const EditScope inner = pool->pool.edit();
            EXPECT_EQ(stray_write(), 0);
        }
        EXPECT_EQ(stray_write(), 0) << "the outer scope goes on";
    }
    EXPECT_EQ(stray_write(), SIGSEGV);
    const EditScope again = pool->pool.edit();
    EXPECT_EQ(stray_write(), 0);
}

TEST_P(PoolProtectionTest, PoolOpensItselfWhereItWrites) {
    {
        const EditScope scope = pool->pool.edit();
        pool->write(7);
    }
    pool->pool.release(pool->page);
    EXPECT_EQ(pool->pool.entries(pool->page)[7], ShadowEntry());
    EXPECT_EQ(stray_write(), SIGSEGV);
}

TEST_P(PoolProtectionTest, EveryPageIsProtectedAndTheSwitcherIsNot) {
    const auto dies = [](std::byte& byte) {
        return signal_of([&] { *const_cast<volatile std::byte*>(&byte) = std::byte{1}; }) == SIGSEGV;
    };
    EXPECT_TRUE(dies(pool->memory.pool().front()));
    EXPECT_TRUE(dies(pool->memory.pool()[pool_bytes / 2]));
    EXPECT_TRUE(dies(pool->memory.pool().back()));
    EXPECT_FALSE(dies(pool->memory.switcher().front()));
    EXPECT_FALSE(dies(pool->memory.switcher().back()));
}

TEST_P(PoolProtectionTest, ThreadsReadAndHaveScopesOfTheirOwn) {
    std::thread([&] { EXPECT_EQ(pool->pool.entries(pool->page)[7], ShadowEntry()); }).join();

    // The other thread must exist first: it would inherit this one's scope.
    std::latch opened(1), ended(1);
    std::thread other([&] {
        opened.wait();
        {
            const EditScope scope = pool->pool.edit();
            EXPECT_EQ(stray_write(), 0);
        }
        ended.count_down();
    });
    const EditScope scope = pool->pool.edit();
    opened.count_down();
    ended.wait();
    EXPECT_EQ(stray_write(), 0) << "the end of the other thread's scope is not the end of this one's";
    other.join();
}

TEST_P(PoolProtectionTest, MemoryStaysLazyAndItsEndLeavesNothing) {
    const auto touched = [](std::span<std::byte> bytes) {
        std::vector<unsigned char> resident(bytes.size() / page_size);
        EXPECT_EQ(mincore(bytes.data(), bytes.size(), resident.data()), 0);
        return std::ranges::count_if(resident, [](unsigned char r) { return (r & 1) != 0; });
    };
    EXPECT_EQ(touched(pool->memory.all()), 0);
    {
        const EditScope scope = pool->pool.edit();
        pool->write(7);
    }
    EXPECT_EQ(touched(pool->memory.all()), 1);
    for (int i = 0; i < 100; ++i) // more than there are keys
        pool.emplace(GetParam());
    EXPECT_NE(pool->pool.guard(), nullptr);
}

INSTANTIATE_TEST_SUITE_P(Kinds, PoolProtectionTest,
                         testing::Values(PoolProtection::page_rights, PoolProtection::protection_key),
                         [](const auto& kind) {
                             return kind.param == PoolProtection::page_rights ? "PageRights"
                                                                              : "ProtectionKey";
                         });

TEST(PoolProtection, EmulatedMachineHasKeys) {
    if (std::getenv("UMBRA_EMULATED_HOST") == nullptr)
        GTEST_SKIP() << "not on an emulated host";
    EXPECT_EQ(best_pool_protection(), PoolProtection::protection_key) << "no test of keys has run";
}

TEST(PoolProtection, KeysAreTheThreadsOwn) {
    if (best_pool_protection() != PoolProtection::protection_key)
        GTEST_SKIP() << "no protection keys on this machine";
    const ProtectedPool pool(PoolProtection::protection_key);
    std::latch opened(1), tried(1);
    std::thread other([&] {
        const EditScope scope = pool.pool.edit();
        opened.count_down();
        tried.wait();
    });
    opened.wait();
    EXPECT_EQ(signal_of([&] { pool.write(7); }), SIGSEGV) << "another thread's scope is none of this one's";
    tried.count_down();
    other.join();
}

TEST(PoolProtection, ThreadThatWasThereBeforeMayEdit) {
    if (best_pool_protection() != PoolProtection::protection_key)
        GTEST_SKIP() << "no protection keys on this machine";
    std::optional<ProtectedPool> pool;
    std::latch made(1);
    std::thread early([&] {
        made.wait();
        {
            const EditScope scope = pool->pool.edit();
            pool->write(7);
        }
        EXPECT_EQ(pool->pool.entries(pool->page)[7], entry) << "reads as other threads do";
        EXPECT_EQ(signal_of([&] { pool->write(7); }), SIGSEGV);
    });
    pool.emplace(PoolProtection::protection_key);
    made.count_down();
    early.join();
}

TEST(PoolProtection, WithoutProtectionOneViewServesBoth) {
    const ProtectedPool pool(PoolProtection::none);
    EXPECT_EQ(pool.pool.guard(), nullptr);
    EXPECT_EQ(pool.memory.all().data(), pool.memory.switcher().data());
    const EditScope scope = pool.pool.edit();
    pool.write(7);
    EXPECT_EQ(pool.seen_by_machine(7), entry);
}

TEST(PoolProtection, RunsOutOfKeys) {
    if (best_pool_protection() != PoolProtection::protection_key)
        GTEST_SKIP() << "no protection keys on this machine";
    std::vector<int> keys;
    for (int key = pkey_alloc(0, 0); key >= 0; key = pkey_alloc(0, 0))
        keys.push_back(key);
    const ProtectedPool pool(PoolProtection::protection_key);
    EXPECT_NE(best_pool_protection(), PoolProtection::protection_key);
    for (const int key : keys)
        EXPECT_EQ(pkey_free(key), 0);
    EXPECT_EQ(pool.pool.guard(), nullptr);
    pool.write(7); // lives
    EXPECT_EQ(pool.seen_by_machine(7), entry);
}

} // namespace
} // namespace umbra
