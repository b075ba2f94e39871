// Translation caches, model-specific registers, time, and extended state.
#include "vmm/emulator/executor.hpp"

#include "vmm/msr.hpp"

namespace umbra {
namespace {

namespace cpuid {
constexpr std::uint32_t invpcid = 1U << 10; ///< leaf 7: EBX
constexpr std::uint32_t nx = 1U << 20;      ///< leaf 0x80000001: EDX
} // namespace cpuid

bool valid_pat(std::uint64_t value) {
    for (unsigned i = 0; i < 8; ++i) {
        const std::uint64_t type = (value >> (8 * i)) & 0xff;
        if (type > 7 || type == 2 || type == 3)
            return false;
    }
    return true;
}

} // namespace

// --- Translation caches

Emulation Executor::invalidate_page() {
    const ZydisDecodedOperand& operand = memory_operand();
    GuestVirt at;
    // A non-canonical address has no translation to lose, and raises nothing.
    if (auto violation = operand_address(operand, 1, false, at); !violation)
        environment_->paging_changed(
            {.kind = PagingChange::page, .globals = true, .pcid = current_pcid(), .address = at});
    return done();
}

/// Intel SDM vol. 2A, INVPCID. The reserved bits of the descriptor count for every type; its PCID and its
/// address only for those that use them.
Emulation Executor::invalidate_pcid() {
    if ((environment_->cpuid(7, 0).ebx & cpuid::invpcid) == 0)
        return invalid_opcode();
    if (!privileged())
        return general_protection();
    constexpr std::array kinds{PagingChange::page, PagingChange::context, PagingChange::everything,
                               PagingChange::all_contexts};
    const std::uint64_t type = native_width(reg(reg_operand()));
    if (type >= kinds.size())
        return general_protection();
    std::array<std::uint64_t, 2> descriptor{}; // PCID, linear address
    if (auto fault = read_memory_operand(descriptor))
        return raise(*fault);
    const PagingChange::Kind kind = kinds[type];
    const bool names_pcid = kind == PagingChange::page || kind == PagingChange::context;
    const bool names_address = kind == PagingChange::page;
    const bool pcids = (cpu_->cr4 & cr4::pcide) != 0;
    if (descriptor[0] > pcid_mask || (names_pcid && !pcids && descriptor[0] != 0) ||
        (names_address && !canonical(descriptor[1])))
        return general_protection();
    environment_->paging_changed(
        {.kind = kind,
         .globals = kind == PagingChange::everything,
         .pcid = names_pcid ? static_cast<std::uint16_t>(descriptor[0]) : current_pcid(),
         .address = GuestVirt(names_address ? descriptor[1] : 0)});
    return done();
}

// --- Model-specific registers, time, extended state

std::uint64_t Executor::edx_eax() {
    return (reg(Gpr::rdx) << 32) | static_cast<std::uint32_t>(reg(Gpr::rax));
}

void Executor::set_edx_eax(std::uint64_t value) {
    reg(Gpr::rax) = static_cast<std::uint32_t>(value);
    reg(Gpr::rdx) = value >> 32;
}

/// Where VirtualCpu holds a register, if it does.
std::uint64_t* Executor::held_msr(std::uint32_t index) {
    switch (index) {
    case msr::sysenter_cs:
        return &cpu_->sysenter_cs;
    case msr::sysenter_esp:
        return &cpu_->sysenter_esp;
    case msr::sysenter_eip:
        return &cpu_->sysenter_eip;
    case msr::pat:
        return &cpu_->pat;
    case msr::efer:
        return &cpu_->efer;
    case msr::star:
        return &cpu_->star;
    case msr::lstar:
        return &cpu_->lstar;
    case msr::cstar:
        return &cpu_->cstar;
    case msr::fmask:
        return &cpu_->fmask;
    case msr::fs_base:
        return &cpu_->fs.base;
    case msr::gs_base:
        return &cpu_->gs.base;
    case msr::kernel_gs_base:
        return &cpu_->kernel_gs_base;
    case msr::tsc_aux:
        return &cpu_->tsc_aux;
    default:
        return nullptr;
    }
}

/// Whether a register that held_msr() knows, other than EFER, takes `value`.
bool Executor::valid_msr(std::uint32_t index, std::uint64_t value) const {
    switch (index) {
    case msr::pat:
        return valid_pat(value);
    case msr::fmask:
    case msr::tsc_aux:
        return fits_32(value);
    case msr::sysenter_esp:
    case msr::sysenter_eip:
    case msr::lstar:
    case msr::cstar:
    case msr::fs_base:
    case msr::gs_base:
    case msr::kernel_gs_base:
        // Of the addresses of long mode, also before it is entered.
        return ((cpu_->cr4 & cr4::la57) != 0 ? paging_5_level : paging_4_level).canonical(GuestVirt(value));
    default:
        return true;
    }
}

Emulation Executor::read_msr() {
    const auto index = static_cast<std::uint32_t>(reg(Gpr::rcx));
    const std::uint64_t* held = held_msr(index);
    const auto value = held != nullptr ? std::optional(*held) : environment_->read_msr(index);
    if (!value)
        return general_protection();
    set_edx_eax(*value);
    return done();
}

Emulation Executor::write_msr() {
    const auto index = static_cast<std::uint32_t>(reg(Gpr::rcx));
    const std::uint64_t value = edx_eax();
    bool written = true;
    if (index == msr::efer)
        written = write_efer(value);
    else if (std::uint64_t* held = held_msr(index); held == nullptr)
        written = environment_->write_msr(index, value);
    else if (valid_msr(index, value))
        *held = value;
    else
        written = false;
    return written ? done() : general_protection();
}

/// LMA follows LME and CR0.PG and is not written; LME cannot change while paging is on.
bool Executor::write_efer(std::uint64_t value) {
    value = (value & ~efer::lma) | (cpu_->efer & efer::lma);
    const std::uint64_t changed = cpu_->efer ^ value;
    const bool lme_changes_paging = (changed & efer::lme) != 0 && (cpu_->cr0 & cr0::pg) != 0;
    if ((value & ~(efer::sce | efer::lme | efer::lma | efer::nxe)) != 0 || lme_changes_paging)
        return false;
    if ((changed & efer::nxe) != 0 && (environment_->cpuid(0x8000'0001, 0).edx & cpuid::nx) == 0)
        return false;
    cpu_->efer = value;
    if ((changed & efer::nxe) != 0)
        tell(PagingChange::mode);
    return true;
}

Emulation Executor::read_tsc() {
    if (cpu_->cpl != 0 && (cpu_->cr4 & cr4::tsd) != 0)
        return general_protection();
    set_edx_eax(environment_->read_tsc());
    if (instruction_.mnemonic == ZYDIS_MNEMONIC_RDTSCP)
        reg(Gpr::rcx) = static_cast<std::uint32_t>(cpu_->tsc_aux);
    return done();
}

/// The core counters of AMD's CPUs, which their MSRs are the other way to (AMD APM vol. 3, RDPMC); others are
/// not offered.
Emulation Executor::read_counter() {
    constexpr std::uint32_t counters = 4;
    const auto index = static_cast<std::uint32_t>(reg(Gpr::rcx));
    if ((cpu_->cpl != 0 && (cpu_->cr4 & cr4::pce) == 0) || index >= counters)
        return general_protection();
    const auto value = environment_->read_msr(msr::perf_ctr0 + index);
    if (!value)
        return general_protection();
    set_edx_eax(*value);
    return done();
}

Emulation Executor::set_xcr() {
    if ((cpu_->cr4 & cr4::osxsave) == 0)
        return invalid_opcode();
    const bool xcr0 = static_cast<std::uint32_t>(reg(Gpr::rcx)) == 0;
    if (!privileged() || !xcr0 || !environment_->write_xcr0(edx_eax()))
        return general_protection();
    return done();
}

/// STAC and CLAC (Intel SDM vol. 2): offered with SMAP, whether or not CR4.SMAP is set, and #UD, not #GP, for
/// programs. Each of them traps, #UD being what the machine's CPL 3 makes of it; POPF, the other way to
/// change EFLAGS.AC, does not, so that the monitor learns of what it did at the next trap only. What POPF
/// takes away may therefore still be used until then; what it grants is found by the page fault that SMAP
/// makes of it.
Emulation Executor::access_flag() {
    if ((environment_->cr4_allowed() & cr4::smap) == 0 || !privileged())
        return invalid_opcode();
    if (instruction_.mnemonic == ZYDIS_MNEMONIC_STAC)
        cpu_->rflags |= rflags::alignment_check;
    else
        cpu_->rflags &= ~rflags::alignment_check;
    return done();
}

} // namespace umbra
