#include "vmm/missing_feature.hpp"

#include "vmm/msr.hpp"

#include <array>

#include <Zydis/Zydis.h>

namespace umbra {
namespace {

constexpr std::uint64_t apic_base_x2apic = 1U << 10; // Intel SDM vol. 4, table 2-2

std::optional<CpuFeature> of_cr4(std::uint64_t value, std::uint64_t allowed) {
    for (std::size_t i = 0; i < cpu_feature_count; ++i)
        if (const auto feature = static_cast<CpuFeature>(i); (cr4_bit(feature) & value & ~allowed) != 0)
            return feature;
    return std::nullopt;
}

std::optional<CpuFeature> of_msr(std::uint32_t index, const CpuFeatures& features) {
    if (index >= msr::x2apic_first && index <= msr::x2apic_last && !features.x2apic)
        return CpuFeature::x2apic;
    if (index == msr::tsc_deadline && !features.tsc_deadline)
        return CpuFeature::tsc_deadline;
    return std::nullopt;
}

} // namespace

std::optional<CpuFeature> missing_feature(const VirtualCpu& cpu, std::span<const std::byte> code,
                                          const CpuFeatures& features) {
    ZydisDecoder decoder;
    ZydisDecoderInit(&decoder,
                     cpu.cs.long_mode ? ZYDIS_MACHINE_MODE_LONG_64 : ZYDIS_MACHINE_MODE_LONG_COMPAT_32,
                     cpu.cs.long_mode ? ZYDIS_STACK_WIDTH_64 : ZYDIS_STACK_WIDTH_32);
    ZydisDecodedInstruction instruction;
    std::array<ZydisDecodedOperand, ZYDIS_MAX_OPERAND_COUNT> operands{};
    if (code.empty() || !ZYAN_SUCCESS(ZydisDecoderDecodeFull(&decoder, code.data(), code.size(), &instruction,
                                                             operands.data())))
        return std::nullopt;
    const auto index = static_cast<std::uint32_t>(cpu[Gpr::rcx]);
    switch (instruction.mnemonic) {
    case ZYDIS_MNEMONIC_MOV:
        if (operands[0].type == ZYDIS_OPERAND_TYPE_REGISTER && operands[0].reg.value == ZYDIS_REGISTER_CR4)
            return of_cr4(cpu.gpr.at(static_cast<std::size_t>(ZydisRegisterGetId(operands[1].reg.value))),
                          features.cr4);
        return std::nullopt;
    case ZYDIS_MNEMONIC_WRMSR:
        if (index == msr::apic_base && (cpu[Gpr::rax] & apic_base_x2apic) != 0 && !features.x2apic)
            return CpuFeature::x2apic;
        return of_msr(index, features);
    case ZYDIS_MNEMONIC_RDMSR:
        return of_msr(index, features);
    case ZYDIS_MNEMONIC_STAC:
    case ZYDIS_MNEMONIC_CLAC:
        return of_cr4(cr4::smap, features.cr4);
    case ZYDIS_MNEMONIC_RDFSBASE:
    case ZYDIS_MNEMONIC_RDGSBASE:
    case ZYDIS_MNEMONIC_WRFSBASE:
    case ZYDIS_MNEMONIC_WRGSBASE:
        return of_cr4(cr4::fsgsbase, features.cr4);
    default:
        return std::nullopt;
    }
}

} // namespace umbra
