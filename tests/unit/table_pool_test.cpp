// Unit tests of shadow/table_pool.hpp.
#include "shadow/table_pool.hpp"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <set>
#include <vector>

#include <gtest/gtest.h>
#include <sys/mman.h>

namespace umbra {
namespace {

constexpr std::size_t group = TablePool::group_pages;
constexpr MachineFrame first_frame{0x12'3456};

/// Anonymous memory for a pool.
class PoolMemory {
  public:
    explicit PoolMemory(std::size_t groups) : size_(groups * group * page_size) {
        void* const memory = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED)
            throw std::bad_alloc();
        memory_ = static_cast<std::byte*>(memory);
    }
    ~PoolMemory() { munmap(memory_, size_); }
    PoolMemory(const PoolMemory&) = delete;
    PoolMemory& operator=(const PoolMemory&) = delete;
    PoolMemory(PoolMemory&&) = delete;
    PoolMemory& operator=(PoolMemory&&) = delete;

    [[nodiscard]] std::span<std::byte> bytes() const { return {memory_, size_}; }
    /// How many of the pages exist.
    [[nodiscard]] std::size_t touched() const {
        std::vector<unsigned char> resident(size_ / page_size);
        EXPECT_EQ(mincore(memory_, size_, resident.data()), 0);
        return static_cast<std::size_t>(
            std::ranges::count_if(resident, [](unsigned char r) { return (r & 1) != 0; }));
    }

  private:
    std::byte* memory_ = nullptr;
    std::size_t size_;
};

bool all_zero(const TablePool& pool, TableIndex page) {
    return std::ranges::all_of(pool.entries(page), [](ShadowEntry entry) { return entry == ShadowEntry(); });
}

void fill(const TablePool& pool, TableIndex page) {
    std::ranges::fill(pool.entries(page), ShadowEntry(pool.frame(page), entry_bit::present));
}

TEST(TablePool, GroupsAreContiguous) {
    const PoolMemory memory(3);
    TablePool pool(first_frame, memory.bytes());
    EXPECT_EQ(pool.capacity(), 3 * group);
    for (std::size_t g = 0; g < 3; ++g) {
        for (std::size_t i = 0; i < group; ++i) {
            const auto page = pool.allocate();
            ASSERT_TRUE(page);
            EXPECT_EQ(pool.frame(*page), first_frame + (g * group + i));
        }
    }
}

TEST(TablePool, GroupIsUsedUpBeforeTheNext) {
    const PoolMemory memory(2);
    TablePool pool(first_frame, memory.bytes());
    std::vector<TableIndex> pages;
    for (std::size_t i = 0; i < group; ++i)
        pages.push_back(pool.allocate().value());
    pool.release(pages[3]);
    pool.release(pages[7]);
    const std::set again{pool.allocate().value(), pool.allocate().value()};
    EXPECT_EQ(again, (std::set{pages[3], pages[7]}));
    EXPECT_EQ(pool.frame(pool.allocate().value()), first_frame + group);
}

TEST(TablePool, LastReleasedIsNextAllocated) {
    const PoolMemory memory(1);
    TablePool pool(first_frame, memory.bytes());
    const TableIndex a = pool.allocate().value();
    const TableIndex b = pool.allocate().value();
    const TableIndex c = pool.allocate().value();
    pool.release(b);
    pool.release(a);
    pool.release(c);
    EXPECT_EQ(pool.allocate(), c);
    EXPECT_EQ(pool.allocate(), a);
    EXPECT_EQ(pool.allocate(), b);
}

TEST(TablePool, PagesAreZeroedAndDoNotOverlap) {
    const PoolMemory memory(1);
    TablePool pool(first_frame, memory.bytes());
    const TableIndex a = pool.allocate().value();
    const TableIndex b = pool.allocate().value();
    EXPECT_TRUE(all_zero(pool, a));
    fill(pool, a);
    EXPECT_TRUE(all_zero(pool, b));
    fill(pool, b);
    pool.release(a);
    EXPECT_TRUE(all_zero(pool, a));
    EXPECT_TRUE(
        std::ranges::all_of(pool.entries(b), [&](ShadowEntry e) { return e.table() == pool.frame(b); }));
    EXPECT_EQ(pool.allocate(), a);
    EXPECT_TRUE(all_zero(pool, a));
}

TEST(TablePool, EntriesLieInTheMemoryOfTheirFrame) {
    const PoolMemory memory(1);
    TablePool pool(first_frame, memory.bytes());
    (void)pool.allocate();
    const TableIndex page = pool.allocate().value();
    const auto offset = (pool.frame(page) - first_frame) * page_size;
    EXPECT_EQ(static_cast<void*>(pool.entries(page).data()), memory.bytes().data() + offset);
    EXPECT_EQ(pool.entries(page).size_bytes(), page_size);
}

TEST(TablePool, Exhaustion) {
    const PoolMemory memory(2);
    TablePool pool(first_frame, memory.bytes());
    std::set<TableIndex> pages;
    for (std::size_t i = 0; i < 2 * group; ++i)
        pages.insert(pool.allocate().value());
    EXPECT_EQ(pages.size(), 2 * group) << "no page is handed out twice";
    EXPECT_EQ(pool.allocate(), std::nullopt);
    EXPECT_EQ(pool.in_use(), 2 * group) << "a failed allocation counts nothing";
    pool.release(*pages.begin());
    EXPECT_EQ(pool.allocate(), *pages.begin());
    EXPECT_EQ(pool.allocate(), std::nullopt);
}

TEST(TablePool, Counts) {
    const PoolMemory memory(1);
    TablePool pool(first_frame, memory.bytes());
    EXPECT_EQ(pool.in_use(), 0U);
    EXPECT_EQ(pool.high_water(), 0U);
    const TableIndex a = pool.allocate().value();
    const TableIndex b = pool.allocate().value();
    EXPECT_EQ(pool.in_use(), 2U);
    pool.release(a);
    pool.release(b);
    EXPECT_EQ(pool.in_use(), 0U);
    (void)pool.allocate();
    EXPECT_EQ(pool.in_use(), 1U);
    EXPECT_EQ(pool.high_water(), 2U);
}

TEST(TablePool, FindsThePageOfAFrame) {
    const PoolMemory memory(1);
    TablePool pool(first_frame, memory.bytes());
    for (std::size_t i = 0; i < group; ++i) {
        const TableIndex page = pool.allocate().value();
        EXPECT_EQ(pool.page_of(pool.frame(page)), page);
    }
    EXPECT_EQ(pool.page_of(MachineFrame(first_frame.number() - 1)), std::nullopt);
    EXPECT_EQ(pool.page_of(first_frame + group), std::nullopt);
    EXPECT_EQ(pool.page_of(MachineFrame(0)), std::nullopt);
}

TEST(TablePool, TouchesOnlyWhatIsHandedOut) {
    const PoolMemory memory(4);
    TablePool pool(first_frame, memory.bytes());
    EXPECT_EQ(memory.touched(), 0U);
    for (int i = 0; i < 3; ++i)
        fill(pool, pool.allocate().value());
    EXPECT_EQ(memory.touched(), 3U);
}

TEST(TablePool, WithoutMemoryIsExhausted) {
    TablePool pool(first_frame, {});
    EXPECT_EQ(pool.allocate(), std::nullopt);
}

} // namespace
} // namespace umbra
