// tlb: what kernels do wrong with the TLB, each mistake by itself: `bug=NAME` makes it, `fixed=NAME` does the
// same with each invalidation that is right for it, and without a word every one is done right. Whether a CPU
// still has the old translation when the mistake is made is chance, and the manuals allow both: the run
// passes, and tells which it saw. It is for the TLB sanitizer to find the mistakes, and to find none in what
// is right. Intel SDM vol. 3A ch. 4.10. Outcome: passed.
#include "guest/runtime/boot.hpp"
#include "guest/runtime/console.hpp"
#include "guest/runtime/cpu.hpp"
#include "guest/runtime/descriptors.hpp"
#include "guest/runtime/paging.hpp"
#include "guest/runtime/process.hpp"
#include "guest/runtime/traps.hpp"

#include <cstdint>
#include <initializer_list>

using namespace umbra::guest;

namespace {

enum class Flush : std::uint8_t { forgotten, invlpg, cr3, cr4 };
constexpr const char* flush_names[] = {"nothing", "invlpg", "CR3", "CR4.PGE"};

/// A frame whose first word is `value`.
std::uint64_t frame_with(std::uint64_t value) {
    const std::uint64_t frame = allocate_frame();
    physical(frame) = value;
    return frame;
}

/// Each experiment gets a top-level slot of its own, so that it starts with nothing mapped and nothing
/// cached.
std::uint64_t fresh_page() {
    static unsigned next = 1;
    return slot_base(next++) + 5 * page_4k;
}

/// After `page` was changed.
void flush(const AddressSpace& space, Flush by, std::uint64_t page) {
    switch (by) {
    case Flush::forgotten:
        return;
    case Flush::invlpg:
        invlpg(page);
        return;
    case Flush::cr3:
        space.load();
        return;
    case Flush::cr4:
        write_cr4(read_cr4() ^ cr4_pge);
        write_cr4(read_cr4() ^ cr4_pge);
        return;
    }
}

/// Of two values, of which one is behind the old translation, and one behind the new.
bool is_old(std::uint64_t seen, std::uint64_t old_value, std::uint64_t new_value) {
    CHECK(seen == old_value || seen == new_value);
    return seen == old_value;
}

// Each experiment uses a page, changes its translation, and uses it again. True if the old one was used then.

bool unmap(const AddressSpace& space, Flush by) {
    const std::uint64_t page = fresh_page();
    space.map(page, frame_with(1), pte_kernel_rw);
    CHECK_EQ(word(page), 1);
    space.entry(page) = 0;
    flush(space, by, page);
    const Trap trap = probe_read(page);
    CHECK(trap.none() || trap.is_page_fault(0, page));
    return trap.none();
}

bool protect(const AddressSpace& space, Flush by) {
    const std::uint64_t page = fresh_page();
    const std::uint64_t frame = allocate_frame();
    space.map(page, frame, pte_kernel_rw);
    word(page) = 1;
    space.entry(page) &= ~pte_writable;
    flush(space, by, page);
    CHECK_EQ(word(page), 1); // it may still be read, in any case
    const Trap trap = probe_write(page, 2);
    CHECK(trap.none() || trap.is_page_fault(pf_present | pf_write, page));
    CHECK_EQ(physical(frame), trap.none() ? 2 : 1);
    return trap.none();
}

bool remap(const AddressSpace& space, Flush by) {
    const std::uint64_t page = fresh_page();
    space.map(page, frame_with(1), pte_kernel_rw);
    CHECK_EQ(word(page), 1);
    space.map(page, frame_with(2), pte_kernel_rw);
    flush(space, by, page);
    return is_old(word(page), 1, 2);
}

/// The mistake is to trust in CR3.
bool global(const AddressSpace& space, Flush by) {
    const std::uint64_t page = fresh_page();
    write_cr4(read_cr4() | cr4_pge);
    space.map(page, frame_with(1), pte_kernel_rw | pte_global);
    CHECK_EQ(word(page), 1);
    space.map(page, frame_with(2), pte_kernel_rw | pte_global);
    flush(space, by == Flush::forgotten ? Flush::cr3 : by, page);
    const bool old = is_old(word(page), 1, 2);
    write_cr4(read_cr4() & ~cr4_pge);
    return old;
}

/// One entry of level 2 translates both pages; the mistake is to invalidate one of them only.
bool upper(const AddressSpace& space, Flush by) {
    const std::uint64_t page = fresh_page();
    const std::uint64_t other = page + page_4k;
    space.map(page, frame_with(1), pte_kernel_rw);
    space.map(other, frame_with(2), pte_kernel_rw);
    CHECK_EQ(word(page), 1);
    CHECK_EQ(word(other), 2);
    const std::uint64_t table = allocate_frame();
    physical(table, page / page_4k % 512) = frame_with(3) | pte_kernel_rw;
    physical(table, other / page_4k % 512) = frame_with(4) | pte_kernel_rw;
    space.entry(page, 2) = table | pte_kernel_rw;
    flush(space, by == Flush::forgotten ? Flush::invlpg : by, page);
    flush(space, by, other);
    CHECK_EQ(word(page), 3);
    return is_old(word(other), 2, 4);
}

/// As `upper`, but the page was never used: it is the entry of level 2 that is cached.
bool table(const AddressSpace& space, Flush by) {
    const std::uint64_t page = fresh_page();
    const std::uint64_t unused = page + page_4k;
    space.map(page, frame_with(1), pte_kernel_rw);
    space.map(unused, frame_with(2), pte_kernel_rw);
    CHECK_EQ(word(page), 1);
    const std::uint64_t table = allocate_frame();
    physical(table, unused / page_4k % 512) = frame_with(4) | pte_kernel_rw;
    space.entry(page, 2) = table | pte_kernel_rw;
    flush(space, by, page); // INVLPG of any address drops all cached entries of upper levels
    return is_old(word(unused), 2, 4);
}

/// The mistake shows as a page that was written to and is not dirty.
bool dirty(const AddressSpace& space, Flush by) {
    const std::uint64_t page = fresh_page();
    space.map(page, allocate_frame(), pte_kernel_rw);
    word(page) = 1;
    CHECK_EQ(space.entry(page) & pte_dirty, pte_dirty);
    space.entry(page) &= ~pte_dirty;
    flush(space, by, page);
    word(page) = 2;
    CHECK_EQ(word(page), 2);
    return (space.entry(page) & pte_dirty) == 0;
}

struct Experiment {
    const char* bug = nullptr;
    const char* fixed = nullptr;
    bool (*saw_old)(const AddressSpace& space, Flush by) = nullptr;
    bool cr3_is_right = true;

