#include "vmm/monitor.hpp"

#include "vmm/missing_feature.hpp"
#include "vmm/msr.hpp"
#include "vmm/msr_policy.hpp"
#include "vmm/segmentation.hpp"
#include "vmm/switcher_layout.h"

#include <algorithm>

#include <fmt/core.h>

namespace umbra {
namespace {

/// Where the switcher starts out: in the hole that Linux leaves to hypervisors
/// (Documentation/arch/x86/x86_64/mm.rst), but not in its first slot, which some hosts keep for themselves.
constexpr unsigned first_slot = 257;
constexpr unsigned host_slot = 256;

/// So often in a row may one access fault though its translation is in place, before the machine is taken for
/// blind.
constexpr unsigned fill_patience = 16;

constexpr std::uint8_t first_interrupt = 32;

/// The guest has not ended by itself, and nobody has ended it.
bool is_panic(const Verdict& verdict) {
    switch (verdict.kind) {
    case Verdict::Kind::reset:
    case Verdict::Kind::triple_fault:
    case Verdict::Kind::stopped:
    case Verdict::Kind::no_progress:
    case Verdict::Kind::host_failed:
        return true;
    case Verdict::Kind::passed:
    case Verdict::Kind::failed:
    case Verdict::Kind::timed_out:
    case Verdict::Kind::interrupted:
    case Verdict::Kind::restart:
        return false;
    }
    __builtin_unreachable();
}

/// The build option UMBRA_AUDIT: the shadow MMU's invariants are checked before the guest goes on.
#ifdef UMBRA_AUDIT
constexpr bool audit_every_entry = true;
#else
constexpr bool audit_every_entry = false;
#endif

MmuConfig mmu_config(const Machine& machine, const HostTraits& traits, const MonitorOptions& options) {
    MmuConfig config;
    config.nothing = MonitorMemory::nothing(machine.kvm().physical_bits());
    config.gigabyte_pages = machine.kvm().gigabyte_pages();
    config.stores_seen = traits.stores_seen;
    config.first_slot = first_slot;
    config.usable_slots[host_slot] = false;
    // What a write to a protected table costs, its trap and the protection that follows later, against the
    // comparison of a table (tests/bench): 50 to 250 us where KVM interprets ring 0 and shadows our tables in
    // turn, and some exits elsewhere, against 0.05 to 0.1 us.
    constexpr unsigned trap_cost_interpreted = 1000, trap_cost_native = 60;
    config.trap_cost = traits.native_ring0 ? trap_cost_native : trap_cost_interpreted;
    if (options.sync)
        config.sync = *options.sync;
    if (options.prefetch)
        config.prefetch = *options.prefetch;
    config.virtual_tlb = options.virtual_tlb;
    if (options.checks != nullptr && options.checks->watch_tables()) {
        config.sync = Sync::trap;
        config.prefetch = 1; // only what the guest uses is there
    }
    return config;
}

/// Vectors for which the CPU pushes an error code (Intel SDM vol. 3A, 6.13).
bool pushes_error_code(std::uint8_t vector) {
    return vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21;
}

/// Whether this trap's frame has RFLAGS.RF set, whatever the guest's is: by the class of the exception.
bool sets_resume_flag(const Trap& trap) {
    if (trap.kind != Trap::Kind::vector && trap.kind != Trap::Kind::descriptor)
        return false;
    switch (static_cast<Vector>(trap.vector)) {
    case Vector::debug:
    case Vector::nmi:
    case Vector::breakpoint:
    case Vector::overflow:
        return false;
    default: // faults, and interrupts, which come between instructions
        return trap.vector < first_interrupt;
    }
}

/// What is at RIP, for Monitor::run_ahead.
struct Ahead {
    std::uint64_t skip = 0; ///< bytes to go on by, for instructions that do no more than that
    bool emulate = false;   ///< behind them is an instruction that would trap, if the guest ran
};
constexpr std::size_t ahead_bytes = 16;

/// The length of a NOP with a ModRM byte at the start of `code`, as kernels put over what they need not do
/// (Intel SDM vol. 2B, NOP); 0 if there is none.
std::size_t long_nop(std::span<const std::byte> code) {
    const std::size_t prefix = !code.empty() && code[0] == std::byte{0x66} ? 1 : 0;
    if (code.size() < prefix + 3 || code[prefix] != std::byte{0x0f} || code[prefix + 1] != std::byte{0x1f})
        return 0;
    const auto modrm = std::to_integer<unsigned>(code[prefix + 2]);
    const unsigned mod = modrm >> 6, rm = modrm & 7;
    std::size_t length = prefix + 3 + (mod != 3 && rm == 4 ? 1 : 0);
    if (mod == 1)
        length += 1;
    if (mod == 2 || (mod == 0 && rm == 5))
        length += 4;
    return length <= code.size() ? length : 0;
}

/// How far a short jump at the start of `code` goes from its own address, if that is forward and in `code`;
/// otherwise 0.
std::size_t short_jump(std::span<const std::byte> code) {
    constexpr std::size_t instruction = 2, most_forward = 0x7f;
    if (code.size() < instruction || code[0] != std::byte{0xeb})
        return 0;
    const auto distance = std::to_integer<std::size_t>(code[1]);
    return distance <= most_forward && instruction + distance < code.size() ? instruction + distance : 0;
}

Ahead look_ahead(std::span<const std::byte> code) {
    Ahead ahead;
    const auto next = [&]<class... Bytes>(Bytes... expected) {
        const std::array<std::uint8_t, sizeof...(Bytes)> pattern{static_cast<std::uint8_t>(expected)...};
        return code.size() >= pattern.size() &&
               std::ranges::equal(code.first(pattern.size()), std::as_bytes(std::span(pattern)));
    };
    const auto skip = [&](std::size_t length) {
        ahead.skip += length;
        code = code.subspan(length);
    };
    for (bool skipped = true; skipped;) {
        skipped = true;
        if (next(0x90)) // nop
            skip(1);
        else if (next(0x66, 0x90))
            skip(2);
        else if (const std::size_t length = long_nop(code); length != 0)
            skip(length);
        else if (next(0x0f, 0xae, 0xf0) || next(0x0f, 0xae, 0xe8)) // mfence, lfence
            skip(3);
        else if (next(0xf3, 0x0f, 0x1e, 0xfa)) // endbr64
            skip(4);
        else if (const std::size_t distance = short_jump(code); distance != 0)
            skip(distance);
        else
            skipped = false;
    }
    constexpr auto modrm_reg = [](std::byte modrm) { return std::to_integer<unsigned>(modrm) >> 3 & 7; };
    const bool loads_segment = next(0x8e) && code.size() > 1 && modrm_reg(code[1]) != 2; // not SS
    ahead.emulate = loads_segment || next(0x0f, 0x01, 0xf8) || next(0x48, 0x0f, 0x07) || next(0x48, 0xcf) ||
                    next(0x0f, 0x30) || next(0x0f, 0x32) || next(0x0f, 0x20) || next(0x0f, 0x22);
    return ahead;
}

/// Whether there is a repeated OUTS at the start of `code`.
bool is_repeated_output(std::span<const std::byte> code, bool long_mode) {
    bool repeated = false;
    for (const std::byte each : code) {
        const auto byte = std::to_integer<unsigned>(each);
        const bool segment = (byte & 0xe7) == 0x26 || byte == 0x64 || byte == 0x65;
        const bool size = byte == 0x66 || byte == 0x67, rex = long_mode && (byte & 0xf0) == 0x40;
        const bool repeat = byte == 0xf2 || byte == 0xf3;
        if (!segment && !size && !rex && !repeat)
            return repeated && (byte == 0x6e || byte == 0x6f);
        repeated = repeated || repeat;
    }
    return false;
}

template<class... Cases>
struct Overloaded : Cases... {
    using Cases::operator()...;
};
template<class... Cases>
Overloaded(Cases...) -> Overloaded<Cases...>;

} // namespace

Monitor::Monitor(Machine& machine, const HostTraits& traits, const VirtualCpu& boot, MonitorOptions options)
    : Engine(machine, boot, traits.cpuid_intercepted), traits_(traits),
      pool_(machine.monitor_memory().pool_base().frame(), machine.monitor_memory().pool(),
            machine.monitor_memory().guard()),
      region_(machine.monitor_memory(), 1), switcher_(region_, machine.vcpu(), traits, 0),
      tables_(machine.memory(), pool_, mmu_config(machine, traits, options), region_.root_entry()),
      mmu_(tables_), cpuid_(machine.cpuid()), machine_cr4_allowed_(machine.kvm().cr4_offered()),
      placed_slot_(first_slot), checks_(options.checks), end_dead_halt_(options.end_stuck) {
    if (options.end_stuck && options.frontend == nullptr) // a debugger may change anything
        stuck_watch_.emplace();
    if (checks_ != nullptr)
        checks_->attach(mmu_, [this] { return origin(); });
    if (options.frontend != nullptr)
        debugger_.emplace(DebugTarget{cpu_, mmu_, tables_, machine.memory(), machine.vcpu()},
                          *options.frontend);
    machine.platform().observe_dma([this](GuestPhys at, std::size_t size) { stored(at, {}, size); });
    switcher_.place(placed_slot_);
    mmu_.set_paging(paging());
    refresh_control();
}

Verdict Monitor::run(RunControl& control) {
    Vcpu& vcpu = machine_.vcpu();
    control.attach(vcpu);
    control.look_regularly(stuck_watch_.has_value());
    Step verdict;
    if (debugger_ && debugger_->frontend().wants_pause())
        verdict = stand_still(control);
    if (!verdict)
        verdict = enter();
    while (!verdict)
        verdict = handle_exit(vcpu.run(), control);
    if (debugger_)
        debugger_->frontend().ended(*verdict);
    control.detach();
    return *verdict;
}

/// Puts the virtual CPU's state into the machine, which then only needs to be run.
Monitor::Step Monitor::enter() {
    tell_alignment_check(); // may have been changed by an emulated instruction
    MachineState state = mmu_.enter(cpu_.cpl == 3);
    if (placed_slot_ != state.reserved_slot) {
        placed_slot_ = state.reserved_slot;
        switcher_.place(placed_slot_);
    }
    machine_.vcpu().unblock_nmi();
    // Where ring 0 goes on with the guest, a debt wakes it at once, as a CPU may.
    const bool sleeping = cpu_.halted && (state.debt.none() || traits_.own_gdt);
    if (cpu_.halted) // a signal may have ended its sleep: the switcher cannot run in it
        machine_.vcpu().wake();
    const std::uint64_t flags = cpu_.rflags, rip = cpu_.rip;
    prepare_steps(sleeping);
    if (single_step_)
        cpu_.rflags |= rflags::trap;
    if (interrupts_held_)
        cpu_.rflags &= ~rflags::interrupt;
    const bool entered =
        switcher_.enter(cpu_, state.root, state.debt, pool_, std::exchange(native_access_, std::nullopt));
    state.debt.paid();
    cpu_.rflags = flags;
    cpu_.rip = rip;
    if (!entered && machine_.vcpu().was_reset())
        return stop_at_init();
    if (!entered)
        return stop(Verdict::Kind::host_failed,
                    "the switcher did not do its work: " + machine_.vcpu().describe_exit());
    if (note_nmi() && !cpu_.nmi_blocked) { // it came while ring 0 worked
        if (auto verdict = deliver_nmi())
            return verdict;
        return enter();
    }
    if (std::exchange(interrupt_shadow_, false))
        machine_.vcpu().set_interrupt_shadow(true);
    if (sleeping)
        machine_.vcpu().halt();
    return std::nullopt;
}

/// Whether the guest is to be entered for one instruction.
void Monitor::prepare_steps(bool sleeping) {
    const bool guarded = mmu_.guarded_access_begun();
    const bool debugger_steps = debugger_ && debugger_->prepare_entry();
    single_step_ = table_write_ || guarded || debugger_steps || breakpoints_.wants_step();
    interrupts_held_ = (guarded || (debugger_steps && debugger_->holds_interrupts())) && !sleeping;
    stepping_ = (cpu_.rflags & rflags::trap) != 0;
    step_kind_.reset();
    if (native_access_ && (single_step_ || stepping_)) { // is the step: the guest gets no further
        after_access_ = cpu_.rip;
        cpu_.rip = switcher_.unreachable().value();
        single_step_ = false;
        interrupts_held_ = true;
    } else if (single_step_ || stepping_) {
        step_kind_ = step_kind(code(), code_mode(cpu_));
    }
    switcher_.withhold_iopl(withholds_iopl());
}

/// Whether the instruction that the guest is entered for is left to the emulator: the machine may not end a
/// step behind STI, and watched ports are seen there.
bool Monitor::withholds_iopl() const {
    if (step_kind_ == StepKind::string_io) // which it does not do at those ports
        return !Platform::kvm_owns(Port{static_cast<std::uint16_t>(cpu_[Gpr::rdx])});
    return step_kind_ == StepKind::by_iopl;
}

/// The bytes at RIP, as the guest wrote them.
std::vector<std::byte> Monitor::code() {
    if (debugger_)
        return debugger_->code();
    std::vector<std::byte> bytes(ahead_bytes);
    bytes.resize(space().peek(linear_rip(cpu_), bytes));
    return bytes;
}

Monitor::Step Monitor::handle_exit(ExitReason reason, RunControl& control) {
    Vcpu& vcpu = machine_.vcpu();
    begin_trap();
    if (vcpu.was_reset()) {
        Verdict verdict = stop_at_init();
        end_trap();
        return verdict;
    }
    // In ring 0 the machine is in the switcher: at the end of a trap, or on its way into the guest.
    const bool in_ring0 = switcher_.in_ring0();
    const bool trapped = reason == ExitReason::port && in_ring0 && vcpu.port_exit().port == TRAP_PORT;
    Trap trap;
    if (trapped || !in_ring0) {
        const std::uint64_t own_flags = cpu_.rflags, own_rip = cpu_.rip;
        trap = switcher_.leave(cpu_);
        const bool nmi_came = note_nmi();
        if (single_step_ || interrupts_held_)
            take_back_flags(trap, own_flags);
        else if ((cpu_.rflags & ~own_flags & rflags::trap) != 0 && (nmi_came || vcpu.nmi_waits()))
            cpu_.rflags &= ~rflags::trap; // KVM's, to see the end of the interrupt shadow
        if (sets_resume_flag(trap) && (cpu_.rip != own_rip || (own_flags & rflags::resume) == 0))
            cpu_.rflags &= ~rflags::resume;
        if (after_access_)
            cpu_.rip = *after_access_;
        last_rip_ = std::exchange(trap_.rip, GuestVirt(cpu_.rip));
        tell_alignment_check();
    }
    Step verdict;
    bool entered = true; // the machine only needs to be run again
    switch (reason) {
    case ExitReason::port:
        verdict = trapped ? handle_trap(trap) : handle_port_exit();
        entered = !trapped;
        if (entered && !verdict && !in_ring0 && continue_output()) {
            verdict = machine_.guest_verdict();
            entered = false;
        }
        break;
    case ExitReason::mmio:
        handle_mmio_exit();
        break;
    case ExitReason::interrupted:
        trap_.reason = TrapReason::signal;
        trap_.action = TrapAction::attend;
        break;
    case ExitReason::not_emulated:
        if (!in_ring0) {
            // An instruction that is not in RAM, or accesses what is not: raises #UD, as KVM by itself does
            // at CPL 3 of hosts that run ring 0 natively.
            verdict = deliver_event(Event::of(Exception::invalid_opcode()), TrapReason::exception);
            entered = false;
            break;
        }
        [[fallthrough]];
    case ExitReason::halt:
    case ExitReason::internal_error:
    case ExitReason::other:
        trap_.reason = TrapReason::signal;
        verdict = stop(Verdict::Kind::host_failed, vcpu.describe_exit());
        break;
    case ExitReason::shutdown:
        trap_.reason = TrapReason::signal;
        verdict = stop(Verdict::Kind::host_failed, "the machine shut down under the switcher");
        break;
    }
    if (!verdict && !entered && nmi_pending_)
        verdict = deliver_nmi();
    if (debugger_) {
        const bool stoppable = !entered || (reason == ExitReason::interrupted && !in_ring0);
        if (auto ending = attend_debugger(control, verdict, stoppable, entered))
            verdict = ending;
    }
    if (!verdict && !entered)
        verdict = enter();
    if constexpr (audit_every_entry) {
        if (auto broken = mmu_.audit(); broken && !verdict)
            verdict = stop(Verdict::Kind::host_failed, "audit: " + *broken);
    }
    end_trap();
    if (!verdict)
        verdict = finish_exit(reason, control);
    if (!verdict && stuck_watch_ && reason == ExitReason::interrupted && !in_ring0)
        verdict = look_for_progress(space());
    if (debugger_calls_) // to be attended at the next exit, which is at once
        vcpu.request_exit();
    return verdict;
}

/// The machine was entered with EFLAGS.TF for one instruction, of which the guest must not learn.
void Monitor::take_back_flags(const Trap& trap, std::uint64_t own) {
    const bool done =
        trap.kind == Trap::Kind::vector && trap.vector == static_cast<std::uint8_t>(Vector::debug);
    std::uint64_t changed = (single_step_ ? rflags::trap : 0) | (interrupts_held_ ? rflags::interrupt : 0);
    const auto taken_back = [&](std::uint64_t flags) { return (flags & ~changed) | (own & changed); };
    if (done && step_kind_ == StepKind::pushes_flags)
        take_back_pushed(own, changed);
    if (done && step_kind_ == StepKind::pops_flags) // they are what it has popped, as far as it may
        changed &= cpu_.cpl > cpu_.iopl() ? rflags::interrupt : 0;
    cpu_.rflags = taken_back(cpu_.rflags);
    if (trap.kind == Trap::Kind::syscall)
        cpu_[Gpr::r11] = taken_back(cpu_[Gpr::r11]);
}

/// PUSHF has pushed flags of which those of `changed` were umbra's. TF and IF are in one byte.
void Monitor::take_back_pushed(std::uint64_t own, std::uint64_t changed) {
    constexpr unsigned byte = 1, byte_bits = 8;
    const std::uint64_t stack = cpu_[Gpr::rsp] + byte;
    const GuestVirt at = cpu_.cs.long_mode ? GuestVirt(stack) : linear(cpu_, cpu_.ss.base + stack);
    const GuestWalk walk = walk_guest(machine_.memory(), paging(), at, {.ac = true});
    const auto ram = walk.fault ? std::span<std::byte>() : machine_.memory().range(walk.address, 1);
    if (ram.empty())
        return;
    const auto mask = static_cast<std::byte>(changed >> byte_bits);
    ram.front() = (ram.front() & ~mask) | (static_cast<std::byte>(own >> byte_bits) & mask);
    (void)tables_.wrote(walk.address, 1);
}

/// At the end of an exit: the guest stops here if the debugger wants it, and it can. A guest that cannot go
/// on stays to be looked at.
Monitor::Step Monitor::attend_debugger(RunControl& control, const Step& verdict, bool stoppable,
                                       bool& entered) {
    DebugFrontend& frontend = debugger_->frontend();
    if (verdict) {
        if (!frontend.connected() || !is_panic(*verdict))
            return std::nullopt;
        debugger_->want_stop({.kind = Stop::Kind::ended, .text = describe(*verdict)});
        const Step other = stand_still(control);
        return other && other->kind == Verdict::Kind::restart ? other : std::nullopt;
    }
    if (std::exchange(debugger_calls_, false) && frontend.poll())
        debugger_->want_stop({});
    if (!debugger_->stop_wanted())
        return std::nullopt;
    // What KVM was about to inject belongs to the state that the guest was in.
    if (!stoppable || (entered && machine_.vcpu().injects())) {
        control.insist(true);
        return std::nullopt;
    }
    control.insist(false);
    entered = false;
    return stand_still(control);
}

/// Serves the debugger's client until the guest is to go on.
Monitor::Step Monitor::stand_still(RunControl& control) {
    DebugFrontend& frontend = debugger_->frontend();
    Step ending;
    // A step may end where the event that it was to meet is delivered; and the client may have said more than
    // "go on".
    do {
        ending = serve_stop(control);
        if (!ending && frontend.poll())
            debugger_->want_stop({});
    } while (!ending && debugger_->stop_wanted());
    return ending;
}

Monitor::Step Monitor::serve_stop(RunControl& control) {
    DebugFrontend& frontend = debugger_->frontend();
    machine_.platform().flush();
    cpu_.cr8 = machine_.vcpu().cr8();
    frontend.stopped(debugger_->take_stop());
    breakpoints_.abandon();
    for (auto serve = DebugFrontend::Serve::waiting; serve != DebugFrontend::Serve::resume;) {
        if (auto ending = attend(control)) // before it serves: what comes later wakes it again
            return ending;
        serve = frontend.serve();
        switch (serve) {
        case DebugFrontend::Serve::waiting:
            control.wait();
            break;
        case DebugFrontend::Serve::resume:
            break;
        case DebugFrontend::Serve::kill:
            return Verdict{Verdict::Kind::interrupted, 0, "killed by the debugger"};
        case DebugFrontend::Serve::reset:
            return Verdict{Verdict::Kind::restart, 0, "reset by the debugger"};
        }
    }
    mmu_.set_paging(paging());
    refresh_control();
    debugger_->apply();
    if (const auto held = std::exchange(held_event_, std::nullopt);
        held && (!debugger_->drops_event() || is_interrupt(held->kind)))
        return complete_event(*held);
    return std::nullopt;
}

Monitor::Step Monitor::handle_trap(const Trap& trap) {
    if (after_access_) {
        after_access_.reset();
        trap_.reason = TrapReason::signal;
        trap_.action = TrapAction::attend;
        if (trap.vector == static_cast<std::uint8_t>(Vector::nmi)) {
            machine_.vcpu().nmi_taken();
            nmi_pending_ = true;
        }
        return finish_step();
    }
    was_halted_ = std::exchange(cpu_.halted, false);
    switch (trap.kind) {
    case Trap::Kind::syscall:
        last_fill_ = {};
        return handle_syscall();
    case Trap::Kind::vector:
    case Trap::Kind::descriptor:
        break;
    case Trap::Kind::none:
    case Trap::Kind::broken:
        return stop(Verdict::Kind::host_failed,
                    fmt::format("the switcher faulted: vector {}, address {}", trap.vector, trap.address));
    }
    if (trap.vector == static_cast<std::uint8_t>(Vector::page_fault) && trap.error_code)
        return handle_page_fault(trap);
    last_fill_ = {};
    if (table_write_)
        finish_table_write();
    if (trap.vector == static_cast<std::uint8_t>(Vector::debug) && single_step_ &&
        step_kind_ != StepKind::int1) {
        trap_.reason = TrapReason::exception;
        trap_.vector = trap.vector;
        trap_.action = TrapAction::attend;
        return finish_step();
    }
    // By a gate that is not for CPL 3 it is #GP, and where 32-bit code is interpreted #UD.
    const bool int3 = trap.vector == static_cast<std::uint8_t>(Vector::breakpoint) ||
                      trap.vector == static_cast<std::uint8_t>(Vector::general_protection) ||
                      trap.vector == static_cast<std::uint8_t>(Vector::invalid_opcode);
    if (debugger_ && int3 && debugger_->breakpoint_trap(trap.vector)) {
        trap_.reason = TrapReason::exception;
        trap_.vector = trap.vector;
        trap_.action = TrapAction::attend;
        return std::nullopt;
    }
    // A guest may have left the interrupt controller at vectors that are exceptions' too: these come without
    // error code.
    if (trap.vector >= first_interrupt || (pushes_error_code(trap.vector) && !trap.error_code))
        return deliver_event(Event::external(trap.vector), TrapReason::interrupt);
    return handle_exception(trap);
}

// --- Page faults

Monitor::Step Monitor::handle_page_fault(const Trap& trap) {
    const Access access{.write = (*trap.error_code & PageFault::write) != 0,
                        .fetch = (*trap.error_code & PageFault::fetch) != 0,
                        .user = cpu_.cpl == 3,
                        .ac = (cpu_.rflags & rflags::alignment_check) != 0};
    trap_.reason = TrapReason::page_fault;
    trap_.action = TrapAction::fill;
    trap_.vector = trap.vector;
    trap_.detail = *trap.error_code;
    trap_.address = trap.address;
    const MissResult miss = mmu_.fault(trap.address, access);
    switch (miss.outcome) {
    case Miss::filled:
        if (last_fill_.address != trap.address) {
            last_fill_ = {trap.address};
        } else if (++last_fill_.times == fill_patience) {
            mmu_.reset();
        } else if (last_fill_.times > 2 * fill_patience) {
            return stop(Verdict::Kind::host_failed,
                        fmt::format("the machine does not see the translation of {}", trap.address));
        }
        return std::nullopt;
    case Miss::guest_fault:
        last_fill_ = {};
        if (table_write_)
            finish_table_write();
        if (miss.trapped_user_fetch || is_user_entry(trap, access))
            return finish_user_entry();
        return deliver_event(Event::of(Exception::page_fault(miss.fault)), TrapReason::page_fault);
    case Miss::table_write:
        return begin_table_write(trap, access, miss.address);
    case Miss::guarded:
        return handle_guarded(trap, access);
    case Miss::no_slot:
        return stop(Verdict::Kind::stopped,
                    "the guest uses all 512 entries of its top-level page table: no room for the switcher");
    }
    __builtin_unreachable();
}

/// An access that gdb's breakpoints and watchpoints, or the guest's own, may be about. It is made by an entry
/// for one instruction.
Monitor::Step Monitor::handle_guarded(const Trap& trap, Access access) {
    last_fill_ = {};
    trap_.action = TrapAction::attend;
    const GuestVirt page = trap.address.page_base();
    if (Guards wanted = breakpoints_.guards();
        wanted != breakpoint_guards_ && !wanted.pages.contains(page)) { // met in vain
        breakpoint_guards_ = wanted;
        mmu_.set_guards(std::move(wanted), GuardOwner::guest);
        return std::nullopt; // the access is made anew
    }
    if (debugger_ && !debugger_->guarded(trap.address, access))
        return std::nullopt;
    if (access.fetch && page == linear_rip(cpu_).page_base()) {
        if (const std::uint64_t met = breakpoints_.at_instruction(); met != 0)
            return deliver_debug(met);
    }
    note_operands();
    if (!access.fetch)
        breakpoints_.accessed(trap.address, 1, access.write);
    mmu_.begin_guarded_access();
    return std::nullopt;
}

/// What the instruction at RIP accesses, for the guest's breakpoints.
void Monitor::note_operands() {
    if (!breakpoints_.enabled())
        return;
    if (const auto operands = memory_accesses(cpu_, code()))
        breakpoints_.accessed(*operands);
}

/// The guest writes to one of its live page tables: it may, for one instruction, after which is looked what
/// has changed. An instruction that writes to several tables comes here for each, before it is done.
Monitor::Step Monitor::begin_table_write(const Trap& trap, Access access, GuestPhys slot) {
    last_fill_ = {};
    if (checks_ != nullptr && !checks_->may_write_table(trap.address, slot, origin())) {
        if (table_write_)
            finish_table_write();
        // As from supervisor protection keys, which the guest's kernel is protected from itself by.
        const std::uint32_t code = PageFault::present | PageFault::write | PageFault::protection_key |
                                   (access.user ? PageFault::user : 0);
        return deliver_event(Event::of(Exception::page_fault({trap.address, code})), TrapReason::page_fault);
    }
    mmu_.begin_table_write();
    if (!table_write_)
        table_write_ = origin();
    return std::nullopt;
}

void Monitor::finish_table_write() {
    const std::vector<TableWrite> writes = mmu_.finish_table_write();
    if (checks_ != nullptr && table_write_)
        checks_->table_written(writes, *table_write_);
    table_write_.reset();
}

/// umbra's own stores for the guest: by instructions that it emulates, event frames, and devices.
void Monitor::stored(GuestPhys at, std::optional<GuestVirt> linear, std::size_t size) {
    const std::vector<TableWrite> writes = tables_.wrote(at, size);
    if (checks_ != nullptr && !writes.empty())
        checks_->table_written(writes, origin());
    if (debugger_)
        debugger_->stored(at, linear, size);
    if (linear)
        breakpoints_.accessed(*linear, size, true);
}

/// Whether the guest's GDT has its programs' code at a selector that is valid in the host's GDT, so that
/// `iretq` to it succeeds without a trap.
bool Monitor::has_untrapped_user_code() {
    if (traits_.own_gdt || !in_long_mode(cpu_))
        return false;
    Segment code;
    return !read_descriptor(cpu_, space(), Switcher::host_user_code, code) && code.present && is_code(code) &&
           code.dpl == 3;
}

/// Whether a fetch that the guest's tables refuse to its kernel is the first of a program that an untrapped
/// `iretq` went to: the page is not there yet, or SMEP forbids it to the kernel. A kernel of the upper half
/// does not go to the lower one by other means, unless it goes wrong.
bool Monitor::is_user_entry(const Trap& trap, Access access) {
    constexpr auto upper_half = [](GuestVirt at) { return at.value() >> 63 != 0; };
    return access.fetch && !access.user && trap.address == GuestVirt(cpu_.rip) && !upper_half(trap.address) &&
           upper_half(last_rip_) && has_untrapped_user_code();
}

/// The guest's kernel has gone to its programs by an `iretq` that did not trap; this fetch did.
Monitor::Step Monitor::finish_user_entry() {
    cpu_.cs = flat_code_segment(Switcher::host_user_code, 3, true);
    cpu_.ss = flat_stack_segment(Switcher::host_user_data, 3);
    cpu_.cpl = 3;
    cpu_.rflags |= rflags::interrupt; // the flags it loaded are lost; programs run with interrupts enabled
    trap_.reason = TrapReason::instruction;
    trap_.action = TrapAction::emulate;
    trap_.instruction = "iretq";
    mmu_.finish_guarded_access();
    if (debugger_)
        debugger_->executed();
    return std::nullopt;
}

// --- Instructions and events

Monitor::Step Monitor::handle_exception(const Trap& trap) {
    const bool stepping = (cpu_.rflags & rflags::trap) != 0;
    Event original{trap.vector, EventKind::exception, trap.error_code, trap.address};
    switch (static_cast<Vector>(trap.vector)) {
    case Vector::invalid_opcode:
    case Vector::invalid_tss:
    case Vector::segment_not_present:
    case Vector::stack_fault:
    case Vector::general_protection:
        break; // perhaps an instruction that only the machine's CPL 3 refuses
    case Vector::debug:
        return was_int1() ? deliver_event(original, TrapReason::exception) : finish_instruction(true);
    case Vector::breakpoint:
    case Vector::overflow:
        original.kind = EventKind::software_exception; // its gate's privilege is checked
        original.instruction_length = 1;
        return deliver_event(original, TrapReason::exception);
    case Vector::nmi:
        machine_.vcpu().nmi_taken();
        nmi_pending_ = true;
        cpu_.halted = was_halted_; // unless it is delivered
        return deliver_nmi();
    case Vector::alignment_check:
        if (switcher_.absorb_alignment_check(cpu_)) {
            trap_.reason = TrapReason::exception;
            trap_.action = TrapAction::attend;
            return std::nullopt;
        }
        return deliver_event(original, TrapReason::exception);
    case Vector::divide_error:
    case Vector::bound:
    case Vector::device_not_available:
    case Vector::double_fault:
    case Vector::page_fault:
    case Vector::x87:
    case Vector::machine_check:
    case Vector::simd:
        return deliver_event(original, TrapReason::exception);
    }

    if (missed_step())
        return finish_instruction(true);
    const DescriptorTable gdtr = cpu_.gdtr;
    cpu_.cr8 =
        machine_.vcpu().cr8(); // the task priority, which the guest may also have set at its local APIC
    trap_.reason = TrapReason::instruction;
    trap_.action = TrapAction::emulate;
    if (debugger_ && debugger_->catches_instruction()) {
        trap_.action = TrapAction::attend;
        return std::nullopt;
    }
    note_operands();
    const Emulation emulation = emulate(cpu_, space(), *this, &trap_.instruction);
    return std::visit(
        Overloaded{
            [&](const emulated::Done& done) -> Step {
                interrupt_shadow_ = done.interrupt_shadow;
                refresh_control();
                if (cpu_.gdtr.base != gdtr.base || cpu_.gdtr.limit != gdtr.limit)
                    mmu_.set_trap_user_fetch(has_untrapped_user_code());
                if (auto verdict = machine_.guest_verdict())
                    return verdict;
                mmu_.finish_guarded_access();
                if (debugger_)
                    debugger_->executed();
                if (auto verdict = finish_instruction(done, stepping))
                    return verdict;
                return done.interrupt_shadow ? std::nullopt : run_ahead(); // in it the guest must run
            },
            [&](const emulated::Raised& raised) -> Step {
                return deliver_refusal(Event::of(raised.exception), TrapReason::instruction);
            },
            [&](const emulated::SoftwareEvent& software) -> Step {
                return deliver_event(software.event, TrapReason::instruction);
            },
            [&](const emulated::Halted&) -> Step {
                mmu_.finish_guarded_access();
                if (stepping) { // which wakes it up
                    if (debugger_)
                        debugger_->executed();
                    return finish_instruction(stepping);
                }
                machine_.platform().flush();
                if (end_dead_halt_ && (cpu_.rflags & rflags::interrupt) == 0 &&
                    !machine_.has_unmaskable_interrupts())
                    return stop(Verdict::Kind::no_progress, "the guest halted with interrupts off");
                trap_.action = TrapAction::halt;
                if (debugger_)
                    debugger_->halted();
                return std::nullopt;
            },
            [&](const emulated::PortAccess& access) -> Step {
                native_access_ = NativePortAccess{access.port, access.size, access.write};
                breakpoints_.accessed_port(access.port, access.size);
                trap_.reason = access.write ? TrapReason::port_write : TrapReason::port_read;
                trap_.action = TrapAction::machine;
                trap_.detail = access.port;
                return std::nullopt;
            },
            [&](const emulated::Unsupported& unsupported) -> Step {
                return stop(Verdict::Kind::stopped,
                            fmt::format("umbra does not emulate this instruction: {}", unsupported.what));
            },
            [&](const emulated::NotSensitive&) -> Step {
                return deliver_refusal(original, TrapReason::exception);
            },
        },
        emulation);
}

/// The instruction at RIP was refused by this exception.
Monitor::Step Monitor::deliver_refusal(const Event& event, TrapReason reason) {
    std::array<std::byte, ahead_bytes> code{};
    const std::uint64_t base = cpu_.cs.long_mode ? 0 : cpu_.cs.base;
    const std::size_t got = space().peek(GuestVirt(cpu_.rip + base), code);
    std::optional<Refusal> refusal;
    if (const auto feature = missing_feature(cpu_, std::span(code).first(got), features_))
        refusal = {*feature, GuestVirt(cpu_.rip)};
    Step verdict = deliver_event(event, reason);
    refusal_ = refusal;
    return verdict;
}

/// Takes an NMI that met the machine in ring 0 for the guest: whether there was one.
bool Monitor::note_nmi() {
    if (!switcher_.nmi_came())
        return false;
    machine_.vcpu().nmi_taken();
    return nmi_pending_ = true;
}

/// An NMI that has come, once the guest's CPU admits it. It is here that further ones are held back, and not
/// in the machine: a KVM that waits for an IRET to inject one sets RFLAGS.TF for it, and that IRET traps.
Monitor::Step Monitor::deliver_nmi() {
    if (!nmi_pending_ || cpu_.nmi_blocked)
        return std::nullopt;
    nmi_pending_ = false;
    return deliver_event(Event::nmi(), TrapReason::interrupt);
}

Monitor::Step Monitor::handle_syscall() {
    if (const auto exception = emulate_syscall(cpu_, GuestVirt(cpu_.rip)))
        return deliver_event(Event::of(*exception), TrapReason::syscall);
    trap_.reason = TrapReason::syscall;
    trap_.action = TrapAction::enter;
    if (debugger_)
        debugger_->executed();
    mmu_.finish_guarded_access();
    const bool stepping = (cpu_.rflags & rflags::trap) != 0;
    return stepping || breakpoints_.enabled() ? finish_instruction(stepping) : run_ahead();
}

/// A #DB for the reasons in `status`, by bits of DR6. Of those, B0 to B3 are of the last #DB only (Intel SDM
/// vol. 3B, 17.2.3).
Monitor::Step Monitor::deliver_debug(std::uint64_t status) {
    cpu_.dr6 = (cpu_.dr6 & ~dr6::breakpoints) | status;
    const Event event = Event::of({Vector::debug, std::nullopt, {}});
    if (debugger_ && debugger_->stop_wanted()) { // by the same instruction: there gdb looks first
        held_event_ = event;
        return std::nullopt;
    }
    return deliver_event(event, TrapReason::exception);
}

/// An entry for one instruction is over, and it is done.
Monitor::Step Monitor::finish_step() {
    mmu_.finish_guarded_access();
    if (debugger_)
        debugger_->executed();
    return finish_instruction(stepping_);
}

/// An instruction is done: the #DB of what it has met, or of RFLAGS.TF (`stepping`), if there is one.
Monitor::Step Monitor::finish_instruction(bool stepping) {
    const std::uint64_t status = breakpoints_.take() | (stepping ? dr6::single_step : 0);
    return status != 0 ? deliver_debug(status) : std::nullopt;
}

/// The same for one that was emulated: `stepping` is RFLAGS.TF of before it.
Monitor::Step Monitor::finish_instruction(const emulated::Done& done, bool stepping) {
    switch (done.step) {
    case emulated::SingleStep::flags_before:
        return finish_instruction(stepping);
    case emulated::SingleStep::flags_after:
        return finish_instruction((cpu_.rflags & rflags::trap) != 0);
    case emulated::SingleStep::held:
        breakpoints_.hold_back();
        break;
    }
    return std::nullopt;
}

/// Whether a #DB of the machine is that of INT1, where that does not trap otherwise. If it is not, and
/// RFLAGS.TF is clear behind it, the instruction was a POPF.
bool Monitor::was_int1() {
    if (step_kind_)
        return step_kind_ == StepKind::int1;
    constexpr std::byte int1{0xf1};
    return (cpu_.rflags & rflags::trap) == 0 && is_behind(int1);
}

/// Whether the machine has left out the step behind the STI that follows a POPF which has set RFLAGS.TF, as
/// QEMU's emulation does.
bool Monitor::missed_step() {
    constexpr std::byte sti{0xfb};
    return (cpu_.rflags & rflags::trap) != 0 && !step_kind_ && is_behind(sti);
}

bool Monitor::is_behind(std::byte instruction) {
    std::byte before{};
    return space().peek(linear_rip(cpu_) - std::uint64_t{1}, std::span(&before, 1)) == 1 &&
           before == instruction;
}

/// Emulates what comes next, as long as it would trap at once: around SWAPGS, at the beginning and the end of
/// a system call, kernels have such instructions in a row, and each saves the way into the guest and back.
Monitor::Step Monitor::run_ahead() {
    constexpr unsigned most = 8; // a guest's loop of such instructions must not keep the monitor here
    const auto may = [this] {
        return cpu_.cpl == 0 && cpu_.cs.long_mode && (cpu_.rflags & rflags::trap) == 0 && !debugger_ &&
               checks_ == nullptr && !table_write_ && !breakpoints_.enabled();
    };
    for (unsigned i = 0; i < most && may(); ++i) {
        std::array<std::byte, ahead_bytes> bytes{};
        const Ahead next = look_ahead(std::span(bytes).first(space().peek(GuestVirt(cpu_.rip), bytes)));
        if (!next.emulate)
            break;
        cpu_.rip += next.skip;
        const Emulation emulation = emulate(cpu_, space(), *this);
        const auto* done = std::get_if<emulated::Done>(&emulation);
        if (done == nullptr)
            break; // whatever it is else, it comes again by its own trap
        log_.count_ahead();
        refresh_control();
        if (auto verdict = finish_instruction(*done, false))
            return verdict;
    }
    return std::nullopt;
}

/// Where the machine honours IOPL, KVM itself makes the guest's accesses to ports, and exits for each element
/// of a repeated OUTS. (Of INS it takes many at once.) What is left of one is written here, up to the
/// emulator's bound: true if there was something. At this exit the state of the guest is that between two
/// elements.
bool Monitor::continue_output() {
    if (!machine_.vcpu().port_exit().write || debugger_ || checks_ != nullptr || table_write_ || steps() ||
        (cpu_.rflags & rflags::trap) != 0)
        return false;
    std::array<std::byte, ahead_bytes> bytes{};
    const std::size_t got = space().peek(GuestVirt(cpu_.rip + (cpu_.cs.long_mode ? 0 : cpu_.cs.base)), bytes);
    if (!is_repeated_output(std::span(bytes).first(got), cpu_.cs.long_mode))
        return false;
    (void)emulate(cpu_, space(), *this); // what is not done comes again, by its own fault or exit
    return true;
}

Monitor::Step Monitor::deliver_event(const Event& event, TrapReason reason) {
    if (reason != TrapReason::interrupt)
        refusal_.reset();
    trap_.reason = reason;
    trap_.action = TrapAction::deliver;
    trap_.vector = event.vector;
    trap_.detail = event.error_code.value_or(0);
    trap_.address = event.address;
    if (debugger_ && debugger_->catches_event(event)) {
        trap_.action = TrapAction::attend;
        held_event_ = event;
        return std::nullopt;
    }
    return complete_event(event);
}

Monitor::Step Monitor::complete_event(const Event& event) {
    const GuestVirt rip(cpu_.rip);
    const std::uint64_t rsp = cpu_[Gpr::rsp];
    const bool debug =
        event.kind == EventKind::exception && event.vector == static_cast<std::uint8_t>(Vector::debug);
    mmu_.finish_guarded_access();
    breakpoints_.abandon();
    if (debug)
        cpu_.dr6 |= breakpoints_.take();
    const Delivery delivery = deliver(cpu_, space(), event);
    switch (delivery.outcome) {
    case Delivery::delivered:
        interrupt_shadow_ = false;
        if (debugger_)
            debugger_->delivered(event, {.rip = rip, .rsp = rsp, .done = was_halted_});
        if (!debug)
            return finish_instruction(false); // what its frame has met, and what was held back
        breakpoints_.delay();
        return std::nullopt;
    case Delivery::triple_fault: {
        std::string how = fmt::format("while vector {} was delivered", event.vector);
        for (const Exception& nested : delivery.nested())
            how += fmt::format(", then {}", static_cast<unsigned>(nested.vector));
        if (event.vector == static_cast<std::uint8_t>(Vector::invalid_opcode) && !traits_.own_gdt &&
            !cpu_.cs.long_mode)
            how += "; this host's KVM interprets 32-bit code, and may not know the instruction";
        return stop(Verdict::Kind::triple_fault, std::move(how));
    }
    case Delivery::unsupported:
        return stop(Verdict::Kind::stopped, fmt::format("umbra does not deliver vector {} to this guest: {}",
                                                        event.vector, delivery.what));
    }
    __builtin_unreachable();
}

/// Guards for the guest's breakpoints. Those that it turns off stay until they are met in vain: handlers of
/// #DB turn off all while they run.
void Monitor::refresh_breakpoints() {
    if (cpu_.dr7 == guarded_dr7_ && cpu_.dr == guarded_dr_)
        return;
    guarded_dr7_ = cpu_.dr7;
    guarded_dr_ = cpu_.dr;
    Guards wanted = breakpoints_.guards();
    const auto in_force = [this](const std::pair<const GuestVirt, Guard>& page) {
        const auto found = breakpoint_guards_.pages.find(page.first);
        return found != breakpoint_guards_.pages.end() && (found->second | page.second) == found->second;
    };
    if (std::ranges::all_of(wanted.pages, in_force))
        return;
    breakpoint_guards_ = wanted;
    mmu_.set_guards(std::move(wanted), GuardOwner::guest);
}

/// Tells the machine of registers that it honours by itself: control-register bits, the task priority, and
/// what RDTSCP and RDPID read.
void Monitor::refresh_control() {
    if (cpu_.tsc_aux != machine_tsc_aux_) {
        machine_tsc_aux_ = cpu_.tsc_aux;
        (void)machine_.vcpu().write_msr(msr::tsc_aux,
                                        cpu_.tsc_aux); // fails only where CPUID does not offer it
    }
    if (cpu_.cr8 != machine_.vcpu().cr8())
        machine_.vcpu().set_cr8(cpu_.cr8);
    refresh_breakpoints();
    if (cpu_.cr0 == machine_cr0_ && cpu_.cr4 == machine_cr4_ && cpu_.efer == machine_efer_)
        return;
    machine_cr0_ = cpu_.cr0;
    machine_cr4_ = cpu_.cr4;
    machine_efer_ = cpu_.efer;
    switcher_.set_control(cpu_, machine_cr4_allowed_);
}

// --- The virtual CPU's surroundings

void Monitor::paging_changed(const PagingChange& change) {
    mmu_.set_paging(paging());
    switch (change.kind) {
    case PagingChange::mode:
        return;
    case PagingChange::page:
        mmu_.invalidate(change.address, change.pcid, change.globals);
        return;
    case PagingChange::cr3_load_no_flush:
        break;
    case PagingChange::cr3_load:
    case PagingChange::context:
    case PagingChange::all_contexts:
    case PagingChange::everything:
        mmu_.flush({.all_contexts = change.all_pcids(), .pcid = change.pcid, .globals = change.globals});
        break;
    }
    mmu_.set_trap_user_fetch(has_untrapped_user_code());
}

std::optional<std::array<std::uint64_t, 4>> Monitor::pdptes(std::uint64_t cr3) {
    return load_pdptes(machine_.memory(), cr3, features_.physical_bits);
}

std::optional<std::uint64_t> Monitor::read_msr(std::uint32_t index) {
    const MsrRead answer = msr_read(index, features_);
    switch (answer.kind) {
    case MsrRead::refused:
        return std::nullopt;
    case MsrRead::fixed:
        return answer.value;
    case MsrRead::machine:
        break;
    }
    const auto value = machine_.vcpu().read_msr(index);
    return value ? std::optional(*value & answer.value) : std::nullopt;
}

bool Monitor::write_msr(std::uint32_t index, std::uint64_t value) {
    Vcpu& vcpu = machine_.vcpu();
    switch (msr_write(index, value, features_, machine_.memory())) {
    case MsrWrite::refused:
        return false;
    case MsrWrite::ignored:
        return true;
    case MsrWrite::unchanged:
        return read_msr(index) == value;
    case MsrWrite::apic_base: {
        const auto current = vcpu.read_msr(index);
        if (!current || !apic_base_allowed(*current, value, features_))
            return false;
        break;
    }
    case MsrWrite::tsc:
        return move_tsc(value - read_tsc());
    case MsrWrite::tsc_adjust:
        return move_tsc(value - vcpu.read_msr(index).value_or(0));
    case MsrWrite::machine:
        break;
    }
    if (!vcpu.write_msr(index, value))
        return false;
    cpu_.cr8 = vcpu.cr8(); // the same register as the local APIC's task priority
    return true;
}

/// Moves the TSC and IA32_TSC_ADJUST. Of what userspace writes to these registers, KVM would take a TSC of
/// about the value that it has, or of 0, for an attempt to make vCPUs agree, and move none for the other.
bool Monitor::move_tsc(std::uint64_t distance) {
    Vcpu& vcpu = machine_.vcpu();
    if (const auto adjusted = vcpu.read_msr(msr::tsc_adjust))
        (void)vcpu.write_msr(msr::tsc_adjust, *adjusted + distance); // is only kept
    if (const auto offset = vcpu.tsc_offset())
        return vcpu.set_tsc_offset(*offset + distance);
    return vcpu.write_msr(msr::tsc, read_tsc() + distance);
}

/// The TSC as RDTSC reads it where it does not trap: KVM may have given the machine an offset.
std::uint64_t Monitor::read_tsc() {
    return machine_.vcpu().read_msr(msr::tsc).value_or(timestamp());
}

CpuidResult Monitor::cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
    for (const CpuidLeaf& candidate : cpuid_) {
        constexpr std::uint32_t index_matters = 1;
        if (candidate.function == leaf &&
            ((candidate.flags & index_matters) == 0 || candidate.index == subleaf))
            return {candidate.eax, candidate.ebx, candidate.ecx, candidate.edx};
    }
    return {};
}

} // namespace umbra
