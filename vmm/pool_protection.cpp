#include "vmm/pool_protection.hpp"

#include <mutex>

#include <sys/mman.h>

namespace umbra {
namespace {

constexpr int readable = PROT_READ, writable = PROT_READ | PROT_WRITE;

class KeyGuard final : public PoolGuard {
  public:
    KeyGuard(int key, std::span<std::byte> memory) : key_(key), memory_(memory) {}
    KeyGuard(const KeyGuard&) = delete;
    KeyGuard& operator=(const KeyGuard&) = delete;
    KeyGuard(KeyGuard&&) = delete;
    KeyGuard& operator=(KeyGuard&&) = delete;
    ~KeyGuard() override {
        constexpr int common = 0;
        (void)::pkey_mprotect(memory_.data(), memory_.size(), writable, common); // no page keeps a freed key
        (void)::pkey_free(key_);
    }

    bool open() override {
        if (::pkey_get(key_) == 0)
            return false;
        (void)::pkey_set(key_, 0); // fails for no key that exists
        return true;
    }
    void close() override { (void)::pkey_set(key_, PKEY_DISABLE_WRITE); }
    [[nodiscard]] const char* name() const override { return "protection key"; }

  private:
    int key_;
    std::span<std::byte> memory_;
};

/// Page rights are the process's: the first scope of any thread opens, the last one closes.
class PageGuard final : public PoolGuard {
  public:
    explicit PageGuard(std::span<std::byte> memory) : memory_(memory) {}
    PageGuard(const PageGuard&) = delete;
    PageGuard& operator=(const PageGuard&) = delete;
    PageGuard(PageGuard&&) = delete;
    PageGuard& operator=(PageGuard&&) = delete;
    ~PageGuard() override { set(writable); }

    bool open() override {
        const std::lock_guard lock(mutex_);
        if (scopes_++ == 0)
            set(writable);
        return true;
    }
    void close() override {
        const std::lock_guard lock(mutex_);
        if (--scopes_ == 0)
            set(readable);
    }
    [[nodiscard]] const char* name() const override { return "page rights"; }

  private:
    /// Where the kernel cannot (it is out of memory for the mapping's record), the next write tells.
    void set(int rights) { (void)::mprotect(memory_.data(), memory_.size(), rights); }

    std::span<std::byte> memory_;
    std::mutex mutex_;
    unsigned scopes_ = 0;
};

} // namespace

PoolProtection best_pool_protection() {
    if (const int key = ::pkey_alloc(0, PKEY_DISABLE_WRITE); key >= 0) {
        (void)::pkey_free(key);
        return PoolProtection::protection_key;
    }
#ifdef UMBRA_AUDIT
    return PoolProtection::page_rights;
#else
    return PoolProtection::none;
#endif
}

std::unique_ptr<PoolGuard> protect_pool(PoolProtection kind, std::span<std::byte> memory) {
    switch (kind) {
    case PoolProtection::none:
        break;
    case PoolProtection::page_rights:
        if (::mprotect(memory.data(), memory.size(), readable) == 0)
            return std::make_unique<PageGuard>(memory);
        break;
    case PoolProtection::protection_key: {
        const int key = ::pkey_alloc(0, PKEY_DISABLE_WRITE);
        if (key >= 0 && ::pkey_mprotect(memory.data(), memory.size(), writable, key) == 0)
            return std::make_unique<KeyGuard>(key, memory);
        if (key >= 0)
            (void)::pkey_free(key);
        break;
    }
    }
    return nullptr;
}

} // namespace umbra
