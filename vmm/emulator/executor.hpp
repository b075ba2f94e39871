// The inside of the emulator: one instruction on the virtual CPU. Its parts are the files beside this one.
#pragma once

#include "vmm/emulator.hpp"
#include "vmm/segmentation.hpp"

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include <Zydis/Zydis.h>

namespace umbra {

using emulated::Done;
using emulated::Halted;
using emulated::NotSensitive;
using emulated::PortAccess;
using emulated::Raised;
using emulated::SingleStep;
using emulated::SoftwareEvent;
using emulated::Unsupported;
using Fault = std::optional<Exception>;

constexpr std::uint64_t pcid_mask = 0xfff; ///< of CR3

constexpr bool fits_32(std::uint64_t value) {
    return value >> 32 == 0;
}

/// One instruction: fetched, decoded, executed.
class Executor {
  public:
    Executor(VirtualCpu& cpu, const GuestSpace& space, CpuEnvironment& environment)
        : cpu_(&cpu), space_(&space), environment_(&environment) {}

    /// `mnemonic`: as for emulate().
    Emulation run(const char** mnemonic);

  private:
    // Fetching and decoding
    [[nodiscard]] Fault fetch(std::size_t size);
    [[nodiscard]] std::size_t fetchable() const;
    [[nodiscard]] ZyanStatus decode();
    void decode_operands();
    [[nodiscard]] const char* name() const;

    // How an instruction ends
    [[nodiscard]] static Emulation raise(const Exception& exception) { return Raised{exception}; }
    [[nodiscard]] static Emulation general_protection() { return Raised{Exception::general_protection()}; }
    [[nodiscard]] static Emulation invalid_opcode() { return Raised{Exception::invalid_opcode()}; }
    void advance();
    [[nodiscard]] Emulation done();
    [[nodiscard]] Emulation software_event(std::uint8_t vector, EventKind kind);

    // Operands
    [[nodiscard]] std::uint64_t& reg(Gpr which) { return (*cpu_)[which]; }
    [[nodiscard]] Gpr reg_operand() const;
    [[nodiscard]] Gpr rm_operand() const;
    [[nodiscard]] bool has_memory_operand() const { return instruction_.raw.modrm.mod != 3; }
    [[nodiscard]] const ZydisDecodedOperand& memory_operand();
    void write_register(Gpr which, unsigned bytes, std::uint64_t value);
    /// What of a general-purpose register the code can use in full.
    [[nodiscard]] std::uint64_t native_width(std::uint64_t value) const {
        return cpu_->cs.long_mode ? value : static_cast<std::uint32_t>(value);
    }
    [[nodiscard]] std::uint64_t effective_address(const ZydisDecodedOperand& operand);
    [[nodiscard]] Fault linear_address(SegmentRegister which, std::uint64_t offset, std::size_t size,
                                       bool write, GuestVirt& at);
    [[nodiscard]] Fault operand_address(const ZydisDecodedOperand& operand, std::size_t size, bool write,
                                        GuestVirt& at);
    template<class T>
    [[nodiscard]] Fault read_memory_operand(T& value);
    [[nodiscard]] Fault read_rm16(std::uint16_t& value);
    [[nodiscard]] Fault read_far_pointer(std::uint16_t& selector, std::uint64_t& offset);

    // The stack
    [[nodiscard]] unsigned stack_bytes() const;
    void set_stack_pointer(std::uint64_t value);
    [[nodiscard]] Fault read_stack(std::uint64_t offset, unsigned width, std::span<std::uint64_t> items);

    // Privilege
    [[nodiscard]] bool privileged() const { return cpu_->cpl == 0; }
    [[nodiscard]] bool steps() const { return (cpu_->rflags & rflags::trap) != 0 || environment_->steps(); }
    [[nodiscard]] bool io_flag_privileged() const { return cpu_->cpl <= cpu_->iopl(); }
    [[nodiscard]] bool umip_denies() const { return cpu_->cpl != 0 && (cpu_->cr4 & cr4::umip) != 0; }
    /// An explicit data access of the instruction. What it reads by itself, descriptors and the TSS, are
    /// GuestSpace's implicit ones, which EFLAGS.AC does not open user pages to (Intel SDM vol. 3A, 4.6.1).
    [[nodiscard]] Access access(bool write = false) const {
        return {.write = write, .user = cpu_->cpl == 3, .ac = (cpu_->rflags & rflags::alignment_check) != 0};
    }
    [[nodiscard]] bool canonical(std::uint64_t value) const {
        return space_->paging().format->canonical(GuestVirt(value));
    }

    // The instructions
    Emulation execute();
    Emulation execute_at_level_0();
    Emulation set_interrupt_flag();
    Emulation halt();
    Emulation port_io();
    Emulation string_io();
    [[nodiscard]] Fault check_port(std::uint16_t port, unsigned size);
    Emulation move();
    Emulation move_control_register();
    Emulation move_debug_register();
    [[nodiscard]] Fault write_cr0(std::uint64_t value);
    [[nodiscard]] Fault load_pdptes(std::uint64_t cr3);
    [[nodiscard]] Fault write_cr3(std::uint64_t value);
    [[nodiscard]] Fault write_cr4(std::uint64_t value);
    Emulation load_machine_status_word();
    Emulation store_system_register(std::uint64_t value);
    Emulation store_descriptor_table(const DescriptorTable& table);
    Emulation load_descriptor_table(DescriptorTable& table);
    Emulation load_system_segment();
    Emulation load_segment_register(SegmentRegister which, std::uint16_t selector);
    Emulation pop_segment();
    Emulation load_far_pointer(SegmentRegister which);
    Emulation examine_descriptor();
    Emulation far_transfer(bool call);
    Emulation far_return();
    Emulation interrupt_return();
    Emulation system_return();
    Emulation fast_system_call();
    Emulation fast_system_return();
    Emulation invalidate_page();
    Emulation invalidate_pcid();
    Emulation read_msr();
    Emulation write_msr();
    [[nodiscard]] std::uint64_t* held_msr(std::uint32_t index);
    [[nodiscard]] bool valid_msr(std::uint32_t index, std::uint64_t value) const;
    [[nodiscard]] bool write_efer(std::uint64_t value);
    Emulation read_tsc();
    Emulation read_counter();
    Emulation set_xcr();
    Emulation access_flag();

    [[nodiscard]] Fault check_target(const Segment& code, std::uint64_t offset) const;
    void enter_code_segment(const Segment& code, std::uint8_t cpl, std::uint64_t rip);
    [[nodiscard]] std::uint64_t edx_eax();
    void set_edx_eax(std::uint64_t value);
    [[nodiscard]] std::uint16_t current_pcid() const;
    void tell(PagingChange::Kind kind, bool globals = false) {
        environment_->paging_changed(
            {.kind = kind, .globals = globals, .pcid = current_pcid(), .address = {}});
    }

    VirtualCpu* cpu_;
    const GuestSpace* space_;
    CpuEnvironment* environment_;

    static constexpr std::size_t max_instruction_length = 15;
    std::array<std::byte, max_instruction_length> bytes_{};
    std::size_t fetched_ = 0;
    ZydisDecoderContext context_{};
    ZydisDecodedInstruction instruction_{};
    std::array<ZydisDecodedOperand, 2> operands_{}; ///< no sensitive instruction has its memory operand later
};

template<class T>
Fault Executor::read_memory_operand(T& value) {
    GuestVirt at;
    if (auto fault = operand_address(memory_operand(), sizeof(T), false, at))
        return fault;
    return space_->read(at, value, access());
}

} // namespace umbra
