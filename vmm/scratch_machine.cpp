#include "vmm/scratch_machine.hpp"

#include "vmm/segmentation.hpp"
#include "vmm/switcher_layout.h"

#include <algorithm>
#include <array>

namespace umbra {
namespace {

constexpr std::size_t pool_bytes = std::size_t{2} << 20;
constexpr std::uint64_t rights =
    entry_bit::present | entry_bit::writable | entry_bit::user | entry_bit::accessed | entry_bit::dirty;

Vm make_vm(const Kvm& kvm, const MonitorMemory& memory, const HostMemory& ram,
           ScratchMachine::InterruptControllers controllers) {
    Vm vm = kvm.create_vm();
    vm.add_memory(0, MachinePhys(0), ram.bytes());
    vm.add_memory(1, memory.base(), memory.all());
    if (controllers == ScratchMachine::InterruptControllers::in_kernel)
        vm.create_interrupt_controllers();
    return vm;
}

Vcpu make_vcpu(const Kvm& kvm, Vm& vm) {
    Vcpu vcpu = vm.create_vcpu(0);
    std::vector<CpuidLeaf> leaves = kvm.supported_cpuid();
    for (CpuidLeaf& leaf : leaves) {
        if (leaf.function == ScratchMachine::marked_leaf)
            leaf.eax = ScratchMachine::leaf_mark;
    }
    vcpu.set_cpuid(leaves);
    return vcpu;
}

} // namespace

ScratchMachine::ScratchMachine(const Kvm& kvm, const HostTraits& assumed, InterruptControllers controllers)
    : memory_(MonitorMemory::default_base(kvm.physical_bits()), pool_bytes),
      ram_(pages * page_size, HostMemory::Pages::small, "a scratch machine"),
      vm_(make_vm(kvm, memory_, ram_, controllers)), machine_(make_vcpu(kvm, vm_)), region_(memory_, 1),
      switcher_(region_, machine_, assumed, 0), pool_(memory_.pool_base().frame(), memory_.pool()),
      root_(*pool_.allocate()), cr4_offered_(kvm.cr4_offered()) {
    TableIndex parent = root_;
    for (unsigned level = 3; level >= 1; --level) {
        const TableIndex child = *pool_.allocate();
        pool_.entries(parent)[0] = ShadowEntry(pool_.frame(child), rights);
        parent = child;
    }
    table_ = parent;
    spare_ = *pool_.allocate();
    for (std::size_t i = 0; i < pages; ++i)
        entry(i) = mapping(i);
    pool_.entries(root_)[switcher_slot] = region_.root_entry();

    cpu.cr0 = cr0::pe | cr0::pg | cr0::wp | cr0::ne | cr0::et | cr0::mp;
    cpu.cr4 = cr4::pae | cr4::osfxsr | cr4::osxmmexcpt;
    cpu.efer = efer::lme | efer::lma | efer::nxe | efer::sce;
    cpu.cs = flat_code_segment(Switcher::host_user_code, 3, true);
    cpu.ss = flat_stack_segment(Switcher::host_user_data, 3);
    switcher_.place(switcher_slot);
    set_control();
}

ShadowEntry ScratchMachine::mapping(std::size_t frame) {
    return {MachineFrame(frame), rights};
}

std::span<std::uint64_t> ScratchMachine::page(std::size_t number) {
    return {reinterpret_cast<std::uint64_t*>(ram_.bytes().data() + number * page_size),
            page_size / sizeof(std::uint64_t)};
}

std::span<std::byte> ScratchMachine::stub(std::uint8_t vector) {
    return memory_.switcher().subspan(std::size_t{vector} * STUB_SIZE, STUB_SIZE);
}

Trap ScratchMachine::run(std::span<const std::uint8_t> code, std::uint8_t cpl) {
    std::ranges::copy(code, reinterpret_cast<std::uint8_t*>(ram_.bytes().data() + code_address));
    cpu.rip = code_address;
    cpu.cpl = cpl;
    const bool entered = switcher_.enter(cpu, pool_.frame(root_), debt, pool_, access);
    debt.paid();
    access.reset();
    if (!entered)
        return {.kind = Trap::Kind::broken, .error_code = {}, .address = {}};
    exit_ = machine_.run();
    return switcher_.leave(cpu);
}

bool ScratchMachine::completes(std::span<const std::uint8_t> code) {
    std::vector<std::uint8_t> with_end(code.begin(), code.end());
    with_end.insert(with_end.end(), {0x0f, 0x0b}); // ud2
    const Trap trap = run(with_end);
    return trap.kind == Trap::Kind::vector &&
           trap.vector == static_cast<std::uint8_t>(Vector::invalid_opcode) &&
           cpu.rip == code_address + code.size();
}

std::optional<std::uint64_t> ScratchMachine::load(std::uint8_t number) {
    const auto high = static_cast<std::uint8_t>(number << 4);
    const std::array<std::uint8_t, 8> code{0x48, 0x8b, 0x04, 0x25,
                                           0x00, high, 0,    0}; // mov number * 4096, %rax
    return completes(code) ? std::optional(cpu[Gpr::rax]) : std::nullopt;
}

} // namespace umbra
