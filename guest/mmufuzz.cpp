// mmufuzz: random programs of page-table writes, invalidations, mode switches and accesses. Tables of three
// levels refer to each other at random and are shared by three address spaces; entries of every level are
// rewritten, each time with an invalidation that the manuals call sufficient (INVLPG, a load of CR3, CR4.PGE,
// or none where none is needed); WP and PGE come and go, and with the word `nxe` EFER.NXE too (a KVM that
// shadows its guests' tables heeds that one only for what it has not cached). Kernel and programs read, write
// and execute; each result (value, error code, CR2, dirty bit) is compared with a walk in software and goes
// into a checksum, which is the same on every machine that is right. `seed=N` chooses the program, `rounds=N`
// how long it is. Intel SDM vol. 3A ch. 4.5-4.10. Outcome: passed.
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

constexpr std::uint64_t default_seed = 1;
constexpr std::uint64_t default_rounds = 250;
constexpr unsigned accesses_per_round = 8;
constexpr std::uint64_t accesses_per_report = 1000;

// The addresses: a few entries of each table are in use.
constexpr unsigned program_slot = 2;
constexpr std::uint64_t top_slots[] = {20, 21, 400};
constexpr unsigned shared_slot = 400; // the same in all spaces, so that its pages may be global
constexpr unsigned slot_count = sizeof top_slots / sizeof *top_slots;
constexpr std::uint64_t indices[] = {0, 1, 255, 511};
constexpr unsigned index_count = sizeof indices / sizeof *indices;
constexpr unsigned page_count = slot_count * index_count * index_count * index_count;

/// What the tables are made of. The shared slot's are its own.
struct Pool {
    static constexpr unsigned tables_per_level = 3;
    std::uint64_t tables[4][tables_per_level]; ///< by level, 1 to 3
};
constexpr unsigned space_count = 3, frame_count = 8, large_count = 2;
std::uint64_t roots[space_count];
Pool private_pool, shared_pool;
std::uint64_t frames[frame_count];
std::uint64_t large_frames[large_count];

// Every page begins with data and holds a little code.
constexpr std::uint64_t data_words = 64;
constexpr std::uint64_t kernel_code_offset = 0x800, user_code_offset = 0x900;
constexpr std::uint64_t ret = 0xc3, syscall = 0x050f;

struct State {
    std::uint64_t root = 0;
    bool wp = true;
    bool nxe = true;
    bool pge = false;
};
State state;
bool toggle_nxe;
std::uint64_t accesses = 0;
std::uint64_t checksum = 0;

/// xorshift64*: the same numbers in every run, as long as no expression asks for two of them in an order that
/// is the compiler's choice.
std::uint64_t random_state;
std::uint64_t random() {
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return random_state * 0x2545'f491'4f6c'dd1d;
}
std::uint64_t random_below(std::uint64_t bound) {
    return (random() >> 16) % bound;
}
bool one_in(std::uint64_t count) {
    return random_below(count) == 0;
}

void add_to_checksum(std::uint64_t value) {
    checksum = (checksum ^ value) * 0x100'0000'01b3;
    checksum ^= checksum >> 29;
}

/// Address of page 0..page_count - 1.
std::uint64_t page_address(std::uint64_t page) {
    std::uint64_t address = 0;
    for (unsigned level = 1; level <= 3; ++level) {
        address += indices[page % index_count] * span_of(level);
        page /= index_count;
    }
    return slot_base(static_cast<unsigned>(top_slots[page])) + address;
}

// ---- the walk in software

enum class Kind : std::uint8_t { read, write, fetch };

struct Access {
    std::uint64_t address;
    Kind kind;
    bool user;
};

struct Walk {
    bool faults = false;
    std::uint64_t error = 0;
    std::uint64_t physical = 0;
    std::uint64_t leaf_slot = 0;
    bool bits_set = true; ///< accessed in every entry, and dirty in the last if it was a write
};

