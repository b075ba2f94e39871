// Unpacks LZ4 blocks: sequences of literals and a copy of what came before them.
#include "vmm/loader/lz4.hpp"

#include <algorithm>
#include <cstring>

namespace umbra {

namespace {

constexpr std::size_t length_mask = 15; // a length of this goes on in the bytes that follow
constexpr std::size_t least_match = 4;

/// A block's bytes, front to back.
class Sequences {
  public:
    explicit Sequences(std::span<const std::byte> block) : left_(block) {}

    [[nodiscard]] bool empty() const { return left_.empty(); }
    [[nodiscard]] std::optional<std::size_t> byte() {
        if (left_.empty())
            return std::nullopt;
        const auto value = std::to_integer<std::size_t>(left_.front());
        left_ = left_.subspan(1);
        return value;
    }
    /// The length whose first 4 bits are `bits`. It cannot overflow: each byte adds at most 255.
    [[nodiscard]] std::optional<std::size_t> length(std::size_t bits) {
        constexpr std::size_t continued = 255;
        std::size_t length = bits;
        for (std::size_t more = bits == length_mask ? continued : 0; more == continued; length += more) {
            const auto next = byte();
            if (!next)
                return std::nullopt;
            more = *next;
        }
        return length;
    }
    [[nodiscard]] std::optional<std::span<const std::byte>> bytes(std::size_t count) {
        if (count > left_.size())
            return std::nullopt;
        const auto taken = left_.first(count);
        left_ = left_.subspan(count);
        return taken;
    }

  private:
    std::span<const std::byte> left_;
};

/// Copies `length` bytes from `distance` bytes before out[at]. Where they overlap, the bytes repeat.
void copy_match(std::span<std::byte> out, std::size_t at, std::size_t distance, std::size_t length) {
    for (std::size_t done = 0; done < length;) {
        // From the same place, so that each round can copy all that is there by now.
        const std::size_t count = std::min(length - done, distance + done);
        std::memcpy(&out[at + done], &out[at - distance], count);
        done += count;
    }
}

} // namespace

std::optional<std::size_t> unpack_lz4_block(std::span<const std::byte> block, std::span<std::byte> out) {
    constexpr unsigned literal_shift = 4, byte_bits = 8;
    Sequences in(block);
    std::size_t size = 0;
    while (true) {
        const auto token = in.byte();
        const auto literal_length = token ? in.length(*token >> literal_shift) : std::nullopt;
        const auto literals = literal_length ? in.bytes(*literal_length) : std::nullopt;
        if (!literals || literals->size() > out.size() - size)
            return std::nullopt;
        std::ranges::copy(*literals, out.begin() + static_cast<std::ptrdiff_t>(size));
        size += literals->size();
        if (in.empty()) // the last sequence has literals only
            return size;

        const auto low = in.byte(), high = in.byte();
        const auto match = in.length(*token & length_mask);
        if (!high || !match)
            return std::nullopt;
        const std::size_t distance = *low | *high << byte_bits;
        const std::size_t length = *match + least_match;
        if (distance == 0 || distance > size || length > out.size() - size)
            return std::nullopt;
        copy_match(out, size, distance, length);
        size += length;
    }
}

} // namespace umbra
