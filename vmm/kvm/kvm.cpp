#include "vmm/kvm/kvm.hpp"

#include "vmm/error.hpp"
#include "vmm/kvm/abi.hpp"
#include "vmm/msr.hpp"

#include <cpuid.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>

#include <fmt/core.h>

namespace umbra {
namespace {

[[noreturn]] void fail(const char* what) {
    throw StartupError(ExitCode::host_cannot, fmt::format("{}: {}", what, std::strerror(errno)));
}

template<class Argument>
int control(const File& file, unsigned long request, Argument argument) {
    int result = 0;
    do
        result = ::ioctl(file.get(), request, argument);
    while (result < 0 && errno == EINTR);
    return result;
}

template<class Argument>
int must(const File& file, const char* name, unsigned long request, Argument argument) {
    const int result = control(file, request, argument);
    if (result < 0)
        fail(name);
    return result;
}

/// A KVM structure with a trailing array, e.g. kvm_cpuid2 with its entries.
template<class Header, class Element>
class WithArray {
  public:
    explicit WithArray(std::size_t count) : storage_((sizeof(Header) + count * sizeof(Element)) / 8 + 1) {}
    Header* operator->() { return get(); }
    Header* get() { return reinterpret_cast<Header*>(storage_.data()); }

  private:
    std::vector<std::uint64_t> storage_;
};
using CpuidList = WithArray<kvm_cpuid2, kvm_cpuid_entry2>;
using MsrList = WithArray<kvm_msrs, kvm_msr_entry>;
using RouteList = WithArray<kvm_irq_routing, kvm_irq_routing_entry>;

kvm_segment to_kvm(const Segment& segment) {
    kvm_segment out{};
    out.base = segment.base;
    out.limit = segment.limit;
    out.selector = segment.selector;
    out.type = segment.type;
    out.present = segment.present;
    out.dpl = segment.dpl;
    out.db = segment.default_32;
    out.s = !segment.system;
    out.l = segment.long_mode;
    out.g = segment.granularity;
    out.avl = segment.available;
    out.unusable = !segment.present;
    return out;
}

Segment from_kvm(const kvm_segment& segment) {
    Segment out;
    out.selector = segment.selector;
    out.base = segment.base;
    out.limit = segment.limit;
    out.type = segment.type;
    out.dpl = segment.dpl;
    out.present = segment.present != 0 && segment.unusable == 0;
    out.system = segment.s == 0;
    out.long_mode = segment.l != 0;
    out.default_32 = segment.db != 0;
    out.granularity = segment.g != 0;
    out.available = segment.avl != 0;
    return out;
}

kvm_segment& segment_of(kvm_sregs& sregs, SegmentName name) {
    switch (name) {
    case SegmentName::cs:
        return sregs.cs;
    case SegmentName::ss:
        return sregs.ss;
    case SegmentName::ds:
        return sregs.ds;
    case SegmentName::es:
        return sregs.es;
    case SegmentName::fs:
        return sregs.fs;
    case SegmentName::gs:
        return sregs.gs;
    case SegmentName::tr:
        return sregs.tr;
    case SegmentName::ldt:
        return sregs.ldt;
    }
    __builtin_unreachable();
}

/// kvm_regs in the order of instruction encoding.
template<class Regs>
auto gpr_slots(Regs& regs) {
    return std::array{&regs.rax, &regs.rcx, &regs.rdx, &regs.rbx, &regs.rsp, &regs.rbp, &regs.rsi, &regs.rdi,
                      &regs.r8,  &regs.r9,  &regs.r10, &regs.r11, &regs.r12, &regs.r13, &regs.r14, &regs.r15};
}

/// Offsets in an XSAVE area (Intel SDM vol. 1, table 10-2 and 13.4).
namespace xsave {
constexpr std::size_t fcw = 0, fsw = 2, tag = 4, fop = 6, fip = 8, fcs = 12, fdp = 16, fds = 20, mxcsr = 24,
                      st = 32, xmm = 160, present = 512;
constexpr std::uint64_t x87 = 1U << 0, sse = 1U << 1, avx = 1U << 2; ///< components
} // namespace xsave

/// Where the upper halves of the YMM registers lie, in the standard format; nothing without AVX.
std::optional<std::size_t> ymm_offset() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    constexpr unsigned bytes = 256;
    if (__get_cpuid_count(0xd, 2, &eax, &ebx, &ecx, &edx) == 0 || eax != bytes ||
        ebx > sizeof(kvm_xsave) - bytes)
        return std::nullopt;
    return ebx;
}

template<class T>
T load_at(std::span<const std::byte> area, std::size_t offset) {
    T value{};
    std::memcpy(&value, area.subspan(offset).data(), sizeof(T));
    return value;
}
template<class T>
void store_at(std::span<std::byte> area, std::size_t offset, const T& value) {
    std::memcpy(area.subspan(offset).data(), &value, sizeof(T));
}

/// The two tag bits of a register that is in use (Intel SDM vol. 1, 8.1.7).
unsigned tag_of(const std::array<std::byte, 10>& value) {
    constexpr unsigned valid = 0, zero = 1, special = 2, all_ones = 0x7fff;
    const auto significand = load_at<std::uint64_t>(value, 0);
    const unsigned exponent = load_at<std::uint16_t>(value, 8) & all_ones;
    if (exponent == 0)
        return significand == 0 ? zero : special;
    return exponent != all_ones && significand >> 63 != 0 ? valid : special;
}

/// The full tag word of FXSAVE's, which has one bit for each physical register: it is in use.
std::uint16_t full_tag(const ExtendedState& state, unsigned in_use) {
    const unsigned top = state.fstat >> 11 & 7U;
    unsigned tag = 0;
    for (unsigned i = 0; i < 8; ++i)
        tag |= ((in_use >> i & 1U) != 0 ? tag_of(state.st.at((i - top) & 7U)) : 3U) << (2 * i);
    return static_cast<std::uint16_t>(tag);
}

void put_legacy(const ExtendedState& state, std::span<std::byte> area) {
    unsigned in_use = 0;
    for (unsigned i = 0; i < 8; ++i)
        in_use |= (state.ftag >> (2 * i) & 3U) != 3U ? 1U << i : 0;
    store_at(area, xsave::fcw, state.fctrl);
    store_at(area, xsave::fsw, state.fstat);
    store_at(area, xsave::tag, static_cast<std::uint8_t>(in_use));
    store_at(area, xsave::fop, state.fop);
    store_at(area, xsave::fip, state.fioff);
    store_at(area, xsave::fcs, state.fiseg);
    store_at(area, xsave::fdp, state.fooff);
    store_at(area, xsave::fds, state.foseg);
    store_at(area, xsave::mxcsr, state.mxcsr);
    for (std::size_t i = 0; i < state.st.size(); ++i)
        store_at(area, xsave::st + 16 * i, state.st.at(i));
    for (std::size_t i = 0; i < state.xmm.size(); ++i)
        store_at(area, xsave::xmm + 16 * i, state.xmm.at(i));
}

constexpr std::uint64_t sync_general = KVM_SYNC_X86_REGS;
constexpr std::uint64_t sync_system = KVM_SYNC_X86_SREGS;

kvm_device_attr tsc_offset_attribute(std::uint64_t& offset) {
    kvm_device_attr attribute{};
    attribute.group = KVM_VCPU_TSC_CTRL;
    attribute.attr = KVM_VCPU_TSC_OFFSET;
    attribute.addr = reinterpret_cast<std::uint64_t>(&offset);
    return attribute;
}

/// An entry of an APIC's interrupt tables (Intel SDM vol. 3A, 11.5.1) that is not masked and sends something
/// else than interrupts: an SMI, an NMI or an INIT.
bool is_unmaskable(std::uint32_t entry) {
    constexpr std::uint32_t masked = 1U << 16;
    const std::uint32_t mode = entry >> 8 & 7;
    return (entry & masked) == 0 && (mode == 2 || mode == 4 || mode == 5);
}

} // namespace

