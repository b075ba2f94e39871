// Unit tests of vmm/loader/acpi_tables and mp_table: the bytes in guest memory, as a kernel reads them.
#include "vmm/loader/acpi_tables.hpp"

#include "vmm/loader/mp_table.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <numeric>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>

namespace umbra {
namespace {

/// 2 MB of guest memory, the least that a guest has, full of ones where nothing was written.
class PlatformTablesTest : public ::testing::Test {
  protected:
    std::vector<std::byte> ram = std::vector<std::byte>(std::size_t{2} << 20, std::byte{0xff});

    void put(std::uint64_t at, const std::vector<std::byte>& bytes) {
        std::ranges::copy(bytes, std::span(ram).subspan(at, bytes.size()).begin());
    }
    [[nodiscard]] std::uint64_t number(std::uint64_t at, unsigned bytes) const {
        std::uint64_t value = 0;
        for (unsigned i = 0; i < bytes; ++i)
            value |= std::to_integer<std::uint64_t>(ram.at(at + i)) << (8 * i);
        return value;
    }
    [[nodiscard]] std::string text(std::uint64_t at, std::size_t size) const {
        std::string value;
        for (std::size_t i = 0; i < size; ++i)
            value.push_back(static_cast<char>(ram.at(at + i)));
        return value;
    }
    [[nodiscard]] unsigned sum(std::uint64_t at, std::uint64_t size) const {
        unsigned total = 0;
        for (std::uint64_t i = 0; i < size; ++i)
            total += std::to_integer<unsigned>(ram.at(at + i));
        return total & 0xff;
    }
};

// --- ACPI

class AcpiTablesTest : public PlatformTablesTest {
  protected:
    /// The tables of the XSDT and the DSDT by signature, each with a header that is in order.
    [[nodiscard]] std::map<std::string, std::uint64_t> tables() const {
        const std::uint64_t xsdt = number(rsdp + 24, 8);
        std::map<std::string, std::uint64_t> found{{text(xsdt, 4), xsdt}};
        for (std::uint64_t at = xsdt + 36; at < xsdt + number(xsdt + 4, 4); at += 8)
            found[text(number(at, 8), 4)] = number(at, 8);
        found["DSDT"] = number(found.at("FACP") + 40, 4);
        return found;
    }
    /// A generic address structure, which must be of I/O space.
    [[nodiscard]] std::pair<std::uint64_t, std::uint64_t> port_and_bits(std::uint64_t at) const {
        EXPECT_EQ(number(at, 1), 1U) << at;
        EXPECT_EQ(number(at + 2, 1), 0U) << at;
        return {number(at + 4, 8), number(at + 1, 1)};
    }

    void write(const AcpiConfig& config = {}) {
        const AcpiTables made = make_acpi_tables(GuestPhys(tables_at), config);
        tables_end = tables_at + made.tables.size();
        put(tables_at, made.tables);
        put(rsdp, made.root_pointer);
    }

