// access: every combination of rights against every kind of access. A page's last two entries take all values
// of present, writable, user and no-execute, CR0.WP both of its own; kernel and program read, write and
// fetch. Proves that each access succeeds or faults with the error code that the rules of Intel SDM vol. 3A
// ch. 4.6 and 4.7 give, and leaves the accessed and dirty bits that ch. 4.8 asks for. (CR4.SMEP and SMAP are
// off.) Outcome: passed.
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

constexpr std::uint64_t page = slot_base(7) + 3 * page_1g + 5 * page_2m + 9 * page_4k;
constexpr std::uint64_t programs = slot_base(6);
constexpr std::uint64_t stack_top = slot_base(6) + page_2m;
constexpr std::uint64_t ret = 0xc3; // what the page holds, so that it can be called

enum class Kind : std::uint8_t { read, write, fetch };

struct Access {
    Kind kind;
    bool user;
    bool wp;
};

/// No fault, or the error code of one.
struct Outcome {
    bool faults = false;
    std::uint64_t error = 0;
};

/// The rules, as the manual gives them. `table` and `leaf` are the entries of levels 2 and 1; above, all is
/// allowed.
Outcome expected(const Access& access, std::uint64_t table, std::uint64_t leaf) {
    const bool present = (leaf & pte_present) != 0;
    const bool writable = (table & leaf & pte_writable) != 0;
    const bool user_page = (table & leaf & pte_user) != 0;
    const bool executable = ((table | leaf) & pte_no_execute) == 0;

    bool allowed = present && (user_page || !access.user);
    if (access.kind == Kind::write)
        allowed = allowed && (writable || (!access.user && !access.wp));
    if (access.kind == Kind::fetch)
        allowed = allowed && executable;
    if (allowed)
        return {};
    return {.faults = true,
            .error = (present ? pf_present : 0) | (access.kind == Kind::write ? pf_write : 0) |
                     (access.user ? pf_user : 0) | (access.kind == Kind::fetch ? pf_fetch : 0)};
}

USER_PROGRAM(program_read, "mov (%rdi), %rax\n syscall");
USER_PROGRAM(program_write, "mov %rsi, (%rdi)\n syscall");
USER_PROGRAM(program_fetch, "call *%rdi\n syscall");

Outcome from_program(Kind kind) {
    void (*const program)() = kind == Kind::read    ? program_read
                              : kind == Kind::write ? program_write
                                                    : program_fetch;
    TrapFrame frame = user_frame(program_address(program), stack_top);
    frame.rdi = page;
    frame.rsi = ret;
    run_user(frame);
    if (frame.vector == vector_syscall)
        return {};
    CHECK_EQ(frame.vector, vector_pf);
    CHECK_EQ(frame.rip, kind == Kind::fetch ? page : program_address(program));
    CHECK_EQ(read_cr2(), page);
    return {.faults = true, .error = frame.error};
}

Outcome from_kernel(Kind kind) {
    const Trap trap = kind == Kind::read    ? probe_read(page)
                      : kind == Kind::write ? probe_write(page, ret)
                                            : probe_fetch(page);
    if (trap.none())
        return {};
    CHECK(trap.is_page_fault(trap.frame.error, page));
    return {.faults = true, .error = trap.frame.error};
}

void try_access(const AddressSpace& space, const Access& access, std::uint64_t table_rights,
                std::uint64_t leaf_rights) {
    Word& table = space.entry(page, 2);
    Word& leaf = space.entry(page, 1);
    table = (table & pte_address) | pte_present | table_rights;
    leaf = (leaf & pte_address) | leaf_rights;
    invlpg(page);

    const Outcome should = expected(access, table_rights, leaf_rights);
    const Outcome is = access.user ? from_program(access.kind) : from_kernel(access.kind);
    const bool bits_right = should.faults ? (leaf & pte_dirty) == 0
                                          : (table & pte_accessed) != 0 && (leaf & pte_accessed) != 0 &&
                                                ((leaf & pte_dirty) != 0) == (access.kind == Kind::write) &&
                                                (table & pte_dirty) == 0;
    if (is.faults == should.faults && is.error == should.error && bits_right)
        return;
    print("access %u user %u wp %u table %#lx leaf %#lx: fault %u error %#lx, should be %u %#lx; entries "
          "%#lx %#lx\n",
          static_cast<unsigned>(access.kind), access.user, access.wp, table_rights, leaf_rights, is.faults,
          is.error, should.faults, should.error, table.read(), leaf.read());
    exit_guest(exit_check_failed);
}

/// Calls `visit` with every subset of `bits`.
template<class Visit>
void each_subset(std::uint64_t bits, Visit visit) {
    std::uint64_t subset = 0;
    do {
        visit(subset);
        subset =
            (subset - bits) & bits; // the next one: the carry runs through the bits that are not in the set
    } while (subset != 0);
}

} // namespace

extern "C" int kernel_main(const BootParams& boot) {
    install_descriptors();
    init_memory(boot);
    enable_user_mode();
    const AddressSpace space = AddressSpace::create();
    const std::uint64_t frame = allocate_frame();
    physical(frame) = ret;
    space.map(page, frame, pte_user_rw);
    space.map(stack_top - page_4k, allocate_frame(), pte_user_rw);
    map_programs(space, programs);
    space.load();

    unsigned count = 0;
    for (const Access& privilege :
         {Access{.kind = {}, .user = false, .wp = true}, Access{.kind = {}, .user = false, .wp = false},
          Access{.kind = {}, .user = true, .wp = true}}) {
        write_cr0(privilege.wp ? read_cr0() | cr0_wp : read_cr0() & ~cr0_wp);
        for (const Kind kind : {Kind::read, Kind::write, Kind::fetch})
            each_subset(pte_writable | pte_user | pte_no_execute, [&](std::uint64_t table_rights) {
                each_subset(pte_present | pte_writable | pte_user | pte_no_execute,
                            [&](std::uint64_t leaf_rights) {
                                try_access(space, {.kind = kind, .user = privilege.user, .wp = privilege.wp},
                                           table_rights, leaf_rights);
                                ++count;
                            });
            });
    }
    print("access: %u combinations\n", count);
    print("access: passed\n");
    return 0;
}
