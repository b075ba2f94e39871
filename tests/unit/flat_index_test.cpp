// Unit tests of shadow/flat_index.hpp: what was put in is found, whatever else came and went.

#include "shadow/flat_index.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <random>
#include <vector>

namespace umbra::test {
namespace {

/// All records' hashes are equal in most bits, so that they stand in each other's way.
std::size_t hash_of(std::uint32_t number) {
    return number % 5;
}

std::optional<std::uint32_t> find(const FlatIndex& index, std::uint32_t number) {
    return index.find(hash_of(number), [=](std::uint32_t other) { return other == number; });
}

TEST(FlatIndex, FindsByTheKeyNotByTheHash) {
    FlatIndex index(4);
    index.insert(1, 10);
    index.insert(1, 20);
    EXPECT_EQ(index.find(1, [](std::uint32_t number) { return number > 10; }), 20U);
    EXPECT_EQ(index.find(1, [](std::uint32_t number) { return number > 20; }), std::nullopt);
    EXPECT_EQ(index.find(2, [](std::uint32_t) { return true; }), 20U) << "probing goes on from there";
    EXPECT_EQ(index.find(0, [](std::uint32_t) { return true; }), std::nullopt);
}

TEST(FlatIndex, RandomInsertionsAndErasures) {
    constexpr std::uint32_t records = 40;
    FlatIndex index(records);
    std::vector<bool> known(records);
    std::mt19937 random(1); // NOLINT(cert-msc51-cpp): the same each time
    for (int step = 0; step < 20'000; ++step) {
        const auto number = static_cast<std::uint32_t>(random() % records);
        if (known[number])
            index.erase(number, hash_of);
        else
            index.insert(hash_of(number), number);
        known[number] = !known[number];
        ASSERT_EQ(index.size(), static_cast<std::size_t>(std::ranges::count(known, true)));
        for (std::uint32_t other = 0; other < records; ++other)
            ASSERT_EQ(find(index, other).has_value(), known[other]) << other << " after step " << step;
    }
}

TEST(FlatIndex, HoldsNothingAfterClear) {
    FlatIndex index(8);
    for (std::uint32_t number = 0; number < 8; ++number)
        index.insert(hash_of(number), number);
    index.clear();
    EXPECT_EQ(index.size(), 0U);
    for (std::uint32_t number = 0; number < 8; ++number)
        EXPECT_EQ(find(index, number), std::nullopt);
}

} // namespace
} // namespace umbra::test
