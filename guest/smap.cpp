// smap: supervisor-mode access prevention. Proves that with CR4.SMAP set the kernel's reads and writes of
// user pages fault, with the right error code, unless RFLAGS.AC is set; that the other rights still count
// then; that fetches, programs and the kernel's own pages are not concerned; that what the CPU reads by
// itself is not helped by AC; and how AC gets from program to kernel and back. CR0.AM, which AC is shared
// with, checks programs only. Intel SDM vol. 3A ch. 4.6.1 and 6.15, vol. 2 STAC and CLAC. Outcome: passed,
// also where the CPU does not offer SMAP.
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

constexpr unsigned vector_ac = 17;
constexpr unsigned vector_call = 0x80;    // open to programs; ends run_user()
constexpr unsigned vector_handled = 0x82; // open to programs; its handler looks around
constexpr std::uint64_t ret = 0xc3;

constexpr std::uint64_t base = slot_base(2);
constexpr std::uint64_t user_page = base;
constexpr std::uint64_t user_read_only = base + page_4k;
constexpr std::uint64_t kernel_page = base + 2 * page_4k;
constexpr std::uint64_t missing = base + 3 * page_4k;
constexpr std::uint64_t local_table = base + 4 * page_4k;
constexpr std::uint64_t user_code_page = base + 5 * page_4k;
constexpr std::uint64_t kernel_branch = base + page_1g; // a user page, but its level 2 entry is the kernel's
constexpr std::uint64_t large_user_page = base + 2 * page_1g;
constexpr std::uint64_t programs = base + 3 * page_1g;
constexpr std::uint64_t stack_top = programs + page_2m;

/// Not inlined between an stac and the access that it is for.
std::uint64_t read_flags() {
    std::uint64_t flags = 0;
    asm volatile("pushfq\n pop %0" : "=r"(flags) : : "memory");
    return flags;
}
/// Changes AC without an instruction that traps on any host.
void popf_ac(bool set) {
    const std::uint64_t flags = set ? read_flags() | rflags_ac : read_flags() & ~rflags_ac;
    asm volatile("push %0\n popfq" : : "r"(flags) : "memory", "cc");
}
bool ac_is_set() {
    return (read_flags() & rflags_ac) != 0;
}

AddressSpace make_space() {
    const AddressSpace space = AddressSpace::create();
    space.map(user_page, allocate_frame(), pte_user_rw);
    space.map(user_read_only, allocate_frame(), pte_present | pte_user);
    space.map(kernel_page, allocate_frame(), pte_kernel_rw);
    space.map(local_table, allocate_frame(), pte_user_rw);
    space.map(user_code_page, allocate_frame(), pte_user_rw);
    space.map(kernel_branch, allocate_frame(), pte_user_rw);
    space.entry(kernel_branch, 2) &= ~pte_user;
    space.map(large_user_page, allocate_frames(512, page_2m), pte_user_rw, 2);
    space.map(stack_top - page_4k, allocate_frame(), pte_user_rw);
    map_programs(space, programs);
    space.load();
    return space;
}

void turn_on() {
    clac();
    word(user_page) = ret; // not prevented yet, whatever AC is
    stac();
    CHECK(ac_is_set());
    CHECK_EQ(word(user_page), ret);
    clac();
    CHECK(!ac_is_set());
    CHECK_EQ(word(large_user_page), 0);
    CHECK_EQ(word(user_read_only), 0);
    write_cr4(read_cr4() | cr4_smap); // counts at once for what is in the TLB
    CHECK(probe_read(user_page).is_page_fault(pf_present, user_page));
    CHECK(probe_write(user_page, 0).is_page_fault(pf_present | pf_write, user_page));
    write_cr4(read_cr4() & ~cr4_smap);
    CHECK_EQ(word(user_page), ret);
    write_cr4(read_cr4() | cr4_smap);
    CHECK(probe_read(user_page).is_page_fault(pf_present, user_page));
    print("smap: turned on\n");
}

