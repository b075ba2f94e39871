// modes: turns paging off and on again and again, each time with other tables and in another mode: none, two
// levels, PAE, and long mode, seen from compatibility mode. In each, the same address means other memory.
// Outcome: passed.
#include "guest/legacy/long_mode.hpp"

using namespace umbra::legacy;

namespace {

constexpr uint32_t window = 0x4000'0000; // bytes; in its own entry of every table but the highest
constexpr uint32_t mapped = 64 << 20;    // to itself
constexpr uint32_t present = 1, writable = 2, large = 0x80;

/// One set of tables for each mode, and the page that each has at the window.
struct Tables {
    alignas(4096) uint32_t two_levels[1024];
    alignas(4096) uint32_t two_levels_window[1024];
    alignas(4096) uint64_t level4[512];
    alignas(4096) uint64_t level3[512];
    alignas(4096) uint64_t level2[512];
    alignas(4096) uint64_t level2_window[512];
    alignas(4096) uint64_t level1_window[512];
    alignas(4096) uint64_t pae_root[4];
    alignas(4096) uint64_t pae_level2_window[512];
    alignas(4096) uint64_t pae_level1_window[512];
};
constexpr unsigned sets = 2;
Tables tables[sets];

enum class Mode : unsigned { off, two_levels, pae, long_mode };
constexpr unsigned modes = 4;
alignas(4096) uint32_t pages[sets][modes][1024];

template<class T>
uint32_t address_of(const T& object) {
    return reinterpret_cast<uint32_t>(&object);
}

void build(unsigned set) {
    Tables& t = tables[set];
    const auto page = [set](Mode mode) {
        return address_of(pages[set][static_cast<unsigned>(mode)]) | present | writable;
    };
    for (uint32_t at = 0; at < mapped; at += 1 << 22)
        t.two_levels[at >> 22] = at | present | writable | large;
    t.two_levels[window >> 22] = address_of(t.two_levels_window) | present | writable;
    t.two_levels_window[0] = page(Mode::two_levels);

    for (uint32_t at = 0; at < mapped; at += 1 << 21)
        t.level2[at >> 21] = at | present | writable | large;
    t.pae_level2_window[0] = address_of(t.pae_level1_window) | present | writable;
    t.pae_level1_window[0] = page(Mode::pae);

    t.level4[0] = address_of(t.level3) | present | writable;
    t.level3[0] = address_of(t.level2) | present | writable;
    t.level3[1] = address_of(t.level2_window) | present | writable;
    t.level2_window[0] = address_of(t.level1_window) | present | writable;
    t.level1_window[0] = page(Mode::long_mode);
}

/// Written anew each time: QEMU's emulation sets accessed bits in these entries, which are reserved.
void load_pae_root(unsigned set) {
    Tables& t = tables[set];
    memory_at<uint64_t>(address_of(t.pae_root[0])) = address_of(t.level2) | present;
    memory_at<uint64_t>(address_of(t.pae_root[1])) = address_of(t.pae_level2_window) | present;
    write_cr3(address_of(t.pae_root));
}

void enter(Mode mode, unsigned set) {
    switch (mode) {
    case Mode::off:
        break;
    case Mode::two_levels:
        write_cr4((read_cr4() & ~cr4_pae) | cr4_pse);
        write_cr3(address_of(tables[set].two_levels));
        write_cr0(read_cr0() | cr0_pg);
        break;
    case Mode::pae:
        write_cr4(read_cr4() | cr4_pae);
        load_pae_root(set);
        write_cr0(read_cr0() | cr0_pg);
        break;
    case Mode::long_mode:
        turn_long_mode_on(address_of(tables[set].level4));
        break;
    }
}

/// To the other set, with paging on.
void change_set(Mode mode, unsigned set) {
    if (mode == Mode::two_levels)
        write_cr3(address_of(tables[set].two_levels));
    if (mode == Mode::pae)
        load_pae_root(set);
    if (mode == Mode::long_mode)
        write_cr3(address_of(tables[set].level4));
}

void leave(Mode mode) {
    if (mode == Mode::long_mode)
        turn_long_mode_off();
    else
        write_cr0(read_cr0() & ~cr0_pg);
}

uint32_t expected[sets][modes];

/// What is at the window is the page of this mode and set, to read and to write.
void check(Mode mode, unsigned set, uint32_t new_value) {
    const auto index = static_cast<unsigned>(mode);
    const uint32_t at = mode == Mode::off ? address_of(pages[set][index]) : window;
    CHECK_EQ(memory_at<uint32_t>(at), expected[set][index]);
    memory_at<uint32_t>(at) = new_value;
    expected[set][index] = new_value;
    CHECK_EQ(memory_at<uint32_t>(address_of(pages[set][index])), new_value);
    if (mode == Mode::long_mode)
        CHECK_EQ(walk_through_64_bit_code(new_value & 0xff), (new_value & 0xff) * 3 + 1);
}

} // namespace

extern "C" int kernel_main(uint32_t /*eax*/, uint32_t /*ebx*/) {
    constexpr unsigned rounds = 200;
    CHECK(cpu_has_long_mode());
    init_descriptors();
    init_long_mode();
    for (unsigned set = 0; set < sets; ++set)
        build(set);
    unsigned entered[modes] = {};
    uint32_t random = 1;
    for (unsigned round = 0; round < rounds; ++round) {
        random = random * 1'664'525 + 1'013'904'223;
        const auto mode = static_cast<Mode>(random >> 30);
        unsigned set = random >> 29 & 1;
        enter(mode, set);
        check(mode, set, random);
        if ((random >> 28 & 1) != 0) {
            set = 1 - set;
            change_set(mode, set);
            check(mode, set, ~random);
        }
        leave(mode);
        ++entered[static_cast<unsigned>(mode)];
        for (unsigned i = 0; i < sets; ++i)
            for (unsigned j = 0; j < modes; ++j)
                CHECK_EQ(memory_at<uint32_t>(address_of(pages[i][j])), expected[i][j]);
    }
    print("without paging %u times, two levels %u, PAE %u, long mode %u\n", entered[0], entered[1],
          entered[2], entered[3]);
    print("%s: passed\n", LEGACY_NAME);
    return 0;
}
