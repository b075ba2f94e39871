#include "vmm/delivery.hpp"

#include "vmm/segmentation.hpp"

namespace umbra {
namespace {

constexpr unsigned gate_size = 16, legacy_gate_size = 8;

// Offsets of the 64-bit TSS (Intel SDM vol. 3A, figure 7-11).
constexpr std::uint32_t tss_rsp0 = 4;
constexpr std::uint32_t tss_ist1 = 36;
// Of the 32-bit and of the 16-bit one (figures 7-2 and 7-10): the stack pointer for level 0, the selector
// behind it.
constexpr std::uint32_t tss_esp0 = 4;
constexpr std::uint32_t tss_sp0 = 2;

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

/// An IDT gate (Intel SDM vol. 3A, figure 6-2; in long mode figure 6-8, with an upper half).
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
  protected:
    Attempt(VirtualCpu& cpu, const GuestSpace& space, const Event& event)
        : cpu_(&cpu), space_(&space), event_(&event), ext_(software(event.kind) ? 0 : 1) {}

    [[nodiscard]] std::optional<Exception> gate_fault(Vector vector) const {
        constexpr std::uint32_t idt = 2; // the error code's IDT bit
        return Exception{vector, event_->vector * 8U + idt + ext_, {}};
    }
    [[nodiscard]] std::optional<Exception> check_gate_limit(unsigned size) const {
        if (event_->vector * size + size - 1 > cpu_->idtr.limit)
            return gate_fault(Vector::general_protection);
        return std::nullopt;
    }
    [[nodiscard]] std::optional<Exception> check_gate_use() const {
        if (software(event_->kind) && gate_.dpl() < cpu_->cpl)
            return gate_fault(Vector::general_protection);
        if (!gate_.present())
            return gate_fault(Vector::segment_not_present);
        return std::nullopt;
    }
    std::optional<Exception> read_code_segment() {
        if (auto exception = read_descriptor(*cpu_, *space_, gate_.selector(), code_, ext_))
            return exception;
        const std::uint32_t code = selector::error_code(gate_.selector()) | ext_;
        if (!is_code(code_) || code_.dpl > cpu_->cpl)
            return Exception::general_protection(code);
        if (!code_.present)
            return Exception{Vector::segment_not_present, code, {}};
        new_cpl_ = is_conforming(code_) ? cpu_->cpl : code_.dpl;
        return std::nullopt;
    }
    [[nodiscard]] std::uint64_t saved_rflags() const {
        return cpu_->rflags | (fault_class(*event_) ? rflags::resume : 0);
    }
    /// All but the stack.
    void enter_handler(std::uint64_t rip, bool interrupts_off) {
        cpu_->cs = code_;
        cpu_->cs.selector = static_cast<std::uint16_t>(selector::error_code(gate_.selector()) | new_cpl_);
        cpu_->cpl = new_cpl_;
        cpu_->rip = rip;
        cpu_->rflags &= ~(rflags::trap | rflags::nested_task | rflags::resume | rflags::virtual_8086);
        if (interrupts_off)
            cpu_->rflags &= ~rflags::interrupt;
        if (event_->kind == EventKind::exception && event_->vector == static_cast<unsigned>(Vector::debug))
            cpu_->dr7 &= ~dr7_general_detect;
        cpu_->halted = false;
        if (event_->kind == EventKind::nmi)
            cpu_->nmi_blocked = true;
    }

    static constexpr std::uint64_t dr7_general_detect = 1U << 13;

    VirtualCpu* cpu_;
    const GuestSpace* space_;
    const Event* event_;
    std::uint32_t ext_; ///< the error code's EXT bit: the cause is not the program's own instruction
    Gate gate_;
    Segment code_;
    std::uint8_t new_cpl_ = 0;
};

class LongModeAttempt : private Attempt {
  public:
    LongModeAttempt(VirtualCpu& cpu, const GuestSpace& space, const Event& event)
        : Attempt(cpu, space, event) {}

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

    std::optional<Exception> find_gate() {
        if (auto exception = check_gate_limit(gate_size))
            return exception;
        std::array<std::uint64_t, 2> raw{};
        if (auto exception = space_->read(cpu_->idtr.base + std::uint64_t{event_->vector} * gate_size, raw)) {
            if (exception->vector == Vector::general_protection)
                return gate_fault(Vector::general_protection);
            return exception;
        }
        gate_ = Gate(raw);
        if (gate_.type() != descriptor_type::interrupt_gate && gate_.type() != descriptor_type::trap_gate)
            return gate_fault(Vector::general_protection);
        return check_gate_use();
    }

