// How gdb and LLDB see the virtual CPU: one table of registers, from which the target description and the
// contents of the packets g, G, p and P are made.
//
// GDB manual, appendix "Target Descriptions", sections "Target Description Format" and "i386 Features".
#pragma once

#include "vmm/cpu.hpp"
#include "vmm/kvm/kvm.hpp"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace umbra {

/// gdb cannot change it during a connection.
enum class TargetWidth : std::uint8_t { bits_32, bits_64 };

struct CpuView {
    const VirtualCpu& cpu;
    const ExtendedState& extended;
};

/// The state to change, and what bounds the control registers.
struct CpuEdit {
    VirtualCpu& cpu;
    ExtendedState& extended;
    std::uint64_t cr4_allowed = 0; ///< the CR4 bits that the guest's CPU has
    unsigned physical_bits = 36;   ///< MAXPHYADDR
};

class RegisterSet {
  public:
    explicit RegisterSet(TargetWidth width, bool avx = false);

    [[nodiscard]] TargetWidth width() const { return width_; }
    [[nodiscard]] std::size_t count() const { return registers_.size(); }
    [[nodiscard]] std::string target_xml() const;

    /// Hexadecimal digits, as the packets g and p want them. Empty if there is no such register.
    [[nodiscard]] std::string read_all(const CpuView& view) const;
    [[nodiscard]] std::string read(std::size_t number, const CpuView& view) const;
    /// The value of one that is no FPU or vector register; nothing if it is, or there is no such register.
    [[nodiscard]] std::optional<std::uint64_t> value(std::size_t number, const VirtualCpu& cpu) const;
    /// The frame pointer, stack pointer and program counter, as a stop reply carries them: "06:…;07:…;10:…;".
    [[nodiscard]] std::string expedited(const VirtualCpu& cpu) const;

    /// False: nothing was changed, as there is no such register, the digits are not its size, or the value is
    /// refused. Writable are the general and FPU registers, RIP, RFLAGS, the bases of FS and GS, CR2, and,
    /// with the checks of MOV to them, CR0, CR3, CR4, CR8 and EFER, except that paging and long mode stay as
    /// they are. The caller compares those before and after, to tell the MMU, and reloads PAE's PDPTEs.
    /// Selectors are refused, as their hidden parts would not fit them. A register may always be written with
    /// the value that it has.
    [[nodiscard]] bool write(std::size_t number, std::string_view hex, const CpuEdit& edit) const;
    [[nodiscard]] bool write_all(std::string_view hex, const CpuEdit& edit) const;

  private:
    using Get = void (*)(const CpuView&, std::size_t index, std::span<std::byte> out);
    using Set = bool (*)(const CpuEdit&, std::size_t index, std::span<const std::byte> in);
    struct Register {
        std::string name;
        unsigned bits;
        const char* type;
        const char* group; ///< null: gdb's choice
        const char* feature;
        Get get;
        Set set; ///< null: read only
        std::size_t index;
    };
    void add(std::string name, unsigned bits, const char* type, const char* group, Get get, Set set,
             std::size_t index = 0);

    TargetWidth width_;
    const char* feature_ = nullptr; ///< of what is being added
    std::vector<Register> registers_;
};

} // namespace umbra
