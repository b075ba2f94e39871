// The manifest that `umbra test --init` writes.
#pragma once

#include <string_view>

namespace umbra {

/// A manifest with every key, each with a comment: what users begin with, and the reference of manifests.
[[nodiscard]] std::string_view example_manifest();

} // namespace umbra