std::array<std::byte, fxsave_bytes> to_fxsave(const ExtendedState& state) {
    std::array<std::byte, fxsave_bytes> area{};
    put_legacy(state, area);
    return area;
}

// --- Kvm

Kvm::Kvm() : file_(::open("/dev/kvm", O_RDWR | O_CLOEXEC)) {
    if (file_.get() < 0) {
        if (errno == ENOENT)
            throw StartupError(
                ExitCode::host_cannot,
                "/dev/kvm does not exist: load kvm_amd or kvm_intel, or enable virtualization for "
                "this machine in its firmware or its host");
        if (errno == EACCES || errno == EPERM)
            throw StartupError(ExitCode::host_cannot,
                               "/dev/kvm: permission denied: become a member of the group that "
                               "owns it (usually 'kvm') or run as root");
        fail("open /dev/kvm");
    }
    if (const int version = must(file_, "KVM_GET_API_VERSION", KVM_GET_API_VERSION, 0); version != 12)
        throw StartupError(ExitCode::host_cannot,
                           fmt::format("KVM has API version {}, umbra needs 12", version));
    const auto supported = control(file_, KVM_CHECK_EXTENSION, KVM_CAP_SYNC_REGS);
    if (supported < 0 ||
        (static_cast<unsigned>(supported) & (sync_general | sync_system)) != (sync_general | sync_system))
        throw StartupError(ExitCode::host_cannot, "KVM lacks KVM_CAP_SYNC_REGS: use Linux 4.17 or newer");
    if (control(file_, KVM_CHECK_EXTENSION, KVM_CAP_IMMEDIATE_EXIT) <= 0)
        throw StartupError(ExitCode::host_cannot,
                           "KVM lacks KVM_CAP_IMMEDIATE_EXIT: use Linux 4.17 or newer");
    run_size_ = static_cast<std::size_t>(must(file_, "KVM_GET_VCPU_MMAP_SIZE", KVM_GET_VCPU_MMAP_SIZE, 0));

    constexpr std::uint32_t most = 256; // KVM's own limit
    CpuidList list(most);
    list->nent = most;
    must(file_, "KVM_GET_SUPPORTED_CPUID", KVM_GET_SUPPORTED_CPUID, list.get());
    for (const kvm_cpuid_entry2& entry : std::span(list->entries, list->nent))
        cpuid_.push_back(
            {entry.function, entry.index, entry.flags, entry.eax, entry.ebx, entry.ecx, entry.edx});
    // Of the TSC-deadline timer, which depends on KVM's interrupt controllers, KVM may tell apart.
    constexpr std::uint32_t tsc_deadline = 1U << 24;
    if (control(file_, KVM_CHECK_EXTENSION, KVM_CAP_TSC_DEADLINE_TIMER) > 0)
        for (CpuidLeaf& entry : cpuid_)
            if (entry.function == 1)
                entry.ecx |= tsc_deadline;
}

