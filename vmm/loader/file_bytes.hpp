// Reading numbers and ranges out of a file whose every offset may be a lie. Internal to vmm/loader/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <type_traits>

#include <elf.h>

namespace umbra {

/// `size` bytes from `offset`; nothing unless all of them are in the file.
[[nodiscard]] inline std::optional<std::span<const std::byte>>
range_of(std::span<const std::byte> file, std::uint64_t offset, std::uint64_t size) {
    if (offset > file.size() || size > file.size() - offset)
        return std::nullopt;
    return file.subspan(offset, size);
}

/// The object at `offset`, which need not be aligned; nothing unless all of it is in the file.
template<class T>
[[nodiscard]] std::optional<T> read_object(std::span<const std::byte> file, std::uint64_t offset) {
    static_assert(std::is_trivially_copyable_v<T>);
    const auto bytes = range_of(file, offset, sizeof(T));
    if (!bytes)
        return std::nullopt;
    T object{};
    std::memcpy(&object, bytes->data(), sizeof object);
    return object;
}

[[nodiscard]] inline bool is_elf(std::span<const std::byte> file) {
    return file.size() >= SELFMAG && std::memcmp(file.data(), ELFMAG, SELFMAG) == 0;
}

} // namespace umbra
