#include "vmm/debug/operands.hpp"

#include <algorithm>
#include <array>

#include <Zydis/Zydis.h>

namespace umbra {
namespace {

struct Decoded {
    ZydisDecodedInstruction instruction;
    std::array<ZydisDecodedOperand, ZYDIS_MAX_OPERAND_COUNT> operands;
};

ZydisMachineMode machine_mode(CodeMode mode) {
    switch (mode) {
    case CodeMode::bits_16:
        return ZYDIS_MACHINE_MODE_LONG_COMPAT_16;
    case CodeMode::bits_32:
        return ZYDIS_MACHINE_MODE_LONG_COMPAT_32;
    case CodeMode::bits_64:
        return ZYDIS_MACHINE_MODE_LONG_64;
    }
    __builtin_unreachable();
}

ZydisStackWidth stack_width(CodeMode mode, bool wide_stack) {
    if (mode == CodeMode::bits_64)
        return ZYDIS_STACK_WIDTH_64;
    return wide_stack ? ZYDIS_STACK_WIDTH_32 : ZYDIS_STACK_WIDTH_16;
}

/// `wide_stack`: SS.B, which outside 64-bit mode tells SP from ESP, whatever code runs.
std::optional<Decoded> decode(std::span<const std::byte> code, CodeMode mode, bool wide_stack) {
    ZydisDecoder decoder;
    const ZydisStackWidth stack = stack_width(mode, wide_stack);
    Decoded decoded{};
    if (code.empty() || !ZYAN_SUCCESS(ZydisDecoderInit(&decoder, machine_mode(mode), stack)) ||
        !ZYAN_SUCCESS(ZydisDecoderDecodeFull(&decoder, code.data(), code.size(), &decoded.instruction,
                                             decoded.operands.data())))
        return std::nullopt;
    return decoded;
}

std::uint64_t mask_of(unsigned bits) {
    return bits >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << bits) - 1;
}

/// The value of a general register of any width, sign ignored; nothing for other registers.
std::optional<std::uint64_t> value_of(const VirtualCpu& cpu, ZydisRegister name, std::uint64_t next_rip) {
    if (name == ZYDIS_REGISTER_NONE)
        return 0;
    if (name == ZYDIS_REGISTER_RIP || name == ZYDIS_REGISTER_EIP)
        return next_rip;
    const ZydisRegister whole = ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, name);
    if (ZydisRegisterGetClass(whole) != ZYDIS_REGCLASS_GPR64)
        return std::nullopt;
    const auto number = static_cast<std::uint8_t>(ZydisRegisterGetId(whole));
    const std::uint64_t value = cpu.gpr[number];
    const bool high_byte = name == ZYDIS_REGISTER_AH || name == ZYDIS_REGISTER_BH ||
                           name == ZYDIS_REGISTER_CH || name == ZYDIS_REGISTER_DH;
    if (high_byte)
        return value >> 8 & 0xff;
    return value & mask_of(ZydisRegisterGetWidth(ZYDIS_MACHINE_MODE_LONG_64, name));
}

std::uint64_t base_of(const VirtualCpu& cpu, ZydisRegister segment, bool mode64) {
    switch (segment) {
    case ZYDIS_REGISTER_FS:
        return cpu.fs.base;
    case ZYDIS_REGISTER_GS:
        return cpu.gs.base;
    case ZYDIS_REGISTER_ES:
        return mode64 ? 0 : cpu.es.base;
    case ZYDIS_REGISTER_CS:
        return mode64 ? 0 : cpu.cs.base;
    case ZYDIS_REGISTER_SS:
        return mode64 ? 0 : cpu.ss.base;
    case ZYDIS_REGISTER_DS:
        return mode64 ? 0 : cpu.ds.base;
    default: // Zydis' registers are many, and no other one is a segment's
        return 0;
    }
}

/// The machine's stack operations move RSP before a push uses it.
bool pushes(const ZydisDecodedInstruction& instruction) {
    switch (instruction.meta.category) {
    case ZYDIS_CATEGORY_PUSH:
    case ZYDIS_CATEGORY_CALL:
        return true;
    default: // of more than a hundred
        return instruction.mnemonic == ZYDIS_MNEMONIC_ENTER;
    }
}

/// An implied operand on the stack, whose address has the stack's width and not the instruction's. LEAVE
/// finds it by RBP, which it makes the stack pointer first.
bool on_stack(const ZydisDecodedInstruction& instruction, const ZydisDecodedOperand& operand) {
    return operand.visibility == ZYDIS_OPERAND_VISIBILITY_HIDDEN &&
           (operand.mem.base == ZYDIS_REGISTER_RSP || operand.mem.base == ZYDIS_REGISTER_ESP ||
            operand.mem.base == ZYDIS_REGISTER_SP || instruction.mnemonic == ZYDIS_MNEMONIC_LEAVE);
}