/// Intel SDM vol. 3A, 4.6 and 4.7.
Walk walk(const Access& access) {
    const bool write = access.kind == Kind::write;
    Walk result;
    result.error = (write ? pf_write : 0) | (access.user ? pf_user : 0) |
                   (access.kind == Kind::fetch && state.nxe ? pf_fetch : 0);
    bool writable = true, user = true, executable = true;
    std::uint64_t table = state.root;
    for (unsigned level = 4;; --level) {
        result.leaf_slot = table + access.address / span_of(level) % 512 * 8;
        const std::uint64_t entry = physical(result.leaf_slot);
        result.faults = true;
        if ((entry & pte_present) == 0)
            return result;
        if ((entry & pte_no_execute) != 0 && !state.nxe) {
            result.error |= pf_present | pf_reserved;
            return result;
        }
        result.faults = false;
        writable = writable && (entry & pte_writable) != 0;
        user = user && (entry & pte_user) != 0;
        executable = executable && (entry & pte_no_execute) == 0;
        const bool leaf = level == 1 || (entry & pte_large) != 0;
        const std::uint64_t wanted = pte_accessed | (leaf && write ? pte_dirty : 0);
        result.bits_set = result.bits_set && (entry & wanted) == wanted;
        if (!leaf) {
            table = entry & pte_address;
            continue;
        }
        result.physical = (entry & pte_address & ~(span_of(level) - 1)) + access.address % span_of(level);
        break;
    }
    const bool denied = (access.user && !user) || (write && !writable && (access.user || state.wp)) ||
                        (access.kind == Kind::fetch && !executable);
    if (denied) {
        result.faults = true;
        result.error |= pf_present;
    }
    return result;
}

/// Whether the walk of `address` meets the entry at `slot`.
bool passes(std::uint64_t address, std::uint64_t slot) {
    std::uint64_t table = state.root;
    for (unsigned level = 4; level >= 1; --level) {
        const std::uint64_t here = table + address / span_of(level) % 512 * 8;
        if (here == slot)
            return true;
        const std::uint64_t entry = physical(here);
        if ((entry & pte_present) == 0 || (level < 4 && (entry & pte_large) != 0))
            return false;
        table = entry & pte_address;
    }
    return false;
}

// ---- changes of the tables, and what has to be invalidated for them

bool affected[page_count];
unsigned affected_pages = 0;
bool shared_affected = false;

void forget_affected() {
    for (bool& page : affected)
        page = false;
    affected_pages = 0;
    shared_affected = false;
}

std::uint64_t random_entry(const Pool& pool, unsigned level) {
    std::uint64_t flags = random() & (pte_accessed | pte_dirty);
    flags |= one_in(level == 1 ? 8 : 12) ? 0 : pte_present;
    flags |= one_in(level == 1 ? 4 : 10) ? 0 : pte_writable;
    flags |= one_in(level == 1 ? 4 : 10) ? 0 : pte_user;
    flags |= one_in(level == 1 ? 6 : 20) ? pte_no_execute : 0;
    const bool global = &pool == &shared_pool && !one_in(3);
    if (level == 1)
        return flags | (global ? pte_global : 0) | frames[random_below(frame_count)];
    if (level == 2 && one_in(4))
        return flags | (global ? pte_global : 0) | pte_large | large_frames[random_below(large_count)];
    return flags | pool.tables[level - 1][random_below(Pool::tables_per_level)];
}

void change_entry() {
    const bool shared = one_in(3);
    const Pool& pool = shared ? shared_pool : private_pool;
    unsigned level = 1 + static_cast<unsigned>(random_below(3));
    if (level > 1 && one_in(2))
        --level;
    const std::uint64_t table = pool.tables[level][random_below(Pool::tables_per_level)];
    std::uint64_t slot = table + indices[random_below(index_count)] * 8;
    std::uint64_t value = random_entry(pool, level);
    if (!shared && one_in(16)) {
        level = 4;
        const std::uint64_t root = roots[random_below(space_count)];
        slot = root + top_slots[random_below(slot_count - 1)] * 8;
        value = random_entry(private_pool, level);
    }
    if ((physical(slot) & pte_present) != 0) { // what was absent is not cached
        for (unsigned page = 0; page < page_count; ++page) {
            if (!affected[page] && passes(page_address(page), slot)) {
                affected[page] = true;
                ++affected_pages;
            }
        }
        shared_affected |= shared;
    }
    physical(slot) = value;
}

