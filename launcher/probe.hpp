// `umbra probe`: tells what kind of KVM host this is.
#pragma once

#include "vmm/probe.hpp"

#include <string>

namespace umbra {

/// For people: the kind, umbra's strategy, and an aligned table of the traits.
[[nodiscard]] std::string probe_table(const HostReport& report);
/// For programs: an object with "kind", "resume" ("iretq" or "system_registers"), "present_entries" ("store"
/// or "republish") and "traits", which has by its id an object of strings "question", "value", "meaning".
[[nodiscard]] std::string probe_json(const HostReport& report);

/// Probes this host and prints either to standard output. Returns the exit code; StartupError as probe_host.
int probe_command(bool json);

} // namespace umbra
