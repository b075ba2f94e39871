// KVM's API (Documentation/virt/kvm/api.rst), as far as umbra uses it: the only folder that knows ioctls.
//
// Reading order: Kvm (the device), Vm (memory, interrupt controllers), Vcpu (registers, running). What fails
// while a machine is being made throws StartupError with the ioctl's name and reason; running reports by
// value.
#pragma once

#include "shadow/address.hpp"
#include "vmm/cpu.hpp"
#include "vmm/kvm/file.hpp"

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

struct kvm_run;

namespace umbra {

/// One CPUID leaf as KVM offers it or a guest is to see it.
struct CpuidLeaf {
    std::uint32_t function = 0;
    std::uint32_t index = 0;
    std::uint32_t flags = 0; ///< KVM_CPUID_FLAG_*, passed back as they came
    std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

enum class ExitReason : std::uint8_t {
    port,           ///< KVM_EXIT_IO: see Vcpu::port_exit
    mmio,           ///< KVM_EXIT_MMIO: see Vcpu::mmio_exit
    halt,           ///< KVM_EXIT_HLT: no in-kernel irqchip
    shutdown,       ///< KVM_EXIT_SHUTDOWN: triple fault of the machine
    interrupted,    ///< a signal or request_exit
    not_emulated,   ///< KVM cannot emulate an instruction that it must: one that is not in RAM, or accesses
                    ///< what is not
    internal_error, ///< KVM could not go on: see Vcpu::describe_exit
    other,          ///< anything else, and KVM_RUN's own failures: see Vcpu::describe_exit
};

struct PortExit {
    std::uint16_t port = 0;
    unsigned size = 0; ///< 1, 2 or 4
    bool write = false;
    std::span<std::byte> data; ///< one or, for string instructions, more values of `size` bytes
};

struct MmioExit {
    MachinePhys address;
    bool write = false;
    std::span<std::byte> data; ///< 1 to 8 bytes
};

/// The names of the segment registers that a Vcpu can be asked for.
enum class SegmentName : std::uint8_t { cs, ss, ds, es, fs, gs, tr, ldt };

/// The x87, SSE and AVX state, which VirtualCpu leaves in the machine's vCPU (Intel SDM vol. 1, 10.5.1
/// and 13.4).
struct ExtendedState {
    std::array<std::array<std::byte, 10>, 8> st{}; ///< st[0] is the top of the stack
    std::uint16_t fctrl = 0x37f, fstat = 0;
    std::uint16_t ftag = 0xffff; ///< the full tag word: two bits for each physical register, 3 is empty
    std::uint16_t fop = 0;
    std::uint32_t fioff = 0, fooff = 0; ///< of the last instruction and its operand
    std::uint16_t fiseg = 0, foseg = 0; ///< in 64-bit mode: bits [47:32] of those addresses
    std::uint32_t mxcsr = 0x1f80;
    std::array<std::array<std::byte, 16>, 16> xmm{};
    std::array<std::array<std::byte, 16>, 16> ymm_high{}; ///< bits [255:128]; zero if there is no AVX

    bool operator==(const ExtendedState&) const = default;
};

/// The legacy region of an XSAVE area, as FXSAVE64 writes it (Intel SDM vol. 1, table 10-2).
inline constexpr std::size_t fxsave_bytes = 512;
[[nodiscard]] std::array<std::byte, fxsave_bytes> to_fxsave(const ExtendedState& state);

class Vcpu {
  public:
    Vcpu(File file, std::size_t run_size);
    Vcpu(Vcpu&&) noexcept = default;
    Vcpu& operator=(Vcpu&&) = delete;
    Vcpu(const Vcpu&) = delete;
    Vcpu& operator=(const Vcpu&) = delete;
    ~Vcpu();

    /// Runs until an exit. Registers set since the last exit take effect; a port or MMIO read's data must
    /// have been filled in.
    [[nodiscard]] ExitReason run();
    /// How often run() has come back.
    [[nodiscard]] std::uint64_t exits() const { return exits_; }
    /// Makes the current or next run() return `interrupted`. Async-signal-safe. A vCPU that is inside KVM_RUN
    /// on another thread needs a signal besides.
    void request_exit();
    void clear_exit_request();

