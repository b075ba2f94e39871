// pcid: address spaces tagged by process-context identifiers. Proves that each space sees its own mappings
// whether its translations are kept over a switch or not; that what INVPCID (all four types), INVLPG, a load
// of CR3, and changes of CR4.PGE and CR4.PCIDE flush is gone, for other PCIDs than the current one too; that
// global pages are global to all PCIDs; and what faults. What the manuals leave open (whether a translation
// that nothing flushed is still the old one) is accepted either way, but never a third. Intel SDM vol. 3A ch.
// 4.10.1 and 4.10.4.1, vol. 2A INVPCID. Outcome: passed, also where the CPU offers no PCIDs.
#include "guest/runtime/boot.hpp"
#include "guest/runtime/console.hpp"
#include "guest/runtime/cpu.hpp"
#include "guest/runtime/descriptors.hpp"
#include "guest/runtime/paging.hpp"
#include "guest/runtime/process.hpp"
#include "guest/runtime/traps.hpp"
#include "guest/runtime/user.hpp"

#include <cstdint>
#include <initializer_list>

using namespace umbra::guest;

namespace {

constexpr unsigned space_count = 5;
constexpr std::uint64_t page = slot_base(3) + 17 * page_2m + 5 * page_4k;  // each space has its own
constexpr std::uint64_t shared = slot_base(4) + 3 * page_1g + 7 * page_4k; // one, in tables that all share
constexpr std::uint64_t programs = slot_base(5);
constexpr std::uint64_t stack_top = slot_base(5) + page_2m;

/// A frame whose first word is `value`.
std::uint64_t frame_with(std::uint64_t value) {
    const std::uint64_t frame = allocate_frame();
    physical(frame) = value;
    return frame;
}

/// A value that no page has held yet.
std::uint64_t fresh_value() {
    static std::uint64_t last = 0x1000;
    return ++last;
}

/// What becomes of the translations of the PCID that is switched to.
enum class Load : std::uint8_t { flush, keep };

/// Address spaces with the PCIDs 1, 2, 3, ... and the largest there is.
class Spaces {
  public:
    Spaces() {
        spaces_[0].map(shared, frame_with(fresh_value()), pte_kernel_rw | pte_global);
        for (unsigned i = 0; i < space_count; ++i) {
            if (i > 0)
                spaces_[i].entry(shared, 4) = spaces_[0].entry(shared, 4);
            spaces_[i].map(page, frame_with(fresh_value()), pte_kernel_rw);
        }
    }

    [[nodiscard]] const AddressSpace& operator[](unsigned index) const { return spaces_[index]; }
    [[nodiscard]] static std::uint64_t pcid(unsigned index) {
        return index + 1 == space_count ? cr3_pcid : index + 1;
    }
    void enter(unsigned index, Load load) const {
        write_cr3(spaces_[index].root() | pcid(index) | (load == Load::keep ? cr3_no_flush : 0));
    }
    /// The word that `page` begins with, by the space's tables.
    [[nodiscard]] std::uint64_t current(unsigned index) const {
        return physical(spaces_[index].entry(page) & pte_address);
    }
    /// Gives a page of a space another frame, with a value that it returns. Flushes nothing.
    std::uint64_t remap(unsigned index, std::uint64_t virt, std::uint64_t flags) const {
        const std::uint64_t value = fresh_value();
        spaces_[index].entry(virt) = frame_with(value) | flags;
        return value;
    }

