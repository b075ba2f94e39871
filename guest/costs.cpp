// costs: what single operations cost, by the TSC. Each is repeated in batches, of which the median counts, so
// that what the host does meanwhile does not. One line for each: "costs: NAME: N in T ticks". Words:
// NAME=BATCHES, to measure this operation and leave out those that are not named. By two runs that differ in
// the batches of one operation, whoever counts from outside can tell what it costs there; where the TSC
// counts instructions, ticks are exact (scripts/bench --counted). Outcome: passed.
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

using namespace umbra::guest;

namespace {

constexpr std::uint64_t default_batches = 3, most_batches = 64;
constexpr unsigned warm_ups =
    8; // batches before those that count: caches fill, and umbra finds its way to keep tables in step

constexpr std::uint64_t program_base = slot_base(2);
constexpr std::uint64_t user_stack = program_base + 8 * page_4k; // its top
constexpr std::uint64_t missing = program_base + 16 * page_4k;
constexpr std::uint64_t fresh_pages = slot_base(3);
constexpr std::uint64_t private_page = slot_base(4); // of each address space

/// Runs `batch`, which returns its ticks for `repetitions` of an operation, and tells their median.
template<class Batch>
void measure(const char* name, std::uint64_t batches, unsigned repetitions, Batch batch) {
    std::uint64_t sorted[most_batches];
    for (unsigned i = 0; i < warm_ups; ++i)
        (void)batch();
    for (std::uint64_t count = 0; count < batches; ++count) {
        const std::uint64_t ticks = batch();
        std::uint64_t at = count;
        for (; at > 0 && sorted[at - 1] > ticks; --at)
            sorted[at] = sorted[at - 1];
        sorted[at] = ticks;
    }
    print("costs: %s: %u in %lu ticks\n", name, repetitions, sorted[batches / 2]);
}

/// The usual batch.
template<class Operation>
void measure_each(const char* name, std::uint64_t batches, unsigned repetitions, Operation operation) {
    measure(name, batches, repetitions, [&] {
        const std::uint64_t start = read_tsc();
        for (unsigned i = 0; i < repetitions; ++i)
            operation();
        return read_tsc() - start;
    });
}

void instruction(const char* name, std::uint64_t batches) {
    measure_each(name, batches, 64, [] { (void)read_cr0(); });
}

/// First writes to pages that the tables have mapped.
void hidden_fault(const char* name, std::uint64_t batches) {
    constexpr unsigned repetitions = 64;
    const AddressSpace space = AddressSpace::current();
    const std::uint64_t pages = (warm_ups + batches) * repetitions;
    const std::uint64_t frames = allocate_frames(pages);
    for (std::uint64_t offset = 0; offset < pages * page_4k; offset += page_4k)
        space.map(fresh_pages + offset, frames + offset, pte_kernel_rw);
    std::uint64_t next = fresh_pages;
    measure_each(name, batches, repetitions, [&next] {
        word(next) = 1;
        next += page_4k;
    });
}

/// A fault that the guest's tables ask for, its handler, which skips the instruction, and the way back.
void delivered_fault(const char* name, std::uint64_t batches) {
    set_handler(vector_pf, [](TrapFrame& frame) { frame.rip = frame.rax; });
    measure_each(name, batches, 64, [] {
        asm volatile("lea 1f(%%rip), %%rax\n mov (%0), %%rcx\n 1:" : : "r"(missing) : "rax", "rcx", "memory");
    });
    set_handler(vector_pf, nullptr);
}

USER_PROGRAM(program_calls, "1: syscall\n jmp 1b");

/// SYSCALL and SYSRET, with SWAPGS in the kernel both times.
void system_call(const char* name, std::uint64_t batches) {
    enable_user_mode();
    const AddressSpace space = AddressSpace::current();
    map_programs(space, program_base);
    space.map(user_stack - page_4k, allocate_frame(), pte_user_rw);
    TrapFrame frame = user_frame(program_address(program_calls), user_stack);
    measure_each(name, batches, 64, [&frame] { run_user(frame, EnterUserBy::sysret); });
}

/// The local APIC's registers (Intel SDM vol. 3A ch. 10).
enum class Apic : std::uint32_t {
    end_of_interrupt = 0xb0,
    spurious_vector = 0xf0,
    timer_vector = 0x320,
    timer_count = 0x380,
    timer_divider = 0x3e0
};
void write_apic(Apic reg, std::uint32_t value) {
    constexpr std::uint64_t base = 0xfee0'0000;
    *reinterpret_cast<volatile std::uint32_t*>(base + static_cast<std::uint32_t>(reg)) = value;
}

volatile std::uint64_t timer_ticks = 0;
constexpr std::uint32_t timer_interval = 200'000; // longer than a tick takes

/// The local APIC's one-shot timer: what an interrupt takes from a loop, with its end and the timer's next
/// start.
void timer_tick(const char* name, std::uint64_t batches) {
    constexpr unsigned vector = 0x40, repetitions = 4;
    constexpr std::uint32_t apic_enabled = 0x100, spurious = 0xff, divide_by_1 = 0xb;
    set_handler(vector, [](TrapFrame&) {
        timer_ticks = timer_ticks + 1;
        write_apic(Apic::end_of_interrupt, 0);
        write_apic(Apic::timer_count, timer_interval);
    });
    init_pic(0);
    write_apic(Apic::spurious_vector, apic_enabled | spurious);
    write_apic(Apic::timer_divider, divide_by_1);
    write_apic(Apic::timer_vector, vector);
    write_apic(Apic::timer_count, timer_interval);
    enable_interrupts();
    measure(name, batches, repetitions, [] {
        std::uint64_t taken = 0;
        for (unsigned i = 0; i < repetitions; ++i) {
            // The tick comes after one look at the counter and before the next: after the clock was read for
            // the last time but one.
            std::uint64_t now = read_tsc(), last = now;
            const std::uint64_t seen = timer_ticks;
            do {
                last = now;
                now = read_tsc();
            } while (timer_ticks == seen);
            taken += read_tsc() - last;
        }
        return taken;
    });
    disable_interrupts();
    write_apic(Apic::timer_count, 0);
}

/// A load of CR3 and a read of a page that each address space has for itself.
template<unsigned space_count>
void context_switch(const char* name, std::uint64_t batches) {
    static std::uint64_t roots[space_count];
    for (std::uint64_t& root : roots) {
        const AddressSpace space = AddressSpace::create();
        space.map(private_page, allocate_frame(), pte_kernel_rw);
        root = space.root();
    }
    const std::uint64_t own_root = read_cr3();
    unsigned next = 0;
    measure_each(name, batches, 256, [&next] {
        write_cr3(roots[next]);
        (void)word(private_page).read();
        next = (next + 1) % space_count;
    });
    write_cr3(own_root);
}

/// Of a page that is in use.
void invalidate(const char* name, std::uint64_t batches) {
    const AddressSpace space = AddressSpace::current();
    space.map(private_page, allocate_frame(), pte_kernel_rw);
    measure_each(name, batches, 64, [] {
        word(private_page) = 1;
        invlpg(private_page);
    });
}

struct Operation {
    const char* name;
    void (*run)(const char* name, std::uint64_t batches);
};
constexpr Operation operations[] = {
    {"instruction", instruction},
    {"hidden-fault", hidden_fault},
    {"delivered-fault", delivered_fault},
    {"system-call", system_call},
    {"timer-tick", timer_tick},
    {"switch-1", context_switch<1>},
    {"switch-16", context_switch<16>},
    {"switch-256", context_switch<256>},
    {"invlpg", invalidate},
};

} // namespace

extern "C" int kernel_main(const BootParams& boot) {
    install_descriptors();
    init_memory(boot);
    const AddressSpace space = AddressSpace::create();
    space.load();
    bool named = false;
    for (const Operation& operation : operations)
        named = named || boot.number(operation.name, 0) != 0;
    for (const Operation& operation : operations) {
        const std::uint64_t batches = boot.number(operation.name, named ? 0 : default_batches);
        CHECK(batches <= most_batches);
        if (batches != 0)
            operation.run(operation.name, batches);
    }
    print("costs: passed\n");
    return 0;
}