    std::uint64_t rsdp = 0xe0000, tables_at = 0xf0040, tables_end = tables_at;
};

TEST_F(AcpiTablesTest, RootPointerIsInOrder) {
    write();
    EXPECT_EQ(text(rsdp, 8), "RSD PTR ");
    EXPECT_EQ(sum(rsdp, 20), 0U);
    EXPECT_EQ(number(rsdp + 15, 1), 2U);
    EXPECT_EQ(number(rsdp + 20, 4), 36U);
    EXPECT_EQ(sum(rsdp, 36), 0U);
}

TEST_F(AcpiTablesTest, EveryHeaderIsInOrder) {
    write();
    const auto found = tables();
    std::vector<std::string> signatures;
    for (const auto& [signature, at] : found) {
        signatures.push_back(signature);
        const std::uint64_t length = number(at + 4, 4);
        EXPECT_EQ(at % 16, 0U) << signature;
        EXPECT_GE(at, tables_at) << signature;
        EXPECT_LE(at + length, tables_end) << signature;
        EXPECT_EQ(text(at, 4), signature);
        EXPECT_EQ(sum(at, length), 0U) << signature;
        EXPECT_EQ(text(at + 10, 6), "UMBRA ") << signature;
    }
    EXPECT_EQ(signatures, (std::vector<std::string>{"APIC", "DSDT", "FACP", "XSDT"}));
}

TEST_F(AcpiTablesTest, BothRootTablesNameTheSame) {
    write();
    const std::uint64_t rsdt = number(rsdp + 16, 4);
    const std::uint64_t xsdt = number(rsdp + 24, 8);
    EXPECT_EQ(text(rsdt, 4), "RSDT");
    EXPECT_EQ(number(rsdt + 4, 4), 36U + 2 * 4);
    EXPECT_EQ(number(xsdt + 4, 4), 36U + 2 * 8);
    EXPECT_EQ(sum(rsdt, number(rsdt + 4, 4)), 0U);
    for (unsigned i = 0; i < 2; ++i)
        EXPECT_EQ(number(rsdt + 36 + 4 * i, 4), number(xsdt + 36 + 8 * i, 8));
}

TEST_F(AcpiTablesTest, FadtDescribesTheFixedHardware) {
    write();
    const std::uint64_t fadt = tables().at("FACP");
    EXPECT_EQ(number(fadt + 4, 4), 268U);
    EXPECT_EQ(number(fadt + 8, 1), 5U);
    EXPECT_EQ(number(fadt + 46, 2), 9U) << "SCI_INT";
    EXPECT_EQ(number(fadt + 48, 4), 0U) << "SMI_CMD: ACPI mode is always on";
    EXPECT_EQ(number(fadt + 56, 4), 0x600U) << "PM1a_EVT_BLK";
    EXPECT_EQ(number(fadt + 60, 4), 0U) << "PM1b_EVT_BLK";
    EXPECT_EQ(number(fadt + 64, 4), 0x604U) << "PM1a_CNT_BLK";
    EXPECT_EQ(number(fadt + 76, 4), 0x608U) << "PM_TMR_BLK";
    EXPECT_EQ(number(fadt + 80, 4), 0U) << "GPE0_BLK";
    EXPECT_EQ(number(fadt + 88, 1), 4U) << "PM1_EVT_LEN";
    EXPECT_EQ(number(fadt + 89, 1), 2U) << "PM1_CNT_LEN";
    EXPECT_EQ(number(fadt + 91, 1), 4U) << "PM_TMR_LEN";
    EXPECT_GT(number(fadt + 96, 2), 100U) << "P_LVL2_LAT: no C2";
    EXPECT_GT(number(fadt + 98, 2), 1000U) << "P_LVL3_LAT: no C3";
    EXPECT_EQ(number(fadt + 108, 1), 0x32U) << "CENTURY";
    EXPECT_EQ(number(fadt + 109, 2), 3U) << "IAPC_BOOT_ARCH: legacy devices, 8042";
    EXPECT_EQ(number(fadt + 112, 4), 0x575U)
        << "WBINVD, C1, no fixed buttons nor RTC wake, 32-bit timer, reset";
    EXPECT_EQ(port_and_bits(fadt + 116), std::pair(0xcf9UL, 8UL)) << "RESET_REG";
    EXPECT_EQ(number(fadt + 128, 1), 6U) << "RESET_VALUE";
    EXPECT_EQ(number(fadt + 132, 8), 0U) << "X_FIRMWARE_CTRL: the 32-bit field is used";
    EXPECT_EQ(number(fadt + 140, 8), number(fadt + 40, 4)) << "X_DSDT";
    EXPECT_EQ(port_and_bits(fadt + 148), std::pair(0x600UL, 32UL)) << "X_PM1a_EVT_BLK";
    EXPECT_EQ(port_and_bits(fadt + 172), std::pair(0x604UL, 16UL)) << "X_PM1a_CNT_BLK";
    EXPECT_EQ(port_and_bits(fadt + 208), std::pair(0x608UL, 32UL)) << "X_PM_TMR_BLK";
}

TEST_F(AcpiTablesTest, FacsIsAlignedAndAwake) {
    write();
    const std::uint64_t facs = number(tables().at("FACP") + 36, 4);
    EXPECT_EQ(facs % 64, 0U);
    EXPECT_EQ(text(facs, 4), "FACS");
    EXPECT_EQ(number(facs + 4, 4), 64U);
    EXPECT_EQ(number(facs + 12, 4), 0U) << "firmware waking vector";
    EXPECT_EQ(number(facs + 16, 4), 0U) << "global lock";
    EXPECT_EQ(number(facs + 32, 1), 2U) << "version";
}

TEST_F(AcpiTablesTest, MadtListsTheInterruptControllers) {
    write({.cpus = 3});
    const std::uint64_t madt = tables().at("APIC");
    EXPECT_EQ(number(madt + 36, 4), 0xfee0'0000U);
    EXPECT_EQ(number(madt + 40, 4), 1U) << "PCAT_COMPAT";
    std::vector<std::vector<std::uint64_t>> entries;
    const std::uint64_t end = madt + number(madt + 4, 4);
    std::uint64_t at = madt + 44;
    while (at < end) {
        std::vector<std::uint64_t> entry;
        for (std::uint64_t i = 0; i < number(at + 1, 1); ++i)
            entry.push_back(number(at + i, 1));
        ASSERT_GE(entry.size(), 2U);
        at += entry.size();
        entries.push_back(std::move(entry));
    }
    EXPECT_EQ(at, end);
    EXPECT_EQ(entries, (std::vector<std::vector<std::uint64_t>>{
                           {0, 8, 0, 0, 1, 0, 0, 0},
                           {0, 8, 1, 1, 1, 0, 0, 0},
                           {0, 8, 2, 2, 1, 0, 0, 0},
                           {1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0},
                           {2, 10, 0, 0, 2, 0, 0, 0, 0, 0},    // the timer: pin 2
                           {2, 10, 0, 9, 9, 0, 0, 0, 0x0d, 0}, // the SCI: level, active high
                           {4, 6, 0xff, 0, 0, 1},              // NMI: LINT1
                       }));
}

/// AML as far as the DSDT goes: what lies between the packages' lengths adds up (ACPI specification, 20.2.4).
class AmlReader {
  public:
    explicit AmlReader(std::string code) : code_(std::move(code)) {}

    /// Takes a PkgLength; the end of what it spans.
    std::size_t package_end(std::size_t& at) const {
        const std::size_t start = at;
        const auto first = byte(at++);
        const unsigned more = first >> 6;
        std::size_t length = more == 0 ? first & 0x3f : first & 0x0f;
        for (unsigned i = 0; i < more; ++i)
            length |= static_cast<std::size_t>(byte(at++)) << (4 + 8 * i);
        return start + length;
    }
    [[nodiscard]] unsigned byte(std::size_t at) const { return static_cast<unsigned char>(code_.at(at)); }
    [[nodiscard]] const std::string& code() const { return code_; }

  private:
    std::string code_;
};

TEST_F(AcpiTablesTest, DsdtHasSoftOffAndTheDevices) {
    write();
    const std::uint64_t dsdt = tables().at("DSDT");
    EXPECT_EQ(number(dsdt + 8, 1), 2U);
    const AmlReader aml(text(dsdt + 36, number(dsdt + 4, 4) - 36));
    using namespace std::string_literals;
    EXPECT_EQ(aml.code().substr(0, 14), "\x08_S5_\x12\x08\x04\x0a\x05\x0a\x05\x00\x00"s);

    std::size_t at = 14;
    ASSERT_EQ(aml.byte(at++), 0x10U); // ScopeOp
    EXPECT_EQ(aml.package_end(at), aml.code().size());
    EXPECT_EQ(aml.code().substr(at, 4), "_SB_");
    at += 4;
    std::map<std::string, std::string> devices; // by name, what follows it
    while (at < aml.code().size()) {
        ASSERT_EQ(aml.code().substr(at, 2), "\x5b\x82"); // DeviceOp
        at += 2;
        const std::size_t end = aml.package_end(at);
        ASSERT_LE(end, aml.code().size());
        devices[aml.code().substr(at, 4)] = aml.code().substr(at + 4, end - at - 4);
        at = end;
    }
    std::vector<std::string> names;
    for (const auto& [name, body] : devices) {
        names.push_back(name);
        // _CRS is the last: Buffer (length) { descriptors }, which ends with an end tag without a checksum.
        const std::size_t resources = body.find("_CRS\x11");
        ASSERT_NE(resources, std::string::npos) << name;
        const AmlReader reader(body);
        std::size_t buffer = resources + 5;
        EXPECT_EQ(reader.package_end(buffer), body.size()) << name;
        EXPECT_EQ(reader.byte(buffer), 0x0aU) << name;
        EXPECT_EQ(reader.byte(buffer + 1), body.size() - buffer - 2) << name;
        EXPECT_EQ(body.substr(body.size() - 2), "\x79\x00"s) << name;
    }
    EXPECT_EQ(names, (std::vector<std::string>{"COM1", "COM2", "FWCF", "KBD_", "RTC_"}));
    const auto has = [&devices](const char* device, const std::string& bytes) {
        return devices.at(device).find(bytes) != std::string::npos;
    };
    EXPECT_TRUE(has("COM1", "\x47\x01\xf8\x03\xf8\x03\x01\x08\x22\x10\x00"s)) << "IO, IRQ 4";
    EXPECT_TRUE(has("COM2", "\x47\x01\xf8\x02\xf8\x02\x01\x08\x22\x08\x00"s)) << "IO, IRQ 3";
    EXPECT_TRUE(has("KBD_", "\x0c\x41\xd0\x03\x03"s)) << "PNP0303";
    EXPECT_TRUE(has("FWCF", "\x0dQEMU0002\x00"s));
    EXPECT_TRUE(has("RTC_", "\x22\x00\x01\x79"s)) << "IRQ 8";
}

TEST_F(AcpiTablesTest, AsManyCpusAsApicIdentifiersFit) {
    write({.cpus = 255});
    const std::uint64_t madt = tables().at("APIC");
    EXPECT_EQ(number(madt + 4, 4), 44U + 255 * 8 + 12 + 10 + 10 + 6);
    EXPECT_EQ(sum(madt, number(madt + 4, 4)), 0U);
    EXPECT_EQ(number(madt + 44 + 254 * 8, 4), 0xfefe'0800U);
}

TEST_F(AcpiTablesTest, AsLongAtAnyPlace) {
    EXPECT_EQ(make_acpi_tables({}, {}).tables.size(),
              make_acpi_tables(GuestPhys{0xfff0'0000}, {}).tables.size());
    tables_at = 0x12'3440;
    write();
    EXPECT_EQ(tables().size(), 4U);
    EXPECT_EQ(number(tables().at("FACP") + 36, 4), tables_at) << "the FACS";
}

// --- The MultiProcessor tables

TEST_F(PlatformTablesTest, MpFloatingPointerIsInOrder) {
    constexpr std::uint64_t pointer = 0xf8000;
    put(pointer, make_mp_table(GuestPhys{pointer}, {.cpus = 1}));
    EXPECT_EQ(text(pointer, 4), "_MP_");
    EXPECT_EQ(number(pointer + 4, 4), pointer + 16);
    EXPECT_EQ(number(pointer + 8, 1), 1U) << "16-byte units";
    EXPECT_EQ(number(pointer + 9, 1), 4U) << "revision 1.4";
    EXPECT_EQ(sum(pointer, 16), 0U);
    EXPECT_EQ(number(pointer + 11, 5), 0U) << "a table of its own, virtual wire mode";
}

TEST_F(PlatformTablesTest, MpTableListsTheMachine) {
    constexpr std::uint64_t table = 0xf8010;
    put(table - 16, make_mp_table(GuestPhys{table - 16}, {.cpus = 2}));
    const std::uint64_t length = number(table + 4, 2);
    EXPECT_EQ(text(table, 4), "PCMP");
    EXPECT_EQ(number(table + 6, 1), 4U);
    EXPECT_EQ(sum(table, length), 0U);
    EXPECT_EQ(text(table + 8, 20), "UMBRA   UMBRAPC     ");
    EXPECT_EQ(number(table + 36, 4), 0xfee0'0000U);

    std::map<std::uint64_t, unsigned> kinds;
    std::map<std::uint64_t, std::uint64_t> pins; // of the I/O APIC, by ISA interrupt
    std::uint64_t at = table + 44;
    std::uint64_t last = 0;
    while (at < table + length) {
        const std::uint64_t kind = number(at, 1);
        EXPECT_GE(kind, last) << "in ascending order";
        last = kind;
        switch (kind) {
        case 0:
            EXPECT_EQ(number(at + 1, 1), kinds[0]) << "APIC ID";
            EXPECT_EQ(number(at + 2, 1), 0x14U);
            EXPECT_EQ(number(at + 3, 1), kinds[0] == 0 ? 3U : 1U) << "enabled, the first is the boot one";
            at += 20;
            break;
        case 1:
            EXPECT_EQ(text(at + 2, 6), "ISA   ");
            at += 8;
            break;
        case 2:
            EXPECT_EQ(number(at + 3, 1), 1U);
            EXPECT_EQ(number(at + 4, 4), 0xfec0'0000U);
            at += 8;
            break;
        case 3:
            EXPECT_EQ(number(at + 1, 1), 0U);
            EXPECT_EQ(number(at + 2, 2), number(at + 5, 1) == 9 ? 0x0dU : 0U);
            pins[number(at + 5, 1)] = number(at + 7, 1);
            at += 8;
            break;
        case 4:
            EXPECT_EQ(number(at + 6, 1), 0xffU) << "every local APIC";
            EXPECT_EQ(number(at + 7, 1), number(at + 1, 1) == 3 ? 0U : 1U) << "ExtINT on LINT0, NMI on LINT1";
            at += 8;
            break;
        default:
            FAIL() << kind;
        }
        ++kinds[kind];
    }
    EXPECT_EQ(at, table + length);
    EXPECT_EQ(number(table + 34, 2), std::accumulate(kinds.begin(), kinds.end(), 0U,
                                                     [](unsigned n, auto& kind) { return n + kind.second; }));
    EXPECT_EQ(kinds, (std::map<std::uint64_t, unsigned>{{0, 2}, {1, 1}, {2, 1}, {3, 15}, {4, 2}}));
    EXPECT_EQ(pins.at(0), 2U);
    EXPECT_FALSE(pins.contains(2)) << "the cascade";
    EXPECT_EQ(pins.at(4), 4U);
}

} // namespace
} // namespace umbra
