// Unit tests of shadow/reverse_map.hpp.
#include "shadow/reverse_map.hpp"

#include <vector>

#include <gtest/gtest.h>

namespace umbra {
namespace {

constexpr std::uint64_t frames = 1000;
constexpr MachineFrame one{70}, other{71};
constexpr ShadowSlot first{TableIndex{3}, 5}, second{TableIndex{3}, 6}, third{TableIndex{4}, 5};

std::vector<ShadowSlot> slots(std::span<const ShadowSlot> found) {
    return {found.begin(), found.end()};
}

TEST(ReverseMap, KnowsOnlyWhatItWasAskedToTrack) {
    ReverseMap map(frames);
    EXPECT_FALSE(map.tracked(one));
    map.add(one, first);
    EXPECT_TRUE(map.small(one).empty());
    EXPECT_TRUE(map.track(one));
    EXPECT_TRUE(map.tracked(one));
    EXPECT_TRUE(map.small(one).empty()) << "what was there before must be told";
    map.add(one, first);
    map.add(other, second);
    EXPECT_EQ(slots(map.small(one)), (std::vector{first}));
    EXPECT_FALSE(map.tracked(other));
    EXPECT_TRUE(map.small(other).empty());
}

TEST(ReverseMap, EachFrameHasItsOwnMark) {
    // Neighbours, and frames with the same place in another word of marks.
    ReverseMap map(frames);
    for (const std::uint64_t tracked : {0U, 63U, 64U, 500U, 999U})
        EXPECT_TRUE(map.track(MachineFrame(tracked)));
    for (std::uint64_t frame = 0; frame < frames; ++frame) {
        const bool wanted = frame == 0 || frame == 63 || frame == 64 || frame == 500 || frame == 999;
        EXPECT_EQ(map.tracked(MachineFrame(frame)), wanted) << frame;
    }
    map.untrack(MachineFrame(64));
    EXPECT_FALSE(map.tracked(MachineFrame(64)));
    EXPECT_TRUE(map.tracked(MachineFrame(0)));
    EXPECT_TRUE(map.tracked(MachineFrame(63)));
}

TEST(ReverseMap, FramesOutOfBoundsAreNotTracked) {
    ReverseMap map(frames);
    for (const std::uint64_t frame : {frames, frames + 1, std::uint64_t{1} << 40, ~std::uint64_t{0} >> 12}) {
        EXPECT_FALSE(map.track(MachineFrame(frame))) << frame;
        EXPECT_FALSE(map.tracked(MachineFrame(frame))) << frame;
        map.untrack(MachineFrame(frame));
        map.add(MachineFrame(frame), first);
        EXPECT_TRUE(map.small(MachineFrame(frame)).empty()) << frame;
    }
    ReverseMap none(0);
    EXPECT_FALSE(none.track(MachineFrame(0)));
}

TEST(ReverseMap, SlotsComeAndGo) {
    ReverseMap map(frames);
    ASSERT_TRUE(map.track(one));
    ASSERT_TRUE(map.track(other));
    map.add(one, first);
    map.add(one, second);
    map.add(one, third);
    map.add(other, third);
    map.remove(one, second);
    EXPECT_EQ(slots(map.small(one)), (std::vector{first, third})) << "same slot, same table: both must match";
    map.remove(one, second);
    map.remove(one, first);
    map.remove(one, third);
    EXPECT_TRUE(map.small(one).empty());
    EXPECT_TRUE(map.tracked(one));
    EXPECT_EQ(slots(map.small(other)), (std::vector{third}));
}

TEST(ReverseMap, WhatIsNotTrackedAnyMoreIsForgotten) {
    ReverseMap map(frames);
    ASSERT_TRUE(map.track(one));
    map.add(one, first);
    map.untrack(one);
    EXPECT_TRUE(map.small(one).empty());
    ASSERT_TRUE(map.track(one));
    EXPECT_TRUE(map.small(one).empty());
}

TEST(ReverseMap, LargePagesAreKnownAlwaysAndByTheirSize) {
    ReverseMap map(frames);
    constexpr MachineFrame page{512};
    map.add_large(page, 2, first);
    map.add_large(page, 2, second);
    map.add_large(page, 3, third);
    EXPECT_EQ(slots(map.large(page, 2)), (std::vector{first, second}));
    EXPECT_EQ(slots(map.large(page, 3)), (std::vector{third}));
    EXPECT_TRUE(map.large(MachineFrame(1024), 2).empty());
    EXPECT_TRUE(map.small(page).empty());
    EXPECT_FALSE(map.tracked(page));
    map.remove_large(page, 3, first); // of the other size
    map.remove_large(MachineFrame(1024), 2, first);
    map.remove_large(page, 2, first);
    EXPECT_EQ(slots(map.large(page, 2)), (std::vector{second}));
    EXPECT_EQ(slots(map.large(page, 3)), (std::vector{third}));
    map.remove_large(page, 2, second);
    EXPECT_TRUE(map.large(page, 2).empty());
    map.clear_large();
    EXPECT_TRUE(map.large(page, 3).empty());
}

} // namespace
} // namespace umbra
