// Where the stubs lead: to a handler, back to run_user(), to the PROBE in progress, or to the end of the run.
#include "guest/runtime/traps.hpp"

#include "guest/runtime/console.hpp"
#include "guest/runtime/cpu.hpp"
#include "guest/runtime/process.hpp"
#include "guest/runtime/user.hpp"

extern "C" {
// Set by the PROBE macro; `probe_end` is 0 while no probe is in progress.
volatile std::uint64_t probe_start = 0;
volatile std::uint64_t probe_end = 0;
}

namespace umbra::guest {
namespace {

TrapHandler handlers[256];
Trap probed;

} // namespace

void set_handler(unsigned vector, TrapHandler handler) {
    handlers[vector] = handler;
}

Trap take_trap() {
    Trap result = probed;
    result.start = probe_start;
    result.end = probe_end;
    probed = Trap{};
    probe_end = 0;
    return result;
}

void print_frame(const TrapFrame& frame) {
    print("trap %lu error %#lx rip %#lx cs %#lx rflags %#lx rsp %#lx ss %#lx\n", frame.vector, frame.error,
          frame.rip, frame.cs, frame.rflags, frame.rsp, frame.ss);
}

extern "C" void dispatch_trap(TrapFrame& frame) {
    if (frame.vector < 256 && handlers[frame.vector] != nullptr) {
        handlers[frame.vector](frame);
        return;
    }
    if (frame.from_user())
        end_user(frame);
    if (probe_end == 0 || !probed.none()) {
        print("unexpected ");
        print_frame(frame);
        if (frame.vector == vector_pf)
            print("cr2 %#lx\n", read_cr2());
        exit_guest(exit_unexpected_trap);
    }
    probed.frame = frame;
    if (frame.vector == vector_pf)
        probed.cr2 = read_cr2();
    frame.rip = probe_end;
    frame.rflags &= ~rflags_tf;
}

Trap probe_read(std::uint64_t address) {
    return PROBE("mov (%0), %%rax", : : "r"(address) : "rax");
}

Trap probe_write(std::uint64_t address, std::uint64_t value) {
    return PROBE("mov %1, (%0)", : : "r"(address), "r"(value));
}

Trap probe_fetch(std::uint64_t address) {
    Trap trap = PROBE_SEQUENCE("mov %%rsp, %%rbx", "call *%0", "mov %%rbx, %%rsp",
                               :
                               : "r"(address)
                               : "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11");
    trap.start = address;
    return trap;
}

} // namespace umbra::guest
