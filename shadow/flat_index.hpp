// A hash index over records that are numbered and lie elsewhere: from a key to its record's number.
//
// One flat array with linear probing, which allocates nothing for a record; and numbers, not pointers, which
// mean the same in any mapping of the records.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace umbra {

class FlatIndex {
  public:
    /// For up to `most` records, whose numbers are below 2^32 - 1.
    explicit FlatIndex(std::size_t most) : places_(std::bit_ceil(2 * most + 1)) {}

    /// The record with this hash for which `matches(number)` says that it is the one.
    template<class Matches>
    [[nodiscard]] std::optional<std::uint32_t> find(std::size_t hash, Matches matches) const {
        for (std::size_t at = home(hash); places_[at] != 0; at = next(at)) {
            if (matches(places_[at] - 1))
                return places_[at] - 1;
        }
        return std::nullopt;
    }

    /// The record is not there yet.
    void insert(std::size_t hash, std::uint32_t number) {
        std::size_t at = home(hash);
        while (places_[at] != 0)
            at = next(at);
        places_[at] = number + 1;
        ++size_;
    }

    /// The record is there. `hash_of(number)`: of each record that is.
    template<class HashOf>
    void erase(std::uint32_t number, HashOf hash_of) {
        std::size_t hole = home(hash_of(number));
        while (places_[hole] != number + 1)
            hole = next(hole);
        // What follows moves up, unless it is nearer to its home there than the hole is.
        for (std::size_t at = next(hole); places_[at] != 0; at = next(at)) {
            const std::size_t from_home = distance(home(hash_of(places_[at] - 1)), at);
            if (from_home >= distance(hole, at)) {
                places_[hole] = places_[at];
                hole = at;
            }
        }
        places_[hole] = 0;
        --size_;
    }

    void clear() {
        places_.assign(places_.size(), 0);
        size_ = 0;
    }

    [[nodiscard]] std::size_t size() const { return size_; }

  private:
    [[nodiscard]] std::size_t home(std::size_t hash) const { return hash & (places_.size() - 1); }
    [[nodiscard]] std::size_t next(std::size_t at) const { return (at + 1) & (places_.size() - 1); }
    [[nodiscard]] std::size_t distance(std::size_t from, std::size_t to) const {
        return (to - from) & (places_.size() - 1);
    }

    std::vector<std::uint32_t> places_; ///< a power of two of them: number + 1, or 0
    std::size_t size_ = 0;
};

} // namespace umbra
