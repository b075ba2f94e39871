// The switcher: how the machine gets from the guest to the monitor and back.
//
// Its code (switcher_image.S) and, for each vCPU, a GDT, an IDT, a TSS and an entry stack lie in one
// top-level slot of every shadow root, supervisor-only: guest code, which always runs at CPL 3, can neither
// read nor name them. Any trap of guest code goes through the machine's IDT to a stub that makes one exit.
// `leave` turns the machine's state at that exit into the virtual CPU's; `enter` does the reverse, and pays
// the shadow MMU's debt on the way.
//
// The guest runs with its own selectors in CS and SS, which it can read. No descriptor stands behind them: of
// the machine's GDT and LDT only the switcher's own descriptors are mapped, at the end of the GDT, and their
// DPL of 0 hides them from CPL 3. So whatever looks at a descriptor at CPL 3 (loads, far transfers, LAR, LSL,
// VERR, VERW) page faults in a table, and is emulated on the guest's. It is registers alone that put CS and
// SS into the machine: an `iretq` would look them up.
#pragma once

#include "shadow/mmu.hpp"
#include "vmm/cpu.hpp"
#include "vmm/kvm/kvm.hpp"
#include "vmm/monitor_memory.hpp"
#include "vmm/traits.hpp"

#include <array>
#include <cstdint>
#include <optional>
#include <utility>

namespace umbra {

/// The part that all vCPUs share: the code's pages and the tables below the reserved slot.
class SwitcherRegion {
  public:
    /// Builds the region for `vcpus` vCPUs. `memory` outlives it.
    SwitcherRegion(MonitorMemory& memory, unsigned vcpus);

    /// The entry that every shadow root carries in the reserved slot.
    [[nodiscard]] ShadowEntry root_entry() const;
    /// The most tables that a vCPU's stack can carry as debt: the pool must not be larger.
    [[nodiscard]] static std::size_t max_debt(unsigned vcpus);

  private:
    friend class Switcher;
    MonitorMemory& memory_;
    std::size_t block_pages_; ///< of each vCPU
};

/// Why the machine left the guest.
struct Trap {
    enum class Kind : std::uint8_t {
        vector,     ///< an exception or interrupt, by the machine's IDT
        syscall,    ///< the `syscall` instruction; RIP is behind it
        descriptor, ///< an instruction that looks at a descriptor; its selector, but for the RPL, is
                    ///< error_code
        none,       ///< no trap: KVM exited at guest code (a port or MMIO access, a signal)
        broken,     ///< the switcher itself faulted: the machine's state is lost
    };
    Kind kind = Kind::none;
    std::uint8_t vector = 0;
    std::optional<std::uint32_t> error_code; ///< if the machine pushed one
    GuestVirt address;                       ///< CR2; for page faults
};

/// A port access to be made for the guest on the way back to it, by AL, AX or EAX.
struct NativePortAccess {
    std::uint16_t port = 0;
    unsigned size = 1;
    bool write = false;
};

/// One vCPU's switcher.
class Switcher {
  public:
    /// Where the host's GDT is in force, Linux' selectors for its programs: valid at CPL 3 whatever the VM's
    /// GDT says.
    static constexpr std::uint16_t host_user_code = 0x33, host_user_data = 0x2b;

    Switcher(SwitcherRegion& region, Vcpu& machine, const HostTraits& traits, unsigned id);

    /// Gives the machine its descriptor tables, system-call entry and control registers for the reserved slot
    /// `slot`. To be called again when the slot moves.
    void place(unsigned slot);

    /// After an exit: brings general registers, RIP, RSP, RFLAGS and segment bases of `cpu` up to date and
    /// says what happened.
    [[nodiscard]] Trap leave(VirtualCpu& cpu);

    /// Prepares the machine to go on with `cpu` on the tables of `root`. Pays `debt`: the caller says so to
    /// the Mmu. What `access` reads is in RAX, of `cpu` or of the machine. False if ring 0 did not do its
    /// work: Vcpu::describe_exit tells.
    [[nodiscard]] bool enter(VirtualCpu& cpu, MachineFrame root, const Debt& debt, const TablePool& pool,
                             std::optional<NativePortAccess> access = std::nullopt);

