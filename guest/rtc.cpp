// rtc: interrupts of the real-time clock, IRQ 8. Proves that periods, the end of an update and the alarm
// interrupt if they are enabled and not otherwise, end a HLT, and tell themselves in status C; and that there
// is no further interrupt until that has been read. Motorola MC146818A data sheet. Outcome: passed.
#include "guest/runtime/boot.hpp"
#include "guest/runtime/console.hpp"
#include "guest/runtime/cpu.hpp"
#include "guest/runtime/descriptors.hpp"
#include "guest/runtime/process.hpp"
#include "guest/runtime/timer.hpp"
#include "guest/runtime/traps.hpp"

#include <cstdint>
#include <initializer_list>

using namespace umbra::guest;

namespace {

constexpr unsigned rtc_line = 8, cascade_line = 2;
constexpr std::uint8_t status_a = 0x0a, status_b = 0x0b, status_c = 0x0c;
constexpr std::uint8_t seconds_alarm = 0x01, minutes_alarm = 0x03, hours_alarm = 0x05, any = 0xff;
constexpr std::uint8_t hours_24 = 0x02, updates = 0x10, alarms = 0x20, periods = 0x40, interrupting = 0x80;
constexpr std::uint8_t hz_1024 = 0x26;

std::uint8_t cmos(std::uint8_t index) {
    out8(0x70, index);
    return in8(0x71);
}

void set_cmos(std::uint8_t index, std::uint8_t value) {
    out8(0x70, index);
    out8(0x71, value);
}

std::uint64_t seconds() {
    return cmos(0);
}

volatile std::uint64_t interrupts = 0;
volatile std::uint8_t told = 0; ///< by status C, to the last one
bool read_status = true;

void on_interrupt(TrapFrame&) {
    interrupts = interrupts + 1;
    if (read_status)
        told = cmos(status_c);
    end_of_interrupt(rtc_line);
}

void await(std::uint64_t count) {
    const std::uint64_t before = interrupts;
    while (interrupts - before < count) {
        wait_for_interrupt();
        disable_interrupts();
    }
}

/// From here on `which` interrupt; what the PIC may have kept of others is taken before.
void enable(std::uint8_t which) {
    set_cmos(status_b, hours_24);
    (void)cmos(status_c);
    enable_interrupts();
    (void)seconds();
    disable_interrupts();
    set_cmos(status_b, static_cast<std::uint8_t>(hours_24 | which));
}

} // namespace

extern "C" int kernel_main(const BootParams&) {
    install_descriptors();
    set_handler(irq_base + rtc_line, on_interrupt);
    init_pic(1 << rtc_line | 1 << cascade_line);
    set_cmos(status_a, hz_1024);

    enable(periods);
    await(50);
    CHECK_EQ(told & (periods | interrupting), periods | interrupting);
    print("rtc: periods\n");

    read_status = false;
    await(1);
    const std::uint64_t before = interrupts, from = seconds();
    enable_interrupts();
    while (seconds() == from) {
    }
    disable_interrupts();
    CHECK(interrupts - before <= 1); // one may have come before status C was last read
    read_status = true;

    for (unsigned i = 0; i < 2; ++i) {
        const std::uint64_t second = seconds();
        enable(updates);
        await(1);
        CHECK_EQ(told & (updates | interrupting), updates | interrupting);
        CHECK(seconds() != second);
    }
    print("rtc: updates\n");

    for (const std::uint8_t part : {seconds_alarm, minutes_alarm, hours_alarm})
        set_cmos(part, any);
    enable(alarms);
    await(1);
    CHECK_EQ(told & (alarms | updates | interrupting), alarms | updates | interrupting);
    enable(0);
    const std::uint64_t all = interrupts, last = seconds();
    enable_interrupts();
    while (seconds() == last) {
    }
    disable_interrupts();
    CHECK_EQ(interrupts, all);
    CHECK_EQ(cmos(status_c) & (updates | interrupting), updates);
    print("rtc: alarms\n");

    init_pic(0);
    print("rtc: passed\n");
    return 0;
}
