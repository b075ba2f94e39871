// The reverse map: from a guest frame to the shadow leaf entries that map it.
//
// Kept for the frames that somebody asks for (tables of the guest that are write-protected), not for all: a
// table of one number for each frame would cost more memory than it saves time. What was mapped before a
// frame was asked for is found by looking through all tables once, for many frames at a time.
#pragma once

#include "shadow/table_pool.hpp"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

namespace umbra {

/// A place in the shadow tables.
struct ShadowSlot {
    TableIndex table{};
    unsigned slot = 0;

    bool operator==(const ShadowSlot&) const = default;
};

class ReverseMap {
  public:
    /// For frames below `frames`.
    explicit ReverseMap(std::uint64_t frames)
        // Not a vector: pages of zeroes that are never looked at shall not be touched.
        : frames_(frames), tracked_(static_cast<std::uint64_t*>(std::calloc(frames / 64 + 1, 8)), std::free) {
    }

    [[nodiscard]] bool tracked(MachineFrame frame) const {
        return frame.number() < frames_ && tracked_ &&
               (tracked_.get()[frame.number() / 64] >> frame.number() % 64 & 1) != 0;
    }
    /// False if the frame is out of bounds. Entries that map it already must be told by `add`.
    bool track(MachineFrame frame) {
        if (frame.number() >= frames_ || !tracked_)
            return false;
        tracked_.get()[frame.number() / 64] |= std::uint64_t{1} << frame.number() % 64;
        return true;
    }
    void untrack(MachineFrame frame) {
        if (!tracked(frame))
            return;
        tracked_.get()[frame.number() / 64] &= ~(std::uint64_t{1} << frame.number() % 64);
        small_.erase(frame.number());
    }

    /// A leaf entry at `slot` now maps the page of 4 KB.
    void add(MachineFrame frame, ShadowSlot slot) {
        if (tracked(frame))
            small_[frame.number()].push_back(slot);
    }
    void remove(MachineFrame frame, ShadowSlot slot) {
        if (const auto found = small_.find(frame.number()); found != small_.end())
            std::erase(found->second, slot);
    }
    /// The same for a leaf of 2 MB or 1 GB, which are known always: there are few.
    void add_large(MachineFrame first, unsigned level, ShadowSlot slot) {
        large_[{first.number(), level}].push_back(slot);
    }
    void remove_large(MachineFrame first, unsigned level, ShadowSlot slot) {
        const auto found = large_.find({first.number(), level});
        if (found == large_.end())
            return;
        std::erase(found->second, slot);
        if (found->second.empty())
            large_.erase(found);
    }

    void clear_large() { large_.clear(); }

    /// The entries of 4 KB that map a tracked frame.
    [[nodiscard]] std::span<const ShadowSlot> small(MachineFrame frame) const {
        const auto found = small_.find(frame.number());
        return found == small_.end() ? std::span<const ShadowSlot>() : found->second;
    }
    /// The entries of `level` whose page begins at `first`.
    [[nodiscard]] std::span<const ShadowSlot> large(MachineFrame first, unsigned level) const {
        const auto found = large_.find({first.number(), level});
        return found == large_.end() ? std::span<const ShadowSlot>() : found->second;
    }

  private:
    struct LargePage {
        std::uint64_t first;
        unsigned level;
        bool operator==(const LargePage&) const = default;
    };
    struct LargePageHash {
        std::size_t operator()(const LargePage& page) const noexcept {
            return std::hash<std::uint64_t>{}(page.first | page.level); // first is a multiple of 512
        }
    };
    std::uint64_t frames_;
    std::unique_ptr<std::uint64_t, decltype(&std::free)> tracked_; ///< one bit for each frame
    std::unordered_map<std::uint64_t, std::vector<ShadowSlot>> small_;
    std::unordered_map<LargePage, std::vector<ShadowSlot>, LargePageHash> large_;
};

} // namespace umbra
