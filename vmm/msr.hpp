// Indices of the model-specific registers that more than one place knows (Intel SDM vol. 4, table 2-2; AMD
// APM vol. 2, appendix A). What a guest gets from each: vmm/msr_policy.cpp.
#pragma once

#include <cstdint>

namespace umbra::msr {

inline constexpr std::uint32_t tsc = 0x10, apic_base = 0x1b, tsc_adjust = 0x3b;
inline constexpr std::uint32_t sysenter_cs = 0x174, sysenter_esp = 0x175, sysenter_eip = 0x176, pat = 0x277;
inline constexpr std::uint32_t tsc_deadline = 0x6e0;
inline constexpr std::uint32_t x2apic_first = 0x800, x2apic_task_priority = 0x808, x2apic_last = 0x8ff;
inline constexpr std::uint32_t efer = 0xc000'0080, star = 0xc000'0081, lstar = 0xc000'0082,
                               cstar = 0xc000'0083, fmask = 0xc000'0084;
inline constexpr std::uint32_t fs_base = 0xc000'0100, gs_base = 0xc000'0101, kernel_gs_base = 0xc000'0102,
                               tsc_aux = 0xc000'0103;
inline constexpr std::uint32_t perf_ctr0 = 0xc001'0004; ///< AMD's, the first of four

} // namespace umbra::msr
