// exceptions: what the CPU pushes for each exception, and where. Proves vector, error code, saved RIP (at the
// instruction for faults, behind it for traps), the saved stack and flags; gate types and their effect on IF;
// the interrupt stack table; absent gates, bad stacks and the double faults they lead to; that a handler may
// change the frame; single steps, also over instructions that a hypervisor emulates. Intel SDM vol. 3A ch. 6.
// Outcome: passed.
#include "guest/runtime/boot.hpp"
#include "guest/runtime/console.hpp"
#include "guest/runtime/cpu.hpp"
#include "guest/runtime/descriptors.hpp"
#include "guest/runtime/paging.hpp"
#include "guest/runtime/process.hpp"
#include "guest/runtime/timer.hpp"
#include "guest/runtime/traps.hpp"

#include <cstdint>
#include <initializer_list>

using namespace umbra::guest;

namespace {

constexpr std::uint64_t not_canonical = std::uint64_t{1} << 63;
constexpr std::uint64_t unmapped = slot_base(9);
constexpr std::uint64_t mapped_end = slot_base(8) + page_4k; // of a single page
constexpr std::uint64_t beyond_gdt = gdt_slots * 8 + 64;
constexpr std::uint64_t external = 1; // EXT of a selector error code
constexpr std::uint64_t in_idt = 2;   // IDT of a selector error code
constexpr unsigned vector_outer = 0x90;
constexpr unsigned vector_inner = 0x91;

bool qemu;      // the CPU is QEMU's own emulation
bool qemu_host; // memory is accessed by QEMU's emulation

/// The error code that names a gate; QEMU doubles the index.
std::uint64_t gate_error(std::uint64_t vector) {
    return vector * (qemu ? 16 : 8) | in_idt;
}

/// The parts of the frame that do not depend on the exception.
void check_frame(const Trap& trap) {
    CHECK_EQ(trap.frame.cs, kernel_code);
    CHECK_EQ(trap.frame.ss, kernel_data);
    CHECK_EQ(trap.frame.rflags & (rflags_fixed | rflags_if | rflags_tf), rflags_fixed);
}

void faults() {
    Trap trap = PROBE("xor %%edx, %%edx\n div %%rcx", : : "c"(0), "a"(1) : "rdx", "cc");
    CHECK_EQ(trap.frame.vector, vector_de);
    CHECK_EQ(trap.frame.rip, trap.start + 2);
    check_frame(trap);
    trap = PROBE("idivl %%ecx", : : "c"(-1), "a"(0x8000'0000), "d"(-1) : "cc"); // the quotient does not fit
    CHECK(trap.is_fault(vector_de));

    trap = PROBE("ud2", : :);
    CHECK(trap.is_fault(vector_ud));
    check_frame(trap);
    trap = PROBE(".byte 0x06", : :); // push %es, which 64-bit mode does not have
    CHECK(trap.is_fault(vector_ud));

    trap = PROBE("mov (%0), %%rax", : : "r"(not_canonical) : "rax");
    CHECK(trap.is_fault(vector_gp));
    check_frame(trap);
    trap = PROBE("mov %%rax, (%0)", : : "r"(slot_base(256) - 0x1000));
    CHECK(trap.is_fault(vector_gp));
    if (!qemu) { // which has every register, and no reserved bits
        trap = PROBE("rdmsr", : : "c"(0x1234'5678) : "rax", "rdx");
        CHECK(trap.is_fault(vector_gp));
        trap = PROBE("mov %0, %%cr4", : : "r"(read_cr4() | std::uint64_t{1} << 63));
        CHECK(trap.is_fault(vector_gp));
    }

    trap = probe_write(unmapped + 0x123, 0);
    CHECK(trap.is_page_fault(pf_write, unmapped + 0x123));
    check_frame(trap);
    print("exceptions: #DE #UD #GP #PF\n");
}

void traps() {
    Trap trap = PROBE("int3", : :);
    CHECK(trap.is_trap(vector_bp));
    check_frame(trap);
    trap = PROBE(".byte 0xcd, 3", : :); // the long form of it
    CHECK(trap.is_trap(vector_bp));
    trap = PROBE("int $0x80", : :);
    CHECK(trap.is_trap(0x80));
    trap = PROBE("int $0xff", : :);
    CHECK(trap.is_trap(0xff));

    // An exception's vector used as a software interrupt: no error code, so it borrows the stub of a vector
    // without one.
    const TableRegister idt = idt_register();
    constexpr std::uint64_t gate_size = 16; // the first half is all that differs
    Word& gate = word(idt.base + vector_pf * gate_size);
    const std::uint64_t own_gate = gate;
    gate = word(idt.base + 0x80 * gate_size);
    trap = PROBE("int $14", : :);
    gate = own_gate;
    CHECK(trap.is_trap(0x80));
    check_frame(trap);
    print("exceptions: #BP and software interrupts\n");
}

void segments() {
    const auto load_ds = [](std::uint64_t selector) { return PROBE("mov %w0, %%ds", : : "r"(selector)); };
    CHECK(load_ds(0).none());
    CHECK(load_ds(3).none());
    CHECK(load_ds(kernel_data).none());
    CHECK(load_ds(user_data).none());
    CHECK(load_ds(beyond_gdt).is_fault(vector_gp, beyond_gdt));
    CHECK(load_ds(beyond_gdt | 3).is_fault(vector_gp, beyond_gdt));
    CHECK(load_ds(kernel_data | 4).is_fault(vector_gp, kernel_data | 4)); // of the LDT, which is null
    CHECK(load_ds(task_state).is_fault(vector_gp, task_state));
    CHECK(load_ds(absent_data).is_fault(vector_np, absent_data));
    CHECK(load_ds(kernel_data).none());

    const auto load_ss = [](std::uint64_t selector) { return PROBE("mov %w0, %%ss", : : "r"(selector)); };
    CHECK(load_ss(absent_data).is_fault(vector_ss, absent_data));
    CHECK(load_ss(user_data).is_fault(vector_gp, user_data & ~3));
    CHECK(load_ss(kernel_code).is_fault(vector_gp, kernel_code));
    CHECK(load_ss(beyond_gdt).is_fault(vector_gp, beyond_gdt));
    CHECK(load_ss(0).none()); // a kernel in 64-bit mode needs no stack segment
    CHECK(load_ss(kernel_data).none());

    // Far returns and IRETQ to what cannot be code: the fault is reported at them, and RSP stays.
    for (const unsigned selector : {unsigned{kernel_data}, unsigned{beyond_gdt}, unsigned{task_state}}) {
        std::uint64_t rsp = 0;
        Trap trap = PROBE_SEQUENCE("push %1\n lea 771f(%%rip), %%rax\n push %%rax\n mov %%rsp, %0", "lretq",
                                   "add $16, %%rsp",
                                   : "=&r"(rsp)
                                   : "r"(std::uint64_t{selector})
                                   : "rax", "memory");
        CHECK(trap.is_fault(vector_gp, selector));
        CHECK_EQ(trap.frame.rsp, rsp);
        trap = PROBE_SEQUENCE("mov %%rsp, %%rax\n push %2\n push %%rax\n push $2\n push %1\n"
                              "lea 771f(%%rip), %%rax\n push %%rax\n mov %%rsp, %0",
                              "iretq", "add $40, %%rsp",
                              : "=&r"(rsp)
                              : "r"(std::uint64_t{selector}), "r"(std::uint64_t{kernel_data})
                              : "rax", "memory");
        CHECK(trap.is_fault(vector_gp, selector));
        CHECK_EQ(trap.frame.rsp, rsp);
    }
    print("exceptions: #NP #SS #GP of segments\n");
}

void stack_faults() {
    Trap trap = PROBE_SEQUENCE("mov %%rsp, %%rbx\n mov %0, %%rsp", "mov (%%rsp), %%rax", "mov %%rbx, %%rsp",
                               :
                               : "r"(not_canonical)
                               : "rax", "rbx", "memory");
    // The stack is unusable, and #SS finds no other: a double fault, on the stack of the interrupt stack
    // table.
    CHECK_EQ(trap.frame.vector, vector_df);
    CHECK_EQ(trap.frame.error, 0);
    CHECK_EQ(trap.frame.rsp, not_canonical);

    set_gate(vector_ss, {.stack = spare_stack});
    trap = PROBE_SEQUENCE("mov %%rsp, %%rbx\n mov %0, %%rsp", "mov 8(%%rsp), %%rax", "mov %%rbx, %%rsp",
                          :
                          : "r"(not_canonical)
                          : "rax", "rbx", "memory");
    if (!qemu_host) // which raises #GP, whatever the register
        CHECK(trap.is_fault(vector_ss));
    CHECK_EQ(trap.frame.rsp, not_canonical);
    trap = PROBE_SEQUENCE("mov %%rbp, %%rbx\n mov %0, %%rbp", "mov 8(%%rbp), %%rax", "mov %%rbx, %%rbp",
                          :
                          : "r"(not_canonical)
                          : "rax", "rbx", "memory");
    if (!qemu_host)
        CHECK(trap.is_fault(vector_ss)); // RBP addresses the stack segment too
    set_gate(vector_ss, {});
    print("exceptions: #SS of addresses\n");
}

void double_faults() {
    // A page fault whose gate is absent.
    set_gate(vector_pf, {.present = false});
    Trap trap = probe_read(unmapped);
    set_gate(vector_pf, {});
    CHECK(trap.is_fault(vector_df));
    check_frame(trap);
    CHECK_EQ(read_cr2(), unmapped);

    // A protection fault whose gate leads into no code segment.
    set_gate(vector_gp, {.selector = kernel_data});
    trap = PROBE("mov (%0), %%rax", : : "r"(not_canonical) : "rax");
    set_gate(vector_gp, {});
    CHECK(trap.is_fault(vector_df));

    // An invalid opcode where the stack has run into a missing page: #UD, #PF, #DF.
    std::uint64_t rsp = unmapped + page_4k;
    trap = PROBE_SEQUENCE("mov %%rsp, %%rbx\n mov %0, %%rsp", "ud2", "mov %%rbx, %%rsp",
                          :
                          : "r"(rsp)
                          : "rbx", "memory");
    CHECK(trap.is_fault(vector_df));
    CHECK_EQ(trap.frame.rsp, rsp);
    CHECK_EQ(read_cr2(), rsp - 8);

    // Where the page fault has a stack of its own it can be delivered.
    set_gate(vector_pf, {.stack = spare_stack});
    trap = PROBE_SEQUENCE("mov %%rsp, %%rbx\n mov %0, %%rsp", "ud2", "mov %%rbx, %%rsp",
                          :
                          : "r"(rsp)
                          : "rbx", "memory");
    CHECK(trap.is_page_fault(pf_write, rsp - 8));
    CHECK_EQ(trap.frame.rsp, rsp);
    set_gate(vector_pf, {});
    print("exceptions: #DF\n");
}

void absent_gates() {
    set_gate(vector_outer, {.present = false});
    Trap trap = PROBE("int $0x90", : :);
    CHECK(trap.is_fault(vector_np, gate_error(vector_outer)));
    set_gate(vector_outer, {.selector = task_state});
    trap = PROBE("int $0x90", : :);
    CHECK(trap.is_fault(vector_gp, task_state));
    set_gate(vector_outer, {});

    set_gate(vector_ud, {.present = false}); // an exception, not an instruction, asked for the gate: EXT
    trap = PROBE("ud2", : :);
    set_gate(vector_ud, {});
    CHECK(trap.is_fault(vector_np, gate_error(vector_ud) | (qemu ? 0 : external)));

    constexpr unsigned gates = 0x90; // a shorter IDT
    TableRegister shorter = idt_register();
    shorter.limit = gates * 16 - 1;
    load_idt(shorter);
    trap = PROBE("int $0x90", : :);
    CHECK(trap.is_fault(vector_gp, gate_error(vector_outer)));
    trap = PROBE("int $0x8f", : :);
    CHECK(trap.is_trap(0x8f));
    load_idt(idt_register());
    trap = PROBE("int $0x90", : :);
    CHECK(trap.is_trap(vector_outer));
    print("exceptions: absent gates\n");
}

TrapFrame outer_frame;
TrapFrame inner_frame;
std::uint64_t frame_address;

void gate_types() {
    // The frame of a trap inside the handler shows the flags that the handler runs with.
    set_handler(vector_outer, [](TrapFrame& frame) {
        outer_frame = frame;
        asm volatile("int $0x91");
    });
    set_handler(vector_inner, [](TrapFrame& frame) { inner_frame = frame; });
    struct Case {
        Gate::Type type;
        bool enabled;
    };
    constexpr Case cases[] = {{Gate::Type::interrupt, false},
                              {Gate::Type::interrupt, true},
                              {Gate::Type::trap, false},
                              {Gate::Type::trap, true}};
    for (const Case& c : cases) {
        set_gate(vector_outer, {.type = c.type});
        if (c.enabled)
            enable_interrupts();
        asm volatile("int $0x90" : : : "memory");
        CHECK_EQ((outer_frame.rflags & rflags_if) != 0, c.enabled);
        CHECK_EQ((inner_frame.rflags & rflags_if) != 0, c.enabled && c.type == Gate::Type::trap);
        asm volatile("int $0x91" : : : "memory"); // IRETQ has put IF back
        CHECK_EQ((inner_frame.rflags & rflags_if) != 0, c.enabled);
        disable_interrupts();
    }
    asm volatile("int $0x91" : : : "memory");
    CHECK_EQ(inner_frame.rflags & rflags_if, 0);

    // NT stays what POPF made it, and is clear in a handler.
    asm volatile("pushfq\n orq %0, (%%rsp)\n popfq\n int $0x91\n pushfq\n andq %1, (%%rsp)\n popfq"
                 :
                 : "i"(0x4000), "i"(~0x4000)
                 : "memory", "cc");
    CHECK_EQ(inner_frame.rflags & 0x4000, 0x4000);
    set_gate(vector_outer, {});
    set_handler(vector_outer, nullptr);
    set_handler(vector_inner, nullptr);
    print("exceptions: gate types\n");
}

void stacks() {
    set_handler(vector_outer, [](TrapFrame& frame) {
        outer_frame = frame;
        frame_address = reinterpret_cast<std::uint64_t>(&frame);
    });
    for (std::uint64_t misalignment = 0; misalignment < 16; ++misalignment) {
        std::uint64_t rsp = 0;
        std::uint64_t rsp_behind = 0;
        asm volatile("mov %%rsp, %%rbx\n"
                     "sub $256, %%rsp\n"
                     "and $-16, %%rsp\n"
                     "sub %2, %%rsp\n"
                     "mov %%rsp, %0\n"
                     "int $0x90\n"
                     "mov %%rsp, %1\n"
                     "mov %%rbx, %%rsp"
                     : "=&r"(rsp), "=&r"(rsp_behind)
                     : "r"(misalignment)
                     : "rbx", "memory", "cc");
        CHECK_EQ(outer_frame.rsp, rsp);
        CHECK_EQ(rsp_behind, rsp);
        CHECK_EQ(frame_address + sizeof(TrapFrame),
                 rsp & ~std::uint64_t{15}); // aligned before the first push
    }

    set_gate(vector_outer, {.stack = spare_stack});
    std::uint64_t rsp = 0;
    asm volatile("mov %%rsp, %0\n int $0x90" : "=&r"(rsp) : : "memory");
    CHECK_EQ(outer_frame.rsp, rsp);
    CHECK_EQ(outer_frame.ss, kernel_data);
    CHECK_EQ(frame_address + sizeof(TrapFrame), interrupt_stack_top(spare_stack));
    set_gate(vector_outer, {});
    set_handler(vector_outer, nullptr);
    print("exceptions: stacks\n");
}

/// A handler changes registers, flags, stack and the address to go on at.
void changed_frames() {
    set_handler(vector_outer, [](TrapFrame& frame) {
        frame.rax = 0x1111;
        frame.r15 = 0x2222;
        frame.rflags |= 1; // CF
        frame.rip += 2;    // over the ud2
        frame.rsp -= 64;
    });
    std::uint64_t rax = 0;
    std::uint64_t r15 = 0;
    std::uint64_t moved = 0;
    std::uint64_t carry = 0;
    asm volatile("mov %%rsp, %%rbx\n"
                 "clc\n"
                 "int $0x90\n"
                 "ud2\n"
                 "sbb %%rcx, %%rcx\n"
                 "mov %%rbx, %%rdx\n"
                 "sub %%rsp, %%rdx\n"
                 "mov %%rbx, %%rsp\n"
                 "mov %%r15, %1"
                 : "=&a"(rax), "=&r"(r15), "=&d"(moved), "=&c"(carry)
                 :
                 : "rbx", "r15", "memory", "cc");
    CHECK_EQ(rax, 0x1111);
    CHECK_EQ(r15, 0x2222);
    CHECK_EQ(moved, 64);
    CHECK_EQ(carry, ~std::uint64_t{0});
    set_handler(vector_outer, nullptr);
    print("exceptions: changed frames\n");
}

constexpr unsigned max_steps = 16;
std::uint64_t steps[max_steps];
unsigned step_count;

void single_steps() {
    constexpr std::uint64_t dr6_single_step = 1 << 14;
    set_handler(vector_db, [](TrapFrame& frame) {
        CHECK((read_dr6() & dr6_single_step) != 0);
        CHECK(step_count < max_steps);
        steps[step_count++] = frame.rip;
    });
    set_handler(vector_outer, [](TrapFrame&) {});
    write_dr6(0);

    step_count = 0;
    std::uint64_t start = 0;
    std::uint64_t offset_of_end = 0;
    asm volatile("lea 1f(%%rip), %0\n"
                 "mov $(9f - 1f), %1\n"
                 "pushf\n"
                 "orl $0x100, (%%rsp)\n"
                 "popf\n" // the step after the one that sets TF is the first
                 "1: nop\n"
                 "cli\n" // emulated, where the kernel is deprivileged
                 "mov %%cr3, %%rax\n"
                 "mov %%rax, %%cr3\n"
                 ".byte 0xeb, 1\n" // jmp 2f, in its short form
                 "nop\n"
                 "2: int $0x90\n" // TF is clear in the handler, and set again behind IRETQ
                 "nop\n"
                 "pushf\n"
                 "andl $~0x100, (%%rsp)\n"
                 "popf\n"
                 "9: nop"
                 : "=&r"(start), "=&r"(offset_of_end)
                 :
                 : "rax", "memory", "cc");
    // Behind nop, cli, mov, mov, jmp; not behind int, whose handler runs untraced, but behind the nop after
    // it, pushf, and, popf. The lengths are those of the encodings.
    const std::uint64_t expected[] = {1, 2, 5, 8, 11, 14, 15, 22, offset_of_end};
    for (unsigned i = 0; i < step_count; ++i)
        CHECK_EQ(steps[i] - start, expected[i]);
    CHECK_EQ(step_count, sizeof(expected) / sizeof(expected[0]));
    set_handler(vector_db, nullptr);
    set_handler(vector_outer, nullptr);
    print("exceptions: single steps\n");
}

/// Faults in the middle of instructions that repeat: what is done is done, and the registers say how far it
/// got.
void repeated_instructions() {
    const AddressSpace space = AddressSpace::create();
    space.map(mapped_end - page_4k, allocate_frame(), pte_kernel_rw);
    space.load();
    std::uint64_t count = 64;
    std::uint64_t target = mapped_end - 24;
    const Trap trap = PROBE("rep stosb", : "+c"(count), "+D"(target) : "a"(0x5a) : "memory");
    CHECK(trap.is_page_fault(pf_write, mapped_end));
    CHECK_EQ(trap.frame.rcx, 40);
    CHECK_EQ(trap.frame.rdi, mapped_end);
    CHECK_EQ(word(mapped_end - 8), 0x5a5a'5a5a'5a5a'5a5a);
    print("exceptions: repeated instructions\n");
}

} // namespace

extern "C" int kernel_main(const BootParams& boot) {
    install_descriptors();
    init_memory(boot);
    init_pic(0); // some tests set IF
    qemu = boot.has_option("qemu");
    qemu_host = qemu || boot.has_option("qemu-host");

    faults();
    traps();
    segments();
    stack_faults();
    double_faults();
    absent_gates();
    gate_types();
    stacks();
    changed_frames();
    single_steps();
    repeated_instructions();
    print("exceptions: passed\n");
    return 0;
}