    std::optional<Exception> find_code_segment() {
        if (auto exception = read_code_segment())
            return exception;
        if (!code_.long_mode || code_.default_32)
            return Exception::general_protection(selector::error_code(gate_.selector()) | ext_);
        if (!canonical(gate_.offset()))
            return Exception::general_protection(ext_);
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
        // As it lies in memory, from the lowest address up; without an error code the first one is left out.
        const std::array<std::uint64_t, 6> frame{event_->error_code.value_or(0),
                                                 cpu_->rip,
                                                 cpu_->cs.selector,
                                                 saved_rflags(),
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
        enter_handler(gate_.offset(), gate_.type() == descriptor_type::interrupt_gate);
    }

    std::uint64_t rsp_ = 0;
};

/// Legacy protected mode: Intel SDM vol. 2A, INT n, PROTECTED-MODE and what follows it.
class LegacyAttempt : private Attempt {
  public:
    LegacyAttempt(VirtualCpu& cpu, const GuestSpace& space, const Event& event)
        : Attempt(cpu, space, event) {}

    [[nodiscard]] std::optional<Exception> run() {
        if (auto exception = find_gate())
            return exception;
        if (is_task_gate())
            return std::nullopt;
        if (auto exception = read_code_segment())
            return exception;
        if (auto exception = find_stack())
            return exception;
        if (auto exception = place_frame())
            return exception;
        if (handler() > code_.limit)
            return Exception::general_protection(ext_);
        if (auto exception = push_frame())
            return exception;
        if (auto exception = mark_accessed(*cpu_, *space_, code_))
            return exception;
        if (switches_stack()) {
            if (auto exception = mark_accessed(*cpu_, *space_, ss_))
                return exception;
        }
        enter();
        return std::nullopt;
    }
    /// After a run() without an exception: nothing was done, the gate names a task.
    [[nodiscard]] bool is_task_gate() const { return gate_.type() == descriptor_type::task_gate; }

  private:
    [[nodiscard]] bool wide_gate() const {
        return gate_.type() == descriptor_type::interrupt_gate || gate_.type() == descriptor_type::trap_gate;
    }
    [[nodiscard]] std::uint64_t handler() const {
        return wide_gate() ? static_cast<std::uint32_t>(gate_.offset())
                           : static_cast<std::uint16_t>(gate_.offset());
    }
    [[nodiscard]] bool switches_stack() const { return new_cpl_ != cpu_->cpl; }

    std::optional<Exception> find_gate() {
        if (auto exception = check_gate_limit(legacy_gate_size))
            return exception;
        std::uint64_t raw = 0;
        const GuestVirt at =
            linear(*cpu_, cpu_->idtr.base.value() + std::uint64_t{event_->vector} * legacy_gate_size);
        if (auto exception = space_->read(at, raw))
            return exception;
        gate_ = Gate({raw, 0});
        switch (gate_.type()) {
        case descriptor_type::task_gate:
        case descriptor_type::interrupt_gate_16:
        case descriptor_type::trap_gate_16:
        case descriptor_type::interrupt_gate:
        case descriptor_type::trap_gate:
            return check_gate_use();
        default: // all the other types
            return gate_fault(Vector::general_protection);
        }
    }

    /// SS and ESP of the handler: the current ones, or those of the TSS for its level.
    std::optional<Exception> find_stack() {
        ss_ = cpu_->ss;
        esp_ = static_cast<std::uint32_t>((*cpu_)[Gpr::rsp]);
        if (!switches_stack())
            return std::nullopt;
        const bool wide_tss = (cpu_->tr.type | 2) == descriptor_type::tss_busy;
        const std::uint32_t pointer_size = wide_tss ? 4 : 2;
        const std::uint32_t offset = wide_tss ? tss_esp0 + new_cpl_ * 8U : tss_sp0 + new_cpl_ * 4U;
        const std::uint32_t size = pointer_size + sizeof(std::uint16_t);
        if (!cpu_->tr.present || offset + size - 1 > cpu_->tr.limit)
            return Exception{Vector::invalid_tss, selector::error_code(cpu_->tr.selector) | ext_, {}};
        std::array<std::byte, 6> pointer{};
        const GuestVirt at = linear(*cpu_, cpu_->tr.base + offset);
        if (auto exception = space_->read(at, std::span(pointer).first(size)))
            return exception;
        esp_ = 0;
        std::memcpy(&esp_, pointer.data(), pointer_size);
        std::uint16_t selector = 0;
        std::memcpy(&selector, pointer.data() + pointer_size, sizeof(selector));
        return read_stack_segment(selector);
    }

