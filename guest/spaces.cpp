// spaces: address spaces that share the kernel's tables. Proves that a switch by CR3 changes exactly the
// private mappings, that a change of a shared kernel mapping is one in every space, that tables edited while
// no CPU uses them count from the next switch on, and that a table's frame can serve another space
// afterwards. Intel SDM vol. 3A ch. 4.10.4. Outcome: passed.
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

constexpr unsigned space_count = 8;
constexpr unsigned private_pages = 4;
constexpr unsigned kernel_slot = 400;
constexpr std::uint64_t private_base = slot_base(3) + 17 * page_2m;
constexpr std::uint64_t kernel_base = slot_base(kernel_slot) + 5 * page_1g;

constexpr std::uint64_t private_page(unsigned page) {
    return private_base + page * page_4k;
}
constexpr std::uint64_t kernel_page(unsigned page) {
    return kernel_base + page * page_4k;
}
/// What the first word of a private page holds.
constexpr std::uint64_t mark(unsigned space, unsigned page) {
    return 0x1000 + space * 0x100 + page;
}

class Spaces {
  public:
    Spaces() {
        for (unsigned i = 0; i < space_count; ++i) {
            if (i == 0)
                spaces_[0].map(kernel_page(0), allocate_frame(), pte_kernel_rw);
            else
                spaces_[i].entry(kernel_base, 4) = spaces_[0].entry(kernel_base, 4);
            for (unsigned page = 0; page < private_pages; ++page) {
                const std::uint64_t frame = allocate_frame();
                physical(frame) = mark(i, page);
                spaces_[i].map(private_page(page), frame, pte_kernel_rw);
            }
        }
    }

    [[nodiscard]] const AddressSpace& operator[](unsigned index) const { return spaces_[index]; }
    /// Switches to each space in turn and calls `visit(index)` there.
    template<class Visit>
    void each(Visit visit) const {
        for (unsigned i = 0; i < space_count; ++i) {
            spaces_[i].load();
            visit(i);
        }
    }

  private:
    AddressSpace spaces_[space_count] = {
        AddressSpace::create(), AddressSpace::create(), AddressSpace::create(), AddressSpace::create(),
        AddressSpace::create(), AddressSpace::create(), AddressSpace::create(), AddressSpace::create()};
};

void switching(const Spaces& spaces) {
    constexpr unsigned rounds = 40;
    for (unsigned round = 0; round < rounds; ++round)
        spaces.each([&](unsigned space) {
            const unsigned page = round % private_pages;
            CHECK_EQ(word(private_page(page)), mark(space, page));
            Word& visits = word(private_page(page) + 8);
            visits = visits + space + 1;
        });
    spaces.each([&](unsigned space) {
        CHECK_EQ(read_cr3(), spaces[space].root());
        for (unsigned page = 0; page < private_pages; ++page)
            CHECK_EQ(word(private_page(page) + 8), rounds / private_pages * (space + 1));
        CHECK(probe_read(private_page(private_pages)).is_page_fault(0, private_page(private_pages)));
    });
    print("spaces: %u switches\n", space_count * rounds);
}

/// Every change is made in one space only, in tables that all of them share.
void kernel_changes(const Spaces& spaces) {
    const std::uint64_t first = spaces[0].entry(kernel_page(0)) & pte_address;
    const std::uint64_t second = allocate_frame();
    physical(first) = 0x11;
    physical(second) = 0x22;
    spaces.each([](unsigned) { CHECK_EQ(word(kernel_page(0)), 0x11); });

    spaces[2].load();
    spaces[2].entry(kernel_page(0)) = second | pte_kernel_rw;
    invlpg(kernel_page(0));
    spaces.each([](unsigned space) {
        CHECK_EQ(word(kernel_page(0)), 0x22 + space);
        word(kernel_page(0)) = 0x23 + space;
    });

    spaces[5].load();
    spaces[5].entry(kernel_page(0)) = second | pte_present;
    invlpg(kernel_page(0));
    spaces.each([](unsigned) {
        CHECK(probe_write(kernel_page(0), 0).is_page_fault(pf_present | pf_write, kernel_page(0)));
    });

    spaces[7].load();
    spaces[7].entry(kernel_page(0)) = 0;
    invlpg(kernel_page(0));
    spaces.each([](unsigned) { CHECK(probe_read(kernel_page(0)).is_page_fault(0, kernel_page(0))); });

    spaces[1].map(kernel_page(1), first, pte_kernel_rw); // present now: no flush
    spaces.each([](unsigned) { CHECK_EQ(word(kernel_page(1)), 0x11); });

    // A new large page, in a table that did not exist before.
    const std::uint64_t large = kernel_base + page_1g;
    spaces[3].map(large, 0, pte_kernel_rw, 2);
    spaces.each([&](unsigned) { CHECK_EQ(word(large + 0x10'0000), physical(0x10'0000)); });
    print("spaces: kernel mappings\n");
}

