// How manifests and kernels are found, and their cases put together.
#include "launcher/test/manifest.hpp"
#include "launcher/test/manifest_words.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <system_error>
#include <utility>

#include <fmt/core.h>

namespace umbra {
namespace {

namespace fs = std::filesystem;

ManifestError file_error(std::string file, std::string problem) {
    return {std::move(file), 0, 0, "", std::move(problem)};
}

bool is_build_folder(const fs::path& folder) {
    std::error_code error;
    return fs::exists(folder / "CMakeCache.txt", error) || fs::exists(folder / "CACHEDIR.TAG", error);
}

/// All manifests in `folder` and below, in no order. What cannot be searched is told, and the rest is.
void search(const fs::path& folder, std::vector<std::string>& manifests, std::vector<ManifestError>& errors) {
    std::error_code error;
    for (auto entry = fs::directory_iterator(folder, error); !error && entry != fs::directory_iterator();
         entry.increment(error)) {
        const fs::path path = entry->path();
        std::error_code unknown; // of a link that leads nowhere: no folder then
        if (entry->is_directory(unknown)) {
            const bool own = !entry->is_symlink(unknown) && !path.filename().string().starts_with('.');
            if (own && !is_build_folder(path))
                search(path, manifests, errors);
        } else if (path.filename() == manifest_name) {
            manifests.push_back(path.string());
        }
    }
    if (error)
        errors.push_back(file_error(folder.string(), fmt::format("cannot be searched: {}", error.message())));
}

} // namespace

Cases read_manifest(const std::string& file, const fs::path& base) {
    const auto failed = [&](std::string_view why) {
        return Cases{{}, {file_error(file, fmt::format("cannot be read: {}", why))}};
    };
    // Not a pipe, which would be waited for.
    std::error_code error;
    if (const fs::file_status status = fs::status(file, error); !fs::is_regular_file(status))
        return failed(error ? error.message() : "not a regular file");
    std::ifstream stream(file, std::ios::binary);
    if (!stream)
        return failed(std::strerror(errno));
    std::string text(maximum_manifest_size + 1, '\0');
    stream.read(text.data(), static_cast<std::streamsize>(text.size()));
    if (stream.bad())
        return failed("input error");
    text.resize(static_cast<std::size_t>(stream.gcount()));
    if (text.size() > maximum_manifest_size)
        return failed(fmt::format("more than {} KiB", maximum_manifest_size >> 10));
    return parse_manifest(text, file, base);
}

TestCase bare_kernel(const std::string& file, const fs::path& base) {
    TestCase made;
    made.kernel = absolute_path(base, file);
    made.name = (base / file).lexically_normal().lexically_relative(base.lexically_normal()).generic_string();
    return made;
}

Discovery find_manifests(std::span<const std::string> paths) {
    static const std::string current_folder = ".";
    if (paths.empty())
        paths = {&current_folder, 1};
    Discovery found;
    std::set<fs::path> known; // the same file by another path is no other case
    const auto add = [&](std::vector<std::string>& files, const std::string& file) {
        std::error_code error;
        if (known.insert(fs::weakly_canonical(file, error)).second || error)
            files.push_back(file);
    };
    for (const std::string& path : paths) {
        std::error_code error;
        const fs::file_status status = fs::status(path, error);
        if (fs::is_directory(status)) {
            std::vector<std::string> manifests;
            const std::size_t errors = found.errors.size();
            search(path, manifests, found.errors);
            if (manifests.empty() && found.errors.size() == errors)
                found.errors.push_back(
                    file_error(path, fmt::format("no {} in it or below it", manifest_name)));
            std::ranges::sort(manifests);
            for (const std::string& manifest : manifests)
                add(found.manifests, manifest.starts_with("./") ? manifest.substr(2) : manifest);
        } else if (path.ends_with(".toml")) {
            add(found.manifests, path); // also one that is not there: reading it tells
        } else if (fs::is_regular_file(status)) {
            add(found.kernels, path);
        } else {
            found.errors.push_back(file_error(
                path, error ? error.message() : std::string("neither a folder, a manifest nor a kernel")));
        }
    }
    return found;
}

Cases load_cases(std::span<const std::string> paths, const fs::path& base) {
    const Discovery found = find_manifests(paths);
    Cases all{{}, found.errors};
    std::map<std::string, std::string> names; // and their files
    const auto take = [&](Cases cases, const std::string& file) {
        std::ranges::move(cases.errors, std::back_inserter(all.errors));
        for (TestCase& test : cases.cases) {
            const auto [first, is_new] = names.emplace(test.name, file);
            if (is_new)
                all.cases.push_back(std::move(test));
            else
                all.errors.push_back({file, test.line, test.line == 0 ? 0U : 1U, "",
                                      fmt::format("expected cases with names of their own, not '{}' as in {}",
                                                  printable(test.name), first->second)});
        }
    };
    for (const std::string& file : found.manifests)
        take(read_manifest(file, base), file);
    for (const std::string& file : found.kernels)
        take({{bare_kernel(file, base)}, {}}, file);
    return all;
}

} // namespace umbra
