#include "launcher/emulated/kernel.hpp"

#include "launcher/emulated/init_image.hpp"
#include "vmm/error.hpp"
#include "vmm/loader/compressed.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string_view>
#include <utility>

#include <fmt/core.h>

namespace umbra::emulated {
namespace {

namespace fs = std::filesystem;

std::string read_file(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

/// A module's name as the kernel has it: files and modules.builtin may have it with '-'.
std::string module_name(const fs::path& file) {
    std::string name = file.filename().native();
    name.resize(std::min(name.find(".ko"), name.size()));
    std::ranges::replace(name, '-', '_');
    return name;
}

/// A module's file, unpacked.
std::string read_module(const fs::path& path) {
    std::string file = read_file(path);
    const auto bytes = std::as_bytes(std::span(file));
    if (compression_of(bytes) == Compression::none)
        return file;
    constexpr std::uint64_t limit = std::uint64_t{256} << 20;
    const std::vector<std::byte> unpacked = unpack(bytes, limit);
    return {reinterpret_cast<const char*>(unpacked.data()), unpacked.size()};
}

/// The modules of one kernel.
class Modules {
  public:
    /// `folder`: lib/modules/VERSION.
    explicit Modules(const fs::path& folder) {
        std::error_code error;
        for (fs::recursive_directory_iterator entry(folder / "kernel", error), end; !error && entry != end;
             entry.increment(error))
            if (entry->path().filename().native().find(".ko") != std::string::npos)
                files_.emplace(module_name(entry->path()), entry->path());
        std::ifstream list(folder / "modules.builtin");
        for (std::string line; std::getline(list, line);)
            builtin_.insert(module_name(line));
    }

    [[nodiscard]] bool has(const std::string& name) const {
        return files_.contains(name) || builtin_.contains(name);
    }

    /// Adds the module and, before it, what it depends on. Those that are built in, or unknown, are left out:
    /// whether the kernel misses them it says itself.
    void add(const std::string& name, const std::string& parameters, std::vector<HostKernel::Module>& list) {
        const auto found = files_.find(name);
        if (found == files_.end() || !added_.insert(name).second)
            return;
        for (const std::string& other : dependencies(found->second))
            add(other, {}, list);
        list.push_back({found->second, parameters});
    }

  private:
    /// From its .modinfo section, whose strings each end with a zero byte: "depends=kvm,ccp".
    static std::vector<std::string> dependencies(const fs::path& file) {
        constexpr std::string_view key("\0depends=", 9);
        const std::string module = read_module(file);
        const std::size_t at = module.find(key);
        if (at == std::string::npos)
            return {};
        std::string_view names(module.c_str() + at + key.size());
        std::vector<std::string> list;
        while (!names.empty()) {
            const std::string_view name = names.substr(0, names.find(','));
            list.push_back(module_name(fs::path(name)));
            names.remove_prefix(std::min(names.size(), name.size() + 1));
        }
        return list;
    }

    std::map<std::string, fs::path> files_;
    std::set<std::string> builtin_;
    std::set<std::string> added_;
};

/// Numbers in names are compared as numbers: 6.1.0-9 is older than 6.1.0-10.
bool older(const std::string& left, const std::string& right) {
    return ::strverscmp(left.c_str(), right.c_str()) < 0;
}

struct Candidate {
    fs::path image, modules;
    std::string version;
    bool cloud = false;
};

/// The kernels that are there, the best first.
std::vector<Candidate> candidates() {
    std::vector<fs::path> roots{"/"};
    if (const char* const cache = std::getenv("XDG_CACHE_HOME"); cache != nullptr && *cache != '\0')
        roots.push_back(fs::path(cache) / "umbra/kernel");
    else if (const char* const home = std::getenv("HOME"); home != nullptr)
        roots.push_back(fs::path(home) / ".cache/umbra/kernel");
    std::vector<Candidate> found;
    for (const fs::path& root : roots) {
        std::error_code error;
        for (fs::directory_iterator entry(root / "lib/modules", error), end; !error && entry != end;
             entry.increment(error)) {
            const std::string version = entry->path().filename();
            for (const fs::path& image : {root / "boot" / ("vmlinuz-" + version), entry->path() / "vmlinuz"})
                if (::access(image.c_str(), R_OK) == 0) {
                    found.push_back(
                        {image, entry->path(), version, version.find("cloud") != std::string::npos});
                    break;
                }
        }
    }
    std::ranges::stable_sort(found, [](const Candidate& left, const Candidate& right) {
        return left.cloud != right.cloud ? left.cloud : older(right.version, left.version);
    });
    return found;
}

/// What `kernel` lacks; its modules otherwise.
std::string choose(const Candidate& kernel, const std::string& kvm_parameters, HostKernel& chosen) {
    Modules modules(kernel.modules);
    for (const char* const needed : {"kvm_amd", "virtio_pci", "virtio_console"})
        if (!modules.has(needed))
            return needed;
    chosen = {kernel.image, Sharing::plan9, {}};
    modules.add("virtio_pci", {}, chosen.modules);
    modules.add("virtio_console", {}, chosen.modules);
    if (modules.has("9p") && modules.has("9pnet_virtio")) {
        modules.add("9pnet_virtio", {}, chosen.modules);
        modules.add("9p", {}, chosen.modules);
    } else if (::geteuid() != 0) {
        return "9p, which shares files without root's rights"; // virtiofsd needs them
    } else if (modules.has("virtiofs")) {
        chosen.sharing = Sharing::virtiofs;
        modules.add("virtiofs", {}, chosen.modules);
    } else {
        return "virtiofs and 9p";
    }
    // Some kernels have these beside kvm, and no module says so.
    modules.add("irqbypass", {}, chosen.modules);
    modules.add("kvm_amd", kvm_parameters, chosen.modules);
    return {};
}

// --- The RAM disk: cpio's "new ASCII" format (Documentation/driver-api/early-userspace/buffer-format.rst)

class Archive {
  public:
    void add(const std::string& name, unsigned mode, std::string_view contents) {
        bytes_ += fmt::format(
            "070701{:08X}{:08X}{:08X}{:08X}{:08X}{:08X}{:08X}{:08X}{:08X}{:08X}{:08X}{:08X}{:08X}", ++inode_,
            mode, 0, 0, 1, 0, contents.size(), 0, 0, 0, 0, name.size() + 1, 0);
        bytes_ += name;
        bytes_ += '\0';
        align();
        bytes_ += contents;
        align();
    }
    [[nodiscard]] std::string take() {
        add("TRAILER!!!", 0, {});
        return std::move(bytes_);
    }

  private:
    void align() { bytes_.resize((bytes_.size() + 3) / 4 * 4); }

    unsigned inode_ = 0;
    std::string bytes_;
};

} // namespace

std::string find_host_kernel(const std::string& kvm_parameters, std::optional<HostKernel>& kernel) {
    std::string lacking;
    for (const Candidate& candidate : candidates()) {
        HostKernel chosen;
        const std::string lacks = choose(candidate, kvm_parameters, chosen);
        if (lacks.empty()) {
            kernel = std::move(chosen);
            return {};
        }
        lacking +=
            fmt::format("{}{} lacks {}", lacking.empty() ? " (" : ", ", candidate.image.native(), lacks);
    }
    return "a Linux kernel with kvm_amd" + (lacking.empty() ? lacking : lacking + ")");
}

File make_initramfs(const HostKernel& kernel) {
    constexpr unsigned program = 0100755, file = 0100644, folder = 0040755;
    Archive archive;
    archive.add("dev", folder, {});
    archive.add("modules", folder, {});
    archive.add("init", program, init_image());
    archive.add("share", file,
                kernel.sharing == Sharing::virtiofs
                    ? "virtiofs "
                    : "9p trans=virtio,version=9p2000.L,msize=524288,cache=mmap,access=any");
    std::string list;
    for (const HostKernel::Module& module : kernel.modules) {
        const std::string name = "modules/" + module_name(module.file) + ".ko";
        archive.add(name, file, read_module(module.file));
        list += fmt::format("/{} {}\n", name, module.parameters);
    }
    archive.add("modules.list", file, list);
    const std::string bytes = archive.take();
    File disk(::memfd_create("initramfs", MFD_CLOEXEC));
    for (std::string_view rest = bytes; !rest.empty();) {
        const ssize_t count = ::write(disk.get(), rest.data(), rest.size());
        if (count < 0)
            throw StartupError(ExitCode::host_cannot,
                               fmt::format("no memory for a RAM disk: {}", std::strerror(errno)));
        rest.remove_prefix(static_cast<std::size_t>(count));
    }
    return disk;
}

} // namespace umbra::emulated