Vm Kvm::create_vm() const {
    return {File(must(file_, "KVM_CREATE_VM", KVM_CREATE_VM, 0)), run_size_};
}

const CpuidLeaf* Kvm::leaf(std::uint32_t function, std::uint32_t index) const {
    for (const CpuidLeaf& candidate : cpuid_) {
        const bool indexed = (candidate.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) != 0;
        if (candidate.function == function && (!indexed || candidate.index == index))
            return &candidate;
    }
    return nullptr;
}

unsigned Kvm::physical_bits() const {
    const CpuidLeaf* sizes = leaf(0x80000008);
    return sizes != nullptr ? sizes->eax & 0xff : 36;
}

bool Kvm::gigabyte_pages() const {
    const CpuidLeaf* features = leaf(0x80000001);
    return features != nullptr && (features->edx & 1U << 26) != 0;
}

std::uint64_t Kvm::cr4_offered() const {
    const CpuidLeaf* basic = leaf(1);
    const CpuidLeaf* extended = leaf(7);
    return umbra::cr4_offered(basic != nullptr ? basic->ecx : 0, extended != nullptr ? extended->ebx : 0,
                              extended != nullptr ? extended->ecx : 0);
}

// --- Vm

void Vm::add_memory(unsigned slot, MachinePhys base, std::span<std::byte> bytes, WriteLog log) {
    kvm_userspace_memory_region region{};
    region.slot = slot;
    region.flags = log == WriteLog::on ? KVM_MEM_LOG_DIRTY_PAGES : 0;
    region.guest_phys_addr = base.value();
    region.memory_size = bytes.size();
    region.userspace_addr = reinterpret_cast<std::uint64_t>(bytes.data());
    must(file_, "KVM_SET_USER_MEMORY_REGION", KVM_SET_USER_MEMORY_REGION, &region);
}

bool Vm::written_pages(unsigned slot, std::span<std::uint64_t> bits) {
    kvm_dirty_log log{};
    log.slot = slot;
    log.dirty_bitmap = bits.data();
    return control(file_, KVM_GET_DIRTY_LOG, &log) == 0;
}

void Vm::allow_shadow_pages(std::uint64_t count) {
    if (control(file_, KVM_CHECK_EXTENSION, KVM_CAP_MMU_SHADOW_CACHE_CONTROL) > 0)
        (void)control(file_, KVM_SET_NR_MMU_PAGES, count); // if it fails, the machine is only slower
}

