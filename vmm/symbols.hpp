// Names of a guest kernel's functions, for reports.
#pragma once

#include "shadow/address.hpp"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace umbra {

/// The functions in the .symtab of an ELF file, by address. Their addresses are those that the kernel was
/// linked for.
class Symbols {
  public:
    /// Where an address lies: `name` is as in the file (C++ names are mangled); valid as long as the Symbols.
    struct Place {
        std::string_view name;
        std::uint64_t offset = 0; ///< from the function's first byte
    };

    Symbols() = default;
    /// Function symbols of a 64-bit ELF, and labels in code that no function covers (assembly without .type).
    /// A file that is not ELF, has no symbols, or whose tables are damaged gives none: a kernel runs as well
    /// without. Takes memory in proportion to the file.
    [[nodiscard]] static Symbols from_elf(std::span<const std::byte> file);

    [[nodiscard]] std::size_t size() const { return functions_.size(); }
    /// The function that `at` is in. A function whose size the file does not tell reaches to the next one, or
    /// to the end of its section.
    [[nodiscard]] std::optional<Place> find(GuestVirt at) const;
    /// Where the function of this name lies: as in the file, or readable.
    struct Extent {
        GuestVirt start;
        std::uint64_t size = 0; ///< bytes
    };
    [[nodiscard]] std::optional<Extent> function(std::string_view name) const;
    /// "main+0x12"; empty if unknown. C++ names are readable, without parameters; long names are cut.
    [[nodiscard]] std::string name(GuestVirt at) const;

  private:
    struct Function {
        GuestVirt start;
        std::uint64_t size = 0;
        std::uint32_t name = 0; ///< offset in strings_
    };

    std::vector<Function> functions_; ///< sorted by start, which are all different
    std::string strings_;             ///< the ELF string table: names end with a NUL
};

/// Where the section of this name lies, if the file is ELF and has it with code in it.
[[nodiscard]] std::optional<Symbols::Extent> elf_code_section(std::span<const std::byte> file,
                                                              std::string_view name);

} // namespace umbra
