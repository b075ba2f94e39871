// The numbers that a program of cpufuzz is made of: the same for the same seed everywhere.
#pragma once

#include <cstdint>

namespace umbra::guest::cpufuzz {

/// splitmix64: each program begins with a state of its own, so that none depends on those before it.
class Random {
  public:
    Random(std::uint64_t seed, std::uint64_t program) : state_(seed * 0x9e37'79b9'7f4a'7c15 ^ program << 20) {
        (void)next();
    }
    std::uint64_t next() {
        state_ += 0x9e37'79b9'7f4a'7c15;
        std::uint64_t value = state_;
        value = (value ^ value >> 30) * 0xbf58'476d'1ce4'e5b9;
        value = (value ^ value >> 27) * 0x94d0'49bb'1331'11eb;
        return value ^ value >> 31;
    }
    std::uint64_t below(std::uint64_t bound) { return (next() >> 32) * bound >> 32; }
    bool one_in(std::uint64_t count) { return below(count) == 0; }
    template<class T, unsigned n>
    T of(const T (&choices)[n]) {
        return choices[below(n)];
    }

  private:
    std::uint64_t state_;
};

} // namespace umbra::guest::cpufuzz
