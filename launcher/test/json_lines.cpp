#include "launcher/test/json_lines.hpp"

#include "launcher/test/text.hpp"

#include <nlohmann/json.hpp>

namespace umbra {
namespace {

using Json = nlohmann::ordered_json;

std::string line_of(const Json& event) {
    return event.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

} // namespace

void JsonLinesSink::plan(const RunPlan& plan) {
    file_.write(line_of({{"event", "plan"},
                         {"format", 1},
                         {"runs", plan.runs == 0 ? Json() : Json(plan.runs)},
                         {"begun", utc_text(plan.begun)}}));
}

void JsonLinesSink::started(const TestCase& test, unsigned attempt) {
    file_.write(line_of({{"event", "start"}, {"name", test.name}, {"attempt", attempt}}));
}

void JsonLinesSink::ended(const CaseResult& result) {
    Json event{{"event", "end"}};
    event.update(Json::parse(result_json(result)));
    event["console"] =
        result.verdict == CaseVerdict::passed ? Json() : Json(last_part(result.console, json_console));
    file_.write(line_of(event));
}

void JsonLinesSink::finished(const RunSummary& summary) {
    file_.write(line_of({{"event", "summary"},
                         {"passed", summary.passed},
                         {"failed", summary.failed},
                         {"skipped", summary.skipped},
                         {"not_run", summary.not_run},
                         {"wall_seconds", std::chrono::duration<double>(summary.duration).count()},
                         {"interrupted", summary.interrupted}}));
}

} // namespace umbra
