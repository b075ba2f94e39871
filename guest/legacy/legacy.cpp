// legacy: started by each protocol and in each format that a 32-bit kernel can have (start.S), it checks what
// the protocol promises: the machine's state, the boot information, the command line, the memory map, the
// modules. Outcome: passed.
//
// Words of the command line say what there is to find: memory=MIB, modules=N, empty-modules, text-screen. The
// first module holds module_text 500 times and has arguments that end in "first module"; the second holds it
// once, and they end in "second module". "inexact-flags": on this machine pushf does not show IF as it is.
#include "guest/legacy/runtime.hpp"

using namespace umbra::legacy;

namespace {

enum class Protocol { multiboot1, multiboot2, pvh, umbra };
#if defined LEGACY_MULTIBOOT1 || defined LEGACY_KLUDGE
constexpr Protocol protocol = Protocol::multiboot1;
#elif defined LEGACY_MULTIBOOT2 || defined LEGACY_RELOCATABLE
constexpr Protocol protocol = Protocol::multiboot2;
#elif defined LEGACY_PVH || defined LEGACY_PVH64
constexpr Protocol protocol = Protocol::pvh;
#else
constexpr Protocol protocol = Protocol::umbra;
#endif
#ifdef LEGACY_RELOCATABLE
constexpr bool relocatable = true;
#else
constexpr bool relocatable = false;
#endif

// --- what was found, whatever the protocol

struct Range {
    uint64_t base, size; ///< bytes
    bool ram;
};
struct Module {
    uint32_t base, size; ///< bytes
    const char* arguments;
};

constexpr unsigned most_ranges = 64;
constexpr unsigned most_modules = 8;
Range ranges[most_ranges];
unsigned range_count = 0;
Module modules[most_modules];
unsigned module_count = 0;
const char* command_line = "";

void add_range(uint64_t base, uint64_t size, bool ram) {
    CHECK(range_count < most_ranges);
    ranges[range_count++] = {base, size, ram};
}
void add_module(uint32_t base, uint32_t end, const char* arguments) {
    CHECK(module_count < most_modules);
    CHECK(base <= end);
    modules[module_count++] = {base, end - base, arguments};
}

const char* text_at(uint64_t address) {
    CHECK(address != 0 && address >> 32 == 0);
    return reinterpret_cast<const char*>(static_cast<uint32_t>(address));
}

bool ends_with(const char* text, const char* end) {
    return length(text) >= length(end) && equal(text + length(text) - length(end), end, length(end));
}

/// The number behind `name` on the command line.
uint32_t number(const char* name) {
    const char* at = find_word(command_line, name);
    CHECK(at != nullptr);
    uint32_t value = 0;
    for (; *at >= '0' && *at <= '9'; ++at)
        value = value * 10 + static_cast<uint32_t>(*at - '0');
    return value;
}
bool has_word(const char* name) {
    return find_word(command_line, name) != nullptr;
}

// --- multiboot 1

struct Multiboot1Info {
    static constexpr uint32_t magic = 0x2bad'b002;
    static constexpr uint32_t has_memory = 1 << 0, has_command_line = 1 << 2, has_modules = 1 << 3,
                              has_memory_map = 1 << 6, has_loader_name = 1 << 9;

    uint32_t flags, memory_lower, memory_upper, boot_device, command_line;
    uint32_t module_count, modules;
    uint32_t symbols[4];
    uint32_t memory_map_size, memory_map;
    uint32_t drives_size, drives, configuration_table, loader_name;
};
struct Multiboot1Module {
    uint32_t base, end, arguments, reserved;
};
struct [[gnu::packed]] Multiboot1Range {
    uint32_t size_of_rest;
    uint64_t base, size;
    uint32_t type;
};

void read_multiboot1(uint32_t eax, uint32_t ebx) {
    CHECK_EQ(eax, Multiboot1Info::magic);
    const auto& info = *reinterpret_cast<const Multiboot1Info*>(ebx);
    constexpr uint32_t promised = Multiboot1Info::has_memory | Multiboot1Info::has_memory_map;
    CHECK_EQ(info.flags & promised, promised);
    CHECK((info.flags & Multiboot1Info::has_command_line) != 0);
    command_line = text_at(info.command_line);
    if ((info.flags & Multiboot1Info::has_loader_name) != 0)
        print("loader \"%s\"\n", text_at(info.loader_name));
    for (uint32_t at = info.memory_map; at < info.memory_map + info.memory_map_size;) {
        const auto& range = *reinterpret_cast<const Multiboot1Range*>(at);
        CHECK(range.size_of_rest >= sizeof(Multiboot1Range) - sizeof range.size_of_rest);
        add_range(range.base, range.size, range.type == 1);
        at += range.size_of_rest + sizeof range.size_of_rest;
    }
    CHECK(info.memory_lower >= 512 && info.memory_lower <= 640);
    CHECK(info.memory_upper / 1024 < number("memory=") && info.memory_upper / 1024 + 2 >= number("memory="));
    const auto* const module = reinterpret_cast<const Multiboot1Module*>(info.modules);
    for (uint32_t i = 0; (info.flags & Multiboot1Info::has_modules) != 0 && i < info.module_count; ++i)
        add_module(module[i].base, module[i].end, text_at(module[i].arguments));
}

// --- multiboot 2

struct Multiboot2Tag {
    static constexpr uint32_t magic = 0x36d7'6289;
    static constexpr uint32_t end = 0, command_line = 1, loader_name = 2, module = 3, memory = 4,
                              memory_map = 6, framebuffer = 8, rsdp1 = 14, rsdp2 = 15, load_base = 21;

