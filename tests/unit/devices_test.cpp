// Unit tests of vmm/devices: every device through the ports by which a guest reaches it.
#include "vmm/devices/platform.hpp"
#include "vmm/devices/rtc_timer.hpp"

#include <array>
#include <chrono>
#include <future>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

namespace umbra {
namespace {

using namespace std::chrono_literals;

constexpr std::chrono::sys_days leap_day{std::chrono::year{2024} / 2 / 29}; // a Thursday

/// A platform whose callbacks write into this object.
class DevicesTest : public ::testing::Test {
  protected:
    DevicesTest() : platform(config()) {}

    PlatformConfig config() {
        return {
            .serial_output =
                [this](std::span<const char> text) { serial_writes.emplace_back(text.begin(), text.end()); },
            .debug_output =
                [this](std::span<const char> text) { debug_writes.emplace_back(text.begin(), text.end()); },
            .serial_interrupt = [this](bool level) { interrupt_levels.push_back(level); },
            .clock = [this] { return now; },
            .low_memory = std::uint64_t{3} << 30,
            .high_memory = std::uint64_t{1} << 30,
            .second_serial_output =
                [this](std::span<const char> text) {
                    second_serial_writes.emplace_back(text.begin(), text.end());
                },
            .second_serial_interrupt = [this](bool level) { second_interrupt_levels.push_back(level); },
            .rtc_interrupt = [this](bool level) { rtc_levels.push_back(level); },
            .timer = [this] { return uptime; },
        };
    }

    std::uint32_t in(std::uint16_t port, unsigned size = 1) { return platform.port_read(Port{port}, size); }
    void out(std::uint16_t port, std::uint32_t value, unsigned size = 1) {
        platform.port_write(Port{port}, size, value);
    }
    std::uint32_t cmos(std::uint8_t index) {
        out(0x70, index);
        return in(0x71);
    }
    void set_cmos(std::uint8_t index, std::uint8_t value) {
        out(0x70, index);
        out(0x71, value);
    }
    [[nodiscard]] bool interrupt_level() const {
        return !interrupt_levels.empty() && interrupt_levels.back();
    }