    /// Whether entries from now on are without IOPL, so that CLI, STI, IN, OUT, INS and OUTS trap.
    void withhold_iopl(bool withhold) { iopl_withheld_ = withhold; }

    /// Control registers that the machine honours for the guest: FPU and SSE state, FSGSBASE, TSD, alignment
    /// checks, EFER.SCE. `allowed_cr4`: what KVM lets the machine have; UMIP is set if it may be, so that
    /// sgdt and its kin trap.
    void set_control(const VirtualCpu& cpu, std::uint64_t allowed_cr4);

    /// To be asked at each #AC of the machine. True if the guest's CPU would not have raised it: the guest
    /// then goes on at the same instruction, and is not checked until its next trap at least.
    [[nodiscard]] bool absorb_alignment_check(const VirtualCpu& cpu);

    /// Whether an NMI met the machine in ring 0, once: it goes on there as if there had been none.
    [[nodiscard]] bool nmi_came() { return std::exchange(nmi_came_, false); }

    /// What it shall take the host for from now on.
    void assume(const HostTraits& traits) { traits_ = traits; }

    /// Whether the machine is in ring 0, and so in the switcher: at the end of a trap, or at work for
    /// `enter`.
    [[nodiscard]] bool in_ring0() const;

    /// An address from which the guest gets no further: a fetch page fault at it is the next trap.
    [[nodiscard]] MachineVirt unreachable() const { return MachineVirt(address(stack_top_ - page_size)); }
    /// Where `syscall` goes, in the machine's LSTAR.
    [[nodiscard]] MachineVirt syscall_entry() const { return MachineVirt(syscall_entry_); }

  private:
    struct Frame { ///< what the machine pushes on a trap and `iretq` pops
        std::uint64_t rip, cs, rflags, rsp, ss;
    };
    [[nodiscard]] std::uint64_t
    address(std::size_t offset) const; ///< of a byte of the area, in the reserved slot
    [[nodiscard]] std::uint64_t machine_flags(const VirtualCpu& cpu) const;
    void set_alignment_checks(const VirtualCpu& cpu);
    void take_segments(VirtualCpu& cpu);
    void put_segments(const VirtualCpu& cpu);
    void choose_code_and_stack(const VirtualCpu& cpu);
    void set_descriptor(const Segment& segment);
    bool set_nmi_aside();
    bool undo_repeated_interrupt();
    [[nodiscard]] GuestVirt gdt_base() const;
    [[nodiscard]] GuestVirt ldt_base() const;
    [[nodiscard]] std::optional<std::uint16_t> selector_of(GuestVirt descriptor) const;
    void prepare_work(const VirtualCpu& cpu, MachineFrame root, const Debt& debt, const TablePool& pool,
                      std::optional<NativePortAccess> access);
    [[nodiscard]] bool finish_work();

    MonitorMemory& memory_;
    Vcpu& machine_;
    HostTraits traits_;
    std::size_t block_;               ///< offset of this vCPU's pages in the switcher's area
    std::size_t stack_top_;           ///< offset of the end of its entry stack
    MachineVirt base_;                ///< where the reserved slot begins
    std::uint64_t syscall_entry_ = 0; ///< LSTAR
    MachineFrame root_;               ///< loaded in the machine's CR3
    std::uint64_t control_cr0_ = 0, control_cr4_ = 0,
                  control_efer_ = 0; ///< as set_control chose them, without CR0.AM
    bool nmi_came_ = false;
    bool iopl_withheld_ = false;
    bool alignment_checks_ = false;      ///< the machine's CR0.AM
    bool hide_alignment_flag_ = false;   ///< the next entry leaves EFLAGS.AC out
    bool alignment_flag_hidden_ = false; ///< the last one did
    Segment code_, stack_;               ///< CS and SS that the guest runs with
    std::array<Segment, 4> data_{};      ///< DS, ES, FS, GS in the machine, without their bases
};

} // namespace umbra
