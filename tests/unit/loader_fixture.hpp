// What tests of vmm/loader share: guest memory, files made in memory, and the message of a refusal.
#pragma once

#include "shadow/guest_memory.hpp"
#include "vmm/error.hpp"
#include "vmm/loader/loader.hpp"
#include "vmm/loader/memory_size.hpp"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <gtest/gtest.h>
#include <sys/mman.h>

namespace umbra {

using Bytes = std::vector<std::byte>;

inline constexpr std::uint64_t mib = std::uint64_t{1} << 20;

/// Guest RAM as umbra lays it out, with an inaccessible page behind each region.
class TestRam {
  public:
    explicit TestRam(std::uint64_t size) {
        std::vector<GuestMemory::Region> regions;
        for (const RamRange& range : ram_ranges(size)) {
            const std::size_t mapped = range.size + page_size;
            void* const base =
                mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (base == MAP_FAILED || mprotect(base, range.size, PROT_READ | PROT_WRITE) != 0)
                throw std::bad_alloc();
            mappings_.emplace_back(base, mapped);
            regions.push_back({range.base, {static_cast<std::byte*>(base), range.size}});
        }
        memory_ = GuestMemory(std::move(regions));
    }
    ~TestRam() {
        for (const auto& [base, size] : mappings_)
            munmap(base, size);
    }
    TestRam(const TestRam&) = delete;
    TestRam& operator=(const TestRam&) = delete;
    TestRam(TestRam&&) = delete;
    TestRam& operator=(TestRam&&) = delete;

    [[nodiscard]] const GuestMemory& memory() const { return memory_; }

    template<class T>
    [[nodiscard]] T at(GuestPhys address) const {
        return memory_.read<T>(address).value();
    }
    [[nodiscard]] std::string text(GuestPhys address, std::size_t size) const {
        const auto bytes = memory_.range(address, size);
        return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
    }

  private:
    std::vector<std::pair<void*, std::size_t>> mappings_;
    GuestMemory memory_;
};

inline Bytes bytes_of(std::string_view text) {
    const auto bytes = std::as_bytes(std::span(text));
    return {bytes.begin(), bytes.end()};
}

template<class T>
void put(Bytes& file, std::size_t offset, const T& value) {
    ASSERT_LE(offset + sizeof value, file.size());
    std::memcpy(file.data() + offset, &value, sizeof value);
}

/// The message with which loading fails; empty if it succeeds. Anything but StartupError(bad_usage) fails the
/// test.
inline std::string failure(const Bytes& file, const LoadRequest& request = {},
                           std::uint64_t memory_size = 16 * mib) {
    const TestRam ram(memory_size);
    try {
        (void)load_kernel(file, request, ram.memory());
    } catch (const StartupError& error) {
        EXPECT_EQ(error.code(), ExitCode::bad_usage);
        std::string message = error.what();
        EXPECT_FALSE(message.empty());
        EXPECT_EQ(message.find('\n'), std::string::npos) << "one line";
        return message;
    }
    return {};
}

} // namespace umbra
