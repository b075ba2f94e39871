// Files that tests make: temporary ones, and kernels of a few instructions.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace umbra {

/// A new folder; it goes with this object.
class TemporaryFolder {
  public:
    TemporaryFolder();
    TemporaryFolder(const TemporaryFolder&) = delete;
    TemporaryFolder& operator=(const TemporaryFolder&) = delete;
    TemporaryFolder(TemporaryFolder&&) = delete;
    TemporaryFolder& operator=(TemporaryFolder&&) = delete;
    ~TemporaryFolder();

    /// The path of a file in it.
    [[nodiscard]] std::string file(std::string_view name) const { return path_ / name; }
    /// Writes one; returns its path.
    [[nodiscard]] std::string write(std::string_view name, std::string_view bytes) const;

  private:
    std::filesystem::path path_;
};

/// All of a file; empty if it cannot be read.
[[nodiscard]] std::string contents_of(const std::string& path);

/// A 64-bit ELF executable without symbols: `code`, loaded and entered at 1 MB.
[[nodiscard]] std::string elf_kernel(const std::vector<std::uint8_t>& code);

} // namespace umbra
