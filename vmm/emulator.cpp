#include "vmm/emulator.hpp"

#include "vmm/segmentation.hpp"

#include <utility>

#include <Zydis/Zydis.h>

namespace umbra {
namespace {

using emulated::Done;
using emulated::Halted;
using emulated::NotSensitive;
using emulated::PortAccess;
using emulated::Raised;
using emulated::SingleStep;
using emulated::SoftwareEvent;
using emulated::Unsupported;
using Fault = std::optional<Exception>;

constexpr std::size_t max_instruction_length = 15;

/// Elements of one repeated INS or OUTS that are done before the guest may be interrupted again.
constexpr unsigned string_chunk = 1024;

// Offset of the I/O map base in the 64-bit and the 32-bit TSS (Intel SDM vol. 3A, figures 7-11 and 7-2).
constexpr std::uint32_t tss_io_map_base = 102;

// Indices of the model-specific registers that VirtualCpu holds (Intel SDM vol. 4, table 2-2).
namespace msr {
constexpr std::uint32_t sysenter_cs = 0x174, sysenter_esp = 0x175, sysenter_eip = 0x176, pat = 0x277;
constexpr std::uint32_t efer = 0xc000'0080, star = 0xc000'0081, lstar = 0xc000'0082, cstar = 0xc000'0083,
                        fmask = 0xc000'0084;
constexpr std::uint32_t fs_base = 0xc000'0100, gs_base = 0xc000'0101, kernel_gs_base = 0xc000'0102,
                        tsc_aux = 0xc000'0103;
constexpr std::uint32_t perf_ctr0 = 0xc001'0004;
} // namespace msr

namespace cpuid {
constexpr std::uint32_t invpcid = 1U << 10; ///< leaf 7: EBX
constexpr std::uint32_t nx = 1U << 20;      ///< leaf 0x80000001: EDX
} // namespace cpuid

// DR6 and DR7 (Intel SDM vol. 3A, 17.2): what is always one, and what can be written.
constexpr std::uint64_t dr6_fixed = 0xffff'0ff0, dr6_writable = 0xe00f, dr6_bd = 1U << 13;
constexpr std::uint64_t dr7_fixed = 0x400, dr7_writable = 0xffff'23ff, dr7_gd = 1U << 13;

constexpr std::uint64_t cr3_no_flush = std::uint64_t{1} << 63;
constexpr std::uint64_t pcid_mask = 0xfff;

// A change of these reloads the PDPTEs under PAE paging (Intel SDM vol. 3A, 4.4.1).
constexpr std::uint64_t cr0_reloads_pdptes = cr0::cd | cr0::nw | cr0::pg;
constexpr std::uint64_t cr4_reloads_pdptes = cr4::pae | cr4::pge | cr4::pse | cr4::smep;

// The flags that SYSRET loads from R11, and those that IRET loads at any privilege level.
constexpr std::uint64_t sysret_flags = 0x3c'7fd7;
constexpr std::uint64_t iret_flags_16 = 0x4dd5, iret_flags = iret_flags_16 | rflags::resume |
                                                             rflags::alignment_check | (1U << 21); // ID
constexpr std::uint64_t overflow_flag = 1U << 11;
constexpr std::uint64_t iret_flags_cpl0 = 3U << 19; // VIF, VIP

constexpr bool fits_32(std::uint64_t value) {
    return value >> 32 == 0;
}

bool valid_pat(std::uint64_t value) {
    for (unsigned i = 0; i < 8; ++i) {
        const std::uint64_t type = (value >> (8 * i)) & 0xff;
        if (type > 7 || type == 2 || type == 3)
            return false;
    }
    return true;
}

/// The decoders, one for each code segment size.
class Decoders {
  public:
    Decoders() {
        ZydisDecoderInit(&code_64_, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
        ZydisDecoderInit(&code_32_, ZYDIS_MACHINE_MODE_LONG_COMPAT_32, ZYDIS_STACK_WIDTH_32);
        ZydisDecoderInit(&code_16_, ZYDIS_MACHINE_MODE_LONG_COMPAT_16, ZYDIS_STACK_WIDTH_16);
    }
    [[nodiscard]] const ZydisDecoder& of(const Segment& code) const {
        return code.long_mode ? code_64_ : code.default_32 ? code_32_ : code_16_;
    }

  private:
    ZydisDecoder code_64_{}, code_32_{}, code_16_{};
};

const Decoders decoders;

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

