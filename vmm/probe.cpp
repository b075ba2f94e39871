#include "vmm/probe.hpp"

#include "vmm/scratch_machine.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <optional>

#include <fmt/core.h>

namespace umbra {
namespace {

struct Finding {
    std::string value;
    std::string meaning;
};

Finding unknown(std::string_view why) {
    return {fmt::format("unknown: {}", why), ""};
}

constexpr auto number(Vector vector) {
    return static_cast<std::uint8_t>(vector);
}

std::string name(std::uint8_t vector) {
    switch (static_cast<Vector>(vector)) {
    case Vector::debug:
        return "#DB";
    case Vector::breakpoint:
        return "#BP";
    case Vector::invalid_opcode:
        return "#UD";
    case Vector::general_protection:
        return "#GP";
    case Vector::page_fault:
        return "#PF";
    case Vector::divide_error:
    case Vector::nmi:
    case Vector::overflow:
    case Vector::bound:
    case Vector::device_not_available:
    case Vector::double_fault:
    case Vector::invalid_tss:
    case Vector::segment_not_present:
    case Vector::stack_fault:
    case Vector::x87:
    case Vector::alignment_check:
    case Vector::machine_check:
    case Vector::simd:
        break;
    }
    return fmt::format("vector {}", vector);
}

/// How the machine left the guest: "#GP(0x402)".
std::string describe(const Trap& trap, ScratchMachine& scratch) {
    switch (trap.kind) {
    case Trap::Kind::vector:
        return name(trap.vector) + (trap.error_code ? fmt::format("({:#x})", *trap.error_code) : "");
    case Trap::Kind::syscall:
        return "a system call";
    case Trap::Kind::descriptor:
        return fmt::format("a look at descriptor {:#x}", trap.error_code.value_or(0));
    case Trap::Kind::none:
    case Trap::Kind::broken:
        break;
    }
    return scratch.machine().describe_exit();
}

bool is(const Trap& trap, Vector vector) {
    return trap.kind == Trap::Kind::vector && trap.vector == number(vector);
}

// --- times

template<class Action>
double median_ns(std::size_t times, Action action) {
    std::vector<double> samples(times);
    for (double& sample : samples) {
        const auto start = std::chrono::steady_clock::now();
        action();
        sample = std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count();
    }
    const auto middle = samples.begin() + static_cast<std::ptrdiff_t>(times / 2);
    std::ranges::nth_element(samples, middle);
    return *middle;
}

Finding round_trip(const Kvm& kvm, const HostTraits& traits) {
    ScratchMachine scratch(kvm, traits);
    const double time = median_ns(300, [&] { (void)scratch.completes({}); });
    return {fmt::format("{:.1f} us", time / 1000), "what each intercepted instruction or fault costs"};
}

Finding ring0_instruction(const Kvm& kvm, const HostTraits& traits) {
    ScratchMachine scratch(kvm, traits);
    constexpr std::size_t tables = 64, instructions = 3 * tables; // of the switcher's republish loop
    const auto time = [&](std::size_t count) {
        return median_ns(50, [&] {
            scratch.debt = Debt(std::vector(count, scratch.spare_table()));
            (void)scratch.completes({});
        });
    };
    const double without = time(0);
    const double each = std::max(0.0, time(tables) - without) / instructions;
    return {fmt::format("{:.0f} ns", each), each < 100 ? "ring 0 runs natively" : "ring 0 is interpreted"};
}

Finding ring0_trap(const Kvm& kvm, const HostTraits& traits) {
    HostTraits with_descriptors = traits; // of CS and SS, for its `iretq`
    with_descriptors.own_gdt = false;
    ScratchMachine scratch(kvm, with_descriptors);
    constexpr std::array<std::uint8_t, 7> skip_two{0x48, 0x83, 0x04, 0x24,
                                                   0x02, 0x48, 0xcf}; // addq $2, (%rsp); iretq
    std::ranges::copy(std::as_bytes(std::span(skip_two)),
                      scratch.stub(number(Vector::invalid_opcode)).begin());
    constexpr std::size_t traps = 100;
    std::vector<std::uint8_t> code;
    for (std::size_t i = 0; i < traps; ++i)
        code.insert(code.end(), {0x0f, 0x0b}); // ud2
    code.push_back(0xf4);                      // hlt
    Trap last;
    const double all = median_ns(10, [&] { last = scratch.run(code); });
    const double none = median_ns(10, [&] { (void)scratch.run(std::span(code).last(1)); });
    if (!is(last, Vector::general_protection) || scratch.cpu.rip != ScratchMachine::code_address)
        return unknown(describe(last, scratch));
    return {fmt::format("{:.1f} us", std::max(0.0, all - none) / 1000 / traps), "a trap that needs no exit"};
}

// --- flags and privileged instructions

Finding iopl(const Kvm& /*kvm*/, const HostTraits& traits) {
    return traits.iopl_honoured ? Finding{"yes", "cli, sti, in, out of the kernel run natively"}
                                : Finding{"no", "cli, sti, in, out of the kernel trap and are emulated"};
}

/// What `pushf` shows of IF where it is set as said.
std::optional<bool> pushed_if(ScratchMachine& scratch, bool set) {
    scratch.cpu.rflags = rflags::fixed | (set ? rflags::interrupt : 0);
    scratch.cpu[Gpr::rsp] = 0x5000;
    constexpr std::array<std::uint8_t, 2> pushf_pop_rax{0x9c, 0x58};
    if (!scratch.completes(pushf_pop_rax))
        return std::nullopt;
    return (scratch.cpu[Gpr::rax] & rflags::interrupt) != 0;
}

Finding pushf(const Kvm& kvm, const HostTraits& traits) {
    ScratchMachine scratch(kvm, traits);
    const auto clear = pushed_if(scratch, false), set = pushed_if(scratch, true);
    if (!clear || !set)
        return unknown("it traps");
    if (!*clear && *set)
        return {"exact", "the kernel sees its own IF"};
    return {fmt::format("always {}", *set ? 1 : 0), "a kernel that looks at IF by pushf is misled"};
}

Finding popf(const Kvm& kvm, HostTraits traits) {
    traits.iopl_honoured = true; // so that IF comes from the machine
    ScratchMachine scratch(kvm, traits);
    scratch.cpu.rflags |= rflags::interrupt;
    scratch.cpu[Gpr::rsp] = 0x5000;
    constexpr std::array<std::uint8_t, 6> push_popf{0x68, 0x02, 0x30, 0x00, 0x00, 0x9d}; // IF = 0
    if (!scratch.completes(push_popf))
        return unknown("it traps");
    return (scratch.cpu.rflags & rflags::interrupt) == 0
               ? Finding{"changes it", "the kernel may disable interrupts by popf"}
               : Finding{"leaves it", "a kernel that disables interrupts by popf alone keeps them enabled"};
}

Finding umip(const Kvm& kvm, const HostTraits& traits) {
    struct Instruction {
        const char* name;
        std::array<std::uint8_t, 8> code; // to memory at 0x3000
    };
    constexpr std::array instructions{Instruction{"sgdt", {0x0f, 0x01, 0x04, 0x25, 0x00, 0x30}},
                                      Instruction{"sidt", {0x0f, 0x01, 0x0c, 0x25, 0x00, 0x30}},
                                      Instruction{"sldt", {0x0f, 0x00, 0x04, 0x25, 0x00, 0x30}},
                                      Instruction{"str", {0x0f, 0x00, 0x0c, 0x25, 0x00, 0x30}},
                                      Instruction{"smsw", {0x0f, 0x01, 0x24, 0x25, 0x00, 0x30}}};
    ScratchMachine scratch(kvm, traits);
    std::string run;
    for (const Instruction& instruction : instructions) {
        if (scratch.completes(instruction.code))
            run += fmt::format("{}{}", run.empty() ? "" : " ", instruction.name);
    }
    if (run.empty())
        return {"yes", "sgdt, sidt, sldt, str, smsw show the guest its own tables"};
    return {"no: " + run, "these show the guest the switcher's tables"};
}

template<std::uint8_t... code>
Finding software_interrupt(const Kvm& kvm, const HostTraits& traits) {
    ScratchMachine scratch(kvm, traits);
    constexpr std::array<std::uint8_t, sizeof...(code)> instruction{code...};
    const Trap trap = scratch.run(instruction);
    if (trap.kind != Trap::Kind::vector)
        return unknown(describe(trap, scratch));
    return {describe(trap, scratch), "umbra delivers it through the guest's IDT"};
}

Finding syscall(const Kvm& /*kvm*/, const HostTraits& traits) {
    return traits.syscall_to_ring0
               ? Finding{"at LSTAR, CPL 0", "system calls cost one trap"}
               : Finding{"at LSTAR, CPL 3", "the fetch fault at LSTAR is the system call"};
}

// --- segments, CPUID

Finding code_segment(const Kvm& kvm, const HostTraits& traits) {
    ScratchMachine scratch(kvm, traits);
    constexpr std::array<std::uint8_t, 2> mov_cs{0x8c, 0xc8};
    constexpr std::uint16_t own = 0x10;
    scratch.cpu.cs.selector = own;
    if (!scratch.completes(mov_cs))
        return unknown("it traps");
    return {fmt::format("{:#x}", scratch.cpu[Gpr::rax]),
            traits.rpl_hidden ? "a kernel sees its own selectors"
            : traits.own_gdt  ? "a kernel sees its own selectors, but with RPL 3"
                              : "what a kernel sees that reads its CS; not its "
                                "own selector"};
}

Finding gdt(const Kvm& /*kvm*/, const HostTraits& traits) {
    return traits.own_gdt ? Finding{"the switcher's", "whatever looks at a descriptor traps"}
                          : Finding{"the host's",
                                    "iretq to a program traps at its first instruction; some loads never do"};
}

Finding cpuid(const Kvm& /*kvm*/, const HostTraits& traits) {
    return traits.cpuid_intercepted ? Finding{"what the VM was given", "umbra decides what CPU guests see"}
                                    : Finding{"the host's", "guests see features that umbra does not offer"};
}

// --- translation

/// Every top-level slot is tried by a jump to code there.
Finding slots(const Kvm& kvm, const HostTraits& traits) {
    ScratchMachine scratch(kvm, traits);
    const auto top = scratch.top_level();
    constexpr std::array<std::uint8_t, 4> jump{0xff, 0xe0, 0x0f, 0x0b}; // jmp *%rax; ud2
    std::string unusable;
    for (unsigned slot = 0; slot < top.size(); ++slot) {
        if (slot == ScratchMachine::switcher_slot)
            continue;
        top[slot] = top[0];
        const std::uint64_t target =
            paging_4_level.sign_extend(std::uint64_t{slot} << paging_4_level.root().shift).value() +
            ScratchMachine::code_address + 2;
        scratch.cpu[Gpr::rax] = target;
        if (!is(scratch.run(jump), Vector::invalid_opcode) || scratch.cpu.rip != target)
            unusable += fmt::format(" {}", slot);
    }
    return unusable.empty() ? Finding{"all", "guests may use every address"}
                            : Finding{"all but" + unusable, "guests cannot use addresses there"};
}

Finding store_fills(const Kvm& kvm, const HostTraits& traits) {
    ScratchMachine scratch(kvm, traits);
    scratch.entry(3) = ShadowEntry();
    if (scratch.load(3))
        return unknown("an entry that is not present translates");
    scratch.entry(3) = ScratchMachine::mapping(3);
    return scratch.load(3) ? Finding{"seen", "hidden faults are filled by plain stores"}
                           : Finding{"not seen", "umbra cannot run guests here"};
}

Finding store_upgrades(const Kvm& kvm, const HostTraits& traits) {
    ScratchMachine scratch(kvm, traits);
    scratch.entry(3) = ShadowEntry(ScratchMachine::mapping(3).raw() & ~entry_bit::writable);
    constexpr std::array<std::uint8_t, 8> store{0x48, 0x89, 0x04, 0x25, 0x00, 0x30, 0, 0}; // mov %rax, 0x3000
    if (scratch.completes(store))
        return unknown("a read-only entry can be written through");
    scratch.entry(3) = ScratchMachine::mapping(3);
    return scratch.completes(store)
               ? Finding{"seen", "the first write to a clean page is let through by a plain store"}
               : Finding{"not seen", "the first write to a clean page needs a change by ring 0"};
}

Finding store_changes(const Kvm& /*kvm*/, const HostTraits& traits) {
    return traits.stores_seen ? Finding{"seen", "what guests unmap or remap is changed by plain stores"}
                              : Finding{"not seen", "what guests unmap or remap is changed by ring 0"};
}

Finding ring0_changes(const Kvm& kvm, const HostTraits& traits) {
    ScratchMachine scratch(kvm, traits);
    scratch.page(4)[0] = 4;
    (void)scratch.load(3);
    scratch.entry(3) = ScratchMachine::mapping(4);
    scratch.debt = Debt({scratch.table()});
    const bool changed = scratch.load(3) == 4;
    scratch.entry(3) = ShadowEntry();
    scratch.debt = Debt({scratch.table()});
    const bool cleared = !scratch.load(3);
    return changed && cleared ? Finding{"seen", "guests' page tables can be followed"}
                              : Finding{"not seen", "umbra cannot run guests here"};
}

// --- what else the CPU does for guests

Finding single_step(const Kvm& kvm, const HostTraits& traits) {
    ScratchMachine scratch(kvm, traits);
    scratch.cpu.rflags |= rflags::trap;
    constexpr std::array<std::uint8_t, 3> nop_ud2{0x90, 0x0f, 0x0b};
    const Trap trap = scratch.run(nop_ud2);
    return is(trap, Vector::debug) && scratch.cpu.rip == ScratchMachine::code_address + 1
               ? Finding{"raises #DB", "debuggers can step, inside the guest and outside"}
               : Finding{"raises " + describe(trap, scratch), "debuggers cannot step"};
}

Finding mmio(const Kvm& kvm, const HostTraits& traits) {
    ScratchMachine scratch(kvm, traits);
    scratch.entry(5) = ScratchMachine::mapping(MonitorMemory::nothing(kvm.physical_bits()).number());
    const auto value = scratch.load(5);
    if (scratch.exit_reason() == ExitReason::mmio)
        return {"exits", "device memory is emulated"};
    return value ? Finding{fmt::format("reads {:#x}", *value), "device memory cannot be emulated"}
                 : unknown("neither an exit nor a value");
}

/// A control bit and an instruction that must raise an exception where it is as said.
struct ControlBit {
    std::uint64_t cr0;
    std::uint64_t cr4;
    std::array<std::uint8_t, 5> code;
    Vector vector;
    const char* ignored; ///< what it means for guests if the instruction runs
};
constexpr ControlBit task_switched{cr0::ts,
                                   0,
                                   {0xdb, 0xe3, 0x90, 0x90, 0x90},
                                   Vector::device_not_available,
                                   "no #NM: switch FPU state eagerly"};
constexpr ControlBit fpu_emulation{cr0::em,
                                   0,
                                   {0xdb, 0xe3, 0x90, 0x90, 0x90},
                                   Vector::device_not_available,
                                   "no #NM: the FPU is always there"};
constexpr ControlBit tsc_disable{0,
                                 cr4::tsd,
                                 {0x0f, 0x31, 0x90, 0x90, 0x90},
                                 Vector::general_protection,
                                 "programs can always read the TSC"};
constexpr ControlBit no_fsgsbase{
    0, 0, {0xf3, 0x48, 0x0f, 0xae, 0xc0}, Vector::invalid_opcode, "rdfsbase and its kin always run"};
constexpr ControlBit no_osxsave{
    0, 0, {0x0f, 0x01, 0xd0, 0x90, 0x90}, Vector::invalid_opcode, "xgetbv and AVX always run"};

template<const ControlBit& bit>
Finding control(const Kvm& kvm, const HostTraits& traits) {
    ScratchMachine scratch(kvm, traits);
    scratch.cpu.cr0 |= bit.cr0;
    scratch.cpu.cr4 |= bit.cr4;
    scratch.set_control();
    scratch.cpu[Gpr::rcx] = 0; // XCR0, for xgetbv
    if (scratch.completes(bit.code))
        return {"no", bit.ignored};
    const Trap trap = scratch.run(bit.code);
    return is(trap, bit.vector) ? Finding{"yes", "as on a CPU"} : unknown(describe(trap, scratch));
}

Finding alignment_check(const Kvm& kvm, const HostTraits& traits) {
    ScratchMachine scratch(kvm, traits);
    scratch.cpu.cr0 |= cr0::am;
    scratch.set_control();
    scratch.cpu.rflags |= rflags::alignment_check;
    constexpr std::array<std::uint8_t, 10> load{0x48, 0x8b, 0x04, 0x25, 0x01, 0x30, 0, 0, 0x0f, 0x0b};
    const Trap trap = scratch.run(load, 3);
    if (is(trap, Vector::alignment_check))
        return {"yes", "as on a CPU"};
    return is(trap, Vector::invalid_opcode) ? Finding{"no", "programs get no #AC"}
                                            : unknown(describe(trap, scratch));
}

/// The first interrupt line of KVM's PIC, programmed as PCs do (Intel 8259A data sheet), held back by IF and
/// let through.
Finding interrupts(const Kvm& kvm, const HostTraits& traits) {
    ScratchMachine scratch(kvm, traits, ScratchMachine::InterruptControllers::in_kernel);
    constexpr std::uint8_t first_vector = 0x20;
    constexpr std::array<std::pair<std::uint16_t, std::uint8_t>, 5> program{
        {{0x20, 0x11}, {0x21, first_vector}, {0x21, 0x04}, {0x21, 0x01}, {0x21, 0xfe}}};
    for (const auto& [port, value] : program) {
        scratch.cpu[Gpr::rax] = value;
        scratch.access = NativePortAccess{.port = port, .size = 1, .write = true};
        if (!scratch.completes({}))
            return unknown("port accesses of the switcher fail");
    }
    scratch.vm().set_irq_line(0, true);
    constexpr std::array<std::uint8_t, 7> spin{0xb9, 0x00, 0x00, 0x10,
                                               0x00, 0xe2, 0xfe}; // mov $1 << 20, %ecx; loop .
    if (!scratch.completes(spin))
        return {"arrive unasked", "guests cannot disable interrupts"};
    scratch.cpu.rflags |= rflags::interrupt;
    const Trap trap = scratch.run(spin);
    return trap.kind == Trap::Kind::vector && trap.vector == first_vector
               ? Finding{"arrive as IF admits", "timers and devices interrupt guests at once"}
               : unknown(describe(trap, scratch));
}

Finding exact_cpu(const Kvm& /*kvm*/, const HostTraits& traits) {
    return traits.exact_cpu
               ? Finding{"no", "as on a CPU"}
               : Finding{"by QEMU", "slow, and its mistakes are guests', too, most on the native engine"};
}

struct Experiment {
    const char* id;
    const char* question;
    Finding (*find)(const Kvm&, const HostTraits&);
};

constexpr std::array experiments{
    Experiment{"emulated_cpu", "the host's CPU is emulated", exact_cpu},
    Experiment{"trap", "trap round trip", round_trip},
    Experiment{"ring0_instruction", "an instruction in ring 0", ring0_instruction},
    Experiment{"ring0_trap", "trap resumed in ring 0", ring0_trap},
    Experiment{"iopl", "IOPL 3 honoured at CPL 3", iopl},
    Experiment{"pushf_if", "pushf shows IF", pushf},
    Experiment{"popf_if", "popf and IF",
               [](const Kvm& kvm, const HostTraits& traits) { return popf(kvm, traits); }},
    Experiment{"umip", "UMIP: sgdt and its kin trap", umip},
    Experiment{"int_n", "int 0x21 arrives as", software_interrupt<0xcd, 0x21>},
    Experiment{"int_80", "int 0x80 arrives as", software_interrupt<0xcd, 0x80>},
    Experiment{"int3", "int3 arrives as", software_interrupt<0xcc>},
    Experiment{"syscall", "syscall arrives", syscall},
    Experiment{"mov_cs", "mov %cs shows", code_segment},
    Experiment{"gdt", "GDT in force", gdt},
    Experiment{"cpuid", "CPUID shows", cpuid},
    Experiment{"slots", "usable top-level slots", slots},
    Experiment{"store_fill", "store: not present to present", store_fills},
    Experiment{"store_upgrade", "store: read-only to writable", store_upgrades},
    Experiment{"store_change", "store: other frame, then flush", store_changes},
    Experiment{"ring0_change", "the same, republished by ring 0", ring0_changes},
    Experiment{"single_step", "TF", single_step},
    Experiment{"mmio", "an access to no memory", mmio},
    Experiment{"interrupts", "in-kernel PIC: interrupts", interrupts},
    Experiment{"cr0_ts", "CR0.TS honoured", control<task_switched>},
    Experiment{"cr0_em", "CR0.EM honoured", control<fpu_emulation>},
    Experiment{"cr0_am", "CR0.AM with EFLAGS.AC honoured", alignment_check},
    Experiment{"cr4_tsd", "CR4.TSD honoured", control<tsc_disable>},
    Experiment{"cr4_fsgsbase", "CR4.FSGSBASE honoured", control<no_fsgsbase>},
    Experiment{"cr4_osxsave", "CR4.OSXSAVE honoured", control<no_osxsave>},
};

std::string kind(const HostTraits& traits) {
    if (!traits.native_ring0)
        return "interprets the machine's ring 0, like a KVM for hosts without hardware virtualization";
    if (traits.stores_seen)
        return "runs ring 0 natively and lets the CPU walk our tables, like kvm_amd with NPT or kvm_intel "
               "with EPT";
    return "runs ring 0 natively and shadows our tables in turn, like kvm_amd with npt=0 or kvm_intel with "
           "ept=0";
}

std::string strategy(const HostTraits& traits) {
    return fmt::format("changes present entries by {}",
                       traits.stores_seen ? "plain stores" : "stores that ring 0 republishes");
}

} // namespace

HostReport probe_host(const Kvm& kvm) {
    HostReport report;
    report.traits = probe_traits(kvm);
    report.kind = kind(report.traits);
    report.strategy = strategy(report.traits);
    for (const Experiment& experiment : experiments) {
        Finding finding = experiment.find(kvm, report.traits);
        report.details.push_back(
            {experiment.id, experiment.question, std::move(finding.value), std::move(finding.meaning)});
    }
    return report;
}

} // namespace umbra
