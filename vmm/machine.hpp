// The machine that a guest is run in, whichever engine runs it: RAM, platform, KVM's VM and its vCPU.
#pragma once

#include "shadow/guest_memory.hpp"
#include "vmm/cpu_model.hpp"
#include "vmm/devices/platform.hpp"
#include "vmm/devices/rtc_timer.hpp"
#include "vmm/host_memory.hpp"
#include "vmm/kvm/kvm.hpp"
#include "vmm/loader/loader.hpp"
#include "vmm/monitor_memory.hpp"
#include "vmm/verdict.hpp"

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace umbra {

struct MachineConfig {
    std::uint64_t memory_bytes = 0; ///< guest RAM: within parse_memory_size's bounds
    std::size_t pool_bytes = 0;     ///< for shadow tables; 0: an engine without them
    CpuChoice cpu{};
    OutputSink serial_output;
    OutputSink debug_output;
    std::vector<FwCfgFile> fw_cfg{}; ///< the user's items
    bool test_device = false;        ///< there is a TestDevice
    bool keyboard = false;           ///< input() types on the keyboard instead of into the serial port
};

class Machine {
  public:
    Machine(const Kvm& kvm, MachineConfig config);
    Machine(const Machine&) = delete;
    Machine& operator=(const Machine&) = delete;
    Machine(Machine&&) = delete;
    Machine& operator=(Machine&&) = delete;
    ~Machine() = default;

    [[nodiscard]] const Kvm& kvm() const { return kvm_; }
    [[nodiscard]] const GuestMemory& memory() const { return memory_; }
    [[nodiscard]] MonitorMemory& monitor_memory() { return monitor_; }
    [[nodiscard]] Platform& platform() { return platform_; }
    [[nodiscard]] const Platform& platform() const { return platform_; }
    [[nodiscard]] Vcpu& vcpu() { return vcpu_; }
    [[nodiscard]] const Vcpu& vcpu() const { return vcpu_; }
    /// What CPUID shows, if the host intercepts it.
    [[nodiscard]] const std::vector<CpuidLeaf>& cpuid() const { return cpuid_; }
    [[nodiscard]] CpuFeatures cpu_features(bool cpuid_intercepted) const {
        return guest_features(cpuid_, cpu_choice_, cpuid_intercepted);
    }

    /// Answers the vCPU's last exit, a port or an MMIO access.
    void complete_port_exit();
    void complete_mmio_exit();

    [[nodiscard]] std::uint32_t port_read(std::uint16_t port, unsigned size);
    void port_write(std::uint16_t port, unsigned size, std::uint32_t value) {
        platform_.port_write(Port{port}, size, value);
    }

    /// Input for the guest's serial port or keyboard; what its queue cannot take yet waits.
    void input(std::string_view text);

    /// Whether something could interrupt a guest that has interrupts off.
    [[nodiscard]] bool has_unmaskable_interrupts() const {
        return vm_.has_unmaskable_input() || vcpu_.line_is_unmaskable();
    }

    /// The verdict of a guest that has ended its own run; nothing while it goes on.
    [[nodiscard]] std::optional<Verdict> guest_verdict() const;

  private:
    const Kvm& kvm_;
    std::vector<HostMemory> ram_;
    GuestMemory memory_;
    MonitorMemory monitor_;
    CpuChoice cpu_choice_;
    Vm vm_;
    Vcpu vcpu_;
    std::vector<CpuidLeaf> cpuid_; ///< the vCPU has them
    Platform platform_;
    RtcTimer rtc_timer_;
    std::string waiting_input_;
};

/// The state in which a kernel is entered; README.md documents it to guests' authors.
[[nodiscard]] VirtualCpu boot_cpu(const LoadedKernel& kernel);

} // namespace umbra