    std::optional<Exception> read_stack_segment(std::uint16_t selector) {
        if (auto exception = read_descriptor(*cpu_, *space_, selector, ss_, ext_)) {
            if (exception->vector == Vector::general_protection) // null, or outside its table
                exception->vector = Vector::invalid_tss;
            return exception;
        }
        const std::uint32_t code = selector::error_code(selector) | ext_;
        if (selector::rpl(selector) != new_cpl_ || ss_.dpl != new_cpl_ || !is_writable_data(ss_))
            return Exception{Vector::invalid_tss, code, {}};
        if (!ss_.present)
            return Exception{Vector::stack_fault, code, {}};
        return std::nullopt;
    }

    /// The frame's items and where each of them goes, without writing anything.
    std::optional<Exception> place_frame() {
        const auto push = [this](std::uint64_t value) {
            items_[item_count_++].value = static_cast<std::uint32_t>(value);
        };
        if (switches_stack()) {
            push(cpu_->ss.selector);
            push((*cpu_)[Gpr::rsp]);
        }
        push(saved_rflags());
        push(cpu_->cs.selector);
        push(cpu_->rip);
        if (event_->error_code)
            push(*event_->error_code);

        const std::uint32_t pointer_mask = ss_.default_32 ? 0xffff'ffff : 0xffff;
        for (Item& item : items()) {
            // With a 16-bit stack pointer the upper half of ESP stays as it is.
            esp_ = (esp_ & ~pointer_mask) | ((esp_ - width()) & pointer_mask);
            const auto at = address_in_segment(ss_, esp_ & pointer_mask, width(), true);
            if (!at) // only a stack that comes from the TSS is named
                return Exception{Vector::stack_fault,
                                 (switches_stack() ? selector::error_code(ss_.selector) : 0U) | ext_,
                                 {}};
            item.at = *at;
        }
        return std::nullopt;
    }

    std::optional<Exception> push_frame() {
        for (const Item& item : items()) {
            const auto bytes = std::as_bytes(std::span(&item.value, 1)).first(width());
            if (auto exception = space_->write(item.at, bytes))
                return exception;
        }
        return std::nullopt;
    }

    void enter() {
        if (switches_stack()) {
            cpu_->ss = ss_;
        }
        (*cpu_)[Gpr::rsp] = esp_;
        enter_handler(handler(), gate_.type() == descriptor_type::interrupt_gate ||
                                     gate_.type() == descriptor_type::interrupt_gate_16);
    }

    /// Something pushed, in a slot of width() bytes at `at`.
    struct Item {
        GuestVirt at;
        std::uint32_t value = 0;
    };
    [[nodiscard]] unsigned width() const { return wide_gate() ? 4 : 2; }
    [[nodiscard]] std::span<Item> items() { return std::span(items_).first(item_count_); }

    Segment ss_;
    std::uint32_t esp_ = 0;
    std::array<Item, 6> items_{}; ///< in the order of the pushes
    unsigned item_count_ = 0;
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
    const auto unsupported = [&result](std::string_view what) {
        result.outcome = Delivery::unsupported;
        result.what = what;
        return result;
    };
    if (const auto what = unsupported_mode(cpu))
        return unsupported(*what);
    const bool long_mode = in_long_mode(cpu);
    Event current = event;
    if (is_page_fault(event))
        cpu.cr2 = event.address.value();
    for (;;) {
        std::optional<Exception> fault;
        if (long_mode) {
            fault = LongModeAttempt(cpu, space, current).run();
        } else {
            LegacyAttempt attempt(cpu, space, current);
            fault = attempt.run();
            if (!fault && attempt.is_task_gate())
                return unsupported("an interrupt through a task gate");
        }
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
