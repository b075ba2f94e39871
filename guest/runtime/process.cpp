// Ending the run.
#include "guest/runtime/process.hpp"

#include "guest/runtime/console.hpp"
#include "guest/runtime/cpu.hpp"

namespace umbra::guest {

constexpr std::uint16_t isa_debug_exit = 0xf4;

extern "C" void exit_guest(std::uint32_t code) {
    flush_console();
    out32(isa_debug_exit, code);
    for (;;) // nobody listens at the port
        asm volatile("cli\n hlt");
}

void check_failed(const char* file, int line, const char* expression) {
    print("%s:%d: check failed: %s\n", file, line, expression);
    exit_guest(exit_check_failed);
}

void check_failed(const char* file, int line, const char* expression, std::uint64_t actual,
                  std::uint64_t expected) {
    print("%s:%d: check failed: %s: is %#lx, should be %#lx\n", file, line, expression, actual, expected);
    exit_guest(exit_check_failed);
}

} // namespace umbra::guest