void toggle_pge() {
    state.pge = !state.pge;
    write_cr4(read_cr4() ^ cr4_pge);
}

void switch_space() {
    state.root = roots[random_below(space_count)];
    write_cr3(state.root);
}

/// One of the ways that suffice for what has changed.
void invalidate() {
    constexpr unsigned too_many = 24;
    const bool cr3_suffices = !shared_affected || !state.pge;
    if (affected_pages == 0) {
        if (one_in(8) && cr3_suffices)
            switch_space();
    } else if (affected_pages <= too_many && !one_in(3)) {
        for (unsigned page = 0; page < page_count; ++page) {
            if (affected[page])
                invlpg(page_address(page) + random_below(page_4k));
        }
        // A page of another space that is not global goes when CR3 is loaded; the shared slot's are invalid
        // here.
    } else if (cr3_suffices && !one_in(3)) {
        switch_space();
    } else {
        toggle_pge();
        if (one_in(2))
            toggle_pge();
    }
    forget_affected();
}

void change_mode() {
    if (!toggle_nxe || (state.nxe && !one_in(4))) {
        state.wp = !state.wp; // takes effect at once
        write_cr0(read_cr0() ^ cr0_wp);
        return;
    }
    state.nxe = !state.nxe;
    write_msr(msr_efer, read_msr(msr_efer) ^ efer_nxe);
    toggle_pge();
}

// ---- accesses

USER_PROGRAM(program_read, "mov (%rdi), %rax\n syscall");
USER_PROGRAM(program_write, "mov %rsi, (%rdi)\n syscall");
USER_PROGRAM(program_jump, "jmp *%rdi");

struct Result {
    std::uint64_t vector = vector_none, error = 0, cr2 = 0, rip = 0;
    std::uint64_t value = 0; ///< of a read
};

Result run_kernel(const Access& access, std::uint64_t value) {
    std::uint64_t seen = 0;
    const Trap trap = access.kind == Kind::read    ? PROBE("mov (%1), %0",
                                                           : "+r"(seen)
                                                           : "r"(access.address))
                      : access.kind == Kind::write ? probe_write(access.address, value)
                                                   : probe_fetch(access.address);
    if (trap.none())
        return {.value = seen};
    return {trap.frame.vector, trap.frame.error, trap.cr2, trap.frame.rip - trap.start, 0};
}

Result run_program(const Access& access, std::uint64_t value) {
    void (*const program)() = access.kind == Kind::read    ? program_read
                              : access.kind == Kind::write ? program_write
                                                           : program_jump;
    TrapFrame frame = user_frame(program_address(program), 0);
    frame.rdi = access.address;
    frame.rsi = value;
    run_user(frame);
    if (frame.vector == vector_syscall) {
        if (access.kind == Kind::fetch)
            CHECK_EQ(frame.rip, access.address + 2);
        return {.value = access.kind == Kind::read ? frame.rax : 0};
    }
    const std::uint64_t start = access.kind == Kind::fetch ? access.address : program_address(program);
    return {frame.vector, frame.error, read_cr2(), frame.rip - start, 0};
}

Access random_access() {
    Access access{page_address(random_below(page_count)), Kind::read, one_in(2)};
    if (one_in(2))
        access.kind = one_in(3) ? Kind::fetch : Kind::write;
    if (access.kind == Kind::fetch)
        access.address += access.user ? user_code_offset : kernel_code_offset;
    else
        access.address += random_below(data_words) * 8;
    return access;
}

