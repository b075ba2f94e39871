// How devices interrupt.
#pragma once

#include <functional>

namespace umbra {

/// The state of an interrupt request line: true = asserted. Called only when the level changes, on the thread
/// that runs the vCPU.
using InterruptLine = std::function<void(bool level)>;

} // namespace umbra
