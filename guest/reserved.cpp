// reserved: bits that must be 0 in a present entry. Proves that an entry of any level with an address beyond
// the CPU's physical address bits, a large page whose address is not aligned, and a top-level entry that
// claims to be a page, all fault with RSVD and P in the error code, whatever the access. Intel SDM vol. 3A
// ch. 4.5.4 and 4.7. Outcome: passed.
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

std::uint64_t reserved_fault = pf_present | pf_reserved;

void expect_reserved_fault(std::uint64_t page) {
    invlpg(page);
    CHECK(probe_read(page).is_page_fault(reserved_fault, page));
    CHECK(probe_write(page, 0).is_page_fault(reserved_fault | pf_write, page));
    CHECK(probe_fetch(page).is_page_fault(reserved_fault | pf_fetch, page));
}

void address_bits(const AddressSpace& space) {
    if (physical_address_bits() >= 52) {
        print("reserved: all address bits are in use on this CPU\n");
        return;
    }
    constexpr std::uint64_t beyond = std::uint64_t{1} << 51;
    for (unsigned level = 1; level <= 4; ++level) {
        const std::uint64_t page = slot_base(level);
        space.map(page, allocate_frame(), pte_kernel_rw);
        CHECK_EQ(word(page), 0);
        space.entry(page, level) |= beyond;
        expect_reserved_fault(page);

        space.entry(page, level) &= ~pte_present; // in an entry that is not present nothing is reserved
        invlpg(page);
        CHECK(probe_read(page).is_page_fault(0, page));
        space.entry(page, level) &= ~beyond;
        space.entry(page, level) |= pte_present;
        CHECK_EQ(word(page), 0);
    }
    print("reserved: address bits at each level\n");
}

void page_sizes(const AddressSpace& space) {
    constexpr std::uint64_t below_2m = std::uint64_t{1} << 13; // above the PAT bit of a large page
    const std::uint64_t page = slot_base(5);
    space.map(page, allocate_frames(512, page_2m), pte_kernel_rw, 2);
    CHECK_EQ(word(page), 0);
    space.entry(page, 2) |= below_2m;
    expect_reserved_fault(page);
    space.entry(page, 2) &= ~below_2m;

    space.entry(page, 4) |= pte_large; // there are no pages of 512 GB
    expect_reserved_fault(page);
    space.entry(page, 4) &= ~pte_large;
    invlpg(page);
    CHECK_EQ(word(page), 0);

    if (has_1g_pages()) {
        const std::uint64_t huge = slot_base(6);
        space.map(huge, 0, pte_kernel_rw, 3);
        CHECK_EQ(word(huge + 0x10'0000), physical(0x10'0000));
        space.entry(huge, 3) |= page_2m; // an address that is aligned to 2 MB only
        expect_reserved_fault(huge);
    }
    print("reserved: page sizes\n");
}

} // namespace

extern "C" int kernel_main(const BootParams& boot) {
    install_descriptors();
    init_memory(boot);
    if (boot.has_option("qemu"))
        reserved_fault = pf_reserved; // QEMU says "not present" here
    const AddressSpace space = AddressSpace::create();
    space.load();

    address_bits(space);
    page_sizes(space);
    print("reserved: passed\n");
    return 0;
}
