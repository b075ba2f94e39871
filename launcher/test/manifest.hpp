// Manifests of `umbra test`: how they are found, and how they are read into test cases.
//
// A manifest is a TOML file (https://toml.io/en/v1.0.0), by its usual name umbra.toml: tables [[case]], one
// for each case, and a table [defaults] of what they have in common. A key of a case replaces that of the
// defaults as a whole. launcher/test/example.cpp is a manifest with every key, and says what each means.
//
// Manifests are untrusted as far as this goes: whatever is in them, it is cases or errors; sizes are bounded.
#pragma once

#include "launcher/test/case.hpp"

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace umbra {

inline constexpr std::string_view manifest_name = "umbra.toml";

/// Bytes of one manifest, and cases of one with all their matrices.
inline constexpr std::size_t maximum_manifest_size = std::size_t{1} << 20;
inline constexpr std::size_t maximum_manifest_cases = 10'000;

struct ManifestError {
    std::string file;    ///< as the user names it, or below a folder that they name
    unsigned line = 0;   ///< from 1; 0: the file as a whole
    unsigned column = 0; ///< in characters, from 1
    std::string key;     ///< "case.timeout", "defaults.console.required[2]"; empty: none
    std::string problem; ///< what is there and what was expected

    bool operator==(const ManifestError&) const = default;
};
/// "FILE:LINE:COLUMN: KEY: PROBLEM", as compilers put it.
[[nodiscard]] std::string describe(const ManifestError& error);

struct Cases {
    std::vector<TestCase> cases; ///< of manifests without an error only
    std::vector<ManifestError> errors;
};

/// The cases of a manifest's text, in its order. All its errors are found, by line, unless it is no TOML:
/// then the first. `file` is what they say, and with `base` gives the manifest's place: relative paths in it
/// are from its folder.
///
/// Cases are named "FOLDER/CASE": the folder as it is from `base`, which is absolute (the current folder, so
/// that a case has one name however it is asked for). A manifest not called umbra.toml adds its own name:
/// smoke.toml's are "FOLDER/smoke/CASE". A matrix adds "[KEY=VALUE,KEY=VALUE]".
[[nodiscard]] Cases parse_manifest(std::string_view text, const std::string& file,
                                   const std::filesystem::path& base);
[[nodiscard]] Cases read_manifest(const std::string& file, const std::filesystem::path& base);

/// The case that a kernel alone is: it shall pass. Named by its path from `base`.
[[nodiscard]] TestCase bare_kernel(const std::string& file, const std::filesystem::path& base);

struct Discovery {
    std::vector<std::string> manifests, kernels; ///< each file once, in the order of what was asked for
    std::vector<ManifestError> errors;
};

/// What the user means by `paths`: all umbra.toml in and below a folder, sorted; a file *.toml, a manifest;
/// any other file, a kernel. Without any path, the current folder.
///
/// Below a folder that is named, not searched are hidden folders (.git), build folders, known by
/// CMakeCache.txt or CACHEDIR.TAG (https://bford.info/cachedir/, Cargo's too), which often hold copies, and
/// folders behind symbolic links, so that loops of them do no harm. They are searched if they are named
/// themselves. A folder in which nothing is found is an error, as is one that cannot be read: a test must not
/// vanish in silence.
[[nodiscard]] Discovery find_manifests(std::span<const std::string> paths);

/// All of it: what find_manifests() finds, read. That no two cases of a run have the same name is checked
/// too.
[[nodiscard]] Cases load_cases(std::span<const std::string> paths, const std::filesystem::path& base);

} // namespace umbra
