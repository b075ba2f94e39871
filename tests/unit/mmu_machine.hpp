// What the tests of the shadow MMU have in common: addresses, outcomes, and a machine of
// tests/unit/fake_machine.hpp with one address space loaded.
#pragma once

#include "tests/unit/fake_machine.hpp"

#include <cstdint>
#include <vector>

#include <gtest/gtest.h>

namespace umbra::test {

inline constexpr std::uint64_t p = entry_bit::present, rw = entry_bit::writable, us = entry_bit::user,
                               ps = entry_bit::page_size, xd = entry_bit::no_execute, a = entry_bit::accessed,
                               d = entry_bit::dirty;
inline constexpr std::uint64_t kernel_bits = p | rw, user_bits = p | rw | us;
inline constexpr std::uint64_t mb = FakeMachine::mb, gb = FakeMachine::gb;

// Addresses with a different index at each level.
inline constexpr GuestVirt at{0x0123'4567'8000};
inline constexpr GuestVirt neighbour = at + page_size; ///< in the same table
inline constexpr GuestVirt far = at + 3 * gb + 7 * mb; ///< shares the root only
inline constexpr GuestVirt kernel_at{0xffff'9000'0000'0000};
inline constexpr GuestVirt giant = GuestVirt(at.value() & ~(gb - 1)),
                           large = GuestVirt(at.value() & ~(2 * mb - 1));

/// The access reaches this byte of the page: in RAM, or where no memory is.
inline Outcome mapped(GuestFrame frame, std::uint64_t offset = 0) {
    return {.address = MachineFrame(frame.number()).base() + offset, .error_code = {}};
}
/// The page is not the guest's.
inline Outcome leads_nowhere(std::uint64_t offset = 0) {
    return {.address = FakeMachine::nothing.base() + offset, .error_code = {}};
}
inline Outcome fault(std::uint32_t code) {
    return {.address = {}, .error_code = code};
}
inline constexpr std::uint32_t present = PageFault::present, write = PageFault::write, user = PageFault::user,
                               reserved = PageFault::reserved, fetch = PageFault::fetch;

/// A machine with one address space loaded.
class Machine : public FakeMachine {
  public:
    explicit Machine(const Options& options = {}) : FakeMachine(options), root(new_frame()) {
        load_cr3(root);
    }

    using FakeMachine::map;
    void map(GuestVirt address, GuestFrame frame, std::uint64_t bits = user_bits, unsigned level = 1) {
        map(root, address, frame, bits, level);
    }
    /// Maps a new page.
    GuestFrame map_new(GuestVirt address, std::uint64_t bits = user_bits) {
        const GuestFrame frame = new_frame();
        map(address, frame, bits);
        return frame;
    }
    [[nodiscard]] GuestEntry entry(GuestVirt address, unsigned level = 1) const {
        return get(slot(root, address, level));
    }
    void set_entry(GuestVirt address, std::uint64_t raw, unsigned level = 1) {
        put(slot(root, address, level), GuestEntry(raw));
    }
    /// Sets bits of an entry to those of `bits` under `mask`.
    void change(GuestVirt address, std::uint64_t mask, std::uint64_t bits, unsigned level = 1) {
        set_entry(address, (entry(address, level).raw() & ~mask) | bits, level);
    }
    /// An address space that shares the kernel half of this one.
    GuestFrame new_space() {
        const GuestFrame space = new_frame();
        for (unsigned i = entries_per_table / 2; i < entries_per_table; ++i)
            put(FakeMachine::slot_of(space, i), get(FakeMachine::slot_of(root, i)));
        return space;
    }
    /// Switches address space as MOV CR3 does that flushes nothing (bit 63 set).
    void switch_to(GuestFrame space, std::uint16_t pcid) {
        paging.root = space;
        paging.pcid = pcid;
        set_control();
    }
    /// The same with a flush.
    void load_cr3(GuestFrame space, std::uint16_t pcid) {
        paging.pcid = pcid;
        FakeMachine::load_cr3(space);
    }
    using FakeMachine::load_cr3;
    /// Lets `frame` take the place of the table of level 1 that translates `address`.
    void move_table(GuestVirt address, GuestFrame frame) {
        const GuestFrame old = entry(address, 2).table();
        for (unsigned i = 0; i < entries_per_table; ++i)
            put(FakeMachine::slot_of(frame, i), get(FakeMachine::slot_of(old, i)));
        set_entry(address, frame.base().value() | user_bits, 2);
    }
    /// Sets an entry of 4 bytes.
    void store32(GuestFrame table, std::uint64_t index, std::uint64_t raw) {
        const GuestPhys pair = FakeMachine::slot_of(table, index / 2);
        const std::uint64_t shift = index % 2 * 32, mask = std::uint64_t{0xffff'ffff} << shift;
        store(pair, (get(pair).raw() & ~mask) | raw << shift);
    }
    /// One instruction of the guest that stores to `address`. Returns what the Mmu says it has changed in
    /// the guest's tables.
    std::vector<TableWrite> store_at(GuestVirt address, std::uint64_t value) {
        const Outcome reached = FakeMachine::write(address);
        EXPECT_TRUE(reached.address && memory.write(GuestPhys(reached.address->value()), value)) << reached;
        return finish_write();
    }
    std::vector<TableWrite> finish_write() {
        std::vector<TableWrite> writes;
        if (mmu.table_write_begun()) {
            writes = mmu.finish_table_write();
            enter();
        }
        return writes;
    }
    /// The entry of the shadow tables at `level`; not present if the walk ends before.
    [[nodiscard]] ShadowEntry shadow(GuestVirt address, unsigned level = 1, bool as_user = false) {
        for (const auto& step : mmu.shadow_walk(address, as_user)) {
            if (step.level->number == level)
                return step.entry;
        }
        return ShadowEntry();
    }
    /// The table of `level` that translates `address`, and the entry in it.
    [[nodiscard]] TableIndex table(GuestVirt address, unsigned level) {
        for (const auto& step : mmu.shadow_walk(address, user())) {
            if (step.level->number == level)
                return pool.page_of(step.slot.frame()).value();
        }
        ADD_FAILURE() << "no table of level " << level;
        return TableIndex{};
    }
    [[nodiscard]] ShadowEntry& shadow_slot(GuestVirt address, unsigned level = 1) {
        return pool.entries(table(address, level))[paging_4_level.level(level).index(address)];
    }

    GuestFrame root;
};

} // namespace umbra::test
