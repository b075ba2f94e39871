// Random guests: what they map, how they change their mind, and which flushes they forget.
#pragma once

#include "tests/model/program.hpp"

#include <array>
#include <random>
#include <vector>

namespace umbra::model {

class Generator {
  public:
    /// `mode`: where most of the program runs. `shadowed`: only what the shadow MMU offers to guests.
    Generator(Mode mode, std::uint64_t seed, bool shadowed, bool sanitized = false);

    [[nodiscard]] const Setup& setup() const { return setup_; }
    /// The next operation: first those that build tables, then whatever comes. `now`: the guest so far.
    [[nodiscard]] Operation next(const ReferenceMmu& now);

  private:
    /// The tables of one paging mode, and which of their entries are used.
    struct Space {
        Mode mode{};
        std::array<std::vector<std::uint64_t>, 6> tables; ///< by level
    };

    std::uint64_t below(std::uint64_t bound) { return random_() % bound; }
    bool chance(unsigned percent) { return below(100) < percent; }
    template<class Container>
    typename Container::value_type pick(const Container& from) {
        return from[below(from.size())];
    }
    std::uint64_t new_frame();

    void make_space(Mode mode);
    [[nodiscard]] const Space& space(Mode mode) const;
    std::uint64_t random_root(Mode mode);
    std::uint64_t random_address(Mode mode);
    std::uint64_t random_page();
    std::uint64_t random_table(const Space& space, unsigned level);
    std::uint64_t random_entry(const Space& space, unsigned level);
    Operation entry_write(Mode mode, std::uint64_t slot, unsigned level, std::uint64_t clear,
                          std::uint64_t set);
    Operation whole_write(Mode mode, std::uint64_t slot, unsigned level, std::uint64_t value);

    Operation access(std::uint64_t at);
    Operation invalidation(const Cpu& cpu, std::uint64_t at);
    void change(const ReferenceMmu& now, std::uint64_t at);
    Operation load_cr3(const Cpu& cpu);
    Operation control(Cpu cpu);
    Operation other_mode(const Cpu& cpu);

    std::mt19937_64 random_;
    bool shadowed_;
    bool smap_, global_, pcids_, trapping_, keys_; ///< what this guest is interested in
    Setup setup_;
    std::uint64_t next_frame_ = 0;
    std::vector<Space> spaces_;
    std::vector<std::uint64_t> pages_;
    std::vector<Operation> queue_; ///< to come, last first
    bool user_ = false, ac_ = false, trap_ = false;
};

} // namespace umbra::model
