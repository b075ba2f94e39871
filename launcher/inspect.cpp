#include "launcher/inspect.hpp"

#include "vmm/error.hpp"
#include "vmm/loader/kernel_file.hpp"
#include "vmm/loader/loader.hpp"

#include <cstdio>

#include <fmt/core.h>

namespace umbra {

int inspect_command(const std::string& path) {
    const std::vector<std::byte> file = read_kernel(path);
    try {
        std::fputs(inspect_kernel_file(file).c_str(), stdout);
    } catch (const StartupError& error) {
        throw StartupError(error.code(), fmt::format("cannot inspect kernel '{}': {}", path, error.what()));
    }
    return 0;
}

} // namespace umbra
