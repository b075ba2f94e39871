// Page tables of a guest kernel, and the frames they and everything else are made of. 4-level paging only;
// Intel SDM vol. 3A ch. 4.5. The first 4 GB stay identity mapped, as the loader left them: a table's address
// is a pointer.
#pragma once

#include "guest/runtime/boot.hpp"

#include <cstdint>

namespace umbra::guest {

// Bits of an entry
inline constexpr std::uint64_t pte_present = 1;
inline constexpr std::uint64_t pte_writable = 1 << 1;
inline constexpr std::uint64_t pte_user = 1 << 2;
inline constexpr std::uint64_t pte_accessed = 1 << 5;
inline constexpr std::uint64_t pte_dirty = 1 << 6;
inline constexpr std::uint64_t pte_large = 1 << 7; ///< in levels 2 and 3: the entry maps 2 MB or 1 GB
inline constexpr std::uint64_t pte_global = 1 << 8;
inline constexpr std::uint64_t pte_no_execute = std::uint64_t{1} << 63;
inline constexpr std::uint64_t pte_address = 0x000f'ffff'ffff'f000;
inline constexpr std::uint64_t pte_kernel_rw = pte_present | pte_writable;
inline constexpr std::uint64_t pte_user_rw = pte_kernel_rw | pte_user;

inline constexpr std::uint64_t page_4k = 0x1000;
inline constexpr std::uint64_t page_2m = 0x20'0000;
inline constexpr std::uint64_t page_1g = 0x4000'0000;

/// Bytes that one entry of `level` (1..4) spans.
constexpr std::uint64_t span_of(unsigned level) {
    return page_4k << (9 * (level - 1));
}

/// The lowest address of top-level slot 0..511, sign-extended.
constexpr std::uint64_t slot_base(unsigned slot) {
    return std::uint64_t{slot} << 39 | (slot >= 256 ? 0xffff'0000'0000'0000 : 0);
}

/// Hands out the RAM between the kernel's image and the end of the range it is in. To be called once.
void init_memory(const BootParams& boot);

/// Physical address of `count` contiguous zeroed frames, aligned to `alignment` bytes (a power of two). Ends
/// the run if there are none left; nothing is ever given back.
[[nodiscard]] std::uint64_t allocate_frames(std::uint64_t count, std::uint64_t alignment = page_4k);
[[nodiscard]] inline std::uint64_t allocate_frame() {
    return allocate_frames(1);
}

/// A word of memory that is not this code's alone: the CPU sets bits in page tables, and another mapping may
/// lead to the same word. Every mention reads or writes it.
class Word {
  public:
    [[nodiscard]] std::uint64_t read() const { return value_; }
    operator std::uint64_t() const { return value_; } // NOLINT(google-explicit-constructor): it is a number
    Word& operator=(std::uint64_t value) {
        value_ = value;
        return *this;
    }
    Word& operator=(const Word& other) { return *this = other.read(); }
    Word& operator|=(std::uint64_t bits) { return *this = read() | bits; }
    Word& operator&=(std::uint64_t bits) { return *this = read() & bits; }

  private:
    volatile std::uint64_t value_;
};

/// The word at a virtual address.
inline Word& word(std::uint64_t virt) {
    return *reinterpret_cast<Word*>(virt);
}
/// The word at a physical address below 4 GB, by the identity map.
inline Word& physical(std::uint64_t address) {
    return *reinterpret_cast<Word*>(address);
}
/// Entry 0..511 of the table, or word of the frame, at a physical address below 4 GB.
inline Word& physical(std::uint64_t frame, std::uint64_t index) {
    return physical(frame + index * sizeof(Word));
}

/// One set of page tables. Nothing here flushes the TLB: that is the caller's business, and often the point.
class AddressSpace {
  public:
    /// New tables with the identity map (top-level slot 0) of the tables in use, shared with them.
    static AddressSpace create();
    /// The tables in use.
    static AddressSpace current();

    [[nodiscard]] std::uint64_t root() const { return root_; }
    void load() const;

    /// Maps one page of `level` (1: 4 KB, 2: 2 MB, 3: 1 GB). Missing tables are made, open to everything, so
    /// that the last entry decides.
    void map(std::uint64_t virt, std::uint64_t phys, std::uint64_t flags, unsigned level = 1) const;

    /// The entry of `level` that translates `virt`, by reference: the CPU changes it too. All levels above
    /// must be present and refer to tables.
    [[nodiscard]] Word& entry(std::uint64_t virt, unsigned level = 1) const;

  private:
    explicit AddressSpace(std::uint64_t root) : root_(root) {}

    std::uint64_t root_; // physical
};

} // namespace umbra::guest
