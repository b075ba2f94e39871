// The address spaces of umbra, one type each, so that the compiler refuses to mix them.
//
//   GuestVirt    what the guest's instructions use; translated by the guest's page tables
//   GuestPhys    what the guest's page tables and devices use
//   MachinePhys  what the machine's page tables (the shadows) use: KVM's guest-physical memory. Guest RAM
//   lies at
//                equal numbers in both; monitor memory exists only here
//   MachineVirt  what ring-0 code of the switcher uses; translated by the shadows
//
// Host virtual addresses are ordinary pointers.
#pragma once

#include <algorithm>
#include <compare>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <type_traits>

#include <fmt/core.h>

namespace umbra {

inline constexpr unsigned page_shift = 12;
inline constexpr std::uint64_t page_size = std::uint64_t{1} << page_shift;

template<class Space>
class Frame;

/// A byte address in one address space. Arithmetic stays inside the space; the difference of two is a plain
/// count.
template<class Space>
class Address {
  public:
    constexpr Address() = default;
    explicit constexpr Address(std::uint64_t value) : value_(value) {}

    [[nodiscard]] constexpr std::uint64_t value() const { return value_; }
    [[nodiscard]] constexpr std::uint64_t page_offset() const { return value_ & (page_size - 1); }
    [[nodiscard]] constexpr Address page_base() const { return Address(value_ & ~(page_size - 1)); }
    [[nodiscard]] constexpr Frame<Space> frame() const { return Frame<Space>(value_ >> page_shift); }

    constexpr auto operator<=>(const Address&) const = default;
    constexpr Address operator+(std::uint64_t bytes) const { return Address(value_ + bytes); }
    constexpr Address operator-(std::uint64_t bytes) const { return Address(value_ - bytes); }
    constexpr std::uint64_t operator-(Address other) const { return value_ - other.value_; }
    constexpr Address& operator+=(std::uint64_t bytes) {
        value_ += bytes;
        return *this;
    }

  private:
    std::uint64_t value_ = 0;
};

/// A 4 KB frame of a physical address space (or page of a virtual one).
template<class Space>
class Frame {
  public:
    constexpr Frame() = default;
    explicit constexpr Frame(std::uint64_t number) : number_(number) {}

    [[nodiscard]] constexpr std::uint64_t number() const { return number_; }
    [[nodiscard]] constexpr Address<Space> base() const { return Address<Space>(number_ << page_shift); }

    constexpr auto operator<=>(const Frame&) const = default;
    constexpr Frame operator+(std::uint64_t frames) const { return Frame(number_ + frames); }
    constexpr std::uint64_t operator-(Frame other) const { return number_ - other.number_; }

  private:
    std::uint64_t number_ = 0;
};

/// The spaces. `prefix` begins every printed address: "gva:0x…".
struct GuestVirtSpace {
    static constexpr const char* prefix = "gva";
};
struct GuestPhysSpace {
    static constexpr const char* prefix = "gpa";
};
struct MachinePhysSpace {
    static constexpr const char* prefix = "mpa";
};
struct MachineVirtSpace {
    static constexpr const char* prefix = "mva";
};

using GuestVirt = Address<GuestVirtSpace>;
using GuestPhys = Address<GuestPhysSpace>;
using MachinePhys = Address<MachinePhysSpace>;
using MachineVirt = Address<MachineVirtSpace>;
using GuestFrame = Frame<GuestPhysSpace>;
using MachineFrame = Frame<MachinePhysSpace>;

static_assert(!std::is_convertible_v<GuestVirt, GuestPhys> && !std::is_constructible_v<GuestPhys, GuestVirt>);
static_assert(!std::is_convertible_v<std::uint64_t, GuestPhys> &&
              !std::is_convertible_v<GuestPhys, std::uint64_t>);
static_assert(!std::is_convertible_v<GuestFrame, MachineFrame> &&
              !std::is_constructible_v<MachineFrame, GuestFrame>);

} // namespace umbra

template<class Space>
struct fmt::formatter<umbra::Address<Space>> : fmt::formatter<std::string_view> {
    template<class Context>
    auto format(umbra::Address<Space> address, Context& context) const {
        // Not by format_to: libfmt's instance of it, made by GCC, has a name that Clang does not look for.
        const std::string text = fmt::format("{}:{:#x}", Space::prefix, address.value());
        return std::copy(text.begin(), text.end(), context.out());
    }
};

template<class Space>
struct std::hash<umbra::Frame<Space>> {
    std::size_t operator()(umbra::Frame<Space> frame) const noexcept {
        return std::hash<std::uint64_t>{}(frame.number());
    }
};
