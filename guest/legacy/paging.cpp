// legacy_paging and pae: a kernel that stays in 32-bit protected mode, with its own descriptor tables,
// exceptions through 32-bit gates, programs of ring 3 and the timer; without paging, then on page tables of
// two levels with 4 MB pages, or, if LEGACY_PAE is defined, of three levels with 2 MB pages and, if the CPU
// has it, no-execute. Outcome: passed.
#include "guest/legacy/machine.hpp"

using namespace umbra::legacy;

namespace {

// --- the tables: the first 64 MB are mapped to themselves, and one page at `window`

constexpr uint32_t window = 0x4000'0000;
constexpr uint32_t mapped = 64 << 20; // bytes

constexpr uint32_t present = 1, writable = 2, user = 4, accessed = 0x20, dirty = 0x40, large = 0x80;

#ifdef LEGACY_PAE
using Entry = uint64_t;
constexpr uint64_t no_execute = uint64_t{1} << 63;
constexpr unsigned large_page_shift = 21;
alignas(32) Entry root[4]; // the page-directory-pointer table, whose entries have no permissions
alignas(4096) Entry directory[512], window_directory[512];
constexpr unsigned window_index = 0;
#else
using Entry = uint32_t;
constexpr uint64_t no_execute = 0;
constexpr unsigned large_page_shift = 22;
alignas(4096) Entry directory[1024];
Entry (&root)[1024] = directory;
Entry (&window_directory)[1024] = directory;
constexpr unsigned window_index = window >> 22;
#endif
constexpr unsigned entries = 4096 / sizeof(Entry);
alignas(4096) Entry low_table[entries], window_table[entries];
alignas(4096) uint8_t frame[4096], other_frame[4096];

template<class T>
uint32_t address_of(const T& object) {
    return reinterpret_cast<uint32_t>(&object);
}

void write_entry(Entry& entry, uint64_t value) {
    const_cast<volatile Entry&>(entry) = static_cast<Entry>(value);
    asm volatile("" : : : "memory");
}
uint64_t read_entry(const Entry& entry) {
    return const_cast<const volatile Entry&>(entry);
}

void build_tables() {
    for (unsigned i = 0; i < entries; ++i) {
        const uint32_t page = i << 12;
        const bool for_users =
            page >= reinterpret_cast<uint32_t>(user_begin) && page < reinterpret_cast<uint32_t>(user_end);
        write_entry(low_table[i], page | present | writable | (for_users ? user : 0));
    }
    write_entry(directory[0], address_of(low_table) | present | writable | user);
    for (uint32_t i = 1; i < mapped >> large_page_shift; ++i)
        write_entry(directory[i], i << large_page_shift | present | writable | large);
    write_entry(window_directory[window_index], address_of(window_table) | present | writable | user);
#ifdef LEGACY_PAE
    write_entry(root[0], address_of(directory) | present);
    write_entry(root[1], address_of(window_directory) | present);
#endif
}

void turn_paging_on() {
    write_cr4(read_cr4() | (sizeof(Entry) == 8 ? cr4_pae : cr4_pse));
    write_cr3(address_of(root));
    write_cr0(read_cr0() | cr0_pg);
}
void turn_paging_off() {
    write_cr0(read_cr0() & ~cr0_pg);
}

// --- exceptions of the kernel itself

void expect_trap(uint32_t vector, uint32_t error) {
    CHECK_EQ(last_trap.vector, vector);
    CHECK_EQ(last_trap.error, error);
}

void check_exceptions() {
    EXPECTING_TRAP("ud2", : : : "memory");
    expect_trap(vector_ud, 0);
    EXPECTING_TRAP("int3", : : : "memory");
    expect_trap(vector_bp, 0);
    EXPECTING_TRAP("divl %0", : : "r"(0), "a"(1), "d"(0) : "memory", "cc");
    expect_trap(vector_de, 0);
    EXPECTING_TRAP("int $0x42", : : : "memory");
    expect_trap(0x42, 0);
    EXPECTING_TRAP("movl %0, %%fs", : : "r"(uint32_t{absent_segment}) : "memory");
    expect_trap(vector_np, absent_segment);
    EXPECTING_TRAP("movl %0, %%fs", : : "r"(0x1000) : "memory"); // behind the GDT's end
    expect_trap(vector_gp, 0x1000);
    EXPECTING_TRAP("movl %0, %%ss", : : "r"(0) : "memory");
    expect_trap(vector_gp, 0);
    EXPECTING_TRAP("nop", : : : "memory");
    CHECK_EQ(last_trap.vector, LastTrap::none);
}

// --- programs of ring 3

void check_users() {
    run_user(user_call, 0x1111);
    expect_trap(vector_leave, 0);
    CHECK(last_trap.from_user);
    CHECK_EQ(last_trap.eax, 0x4444);
    CHECK_EQ(last_trap.edx, 0x5678);
    constexpr uint32_t gate = vector_timer * 8 + 2; // the error code's IDT bit
    const struct {
        const char* program;
        uint32_t error;
    } forbidden[] = {{user_hlt, 0},          {user_cli, 0},    {user_cr0, 0},
                     {user_out, 0},          {user_int, gate}, {user_segment, kernel_data},
                     {user_far, kernel_code}};
    for (const auto& attempt : forbidden) {
        run_user(attempt.program, 0);
        expect_trap(vector_gp, attempt.error);
        CHECK(last_trap.from_user);
        CHECK(attempt.program == user_segment ||
              last_trap.eip == reinterpret_cast<uint32_t>(attempt.program));
    }
}

// --- page faults

enum class Access { read, write, fetch };
constexpr Access accesses[] = {Access::read, Access::write, Access::fetch};
constexpr bool both[] = {false, true};
constexpr uint32_t permissions[] = {0, writable, user, user | writable};

constexpr uint8_t kernel_program[] = {0xff, 0xe2};             // jmp *%edx
constexpr uint8_t user_program[] = {0xcd, vector_leave};       // int $0x80
constexpr unsigned user_program_offset = 16, data_offset = 64; // bytes in the page

/// Returns whether it was done without a fault.
bool attempt(Access access, bool by_user) {
    const uint32_t data = window + data_offset;
    if (by_user) {
        if (access == Access::fetch)
            run_user(user_fetch, window + user_program_offset);
        else
            run_user(access == Access::read ? user_read : user_write, data);
        CHECK(last_trap.from_user);
        return last_trap.vector == vector_leave;
    }
    switch (access) {
    case Access::read:
        EXPECTING_TRAP("movl (%0), %%eax", : : "r"(data) : "memory", "eax");
        break;
    case Access::write:
        EXPECTING_TRAP("movl %0, (%0)", : : "r"(data) : "memory");
        break;
    case Access::fetch:
        EXPECTING_TRAP("movl $1f, %%edx\n\t jmp *%0", : : "r"(window) : "memory", "edx");
        break;
    }
    return last_trap.vector == LastTrap::none;
}

/// One access through tables with these permissions, by the rules of Intel SDM vol. 3A §4.6 and §4.7.
void check_access(uint64_t upper, uint64_t lower, Access access, bool by_user) {
    write_entry(window_directory[window_index], address_of(window_table) | present | upper);
    write_entry(window_table[0], address_of(frame) | lower);
    write_cr3(address_of(root));

    const bool is_present = (lower & present) != 0;
    const bool write = access == Access::write, fetch = access == Access::fetch;
    const bool write_protect = by_user || (read_cr0() & cr0_wp) != 0;
    const bool forbidden = (by_user && (upper & lower & user) == 0) ||
                           (write && write_protect && (upper & lower & writable) == 0) ||
                           (fetch && ((upper | lower) & no_execute) != 0);
    const bool done = attempt(access, by_user);
    const auto entry = static_cast<uint32_t>(read_entry(window_table[0]));
    CHECK_EQ(done, is_present && !forbidden);
    if (done) {
        CHECK_EQ(entry & (accessed | dirty), accessed | (write ? dirty : 0));
        CHECK((read_entry(window_directory[window_index]) & accessed) != 0);
        return;
    }
    const bool no_execute_on = sizeof(Entry) == 8 && cpu_has_nx() && (read_efer() & efer_nxe) != 0;
    const uint32_t error =
        (is_present ? 1 : 0) | (write ? 2 : 0) | (by_user ? 4 : 0) | (fetch && no_execute_on ? 16 : 0);
    expect_trap(vector_pf, error);
    CHECK_EQ(last_trap.cr2, window + (!fetch ? data_offset : by_user ? user_program_offset : 0));
    CHECK_EQ(entry & dirty, 0);
}

unsigned check_all_accesses() {
    unsigned count = 0;
    for (const uint32_t upper : permissions)
        for (uint32_t lower = 0; lower < 8; ++lower)
            for (const Access access : accesses)
                for (const bool by_user : both) {
                    check_access(upper, lower, access, by_user);
                    ++count;
                    if (no_execute == 0 || (read_efer() & efer_nxe) == 0)
                        continue;
                    check_access(upper, lower | no_execute, access, by_user);
                    check_access(upper | no_execute, lower, access, by_user);
                    count += 2;
                }
    return count;
}

void check_faults() {
    for (unsigned i = 0; i < sizeof kernel_program; ++i)
        frame[i] = kernel_program[i];
    for (unsigned i = 0; i < sizeof user_program; ++i)
        frame[user_program_offset + i] = user_program[i];
    for (const bool no_execute_on : both) {
        if (no_execute_on && (sizeof(Entry) == 4 || !cpu_has_nx()))
            continue;
        if (no_execute_on)
            write_efer(read_efer() | efer_nxe);
        for (const bool write_protect : both) {
            write_cr0((read_cr0() & ~cr0_wp) | (write_protect ? cr0_wp : 0));
            print("%u accesses, WP %u, NXE %u\n", check_all_accesses(), write_protect ? 1U : 0U,
                  no_execute_on ? 1U : 0U);
        }
    }
    write_cr0(read_cr0() & ~cr0_wp);
}

#ifdef LEGACY_PAE
/// Without EFER.NXE the bit for no-execute is reserved.
void check_reserved_bit(uint32_t ebx) {
    write_efer(read_efer() & ~efer_nxe);
    write_entry(window_directory[window_index], address_of(window_table) | present | writable | user);
    write_entry(window_table[0], address_of(frame) | present | writable | no_execute);
    write_cr3(address_of(root));
    CHECK(!attempt(Access::read, false));
    constexpr uint32_t rsvd = 8;
    expect_trap(vector_pf, on_qemu(ebx) ? rsvd : rsvd | present);
}
#endif

/// INVLPG and MOV CR3 make changes seen; so do large pages, and aliases of the same memory.
void check_translations() {
    write_entry(window_directory[window_index], address_of(window_table) | present | writable | user);
    for (unsigned i = 0; i < 100; ++i) {
        uint8_t* const target = i % 2 == 0 ? frame : other_frame;
        write_entry(window_table[0], reinterpret_cast<uint32_t>(target) | present | writable);
        if (i % 3 == 0)
            write_cr3(address_of(root));
        else
            invlpg(window);
        memory_at<uint32_t>(window + 128) = i;
        CHECK_EQ(memory_at<uint32_t>(reinterpret_cast<uint32_t>(target) + 128), i);
    }
    // A large page at the window onto the first of memory, where this kernel is.
    write_entry(window_directory[window_index], present | writable | large);
    write_cr3(address_of(root));
    auto& alias = memory_at<uint32_t>(window + address_of(frame) + 256);
    if (address_of(frame) + 256 < 1U << large_page_shift) {
        alias = 0x600d'cafe;
        CHECK_EQ(memory_at<uint32_t>(address_of(frame) + 256), 0x600d'cafe);
        CHECK_EQ(read_entry(window_directory[window_index]) & (accessed | dirty), accessed | dirty);
    }
}

// --- the timer

void check_timer() {
    start_timer(100);
    wait_ticks(5);
    const uint32_t before = ticks;
    run_user(user_loop, 0, before + 5);
    CHECK_EQ(last_trap.vector, LastTrap::none);
    CHECK(ticks >= before + 5);
    stop_timer();
}

} // namespace

extern "C" int kernel_main(uint32_t /*eax*/, [[maybe_unused]] uint32_t ebx) {
    init_descriptors();
    check_exceptions();
    print("exceptions without paging\n");
    check_users();
    print("programs without paging\n");
    check_timer();
    print("%u ticks without paging\n", ticks);

    build_tables();
    turn_paging_on();
    check_exceptions();
    print("exceptions with paging\n");
    check_users();
    print("programs with paging\n");
    check_faults();
#ifdef LEGACY_PAE
    check_reserved_bit(ebx);
#endif
    check_translations();
    print("translations\n");
    check_timer();
    print("%u ticks with paging\n", ticks);

    turn_paging_off();
    check_exceptions();
    check_users();
    print("%s: passed\n", LEGACY_NAME);
    return 0;
}
