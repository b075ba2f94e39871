// The static program that init.cpp is linked to, which this one carries.
#pragma once

#include <string_view>

namespace umbra::emulated {

extern "C" {
extern const char umbra_init_begin[];
extern const char umbra_init_end[];
}

[[nodiscard]] inline std::string_view init_image() {
    return {umbra_init_begin, umbra_init_end};
}

} // namespace umbra::emulated