/// BT, BTS, BTR, BTC with a register: the bit may lie anywhere around the operand (Intel SDM vol. 2A, BT).
std::optional<std::int64_t> bit_displacement(const VirtualCpu& cpu, const Decoded& decoded) {
    switch (decoded.instruction.mnemonic) {
    case ZYDIS_MNEMONIC_BT:
    case ZYDIS_MNEMONIC_BTC:
    case ZYDIS_MNEMONIC_BTR:
    case ZYDIS_MNEMONIC_BTS:
        break;
    default: // every other instruction
        return std::nullopt;
    }
    const ZydisDecodedOperand& bit = decoded.operands[1];
    if (bit.type != ZYDIS_OPERAND_TYPE_REGISTER)
        return std::nullopt;
    const auto raw = value_of(cpu, bit.reg.value, 0);
    if (!raw)
        return std::nullopt;
    const unsigned width = decoded.operands[0].size;
    const unsigned unused = 64 - width;
    const std::int64_t offset = static_cast<std::int64_t>(*raw << unused) >> unused;
    return (offset >> (width == 16 ? 4 : width == 32 ? 5 : 6)) * (width / 8);
}

/// Instructions that name memory and do not access it as data.
bool accesses_nothing(ZydisMnemonic mnemonic, ZydisInstructionCategory category) {
    switch (mnemonic) {
    case ZYDIS_MNEMONIC_LEA:
    case ZYDIS_MNEMONIC_NOP:
    case ZYDIS_MNEMONIC_INVLPG:
    case ZYDIS_MNEMONIC_CLFLUSH:
    case ZYDIS_MNEMONIC_CLFLUSHOPT:
    case ZYDIS_MNEMONIC_CLWB:
    case ZYDIS_MNEMONIC_CLDEMOTE:
    case ZYDIS_MNEMONIC_MONITOR:
    case ZYDIS_MNEMONIC_PREFETCHWT1:
        return true;
    default: // of more than a thousand
        return category == ZYDIS_CATEGORY_PREFETCH || category == ZYDIS_CATEGORY_WIDENOP;
    }
}

/// Instructions whose bytes are not theirs to tell: registers, memory or the CPU decide on how many or which.
bool untold(const Decoded& decoded, CodeMode mode) {
    const ZydisDecodedInstruction& instruction = decoded.instruction;
    switch (instruction.meta.category) {
    case ZYDIS_CATEGORY_XSAVE:
    case ZYDIS_CATEGORY_XSAVEOPT:
        return true;
    default: // of more than a hundred
        break;
    }
    switch (instruction.mnemonic) {
    case ZYDIS_MNEMONIC_ENTER: // reads and writes whole frames of outer procedures, if there are any
        return (decoded.operands[1].imm.value.u & 0x1f) != 0;
    case ZYDIS_MNEMONIC_IRET: // pops more if it leads to an outer privilege level
    case ZYDIS_MNEMONIC_IRETD:
        return mode != CodeMode::bits_64;
    case ZYDIS_MNEMONIC_CLZERO: // a cache line
    case ZYDIS_MNEMONIC_MASKMOVQ:
    case ZYDIS_MNEMONIC_MASKMOVDQU:
    case ZYDIS_MNEMONIC_VMASKMOVDQU:
    case ZYDIS_MNEMONIC_VMASKMOVPS:
    case ZYDIS_MNEMONIC_VMASKMOVPD:
    case ZYDIS_MNEMONIC_VPMASKMOVD:
    case ZYDIS_MNEMONIC_VPMASKMOVQ:
        return true;
    default: // of more than a thousand
        return instruction.avx.mask.reg != ZYDIS_REGISTER_NONE &&
               instruction.avx.mask.reg != ZYDIS_REGISTER_K0;
    }
}

/// A repeated string instruction whose count is used up does nothing.
bool repeats_no_more(const VirtualCpu& cpu, const ZydisDecodedInstruction& instruction) {
    constexpr ZydisInstructionAttributes repeated =
        ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE;
    return (instruction.attributes & repeated) != 0 &&
           (cpu[Gpr::rcx] & mask_of(instruction.address_width)) == 0;
}

} // namespace

