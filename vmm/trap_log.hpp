// What happened while the guest ran: every exit with its reason, counted, timed, remembered, and traced if
// asked.
#pragma once

#include "vmm/cpu.hpp"

#include <array>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace umbra {

/// Why the machine left the guest.
enum class TrapReason : std::uint8_t {
    page_fault,  ///< any #PF of the machine, hidden or not: the action tells
    instruction, ///< a privileged or sensitive instruction
    syscall,
    interrupt, ///< external
    exception, ///< any other exception
    port_read, ///< by KVM's own exit (an instruction that trapped counts as one)
    port_write,
    mmio_read,
    mmio_write,
    signal, ///< the launcher wanted the vCPU's thread
    count_,
};

/// What the monitor did about it.
enum class TrapAction : std::uint8_t {
    fill,    ///< filled the shadow tables; the guest never learns of it
    deliver, ///< delivered an event through the guest's IDT
    emulate, ///< executed the instruction on the virtual CPU
    enter,   ///< entered the guest's system-call handler
    device,  ///< a device model answered
    machine, ///< had the machine make the access, for a device inside KVM
    halt,    ///< put the vCPU to sleep
    attend,  ///< input, or nothing
    stop,    ///< ended the run
    count_,
};

/// As the enumerators are spelled above; the same in the trace, the statistics and reports.
[[nodiscard]] std::string_view name(TrapReason reason);
[[nodiscard]] std::string_view name(TrapAction action);

struct TrapRecord {
    std::uint64_t start = 0; ///< time-stamp counter
    std::uint64_t end = 0;
    TrapReason reason{};
    TrapAction action{};
    std::uint8_t vcpu = 0;
    std::uint8_t cpl = 0;     ///< virtual, when the trap came
    std::uint8_t vector = 0;  ///< of the exception or interrupt, met or delivered
    std::uint32_t detail = 0; ///< its error code, if it has one; number of ports
    GuestVirt rip{};
    GuestVirt address{};               ///< CR2; page faults only
    GuestPhys device{};                ///< the address; MMIO only
    const char* instruction = nullptr; ///< the mnemonic, if one was decoded; static text

    [[nodiscard]] bool has_vector() const { return reason == TrapReason::exception || vector != 0; }
    /// Whatever the reason: an emulated instruction may end in one too.
    [[nodiscard]] bool is_page_fault() const {
        return reason == TrapReason::page_fault || (reason != TrapReason::interrupt && vector == 14);
    }
};

class TrapLog {
  public:
    struct Total {
        std::uint64_t count = 0;
        std::uint64_t cycles = 0; ///< in the monitor, from exit to readiness for the next entry
    };
    static constexpr std::size_t remembered = 32;

    TrapLog() = default;
    /// Every record is also written to `path`, one line each; a line that begins with '#' explains the
    /// format. StartupError if it cannot be opened.
    ///
    /// A line is KEY=VALUE pairs, one space between. Always there, in this order: us (microseconds since
    /// umbra started, when the trap came), vcpu, reason, cpl, rip, action, took_us (until the guest could go
    /// on). Between rip and action, where it applies: vector and error (of an exception or interrupt, met or
    /// delivered; error is its error code, 0 if it has none), cr2 (page faults), port, gpa (MMIO),
    /// instruction (its mnemonic). Addresses, error codes
    /// and ports are hexadecimal.
    void trace_to(const std::string& path);
    /// Writes out what is left of the trace and ends it. False if some of it was lost, the disk being full
    /// for instance: the first line that could not be written was the last, and the guest went on.
    [[nodiscard]] bool finish_trace();

    void add(const TrapRecord& record) {
        Total& total =
            totals_[static_cast<std::size_t>(record.reason)][static_cast<std::size_t>(record.action)];
        ++total.count;
        total.cycles += record.end - record.start;
        last_[added_++ % remembered] = record;
        if (record.instruction != nullptr)
            count(record.instruction);
        if (trace_)
            write(record);
    }

    [[nodiscard]] const Total& total(TrapReason reason, TrapAction action) const {
        return totals_[static_cast<std::size_t>(reason)][static_cast<std::size_t>(action)];
    }
    /// Instructions that trapped, with how often.
    struct Instruction {
        const char* mnemonic = nullptr;
        std::uint64_t count = 0;
    };
    [[nodiscard]] std::span<const Instruction> instructions() const { return instructions_; }
    [[nodiscard]] std::uint64_t added() const { return added_; }
    /// Instructions that the monitor emulated behind one that had trapped, before they could.
    void count_ahead() { ++ahead_; }
    [[nodiscard]] std::uint64_t ahead() const { return ahead_; }
    /// The last records, oldest first; at most `remembered`.
    [[nodiscard]] std::vector<TrapRecord> last() const;

  private:
    struct Close {
        void operator()(std::FILE* file) const { std::fclose(file); }
    };
    void write(const TrapRecord& record);
    void put(std::string_view text);
    void count(const char* mnemonic) {
        for (Instruction& known :
             instructions_) { // some twenty at most; mnemonics are the same pointers each time
            if (known.mnemonic == mnemonic) {
                ++known.count;
                return;
            }
        }
        instructions_.push_back({mnemonic, 1});
    }

    std::array<std::array<Total, static_cast<std::size_t>(TrapAction::count_)>,
               static_cast<std::size_t>(TrapReason::count_)>
        totals_{};
    std::array<TrapRecord, remembered> last_{};
    std::vector<Instruction> instructions_;
    std::uint64_t added_ = 0, ahead_ = 0;
    std::unique_ptr<std::FILE, Close> trace_;
    bool trace_failed_ = false;
    double trace_rate_ = 1; ///< ticks_per_microsecond() when the trace began: one scale for all of it
};

/// The time-stamp counter. All of a machine's processors are taken to agree on it, as they do wherever Linux
/// uses it as its clock.
[[nodiscard]] inline std::uint64_t timestamp() {
    return __builtin_ia32_rdtsc();
}
/// Ticks of timestamp() in a microsecond, measured against the monotonic clock since the process started:
/// over at least a millisecond, which the call waits for if need be.
[[nodiscard]] double ticks_per_microsecond();

} // namespace umbra
