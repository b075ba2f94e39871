// Multiboot 2: relocation, and the boot information's tags (Multiboot2 Specification version 2.0, 3.6).
#include "vmm/loader/file_bytes.hpp"
#include "vmm/loader/protocols.hpp"
#include "vmm/loader/reject.hpp"

#include <algorithm>

namespace umbra {

namespace {

enum class InfoTag : std::uint32_t {
    end = 0,
    command_line = 1,
    boot_loader_name = 2,
    module = 3,
    basic_memory = 4,
    memory_map = 6,
    framebuffer = 8,
    elf_sections = 9,
    acpi_old_rsdp = 14,
    acpi_new_rsdp = 15,
    load_base = 21,
};

/// The tags, one after the other; all their numbers are little-endian.
class Tags {
  public:
    /// Contents are added until the next begin().
    void begin(InfoTag type) {
        finish();
        start_ = bytes_.size();
        add(static_cast<std::uint32_t>(type));
        add(std::uint32_t{0}); // the size, once it is known
    }
    template<class T>
    void add(T number) {
        add_bytes(std::as_bytes(std::span(&number, 1)));
    }
    void add_bytes(std::span<const std::byte> bytes) {
        bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
    }
    void add_text(std::string_view text) {
        add_bytes(std::as_bytes(std::span(text)));
        add('\0');
    }
    [[nodiscard]] std::vector<std::byte> take() {
        begin(InfoTag::end);
        finish();
        set(0, bytes_.size());
        return std::move(bytes_);
    }

  private:
    void set(std::size_t at, std::size_t size) {
        const auto word = static_cast<std::uint32_t>(size);
        std::memcpy(bytes_.data() + at, &word, sizeof word);
    }
    void finish() {
        constexpr std::size_t alignment = 8, size_offset = 4;
        if (start_ != 0)
            set(start_ + size_offset, bytes_.size() - start_);
        bytes_.resize((bytes_.size() + alignment - 1) / alignment * alignment);
    }