CodeMode code_mode(const VirtualCpu& cpu) {
    if ((cpu.efer & efer::lma) != 0 && cpu.cs.long_mode)
        return CodeMode::bits_64;
    return cpu.cs.default_32 ? CodeMode::bits_32 : CodeMode::bits_16;
}

std::optional<std::vector<MemoryAccess>> memory_accesses(const VirtualCpu& cpu,
                                                         std::span<const std::byte> code) {
    const CodeMode mode = code_mode(cpu);
    const auto decoded = decode(code, mode, cpu.ss.default_32);
    if (!decoded)
        return std::nullopt;
    const ZydisDecodedInstruction& instruction = decoded->instruction;
    std::vector<MemoryAccess> accesses;
    if (accesses_nothing(instruction.mnemonic, instruction.meta.category) ||
        repeats_no_more(cpu, instruction))
        return accesses;
    if (untold(*decoded, mode))
        return std::nullopt;
    const bool mode64 = mode == CodeMode::bits_64;
    const std::uint64_t next_rip = cpu.rip + instruction.length;
    for (const ZydisDecodedOperand& operand : std::span(decoded->operands).first(instruction.operand_count)) {
        if (operand.type != ZYDIS_OPERAND_TYPE_MEMORY)
            continue;
        if (operand.mem.type != ZYDIS_MEMOP_TYPE_MEM || operand.size == 0)
            return std::nullopt;
        const bool read = (operand.actions & ZYDIS_OPERAND_ACTION_MASK_READ) != 0;
        const bool write = (operand.actions & ZYDIS_OPERAND_ACTION_MASK_WRITE) != 0;
        const auto base = value_of(cpu, operand.mem.base, next_rip);
        const auto index = value_of(cpu, operand.mem.index, next_rip);
        if (!base || !index)
            return std::nullopt;
        const std::uint64_t size = operand.size / 8;
        std::uint64_t offset = *base + *index * std::max<std::uint64_t>(operand.mem.scale, 1);
        if (operand.mem.disp.has_displacement)
            offset += static_cast<std::uint64_t>(operand.mem.disp.value);
        const bool stack = on_stack(instruction, operand);
        if (stack && write && pushes(instruction))
            offset -= size;
        // POP computes the address of its operand after it has moved RSP (Intel SDM vol. 2B, POP).
        const bool by_stack_pointer =
            operand.mem.base == ZYDIS_REGISTER_RSP || operand.mem.base == ZYDIS_REGISTER_ESP;
        if (!stack && by_stack_pointer && instruction.meta.category == ZYDIS_CATEGORY_POP)
            offset += size;
        if (instruction.mnemonic == ZYDIS_MNEMONIC_XLAT) // Zydis names no index
            offset += cpu[Gpr::rax] & 0xff;
        if (const auto bits = bit_displacement(cpu, *decoded))
            offset += static_cast<std::uint64_t>(*bits);
        offset &= mask_of(stack ? instruction.stack_width : instruction.address_width);
        std::uint64_t linear = base_of(cpu, operand.mem.segment, mode64) + offset;
        if (!mode64)
            linear &= mask_of(32);
        accesses.push_back({GuestVirt(linear), size, read, write});
    }
    return accesses;
}

StepKind step_kind(std::span<const std::byte> code, CodeMode mode) {
    const auto decoded = decode(code, mode, mode != CodeMode::bits_16);
    if (!decoded)
        return StepKind::plain;
    switch (decoded->instruction.mnemonic) {
    case ZYDIS_MNEMONIC_PUSHF:
    case ZYDIS_MNEMONIC_PUSHFD:
    case ZYDIS_MNEMONIC_PUSHFQ:
        return StepKind::pushes_flags;
    case ZYDIS_MNEMONIC_POPF:
    case ZYDIS_MNEMONIC_POPFD:
    case ZYDIS_MNEMONIC_POPFQ:
        return StepKind::pops_flags;
    case ZYDIS_MNEMONIC_CLI:
    case ZYDIS_MNEMONIC_STI:
    case ZYDIS_MNEMONIC_IN:
    case ZYDIS_MNEMONIC_OUT:
        return StepKind::by_iopl;
    case ZYDIS_MNEMONIC_INSB:
    case ZYDIS_MNEMONIC_INSW:
    case ZYDIS_MNEMONIC_INSD:
    case ZYDIS_MNEMONIC_OUTSB:
    case ZYDIS_MNEMONIC_OUTSW:
    case ZYDIS_MNEMONIC_OUTSD:
        return StepKind::string_io;
    case ZYDIS_MNEMONIC_INT1:
        return StepKind::int1;
    default: // all others
        return StepKind::plain;
    }
}

} // namespace umbra
