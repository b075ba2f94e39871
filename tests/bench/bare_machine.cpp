#include "tests/bench/bare_machine.hpp"

#include <algorithm>
#include <array>

namespace umbra::bench {
namespace {

constexpr std::size_t memory_bytes = std::size_t{2} << 20;

// Where things are. The first 2 MB are mapped as they are.
constexpr std::size_t root = 0x1000, low_pdpt = 0x2000, low_directory = 0x3000;
constexpr std::size_t gdt = 0x4000, idt = 0x5000, tss = 0x6000, stub = 0x7000;
constexpr std::size_t stack_top = 0x9000,
                      frame = stack_top - 5 * sizeof(std::uint64_t); // RIP, CS, RFLAGS, RSP, SS
constexpr std::size_t code_begin = 0xa000;
constexpr std::size_t pages_pdpt = 0xb000, pages_directory = 0xc000, pages_tables = 0xd000;
constexpr std::size_t frames_behind = 0x100000; // what the pages show, in turn
constexpr std::size_t more_pdpt = pages_tables + BareMachine::pages * sizeof(ShadowEntry),
                      more_directory = more_pdpt + page_size;
static_assert(more_directory + page_size <= frames_behind);
constexpr MachinePhys more_memory{std::uint64_t{1} << 30};
static_assert(pages_tables + BareMachine::pages * sizeof(ShadowEntry) <= frames_behind);
static_assert(frames_behind + BareMachine::frames * page_size <= memory_bytes);

constexpr std::uint8_t trap_port = 0xe0;
// The user's are those of Linux, which some hosts have in force whatever the machine's GDT says.
constexpr std::uint16_t ring0_cs = 0x10, ring0_ss = 0x18, task = 0x40, user_ss = 0x2b, user_cs = 0x33;
constexpr std::uint32_t tss_limit = 0x67;

constexpr std::uint64_t rights =
    entry_bit::present | entry_bit::writable | entry_bit::user | entry_bit::accessed | entry_bit::dirty;

Segment flat(std::uint16_t selector, bool code) {
    Segment segment;
    segment.selector = selector;
    segment.limit = 0xffff'ffff;
    segment.type = code ? 0xb : 0x3;
    segment.dpl = selector & 3;
    segment.present = segment.granularity = true;
    segment.long_mode = code;
    segment.default_32 = !code;
    return segment;
}

Vm make_vm(const Kvm& kvm, const HostMemory& memory) {
    Vm vm = kvm.create_vm();
    vm.add_memory(0, MachinePhys(0), memory.bytes());
    return vm;
}

} // namespace

BareMachine::BareMachine(const Kvm& kvm, std::span<const std::byte> code, ResumeBy resume)
    : resume_(resume), memory_(memory_bytes, HostMemory::Pages::small, "a bare machine"),
      vm_(make_vm(kvm, memory_)), vcpu_(vm_.create_vcpu(0)) {
    vcpu_.set_cpuid(kvm.supported_cpuid());
    const auto entry = [&](std::size_t table, std::size_t slot, std::uint64_t value) {
        at(table)[slot] = value | rights;
    };
    entry(root, 0, low_pdpt);
    entry(low_pdpt, 0, low_directory);
    entry(low_directory, 0, entry_bit::page_size);
    entry(root, paging_4_level.root().index(pages_begin), pages_pdpt);
    entry(pages_pdpt, 0, pages_directory);
    for (std::size_t i = 0; i < pages / entries_per_table; ++i)
        entry(pages_directory, i, pages_tables + i * page_size);

    // Descriptors: Intel SDM vol. 3A, 3.4.5 and 7.2.3; gates: 6.14.1.
    at(gdt)[ring0_cs / 8] = 0x00af'9b00'0000'ffff;
    at(gdt)[ring0_ss / 8] = 0x00cf'9300'0000'ffff;
    at(gdt)[user_ss / 8] = 0x00cf'f300'0000'ffff;
    at(gdt)[user_cs / 8] = 0x00af'fb00'0000'ffff;
    at(gdt)[task / 8] = std::uint64_t{0x8b} << 40 | std::uint64_t{tss} << 16 | tss_limit;
    for (const Vector vector : {Vector::general_protection, Vector::page_fault})
        at(idt)[static_cast<std::size_t>(vector) * 2] =
            std::uint64_t{0x8e} << 40 | std::uint64_t{ring0_cs} << 16 | stub;
    at(tss)[0] = std::uint64_t{stack_top} << 32; // RSP0 is at byte 4
    // out %al, $trap_port; add $8, %rsp (the error code); iretq
    constexpr std::array<std::uint8_t, 8> stub_code{0xe6, trap_port, 0x48, 0x83, 0xc4, 0x08, 0x48, 0xcf};
    std::ranges::copy(std::as_bytes(std::span(stub_code)), memory_.bytes().begin() + stub);
    std::ranges::copy(code, memory_.bytes().begin() + code_begin);

    vcpu_.set_control(cr0::pe | cr0::pg | cr0::wp | cr0::ne | cr0::et, cr4::pae,
                      efer::lme | efer::lma | efer::nxe);
    vcpu_.set_cr3(MachinePhys(root).frame());
    vcpu_.set_descriptor_tables({.base = GuestVirt(gdt), .limit = page_size - 1},
                                {.base = GuestVirt(idt), .limit = page_size - 1});
    Segment tr;
    tr.selector = task;
    tr.base = tss;
    tr.limit = tss_limit;
    tr.type = 0xb; // busy 64-bit TSS
    tr.present = tr.system = true;
    vcpu_.set_segment(SegmentName::tr, tr);
}

std::uint64_t* BareMachine::at(std::size_t address) {
    return reinterpret_cast<std::uint64_t*>(memory_.bytes().data() + address);
}

void BareMachine::start(std::size_t offset, std::uint64_t rdi, std::uint64_t rsi) {
    vcpu_.write_gpr(Gpr::rdi, rdi);
    vcpu_.write_gpr(Gpr::rsi, rsi);
    vcpu_.set_rip(code_begin + offset);
    vcpu_.set_rflags(rflags::fixed);
    vcpu_.set_segment(SegmentName::cs, flat(user_cs, true));
    vcpu_.set_segment(SegmentName::ss, flat(user_ss, false));
}

bool BareMachine::run() {
    return vcpu_.run() == ExitReason::port && vcpu_.port_exit().port == trap_port;
}

void BareMachine::resume(unsigned length) {
    at(frame)[0] += length;
    if (resume_ == ResumeBy::iretq)
        return;
    vcpu_.set_rip(at(frame)[0]);
    vcpu_.set_rsp(at(frame)[3]);
    vcpu_.set_rflags(rflags::fixed);
    vcpu_.set_segment(SegmentName::cs, flat(user_cs, true));
    vcpu_.set_segment(SegmentName::ss, flat(user_ss, false));
}

void BareMachine::map(std::size_t number) {
    at(pages_tables)[number] = (frames_behind + number % frames * page_size) | rights;
}

void BareMachine::add_memory(std::span<std::byte> memory, WriteLog log) {
    constexpr std::uint64_t large = std::uint64_t{2} << 20;
    vm_.add_memory(more_slot, more_memory, memory, log);
    at(root)[paging_4_level.root().index(more_begin)] = more_pdpt | rights;
    at(more_pdpt)[0] = more_directory | rights;
    for (std::size_t i = 0; i < memory.size() / large; ++i)
        at(more_directory)[i] = (more_memory.value() + i * large) | rights | entry_bit::page_size;
}

} // namespace umbra::bench
