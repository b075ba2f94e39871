// debugregs: breakpoints by the debug registers, as a kernel and its programs meet them. Execution
// breakpoints are faults before the instruction, and RFLAGS.RF gets past them; data breakpoints of all
// lengths, on each kind of access and on what the CPU does by itself, are traps behind it; ports with CR4.DE;
// what DR6 tells and keeps; general detection; steps and MOV SS beside all that; nothing once DR7 is clear.
// Intel SDM vol. 3B ch. 17.2 and 17.3, vol. 3A ch. 6.8.3 and 6.9. Outcome: passed.
//
// The word `qemu`: the CPU is QEMU's own emulation (7.2), in which some breakpoints are not met.
#include "guest/runtime/boot.hpp"
#include "guest/runtime/console.hpp"
#include "guest/runtime/cpu.hpp"
#include "guest/runtime/descriptors.hpp"
#include "guest/runtime/paging.hpp"
#include "guest/runtime/process.hpp"
#include "guest/runtime/traps.hpp"
#include "guest/runtime/user.hpp"

#include <cstdint>

using namespace umbra::guest;

extern "C" {
std::uint64_t pushed_flags = 0;
}

namespace {

bool qemu; // the CPU is QEMU's own emulation

constexpr std::uint64_t programs = slot_base(2), user_stack = slot_base(2) + 0x10'0000;
constexpr std::uint64_t cr4_de = 1U << 3;
constexpr std::uint64_t dr6_none = 0xffff'0ff0, dr6_bd = 1U << 13, dr6_bs = 1U << 14;
constexpr std::uint64_t dr7_none = 0x400, dr7_gd = 1U << 13;
constexpr std::uint64_t rflags_rf = std::uint64_t{1} << 16;

enum On : std::uint64_t { execution = 0, write = 1, port = 2, access = 3 };
enum Length : std::uint64_t { one = 0, two = 1, eight = 2, four = 3 };

constexpr std::uint64_t enable(unsigned number, On on, Length length) {
    return std::uint64_t{2} << (2 * number) | (on | length << 2) << (16 + 4 * number);
}

void set_address(unsigned number, std::uint64_t at) {
    switch (number) {
    case 0:
        asm volatile("mov %0, %%dr0" : : "r"(at));
        return;
    case 1:
        asm volatile("mov %0, %%dr1" : : "r"(at));
        return;
    case 2:
        asm volatile("mov %0, %%dr2" : : "r"(at));
        return;
    default:
        asm volatile("mov %0, %%dr3" : : "r"(at));
    }
}

void control(std::uint64_t dr7) {
    asm volatile("mov %0, %%dr7" : : "r"(dr7 | dr7_none) : "memory");
}

template<class T>
std::uint64_t address_of(T* place) {
    return reinterpret_cast<std::uint64_t>(place);
}

// --- What the handler of #DB sees

struct Hit {
    std::uint64_t rip, status, rflags;
};
volatile Hit hits[8];
volatile std::uint64_t met = 0;
std::uint64_t steps_left = 0; ///< of RFLAGS.TF
bool resumes = true;          ///< sets RFLAGS.RF

void on_debug(TrapFrame& frame) {
    if (const std::uint64_t number = met; number < 8) {
        hits[number].rip = frame.rip;
        hits[number].status = read_dr6();
        hits[number].rflags = frame.rflags;
    }
    met = met + 1;
    write_dr6(0);
    if (resumes)
        frame.rflags |= rflags_rf;
    if (steps_left != 0 && --steps_left == 0)
        frame.rflags &= ~rflags_tf;
}

void expect_none() {
    met = 0;
    steps_left = 0;
}

bool met_once(std::uint64_t rip, std::uint64_t status) {
    const bool as_wanted = met == 1 && hits[0].rip == rip && hits[0].status == (dr6_none | status);
    if (!as_wanted)
        print("debugregs: %lu hits, the first at %#lx with DR6 %#lx, not at %#lx with %#lx\n", met,
              hits[0].rip, hits[0].status, rip, dr6_none | status);
    return as_wanted;
}

/// Runs `text`, behind whose instruction in question is a label 2: the #DB must be there, once.
#define TRAPS(status, text, ...)                                                                             \
    [&] {                                                                                                    \
        expect_none();                                                                                       \
        std::uint64_t behind = 0;                                                                            \
        asm volatile("lea 2f(%%rip), %0\n" text : "=&r"(behind) : __VA_ARGS__);                              \
        return met_once(behind, status);                                                                     \
    }()

alignas(4096) volatile std::uint64_t watched[512];
alignas(4096) volatile std::uint64_t elsewhere[512];

// --- Instructions

void execution_breakpoints() {
    std::uint64_t at = 0;
    for (unsigned number = 0; number < 4; ++number) {
        asm volatile("lea 1f(%%rip), %0\n jmp 3f\n 1: nop\n ret\n 3:" : "=r"(at));
        set_address(number, at);
        control(enable(number, execution, one));
        expect_none();
        asm volatile("call *%0" : : "r"(at) : "memory");
        CHECK(met_once(at, 1U << number));
        CHECK((hits[0].rflags & rflags_rf) == 0);
        control(0);
        set_address(number, 0); // a CPU may tell of conditions that are not enabled, too
    }
    // Without RF it is met again and again.
    set_address(0, at);
    control(enable(0, execution, one));
    expect_none();
    resumes = false;
    set_handler(vector_db, [](TrapFrame& frame) {
        on_debug(frame);
        if (met == 3)
            frame.rflags |= rflags_rf;
    });
    asm volatile("call *%0" : : "r"(at) : "memory");
    CHECK_EQ(met, 3);
    set_handler(vector_db, on_debug);
    resumes = true;
    // In an instruction's middle it is none, and RF is gone behind one instruction.
    asm volatile("lea 1f(%%rip), %0\n jmp 3f\n .balign 64\n 1: mov $1, %%eax\n nop\n ret\n 3:" : "=r"(at));
    set_address(0, at + 1);
    set_address(1, at);
    set_address(2, at + 5);
    control(enable(0, execution, one) | enable(1, execution, one) | enable(2, execution, one));
    expect_none();
    asm volatile("call *%0" : : "r"(at) : "rax", "memory");
    CHECK_EQ(met, 2);
    CHECK(hits[0].rip == at && hits[0].status == (dr6_none | 2));
    CHECK(hits[1].rip == at + 5 && hits[1].status == (dr6_none | 4));
    // Before instructions that trap by themselves.
    asm volatile("lea 1f(%%rip), %0\n jmp 3f\n 1: mov %%cr0, %%rax\n ret\n 3:" : "=r"(at));
    set_address(1, at);
    control(enable(1, execution, one));
    expect_none();
    asm volatile("call *%0" : : "r"(at) : "rax", "memory");
    CHECK(met_once(at, 2));
    control(0);
    print("debugregs: instructions\n");
}

// --- Data

void data_breakpoints() {
    const std::uint64_t at = address_of(&watched[8]);
    set_address(1, at);
    control(enable(1, write, four));
    CHECK(TRAPS(2, "movl $1, (%1)\n 2: nop", "r"(at) : "memory"));
    CHECK(TRAPS(2, "movb $1, 3(%1)\n 2: nop", "r"(at) : "memory"));
    CHECK(TRAPS(2, "movq $1, -4(%1)\n 2: nop", "r"(at) : "memory"));
    CHECK(TRAPS(2, "incb 2(%1)\n 2: nop", "r"(at) : "memory", "cc"));
    expect_none();
    watched[0] = watched[8]; // reads, and others of the page
    watched[9] = 1;
    asm volatile("movb $1, 4(%0)\n movb $1, -1(%0)" : : "r"(at) : "memory");
    CHECK_EQ(met, 0);
    // Each length, aligned by itself.
    constexpr struct {
        Length length;
        std::uint64_t bytes;
    } lengths[] = {{one, 1}, {two, 2}, {four, 4}, {eight, 8}};
    for (const auto& [length, bytes] : lengths) {
        const std::uint64_t first = at + (8 - bytes), last = first + bytes - 1;
        set_address(2, first);
        control(enable(2, access, length));
        CHECK(TRAPS(4, "movb $1, (%1)\n 2: nop", "r"(first) : "memory"));
        CHECK(TRAPS(4, "movb (%1), %%al\n 2: nop", "r"(last) : "rax", "memory"));
        expect_none();
        asm volatile("movb (%0), %%al\n movb (%1), %%al" : : "r"(first - 1), "r"(last + 1) : "rax");
        CHECK_EQ(met, 0);
    }
    // Several at once, and one that is not enabled.
    set_address(0, at);
    set_address(1, at + 8);
    set_address(3, at);
    control(enable(0, write, eight) | enable(1, write, eight));
    write_dr6(0);
    if (!qemu) // which tells of the first alone
        CHECK(TRAPS(3, "movq $1, 4(%1)\n 2: nop", "r"(at) : "memory"));
    // DR6's other bits stay, and B0 to B3 are of the last #DB.
    expect_none();
    write_dr6(dr6_none | dr6_bs | 4);
    asm volatile("movl $1, (%0)\n nop" : : "r"(at) : "memory");
    CHECK_EQ(met, 1);
    CHECK_EQ(hits[0].status, dr6_none | dr6_bs | 1);
    // An iteration of a repeated instruction, with the others behind it.
    set_address(0, at + 16);
    control(enable(0, write, one));
    expect_none();
    std::uint64_t to = at, count = 5;
    asm volatile("rep stosq" : "+D"(to), "+c"(count) : "a"(std::uint64_t{7}) : "memory");
    CHECK_EQ(met, 1);
    CHECK(watched[12] == 7 && count == 0);
    // With RFLAGS.TF, one #DB for both.
    control(enable(0, write, one));
    expect_none();
    steps_left = 1;
    std::uint64_t behind = 0;
    asm volatile("lea 2f(%%rip), %0\n pushfq\n orq $0x100, (%%rsp)\n popfq\n movb $1, 16(%1)\n 2: nop"
                 : "=&r"(behind)
                 : "r"(at)
                 : "memory", "cc");
    CHECK(met_once(behind, 1 | dr6_bs));
    control(0);
    print("debugregs: data\n");
}

/// What the CPU itself reads and writes, which a monitor may do for it.
void implied_accesses() {
    const std::uint64_t at = address_of(&watched[16]);
    set_address(0, at);
    control(enable(0, access, two));
    CHECK(TRAPS(1, "sgdt (%1)\n 2: nop", "r"(at) : "memory"));
    CHECK(TRAPS(1, "smsw (%1)\n 2: nop", "r"(at) : "memory"));
    watched[16] = kernel_data;
    CHECK(TRAPS(1, "mov (%1), %%ds\n 2: nop", "r"(at) : "memory"));
    // A fault, and nothing is told.
    watched[16] = 0xfff8;
    expect_none();
    CHECK(PROBE("mov (%0), %%ds", : : "r"(at) : "memory").is_fault(vector_gp, 0xfff8));
    CHECK(met == 0 || qemu);
    print("debugregs: implied accesses\n");
    // MOV SS holds its own back until the next instruction is done.
    watched[16] = kernel_data;
    if (!qemu)
        CHECK(TRAPS(1, "mov (%1), %%ss\n nop\n 2: nop", "r"(at) : "memory"));
    control(0);
    if (qemu) // which aborts
        return;
    // What the frame of an event meets is told at its handler's first instruction.
    set_handler(0x81, [](TrapFrame&) {});
    expect_none();
    asm volatile("mov %%rsp, %%rax\n and $-16, %%rax\n sub $24, %%rax\n mov %%rax, %%dr0\n mov %0, %%rax\n"
                 "mov %%rax, %%dr7\n int $0x81\n mov %1, %%rax\n mov %%rax, %%dr7"
                 :
                 : "r"(enable(0, write, eight) | dr7_none), "r"(dr7_none)
                 : "rax", "memory", "cc");
    CHECK(met_once(address_of(&trap_stubs[0x81]), 1));
    set_handler(0x81, nullptr);
    print("debugregs: MOV SS, frames\n");
}

// --- Steps

/// IRETQ sets RFLAGS.TF and goes to `text`, with `popped` on the stack and SS's selector in ECX. The #DB must
/// be at its label 2.
#define STEP(popped, text)                                                                                   \
    [&] {                                                                                                    \
        expect_none();                                                                                       \
        steps_left = 1;                                                                                      \
        std::uint64_t behind = 0;                                                                            \
        asm volatile("lea 2f(%%rip), %0\n push %1\n mov %%rsp, %%rdx\n mov %2, %%ecx\n push %2\n"            \
                     "push %%rdx\n pushfq\n orq $0x100, (%%rsp)\n push %3\n push $1f\n"                      \
                     "iretq\n 1: " text "\n lea 8(%%rdx), %%rsp"                                             \
                     : "=&r"(behind)                                                                         \
                     : "r"(std::uint64_t{popped}), "i"(kernel_data), "i"(kernel_code)                        \
                     : "rax", "rcx", "rdx", "memory", "cc");                                                 \
        return met_once(behind, dr6_bs);                                                                     \
    }()

[[gnu::noinline]] void steps() {
    CHECK(STEP(0, "nop\n 2: nop"));
    CHECK(STEP(0, "cli\n 2: nop"));
    if (!qemu) // which does not step behind STI
        CHECK(STEP(0, "sti\n 2: cli"));
    CHECK(STEP(0, "mov %%cr0, %%rax\n 2: nop"));
    CHECK(STEP(0, "mov %%ecx, %%ss\n nop\n 2: nop")); // is held for one instruction
    CHECK(STEP(0, "in $0x21, %%al\n 2: nop"));        // of a device that is KVM's
    CHECK(STEP(0, "in $0x80, %%al\n 2: nop"));
    CHECK(STEP(rflags_fixed, "popfq\n 2: nop")); // which clears it
    CHECK(STEP(0, "pushfq\n 2: pop pushed_flags(%%rip)"));
    CHECK((pushed_flags & rflags_tf) != 0);
    // POPFQ sets it: behind the next instruction.
    expect_none();
    steps_left = 1;
    std::uint64_t behind = 0;
    asm volatile("lea 2f(%%rip), %0\n pushfq\n orq $0x100, (%%rsp)\n popfq\n nop\n 2: nop"
                 : "=&r"(behind)
                 :
                 : "memory", "cc");
    CHECK(met_once(behind, dr6_bs));
}

void single_steps() {
    steps();
    // The same where each instruction is looked at, for breakpoints that are never met.
    set_address(0, address_of(&steps));
    set_address(1, address_of(&steps) + 1024);
    control(enable(0, access, one) | enable(1, access, one));
    steps();
    asm volatile("pushfq\n pop pushed_flags(%%rip)" : : : "memory");
    CHECK((pushed_flags & rflags_tf) == 0);
    control(0);
    print("debugregs: steps\n");
}

// --- The rest

void ports() {
    constexpr std::uint16_t scratch = 0x2ff;
    set_address(3, scratch - 1);
    write_cr4(read_cr4() | cr4_de);
    control(enable(3, port, two));
    CHECK(TRAPS(8, "in %%dx, %%al\n 2: nop", "d"(scratch) : "rax"));
    CHECK(TRAPS(8, "out %%al, %%dx\n 2: nop", "d"(scratch), "a"(1)));
    CHECK(TRAPS(8, "in %%dx, %%ax\n 2: nop", "d"(scratch - 2) : "rax"));
    expect_none();
    (void)in16(scratch - 3);
    CHECK_EQ(met, 0);
    const std::uint64_t in_kernel = 0x21; // of a PIC
    set_address(3, in_kernel);
    control(enable(3, port, one));
    CHECK(TRAPS(8, "in $0x21, %%al\n 2: nop", "r"(0) : "rax"));
    expect_none();
    (void)in8(0x22);
    CHECK_EQ(met, 0);
    control(0);
    write_cr4(read_cr4() & ~cr4_de);
    print("debugregs: ports\n");
}

void general_detection() {
    expect_none();
    control(dr7_gd);
    std::uint64_t at = 0, value = 0;
    asm volatile("lea 1f(%%rip), %0\n 1: mov %%dr0, %1" : "=&r"(at), "=r"(value) : : "memory");
    CHECK(met_once(at, dr6_bd)); // which has cleared GD
    asm volatile("mov %%dr7, %0" : "=r"(value));
    CHECK_EQ(value, dr7_none);
    print("debugregs: general detection\n");
}

[[gnu::noinline]] void off_is_off() {
    const std::uint64_t at = address_of(&watched[8]);
    set_address(0, at);
    control(enable(0, access, eight));
    CHECK(TRAPS(1, "movq $1, (%1)\n 2: nop", "r"(at) : "memory"));
    control(0);
    expect_none();
    watched[8] = watched[9];
    control(enable(0, access, eight) & ~std::uint64_t{3});
    watched[8] = watched[9];
    CHECK_EQ(met, 0);
    set_address(0, address_of(&elsewhere[8]));
    control(enable(0, access, eight));
    watched[8] = 1;
    CHECK_EQ(met, 0);
    elsewhere[8] = 1;
    CHECK_EQ(met, 1);
    control(0);
    print("debugregs: off\n");
}

// --- Programs

USER_PROGRAM(touches, "nop\n mov %rax, (%rdi)\n nop\n ud2");

void programs_meet_them(const AddressSpace& space) {
    map_programs(space, programs);
    space.map(user_stack, allocate_frame(), pte_kernel_rw | pte_user);
    const std::uint64_t begin = program_address(touches);
    set_address(0, begin);
    set_address(1, user_stack + 8);
    control(enable(0, execution, one) | enable(1, write, eight));
    set_handler(vector_db, nullptr); // the program ends there
    TrapFrame frame = user_frame(begin, user_stack + 0x1000);
    frame.rdi = user_stack + 8;
    run_user(frame);
    CHECK_EQ(frame.vector, vector_db);
    CHECK_EQ(frame.rip, begin);
    CHECK_EQ(read_dr6(), dr6_none | 1);
    write_dr6(0);
    frame.rflags |= rflags_rf;
    run_user(frame);
    CHECK_EQ(frame.vector, vector_db);
    CHECK_EQ(frame.rip, begin + 4);
    CHECK_EQ(read_dr6(), dr6_none | 2);
    run_user(frame);
    CHECK_EQ(frame.vector, vector_ud);
    control(0);
    print("debugregs: programs\n");
}

} // namespace

extern "C" int kernel_main(const BootParams& boot) {
    install_descriptors();
    init_memory(boot);
    qemu = boot.has_option("qemu");
    set_handler(vector_db, on_debug);
    write_dr6(0);
    execution_breakpoints();
    data_breakpoints();
    implied_accesses();
    if (!qemu) { // whose nested machines meet neither
        ports();
        general_detection();
    }
    off_is_off();
    single_steps();
    enable_user_mode();
    programs_meet_them(AddressSpace::current());
    print("debugregs: passed\n");
    return 0;
}
