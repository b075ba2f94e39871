// nmi: non-maskable interrupts, which the guest sends to itself by its local APIC, and the timer by the I/O
// APIC. Proves that one comes whatever RFLAGS.IF says, in the kernel and in a program, by the interrupt stack
// table and without; that further ones are held back until the handler's IRET, or that of a fault in it, and
// then are one, however many were sent; that one ends a HLT, but not one that is held back; and that those
// which meet an interrupt shadow leave no trace in what the guest's own instructions do. Intel SDM vol. 3A
// ch. 6.7 and 10.6.1. Outcome: passed.
#include "guest/runtime/boot.hpp"
#include "guest/runtime/console.hpp"
#include "guest/runtime/cpu.hpp"
#include "guest/runtime/descriptors.hpp"
#include "guest/runtime/paging.hpp"
#include "guest/runtime/process.hpp"
#include "guest/runtime/timer.hpp"
#include "guest/runtime/traps.hpp"
#include "guest/runtime/user.hpp"

#include <cstdint>
#include <initializer_list>

using namespace umbra::guest;

namespace {

constexpr unsigned vector_nmi = 2, timer_line = 0;
constexpr std::uint64_t local_apic = 0xfee0'0000;
constexpr std::uint64_t spurious = 0xf0, command = 0x300;            // registers of the local APIC
constexpr std::uint32_t nmi_to_self = 1U << 18 | 1U << 14 | 4U << 8; // shorthand, assert, delivery mode
constexpr std::uint64_t stack_top = slot_base(4) + 8 * page_4k;
constexpr std::uint64_t apic_of_program = slot_base(4) + 16 * page_4k,
                        shared_page = slot_base(4) + 17 * page_4k;

volatile std::uint32_t& apic_register(std::uint64_t offset) {
    return *reinterpret_cast<volatile std::uint32_t*>(local_apic + offset);
}

void send_nmi() {
    apic_register(command) = nmi_to_self;
}

/// The timer's input of the I/O APIC (ACPI's MADT: not 0) sends NMIs from now on, or nothing.
void timer_sends_nmi(bool enabled) {
    constexpr std::uint32_t input = 2, entries = 0x10, edge_nmi = 4U << 8, masked = 1U << 16;
    auto* const io_apic = reinterpret_cast<volatile std::uint32_t*>(0xfec0'0000);
    io_apic[0] = entries + 2 * input;               // IOREGSEL
    io_apic[4] = edge_nmi | (enabled ? 0 : masked); // IOWIN: the lower half
}

volatile std::uint64_t taken = 0;      ///< NMIs that a handler has been entered for
volatile std::uint64_t depth = 0;      ///< handlers that are running
volatile std::uint64_t ticks = 0;      ///< of the timer, by the PIC
TrapFrame first, second;               ///< of the first two since expect()
std::uint64_t first_frame_address = 0; ///< where it was pushed
void (*in_first)() = nullptr;          ///< what the first one's handler does

void on_nmi(TrapFrame& frame) {
    taken = taken + 1;
    depth = depth + 1;
    if (taken == 1) {
        first = frame;
        first_frame_address = reinterpret_cast<std::uint64_t>(&frame);
        if (in_first != nullptr)
            in_first();
    } else if (taken == 2) {
        second = frame;
    }
    depth = depth - 1;
}

void expect(void (*what_first_does)()) {
    taken = 0;
    in_first = what_first_does;
}

/// Sends one, whose frame must be exact.
void send_and_check() {
    std::uint64_t behind = 0, rsp = 0;
    asm volatile("lea 1f(%%rip), %0\n mov %%rsp, %1\n movl %3, %2\n 1:"
                 : "=&r"(behind), "=&r"(rsp), "=m"(apic_register(command))
                 : "i"(nmi_to_self)
                 : "memory");
    CHECK_EQ(first.vector, vector_nmi);
    CHECK_EQ(first.rip, behind);
    CHECK_EQ(first.cs, kernel_code);
    CHECK_EQ(first.ss, kernel_data);
    CHECK_EQ(first.rsp, rsp);
    CHECK_EQ(first.rflags & (rflags_fixed | rflags_if | rflags_tf), rflags_fixed);
}

void comes_at_once() {
    expect(nullptr);
    send_and_check();
    CHECK_EQ(taken, 1);
    CHECK_EQ(first_frame_address, (first.rsp & ~std::uint64_t{15}) - sizeof(TrapFrame));

    set_gate(vector_nmi, {.stack = spare_stack});
    expect(nullptr);
    send_and_check();
    CHECK_EQ(taken, 1);
    CHECK_EQ(first_frame_address, interrupt_stack_top(spare_stack) - sizeof(TrapFrame));
    print("nmi: comes at once\n");
}

void blocked_until_iret() {
    expect([] {
        for (unsigned i = 0; i < 3; ++i)
            send_nmi();
        CHECK_EQ(taken, 1);
    });
    send_and_check();
    CHECK_EQ(taken, 2);
    CHECK_EQ(second.rip, first.rip); // before the first instruction that IRET has gone back to
    CHECK_EQ(second.rsp, first.rsp);
    CHECK_EQ(second.rflags & rflags_tf, 0);
    CHECK_EQ(depth, 0);
    print("nmi: blocked until IRET\n");
}

/// Any IRET ends it, also that of an exception in the NMI's own handler.
void unblocked_by_nested_iret() {
    set_gate(vector_nmi, {}); // by the interrupt stack table, the second frame would lie over the first
    expect([] {
        send_nmi();
        CHECK_EQ(taken, 1);
        const Trap trap = PROBE("ud2", : :);
        CHECK(trap.is_fault(vector_ud));
        CHECK_EQ(taken, 2);
        CHECK_EQ(second.rip, trap.end);
    });
    send_and_check();
    CHECK_EQ(taken, 2);
    print("nmi: unblocked by an IRET\n");
}

/// Sends an NMI, and waits until the word at RDI differs from RSI.
USER_PROGRAM(program_send, "movl %edx, (%rcx)\n 1: cmp %rsi, (%rdi)\n je 1b\n syscall");

volatile std::uint64_t* shared_word; // with the program

void in_user_mode(const AddressSpace& space) {
    const std::uint64_t frame_of_word = allocate_frame();
    enable_user_mode();
    map_programs(space, slot_base(4));
    space.map(stack_top - page_4k, allocate_frame(), pte_user_rw);
    space.map(apic_of_program, local_apic, pte_user_rw);
    space.map(shared_page, frame_of_word, pte_present | pte_user);
    shared_word = reinterpret_cast<volatile std::uint64_t*>(frame_of_word);
    for (const std::uint8_t stack : {std::uint8_t{0}, spare_stack}) {
        set_gate(vector_nmi, {.stack = stack});
        expect([] { *shared_word = *shared_word + 1; });
        TrapFrame frame = user_frame(program_address(program_send), stack_top);
        frame.rcx = apic_of_program + command;
        frame.rdx = nmi_to_self;
        frame.rdi = shared_page;
        frame.rsi = *shared_word;
        run_user(frame);
        CHECK_EQ(frame.vector, vector_syscall);
        CHECK_EQ(taken, 1);
        CHECK_EQ(first.cs, user_code);
        CHECK_EQ(first.ss, user_data);
        CHECK_EQ(first.rsp, stack_top);
        CHECK_EQ(first_frame_address,
                 (stack == 0 ? trap_stack_top() : interrupt_stack_top(spare_stack)) - sizeof(TrapFrame));
    }
    set_gate(vector_nmi, {});
    print("nmi: in a program\n");
}

void ends_halt() {
    expect(nullptr);
    timer_sends_nmi(true);
    std::uint64_t behind = 0;
    asm volatile("lea 1f(%%rip), %0\n 2: hlt\n 1: cmpq $0, %1\n je 2b"
                 : "=&r"(behind)
                 : "m"(taken)
                 : "memory", "cc");
    timer_sends_nmi(false);
    CHECK((first.rflags & rflags_if) == 0);

    // Held back, it ends none: that is up to the timer, whose IRET lets it come.
    static std::uint64_t ticks_at_second = 0, ticks_before = 0;
    expect([] {
        send_nmi();
        init_pic(1 << timer_line);
        ticks_before = ticks;
        asm volatile("sti\n hlt\n cli" : : : "memory");
        init_pic(0);
        CHECK_EQ(taken, 2);
    });
    set_handler(vector_nmi, [](TrapFrame& frame) {
        if (taken == 1)
            ticks_at_second = ticks;
        on_nmi(frame);
    });
    send_nmi();
    CHECK_EQ(taken, 2);
    CHECK(ticks_at_second > ticks_before);
    set_handler(vector_nmi, on_nmi);
    print("nmi: ends HLT\n");
}

/// Behind STI and MOV SS, NMIs may be held back for an instruction. A hypervisor may need to step over it,
/// and the guest must not see that, above all where that instruction is emulated.
void in_interrupt_shadows() {
    constexpr std::uint64_t wanted = 30;
    expect(nullptr);
    timer_sends_nmi(true);
    while (taken < wanted) {
        asm volatile("mov %%ss, %%eax\n"
                     "mov $100, %%ecx\n"
                     "1: sti\n mov %%cr2, %%rdx\n cli\n"
                     "mov %%eax, %%ss\n mov %%cr2, %%rdx\n"
                     "pushfq\n pop %%rdx\n test $0x100, %%edx\n jnz 2f\n"
                     "loop 1b\n 2:"
                     :
                     :
                     : "rax", "rcx", "rdx", "memory", "cc");
        std::uint64_t flags = 0;
        asm volatile("pushfq\n pop %0" : "=r"(flags));
        CHECK_EQ(flags & rflags_tf, 0);
        CHECK_EQ((first.rflags | second.rflags) & rflags_tf, 0);
    }
    timer_sends_nmi(false);
    print("nmi: in interrupt shadows\n");
}

} // namespace

extern "C" int kernel_main(const BootParams& boot) {
    install_descriptors();
    init_memory(boot);
    const AddressSpace space = AddressSpace::create();
    space.load();
    init_pic(0);
    set_handler(irq_base + timer_line, [](TrapFrame&) {
        ticks = ticks + 1;
        end_of_interrupt(timer_line);
    });
    set_handler(vector_nmi, on_nmi);
    apic_register(spurious) = 0x1ff; // enabled
    constexpr std::uint32_t hz = 100;
    start_pit(hz);

    comes_at_once();
    blocked_until_iret();
    unblocked_by_nested_iret();
    in_user_mode(space);
    ends_halt();
    in_interrupt_shadows();
    print("nmi: passed\n");
    return 0;
}
