// Tells kernel formats apart and puts kernel, initrd and boot data together.
#include "vmm/loader/loader.hpp"

#include "vmm/loader/kernel_image.hpp"
#include "vmm/loader/memory_size.hpp"
#include "vmm/loader/reject.hpp"

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <system_error>

namespace umbra {

namespace {

/// The end of the RAM that begins at 0, which everything but a large ELF's own segments is loaded into.
GuestPhys end_of_low_memory(const GuestMemory& memory) {
    const auto& regions = memory.regions();
    if (regions.empty() || regions.front().base != GuestPhys{0} ||
        regions.front().bytes.size() < minimum_memory)
        reject("guest memory is too small: a kernel needs at least {} MiB", minimum_memory >> 20);
    return GuestPhys{regions.front().bytes.size()};
}

KernelImage load_image(std::span<const std::byte> file, const GuestMemory& memory) {
    if (is_elf(file))
        return load_elf(file, memory);
    if (is_bzimage(file))
        return load_bzimage(file, memory);
    reject("not a kernel: neither an ELF executable nor a Linux bzImage");
}

/// Copies the initrd as high as the kernel allows, where Linux expects it to be out of its way.
MemoryBlock place_initrd(std::span<const std::byte> initrd, const KernelImage& image,
                         const GuestMemory& memory, GuestPhys memory_end) {
    if (initrd.empty())
        return {};
    const GuestPhys floor = (image.end + (page_size - 1)).page_base();
    const std::uint64_t space = (initrd.size() + page_size - 1) & ~(page_size - 1);
    const GuestPhys limit = std::min(image.initrd_limit, low_memory_end).page_base();
    if (floor > limit || space > limit - floor)
        reject("the initrd of {} bytes does not fit between the kernel's end {} and {}, the highest address "
               "that "
               "it may have",
               initrd.size(), image.end, limit);
    if (floor + space > memory_end)
        reject("the initrd of {} bytes does not fit into guest memory: it needs at least {} MiB",
               initrd.size(), mebibytes_up_to(floor + space));
    const GuestPhys base = std::min(limit, memory_end) - space;
    const auto target = memory.range(base, initrd.size());
    std::copy(initrd.begin(), initrd.end(), target.begin());
    return {base, initrd.size()};
}

} // namespace

LoadedKernel load_kernel(std::span<const std::byte> file, const LoadRequest& request,
                         const GuestMemory& memory) {
    const GuestPhys memory_end = end_of_low_memory(memory);
    const KernelImage image = load_image(file, memory);
    if (request.command_line.size() > image.command_line_limit)
        reject("the command line has {} bytes; this kernel takes at most {}", request.command_line.size(),
               image.command_line_limit);
    const MemoryBlock initrd = place_initrd(request.initrd, image, memory, memory_end);
    write_boot_data(memory, image.header, request.command_line, initrd);
    return {.protocol = image.protocol, .entry = image.entry};
}

std::vector<std::byte> read_file(const std::string& path, std::string_view what) {
    const auto fail = [&](const std::string& reason) {
        reject("cannot read {} '{}': {}", what, path, reason);
    };

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
    if (size == 0)
        fail("the file is empty");
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

} // namespace umbra
