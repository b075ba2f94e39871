#include "vmm/traits.hpp"

#include "vmm/error.hpp"
#include "vmm/scratch_machine.hpp"
#include "vmm/segmentation.hpp"
#include "vmm/switcher_layout.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>

#include <cpuid.h>

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

/// Whether descriptors are looked for in the machine's GDT, which is not mapped there, and so trap: by `lsl`,
/// because a KVM whose own GDT is in force may interpret the loads that fail in it.
bool consults_own_gdt(ScratchMachine& scratch) {
    constexpr std::array<std::uint8_t, 3> lsl{0x0f, 0x03, 0xc0}; // lsl %eax, %eax
    constexpr std::uint16_t global = 0x8003, local = 0x8007;
    for (const std::uint16_t selector : {global, local}) {
        scratch.cpu[Gpr::rax] = selector;
        if (scratch.run(lsl).kind != Trap::Kind::descriptor)
            return false;
    }
    return true;
}

/// Whether a kernel at the machine's CPL 3 reads its CS and SS with RPL 0.
bool hides_rpl(ScratchMachine& scratch) {
    constexpr std::uint16_t code = 0x10, stack = 0x18;
    constexpr std::array<std::uint8_t, 4> read{0x8c, 0xc8, 0x8c, 0xd1}; // mov %cs, %eax; mov %ss, %ecx
    constexpr std::array<std::uint8_t, 1> hlt{0xf4};                    // a fault at no level but 0
    const VirtualCpu before = scratch.cpu;
    scratch.cpu.cs = flat_code_segment(code, 0, true);
    scratch.cpu.ss = flat_stack_segment(stack, 0);
    const bool hidden =
        scratch.completes(read) && scratch.cpu[Gpr::rax] == code && scratch.cpu[Gpr::rcx] == stack;
    const Trap trap = scratch.run(hlt);
    scratch.cpu = before;
    return hidden && trap.kind == Trap::Kind::vector &&
           trap.vector == static_cast<std::uint8_t>(Vector::general_protection);
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

/// Whether this process runs on QEMU's software emulation (TCG), by the hypervisor's leaf of CPUID.
bool on_emulated_cpu() {
    constexpr std::uint32_t hypervisor_leaf = 0x4000'0000, hypervisor_present = std::uint32_t{1} << 31;
    std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0 || (ecx & hypervisor_present) == 0)
        return false;
    std::array<std::uint32_t, 3> name{};
    __cpuid(hypervisor_leaf, eax, name[0], name[1], name[2]);
    return std::memcmp(name.data(), "TCGTCGTCGTCG", sizeof(name)) == 0;
}

} // namespace

HostTraits probe_traits(const Kvm& kvm) {
    // Assumed until known: what works on every host.
    HostTraits traits;
    ScratchMachine scratch(kvm, traits);

    if (!scratch.completes({}))
        throw StartupError(ExitCode::host_cannot, "this KVM does not deliver a trap from CPL 3: " +
                                                      scratch.machine().describe_exit());

    constexpr std::array<std::uint8_t, 1> cli{0xfa};
    traits.iopl_honoured = scratch.completes(cli);
    traits.own_gdt = consults_own_gdt(scratch);
    traits.rpl_hidden = traits.own_gdt; // to be tried
    scratch.switcher().assume(traits);
    traits.rpl_hidden = traits.own_gdt && hides_rpl(scratch);
    scratch.switcher().assume(traits);
    constexpr std::array<std::uint8_t, 2> syscall{0x0f, 0x05};
    (void)scratch.run(syscall);
    traits.syscall_to_ring0 = scratch.machine().rip() - scratch.switcher().syscall_entry().value() < 16;
    traits.stores_seen = sees_stores(scratch);
    traits.native_ring0 = !interprets_ring0(scratch);
    // A KVM that interprets ring 0 may intercept CPUID in this machine and not in the guest's.
    traits.cpuid_intercepted = traits.native_ring0 && intercepts_cpuid(scratch);
    traits.exact_cpu = !on_emulated_cpu();
    return traits;
}

} // namespace umbra
