// The arena, the tables, and what is recorded when a program enters the kernel.
#include "guest/cpufuzz/machine.hpp"

#include "guest/runtime/console.hpp"
#include "guest/runtime/cpu.hpp"
#include "guest/runtime/descriptors.hpp"
#include "guest/runtime/process.hpp"

#include <cstring>
#include <initializer_list>

extern "C" {
// Shared with entry.S.
std::uint64_t fuzz_vector, fuzz_harness_stack;
std::uint32_t fuzz_way;
std::uint64_t fuzz_registers[16];
struct {
    std::uint64_t room[64]; // for an exception of the iretq itself
    std::uint64_t frame[5];
} fuzz_frame_with_room;
extern const std::uint8_t fuzz_stubs[256][32];
void fuzz_enter();
void fuzz_syscall_64();
void fuzz_syscall_32();
void fuzz_sysenter();
void fuzz_call_gate();
}

namespace umbra::guest::cpufuzz {
namespace {

enum class Way : std::uint32_t { end = 0, iret = 1, sysret_64 = 2, sysret_32 = 3 };

constexpr std::uint64_t window = 0x200; ///< bytes at the end of a stack, and of data, that programs write
constexpr std::uint64_t edge = 0x40;    ///< and at the beginning
constexpr std::uint64_t fs_base = data_page, gs_base = data_page + 0x100, kernel_gs_base = data_page + 0x200;

/// Registers of the local APIC.
std::uint32_t volatile& apic(std::uint64_t offset) {
    constexpr std::uint64_t local_apic = 0xfee0'0000;
    return *reinterpret_cast<volatile std::uint32_t*>(local_apic + offset);
}
constexpr std::uint64_t apic_eoi = 0xb0, apic_spurious = 0xf0, apic_command = 0x300,
                        apic_requests = 0x200 + vector_pending / 32 * 0x10;

constexpr std::uint32_t msr_cstar = 0xc000'0083, msr_sysenter_cs = 0x174, msr_sysenter_esp = 0x175,
                        msr_sysenter_eip = 0x176, msr_pat = 0x277, msr_tsc_aux = 0xc000'0103;
constexpr std::uint64_t dr6_at_reset = 0xffff'0ff0, pat_at_reset = 0x0007'0406'0007'0406;

Peculiarities peculiar;
Outcome* recording = nullptr; ///< null: no program runs
std::uint64_t cr0_of_arena, cr4_of_arena, cr3_of_arena, efer_of_arena;

template<class T>
T& at(std::uint64_t address) {
    return *reinterpret_cast<T*>(address);
}
void write16(std::uint64_t address, std::uint16_t value) {
    std::memcpy(reinterpret_cast<void*>(address), &value, sizeof value);
}
void write64(std::uint64_t address, std::uint64_t value) {
    std::memcpy(reinterpret_cast<void*>(address), &value, sizeof value);
}

void lldt(std::uint16_t selector) {
    asm volatile("lldt %0" : : "r"(selector) : "memory");
}
void ltr(std::uint16_t selector) {
    asm volatile("ltr %0" : : "r"(selector) : "memory");
}
std::uint64_t read_dr7() {
    std::uint64_t value = 0;
    asm volatile("mov %%dr7, %0" : "=r"(value));
    return value;
}
std::uint64_t read_cr8() {
    std::uint64_t value = 0;
    asm volatile("mov %%cr8, %0" : "=r"(value));
    return value;
}

std::uint64_t mix(std::uint64_t sum, std::uint64_t value) {
    sum = (sum ^ value) * 0x100'0000'01b3;
    return sum ^ sum >> 29;
}
std::uint64_t sum_of(std::uint64_t sum, std::uint64_t begin, std::uint64_t end) {
    for (; begin < end; begin += 8)
        sum = mix(sum, at<const std::uint64_t>(begin));
    return sum;
}
void fill(std::uint64_t begin, std::uint64_t end) {
    for (; begin < end; begin += 8)
        at<std::uint64_t>(begin) = 0x5a5a'0000'5a5a'0000 + (begin & 0xffff);
}

constexpr std::uint64_t written_pages[] = {data_page, user_stack_page, kernel_stack_page};

std::uint64_t segment(std::uint64_t access, std::uint64_t flags, std::uint64_t base, std::uint64_t limit) {
    return (limit & 0xffff) | (base & 0xff'ffff) << 16 | access << 40 | (limit >> 16 & 0xf) << 48 |
           flags << 52 | (base >> 24 & 0xff) << 56;
}

void write_fixed_descriptors() {
    constexpr std::uint64_t code = 0x9b, data = 0x93, user = 0x60, flat_64 = 0xa, flat_32 = 0xc, of_16 = 0;
    constexpr std::uint64_t all = 0xf'ffff, first_64k = 0xffff;
    std::uint64_t* gdt = &at<std::uint64_t>(gdt_base);
    gdt[0] = 0;
    gdt[kernel_code_64 / 8] = segment(code, flat_64, 0, all);
    gdt[kernel_data / 8] = segment(data, flat_32, 0, all);
    gdt[task / 8] = segment(0x8b, 0, tss_page, page_4k - 1);
    gdt[task / 8 + 1] = 0;
    gdt[local_table / 8] = segment(0x82, 0, ldt_base, ldt_slots * 8 - 1);
    gdt[local_table / 8 + 1] = 0;
    gdt[user_code_32 / 8] = segment(code | user, flat_32, 0, all);
    gdt[user_data / 8] = segment(data | user, flat_32, 0, all);
    gdt[user_code_64 / 8] = segment(code | user, flat_64, 0, all);
    gdt[kernel_code_32 / 8] = segment(code, flat_32, 0, all);
    gdt[kernel_code_16 / 8] = segment(code, of_16, arena, first_64k);
    gdt[user_code_16 / 8] = segment(code | user, of_16, arena, first_64k);
    gdt[kernel_data_16 / 8] = segment(data, of_16, arena, first_64k);
    gdt[user_data_16 / 8] = segment(data | user, of_16, arena, first_64k);
}

void write_tss() {
    write64(tss_page + 4, trap_stack_page + page_4k);
    write64(tss_page + 12, trap_stack_page + page_4k);
    write64(tss_page + 20, trap_stack_page + page_4k);
    write64(tss_page + 36, fault_stack_page + page_4k);
    write64(tss_page + 44, special_stack_page + page_4k);
    for (std::uint64_t stack = 3; stack <= 7; ++stack)
        write64(tss_page + 28 + 8 * stack, special_stack_page + 0x200 * stack);
    write16(tss_page + 102, 0xffff);
}

void pages_of_the_arena(const AddressSpace& space) {
    space.entry(arena, 4) |= pte_user;
    space.entry(arena, 3) |= pte_user;
    space.entry(arena, 2) = allocate_frame() | pte_user_rw;
    for (const std::uint64_t page : {code_page, data_page, user_stack_page})
        space.map(page, allocate_frame(), pte_user_rw);
    space.map(read_only_page, allocate_frame(), pte_present | pte_user);
    for (const std::uint64_t page : {supervisor_page, kernel_stack_page, trap_stack_page, fault_stack_page,
                                     special_stack_page, gdt_page, ldt_page, tss_page, idt_page})
        space.map(page, allocate_frame(), pte_kernel_rw);

    // Nothing lies where an address with the arena for its base leads, nor below 1 MB, where these tables
    // are.
    space.entry(2 * arena, 2) = 0;
    const std::uint64_t low = allocate_frame();
    for (std::uint64_t page = 0; page < 512; ++page)
        physical(low, page) = page < 256 ? 0 : page * page_4k | pte_kernel_rw;
    space.entry(0, 2) = low | pte_user_rw;
}

void write_msrs() {
    write_msr(msr_star, std::uint64_t{user_code_32} << 48 | std::uint64_t{kernel_code_64} << 32);
    write_msr(msr_lstar, reinterpret_cast<std::uint64_t>(&fuzz_syscall_64));
    write_msr(msr_cstar, reinterpret_cast<std::uint64_t>(&fuzz_syscall_32));
    write_msr(msr_fmask, 0x4'7700);
    write_msr(msr_efer, efer_of_arena);
    write_msr(msr_sysenter_cs, 0);
    write_msr(msr_sysenter_esp, 0);
    write_msr(msr_sysenter_eip, 0);
    write_msr(msr_pat, pat_at_reset);
    write_msr(msr_tsc_aux, 0);
    write_msr(msr_kernel_gs_base, kernel_gs_base);
}

void take_data_segments(std::uint16_t selector) {
    asm volatile("mov %0, %%ds\n mov %0, %%es" : : "r"(std::uint32_t{selector}));
}

} // namespace

std::uint64_t usual_cr3() {
    return cr3_of_arena;
}
std::uint64_t stub_of(unsigned vector) {
    return reinterpret_cast<std::uint64_t>(&fuzz_stubs[vector]);
}
std::uint64_t call_gate_entry() {
    return reinterpret_cast<std::uint64_t>(&fuzz_call_gate);
}

void write_gate(unsigned vector, std::uint64_t selector, std::uint64_t type, std::uint64_t stack) {
    const std::uint64_t target = stub_of(vector);
    std::uint64_t* gate = &at<std::uint64_t>(idt_page + std::uint64_t{16} * vector);
    gate[0] = (target & 0xffff) | selector << 16 | stack << 32 | type << 40 | (target >> 16 & 0xffff) << 48;
    gate[1] = target >> 32;
}

void set_up(const Peculiarities& peculiarities) {
    peculiar = peculiarities;
    const AddressSpace space = AddressSpace::create();
    pages_of_the_arena(space);
    space.load();
    cr0_of_arena = read_cr0();
    cr4_of_arena = read_cr4();
    cr3_of_arena = read_cr3();
    efer_of_arena = read_msr(msr_efer) | efer_sce;
    for (unsigned vector = 0; vector < 256; ++vector)
        write_gate(vector, kernel_code_64, 0x8e, 0);
    restore_memory();
    load_gdt({.limit = gdt_slots_admitted * 8 - 1, .base = gdt_base});
    load_idt({.limit = page_4k - 1, .base = idt_page});
    at<std::uint64_t>(gdt_base + task) &= ~(std::uint64_t{2} << 40); // not busy yet
    ltr(task);
    lldt(local_table);
    asm volatile("pushq %0\n push $1f\n lretq\n 1: mov %1, %%ss"
                 :
                 : "i"(kernel_code_64), "r"(std::uint32_t{kernel_data})
                 : "memory");
    write_msrs();
    restore_registers(changed_fs | changed_gs);
    constexpr std::uint32_t enabled = 0x1ff; // with the spurious vector 0xff
    apic(apic_spurious) = enabled;
}

void restore_memory() {
    fill(supervisor_page, supervisor_page + 2 * edge);
    for (const std::uint64_t page : written_pages) {
        fill(page, page + edge);
        fill(page + page_4k - window, page + page_4k);
    }
    write_fixed_descriptors();
    write_tss();
    for (const unsigned vector : {1U, 3U, 4U, 6U, 10U, 11U, 12U, 13U, 14U})
        write_gate(vector, kernel_code_64, vector == 3 || vector == 4 ? 0xee : 0x8e, 0);
    write_gate(8, kernel_code_64, 0x8e, 1);
    write_gate(vector_end, kernel_code_64, 0xee, 2);
}

void restore_registers(std::uint32_t changed) {
    if ((changed & changed_control) != 0) {
        write_cr0(cr0_of_arena);
        write_cr4(cr4_of_arena);
        write_cr2(0);
    }
    if ((changed & changed_cr8) != 0)
        asm volatile("mov %0, %%cr8" : : "r"(std::uint64_t{0}));
    if ((changed & changed_cr3) != 0)
        write_cr3(cr3_of_arena);
    if ((changed & changed_gdtr) != 0)
        load_gdt({.limit = gdt_slots_admitted * 8 - 1, .base = gdt_base});
    if ((changed & changed_idtr) != 0)
        load_idt({.limit = page_4k - 1, .base = idt_page});
    if ((changed & changed_ldtr) != 0) {
        at<std::uint64_t>(gdt_base + local_table) = segment(0x82, 0, ldt_base, ldt_slots * 8 - 1);
        lldt(local_table);
    }
    if ((changed & changed_tr) != 0) {
        at<std::uint64_t>(gdt_base + task) = segment(0x89, 0, tss_page, page_4k - 1);
        ltr(task);
    }
    take_data_segments(0);
    if ((changed & changed_msrs) != 0)
        write_msrs();
    if ((changed & changed_fs) != 0) {
        asm volatile("mov %0, %%fs" : : "r"(0));
        write_msr(msr_fs_base, fs_base);
    }
    if ((changed & changed_gs) != 0) {
        asm volatile("mov %0, %%gs" : : "r"(0));
        write_msr(msr_gs_base, gs_base);
    }
    if ((changed & changed_debug) != 0) {
        asm volatile("mov %0, %%dr7" : : "r"(std::uint64_t{0x400}));
        write_dr6(dr6_at_reset);
        asm volatile("mov %0, %%dr0\n mov %0, %%dr1\n mov %0, %%dr2\n mov %0, %%dr3"
                     :
                     : "r"(std::uint64_t{0}));
    }
}

/// After a program with a pending interrupt: whether or not it was taken, it is no more.
void finish_interrupt() {
    apic(apic_eoi) = 0;
    if ((apic(apic_requests) >> vector_pending % 32 & 1) == 0)
        return;
    static Outcome ignored;
    ignored.count = 0;
    recording = &ignored;
    asm volatile("sti\n nop\n nop\n cli" : : : "memory");
    apic(apic_eoi) = 0;
}

void run(const Start& start, const std::uint64_t (&registers)[16], std::uint32_t changed, Outcome& outcome) {
    outcome.count = 0;
    recording = &outcome;
    for (unsigned i = 0; i < 16; ++i)
        fuzz_registers[i] = registers[i];
    std::uint64_t(&frame)[5] = fuzz_frame_with_room.frame;
    frame[0] = start.rip;
    frame[1] = start.cs;
    frame[2] = start.rflags;
    frame[3] = start.rsp;
    frame[4] = start.ss;
    if (start.data != 0)
        take_data_segments(start.data);
    if ((changed & changed_debug) != 0)
        write_dr6(dr6_at_reset);
    constexpr std::uint32_t to_itself = 0x4'0000;
    if (start.interrupt)
        apic(apic_command) = to_itself | vector_pending;
    fuzz_enter();
    if (start.interrupt)
        finish_interrupt();
    recording = nullptr;
    std::uint64_t(&system)[12] = outcome.system;
    for (std::uint64_t& value : system)
        value = 0;
    if ((changed & changed_control) != 0) {
        system[0] = read_cr0();
        system[1] = read_cr4();
    }
    if ((changed & changed_cr8) != 0)
        system[2] = read_cr8();
    if ((changed & changed_fs) != 0)
        system[3] = read_msr(msr_fs_base);
    if ((changed & changed_gs) != 0)
        system[4] = read_msr(msr_gs_base);
    if ((changed & changed_debug) != 0) {
        system[6] = read_dr6();
        system[7] = read_dr7();
    }
    if ((changed & changed_msrs) != 0) {
        system[8] = read_msr(msr_efer);
        system[5] = read_msr(msr_kernel_gs_base);
    }
    // What is left of an exception, and would be told with another's.
    for (unsigned i = 0; i < outcome.count; ++i) {
        if (outcome.happened[i].vector == 14 || outcome.happened[i].vector == 8)
            write_cr2(0);
        else if (outcome.happened[i].vector == 1)
            write_dr6(dr6_at_reset);
    }
    std::uint64_t sum = sum_of(0, supervisor_page, supervisor_page + 2 * edge);
    for (const std::uint64_t page : written_pages) {
        if (page == data_page) // of a stack: a part of a frame may be there, which is nobody's business
            sum = sum_of(sum, page, page + edge);
        sum = sum_of(sum, page + page_4k - window, page + page_4k);
    }
    sum = sum_of(sum, gdt_base, gdt_page + page_4k);
    sum = sum_of(sum, ldt_base, ldt_page + page_4k);
    outcome.memory = sum;
}

/// How it goes on after `happened`: traps and system calls are returned from, faults end the program.
Way way_on(const Happened& happened, unsigned count) {
    if (count == max_happened)
        return Way::end;
    switch (happened.vector) {
    case 1:
    case 3:
    case 4:
        return Way::iret;
    case syscall_64:
        return Way::sysret_64;
    case syscall_32:
        return Way::sysret_32;
    case vector_end:
        return Way::end;
    default:
        return happened.vector >= 0x20 && happened.vector < 256 ? Way::iret : Way::end;
    }
}

/// The error code as a CPU would have pushed it: QEMU doubles the number of the gate, and leaves EXT out.
std::uint64_t usual_error(std::uint64_t error) {
    constexpr std::uint64_t ext = 1, idt = 2;
    if (fuzz_vector == 14 || !peculiar.any)
        return error;
    if (peculiar.native && (error & idt) != 0)
        error = (error >> 1 & ~std::uint64_t{7}) | idt;
    return error & ~ext;
}

extern "C" Way fuzz_on_entry() {
    if (recording == nullptr) {
        if (fuzz_vector == 1) // a program has set DR7.GD, which is clear now
            return Way::iret;
        const std::uint64_t* pushed = &at<const std::uint64_t>(fuzz_registers[4]);
        print("cpufuzz itself trapped: vector %lu, on the stack %lx %lx %lx\n", fuzz_vector, pushed[0],
              pushed[1], pushed[2]);
        exit_guest(exit_unexpected_trap);
    }
    Happened& now = recording->happened[recording->count++];
    now = Happened{};
    now.vector = fuzz_vector;
    for (unsigned i = 0; i < 16; ++i)
        now.registers[i] = fuzz_registers[i];
    std::uint64_t selector = 0;
    asm volatile("mov %%ds, %0" : "=r"(selector));
    now.data[0] = selector;
    asm volatile("mov %%es, %0" : "=r"(selector));
    now.data[1] = selector;
    asm volatile("mov %%fs, %0" : "=r"(selector));
    now.data[2] = selector;
    asm volatile("mov %%gs, %0" : "=r"(selector));
    now.data[3] = selector;
    constexpr std::uint64_t resume = 1 << 16, iopl = 3 << 12;
    if (now.vector < 256) {
        // The CPU aligns the stack before it pushes, so its alignment tells whether there is an error code.
        std::uint64_t frame = fuzz_registers[4];
        if (frame % 16 == 0) {
            now.has_error = 1;
            now.error = at<std::uint64_t>(frame) = usual_error(at<std::uint64_t>(frame));
            frame += 8;
        }
        fuzz_registers[4] = frame;
        auto& pushed = at<std::uint64_t[5]>(frame);
        if ((pushed[1] & 3) == 0)
            pushed[2] &= ~iopl;
        if (peculiar.any)
            pushed[2] &= ~resume;
        now.rip = pushed[0];
        now.cs = pushed[1];
        now.rflags = pushed[2];
        now.rsp = pushed[3];
        now.ss = pushed[4];
        if (now.vector == 14 || now.vector == 8)
            now.address = read_cr2();
        else if (now.vector == 1)
            now.address = read_dr6();
    } else if (now.vector == syscall_64 || now.vector == syscall_32) {
        fuzz_registers[11] &= ~(iopl | (peculiar.any ? resume : 0)); // what SYSRET takes, too
        now.registers[11] = fuzz_registers[11];
    }
    return way_on(now, recording->count);
}

} // namespace umbra::guest::cpufuzz
