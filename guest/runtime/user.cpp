// Entering and leaving user mode.
#include "guest/runtime/user.hpp"

#include "guest/runtime/cpu.hpp"

#include <cstddef>
#include <cstring>

extern "C" const std::uint8_t user_text_begin[]; // kernel.ld
extern "C" const std::uint8_t user_text_end[];

namespace umbra::guest {

extern "C" {
void syscall_entry();
void enter_user(const TrapFrame* frame, bool by_sysret, std::uint64_t* saved_stack);
[[noreturn]] void leave_user(std::uint64_t saved_stack);
}

namespace {

// The system call entry addresses these by GS.
static_assert(offsetof(PerCpu, kernel_stack) == 0 && offsetof(PerCpu, user_stack) == 8 &&
              offsetof(PerCpu, syscall_cs) == 16 && offsetof(PerCpu, syscall_ss) == 24);

PerCpu per_cpu;
TrapFrame* running = nullptr;
std::uint64_t caller_stack = 0; // of run_user()
std::uint64_t programs_base = 0;
alignas(16) std::uint8_t trap_stack[16384];

} // namespace

std::uint64_t trap_stack_top() {
    return reinterpret_cast<std::uint64_t>(trap_stack) + sizeof(trap_stack);
}

void enable_user_mode() {
    set_trap_stack(trap_stack_top());
    per_cpu.kernel_stack = trap_stack_top();
    constexpr std::uint64_t flags_cleared_on_syscall = 0x4'7700; // AC, NT, IOPL, DF, IF, TF
    write_msr(msr_star, std::uint64_t{sysret_base} << 48 | std::uint64_t{kernel_code} << 32);
    write_msr(msr_lstar, reinterpret_cast<std::uint64_t>(&syscall_entry));
    write_msr(msr_fmask, flags_cleared_on_syscall);
    write_msr(msr_efer, read_msr(msr_efer) | efer_sce);
    write_msr(msr_gs_base, reinterpret_cast<std::uint64_t>(&per_cpu));
    write_msr(msr_kernel_gs_base, 0);
}

void map_programs(const AddressSpace& space, std::uint64_t base) {
    const auto size = static_cast<std::uint64_t>(user_text_end - user_text_begin);
    const std::uint64_t pages = (size + page_4k - 1) / page_4k;
    const std::uint64_t frames = allocate_frames(pages);
    std::memcpy(reinterpret_cast<void*>(frames), user_text_begin, size);
    for (std::uint64_t offset = 0; offset < pages * page_4k; offset += page_4k)
        space.map(base + offset, frames + offset, pte_present | pte_user);
    programs_base = base;
}

std::uint64_t program_address(void (*program)()) {
    return programs_base +
           (reinterpret_cast<std::uint64_t>(program) - reinterpret_cast<std::uint64_t>(user_text_begin));
}

TrapFrame user_frame(std::uint64_t rip, std::uint64_t rsp) {
    return {.rip = rip, .cs = user_code, .rflags = rflags_fixed, .rsp = rsp, .ss = user_data};
}

void run_user(TrapFrame& frame, EnterUserBy by) {
    running = &frame;
    enter_user(&frame, by == EnterUserBy::sysret, &caller_stack);
}

void end_user(const TrapFrame& frame) {
    *running = frame;
    leave_user(caller_stack);
}

} // namespace umbra::guest
