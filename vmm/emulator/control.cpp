// Control and debug registers.
#include "vmm/emulator/executor.hpp"

#include <utility>

namespace umbra {
namespace {

// DR6 and DR7 (Intel SDM vol. 3A, 17.2): what is always one, and what can be written.
constexpr std::uint64_t dr6_fixed = 0xffff'0ff0, dr6_writable = 0xe00f, dr6_bd = 1U << 13;
constexpr std::uint64_t dr7_fixed = 0x400, dr7_writable = 0xffff'23ff, dr7_gd = 1U << 13;

constexpr std::uint64_t cr3_no_flush = std::uint64_t{1} << 63;

// A change of these reloads the PDPTEs under PAE paging (Intel SDM vol. 3A, 4.4.1).
constexpr std::uint64_t cr0_reloads_pdptes = cr0::cd | cr0::nw | cr0::pg;
constexpr std::uint64_t cr4_reloads_pdptes = cr4::pae | cr4::pge | cr4::pse | cr4::smep;

} // namespace

// --- Control and debug registers

Emulation Executor::move() {
    if (instruction_.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT) {
        if (instruction_.opcode != 0x8e)
            return NotSensitive{};
        std::uint16_t selector = 0;
        if (auto fault = read_rm16(selector))
            return raise(*fault);
        return load_segment_register(static_cast<SegmentRegister>(instruction_.raw.modrm.reg), selector);
    }
    switch (instruction_.opcode) {
    case 0x20:
    case 0x22:
        return privileged() ? move_control_register() : general_protection();
    case 0x21:
    case 0x23:
        return privileged() ? move_debug_register() : general_protection();
    default:
        return NotSensitive{};
    }
}

Emulation Executor::move_control_register() {
    const auto number = static_cast<unsigned>(reg_operand());
    std::uint64_t* control = nullptr;
    switch (number) {
    case 0:
        control = &cpu_->cr0;
        break;
    case 2:
        control = &cpu_->cr2;
        break;
    case 3:
        control = &cpu_->cr3;
        break;
    case 4:
        control = &cpu_->cr4;
        break;
    case 8:
        control = &cpu_->cr8;
        break;
    default: // there are no others
        return invalid_opcode();
    }
    if (instruction_.opcode == 0x20) {
        reg(rm_operand()) = native_width(*control);
        return done();
    }
    const std::uint64_t value = native_width(reg(rm_operand()));
    if (number == 0 && (value & (cr0::pe | cr0::pg)) == 0 && !cpu_->cs.long_mode)
        return Unsupported{"a return to real mode"};
    Fault fault;
    if (number == 0)
        fault = write_cr0(value);
    else if (number == 3)
        fault = write_cr3(value);
    else if (number == 4)
        fault = write_cr4(value);
    else if (number == 8 && value > 0xf)
        fault = Exception::general_protection();
    else
        *control = value;
    return fault ? raise(*fault) : done();
}

/// Intel SDM vol. 3A, 2.5 and 9.8.5, and vol. 2B, MOV to control registers. PE stays set. Setting PG enters
/// long mode if EFER.LME is set: compatibility mode, until a far JMP loads CS.L. It is cleared only outside
/// 64-bit mode, and ends long mode.
Fault Executor::write_cr0(std::uint64_t value) {
    value |= cr0::et;
    const bool caching_valid = (value & cr0::cd) != 0 || (value & cr0::nw) == 0;
    if (!fits_32(value) || (value & cr0::pe) == 0 || !caching_valid)
        return Exception::general_protection();
    constexpr std::uint64_t defined = cr0::pe | cr0::mp | cr0::em | cr0::ts | cr0::et | cr0::ne | cr0::wp |
                                      cr0::am | cr0::nw | cr0::cd | cr0::pg;
    value &= defined; // the others are ignored
    const std::uint64_t changed = cpu_->cr0 ^ value;
    const bool on = (changed & value & cr0::pg) != 0; // of paging
    const bool off = (changed & ~value & cr0::pg) != 0;
    if (off && (cpu_->cs.long_mode || (cpu_->cr4 & cr4::pcide) != 0))
        return Exception::general_protection();
    const bool to_long_mode = on && (cpu_->efer & efer::lme) != 0;
    if (to_long_mode) {
        const bool tss_16 = cpu_->tr.present && (cpu_->tr.type | 2) == descriptor_type::tss_16_busy;
        if ((cpu_->cr4 & cr4::pae) == 0 || tss_16)
            return Exception::general_protection();
    }
    const std::uint64_t old_cr0 = std::exchange(cpu_->cr0, value), old_efer = cpu_->efer;
    if (to_long_mode)
        cpu_->efer |= efer::lma;
    else if (off)
        cpu_->efer &= ~efer::lma;
    if ((changed & cr0_reloads_pdptes) != 0) {
        if (auto fault = load_pdptes(cpu_->cr3)) {
            cpu_->cr0 = old_cr0;
            cpu_->efer = old_efer;
            return fault;
        }
    }
    if (on || off)
        tell(PagingChange::everything, true);
    else if ((changed & cr0::wp) != 0)
        tell(PagingChange::mode);
    return std::nullopt;
}

/// Under PAE paging, loads the PDPTE registers by this CR3; #GP(0) for a reserved bit in a present one.
Fault Executor::load_pdptes(std::uint64_t cr3) {
    if (&paging_format(*cpu_) != &paging_pae)
        return std::nullopt;
    const auto loaded = environment_->pdptes(cr3);
    if (!loaded)
        return Exception::general_protection();
    cpu_->pdptes = *loaded;
    return std::nullopt;
}

/// Intel SDM vol. 3A, 4.10.4.1. Bit 63 is reserved without PCIDs, and never kept.
Fault Executor::write_cr3(std::uint64_t value) {
    const bool pcids = (cpu_->cr4 & cr4::pcide) != 0;
    const bool keep = pcids && (value & cr3_no_flush) != 0;
    if (pcids)
        value &= ~cr3_no_flush;
    if (value >> environment_->physical_bits() != 0)
        return Exception::general_protection();
    if (auto fault = load_pdptes(value))
        return fault;
    cpu_->cr3 = value;
    tell(keep ? PagingChange::cr3_load_no_flush : PagingChange::cr3_load);
    return std::nullopt;
}

/// What flushes: Intel SDM vol. 3A, 4.10.4.1, and AMD APM vol. 2, 5.5.2, where PSE does too. Turning PCIDs on
/// flushes nothing: the translations made until then are those of PCID 0, which CR3 must name. In long mode
/// PAE and LA57 stay as they are.
Fault Executor::write_cr4(std::uint64_t value) {
    const std::uint64_t changed = cpu_->cr4 ^ value;
    const bool long_mode = in_long_mode(*cpu_);
    const bool pcids_on = (changed & value & cr4::pcide) != 0;
    if ((value & ~environment_->cr4_allowed()) != 0 ||
        (long_mode && ((value & cr4::pae) == 0 || (changed & cr4::la57) != 0)) ||
        (pcids_on && (!long_mode || (cpu_->cr3 & pcid_mask) != 0)))
        return Exception::general_protection();
    cpu_->cr4 = value;
    if ((changed & cr4_reloads_pdptes) != 0) {
        if (auto fault = load_pdptes(cpu_->cr3)) {
            cpu_->cr4 ^= changed;
            return fault;
        }
    }
    const bool pcids_off = (changed & ~value & cr4::pcide) != 0;
    const bool smep_on = (changed & value & cr4::smep) != 0;
    if ((changed & (cr4::smep | cr4::smap | cr4::pke)) != 0)
        tell(PagingChange::mode);
    if ((changed & (cr4::pge | cr4::pse | cr4::pae)) != 0 || pcids_off)
        tell(PagingChange::everything, true);
    else if (smep_on)
        tell(PagingChange::context, true);
    return std::nullopt;
}

std::uint16_t Executor::current_pcid() const {
    return static_cast<std::uint16_t>((cpu_->cr4 & cr4::pcide) != 0 ? cpu_->cr3 & pcid_mask : 0);
}

Emulation Executor::load_machine_status_word() {
    std::uint16_t value = 0;
    if (auto fault = read_rm16(value))
        return raise(*fault);
    // PE can be set but not cleared, and here it is set.
    constexpr std::uint64_t loaded = cr0::mp | cr0::em | cr0::ts;
    cpu_->cr0 = (cpu_->cr0 & ~loaded) | (value & loaded);
    return done();
}

/// Intel SDM vol. 3B, 17.2.
Emulation Executor::move_debug_register() {
    auto number = static_cast<unsigned>(reg_operand());
    if (number > 7)
        return invalid_opcode();
    if (number == 4 || number == 5) {
        if ((cpu_->cr4 & cr4::de) != 0)
            return invalid_opcode();
        number += 2;
    }
    if ((cpu_->dr7 & dr7_gd) != 0) {
        cpu_->dr6 |= dr6_bd;
        cpu_->rflags |= rflags::resume; // a fault, and none of an instruction breakpoint
        return raise({Vector::debug, std::nullopt, {}});
    }
    std::uint64_t& debug = number == 6 ? cpu_->dr6 : number == 7 ? cpu_->dr7 : cpu_->dr[number];
    if (instruction_.opcode == 0x21) {
        reg(rm_operand()) = native_width(debug);
        return done();
    }
    const std::uint64_t general = native_width(reg(rm_operand()));
    if (number >= 6 && !fits_32(general))
        return general_protection();
    debug = number == 6   ? (general & dr6_writable) | dr6_fixed
            : number == 7 ? (general & dr7_writable) | dr7_fixed
                          : general;
    return done();
}

} // namespace umbra
