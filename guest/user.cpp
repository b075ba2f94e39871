// user: programs at CPL 3. Proves the ways in (IRETQ, SYSRET) and out (SYSCALL, INT with a gate for programs,
// exceptions), that registers survive them, that traps switch to RSP0 and SWAPGS exchanges the GS bases, that
// programs reach user pages only and nothing of the kernel's, and that privileged instructions are refused.
// Intel SDM vol. 3A ch. 5. Outcome: passed.
#include "guest/runtime/user.hpp"
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

constexpr unsigned vector_call = 0x80;      // open to programs
constexpr unsigned vector_closed = 0x81;    // not open to programs
constexpr unsigned vector_handled = 0x82;   // open, and its handler returns to the program
constexpr unsigned vector_own_stack = 0x83; // open, and its gate names a stack
constexpr std::uint64_t flag_carry = 1 << 0;
constexpr std::uint64_t flag_zero = 1 << 6;

// The pages of the program's address space.
constexpr std::uint64_t user_base = slot_base(2);
constexpr std::uint64_t code = user_base;
constexpr std::uint64_t data = user_base + 16 * page_4k;
constexpr std::uint64_t read_only = data + page_4k;
constexpr std::uint64_t not_executable = data + 2 * page_4k;
constexpr std::uint64_t kernel_only = data + 3 * page_4k;
constexpr std::uint64_t missing = data + 4 * page_4k;
constexpr std::uint64_t stack_top = data + 8 * page_4k;
constexpr std::uint64_t kernel_branch = user_base + page_1g; // its level 2 entry is the kernel's

// Where an instruction is expected to trap, a system call behind it says that it did not.
USER_PROGRAM(program_syscalls, "syscall\n syscall");
USER_PROGRAM(program_int_call, "int $0x80\n syscall");
USER_PROGRAM(program_int_closed, "int $0x81\n syscall");
USER_PROGRAM(program_int_handled, "int $0x82\n syscall");
USER_PROGRAM(program_int_own_stack, "int $0x83\n syscall");
USER_PROGRAM(program_int3, "int3\n syscall");
USER_PROGRAM(program_read, "mov (%rdi), %rax\n syscall");
USER_PROGRAM(program_write, "mov %rsi, (%rdi)\n syscall");
USER_PROGRAM(program_jump, "jmp *%rdi");
USER_PROGRAM(program_push_pop, "push %rdi\n pop %rax\n syscall");
USER_PROGRAM(program_segment_bases, "mov %fs:0, %rax\n mov %gs:8, %rbx\n syscall");
USER_PROGRAM(program_step, "nop\n lea 1(%rdi), %rax\n syscall");
USER_PROGRAM(program_divide, "xor %edx, %edx\n xor %ecx, %ecx\n div %rcx\n syscall");
USER_PROGRAM(program_ud2, "ud2");
USER_PROGRAM(program_count, "1: syscall\n add %rax, %rbx\n dec %rdi\n jnz 1b\n int $0x80");

