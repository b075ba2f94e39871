// Unit tests of vmm/devices/fw_cfg, through the ports by which a guest reaches it.
#include "vmm/devices/fw_cfg.hpp"

#include "vmm/devices/platform.hpp"
#include "vmm/error.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

namespace umbra {
namespace {

constexpr std::uint16_t selector = 0x510;
constexpr std::uint16_t data = 0x511;
constexpr std::uint16_t dma_high = 0x514;
constexpr std::uint16_t dma_low = 0x518;

std::vector<std::byte> bytes_of(std::string_view text) {
    const auto bytes = std::as_bytes(std::span(text));
    return {bytes.begin(), bytes.end()};
}

class FwCfgTest : public ::testing::Test {
  protected:
    FwCfgTest() {
        platform.observe_dma([this](GuestPhys at, std::size_t size) { stores.emplace_back(at, size); });
    }

    PlatformConfig config() {
        PlatformConfig platform_config;
        platform_config.fw_cfg = {
            .memory = memory, .cpus = 3, .files = {{"opt/b", bytes_of("hello")}, {"etc/a", bytes_of("")}}};
        return platform_config;
    }

    void select(std::uint16_t key) { platform.port_write(Port{selector}, 2, key); }
    std::string read(std::size_t count) {
        std::string text;
        while (text.size() < count)
            text.push_back(static_cast<char>(platform.port_read(Port{data}, 1)));
        return text;
    }
    std::uint64_t number(std::uint16_t key, unsigned size) {
        select(key);
        std::uint64_t value = 0;
        for (unsigned i = 0; i < size; ++i)
            value |= std::uint64_t{platform.port_read(Port{data}, 1)} << (8 * i);
        EXPECT_EQ(platform.port_read(Port{data}, 1), 0U) << "nothing follows";
        return value;
    }
    void put_big_endian(std::uint64_t at, std::uint64_t value, unsigned size) {
        for (unsigned i = 0; i < size; ++i)
            ram.at(at + i) = static_cast<std::byte>(value >> (8 * (size - 1 - i)));
    }
    /// Has a request carried out; its control field afterwards.
    std::uint32_t transfer(std::uint64_t request, std::uint32_t control, std::uint64_t length,
                           std::uint64_t address) {
        put_big_endian(request, control, 4);
        put_big_endian(request + 4, length, 4);
        put_big_endian(request + 8, address, 8);
        platform.port_write(Port{dma_high}, 4, 0);
        platform.port_write(Port{dma_low}, 4, __builtin_bswap32(static_cast<std::uint32_t>(request)));
        return __builtin_bswap32(memory.read<std::uint32_t>(GuestPhys(request)).value_or(0));
    }
    [[nodiscard]] std::string text(std::uint64_t at, std::size_t size) const {
        std::string value;
        for (std::size_t i = 0; i < size; ++i)
            value.push_back(static_cast<char>(ram.at(at + i)));
        return value;
    }

