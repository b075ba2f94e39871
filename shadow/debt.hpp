// What the shadow MMU has changed that a machine may not have noticed.
#pragma once

#include "shadow/table_pool.hpp"

#include <cstdlib>
#include <utility>
#include <vector>

namespace umbra {

/// What one vCPU of the machine must do before it runs the guest again. An object that cannot be copied, and
/// that must not go unpaid: in checking builds that ends the process.
class Debt {
  public:
    Debt() = default;
    explicit Debt(std::vector<TableIndex> changed) : tables(std::move(changed)), flush(true) {}
    Debt(Debt&& other) noexcept
        : tables(std::exchange(other.tables, {})), flush(std::exchange(other.flush, false)),
          root_gone(std::exchange(other.root_gone, false)) {}
    Debt& operator=(Debt&& other) noexcept {
        check_paid();
        tables = std::exchange(other.tables, {});
        flush = std::exchange(other.flush, false);
        root_gone = std::exchange(other.root_gone, false);
        return *this;
    }
    Debt(const Debt&) = delete;
    Debt& operator=(const Debt&) = delete;
    ~Debt() { check_paid(); }

    [[nodiscard]] bool none() const { return tables.empty() && !flush; }
    /// The machine has been told, or is bound to be before it runs the guest.
    void paid() {
        tables.clear();
        flush = root_gone = false;
    }

    /// Tables with a change to a present entry, for hosts whose KVM believes them write-protected and does
    /// not see stores by userspace: ring-0 code of the VM must touch each (vmm/switcher.hpp).
    std::vector<TableIndex> tables;
    bool flush = false; ///< the machine's TLB may hold what was taken away
    /// A root is gone that the machine may have loaded: even ring-0 code, which every root maps, cannot run
    /// on it.
    bool root_gone = false;

  private:
    void check_paid() const {
#ifdef UMBRA_AUDIT
        if (!none())
            std::abort();
#endif
    }
};

} // namespace umbra