USER_PROGRAM(program_cli, "cli\n syscall");
USER_PROGRAM(program_sti, "sti\n syscall");
USER_PROGRAM(program_hlt, "hlt\n syscall");
USER_PROGRAM(program_in, "in $0x80, %al\n syscall");
USER_PROGRAM(program_out, "out %al, $0x80\n syscall");
USER_PROGRAM(program_outs, "outsb\n syscall");
USER_PROGRAM(program_read_cr0, "mov %cr0, %rax\n syscall");
USER_PROGRAM(program_write_cr0, "mov %rax, %cr0\n syscall");
USER_PROGRAM(program_read_cr3, "mov %cr3, %rax\n syscall");
USER_PROGRAM(program_write_cr3, "mov %rax, %cr3\n syscall");
USER_PROGRAM(program_write_cr4, "mov %rax, %cr4\n syscall");
USER_PROGRAM(program_read_dr7, "mov %dr7, %rax\n syscall");
USER_PROGRAM(program_clts, "clts\n syscall");
USER_PROGRAM(program_lmsw, "lmsw %ax\n syscall");
USER_PROGRAM(program_invlpg, "invlpg (%rdi)\n syscall");
USER_PROGRAM(program_wbinvd, "wbinvd\n syscall");
USER_PROGRAM(program_rdmsr, "mov $0xc0000080, %ecx\n rdmsr\n syscall");
USER_PROGRAM(program_wrmsr, "mov $0xc0000080, %ecx\n wrmsr\n syscall");
USER_PROGRAM(program_swapgs, "swapgs\n syscall");
USER_PROGRAM(program_sysret, "sysretq\n syscall");
USER_PROGRAM(program_lgdt, "lgdt (%rdi)\n syscall");
USER_PROGRAM(program_lidt, "lidt (%rdi)\n syscall");
USER_PROGRAM(program_ltr, "ltr %ax\n syscall");
USER_PROGRAM(program_lldt, "lldt %ax\n syscall");
USER_PROGRAM(program_load_ds, "mov %eax, %ds\n syscall");
USER_PROGRAM(program_load_ss, "mov %eax, %ss\n syscall");
USER_PROGRAM(program_iret, "iretq\n syscall");

/// Runs `program` with two arguments until it traps.
TrapFrame run(void (*program)(), std::uint64_t rdi = 0, std::uint64_t rsi = 0) {
    TrapFrame frame = user_frame(program_address(program), stack_top);
    frame.rdi = rdi;
    frame.rsi = rsi;
    run_user(frame);
    CHECK(frame.from_user());
    CHECK_EQ(frame.cs, user_code);
    CHECK_EQ(frame.ss, user_data);
    return frame;
}

bool faulted(const TrapFrame& frame, unsigned vector, std::uint64_t error, std::uint64_t rip) {
    return frame.vector == vector && frame.error == error && frame.rip == rip;
}

AddressSpace make_space() {
    constexpr std::uint64_t ret = 0xc3;
    const AddressSpace space = AddressSpace::create();
    map_programs(space, code);
    space.map(data, allocate_frame(), pte_user_rw);
    space.map(read_only, allocate_frame(), pte_present | pte_user);
    space.map(not_executable, allocate_frame(), pte_user_rw | pte_no_execute);
    space.map(kernel_only, allocate_frame(), pte_kernel_rw);
    space.map(stack_top - page_4k, allocate_frame(), pte_user_rw | pte_no_execute);
    space.map(kernel_branch, allocate_frame(), pte_user_rw);
    space.entry(kernel_branch, 2) &= ~pte_user;
    space.load();
    word(kernel_only) = ret; // the kernel's use of the page opens nothing to programs
    word(kernel_branch) = ret;
    return space;
}

/// All registers hold numbers of their own; RCX and RSP are left to the caller.
void fill_registers(TrapFrame& frame) {
    frame.rax = 0xa1;
    frame.rbx = 0xb2;
    frame.rdx = 0xd3;
    frame.rsi = 0x5e'0000'0000'0004;
    frame.rdi = 0xd1'0000'0000'0005;
    frame.rbp = 0xffff'ffff'ffff'0006;
    frame.r8 = 0x8008'0000'0000'0008;
    frame.r9 = 9;
    frame.r10 = 0x10;
    frame.r11 = 0x11;
    frame.r12 = 0x12;
    frame.r13 = 0x13;
    frame.r14 = 0x14;
    frame.r15 = 0x15;
}

void check_same_registers(const TrapFrame& now, const TrapFrame& before) {
    CHECK_EQ(now.rax, before.rax);
    CHECK_EQ(now.rbx, before.rbx);
    CHECK_EQ(now.rdx, before.rdx);
    CHECK_EQ(now.rsi, before.rsi);
    CHECK_EQ(now.rdi, before.rdi);
    CHECK_EQ(now.rbp, before.rbp);
    CHECK_EQ(now.r8, before.r8);
    CHECK_EQ(now.r9, before.r9);
    CHECK_EQ(now.r10, before.r10);
    CHECK_EQ(now.r12, before.r12);
    CHECK_EQ(now.r13, before.r13);
    CHECK_EQ(now.r14, before.r14);
    CHECK_EQ(now.r15, before.r15);
    CHECK_EQ(now.rsp, before.rsp);
    CHECK_EQ(now.ss, before.ss);
    CHECK_EQ(now.cs, before.cs);
}