    std::vector<std::byte> ram = std::vector<std::byte>(0x4000, std::byte{'.'});
    GuestMemory memory{std::vector<GuestMemory::Region>{{GuestPhys{0}, ram}}};
    Platform platform{config()};
    std::vector<std::pair<GuestPhys, std::size_t>> stores;
};

constexpr std::uint32_t control_read = 0x02, control_skip = 0x04, control_select = 0x08, control_write = 0x10;
constexpr std::uint32_t select_hello = 0x21U << 16 | control_select;

TEST_F(FwCfgTest, KnownItems) {
    select(0);
    EXPECT_EQ(read(6), std::string("QEMU\0\0", 6));
    EXPECT_EQ(number(0x01, 4), 3U) << "traditional and DMA";
    EXPECT_EQ(number(0x03, 8), 0x4000U) << "RAM";
    EXPECT_EQ(number(0x05, 2), 3U) << "CPUs";
    EXPECT_EQ(number(0x0f, 2), 3U) << "at most";
    EXPECT_EQ(platform.unclaimed(), UnclaimedAccesses{});
}

TEST_F(FwCfgTest, DirectoryIsSortedAndBigEndian) {
    using namespace std::string_literals;
    select(0x19);
    EXPECT_EQ(read(4), "\0\0\0\x02"s);
    EXPECT_EQ(read(64), "\0\0\0\0\0\x20\0\0etc/a"s + std::string(51, '\0'));
    EXPECT_EQ(read(64), "\0\0\0\x05\0\x21\0\0opt/b"s + std::string(51, '\0'));
    EXPECT_EQ(read(2), "\0\0"s);
}

TEST_F(FwCfgTest, SelectingBeginsAnew) {
    select(0x21);
    EXPECT_EQ(read(3), "hel");
    select(0x4021); // the write channel's bit
    EXPECT_EQ(read(7), std::string("hello\0\0", 7));
    select(0x22);
    EXPECT_EQ(read(2), std::string(2, '\0')) << "no such item";
    select(0xffff);
    EXPECT_EQ(read(2), std::string(2, '\0'));
}

TEST_F(FwCfgTest, ItemsCannotBeWritten) {
    select(0x21);
    platform.port_write(Port{data}, 1, 'x');
    platform.port_write(Port{selector}, 1, 0x19); // a byte selects nothing
    EXPECT_EQ(read(5), "hello");
}

TEST_F(FwCfgTest, DmaRegisterHasASignature) {
    EXPECT_EQ(platform.port_read(Port{dma_high}, 4), 0x554d'4551U) << "QEMU";
    EXPECT_EQ(platform.port_read(Port{dma_low}, 4), 0x4746'4320U) << " CFG";
    EXPECT_EQ(platform.port_read(Port{0x51b}, 1), static_cast<std::uint32_t>('G'));
}

TEST_F(FwCfgTest, DmaReadsOnAndFillsWithZeros) {
    EXPECT_EQ(transfer(0x100, select_hello | control_read, 3, 0x200), 0U);
    EXPECT_EQ(text(0x200, 4), "hel.");
    EXPECT_EQ(transfer(0x100, control_read, 4, 0x200), 0U);
    EXPECT_EQ(text(0x200, 5), std::string("lo\0\0.", 5));
    EXPECT_EQ(transfer(0x100, select_hello | control_read, 0, 0x200), 0U);
    EXPECT_EQ(text(0x200, 5), std::string("lo\0\0.", 5));
    EXPECT_EQ(read(1), "h") << "both interfaces have one place in one item";
}

TEST_F(FwCfgTest, DmaSkipsAndSelects) {
    EXPECT_EQ(transfer(0x100, select_hello | control_skip, 4, 0), 0U);
    EXPECT_EQ(read(1), "o");
    EXPECT_EQ(transfer(0x100, select_hello, 0, 0), 0U);
    EXPECT_EQ(read(1), "h");
    EXPECT_EQ(transfer(0x100, control_skip, 0xffff'ffff, 0), 0U);
    EXPECT_EQ(read(1), std::string(1, '\0'));
}

TEST_F(FwCfgTest, DmaErrors) {
    EXPECT_EQ(transfer(0x100, select_hello | control_write, 1, 0x200), 1U) << "items are read-only";
    EXPECT_EQ(transfer(0x100, select_hello | control_read, 5, 0x4000), 1U);
    EXPECT_EQ(transfer(0x100, select_hello | control_read, 5, 0x3ffc), 1U);
    EXPECT_EQ(text(0x3ffc, 4), "....") << "all or nothing";
    EXPECT_EQ(transfer(0x100, select_hello | control_read, 5, ~std::uint64_t{0} - 2), 1U);
    EXPECT_EQ(transfer(0x100, select_hello | control_read, 0xffff'ffff, 0x200), 1U);
    EXPECT_EQ(read(5), "hello") << "what failed has read nothing";
    const std::vector<std::byte> before = ram;
    platform.port_write(Port{dma_high}, 4, 0xffff'ffff);
    platform.port_write(Port{dma_low}, 4, 0xf0ff'ffff);
    platform.port_write(Port{dma_low}, 4, __builtin_bswap32(0x3ff8)); // not all of the request is RAM
    EXPECT_EQ(ram, before);
}

TEST_F(FwCfgTest, HighHalfOfTheRequestCountsOnce) {
    put_big_endian(0x100, select_hello | control_read, 4);
    put_big_endian(0x104, 5, 4);
    put_big_endian(0x108, 0x200, 8);
    platform.port_write(Port{dma_high}, 4, __builtin_bswap32(1));
    platform.port_write(Port{dma_low}, 4, __builtin_bswap32(0x100));
    EXPECT_EQ(text(0x200, 5), ".....") << "beyond 4 GB there is no RAM";
    platform.port_write(Port{dma_low}, 4, __builtin_bswap32(0x100));
    EXPECT_EQ(text(0x200, 5), "hello");
}

TEST_F(FwCfgTest, ObserverHearsOfEachPageWritten) {
    (void)transfer(0xffe, select_hello | control_read, 0x1002, 0x1fff);
    using Stores = decltype(stores);
    EXPECT_EQ(stores, (Stores{{GuestPhys{0x1fff}, 1},
                              {GuestPhys{0x2000}, 0x1000},
                              {GuestPhys{0x3000}, 1},
                              {GuestPhys{0xffe}, 2},
                              {GuestPhys{0x1000}, 2}}));
    EXPECT_EQ(text(0x1fff, 5), "hello");
    stores.clear();
    (void)transfer(0x100, control_read, 1, 0x4000);
    EXPECT_EQ(stores, (Stores{{GuestPhys{0x100}, 4}})) << "only the error";
    platform.observe_dma({});
    EXPECT_EQ(transfer(0x100, control_read, 1, 0x200), 0U);
    EXPECT_EQ(stores.size(), 1U);
}

TEST_F(FwCfgTest, NamesAreChecked) {
    EXPECT_THROW(FwCfg({.memory = {}, .files = {{"", {}}}}), StartupError);
    EXPECT_THROW(FwCfg({.memory = {}, .files = {{std::string(56, 'n'), {}}}}), StartupError);
    EXPECT_NO_THROW(FwCfg({.memory = {}, .files = {{std::string(55, 'n'), {}}}}));
    EXPECT_THROW(FwCfg({.memory = {}, .files = {{"a", {}}, {"b", {}}, {"a", {}}}}), StartupError);
}

TEST(FwCfgOption, IsWrittenAsForQemu) {
    struct Case {
        const char* text;
        FwCfgOption option;
    };
    for (const Case& c :
         {Case{"name=opt/x,string=hello", {"opt/x", false, "hello"}},
          Case{"opt/x,string=a=b,,c", {"opt/x", false, "a=b,c"}},
          Case{"opt/x,file=/tmp/f", {"opt/x", true, "/tmp/f"}},
          Case{"file=f,name=opt/,,x", {"opt/,x", true, "f"}}, Case{"opt/x,string=", {"opt/x", false, ""}}}) {
        const FwCfgOption got = parse_fw_cfg(c.text);
        EXPECT_EQ(got.name, c.option.name) << c.text;
        EXPECT_EQ(got.is_file, c.option.is_file) << c.text;
        EXPECT_EQ(got.value, c.option.value) << c.text;
    }
    const std::string long_name = std::string(56, 'n') + ",string=x";
    using namespace std::string_view_literals;
    for (const std::string_view text : {""sv, "opt/x"sv, "string=y"sv, "name=,string=y"sv, "opt/x,y"sv,
                                        "opt/x,strong=y"sv, "opt/x,string=a,file=b"sv, "opt/x,string=a,b"sv,
                                        "name=a,name=b,string=c"sv, "opt/x,"sv, std::string_view(long_name)})
        EXPECT_THROW((void)parse_fw_cfg(text), StartupError) << text;
}

} // namespace
} // namespace umbra
