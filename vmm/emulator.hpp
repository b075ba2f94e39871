// The emulator of privileged and sensitive instructions: what the guest's CPU would have done where the
// machine, at its CPL 3, trapped.
//
// Every instruction that must trap to be virtualised is here, and nothing else: arithmetic, moves and calls
// run natively. Semantics: Intel SDM vol. 2; long mode (64-bit and compatibility mode) and legacy protected
// mode.
#pragma once

#include "vmm/cpu.hpp"
#include "vmm/delivery.hpp"
#include "vmm/guest_space.hpp"

#include <string_view>
#include <variant>

namespace umbra {

/// A change to how addresses translate, told to the shadow MMU after the CPU's state was changed. It says
/// exactly what the CPU must forget, never more (Intel SDM vol. 3A, 4.10.4.1): which translations, of which
/// PCIDs, and whether global ones are among them. The paging-structure caches of the same PCIDs go with the
/// translations; for `page` all of them, as they are not kept by page.
struct PagingChange {
    enum Kind : std::uint8_t {
        mode,              ///< CR0.WP, CR4.SMEP, SMAP or PKE, or EFER.NXE: other rights, nothing is gone
        cr3_load_no_flush, ///< CR3 loaded with bit 63 (CR4.PCIDE only): another root, nothing is gone
        cr3_load,          ///< CR3 loaded: what `pcid`, which is the current one now, had is gone
        page,              ///< the page of `address` in `pcid` is gone
        context,           ///< what `pcid` had is gone
        all_contexts,      ///< what all PCIDs had is gone
        everything,        ///< the same, and all global translations: CR0.PG or CR4.PGE changed ...
    };
    Kind kind = everything;
    /// Global translations go too, whatever PCID they were made in: for `page` those of that page (INVLPG
    /// yes, INVPCID no), for `context` all (CR4.SMEP being set). `everything` has it set, other kinds do not.
    bool globals = true;
    std::uint16_t pcid = 0; ///< the current one but for INVPCID; 0 without CR4.PCIDE
    GuestVirt address;      ///< canonical; `page` only

    [[nodiscard]] constexpr bool all_pcids() const { return kind == all_contexts || kind == everything; }
    bool operator==(const PagingChange&) const = default;
};

struct CpuidResult {
    std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

/// What a CPU is connected to, and what it offers.
class CpuEnvironment {
  public:
    CpuEnvironment() = default;
    CpuEnvironment(const CpuEnvironment&) = delete;
    CpuEnvironment(CpuEnvironment&&) = delete;
    CpuEnvironment& operator=(const CpuEnvironment&) = delete;
    CpuEnvironment& operator=(CpuEnvironment&&) = delete;
    virtual ~CpuEnvironment() = default;

    /// Port I/O of `size` 1, 2 or 4 bytes; never called for a port that kernel_owns().
    [[nodiscard]] virtual std::uint32_t port_read(std::uint16_t port, unsigned size) = 0;
    virtual void port_write(std::uint16_t port, unsigned size, std::uint32_t value) = 0;
    /// Whether a device inside KVM answers at `port`, so that only the machine itself can do the access.
    [[nodiscard]] virtual bool kernel_owns(std::uint16_t port) = 0;

    /// Model-specific registers that VirtualCpu does not hold. nullopt or false: no such register, or a value
    /// that it refuses; the guest gets #GP(0).
    [[nodiscard]] virtual std::optional<std::uint64_t> read_msr(std::uint32_t index) = 0;
    [[nodiscard]] virtual bool write_msr(std::uint32_t index, std::uint64_t value) = 0;
    /// False: #GP(0).
    [[nodiscard]] virtual bool write_xcr0(std::uint64_t value) = 0;
    [[nodiscard]] virtual std::uint64_t read_tsc() = 0;

    /// Whether no more than one instruction, or one element of a repeated one, is to be done at a time.
    [[nodiscard]] virtual bool steps() { return false; }

