// Unit tests of vmm/loader/firmware: what kernels find where firmware leaves it, and that a kernel's own
// memory is left to it.
#include "vmm/loader/firmware.hpp"

#include "tests/unit/loader_fixture.hpp"
#include "vmm/devices/vga.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <fmt/core.h>
#include <gtest/gtest.h>

namespace umbra {
namespace {

struct Span {
    std::uint64_t begin, end;
};

/// A kernel that wants `kernel` for itself, with firmware around it.
class Placed {
  public:
    explicit Placed(std::vector<Span> kernel) : kernel_(std::move(kernel)) {
        for (const Span& span : kernel_) {
            plan_.claim(GuestPhys{span.begin}, span.end - span.begin, "the kernel");
            std::ranges::fill(bytes(span), std::byte{0xee});
        }
        rsdp = place_firmware(plan_).value();
    }

    std::uint64_t rsdp = 0;

    [[nodiscard]] std::uint64_t word(std::uint64_t at) const { return ram_.at<std::uint16_t>(GuestPhys{at}); }
    [[nodiscard]] std::uint64_t dword(std::uint64_t at) const {
        return ram_.at<std::uint32_t>(GuestPhys{at});
    }
    [[nodiscard]] std::string text(std::uint64_t at, std::size_t size) const {
        return ram_.text(GuestPhys{at}, size);
    }
    [[nodiscard]] const MemoryPlan& plan() const { return plan_; }

    /// As kernels look for ACPI's root pointer and for the MP floating pointer: in the extended BIOS data
    /// area's first KB, and from `begin` to 1 MB.
    [[nodiscard]] std::optional<std::uint64_t> scan(std::string_view signature, std::uint64_t begin) const {
        const std::uint64_t extended = word(0x40e) << 4;
        for (const Span& span :
             {Span{extended, extended == 0 ? 0 : extended + 1024}, Span{begin, 0x100000}}) {
            for (std::uint64_t at = span.begin; at < span.end; at += 16) {
                if (text(at, signature.size()) == signature)
                    return at;
            }
        }
        return std::nullopt;
    }
    [[nodiscard]] std::optional<std::uint64_t> scan_rsdp() const { return scan("RSD PTR ", 0xe0000); }
    [[nodiscard]] std::optional<std::uint64_t> scan_mp() const { return scan("_MP_", 0xf0000); }

    /// The tables are whole, not in usable memory, and the kernel is as it was.
    void check() const {
        expect_table(rsdp, 36);
        for (const std::uint64_t root : {dword(rsdp + 16), dword(rsdp + 24)}) { // RSDT and XSDT
            expect_table(root, dword(root + 4));
            const std::uint64_t size = text(root, 4) == "RSDT" ? 4 : 8;
            for (std::uint64_t at = root + 36; at < root + dword(root + 4); at += size)
                expect_table(dword(at), dword(dword(at) + 4));
        }
        for (const Span& span : kernel_)
            EXPECT_TRUE(std::ranges::all_of(bytes(span), [](std::byte byte) {
                return byte == std::byte{0xee};
            })) << fmt::format("{:#x}", span.begin);
        if (const auto mp = scan_mp()) {
            expect_table(*mp, 16);
            EXPECT_EQ(dword(*mp + 4), *mp + 16);
            expect_table(*mp + 16, word(*mp + 20));
        }
        EXPECT_EQ(vga_text(vga_screen(ram_.memory(), {})), std::string(25, '\n'));
    }
    [[nodiscard]] bool is_usable(std::uint64_t at) const {
        return std::ranges::any_of(plan_.memory_map(), [at](const boot_e820_entry& entry) {
            return entry.type == e820_ram && at - entry.addr < entry.size;
        });
    }

  private:
    [[nodiscard]] std::span<std::byte> bytes(const Span& span) const {
        return ram_.memory().range(GuestPhys{span.begin}, span.end - span.begin);
    }
    void expect_table(std::uint64_t at, std::uint64_t size) const {
        unsigned sum = 0;
        for (const std::byte byte : bytes({at, at + size}))
            sum += std::to_integer<unsigned>(byte);
        EXPECT_EQ(sum & 0xff, 0U) << fmt::format("{:#x}", at);
        EXPECT_NE(dword(at), 0U) << fmt::format("{:#x}", at);
        EXPECT_FALSE(is_usable(at)) << fmt::format("{:#x}", at);
        EXPECT_FALSE(is_usable(at + size - 1)) << fmt::format("{:#x}", at);
    }

