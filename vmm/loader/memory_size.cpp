// Parsing of memory sizes and the split of RAM around the PC's device windows.
#include "vmm/loader/memory_size.hpp"

#include "vmm/loader/reject.hpp"

#include <algorithm>
#include <charconv>
#include <optional>
#include <system_error>

namespace umbra {

namespace {

/// The binary exponent of a size suffix; nothing if it is none.
std::optional<unsigned> suffix_shift(std::string_view suffix) {
    if (suffix == "K" || suffix == "k")
        return 10;
    if (suffix.empty() || suffix == "M" || suffix == "m")
        return 20;
    if (suffix == "G" || suffix == "g")
        return 30;
    return std::nullopt;
}

} // namespace

std::uint64_t parse_memory_size(std::string_view text, std::uint64_t most) {
    std::uint64_t count = 0;
    const char* const end = text.data() + text.size();
    const auto [rest, error] = std::from_chars(text.data(), end, count);
    const auto shift = suffix_shift({rest, static_cast<std::size_t>(end - rest)});
    if (error == std::errc::invalid_argument || !shift)
        reject("bad memory size '{}': write a number with K, M or G, such as 64M", text);
    if (error == std::errc::result_out_of_range || count > most >> *shift)
        reject("memory size '{}' is too large: at most {} GiB", text, most >> 30);
    const std::uint64_t bytes = count << *shift;
    if (bytes < minimum_memory)
        reject("memory size '{}' is too small: at least {} MiB", text, minimum_memory >> 20);
    if (bytes % page_size != 0)
        reject("memory size '{}' is not a multiple of {} KiB", text, page_size >> 10);
    return bytes;
}

std::vector<RamRange> ram_ranges(std::uint64_t bytes) {
    const std::uint64_t low = std::min(bytes, low_memory_end.value());
    std::vector<RamRange> ranges{{GuestPhys{0}, low}};
    if (bytes > low)
        ranges.push_back({high_memory_base, bytes - low});
    return ranges;
}

} // namespace umbra
