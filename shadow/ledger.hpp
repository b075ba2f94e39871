// What one vCPU owes its machine, and whether it is in the guest.
#pragma once

#include "shadow/debt.hpp"

#include <atomic>
#include <utility>
#include <vector>

namespace umbra {

/// All but in_guest is for who edits the tables.
class Ledger {
  public:
    /// `pages`: of the pool.
    explicit Ledger(std::size_t pages) : owed_(pages) {}

    /// A present entry of `table` has changed. `seen`: a flush is enough for the machine to notice.
    void owe(TableIndex table, bool root_gone, bool seen) {
        debt_.flush = true;
        debt_.root_gone |= root_gone;
        if (seen || owed_[TablePool::number(table)])
            return;
        owed_[TablePool::number(table)] = true;
        debt_.tables.push_back(table);
    }
    [[nodiscard]] const Debt& debt() const { return debt_; }
    [[nodiscard]] Debt take() {
        for (const TableIndex table : debt_.tables)
            owed_[TablePool::number(table)] = false;
        return std::move(debt_);
    }
    /// The vCPU does not run again.
    void close() { debt_.paid(); }

    /// It may use what the tables refer to, from now on; by its own thread.
    void enter() { in_guest_ = true; }
    void leave() {
        in_guest_ = false;
        in_guest_.notify_all();
    }
    [[nodiscard]] bool in_guest() const { return in_guest_.load(); }
    void wait_until_left() const { in_guest_.wait(true); }

  private:
    Debt debt_;
    std::vector<bool> owed_; ///< by pool page: is in debt_.tables
    std::atomic<bool> in_guest_ = false;
};

} // namespace umbra
