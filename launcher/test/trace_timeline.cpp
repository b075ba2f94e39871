// A trap trace, read for the report: when and where the guest had page faults, and where its code trapped.
#include "launcher/test/html.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <iterator>
#include <span>

namespace umbra {
namespace {

/// A place in the trace's addresses: a page, and in the bits of its offset what happened there.
using Place = std::uint64_t;
using Kind = FaultTimeline::Kind;
constexpr std::uint64_t page_size = 4096, code_mark = FaultTimeline::kinds;

Place page_of(Place place) {
    return place & ~(page_size - 1);
}

constexpr std::size_t maximum_line = 4096;
/// Holes up to this size do not part regions.
constexpr std::uint64_t region_gap = std::uint64_t{2} << 20;
constexpr std::size_t maximum_regions = 64;

/// The value of KEY=VALUE in a line of the trace.
std::optional<std::string_view> field(std::string_view line, std::string_view key) {
    while (!line.empty()) {
        const std::string_view word = line.substr(0, line.find(' '));
        if (word.size() > key.size() && word.starts_with(key) && word[key.size()] == '=')
            return word.substr(key.size() + 1);
        line.remove_prefix(std::min(line.size(), word.size() + 1));
    }
    return std::nullopt;
}

std::optional<double> microseconds(std::string_view line) {
    const auto text = field(line, "us");
    double value = 0;
    if (!text || std::from_chars(text->data(), text->data() + text->size(), value).ec != std::errc{})
        return std::nullopt;
    return std::isfinite(value) && value >= 0 ? std::optional(value) : std::nullopt;
}

std::optional<std::uint64_t> address(std::string_view line, std::string_view key) {
    const auto text = field(line, key);
    std::uint64_t value = 0;
    if (!text || !text->starts_with("0x") ||
        std::from_chars(text->data() + 2, text->data() + text->size(), value, 16).ec != std::errc{})
        return std::nullopt;
    return value;
}

Kind kind_of(std::string_view line) {
    const auto action = field(line, "action");
    if (action == "fill")
        return Kind::filled;
    return action == "deliver" ? Kind::delivered : Kind::other;
}

/// Of places that are sorted, at least one.
FaultTimeline::Region region_of(std::span<const Place> places) {
    FaultTimeline::Region region;
    region.first = page_of(places.front());
    region.last = page_of(places.back());
    const std::uint64_t pages = (region.last - region.first) / page_size + 1;
    while (pages > region.cell_pages * FaultTimeline::most_cells)
        region.cell_pages *= 2;
    region.cells.resize(static_cast<std::size_t>((pages - 1) / region.cell_pages + 1));
    std::optional<Place> before;
    for (const Place place : places) {
        const std::uint64_t page = page_of(place);
        region.pages += page != before ? 1 : 0;
        before = page;
        FaultTimeline::Cell& cell =
            region.cells.at(static_cast<std::size_t>((page - region.first) / page_size / region.cell_pages));
        const auto mark = static_cast<std::size_t>(place - page);
        ++(mark == code_mark ? region.code : region.faults);
        ++(mark == code_mark ? cell.code : cell.faults.at(mark));
    }
    return region;
}

/// Sets the map and what is not in it.
void draw_map(std::vector<Place>& places, FaultTimeline& timeline) {
    std::ranges::sort(places);
    std::vector<std::span<const Place>> regions;
    for (std::span<const Place> rest = places; !rest.empty();) {
        std::size_t length = 1;
        while (length < rest.size() && page_of(rest[length]) - page_of(rest[length - 1]) <= region_gap)
            ++length;
        regions.push_back(rest.first(length));
        rest = rest.subspan(length);
    }
    if (regions.size() > maximum_regions) {
        timeline.more_places = regions.size() - maximum_regions;
        std::ranges::nth_element(regions, regions.begin() + maximum_regions, std::ranges::greater(),
                                 &std::span<const Place>::size);
        regions.resize(maximum_regions);
        std::ranges::sort(regions, {}, [](const auto& region) { return region.front(); });
    }
    std::ranges::transform(regions, std::back_inserter(timeline.map), region_of);
}

} // namespace

std::optional<FaultTimeline> read_timeline(std::istream& trace, std::size_t most) {
    FaultTimeline timeline;
    std::vector<Place> places;
    std::vector<std::pair<float, Kind>> faults; // microseconds since the first trap
    std::optional<double> first;
    double last = 0;
    std::size_t read = 0;
    for (std::string line; std::getline(trace, line);) {
        read += line.size() + 1;
        if (read > most) {
            timeline.complete = false;
            break;
        }
        if (line.size() > maximum_line || line.starts_with('#'))
            continue;
        const auto us = microseconds(line);
        if (!us)
            continue;
        ++timeline.traps;
        first = first.value_or(*us);
        last = std::max(last, *us);
        if (const auto rip = address(line, "rip"))
            places.push_back(page_of(*rip) | code_mark);
        if (const auto fault = address(line, "cr2")) {
            const Kind kind = kind_of(line);
            places.push_back(page_of(*fault) | static_cast<std::uint64_t>(kind));
            faults.emplace_back(static_cast<float>(std::max(*us - *first, 0.0)), kind);
        }
    }
    if (!first)
        return std::nullopt;
    timeline.seconds = (last - *first) / 1e6;
    const double slot_us = std::max((last - *first) / FaultTimeline::slots, 1e-3);
    for (const auto& [us, kind] : faults) {
        const auto slot = static_cast<std::size_t>(static_cast<double>(us) / slot_us);
        ++timeline.faults.at(std::min(slot, FaultTimeline::slots - 1)).at(static_cast<std::size_t>(kind));
    }
    draw_map(places, timeline);
    return timeline;
}

} // namespace umbra
