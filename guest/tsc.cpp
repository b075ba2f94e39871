// tsc: the time-stamp counter, written by WRMSR and moved by IA32_TSC_ADJUST, by little and by much. Proves
// that RDTSC follows at once, that RDMSR agrees with it, and that each of the two registers tells of what was
// written to the other. Intel SDM vol. 3B ch. 17.17.3. Outcome: passed.
#include "guest/runtime/boot.hpp"
#include "guest/runtime/console.hpp"
#include "guest/runtime/cpu.hpp"
#include "guest/runtime/descriptors.hpp"
#include "guest/runtime/process.hpp"

#include <cstdint>
#include <initializer_list>

using namespace umbra::guest;

namespace {

constexpr std::uint32_t msr_tsc = 0x10, msr_tsc_adjust = 0x3b;
constexpr std::uint64_t little = 1'000'000'000, much = std::uint64_t{1} << 50;

/// No test takes so long, even where each instruction is emulated.
constexpr std::uint64_t a_while = std::uint64_t{1} << 40;

/// What the counter would be if nothing had moved it.
std::uint64_t unmoved() {
    return read_tsc() - read_msr(msr_tsc_adjust);
}

void written() {
    for (const std::uint64_t value : {much, std::uint64_t{0}, little, std::uint64_t{0}}) {
        write_msr(msr_tsc, value);
        CHECK(read_tsc() - value < a_while);
        CHECK(read_msr(msr_tsc) - value < a_while);
    }
    for (const std::uint64_t step : {little, much}) {
        const std::uint64_t before = read_tsc();
        write_msr(msr_tsc, before + step);
        CHECK(read_tsc() - before >= step);
        CHECK(read_tsc() - before < step + a_while);
    }
    print("tsc: written\n");
}

void adjusted() {
    const std::uint64_t start = unmoved();
    write_msr(msr_tsc, 0);
    CHECK(unmoved() - start < a_while);
    for (const std::uint64_t value : {little, much, std::uint64_t{0}, ~little}) {
        const std::uint64_t moved = value - read_msr(msr_tsc_adjust);
        const std::uint64_t before = read_tsc();
        write_msr(msr_tsc_adjust, value);
        CHECK_EQ(read_msr(msr_tsc_adjust), value);
        CHECK(read_tsc() - before - moved < a_while);
    }
    CHECK(unmoved() - start < a_while);
    print("tsc: adjusted\n");
}

} // namespace

extern "C" int kernel_main(const BootParams&) {
    constexpr std::uint32_t adjust_feature = 1U << 1; // of leaf 7, EBX
    install_descriptors();
    written();
    if ((cpuid(7).ebx & adjust_feature) != 0)
        adjusted();
    print("tsc: passed\n");
    return 0;
}
