#include "vmm/symbols.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>

#include <cxxabi.h>
#include <elf.h>
#include <fmt/core.h>

namespace umbra {
namespace {

/// The part of the file that a section occupies; empty if it does not lie in the file.
std::span<const std::byte> contents(std::span<const std::byte> file, std::uint64_t offset,
                                    std::uint64_t size) {
    if (offset > file.size() || size > file.size() - offset)
        return {};
    return file.subspan(offset, size);
}

/// A copy of the whole objects in `bytes`.
template<class T>
std::vector<T> table_of(std::span<const std::byte> bytes) {
    std::vector<T> table(bytes.size() / sizeof(T));
    const auto whole = bytes.first(table.size() * sizeof(T));
    std::ranges::copy(whole, std::as_writable_bytes(std::span(table)).begin());
    return table;
}

std::vector<Elf64_Shdr> section_headers(std::span<const std::byte> file) {
    Elf64_Ehdr header{};
    if (file.size() < sizeof header)
        return {};
    std::memcpy(&header, file.data(), sizeof header);
    if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 || header.e_ident[EI_CLASS] != ELFCLASS64 ||
        header.e_ident[EI_DATA] != ELFDATA2LSB || header.e_shentsize != sizeof(Elf64_Shdr))
        return {};
    return table_of<Elf64_Shdr>(
        contents(file, header.e_shoff, std::uint64_t{header.e_shnum} * sizeof(Elf64_Shdr)));
}

/// A symbol while the table is made.
struct Candidate {
    GuestVirt start;
    std::uint64_t size = 0;  ///< 0: unknown
    std::uint64_t limit = 0; ///< to the end of its section
    std::uint32_t name = 0;
    bool label = false; ///< not said to be a function
    bool local = false;
};

std::optional<Candidate> candidate(const Elf64_Sym& symbol, const std::vector<Elf64_Shdr>& sections,
                                   std::string_view strings) {
    const unsigned type = ELF64_ST_TYPE(symbol.st_info);
    if ((type != STT_FUNC && type != STT_NOTYPE) || symbol.st_shndx >= sections.size())
        return std::nullopt;
    const Elf64_Shdr& section = sections[symbol.st_shndx];
    const std::uint64_t offset = symbol.st_value - section.sh_addr; // wraps when below: then beyond the size
    if ((section.sh_flags & SHF_EXECINSTR) == 0 || offset >= section.sh_size)
        return std::nullopt;
    if (symbol.st_name >= strings.size() || strings[symbol.st_name] == '\0')
        return std::nullopt;
    return Candidate{GuestVirt(symbol.st_value), symbol.st_size,
                     section.sh_size - offset,   symbol.st_name,
                     type == STT_NOTYPE,         ELF64_ST_BIND(symbol.st_info) == STB_LOCAL};
}

/// A C++ name as in the source, without its parameters; any other name as it is.
std::string readable(std::string_view name) {
    // A mangled name can stand for an exponentially longer one: the first bound keeps that harmless.
    constexpr std::size_t longest_mangled = 128;
    constexpr std::size_t longest = 48;
    std::string text(name.substr(0, longest_mangled + 1));
    if (name.starts_with("_Z") && name.size() <= longest_mangled) {
        const std::unique_ptr<char, decltype(&std::free)> demangled(
            abi::__cxa_demangle(text.c_str(), nullptr, nullptr, nullptr), &std::free);
        if (demangled)
            text = demangled.get();
        // The parameters are what the last parenthesis closes.
        std::size_t depth = 0;
        for (std::size_t i = text.rfind(')') + 1; i-- > 0;) {
            depth += text[i] == ')' ? 1 : 0;
            if (text[i] == '(' && --depth == 0) {
                text.resize(i);
                break;
            }
        }
    }
    // What is printed on a terminal comes from a file that anyone may have made.
    std::ranges::replace_if(
        text, [](char c) { return c < ' ' || c > '~'; }, '?');
    if (text.size() > longest)
        text.replace(longest - 3, std::string::npos, "...");
    return text;
}

} // namespace

