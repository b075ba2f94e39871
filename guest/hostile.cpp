// hostile: a kernel that looks for what runs it. It touches every top-level slot, claims each for itself,
// maps and writes every physical address that might be somebody's, loads every kind of segment, descriptor
// table, task register, MSR and control register value, and tries all ports. Proves that it sees only what a
// CPU of its own would show (faults its own tables ask for, an empty bus), and that it can go on after each
// attempt. Outcome: passed.
#include "guest/runtime/boot.hpp"
#include "guest/runtime/console.hpp"
#include "guest/runtime/cpu.hpp"
#include "guest/runtime/descriptors.hpp"
#include "guest/runtime/paging.hpp"
#include "guest/runtime/process.hpp"
#include "guest/runtime/traps.hpp"
#include "guest/runtime/user.hpp"

#include <cstdint>
#include <initializer_list>

using namespace umbra::guest;

namespace {

constexpr unsigned slots = 512;
constexpr unsigned window_slot = 1; // where addresses are mapped, to be tried
constexpr std::uint64_t window = slot_base(window_slot);
constexpr std::uint64_t programs = slot_base(2);
constexpr std::uint64_t stack_top = programs + page_2m;
constexpr std::uint64_t all_ones = ~std::uint64_t{0};
constexpr std::uint64_t not_canonical = 0x1234'5678'9abc'def0;

bool qemu; // the CPU is QEMU's own emulation

USER_PROGRAM(program_read, "mov (%rdi), %rax\n syscall");

// The address space

/// No slot but the three in use holds anything, whoever asks.
void empty_slots() {
    for (unsigned slot = 3; slot < slots; ++slot) {
        const std::uint64_t first = slot_base(slot);
        const std::uint64_t last = first + span_of(4) - 8;
        CHECK(probe_read(first).is_page_fault(0, first));
        CHECK(probe_write(last, 0).is_page_fault(pf_write, last));

        TrapFrame frame = user_frame(program_address(program_read), stack_top);
        frame.rdi = first;
        run_user(frame);
        CHECK_EQ(frame.vector, vector_pf);
        CHECK_EQ(frame.error, pf_user);
        CHECK_EQ(read_cr2(), first);
    }
    print("hostile: empty slots\n");
}

/// Every slot can be had, one after the other, and many at once. (Slot 256 is left out: there are hosts on
/// which nothing that is not privileged can use it.)
void claimed_slots(const AddressSpace& space) {
    constexpr unsigned unusable = 256;
    constexpr std::uint64_t offset = 3 * page_1g + page_2m + page_4k;
    const std::uint64_t frame = allocate_frame();
    physical(frame) = 0xc1a1;
    space.map(window + offset, frame, pte_user_rw);
    const std::uint64_t entry = space.entry(window, 4);
    const auto claim = [&](unsigned slot) { physical(space.root(), slot) = entry; };
    const auto release = [&](unsigned slot) { physical(space.root(), slot) = 0; };

    for (unsigned slot = 3; slot < slots; ++slot) {
        if (slot == unusable)
            continue;
        const std::uint64_t page = slot_base(slot) + offset;
        claim(slot);
        CHECK_EQ(word(page), 0xc1a1);
        release(slot);
        invlpg(page);
        CHECK(probe_read(page).is_page_fault(0, page));
    }
    std::uint64_t count = 0xc1a1;
    for (const unsigned parity : {0U, 1U}) {
        for (unsigned slot = 4 + parity; slot < slots; slot += 2)
            claim(slot);
        for (unsigned slot = 4 + parity; slot < slots; slot += 2) {
            if (slot == unusable)
                continue;
            Word& shared = word(slot_base(slot) + offset);
            CHECK_EQ(shared, count);
            shared = ++count;
        }
        for (unsigned slot = 4 + parity; slot < slots; slot += 2)
            release(slot);
        space.load();
    }
    print("hostile: claimed slots\n");
}

/// Where no memory is, reads find nothing and writes change nothing.
void check_nothing_at(std::uint64_t virt) {
    std::uint64_t value = 0;
    Trap trap = PROBE("mov (%1), %0", : "+r"(value) : "r"(virt));
    CHECK(trap.none());
    CHECK(value == all_ones || qemu); // whose empty bus reads 0
    CHECK(probe_write(virt, 0x600d).none());
    trap = PROBE("mov (%1), %0", : "+r"(value) : "r"(virt));
    CHECK(trap.none());
    CHECK(value == all_ones || (qemu && value == 0));
    std::uint32_t byte = 0;
    trap = PROBE("movzbl 3(%1), %0", : "+r"(byte) : "r"(virt));
    CHECK(trap.none());
    CHECK(byte == 0xff || qemu);
}

void physical_addresses(const AddressSpace& space, std::uint64_t ram_end) {
    const unsigned bits = physical_address_bits();
    const std::uint64_t end = std::uint64_t{1} << bits;
    constexpr std::uint64_t page = window + 5 * page_4k;
    const auto try_address = [&](std::uint64_t address) {
        space.map(page, address, pte_kernel_rw);
        invlpg(page);
        check_nothing_at(page);
    };
    // The first pages above RAM, the borders of the address space, every power of two, and a sample of the
    // rest. Between 3 and 4 GB there are devices.
    for (std::uint64_t address = ram_end; address < ram_end + 16 * page_4k; address += page_4k)
        try_address(address);
    for (unsigned bit = 30; bit < bits; ++bit) {
        const std::uint64_t address = std::uint64_t{1} << bit;
        for (const std::uint64_t at : {address - page_4k, address, address + page_4k, address + page_2m})
            if (at >= ram_end && (at < 0xc000'0000 || at >= 0x1'0000'0000))
                try_address(at);
    }
    for (unsigned pages = 1; pages <= 16; ++pages)
        try_address(end - pages * page_4k);
    constexpr unsigned samples = 64;
    for (unsigned i = 1; i < samples; ++i)
        try_address(end / samples * i & ~(page_1g - 1));

    // Large pages reach as far, also when they begin in RAM.
    const std::uint64_t large = window + page_1g;
    for (const std::uint64_t address : {ram_end & ~(page_2m - 1), end - page_2m, end / 2}) {
        space.map(large, address, pte_kernel_rw, 2);
        invlpg(large);
        check_nothing_at(large + page_2m - 8);
    }
    if (has_1g_pages()) {
        const std::uint64_t huge = window + 2 * page_1g;
        space.map(huge, 0, pte_kernel_rw, 3);
        CHECK_EQ(word(huge + 0x10'0000), physical(0x10'0000));
        check_nothing_at(huge + ram_end);
        check_nothing_at(huge + page_1g - 8);
        for (std::uint64_t address = end - 8 * page_1g; address < end; address += page_1g) {
            space.map(huge, address, pte_kernel_rw, 3);
            invlpg(huge);
            check_nothing_at(huge);
            check_nothing_at(huge + page_1g - 8);
        }
    }

    // Tables in nothing: their entries are all ones, or nothing.
    const std::uint64_t in_no_table = window + 4 * page_1g;
    for (unsigned level = 2; level <= 3; ++level)
        for (const std::uint64_t table : {ram_end, end / 2, end - page_4k}) {
            space.map(in_no_table, 0, pte_kernel_rw);
            space.entry(in_no_table, level) = table | pte_kernel_rw;
            invlpg(in_no_table);
            const Trap trap = probe_read(in_no_table);
            CHECK_EQ(trap.frame.vector, vector_pf);
            CHECK_EQ(trap.frame.error & ~(pf_present | pf_reserved), 0);
            CHECK_EQ(trap.cr2, in_no_table);
            space.entry(in_no_table, 3) = 0;
            invlpg(in_no_table);
        }
    print("hostile: physical addresses\n");
}

/// One frame as table of each level and as page, and two that are each other's.
void circular_tables(const AddressSpace& space) {
    constexpr unsigned slot = 77;
    const std::uint64_t first = allocate_frame();
    const std::uint64_t second = allocate_frame();
    for (unsigned i = 0; i < 512;
         ++i) { // each entry is told by the bits that are the kernel's own, from 52 on
        physical(first, i) = (i % 2 == 0 ? first : second) | pte_user_rw | std::uint64_t{i} << 52;
        physical(second, i) = (i % 2 == 0 ? second : first) | pte_user_rw | std::uint64_t{i} << 52;
    }
    space.entry(slot_base(slot), 4) = first | pte_user_rw;
    for (std::uint64_t i = 0; i < 512; i += 37) {
        // Indices i, i+1, i+2 lead from frame to frame; odd ones change to the other.
        const std::uint64_t path[] = {i, (i + 1) % 512, (i + 2) % 512};
        const std::uint64_t virt =
            slot_base(slot) + path[0] * span_of(3) + path[1] * span_of(2) + path[2] * span_of(1) + i * 8;
        const std::uint64_t changes = path[0] % 2 + path[1] % 2 + path[2] % 2;
        const std::uint64_t at = (changes % 2 == 0 ? first : second) + i * 8;
        const std::uint64_t entry = word(virt); // marks entries as accessed, perhaps this one
        CHECK_EQ(entry, physical(at));
        word(virt) = physical(at) & ~pte_present; // the page, which is a table, changes through itself
        space.load();
        CHECK_EQ(physical(at) & pte_present, 0);
        physical(at) |= pte_present;
        space.load();
    }
    space.entry(slot_base(slot), 4) = 0;
    space.load();
    print("hostile: circular tables\n");
}

// Segments and descriptor tables

/// On some hosts these are in force whatever GDT the guest has: a program, and a deprivileged kernel, can
/// load them.
bool may_be_the_hosts(std::uint64_t selector) {
    const std::uint64_t index = selector >> 3;
    return (selector & 4) == 0 && ((index >= 4 && index <= 6) || (index >= 12 && index <= 15));
}

bool is_data_segment(std::uint64_t selector) {
    const std::uint64_t bare = selector & ~std::uint64_t{3};
    if (bare == 0)
        return true;
    const unsigned rpl = selector & 3;
    // Code segments can be read from, too. The RPL must not be weaker than the segment's privilege.
    return ((bare == kernel_data || bare == kernel_code) && rpl == 0) || bare == (user_data & ~3) ||
           bare == (user_code & ~3) || bare == (sysret_base & ~3);
}

void segments() {
    const auto check = [](const Trap& trap, std::uint64_t selector) {
        if (may_be_the_hosts(selector))
            CHECK(trap.none() || trap.is_fault(vector_gp, selector & ~std::uint64_t{3}));
        else if (is_data_segment(selector))
            CHECK(trap.none());
        else if ((selector & ~std::uint64_t{3}) == absent_data)
            CHECK(trap.is_fault(selector == absent_data ? vector_np : vector_gp, absent_data));
        else
            CHECK(trap.is_fault(vector_gp, selector & ~std::uint64_t{3}));
    };
    const auto try_selector = [&](std::uint64_t selector) {
        check(PROBE("mov %w0, %%ds", : : "r"(selector)), selector);
        check(PROBE("mov %w0, %%es", : : "r"(selector)), selector);
        check(PROBE("mov %w0, %%fs", : : "r"(selector)), selector);
    };
    constexpr std::uint64_t dense = 160; // all selectors up to here, and some of the rest
    for (std::uint64_t selector = 0; selector < dense; ++selector)
        try_selector(selector);
    for (std::uint64_t selector = dense; selector < 0x1'0000; selector += 509)
        try_selector(selector);
    try_selector(0xffff);
    for (std::uint64_t selector = 4; selector < dense; ++selector)
        if (selector != kernel_data && !may_be_the_hosts(selector)) {
            const Trap trap = PROBE("mov %w0, %%ss", : : "r"(selector));
            const unsigned vector = selector == absent_data ? vector_ss : vector_gp;
            CHECK(trap.is_fault(vector, selector & ~std::uint64_t{3}));
        }
    asm volatile("mov %0, %%ds\n mov %0, %%es\n mov %1, %%fs" : : "r"(std::uint32_t{kernel_data}), "r"(0));
    print("hostile: segments\n");
}

void descriptor_tables() {
    const auto stored_gdt = [] {
        TableRegister table{};
        asm volatile("sgdt %0" : "=m"(table));
        return table;
    };
    const auto stored_idt = [] {
        TableRegister table{};
        asm volatile("sidt %0" : "=m"(table));
        return table;
    };
    CHECK_EQ(stored_gdt().base, gdt_register().base);
    CHECK_EQ(stored_gdt().limit, gdt_register().limit);
    CHECK_EQ(stored_idt().base, idt_register().base);
    CHECK_EQ(stored_idt().limit, idt_register().limit);
    std::uint32_t value = 0;
    asm volatile("str %0" : "=r"(value));
    CHECK_EQ(value & 0xffff, task_state);
    asm volatile("sldt %0" : "=r"(value));
    CHECK_EQ(value & 0xffff, 0);
    asm volatile("smsw %0" : "=r"(value));
    CHECK_EQ(value & 0xffff, read_cr0() & 0xffff);

    // Tables that are not there can be loaded: only their use would fault.
    for (const std::uint64_t base : {std::uint64_t{0}, window - page_4k, slot_base(511), all_ones - 0xfff}) {
        for (const unsigned limit : {0U, 0xffffU}) {
            const TableRegister table{.limit = static_cast<std::uint16_t>(limit), .base = base};
            load_gdt(table);
            const TableRegister gdt = stored_gdt();
            load_gdt(gdt_register());
            load_idt(table);
            const TableRegister idt = stored_idt();
            load_idt(idt_register());
            CHECK_EQ(gdt.base, base);
            CHECK_EQ(gdt.limit, limit);
            CHECK_EQ(idt.base, base);
            CHECK_EQ(idt.limit, limit);
        }
    }
    const TableRegister wild{.limit = 0xffff, .base = not_canonical};
    if (!qemu) { // which takes any address
        Trap trap = PROBE("lgdt %0", : : "m"(wild));
        CHECK(trap.is_fault(vector_gp));
        trap = PROBE("lidt %0", : : "m"(wild));
        CHECK(trap.is_fault(vector_gp));
    }
    const Trap trap = PROBE("lgdt (%0)", : : "r"(slot_base(99)));
    CHECK(trap.is_page_fault(0, slot_base(99)));

    const auto load_task = [](std::uint64_t selector) { return PROBE("ltr %w0", : : "r"(selector)); };
    if (!qemu) // which takes it
        CHECK(load_task(0).is_fault(vector_gp));
    CHECK(load_task(task_state).is_fault(vector_gp, task_state)); // it is busy
    CHECK(load_task(kernel_data).is_fault(vector_gp, kernel_data));
    CHECK(load_task(0xfff8).is_fault(vector_gp, 0xfff8));
    const auto load_ldt = [](std::uint64_t selector) { return PROBE("lldt %w0", : : "r"(selector)); };
    CHECK(load_ldt(0).none());
    CHECK(load_ldt(kernel_data).is_fault(vector_gp, kernel_data));
    CHECK(load_ldt(task_state).is_fault(vector_gp, task_state));
    CHECK(load_ldt(0xfff8).is_fault(vector_gp, 0xfff8));
    print("hostile: descriptor tables\n");
}

// Registers of the CPU

void model_specific_registers() {
    const auto read = [](std::uint64_t index) { return PROBE("rdmsr", : : "c"(index) : "rax", "rdx"); };
    const auto write = [](std::uint64_t index, std::uint64_t value) {
        return PROBE("wrmsr", : : "c"(index), "a"(value & 0xffff'ffff), "d"(value >> 32));
    };
    struct Range {
        std::uint64_t first, count;
    };
    for (const Range range :
         {Range{0, 0x20}, Range{0x170, 0x40}, Range{0x480, 0x20}, Range{0x4b56'4d00, 0x10},
          Range{0xc000'0080, 0x8}, Range{0xc000'0100, 0x8}, Range{0xc001'0110, 0x10}})
        for (std::uint64_t index = range.first; index < range.first + range.count; ++index) {
            const Trap trap = read(index); // which of them exist is the CPU's business
            CHECK(trap.none() || trap.is_fault(vector_gp));
        }
    if (!qemu)
        for (std::uint64_t index = 0x1234'0000; index < 0x1234'0010; ++index) {
            CHECK(read(index).is_fault(vector_gp));
            CHECK(write(index, 1).is_fault(vector_gp));
        }

    const std::uint64_t lstar = read_msr(msr_lstar);
    write_msr(msr_lstar, slot_base(300));
    CHECK_EQ(read_msr(msr_lstar), slot_base(300)); // what is read is what was written, not what is in force
    if (!qemu) {
        CHECK(write(msr_lstar, not_canonical).is_fault(vector_gp));
        CHECK(write(msr_fs_base, not_canonical).is_fault(vector_gp));
        CHECK(write(msr_kernel_gs_base, not_canonical).is_fault(vector_gp));
    }
    write_msr(msr_lstar, lstar);

    constexpr std::uint64_t efer_lme = 1 << 8;
    constexpr std::uint64_t efer_lma = 1 << 10;
    const std::uint64_t efer = read_msr(msr_efer);
    CHECK_EQ(efer & (efer_sce | efer_lme | efer_lma | efer_nxe), efer_sce | efer_lme | efer_lma | efer_nxe);
    if (!qemu) {                                                      // which ignores what it does not like
        CHECK(write(msr_efer, efer & ~efer_lme).is_fault(vector_gp)); // not while paging is on
        CHECK(write(msr_efer, efer | std::uint64_t{1} << 63).is_fault(vector_gp));
    }
    CHECK(write(msr_efer, efer & ~efer_sce).none());
    CHECK_EQ(read_msr(msr_efer), efer & ~efer_sce);
    CHECK(write(msr_efer, efer).none());
    CHECK_EQ(read_msr(msr_efer), efer);

    const std::uint64_t apic_base = read_msr(msr_apic_base);
    CHECK(write(msr_apic_base, apic_base).none());
    CHECK_EQ(read_msr(msr_apic_base), apic_base);
    print("hostile: model-specific registers\n");
}

void control_registers() {
    const std::uint64_t cr0 = read_cr0();
    const std::uint64_t cr3 = read_cr3();
    const std::uint64_t cr4 = read_cr4();
    if (!qemu) { // which does as it is told
        constexpr std::uint64_t pe = 1;
        constexpr std::uint64_t nw = std::uint64_t{1} << 29;
        constexpr std::uint64_t pg = std::uint64_t{1} << 31;
        constexpr std::uint64_t pae = std::uint64_t{1} << 5;
        constexpr std::uint64_t reserved = std::uint64_t{1} << 63;
        for (const std::uint64_t value : {cr0 & ~pg, cr0 & ~pe, cr0 | nw, cr0 | reserved})
            CHECK(PROBE("mov %0, %%cr0", : : "r"(value)).is_fault(vector_gp));
        for (const std::uint64_t value : {cr4 & ~pae, cr4 | reserved})
            CHECK(PROBE("mov %0, %%cr4", : : "r"(value)).is_fault(vector_gp));
        if (physical_address_bits() < 52)
            CHECK(PROBE("mov %0, %%cr3", : : "r"(cr3 | std::uint64_t{1} << 51)).is_fault(vector_gp));
    }
    CHECK_EQ(read_cr0(), cr0);
    CHECK_EQ(read_cr3(), cr3);
    CHECK_EQ(read_cr4(), cr4);
    write_cr3(cr3 | 0x18); // PCD and PWT: no other tables
    CHECK_EQ(read_cr3(), cr3 | 0x18);
    write_cr3(cr3);
    CHECK(PROBE("mov %%cr1, %%rax", : : : "rax").is_fault(vector_ud));
    CHECK(PROBE("rsm", : :).is_fault(vector_ud));
    print("hostile: control registers\n");
}

// Ports and jumps

void ports() {
    // Reading is harmless at every port. Where nothing is, it gives all ones, in every width.
    for (unsigned port = 0; port < 0x400; ++port)
        static_cast<void>(in8(static_cast<std::uint16_t>(port)));
    for (std::uint16_t port = 0x1100; port < 0x1140; ++port) {
        out8(port, 0x5a);
        CHECK_EQ(in8(port), 0xff);
    }
    out32(0x1100, 0x1234'5678);
    CHECK_EQ(in16(0x1100), 0xffff);
    CHECK_EQ(in32(0x1100), 0xffff'ffff);
    CHECK_EQ(in32(0xfffc), 0xffff'ffff);

    // String instructions go through memory, and fault there like any other access.
    std::uint8_t bytes[40] = {};
    void* target = bytes;
    std::uint64_t count = sizeof(bytes);
    asm volatile("rep insb" : "+D"(target), "+c"(count) : "d"(0x1100) : "memory");
    CHECK_EQ(count, 0);
    CHECK(target == bytes + sizeof(bytes));
    for (const std::uint8_t byte : bytes)
        CHECK_EQ(byte, 0xff);
    std::uint64_t source = slot_base(99);
    Trap trap = PROBE("outsb", : "+S"(source) : "d"(0x1100) : "memory");
    CHECK(trap.is_page_fault(0, slot_base(99)));
    trap = PROBE("insl", : "+D"(source) : "d"(0x1100) : "memory");
    CHECK(trap.is_page_fault(pf_write, slot_base(99)));
    print("hostile: ports\n");
}

void jumps() {
    for (const std::uint64_t target : {not_canonical, slot_base(256) - page_4k, std::uint64_t{1} << 47}) {
        // Reported at the jump or at its target: CPUs differ.
        const auto check = [&](const Trap& trap) {
            CHECK_EQ(trap.frame.vector, vector_gp);
            CHECK_EQ(trap.frame.error, 0);
            CHECK(trap.frame.rip == trap.start || trap.frame.rip == target);
        };
        check(PROBE("jmp *%0", : : "r"(target)));
        check(PROBE_SEQUENCE("mov %%rsp, %%rbx", "call *%0", "mov %%rbx, %%rsp",
                             :
                             : "r"(target)
                             : "rbx", "memory"));
        check(PROBE_SEQUENCE("mov %%rsp, %%rbx\n push %0", "ret", "mov %%rbx, %%rsp",
                             :
                             : "r"(target)
                             : "rbx", "memory"));
    }
    for (const unsigned slot : {3U, 255U, 300U, 511U})
        CHECK(probe_fetch(slot_base(slot)).is_page_fault(pf_fetch, slot_base(slot)));
    print("hostile: jumps\n");
}

} // namespace

extern "C" int kernel_main(const BootParams& boot) {
    install_descriptors();
    init_memory(boot);
    enable_user_mode();
    qemu = boot.has_option("qemu");
    const AddressSpace space = AddressSpace::create();
    space.map(window, allocate_frame(), pte_kernel_rw);
    space.map(stack_top - page_4k, allocate_frame(), pte_user_rw);
    map_programs(space, programs);
    space.load();

    empty_slots();
    claimed_slots(space);
    physical_addresses(space, boot.ram_end());
    circular_tables(space);
    segments();
    descriptor_tables();
    model_specific_registers();
    control_registers();
    ports();
    jumps();
    print("hostile: passed\n");
    return 0;
}
