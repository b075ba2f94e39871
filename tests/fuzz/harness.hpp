// What the fuzz targets share: reading an input, a guest's small memory, and how a broken rule is told.
//
// An input is a program: operations of a few bytes each, read front to back, so that cutting, doubling or
// splicing an input makes another program that means something. Any input is one: what is missing at its end
// is zero.
#pragma once

#include "shadow/guest_walk.hpp"

#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include <fmt/core.h>

namespace umbra::fuzz {

/// Set by UMBRA_FUZZ_TRACE in the environment: prints each operation, for replaying one input.
inline const bool tracing = std::getenv("UMBRA_FUZZ_TRACE") != nullptr;

template<class... Args>
void trace(fmt::format_string<Args...> format, Args&&... args) {
    if (tracing)
        fmt::print(stderr, "{}\n", fmt::format(format, std::forward<Args>(args)...));
}

/// Ends the process if a rule is broken, so that libFuzzer keeps the input.
template<class... Args>
void check(bool holds, fmt::format_string<Args...> rule, Args&&... args) {
    if (holds)
        return;
    fmt::print(stderr, "broken: {}\n", fmt::format(rule, std::forward<Args>(args)...));
    std::abort();
}

class Input {
  public:
    Input(const std::uint8_t* data, std::size_t size) : left_(data, size) {}

    [[nodiscard]] bool empty() const { return left_.empty(); }
    template<class T>
    [[nodiscard]] T take() {
        T value{};
        const std::size_t size = std::min(sizeof(T), left_.size());
        if (size != 0)
            std::memcpy(&value, left_.data(), size);
        left_ = left_.subspan(size);
        return value;
    }
    [[nodiscard]] unsigned below(unsigned bound) { return take<std::uint8_t>() % bound; }

  private:
    std::span<const std::uint8_t> left_;
};

/// Guest RAM with a hole, and more of it from 4 GB up. Each region is an allocation of its own, so that
/// AddressSanitizer sees an access beyond it. Programs write to a few pages of it, which can be tables; the
/// rest, which makes room for large pages, stays zero.
class SmallMemory {
  public:
    static constexpr std::uint64_t low_bytes = std::uint64_t{4} << 20, high_bytes = std::uint64_t{2} << 20;
    static constexpr GuestFrame low{0}, high{1U << 20};
    /// Frames in the hole, for a device.
    static constexpr GuestFrame window{0x800}, behind_window{0x804};
    static constexpr std::array pages{low,     low + 1, low + 2, low + 3,   low + 4,   low + 5, low + 6,
                                      low + 7, low + 8, low + 9, low + 512, low + 513, high,    high + 1};

    SmallMemory()
        : low_(std::make_unique<std::byte[]>(low_bytes)), high_(std::make_unique<std::byte[]>(high_bytes)),
          memory_({{low.base(), {low_.get(), low_bytes}}, {high.base(), {high_.get(), high_bytes}}}) {}

    [[nodiscard]] const GuestMemory& memory() const { return memory_; }
    void clear() const {
        for (const GuestFrame page : pages)
            std::memset(memory_.range(page.base(), page_size).data(), 0, page_size);
    }

    /// All that programs write to, one page after the other.
    [[nodiscard]] std::vector<std::uint64_t> contents() const {
        constexpr std::size_t words = page_size / sizeof(std::uint64_t);
        std::vector<std::uint64_t> all(pages.size() * words);
        for (std::size_t i = 0; i < pages.size(); ++i)
            std::memcpy(&all[i * words], memory_.range(pages.at(i).base(), page_size).data(), page_size);
        return all;
    }
    /// Where in `contents` the byte at `at` is; nothing if it is not in it.
    [[nodiscard]] static std::optional<std::size_t> offset(GuestPhys at) {
        const auto* const found = std::ranges::find(pages, at.frame());
        if (found == pages.end())
            return std::nullopt;
        return static_cast<std::size_t>(found - pages.begin()) * page_size + at.page_offset();
    }

    [[nodiscard]] static GuestFrame page(unsigned number) { return pages.at(number % pages.size()); }
    /// Mostly one of the pages; otherwise other RAM, or where there is none.
    [[nodiscard]] static GuestFrame frame(Input& input) {
        const auto choice = input.take<std::uint8_t>();
        if (choice < 0xe0)
            return page(choice);
        constexpr std::array others{low + 511,
                                    low + 1023,
                                    low + 1024,
                                    high + 512,
                                    window,
                                    behind_window,
                                    GuestFrame{512 << 9},
                                    GuestFrame{~0U},
                                    GuestFrame{std::uint64_t{1} << 28},
                                    GuestFrame{(std::uint64_t{1} << 40) - 1}};
        return others.at(choice % others.size());
    }
    /// Any value, or one that a guest could mean: most random numbers lead out of memory at once.
    [[nodiscard]] static GuestEntry entry(Input& input) {
        const auto kind = input.take<std::uint8_t>();
        if (kind % 8 == 0)
            return GuestEntry(input.take<std::uint64_t>());
        const std::uint64_t bits = input.take<std::uint16_t>() & 0xfffU;
        const std::uint64_t no_execute = kind % 8 == 1 ? entry_bit::no_execute : 0;
        const std::uint64_t key = kind % 8 == 2 ? std::uint64_t{kind} >> 4 << entry_bit::key_shift : 0;
        const std::uint64_t table = kind % 8 >= 4 ? entry_bit::present | entry_bit::writable : 0;
        return GuestEntry(frame(input), bits | no_execute | key | table);
    }
    /// A slot in one of the pages, aligned for an entry of 8 bytes.
    [[nodiscard]] static GuestPhys slot(Input& input) {
        const GuestFrame table = page(input.take<std::uint8_t>());
        return table.base() + input.take<std::uint16_t>() % entries_per_table * sizeof(std::uint64_t);
    }
    /// An address that the mode has, in few spans of each level, so that accesses meet.
    [[nodiscard]] static GuestVirt address(Input& input, const PagingFormat& format) {
        const auto offset = input.take<std::uint16_t>();
        const auto indices = input.take<std::uint16_t>();
        const std::uint64_t page = offset >> 12; // the first ones and the last two
        std::uint64_t bits = (offset & (page_size - 1)) | (page < 14 ? page : 0x1f0 | page) << page_shift;
        for (unsigned shift = 21, from = 0; shift < format.address_bits(); shift += 9, from += 2) {
            const std::uint64_t index = indices >> from & 3; // the first two and the last two
            bits |= (index < 2 ? index : 0x1fc | index) << shift;
        }
        return format.sign_extend(bits);
    }

  private:
    std::unique_ptr<std::byte[]> low_, high_;
    GuestMemory memory_;
};

inline constexpr std::array formats{&paging_4_level,    &paging_pae, &paging_32_bit,
                                    &paging_32_bit_pse, &paging_off, &paging_5_level};

/// Puts an entry where the format's width says.
inline void put(const GuestMemory& memory, const Level& level, GuestPhys slot, GuestEntry entry) {
    if (level.entry_bytes == sizeof(std::uint64_t))
        (void)memory.write(slot, entry.raw());
    else
        (void)memory.write(slot, static_cast<std::uint32_t>(entry.raw()));
}

inline Access access(std::uint8_t bits) {
    return {
        .write = (bits & 3) == 1, .fetch = (bits & 3) == 2, .user = (bits & 4) != 0, .ac = (bits & 8) != 0};
}

} // namespace umbra::fuzz
