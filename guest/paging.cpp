// paging: the MMU seen from a kernel that edits its own tables. Proves that mappings appear, move, lose
// rights and disappear as the architecture says, with the exact error code and CR2 of each fault, the
// accessed and dirty bits of each level, large pages, and all the ways to flush. What the manuals leave open
// (what a stale translation does before its flush) is not tested. Intel SDM vol. 3A ch. 4.5-4.10. Outcome:
// passed.
#include "guest/runtime/paging.hpp"
#include "guest/runtime/boot.hpp"
#include "guest/runtime/console.hpp"
#include "guest/runtime/cpu.hpp"
#include "guest/runtime/descriptors.hpp"
#include "guest/runtime/process.hpp"
#include "guest/runtime/traps.hpp"

#include <cstdint>

using namespace umbra::guest;

namespace {

constexpr std::uint64_t used = pte_accessed | pte_dirty;

/// A frame whose first word is `value`.
std::uint64_t frame_with(std::uint64_t value) {
    const std::uint64_t frame = allocate_frame();
    physical(frame) = value;
    return frame;
}

/// Each test gets a top-level slot of its own, so that it starts with nothing mapped and nothing cached.
std::uint64_t fresh_slot() {
    static unsigned next = 1;
    return slot_base(next++);
}

void remap(const AddressSpace& space) {
    const std::uint64_t page = fresh_slot() + 5 * page_4k;
    const std::uint64_t first = frame_with(0x1111);
    const std::uint64_t second = frame_with(0x2222);

    space.map(page, first, pte_kernel_rw);
    CHECK_EQ(word(page), 0x1111);
    word(page + 8) = 0xaaaa;
    CHECK_EQ(physical(first + 8), 0xaaaa);

    space.map(page, second, pte_kernel_rw);
    invlpg(page);
    CHECK_EQ(word(page), 0x2222);
    word(page + 8) = 0xbbbb;
    CHECK_EQ(physical(second + 8), 0xbbbb);
    CHECK_EQ(physical(first + 8), 0xaaaa);
    print("paging: remap\n");
}

void unmap(const AddressSpace& space) {
    const std::uint64_t page = fresh_slot();
    CHECK(probe_read(page + 0x123).is_page_fault(0, page + 0x123)); // no table at any level
    space.map(page, frame_with(1), pte_kernel_rw);
    CHECK_EQ(word(page), 1); // not-present to present takes no flush
    word(page) = 2;

    space.entry(page) = 0;
    invlpg(page + 0x800); // any address in the page
    CHECK(probe_read(page + 0xff8).is_page_fault(0, page + 0xff8));
    CHECK(probe_write(page, 3).is_page_fault(pf_write, page));
    CHECK(probe_fetch(page).is_page_fault(pf_fetch, page));
    print("paging: unmap\n");
}

/// A page becomes present by a change at each of the four levels, without a flush.
void becomes_present(const AddressSpace& space) {
    for (unsigned level = 1; level <= 4; ++level) {
        const std::uint64_t page = fresh_slot() + 3 * page_1g + 7 * page_2m + 9 * page_4k;
        space.map(page, frame_with(level), pte_kernel_rw);
        space.entry(page, level) &= ~pte_present;
        CHECK(probe_read(page).is_page_fault(0, page));
        CHECK(probe_write(page, 0).is_page_fault(pf_write, page));
        space.entry(page, level) |= pte_present;
        CHECK_EQ(word(page), level);
    }
    print("paging: not present to present at each level\n");
}

void write_protection(const AddressSpace& space) {
    const std::uint64_t page = fresh_slot();
    const std::uint64_t frame = frame_with(1);
    space.map(page, frame, pte_present);
    CHECK_EQ(word(page), 1);
    CHECK(probe_write(page, 2).is_page_fault(pf_present | pf_write, page));
    CHECK_EQ(physical(frame), 1);
    CHECK_EQ(space.entry(page) & used, pte_accessed); // a write that faults dirties nothing

    write_cr0(read_cr0() & ~cr0_wp); // the kernel may now write to read-only pages
    CHECK(probe_write(page, 3).none());
    CHECK_EQ(physical(frame), 3);
    CHECK_EQ(space.entry(page) & (used | pte_writable), used);
    write_cr0(read_cr0() | cr0_wp);
    CHECK(probe_write(page, 4).is_page_fault(pf_present | pf_write, page));

    space.entry(page) |= pte_writable;
    invlpg(page);
    CHECK(probe_write(page, 5).none());
    space.entry(page) &= ~pte_writable;
    invlpg(page);
    CHECK(probe_write(page, 6).is_page_fault(pf_present | pf_write, page));
    CHECK_EQ(word(page), 5);
    print("paging: write protection\n");
}

void no_execute(const AddressSpace& space) {
    constexpr std::uint64_t ret = 0xc3;
    for (unsigned level = 1; level <= 4; ++level) {
        const std::uint64_t page = fresh_slot();
        space.map(page, frame_with(ret), pte_kernel_rw);
        CHECK(probe_fetch(page).none());
        space.entry(page, level) |= pte_no_execute;
        invlpg(page);
        CHECK(probe_fetch(page).is_page_fault(pf_present | pf_fetch, page));
        CHECK_EQ(word(page), ret);
        space.entry(page, level) &= ~pte_no_execute;
        invlpg(page);
        CHECK(probe_fetch(page).none());
    }
    print("paging: no execute\n");
}

void accessed_and_dirty(const AddressSpace& space) {
    const std::uint64_t page = fresh_slot() + page_1g + page_2m + page_4k;
    const std::uint64_t neighbour = page + page_4k;
    space.map(page, allocate_frame(), pte_kernel_rw);
    space.map(neighbour, allocate_frame(), pte_kernel_rw);
    for (unsigned level = 1; level <= 4; ++level)
        CHECK_EQ(space.entry(page, level) & pte_accessed, 0);

    for (unsigned round = 0; round < 2; ++round) {
        static_cast<void>(word(page).read());
        CHECK_EQ(space.entry(page) & used, pte_accessed);
        for (unsigned level = 2; level <= 4; ++level)
            CHECK_EQ(space.entry(page, level) & used, pte_accessed); // dirty belongs to the level that maps
        word(page) = round;
        CHECK_EQ(space.entry(page) & used, used);
        for (unsigned level = 2; level <= 4; ++level)
            CHECK_EQ(space.entry(page, level) & used, pte_accessed);
        CHECK_EQ(space.entry(neighbour) & used, 0);

        for (unsigned level = 1; level <= 4; ++level)
            space.entry(page, level) &= ~used;
        invlpg(page);
        for (unsigned level = 1; level <= 4; ++level)
            CHECK_EQ(space.entry(page, level) & used, 0);
    }

    word(page) = 7; // a first access that writes sets both at once
    CHECK_EQ(space.entry(page) & used, used);
    space.entry(page) &= ~pte_dirty; // accessed stays: as a kernel does that cleans a page
    invlpg(page);
    static_cast<void>(word(page).read());
    CHECK_EQ(space.entry(page) & used, pte_accessed);
    asm volatile("lock incq (%0)" : : "r"(page) : "memory");
    CHECK_EQ(space.entry(page) & used, used);
    CHECK_EQ(word(page), 8);

    constexpr std::uint64_t ret = 0xc3;
    word(neighbour) = ret;
    space.entry(neighbour) &= ~used;
    invlpg(neighbour);
    CHECK(probe_fetch(neighbour).none());
    CHECK_EQ(space.entry(neighbour) & used, pte_accessed);
    print("paging: accessed and dirty bits\n");
}

void large_pages(const AddressSpace& space) {
    const std::uint64_t page = fresh_slot() + 4 * page_2m;
    const std::uint64_t first = allocate_frames(512, page_2m);
    const std::uint64_t second = allocate_frames(512, page_2m);
    constexpr std::uint64_t middle = 0x12'3450;
    physical(first) = 0x10;
    physical(first + middle) = 0x11;
    physical(second + middle) = 0x22;

    space.map(page, first, pte_kernel_rw, 2);
    CHECK_EQ(word(page), 0x10);
    CHECK_EQ(word(page + middle), 0x11);
    CHECK_EQ(space.entry(page, 2) & used, pte_accessed);
    word(page + page_2m - 8) = 0x33;
    CHECK_EQ(physical(first + page_2m - 8), 0x33);
    CHECK_EQ(space.entry(page, 2) & used, used);
    CHECK(probe_read(page + page_2m).is_page_fault(0, page + page_2m));

    space.entry(page, 2) = second | pte_present | pte_large; // moved, and read-only
    invlpg(page + 77 * page_4k);                             // flushes the whole large page
    CHECK_EQ(word(page + middle), 0x22);
    CHECK(probe_write(page + middle, 0).is_page_fault(pf_present | pf_write, page + middle));

    // Split: 512 small pages in its place, the same frames in reverse order.
    const std::uint64_t table = allocate_frame();
    for (std::uint64_t i = 0; i < 512; ++i)
        physical(table, i) = (second + (511 - i) * page_4k) | pte_kernel_rw;
    space.entry(page, 2) = table | pte_kernel_rw;
    invlpg(page + middle);
    const std::uint64_t mirrored = page + (511 - middle / page_4k) * page_4k + middle % page_4k;
    CHECK_EQ(word(mirrored), 0x22);
    CHECK_EQ(physical(table, (511 - middle / page_4k)) & used, pte_accessed);
    CHECK_EQ(physical(table) & used, 0);
    physical(table + 8) = 0;
    CHECK(probe_read(page + page_4k).is_page_fault(0, page + page_4k));

    // And merged again.
    space.entry(page, 2) = first | pte_kernel_rw | pte_large;
    invlpg(mirrored);
    invlpg(page + page_4k);
    CHECK_EQ(word(page + middle), 0x11);
    CHECK_EQ(word(page + page_4k), 0);

    if (has_1g_pages()) {
        const std::uint64_t huge = fresh_slot() + 2 * page_1g;
        space.map(huge, 0, pte_kernel_rw, 3);
        CHECK_EQ(word(huge + first), 0x10);
        CHECK_EQ(space.entry(huge, 3) & used, pte_accessed);
        word(huge + first) = 0x55;
        CHECK_EQ(physical(first), 0x55);
        CHECK_EQ(space.entry(huge, 3) & used, used);
        space.entry(huge, 3) &= ~pte_writable;
        invlpg(huge);
        CHECK(probe_write(huge + second, 0).is_page_fault(pf_present | pf_write, huge + second));
    }
    print("paging: large pages\n");
}

void upper_levels(const AddressSpace& space) {
    for (unsigned level = 2; level <= 4; ++level) {
        const std::uint64_t page = fresh_slot();
        space.map(page, frame_with(0x11), pte_kernel_rw);
        word(page) = 0x12;
        space.entry(page, level) &= ~pte_writable; // rights of all levels count
        invlpg(page);
        CHECK(probe_write(page, 0).is_page_fault(pf_present | pf_write, page));
        CHECK_EQ(word(page), 0x12);

        // Another subtree in its place.
        const std::uint64_t other = fresh_slot();
        space.map(other, frame_with(0x22), pte_kernel_rw);
        CHECK_EQ(word(other), 0x22);
        space.entry(page, level) = space.entry(other, level);
        invlpg(page);
        CHECK_EQ(word(page), 0x22);
        word(page) = 0x23;
        CHECK_EQ(word(other), 0x23);

        // A change in the table that both now share is a change of both.
        space.entry(other) = 0;
        invlpg(page);
        invlpg(other);
        CHECK(probe_read(page).is_page_fault(0, page));
        CHECK(probe_read(other).is_page_fault(0, other));

        space.entry(page, level) = 0;
        space.load();
        CHECK(probe_write(page, 0).is_page_fault(pf_write, page));
    }
    print("paging: upper levels\n");
}

void flushes(const AddressSpace& space) {
    const std::uint64_t page = fresh_slot();
    const std::uint64_t first = frame_with(1);
    const std::uint64_t second = frame_with(2);
    const auto change = [&](std::uint64_t frame, std::uint64_t flags) {
        CHECK(word(page) == 1 || word(page) == 2); // in the TLB
        space.entry(page) = frame | pte_kernel_rw | flags;
    };
    space.map(page, first, pte_kernel_rw);

    change(second, 0);
    space.load();
    CHECK_EQ(word(page), 2);

    write_cr4(read_cr4() | cr4_pge);
    change(first, pte_global);
    invlpg(page); // flushes global pages too
    CHECK_EQ(word(page), 1);
    change(second, pte_global);
    space.load(); // need not
    const std::uint64_t seen = word(page);
    CHECK(seen == 1 || seen == 2);
    write_cr4(read_cr4() & ~cr4_pge); // a change of PGE does
    CHECK_EQ(word(page), 2);

    change(first, 0);
    invlpg(0x8000'0000'0000'0000); // not canonical: does nothing, and faults not (SDM vol. 2A, INVLPG)
    invlpg(page);
    CHECK_EQ(word(page), 1);
    print("paging: flushes\n");
}

void aliases(const AddressSpace& space) {
    const std::uint64_t writable = fresh_slot();
    const std::uint64_t read_only = fresh_slot();
    const std::uint64_t frame = frame_with(1);
    space.map(read_only, frame, pte_present);
    space.map(writable, frame, pte_kernel_rw);
    CHECK_EQ(word(read_only), 1);
    word(writable) = 2;
    CHECK_EQ(word(read_only), 2);
    CHECK_EQ(space.entry(read_only) & used, pte_accessed); // dirty belongs to the entry, not to the frame
    CHECK(probe_write(read_only, 3).is_page_fault(pf_present | pf_write, read_only));

    // Code changed through an alias, as kernels patch themselves.
    constexpr std::uint64_t load_5_and_return = 0xc3'0000'0005'b8;
    constexpr std::uint64_t load_6_and_return = 0xc3'0000'0006'b8;
    const auto call = [&] {
        std::uint64_t result = 0;
        asm volatile("call *%1" : "=a"(result) : "r"(read_only) : "memory", "cc");
        return result;
    };
    word(writable) = load_5_and_return;
    CHECK_EQ(call(), 5);
    word(writable) = load_6_and_return;
    static_cast<void>(cpuid(0)); // serialises
    CHECK_EQ(call(), 6);
    print("paging: aliases\n");
}

/// The tables mapped into themselves: entry 510 of the root is the root.
void self_map(const AddressSpace& space) {
    constexpr std::uint64_t slot = 510;
    const std::uint64_t self = slot_base(slot);
    const std::uint64_t page = fresh_slot() + 2 * page_4k;
    const std::uint64_t mask = 0xffff'ffff'f000;
    const auto entry_address = [&](std::uint64_t virt) { return self + ((virt & mask) >> 9); };
    const std::uint64_t root_address = self + (slot << 30) + (slot << 21) + (slot << 12);
    const std::uint64_t first = frame_with(1);
    const std::uint64_t second = frame_with(2);

    space.map(page, first, pte_kernel_rw);
    physical(space.root(), slot) = space.root() | pte_kernel_rw;
    CHECK_EQ(word(page), 1);
    CHECK_EQ(word(entry_address(page)) & ~used, first | pte_kernel_rw);
    CHECK_EQ(word(root_address + slot * 8) & pte_address, space.root());

    word(entry_address(page)) = second | pte_kernel_rw;
    invlpg(page);
    CHECK_EQ(word(page), 2);
    word(entry_address(page)) = 0;
    invlpg(page);
    CHECK(probe_read(page).is_page_fault(0, page));
    word(entry_address(page)) = first | pte_kernel_rw;
    CHECK_EQ(word(page), 1);
    // The tables' own entries are accessed, and, where an entry maps a table as a page, dirty.
    CHECK_EQ(space.entry(page) & used, pte_accessed);
    CHECK_EQ(space.entry(page, 2) & used, used);
    CHECK_EQ(space.entry(page, 3) & used, pte_accessed);

    // A whole new tree, made through the window only.
    const std::uint64_t other = fresh_slot();
    const std::uint64_t tables[] = {allocate_frame(), allocate_frame(), allocate_frame()};
    word(root_address + (other >> 39) * 8) = tables[0] | pte_kernel_rw;
    word(entry_address(entry_address(entry_address(other)))) = tables[1] | pte_kernel_rw;
    word(entry_address(entry_address(other))) = tables[2] | pte_kernel_rw;
    word(entry_address(other)) = second | pte_kernel_rw;
    CHECK_EQ(word(other), 2);

    physical(space.root(), slot) = 0;
    space.load();
    CHECK(probe_read(root_address).is_page_fault(0, root_address));
    print("paging: self map\n");
}

/// An access that touches two pages faults for the one that is missing, and then writes to neither.
void page_crossing(const AddressSpace& space) {
    const std::uint64_t page = fresh_slot();
    const std::uint64_t frame = allocate_frame();
    space.map(page, frame, pte_kernel_rw);
    const std::uint64_t straddling = page + page_4k - 4;
    CHECK(probe_write(straddling, ~std::uint64_t{0}).is_page_fault(pf_write, page + page_4k));
    CHECK_EQ(physical(frame + page_4k - 8), 0);
    CHECK(probe_read(straddling).is_page_fault(0, page + page_4k));

    const std::uint64_t next = allocate_frame();
    space.map(page + page_4k, next, pte_kernel_rw);
    CHECK(probe_write(straddling, 0x8877'6655'4433'2211).none());
    CHECK_EQ(physical(frame + page_4k - 8), 0x4433'2211'0000'0000);
    CHECK_EQ(physical(next), 0x8877'6655);
    print("paging: accesses across pages\n");
}

/// A frame that was a page table becomes data, and one that was data becomes a page table.
void frames_change_roles(const AddressSpace& space) {
    const std::uint64_t page = fresh_slot();
    const std::uint64_t data = frame_with(0x77);
    space.map(page, data, pte_kernel_rw);
    CHECK_EQ(word(page), 0x77);
    const std::uint64_t old_table = space.entry(page, 2) & pte_address;

    const std::uint64_t new_table = frame_with(data | pte_kernel_rw);
    space.entry(page, 2) = new_table | pte_kernel_rw;
    invlpg(page);
    CHECK_EQ(word(page), 0x77);
    for (std::uint64_t i = 0; i < 512; ++i) // the old one is data now: whatever is written to it maps nothing
        physical(old_table, i) = ~std::uint64_t{0};
    CHECK_EQ(word(page), 0x77);
    CHECK(probe_read(page + page_4k).is_page_fault(0, page + page_4k));
    physical(new_table + 8) = old_table | pte_kernel_rw;
    CHECK_EQ(word(page + page_4k), ~std::uint64_t{0});
    print("paging: frames change roles\n");
}

} // namespace

extern "C" int kernel_main(const BootParams& boot) {
    install_descriptors();
    init_memory(boot);
    const AddressSpace space = AddressSpace::create();
    space.load();

    remap(space);
    unmap(space);
    becomes_present(space);
    write_protection(space);
    no_execute(space);
    accessed_and_dirty(space);
    large_pages(space);
    upper_levels(space);
    flushes(space);
    aliases(space);
    self_map(space);
    page_crossing(space);
    frames_change_roles(space);
    print("paging: passed\n");
    return 0;
}
