// The Linux kernel of an emulated machine, and those of its modules that it needs, as a RAM disk.
#pragma once

#include "vmm/kvm/file.hpp"

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace umbra::emulated {

/// How the machine sees this computer's files: by what its kernel has.
enum class Sharing {
    virtiofs, ///< served by a process of its own, virtiofsd
    plan9,    ///< served by QEMU
};

/// A kernel that has what an emulated machine takes: KVM for SVM, virtio, a way to share files.
struct HostKernel {
    struct Module {
        std::filesystem::path file;
        std::string parameters;
    };
    std::filesystem::path image;
    Sharing sharing{};
    std::vector<Module> modules; ///< in the order in which they can be loaded
};

/// The newest that is installed, or that scripts/setup has unpacked; Debian's cloud kernels, which start
/// faster, go before all others. If there is none, returns what is needed and why those that are there will
/// not do. `kvm_parameters`: of the module kvm_amd.
[[nodiscard]] std::string find_host_kernel(const std::string& kvm_parameters,
                                           std::optional<HostKernel>& kernel);

/// The RAM disk: `init` as /init, the modules unpacked, and what init.cpp reads. In memory, and nowhere else.
[[nodiscard]] File make_initramfs(const HostKernel& kernel);

} // namespace umbra::emulated
