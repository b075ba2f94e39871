// random: page tables full of random numbers. A few frames hold entries that refer to each other, to
// themselves, to memory that does not exist and to addresses that cannot be, so that each frame serves at
// several levels at once, and as data. Every access is compared with a walk in software: same fault, or same
// word, and accessed and dirty bits set. Intel SDM vol. 3A ch. 4.5-4.8. Outcome: passed.
#include "guest/runtime/boot.hpp"
#include "guest/runtime/console.hpp"
#include "guest/runtime/cpu.hpp"
#include "guest/runtime/descriptors.hpp"
#include "guest/runtime/paging.hpp"
#include "guest/runtime/process.hpp"
#include "guest/runtime/traps.hpp"

#include <cstdint>

using namespace umbra::guest;

namespace {

constexpr unsigned frame_count = 12;
constexpr unsigned slot_count = 4; // of the top level, each with another of the frames under it
constexpr unsigned first_slot = 20;
constexpr unsigned rounds = 12;
constexpr unsigned accesses_per_round = 150;

std::uint64_t frames[frame_count];
std::uint64_t ram_end;
bool qemu;

/// xorshift64*: the same numbers in every run.
std::uint64_t random_state = 0x9e37'79b9'7f4a'7c15;
std::uint64_t random() {
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return random_state * 0x2545'f491'4f6c'dd1d;
}
std::uint64_t random_below(std::uint64_t bound) {
    return random() % bound;
}

/// Mostly a way on to another of the frames. Large pages are left out: one of them could reach the kernel
/// itself.
std::uint64_t random_entry() {
    std::uint64_t flags = random() & (pte_writable | pte_user | pte_accessed | pte_dirty | pte_no_execute);
    if (random_below(8) != 0)
        flags |= pte_present;
    if (random_below(4) != 0)
        flags |= pte_writable;
    switch (random_below(16)) {
    case 0: // nothing is there
        return flags | (std::uint64_t{1} << (physical_address_bits() - 1)) | (random_below(1 << 16) << 12);
    case 1: // reserved bits
        return physical_address_bits() < 52 ? flags | frames[0] | std::uint64_t{1} << 51 : 0;
    default:
        return flags | frames[random_below(frame_count)];
    }
}

struct Walk {
    bool faults = false;
    std::uint64_t error = 0;
    bool error_is_open = false; ///< a table lies where nothing is: all ones or nothing, as the bus has it
    std::uint64_t address = 0;  ///< physical
    bool bits_set = true;       ///< accessed in every entry, and dirty in the last if it was a write
};

Walk walk(std::uint64_t root, std::uint64_t virt, bool write) {
    const std::uint64_t beyond = pte_address & ~((std::uint64_t{1} << physical_address_bits()) - 1);
    Walk result;
    bool writable = true;
    std::uint64_t table = root;
    for (unsigned level = 4; level >= 1; --level) {
        if (table >= ram_end)
            return {.faults = true, .error = write ? pf_write : 0, .error_is_open = true};
        const std::uint64_t entry = physical(table, virt / span_of(level) % 512);
        if ((entry & pte_present) == 0)
            return {.faults = true, .error = write ? pf_write : 0};
        if ((entry & beyond) != 0)
            return {.faults = true, .error = (qemu ? 0 : pf_present) | pf_reserved | (write ? pf_write : 0)};
        writable = writable && (entry & pte_writable) != 0;
        const std::uint64_t wanted = level == 1 && write ? pte_accessed | pte_dirty : pte_accessed;
        result.bits_set = result.bits_set && (entry & wanted) == wanted;
        table = entry & pte_address;
    }
    if (write && !writable)
        return {.faults = true, .error = pf_present | pf_write};
    result.address = table + virt % page_4k;
    return result;
}

/// One access, and the walk after it: what the CPU sets in entries on its way changes no translation.
void access(const AddressSpace& space, std::uint64_t virt, bool write, std::uint64_t value) {
    // A write may change the tables that it went through. Where it leads is settled before.
    const Walk before = walk(space.root(), virt, write);
    std::uint64_t seen = 0;
    const Trap trap = write ? probe_write(virt, value) : PROBE("mov (%1), %0", : "+r"(seen) : "r"(virt));
    bool right = false;
    if (before.faults) {
        const std::uint64_t open = before.error_is_open ? pf_present | pf_reserved : 0;
        right = trap.frame.vector == vector_pf && (trap.frame.error | open) == (before.error | open) &&
                trap.frame.rip == trap.start && trap.cr2 == virt;
    } else if (before.address >= ram_end) {
        right = trap.none() && (write || seen == ~std::uint64_t{0} || qemu);
    } else if (write) {
        right = trap.none() && physical(before.address) == value;
    } else {
        right = trap.none() && seen == physical(before.address) && walk(space.root(), virt, false).bits_set;
    }
    if (right)
        return;
    print("%s of %#lx: vector %lu error %#lx cr2 %#lx seen %#lx; should fault %u error %#lx, physical %#lx\n",
          write ? "write" : "read", virt, trap.frame.vector, trap.frame.error, trap.cr2, seen, before.faults,
          before.error, before.address);
    exit_guest(exit_check_failed);
}

} // namespace

extern "C" int kernel_main(const BootParams& boot) {
    install_descriptors();
    init_memory(boot);
    qemu = boot.has_option("qemu");
    ram_end = boot.ram_end();
    for (std::uint64_t& frame : frames)
        frame = allocate_frame();
    const AddressSpace space = AddressSpace::create();
    for (unsigned slot = 0; slot < slot_count; ++slot)
        space.entry(slot_base(first_slot + slot), 4) = frames[slot] | pte_user_rw;
    space.load();

    for (unsigned round = 0; round < rounds; ++round) {
        for (const std::uint64_t frame : frames)
            for (unsigned i = 0; i < 512; ++i)
                physical(frame, i) = random_entry();
        space.load();
        for (unsigned i = 0; i < accesses_per_round; ++i) {
            const std::uint64_t virt = slot_base(first_slot) + random_below(slot_count * span_of(4)) / 8 * 8;
            const bool write = random_below(4) == 0;
            access(space, virt, write, random_entry());
            if (write)
                space.load(); // it may have been a table
        }
    }
    print("random: %u accesses\n", rounds * accesses_per_round);
    print("random: passed\n");
    return 0;
}
