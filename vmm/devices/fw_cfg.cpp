// fw_cfg's items, its two interfaces, and the option by which users add items.
#include "vmm/devices/fw_cfg.hpp"

#include "vmm/error.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <iterator>
#include <utility>

#include <fmt/core.h>

namespace umbra {
namespace {

// Ports, from FwCfg::base_port.
constexpr unsigned selector_offset = 0;
constexpr unsigned data_offset = 1;
constexpr unsigned dma_offset = 4; // eight bytes, big-endian; writing the last four starts the transfer

// Keys.
constexpr std::uint16_t key_signature = 0x00;
constexpr std::uint16_t key_id = 0x01;
constexpr std::uint16_t key_ram_size = 0x03;
constexpr std::uint16_t key_no_graphic = 0x04;
constexpr std::uint16_t key_cpus = 0x05;
constexpr std::uint16_t key_boot_menu = 0x0e;
constexpr std::uint16_t key_most_cpus = 0x0f;
constexpr std::uint16_t key_directory = 0x19;
constexpr std::uint16_t key_first_file = 0x20;
constexpr std::uint16_t key_write_channel = 0x4000; // a bit without effect

constexpr std::uint32_t id_traditional = 1;
constexpr std::uint32_t id_dma = 2;
constexpr std::string_view signature = "QEMU";
constexpr std::string_view dma_signature = "QEMU CFG";

// A DMA request: control, length, address.
constexpr std::size_t request_size = 16;
constexpr std::uint32_t dma_error = 1U << 0;
constexpr std::uint32_t dma_read = 1U << 1;
constexpr std::uint32_t dma_skip = 1U << 2;
constexpr std::uint32_t dma_select = 1U << 3; // bits 16-31: the key
constexpr std::uint32_t dma_write = 1U << 4;

void append_big_endian(std::vector<std::byte>& bytes, std::uint64_t value, unsigned size) {
    for (unsigned i = size; i > 0; --i)
        bytes.push_back(static_cast<std::byte>(value >> (8 * (i - 1))));
}

std::uint64_t big_endian(std::span<const std::byte> bytes) {
    std::uint64_t value = 0;
    for (const std::byte byte : bytes)
        value = value << 8 | std::to_integer<std::uint64_t>(byte);
    return value;
}

std::vector<std::byte> bytes_of(std::string_view text) {
    const auto bytes = std::as_bytes(std::span(text));
    return {bytes.begin(), bytes.end()};
}

/// Splits at single commas; two stand for one.
std::vector<std::string> split(std::string_view text) {
    std::vector<std::string> parts(1);
    for (std::size_t i = 0; i < text.size(); ++i) {
        if (text[i] != ',') {
            parts.back() += text[i];
        } else if (i + 1 < text.size() && text[i + 1] == ',') {
            parts.back() += ',';
            ++i;
        } else {
            parts.emplace_back();
        }
    }
    return parts;
}

template<class... Args>
[[noreturn]] void refuse(fmt::format_string<Args...> format, Args&&... args) {
    throw StartupError(ExitCode::bad_usage, fmt::format(format, std::forward<Args>(args)...));
}

} // namespace

FwCfgOption parse_fw_cfg(std::string_view text) {
    FwCfgOption option;
    bool has_value = false;
    bool first = true;
    for (const std::string& part : split(text)) {
        const std::size_t equals = part.find('=');
        const std::string key = part.substr(0, equals);
        if (equals == std::string::npos && first) {
            option.name = part;
        } else if (equals != std::string::npos && key == "name" && option.name.empty()) {
            option.name = part.substr(equals + 1);
        } else if (equals != std::string::npos && (key == "file" || key == "string") && !has_value) {
            has_value = true;
            option.is_file = key == "file";
            option.value = part.substr(equals + 1);
        } else {
            refuse("fw_cfg '{}': cannot use '{}'; write name=NAME,string=TEXT or name=NAME,file=FILE", text,
                   part);
        }
        first = false;
    }
    if (option.name.empty() || !has_value)
        refuse("fw_cfg '{}': {} is missing; write name=NAME,string=TEXT or name=NAME,file=FILE", text,
               option.name.empty() ? "the name" : "string= or file=");
    if (option.name.size() > FwCfg::name_limit)
        refuse("fw_cfg '{}': the name has more than {} bytes", text, FwCfg::name_limit);
    return option;
}

FwCfg::FwCfg(FwCfgConfig config) : memory_(std::move(config.memory)) {
    std::uint64_t ram = 0;
    for (const GuestMemory::Region& region : memory_.regions())
        ram += region.bytes.size();
    items_[key_signature] = bytes_of(signature);
    add(key_id, id_traditional | id_dma, 4);
    add(key_ram_size, ram, 8);
    add(key_no_graphic, 0, 2);
    add(key_cpus, config.cpus, 2);
    add(key_boot_menu, 0, 2);
    add(key_most_cpus, config.cpus, 2);

    std::ranges::sort(config.files, {}, &FwCfgFile::name);
    const auto same = std::ranges::adjacent_find(config.files, {}, &FwCfgFile::name);
    if (same != config.files.end())
        refuse("fw_cfg: there are two items '{}'", same->name);
    std::vector<std::byte> directory;
    append_big_endian(directory, config.files.size(), 4);
    std::uint16_t key = key_first_file;
    for (FwCfgFile& file : config.files) {
        if (file.name.empty() || file.name.size() > name_limit)
            refuse("fw_cfg: an item's name has 1 to {} bytes, not '{}'", name_limit, file.name);
        append_big_endian(directory, file.bytes.size(), 4);
        append_big_endian(directory, key, 2);
        append_big_endian(directory, 0, 2);
        std::vector<std::byte> name = bytes_of(file.name);
        name.resize(name_limit + 1);
        directory.insert(directory.end(), name.begin(), name.end());
        items_[key++] = std::move(file.bytes);
    }
    items_[key_directory] = std::move(directory);
}

void FwCfg::add(std::uint16_t key, std::uint64_t value, unsigned bytes) {
    std::vector<std::byte>& item = items_[key];
    for (unsigned i = 0; i < bytes; ++i)
        item.push_back(static_cast<std::byte>(value >> (8 * i)));
}

void FwCfg::select(std::uint16_t key) {
    selected_ = key & static_cast<std::uint16_t>(~key_write_channel);
    offset_ = 0;
}

/// What is left of the selected item.
std::span<const std::byte> FwCfg::rest() const {
    const auto item = items_.find(selected_);
    return item == items_.end() ? std::span<const std::byte>{} : std::span(item->second).subspan(offset_);
}

/// Behind an item's end, and where there is none, all bytes are 0.
std::byte FwCfg::next() {
    const auto left = rest();
    if (left.empty())
        return std::byte{0};
    ++offset_;
    return left.front();
}

std::uint32_t FwCfg::read(unsigned offset, unsigned size) {
    if (offset == data_offset)
        return std::to_integer<std::uint32_t>(next()); // byte-wide, whatever the access
    std::uint32_t value = 0;
    for (unsigned i = 0; i < size; ++i) {
        const unsigned at = offset + i;
        if (at >= dma_offset && at < port_count)
            value |= std::uint32_t{static_cast<unsigned char>(dma_signature[at - dma_offset])} << (8 * i);
    }
    return value;
}

void FwCfg::write(unsigned offset, unsigned size, std::uint32_t value) {
    if (offset == selector_offset && size >= 2)
        select(static_cast<std::uint16_t>(value));
    if (size != 4)
        return;
    if (offset == dma_offset) {
        request_high_ = __builtin_bswap32(value);
    } else if (offset == dma_offset + 4) {
        const std::uint64_t high = std::exchange(request_high_, 0);
        transfer(GuestPhys(high << 32 | __builtin_bswap32(value)));
    }
}

void FwCfg::transfer(GuestPhys request) {
    const auto copy = memory_.read<std::array<std::byte, request_size>>(request);
    if (!copy)
        return; // there is no RAM to tell of the error
    const std::span<const std::byte> bytes(*copy);
    const auto control = static_cast<std::uint32_t>(big_endian(bytes.first(4)));
    const std::uint64_t length = big_endian(bytes.subspan(4, 4));
    const GuestPhys address(big_endian(bytes.subspan(8)));

    if ((control & dma_select) != 0)
        select(static_cast<std::uint16_t>(control >> 16));
    bool done = true;
    if ((control & dma_read) != 0)
        done = copy_out(address, length);
    else if ((control & dma_write) != 0)
        done = length == 0;
    else if ((control & dma_skip) != 0)
        offset_ += std::min<std::size_t>(rest().size(), length);
    (void)memory_.write(request, __builtin_bswap32(done ? 0 : dma_error));
    stored(request, sizeof(control));
}

/// False if [to, to + size) is not RAM of one region: nothing is written then.
bool FwCfg::copy_out(GuestPhys to, std::uint64_t size) {
    if (size == 0)
        return true;
    const auto room = memory_.range(to, size);
    if (room.empty())
        return false;
    const auto from = rest().first(std::min<std::size_t>(rest().size(), size));
    std::ranges::copy(from, room.begin());
    std::ranges::fill(room.subspan(from.size()), std::byte{0});
    offset_ += from.size();
    stored(to, size);
    return true;
}

void FwCfg::stored(GuestPhys at, std::uint64_t size) const {
    while (observer_ && size != 0) {
        const std::uint64_t piece = std::min(size, page_size - at.page_offset());
        observer_(at, piece);
        at += piece;
        size -= piece;
    }
}

} // namespace umbra
