// A KVM program that makes a machine, takes one trap and ends: what starting umbra is compared with.

#include "tests/bench/bare_machine.hpp"
#include "vmm/error.hpp"

#include <array>
#include <cstdio>

int main() {
    using namespace umbra;
    constexpr std::array<std::uint8_t, 1> hlt{0xf4};
    try {
        bench::BareMachine machine(Kvm(), std::as_bytes(std::span(hlt)), bench::ResumeBy::iretq);
        machine.start(0, 0, 0);
        return machine.run() ? 0 : 1;
    } catch (const StartupError& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
