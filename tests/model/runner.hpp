// Runs programs on the reference model and on a machine at once, and tells where they part.
#pragma once

#include "tests/model/machines.hpp"
#include "tests/model/program.hpp"

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace umbra::model {

using MachineMaker = std::function<std::unique_ptr<Machine>(const Setup&)>;

class Runner {
  public:
    Runner(const Setup& setup, const MachineMaker& make_machine);

    /// What is wrong after this operation, in words; nothing if all is well.
    [[nodiscard]] std::optional<std::string> execute(const Operation& operation);
    /// Compares all of the guest's tables, and audits the machine.
    [[nodiscard]] std::optional<std::string> check_everything() const;

    [[nodiscard]] const ReferenceMmu& reference() const { return reference_; }
    [[nodiscard]] const Machine& machine() const { return *machine_; }
    [[nodiscard]] std::uint64_t accesses() const { return accesses_; }
    /// Accesses that used a translation which the tables no longer contained.
    [[nodiscard]] std::uint64_t stale_hits() const { return stale_hits_; }
    /// Those that a sanitizer reported.
    [[nodiscard]] std::uint64_t stale_reports() const { return stale_reports_; }

  private:
    [[nodiscard]] std::optional<std::string> access(std::uint64_t at, Access access);
    [[nodiscard]] std::optional<std::string> stale_use(std::uint64_t at, Access access, const StaleUse& use);
    [[nodiscard]] std::optional<std::string> check_slot(std::uint64_t slot) const;

    ReferenceMmu reference_{Machine::ram()};
    std::unique_ptr<Machine> machine_;
    Sanitize sanitize_;
    bool trap_user_fetch_ = false;
    std::uint64_t accesses_ = 0;
    std::uint64_t stale_hits_ = 0, stale_reports_ = 0;
};

/// What was wrong first, and after which operation.
struct Failure {
    std::size_t operation = 0;
    std::string what;
};
/// Runs all of `program`. GoogleTest failures inside the machine count.
[[nodiscard]] std::optional<Failure> run(const Setup& setup, const std::vector<Operation>& program,
                                         const MachineMaker& make_machine);
/// The same in a process of its own: its death is a failure too.
[[nodiscard]] std::optional<Failure> run_apart(const Setup& setup, const std::vector<Operation>& program,
                                               const MachineMaker& make_machine);

/// A part of `program`, which fails in `run` or `run_apart`, that fails too and of which no operation can be
/// left out: delta debugging. Takes at most `runs` runs.
using Run = std::function<std::optional<Failure>(const std::vector<Operation>&)>;
[[nodiscard]] std::vector<Operation> shrink(std::vector<Operation> program, const Run& run,
                                            unsigned runs = 3000);

} // namespace umbra::model
