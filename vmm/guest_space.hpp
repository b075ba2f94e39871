// Guest-virtual memory as the virtual CPU's own microcode would access it: descriptor tables, stacks, code
// bytes.
#pragma once

#include "shadow/guest_walk.hpp"
#include "vmm/cpu.hpp"

#include <concepts>
#include <cstring>
#include <optional>
#include <span>

namespace umbra {

/// What umbra's own accesses for the guest reach beside RAM's bytes: devices, and whoever must hear of stores
/// that no page fault announces.
class GuestBus {
  public:
    GuestBus() = default;
    GuestBus(const GuestBus&) = delete;
    GuestBus(GuestBus&&) = delete;
    GuestBus& operator=(const GuestBus&) = delete;
    GuestBus& operator=(GuestBus&&) = delete;

    /// `size` bytes of RAM at `at` have been written: 1 or more. By the CPU at this linear address, all in
    /// one page; or by a device, without one.
    virtual void stored(GuestPhys at, std::optional<GuestVirt> linear, std::size_t size) = 0;
    /// Accesses to what is not RAM, each within a page.
    virtual void read_device(GuestPhys at, std::span<std::byte> into) = 0;
    virtual void write_device(GuestPhys at, std::span<const std::byte> from) = 0;

  protected:
    ~GuestBus() = default;
};

/// Accesses by the guest's own page tables, page by page; accessed and dirty bits are set as the CPU would.
/// Unless told otherwise they are implicit supervisor accesses, as to descriptor tables, the TSS and the
/// stack of a handler: at level 0 whatever the CPL, and not helped by EFLAGS.AC (Intel SDM vol. 3A, 4.6.1).
/// A view: cheap to make for one operation from the CPU's current paging state.
class GuestSpace {
  public:
    /// `bus`, if there is one, outlives the view. It does not hear of accessed and dirty bits.
    GuestSpace(const GuestMemory& memory, const GuestPaging& paging, GuestBus* bus = nullptr)
        : memory_(&memory), paging_(paging), bus_(bus) {}

    /// Reads all of `into` or returns the exception that the access raises: #PF, or #GP for a non-canonical
    /// address. Outside RAM the bus answers; without one, all-ones.
    [[nodiscard]] std::optional<Exception> read(GuestVirt at, std::span<std::byte> into,
                                                Access access = {}) const;
    /// Writes all of `from` or, when an exception is returned, nothing: every page is checked before the
    /// first store. What is outside RAM is the bus's; without one it is dropped. `access.write` is implied.
    [[nodiscard]] std::optional<Exception> write(GuestVirt at, std::span<const std::byte> from,
                                                 Access access = {}) const;

    template<class T>
    requires(!std::convertible_to<T&, std::span<const std::byte>>)
        [[nodiscard]] std::optional<Exception> read(GuestVirt at, T& value, Access access = {}) const {
        return read(at, std::as_writable_bytes(std::span(&value, 1)), access);
    }
    template<class T>
    requires(!std::convertible_to<const T&, std::span<const std::byte>>)
        [[nodiscard]] std::optional<Exception> write(GuestVirt at, const T& value, Access access = {}) const {
        return write(at, std::as_bytes(std::span(&value, 1)), access);
    }
    /// Up to into.size() instruction bytes; fewer if a page cannot be fetched from. Returns how many. Sets
    /// nothing.
    [[nodiscard]] std::size_t peek(GuestVirt at, std::span<std::byte> into) const;

    [[nodiscard]] const GuestPaging& paging() const { return paging_; }

  private:
    const GuestMemory* memory_;
    GuestPaging paging_;
    GuestBus* bus_;
};

} // namespace umbra
