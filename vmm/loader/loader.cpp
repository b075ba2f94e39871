// Chooses the protocol, and places what several of them have: initrd, modules, boot data.
#include "vmm/loader/loader.hpp"

#include "vmm/loader/firmware.hpp"
#include "vmm/loader/memory_size.hpp"
#include "vmm/loader/protocols.hpp"
#include "vmm/loader/reject.hpp"
#include "vmm/loader/setup_header.hpp"

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <system_error>
#include <utility>

namespace umbra {

namespace {

bool is_flat(KernelProtocol protocol) {
    return protocol == KernelProtocol::flat || protocol == KernelProtocol::flat32;
}

// --- The choice of protocol

[[noreturn]] void reject_protocol(const KernelFile& kernel, KernelProtocol wanted) {
    std::string offered;
    for (const KernelProtocol protocol : kernel.protocols())
        offered += (offered.empty() ? "" : ", ") + std::string(name(protocol));
    // What is wrong with a bzImage is told once, of its first protocol.
    const std::string_view problem =
        kernel.problem(wanted == KernelProtocol::linux32 ? KernelProtocol::linux64 : wanted);
    reject("it cannot be loaded by the protocol {}{}{}; it offers {}", name(wanted),
           problem.empty() ? "" : ": ", problem, offered);
}

/// Nothing is known of the file but, perhaps, what is wrong with it: with its format first, from which the
/// rest follows.
[[noreturn]] void reject_unknown(const KernelFile& kernel) {
    for (const KernelProtocol protocol :
         {KernelProtocol::elf64, KernelProtocol::elf32, KernelProtocol::linux64, KernelProtocol::multiboot1,
          KernelProtocol::multiboot2, KernelProtocol::pvh}) {
        if (const std::string_view problem = kernel.problem(protocol); !problem.empty())
            reject("{}", problem);
    }
    reject("not a kernel: neither ELF, Linux bzImage nor multiboot; a flat binary needs a load address");
}

LoadedKernel load_by_protocol(const LoadContext& context) {
    switch (context.protocol) {
    case KernelProtocol::linux64:
    case KernelProtocol::linux32:
        return load_linux(context);
    case KernelProtocol::multiboot1:
        return load_multiboot1(context);
    case KernelProtocol::multiboot2:
        return load_multiboot2(context);
    case KernelProtocol::pvh:
        return load_pvh(context);
    case KernelProtocol::elf64:
    case KernelProtocol::elf32:
    case KernelProtocol::flat:
    case KernelProtocol::flat32:
        return load_plain(context);
    }
    __builtin_unreachable();
}

// --- Initrd and boot data

/// Copies the initrd as high as the kernel allows, where Linux expects it to be out of its way.
MemoryBlock place_initrd(const LoadContext& context, GuestPhys kernel_end, GuestPhys highest) {
    const auto initrd = context.request.initrd;
    if (initrd.empty())
        return {};
    const GuestPhys floor = (kernel_end + (page_size - 1)).page_base();
    const GuestPhys limit = std::min(highest, low_memory_end).page_base();
    const std::uint64_t space = (initrd.size() + page_size - 1) & ~(page_size - 1);
    if (floor > limit || space > limit - floor)
        reject("the initrd of {} bytes does not fit between the kernel's end {} and {}, the highest address "
               "that it may have",
               initrd.size(), kernel_end, limit);
    const auto base = context.plan.highest(space, {floor, limit});
    if (!base)
        reject("the initrd of {} bytes does not fit into guest memory: it needs at least {} MiB",
               initrd.size(), mebibytes_up_to(floor + space));
    context.plan.claim(*base, space, "the initrd");
    std::ranges::copy(initrd, context.plan.memory().range(*base, initrd.size()).begin());
    return {*base, initrd.size()};
}

/// At 0, where umbra's own guests are promised to find it, or above what kernels like to have there.
BootArea place_boot_area(MemoryPlan& plan) {
    constexpr std::uint64_t used = BootArea::size - BootArea::begin;
    BootArea area;
    if (!plan.is_free(area.base + BootArea::begin, used)) {
        const auto base = plan.lowest(BootArea::size, {area.end(), low_memory_end});
        if (!base)
            reject("the boot data of {:#x} bytes does not fit into guest memory beside the kernel",
                   BootArea::size);
        area.base = *base;
    }
    plan.claim(area.base + BootArea::begin, used, "the boot data");
    return area;
}

void write_gdt(const GuestMemory& memory, const LoadedKernel& kernel) {
    const auto entries = boot_gdt_entries(kernel.mode, kernel.code_selector);
    const auto bytes = std::as_bytes(std::span(entries));
    std::ranges::copy(bytes, memory.range(kernel.gdt, bytes.size()).begin());
}

[[noreturn]] void reject_file(const std::string& path, std::string_view what, const std::string& reason) {
    reject("cannot read {} '{}': {}", what, path, reason);
}

} // namespace

// --- For the loaders of single protocols

setup_header header_without_bzimage() {
    setup_header header{};
    header.boot_flag = boot_sector_magic;
    header.header = setup_header_magic;
    header.version = first_64_bit_version;
    header.loadflags = LOADED_HIGH;
    header.cmdline_size = static_cast<std::uint32_t>(command_line_limit);
    header.initrd_addr_max = static_cast<std::uint32_t>(low_memory_end.value() - 1);
    return header;
}

LoadedKernel finish_boot_data(const LoadContext& context, StartMode mode, const setup_header& header,
                              const PlacedKernel& placed, GuestPhys initrd_limit) {
    const std::string_view line = context.request.command_line;
    const std::uint64_t limit = std::min<std::uint64_t>(header.cmdline_size, command_line_limit);
    if (line.size() > limit)
        reject("the command line has {} bytes; this kernel takes at most {}", line.size(), limit);
    const BootArea area = place_boot_area(context.plan);
    const MemoryBlock initrd = place_initrd(context, placed.end, initrd_limit);
    write_boot_data(context.plan.memory(), area,
                    {.header = header,
                     .command_line = line,
                     .initrd = initrd,
                     .rsdp = placed.rsdp,
                     .memory_map = context.plan.memory_map()});
    LoadedKernel kernel;
    kernel.mode = mode;
    kernel.stack_top = area.stack_top();
    kernel.rsi = area.boot_params().value();
    kernel.page_table_root = area.page_tables();
    kernel.gdt = area.gdt();
    kernel.code_selector = linux_code_selector;
    write_gdt(context.plan.memory(), kernel);
    return kernel;
}

PlacedKernel place_kernel(const KernelParts& parts, MemoryPlan& plan) {
    load_parts(parts, plan);
    return {end_of(parts), place_firmware(plan)};
}

PlacementWindow info_window() {
    return {GuestPhys{0x10000}, low_memory_end, 16};
}

std::vector<PlacedModule> place_modules(const LoadContext& context, GuestPhys kernel_end) {
    const GuestPhys floor = std::max(kernel_end, GuestPhys{0x100000});
    std::vector<BootModule> modules(context.request.modules.begin(), context.request.modules.end());
    if (!context.request.initrd.empty())
        modules.insert(modules.begin(), BootModule{context.request.initrd, {}});
    std::vector<PlacedModule> placed;
    for (const BootModule& module : modules) {
        const GuestPhys begin = context.plan.store(
            module.contents, {floor, low_memory_end},
            module.arguments.empty() ? "a module" : fmt::format("the module '{}'", module.arguments));
        placed.push_back({begin, begin + module.contents.size(), module.arguments});
    }
    return placed;
}

GuestPhys store_text(MemoryPlan& plan, std::string_view text) {
    const std::string terminated(text);
    return plan.store(std::as_bytes(std::span(terminated.c_str(), terminated.size() + 1)), info_window(),
                      "text for the kernel");
}

LoadedKernel start_in_protected_mode(const LoadContext& context, GuestPhys entry) {
    LoadedKernel kernel;
    kernel.mode = StartMode::protected_mode;
    kernel.entry = GuestVirt{entry.value()};
    kernel.code_selector = multiboot_code_selector;
    const std::vector<std::byte> stack(page_size);
    kernel.stack_top =
        GuestVirt{context.plan.store(stack, info_window(), "the first stack").value() + stack.size()};
    kernel.gdt = store_objects(context.plan, boot_gdt_entries(kernel.mode, kernel.code_selector));
    return kernel;
}

BasicMemory basic_memory(const MemoryPlan& plan) {
    BasicMemory basic;
    for (const boot_e820_entry& range : plan.memory_map()) {
        const auto kib = static_cast<std::uint32_t>(range.size >> 10);
        if (range.type == e820_ram && range.addr == 0)
            basic.lower = kib;
        if (range.type == e820_ram && range.addr == 0x100000)
            basic.upper = kib;
    }
    return basic;
}

// --- The interface

std::vector<std::byte> unpack_kernel_file(std::vector<std::byte> file) {
    return can_unpack(compression_of(file)) ? unpack(file, unpacked_kernel_limit) : std::move(file);
}

bool takes_modules(KernelProtocol protocol) {
    return protocol == KernelProtocol::multiboot1 || protocol == KernelProtocol::multiboot2 ||
           protocol == KernelProtocol::pvh;
}

KernelProtocol choose_protocol(const KernelFile& kernel, const LoadRequest& request) {
    const KernelProtocol protocol = request.protocol.value_or(kernel.protocols().front());
    if (!kernel.offers(protocol))
        reject_protocol(kernel, protocol);
    if (is_flat(protocol) && !request.load_address) {
        if (!request.protocol)
            reject_unknown(kernel);
        reject("a flat binary needs a load address");
    }
    if (!is_flat(protocol) && (request.load_address || request.entry))
        reject("only a flat binary takes a load address or entry; this kernel is loaded by the protocol {}",
               name(protocol));
    if (!takes_modules(protocol) && !request.modules.empty())
        reject("the protocol {} knows of no modules; an initrd can be passed", name(protocol));
    return protocol;
}

LoadedKernel load_kernel(std::span<const std::byte> file, const LoadRequest& request,
                         const GuestMemory& memory) {
    std::vector<std::byte> unpacked;
    if (can_unpack(compression_of(file))) {
        unpacked = unpack(file, unpacked_kernel_limit);
        file = unpacked;
    }
    const KernelFile kernel_file = read_kernel_file(file);
    const KernelProtocol protocol = choose_protocol(kernel_file, request);
    MemoryPlan plan(memory);
    LoadedKernel kernel = load_by_protocol({file, kernel_file, request, protocol, plan});
    kernel.protocol = protocol;
    return kernel;
}

std::vector<std::byte> read_file(const std::string& path, std::string_view what) {
    const auto fail = [&](const std::string& reason) { reject_file(path, what, reason); };

    std::error_code error;
    const auto status = std::filesystem::status(path, error);
    if (error)
        fail(error.message());
    if (std::filesystem::is_directory(status))
        fail("Is a directory");
    if (!std::filesystem::is_regular_file(status))
        fail("not a regular file");
    const std::uintmax_t size = std::filesystem::file_size(path, error);
    if (error)
        fail(error.message());
    if (size > low_memory_end.value())
        fail("the file is larger than what a guest can be started with");

    errno = 0;
    std::ifstream stream(path, std::ios::binary);
    if (!stream)
        fail(std::generic_category().message(errno));
    std::vector<std::byte> bytes(size);
    stream.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(size));
    if (!stream)
        fail("it became shorter while it was read, or its disk failed");
    return bytes;
}

std::vector<std::byte> read_kernel(const std::string& path) {
    constexpr std::string_view what = "kernel";
    std::vector<std::byte> file = read_file(path, what);
    if (file.empty())
        reject_file(path, what, "the file is empty");
    return file;
}

} // namespace umbra