    std::array<std::byte, max_instruction_length> bytes_{};
    std::size_t fetched_ = 0;
    ZydisDecoderContext context_{};
    ZydisDecodedInstruction instruction_{};
    std::array<ZydisDecodedOperand, 2> operands_{}; ///< no sensitive instruction has its memory operand later
};

// --- Fetching and decoding

/// Fetches up to `size` bytes of the instruction in all, as the CPU's own fetch.
Fault Executor::fetch(std::size_t size) {
    std::uint64_t at = cpu_->rip + fetched_;
    if (!cpu_->cs.long_mode)
        at = static_cast<std::uint32_t>(cpu_->cs.base + at);
    Access fetch_access = access();
    fetch_access.fetch = true;
    if (auto fault =
            space_->read(GuestVirt(at), std::span(bytes_).subspan(fetched_, size - fetched_), fetch_access))
        return fault;
    fetched_ = size;
    return std::nullopt;
}

/// How many bytes at RIP lie in the code segment, at most those of the longest instruction.
std::size_t Executor::fetchable() const {
    if (cpu_->cs.long_mode)
        return max_instruction_length;
    if (cpu_->rip > cpu_->cs.limit)
        return 0;
    return std::min<std::uint64_t>(max_instruction_length, cpu_->cs.limit - cpu_->rip + 1);
}

ZyanStatus Executor::decode() {
    return ZydisDecoderDecodeInstruction(&decoders.of(cpu_->cs), &context_, bytes_.data(), fetched_,
                                         &instruction_);
}

/// Most instructions need none of this, so it is not part of decode(). The implicit operands of INS and OUTS
/// count.
void Executor::decode_operands() {
    const auto count = std::min<std::size_t>(operands_.size(), instruction_.operand_count);
    (void)ZydisDecoderDecodeOperands(&decoders.of(cpu_->cs), &context_, &instruction_, operands_.data(),
                                     static_cast<ZyanU8>(count));
}

Emulation Executor::run(const char** mnemonic) {
    // What follows the instruction in the next page may be unmapped, and is fetched only if needed.
    const std::uint64_t start = cpu_->rip + (cpu_->cs.long_mode ? 0 : cpu_->cs.base);
    const std::size_t all = fetchable();
    if (all == 0)
        return general_protection();
    const std::size_t first = std::min<std::size_t>(all, page_size - GuestVirt(start).page_offset());
    if (auto fault = fetch(first))
        return raise(*fault);
    ZyanStatus status = decode();
    if (status == ZYDIS_STATUS_NO_MORE_DATA && first < all) {
        if (auto fault = fetch(all))
            return raise(*fault);
        status = decode();
    }
    if (status == ZYDIS_STATUS_NO_MORE_DATA && all < max_instruction_length)
        return general_protection(); // it goes beyond its segment
    // A control or debug register that does not exist is #UD, which goes before the machine's #GP for its
    // CPL 3.
    if (status == ZYDIS_STATUS_ILLEGAL_LOCK || status == ZYDIS_STATUS_BAD_REGISTER)
        return invalid_opcode();
    if (!ZYAN_SUCCESS(status))
        return NotSensitive{};
    if (mnemonic != nullptr)
        *mnemonic = name();
    return execute();
}

/// The mnemonic, with the three kinds of MOV that trap told apart.
const char* Executor::name() const {
    if (instruction_.mnemonic != ZYDIS_MNEMONIC_MOV)
        return ZydisMnemonicGetString(instruction_.mnemonic);
    if (instruction_.opcode_map != ZYDIS_OPCODE_MAP_0F)
        return "mov-segment";
    return (instruction_.opcode & 1) != 0 ? "mov-dr" : "mov-cr"; // 0F 20 to 0F 23
}

// --- How an instruction ends

void Executor::advance() {
    cpu_->rip += instruction_.length;
    if (!cpu_->cs.long_mode)
        cpu_->rip = static_cast<std::uint32_t>(cpu_->rip);
    cpu_->rflags &= ~rflags::resume;
}

Emulation Executor::done() {
    advance();
    return Done{};
}

Emulation Executor::software_event(std::uint8_t vector, EventKind kind) {
    advance();
    Event event = Event::software(vector, instruction_.length);
    event.kind = kind;
    return SoftwareEvent{event};
}

// --- Operands

Gpr Executor::reg_operand() const {
    return static_cast<Gpr>(instruction_.raw.modrm.reg | (instruction_.raw.rex.R << 3));
}

Gpr Executor::rm_operand() const {
    return static_cast<Gpr>(instruction_.raw.modrm.rm | (instruction_.raw.rex.B << 3));
}

/// The one memory operand; only for instructions that have one.
const ZydisDecodedOperand& Executor::memory_operand() {
    decode_operands();
    return operands_[0].type == ZYDIS_OPERAND_TYPE_MEMORY ? operands_[0] : operands_[1];
}

/// Writes as an instruction with that operand size does: 4 bytes clear the upper half, 1 and 2 leave the
/// rest.
void Executor::write_register(Gpr which, unsigned bytes, std::uint64_t value) {
    if (bytes >= 4) {
        reg(which) = bytes == 4 ? static_cast<std::uint32_t>(value) : value;
        return;
    }
    const std::uint64_t mask = (std::uint64_t{1} << (8 * bytes)) - 1;
    reg(which) = (reg(which) & ~mask) | (value & mask);
}

std::uint64_t Executor::effective_address(const ZydisDecodedOperand& operand) {
    const auto value_of = [this](ZydisRegister which) -> std::uint64_t {
        switch (ZydisRegisterGetClass(which)) {
        case ZYDIS_REGCLASS_GPR16:
        case ZYDIS_REGCLASS_GPR32:
        case ZYDIS_REGCLASS_GPR64:
            return reg(static_cast<Gpr>(ZydisRegisterGetId(which)));
        case ZYDIS_REGCLASS_IP:
            return cpu_->rip + instruction_.length;
        default: // no register
            return 0;
        }
    };
    const std::uint64_t sum = value_of(operand.mem.base) + value_of(operand.mem.index) * operand.mem.scale +
                              static_cast<std::uint64_t>(operand.mem.disp.value);
    switch (instruction_.address_width) {
    case 16:
        return static_cast<std::uint16_t>(sum);
    case 32:
        return static_cast<std::uint32_t>(sum);
    default:
        return sum;
    }
}

/// Segmentation: #SS(0) through SS, otherwise #GP(0) (Intel SDM vol. 3A, 5.3 and 5.3.1).
Fault Executor::linear_address(SegmentRegister which, std::uint64_t offset, std::size_t size, bool write,
                               GuestVirt& at) {
    const Segment& through = segment(*cpu_, which);
    const Exception violation = which == SegmentRegister::ss ? Exception{Vector::stack_fault, 0, {}}
                                                             : Exception::general_protection();
    if (cpu_->cs.long_mode) {
        const bool based = which == SegmentRegister::fs || which == SegmentRegister::gs;
        at = GuestVirt(offset + (based ? through.base : 0));
        if (!canonical(at.value()) || !canonical((at + (size - 1)).value()))
            return violation;
        return std::nullopt;
    }
    const auto address = address_in_segment(through, offset, size, write);
    if (!address)
        return violation;
    at = *address;
    return std::nullopt;
}

Fault Executor::operand_address(const ZydisDecodedOperand& operand, std::size_t size, bool write,
                                GuestVirt& at) {
    const auto which = static_cast<SegmentRegister>(ZydisRegisterGetId(operand.mem.segment));
    return linear_address(which, effective_address(operand), size, write, at);
}

template<class T>
Fault Executor::read_memory_operand(T& value) {
    GuestVirt at;
    if (auto fault = operand_address(memory_operand(), sizeof(T), false, at))
        return fault;
    return space_->read(at, value, access());
}

Fault Executor::read_rm16(std::uint16_t& value) {
    if (has_memory_operand())
        return read_memory_operand(value);
    value = static_cast<std::uint16_t>(reg(rm_operand()));
    return std::nullopt;
}

/// m16:16, m16:32 or m16:64 by operand size, or an immediate pointer.
Fault Executor::read_far_pointer(std::uint16_t& selector, std::uint64_t& offset) {
    decode_operands();
    if (operands_[0].type == ZYDIS_OPERAND_TYPE_POINTER) {
        selector = operands_[0].ptr.segment;
        offset = operands_[0].ptr.offset;
        return std::nullopt;
    }
    const std::size_t width = instruction_.operand_width / 8U;
    std::array<std::byte, 10> pointer{};
    GuestVirt at;
    if (auto fault = operand_address(memory_operand(), width + 2, false, at))
        return fault;
    if (auto fault = space_->read(at, std::span(pointer).first(width + 2), access()))
        return fault;
    offset = 0;
    std::memcpy(&offset, pointer.data(), width);
    std::memcpy(&selector, pointer.data() + width, sizeof(selector));
    return std::nullopt;
}

// --- The stack

/// The size of the stack pointer.
unsigned Executor::stack_bytes() const {
    if (cpu_->cs.long_mode)
        return 8;
    return cpu_->ss.default_32 ? 4 : 2;
}

void Executor::set_stack_pointer(std::uint64_t value) {
    write_register(Gpr::rsp, stack_bytes(), value);
}

/// Reads `items` of `width` bytes each, the first one `offset` bytes above the stack pointer.
Fault Executor::read_stack(std::uint64_t offset, unsigned width, std::span<std::uint64_t> items) {
    std::array<std::byte, 5 * sizeof(std::uint64_t)> block{};
    const auto bytes = std::span(block).first(items.size() * width);
    std::uint64_t pointer = reg(Gpr::rsp) + offset;
    if (stack_bytes() < 8)
        pointer &= (std::uint64_t{1} << (8 * stack_bytes())) - 1;
    GuestVirt at;
    if (auto fault = linear_address(SegmentRegister::ss, pointer, bytes.size(), false, at))
        return fault;
    if (auto fault = space_->read(at, bytes, access()))
        return fault;
    for (std::size_t i = 0; i < items.size(); ++i) {
        items[i] = 0;
        std::memcpy(&items[i], bytes.data() + i * width, width);
    }
    return std::nullopt;
}

// --- Which instruction

Emulation Executor::execute() {
    // Zydis knows some 1600 mnemonics; the default is all that run natively.
    switch (instruction_.mnemonic) {
    case ZYDIS_MNEMONIC_CLI:
        if (!io_flag_privileged())
            return general_protection();
        cpu_->rflags &= ~rflags::interrupt;
        return done();
    case ZYDIS_MNEMONIC_STI:
        return set_interrupt_flag();
    case ZYDIS_MNEMONIC_IN:
    case ZYDIS_MNEMONIC_OUT:
        return port_io();
    case ZYDIS_MNEMONIC_INSB:
    case ZYDIS_MNEMONIC_INSW:
    case ZYDIS_MNEMONIC_INSD:
    case ZYDIS_MNEMONIC_OUTSB:
    case ZYDIS_MNEMONIC_OUTSW:
    case ZYDIS_MNEMONIC_OUTSD:
        return string_io();
    case ZYDIS_MNEMONIC_MOV:
        return move();
    case ZYDIS_MNEMONIC_POP:
        return pop_segment();
    case ZYDIS_MNEMONIC_LAR:
    case ZYDIS_MNEMONIC_LSL:
    case ZYDIS_MNEMONIC_VERR:
    case ZYDIS_MNEMONIC_VERW:
        return examine_descriptor();
    case ZYDIS_MNEMONIC_LFS:
        return load_far_pointer(SegmentRegister::fs);
    case ZYDIS_MNEMONIC_LGS:
        return load_far_pointer(SegmentRegister::gs);
    case ZYDIS_MNEMONIC_LSS:
        return load_far_pointer(SegmentRegister::ss);
    case ZYDIS_MNEMONIC_LDS:
        return load_far_pointer(SegmentRegister::ds);
    case ZYDIS_MNEMONIC_LES:
        return load_far_pointer(SegmentRegister::es);
    case ZYDIS_MNEMONIC_JMP:
    case ZYDIS_MNEMONIC_CALL:
        if (instruction_.meta.branch_type != ZYDIS_BRANCH_TYPE_FAR)
            return NotSensitive{};
        return far_transfer(instruction_.mnemonic == ZYDIS_MNEMONIC_CALL);
    case ZYDIS_MNEMONIC_RET:
        return instruction_.meta.branch_type == ZYDIS_BRANCH_TYPE_FAR ? far_return() : NotSensitive{};
    case ZYDIS_MNEMONIC_IRET:
    case ZYDIS_MNEMONIC_IRETD:
    case ZYDIS_MNEMONIC_IRETQ:
        return interrupt_return();
    case ZYDIS_MNEMONIC_SYSCALL:
        if ((cpu_->efer & efer::sce) == 0 || !in_long_mode(*cpu_))
            return invalid_opcode();
        (void)emulate_syscall(*cpu_, GuestVirt(cpu_->rip + instruction_.length));
        return Done{.step = SingleStep::flags_after};
    case ZYDIS_MNEMONIC_INT:
        return software_event(static_cast<std::uint8_t>(instruction_.raw.imm[0].value.u),
                              EventKind::software_interrupt);
    case ZYDIS_MNEMONIC_INT3:
        return software_event(static_cast<std::uint8_t>(Vector::breakpoint), EventKind::software_exception);
    case ZYDIS_MNEMONIC_INTO:
        if ((cpu_->rflags & overflow_flag) == 0)
            return done();
        return software_event(static_cast<std::uint8_t>(Vector::overflow), EventKind::software_exception);
    case ZYDIS_MNEMONIC_INT1:
        return software_event(static_cast<std::uint8_t>(Vector::debug), EventKind::exception);
    case ZYDIS_MNEMONIC_SGDT:
        return store_descriptor_table(cpu_->gdtr);
    case ZYDIS_MNEMONIC_SIDT:
        return store_descriptor_table(cpu_->idtr);
    case ZYDIS_MNEMONIC_SLDT:
        return store_system_register(cpu_->ldtr.selector);
    case ZYDIS_MNEMONIC_STR:
        return store_system_register(cpu_->tr.selector);
    case ZYDIS_MNEMONIC_SMSW:
        return store_system_register(cpu_->cr0);
    case ZYDIS_MNEMONIC_CPUID: {
        const CpuidResult result = environment_->cpuid(static_cast<std::uint32_t>(reg(Gpr::rax)),
                                                       static_cast<std::uint32_t>(reg(Gpr::rcx)));
        reg(Gpr::rax) = result.eax;
        reg(Gpr::rbx) = result.ebx;
        reg(Gpr::rcx) = result.ecx;
        reg(Gpr::rdx) = result.edx;
        return done();
    }
    case ZYDIS_MNEMONIC_RDTSC:
    case ZYDIS_MNEMONIC_RDTSCP:
        return read_tsc();
    case ZYDIS_MNEMONIC_RDPMC:
        return read_counter();
    case ZYDIS_MNEMONIC_XSETBV:
        return set_xcr();
    case ZYDIS_MNEMONIC_STAC:
    case ZYDIS_MNEMONIC_CLAC:
        return access_flag();
    case ZYDIS_MNEMONIC_SYSRET:
        return system_return();
    case ZYDIS_MNEMONIC_SYSENTER:
        return fast_system_call();
    case ZYDIS_MNEMONIC_INVPCID:
        return invalidate_pcid();
    // Not offered by CPUID.
    case ZYDIS_MNEMONIC_MONITOR:
    case ZYDIS_MNEMONIC_MWAIT:
    case ZYDIS_MNEMONIC_MONITORX:
    case ZYDIS_MNEMONIC_MWAITX:
    case ZYDIS_MNEMONIC_RSM:
    case ZYDIS_MNEMONIC_GETSEC:
        return invalid_opcode();
    default:
        return execute_at_level_0();
    }
}

/// Instructions whose first check is CPL = 0.
Emulation Executor::execute_at_level_0() {
    // Virtual machine extensions are not offered.
    if (instruction_.meta.isa_ext == ZYDIS_ISA_EXT_VTX || instruction_.meta.isa_ext == ZYDIS_ISA_EXT_SVM)
        return invalid_opcode();
    constexpr ZydisInstructionAttributes privileged_attribute = ZYDIS_ATTRIB_IS_PRIVILEGED;
    const bool needs_level_0 = (instruction_.attributes & privileged_attribute) != 0 ||
                               instruction_.mnemonic == ZYDIS_MNEMONIC_LGDT; // not marked in Zydis 4.0
    if (!needs_level_0)
        return NotSensitive{};
    if (!privileged())
        return general_protection();
    switch (instruction_.mnemonic) {
    case ZYDIS_MNEMONIC_HLT:
        return halt();
    case ZYDIS_MNEMONIC_CLTS:
        cpu_->cr0 &= ~cr0::ts;
        return done();
    case ZYDIS_MNEMONIC_LMSW:
        return load_machine_status_word();
    case ZYDIS_MNEMONIC_LGDT:
        return load_descriptor_table(cpu_->gdtr);
    case ZYDIS_MNEMONIC_LIDT:
        return load_descriptor_table(cpu_->idtr);
    case ZYDIS_MNEMONIC_LLDT:
    case ZYDIS_MNEMONIC_LTR:
        return load_system_segment();
    case ZYDIS_MNEMONIC_INVLPG:
        return invalidate_page();
    case ZYDIS_MNEMONIC_INVD:   // caches are coherent with everything that the guest can reach
    case ZYDIS_MNEMONIC_WBINVD: // WBNOINVD too
        return done();
    case ZYDIS_MNEMONIC_RDMSR:
        return read_msr();
    case ZYDIS_MNEMONIC_WRMSR:
        return write_msr();
    case ZYDIS_MNEMONIC_SYSEXIT:
        return fast_system_return();
    case ZYDIS_MNEMONIC_SWAPGS:
        std::swap(cpu_->gs.base, cpu_->kernel_gs_base);
        return done();
    default:
        return Unsupported{ZydisMnemonicGetString(instruction_.mnemonic)};
    }
}

// --- Interrupt flag, HLT

Emulation Executor::set_interrupt_flag() {
    if (!io_flag_privileged())
        return general_protection();
    const bool was_set = cpu_->interrupts_enabled();
    cpu_->rflags |= rflags::interrupt;
    advance();
    if (was_set)
        return Done{};
    // STI; HLT in one go: no interrupt can come between, and its wake-up be lost.
    constexpr std::byte hlt{0xf4};
    if (instruction_.length < fetched_ && bytes_[instruction_.length] == hlt && privileged() && !steps()) {
        cpu_->rip += 1;
        cpu_->halted = true;
        return Halted{};
    }
    return Done{.interrupt_shadow = true};
}

Emulation Executor::halt() {
    advance();
    cpu_->halted = true;
    return Halted{};
}

// --- Port I/O

/// IOPL, or else the I/O permission bitmap (Intel SDM vol. 1, 18.5.2).
Fault Executor::check_port(std::uint16_t port, unsigned size) {
    if (io_flag_privileged())
        return std::nullopt;
    const Segment& tss = cpu_->tr;
    std::uint16_t map_base = 0;
    const bool has_map = (tss.type | 2) == descriptor_type::tss_busy; // a 16-bit TSS has none
    if (!tss.present || !has_map || tss.limit < tss_io_map_base + 1)
        return Exception::general_protection();
    if (auto fault = space_->read(linear(*cpu_, tss.base + tss_io_map_base), map_base))
        return fault;
    // The CPU always reads two bytes, as the ports may lie in both.
    const std::uint32_t offset = map_base + port / 8U;
    if (offset + 1 > tss.limit)
        return Exception::general_protection();
    std::uint16_t bits = 0;
    if (auto fault = space_->read(linear(*cpu_, tss.base + offset), bits))
        return fault;
    if (((bits >> (port % 8U)) & ((1U << size) - 1)) != 0)
        return Exception::general_protection();
    return std::nullopt;
}

Emulation Executor::port_io() {
    const bool write = instruction_.mnemonic == ZYDIS_MNEMONIC_OUT;
    const bool immediate = instruction_.raw.imm[0].size != 0;
    const auto port = static_cast<std::uint16_t>(immediate ? instruction_.raw.imm[0].value.u : reg(Gpr::rdx));
    const bool byte = (instruction_.opcode & 1) == 0;
    const unsigned size = byte ? 1 : instruction_.operand_width == 16 ? 2 : 4;
    if (auto fault = check_port(port, size))
        return raise(*fault);
    if (environment_->kernel_owns(port)) {
        advance();
        return PortAccess{port, static_cast<std::uint8_t>(size), write};
    }
    if (write) {
        const std::uint64_t mask = (std::uint64_t{1} << (8 * size)) - 1;
        environment_->port_write(port, size, static_cast<std::uint32_t>(reg(Gpr::rax) & mask));
    } else {
        write_register(Gpr::rax, size, environment_->port_read(port, size));
    }
    return done();
}

Emulation Executor::string_io() {
    const bool write = (instruction_.opcode & 2) != 0; // 6E and 6F are OUTS
    const bool byte = (instruction_.opcode & 1) == 0;
    const unsigned size = byte ? 1 : instruction_.operand_width == 16 ? 2 : 4;
    const auto port = static_cast<std::uint16_t>(reg(Gpr::rdx));
    if (auto fault = check_port(port, size))
        return raise(*fault);
    if (environment_->kernel_owns(port))
        return Unsupported{"string I/O at a port of an in-kernel device"};

    constexpr ZydisInstructionAttributes any_repeat =
        ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE;
    const bool repeated = (instruction_.attributes & any_repeat) != 0;
    const unsigned address_bytes = instruction_.address_width / 8U;
    const std::uint64_t address_mask =
        address_bytes == 8 ? ~std::uint64_t{0} : (std::uint64_t{1} << (8 * address_bytes)) - 1;
    const Gpr pointer = write ? Gpr::rsi : Gpr::rdi;
    const std::uint64_t step = (cpu_->rflags & rflags::direction) != 0 ? -std::uint64_t{size} : size;
    const ZydisDecodedOperand& memory = memory_operand();
    const unsigned chunk = steps() ? 1 : string_chunk;

    for (unsigned elements = 0;; ++elements) {
        if (repeated && (reg(Gpr::rcx) & address_mask) == 0)
            return done();
        if (elements == chunk)
            return Done{};
        GuestVirt at;
        if (auto fault = operand_address(memory, size, !write, at))
            return raise(*fault);
        std::uint32_t value = 0;
        const auto bytes = std::as_writable_bytes(std::span(&value, 1)).first(size);
        // For INS this finds a fault before the device is read, which cannot be undone.
        if (auto fault = space_->read(at, bytes, access(!write)))
            return raise(*fault);
        if (write) {
            environment_->port_write(port, size, value);
        } else {
            value = environment_->port_read(port, size);
            if (auto fault = space_->write(at, std::as_bytes(bytes), access()))
                return raise(*fault);
        }
        write_register(pointer, address_bytes, reg(pointer) + step);
        if (!repeated)
            return done();
        write_register(Gpr::rcx, address_bytes, reg(Gpr::rcx) - 1);
    }
}

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

// --- Descriptor tables and system segments

/// SLDT, STR, SMSW: 16 bits to memory, the operand size to a register.
Emulation Executor::store_system_register(std::uint64_t value) {
    if (umip_denies())
        return general_protection();
    if (!has_memory_operand()) {
        write_register(rm_operand(), instruction_.operand_width / 8U, value);
        return done();
    }
    const auto word = static_cast<std::uint16_t>(value);
    GuestVirt at;
    if (auto fault = operand_address(memory_operand(), sizeof(word), true, at))
        return raise(*fault);
    if (auto fault = space_->write(at, word, access()))
        return raise(*fault);
    return done();
}

Emulation Executor::store_descriptor_table(const DescriptorTable& table) {
    if (umip_denies())
        return general_protection();
    const std::uint64_t base = table.base.value();
    std::array<std::byte, 10> image{};
    std::memcpy(image.data(), &table.limit, sizeof(table.limit));
    std::memcpy(image.data() + sizeof(table.limit), &base, sizeof(base));
    const auto stored = std::span(image).first(cpu_->cs.long_mode ? 10 : 6);
    GuestVirt at;
    if (auto fault = operand_address(memory_operand(), stored.size(), true, at))
        return raise(*fault);
    if (auto fault = space_->write(at, std::as_bytes(stored), access()))
        return raise(*fault);
    return done();
}

/// m16&64 in 64-bit mode, otherwise m16&32, of whose base an operand size of 16 bits takes 24 bits.
Emulation Executor::load_descriptor_table(DescriptorTable& table) {
    std::array<std::byte, 10> image{};
    const auto loaded = std::span(image).first(cpu_->cs.long_mode ? 10 : 6);
    GuestVirt at;
    if (auto fault = operand_address(memory_operand(), loaded.size(), false, at))
        return raise(*fault);
    if (auto fault = space_->read(at, loaded, access()))
        return raise(*fault);
    std::uint64_t base = 0;
    std::memcpy(&base, image.data() + sizeof(table.limit), sizeof(base));
    if (!cpu_->cs.long_mode && instruction_.operand_width == 16)
        base &= 0xff'ffff;
    if (!canonical(base))
        return general_protection();
    std::memcpy(&table.limit, image.data(), sizeof(table.limit));
    table.base = GuestVirt(base);
    return done();
}

Emulation Executor::load_system_segment() {
    std::uint16_t selector = 0;
    if (auto fault = read_rm16(selector))
        return raise(*fault);
    const Fault fault = instruction_.mnemonic == ZYDIS_MNEMONIC_LLDT ? load_ldtr(*cpu_, *space_, selector)
                                                                     : load_tr(*cpu_, *space_, selector);
    return fault ? raise(*fault) : done();
}

// --- Segment registers

Emulation Executor::load_segment_register(SegmentRegister which, std::uint16_t selector) {
    if (auto fault = load_segment(*cpu_, *space_, which, selector))
        return raise(*fault);
    advance();
    if (which == SegmentRegister::ss)
        return Done{.interrupt_shadow = true, .step = SingleStep::held};
    return Done{};
}

Emulation Executor::pop_segment() {
    SegmentRegister which = SegmentRegister::es;
    switch (instruction_.opcode) {
    case 0x07: // the first three only in compatibility mode
        break;
    case 0x17:
        which = SegmentRegister::ss;
        break;
    case 0x1f:
        which = SegmentRegister::ds;
        break;
    case 0xa1:
        which = SegmentRegister::fs;
        break;
    case 0xa9:
        which = SegmentRegister::gs;
        break;
    default:
        return NotSensitive{};
    }
    // A slot of the operand size, of which the lower 16 bits are the selector.
    const unsigned width = instruction_.operand_width / 8U;
    std::uint64_t slot = 0;
    if (auto fault = read_stack(0, width, std::span(&slot, 1)))
        return raise(*fault);
    const std::uint64_t popped = reg(Gpr::rsp) + width;
    const unsigned pointer_bytes = stack_bytes(); // before SS changes
    Emulation result = load_segment_register(which, static_cast<std::uint16_t>(slot));
    if (std::holds_alternative<Done>(result))
        write_register(Gpr::rsp, pointer_bytes, popped);
    return result;
}

Emulation Executor::load_far_pointer(SegmentRegister which) {
    std::uint16_t selector = 0;
    std::uint64_t offset = 0;
    if (auto fault = read_far_pointer(selector, offset))
        return raise(*fault);
    if (auto fault = load_segment(*cpu_, *space_, which, selector))
        return raise(*fault);
    write_register(reg_operand(), instruction_.operand_width / 8U, offset);
    return done();
}

/// LAR, LSL, VERR and VERW (Intel SDM vol. 2): ZF tells whether the descriptor is one that they know.
Emulation Executor::examine_descriptor() {
    std::uint16_t selector = 0;
    if (auto fault = read_rm16(selector))
        return raise(*fault);
    VisibleDescriptor found;
    if (auto fault = find_visible_descriptor(*cpu_, *space_, selector, found))
        return raise(*fault);
    const Segment& segment = found.segment;
    // Among system descriptors: the TSS of 16 bits, its gates and the task gate are none in long mode.
    const auto among = [&](std::initializer_list<std::uint8_t> types,
                           std::initializer_list<std::uint8_t> legacy) {
        const auto has = [&](std::initializer_list<std::uint8_t> list) {
            return std::ranges::find(list, segment.type) != list.end();
        };
        return has(types) || (!in_long_mode(*cpu_) && has(legacy));
    };
    namespace type = descriptor_type;
    bool known = found.raw.has_value();
    std::optional<std::uint32_t> result;
    switch (instruction_.mnemonic) {
    case ZYDIS_MNEMONIC_LAR: {
        constexpr std::uint32_t rights =
            0x00f0'ff00; // the byte of the type and what is around the limit's bits
        known = known &&
                (!segment.system ||
                 among({type::ldt, type::tss_available, type::tss_busy, type::call_gate},
                       {type::tss_16_available, type::tss_16_busy, type::call_gate_16, type::task_gate}));
        result = static_cast<std::uint32_t>(found.raw.value_or(0) >> 32) & rights;
        break;
    }
    case ZYDIS_MNEMONIC_LSL:
        known = known && (!segment.system || among({type::ldt, type::tss_available, type::tss_busy},
                                                   {type::tss_16_available, type::tss_16_busy}));
        result = segment.limit;
        break;
    case ZYDIS_MNEMONIC_VERR:
        known = known && !segment.system && (!is_code(segment) || (segment.type & type::readable) != 0);
        break;
    default: // VERW
        known = known && is_writable_data(segment);
        break;
    }
    constexpr std::uint64_t zero_flag = 1U << 6;
    cpu_->rflags = known ? cpu_->rflags | zero_flag : cpu_->rflags & ~zero_flag;
    if (known && result)
        write_register(reg_operand(), instruction_.operand_width / 8U, *result);
    return done();
}

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

Emulation Executor::system_return() {
    if ((cpu_->efer & efer::sce) == 0 || !cpu_->cs.long_mode)
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
    cpu_->rflags = (reg(Gpr::r11) & sysret_flags) | rflags::fixed;
    cpu_->cs = flat_code_segment(code, 3, to_64_bit);
    cpu_->ss = flat_stack_segment(stack, 3);
    cpu_->cpl = 3;
    cpu_->rip = target;
    return Done{.step = SingleStep::flags_after};
}

/// Intel SDM vol. 2B, SYSENTER. AMD's CPUs have none in long mode; their kernels do not set its MSRs there.
Emulation Executor::fast_system_call() {
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

} // namespace

std::optional<std::array<std::uint64_t, 4>> CpuEnvironment::pdptes(std::uint64_t /*cr3*/) {
    return std::nullopt;
}

Emulation emulate(VirtualCpu& cpu, const GuestSpace& space, CpuEnvironment& environment,
                  const char** mnemonic) {
    if (const auto what = unsupported_mode(cpu))
        return Unsupported{*what};
    return Executor(cpu, space, environment).run(mnemonic);
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
