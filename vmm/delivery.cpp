#include "vmm/delivery.hpp"

#include "vmm/segmentation.hpp"

namespace umbra {
namespace {

constexpr unsigned gate_size = 16;

// Offsets of the 64-bit TSS (Intel SDM vol. 3A, figure 7-11).
constexpr std::uint32_t tss_rsp0 = 4;
constexpr std::uint32_t tss_ist1 = 36;

bool software(EventKind kind) {
    return kind == EventKind::software_interrupt || kind == EventKind::software_exception;
}

bool fault_class(const Event& event) {
    if (event.kind != EventKind::exception)
        return false;
    switch (static_cast<Vector>(event.vector)) {
    case Vector::divide_error:
    case Vector::bound:
    case Vector::invalid_opcode:
    case Vector::device_not_available:
    case Vector::invalid_tss:
    case Vector::segment_not_present:
    case Vector::stack_fault:
    case Vector::general_protection:
    case Vector::page_fault:
    case Vector::x87:
    case Vector::alignment_check:
    case Vector::simd:
        return true;
    case Vector::debug: // its faults set RFLAGS.RF themselves, where it is wanted
    case Vector::nmi:
    case Vector::breakpoint:
    case Vector::overflow:
    case Vector::double_fault:
    case Vector::machine_check:
        return false;
    }
    return false;
}

bool is_page_fault(const Event& event) {
    return event.kind == EventKind::exception && event.vector == static_cast<unsigned>(Vector::page_fault);
}

/// Classes of events for table 6-5 of Intel SDM vol. 3A.
enum class Severity : std::uint8_t { benign, contributory, page_fault, double_fault };

Severity severity(const Event& event) {
    if (event.kind != EventKind::exception)
        return Severity::benign;
    switch (static_cast<Vector>(event.vector)) {
    case Vector::divide_error:
    case Vector::invalid_tss:
    case Vector::segment_not_present:
    case Vector::stack_fault:
    case Vector::general_protection:
        return Severity::contributory;
    case Vector::page_fault:
        return Severity::page_fault;
    case Vector::double_fault:
        return Severity::double_fault;
    case Vector::debug:
    case Vector::nmi:
    case Vector::breakpoint:
    case Vector::overflow:
    case Vector::bound:
    case Vector::invalid_opcode:
    case Vector::device_not_available:
    case Vector::x87:
    case Vector::alignment_check:
    case Vector::machine_check:
    case Vector::simd:
        return Severity::benign;
    }
    return Severity::benign;
}

/// An IDT gate in long mode (Intel SDM vol. 3A, figure 6-8).
class Gate {
  public:
    Gate() = default;
    explicit Gate(std::array<std::uint64_t, 2> raw) : raw_(raw) {}

    [[nodiscard]] std::uint16_t selector() const { return static_cast<std::uint16_t>(raw_[0] >> 16); }
    [[nodiscard]] unsigned ist() const { return (raw_[0] >> 32) & 7; }
    [[nodiscard]] unsigned type() const { return (raw_[0] >> 40) & 0x1f; } ///< with the S bit above it
    [[nodiscard]] unsigned dpl() const { return (raw_[0] >> 45) & 3; }
    [[nodiscard]] bool present() const { return ((raw_[0] >> 47) & 1) != 0; }
    [[nodiscard]] std::uint64_t offset() const {
        return (raw_[0] & 0xffff) | ((raw_[0] >> 32) & 0xffff'0000) | (raw_[1] << 32);
    }

  private:
    std::array<std::uint64_t, 2> raw_{};
};

/// One attempt to deliver one event. The CPU changes only if it succeeds.
class Attempt {
  public:
    Attempt(VirtualCpu& cpu, const GuestSpace& space, const Event& event)
        : cpu_(&cpu), space_(&space), event_(&event), ext_(software(event.kind) ? 0 : 1) {}

