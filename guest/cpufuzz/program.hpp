// The programs of cpufuzz: made from a seed, instruction by instruction.
#pragma once

#include "guest/cpufuzz/machine.hpp"
#include "guest/cpufuzz/random.hpp"

#include <cstdint>

namespace umbra::guest::cpufuzz {

/// What a register holds at first, by its number.
constexpr std::uint64_t untouched(std::uint64_t reg) {
    return reg * 0x1111'1111'1111'1111;
}

/// One instruction that is tried, with those that prepare its operands.
struct Step {
    const char* name = nullptr;
    std::uint64_t begin = 0, end = 0; ///< addresses
    unsigned bits = 64;               ///< the mode in which it is decoded
};

struct Program {
    static constexpr unsigned max_steps = 8;

    Start start;
    std::uint64_t registers[16] = {};
    std::uint32_t changed = 0;
    Step steps[max_steps + 1]; ///< the last one ends the program
    unsigned count = 0;
};

/// Makes program `number` of `seed`, in place: code, data and descriptors are in the arena afterwards, whose
/// memory is as restore_memory() leaves it. Of its steps those in `dropped`, a bit each, are left out.
void make_program(std::uint64_t seed, std::uint64_t number, std::uint64_t dropped,
                  const Peculiarities& peculiar, Program& program);

} // namespace umbra::guest::cpufuzz
