// The debugger's mechanism: breakpoints, watchpoints, steps and catches, by umbra's own means alone, so that
// they are the same on every host.
//
//   software breakpoints  int3 in guest memory; where the page is not mapped yet, or the guest must not see
//   it, a
//                         guard of the shadow MMU that makes each fetch from the page trap
//   hardware breakpoints  such a guard: they belong to the address, whatever is mapped there
//   watchpoints           guards against data access; the instruction's operands are compared to the byte
//   steps                 EFLAGS.TF of the machine, which the guest does not see
//
// It speaks no protocol: a DebugFrontend does. All of it is on the vCPU's thread. Reading order: Stop,
// DebugFrontend, what the front end asks for, what the monitor tells.
#pragma once

#include "shadow/mmu.hpp"
#include "vmm/cpu.hpp"
#include "vmm/debug/agent.hpp"
#include "vmm/debug/operands.hpp"
#include "vmm/delivery.hpp"
#include "vmm/kvm/kvm.hpp"
#include "vmm/verdict.hpp"

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace umbra {

enum class BreakpointKind : std::uint8_t { software, hardware };
enum class WatchKind : std::uint8_t { write, read, access };

/// Why the guest stands still.
struct Stop {
    enum class Kind : std::uint8_t {
        request,    ///< by the client
        step,       ///< an instruction, or a range of them, is done
        breakpoint, ///< RIP is at it
        watchpoint, ///< the instruction that made the access is done
        event,      ///< the guest is about to see it
        ended,      ///< it cannot go on; its state is as it was
    };
    Kind kind = Kind::request;
    BreakpointKind breakpoint{};
    WatchKind watch{};
    GuestVirt address{};                  ///< watchpoints: of the first byte accessed that is watched
    bool physical = false;                ///< watchpoints: by physical address, which the text names
    std::optional<std::uint8_t> vector{}; ///< events that are exceptions or interrupts
    std::string text{};                   ///< one line for the user; may be empty
};

/// How the guest goes on.
struct Resume {
    enum class Kind : std::uint8_t { go, step };
    Kind kind = Kind::go;
    GuestVirt range_start, range_end; ///< step: until RIP is outside; empty: one instruction
    bool drop_event = false;          ///< an exception that was caught is not delivered
};

/// Events that stop the guest before it sees them.
struct Catches {
    std::set<std::uint8_t> vectors; ///< exceptions, and interrupts of any kind
    bool cr3 = false;               ///< MOV to CR3
    bool any_msr = false;           ///< RDMSR, WRMSR
    std::set<std::uint32_t> msrs;

    [[nodiscard]] bool instructions() const { return cr3 || any_msr || !msrs.empty(); }
};

class Debugger;

/// What speaks with the debugger's client. All calls come on the vCPU's thread.
class DebugFrontend {
  public:
    DebugFrontend() = default;
    DebugFrontend(const DebugFrontend&) = delete;
    DebugFrontend(DebugFrontend&&) = delete;
    DebugFrontend& operator=(const DebugFrontend&) = delete;
    DebugFrontend& operator=(DebugFrontend&&) = delete;
    virtual ~DebugFrontend() = default;

    /// A machine begins to run, under this debugger; nullptr: it has ended.
    virtual void attach(Debugger* debugger) = 0;
    /// The guest runs. True: it is to stop.
    [[nodiscard]] virtual bool poll() = 0;
    /// The guest stands still: serve() is called until it is to go on.
    virtual void stopped(const Stop& stop) = 0;
    enum class Serve : std::uint8_t {
        waiting, ///< for the client
        resume,  ///< as told to Debugger::resume
        kill,    ///< the run is over
        reset,   ///< it begins anew
    };
    /// Does what the client has asked for so far. Never blocks.
    [[nodiscard]] virtual Serve serve() = 0;
    /// Whether there is a client who looks at a guest that cannot go on.
    [[nodiscard]] virtual bool connected() const = 0;
    /// The guest waits for a client before its first instruction.
    [[nodiscard]] virtual bool wants_pause() const = 0;
    virtual void ended(const Verdict& verdict) = 0;
    /// By the client's numbers, of its expressions; nothing: no such register, or one of more than 64 bits.
    [[nodiscard]] virtual std::optional<std::uint64_t> read_register(unsigned number) const = 0;
    /// Shown by the client, if it is one that can, while the guest runs.
    virtual void print(std::string_view text) = 0;
};

/// The machine that is debugged.
struct DebugTarget {
    VirtualCpu& cpu;
    Mmu& mmu;
    ShadowTables& tables;
    const GuestMemory& memory;
    Vcpu& vcpu; ///< FPU and vector registers
};

class Debugger {
  public:
    /// What `target` refers to outlives this.
    Debugger(DebugTarget target, DebugFrontend& frontend);
    Debugger(const Debugger&) = delete;
    Debugger& operator=(const Debugger&) = delete;
    Debugger(Debugger&&) = delete;
    Debugger& operator=(Debugger&&) = delete;
    ~Debugger();

    // --- The front end, while the guest stands still

    [[nodiscard]] VirtualCpu& cpu() { return target_.cpu; }
    [[nodiscard]] Vcpu& vcpu() { return target_.vcpu; }
    [[nodiscard]] const GuestMemory& memory() const { return target_.memory; }
    [[nodiscard]] Mmu& mmu() { return target_.mmu; }

    /// Virtual addresses by the guest's own tables as they are now, whatever their rights; changes no
    /// accessed bits. Returns how many bytes are there: fewer if what follows is not mapped, or not RAM. What
    /// umbra has put there for breakpoints is not seen. Address: GuestVirt or GuestPhys.
    template<class Address>
    [[nodiscard]] std::size_t read(Address at, std::span<std::byte> into) const;
    /// The same for writes, also to read-only pages. Shadow tables follow.
    template<class Address>
    [[nodiscard]] std::size_t write(Address at, std::span<const std::byte> from);

    struct Breakpoint {
        BreakpointKind kind{};
        GuestVirt at;
        std::vector<AgentExpression> conditions; ///< stops if any is true; none: always
        std::vector<AgentExpression> commands;   ///< run at each hit, in place of a stop
        bool operator==(const Breakpoint&) const = default;
    };
    /// Replaces one of the same kind and place.
    void insert(Breakpoint breakpoint);
    void remove(BreakpointKind kind, GuestVirt at);
    /// Bytes [at, at + size), by that address in any address space. False if that is too much: watch_limit.
    [[nodiscard]] bool watch(WatchKind kind, GuestVirt at, std::uint64_t size);
    void unwatch(WatchKind kind, GuestVirt at, std::uint64_t size);
    /// The same by physical address, however it is reached.
    [[nodiscard]] bool watch(WatchKind kind, GuestPhys at, std::uint64_t size);
    void unwatch(WatchKind kind, GuestPhys at, std::uint64_t size);
    static constexpr std::uint64_t watch_limit = std::uint64_t{1} << 28; ///< bytes, of all together
    struct PhysicalWatch {
        WatchKind kind{};
        GuestPhys at;
        std::uint64_t size = 0;
    };
    [[nodiscard]] std::vector<PhysicalWatch> physical_watches() const;

    /// Breakpoints and watchpoints at this address, now or later, count in the address space with this root
    /// only; nothing: in all.
    void bind(GuestVirt at, std::optional<GuestFrame> root);
    void hide_breakpoints(bool hide) { hidden_ = hide; }
    /// Whether a step may end in an interrupt's handler.
    void step_into_interrupts(bool into) { step_interrupts_ = into; }
    Catches& catches() { return catches_; }

    void resume(const Resume& how);
    /// As if it had never been here: the guest goes on without breakpoints, watchpoints and catches.
    void clear();

    // --- The monitor, while the guest runs

    [[nodiscard]] DebugFrontend& frontend() { return frontend_; }
    [[nodiscard]] bool stop_wanted() const { return stop_.has_value(); }
    /// Unless there is a reason already.
    void want_stop(Stop stop);
    /// The guest stands still: why. What was out of the way for one instruction is in place again.
    [[nodiscard]] Stop take_stop();

    /// The guest is about to go on from a stop: what the front end has asked for takes effect.
    void apply();
    /// Before each entry. True: the guest is to run for one instruction.
    [[nodiscard]] bool prepare_entry();
    /// The guest is to take no interrupt with this instruction: where each instruction of a handler takes
    /// longer than a tick of the timer, the interrupted one would never be executed.
    [[nodiscard]] bool holds_interrupts() const { return !step_interrupts_ || stepping_over_; }

    /// #BP, or the #GP or #UD that comes in its place: whether it is ours. The guest does not learn of it.
    [[nodiscard]] bool breakpoint_trap(std::uint8_t vector);
    /// Miss::guarded. True: the access may be made. False: the guest stops before it, or does it anew.
    [[nodiscard]] bool guarded(GuestVirt at, Access access);
    /// The instruction has been executed: in an entry for one instruction, or by umbra; or it has entered the
    /// system-call handler, or left the kernel.
    void executed() { instruction_ended(true); }
    /// The bytes at RIP, as the guest wrote them.
    [[nodiscard]] std::vector<std::byte> code() const;
    /// Where an interrupt came.
    struct ReturnTo {
        GuestVirt rip;
        std::uint64_t rsp = 0;
        bool done = false; ///< the CPU was halted: with its waking the instruction was done
    };
    /// An event's handler has been entered.
    void delivered(const Event& event, const ReturnTo& interrupted);
    /// HLT: a step ends when the CPU wakes.
    void halted();
    /// An event is about to be delivered. True: the guest stops before, and it is to be delivered afterwards.
    [[nodiscard]] bool catches_event(const Event& event);
    /// The same for the privileged instruction at RIP; it traps again afterwards.
    [[nodiscard]] bool catches_instruction();
    /// umbra has written to guest memory, for the guest: GuestBus.
    void stored(GuestPhys at, std::optional<GuestVirt> linear, std::size_t size);
    /// The event that was caught is not to be delivered.
    [[nodiscard]] bool drops_event() const { return resume_.drop_event; }

  private:
    struct Watch {
        WatchKind kind{};
        GuestVirt at; ///< virtual ones
        std::optional<GuestPhys> physical;
        std::uint64_t size = 0;

        bool operator==(const Watch&) const = default;
    };
    /// An int3.
    struct Patch {
        GuestVirt at;    ///< of the breakpoint, which this address space has there
        GuestFrame root; ///< its top-level table
        std::byte original{};
        bool lifted = false; ///< for one instruction
    };
    /// A watched place that the instruction under way accesses.
    struct Candidate {
        Stop stop;
        std::vector<std::byte> before; ///< the bytes from stop.address on, before a write
    };

    [[nodiscard]] std::uint64_t watched_bytes() const;
    void instruction_ended(bool retired);
    void entered_interrupt(const ReturnTo& interrupted);
    void abandon_instruction();
    void put_back();
    bool set_patches();
    void set_guards();
    [[nodiscard]] std::optional<GuestPhys> translate(GuestVirt at, std::optional<GuestFrame> root = {}) const;
    [[nodiscard]] std::optional<GuestFrame> bound_to(GuestVirt at) const;
    [[nodiscard]] bool counts_here(GuestVirt at) const;
    [[nodiscard]] bool hit(GuestVirt rip);
    void check_operands(GuestVirt at, const Access& access);
    [[nodiscard]] std::optional<Stop> take_access();
    void check_access(GuestVirt at, std::uint64_t size, bool read, bool write);
    void lift(GuestPhys at);
    void lift_page(GuestFrame frame);
    [[nodiscard]] static std::optional<GuestPhys> translate(GuestPhys at) { return at; }
    template<class Address, class Piece>
    std::size_t for_each_piece(Address at, std::size_t size, Piece piece) const;
    void copy_out(std::span<const std::byte> ram, GuestPhys at, std::span<std::byte> into) const;
    void copy_in(std::span<std::byte> ram, GuestPhys at, std::span<const std::byte> from);

    DebugTarget target_;
    DebugFrontend& frontend_;

    // What the front end has asked for
    std::vector<Breakpoint> breakpoints_;
    std::vector<Watch> watches_;
    std::map<GuestVirt, GuestFrame> bound_;
    Catches catches_;
    bool hidden_ = false;
    bool step_interrupts_ = false;
    Resume resume_;

    // What is in effect
    std::map<GuestPhys, Patch> patches_;

    // The instruction under way
    bool stepping_over_ = false;          ///< for one instruction, of which the client is not told
    std::optional<GuestVirt> resumed_at_; ///< a breakpoint here has been told
    std::optional<ReturnTo> told_;        ///< the same, when the handler that came between returns to here
    std::vector<Candidate> accesses_;     ///< one of them is told when the instruction is done
    std::optional<Stop> stored_;          ///< one that umbra has made already, for the guest
    /// The step goes on, or ends, when the interrupt's handler returns to here.
    std::optional<ReturnTo> return_to_;

    std::optional<Stop> stop_;
};

} // namespace umbra
