// A log of bounded length that can be asked for what it holds under one key, newest first.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace umbra {

/// Keeps the last `capacity` records, each under a key; a new one takes the place of the oldest. Memory grows
/// with use, up to capacity * (sizeof(Key) + sizeof(Value) + about 60 bytes).
template<class Key, class Value, class Hash = std::hash<Key>>
class RecentLog {
  public:
    /// `capacity` is at least 1.
    explicit RecentLog(std::size_t capacity) : capacity_(std::max<std::size_t>(capacity, 1)) {}

    void add(const Key& key, const Value& value) {
        const std::uint64_t position = next_++;
        const auto [latest, first] = latest_.try_emplace(key, position);
        const std::uint64_t previous = first ? none : latest->second;
        latest->second = position;
        if (records_.size() < capacity_) {
            records_.push_back({key, value, previous});
            return;
        }
        Record& record = records_[position % capacity_];
        // Of the oldest record's key there may be younger ones; if not, the key is forgotten with it.
        if (const auto dead = latest_.find(record.key);
            dead != latest_.end() && dead->second == position - capacity_)
            latest_.erase(dead);
        record = {key, value, previous};
    }

    /// Calls `visit(Value&)` for the records of `key`, newest first, at most `limit` of them, until one call
    /// returns true. What that call was given; null if none did.
    template<class Visit>
    Value* find(const Key& key, std::size_t limit, Visit&& visit) {
        const auto latest = latest_.find(key);
        if (latest == latest_.end())
            return nullptr;
        for (std::uint64_t at = latest->second; limit != 0 && kept(at); --limit) {
            Record& record = records_[at % capacity_];
            if (visit(record.value))
                return &record.value;
            at = record.previous;
        }
        return nullptr;
    }

    [[nodiscard]] std::size_t size() const { return records_.size(); }

  private:
    static constexpr std::uint64_t none = ~std::uint64_t{0};

    struct Record {
        Key key;
        Value value;
        std::uint64_t
            previous; ///< position of the next older one of the same key: `none`, or perhaps overwritten
    };

    [[nodiscard]] bool kept(std::uint64_t position) const {
        return position < next_ && next_ - position <= records_.size();
    }

    std::size_t capacity_;
    std::uint64_t next_ = 0; ///< records ever added; record n lies at n % capacity_
    std::vector<Record> records_;
    std::unordered_map<Key, std::uint64_t, Hash> latest_;
};

} // namespace umbra
