// Far transfers, returns, and system calls.
#include "vmm/emulator/executor.hpp"

namespace umbra {
namespace {

// The flags that SYSRET loads from R11, and those that IRET loads at any privilege level.
constexpr std::uint64_t sysret_flags = 0x3c'7fd7;
constexpr std::uint64_t iret_flags_16 = 0x4dd5, iret_flags = iret_flags_16 | rflags::resume |
                                                             rflags::alignment_check | (1U << 21); // ID
constexpr std::uint64_t iret_flags_cpl0 = 3U << 19;                                                // VIF, VIP

} // namespace

// --- Far transfers

/// The new instruction pointer against its code segment.
Fault Executor::check_target(const Segment& code, std::uint64_t offset) const {
    const bool valid = code.long_mode ? canonical(offset) : offset <= code.limit;
    return valid ? std::nullopt : Fault(Exception::general_protection());
}

void Executor::enter_code_segment(const Segment& code, std::uint8_t cpl, std::uint64_t rip) {
    cpu_->cs = code;
    cpu_->cs.selector = static_cast<std::uint16_t>(selector::error_code(code.selector) | cpl);
    cpu_->cpl = cpl;
    cpu_->rip = rip;
}

Emulation Executor::far_transfer(bool call) {
    std::uint16_t selector = 0;
    std::uint64_t offset = 0;
    if (auto fault = read_far_pointer(selector, offset))
        return raise(*fault);
    Segment code;
    if (auto fault = check_jump_code_segment(*cpu_, *space_, selector, code))
        return raise(*fault);
    if (code.system) {
        const bool gate =
            code.type == descriptor_type::call_gate || code.type == descriptor_type::call_gate_16;
        if (!gate)
            return Unsupported{"a task switch"};
        return Unsupported{call ? "far call through a call gate" : "far jmp through a call gate"};
    }
    if (auto fault = check_target(code, offset))
        return raise(*fault);
    if (call) {
        const unsigned width = instruction_.operand_width / 8U;
        const std::uint64_t next = cpu_->rip + instruction_.length;
        const std::uint64_t old_cs = cpu_->cs.selector;
        std::array<GuestVirt, 2> slots;
        std::uint64_t pointer = reg(Gpr::rsp);
        for (GuestVirt& slot : slots) {
            pointer -= width;
            if (stack_bytes() < 8)
                pointer &= (std::uint64_t{1} << (8 * stack_bytes())) - 1;
            if (auto fault = linear_address(SegmentRegister::ss, pointer, width, true, slot))
                return raise(*fault);
        }
        if (auto fault = mark_accessed(*cpu_, *space_, code))
            return raise(*fault);
        // As pushes: where the stack ends it is the upper one that faults.
        if (auto fault = space_->write(slots[0], std::as_bytes(std::span(&old_cs, 1)).first(width), access()))
            return raise(*fault);
        if (auto fault = space_->write(slots[1], std::as_bytes(std::span(&next, 1)).first(width), access()))
            return raise(*fault);
        set_stack_pointer(pointer);
    } else if (auto fault = mark_accessed(*cpu_, *space_, code)) {
        return raise(*fault);
    }
    enter_code_segment(code, cpu_->cpl, offset);
    cpu_->rflags &= ~rflags::resume;
    return Done{};
}

Emulation Executor::far_return() {
    const unsigned width = instruction_.operand_width / 8U;
    // RET imm16 releases that many bytes of parameters, on both stacks if there are two.
    const std::uint64_t parameters = instruction_.raw.imm[0].size != 0 ? instruction_.raw.imm[0].value.u : 0;
    std::array<std::uint64_t, 2> inner{}; // RIP, CS
    if (auto fault = read_stack(0, width, inner))
        return raise(*fault);
    const std::uint64_t rip = inner[0];
    const auto selector = static_cast<std::uint16_t>(inner[1]);
    Segment code;
    if (auto fault = check_return_code_segment(*cpu_, *space_, selector, code))
        return raise(*fault);
    const std::uint8_t new_cpl = selector::rpl(selector);
    const bool outer = new_cpl > cpu_->cpl;
    std::array<std::uint64_t, 2> stack{}; // RSP, SS
    Segment ss;
    if (outer) {
        if (auto fault = read_stack(std::uint64_t{2} * width + parameters, width, stack))
            return raise(*fault);
        if (auto fault = check_return_stack_segment(*cpu_, *space_, static_cast<std::uint16_t>(stack[1]),
                                                    new_cpl, code.long_mode, ss))
            return raise(*fault);
    }
    if (auto fault = check_target(code, rip))
        return raise(*fault);
    if (auto fault = mark_accessed(*cpu_, *space_, code))
        return raise(*fault);
    if (outer && ss.present) {
        if (auto fault = mark_accessed(*cpu_, *space_, ss))
            return raise(*fault);
    }
    if (outer) {
        enter_code_segment(code, new_cpl, rip);
        cpu_->ss = ss;
        set_stack_pointer(stack[0] + parameters);
        drop_inner_data_segments(*cpu_);
    } else {
        set_stack_pointer(reg(Gpr::rsp) + std::uint64_t{2} * width + parameters);
        enter_code_segment(code, new_cpl, rip);
    }
    cpu_->rflags &= ~rflags::resume;
    return Done{};
}

/// Intel SDM vol. 2A, IRET: in 64-bit mode SS:RSP is popped at any level, otherwise by a return to an outer
/// one.
Emulation Executor::interrupt_return() {
    cpu_->nmi_blocked = false; // even if it faults
    if ((cpu_->rflags & rflags::nested_task) != 0) {
        if (!in_long_mode(*cpu_))
            return Unsupported{"a return from a nested task"};
        return general_protection();
    }
    const unsigned width = instruction_.operand_width / 8U;
    constexpr std::size_t short_frame = 3;
    std::array<std::uint64_t, 5> frame{}; // RIP, CS, RFLAGS, RSP, SS
    const auto at_first = std::span(frame).first(cpu_->cs.long_mode ? frame.size() : short_frame);
    if (auto fault = read_stack(0, width, at_first))
        return raise(*fault);
    if (!in_long_mode(*cpu_) && privileged() && (frame[2] & rflags::virtual_8086) != 0)
        return Unsupported{"a return to virtual-8086 mode"};
    const auto selector = static_cast<std::uint16_t>(frame[1]);
    Segment code;
    if (auto fault = check_return_code_segment(*cpu_, *space_, selector, code))
        return raise(*fault);
    const std::uint8_t new_cpl = selector::rpl(selector);
    const bool outer = new_cpl > cpu_->cpl;
    const bool pops_stack = cpu_->cs.long_mode || outer;
    if (pops_stack && !cpu_->cs.long_mode) {
        if (auto fault = read_stack(short_frame * width, width, std::span(frame).subspan(short_frame)))
            return raise(*fault);
    }
    Segment ss;
    if (pops_stack) {
        if (auto fault = check_return_stack_segment(*cpu_, *space_, static_cast<std::uint16_t>(frame[4]),
                                                    new_cpl, code.long_mode, ss))
            return raise(*fault);
    }
    if (auto fault = check_target(code, frame[0]))
        return raise(*fault);
    if (auto fault = mark_accessed(*cpu_, *space_, code))
        return raise(*fault);
    if (pops_stack && ss.present) {
        if (auto fault = mark_accessed(*cpu_, *space_, ss))
            return raise(*fault);
    }

    std::uint64_t loaded = width == 2 ? iret_flags_16 : iret_flags;
    if (io_flag_privileged())
        loaded |= rflags::interrupt;
    if (privileged())
        loaded |= rflags::iopl | (width == 2 ? 0 : iret_flags_cpl0);
    cpu_->rflags = (cpu_->rflags & ~loaded) | (frame[2] & loaded) | rflags::fixed;

    if (pops_stack) {
        enter_code_segment(code, new_cpl, frame[0]);
        cpu_->ss = ss;
        set_stack_pointer(frame[3]);
    } else {
        set_stack_pointer(reg(Gpr::rsp) + short_frame * width);
        enter_code_segment(code, new_cpl, frame[0]);
    }
    if (outer)
        drop_inner_data_segments(*cpu_);
    return Done{};
}

/// Intel SDM vol. 2B, SYSRET; AMD APM vol. 3, SYSRET, which in 32-bit code takes no flags from R11.
Emulation Executor::system_return() {
    if ((cpu_->efer & efer::sce) == 0 || !(cpu_->cs.long_mode || environment_->amd()))
        return invalid_opcode();
    if (!privileged())
        return general_protection();
    const bool to_64_bit = instruction_.operand_width == 64;
    const std::uint64_t target = to_64_bit ? reg(Gpr::rcx) : static_cast<std::uint32_t>(reg(Gpr::rcx));
    if (!canonical(target))
        return general_protection();
    const auto base = static_cast<std::uint16_t>(cpu_->star >> 48);
    const auto code = static_cast<std::uint16_t>((base + (to_64_bit ? 16 : 0)) | 3);
    const auto stack = static_cast<std::uint16_t>((base + 8) | 3);
    cpu_->rflags = cpu_->cs.long_mode ? (reg(Gpr::r11) & sysret_flags) | rflags::fixed
                                      : (cpu_->rflags | rflags::interrupt) & ~rflags::resume;
    cpu_->cs = flat_code_segment(code, 3, to_64_bit);
    cpu_->ss = flat_stack_segment(stack, 3);
    cpu_->cpl = 3;
    cpu_->rip = target;
    return Done{.step = SingleStep::flags_after};
}

/// Intel SDM vol. 2B, SYSENTER.
Emulation Executor::fast_system_call() {
    if (environment_->amd() && in_long_mode(*cpu_))
        return invalid_opcode();
    const std::uint16_t base = selector::error_code(static_cast<std::uint16_t>(cpu_->sysenter_cs));
    if (base == 0)
        return general_protection();
    const bool long_mode = in_long_mode(*cpu_);
    cpu_->rflags &= ~(rflags::interrupt | rflags::resume);
    cpu_->cs = flat_code_segment(base, 0, long_mode);
    cpu_->ss = flat_stack_segment(static_cast<std::uint16_t>(base + 8), 0);
    cpu_->cpl = 0;
    cpu_->rip = long_mode ? cpu_->sysenter_eip : static_cast<std::uint32_t>(cpu_->sysenter_eip);
    reg(Gpr::rsp) = long_mode ? cpu_->sysenter_esp : static_cast<std::uint32_t>(cpu_->sysenter_esp);
    return Done{};
}

/// Intel SDM vol. 2B, SYSEXIT.
Emulation Executor::fast_system_return() {
    if (environment_->amd() && in_long_mode(*cpu_))
        return invalid_opcode();
    if (!privileged())
        return general_protection();
    const std::uint16_t base = selector::error_code(static_cast<std::uint16_t>(cpu_->sysenter_cs));
    const bool to_64_bit = instruction_.operand_width == 64;
    if (base == 0 || (to_64_bit && (!canonical(reg(Gpr::rcx)) || !canonical(reg(Gpr::rdx)))))
        return general_protection();
    const auto code = static_cast<std::uint16_t>((base + (to_64_bit ? 32 : 16)) | 3);
    cpu_->rflags &= ~rflags::resume;
    cpu_->cs = flat_code_segment(code, 3, to_64_bit);
    cpu_->ss = flat_stack_segment(static_cast<std::uint16_t>(code + 8), 3);
    cpu_->cpl = 3;
    cpu_->rip = to_64_bit ? reg(Gpr::rdx) : static_cast<std::uint32_t>(reg(Gpr::rdx));
    reg(Gpr::rsp) = to_64_bit ? reg(Gpr::rcx) : static_cast<std::uint32_t>(reg(Gpr::rcx));
    return Done{};
}

/// Intel SDM vol. 2B, SYSCALL. From compatibility mode it goes to CSTAR, as AMD's CPUs do; Intel's raise #UD
/// before this is reached.
std::optional<Exception> emulate_syscall(VirtualCpu& cpu, GuestVirt return_rip) {
    if ((cpu.efer & efer::sce) == 0) {
        constexpr unsigned length = 2;
        cpu.rip = return_rip.value() - length;
        return Exception::invalid_opcode();
    }
    const auto base = static_cast<std::uint16_t>(cpu.star >> 32);
    const std::uint64_t saved_rflags = cpu.rflags & ~rflags::resume;
    cpu[Gpr::rcx] = return_rip.value();
    cpu[Gpr::r11] = saved_rflags;
    cpu.rflags = (saved_rflags & ~cpu.fmask) | rflags::fixed;
    cpu.rip = cpu.cs.long_mode ? cpu.lstar : cpu.cstar;
    cpu.cs = flat_code_segment(selector::error_code(base), 0, true);
    cpu.ss = flat_stack_segment(static_cast<std::uint16_t>(selector::error_code(base) + 8), 0);
    cpu.cpl = 0;
    return std::nullopt;
}

} // namespace umbra
