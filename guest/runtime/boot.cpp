// Reading the boot parameters.
#include "guest/runtime/boot.hpp"

namespace umbra::guest {

const char* BootParams::command_line() const {
    return cmd_line_ptr == 0 ? "" : reinterpret_cast<const char*>(static_cast<std::uintptr_t>(cmd_line_ptr));
}

bool BootParams::has_option(const char* name) const {
    const char* at = command_line();
    while (*at != '\0') {
        const char* expected = name;
        while (*expected != '\0' && *at == *expected) {
            ++at;
            ++expected;
        }
        if (*expected == '\0' && (*at == ' ' || *at == '\0'))
            return true;
        while (*at != ' ' && *at != '\0')
            ++at;
        while (*at == ' ')
            ++at;
    }
    return false;
}

std::uint64_t BootParams::number(const char* name, std::uint64_t otherwise) const {
    for (const char* at = command_line(); *at != '\0';) {
        const char* expected = name;
        while (*expected != '\0' && *at == *expected) {
            ++at;
            ++expected;
        }
        if (*expected == '\0' && *at == '=') {
            std::uint64_t value = 0;
            for (++at; *at >= '0' && *at <= '9'; ++at)
                value = value * 10 + static_cast<std::uint64_t>(*at - '0');
            return value;
        }
        while (*at != ' ' && *at != '\0')
            ++at;
        while (*at == ' ')
            ++at;
    }
    return otherwise;
}

std::uint64_t BootParams::ram_size() const {
    std::uint64_t total = 0;
    for (unsigned i = 0; i < e820_entries; ++i)
        total += e820[i].type == MemoryRange::ram ? e820[i].size : 0;
    return total;
}

std::uint64_t BootParams::ram_end() const {
    constexpr std::uint64_t kernel_base = 0x10'0000;
    for (unsigned i = 0; i < e820_entries; ++i) {
        const MemoryRange range = e820[i];
        if (range.type == MemoryRange::ram && range.base <= kernel_base &&
            kernel_base - range.base < range.size)
            return range.base + range.size;
    }
    return 0;
}

} // namespace umbra::guest
