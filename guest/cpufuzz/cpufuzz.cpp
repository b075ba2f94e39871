// cpufuzz: random short programs of the instructions and events that a hypervisor may have to emulate, or
// whose result shows what machine they run on: segment loads and stores, LAR and its kin, far transfers and
// returns, system calls, software interrupts, flags, single steps, system registers and tables, MSRs, ports,
// interrupts that are pending; with random descriptors, gates, stacks and operands, good and bad; at levels 0
// and 3, in code of 64, 32 and 16 bits. What each program leads to, exceptions with their frames, registers
// and memory, goes into a checksum, which is the same on every machine that is right. A program depends on
// nothing but the seed and its number: some are run twice, which must give the same. README has the options.
// Outcome: passed.
//
// What differs by nature, and is masked: IOPL in flags that code of level 0 pushes or hands on (machine.cpp;
// after PUSHF, program.cpp), for a deprivileged kernel runs with IOPL 3; it cannot change IOPL by POPF,
// either, so programs do not.
#include "guest/cpufuzz/machine.hpp"
#include "guest/cpufuzz/program.hpp"
#include "guest/runtime/boot.hpp"
#include "guest/runtime/console.hpp"
#include "guest/runtime/descriptors.hpp"
#include "guest/runtime/paging.hpp"
#include "guest/runtime/process.hpp"
#include "guest/runtime/timer.hpp"

#include <cstdint>

using namespace umbra::guest;
using namespace umbra::guest::cpufuzz;

namespace {

std::uint64_t mix(std::uint64_t sum, std::uint64_t value) {
    sum = (sum ^ value) * 0x100'0000'01b3;
    return sum ^ sum >> 29;
}

std::uint64_t checksum_of(const Outcome& outcome) {
    std::uint64_t sum = outcome.count;
    for (unsigned i = 0; i < outcome.count; ++i) {
        const auto* words = reinterpret_cast<const std::uint64_t*>(&outcome.happened[i]);
        for (unsigned word = 0; word < sizeof(Happened) / sizeof(std::uint64_t); ++word)
            sum = mix(sum, words[word]);
    }
    for (const std::uint64_t value : outcome.system)
        sum = mix(sum, value);
    return mix(sum, outcome.memory);
}

std::uint64_t word_at(std::uint64_t table, std::uint64_t slot) {
    return word(table + 8 * slot);
}

void print_program(const Program& program) {
    const Start& start = program.start;
    print("start rip %lx cs %lx rflags %lx rsp %lx ss %lx data %x%s changes %x\n", start.rip, start.cs,
          start.rflags, start.rsp, start.ss, unsigned{start.data}, start.interrupt ? " interrupt" : "",
          program.changed);
    for (unsigned i = 0; i <= program.count; ++i) {
        const Step& step = program.steps[i];
        print("code %lx %u ", step.begin, step.bits);
        for (std::uint64_t at = step.begin; at < step.end && at < code_page + page_4k; ++at)
            print("%02x", unsigned{*reinterpret_cast<const std::uint8_t*>(at)});
        print(" %s\n", step.name);
    }
    for (unsigned slot = 0; slot < cpufuzz::gdt_slots; ++slot)
        print("%s%lx", slot % 8 == 0 ? "\ngdt " : " ", word_at(gdt_base, slot));
    for (unsigned slot = 0; slot < ldt_slots; ++slot)
        print("%s%lx", slot % 8 == 0 ? "\nldt " : " ", word_at(ldt_base, slot));
    print("\n");
}

void print_outcome(const Outcome& outcome) {
    for (unsigned i = 0; i < outcome.count; ++i) {
        const Happened& happened = outcome.happened[i];
        print("event %lu", happened.vector);
        if (happened.has_error != 0)
            print(" error %lx", happened.error);
        print(" rip %lx cs %lx rflags %lx rsp %lx ss %lx address %lx\n", happened.rip, happened.cs,
              happened.rflags, happened.rsp, happened.ss, happened.address);
        print("  ds %lx es %lx fs %lx gs %lx", happened.data[0], happened.data[1], happened.data[2],
              happened.data[3]);
        for (unsigned reg = 0; reg < 16; ++reg)
            if (happened.registers[reg] != untouched(reg))
                print(" r%u %lx", reg, happened.registers[reg]);
        print("\n");
    }
    print("system registers");
    for (const std::uint64_t value : outcome.system)
        print(" %lx", value);
    print(", memory %lx\n", outcome.memory);
}

} // namespace

extern "C" int kernel_main(const BootParams& boot) {
    const std::uint64_t seed = boot.number("seed", 1);
    const std::uint64_t first = boot.number("first", 0);
    const std::uint64_t programs = boot.number("programs", 2000);
    const std::uint64_t block = boot.number("block", 1000);
    const std::uint64_t dropped = boot.number("drop", 0);
    const bool trace = boot.has_option("trace");
    const Peculiarities peculiar{.native = boot.has_option("qemu"),
                                 .any = boot.has_option("qemu") || boot.has_option("qemu-host")};
    install_descriptors();
    init_memory(boot);
    init_pic(0);
    set_up(peculiar);

    static Program program;
    static Outcome outcome;
    const auto run_program = [&](std::uint64_t number, bool shows) {
        restore_memory();
        make_program(seed, number, dropped, peculiar, program);
        if (shows) {
            print("program %lu\n", number);
            print_program(program);
        }
        run(program.start, program.registers, program.changed, outcome);
        restore_registers(program.changed);
        if (shows)
            print_outcome(outcome);
        return checksum_of(outcome);
    };
    constexpr std::uint64_t run_twice = 64; ///< one of so many
    std::uint64_t total = 0, of_block = 0, events = 0;
    for (std::uint64_t i = 0; i < programs; ++i) {
        const std::uint64_t sum = run_program(first + i, trace);
        events += outcome.count;
        if (i % run_twice == 0)
            CHECK_EQ(run_program(first + i, false), sum);
        of_block = mix(of_block, sum);
        total = mix(total, sum);
        if ((i + 1) % block == 0 || i + 1 == programs) {
            print("block %lu: %#lx\n", first + i / block * block, of_block);
            of_block = 0;
        }
    }
    print("cpufuzz: seed %lu: %lu programs from %lu on, %lu events, checksum %#lx\n", seed, programs, first,
          events, total);
    print("cpufuzz: passed\n");
    return 0;
}