void Vm::create_interrupt_controllers() {
    must(file_, "KVM_CREATE_IRQCHIP", KVM_CREATE_IRQCHIP, 0);
    route_lines();
    kvm_pit_config pit{};
    pit.flags = KVM_PIT_SPEAKER_DUMMY; // port 0x61 belongs to it: channel 2's gate and output
    must(file_, "KVM_CREATE_PIT2", KVM_CREATE_PIT2, &pit);
    leave_as_a_bios_does();
    // A PIT that makes up for lost ticks is let go of by a grace period of KVM's, 13 ms of waiting, most of
    // what a small guest's run takes. It is waited for now, beside what comes before the first run, and not
    // when the VM ends. All signals are for other threads.
    sigset_t all, before;
    sigfillset(&all);
    (void)::pthread_sigmask(SIG_SETMASK, &all, &before);
    background_ = std::jthread([fd = file_.get()] {
        kvm_reinject_control off{};
        (void)::ioctl(fd, KVM_REINJECT_CONTROL, &off); // if it fails, all there is is the wait at the end
    });
    (void)::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

/// As on a PC, and as QEMU has it: the PIT's line, IRQ 0, is input 2 of the I/O APIC, of whose input 0 the
/// PIC would be the source (Intel 82371AB, 8.7.1, and MultiProcessor Specification 1.4, table 4-11).
void Vm::route_lines() {
    constexpr std::uint32_t timer = 0, cascade = 2, pic_inputs = 8, apic_inputs = KVM_IOAPIC_NUM_PINS;
    RouteList list(std::size_t{2} * apic_inputs);
    const auto route = [&list](std::uint32_t line, std::uint32_t chip, std::uint32_t input) {
        kvm_irq_routing_entry& entry = list->entries[list->nr++];
        entry.gsi = line;
        entry.type = KVM_IRQ_ROUTING_IRQCHIP;
        entry.u.irqchip.irqchip = chip;
        entry.u.irqchip.pin = input;
    };
    for (std::uint32_t line = 0; line < apic_inputs; ++line) {
        if (line == cascade)
            continue;
        if (line < pic_inputs)
            route(line, KVM_IRQCHIP_PIC_MASTER, line);
        else if (line < 2 * pic_inputs)
            route(line, KVM_IRQCHIP_PIC_SLAVE, line - pic_inputs);
        route(line, KVM_IRQCHIP_IOAPIC, line == timer ? cascade : line);
    }
    must(file_, "KVM_SET_GSI_ROUTING", KVM_SET_GSI_ROUTING, list.get());
}

void Vm::leave_as_a_bios_does() {
    kvm_pit_state2 pit{};
    must(file_, "KVM_GET_PIT2", KVM_GET_PIT2, &pit);
    kvm_pit_channel_state& clock = pit.channels[0];
    clock.mode = 3;                                           // square wave
    clock.rw_mode = clock.read_state = clock.write_state = 3; // low byte, then high byte
    clock.count = 0x10000;                                    // 18.2 Hz
    clock.gate = 1;
    must(file_, "KVM_SET_PIT2", KVM_SET_PIT2, &pit);
    const auto set_pic = [this](std::uint32_t chip_id, std::uint8_t first_vector) {
        kvm_irqchip chip{};
        chip.chip_id = chip_id;
        must(file_, "KVM_GET_IRQCHIP", KVM_GET_IRQCHIP, &chip);
        chip.chip.pic.irq_base = first_vector;
        chip.chip.pic.imr = 0xff;
        must(file_, "KVM_SET_IRQCHIP", KVM_SET_IRQCHIP, &chip);
    };
    set_pic(KVM_IRQCHIP_PIC_MASTER, 0x08);
    set_pic(KVM_IRQCHIP_PIC_SLAVE, 0x70);
}

Vcpu Vm::create_vcpu(unsigned id) {
    return {File(must(file_, "KVM_CREATE_VCPU", KVM_CREATE_VCPU, static_cast<unsigned long>(id))), run_size_};
}

void Vm::set_irq_line(unsigned irq, bool level) {
    kvm_irq_level line{};
    line.irq = irq;
    line.level = level ? 1 : 0;
    (void)control(file_, KVM_IRQ_LINE, &line); // fails only for a VM without an irqchip
}

bool Vm::has_unmaskable_input() const {
    kvm_irqchip chip{};
    chip.chip_id = KVM_IRQCHIP_IOAPIC;
    if (control(file_, KVM_GET_IRQCHIP, &chip) != 0)
        return true;
    return std::ranges::any_of(chip.chip.ioapic.redirtbl, [](const auto& entry) {
        return is_unmaskable(static_cast<std::uint32_t>(entry.bits));
    });
}

// --- Vcpu

Vcpu::Vcpu(File file, std::size_t run_size) : file_(std::move(file)), run_size_(run_size) {
    void* mapped = ::mmap(nullptr, run_size_, PROT_READ | PROT_WRITE, MAP_SHARED, file_.get(), 0);
    if (mapped == MAP_FAILED)
        fail("mmap of the vCPU");
    run_ = static_cast<kvm_run*>(mapped);
    run_->kvm_valid_regs = sync_general | sync_system;
    must(file_, "KVM_GET_REGS", KVM_GET_REGS, &run_->s.regs.regs);
    must(file_, "KVM_GET_SREGS", KVM_GET_SREGS, &run_->s.regs.sregs);
}

Vcpu::~Vcpu() {
    if (file_.get() >= 0)
        ::munmap(run_, run_size_);
}

ExitReason Vcpu::run() {
    error_ = 0;
    const int result = ::ioctl(file_.get(), KVM_RUN, 0);
    ++exits_;
    // Where a signal found an interrupt about to be injected, KVM has set its bit here, and never clears one:
    // with the next change of a system register it would inject that interrupt once more, at every entry.
    std::ranges::fill(run_->s.regs.sregs.interrupt_bitmap, 0);
    if (result < 0) {
        error_ = errno;
        return error_ == EINTR ? ExitReason::interrupted : ExitReason::other;
    }
    switch (run_->exit_reason) {
    case KVM_EXIT_IO:
        return ExitReason::port;
    case KVM_EXIT_MMIO:
        return ExitReason::mmio;
    case KVM_EXIT_HLT:
        return ExitReason::halt;
    case KVM_EXIT_SHUTDOWN:
        return ExitReason::shutdown;
    case KVM_EXIT_INTR:
        return ExitReason::interrupted;
    case KVM_EXIT_INTERNAL_ERROR:
        return run_->internal.suberror == KVM_INTERNAL_ERROR_EMULATION ? ExitReason::not_emulated
                                                                       : ExitReason::internal_error;
    default:
        return ExitReason::other;
    }
}

void Vcpu::request_exit() {
    __atomic_store_n(&run_->immediate_exit, 1, __ATOMIC_RELAXED);
}
void Vcpu::clear_exit_request() {
    __atomic_store_n(&run_->immediate_exit, 0, __ATOMIC_RELAXED);
}

PortExit Vcpu::port_exit() const {
    const auto& io = run_->io;
    auto* data = reinterpret_cast<std::byte*>(run_) + io.data_offset;
    return {io.port, io.size, io.direction == KVM_EXIT_IO_OUT, {data, std::size_t{io.size} * io.count}};
}

MmioExit Vcpu::mmio_exit() const {
    auto& mmio = run_->mmio;
    return {
        MachinePhys(mmio.phys_addr), mmio.is_write != 0, {reinterpret_cast<std::byte*>(mmio.data), mmio.len}};
}

bool Vcpu::was_reset() const {
    if (run_->exit_reason == KVM_EXIT_SHUTDOWN)
        return false; // a triple fault: KVM of AMD leaves the vCPU as if reset, too
    constexpr std::uint16_t reset_cs = 0xf000;
    constexpr std::uint64_t reset_rip = 0xfff0;
    return (run_->s.regs.sregs.cr0 & cr0::pe) == 0 && selector(SegmentName::cs) == reset_cs &&
           rip() == reset_rip;
}

std::string Vcpu::describe_exit() const {
    if (error_ != 0)
        return fmt::format("KVM_RUN failed: {}", std::strerror(error_));
    if (run_->exit_reason == KVM_EXIT_INTERNAL_ERROR)
        return fmt::format(
            "KVM internal error {}{}", run_->internal.suberror,
            run_->internal.suberror == KVM_INTERNAL_ERROR_EMULATION
                ? ": it cannot emulate an instruction, which is not in RAM or accesses what is not"
                : "");
    if (run_->exit_reason == KVM_EXIT_FAIL_ENTRY)
        return fmt::format("KVM could not enter the machine: hardware reason {:#x}",
                           run_->fail_entry.hardware_entry_failure_reason);
    return fmt::format("KVM exit reason {}", run_->exit_reason);
}

void Vcpu::dirty_registers() {
    run_->kvm_dirty_regs |= sync_general;
}
void Vcpu::dirty_system_registers() {
    run_->kvm_dirty_regs |= sync_system;
}

void Vcpu::read_gprs(std::array<std::uint64_t, 16>& gpr) const {
    const auto slots = gpr_slots(run_->s.regs.regs);
    for (std::size_t i = 0; i < slots.size(); ++i)
        gpr[i] = *slots[i];
}

void Vcpu::write_gprs(const std::array<std::uint64_t, 16>& gpr) {
    const auto slots = gpr_slots(run_->s.regs.regs);
    for (std::size_t i = 0; i < slots.size(); ++i)
        *slots[i] = gpr[i];
    dirty_registers();
}

void Vcpu::write_gpr(Gpr reg, std::uint64_t value) {
    *gpr_slots(run_->s.regs.regs)[static_cast<std::size_t>(reg)] = value;
    dirty_registers();
}

std::uint64_t Vcpu::gpr(Gpr reg) const {
    return *gpr_slots(run_->s.regs.regs)[static_cast<std::size_t>(reg)];
}
std::uint64_t Vcpu::rip() const {
    return run_->s.regs.regs.rip;
}
std::uint64_t Vcpu::rsp() const {
    return run_->s.regs.regs.rsp;
}
std::uint64_t Vcpu::rflags() const {
    return run_->s.regs.regs.rflags;
}

void Vcpu::set_rip(std::uint64_t value) {
    run_->s.regs.regs.rip = value;
    dirty_registers();
}

void Vcpu::set_rsp(std::uint64_t value) {
    run_->s.regs.regs.rsp = value;
    dirty_registers();
}

void Vcpu::set_rflags(std::uint64_t value) {
    run_->s.regs.regs.rflags = value;
    dirty_registers();
}

std::uint64_t Vcpu::cr2() const {
    return run_->s.regs.sregs.cr2;
}
std::uint64_t Vcpu::cr3() const {
    return run_->s.regs.sregs.cr3;
}
std::uint64_t Vcpu::cr8() const {
    return run_->s.regs.sregs.cr8;
}

Segment Vcpu::segment(SegmentName name) const {
    return from_kvm(segment_of(run_->s.regs.sregs, name));
}
std::uint16_t Vcpu::selector(SegmentName name) const {
    return segment_of(run_->s.regs.sregs, name).selector;
}
std::uint64_t Vcpu::segment_base(SegmentName name) const {
    return segment_of(run_->s.regs.sregs, name).base;
}

void Vcpu::set_segment(SegmentName name, const Segment& value) {
    segment_of(run_->s.regs.sregs, name) = to_kvm(value);
    dirty_system_registers();
}

void Vcpu::set_segment_base(SegmentName name, std::uint64_t base) {
    segment_of(run_->s.regs.sregs, name).base = base;
    dirty_system_registers();
}

void Vcpu::set_descriptor_tables(DescriptorTable gdt, DescriptorTable idt) {
    kvm_sregs& sregs = run_->s.regs.sregs;
    sregs.gdt.base = gdt.base.value();
    sregs.gdt.limit = gdt.limit;
    sregs.idt.base = idt.base.value();
    sregs.idt.limit = idt.limit;
    dirty_system_registers();
}

void Vcpu::set_control(std::uint64_t cr0, std::uint64_t cr4, std::uint64_t efer) {
    kvm_sregs& sregs = run_->s.regs.sregs;
    sregs.cr0 = cr0;
    sregs.cr4 = cr4;
    sregs.efer = efer;
    dirty_system_registers();
}

void Vcpu::set_cr3(MachineFrame root) {
    run_->s.regs.sregs.cr3 = root.base().value();
    dirty_system_registers();
}

void Vcpu::set_cr8(std::uint64_t value) {
    run_->s.regs.sregs.cr8 = value;
    dirty_system_registers();
}

void Vcpu::store(const VirtualCpu& cpu) {
    write_gprs(cpu.gpr);
    set_rip(cpu.rip);
    set_rflags(cpu.rflags);
    set_segment(SegmentName::cs, cpu.cs);
    set_segment(SegmentName::ss, cpu.ss);
    set_segment(SegmentName::ds, cpu.ds);
    set_segment(SegmentName::es, cpu.es);
    set_segment(SegmentName::fs, cpu.fs);
    set_segment(SegmentName::gs, cpu.gs);
    set_segment(SegmentName::tr, cpu.tr);
    set_segment(SegmentName::ldt, cpu.ldtr);
    set_descriptor_tables(cpu.gdtr, cpu.idtr);
    set_control(cpu.cr0, cpu.cr4, cpu.efer);
    kvm_sregs& sregs = run_->s.regs.sregs;
    sregs.cr2 = cpu.cr2;
    sregs.cr3 = cpu.cr3;
    sregs.cr8 = cpu.cr8;
}

void Vcpu::load(VirtualCpu& cpu) const {
    read_gprs(cpu.gpr);
    cpu.rip = rip();
    cpu.rflags = rflags();
    cpu.cs = segment(SegmentName::cs);
    cpu.ss = segment(SegmentName::ss);
    cpu.ds = segment(SegmentName::ds);
    cpu.es = segment(SegmentName::es);
    cpu.fs = segment(SegmentName::fs);
    cpu.gs = segment(SegmentName::gs);
    cpu.tr = segment(SegmentName::tr);
    cpu.ldtr = segment(SegmentName::ldt);
    const kvm_sregs& sregs = run_->s.regs.sregs;
    cpu.gdtr = {GuestVirt(sregs.gdt.base), sregs.gdt.limit};
    cpu.idtr = {GuestVirt(sregs.idt.base), sregs.idt.limit};
    cpu.cr0 = sregs.cr0;
    cpu.cr2 = sregs.cr2;
    cpu.cr3 = sregs.cr3;
    cpu.cr4 = sregs.cr4;
    cpu.cr8 = sregs.cr8;
    cpu.efer = sregs.efer;
    cpu.cpl = cpu.ss.dpl;
}

bool Vcpu::injects() const {
    kvm_vcpu_events events{};
    if (control(file_, KVM_GET_VCPU_EVENTS, &events) != 0)
        return false;
    return events.exception.injected != 0 || events.exception.pending != 0 ||
           events.interrupt.injected != 0 || events.nmi.injected != 0 || events.nmi.pending != 0;
}

void Vcpu::set_interrupt_shadow(bool shadow) {
    kvm_vcpu_events events{};
    events.flags = KVM_VCPUEVENT_VALID_SHADOW;
    events.interrupt.shadow = shadow ? KVM_X86_SHADOW_INT_STI : 0;
    events.nmi.masked = nmi_blocked_ ? 1 : 0;           // is set without being asked
    (void)control(file_, KVM_SET_VCPU_EVENTS, &events); // nothing else is pending at a trap's exit
}

void Vcpu::unblock_nmi() {
    if (!std::exchange(nmi_blocked_, false))
        return;
    kvm_vcpu_events events{};
    if (control(file_, KVM_GET_VCPU_EVENTS, &events) != 0)
        return;
    events.flags = 0;
    events.nmi.masked = 0;
    (void)control(file_, KVM_SET_VCPU_EVENTS, &events);
}

bool Vcpu::nmi_waits() const {
    kvm_vcpu_events events{};
    return control(file_, KVM_GET_VCPU_EVENTS, &events) == 0 && events.nmi.pending != 0;
}

void Vcpu::halt() {
    // A trap between STI and HLT may have left its shadow behind, in which nothing would wake the vCPU.
    set_interrupt_shadow(false);
    kvm_mp_state state{};
    state.mp_state = KVM_MP_STATE_HALTED;
    (void)control(file_, KVM_SET_MP_STATE, &state); // fails only without an irqchip; then the guest polls
}

void Vcpu::wake() {
    kvm_mp_state state{};
    state.mp_state = KVM_MP_STATE_RUNNABLE;
    (void)control(file_, KVM_SET_MP_STATE, &state);
}

bool Vcpu::line_is_unmaskable() const {
    constexpr std::size_t lint0 = 0x350;
    kvm_lapic_state apic{};
    if (control(file_, KVM_GET_LAPIC, &apic) != 0)
        return true;
    std::uint32_t entry = 0;
    std::memcpy(&entry, &apic.regs[lint0], sizeof(entry));
    return is_unmaskable(entry);
}

bool Vcpu::halted() const {
    kvm_mp_state state{};
    return control(file_, KVM_GET_MP_STATE, &state) == 0 && state.mp_state == KVM_MP_STATE_HALTED;
}

std::optional<std::uint64_t> Vcpu::read_msr(std::uint32_t index) const {
    MsrList list(1);
    list->nmsrs = 1;
    list->entries[0].index = index;
    if (control(file_, KVM_GET_MSRS, list.get()) != 1)
        return std::nullopt;
    return list->entries[0].data;
}

bool Vcpu::write_msr(std::uint32_t index, std::uint64_t value) {
    MsrList list(1);
    list->nmsrs = 1;
    list->entries[0].index = index;
    list->entries[0].data = value;
    if (control(file_, KVM_SET_MSRS, list.get()) != 1)
        return false;
    // The synchronised registers repeat these two: with the next change of any of them, the old values would
    // be loaded again.
    if (index == msr::apic_base)
        run_->s.regs.sregs.apic_base = value;
    else if (index == msr::x2apic_task_priority)
        run_->s.regs.sregs.cr8 = value >> 4 & 0xf;
    return true;
}

std::optional<std::uint32_t> Vcpu::tsc_khz() const {
    const int khz = control(file_, KVM_GET_TSC_KHZ, 0);
    return khz > 0 ? std::optional(static_cast<std::uint32_t>(khz)) : std::nullopt;
}

std::optional<std::uint64_t> Vcpu::tsc_offset() const {
    std::uint64_t offset = 0;
    kvm_device_attr attribute = tsc_offset_attribute(offset);
    return control(file_, KVM_GET_DEVICE_ATTR, &attribute) == 0 ? std::optional(offset) : std::nullopt;
}

bool Vcpu::set_tsc_offset(std::uint64_t offset) {
    kvm_device_attr attribute = tsc_offset_attribute(offset);
    return control(file_, KVM_SET_DEVICE_ATTR, &attribute) == 0;
}

bool Vcpu::write_xcr0(std::uint64_t value) {
    kvm_xcrs xcrs{};
    xcrs.nr_xcrs = 1;
    xcrs.xcrs[0].value = value;
    return control(file_, KVM_SET_XCRS, &xcrs) == 0;
}

std::optional<std::uint64_t> Vcpu::read_xcr0() const {
    kvm_xcrs xcrs{};
    if (control(file_, KVM_GET_XCRS, &xcrs) != 0)
        return std::nullopt;
    for (const kvm_xcr& entry : std::span(xcrs.xcrs).first(std::min<std::size_t>(xcrs.nr_xcrs, KVM_MAX_XCRS)))
        if (entry.xcr == 0)
            return entry.value;
    return std::nullopt;
}

std::optional<ExtendedState> Vcpu::read_extended() const {
    kvm_xsave raw{};
    if (control(file_, KVM_GET_XSAVE, &raw) != 0)
        return std::nullopt;
    // What a component that is not marked present holds is undefined; it is in its initial state.
    const auto area = std::as_bytes(std::span(&raw, 1));
    const auto present = load_at<std::uint64_t>(area, xsave::present);
    ExtendedState state;
    if ((present & xsave::x87) != 0) {
        state.fctrl = load_at<std::uint16_t>(area, xsave::fcw);
        state.fstat = load_at<std::uint16_t>(area, xsave::fsw);
        state.fop = load_at<std::uint16_t>(area, xsave::fop);
        state.fioff = load_at<std::uint32_t>(area, xsave::fip);
        state.fiseg = load_at<std::uint16_t>(area, xsave::fcs);
        state.fooff = load_at<std::uint32_t>(area, xsave::fdp);
        state.foseg = load_at<std::uint16_t>(area, xsave::fds);
        for (std::size_t i = 0; i < state.st.size(); ++i)
            state.st.at(i) = load_at<std::array<std::byte, 10>>(area, xsave::st + 16 * i);
        state.ftag = full_tag(state, load_at<std::uint8_t>(area, xsave::tag));
    }
    if ((present & (xsave::sse | xsave::avx)) != 0)
        state.mxcsr = load_at<std::uint32_t>(area, xsave::mxcsr);
    if ((present & xsave::sse) != 0)
        for (std::size_t i = 0; i < state.xmm.size(); ++i)
            state.xmm.at(i) = load_at<std::array<std::byte, 16>>(area, xsave::xmm + 16 * i);
    if (const auto ymm = ymm_offset(); ymm && (present & xsave::avx) != 0)
        state.ymm_high = load_at<decltype(state.ymm_high)>(area, *ymm);
    return state;
}

bool Vcpu::write_extended(const ExtendedState& state) {
    kvm_xsave raw{};
    if (control(file_, KVM_GET_XSAVE, &raw) != 0)
        return false;
    const auto area = std::as_writable_bytes(std::span(&raw, 1));
    auto present = load_at<std::uint64_t>(area, xsave::present) | xsave::x87 | xsave::sse;
    put_legacy(state, area);
    // A component that the guest's CPU lacks must not be marked present: so only if there is something in it.
    if (const auto ymm = ymm_offset();
        ymm && (state.ymm_high != ExtendedState{}.ymm_high || (present & xsave::avx) != 0)) {
        store_at(area, *ymm, state.ymm_high);
        present |= xsave::avx;
    }
    store_at(area, xsave::present, present);
    return control(file_, KVM_SET_XSAVE, &raw) == 0;
}

void Vcpu::set_cpuid(std::span<const CpuidLeaf> leaves) {
    CpuidList list(leaves.size());
    list->nent = static_cast<std::uint32_t>(leaves.size());
    for (std::size_t i = 0; i < leaves.size(); ++i) {
        kvm_cpuid_entry2& entry = list->entries[i];
        entry.function = leaves[i].function;
        entry.index = leaves[i].index;
        entry.flags = leaves[i].flags;
        entry.eax = leaves[i].eax;
        entry.ebx = leaves[i].ebx;
        entry.ecx = leaves[i].ecx;
        entry.edx = leaves[i].edx;
    }
    must(file_, "KVM_SET_CPUID2", KVM_SET_CPUID2, list.get());
}

} // namespace umbra