    [[nodiscard]] PortExit port_exit() const;
    [[nodiscard]] MmioExit mmio_exit() const;
    /// Whether it is at its reset vector: an INIT has come by its local APIC (Intel SDM vol. 3A, 9.1.4), and
    /// what its registers held is lost.
    [[nodiscard]] bool was_reset() const;
    /// The last exit in words, for reports.
    [[nodiscard]] std::string describe_exit() const;

    // General registers, synchronised at every exit (KVM_CAP_SYNC_REGS). Setting any makes all of them be
    // loaded.
    void read_gprs(std::array<std::uint64_t, 16>& gpr) const;
    void write_gprs(const std::array<std::uint64_t, 16>& gpr);
    void write_gpr(Gpr reg, std::uint64_t value);
    [[nodiscard]] std::uint64_t gpr(Gpr reg) const;
    [[nodiscard]] std::uint64_t rip() const;
    [[nodiscard]] std::uint64_t rsp() const;
    [[nodiscard]] std::uint64_t rflags() const;
    void set_rip(std::uint64_t value);
    void set_rsp(std::uint64_t value);
    void set_rflags(std::uint64_t value);

    // System registers, likewise. Setting any makes all of them be loaded, which costs more.
    [[nodiscard]] std::uint64_t cr2() const;
    [[nodiscard]] std::uint64_t cr3() const;
    [[nodiscard]] Segment segment(SegmentName name) const;
    [[nodiscard]] std::uint16_t selector(SegmentName name) const;
    [[nodiscard]] std::uint64_t segment_base(SegmentName name) const;
    void set_segment(SegmentName name, const Segment& value);
    void set_segment_base(SegmentName name, std::uint64_t base);
    void set_descriptor_tables(DescriptorTable gdt, DescriptorTable idt);
    void set_control(std::uint64_t cr0, std::uint64_t cr4, std::uint64_t efer);
    void set_cr3(MachineFrame root);
    void set_cr8(std::uint64_t value);
    [[nodiscard]] std::uint64_t cr8() const;

    /// The whole state, to and from the machine: for an engine that runs the guest on the machine's own CPU.
    void store(const VirtualCpu& cpu);
    void load(VirtualCpu& cpu) const;

    /// Whether KVM was about to inject an event when a signal ended the run: it will with the next one.
    [[nodiscard]] bool injects() const;
    /// Whether interrupts are held back for one instruction, as after STI. Only after an exit by a port
    /// access.
    void set_interrupt_shadow(bool shadow);
    /// The machine has taken an NMI: KVM holds further ones back until it sees an IRET, or unblock_nmi().
    void nmi_taken() { nmi_blocked_ = true; }
    /// NMIs may come again. Cheap if none has been taken.
    void unblock_nmi();
    /// KVM has an NMI that it has not injected yet. If it is an interrupt shadow that holds it back, KVM of
    /// AMD runs the next instruction with RFLAGS.TF set, which shows in the flags that a trap there pushes.
    [[nodiscard]] bool nmi_waits() const;
    /// KVM_SET_MP_STATE: the vCPU sleeps until an interrupt that RFLAGS.IF admits.
    void halt();
    /// It sleeps no longer.
    void wake();
    /// KVM_GET_MP_STATE: whether it sleeps, by a HLT of its own or by halt().
    [[nodiscard]] bool halted() const;
    /// Whether its local APIC passes the PIC's and PIT's line on as an interrupt that RFLAGS.IF does not hold
    /// back, such as an NMI; also if KVM does not tell.
    [[nodiscard]] bool line_is_unmaskable() const;

    /// KVM_GET_MSRS, KVM_SET_MSRS: as userspace, which KVM trusts with more than a guest. Nothing or false if
    /// KVM has no such register, or refuses the value. What is written to the local APIC's base or task
    /// priority shows in the synchronised registers at once.
    [[nodiscard]] std::optional<std::uint64_t> read_msr(std::uint32_t index) const;
    [[nodiscard]] bool write_msr(std::uint32_t index, std::uint64_t value);
    /// KVM_GET_TSC_KHZ: the rate of the machine's TSC; nothing if KVM does not know it.
    [[nodiscard]] std::optional<std::uint32_t> tsc_khz() const;
    /// KVM_VCPU_TSC_OFFSET: what the machine's TSC is ahead of the host's, modulo 2^64; nothing or false if
    /// KVM does not tell (before Linux 5.16).
    [[nodiscard]] std::optional<std::uint64_t> tsc_offset() const;
    [[nodiscard]] bool set_tsc_offset(std::uint64_t offset);
    [[nodiscard]] bool write_xcr0(std::uint64_t value);
    [[nodiscard]] std::optional<std::uint64_t> read_xcr0() const;
    /// KVM_GET_XSAVE; nothing if KVM refuses.
    [[nodiscard]] std::optional<ExtendedState> read_extended() const;
    /// KVM_SET_XSAVE; other components stay as they are. False if KVM refuses, as for reserved bits of MXCSR.
    [[nodiscard]] bool write_extended(const ExtendedState& state);
    void set_cpuid(std::span<const CpuidLeaf> leaves);

