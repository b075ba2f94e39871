// QEMU's firmware configuration device (QEMU, docs/specs/fw_cfg.rst): items of bytes, selected by key and
// read byte by byte or by DMA. Nothing can be written to them.
#pragma once

#include "shadow/address.hpp"
#include "shadow/guest_memory.hpp"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace umbra {

/// An item that the file directory lists.
struct FwCfgFile {
    std::string name; ///< 1 to FwCfg::name_limit bytes, no two the same
    std::vector<std::byte> bytes;
};

/// What a user asks for as QEMU's -fw_cfg does.
struct FwCfgOption {
    std::string name;
    bool is_file = false; ///< `value` is a file's name, otherwise it is the item
    std::string value;
};

/// "name=NAME,string=TEXT" or "name=NAME,file=FILE"; "name=" may be left out, and a comma is written twice in
/// a value. StartupError(bad_usage) says what is wrong.
[[nodiscard]] FwCfgOption parse_fw_cfg(std::string_view text);

/// Told of RAM that a device has written: 1 or more bytes, all in one page.
using DmaObserver = std::function<void(GuestPhys at, std::size_t size)>;

struct FwCfgConfig {
    GuestMemory memory; ///< of DMA; without regions, every transfer fails
    unsigned cpus = 1;
    std::vector<FwCfgFile> files;
};

/// Not thread-safe, as Platform.
class FwCfg {
  public:
    static constexpr std::uint16_t base_port = 0x510;
    static constexpr unsigned port_count = 12;
    static constexpr std::size_t name_limit = 55; ///< bytes of a file's name

    /// StartupError(bad_usage) if a file's name is too long or there twice.
    explicit FwCfg(FwCfgConfig config);

    /// `offset` counts from base_port; `size` is 1, 2 or 4.
    [[nodiscard]] std::uint32_t read(unsigned offset, unsigned size);
    void write(unsigned offset, unsigned size, std::uint32_t value);

    void observe(DmaObserver observer) { observer_ = std::move(observer); }

  private:
    void add(std::uint16_t key, std::uint64_t value, unsigned bytes);
    void select(std::uint16_t key);
    [[nodiscard]] std::span<const std::byte> rest() const;
    [[nodiscard]] std::byte next();
    void transfer(GuestPhys request);
    [[nodiscard]] bool copy_out(GuestPhys to, std::uint64_t size);
    void stored(GuestPhys at, std::uint64_t size) const;

    GuestMemory memory_;
    std::map<std::uint16_t, std::vector<std::byte>> items_; ///< by key
    DmaObserver observer_;
    std::uint16_t selected_ = 0;
    std::size_t offset_ = 0;         ///< in the selected item
    std::uint32_t request_high_ = 0; ///< of the DMA request's address
};

} // namespace umbra