void system_calls() {
    for (const EnterUserBy by : {EnterUserBy::iret, EnterUserBy::sysret}) {
        const std::uint64_t start = program_address(program_syscalls);
        TrapFrame frame = user_frame(start, stack_top - 8);
        fill_registers(frame);
        const std::uint64_t interrupts = by == EnterUserBy::iret ? rflags_if : 0;
        frame.rflags = rflags_fixed | interrupts | flag_carry | flag_zero;
        TrapFrame before = frame;
        for (std::uint64_t call = 1; call <= 2; ++call) {
            run_user(frame, by);
            CHECK_EQ(frame.vector, vector_syscall);
            CHECK_EQ(frame.rip, start + 2 * call);
            CHECK_EQ(frame.rcx, frame.rip);
            CHECK_EQ(frame.r11, before.rflags);
            CHECK_EQ(frame.rflags, before.rflags);
            check_same_registers(frame, before);
            frame.rax = 0x1234'5678'9abc'def0; // the call's result
            before.rax = frame.rax;
        }
    }

    constexpr unsigned calls = 200;
    TrapFrame frame = user_frame(program_address(program_count), stack_top);
    frame.rdi = calls;
    unsigned seen = 0;
    for (;;) {
        run_user(frame, seen % 2 == 0 ? EnterUserBy::iret : EnterUserBy::sysret);
        if (frame.vector != vector_syscall)
            break;
        frame.rax = ++seen;
    }
    CHECK_EQ(frame.vector, vector_call);
    CHECK_EQ(seen, calls);
    CHECK_EQ(frame.rbx, calls * (calls + 1) / 2);
    print("user: system calls\n");
}

void software_interrupts(bool qemu) {
    const auto gate_error = [&](unsigned vector) {
        return vector * (qemu ? 16U : 8U) + 2;
    }; // QEMU doubles the index
    const std::uint64_t start = program_address(program_int_call);
    TrapFrame frame = user_frame(start, stack_top - 24);
    fill_registers(frame);
    frame.rcx = 0xc;
    frame.rflags = rflags_fixed | rflags_if | flag_carry;
    const TrapFrame before = frame;
    run_user(frame);
    CHECK(faulted(frame, vector_call, 0, start + 2));
    check_same_registers(frame, before);
    CHECK_EQ(frame.rcx, before.rcx);
    CHECK_EQ(frame.r11, before.r11);
    CHECK_EQ(frame.rflags, before.rflags);

    // A gate that is not open to programs is a protection fault that names it.
    CHECK(faulted(run(program_int_closed), vector_gp, gate_error(vector_closed),
                  program_address(program_int_closed)));
    CHECK(faulted(run(program_int3), vector_gp, gate_error(vector_bp), program_address(program_int3)));
    set_gate(vector_bp, {.privilege = 3});
    CHECK(faulted(run(program_int3), vector_bp, 0, program_address(program_int3) + 1));
    print("user: software interrupts\n");
}

std::uint64_t frame_address;

void trap_stacks() {
    const auto handler = [](TrapFrame& frame) {
        frame_address = reinterpret_cast<std::uint64_t>(&frame);
        ++frame.rax;
    };
    set_handler(vector_handled, handler);
    set_handler(vector_own_stack, handler);

    TrapFrame frame =
        run(program_int_handled); // back in the program by the stub's IRETQ, then its system call
    CHECK_EQ(frame.vector, vector_syscall);
    CHECK_EQ(frame.rax, 1);
    CHECK_EQ(frame_address, trap_stack_top() - sizeof(TrapFrame));

    frame = run(program_int_own_stack);
    CHECK_EQ(frame.vector, vector_syscall);
    CHECK_EQ(frame.rax, 1);
    CHECK_EQ(frame_address, interrupt_stack_top(spare_stack) - sizeof(TrapFrame));
    print("user: stacks of traps\n");
}