    [[nodiscard]] const char* name() const { return bug + sizeof("bug=") - 1; }
};

constexpr Experiment experiments[] = {
    {"bug=unmap", "fixed=unmap", unmap}, {"bug=protect", "fixed=protect", protect},
    {"bug=remap", "fixed=remap", remap}, {"bug=global", "fixed=global", global, false},
    {"bug=upper", "fixed=upper", upper}, {"bug=table", "fixed=table", table},
    {"bug=dirty", "fixed=dirty", dirty},
};

void do_right(const Experiment& experiment, const AddressSpace& space) {
    for (const Flush by : {Flush::invlpg, Flush::cr3, Flush::cr4}) {
        if (by == Flush::cr3 && !experiment.cr3_is_right)
            continue;
        CHECK(!experiment.saw_old(space, by));
        print("tlb: %s, flushed by %s: saw new\n", experiment.name(), flush_names[static_cast<unsigned>(by)]);
    }
}

} // namespace

extern "C" int kernel_main(const BootParams& boot) {
    install_descriptors();
    init_memory(boot);
    const AddressSpace space = AddressSpace::create();
    space.load();

    bool chosen = false;
    for (const Experiment& experiment : experiments) {
        if (boot.has_option(experiment.bug)) {
            const bool old = experiment.saw_old(space, Flush::forgotten);
            print("tlb: %s saw %s\n", experiment.name(), old ? "old" : "new");
            chosen = true;
        }
        if (boot.has_option(experiment.fixed)) {
            do_right(experiment, space);
            chosen = true;
        }
    }
    if (!chosen) {
        for (const Experiment& experiment : experiments)
            do_right(experiment, space);
    }
    print("tlb: passed\n");
    return 0;
}
