// Fuzzes the reading of gdb's remote protocol (vmm/debug/packet.hpp). How a stream is cut must not change
// what is found in it, what was framed must come back, and whatever a packet holds must be taken apart
// without going beyond it.
#include "tests/fuzz/harness.hpp"
#include "vmm/debug/packet.hpp"

namespace umbra::fuzz {
namespace {

using Items = std::vector<PacketItem>;

void parse(PacketParser& parser, std::string_view bytes, Items& items) {
    while (true) {
        const std::size_t before = bytes.size();
        auto item = parser.take(bytes);
        if (!item)
            break;
        check(bytes.size() < before, "an item takes at least a byte");
        check(item->payload.size() <= PacketParser::max_payload, "payloads are bounded");
        check(item->kind == PacketItem::Kind::packet || item->payload.empty(), "only packets have one");
        items.push_back(std::move(*item));
    }
    check(bytes.empty(), "what holds no item is taken");
}

Items parse(std::string_view bytes, bool check_sums) {
    PacketParser parser;
    parser.check_sums(check_sums);
    Items items;
    parse(parser, bytes, items);
    return items;
}

void check_cuts(std::string_view stream, std::size_t step, bool check_sums) {
    const Items whole = parse(stream, check_sums);
    PacketParser parser;
    parser.check_sums(check_sums);
    Items pieces;
    for (std::size_t at = 0; at < stream.size(); at += step)
        parse(parser, stream.substr(at, step), pieces);
    check(pieces == whole, "pieces of {} bytes hold the same items", step);
}

/// Undoes run-length encoding as a client does: before the escapes.
std::string expanded(std::string_view data) {
    std::string text;
    for (std::size_t i = 0; i < data.size(); ++i) {
        if (data[i] != '*') {
            text += data[i];
            continue;
        }
        check(i > 1 && i + 1 < data.size(), "a count follows a character");
        const char count = data[++i];
        check(count >= ' ' && count <= '~' && count != '#' && count != '$' && count != '+' && count != '-',
              "'{}' is no count", count);
        text.append(static_cast<std::size_t>(count - 29), text.back());
    }
    return text;
}

void check_frame(std::string_view payload) {
    const std::string framed = frame(payload);
    check(framed.size() <= payload.size() * 2 + 4, "a frame is at most twice as long");
    const Items sent = parse(framed, true);
    check(sent.size() == 1 && sent[0].kind == PacketItem::Kind::packet, "a frame is one packet");
    const Items read = parse(expanded(framed), false);
    check(read.size() == 1 && read[0].payload == payload, "what was framed comes back");
}

void check_hex(std::string_view text) {
    check(text_from_hex(to_hex(text)) == text, "bytes come back from digits");
    const auto bytes = from_hex(text);
    check(bytes.has_value() == text_from_hex(text).has_value(), "bytes and text have the same digits");
    check(!bytes || bytes->size() * 2 == text.size(), "two digits a byte");
}

void take_apart(std::string_view payload, Input choices) {
    Cursor cursor(payload);
    while (!cursor.empty() && !choices.empty()) {
        const std::string_view before = cursor.rest();
        bool taken = false;
        switch (choices.below(4)) {
        case 0:
            taken = cursor.hex().has_value();
            break;
        case 1:
            taken = cursor.take(static_cast<char>(choices.take<std::uint8_t>()));
            break;
        case 2: {
            const std::size_t count = choices.below(16);
            const auto bytes = cursor.bytes(count);
            check(!bytes || bytes->size() == count, "as many bytes as asked for");
            taken = bytes && count != 0;
            break;
        }
        case 3:
            check(before.starts_with(cursor.until(';')), "what is taken was at the front");
            taken = true;
            break;
        }
        check(before.ends_with(cursor.rest()), "what is left is the end");
        check(taken == (cursor.size() < before.size()), "what does not fit is left");
    }
}

} // namespace
} // namespace umbra::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace umbra;
    const std::string_view stream(reinterpret_cast<const char*>(data), size);
    for (const bool check_sums : {true, false}) {
        for (const std::size_t step : {std::size_t{1}, std::size_t{2}, std::size_t{7}, size / 2 + 1})
            fuzz::check_cuts(stream, step, check_sums);
    }
    fuzz::check_frame(stream);
    fuzz::check_hex(stream);
    fuzz::take_apart(stream, {data, size});
    for (const PacketItem& item : fuzz::parse(stream, false)) {
        fuzz::check_frame(item.payload);
        fuzz::take_apart(item.payload, {data, size});
    }
    return 0;
}