    std::vector<bool> rtc_levels;
    std::vector<std::string> serial_writes;
    std::vector<std::string> debug_writes;
    std::vector<std::string> second_serial_writes;
    std::vector<bool> interrupt_levels;
    std::vector<bool> second_interrupt_levels;
    std::chrono::steady_clock::time_point uptime{1234h};
    std::chrono::system_clock::time_point now = leap_day + 13h + 45min + 59s;
    Platform platform;
};

// Registers of the serial port.
constexpr std::uint16_t thr = 0x3f8;
constexpr std::uint16_t rbr = 0x3f8;
constexpr std::uint16_t ier = 0x3f9;
constexpr std::uint16_t iir = 0x3fa;
constexpr std::uint16_t fcr = 0x3fa;
constexpr std::uint16_t lcr = 0x3fb;
constexpr std::uint16_t mcr = 0x3fc;
constexpr std::uint16_t lsr = 0x3fd;
constexpr std::uint16_t msr = 0x3fe;
constexpr std::uint16_t scr = 0x3ff;

class SerialTest : public DevicesTest {
  protected:
    std::size_t type(std::string_view text) { return platform.receive({text.data(), text.size()}); }
};

TEST_F(SerialTest, StateAfterReset) {
    EXPECT_EQ(in(ier), 0U);
    EXPECT_EQ(in(iir), 0x01U);
    EXPECT_EQ(in(lcr), 0U);
    EXPECT_EQ(in(mcr), 0U);
    EXPECT_EQ(in(lsr), 0x60U);
    EXPECT_EQ(in(msr), 0xb0U);
    EXPECT_EQ(in(rbr), 0U);
    EXPECT_TRUE(interrupt_levels.empty());
}

TEST_F(SerialTest, OutputIsOneWriteForEachLine) {
    for (const char character : std::string_view{"ab\nc"})
        out(thr, static_cast<std::uint8_t>(character));
    EXPECT_EQ(serial_writes, std::vector<std::string>{"ab\n"});
    platform.flush();
    platform.flush();
    EXPECT_EQ(serial_writes, (std::vector<std::string>{"ab\n", "c"}));
    EXPECT_EQ(in(lsr), 0x60U) << "the transmitter is empty again";
}

TEST_F(SerialTest, OutputWithoutLineEndIsPassedOnWhenTheBufferIsFull) {
    for (std::size_t i = 0; i < OutputBuffer::capacity + 1; ++i)
        out(thr, 'x');
    EXPECT_EQ(serial_writes, std::vector<std::string>{std::string(OutputBuffer::capacity, 'x')});
}

TEST_F(SerialTest, DivisorIsBehindDlab) {
    out(ier, 0x05);
    out(lcr, 0x83);
    out(thr, 0x34);
    out(ier, 0x12);
    EXPECT_EQ(in(rbr), 0x34U);
    EXPECT_EQ(in(ier), 0x12U);
    out(lcr, 0x03);
    EXPECT_EQ(in(ier), 0x05U);
    EXPECT_EQ(in(lcr), 0x03U);
    platform.flush();
    EXPECT_TRUE(serial_writes.empty());
}

TEST_F(SerialTest, ReservedBitsReadZero) {
    out(ier, 0xff);
    EXPECT_EQ(in(ier), 0x0fU);
    out(mcr, 0xff);
    EXPECT_EQ(in(mcr), 0x1fU);
}

TEST_F(SerialTest, ScratchKeepsItsValueAndStatusRegistersAreReadOnly) {
    out(scr, 0xa5);
    out(lsr, 0x00);
    out(msr, 0x0f);
    EXPECT_EQ(in(scr), 0xa5U);
    EXPECT_EQ(in(lsr), 0x60U);
    EXPECT_EQ(in(msr), 0xb0U);
}

TEST_F(SerialTest, FifoEnableShowsInIdentification) {
    out(fcr, 0x01);
    EXPECT_EQ(in(iir), 0xc1U);
    out(fcr, 0xc6); // without bit 0
    EXPECT_EQ(in(iir), 0x01U);
}

TEST_F(SerialTest, InputArrivesInOrderWithAndWithoutFifo) {
    for (const std::uint8_t control : {std::uint8_t{0x00}, std::uint8_t{0x01}}) {
        out(fcr, control);
        EXPECT_EQ(type("hello, this is longer than a FIFO"), 33U);
        std::string read;
        while ((in(lsr)&0x01) != 0)
            read.push_back(static_cast<char>(in(rbr)));
        EXPECT_EQ(read, "hello, this is longer than a FIFO");
        EXPECT_EQ(in(lsr), 0x60U) << "the queue never overruns the receiver";
    }
}

TEST_F(SerialTest, InputIsBounded) {
    out(fcr, 0x01);
    const std::string much(2 * Serial::input_limit, 'i');
    EXPECT_EQ(type(much), Serial::input_limit);
    EXPECT_EQ(type(much), Serial::fifo_size) << "what moved from the queue to the FIFO";
    EXPECT_EQ(type(much), 0U);
    (void)in(rbr);
    EXPECT_EQ(type(much), 1U);
}

TEST_F(SerialTest, ClearingTheFifoDropsWhatItHolds) {
    out(fcr, 0x01);
    type("abc");
    out(fcr, 0x03);
    EXPECT_EQ(in(lsr)&0x01, 0U);
    type("d");
    out(fcr, 0x01);
    EXPECT_EQ(in(rbr), static_cast<std::uint32_t>('d')) << "without the clear bit it stays";
}

TEST_F(SerialTest, TriggerLevelSeparatesAvailableFromTimeout) {
    struct Case {
        std::uint8_t control;
        std::size_t level;
    };
    out(ier, 0x01);
    for (const Case& c : {Case{0x01, 1}, Case{0x41, 4}, Case{0x81, 8}, Case{0xc1, 14}}) {
        out(fcr, c.control | 0x02U);
        for (std::size_t count = 1; count <= Serial::fifo_size; ++count) {
            type("x");
            EXPECT_EQ(in(iir), count >= c.level ? 0xc4U : 0xccU) << c.level << ' ' << count;
        }
    }
}

TEST_F(SerialTest, ReceivedDataInterruptsUntilRead) {
    out(mcr, 0x08);
    out(ier, 0x01);
    EXPECT_FALSE(interrupt_level());
    type("a");
    EXPECT_TRUE(interrupt_level());
    EXPECT_EQ(in(iir), 0x04U);
    EXPECT_TRUE(interrupt_level()) << "reading IIR does not acknowledge received data";
    EXPECT_EQ(in(rbr), static_cast<std::uint32_t>('a'));
    EXPECT_FALSE(interrupt_level());
    EXPECT_EQ(in(iir), 0x01U);
}

TEST_F(SerialTest, ModemControlHoldsNoInterruptBack) {
    out(ier, 0x01);
    type("a");
    EXPECT_TRUE(interrupt_level()) << "OUT2 is 0";
    for (const unsigned control : {0x08U, 0x18U, 0x10U, 0x00U})
        out(mcr, control);
    EXPECT_EQ(interrupt_levels, std::vector<bool>{true}) << "called on changes only";
    (void)in(rbr);
    EXPECT_FALSE(interrupt_level());
    out(ier, 0x02);
    EXPECT_TRUE(interrupt_level());
}

TEST_F(SerialTest, EmptyTransmitterInterruptsWhenEnabledAndIsToldOnce) {
    out(mcr, 0x08);
    out(ier, 0x02);
    EXPECT_TRUE(interrupt_level());
    EXPECT_EQ(in(iir), 0x02U);
    EXPECT_FALSE(interrupt_level());
    EXPECT_EQ(in(iir), 0x01U);
    out(thr, 'x');
    EXPECT_TRUE(interrupt_level());
    out(ier, 0x00);
    EXPECT_FALSE(interrupt_level());
    (void)in(iir);
    out(ier, 0x02);
    EXPECT_EQ(in(iir), 0x02U) << "enabled again, told again";
}

TEST_F(SerialTest, EachTransmittedByteIsAnEdge) {
    out(mcr, 0x08);
    out(ier, 0x02);
    interrupt_levels.clear();
    out(thr, 'x');
    out(thr, 'y');
    EXPECT_EQ(interrupt_levels, (std::vector<bool>{false, true, false, true}));
}

TEST_F(SerialTest, CausesAreToldByPriority) {
    out(mcr, 0x10); // loopback makes every cause
    (void)in(msr);
    out(thr, 'a');
    out(thr, 'b');  // overruns the single buffer
    out(mcr, 0x12); // RTS raises CTS
    out(ier, 0x0f);
    EXPECT_EQ(in(iir), 0x06U);
    EXPECT_EQ(in(lsr), 0x63U);
    EXPECT_EQ(in(lsr), 0x61U) << "reading clears the error";
    EXPECT_EQ(in(iir), 0x04U);
    EXPECT_EQ(in(rbr), static_cast<std::uint32_t>('b')) << "without FIFO the new byte wins";
    EXPECT_EQ(in(iir), 0x02U);
    EXPECT_EQ(in(iir), 0x00U);
    EXPECT_EQ(in(msr), 0x11U);
    EXPECT_EQ(in(iir), 0x01U);
    EXPECT_EQ(in(msr), 0x10U);
}

TEST_F(SerialTest, LoopbackReturnsOutputAndHoldsInputBack) {
    out(fcr, 0x01);
    out(mcr, 0x10);
    type("in");
    EXPECT_EQ(in(lsr)&0x01, 0U);
    out(thr, 'o');
    EXPECT_EQ(in(rbr), static_cast<std::uint32_t>('o'));
    platform.flush();
    EXPECT_TRUE(serial_writes.empty());
    out(mcr, 0x00);
    EXPECT_EQ(in(rbr), static_cast<std::uint32_t>('i'));
    EXPECT_EQ(in(rbr), static_cast<std::uint32_t>('n'));
}

TEST_F(SerialTest, FullFifoKeepsTheOldBytesInLoopback) {
    out(fcr, 0x01);
    out(mcr, 0x10);
    for (unsigned i = 0; i <= Serial::fifo_size; ++i)
        out(thr, i);
    EXPECT_EQ(in(lsr), 0x63U);
    for (unsigned i = 0; i < Serial::fifo_size; ++i)
        EXPECT_EQ(in(rbr), i);
    EXPECT_EQ(in(lsr), 0x60U);
}

TEST_F(SerialTest, LoopbackTiesModemOutputsToInputs) {
    const std::array<std::uint32_t, 4> lines{0x20, 0x10, 0x40, 0x80}; // of DTR, RTS, OUT1, OUT2
    for (unsigned bit = 0; bit < lines.size(); ++bit) {
        out(mcr, 0x10U | 1U << bit);
        EXPECT_EQ(in(msr)&0xf0, lines.at(bit));
    }
}

TEST_F(SerialTest, RingIsTrailingEdge) {
    out(mcr, 0x10);
    (void)in(msr);
    out(mcr, 0x14);
    EXPECT_EQ(in(msr), 0x40U);
    out(mcr, 0x10);
    EXPECT_EQ(in(msr), 0x04U);
}

TEST_F(SerialTest, WideAccessReachesConsecutiveRegisters) {
    out(lcr, 0x5555'0a03, 2); // LCR and MCR
    EXPECT_EQ(in(lcr), 0x03U);
    EXPECT_EQ(in(mcr), 0x0aU);
    EXPECT_EQ(in(lcr, 2), 0x0a03U);
}

TEST_F(SerialTest, SecondPortIsAnother) {
    constexpr std::uint16_t second = 0x2f8;
    out(second + 7, 0x5a);
    EXPECT_EQ(in(second + 7), 0x5aU);
    EXPECT_EQ(in(scr), 0U);
    EXPECT_EQ(in(second + 5), 0x60U);
    out(second, 'x');
    EXPECT_TRUE(platform.output_waits());
    platform.flush();
    EXPECT_EQ(second_serial_writes, std::vector<std::string>{"x"});
    EXPECT_TRUE(serial_writes.empty());
    out(second + 4, 0x08);
    out(second + 1, 0x02);
    EXPECT_EQ(second_interrupt_levels, std::vector<bool>{true});
    EXPECT_TRUE(interrupt_levels.empty());
    type("a");
    EXPECT_EQ(in(second + 5), 0x60U) << "input is the first port's";
}

TEST_F(SerialTest, WorksWithoutCallbacks) {
    Serial serial({}, {});
    serial.write(4, 0x08);
    serial.write(1, 0x02);
    serial.write(0, '\n');
    EXPECT_EQ(serial.read(2), 0x02U);
    EXPECT_EQ(serial.read(8 + 5), 0x60U) << "registers repeat every eight";
}

TEST_F(DevicesTest, DebugConsole) {
    EXPECT_EQ(in(0xe9), 0xe9U);
    out(0xe9, 'h');
    out(0xe9, 'i');
    EXPECT_TRUE(debug_writes.empty());
    out(0xe9, '\n');
    EXPECT_EQ(debug_writes, std::vector<std::string>{"hi\n"});
    EXPECT_TRUE(serial_writes.empty());
}

TEST_F(DevicesTest, DebugExitTakesEverySize) {
    struct Case {
        unsigned size;
        std::uint32_t value;
    };
    for (const std::uint16_t port : std::array<std::uint16_t, 3>{0xf4, 0x501, 0x502}) {
        for (const Case& c : {Case{1, 0x21}, Case{2, 0x4321}, Case{4, 0x8765'4321}}) {
            Platform fresh{PlatformConfig{}};
            EXPECT_EQ(fresh.port_read(Port{port}, c.size), 0U);
            EXPECT_FALSE(fresh.exit());
            fresh.port_write(Port{port}, c.size, 0x8765'4321);
            EXPECT_EQ(fresh.exit(), (GuestExit{GuestExit::Kind::debug_exit, c.value})) << port;
        }
    }
}

TEST_F(DevicesTest, FirstExitCounts) {
    out(0xf4, 0);
    out(0xf4, 7);
    out(0x64, 0xfe);
    EXPECT_EQ(platform.exit(), (GuestExit{GuestExit::Kind::debug_exit, 0}));
}

TEST_F(DevicesTest, WaysToReset) {
    struct Write {
        std::uint16_t port;
        std::uint8_t value;
    };
    const std::vector<std::vector<Write>> ways{
        {{0x64, 0xfe}}, {{0x64, 0xf0}}, {{0x64, 0xd1}, {0x60, 0x02}}, {{0xcf9, 0x02}, {0xcf9, 0x06}},
        {{0x92, 0x03}},
    };
    for (const auto& way : ways) {
        Platform fresh{PlatformConfig{}};
        for (const Write& write : way) {
            EXPECT_FALSE(fresh.exit());
            fresh.port_write(Port{write.port}, 1, write.value);
        }
        EXPECT_EQ(fresh.exit(), GuestExit{GuestExit::Kind::reset}) << way.front().port;
    }
}

TEST_F(DevicesTest, WhatResembleResetsAreNone) {
    out(0x64, 0xff); // pulses no line
    out(0x64, 0xd1);
    out(0x60, 0x03);
    out(0x64, 0xdd);
    out(0x92, 0x02);
    out(0xcf9, 0x02);
    out(0xcf8, 0x8000'0604, 4); // bit 2 of the second byte would reset through 0xcf9
    out(0xcf8, 0x0604, 2);
    EXPECT_FALSE(platform.exit());
    EXPECT_EQ(in(0xcf9), 0x02U);
    EXPECT_EQ(in(0x92), 0x02U);
}

TEST_F(DevicesTest, WaysToPowerOff) {
    struct Case {
        std::uint16_t port;
        unsigned size;
        std::uint32_t value;
    };
    for (const Case& c :
         {Case{0x604, 2, 0x2000}, Case{0x604, 4, 0x2000}, Case{0x605, 1, 0x20}, Case{0x604, 2, 0x3401},
          Case{0xb004, 2, 0x2000}, Case{0xb004, 2, 0x3400}, Case{0xb005, 1, 0x34}}) {
        Platform fresh{PlatformConfig{}};
        fresh.port_write(Port{c.port}, c.size, c.value);
        EXPECT_EQ(fresh.exit(), GuestExit{GuestExit::Kind::power_off});
    }
    out(0x604, 0x1c01, 2);
    out(0x604, 0x20, 1);
    EXPECT_FALSE(platform.exit()) << "without SLP_EN";
}

TEST_F(DevicesTest, OtherSleepsAreNoPowerOff) {
    for (const std::uint16_t port : std::array<std::uint16_t, 2>{0x604, 0xb004}) {
        for (const std::uint32_t type : {1U, 2U, 3U, 4U, 6U, 7U}) {
            Platform fresh{PlatformConfig{}};
            fresh.port_write(Port{port}, 2, type << 10);
            EXPECT_FALSE(fresh.exit());
            fresh.port_write(Port{port}, 2, type << 10 | 1U << 13);
            EXPECT_EQ(fresh.exit(), (GuestExit{GuestExit::Kind::sleep, type})) << port;
        }
    }
    out(0x605, 5U << 2);
    out(0x605, 1U << 2 | 1U << 5);
    EXPECT_EQ(platform.exit(), (GuestExit{GuestExit::Kind::sleep, 1})) << "the type written last";
}

TEST_F(DevicesTest, AcpiRegistersAfterReset) {
    EXPECT_EQ(in(0x600, 2), 0U);
    EXPECT_EQ(in(0x602, 2), 0U);
    EXPECT_EQ(in(0x604, 2), 1U) << "SCI_EN: ACPI mode";
    EXPECT_EQ(in(0x606, 2), 0U);
    EXPECT_EQ(platform.unclaimed(), UnclaimedAccesses{});
}

TEST_F(DevicesTest, AcpiRegistersKeepWhatTheyCan) {
    out(0x600, 0xffff, 2); // status: writing ones clears what is clear
    EXPECT_EQ(in(0x600, 2), 0U);
    out(0x602, 0x0321, 2);
    EXPECT_EQ(in(0x602, 2), 0x0321U);
    EXPECT_EQ(in(0x600, 4), 0x0321'0000U);
    out(0x603, 0x01, 1);
    EXPECT_EQ(in(0x602, 2), 0x0121U);
    out(0x604, 0xdffe, 2);
    EXPECT_EQ(in(0x604, 2), 0x1c03U) << "SCI_EN stays, SLP_TYP and BM_RLD are kept, the rest reads 0";
    out(0x605, 0x14, 1);
    EXPECT_EQ(in(0x604, 2), 0x1403U);
    EXPECT_FALSE(platform.exit());
    out(0x604, 0x3401, 2);
    EXPECT_EQ(platform.exit(), GuestExit{GuestExit::Kind::power_off});
    EXPECT_EQ(in(0x604, 2), 0x1401U) << "SLP_EN is write-only";
}

TEST_F(DevicesTest, AcpiTimerCountsAtItsFrequency) {
    EXPECT_EQ(in(0x608, 4), 0U) << "from the machine's start";
    uptime += 1s;
    EXPECT_EQ(in(0x608, 4), 3'579'545U);
    uptime += 1ms;
    EXPECT_EQ(in(0x608, 4), 3'583'124U);
    EXPECT_EQ(in(0x608, 2), 3'583'124U & 0xffff);
    EXPECT_EQ(in(0x60a, 1), 3'583'124U >> 16 & 0xff);
    out(0x608, 0, 4);
    EXPECT_EQ(in(0x608, 4), 3'583'124U) << "read-only";
    uptime += 2400s - 1ms - 1s; // 40 minutes: 2 * 2^32 and a little
    EXPECT_EQ(in(0x608, 4), static_cast<std::uint32_t>(2400ULL * 3'579'545));
    uptime += std::chrono::years{100};
    const std::uint32_t before = in(0x608, 4);
    uptime += 10s;
    EXPECT_EQ(in(0x608, 4) - before, 35'795'450U) << "no overflow in centuries";
}

TEST_F(DevicesTest, KeyboardControllerIsIdle) {
    EXPECT_EQ(in(0x64), 0x14U);
    EXPECT_EQ(in(0x60), 0U);
}

TEST_F(DevicesTest, KeyboardControllerAnswersCommands) {
    struct Case {
        std::uint8_t command;
        std::uint32_t answer;
    };
    for (const Case& c : {Case{0xaa, 0x55}, Case{0xab, 0x00}, Case{0xa9, 0x01}, Case{0x20, 0x45},
                          Case{0xd0, 0x03}, Case{0xc0, 0xff}}) {
        out(0x64, c.command);
        EXPECT_EQ(in(0x64), 0x1dU) << unsigned{c.command};
        EXPECT_EQ(in(0x60), c.answer) << unsigned{c.command};
        EXPECT_EQ(in(0x64), 0x1cU) << unsigned{c.command};
    }
}

TEST_F(DevicesTest, KeyboardControllerKeepsCommandByteAndOutputPort) {
    out(0x64, 0x60);
    out(0x60, 0x03);
    EXPECT_EQ(in(0x64), 0x14U) << "the last write was data";
    const auto command_byte = [this] {
        out(0x64, 0x20);
        return in(0x60);
    };
    EXPECT_EQ(command_byte(), 0x03U);
    out(0x64, 0xad);
    out(0x64, 0xa7);
    EXPECT_EQ(command_byte(), 0x33U);
    out(0x64, 0xae);
    out(0x64, 0xa8);
    EXPECT_EQ(command_byte(), 0x03U);

    const auto output_port = [this] {
        out(0x64, 0xd0);
        return in(0x60);
    };
    out(0x64, 0xd1);
    out(0x60, 0xcf);
    EXPECT_EQ(output_port(), 0xcfU);
    out(0x64, 0xdd);
    EXPECT_EQ(output_port(), 0xcdU);
    out(0x64, 0xdf);
    EXPECT_EQ(output_port(), 0xcfU);
}

TEST_F(DevicesTest, KeyboardAnswers) {
    const auto answer = [this](std::uint8_t command) {
        out(0x60, command);
        std::vector<std::uint32_t> bytes;
        while ((in(0x64) & 0x01) != 0)
            bytes.push_back(in(0x60));
        return bytes;
    };
    using Bytes = std::vector<std::uint32_t>;
    EXPECT_EQ(answer(0xff), (Bytes{0xfa, 0xaa}));
    EXPECT_EQ(answer(0xf2), (Bytes{0xfa, 0xab, 0x41}));
    EXPECT_EQ(answer(0xf4), Bytes{0xfa});
    EXPECT_EQ(answer(0xee), Bytes{0xee});
    EXPECT_EQ(answer(0xed), Bytes{0xfa});
    EXPECT_EQ(answer(0xff), Bytes{0xfa}) << "the lights, not a reset";
    EXPECT_EQ(answer(0x01), Bytes{0xfe});
}

TEST_F(DevicesTest, MouseIsNotThere) {
    for (const unsigned command : {0xd3U, 0xd4U}) { // a byte as if from the mouse, and to it
        out(0x64, command);
        out(0x60, 0xff);
        EXPECT_EQ(in(0x64) & 0x61, 0x61U) << "the mouse's answer has not come in time";
        EXPECT_EQ(in(0x60), 0xfeU);
        EXPECT_EQ(in(0x64) & 0x61, 0U);
    }
    out(0x64, 0xa9);
    EXPECT_EQ(in(0x64) & 0x61, 0x01U) << "the controller's own";
    EXPECT_EQ(in(0x60), 0x01U);
    out(0x64, 0xd2);
    out(0x60, 0x77);
    EXPECT_EQ(in(0x60), 0x77U);
}

TEST_F(DevicesTest, KeyboardOutputIsBounded) {
    for (int i = 0; i < 1000; ++i)
        out(0x60, 0xee);
    int read = 0;
    for (; (in(0x64) & 0x01) != 0; ++read)
        (void)in(0x60);
    EXPECT_EQ(read, 16);
}

TEST_F(DevicesTest, RtcTellsTimeInEveryFormat) {
    EXPECT_EQ(cmos(0x0b), 0x02U) << "BCD, 24 hours at reset";
    EXPECT_EQ(cmos(0x00), 0x59U);
    EXPECT_EQ(cmos(0x02), 0x45U);
    EXPECT_EQ(cmos(0x04), 0x13U);
    EXPECT_EQ(cmos(0x06), 5U);
    EXPECT_EQ(cmos(0x07), 0x29U);
    EXPECT_EQ(cmos(0x08), 0x02U);
    EXPECT_EQ(cmos(0x09), 0x24U);
    EXPECT_EQ(cmos(0x32), 0x20U);

    set_cmos(0x0b, 0x06);
    EXPECT_EQ(cmos(0x00), 59U);
    EXPECT_EQ(cmos(0x04), 13U);
    EXPECT_EQ(cmos(0x09), 24U);

    set_cmos(0x0b, 0x00);
    EXPECT_EQ(cmos(0x04), 0x81U);
    now = leap_day;
    EXPECT_EQ(cmos(0x04), 0x12U) << "midnight is 12 AM";
    now = leap_day + 12h;
    EXPECT_EQ(cmos(0x04), 0x92U) << "noon is 12 PM";
    set_cmos(0x0b, 0x04);
    now = leap_day + 23h;
    EXPECT_EQ(cmos(0x04), 0x8bU);
}

TEST_F(DevicesTest, RtcAnnouncesItsUpdate) {
    EXPECT_EQ(cmos(0x0a), 0x26U);
    now += 999'755us;
    EXPECT_EQ(cmos(0x0a), 0x26U);
    now += 1us;
    EXPECT_EQ(cmos(0x0a), 0xa6U);
    now += 244us;
    EXPECT_EQ(cmos(0x0a), 0x26U);
    EXPECT_EQ(cmos(0x02), 0x46U);
    set_cmos(0x0a, 0xaf);
    EXPECT_EQ(cmos(0x0a), 0x2fU) << "UIP is read-only";
}

TEST_F(DevicesTest, RtcStatusAndMemory) {
    EXPECT_EQ(cmos(0x0c), 0U);
    EXPECT_EQ(cmos(0x0d), 0x80U);
    set_cmos(0x0c, 0xff);
    set_cmos(0x0d, 0x00);
    EXPECT_EQ(cmos(0x0c), 0U);
    EXPECT_EQ(cmos(0x0d), 0x80U);
    set_cmos(0x00, 0x11);
    EXPECT_EQ(cmos(0x00), 0x59U) << "the clock is the host's";
    set_cmos(0x40, 0x5a);
    EXPECT_EQ(cmos(0x40), 0x5aU);
    EXPECT_EQ(cmos(0xc0), 0x5aU) << "bit 7 masks NMIs only";
    EXPECT_EQ(in(0x70), 0xffU);
}

TEST_F(DevicesTest, RtcTellsWhatHasHappened) {
    EXPECT_EQ(cmos(0x0c), 0U);
    now += 976us; // not yet a period of 1024 Hz
    EXPECT_EQ(cmos(0x0c), 0U);
    now += 1us;
    EXPECT_EQ(cmos(0x0c), 0x40U);
    EXPECT_EQ(cmos(0x0c), 0U) << "reading clears it";
    set_cmos(0x0a, 0x20); // no periods
    now += 998ms;
    EXPECT_EQ(cmos(0x0c), 0U);
    now += 2ms; // 13:46:00
    set_cmos(0x0b, 0x12);
    EXPECT_EQ(cmos(0x0c), 0x90U) << "an update, which is enabled";
    now += 1s;
    set_cmos(0x0b, 0x82);
    EXPECT_EQ(cmos(0x0c), 0x00U) << "no updates while the time is set";
    set_cmos(0x0b, 0x02);
    set_cmos(0x0a, 0x2f); // 2 Hz
    now += 400ms;
    EXPECT_EQ(cmos(0x0c), 0x00U);
    now += 200ms;
    EXPECT_EQ(cmos(0x0c), 0x40U);
    set_cmos(0x0a, 0x21); // as 0x28: 256 Hz
    now += 4ms;
    EXPECT_EQ(cmos(0x0c), 0x40U);
    now += 100us;
    EXPECT_EQ(cmos(0x0c), 0x00U);
}

TEST_F(DevicesTest, RtcTellsThatItsAlarmHasCome) {
    set_cmos(0x0a, 0x20);
    set_cmos(0x0b, 0x22); // enabled; BCD
    set_cmos(0x05, 0x13);
    set_cmos(0x03, 0x46);
    set_cmos(0x01, 0x02);
    now += 2s; // 13:46:01
    EXPECT_EQ(cmos(0x0c), 0x10U);
    now += 1s;
    EXPECT_EQ(cmos(0x0c), 0xb0U);
    now += 23h + 59min + 59s;
    EXPECT_EQ(cmos(0x0c), 0x10U);
    now += 49h;
    EXPECT_EQ(cmos(0x0c), 0xb0U) << "once a day";
    set_cmos(0x05, 0xff); // in any hour
    now += 2s;            // 14:46:03
    EXPECT_EQ(cmos(0x0c), 0xb0U);
    now += 59min;
    EXPECT_EQ(cmos(0x0c), 0x10U);
    set_cmos(0x01, 0x99); // no time
    now += 49h;
    EXPECT_EQ(cmos(0x0c), 0x10U);
}

TEST_F(DevicesTest, RtcInterruptsForWhatIsEnabled) {
    Rtc& rtc = platform.rtc();
    using Levels = std::vector<bool>;
    EXPECT_EQ(rtc.update(), std::nullopt); // nothing is
    set_cmos(0x0b, 0x42);                  // periods, of 1024 Hz
    EXPECT_EQ(rtc.update(), 977us);
    now += 976us;
    EXPECT_EQ(rtc.update(), 1us);
    EXPECT_EQ(rtc_levels, Levels{});
    now += 1us;
    EXPECT_EQ(rtc.update(), std::nullopt) << "there is no more to say until status C has been read";
    EXPECT_EQ(rtc_levels, (Levels{true}));
    now += 1s;
    EXPECT_EQ(rtc.update(), std::nullopt);
    EXPECT_EQ(rtc_levels, (Levels{true}));
    EXPECT_EQ(cmos(0x0c), 0xd0U);
    EXPECT_EQ(rtc_levels, (Levels{true, false}));

    set_cmos(0x0b, 0x12); // updates
    EXPECT_EQ(rtc.update(), 999'023us);
    now += 999'023us;
    EXPECT_EQ(rtc.update(), std::nullopt);
    EXPECT_EQ(rtc_levels, (Levels{true, false, true}));
    set_cmos(0x0b, 0x02); // what has happened interrupts no longer
    EXPECT_EQ(rtc.update(), std::nullopt);
    EXPECT_EQ(rtc_levels.size(), 4U);
    set_cmos(0x0b, 0x12); // and again
    EXPECT_EQ(rtc.update(), std::nullopt);
    EXPECT_EQ(rtc_levels, (Levels{true, false, true, false, true}));
    EXPECT_EQ(cmos(0x0c), 0xd0U);

    set_cmos(0x0b, 0x22); // the alarm, two seconds from now
    set_cmos(0x05, 0x13);
    set_cmos(0x03, 0x46);
    set_cmos(0x01, 0x03);
    EXPECT_EQ(rtc.update(), 1s);
    now += 1s;
    EXPECT_EQ(rtc.update(), 1s);
    EXPECT_EQ(rtc_levels.size(), 6U);
    now += 1s;
    EXPECT_EQ(rtc.update(), std::nullopt);
    EXPECT_EQ(rtc_levels.size(), 7U);
}

TEST(RtcTimerTest, RaisesTheLineInTime) {
    std::promise<void> raised;
    Rtc rtc(
        std::chrono::system_clock::now,
        [&raised, first = true](bool level) mutable {
            if (level && std::exchange(first, false))
                raised.set_value();
        },
        0, 0);
    const RtcTimer timer(rtc);
    rtc.select(0x0b);
    rtc.write(0x42);
    EXPECT_EQ(raised.get_future().wait_for(30s), std::future_status::ready);
}

TEST_F(DevicesTest, CmosTellsMemorySizes) {
    const auto word = [this](std::uint8_t index) { return cmos(index) | cmos(index + 1) << 8; };
    EXPECT_EQ(cmos(0x14), 0x02U);
    EXPECT_EQ(word(0x15), 640U);
    EXPECT_EQ(word(0x17), 0xffffU) << "as much as fits";
    EXPECT_EQ(word(0x30), 0xffffU);
    EXPECT_EQ(word(0x34), ((3072U - 16) << 20) >> 16);
    EXPECT_EQ(word(0x5b) | cmos(0x5d) << 16, 0x4000U);

    Rtc small([this] { return now; }, {}, std::uint64_t{8} << 20, 0);
    const auto small_word = [&small](std::uint8_t index) {
        small.select(index);
        const unsigned low = small.read();
        small.select(index + 1);
        return low | static_cast<unsigned>(small.read()) << 8;
    };
    EXPECT_EQ(small_word(0x30), 7U * 1024);
    EXPECT_EQ(small_word(0x34), 0U);
}

TEST_F(DevicesTest, PciHasNoDevices) {
    out(0xcfb, 0x01); // how kernels make sure that this is configuration mechanism 1
    out(0xcf8, 0x8000'0000, 4);
    EXPECT_EQ(in(0xcf8, 4), 0x8000'0000U);
    EXPECT_EQ(in(0xcfc, 4), 0xffff'ffffU);
    EXPECT_EQ(in(0xcfe, 2), 0xffffU);
    EXPECT_EQ(in(0xcff), 0xffU);
    out(0xcfc, 0x1234'5678, 4);
    EXPECT_EQ(in(0xcfc, 4), 0xffff'ffffU);
    out(0xcf8, 0xffff'ffff, 4);
    EXPECT_EQ(in(0xcf8, 4), 0x80ff'fffcU);
    EXPECT_EQ(platform.unclaimed(), UnclaimedAccesses{});
}

TEST_F(DevicesTest, PostCodesAreDropped) {
    out(0x80, 0x42);
    EXPECT_EQ(in(0x80), 0xffU);
    EXPECT_EQ(platform.unclaimed(), UnclaimedAccesses{});
}

TEST_F(DevicesTest, UnclaimedAccessesReadAllOnesAndAreCounted) {
    EXPECT_EQ(in(0x3e8), 0xffU);
    EXPECT_EQ(in(0x3e8, 2), 0xffffU);
    EXPECT_EQ(in(0xffff, 4), 0xffff'ffffU);
    out(0x1234, 1);
    EXPECT_EQ(platform.unclaimed(), (UnclaimedAccesses{.port_reads = 3, .port_writes = 1}));

    EXPECT_EQ(in(scr, 2), 0xff00U) << "the byte behind the serial port is nobody's";
    EXPECT_EQ(platform.unclaimed().port_reads, 4U);

    std::array<std::byte, 8> data{};
    platform.mmio_read(GuestPhys{0xfed0'0000}, data);
    for (const std::byte byte : data)
        EXPECT_EQ(byte, std::byte{0xff});
    platform.mmio_write(GuestPhys{0xfed0'0000}, data);
    platform.mmio_write(GuestPhys{0xfed0'0000}, data);
    EXPECT_EQ(platform.unclaimed().mmio_reads, 1U);
    EXPECT_EQ(platform.unclaimed().mmio_writes, 2U);
}

TEST_F(DevicesTest, PortsOfKvm) {
    const std::vector<unsigned> expected{0x20, 0x21, 0x40, 0x41, 0x42, 0x43, 0x61, 0xa0, 0xa1, 0x4d0, 0x4d1};
    std::vector<unsigned> owned;
    for (unsigned port = 0; port <= 0xffff; ++port)
        if (Platform::kvm_owns(Port{static_cast<std::uint16_t>(port)}))
            owned.push_back(port);
    EXPECT_EQ(owned, expected);
}

TEST_F(DevicesTest, EveryPortAnswersEverySize) {
    for (unsigned port = 0; port <= 0xffff; ++port)
        for (const unsigned size : {1U, 2U, 4U}) {
            const std::uint32_t value = in(static_cast<std::uint16_t>(port), size);
            if (size < 4) {
                ASSERT_EQ(value >> (8 * size), 0U) << port;
            }
            out(static_cast<std::uint16_t>(port), value, size);
        }
}

// --- QEMU's device for programs that test hypervisors

class TestDeviceTest : public DevicesTest {
  protected:
    TestDeviceTest() {
        PlatformConfig with = config();
        with.test_device = [this](unsigned line, bool level) { lines.emplace_back(line, level); };
        device.emplace(std::move(with));
    }
    std::uint32_t in(std::uint16_t port, unsigned size = 1) { return device->port_read(Port{port}, size); }
    void out(std::uint16_t port, std::uint32_t value, unsigned size = 1) {
        device->port_write(Port{port}, size, value);
    }
    std::optional<Platform> device;
    std::vector<std::pair<unsigned, bool>> lines;
};

TEST_F(TestDeviceTest, RegisterOfFourBytesTwice) {
    out(0xe0, 0x4433'2211, 4);
    EXPECT_EQ(in(0xe0, 4), 0x4433'2211U);
    out(0xe9, 0xaa);
    out(0xea, 0xccbb, 2);
    EXPECT_EQ(in(0xe8, 4), 0xccbb'aa11U);
    EXPECT_EQ(in(0xe1, 2), 0xbbaaU);
    EXPECT_EQ(in(0xe3, 2), 0xccU); // the register ends
    out(0xe4, 0x12345, 4);         // a page's address
    EXPECT_EQ(in(0xe4, 4), 0U);
    EXPECT_EQ(in(0xe0, 4), 0xccbb'aa11U);
    EXPECT_EQ(device->unclaimed(), UnclaimedAccesses{});
}

TEST_F(TestDeviceTest, PortsAreInterruptLines) {
    out(0x2000, 1);
    out(0x200e, 0xff);
    out(0x2017, 0);
    EXPECT_EQ(lines, (std::vector<std::pair<unsigned, bool>>{{0, true}, {14, true}, {23, false}}));
    out(0x2018, 1);
    EXPECT_EQ(lines.size(), 3U);
    EXPECT_EQ(device->unclaimed().port_writes, 1U);
}

TEST_F(TestDeviceTest, MemoryKeepsWhatIsWritten) {
    constexpr GuestPhys first{0xff00'0000}, last = first + 0xffff;
    std::array<std::byte, 2> two{std::byte{1}, std::byte{2}}, got{};
    device->mmio_write(last - 1, two);
    device->mmio_read(last - 1, got);
    EXPECT_EQ(got, two);
    EXPECT_EQ(device->unclaimed(), UnclaimedAccesses{});
    device->mmio_read(last, got); // reaches beyond
    device->mmio_write(first - 1, two);
    EXPECT_EQ(got, (std::array{std::byte{0xff}, std::byte{0xff}}));
    EXPECT_EQ(device->unclaimed(), (UnclaimedAccesses{.mmio_reads = 1, .mmio_writes = 1}));
}

TEST_F(DevicesTest, WithoutTheTestDeviceNothingAnswersThere) {
    std::array<std::byte, 2> two{};
    platform.mmio_read(GuestPhys{0xff00'0000}, two);
    EXPECT_EQ(two, (std::array{std::byte{0xff}, std::byte{0xff}}));
    EXPECT_EQ(in(0xe0), 0xffU);
    EXPECT_EQ(in(0xe9), 0xe9U); // the debug console
    out(0x2000, 1);
    EXPECT_EQ(platform.unclaimed().port_writes, 1U);
}

} // namespace
} // namespace umbra
