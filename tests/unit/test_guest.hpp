// A small guest in plain memory for the tests of the virtual CPU: RAM with real page tables, descriptor
// tables, a TSS, stacks, and a CPU in long mode at privilege level 0.
#pragma once

#include "vmm/cpu.hpp"
#include "vmm/guest_space.hpp"

#include <array>
#include <cstring>
#include <initializer_list>
#include <ostream>
#include <vector>

namespace umbra::test {

/// Selectors of the test guest's GDT.
namespace sel {
inline constexpr std::uint16_t kernel_code = 0x08, kernel_data = 0x10, user_code_32 = 0x1b, user_data = 0x23,
                               user_code = 0x2b, tss = 0x30, ldt = 0x40, conforming_code = 0x50,
                               absent_code = 0x58, absent_data = 0x60, read_only_data = 0x68,
                               execute_only_code = 0x70, call_gate = 0x78, long_and_default_code = 0x88,
                               kernel_code_32 = 0x90, absent_user_code = 0x9b, absent_user_data = 0xa3,
                               user_conforming_code = 0xab, user_data_16 = 0xb3;
inline constexpr std::uint16_t beyond = 0x200;    ///< outside the table
inline constexpr std::uint16_t local_data = 0x0c; ///< in the LDT
} // namespace sel

/// Access bytes of descriptors (P, DPL, S, type); none is accessed yet.
namespace access_byte {
inline constexpr std::uint8_t kernel_code = 0x9a, kernel_data = 0x92, user_code = 0xfa, user_data = 0xf2;
inline constexpr std::uint8_t present = 0x80, conforming = 4, read_or_write = 2;
} // namespace access_byte

class TestGuest {
  public:
    // Where things lie, in an identity map. All is for the kernel but the user pages.
    static constexpr std::uint64_t ram_size = 0x20'0000;
    static constexpr std::uint64_t gdt = 0x1'0000, idt = 0x1'1000, tss = 0x1'2000, ldt = 0x1'3000;
    static constexpr std::uint64_t code = 0x2'0000, data = 0x2'8000, handlers = 0x2'9000;
    static constexpr std::uint64_t kernel_stack = 0x4'2000, interrupt_stack = 0x6'2000; ///< tops
    static constexpr std::uint64_t user_code = 0x3'0000, user_stack = 0x5'2000, user_data = 0x5'4000;
    static constexpr std::uint64_t non_canonical = 0x8000'0000'0000;
    static constexpr std::uint16_t gdt_limit = 0xbf;
    static constexpr std::uint32_t tss_limit = 0x467; ///< with an I/O map for ports below 0x1ff8

    // Flags of descriptors above the limit: G, D, L.
    static constexpr std::uint8_t flags_64 = 0xa, flags_32 = 0xc, flags_16 = 0x0;

    TestGuest() {
        put<std::uint64_t>(0x1000, 0x2000 | all_rights);
        put<std::uint64_t>(0x2000, 0x3000 | all_rights);
        put<std::uint64_t>(0x3000, 0x4000 | all_rights);
        for (std::uint64_t at = 0; at < ram_size; at += page_size)
            map(at, at >= user_code && at < user_code + 0x4000             ? all_rights
                    : at >= user_stack - 0x2000 && at < user_data + 0x2000 ? all_rights
                                                                           : kernel_rights);
        build_gdt();
        build_tss();
        cpu.efer = efer::sce | efer::lme | efer::lma | efer::nxe;
        cpu.cr0 = cr0::pe | cr0::et | cr0::ne | cr0::wp | cr0::am | cr0::pg;
        cpu.cr3 = 0x1000;
        cpu.cr4 = cr4::pae | cr4::pge;
        cpu.gdtr = {GuestVirt(gdt), gdt_limit};
        cpu.idtr = {GuestVirt(idt), 0xfff};
        enter_kernel();
    }

    /// The CPU's view of memory in its current state.
    [[nodiscard]] GuestSpace space() const { return {memory_, guest_paging(cpu, 48, true)}; }
    [[nodiscard]] const GuestMemory& memory() const { return memory_; }

    void enter_kernel() {
        cpu.cpl = 0;
        cpu.cs = segment(sel::kernel_code, 0xb, 0, true);
        cpu.ss = segment(sel::kernel_data, 0x3, 0, false);
        cpu.rip = code;
        cpu[Gpr::rsp] = kernel_stack;
    }
    void enter_user(bool mode64 = true) {
        cpu.cpl = 3;
        cpu.cs = segment(mode64 ? sel::user_code : sel::user_code_32, 0xb, 3, mode64);
        for (Segment* reg : {&cpu.ss, &cpu.ds, &cpu.es})
            *reg = segment(sel::user_data, 0x3, 3, false);
        cpu.rip = user_code;
        cpu[Gpr::rsp] = user_stack;
    }

    template<class T>
    void put(std::uint64_t at, const T& value) {
        std::memcpy(ram_.data() + at, &value, sizeof(T));
    }
    template<class T>
    [[nodiscard]] T get(std::uint64_t at) const {
        T value;
        std::memcpy(&value, ram_.data() + at, sizeof(T));
        return value;
    }

    /// Page-table entry bits of an identity-mapped page; 0 unmaps it.
    void map(std::uint64_t at, std::uint64_t bits) {
        put<std::uint64_t>(0x4000 + (at >> page_shift) * 8, bits == 0 ? 0 : at | bits);
    }
    static constexpr std::uint64_t kernel_rights = entry_bit::present | entry_bit::writable;
    static constexpr std::uint64_t all_rights = kernel_rights | entry_bit::user;

