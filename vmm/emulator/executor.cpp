#include "vmm/emulator/executor.hpp"

namespace umbra {
namespace {

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

constexpr std::uint64_t overflow_flag = 1U << 11;

} // namespace

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
    case ZYDIS_MNEMONIC_SYSEXIT:
        return fast_system_return();
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
    case ZYDIS_MNEMONIC_SWAPGS:
        std::swap(cpu_->gs.base, cpu_->kernel_gs_base);
        return done();
    default:
        return Unsupported{ZydisMnemonicGetString(instruction_.mnemonic)};
    }
}

std::optional<std::array<std::uint64_t, 4>> CpuEnvironment::pdptes(std::uint64_t /*cr3*/) {
    return std::nullopt;
}

Emulation emulate(VirtualCpu& cpu, const GuestSpace& space, CpuEnvironment& environment,
                  const char** mnemonic) {
    if (const auto what = unsupported_mode(cpu))
        return Unsupported{*what};
    return Executor(cpu, space, environment).run(mnemonic);
}

} // namespace umbra
