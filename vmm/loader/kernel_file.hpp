// What a kernel file offers: the boot protocols that it can be started by, and what its headers say, as data.
//
// Nothing is loaded here and nothing refers to guest memory: whether a kernel fits is up to its loader. Files
// are untrusted; a header that is found but damaged is not offered, and told as a problem instead.
#pragma once

#include "shadow/address.hpp"
#include "vmm/loader/compressed.hpp"

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <asm/bootparam.h>

namespace umbra {

/// How a kernel is started. In the order of automatic choice: Linux by its own protocol, which for Linux is
/// the only one that tells it everything; then PVH, whose kernels know that they are in a virtual machine
/// without a BIOS, while some of those that multiboot starts, such as Xen, go back to real mode to call one;
/// then multiboot 1 and 2; then what umbra's own guests are, ELF files entered at e_entry; then what any file
/// is, bytes that are entered in 64-bit mode (flat) or 32-bit protected mode (flat32).
enum class KernelProtocol { linux64, linux32, pvh, multiboot1, multiboot2, elf64, elf32, flat, flat32 };

inline constexpr std::array kernel_protocols{
    KernelProtocol::linux64,    KernelProtocol::linux32,    KernelProtocol::pvh,
    KernelProtocol::multiboot1, KernelProtocol::multiboot2, KernelProtocol::elf64,
    KernelProtocol::elf32,      KernelProtocol::flat,       KernelProtocol::flat32};

/// As users write it: "linux", "linux32", "pvh", "multiboot1", "multiboot2", "elf64", "elf32", "flat",
/// "flat32".
[[nodiscard]] std::string_view name(KernelProtocol protocol);
[[nodiscard]] std::optional<KernelProtocol> kernel_protocol(std::string_view name);

// --- ELF (System V ABI, "Object Files")

struct ElfSegment {
    std::uint32_t type = 0;  ///< PT_*
    std::uint32_t flags = 0; ///< PF_*
    std::uint64_t offset = 0;
    GuestVirt virtual_address;
    GuestPhys physical_address;
    std::uint64_t file_size = 0;   ///< bytes; of a PT_LOAD they lie in the file
    std::uint64_t memory_size = 0; ///< bytes; of a PT_LOAD at least file_size
};

struct ElfSection {
    std::string name;        ///< at most 64 bytes of it
    std::uint32_t type = 0;  ///< SHT_*
    std::uint64_t flags = 0; ///< SHF_*
    GuestVirt address;
    std::uint64_t offset = 0;
    std::uint64_t size = 0; ///< bytes
};

struct ElfNote {
    std::string_view name; ///< without its NUL
    std::uint32_t type = 0;
    std::span<const std::byte> contents;
};

struct ElfFile {
    bool is_64_bit = false;
    std::uint16_t type = 0;    ///< ET_*
    std::uint16_t machine = 0; ///< EM_*
    std::uint64_t entry = 0;   ///< e_entry: virtual or physical, as the protocol says
    std::vector<ElfSegment> segments;
    std::vector<ElfSection> sections; ///< empty if the section headers are damaged: no loader needs them
    std::span<const std::byte> section_headers; ///< all of them as they are; empty if `sections` is
    std::uint32_t section_of_names = 0;         ///< e_shstrndx
    std::vector<ElfNote> notes; ///< of all PT_NOTE segments; without such a segment, of SHT_NOTE sections
    std::uint64_t end =
        0; ///< the first byte behind all that the headers tell of; Linux puts relocations there
};

// --- multiboot

/// Where a kernel that is loaded without regard to its format wants to be: the "a.out kludge" of multiboot 1
/// (3.1.3) and the address and entry tags of multiboot 2 (3.1.5, 3.1.6).
struct MultibootPlacement {
    std::uint64_t file_offset = 0; ///< of what is loaded
    std::uint64_t file_size = 0;   ///< bytes; they lie in the file
    GuestPhys load;
    GuestPhys bss_end; ///< load + file_size or above: to be zeroed up to here
    GuestPhys entry;   ///< in what is loaded
};

/// Multiboot Specification version 0.6.96, 3.1 "OS image format".
struct MultibootHeader {
    static constexpr std::uint32_t magic = 0x1badb002;
    static constexpr std::uint32_t page_aligned_modules = 1 << 0, wants_memory_map = 1 << 1,
                                   wants_video = 1 << 2, has_addresses = 1 << 16;