void pages(const AddressSpace& space) {
    const auto completes = [](const TrapFrame& frame) { return frame.vector == vector_syscall; };
    const auto page_fault = [](const TrapFrame& frame, std::uint64_t error, std::uint64_t address) {
        const bool is_fetch = (error & pf_fetch) != 0;
        CHECK_EQ(frame.vector, vector_pf);
        CHECK_EQ(frame.error, error);
        CHECK_EQ(read_cr2(), address);
        CHECK_EQ(is_fetch, frame.rip == address);
    };

    word(data) = 0x1122;
    CHECK_EQ(run(program_read, data).rax, 0x1122);
    CHECK(completes(run(program_write, data, 0x3344)));
    CHECK_EQ(word(data), 0x3344);
    CHECK_EQ(run(program_push_pop, 0x5566).rax, 0x5566);
    CHECK_EQ(word(stack_top - 8), 0x5566);

    CHECK(completes(run(program_read, read_only)));
    page_fault(run(program_write, read_only), pf_user | pf_present | pf_write, read_only);
    page_fault(run(program_jump, not_executable), pf_user | pf_present | pf_fetch, not_executable);
    page_fault(run(program_read, missing + 5), pf_user, missing + 5);
    page_fault(run(program_write, missing), pf_user | pf_write, missing);
    page_fault(run(program_jump, missing), pf_user | pf_fetch, missing);

    // The kernel's pages, its code and data, and its page tables are there, and out of reach.
    const auto kernel_variable = reinterpret_cast<std::uint64_t>(&frame_address);
    const auto kernel_function = reinterpret_cast<std::uint64_t>(&kernel_main);
    for (const std::uint64_t address :
         {kernel_only, kernel_branch, kernel_variable, kernel_function, space.root(), gdt_register().base}) {
        page_fault(run(program_read, address), pf_user | pf_present, address);
        page_fault(run(program_write, address), pf_user | pf_present | pf_write, address);
        page_fault(run(program_jump, address), pf_user | pf_present | pf_fetch, address);
    }

    // A page changes hands.
    space.entry(kernel_only) |= pte_user;
    invlpg(kernel_only);
    CHECK(completes(run(program_write, kernel_only, 0x77)));
    CHECK_EQ(word(kernel_only), 0x77);
    space.entry(kernel_only) &= ~pte_user;
    invlpg(kernel_only);
    page_fault(run(program_read, kernel_only), pf_user | pf_present, kernel_only);
    CHECK_EQ(word(kernel_only), 0x77);

    // As copy on write: the fault is resolved, and the instruction runs again.
    TrapFrame frame = run(program_write, read_only, 0x88);
    page_fault(frame, pf_user | pf_present | pf_write, read_only);
    const std::uint64_t copy = allocate_frame();
    space.entry(read_only) = copy | pte_user_rw;
    invlpg(read_only);
    run_user(frame);
    CHECK(completes(frame));
    CHECK_EQ(physical(copy), 0x88);
    CHECK_EQ(space.entry(read_only) & (pte_accessed | pte_dirty), pte_accessed | pte_dirty);
    print("user: pages\n");
}

void segment_bases() {
    const std::uint64_t kernel_gs = read_msr(msr_gs_base);
    word(data + 0x100) = 0xf5;
    word(data + 0x208) = 0x65;
    write_msr(msr_fs_base, data + 0x100);
    write_msr(msr_kernel_gs_base, data + 0x200); // in the kernel, this register holds the program's base
    for (unsigned round = 0; round < 2; ++round) {
        const TrapFrame frame = run(program_segment_bases);
        CHECK_EQ(frame.rax, 0xf5);
        CHECK_EQ(frame.rbx, 0x65);
        CHECK_EQ(read_msr(msr_gs_base), kernel_gs);
        CHECK_EQ(read_msr(msr_kernel_gs_base), data + 0x200);
    }
    asm volatile("swapgs");
    CHECK_EQ(read_msr(msr_gs_base), data + 0x200);
    CHECK_EQ(read_msr(msr_kernel_gs_base), kernel_gs);
    std::uint64_t value = 0;
    asm volatile("mov %%gs:8, %0" : "=r"(value));
    CHECK_EQ(value, 0x65);
    asm volatile("swapgs");
    write_msr(msr_fs_base, 0);
    write_msr(msr_kernel_gs_base, 0);
    print("user: segment bases\n");
}

