#include "vmm/machine.hpp"

#include "vmm/loader/boot_params.hpp"
#include "vmm/loader/memory_size.hpp"

#include <cstring>
#include <span>

#include <fmt/core.h>

namespace umbra {
namespace {

std::vector<HostMemory> make_ram(std::uint64_t bytes) {
    std::vector<HostMemory> ram;
    for (const RamRange& range : ram_ranges(bytes))
        ram.emplace_back(range.size, HostMemory::Pages::huge, "guest memory");
    return ram;
}

GuestMemory make_memory(std::uint64_t bytes, const std::vector<HostMemory>& ram) {
    std::vector<GuestMemory::Region> regions;
    for (const RamRange& range : ram_ranges(bytes))
        regions.push_back({range.base, ram[regions.size()].bytes()});
    return GuestMemory(std::move(regions));
}

/// What a KVM that shadows our shadow tables in turn (a nested one) needs so that it never has to throw away
/// tables that a guest goes on using: one for each of ours, and one for each 2 MB that we map by one entry
/// but its memory is of small pages. Each twice, for KVM's are made for the rights on the way to them:
/// read-only and writable. Its own choice is a fiftieth of the memory's pages, which 256 address spaces of a
/// small guest exceed; a switch among them is then half as fast. What is not used takes no memory.
std::uint64_t shadow_pages(const GuestMemory& memory, const MonitorMemory& monitor) {
    constexpr std::uint64_t large = std::uint64_t{2} << 20;
    std::uint64_t pages = monitor.pool().size() / page_size;
    for (const GuestMemory::Region& region : memory.regions())
        pages += (region.bytes.size() + large - 1) / large;
    return 2 * pages;
}

Vm make_vm(const Kvm& kvm, const GuestMemory& memory, const MonitorMemory& monitor, bool with_monitor) {
    Vm vm = kvm.create_vm();
    unsigned slot = 0;
    for (const GuestMemory::Region& region : memory.regions())
        vm.add_memory(slot++, MachinePhys(region.base.value()), region.bytes);
    if (with_monitor) {
        vm.add_memory(slot, monitor.base(), monitor.all());
        vm.allow_shadow_pages(shadow_pages(memory, monitor));
    }
    vm.create_interrupt_controllers();
    return vm;
}

/// Gives the vCPU its CPUID, which tells the rate of its TSC.
std::vector<CpuidLeaf> give_cpuid(const Kvm& kvm, Vcpu& vcpu, const CpuChoice& choice, bool shadow_engine) {
    std::vector<CpuidLeaf> leaves = guest_cpuid(kvm.supported_cpuid(), choice, shadow_engine, vcpu.tsc_khz());
    vcpu.set_cpuid(leaves);
    return leaves;
}

PlatformConfig platform_config(MachineConfig& config, Vm& vm, const GuestMemory& memory) {
    constexpr unsigned keyboard_irq = 1, second_serial_irq = 3, serial_irq = 4, rtc_irq = 8;
    const auto line = [&vm](unsigned irq) { return [&vm, irq](bool level) { vm.set_irq_line(irq, level); }; };
    PlatformConfig platform;
    platform.serial_output = std::move(config.serial_output);
    platform.debug_output = std::move(config.debug_output);
    platform.serial_interrupt = line(serial_irq);
    platform.second_serial_interrupt = line(second_serial_irq);
    platform.keyboard_interrupt = line(keyboard_irq);
    platform.rtc_interrupt = line(rtc_irq);
    for (const GuestMemory::Region& region : memory.regions())
        (region.base < GuestPhys(std::uint64_t{1} << 32) ? platform.low_memory : platform.high_memory) +=
            region.bytes.size();
    platform.fw_cfg.memory = memory;
    platform.fw_cfg.files = std::move(config.fw_cfg);
    platform.type_input = config.keyboard;
    if (config.test_device)
        platform.test_device = [&vm](unsigned irq, bool level) { vm.set_irq_line(irq, level); };
    const auto map = e820_map(memory);
    const auto entries = std::as_bytes(std::span(map));
    platform.fw_cfg.files.push_back({"etc/e820", {entries.begin(), entries.end()}});
    return platform;
}

} // namespace

Machine::Machine(const Kvm& kvm, MachineConfig config)
    : kvm_(kvm), ram_(make_ram(config.memory_bytes)), memory_(make_memory(config.memory_bytes, ram_)),
      monitor_(MonitorMemory::default_base(kvm.physical_bits()), config.pool_bytes, best_pool_protection()),
      cpu_choice_(config.cpu), vm_(make_vm(kvm, memory_, monitor_, config.pool_bytes != 0)),
      vcpu_(vm_.create_vcpu(0)), cpuid_(give_cpuid(kvm, vcpu_, cpu_choice_, config.pool_bytes != 0)),
      platform_(platform_config(config, vm_, memory_)), rtc_timer_(platform_.rtc()) {}

void Machine::complete_port_exit() {
    const PortExit exit = vcpu_.port_exit();
    for (std::size_t offset = 0; offset < exit.data.size(); offset += exit.size) {
        std::uint32_t value = 0;
        if (exit.write) {
            std::memcpy(&value, exit.data.data() + offset, exit.size);
            platform_.port_write(Port{exit.port}, exit.size, value);
        } else {
            value = port_read(exit.port, exit.size);
            std::memcpy(exit.data.data() + offset, &value, exit.size);
        }
    }
}

std::uint32_t Machine::port_read(std::uint16_t port, unsigned size) {
    const std::uint32_t value = platform_.port_read(Port{port}, size);
    if (!waiting_input_.empty())
        input({}); // the read may have made room
    return value;
}

void Machine::input(std::string_view text) {
    waiting_input_ += text;
    waiting_input_.erase(0, platform_.receive(waiting_input_));
}

std::optional<Verdict> Machine::guest_verdict() const {
    const auto& exit = platform_.exit();
    if (!exit)
        return std::nullopt;
    switch (exit->kind) {
    case GuestExit::Kind::debug_exit:
        return Verdict{exit->value == 0 ? Verdict::Kind::passed : Verdict::Kind::failed, exit->value, {}};
    case GuestExit::Kind::power_off:
        return Verdict{Verdict::Kind::passed, 0, "the guest powered off"};
    case GuestExit::Kind::sleep:
        // QEMU suspends by type 1 and waits for somebody to wake it, and ignores most of the others, so that
        // the guest waits: neither is an end that a run could have here.
        return Verdict{
            Verdict::Kind::stopped, 0,
            fmt::format(
                "the guest asked for ACPI sleep type {}, but umbra does not suspend (power-off is {} or {})",
                exit->value, acpi_soft_off_qemu, acpi_soft_off)};
    case GuestExit::Kind::reset:
        return Verdict{Verdict::Kind::reset, 0, {}};
    }
    __builtin_unreachable();
}

void Machine::complete_mmio_exit() {
    const MmioExit exit = vcpu_.mmio_exit();
    const GuestPhys at(exit.address.value());
    if (exit.write)
        platform_.mmio_write(at, exit.data);
    else
        platform_.mmio_read(at, exit.data);
}

VirtualCpu boot_cpu(const LoadedKernel& kernel) {
    const bool long_mode = kernel.mode == StartMode::long_mode;
    VirtualCpu cpu;
    cpu.rip = kernel.entry.value();
    cpu[Gpr::rax] = kernel.rax;
    cpu[Gpr::rbx] = kernel.rbx;
    cpu[Gpr::rsi] = kernel.rsi;
    cpu[Gpr::rdi] = kernel.rdi;
    cpu[Gpr::rsp] = kernel.stack_top.value();
    cpu.cr0 = cr0::pe | cr0::et;
    if (long_mode) {
        cpu.cr0 |= cr0::mp | cr0::ne | cr0::wp | cr0::pg;
        cpu.cr3 = kernel.page_table_root.value();
        cpu.cr4 = cr4::pae | cr4::osfxsr | cr4::osxmmexcpt;
        cpu.efer = efer::lme | efer::lma | efer::nxe;
    }
    cpu.gdtr = {GuestVirt(kernel.gdt.value()), kernel.gdt_limit()};

    Segment data;
    data.selector = kernel.data_selector();
    data.limit = 0xffff'ffff;
    data.type = 0x3; // read/write, accessed
    data.present = data.default_32 = data.granularity = true;
    cpu.ds = cpu.es = cpu.fs = cpu.gs = cpu.ss = data;
    cpu.cs = data;
    cpu.cs.selector = kernel.code_selector;
    cpu.cs.type = 0xb; // execute/read, accessed
    cpu.cs.long_mode = long_mode;
    cpu.cs.default_32 = !long_mode;
    cpu.tr.type = 0xb; // busy TSS: what a CPU has after reset
    cpu.tr.limit = 0xffff;
    cpu.tr.present = cpu.tr.system = true;
    cpu.ldtr.type = 0x2;
    cpu.ldtr.system = true;
    return cpu;
}

} // namespace umbra
