// `umbra inspect`: tells what a kernel file offers.
#pragma once

#include <string>

namespace umbra {

/// Prints inspect_kernel_file() of the file to standard output. Returns the exit code; StartupError if it
/// cannot be read.
int inspect_command(const std::string& path);

} // namespace umbra