    [[nodiscard]] std::optional<Exception> run() {
        if (auto exception = find_gate())
            return exception;
        if (auto exception = find_code_segment())
            return exception;
        if (auto exception = find_stack())
            return exception;
        if (auto exception = push_frame())
            return exception;
        if (auto exception = mark_accessed(*cpu_, *space_, code_))
            return exception;
        enter();
        return std::nullopt;
    }

  private:
    [[nodiscard]] bool canonical(std::uint64_t at) const {
        return space_->paging().format->canonical(GuestVirt(at));
    }
    [[nodiscard]] std::optional<Exception> gate_fault(Vector vector) const {
        constexpr std::uint32_t idt = 2; // the error code's IDT bit
        return Exception{vector, event_->vector * 8U + idt + ext_, {}};
    }

    std::optional<Exception> find_gate() {
        const std::uint32_t offset = event_->vector * gate_size;
        if (offset + gate_size - 1 > cpu_->idtr.limit)
            return gate_fault(Vector::general_protection);
        std::array<std::uint64_t, 2> raw{};
        if (auto exception = space_->read(cpu_->idtr.base + offset, raw)) {
            if (exception->vector == Vector::general_protection)
                return gate_fault(Vector::general_protection);
            return exception;
        }
        gate_ = Gate(raw);
        if (gate_.type() != descriptor_type::interrupt_gate && gate_.type() != descriptor_type::trap_gate)
            return gate_fault(Vector::general_protection);
        if (software(event_->kind) && gate_.dpl() < cpu_->cpl)
            return gate_fault(Vector::general_protection);
        if (!gate_.present())
            return gate_fault(Vector::segment_not_present);
        return std::nullopt;
    }

    std::optional<Exception> find_code_segment() {
        if (auto exception = read_descriptor(*cpu_, *space_, gate_.selector(), code_, ext_))
            return exception;
        const std::uint32_t code = selector::error_code(gate_.selector()) | ext_;
        if (!is_code(code_) || code_.dpl > cpu_->cpl)
            return Exception::general_protection(code);
        if (!code_.present)
            return Exception{Vector::segment_not_present, code, {}};
        if (!code_.long_mode || code_.default_32)
            return Exception::general_protection(code);
        if (!canonical(gate_.offset()))
            return Exception::general_protection(ext_);
        new_cpl_ = is_conforming(code_) ? cpu_->cpl : code_.dpl;
        return std::nullopt;
    }

    std::optional<Exception> find_stack() {
        std::uint64_t rsp = (*cpu_)[Gpr::rsp];
        if (gate_.ist() != 0 || new_cpl_ != cpu_->cpl) {
            const std::uint32_t offset =
                gate_.ist() != 0 ? tss_ist1 + (gate_.ist() - 1) * 8 : tss_rsp0 + std::uint32_t{new_cpl_} * 8;
            if (!cpu_->tr.present || offset + 7 > cpu_->tr.limit)
                return Exception{Vector::invalid_tss, selector::error_code(cpu_->tr.selector) | ext_, {}};
            if (auto exception = space_->read(GuestVirt(cpu_->tr.base) + offset, rsp))
                return exception;
        }
        if (!canonical(rsp))
            return Exception{Vector::stack_fault, ext_, {}};
        rsp_ = rsp & ~std::uint64_t{0xf};
        return std::nullopt;
    }