    virtual void paging_changed(const PagingChange& change) = 0;
    /// What CR3 with this value loads into the PDPTE registers under PAE paging: load_pdptes() of the guest's
    /// memory. nullopt: a present one has a reserved bit set; the guest gets #GP(0). This one is for a CPU
    /// that is never in PAE paging.
    [[nodiscard]] virtual std::optional<std::array<std::uint64_t, 4>> pdptes(std::uint64_t cr3);

    [[nodiscard]] virtual CpuidResult cpuid(std::uint32_t leaf, std::uint32_t subleaf) = 0;
    /// Whether the vendor is AMD: its CPUs have no SYSENTER in long mode, and SYSRET outside 64-bit code (APM
    /// vol. 3). Otherwise they are as the Intel SDM says.
    [[nodiscard]] virtual bool amd() { return false; }
    /// MAXPHYADDR.
    [[nodiscard]] virtual unsigned physical_bits() = 0;
    /// The CR4 bits that the guest may set; any other is #GP(0).
    [[nodiscard]] virtual std::uint64_t cr4_allowed() = 0;
};

/// What became of an instruction. RIP has advanced and RFLAGS.RF is clear unless said otherwise; a #DB for
/// RFLAGS.TF is the caller's affair.
namespace emulated {

/// Whose RFLAGS.TF decides about a #DB behind an instruction (Intel SDM vol. 3B, 17.3.1.4).
enum class SingleStep : std::uint8_t {
    flags_before, ///< of before the instruction
    flags_after,  ///< SYSCALL and SYSRET: of after it
    held,         ///< none, as behind MOV and POP to SS, until the next instruction is done, too
};
/// Executed. RIP stays if a repeated string instruction has more to do: resume, and it traps again.
struct Done {
    /// No interrupt may be taken before the next instruction (STI that set IF, MOV or POP to SS).
    bool interrupt_shadow = false;
    SingleStep step = SingleStep::flags_before;
};
/// To be delivered with deliver(Event::of(…)). RIP is still at the instruction, all its faults being such.
struct Raised {
    Exception exception;
};
/// INT n, INT3, INT1: to be delivered. RIP is after the instruction.
struct SoftwareEvent {
    Event event;
};
/// HLT: cpu.halted is set. `STI; HLT` is executed in one go, RIP after both, where nobody steps.
struct Halted {};
/// IN or OUT at a port that an in-kernel device owns: not executed, but RIP has advanced. The machine shall
/// do it with AL, AX or EAX by `size`; a read of 4 bytes clears the upper half of RAX.
struct PortAccess {
    std::uint16_t port;
    std::uint8_t size; ///< 1, 2 or 4
    bool write;
};
/// A privileged instruction, or a form of one, that umbra cannot emulate. RIP is still at it. The text is
/// static.
struct Unsupported {
    std::string_view what;
};
/// Not an instruction whose trap is umbra's doing (or none at all): the original exception belongs to the
/// guest. Nothing has changed.
struct NotSensitive {};

} // namespace emulated

using Emulation = std::variant<emulated::Done, emulated::Raised, emulated::SoftwareEvent, emulated::Halted,
                               emulated::PortAccess, emulated::Unsupported, emulated::NotSensitive>;

/// Emulates the instruction at RIP. `space` must be of the CPU's current paging state; it is stale after a
/// paging_changed(). Of a repeated string instruction, a bounded number of elements is done in one call.
/// `mnemonic`, if given, is set to the instruction's name (static text, one word), or left alone if it cannot
/// be fetched or decoded.
[[nodiscard]] Emulation emulate(VirtualCpu& cpu, const GuestSpace& space, CpuEnvironment& environment,
                                const char** mnemonic = nullptr);

/// SYSCALL, which may reach the monitor by other ways than a trap at the instruction. `return_rip` is the
/// address after it. When #UD is returned (EFER.SCE is 0), RIP is at the two-byte instruction.
[[nodiscard]] std::optional<Exception> emulate_syscall(VirtualCpu& cpu, GuestVirt return_rip);

} // namespace umbra
