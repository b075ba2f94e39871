// The small guest of the unit tests in legacy protected mode: a CPU at privilege level 0 in 32-bit code,
// without paging or with a 32-bit identity map.
#pragma once

#include "tests/unit/test_guest.hpp"

namespace umbra::test {

/// Selectors that only the legacy guest has.
namespace sel {
inline constexpr std::uint16_t code_16 = 0xc0, based_code = 0xc8, conforming_code_32 = 0xd0,
                               based_data = 0xd8, expand_down_data = 0xe0, stack_16 = 0xe8, tss_16 = 0xf0,
                               call_gate_16 = 0xf8, task_gate = 0x100, level_1_code = 0x109,
                               level_1_data = 0x111, absent_code_32 = 0x118, busy_tss_16 = 0x120,
                               user_conforming_code_32 = 0x12b, expand_down_16 = 0x130,
                               execute_only_code_32 = 0x138;
} // namespace sel

class LegacyGuest : public TestGuest {
  public:
    static constexpr std::uint32_t page_directory = 0x5000, page_table = 0x6000;
    static constexpr std::uint32_t segment_base = 0x1000;   ///< of based_code and based_data
    static constexpr std::uint32_t segment_limit = 0x4ffff; ///< of the same

    LegacyGuest() {
        using namespace access_byte;
        constexpr std::uint8_t byte_32 = 0x4; // D, byte granularity
        descriptor(gdt, sel::code_16, kernel_code, flags_16, 0, 0xf'ffff);
        descriptor(gdt, sel::based_code, kernel_code, byte_32, segment_base, segment_limit);
        descriptor(gdt, sel::conforming_code_32, kernel_code | conforming, flags_32);
        descriptor(gdt, sel::based_data, kernel_data, byte_32, segment_base, segment_limit);
        descriptor(gdt, sel::expand_down_data, kernel_data | expand_down, byte_32, 0, 0x4'1000 - 1);
        descriptor(gdt, sel::stack_16, kernel_data, flags_16, segment_base, 0xffff);
        descriptor(gdt, sel::tss_16, 0x81, flags_16, tss, 0x2b);
        descriptor(gdt, sel::call_gate_16, 0x84, 0);
        descriptor(gdt, sel::task_gate, 0x85, 0);
        descriptor(gdt, sel::level_1_code, kernel_code | level_1, flags_32);
        descriptor(gdt, sel::level_1_data, kernel_data | level_1, flags_32);
        descriptor(gdt, sel::absent_code_32, kernel_code - present, flags_32);
        descriptor(gdt, sel::busy_tss_16, 0x83, flags_16, tss, 0x2b);
        descriptor(gdt, sel::user_conforming_code_32, access_byte::user_code | conforming, flags_32);
        descriptor(gdt, sel::expand_down_16, kernel_data | expand_down, flags_16, 0, 0xfff);
        descriptor(gdt, sel::execute_only_code_32, kernel_code - read_or_write, flags_32);
        cpu.gdtr.limit = 0x13f;
        cpu.idtr.limit = 0x7ff;
        cpu.efer = 0;
        cpu.cr0 = cr0::pe | cr0::et | cr0::ne;
        cpu.cr3 = 0;
        cpu.cr4 = 0;
        // The 32-bit TSS.
        put(tss + 4, static_cast<std::uint32_t>(kernel_stack));
        put(tss + 8, std::uint32_t{sel::kernel_data});
        put(tss + 12, static_cast<std::uint32_t>(interrupt_stack));
        put(tss + 16, std::uint32_t{sel::level_1_data});
        enter_kernel();
    }

    void enter_kernel() {
        cpu.cpl = 0;
        cpu.cs = segment(sel::kernel_code_32, 0xb, 0, false);
        for (Segment* reg : {&cpu.ss, &cpu.ds, &cpu.es})
            *reg = segment(sel::kernel_data, 0x3, 0, false);
        cpu.rip = code;
        cpu[Gpr::rsp] = kernel_stack;
    }
    void enter_user() { TestGuest::enter_user(false); }
    /// TR: a 16-bit TSS at the place of the other one, with level 0's stack.
    void use_16_bit_tss(std::uint16_t stack_segment, std::uint16_t pointer) {
        put(tss + 2, pointer);
        put(tss + 4, stack_segment);
        cpu.tr.selector = sel::busy_tss_16;
        cpu.tr.type = 0x3;
        cpu.tr.limit = 0x2b;
    }
    /// 32-bit paging by an identity map, with the rights that map_32() may change.
    void enable_paging() {
        put(page_directory, page_table | static_cast<std::uint32_t>(all_rights));
        for (std::uint32_t at = 0; at < ram_size; at += page_size)
            map_32(at, at >= user_code && at < kernel_stack - 0x2000          ? all_rights
                       : at >= user_stack - 0x2000 && at < user_data + 0x2000 ? all_rights
                                                                              : kernel_rights);
        cpu.cr3 = page_directory;
        cpu.cr0 |= cr0::pg | cr0::wp;
    }
    void map_32(std::uint64_t at, std::uint64_t bits) {
        put(page_table + (at >> page_shift) * 4, static_cast<std::uint32_t>(bits == 0 ? 0 : at | bits));
    }

  private:
    static constexpr std::uint8_t expand_down = 4, level_1 = 1U << 5;
};

} // namespace umbra::test
