// Time of day as the MC146818A tells it, and the memory sizes that BIOSes leave in CMOS.
#include "vmm/devices/rtc.hpp"

#include <algorithm>
#include <utility>

namespace umbra {

namespace {

constexpr std::uint8_t seconds_register = 0x00;
constexpr std::uint8_t minutes_register = 0x02;
constexpr std::uint8_t hours_register = 0x04;
constexpr std::uint8_t week_day_register = 0x06;
constexpr std::uint8_t month_day_register = 0x07;
constexpr std::uint8_t month_register = 0x08;
constexpr std::uint8_t year_register = 0x09;
constexpr std::uint8_t status_a = 0x0a;
constexpr std::uint8_t status_b = 0x0b;
constexpr std::uint8_t status_c = 0x0c;
constexpr std::uint8_t status_d = 0x0d;
constexpr std::uint8_t century_register = 0x32;

constexpr std::uint8_t update_in_progress = 0x80; // of status A
constexpr std::uint8_t status_a_at_reset = 0x26;  // 32768 Hz time base, 1024 Hz periodic rate
constexpr std::uint8_t status_b_binary = 0x04;    // otherwise BCD
constexpr std::uint8_t status_b_24_hours = 0x02;  // otherwise 12 hours with PM in bit 7
constexpr std::uint8_t status_d_valid = 0x80;     // the battery is good
constexpr std::uint8_t hours_pm = 0x80;
constexpr std::uint8_t seconds_alarm = 0x01;
constexpr std::uint8_t minutes_alarm = 0x03;
constexpr std::uint8_t hours_alarm = 0x05;
constexpr std::uint8_t alarm_any = 0xc0; // both bits: whatever the time is

constexpr std::uint8_t status_a_rate = 0x0f;
constexpr std::uint8_t status_b_set = 0x80; // the time is being set: no updates
// Of status C; their interrupts are enabled by the same bits of status B.
constexpr std::uint8_t flag_update = 0x10;
constexpr std::uint8_t flag_alarm = 0x20;
constexpr std::uint8_t flag_periodic = 0x40;
constexpr std::uint8_t flag_any = 0x80; // one of them is enabled

constexpr std::uint64_t time_base_hz = 32768;

// UIP rises this long before the time changes, so that who sees it clear can read the time undisturbed. The
// time here changes at once, so it falls with the change.
constexpr std::chrono::microseconds update_warning{244};

constexpr std::uint64_t kib = 1024;
constexpr std::uint64_t mib = 1024 * kib;
constexpr std::uint64_t base_memory_kib = 640;

} // namespace

Rtc::Rtc(WallClock clock, InterruptLine interrupt, std::uint64_t low_memory, std::uint64_t high_memory)
    : clock_(std::move(clock)), interrupt_(std::move(interrupt)) {
    memory_[status_a] = status_a_at_reset;
    memory_[status_b] = status_b_24_hours;
    flags_since_ = now();

    const auto put = [this](std::size_t index, std::uint64_t value, std::size_t bytes) {
        for (std::size_t i = 0; i < bytes; ++i)
            memory_.at(index + i) = static_cast<std::uint8_t>(value >> (8 * i));
    };
    const auto above = [](std::uint64_t memory, std::uint64_t start) {
        return memory > start ? memory - start : 0;
    };
    const std::uint64_t extended_kib = std::min<std::uint64_t>(above(low_memory, mib) / kib, 0xffff);
    constexpr std::uint8_t equipment = 0x02; // an FPU, a VGA, no mouse, no floppy disk
    put(0x14, equipment, 1);
    put(0x15, base_memory_kib, 2);
    put(0x17, extended_kib, 2); // KiB above 1 MB, twice: as configured and as found
    put(0x30, extended_kib, 2);
    put(0x34, std::min<std::uint64_t>(above(low_memory, 16 * mib) / (64 * kib), 0xffff), 2);
    put(0x5b, std::min<std::uint64_t>(high_memory / (64 * kib), 0xff'ffff), 3);
}

void Rtc::select(std::uint8_t index) {
    const std::scoped_lock lock(mutex_);
    index_ = index & 0x7f;
}

std::uint8_t Rtc::read() {
    std::unique_lock lock(mutex_);
    const bool took_flags = index_ == status_c;
    const std::uint8_t value = read_register();
    lock.unlock();
    if (took_flags)
        changed();
    return value;
}

void Rtc::write(std::uint8_t value) {
    {
        const std::scoped_lock lock(mutex_);
        write_register(value);
    }
    changed();
}

void Rtc::observe(std::function<void()> observer) {
    observer_ = std::move(observer);
}

void Rtc::changed() const {
    if (observer_)
        observer_();
}

std::optional<std::chrono::microseconds> Rtc::update() {
    using namespace std::chrono;
    const std::scoped_lock lock(mutex_);
    const unsigned enabled = memory_[status_b] & (flag_update | flag_alarm | flag_periodic);
    const Moment moment = now();
    set_line((flags_until(moment) & enabled) != 0);
    if (line_ || enabled == 0)
        return std::nullopt;
    const microseconds into_second = moment - floor<seconds>(moment);
    microseconds next = seconds(1);
    if ((enabled & flag_periodic) != 0 && period_shift() != 0) {
        const std::uint64_t per_second = time_base_hz >> period_shift();
        const std::uint64_t passed = static_cast<std::uint64_t>(into_second.count()) * per_second / 1'000'000;
        next = microseconds(((passed + 1) * 1'000'000 + per_second - 1) / per_second);
    }
    return next - into_second;
}

void Rtc::set_line(bool level) {
    if (std::exchange(line_, level) != level && interrupt_)
        interrupt_(level);
}

std::uint8_t Rtc::read_register() {
    using namespace std::chrono;
    const Moment moment = now();
    const auto day = floor<days>(moment);
    const year_month_day date{day};
    const hh_mm_ss time{moment - day};
    const auto year = static_cast<unsigned>(static_cast<int>(date.year()));
    switch (index_) {
    case seconds_register:
        return encode(static_cast<unsigned>(time.seconds().count()));
    case minutes_register:
        return encode(static_cast<unsigned>(time.minutes().count()));
    case hours_register:
        return encode_hours(static_cast<unsigned>(time.hours().count()));
    case week_day_register: // 1 = Sunday
        return encode(weekday{day}.c_encoding() + 1);
    case month_day_register:
        return encode(static_cast<unsigned>(date.day()));
    case month_register:
        return encode(static_cast<unsigned>(date.month()));
    case year_register:
        return encode(year % 100);
    case century_register:
        return encode(year / 100 % 100);
    case status_a: {
        const bool updating = time.subseconds() >= seconds{1} - update_warning;
        return static_cast<std::uint8_t>(memory_[status_a] | (updating ? update_in_progress : 0U));
    }
    case status_c:
        return take_flags();
    case status_d:
        return status_d_valid;
    default:
        return memory_.at(index_);
    }
}

void Rtc::write_register(std::uint8_t value) {
    switch (index_) {
    case status_a:
        memory_[status_a] = value & static_cast<std::uint8_t>(~update_in_progress);
        break;
    case status_c: // read-only
        break;
    default: // the time's registers take a value that read() does not ask for
        memory_.at(index_) = value;
        break;
    }
}

/// Status C, which reading clears.
std::uint8_t Rtc::take_flags() {
    const Moment until = now();
    unsigned flags = flags_until(until);
    flags_since_ = until;
    if ((flags & memory_[status_b]) != 0)
        flags |= flag_any;
    set_line(false);
    return static_cast<std::uint8_t>(flags);
}

/// What has happened by then, since status C was read.
unsigned Rtc::flags_until(Moment until) const {
    using namespace std::chrono;
    const auto first = floor<seconds>(flags_since_), last = floor<seconds>(until);
    unsigned flags = 0;
    if ((memory_[status_b] & status_b_set) == 0 && last > first)
        flags |= flag_update | (alarm_in(first, last) ? flag_alarm : 0U);
    if (periods_until(until) != periods_until(flags_since_))
        flags |= flag_periodic;
    return flags;
}

/// The length of a period is 2 to this power, in ticks of the time base; 0: there are no periods.
unsigned Rtc::period_shift() const {
    const unsigned rate = memory_[status_a] & status_a_rate;
    if (rate == 0)
        return 0;
    return rate < 3 ? rate + 6 : rate - 1; // the two fastest are those of 8 and 9
}

/// How many periods have passed by then, since whenever; 0 if they are off.
std::uint64_t Rtc::periods_until(Moment when) const {
    using namespace std::chrono;
    const unsigned shift = period_shift();
    if (shift == 0)
        return 0;
    const auto whole = floor<seconds>(when.time_since_epoch());
    const microseconds rest = when.time_since_epoch() - whole;
    const std::uint64_t ticks = static_cast<std::uint64_t>(whole.count()) * time_base_hz +
                                static_cast<std::uint64_t>(rest.count()) * time_base_hz / 1'000'000;
    return ticks >> shift;
}

/// Whether the alarm's time has come after the one and until the other.
bool Rtc::alarm_in(std::chrono::sys_seconds after, std::chrono::sys_seconds until) const {
    using namespace std::chrono;
    const auto matches = [this](std::uint8_t alarm, std::uint8_t value) {
        return (memory_.at(alarm) & alarm_any) == alarm_any || memory_.at(alarm) == value;
    };
    after = std::max(after, until - days(1)); // by then it has come, if it is a time at all
    while (after < until) {
        after += seconds(1);
        const hh_mm_ss time{after - floor<days>(after)};
        if (matches(seconds_alarm, encode(static_cast<unsigned>(time.seconds().count()))) &&
            matches(minutes_alarm, encode(static_cast<unsigned>(time.minutes().count()))) &&
            matches(hours_alarm, encode_hours(static_cast<unsigned>(time.hours().count()))))
            return true;
    }
    return false;
}

std::uint8_t Rtc::encode(unsigned value) const {
    const bool binary = (memory_[status_b] & status_b_binary) != 0;
    return static_cast<std::uint8_t>(binary ? value : value / 10 * 16 + value % 10);
}

std::uint8_t Rtc::encode_hours(unsigned hours) const {
    if ((memory_[status_b] & status_b_24_hours) != 0)
        return encode(hours);
    const unsigned of_twelve = hours % 12 == 0 ? 12 : hours % 12;
    return static_cast<std::uint8_t>(encode(of_twelve) | (hours >= 12 ? hours_pm : 0U));
}

} // namespace umbra
