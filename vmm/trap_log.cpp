#include "vmm/trap_log.hpp"

#include "vmm/error.hpp"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <limits>
#include <thread>

#include <fmt/core.h>

namespace umbra {
namespace {

using namespace std::string_view_literals;
using Clock = std::chrono::steady_clock;

constexpr std::array reason_names{
    "page_fault"sv, "instruction"sv, "syscall"sv,   "interrupt"sv,  "exception"sv,
    "port_read"sv,  "port_write"sv,  "mmio_read"sv, "mmio_write"sv, "signal"sv,
};
constexpr std::array action_names{
    "fill"sv, "deliver"sv, "emulate"sv, "enter"sv, "device"sv, "machine"sv, "halt"sv, "attend"sv, "stop"sv,
};
static_assert(reason_names.size() == static_cast<std::size_t>(TrapReason::count_));
static_assert(action_names.size() == static_cast<std::size_t>(TrapAction::count_));

/// One moment on both clocks.
struct Moment {
    std::uint64_t ticks;
    Clock::time_point time;
};

/// Reads the time-stamp counter on both sides of the other clock, and keeps the closest of a few tries: any
/// of them may be interrupted.
Moment now() {
    Moment best{};
    std::uint64_t closest = std::numeric_limits<std::uint64_t>::max();
    for (int i = 0; i < 4; ++i) {
        const std::uint64_t before = timestamp();
        const Clock::time_point time = Clock::now();
        const std::uint64_t distance = timestamp() - before;
        if (distance < closest) {
            closest = distance;
            best = {before + distance / 2, time};
        }
    }
    return best;
}

const Moment process_start = now();

} // namespace

std::string_view name(TrapReason reason) {
    return reason_names.at(static_cast<std::size_t>(reason));
}

std::string_view name(TrapAction action) {
    return action_names.at(static_cast<std::size_t>(action));
}

void TrapLog::trace_to(const std::string& path) {
    trace_.reset(std::fopen(path.c_str(), "we"));
    if (!trace_)
        throw StartupError(ExitCode::bad_usage,
                           fmt::format("cannot write trace '{}': {}", path, std::strerror(errno)));
    trace_rate_ = ticks_per_microsecond();
    trace_failed_ = false;
    put("# umbra trace: us=since umbra started vcpu reason cpl rip [vector error] [cr2] [port] [gpa] "
        "[instruction] action "
        "took_us=in umbra\n");
}

bool TrapLog::finish_trace() {
    if (trace_ && std::fclose(trace_.release()) != 0) // writes what is buffered
        trace_failed_ = true;
    return !trace_failed_;
}

void TrapLog::put(std::string_view text) {
    if (std::fwrite(text.data(), 1, text.size(), trace_.get()) == text.size())
        return;
    trace_failed_ = true;
    trace_.reset();
}

void TrapLog::write(const TrapRecord& record) {
    const auto microseconds = [this](std::uint64_t from, std::uint64_t to) {
        return static_cast<double>(to - from) / trace_rate_;
    };
    std::string line;
    line.reserve(160);
    const auto append = [&line]<class... Args>(fmt::format_string<Args...> format, Args&&... args) {
        line += fmt::format(format, std::forward<Args>(args)...);
    };
    append("us={:.3f} vcpu={} reason={} cpl={} rip={:#x}", microseconds(process_start.ticks, record.start),
           record.vcpu, name(record.reason), record.cpl, record.rip.value());
    if (record.has_vector())
        append(" vector={} error={:#x}", record.vector, record.detail);
    if (record.is_page_fault())
        append(" cr2={:#x}", record.address.value());
    if (record.reason == TrapReason::port_read || record.reason == TrapReason::port_write)
        append(" port={:#x}", record.detail);
    if (record.reason == TrapReason::mmio_read || record.reason == TrapReason::mmio_write)
        append(" gpa={:#x}", record.device.value());
    if (record.instruction != nullptr)
        append(" instruction={}", record.instruction);
    append(" action={} took_us={:.3f}\n", name(record.action), microseconds(record.start, record.end));
    put(line);
}

std::vector<TrapRecord> TrapLog::last() const {
    std::vector<TrapRecord> records;
    const std::uint64_t count = std::min<std::uint64_t>(added_, remembered);
    records.reserve(count);
    for (std::uint64_t i = added_ - count; i < added_; ++i)
        records.push_back(last_[i % remembered]);
    return records;
}

double ticks_per_microsecond() {
    using namespace std::chrono_literals;
    if (const auto age = Clock::now() - process_start.time; age < 1ms)
        std::this_thread::sleep_for(1ms - age);
    const Moment end = now();
    const std::chrono::duration<double, std::micro> passed = end.time - process_start.time;
    return static_cast<double>(end.ticks - process_start.ticks) / passed.count();
}

} // namespace umbra
