// A machine in QEMU's software emulation whose Linux has KVM by SVM, which any computer can have.
#pragma once

#include "launcher/emulated/kernel.hpp"
#include "vmm/kvm/file.hpp"

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <sys/types.h>

namespace umbra::emulated {

/// A program that this process has started for itself. It ends with this object, or with the thread that made
/// it, if not before: also if that is killed.
class Helper {
  public:
    /// Its standard input is empty; what it prints goes to `log`. The descriptors of `passed` stay open in
    /// it. StartupError(host_cannot) if it cannot be started.
    Helper(const std::vector<std::string>& command, const std::vector<int>& passed, const File& log);
    Helper(const Helper&) = delete;
    Helper& operator=(const Helper&) = delete;
    Helper(Helper&&) = delete;
    Helper& operator=(Helper&&) = delete;
    ~Helper();

    /// Readable when it has ended.
    [[nodiscard]] int handle() const { return handle_.get(); }
    /// How it ended; empty while it runs.
    [[nodiscard]] std::string end() const;

  private:
    pid_t pid_ = -1;
    File handle_;
};

struct MachineConfig {
    bool nested_paging = true; ///< its KVM uses NPT (host kind A), or shadow paging of its own (kind B)
    bool counted = false;      ///< its clock is the count of its instructions, 1 ns each; one processor then
    std::uint64_t memory_bytes = 0;
    /// More than one is for trying out: QEMU 7.2's emulation of several may run the old code where the kernel
    /// has patched its own, after which the machine hangs.
    unsigned processors = 1;
};

class EmulatedMachine {
  public:
    /// Starts it. StartupError(host_cannot) says what is missing and how to install it.
    explicit EmulatedMachine(const MachineConfig& config);

    /// This side of the line to its first program; to be taken once.
    [[nodiscard]] File take_line() { return std::move(line_); }
    /// Readable when QEMU has ended.
    [[nodiscard]] int handle() const { return qemu_->handle(); }
    /// What has happened to it, and what its kernel, QEMU and virtiofsd said last.
    [[nodiscard]] std::string obituary() const;

  private:
    [[nodiscard]] File share_files(std::vector<std::string>& arguments);

    HostKernel kernel_;
    File log_; ///< of QEMU, virtiofsd and the machine's kernel
    File line_, initramfs_;
    std::unique_ptr<Helper> virtiofsd_, qemu_;
};

} // namespace umbra::emulated
