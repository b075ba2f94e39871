// Unit tests of vmm/guest_space: what its accesses may do, and who is told of its stores.
#include "vmm/guest_space.hpp"

#include "tests/unit/test_guest.hpp"

#include <algorithm>
#include <utility>

#include <gtest/gtest.h>

namespace umbra {
namespace {

using namespace test;

class Recorder final : public GuestBus {
  public:
    void stored(GuestPhys at, std::optional<GuestVirt> /*linear*/, std::size_t size) override {
        stores.emplace_back(at, size);
    }
    void read_device(GuestPhys at, std::span<std::byte> into) override {
        std::ranges::fill(into, std::byte{0x5a});
        reads.emplace_back(at, into.size());
    }
    void write_device(GuestPhys at, std::span<const std::byte> from) override {
        writes.emplace_back(at, from.size());
    }
    std::vector<std::pair<GuestPhys, std::size_t>> stores, reads, writes; ///< where, and how many bytes
};
using Stores = decltype(Recorder::stores);

class GuestSpaceTest : public ::testing::Test {
  protected:
    static constexpr GuestVirt at{TestGuest::data}, user_at{TestGuest::user_data};

    /// The guest's memory with an observer.
    [[nodiscard]] GuestSpace observed() { return {guest.memory(), guest.space().paging(), &recorder}; }
    TestGuest guest;
    Recorder recorder;
};

TEST_F(GuestSpaceTest, ObserverHearsOfEachStore) {
    const GuestSpace space = observed();
    EXPECT_EQ(fault_of(space.write(at + 8, std::uint64_t{1})), no_fault);
    EXPECT_EQ(recorder.stores, (Stores{{GuestPhys(TestGuest::data + 8), 8}}));
    std::uint64_t value = 0;
    EXPECT_EQ(fault_of(space.read(at + 8, value)), no_fault);
    EXPECT_EQ(value, 1U);
    EXPECT_EQ(recorder.stores.size(), 1U);
}

TEST_F(GuestSpaceTest, ObserverHearsOfEachPageByItsPhysicalAddress) {
    // The next page's frame is not the next frame.
    constexpr std::uint64_t other = TestGuest::handlers + 0x1000;
    guest.put<std::uint64_t>(0x4000 + ((TestGuest::data + page_size) >> page_shift) * 8,
                             other | TestGuest::kernel_rights);
    const std::array<std::byte, 16> bytes{};
    EXPECT_EQ(fault_of(observed().write(at + (page_size - 4), std::span(bytes))), no_fault);
    EXPECT_EQ(recorder.stores,
              (Stores{{GuestPhys(TestGuest::data + page_size - 4), 4}, {GuestPhys(other), 12}}));
}

TEST_F(GuestSpaceTest, ObserverHearsNothingOfWhatIsNotStored) {
    const std::array<std::byte, 16> bytes{};
    guest.map(TestGuest::data + page_size, 0);
    EXPECT_EQ(fault_of(observed().write(at + (page_size - 4), std::span(bytes))), pf(PageFault::write));
    guest.put<std::uint64_t>(0x4000 + (TestGuest::data >> page_shift) * 8,
                             0x4000'0000 | TestGuest::kernel_rights);
    EXPECT_EQ(fault_of(observed().write(at, std::uint64_t{1})), no_fault); // outside RAM
    EXPECT_EQ(recorder.stores, Stores{});
}

TEST_F(GuestSpaceTest, WhatIsNotRamIsTheDevices) {
    constexpr std::uint64_t device = 0x4000'0000;
    guest.put<std::uint64_t>(0x4000 + (TestGuest::data >> page_shift) * 8, device | TestGuest::kernel_rights);
    // The last bytes of the device's page, and the first ones of the next, which is RAM.
    const GuestVirt across = at + (page_size - 3);
    std::uint64_t value = 0x0807'0605'0403'0201;
    EXPECT_EQ(fault_of(observed().write(across, value)), no_fault);
    EXPECT_EQ(recorder.writes, (Stores{{GuestPhys(device + page_size - 3), 3}}));
    EXPECT_EQ(recorder.stores, (Stores{{GuestPhys(TestGuest::data + page_size), 5}}));
    EXPECT_EQ(fault_of(observed().read(across, value)), no_fault);
    EXPECT_EQ(recorder.reads, recorder.writes);
    EXPECT_EQ(value, 0x0807'0605'045a'5a5aU);
    // And with nobody to ask, all-ones.
    EXPECT_EQ(fault_of(guest.space().read(at, value)), no_fault);
    EXPECT_EQ(value, ~std::uint64_t{0});
}

TEST_F(GuestSpaceTest, AccessesAreImplicitUnlessToldOtherwise) {
    guest.cpu.cr4 |= cr4::smap;
    guest.cpu.rflags |= rflags::alignment_check; // means nothing here
    const GuestSpace space = observed();
    std::uint64_t value = 0;
    EXPECT_EQ(fault_of(space.read(user_at, value)), pf(PageFault::present));
    EXPECT_EQ(fault_of(space.write(user_at, value)), pf(PageFault::present | PageFault::write));
    EXPECT_EQ(recorder.stores, Stores{});
    EXPECT_EQ(fault_of(space.read(user_at, value, {.ac = true})), no_fault);
    EXPECT_EQ(fault_of(space.write(user_at, value, {.ac = true})), no_fault);
    EXPECT_EQ(fault_of(space.read(user_at, value, {.user = true})), no_fault);
    EXPECT_EQ(recorder.stores, (Stores{{GuestPhys(TestGuest::user_data), 8}}));
}

TEST_F(GuestSpaceTest, PeekIsNotStoppedBySmap) {
    guest.cpu.cr4 |= cr4::smap | cr4::smep;
    guest.put<std::uint8_t>(TestGuest::user_code, 0xc3);
    std::array<std::byte, 4> bytes{};
    EXPECT_EQ(guest.space().peek(GuestVirt(TestGuest::user_code), bytes), bytes.size());
    EXPECT_EQ(bytes[0], std::byte{0xc3});
}

} // namespace
} // namespace umbra