    std::vector<Span> kernel_;
    TestRam ram_{16 * mib};
    MemoryPlan plan_{ram_.memory()};
};

TEST(FirmwareTest, IsWhereAPcHasIt) {
    const Placed placed({{0x100000, 0x200000}});
    placed.check();
    EXPECT_EQ(placed.rsdp, 0xf0000U);
    EXPECT_EQ(placed.scan_rsdp(), 0xf0000U);
    EXPECT_EQ(placed.dword(placed.dword(placed.rsdp + 16) + 36) >> 12, 0xf0U) << "the tables behind it";
    EXPECT_EQ(placed.scan_mp(), 0xf8000U);
    EXPECT_EQ(placed.word(0x400), 0x3f8U);
    EXPECT_EQ(placed.word(0x40e), 0x9fc0U);
    EXPECT_EQ(placed.word(0x9fc00), 1U);
    EXPECT_EQ(placed.plan().memory_map().size(), 4U);
}

// The first segment of an ELF that is linked to 1 MB, with its headers.
TEST(FirmwareTest, ThePageBelowOneMegabyteIsNobodys) {
    const Placed placed({{0xff000, 0x102000}});
    placed.check();
    EXPECT_EQ(placed.rsdp, 0xf0000U);
    EXPECT_EQ(placed.scan_mp(), 0xf8000U);
}

TEST(FirmwareTest, MakesWayWithinWhatIsScanned) {
    for (const std::vector<Span>& kernel :
         std::vector<std::vector<Span>>{{{0xf0000, 0xf0001}},
                                        {{0xf0000, 0xf8000}},
                                        {{0xf0010, 0xff000}},
                                        {{0xf0000, 0x100000}},
                                        {{0xc0000, 0xfff00}},
                                        {{0xc0000, 0x100000}},
                                        {{0x9fc80, 0xa0000}, {0xf0000, 0x200000}},
                                        {{0, 0x9fc00}},
                                        {{0x480, 0x600}, {0xe8000, 0xf8100}}}) {
        const Placed placed(kernel);
        placed.check();
        EXPECT_EQ(placed.scan_rsdp(), placed.rsdp) << fmt::format("{:#x}", kernel.back().begin);
    }
    EXPECT_EQ(Placed({{0xf0000, 0x100000}}).rsdp, 0xe0000U);
    EXPECT_EQ(Placed({{0xe0000, 0x100000}}).rsdp, 0x9fc10U) << "behind the extended area's length";
    EXPECT_EQ(Placed({{0xf0000, 0x100000}}).scan_mp(), 0x9fc10U);
}

TEST(FirmwareTest, OutOfAKernelsWayProtocolsTellOfIt) {
    for (const Span& extended : {Span{0x9fc00, 0xa0000}, Span{0x400, 0x500}}) {
        const Placed placed({extended, {0xc0000, 0x100000}});
        placed.check();
        EXPECT_EQ(placed.scan_rsdp(), std::nullopt);
        EXPECT_EQ(placed.scan_mp(), std::nullopt);
        EXPECT_EQ(placed.rsdp, 16 * mib - 0x1000) << "reserved";
        EXPECT_TRUE(placed.is_usable(16 * mib - 0x2001));
        EXPECT_EQ(placed.plan().memory_map().size(), 6U);
    }
    EXPECT_EQ(Placed({{0x9fc00, 0xa0000}}).word(0x40e), 0U) << "there is no extended area";
}

TEST(FirmwareTest, NeedsRoom) {
    EXPECT_THROW(Placed({{0, 0xa0000}, {0xc0000, 16 * mib}}), StartupError);
}

// --- MemoryPlan

TEST(MemoryPlanTest, KernelsGetAllRamAndTheRestWhatTheMapCallsUsable) {
    const TestRam ram(4 * mib);
    const MemoryPlan plan(ram.memory());
    EXPECT_TRUE(plan.is_free(GuestPhys{0}, 0x9fc00));
    EXPECT_FALSE(plan.is_free(GuestPhys{0}, 0x9fc01));
    EXPECT_TRUE(plan.is_unclaimed(GuestPhys{0}, 0xa0000));
    EXPECT_FALSE(plan.is_unclaimed(GuestPhys{0}, 0xa0001));
    EXPECT_FALSE(plan.is_unclaimed(GuestPhys{0xb8000}, 1));
    EXPECT_FALSE(plan.is_free(GuestPhys{mib - 1}, 2));
    EXPECT_TRUE(plan.is_unclaimed(GuestPhys{0xc0000}, 4 * mib - 0xc0000));
    EXPECT_TRUE(plan.is_free(GuestPhys{mib}, 3 * mib));
    EXPECT_FALSE(plan.is_free(GuestPhys{mib}, 3 * mib + 1));
    EXPECT_FALSE(plan.is_free(GuestPhys{4 * mib}, 1));
    EXPECT_FALSE(plan.is_free(GuestPhys{mib}, ~std::uint64_t{0}));
}

TEST(MemoryPlanTest, ReservesPagesAtTheTopOfWhatIsFree) {
    const TestRam ram(4 * mib);
    MemoryPlan plan(ram.memory());
    plan.claim(GuestPhys{4 * mib - 1}, 1, "the last byte");
    EXPECT_EQ(plan.reserve(page_size + 1, "it"), GuestPhys{4 * mib - 0x3000});
    EXPECT_FALSE(plan.is_unclaimed(GuestPhys{4 * mib - 0x3000}, 1));
    const auto& map = plan.memory_map();
    ASSERT_EQ(map.size(), 6U);
    const auto expect = [&map](std::size_t at, std::uint64_t begin, std::uint64_t end, std::uint32_t type) {
        EXPECT_EQ(+map[at].addr, begin);
        EXPECT_EQ(map[at].addr + map[at].size, end);
        EXPECT_EQ(+map[at].type, type);
    };
    expect(3, mib, 4 * mib - 0x3000, e820_ram);
    expect(4, 4 * mib - 0x3000, 4 * mib - 0x1000, e820_reserved);
    expect(5, 4 * mib - 0x1000, 4 * mib, e820_ram);
}

} // namespace
} // namespace umbra
