#include "vmm/guest_breakpoints.hpp"

#include "vmm/segmentation.hpp"

#include <utility>

namespace umbra {

bool GuestBreakpoints::enabled() const {
    constexpr std::uint64_t local_and_global = 0xff;
    return (cpu_->dr7 & local_and_global) != 0;
}

GuestBreakpoints::Breakpoint GuestBreakpoints::breakpoint(unsigned number) const {
    constexpr std::array<std::uint64_t, 4> sizes{1, 2, 8, 4}; // by LEN
    const std::uint64_t control = cpu_->dr7 >> (16 + 4 * number);
    Breakpoint found{.condition = static_cast<Condition>(control & 3),
                     .at = cpu_->dr[number],
                     .bit = std::uint64_t{1} << number};
    if (found.condition != Condition::execution)
        found.size = sizes[control >> 2 & 3];
    found.at &= ~(found.size - 1);
    return found;
}

/// All that count: without CR4.DE there is none for ports.
template<class Action>
void GuestBreakpoints::for_each(Action action) const {
    if (!enabled())
        return;
    for (unsigned number = 0; number < cpu_->dr.size(); ++number) {
        if ((cpu_->dr7 >> (2 * number) & 3) == 0)
            continue;
        const Breakpoint each = breakpoint(number);
        if (each.condition != Condition::port || (cpu_->cr4 & cr4::de) != 0)
            action(each);
    }
}

Guards GuestBreakpoints::guards() const {
    Guards guards;
    for_each([&](const Breakpoint& each) {
        const GuestVirt at(each.at);
        if (each.condition == Condition::port || !paging_4_level.canonical(at))
            return;
        Guard& guard = guards.pages[at.page_base()];
        guard = guard | Guard{.read = each.condition == Condition::access,
                              .write = each.condition != Condition::execution,
                              .fetch = each.condition == Condition::execution};
    });
    return guards;
}

bool GuestBreakpoints::wants_step() const {
    bool ports = false;
    for_each([&](const Breakpoint& each) { ports = ports || each.condition == Condition::port; });
    return (ports && cpu_->cpl <= cpu_->iopl()) || held_ != 0 || (after_stack_load_ && enabled());
}

std::uint64_t GuestBreakpoints::at_instruction() const {
    std::uint64_t met = 0;
    if ((cpu_->rflags & rflags::resume) != 0 || after_stack_load_)
        return met;
    for_each([&, rip = linear_rip(*cpu_)](const Breakpoint& each) {
        if (each.condition == Condition::execution && each.at == rip.value())
            met |= each.bit;
    });
    return met;
}

void GuestBreakpoints::accessed(GuestVirt at, std::uint64_t size, bool write) {
    for_each([&](const Breakpoint& each) {
        const bool concerns =
            each.condition == Condition::access || (each.condition == Condition::write && write);
        if (concerns && each.meets(at.value(), size))
            met_ |= each.bit;
    });
}

void GuestBreakpoints::accessed(std::span<const MemoryAccess> operands) {
    for (const MemoryAccess& operand : operands)
        accessed(operand.at, operand.size, operand.write);
}

void GuestBreakpoints::accessed_port(std::uint16_t port, std::uint64_t size) {
    for_each([&](const Breakpoint& each) {
        if (each.condition == Condition::port && each.meets(port, size))
            met_ |= each.bit;
    });
}

void GuestBreakpoints::hold_back() {
    held_ |= std::exchange(met_, 0);
    after_stack_load_ = true;
}

std::uint64_t GuestBreakpoints::take() {
    after_stack_load_ = false;
    return std::exchange(met_, 0) | std::exchange(held_, 0);
}

void GuestBreakpoints::delay() {
    held_ |= std::exchange(met_, 0);
}

} // namespace umbra
