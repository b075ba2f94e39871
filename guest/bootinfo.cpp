// bootinfo: prints what the loader hands over: command line, initial RAM disk and memory map. Proves that all
// of it arrives, and that it makes sense. Outcome: passed.
#include "guest/runtime/boot.hpp"
#include "guest/runtime/console.hpp"
#include "guest/runtime/process.hpp"

#include <cstdint>

using namespace umbra::guest;

namespace {

/// 64-bit FNV-1a.
std::uint64_t hash(const std::uint8_t* bytes, std::uint64_t size) {
    std::uint64_t value = 0xcbf2'9ce4'8422'2325;
    for (std::uint64_t i = 0; i < size; ++i)
        value = (value ^ bytes[i]) * 0x100'0000'01b3;
    return value;
}

bool in_ram(const BootParams& boot, std::uint64_t base, std::uint64_t size) {
    for (unsigned i = 0; i < boot.e820_entries; ++i) {
        const MemoryRange range = boot.e820[i];
        if (range.type == MemoryRange::ram && base >= range.base && base - range.base < range.size)
            return size <= range.size - (base - range.base);
    }
    return false;
}

void show_memory(const BootParams& boot) {
    std::uint64_t end = 0;
    CHECK(boot.e820_entries > 0);
    for (unsigned i = 0; i < boot.e820_entries; ++i) {
        const MemoryRange range = boot.e820[i];
        CHECK(range.base >= end && range.size > 0);
        end = range.base + range.size;
        print("memory %#lx-%#lx %s\n", range.base, end, range.type == MemoryRange::ram ? "RAM" : "reserved");
    }
}

} // namespace

extern "C" int kernel_main(const BootParams& boot) {
    print("command line \"%s\"\n", boot.command_line());
    show_memory(boot);
    const std::uint64_t disk = boot.ramdisk_image;
    if (disk == 0) {
        CHECK_EQ(boot.ramdisk_size, 0);
        print("no initrd\n");
    } else {
        CHECK(in_ram(boot, disk, boot.ramdisk_size));
        CHECK_EQ(disk % 4096, 0);
        print("initrd of %u bytes, hash %#lx\n", boot.ramdisk_size,
              hash(reinterpret_cast<const std::uint8_t*>(disk), boot.ramdisk_size));
    }
    print("bootinfo: passed\n");
    return 0;
}
