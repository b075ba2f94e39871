#include "vmm/stuck_watch.hpp"

#include <algorithm>
#include <array>
#include <utility>

#include <Zydis/Zydis.h>
#include <fmt/core.h>

namespace umbra {
namespace {

constexpr std::size_t max_instruction_length = 15;
constexpr unsigned max_fillers = 2; ///< PAUSE and NOP

/// What counts of an instruction.
struct Step {
    enum class Kind : std::uint8_t { other, filler, jump };
    Kind kind = Kind::other;
    std::uint64_t next = 0; ///< RIP behind it
};

Step decode(std::span<const std::byte> code, std::uint64_t rip, bool long_mode) {
    ZydisDecoder decoder;
    ZydisDecodedInstruction instruction;
    std::array<ZydisDecodedOperand, ZYDIS_MAX_OPERAND_COUNT> operands{};
    const auto mode = long_mode ? ZYDIS_MACHINE_MODE_LONG_64 : ZYDIS_MACHINE_MODE_LONG_COMPAT_32;
    const auto width = long_mode ? ZYDIS_STACK_WIDTH_64 : ZYDIS_STACK_WIDTH_32;
    if (code.empty() || !ZYAN_SUCCESS(ZydisDecoderInit(&decoder, mode, width)) ||
        !ZYAN_SUCCESS(
            ZydisDecoderDecodeFull(&decoder, code.data(), code.size(), &instruction, operands.data())))
        return {};
    const std::uint64_t behind = rip + instruction.length;
    if (instruction.mnemonic == ZYDIS_MNEMONIC_NOP || instruction.mnemonic == ZYDIS_MNEMONIC_PAUSE)
        return {Step::Kind::filler, behind};
    // With a prefix, its operand may have another size, which CPUs do not agree on.
    const bool direct_jump =
        instruction.mnemonic == ZYDIS_MNEMONIC_JMP && instruction.raw.prefix_count == 0 &&
        operands[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE && operands[0].imm.is_relative == ZYAN_TRUE;
    if (direct_jump)
        return {Step::Kind::jump, behind + static_cast<std::uint64_t>(operands[0].imm.value.s)};
    return {};
}

/// The instruction bytes at `rip` that the CPU can fetch, of one page: an instruction that is in two is none
/// for us.
std::size_t fetch(const VirtualCpu& cpu, const GuestSpace& space, std::uint64_t rip,
                  std::span<std::byte> into) {
    std::uint64_t at = rip, size = into.size();
    if (!cpu.cs.long_mode) {
        if (rip > cpu.cs.limit)
            return 0;
        size = std::min<std::uint64_t>(size, cpu.cs.limit - rip + 1);
        at = static_cast<std::uint32_t>(cpu.cs.base + rip);
    }
    size = std::min<std::uint64_t>(size, page_size - GuestVirt(at).page_offset());
    const Access access{.fetch = true, .user = cpu.cpl == 3};
    return space.read(GuestVirt(at), into.first(size), access) ? 0 : size;
}

} // namespace

bool jumps_to_itself(const VirtualCpu& cpu, const GuestSpace& space) {
    constexpr std::uint64_t breakpoints = 0xff; // those that DR7 enables
    if ((cpu.rflags & (rflags::interrupt | rflags::trap | rflags::virtual_8086)) != 0 ||
        (cpu.dr7 & breakpoints) != 0 || (!cpu.cs.long_mode && !cpu.cs.default_32))
        return false;
    std::uint64_t rip = cpu.rip;
    unsigned fillers = 0, jumps = 0;
    do {
        std::array<std::byte, max_instruction_length> bytes{};
        const std::size_t size = fetch(cpu, space, rip, bytes);
        const Step step = decode(std::span(bytes).first(size), rip, cpu.cs.long_mode);
        fillers += step.kind == Step::Kind::filler ? 1 : 0;
        jumps += step.kind == Step::Kind::jump ? 1 : 0;
        if (step.kind == Step::Kind::other || fillers > max_fillers || jumps > 1)
            return false;
        rip = cpu.cs.long_mode ? step.next : static_cast<std::uint32_t>(step.next);
    } while (rip != cpu.rip);
    return jumps == 1;
}

std::optional<Verdict> StuckWatch::look(const VirtualCpu& cpu, const GuestSpace& space, std::uint64_t exits) {
    if (cpu.halted) {
        if ((cpu.rflags & rflags::interrupt) == 0)
            return Verdict{Verdict::Kind::no_progress, 0, "the guest halted with interrupts off"};
        return std::nullopt;
    }
    if (!jumps_to_itself(cpu, space)) {
        jumped_.reset();
        return std::nullopt;
    }
    const auto before = std::exchange(jumped_, exits);
    if (!before || exits != *before + 1)
        return std::nullopt;
    return Verdict{Verdict::Kind::no_progress, 0,
                   fmt::format("the guest jumps to itself at {:#x} with interrupts off", cpu.rip)};
}

} // namespace umbra