void do_access(bool qemu) {
    const Access access = random_access();
    const std::uint64_t value = random();
    const Walk before = walk(access);
    const bool was_dirty = !before.faults && (physical(before.leaf_slot) & pte_dirty) != 0;
    Result seen = access.user ? run_program(access, value) : run_kernel(access, value);
    if (qemu && (seen.error & pf_reserved) != 0) // QEMU leaves it out
        seen.error |= pf_present;

    bool right = false;
    if (before.faults) {
        right = seen.vector == vector_pf && seen.error == before.error && seen.cr2 == access.address &&
                seen.rip == 0;
    } else {
        const bool is_dirty = (physical(before.leaf_slot) & pte_dirty) != 0;
        right = seen.vector == vector_none && walk(access).bits_set &&
                is_dirty == (was_dirty || access.kind == Kind::write);
        if (access.kind == Kind::read)
            right = right && seen.value == physical(before.physical);
        if (access.kind == Kind::write)
            right = right && physical(before.physical) == value;
        add_to_checksum(is_dirty ? 1 : 0);
    }
    if (!right) {
        print("access %lu: %s %u of %#lx: vector %lu error %#lx cr2 %#lx value %#lx; should fault %u error "
              "%#lx, "
              "physical %#lx\n",
              accesses, access.user ? "program" : "kernel", static_cast<unsigned>(access.kind),
              access.address, seen.vector, seen.error, seen.cr2, seen.value, before.faults, before.error,
              before.physical);
        exit_guest(exit_check_failed);
    }
    for (const std::uint64_t number : {access.address, seen.vector, seen.error, seen.cr2, seen.value})
        add_to_checksum(number);
    ++accesses;
}

void report(std::uint64_t seed) {
    print("mmufuzz: seed %lu: %lu accesses, checksum %#lx\n", seed, accesses, checksum);
}

// ---- set-up

std::uint64_t page_with_code(std::uint64_t frame) {
    for (std::uint64_t i = 0; i < data_words; ++i)
        physical(frame, i) = random();
    physical(frame + kernel_code_offset) = ret;
    physical(frame + user_code_offset) = syscall;
    return frame;
}

void fill(Pool& pool) {
    for (unsigned level = 1; level <= 3; ++level)
        for (std::uint64_t& table : pool.tables[level])
            table = allocate_frame();
    for (unsigned level = 1; level <= 3; ++level)
        for (const std::uint64_t table : pool.tables[level])
            for (const std::uint64_t index : indices)
                physical(table, index) = random_entry(pool, level);
}

void make_spaces() {
    for (std::uint64_t& frame : frames)
        frame = page_with_code(allocate_frame());
    for (std::uint64_t& frame : large_frames) {
        frame = allocate_frames(512, page_2m);
        for (const std::uint64_t index : indices)
            page_with_code(frame + index * page_4k);
    }
    fill(private_pool);
    fill(shared_pool);

    const AddressSpace first = AddressSpace::create();
    map_programs(first, slot_base(program_slot));
    physical(first.root(), shared_slot) = shared_pool.tables[3][0] | pte_user_rw;
    roots[0] = first.root();
    for (unsigned i = 1; i < space_count; ++i) {
        roots[i] = AddressSpace::create().root();
        for (const unsigned slot : {program_slot, shared_slot})
            physical(roots[i], slot) = physical(roots[0], slot);
    }
    for (const std::uint64_t root : roots)
        for (unsigned i = 0; i + 1 < slot_count; ++i)
            physical(root, top_slots[i]) =
                private_pool.tables[3][random_below(Pool::tables_per_level)] | pte_user_rw;
    state.root = roots[0];
    first.load();
}

} // namespace

extern "C" int kernel_main(const BootParams& boot) {
    install_descriptors();
    init_memory(boot);
    enable_user_mode();
    const std::uint64_t seed = boot.number("seed", default_seed);
    const std::uint64_t rounds = boot.number("rounds", default_rounds);
    random_state = (seed + 1) * 0x9e37'79b9'7f4a'7c15; // never 0
    make_spaces();

    toggle_nxe = boot.has_option("nxe");
    const bool qemu = boot.has_option("qemu");
    for (std::uint64_t round = 0; round < rounds; ++round) {
        for (std::uint64_t changes = 1 + random_below(3); changes != 0; --changes)
            change_entry();
        invalidate();
        if (one_in(8))
            change_mode();
        for (unsigned i = 0; i < accesses_per_round; ++i) {
            do_access(qemu);
            if (accesses % accesses_per_report == 0)
                report(seed);
        }
    }
    if (accesses % accesses_per_report != 0)
        report(seed);
    print("mmufuzz: passed\n");
    return 0;
}
