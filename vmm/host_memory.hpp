// Memory of this process that a machine uses as its own.
#pragma once

#include <array>
#include <cstddef>
#include <span>
#include <utility>

namespace umbra {

/// A mapping that no file lies behind: address space at once, pages as they are touched.
class HostMemory {
  public:
    enum class Pages : bool { small, huge };

    HostMemory() = default;
    /// `size` is a multiple of 2 MB where huge pages are wanted, of 4 KB otherwise. StartupError(host_cannot)
    /// names `what` if the address space is not to be had.
    HostMemory(std::size_t size, Pages pages, const char* what);
    /// The same memory of small pages at two addresses, as views of different rights.
    [[nodiscard]] static std::array<HostMemory, 2> twice(std::size_t size, const char* what);
    HostMemory(HostMemory&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}
    HostMemory& operator=(HostMemory&& other) noexcept {
        std::swap(bytes_, other.bytes_);
        return *this;
    }
    HostMemory(const HostMemory&) = delete;
    HostMemory& operator=(const HostMemory&) = delete;
    ~HostMemory();

    /// Zeroed at first; 2 MB aligned.
    [[nodiscard]] std::span<std::byte> bytes() const { return bytes_; }

  private:
    explicit HostMemory(std::span<std::byte> bytes) : bytes_(bytes) {}

    std::span<std::byte> bytes_;
};

} // namespace umbra
