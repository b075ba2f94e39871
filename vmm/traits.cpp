#include "vmm/traits.hpp"

#include "vmm/error.hpp"
#include "vmm/scratch_machine.hpp"
#include "vmm/switcher_layout.h"

#include <algorithm>
#include <array>
#include <chrono>

namespace umbra {
namespace {

bool sees_stores(ScratchMachine& scratch) {
    scratch.page(4)[0] = 4;
    (void)scratch.load(3);
    scratch.entry(3) = ScratchMachine::mapping(4);
    scratch.debt.flush = true;
    const bool seen = scratch.load(3) == 4;
    scratch.entry(3) = ScratchMachine::mapping(3);
    scratch.debt = Debt({scratch.table()});
    return seen;
}

/// Whether a segment is found that the machine's GDT has and no host's: by `lsl`, because a KVM whose own GDT
/// is in force may interpret the loads that fail in it.
bool consults_own_gdt(ScratchMachine& scratch) {
    constexpr std::array<std::uint8_t, 3> lsl{0x0f, 0x03, 0xc0}; // lsl %eax, %eax
    scratch.cpu[Gpr::rax] = Switcher::own_data;
    return scratch.completes(lsl) &&
           static_cast<std::uint32_t>(scratch.cpu[Gpr::rax]) == 0xffff'ffff; // its limit
}

/// Whether CPUID at CPL 3 shows what the VM was given: its brand string begins with ours.
bool intercepts_cpuid(ScratchMachine& scratch) {
    constexpr std::array<std::uint8_t, 2> code{0x0f, 0xa2};
    scratch.cpu[Gpr::rax] = ScratchMachine::marked_leaf;
    scratch.cpu[Gpr::rcx] = 0;
    return scratch.completes(code) &&
           static_cast<std::uint32_t>(scratch.cpu[Gpr::rax]) == ScratchMachine::leaf_mark;
}

/// Whether KVM interprets ring-0 code, at half a microsecond an instruction or more.
bool interprets_ring0(ScratchMachine& scratch) {
    // A port access of a CPU is completed when the machine is entered again, an interpreted one at once.
    // Kernels before 5.1 know no difference: then time tells, by traps with and without instructions on the
    // way back into the guest. Time alone would not do: what disturbs it may look like an interpreter.
    (void)scratch.completes({});
    if (scratch.machine().rip() % STUB_SIZE == 0)
        return false;
    constexpr std::size_t tables = 16, instructions = 3 * tables;
    const auto time = [&](std::size_t count) {
        scratch.debt = Debt(std::vector(count, scratch.spare_table()));
        const auto start = std::chrono::steady_clock::now();
        (void)scratch.completes({});
        return std::chrono::steady_clock::now() - start;
    };
    auto with = std::chrono::steady_clock::duration::max(), without = with;
    for (int i = 0; i < 3; ++i) {
        without = std::min(without, time(0));
        with = std::min(with, time(tables));
    }
    return with - without > std::chrono::nanoseconds(250) * instructions;
}

} // namespace

HostTraits probe_traits(const Kvm& kvm) {
    // Assumed until known: what works on every host.
    HostTraits traits;
    traits.resume = ResumeBy::system_registers;
    ScratchMachine scratch(kvm, traits);

    if (!scratch.completes({}))
        throw StartupError(ExitCode::host_cannot, "this KVM does not deliver a trap from CPL 3: " +
                                                      scratch.machine().describe_exit());

    constexpr std::array<std::uint8_t, 1> cli{0xfa};
    traits.iopl_honoured = scratch.completes(cli);
    traits.own_gdt = consults_own_gdt(scratch);
    constexpr std::array<std::uint8_t, 2> syscall{0x0f, 0x05};
    (void)scratch.run(syscall);
    traits.syscall_to_ring0 = scratch.machine().rip() - scratch.switcher().syscall_entry().value() < 16;
    traits.cpuid_intercepted = intercepts_cpuid(scratch);
    traits.stores_seen = sees_stores(scratch);
    traits.resume = interprets_ring0(scratch) ? ResumeBy::system_registers : ResumeBy::iretq;
    return traits;
}

} // namespace umbra