    std::optional<Exception> push_frame() {
        const std::uint64_t saved_rflags = cpu_->rflags | (fault_class(*event_) ? rflags::resume : 0);
        // As it lies in memory, from the lowest address up; without an error code the first one is left out.
        const std::array<std::uint64_t, 6> frame{event_->error_code.value_or(0),
                                                 cpu_->rip,
                                                 cpu_->cs.selector,
                                                 saved_rflags,
                                                 (*cpu_)[Gpr::rsp],
                                                 cpu_->ss.selector};
        const auto pushed = std::span(frame).subspan(event_->error_code ? 0 : 1);
        const GuestVirt bottom = GuestVirt(rsp_) - pushed.size_bytes();
        rsp_ = bottom.value();

        std::optional<Exception> exception;
        if (bottom.page_offset() + pushed.size_bytes() <= page_size) {
            exception = space_->write(bottom, std::as_bytes(pushed));
            if (exception && exception->vector == Vector::page_fault) // at the first push, the highest
                exception->address = bottom + (pushed.size_bytes() - sizeof(std::uint64_t));
        } else {
            // The CPU pushes downwards: so it is the upper page that faults first.
            for (std::size_t i = pushed.size(); i-- > 0 && !exception;)
                exception = space_->write(bottom + i * sizeof(std::uint64_t), pushed[i]);
        }
        if (exception && exception->vector == Vector::general_protection)
            return Exception{Vector::stack_fault, ext_, {}};
        return exception;
    }

    void enter() {
        (*cpu_)[Gpr::rsp] = rsp_;
        if (new_cpl_ != cpu_->cpl) {
            cpu_->ss = Segment{};
            cpu_->ss.selector = new_cpl_;
            cpu_->ss.dpl = new_cpl_;
        }
        cpu_->cs = code_;
        cpu_->cs.selector = static_cast<std::uint16_t>(selector::error_code(gate_.selector()) | new_cpl_);
        cpu_->cpl = new_cpl_;
        cpu_->rip = gate_.offset();
        cpu_->rflags &= ~(rflags::trap | rflags::nested_task | rflags::resume | rflags::virtual_8086);
        if (gate_.type() == descriptor_type::interrupt_gate)
            cpu_->rflags &= ~rflags::interrupt;
        if (event_->kind == EventKind::exception && event_->vector == static_cast<unsigned>(Vector::debug))
            cpu_->dr7 &= ~dr7_general_detect;
        cpu_->halted = false;
    }

    static constexpr std::uint64_t dr7_general_detect = 1U << 13;

    VirtualCpu* cpu_;
    const GuestSpace* space_;
    const Event* event_;
    std::uint32_t ext_; ///< the error code's EXT bit: the cause is not the program's own instruction
    Gate gate_;
    Segment code_;
    std::uint64_t rsp_ = 0;
    std::uint8_t new_cpl_ = 0;
};

/// Table 6-5: whether `second`, met while `first` was being delivered, becomes a double fault.
bool doubles(Severity first, Severity second) {
    switch (first) {
    case Severity::benign:
    case Severity::double_fault: // then the CPU shuts down instead
        return false;
    case Severity::contributory:
        return second == Severity::contributory;
    case Severity::page_fault:
        return second == Severity::contributory || second == Severity::page_fault;
    }
    return false;
}

} // namespace

Delivery deliver(VirtualCpu& cpu, const GuestSpace& space, const Event& event) {
    Delivery result;
    if ((cpu.efer & efer::lma) == 0) {
        result.outcome = Delivery::unsupported;
        return result;
    }
    Event current = event;
    if (is_page_fault(event))
        cpu.cr2 = event.address.value();
    for (;;) {
        const auto fault = Attempt(cpu, space, current).run();
        if (!fault)
            return result;
        // Ends: a fault is never benign, and after one only a contributory one can be followed by another
        // that does not double. So there are at most four.
        result.faults[result.fault_count++] = *fault;
        const Severity first = severity(current);
        if (first == Severity::double_fault) {
            result.outcome = Delivery::triple_fault;
            return result;
        }
        cpu.rip -= current.instruction_length;
        const Event second = Event::of(*fault);
        if (is_page_fault(second)) // even if it doubles: CR2 tells the handler of #DF what happened
            cpu.cr2 = second.address.value();
        current = doubles(first, severity(second)) ? Event::of({Vector::double_fault, 0, {}}) : second;
    }
}

} // namespace umbra