/// The kernel's data accesses, by all that has a say.
void accesses(const AddressSpace& space) {
    for (const bool wp : {true, false}) {
        write_cr0(wp ? read_cr0() | cr0_wp : read_cr0() & ~cr0_wp);
        for (unsigned round = 0; round < 4; ++round) {
            const bool ac = round % 2 == 1;
            if (ac)
                stac();
            else
                clac();
            for (const std::uint64_t page : {user_page, large_user_page, large_user_page + page_2m - 8}) {
                Word& entry = space.entry(page, page == user_page ? 1 : 2);
                entry &= ~(pte_accessed | pte_dirty);
                invlpg(page);
                const Trap read = probe_read(page);
                const Trap write = probe_write(page, ret);
                if (ac) {
                    CHECK(read.none() && write.none());
                    CHECK_EQ(entry & (pte_accessed | pte_dirty), pte_accessed | pte_dirty);
                } else {
                    CHECK(read.is_page_fault(pf_present, page));
                    CHECK(write.is_page_fault(pf_present | pf_write, page));
                    CHECK_EQ(read.frame.rflags & rflags_ac, 0);
                    CHECK_EQ(entry & pte_dirty, 0);
                }
            }
            invlpg(user_read_only); // KVM's shadow paging lets it be the kernel's after a write without WP
            const Trap read = probe_read(user_read_only);
            CHECK(ac ? read.none() : read.is_page_fault(pf_present, user_read_only));
            const Trap write = probe_write(user_read_only, ret);
            CHECK(ac && !wp ? write.none() : write.is_page_fault(pf_present | pf_write, user_read_only));
            CHECK_EQ(write.none() ? rflags_ac : write.frame.rflags & rflags_ac, ac ? rflags_ac : 0);
            CHECK(probe_read(missing).is_page_fault(0, missing));
            for (const std::uint64_t page : {kernel_page, kernel_branch}) {
                CHECK(probe_write(page, ret).none());
                CHECK_EQ(word(page), ret);
            }
            CHECK_EQ(ac_is_set(), ac);
        }
    }
    write_cr0(read_cr0() | cr0_wp);
    clac();
    print("smap: accesses\n");
}

/// Fetches are SMEP's business. A page that the kernel has executed is still none that it may read.
void fetches(const AddressSpace& space) {
    stac();
    word(user_code_page) = ret;
    clac();
    CHECK(probe_read(user_code_page).is_page_fault(pf_present, user_code_page));
    CHECK(probe_fetch(user_code_page).none());
    space.load(); // a hypervisor on page tables that cannot tell fetches from reads may need this
    CHECK(probe_read(user_code_page).is_page_fault(pf_present, user_code_page));
    CHECK(probe_write(user_code_page, 0).is_page_fault(pf_present | pf_write, user_code_page));
    CHECK(probe_fetch(user_code_page).none());
    print("smap: fetches\n");
}

/// Instructions that emulators do themselves: an operand is an explicit access.
void operands() {
    TableRegister table{};
    const auto store = [] { return PROBE("sgdt (%0)", : : "r"(user_page + 8) : "memory"); };
    CHECK(store().is_page_fault(pf_present | pf_write, user_page + 8));
    stac();
    CHECK(store().none());
    table = *reinterpret_cast<const TableRegister*>(user_page + 8);
    clac();
    CHECK_EQ(table.base, gdt_register().base);
    const auto load = [] { return PROBE("lgdt (%0)", : : "r"(user_page + 8) : "memory"); };
    CHECK(load().is_page_fault(pf_present, user_page + 8));
    stac();
    CHECK(load().none());
    word(user_page + 8) = 0;
    CHECK(PROBE("mov (%0), %%fs", : : "r"(user_page + 8) : "memory").none());
    clac();
    CHECK(PROBE("mov (%0), %%fs",
                :
                : "r"(user_page + 8)
                : "memory")
              .is_page_fault(pf_present, user_page + 8));
    print("smap: operands\n");
}

USER_PROGRAM(program_load_segment, "mov %edi, %fs\n syscall");
USER_PROGRAM(program_access, "mov (%rdi), %rax\n mov %rax, 8(%rdi)\n syscall");
USER_PROGRAM(program_misaligned, "mov 1(%rdi), %rax\n syscall");
USER_PROGRAM(program_int_call, "int $0x80\n syscall");
USER_PROGRAM(program_int_handled, "int $0x82\n syscall");

