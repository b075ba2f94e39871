// Delivery of exceptions and interrupts through the guest's IDT, as its CPU would do it in long mode and in
// legacy protected mode.
//
// Intel SDM vol. 3A, chapter 6, chiefly 6.11 to 6.15; INT n in vol. 2A.
#pragma once

#include "vmm/cpu.hpp"
#include "vmm/guest_space.hpp"

#include <array>
#include <span>
#include <string_view>

namespace umbra {

enum class EventKind : std::uint8_t {
    exception,          ///< raised by the CPU (INT1 counts as one: no gate privilege check)
    external_interrupt, ///< from an interrupt controller
    nmi,                ///< blocks further ones
    software_interrupt, ///< INT n
    software_exception, ///< INT3, INTO
};

/// Comes from outside, whatever the instruction.
[[nodiscard]] constexpr bool is_interrupt(EventKind kind) {
    return kind == EventKind::external_interrupt || kind == EventKind::nmi;
}

/// Something to be delivered. cpu.rip is what the handler shall find on its stack: the faulting instruction
/// for faults, the next one for traps, interrupts and software interrupts.
struct Event {
    std::uint8_t vector = 0;
    EventKind kind = EventKind::exception;
    std::optional<std::uint32_t> error_code;
    GuestVirt address; ///< becomes CR2; page faults only
    /// Of the instruction before cpu.rip that caused the event, for software kinds and INT1: a fault in their
    /// delivery is one of that instruction.
    std::uint8_t instruction_length = 0;

    static Event of(const Exception& exception) {
        return {static_cast<std::uint8_t>(exception.vector), EventKind::exception, exception.error_code,
                exception.address, 0};
    }
    static Event external(std::uint8_t vector) {
        return {vector, EventKind::external_interrupt, std::nullopt, {}, 0};
    }
    static Event nmi() {
        return {static_cast<std::uint8_t>(Vector::nmi), EventKind::nmi, std::nullopt, {}, 0};
    }
    static Event software(std::uint8_t vector, std::uint8_t instruction_length) {
        return {vector, EventKind::software_interrupt, std::nullopt, {}, instruction_length};
    }
};

/// How a delivery ended.
struct Delivery {
    enum Outcome : std::uint8_t {
        delivered,    ///< the CPU is at the first instruction of a handler
        triple_fault, ///< the CPU has shut down; its state is as before the last attempt
        unsupported,  ///< the delivery needs what umbra does not emulate: see `what`
    };
    Outcome outcome = delivered;
    /// Of `unsupported`: real mode, virtual-8086 mode or a task gate. Static text. The CPU's state is as
    /// before the last attempt.
    std::string_view what;

    /// Faults met on the way, first to last: the last one was delivered instead, or ended in the triple
    /// fault.
    std::array<Exception, 4> faults{};
    unsigned fault_count = 0;

    [[nodiscard]] std::span<const Exception> nested() const { return std::span(faults).first(fault_count); }
};

/// Delivers `event` in long mode or legacy protected mode: gate, privilege and stack switch, frame, RFLAGS,
/// CR2; DR7.GD is cleared for #DB, and cpu.halted. All its accesses are implicit supervisor ones; RFLAGS.AC
/// stays as it is. Faults on the way are delivered in its place, by the rules of Intel SDM vol. 3A, table
/// 6-5: at last as #DF, or not at all. The caller has set DR6, and holds external interrupts back while the
/// CPU does not accept them.
[[nodiscard]] Delivery deliver(VirtualCpu& cpu, const GuestSpace& space, const Event& event);

} // namespace umbra
