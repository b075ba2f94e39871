// What `umbra probe` finds out: every trait of the KVM host that matters to guests or to umbra, each by a
// small experiment in a scratch VM of its own.
#pragma once

#include "vmm/traits.hpp"

#include <string>
#include <vector>

namespace umbra {

class Kvm;

/// One trait of this host. What an experiment cannot tell has the value "unknown: " and why.
struct TraitReport {
    std::string id; ///< stable, for programs
    std::string question;
    std::string value;
    std::string meaning; ///< for guests; of an unknown value, nothing
};

struct HostReport {
    HostTraits traits;    ///< what `umbra run` chooses its strategies by
    std::string kind;     ///< the kind of KVM, in words
    std::string strategy; ///< what umbra will do because of it
    std::vector<TraitReport> details;
};

/// Runs all experiments: a tenth of a second. StartupError as probe_traits, or if KVM fails to make a VM.
[[nodiscard]] HostReport probe_host(const Kvm& kvm);

} // namespace umbra