    uint32_t type, size;

    template<class T>
    [[nodiscard]] const T& contents() const {
        CHECK(size >= sizeof *this + sizeof(T));
        return *reinterpret_cast<const T*>(this + 1);
    }
    [[nodiscard]] const char* text(unsigned offset) const {
        const char* const text = reinterpret_cast<const char*>(this + 1) + offset;
        CHECK(sizeof *this + offset + length(text) < size);
        return text;
    }
};
struct Multiboot2Map {
    uint32_t entry_size, version;
};
struct [[gnu::packed]] Multiboot2Range {
    uint64_t base, size;
    uint32_t type, reserved;
};
struct Multiboot2Module {
    uint32_t base, end;
};
struct Multiboot2Memory {
    uint32_t lower, upper;
};
struct [[gnu::packed]] Multiboot2Framebuffer {
    uint64_t address;
    uint32_t pitch, width, height;
    uint8_t depth, type;
};

void check_rsdp(const char* rsdp) {
    CHECK(equal(rsdp, "RSD PTR ", 8));
    uint8_t sum = 0;
    for (unsigned i = 0; i < 20; ++i)
        sum = static_cast<uint8_t>(sum + static_cast<uint8_t>(rsdp[i]));
    CHECK_EQ(sum, 0);
}

void read_multiboot2_map(const Multiboot2Tag& tag) {
    const auto& map = tag.contents<Multiboot2Map>();
    CHECK(map.entry_size >= sizeof(Multiboot2Range) && map.entry_size % 8 == 0);
    const auto end = reinterpret_cast<uint32_t>(&tag) + tag.size;
    for (auto at = reinterpret_cast<uint32_t>(&map + 1); at + map.entry_size <= end; at += map.entry_size) {
        const auto& range = *reinterpret_cast<const Multiboot2Range*>(at);
        add_range(range.base, range.size, range.type == 1);
    }
}

void check_load_base(uint32_t base) {
    CHECK_EQ(base, reinterpret_cast<uint32_t>(image_begin) + load_offset);
    CHECK(!relocatable || (base >= 0x40'0000 && base <= 0x0ff'ffff && base % 0x1'0000 == 0));
}

void read_multiboot2(uint32_t eax, uint32_t ebx) {
    CHECK_EQ(eax, Multiboot2Tag::magic);
    CHECK_EQ(ebx % 8, 0);
    const uint32_t end = ebx + memory_at<uint32_t>(ebx);
    bool ended = false, has_memory = false, has_text_screen = false, has_load_base = false;
    Multiboot2Memory memory{};
    for (uint32_t at = ebx + 8; !ended; at = (at + 7) / 8 * 8) {
        CHECK(at + sizeof(Multiboot2Tag) <= end);
        const auto& tag = *reinterpret_cast<const Multiboot2Tag*>(at);
        CHECK(tag.size >= sizeof tag && tag.size <= end - at);
        at += tag.size;
        switch (tag.type) {
        case Multiboot2Tag::end:
            ended = true;
            break;
        case Multiboot2Tag::command_line:
            command_line = tag.text(0);
            break;
        case Multiboot2Tag::loader_name:
            print("loader \"%s\"\n", tag.text(0));
            break;
        case Multiboot2Tag::module: {
            const auto& module = tag.contents<Multiboot2Module>();
            add_module(module.base, module.end, tag.text(sizeof module));
            break;
        }
        case Multiboot2Tag::memory:
            memory = tag.contents<Multiboot2Memory>();
            has_memory = true;
            break;
        case Multiboot2Tag::memory_map:
            read_multiboot2_map(tag);
            break;
        case Multiboot2Tag::framebuffer: {
            const auto& screen = tag.contents<Multiboot2Framebuffer>();
            has_text_screen = screen.type == 2 && screen.address == 0xb'8000 && screen.pitch == 160 &&
                              screen.width == 80 && screen.height == 25;
            break;
        }
        case Multiboot2Tag::rsdp1:
        case Multiboot2Tag::rsdp2:
            check_rsdp(reinterpret_cast<const char*>(&tag + 1));
            break;
        case Multiboot2Tag::load_base:
            check_load_base(tag.contents<uint32_t>());
            has_load_base = true;
            break;
        default: // of no use here
            break;
        }
    }
    CHECK(has_memory);
    CHECK(memory.lower >= 512 && memory.lower <= 640);
    CHECK(memory.upper / 1024 < number("memory=") && memory.upper / 1024 + 2 >= number("memory="));
    CHECK(has_text_screen || !has_word("text-screen"));
    CHECK(has_load_base || !relocatable);
}

// --- PVH

struct PvhInfo {
    static constexpr uint32_t magic_number = 0x336e'c578;

    uint32_t magic, version, flags, module_count;
    uint64_t modules, command_line, rsdp, memory_map;
    uint32_t range_count, reserved;
};
struct PvhModule {
    uint64_t base, size, arguments, reserved;
};
struct PvhRange {
    uint64_t base, size;
    uint32_t type, reserved;
};

void read_pvh(uint32_t ebx) {
    const auto& info = *reinterpret_cast<const PvhInfo*>(ebx);
    CHECK_EQ(info.magic, PvhInfo::magic_number);
    CHECK(info.version >= 1); // the first with a memory map
    CHECK_EQ(entry_cr4, 0);
    command_line = text_at(info.command_line);
    const auto* const range = reinterpret_cast<const PvhRange*>(text_at(info.memory_map));
    for (uint32_t i = 0; i < info.range_count; ++i)
        add_range(range[i].base, range[i].size, range[i].type == 1);
    if (info.rsdp != 0)
        check_rsdp(text_at(info.rsdp));
    for (uint32_t i = 0; i < info.module_count; ++i) {
        const auto& module = reinterpret_cast<const PvhModule*>(text_at(info.modules))[i];
        add_module(static_cast<uint32_t>(module.base), static_cast<uint32_t>(module.base + module.size),
                   module.arguments == 0 ? nullptr : text_at(module.arguments));
    }
}

// --- umbra's own: Linux's "zero page" (Documentation/arch/x86/zero-page.rst) in ESI

struct [[gnu::packed]] BootParamsRange {
    uint64_t base, size;
    uint32_t type;
};

void read_boot_params(uint32_t esi) {
    constexpr unsigned range_count_offset = 0x1e8, initrd_offset = 0x218, initrd_size_offset = 0x21c,
                       command_line_offset = 0x228, ranges_offset = 0x2d0;
    command_line = text_at(memory_at<uint32_t>(esi + command_line_offset));
    const auto* const range = reinterpret_cast<const BootParamsRange*>(esi + ranges_offset);
    for (unsigned i = 0; i < memory_at<uint8_t>(esi + range_count_offset); ++i)
        add_range(range[i].base, range[i].size, range[i].type == 1);
    const uint32_t initrd = memory_at<uint32_t>(esi + initrd_offset);
    if (initrd != 0)
        add_module(initrd, initrd + memory_at<uint32_t>(esi + initrd_size_offset), nullptr);
}

// --- what is promised by all of them

bool in_ram(uint64_t base, uint64_t size) {
    for (unsigned i = 0; i < range_count; ++i)
        if (ranges[i].ram && base >= ranges[i].base && base + size <= ranges[i].base + ranges[i].size)
            return true;
    return false;
}

bool overlap(uint64_t base, uint64_t size, uint64_t other, uint64_t other_size) {
    return base < other + other_size && other < base + size;
}

uint64_t image_size() {
    return static_cast<uint64_t>(memory_end - image_begin);
}

void check_memory() {
    CHECK(range_count > 0);
    uint64_t ram = 0;
    for (unsigned i = 0; i < range_count; ++i) {
        print("memory 0x%x-0x%x %s\n", ranges[i].base, ranges[i].base + ranges[i].size,
              ranges[i].ram ? "RAM" : "reserved");
        CHECK(ranges[i].size > 0);
        ram += ranges[i].ram ? ranges[i].size : 0;
        for (unsigned other = 0; other < i; ++other)
            CHECK(!overlap(ranges[i].base, ranges[i].size, ranges[other].base, ranges[other].size));
    }
    const uint64_t memory = uint64_t{number("memory=")} << 20;
    constexpr uint64_t most_taken = 1 << 20; // by the legacy areas and what the machine keeps for itself
    CHECK(ram <= memory && ram + most_taken >= memory);
    CHECK(in_ram(reinterpret_cast<uint32_t>(image_begin), image_size()));
    CHECK(in_ram(reinterpret_cast<uint32_t>(image_begin) + load_offset, image_size()));
}

constexpr char module_text[] = "What a module holds. ";

void check_modules(bool at_pages) {
    CHECK_EQ(module_count, number("modules="));
    for (unsigned i = 0; i < module_count; ++i) {
        const Module& module = modules[i];
        print("module at 0x%x, %u bytes, \"%s\"\n", module.base, module.size,
              module.arguments == nullptr ? "" : module.arguments);
        CHECK(in_ram(module.base, module.size));
        CHECK(!overlap(module.base, module.size, reinterpret_cast<uint32_t>(image_begin), image_size()));
        CHECK(!at_pages || module.base % 4096 == 0);
        for (unsigned other = 0; other < i; ++other)
            CHECK(!overlap(module.base, module.size, modules[other].base, modules[other].size));
        if (module.arguments != nullptr)
            CHECK(ends_with(module.arguments, i == 0 ? "first module" : "second module"));
        constexpr unsigned text_length = sizeof module_text - 1;
        const unsigned size = i == 0 ? 500 * text_length : text_length;
        CHECK_EQ(module.size, has_word("empty-modules") ? 0 : size);
        for (unsigned byte = 0; byte < module.size; ++byte)
            CHECK_EQ(memory_at<uint8_t>(module.base + byte),
                     static_cast<uint8_t>(module_text[byte % text_length]));
    }
}

/// All segments reach all of the first 4 GB: their bases are 0, and their limits let the last bytes be read.
void check_segments() {
    static volatile uint32_t variable;
    uint32_t value = 0;
#define CHECK_SEGMENT(segment)                                                                               \
    do {                                                                                                     \
        variable = variable + 0x1234'5601;                                                                   \
        asm volatile("movl %%" segment ":(%1), %0" : "=r"(value) : "r"(&variable) : "memory");               \
        CHECK_EQ(value, variable);                                                                           \
        asm volatile("movl %%" segment ":0xfffffffc, %0" : "=r"(value) : : "memory");                        \
    } while (false)
    CHECK_SEGMENT("cs");
    CHECK_SEGMENT("ds");
    CHECK_SEGMENT("es");
    CHECK_SEGMENT("fs");
    CHECK_SEGMENT("gs");
    CHECK_SEGMENT("ss");
#undef CHECK_SEGMENT
    asm volatile("movl %1, %%es:(%2)\n movl %%ds:(%2), %0" // and data segments can be written
                 : "=&r"(value)
                 : "r"(0x7654'3210), "r"(&variable)
                 : "memory");
    CHECK_EQ(value, 0x7654'3210);
}

void check_state() {
    CHECK_EQ(entry_cr0 & (cr0_pg | cr0_pe), cr0_pe);
    CHECK_EQ(entry_flags & eflags_vm, 0);
    if (!has_word("inexact-flags"))
        CHECK_EQ(entry_flags & eflags_if, 0);
    // A20 is open: 1 MB is not 0.
    const uint32_t low = memory_at<uint32_t>(0);
    auto& high = memory_at<uint32_t>(0x10'0000);
    const uint32_t before = high;
    high = ~low;
    CHECK_EQ(memory_at<uint32_t>(0), low);
    high = before;
    static volatile uint8_t cleared[8192];
    for (const volatile uint8_t& byte : cleared)
        CHECK_EQ(byte, 0);
    check_segments();
}

} // namespace

extern "C" int kernel_main(uint32_t eax, uint32_t information) {
    switch (protocol) {
    case Protocol::multiboot1:
        read_multiboot1(eax, information);
        break;
    case Protocol::multiboot2:
        read_multiboot2(eax, information);
        break;
    case Protocol::pvh:
        read_pvh(information);
        break;
    case Protocol::umbra:
        read_boot_params(information);
        break;
    }
    print("command line \"%s\"\n", command_line);
    check_state();
    check_memory();
    check_modules(protocol != Protocol::pvh);
    print("%s: passed\n", LEGACY_NAME);
    return 0;
}