TrapFrame run(void (*program)(), bool ac, std::uint64_t rdi = 0) {
    TrapFrame frame = user_frame(program_address(program), stack_top);
    frame.rflags |= ac ? rflags_ac : 0;
    frame.rdi = rdi;
    run_user(frame);
    CHECK(frame.from_user());
    CHECK_EQ(frame.rflags & rflags_ac, ac ? rflags_ac : 0);
    return frame;
}

/// A local descriptor table in a user page: the CPU reads it as level 0, and not for an operand.
void implicit_accesses(const AddressSpace& space, bool qemu) {
    constexpr std::uint64_t data_segment = 0x00cf'f300'0000'ffff; // accessed, for programs
    constexpr std::uint64_t local_descriptor = 0x0000'8200'0000'0007;
    constexpr std::uint16_t local_selector = gdt_slots * 8;
    constexpr std::uint64_t in_local_table = 4 | 3; // its first descriptor
    alignas(16) static std::uint64_t gdt[gdt_slots + 2];
    const TableRegister old = gdt_register();
    for (unsigned i = 0; i < gdt_slots; ++i)
        gdt[i] = word(old.base + std::uint64_t{i} * 8);
    gdt[gdt_slots] = local_descriptor | (local_table & 0xff'ffff) << 16 | (local_table >> 24 & 0xff) << 56;
    gdt[gdt_slots + 1] = local_table >> 32;
    load_gdt({.limit = sizeof(gdt) - 1, .base = reinterpret_cast<std::uint64_t>(gdt)});
    asm volatile("lldt %w0" : : "r"(local_selector) : "memory");
    stac();
    word(local_table) = data_segment;
    clac();

    const auto load = [] { return PROBE("mov %0, %%fs", : : "r"(in_local_table) : "memory"); };
    CHECK(load().is_page_fault(pf_present, local_table));
    stac();
    if (!qemu) // which lets AC help here
        CHECK(load().is_page_fault(pf_present, local_table));
    clac();
    for (const bool ac : {false, true}) {
        const TrapFrame frame = run(program_load_segment, ac, in_local_table);
        CHECK(frame.vector == vector_pf && frame.error == pf_present && read_cr2() == local_table);
        CHECK_EQ(frame.rip, program_address(program_load_segment));
        clac(); // which the program may have brought with it
    }
    Word& entry = space.entry(local_table);
    entry &= ~pte_user;
    invlpg(local_table);
    CHECK(load().none());
    for (const bool ac : {false, true})
        CHECK_EQ(run(program_load_segment, ac, in_local_table).vector, vector_syscall);
    asm volatile("mov %0, %%fs\n lldt %w0" : : "r"(0) : "memory");
    load_gdt(old);
    print("smap: implicit accesses\n");
}

struct {
    bool ac;
    std::uint64_t seen;
} in_handler;

/// AC across changes of privilege. Programs themselves are not prevented from anything.
void privilege_changes() {
    stac();
    word(user_page) = 0x1234;
    clac();
    for (const bool ac : {false, true}) {
        CHECK_EQ(run(program_access, ac, user_page).vector, vector_syscall);
        CHECK(!ac_is_set()); // FMASK's doing
        CHECK(probe_read(user_page).is_page_fault(pf_present, user_page));
        stac();
        CHECK_EQ(word(user_page + 8), 0x1234);
        word(user_page + 8) = 0;

        CHECK_EQ(run(program_access, ac, kernel_page).error, pf_present | pf_user);
        CHECK_EQ(ac_is_set(), ac); // exceptions and interrupts leave it
        CHECK_EQ(run(program_int_call, ac).vector, vector_call);
        CHECK_EQ(ac_is_set(), ac);
        if (ac) {
            CHECK_EQ(word(user_page), 0x1234);
        } else {
            CHECK(probe_read(user_page).is_page_fault(pf_present, user_page));
        }
        clac();
    }
    // A handler of the kernel's, with what its program had in AC; its IRETQ brings it back.
    set_handler(vector_handled, [](TrapFrame&) {
        in_handler.ac = ac_is_set();
        if (in_handler.ac)
            in_handler.seen = word(user_page);
        clac();
    });
    for (const bool ac : {false, true}) {
        in_handler = {};
        CHECK_EQ(run(program_int_handled, ac).vector, vector_syscall);
        CHECK_EQ(in_handler.ac, ac);
        CHECK_EQ(in_handler.seen, ac ? 0x1234 : 0);
        // From the kernel, the same.
        if (ac)
            stac();
        asm volatile("int $0x82" : : : "memory");
        CHECK_EQ(in_handler.ac, ac);
        CHECK_EQ(ac_is_set(), ac);
        clac();
    }
    print("smap: privilege changes\n");
}

/// POPF, which hypervisors may not see.
void popf(const AddressSpace& space) {
    for (unsigned round = 0; round < 3; ++round) {
        popf_ac(true);
        CHECK(ac_is_set());
        CHECK_EQ(word(user_page), 0x1234);
        word(user_page + 16) = round;
        popf_ac(false);
        CHECK(!ac_is_set());
        space.load(); // whoever did not see it has a chance now
        CHECK(probe_read(user_page).is_page_fault(pf_present, user_page));
        CHECK(probe_write(user_page, 0).is_page_fault(pf_present | pf_write, user_page));
    }
    print("smap: popf\n");
}

/// AC's other use: with CR0.AM it makes the CPU check alignment, at CPL 3 only.
void alignment(bool qemu) {
    stac();
    word(user_page) = 0x1122'3344'5566'7788;
    word(user_page + 8) = 0x99;
    clac();
    constexpr std::uint64_t misaligned = 0x9911'2233'4455'6677;
    const auto load = [] {
        std::uint64_t value = 0;
        asm volatile("mov 1(%1), %0" : "=r"(value) : "r"(user_page) : "memory");
        return value;
    };
    for (const bool am : {false, true}) {
        write_cr0(am ? read_cr0() | cr0_am : read_cr0() & ~cr0_am);
        for (unsigned round = 0; round < 3; ++round) {
            stac();
            CHECK_EQ(load(), misaligned);
            clac();
            popf_ac(true);
            CHECK_EQ(load(), misaligned);
            popf_ac(false);
            CHECK(!ac_is_set());
        }
        CHECK_EQ(run(program_misaligned, false, user_page).rax, misaligned);
        if (am && qemu) // which checks no alignment
            continue;
        const TrapFrame frame = run(program_misaligned, true, user_page);
        if (am) {
            CHECK(frame.vector == vector_ac && frame.error == 0);
            CHECK_EQ(frame.rip, program_address(program_misaligned));
            CHECK(ac_is_set());
            clac();
        } else {
            CHECK_EQ(frame.vector, vector_syscall);
            CHECK_EQ(frame.rax, misaligned);
        }
    }
    write_cr0(read_cr0() & ~cr0_am);
    print("smap: alignment\n");
}

} // namespace

extern "C" int kernel_main(const BootParams& boot) {
    install_descriptors();
    init_memory(boot);
    enable_user_mode();
    if (!has_smap()) {
        CHECK(PROBE("mov %0, %%cr4", : : "r"(read_cr4() | cr4_smap) : "memory").is_fault(vector_gp));
        print("smap: this CPU does not offer it, and refuses it\n");
        print("smap: passed\n");
        return 0;
    }
    const bool qemu = boot.has_option("qemu");
    set_gate(vector_call, {.privilege = 3});
    set_gate(vector_handled, {.privilege = 3});
    const AddressSpace space = make_space();
    turn_on();
    accesses(space);
    operands();
    implicit_accesses(space, qemu);
    privilege_changes();
    popf(space);
    alignment(qemu || boot.has_option("qemu-host"));
    fetches(space);
    write_cr4(read_cr4() & ~cr4_smap);
    CHECK(probe_read(user_page).none());
    print("smap: passed\n");
    return 0;
}
