// What a kernel's developer is shown when the guest has used a stale translation: `umbra run --sanitize=tlb`.
#pragma once

#include "shadow/tlb_sanitizer.hpp"

#include <functional>
#include <string>

namespace umbra {

struct TlbReportInput {
    const StaleUse& stale;
    const Origin& used; ///< the instruction that made the access; times are in the unit of the write's
    /// The function that an address lies in, "main+0x12"; empty if unknown. Symbols::name.
    std::function<std::string(GuestVirt)> symbol;
    double ticks_per_us = 1; ///< of Origin::time
};

/// Several lines of plain ASCII, each of at most about 110 columns and ended by a newline: the access, the
/// entry that has changed, where it was written and how long before, and the invalidation that is missing.
[[nodiscard]] std::string tlb_report(const TlbReportInput& input);

} // namespace umbra
