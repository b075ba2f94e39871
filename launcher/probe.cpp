#include "launcher/probe.hpp"

#include "vmm/error.hpp"
#include "vmm/kvm/kvm.hpp"

#include <algorithm>
#include <cstdio>

#include <fmt/core.h>
#include <nlohmann/json.hpp>

namespace umbra {

std::string probe_table(const HostReport& report) {
    std::size_t questions = 0, values = 0;
    for (const TraitReport& trait : report.details) {
        questions = std::max(questions, trait.question.size());
        values = std::max(values, trait.value.size());
    }
    std::string text = fmt::format("umbra {}\nthis KVM {}\n\n", report.strategy, report.kind);
    for (const TraitReport& trait : report.details)
        text +=
            fmt::format("{:{}}  {:{}}  {}\n", trait.question, questions, trait.value, values, trait.meaning);
    return text;
}

std::string probe_json(const HostReport& report) {
    nlohmann::ordered_json json{
        {"kind", report.kind},
        {"ring0", report.traits.native_ring0 ? "native" : "interpreted"},
        {"present_entries", report.traits.stores_seen ? "store" : "republish"},
        {"traits", nlohmann::ordered_json::object()},
    };
    for (const TraitReport& trait : report.details)
        json["traits"][trait.id] = {
            {"question", trait.question}, {"value", trait.value}, {"meaning", trait.meaning}};
    return json.dump(2) + "\n";
}

int probe_command(bool json) {
    const HostReport report = probe_host(Kvm());
    const std::string text = json ? probe_json(report) : probe_table(report);
    std::fwrite(text.data(), 1, text.size(), stdout);
    return static_cast<int>(ExitCode::passed);
}

} // namespace umbra