Symbols Symbols::from_elf(std::span<const std::byte> file) {
    const std::vector<Elf64_Shdr> sections = section_headers(file);
    const auto section = std::ranges::find(sections, Elf64_Word{SHT_SYMTAB}, &Elf64_Shdr::sh_type);
    if (section == sections.end() || section->sh_entsize != sizeof(Elf64_Sym) ||
        section->sh_link >= sections.size())
        return {};

    Symbols symbols;
    const Elf64_Shdr& names = sections[section->sh_link];
    const auto strings = contents(file, names.sh_offset, names.sh_size);
    if (strings.empty() || strings.back() != std::byte{0}) // or else the last name would have no end
        return {};
    symbols.strings_.assign(reinterpret_cast<const char*>(strings.data()), strings.size());

    std::vector<Candidate> candidates;
    for (const Elf64_Sym& symbol :
         table_of<Elf64_Sym>(contents(file, section->sh_offset, section->sh_size))) {
        if (const auto found = candidate(symbol, sections, symbols.strings_))
            candidates.push_back(*found);
    }
    // The best name for an address first: a function, of known size, global, and the first in the file.
    std::ranges::stable_sort(candidates, {}, [](const Candidate& c) {
        return std::tuple(c.start, c.label, c.size == 0, c.local);
    });
    for (auto next = candidates.begin(); next != candidates.end();) {
        const Candidate& best = *next;
        next = std::find_if(next, candidates.end(),
                            [&best](const Candidate& other) { return other.start != best.start; });
        if (best.label && !symbols.functions_.empty()) {
            const Function& before = symbols.functions_.back();
            if (best.start - before.start < before.size)
                continue;
        }
        const std::uint64_t reach =
            next == candidates.end() ? best.limit : std::min(best.limit, next->start - best.start);
        symbols.functions_.push_back({best.start, best.size != 0 ? best.size : reach, best.name});
    }
    return symbols;
}

std::optional<Symbols::Place> Symbols::find(GuestVirt at) const {
    const auto after = std::ranges::upper_bound(functions_, at, {}, &Function::start);
    if (after == functions_.begin())
        return std::nullopt;
    const Function& function = *std::prev(after);
    const std::uint64_t offset = at - function.start;
    if (offset >= function.size)
        return std::nullopt;
    return Place{strings_.data() + function.name, offset};
}

std::optional<Symbols::Extent> Symbols::function(std::string_view name) const {
    for (const Function& function : functions_) {
        const std::string_view raw = strings_.data() + function.name;
        if (raw == name || readable(raw) == name)
            return Extent{function.start, function.size};
    }
    return std::nullopt;
}

std::string Symbols::name(GuestVirt at) const {
    const auto place = find(at);
    return place ? fmt::format("{}+{:#x}", readable(place->name), place->offset) : std::string();
}

std::optional<Symbols::Extent> elf_code_section(std::span<const std::byte> file, std::string_view name) {
    const std::vector<Elf64_Shdr> sections = section_headers(file);
    Elf64_Ehdr header{};
    if (sections.empty() || file.size() < sizeof(header))
        return std::nullopt;
    std::memcpy(&header, file.data(), sizeof(header));
    if (header.e_shstrndx >= sections.size())
        return std::nullopt;
    const auto names =
        contents(file, sections[header.e_shstrndx].sh_offset, sections[header.e_shstrndx].sh_size);
    for (const Elf64_Shdr& section : sections) {
        if ((section.sh_flags & SHF_EXECINSTR) == 0 || section.sh_name >= names.size())
            continue;
        const auto rest = names.subspan(section.sh_name);
        const std::string_view text(reinterpret_cast<const char*>(rest.data()), rest.size());
        if (text.size() > name.size() && text.starts_with(name) && text[name.size()] == '\0')
            return Symbols::Extent{GuestVirt(section.sh_addr), section.sh_size};
    }
    return std::nullopt;
}

} // namespace umbra