void privileged_instructions() {
    constexpr void (*programs[])() = {
        program_cli,       program_sti,      program_hlt,       program_in,       program_out,
        program_outs,      program_read_cr0, program_write_cr0, program_read_cr3, program_write_cr3,
        program_write_cr4, program_read_dr7, program_clts,      program_lmsw,     program_invlpg,
        program_wbinvd,    program_swapgs,   program_sysret,    program_lgdt,     program_lidt,
        program_ltr,       program_lldt};
    const std::uint64_t cr3 = read_cr3();
    for (const auto program : programs)
        CHECK(faulted(run(program, data, data), vector_gp, 0, program_address(program)));
    constexpr std::uint64_t after_mov_ecx = 5;
    CHECK(faulted(run(program_rdmsr), vector_gp, 0, program_address(program_rdmsr) + after_mov_ecx));
    CHECK(faulted(run(program_wrmsr), vector_gp, 0, program_address(program_wrmsr) + after_mov_ecx));
    CHECK_EQ(read_cr3(), cr3);

    // The kernel's segments: the error code names the selector.
    for (const auto program : {program_load_ds, program_load_ss}) {
        TrapFrame frame = user_frame(program_address(program), stack_top);
        frame.rax = kernel_data | 3;
        run_user(frame);
        CHECK(faulted(frame, vector_gp, kernel_data, program_address(program)));
    }
    constexpr std::uint64_t frame_size = 40;
    const std::uint64_t to_kernel[] = {reinterpret_cast<std::uint64_t>(&kernel_main), kernel_code,
                                       rflags_fixed, data, kernel_data};
    for (std::uint64_t i = 0; i < frame_size / 8; ++i)
        word(stack_top - frame_size + i * 8) = to_kernel[i];
    TrapFrame frame = user_frame(program_address(program_iret), stack_top - frame_size);
    run_user(frame);
    CHECK(faulted(frame, vector_gp, kernel_code, program_address(program_iret)));
    CHECK_EQ(frame.rsp, stack_top - frame_size);
    print("user: privileged instructions\n");
}

void exceptions() {
    CHECK(faulted(run(program_divide), vector_de, 0, program_address(program_divide) + 4));
    CHECK(faulted(run(program_ud2), vector_ud, 0, program_address(program_ud2)));
    CHECK(faulted(run(program_read, std::uint64_t{1} << 63), vector_gp, 0, program_address(program_read)));

    TrapFrame frame = user_frame(program_address(program_step), stack_top);
    frame.rdi = 41;
    for (const unsigned offset : {1U, 5U}) { // behind the nop, behind the lea
        frame.rflags |= rflags_tf;
        run_user(frame);
        CHECK(faulted(frame, vector_db, 0, program_address(program_step) + offset));
        CHECK_EQ(frame.rflags & rflags_tf, rflags_tf);
    }
    CHECK_EQ(frame.rax, 42);
    frame.rflags &= ~rflags_tf;
    run_user(frame);
    CHECK_EQ(frame.vector, vector_syscall);
    print("user: exceptions\n");
}

} // namespace

extern "C" int kernel_main(const BootParams& boot) {
    install_descriptors();
    init_memory(boot);
    init_pic(0);
    enable_user_mode();
    set_gate(vector_call, {.privilege = 3});
    set_gate(vector_handled, {.privilege = 3});
    set_gate(vector_own_stack, {.privilege = 3, .stack = spare_stack});
    const AddressSpace space = make_space();

    system_calls();
    software_interrupts(boot.has_option("qemu"));
    trap_stacks();
    pages(space);
    segment_bases();
    privileged_instructions();
    exceptions();
    print("user: passed\n");
    return 0;
}