  private:
    AddressSpace spaces_[space_count] = {AddressSpace::create(), AddressSpace::create(),
                                         AddressSpace::create(), AddressSpace::create(),
                                         AddressSpace::create()};
};

Trap probe_cr3(std::uint64_t value) {
    return PROBE("mov %0, %%cr3", : : "r"(value) : "memory");
}
Trap probe_cr4(std::uint64_t value) {
    return PROBE("mov %0, %%cr4", : : "r"(value) : "memory");
}

/// Turns PCIDs on, on the way seeing what may not be done before and after.
void turn_on(const AddressSpace& space) {
    constexpr std::uint64_t write_through = 1 << 3, reserved = std::uint64_t{1} << 60;
    space.load();
    CHECK(probe_cr3(space.root() | cr3_no_flush).is_fault(vector_gp));
    write_cr3(space.root() | write_through);
    CHECK(probe_cr4(read_cr4() | cr4_pcide).is_fault(vector_gp)); // CR3 would name a PCID
    CHECK_EQ(read_cr4() & cr4_pcide, 0);
    space.load();
    CHECK(probe_cr4(read_cr4() | cr4_pcide).none());
    CHECK_EQ(read_cr4() & cr4_pcide, cr4_pcide);

    write_cr3(space.root() | 0xabc | cr3_no_flush);
    CHECK_EQ(read_cr3(), space.root() | 0xabc);
    CHECK(probe_cr3(space.root() | reserved).is_fault(vector_gp));
    CHECK(probe_cr3(space.root() | reserved | cr3_no_flush).is_fault(vector_gp));
    constexpr std::uint64_t cr0_pg = std::uint64_t{1} << 31;
    CHECK(PROBE("mov %0, %%cr0", : : "r"(read_cr0() & ~cr0_pg) : "memory").is_fault(vector_gp));
    write_cr3(space.root());
    print("pcid: control registers\n");
}

void switching(const Spaces& spaces) {
    constexpr unsigned rounds = 20;
    for (unsigned round = 0; round < rounds; ++round) {
        for (unsigned i = 0; i < space_count; ++i) {
            spaces.enter(i, (round + i) % 3 == 0 ? Load::flush : Load::keep);
            CHECK_EQ(read_cr3(), spaces[i].root() | Spaces::pcid(i));
            CHECK_EQ(word(page), spaces.current(i));
            word(page + 8) = word(page + 8) + i + 1;
        }
    }
    for (unsigned i = 0; i < space_count; ++i) {
        spaces.enter(i, Load::keep);
        CHECK_EQ(word(page + 8), rounds * (i + 1));
    }
    print("pcid: %u switches\n", rounds * space_count);
}

/// `space` loses what it had of `page` by `flush`, which is called while another space is active.
template<class Flush>
void check_flush(const Spaces& spaces, unsigned space, Load load, Flush flush) {
    const unsigned other = (space + 2) % space_count;
    const auto use_change_flush_return = [&](auto change) {
        spaces.enter(space, Load::keep);
        word(page) = word(page); // used, and dirty
        spaces.enter(other, Load::keep);
        change();
        flush();
        CHECK_EQ(word(page), spaces.current(other));
        spaces.enter(space, load);
    };
    Word& entry = spaces[space].entry(page);
    std::uint64_t value = 0;
    use_change_flush_return([&] { value = spaces.remap(space, page, pte_kernel_rw); });
    CHECK_EQ(word(page), value);
    CHECK_EQ(entry & (pte_accessed | pte_dirty), pte_accessed);
    word(page) = value;
    CHECK_EQ(entry & pte_dirty, pte_dirty);

    use_change_flush_return([&] { entry &= ~pte_writable; });
    CHECK(probe_write(page, 0).is_page_fault(pf_present | pf_write, page));
    CHECK_EQ(word(page), value);
    entry |= pte_writable;
    invlpg(page);

    const std::uint64_t was = entry;
    use_change_flush_return([&] { entry = 0; });
    CHECK(probe_read(page).is_page_fault(0, page));
    entry = was; // not present to present: no flush

    // A change of an upper level: the caches of these go too.
    Word& table = spaces[space].entry(page, 2);
    use_change_flush_return([&] { table &= ~pte_writable; });
    CHECK(probe_write(page, 0).is_page_fault(pf_present | pf_write, page));
    table |= pte_writable;
    invlpg(page);
    CHECK(probe_write(page, value).none());
}

void flushes(const Spaces& spaces, bool invpcids) {
    for (unsigned i = 0; i < space_count; ++i) {
        check_flush(spaces, i, Load::flush, [] {});
        check_flush(spaces, i, Load::keep, [] {
            write_cr4(read_cr4() ^ cr4_pge);
            write_cr4(read_cr4() ^ cr4_pge);
        });
        if (!invpcids)
            continue;
        const std::uint64_t pcid = Spaces::pcid(i);
        check_flush(spaces, i, Load::keep, [&] { invpcid(InvpcidType::address, pcid, page + 0x123); });
        check_flush(spaces, i, Load::keep, [&] { invpcid(InvpcidType::context, pcid); });
        check_flush(spaces, i, Load::keep, [&] { invpcid(InvpcidType::all_and_global); });
        check_flush(spaces, i, Load::keep, [&] { invpcid(InvpcidType::all); });
    }
    print("pcid: flushes from other spaces%s\n", invpcids ? "" : ", without INVPCID");
}

/// Flushes of another PCID, or of none: the old translation or the new one, until the right flush.
void kept_translations(const Spaces& spaces, bool invpcids) {
    unsigned kept = 0;
    for (unsigned i = 0; i < space_count; ++i) {
        const unsigned other = (i + 1) % space_count;
        spaces.enter(i, Load::keep);
        const std::uint64_t old = word(page);
        spaces.enter(other, Load::flush);
        const std::uint64_t value = spaces.remap(i, page, pte_kernel_rw);
        invlpg(page); // in the other one's PCID
        if (invpcids) {
            invpcid(InvpcidType::context, Spaces::pcid(other));
            invpcid(InvpcidType::address, Spaces::pcid(other), page);
            invpcid(InvpcidType::address, Spaces::pcid(i), page + page_2m);
        }
        spaces.enter(i, Load::keep);
        const std::uint64_t seen = word(page);
        CHECK(seen == old || seen == value);
        kept += seen == old ? 1 : 0;
        invlpg(page);
        CHECK_EQ(word(page), value);
    }
    print("pcid: translations that nothing flushes (%s)\n", kept != 0 ? "kept" : "not kept");
}

/// A table that two spaces share changes, with no flush, while one of them is active. The other one, of whose
/// PCID everything was dropped before, can have seen nothing of what was there.
void nothing_is_foreseen(const Spaces& spaces) {
    constexpr std::uint64_t private_in_shared = shared + page_4k; // not global
    spaces[0].map(private_in_shared, frame_with(fresh_value()), pte_kernel_rw);
    for (unsigned i = 0; i < space_count; ++i) {
        const unsigned other = (i + 1) % space_count;
        spaces.enter(other, Load::flush);
        CHECK_EQ(word(private_in_shared), physical(spaces[other].entry(private_in_shared) & pte_address));
        spaces.enter(i, Load::flush);
        invpcid(InvpcidType::context, Spaces::pcid(other));
        const std::uint64_t old = word(private_in_shared);
        const std::uint64_t value = spaces.remap(i, private_in_shared, pte_kernel_rw);
        const std::uint64_t seen = word(private_in_shared);
        CHECK(seen == old || seen == value);
        spaces.enter(other, Load::keep);
        CHECK_EQ(word(private_in_shared), value);
        spaces[other].entry(private_in_shared) &= ~pte_writable;
        spaces.enter(i, Load::flush);
        CHECK(probe_write(private_in_shared, 0).is_page_fault(pf_present | pf_write, private_in_shared));
        spaces[i].entry(private_in_shared) |= pte_writable;
        invlpg(private_in_shared);
    }
    print("pcid: nothing is foreseen\n");
}

void shared_pcids_and_roots(const Spaces& spaces) {
    // One PCID for two roots: right if the switch flushes.
    for (unsigned round = 0; round < 4; ++round) {
        const unsigned i = round % 2;
        write_cr3(spaces[i].root() | 0x123);
        CHECK_EQ(word(page), spaces.current(i));
    }
    // One root under two PCIDs: INVLPG counts for the current one.
    const std::uint64_t root = spaces[0].root();
    write_cr3(root | 0x200);
    const std::uint64_t old = word(page);
    write_cr3(root | 0x201);
    CHECK_EQ(word(page), old);
    const std::uint64_t value = spaces.remap(0, page, pte_kernel_rw);
    invlpg(page);
    CHECK_EQ(word(page), value);
    write_cr3(root | 0x200 | cr3_no_flush);
    const std::uint64_t seen = word(page);
    CHECK(seen == old || seen == value);
    write_cr3(root | 0x201 | cr3_no_flush);
    CHECK_EQ(word(page), value);
    write_cr3(root | 0x200);
    CHECK_EQ(word(page), value);
    print("pcid: shared PCIDs and roots\n");
}

/// The shared page is `value` in every space, whose translations are kept.
void expect_everywhere(const Spaces& spaces, std::uint64_t value) {
    for (unsigned i = 0; i < space_count; ++i) {
        spaces.enter(i, Load::keep);
        CHECK_EQ(word(shared), value);
    }
}

void global_pages(const Spaces& spaces, bool invpcids) {
    constexpr std::uint64_t global = pte_kernel_rw | pte_global;
    const auto toggle_pge = [] {
        write_cr4(read_cr4() & ~cr4_pge);
        write_cr4(read_cr4() | cr4_pge);
    };
    write_cr4(read_cr4() | cr4_pge);
    std::uint64_t value = spaces.remap(0, shared, global);
    toggle_pge();
    expect_everywhere(spaces, value);

    for (unsigned i = 0; i < space_count; ++i) {
        spaces.enter(i, Load::keep);
        std::uint64_t old = value;
        value = spaces.remap(i, shared, global);
        spaces.enter(i, Load::flush); // need not
        if (invpcids) {               // nor need these
            invpcid(InvpcidType::address, Spaces::pcid(i), shared);
            invpcid(InvpcidType::context, Spaces::pcid(i));
            invpcid(InvpcidType::all);
        }
        const std::uint64_t seen = word(shared);
        CHECK(seen == old || seen == value);
        invlpg(shared); // does, in every PCID
        expect_everywhere(spaces, value);

        value = spaces.remap(i, shared, global);
        toggle_pge();
        expect_everywhere(spaces, value);
        if (invpcids) {
            value = spaces.remap(i, shared, global);
            invpcid(InvpcidType::all_and_global);
            expect_everywhere(spaces, value);
        }
    }
    print("pcid: global pages\n");
}

USER_PROGRAM(program_invpcid, "invpcid (%rdi), %rax\n syscall");

void invpcid_faults(const AddressSpace& space) {
    struct Descriptor {
        std::uint64_t pcid, address;
    };
    const auto probe = [](std::uint64_t type, const Descriptor& descriptor) {
        return PROBE("invpcid %0, %1", : : "m"(descriptor), "r"(type) : "memory");
    };
    constexpr std::uint64_t not_canonical = 0x8000'0000'0000, no_pcid = 0x1000,
                            high_bit = std::uint64_t{1} << 63;
    for (const bool pcids : {false, true}) {
        space.load();
        write_cr4(pcids ? read_cr4() | cr4_pcide : read_cr4() & ~cr4_pcide);
        for (std::uint64_t type = 0; type < 4; ++type) {
            const bool names_pcid = type < 2;
            CHECK(probe(type, {.pcid = 0, .address = page}).none());
            if (pcids || !names_pcid)
                CHECK(probe(type, {.pcid = 7, .address = page}).none());
            else
                CHECK(probe(type, {.pcid = 7, .address = page}).is_fault(vector_gp));
            if (type == 0)
                CHECK(probe(type, {.pcid = 0, .address = not_canonical}).is_fault(vector_gp));
            else
                CHECK(probe(type, {.pcid = 0, .address = not_canonical}).none());
            CHECK(probe(type, {.pcid = no_pcid, .address = page}).is_fault(vector_gp));
            CHECK(probe(type, {.pcid = high_bit, .address = page}).is_fault(vector_gp));
        }
        CHECK(probe(4, {.pcid = 0, .address = page}).is_fault(vector_gp));
        CHECK(probe(high_bit, {.pcid = 0, .address = page}).is_fault(vector_gp));
    }
    const std::uint64_t missing = page + page_2m;
    const Trap trap = PROBE("invpcid (%0), %1", : : "r"(missing), "r"(std::uint64_t{2}) : "memory");
    CHECK(trap.is_page_fault(0, missing));

    map_programs(space, programs);
    space.map(stack_top - page_4k, allocate_frame(), pte_user_rw);
    TrapFrame frame = user_frame(program_address(program_invpcid), stack_top);
    frame.rdi = stack_top - 16;
    frame.rax = 2;
    run_user(frame);
    CHECK(frame.vector == vector_gp && frame.error == 0 && frame.rip == program_address(program_invpcid));
    print("pcid: INVPCID's faults\n");
}

/// PCIDs are turned off under a PCID, which drops everything.
void turn_off(const Spaces& spaces) {
    for (unsigned i = 0; i < space_count; ++i) {
        spaces[i].load();
        write_cr4(read_cr4() | cr4_pcide);
        spaces.enter(i, Load::flush);
        CHECK_EQ(word(page), spaces.current(i));
        (void)word(shared).read();
        const std::uint64_t value = spaces.remap(i, page, pte_kernel_rw);
        const std::uint64_t global = spaces.remap(i, shared, pte_kernel_rw | pte_global);
        write_cr4(read_cr4() & ~cr4_pcide);
        CHECK_EQ(word(page), value);
        CHECK_EQ(word(shared), global);
        CHECK(probe_cr3(spaces[i].root() | cr3_no_flush).is_fault(vector_gp));
    }
    print("pcid: turned off\n");
}

} // namespace

extern "C" int kernel_main(const BootParams& boot) {
    install_descriptors();
    init_memory(boot);
    enable_user_mode();
    if (!has_pcid()) {
        CHECK(probe_cr4(read_cr4() | cr4_pcide).is_fault(vector_gp));
        print("pcid: this CPU offers no PCIDs, and refuses them\n");
        print("pcid: passed\n");
        return 0;
    }
    const Spaces spaces;
    const bool invpcids = has_invpcid();
    turn_on(spaces[0]);
    switching(spaces);
    flushes(spaces, invpcids);
    kept_translations(spaces, invpcids);
    if (invpcids)
        nothing_is_foreseen(spaces);
    shared_pcids_and_roots(spaces);
    global_pages(spaces, invpcids);
    if (invpcids)
        invpcid_faults(spaces[0]);
    turn_off(spaces);
    print("pcid: passed\n");
    return 0;
}
