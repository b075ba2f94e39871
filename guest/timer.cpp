// timer: interrupts of the PIC's timer line. Proves that the timer ticks from the start, as a BIOS leaves it,
// with all interrupts masked; that they arrive at the rate asked for, wake HLT, wait while IF is clear and
// come as soon as it is set, that STI holds them back for one instruction (so that "sti; hlt" loses no
// wake-up), that the frame is exact, and that they interrupt programs too. Intel SDM vol. 3A ch. 6.8.1, vol.
// 2 STI. Outcome: passed.
#include "guest/runtime/timer.hpp"
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

namespace {

constexpr unsigned timer_line = 0;
constexpr std::uint32_t hz = 100;
constexpr std::uint64_t stack_top = slot_base(4) + 8 * page_4k;
constexpr std::uint64_t shared_page = slot_base(4) + 16 * page_4k;

volatile std::uint64_t ticks = 0;
TrapFrame first;                   // the frame of the first tick since the last await_tick()
std::uint64_t first_frame_address; // where it was pushed
bool awaiting = false;

/// QEMU's VMRUN takes no interrupt shadow from the VMCB: what makes the machine exit in one ends it.
bool shadows_may_be_lost = false;

void on_tick(TrapFrame& frame) {
    ticks = ticks + 1;
    if (awaiting) {
        first = frame;
        first_frame_address = reinterpret_cast<std::uint64_t>(&frame);
        awaiting = false;
    }
    end_of_interrupt(timer_line);
}

/// From here on the next tick's frame is of interest. Returns the number of ticks so far. (Hypervisors may
/// make up for ticks that came while they could not be delivered: after one tick at once another.)
std::uint64_t await_tick() {
    awaiting = true;
    return ticks;
}

/// Goes on, with interrupts off, until the PIC holds a tick back.
void wait_until_pending() {
    constexpr unsigned attempts = 1'000'000;
    for (unsigned i = 0; i < attempts; ++i)
        if ((pending_interrupts() & 1U << timer_line) != 0)
            return;
    check_failed(__FILE__, __LINE__, "a tick becomes pending");
}

/// As a BIOS leaves them, but for the masks.
void from_the_start() {
    constexpr std::uint16_t masks[] = {0x21, 0xa1}, edge_or_level[] = {0x4d0, 0x4d1};
    constexpr std::uint16_t pit_channel_0 = 0x40, pit_command = 0x43;
    constexpr std::uint8_t latch_status_of_0 = 0xe2, status_bits = 0x3f;
    constexpr std::uint8_t both_bytes_square_wave = 0x36;
    for (const std::uint16_t port : masks)
        CHECK_EQ(in8(port), 0xff);
    for (const std::uint16_t port : edge_or_level)
        CHECK_EQ(in8(port), 0);
    out8(pit_command, latch_status_of_0);
    CHECK_EQ(in8(pit_channel_0) & status_bits, both_bytes_square_wave);
    init_pic(1 << timer_line);
    while (ticks == 0) {
        wait_for_interrupt();
        disable_interrupts();
    }
    print("timer: ticks from the start\n");
}

void halting() {
    constexpr std::uint64_t wanted = 20;
    while (ticks < wanted) {
        const std::uint64_t before = ticks;
        wait_for_interrupt();
        disable_interrupts();
        CHECK(ticks > before); // HLT ends by the interrupt, and only by it
    }
    print("timer: %lu ticks\n", wanted);
}

/// The interrupt came at `rip`, behind the instruction of one byte that follows STI.
void check_behind_shadow(std::uint64_t rip) {
    if (!shadows_may_be_lost || first.rip != rip - 1)
        CHECK_EQ(first.rip, rip);
}

void held_back() {
    const std::uint64_t before = ticks;
    wait_until_pending();
    const std::uint64_t start = read_tsc();
    while (read_tsc() - start < 1'000'000) {
    }
    CHECK_EQ(ticks, before);

    await_tick();
    std::uint64_t expected = 0;
    asm volatile("lea 1f(%%rip), %0\n sti\n nop\n 1: nop\n cli" : "=&r"(expected) : : "memory");
    CHECK(ticks > before);
    check_behind_shadow(expected);
    print("timer: held back\n");
}

/// A tick is pending before STI: it must come when HLT has begun, and end it.
void no_lost_wake_up() {
    for (unsigned round = 0; round < 5; ++round) {
        wait_until_pending();
        const std::uint64_t before = await_tick();
        std::uint64_t behind_hlt = 0;
        std::uint64_t rsp = 0;
        asm volatile("mov %%rsp, %1\n"
                     "lea 1f(%%rip), %0\n"
                     "sti\n"
                     "hlt\n"
                     "1: cli"
                     : "=&r"(behind_hlt), "=&r"(rsp)
                     :
                     : "memory");
        CHECK(ticks > before);
        CHECK_EQ(first.vector, irq_base + timer_line);
        check_behind_shadow(behind_hlt);
        CHECK_EQ(first.cs, kernel_code);
        CHECK_EQ(first.rflags & (rflags_if | rflags_fixed), rflags_if | rflags_fixed);
        CHECK_EQ(first.rsp, rsp);
        CHECK_EQ(first.ss, kernel_data);
        CHECK_EQ(first_frame_address, (rsp & ~std::uint64_t{15}) - sizeof(TrapFrame));
    }
    print("timer: no lost wake-up\n");
}

/// Interrupts at any instruction leave every register alone.
void registers_survive() {
    const std::uint64_t before = await_tick();
    std::uint64_t wrong = 0;
    asm volatile("mov $0x1111, %%r8\n mov $0x2222, %%r9\n mov $0x3333, %%r10\n mov $0x4444, %%r11\n"
                 "mov $0x5555, %%r12\n mov $0x6666, %%r13\n mov $0x7777, %%r14\n mov $0x8888, %%r15\n"
                 "stc\n"
                 "sti\n"
                 "1: mov %[ticks], %%rax\n"
                 "lea -3(%%rax), %%rax\n"
                 "cmp %[before], %%rax\n"
                 "jl 1b\n"
                 "cli\n"
                 "xor %[wrong], %[wrong]\n"
                 "sub $0x1111, %%r8\n or %%r8, %[wrong]\n sub $0x2222, %%r9\n or %%r9, %[wrong]\n"
                 "sub $0x3333, %%r10\n or %%r10, %[wrong]\n sub $0x4444, %%r11\n or %%r11, %[wrong]\n"
                 "sub $0x5555, %%r12\n or %%r12, %[wrong]\n sub $0x6666, %%r13\n or %%r13, %[wrong]\n"
                 "sub $0x7777, %%r14\n or %%r14, %[wrong]\n sub $0x8888, %%r15\n or %%r15, %[wrong]\n"
                 : [wrong] "=&b"(wrong)
                 : [ticks] "m"(ticks), [before] "d"(before)
                 : "rax", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc");
    CHECK_EQ(wrong, 0);
    CHECK((first.rflags & rflags_if) != 0);
    print("timer: registers\n");
}

/// Waits, without any trap of its own, until the word at RDI differs from RSI.
USER_PROGRAM(program_wait, "1: cmp %rsi, (%rdi)\n je 1b\n syscall");

volatile std::uint64_t* tick_word; // shared with the program

void in_user_mode(const AddressSpace& space) {
    const std::uint64_t frame_of_word = allocate_frame();
    enable_user_mode();
    map_programs(space, slot_base(4));
    space.map(stack_top - page_4k, allocate_frame(), pte_user_rw);
    space.map(shared_page, frame_of_word, pte_present | pte_user);
    tick_word = reinterpret_cast<volatile std::uint64_t*>(frame_of_word);
    set_handler(irq_base + timer_line, [](TrapFrame& frame) {
        on_tick(frame);
        *tick_word = ticks;
    });

    for (unsigned round = 0; round < 10; ++round) {
        TrapFrame frame = user_frame(program_address(program_wait), stack_top);
        frame.rflags |= rflags_if;
        frame.rdi = shared_page;
        frame.rsi = *tick_word;
        const std::uint64_t before = await_tick();
        run_user(frame); // which comes back with interrupts off, as it went
        CHECK_EQ(frame.vector, vector_syscall);
        CHECK(ticks > before);
        CHECK_EQ(*tick_word, ticks);
        CHECK_EQ(first.cs, user_code);
        CHECK_EQ(first.ss, user_data);
        CHECK_EQ(first.rsp, stack_top);
        CHECK_EQ(first_frame_address, trap_stack_top() - sizeof(TrapFrame));
        constexpr std::uint64_t loop_size =
            5; // up to the system call, which the program reaches by a tick only
        CHECK(first.rip - program_address(program_wait) <= loop_size);
    }
    print("timer: ticks in user mode\n");
}

} // namespace

extern "C" int kernel_main(const BootParams& boot) {
    shadows_may_be_lost = boot.has_option("qemu") || boot.has_option("qemu-host");
    install_descriptors();
    init_memory(boot);
    const AddressSpace space = AddressSpace::create();
    space.load();
    set_handler(irq_base + timer_line, on_tick);
    from_the_start();
    ticks = 0;
    start_pit(hz);

    halting();
    held_back();
    no_lost_wake_up();
    registers_survive();
    in_user_mode(space);
    init_pic(0);
    print("timer: passed\n");
    return 0;
}
