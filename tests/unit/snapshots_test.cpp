// Unit tests of shadow/snapshots.hpp.

#include "shadow/snapshots.hpp"

#include <algorithm>

#include <gtest/gtest.h>

namespace umbra::test {
namespace {

constexpr std::size_t pages = 8;

class SnapshotsTest : public ::testing::Test {
  public:
    SnapshotsTest() {
        for (std::size_t i = 0; i < pages; ++i)
            std::ranges::fill(page(i), i + 1);
    }
    std::span<std::uint64_t, entries_per_table> page(std::size_t i) {
        return snapshots.of(static_cast<TableIndex>(i));
    }
    /// Expects that what was given back, and nothing else, is empty.
    void expect_released(const std::vector<bool>& released) {
        for (std::size_t i = 0; i < pages; ++i) {
            const std::uint64_t wanted = released.at(i) ? 0 : i + 1;
            EXPECT_TRUE(std::ranges::all_of(page(i), [&](std::uint64_t n) { return n == wanted; })) << i;
        }
    }
    Snapshots snapshots{pages};
};

TEST_F(SnapshotsTest, GiveBackWhatTheyAreTold) {
    snapshots.release({});
    expect_released(std::vector<bool>(pages));
    snapshots.release({TableIndex{5}});
    expect_released({false, false, false, false, false, true, false, false});
    snapshots.release({TableIndex{7}, TableIndex{2}, TableIndex{0}, TableIndex{1}});
    expect_released({true, true, true, false, false, true, false, true});
}

TEST_F(SnapshotsTest, CanBeWrittenToAgain) {
    snapshots.release({TableIndex{3}, TableIndex{4}});
    std::ranges::fill(page(3), 4);
    expect_released({false, false, false, false, true, false, false, false});
}

} // namespace
} // namespace umbra::test
