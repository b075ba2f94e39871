// Which feature of `--cpu` an instruction needed that the guest's CPU has refused: kernels that are written
// for CPUs of today set CR4 bits and write MSRs without asking CPUID first, and die by the #GP.
#pragma once

#include "vmm/cpu.hpp"
#include "vmm/cpu_model.hpp"

#include <cstddef>
#include <optional>
#include <span>

namespace umbra {

/// `cpu` is about to run what is at the start of `code`. Nothing if it needs no feature, or one that is there
/// (`features`), or if `code` is not a whole instruction.
[[nodiscard]] std::optional<CpuFeature>
missing_feature(const VirtualCpu& cpu, std::span<const std::byte> code, const CpuFeatures& features);

} // namespace umbra
