// selectors: what a kernel finds when it reads its own selectors and looks at its descriptors. Kernels put
// the CS and SS that they read into gates, STAR and the frames of returns, and ask by LAR, LSL, VERR and VERW
// what they have. A hypervisor that runs this kernel at another level, on tables of its own, must not be seen
// by that. Also: what single steps end behind, where the instruction is not the machine's. Intel SDM vol. 3A
// ch. 3.4.2 and 5.10, vol. 3B ch. 17.3.1.4. Outcome: passed.
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

constexpr std::uint64_t programs = slot_base(2), user_stack = slot_base(2) + 0x10'0000;
constexpr std::uint64_t nothing = ~std::uint64_t{0}; ///< where an instruction finds no descriptor

std::uint64_t own_cs() {
    std::uint64_t selector = 0;
    asm volatile("mov %%cs, %0" : "=r"(selector));
    return selector;
}

std::uint64_t own_ss() {
    std::uint64_t selector = 0;
    asm volatile("mov %%ss, %0" : "=r"(selector));
    return selector;
}

std::uint64_t lar(std::uint64_t selector) {
    std::uint64_t rights = nothing;
    asm volatile("lar %k1, %k0\n jz 1f\n mov $-1, %0\n 1:" : "+r"(rights) : "r"(selector) : "cc");
    return rights;
}

std::uint64_t lsl(std::uint64_t selector) {
    std::uint64_t limit = nothing;
    asm volatile("lsl %k1, %k0\n jz 1f\n mov $-1, %0\n 1:" : "+r"(limit) : "r"(selector) : "cc");
    return limit;
}

bool readable(std::uint64_t selector) {
    bool answer = false;
    asm volatile("verr %w1\n setz %0" : "=q"(answer) : "r"(selector) : "cc");
    return answer;
}

bool writable(std::uint64_t selector) {
    bool answer = false;
    asm volatile("verw %w1\n setz %0" : "=q"(answer) : "r"(selector) : "cc");
    return answer;
}

void what_is_read_comes_back() {
    CHECK_EQ(own_cs(), kernel_code);
    CHECK_EQ(own_ss(), kernel_data);

    set_gate(0x81, {.selector = static_cast<std::uint16_t>(own_cs())});
    const Trap trap = PROBE("int $0x81", : :);
    CHECK(trap.is_trap(0x81));
    CHECK_EQ(trap.frame.cs, kernel_code);
    CHECK_EQ(trap.frame.ss, kernel_data);

    asm volatile("mov %%cs, %%eax\n push %%rax\n push $1f\n lretq\n 1:" : : : "rax", "memory");
    asm volatile("mov %%rsp, %%rcx\n mov %%ss, %%eax\n push %%rax\n push %%rcx\n pushfq\n mov %%cs, %%eax\n"
                 "push %%rax\n push $1f\n iretq\n 1:"
                 :
                 :
                 : "rax", "rcx", "memory");
    struct [[gnu::packed]] {
        std::uint32_t offset;
        std::uint16_t selector;
    } far{};
    asm volatile("movl $1f, %0\n mov %%cs, %1\n ljmpl *%0\n 1:"
                 : "+m"(far.offset), "=m"(far.selector)
                 :
                 : "memory");
    asm volatile("mov %%ss, %%eax\n mov %%eax, %%ss\n mov %%eax, %%ds\n mov %%eax, %%es"
                 :
                 :
                 : "rax", "memory");
    write_msr(msr_star, own_cs() << 32);
    CHECK_EQ(read_msr(msr_star) >> 32 & 0xffff, kernel_code);
    print("selectors: what is read comes back\n");
}