    std::uint64_t offset = 0;
    std::uint32_t flags = 0;
    std::optional<MultibootPlacement> placement; ///< otherwise the file is an ELF
    struct Video {
        std::uint32_t mode_type = 0;                    ///< 0 linear graphics, 1 text
        std::uint32_t width = 0, height = 0, depth = 0; ///< 0: no preference
    };
    std::optional<Video> video;
};

/// Multiboot2 Specification version 2.0, 3.1 "OS image format".
struct Multiboot2Header {
    static constexpr std::uint32_t magic = 0xe85250d6;

    std::uint64_t offset = 0;
    std::uint32_t architecture = 0; ///< 0: 32-bit protected mode of i386
    std::uint32_t length = 0;       ///< bytes
    struct Tag {
        std::uint16_t type = 0;
        bool optional = false;
        std::uint32_t size = 0; ///< bytes with this tag's own header
    };
    std::vector<Tag> tags; ///< all but the terminating one, in the file's order
    /// Information tags that are asked for; the second: their absence is no failure.
    struct Request {
        std::uint32_t type = 0;
        bool optional = false;
    };
    std::vector<Request> requests;
    std::optional<MultibootPlacement> placement; ///< otherwise the file is an ELF
    std::optional<GuestPhys> entry;              ///< of the entry address tag, instead of the ELF's
    std::optional<std::uint32_t>
        console_flags; ///< bit 0: a console is required; bit 1: text is known to the kernel
    struct Framebuffer {
        std::uint32_t width = 0, height = 0, depth = 0; ///< 0: no preference
        bool optional = false;
    };
    std::optional<Framebuffer> framebuffer;
    bool page_aligned_modules = false;
    struct Relocation {
        GuestPhys lowest, highest;    ///< of the image's first and last byte
        std::uint32_t alignment = 0;  ///< bytes, a power of two
        std::uint32_t preference = 0; ///< 0 none, 1 lowest, 2 highest
    };
    std::optional<Relocation> relocation;
};

// --- Linux

struct LinuxImage {
    bool is_bzimage = false; ///< otherwise a vmlinux: an ELF entered at e_entry in 64-bit mode
    bool has_64_bit_entry = false;
    /// The rest is of a bzImage (Documentation/arch/x86/boot.rst).
    setup_header header{};
    std::string version;                ///< "6.1.0-13-amd64 ..."; empty if the file does not say; printable
    std::uint64_t code_offset = 0;      ///< of the protected-mode code in the file
    std::uint64_t code_size = 0;        ///< bytes; they lie in the file
    std::span<const std::byte> payload; ///< the compressed vmlinux; empty if the header does not tell
    Compression compression{};          ///< of the payload
};

// --- all of it

struct KernelFile {
    std::uint64_t size = 0; ///< bytes
    std::optional<LinuxImage> linux_image;
    std::optional<ElfFile> elf;
    std::optional<MultibootHeader> multiboot1;
    std::optional<Multiboot2Header> multiboot2;
    std::optional<GuestPhys>
        pvh_entry; ///< ELF note 18 of "Xen": 32-bit protected mode (Xen, public/elfnote.h)

    /// Why the file is not offered by a protocol that it seems to be made for; without protocol: something
    /// that no loader needs is damaged. One line.
    struct Problem {
        std::optional<KernelProtocol> protocol;
        std::string what;
    };
    std::vector<Problem> problems;

    /// The Linux kernel itself: other programs borrow the boot protocol of its bzImage, without a payload.
    [[nodiscard]] bool is_linux() const {
        return linux_image && (!linux_image->is_bzimage || !linux_image->payload.empty());
    }
    /// In the order of automatic choice; `flat` and `flat32` are always the last.
    [[nodiscard]] std::vector<KernelProtocol> protocols() const;
    [[nodiscard]] bool offers(KernelProtocol protocol) const;
    /// The first problem of this protocol, for a message; empty if there is none.
    [[nodiscard]] std::string_view problem(KernelProtocol protocol) const;
};

/// Reads a file that is not compressed, or has been unpacked. Views and spans in the result point into
/// `file`. Throws nothing on damage.
[[nodiscard]] KernelFile read_kernel_file(std::span<const std::byte> file);

/// The text of `umbra inspect`: size and compression, protocols and what is wrong with others, headers, the
/// ELF's entry, segments, sections and notes, and all this of the kernel in a bzImage. Several lines of plain
/// ASCII, each ended by a newline; unpacks what is compressed. Throws StartupError(bad_usage) if the file
/// itself is compressed and cannot be unpacked.
[[nodiscard]] std::string inspect_kernel_file(std::span<const std::byte> file);

} // namespace umbra