    std::vector<std::byte> bytes_ = std::vector<std::byte>(8); ///< total size, reserved
    std::size_t start_ = 0;                                    ///< of the tag that is open
};

/// A request that is not for an option must be for a tag that is known. Those of things that a machine does
/// not have (EFI, APM, a network) are left out of the information all the same, as GRUB does it.
void check_requests(const Multiboot2Header& header) {
    constexpr auto last_known = static_cast<std::uint32_t>(InfoTag::load_base);
    for (const Multiboot2Header::Request& request : header.requests) {
        if (!request.optional && request.type > last_known)
            reject("not supported: the multiboot2 header requires information of the unknown type {}",
                   request.type);
    }
}

/// Moves a relocatable kernel to where it wants to be; without preference, where it was linked to if it can
/// lie there. Returns by how much, modulo 2^64.
std::uint64_t relocate(KernelParts& parts, const Multiboot2Header::Relocation& wish, const MemoryPlan& plan) {
    const GuestPhys linked = begin_of(parts);
    const std::uint64_t size = end_of(parts) - linked;
    const PlacementWindow window{std::max(wish.lowest, first_placed_byte), wish.highest + 1, wish.alignment};
    const bool fits = linked >= wish.lowest && linked + (size - 1) <= wish.highest &&
                      linked.value() % wish.alignment == 0 && plan.is_free(linked, size);
    constexpr std::uint32_t highest = 2;
    std::optional<GuestPhys> base = linked;
    if (wish.preference == highest)
        base = plan.highest(size, window);
    else if (wish.preference != 0 || !fits)
        base = plan.lowest(size, window);
    if (!base)
        reject("the kernel of {:#x} bytes does not fit into guest memory between {} and {}, to where it can "
               "be relocated",
               size, wish.lowest, wish.highest);
    for (KernelPart& part : parts)
        part.start = *base + (part.start - linked);
    return *base - linked;
}

void add_memory(const MemoryPlan& plan, Tags& tags) {
    const BasicMemory basic = basic_memory(plan);
    tags.begin(InfoTag::basic_memory);
    tags.add(basic.lower);
    tags.add(basic.upper);

    constexpr std::uint32_t entry_size = 24, entry_version = 0;
    tags.begin(InfoTag::memory_map);
    tags.add(entry_size);
    tags.add(entry_version);
    for (const boot_e820_entry& range : plan.memory_map()) {
        tags.add(std::uint64_t{range.addr});
        tags.add(std::uint64_t{range.size});
        tags.add(std::uint32_t{range.type});
        tags.add(std::uint32_t{0});
    }
}

/// A text screen is what the machine has, whatever was wished for.
void add_screen(Tags& tags) {
    tags.begin(InfoTag::framebuffer);
    tags.add(text_screen.address.value());
    tags.add(text_screen.pitch);
    tags.add(text_screen.columns);
    tags.add(text_screen.lines);
    tags.add(text_screen.bits);
    tags.add(multiboot_ega_text);
    tags.add(std::uint16_t{0});
}

/// Copies of the ACPI root pointer: that of ACPI 1.0, and all of it.
void add_acpi(const GuestMemory& memory, GuestPhys rsdp, Tags& tags) {
    constexpr std::uint64_t old_size = 20, length_at = 20;
    tags.begin(InfoTag::acpi_old_rsdp);
    tags.add_bytes(memory.range(rsdp, old_size));
    tags.begin(InfoTag::acpi_new_rsdp);
    tags.add_bytes(memory.range(rsdp, memory.read<std::uint32_t>(rsdp + length_at).value_or(0)));
}

void add_sections(const LoadContext& context, GuestPhys kernel_end, Tags& tags) {
    if (!context.kernel.elf || context.kernel.elf->section_headers.empty())
        return;
    const SectionTable table = load_sections(*context.kernel.elf, context.file, context.plan, kernel_end);
    // The specification's text has 16-bit numbers here; its own header file, GRUB and kernels have these.
    tags.begin(InfoTag::elf_sections);
    tags.add(table.count);
    tags.add(table.entry_size);
    tags.add(table.names_index);
    tags.add_bytes(table.headers);
}

std::uint32_t word(GuestPhys address) {
    return static_cast<std::uint32_t>(address.value());
}

GuestPhys linked_entry(const KernelFile& kernel, const KernelParts& parts) {
    const Multiboot2Header& header = *kernel.multiboot2;
    if (header.placement)
        return header.placement->entry;
    return header.entry ? *header.entry : translated_entry(parts, kernel.elf->entry);
}

} // namespace

LoadedKernel load_multiboot2(const LoadContext& context) {
    const Multiboot2Header& header = *context.kernel.multiboot2;
    check_requests(header);
    KernelParts parts = header.placement ? parts_of(*header.placement, context.file)
                                         : parts_of(*context.kernel.elf, context.file);
    GuestPhys entry = linked_entry(context.kernel, parts);
    check_entry(parts, entry);
    if (header.relocation)
        entry += relocate(parts, *header.relocation, context.plan);
    const PlacedKernel placed = place_kernel(parts, context.plan);

    Tags tags;
    tags.begin(InfoTag::command_line);
    tags.add_text(context.request.command_line);
    tags.begin(InfoTag::boot_loader_name);
    tags.add_text(boot_loader_name);
    for (const PlacedModule& module : place_modules(context, placed.end)) {
        tags.begin(InfoTag::module);
        tags.add(word(module.begin));
        tags.add(word(module.end));
        tags.add_text(module.arguments);
    }
    add_memory(context.plan, tags);
    add_screen(tags);
    if (!header.placement)
        add_sections(context, placed.end, tags);
    add_acpi(context.plan.memory(), placed.rsdp, tags);
    if (header.relocation) {
        tags.begin(InfoTag::load_base);
        tags.add(word(begin_of(parts)));
    }

    constexpr std::uint32_t magic = 0x36d7'6289;
    LoadedKernel kernel = start_in_protected_mode(context, entry);
    kernel.rax = magic;
    kernel.rbx = store_objects(context.plan, tags.take()).value();
    return kernel;
}

} // namespace umbra
