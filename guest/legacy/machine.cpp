// Descriptor tables, traps and the timer.
#include "guest/legacy/machine.hpp"

namespace umbra::legacy {
namespace {

struct [[gnu::packed]] TablePointer {
    uint16_t limit;
    uint32_t base;
};

// Intel SDM vol. 3A §3.4.5: flat code and data of DPL 0 and 3, the TSS (filled in later), 64-bit code, and
// data that is not present.
uint64_t gdt[] = {
    0, 0x00cf'9b00'0000'ffff, 0x00cf'9300'0000'ffff, 0x00cf'fb00'0000'ffff, 0x00cf'f300'0000'ffff,
    0, 0x00af'9b00'0000'ffff, 0x00cf'1300'0000'ffff};
uint64_t idt[256];

/// 32-bit task-state segment (§7.2.1), of which only the stack of ring 0 is used.
struct Tss {
    uint32_t link, esp0, ss0;
    uint32_t others[22];
    uint16_t trap, io_map;
};
static_assert(sizeof(Tss) == 104);
Tss tss;

extern "C" const char trap_stubs[], trap_stack_top[];
extern "C" void enter_user(uint32_t eip, uint32_t ecx, uint32_t eflags);
extern "C" [[noreturn]] void leave_user();

uint32_t user_deadline = 0;

constexpr uint16_t master_command = 0x20, master_data = 0x21, slave_command = 0xa0, slave_data = 0xa1;
constexpr uint16_t pit_channel_0 = 0x40, pit_command = 0x43;
constexpr uint8_t end_of_interrupt = 0x20;

} // namespace

LastTrap last_trap;
volatile uint32_t ticks = 0;
extern "C" {
volatile uint32_t resume_address = 0;
}

extern "C" void on_trap(Trap& trap) {
    if (trap.vector == vector_timer) {
        ticks = ticks + 1;
        out8(master_command, end_of_interrupt);
        if (trap.from_user() && user_deadline != 0 && ticks >= user_deadline)
            leave_user();
        return;
    }
    last_trap = {trap.vector, trap.error, trap.eip, read_cr2(), trap.eax, trap.edx, trap.from_user()};
    if (trap.vector == vector_double) {
        trap.eax *= 2;
        return;
    }
    if (trap.from_user())
        leave_user();
    if (resume_address == 0) {
        print("unexpected trap %u, error code 0x%x, at 0x%x, CR2 0x%x\n", trap.vector, trap.error, trap.eip,
              read_cr2());
        exit_guest(2);
    }
    trap.eip = resume_address;
    resume_address = 0;
}

void init_descriptors() {
    const auto tss_base = reinterpret_cast<uint32_t>(&tss);
    tss.esp0 = reinterpret_cast<uint32_t>(trap_stack_top);
    tss.ss0 = kernel_data;
    tss.io_map = sizeof tss; // none: programs may use no port
    constexpr uint64_t available_tss = 0x89;
    gdt[task_state / 8] = (sizeof tss - 1) | uint64_t{tss_base & 0xff'ffff} << 16 | available_tss << 40 |
                          uint64_t{tss_base >> 24} << 56;
    const TablePointer gdtr{sizeof gdt - 1, reinterpret_cast<uint32_t>(gdt)};
    asm volatile("lgdt %0\n"
                 "ljmp %1, $1f\n1:\n"
                 "movl %2, %%ds\n movl %2, %%es\n movl %2, %%fs\n movl %2, %%gs\n movl %2, %%ss\n"
                 "ltr %w3"
                 :
                 : "m"(gdtr), "i"(kernel_code), "r"(uint32_t{kernel_data}), "r"(uint32_t{task_state})
                 : "memory");

    for (unsigned vector = 0; vector < 256; ++vector) {
        const uint32_t stub = reinterpret_cast<uint32_t>(trap_stubs) + 16 * vector;
        const bool for_users =
            vector == vector_bp || vector == vector_of || vector == vector_leave || vector == vector_double;
        const uint64_t interrupt_gate = for_users ? 0xee : 0x8e; // with DPL 3 or 0
        idt[vector] =
            (stub & 0xffff) | uint64_t{kernel_code} << 16 | interrupt_gate << 40 | uint64_t{stub >> 16} << 48;
    }
    const TablePointer idtr{sizeof idt - 1, reinterpret_cast<uint32_t>(idt)};
    asm volatile("lidt %0" : : "m"(idtr) : "memory");

    TablePointer stored{};
    asm volatile("sgdt %0" : "=m"(stored));
    CHECK(stored.limit == gdtr.limit && stored.base == gdtr.base);
    asm volatile("sidt %0" : "=m"(stored));
    CHECK(stored.limit == idtr.limit && stored.base == idtr.base);
}

void run_user(const char* program, uint32_t ecx, uint32_t deadline) {
    last_trap = {};
    user_deadline = deadline;
    enter_user(reinterpret_cast<uint32_t>(program), ecx, deadline == 0 ? 0x2 : 0x2 | eflags_if);
    user_deadline = 0;
}

void start_timer(uint32_t hz) {
    out8(master_command, 0x11); // ICW1: cascade, ICW4 follows
    out8(slave_command, 0x11);
    out8(master_data, vector_timer);
    out8(slave_data, vector_timer + 8);
    out8(master_data, 4); // the slave is at line 2
    out8(slave_data, 2);
    out8(master_data, 1); // 8086 mode
    out8(slave_data, 1);
    out8(slave_data, 0xff);
    const uint32_t divisor = 1'193'182 / hz;
    out8(pit_command, 0x34); // channel 0, both bytes, rate generator
    out8(pit_channel_0, static_cast<uint8_t>(divisor));
    out8(pit_channel_0, static_cast<uint8_t>(divisor >> 8));
    out8(master_data, 0xfe); // line 0 only
}

void wait_ticks(uint32_t count) {
    for (const uint32_t end = ticks + count; ticks < end;)
        wait_for_interrupt();
    disable_interrupts();
}

void stop_timer() {
    out8(master_data, 0xff);
}

} // namespace umbra::legacy
