// hello: the smallest guest. Proves that a kernel is loaded, entered with its boot parameters, heard on the
// serial console, and able to end the run. Outcome: passed.
#include "guest/runtime/boot.hpp"
#include "guest/runtime/console.hpp"

extern "C" int kernel_main(const umbra::guest::BootParams& boot) {
    umbra::guest::print("Hello from a guest kernel\n");
    umbra::guest::print("command line \"%s\", memory %lu KB\n", boot.command_line(), boot.ram_size() / 1024);
    umbra::guest::print("hello: passed\n");
    return 0;
}