  private:
    void dirty_registers();
    void dirty_system_registers();

    File file_;
    kvm_run* run_ = nullptr;
    std::size_t run_size_ = 0;
    int error_ = 0; ///< errno of a failed KVM_RUN
    std::uint64_t exits_ = 0;
    bool nmi_blocked_ = false; ///< by an NMI that the machine has taken
};

/// Whether KVM notes which pages of a memory slot are written to.
enum class WriteLog : bool { off, on };

class Vm {
  public:
    Vm(File file, std::size_t run_size) : file_(std::move(file)), run_size_(run_size) {}

    /// Gives the machine `bytes` (page aligned, outliving the Vm) at `base`. Slots that exist before
    /// create_irqchip cost microseconds, later ones milliseconds.
    void add_memory(unsigned slot, MachinePhys base, std::span<std::byte> bytes,
                    WriteLog log = WriteLog::off);
    /// KVM_GET_DIRTY_LOG: which pages of a slot with a log the machine has written to since the last call, a
    /// bit each; `bits` holds them all. False if KVM refuses.
    [[nodiscard]] bool written_pages(unsigned slot, std::span<std::uint64_t> bits);
    /// KVM_SET_NR_MMU_PAGES: the most tables that KVM makes for the machine at a time where it shadows the
    /// machine's own, instead of one for each 50 pages of memory. At least 64. Ignored where KVM does not let
    /// it be set.
    void allow_shadow_pages(std::uint64_t count);
    /// In-kernel PIC, I/O APIC, local APICs and PIT; before any vCPU. Line 0, the PIT's, is input 2 of the
    /// I/O APIC; the others are the inputs of their number. The PIT's ticks that a guest cannot take in time
    /// are lost, as on a PC: they are not made up for. They are as a PC's BIOS leaves them: the PIT's channel
    /// 0 ticks at 18.2 Hz, in mode 3; the PICs are at vectors 0x08 and 0x70. But all of their inputs are
    /// masked: kernels for machines without a BIOS may enable interrupts and expect none.
    void create_interrupt_controllers();
    [[nodiscard]] Vcpu create_vcpu(unsigned id);
    void set_irq_line(unsigned irq, bool level);
    /// Whether an input of the I/O APIC is passed on as an interrupt that RFLAGS.IF does not hold back; also
    /// if KVM does not tell.
    [[nodiscard]] bool has_unmaskable_input() const;

  private:
    void route_lines();
    void leave_as_a_bios_does();

    File file_;
    std::size_t run_size_;
    std::jthread background_; ///< of create_interrupt_controllers; ends before file_ is closed
};

class Kvm {
  public:
    /// Opens /dev/kvm and checks what umbra needs of it; otherwise StartupError(host_cannot) says what to do.
    Kvm();

    [[nodiscard]] Vm create_vm() const;
    [[nodiscard]] const std::vector<CpuidLeaf>& supported_cpuid() const { return cpuid_; }
    /// MAXPHYADDR of the machines.
    [[nodiscard]] unsigned physical_bits() const;
    /// The machines' CPU maps 1 GB pages.
    [[nodiscard]] bool gigabyte_pages() const;
    /// The CR4 bits that the machines may set.
    [[nodiscard]] std::uint64_t cr4_offered() const;
    [[nodiscard]] const CpuidLeaf* leaf(std::uint32_t function, std::uint32_t index = 0) const;

  private:
    File file_;
    std::size_t run_size_ = 0;
    std::vector<CpuidLeaf> cpuid_;
};

} // namespace umbra