void descriptors() {
    const TableRegister table = gdt_register();
    for (const std::uint64_t selector :
         {kernel_code, kernel_data, task_state, user_code, user_data, absent_data}) {
        const std::uint64_t raw =
            *reinterpret_cast<const volatile std::uint64_t*>(table.base + (selector & ~7U));
        CHECK_EQ(lar(selector), raw >> 32 & 0xf0'ff00);
        const std::uint64_t limit = (raw & 0xffff) | (raw >> 32 & 0xf'0000), pages = raw >> 55 & 1;
        CHECK_EQ(lsl(selector), pages != 0 ? limit << 12 | 0xfff : limit);
    }
    CHECK_EQ(lar(kernel_code) & 0xff00, 0x9b00);
    CHECK_EQ(lar(task_state), 0x8b00);
    CHECK_EQ(lar(kernel_data | 3), nothing);
    CHECK(readable(kernel_code) && !writable(kernel_code));
    CHECK(readable(kernel_data) && writable(kernel_data));
    CHECK(readable(user_data) && writable(user_data));
    CHECK(!readable(task_state));
    // Of what lies beyond the table nothing is to be found, nor is there a local one.
    const std::uint64_t behind = table.limit + std::uint64_t{1};
    for (std::uint64_t selector = 0; selector < 0x1'0000; selector += selector < 0x400 ? 4 : 0x3c) {
        const bool local = (selector & 4) != 0;
        if (!local && selector >= 8 && (selector & ~std::uint64_t{7}) < behind)
            continue;
        CHECK_EQ(lar(selector), nothing);
        CHECK_EQ(lsl(selector), nothing);
        CHECK(!readable(selector) && !writable(selector));
    }
    for (std::uint64_t last = 0xffc8; last <= 0xfff8; last += 8)
        for (std::uint64_t rpl = 0; rpl < 4; rpl += 3) {
            CHECK_EQ(lar(last | rpl), nothing);
            CHECK(PROBE("mov %w0, %%es", : : "r"(last | rpl)).is_fault(vector_gp, last));
        }
    print("selectors: descriptors\n");
}

USER_PROGRAM(look,
             "mov %cs, %ebx\n mov %ss, %ecx\n lar %ebx, %r8d\n setz %r9b\n mov $8, %eax\n"
             "lar %eax, %r10d\n setz %r12b\n mov $0x18, %eax\n lsl %eax, %r13d\n setz %r14b\n verw %cx\n"
             "setz %r15b\n ud2");

void programs_see_what_is_theirs(const AddressSpace& space) {
    map_programs(space, programs);
    space.map(user_stack, allocate_frame(), pte_kernel_rw | pte_user);
    TrapFrame frame = user_frame(program_address(look), user_stack + 0x1000);
    run_user(frame);
    CHECK_EQ(frame.vector, vector_ud);
    CHECK_EQ(frame.rbx, user_code);
    CHECK_EQ(frame.rcx, user_data);
    CHECK_EQ(frame.r9 & 1, 1);
    CHECK_EQ(frame.r8 & 0xff00, 0xfb00);
    CHECK_EQ(frame.r12 & 1, 0); // the kernel's code segment
    CHECK_EQ(frame.r14 & 1, 0); // its TSS
    CHECK_EQ(frame.r15 & 1, 1);
    print("selectors: programs\n");
}

// --- Single steps

std::uint64_t steps = 0, first_step = 0;

void on_step(TrapFrame& frame) {
    if (steps++ == 0)
        first_step = frame.rip;
    frame.rflags &= ~rflags_tf;
}

#define STEP(text, ...)                                                                                      \
    [&] {                                                                                                    \
        steps = 0;                                                                                           \
        std::uint64_t behind = 0;                                                                            \
        asm volatile("lea 2f(%%rip), %0\n pushfq\n orq $0x100, (%%rsp)\n popfq\n" text                       \
                     : "=&r"(behind)                                                                         \
                     : __VA_ARGS__                                                                           \
                     : "rax", "rcx", "rdx", "memory", "cc");                                                 \
        return steps == 1 && first_step == behind;                                                           \
    }()

void single_steps() {
    set_handler(vector_db, on_step);
    CHECK(STEP("nop\n 2: nop\n nop\n"));
    CHECK(STEP("mov %%cr0, %%rax\n 2: nop\n nop\n"));
    CHECK(STEP("mov %%ss, %%eax\n 2: nop\n"));
    CHECK(STEP("mov %w1, %%ds\n 2: nop\n nop\n", "r"(kernel_data)));
    CHECK(STEP("mov %w1, %%ss\n nop\n 2: nop\n", "r"(kernel_data))); // is held for one instruction
    set_handler(vector_db, nullptr);
    print("selectors: single steps\n");
}

} // namespace

extern "C" int kernel_main(const BootParams& boot) {
    install_descriptors();
    init_memory(boot);
    what_is_read_comes_back();
    descriptors();
    single_steps();
    enable_user_mode();
    programs_see_what_is_theirs(AddressSpace::current());
    print("selectors: passed\n");
    return 0;
}
