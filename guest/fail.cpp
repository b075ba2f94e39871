// fail: reports failure. Proves that a guest's exit code arrives. Outcome: failed:7.
#include "guest/runtime/boot.hpp"
#include "guest/runtime/console.hpp"

extern "C" int kernel_main(const umbra::guest::BootParams&) {
    umbra::guest::print("fail: exiting with 7\n");
    return 7;
}
