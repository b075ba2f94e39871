// What the loader hands to a guest kernel: command line and memory map. The layout is Linux's "zero page"
// (Documentation/arch/x86/boot.rst and zero-page.rst), of which only the fields that guests use are named
// here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace umbra::guest {

struct [[gnu::packed]] MemoryRange {
    static constexpr std::uint32_t ram = 1;

    std::uint64_t base; ///< guest-physical, bytes
    std::uint64_t size; ///< bytes
    std::uint32_t type; ///< `ram`, or anything else for memory to leave alone
};

struct [[gnu::packed]] BootParams {
    std::uint8_t before_e820_entries[0x1e8];
    std::uint8_t e820_entries;
    std::uint8_t before_ramdisk[0x218 - 0x1e9];
    std::uint32_t ramdisk_image; ///< guest-physical, 0 if there is none
    std::uint32_t ramdisk_size;  ///< bytes
    std::uint8_t before_cmd_line[0x228 - 0x220];
    std::uint32_t cmd_line_ptr; ///< guest-physical, NUL-terminated
    std::uint8_t before_e820[0x2d0 - 0x22c];
    MemoryRange e820[128];

    [[nodiscard]] const char* command_line() const;
    /// True if `name` is a word of the command line.
    ///
    /// Guests that look closely know two words about the CPU. "qemu": it is QEMU's software emulation
    /// (version 7.2); "qemu-host": it is a hypervisor's, but what is not privileged runs on QEMU's. Checks
    /// that QEMU is known to fail are then left out; each is marked where it stands.
    [[nodiscard]] bool has_option(const char* name) const;
    /// The number of a word NAME=NUMBER of the command line.
    [[nodiscard]] std::uint64_t number(const char* name, std::uint64_t otherwise) const;
    /// Bytes of RAM in the whole map.
    [[nodiscard]] std::uint64_t ram_size() const;
    /// The end of the RAM that begins at 1 MB, where the kernel is.
    [[nodiscard]] std::uint64_t ram_end() const;
};
static_assert(offsetof(BootParams, e820_entries) == 0x1e8 && offsetof(BootParams, ramdisk_image) == 0x218 &&
              offsetof(BootParams, cmd_line_ptr) == 0x228 && offsetof(BootParams, e820) == 0x2d0);

} // namespace umbra::guest

/// Every guest kernel defines this. What it returns becomes the guest's exit code: 0 is success.
extern "C" int kernel_main(const umbra::guest::BootParams& boot);