    /// Makes `bytes` the instruction at RIP.
    void instruction(std::initializer_list<unsigned> bytes) {
        std::uint64_t at = cpu.rip;
        for (const unsigned byte : bytes)
            put(at++, static_cast<std::uint8_t>(byte));
    }

    void descriptor(std::uint64_t table, std::uint16_t selector, std::uint8_t access, std::uint8_t flags,
                    std::uint64_t base = 0, std::uint32_t limit = 0xf'ffff) {
        const std::uint64_t raw = (limit & 0xffff) | (base & 0xff'ffff) << 16 | std::uint64_t{access} << 40 |
                                  std::uint64_t{(limit >> 16) & 0xf} << 48 | std::uint64_t{flags} << 52 |
                                  (base >> 24 & 0xff) << 56;
        put(table + (selector & ~7U), raw);
    }
    void system_descriptor(std::uint16_t selector, std::uint8_t access, std::uint64_t base,
                           std::uint32_t limit) {
        descriptor(gdt, selector, access, 0, base, limit);
        put<std::uint64_t>(gdt + (selector & ~7U) + 8, base >> 32);
    }
    [[nodiscard]] std::uint8_t access_of(std::uint16_t selector) const {
        return get<std::uint8_t>(gdt + (selector & ~7U) + 5);
    }

    static Segment segment(std::uint16_t selector, std::uint8_t type, std::uint8_t dpl, bool mode64) {
        Segment result;
        result.selector = selector;
        result.limit = 0xffff'ffff;
        result.type = type;
        result.dpl = dpl;
        result.present = true;
        result.long_mode = mode64;
        result.default_32 = !mode64;
        result.granularity = true;
        return result;
    }

    VirtualCpu cpu;

  private:
    void build_gdt() {
        using namespace access_byte;
        descriptor(gdt, sel::kernel_code, kernel_code, flags_64);
        descriptor(gdt, sel::kernel_data, kernel_data, flags_32);
        descriptor(gdt, sel::user_code_32, access_byte::user_code, flags_32);
        descriptor(gdt, sel::user_data, access_byte::user_data, flags_32);
        descriptor(gdt, sel::user_code, access_byte::user_code, flags_64);
        system_descriptor(sel::tss, 0x89, tss, tss_limit);
        system_descriptor(sel::ldt, 0x82, ldt, 0xf);
        descriptor(gdt, sel::conforming_code, kernel_code | conforming, flags_64);
        descriptor(gdt, sel::absent_code, kernel_code - present, flags_64);
        descriptor(gdt, sel::absent_data, kernel_data - present, flags_32);
        descriptor(gdt, sel::read_only_data, kernel_data - read_or_write, flags_32);
        descriptor(gdt, sel::execute_only_code, kernel_code - read_or_write, flags_64);
        system_descriptor(sel::call_gate, 0x8c, 0, 0);
        descriptor(gdt, sel::long_and_default_code, kernel_code, 0xe);
        descriptor(gdt, sel::kernel_code_32, kernel_code, flags_32);
        descriptor(gdt, sel::absent_user_code, access_byte::user_code - present, flags_64);
        descriptor(gdt, sel::absent_user_data, access_byte::user_data - present, flags_32);
        descriptor(gdt, sel::user_conforming_code, access_byte::user_code | conforming, flags_64);
        descriptor(gdt, sel::user_data_16, access_byte::user_data, flags_16, 0, 0xffff);
        descriptor(ldt, sel::local_data, kernel_data, flags_32);
    }
    void build_tss() {
        put<std::uint64_t>(tss + 4, kernel_stack);         // RSP0
        put<std::uint64_t>(tss + 36, interrupt_stack);     // IST1
        put<std::uint64_t>(tss + 84, interrupt_stack - 8); // IST7, not aligned
        put<std::uint16_t>(tss + 102, 0x68);               // I/O map base
        std::memset(ram_.data() + tss + 0x68, 0xff, 0x400);
        cpu.tr = segment(sel::tss, 0xb, 0, false);
        cpu.tr.system = true;
        cpu.tr.base = tss;
        cpu.tr.limit = tss_limit;
    }

    std::vector<std::byte> ram_ = std::vector<std::byte>(ram_size);
    GuestMemory memory_{{{GuestPhys(0), ram_}}};
};

/// What an exception is, for comparison: vector and error code (-1: none).
struct Fault {
    Vector vector;
    std::int64_t code;
    bool operator==(const Fault&) const = default;
    friend std::ostream& operator<<(std::ostream& out, const Fault& fault) {
        return out << "vector " << static_cast<unsigned>(fault.vector) << " code " << fault.code;
    }
};
inline constexpr Fault no_fault{Vector::nmi, -2};
[[nodiscard]] inline Fault fault_of(const std::optional<Exception>& exception) {
    if (!exception)
        return no_fault;
    return {exception->vector, exception->error_code ? std::int64_t{*exception->error_code} : -1};
}
[[nodiscard]] inline Fault gp(std::int64_t code = 0) {
    return {Vector::general_protection, code};
}
[[nodiscard]] inline Fault np(std::int64_t code) {
    return {Vector::segment_not_present, code};
}
[[nodiscard]] inline Fault ss(std::int64_t code = 0) {
    return {Vector::stack_fault, code};
}
[[nodiscard]] inline Fault ts(std::int64_t code) {
    return {Vector::invalid_tss, code};
}
[[nodiscard]] inline Fault ud() {
    return {Vector::invalid_opcode, -1};
}
[[nodiscard]] inline Fault pf(std::int64_t code) {
    return {Vector::page_fault, code};
}

} // namespace umbra::test