void inactive_changes(const Spaces& spaces) {
    constexpr std::uint64_t page = private_page(0);
    for (unsigned active = 0; active < space_count; ++active) {
        const unsigned other = (active + 3) % space_count;
        spaces[other].load();
        const std::uint64_t frame = allocate_frame();
        physical(frame) = 0x5000 + other;
        word(page) = 1; // used, and dirty, before it is edited from afar

        spaces[active].load();
        const std::uint64_t mine = word(page);
        spaces[other].entry(page) = frame | pte_kernel_rw;
        CHECK_EQ(word(page), mine);
        CHECK_EQ(spaces[other].entry(page) & (pte_accessed | pte_dirty), 0);

        spaces[other].load();
        CHECK_EQ(word(page), 0x5000 + other);
        CHECK_EQ(spaces[other].entry(page) & (pte_accessed | pte_dirty), pte_accessed);

        spaces[active].load();
        spaces[other].entry(page, 2) &= ~pte_writable;
        spaces[other].load();
        CHECK(probe_write(page, 0).is_page_fault(pf_present | pf_write, page));

        spaces[active].load();
        spaces[other].entry(page, 2) |= pte_writable;
        spaces[other].entry(private_page(1)) = 0;
        spaces[other].load();
        CHECK(probe_write(page, 0x6000 + other).none());
        CHECK(probe_read(private_page(1)).is_page_fault(0, private_page(1)));
    }
    print("spaces: changes of inactive spaces\n");
}

void frames_move_between_spaces(const Spaces& spaces) {
    constexpr std::uint64_t page = private_page(2);
    spaces[0].load();
    CHECK_EQ(word(page), mark(0, 2));
    spaces[1].load();
    CHECK_EQ(word(page), mark(1, 2));

    // Space 1 adopts a subtree of space 0, at each level.
    for (unsigned level = 2; level <= 4; ++level) {
        const std::uint64_t own = spaces[1].entry(page, level);
        spaces[1].entry(page, level) = spaces[0].entry(page, level);
        spaces[1].load();
        CHECK_EQ(word(page), mark(0, 2));
        spaces[1].entry(page, level) = own;
        spaces[1].load();
        CHECK_EQ(word(page), mark(1, 2));
    }

    // A root is cleared and becomes another space's last-level table, and a last-level table becomes a root.
    const std::uint64_t old_root = spaces[7].root();
    const std::uint64_t old_table = spaces[7].entry(page, 2) & pte_address;
    spaces[7].load();
    CHECK_EQ(word(page), mark(7, 2));
    spaces[6].load();
    for (unsigned i = 0; i < 512; ++i) {
        physical(old_table, i) = physical(spaces[0].root(), i);
        physical(old_root, i) = 0;
    }
    const std::uint64_t frame = allocate_frame();
    physical(frame) = 0x77;
    physical(old_root, page / page_4k % 512) = frame | pte_kernel_rw;
    spaces[6].entry(page, 2) = old_root | pte_kernel_rw;
    spaces[6].load();
    CHECK_EQ(word(page), 0x77);
    CHECK(probe_read(private_page(0)).is_page_fault(0, private_page(0)));
    write_cr3(old_table);
    CHECK_EQ(word(page), mark(0, 2));
    CHECK_EQ(word(kernel_page(1)), 0x11);
    spaces[0].load();
    print("spaces: frames move between spaces\n");
}

} // namespace

extern "C" int kernel_main(const BootParams& boot) {
    install_descriptors();
    init_memory(boot);
    const Spaces spaces;

    switching(spaces);
    kernel_changes(spaces);
    inactive_changes(spaces);
    frames_move_between_spaces(spaces);
    print("spaces: passed\n");
    return 0;
}
