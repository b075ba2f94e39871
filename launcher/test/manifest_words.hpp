// What messages about manifests are made of.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace umbra {

using Words = std::vector<std::string_view>;

[[nodiscard]] bool is_control(char c);

/// What the manifest says, as it can stand in a line of a message: `most` bytes of it.
[[nodiscard]] std::string printable(std::string_view text, std::size_t most = 80);

/// "a, b or c"
[[nodiscard]] std::string alternatives(const Words& words);

/// "; did you mean 'kernel'?" if a known word is close to `word`, otherwise nothing.
[[nodiscard]] std::string suggestion(std::string_view word, const Words& known);

/// `path` seen from `folder`, absolute. Symbolic links to folders are followed, so that ".." is what it is
/// for the kernel; the file's own name stays.
[[nodiscard]] std::string absolute_path(const std::filesystem::path& folder,
                                        const std::filesystem::path& path);

} // namespace umbra
