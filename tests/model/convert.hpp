// From the reference model's words to those of shadow/, for the tests that compare the two; and to text.
#pragma once

#include "shadow/guest_walk.hpp"
#include "tests/model/reference_mmu.hpp"

#include <string>

namespace umbra::model {

[[nodiscard]] const PagingFormat& to_format(const Cpu& cpu);
[[nodiscard]] GuestPaging to_paging(const Cpu& cpu);
[[nodiscard]] umbra::Access to_access(Access access);

/// "write by user, AC".
[[nodiscard]] std::string text(Access access);
/// "4-level WP NXE SMEP": the mode and what is on.
[[nodiscard]] std::string text(const Cpu& cpu);
/// "P W U A D PS G XD": the flags of an entry that are set.
[[nodiscard]] std::string flags_text(std::uint64_t entry);

} // namespace umbra::model
