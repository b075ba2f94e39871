// Unit tests of vmm/debug/packet.hpp.
#include "vmm/debug/packet.hpp"

#include <array>
#include <ostream>
#include <random>

#include <gtest/gtest.h>

namespace umbra {

/// For GoogleTest's messages.
static void PrintTo(const PacketItem& item, std::ostream* out) { // NOLINT(readability-identifier-naming)
    *out << "kind " << static_cast<int>(item.kind) << " '" << to_hex(item.payload) << "'";
}

namespace {

using Kind = PacketItem::Kind;
using namespace std::string_literals;

std::vector<PacketItem> parse(PacketParser& parser, std::string_view bytes) {
    std::vector<PacketItem> items;
    while (const auto item = parser.take(bytes))
        items.push_back(*item);
    EXPECT_TRUE(bytes.empty());
    return items;
}

std::vector<PacketItem> parse(std::string_view bytes) {
    PacketParser parser;
    return parse(parser, bytes);
}

PacketItem packet(std::string payload) {
    return {Kind::packet, std::move(payload)};
}

using Items = std::vector<PacketItem>;
const PacketItem ack{Kind::ack}, nack{Kind::nack}, interrupt{Kind::interrupt}, bad{Kind::bad_packet};

/// Undoes run-length encoding as a client does: before the escapes.
std::string expanded(std::string_view data) {
    std::string text;
    for (std::size_t i = 0; i < data.size(); ++i) {
        if (data[i] != '*' || i + 1 == data.size())
            text += data[i];
        else
            text.append(static_cast<std::size_t>(data[++i] - 29), text.back());
    }
    return text;
}

/// What a client makes of a frame, which is checked on the way.
std::string unframed(const std::string& framed) {
    EXPECT_EQ(parse(framed).size(), 1U) << framed;
    EXPECT_EQ(parse(framed).at(0).kind, Kind::packet) << framed;
    PacketParser parser;
    parser.check_sums(false); // the sum is of what was sent
    const Items items = parse(parser, expanded(framed));
    return items.size() == 1 ? items[0].payload : "not a frame: " + framed;
}

// --- Parsing

TEST(GdbPacketParser, KnowsEachItem) {
    EXPECT_EQ(parse("$g#67"), Items{packet("g")});
    EXPECT_EQ(parse("$#00"), Items{packet("")});
    EXPECT_EQ(parse("+"), Items{ack});
    EXPECT_EQ(parse("-"), Items{nack});
    EXPECT_EQ(parse("\x03"), Items{interrupt});
    EXPECT_EQ(parse("+$?#3f-\x03$g#67"), (Items{ack, packet("?"), nack, interrupt, packet("g")}));
    EXPECT_EQ(parse("$OK#9a"), Items{packet("OK")});
    EXPECT_EQ(parse("$OK#9A"), Items{packet("OK")});
}

TEST(GdbPacketParser, SkipsWhatIsNoItem) {
    EXPECT_EQ(parse("GET / HTTP/1.1\r\n\r\n"), Items{});
    EXPECT_EQ(parse("#00}*%\0\xff$g#67\n"s), Items{packet("g")});
}

TEST(GdbPacketParser, UndoesEscapes) {
    EXPECT_EQ(parse("$}\x03}\x04}]}\x0a#62"), Items{packet("#$}*")}); // the sum is of what was sent
    PacketParser parser;
    parser.check_sums(false);
    EXPECT_EQ(parse(parser, "$}\x03}\x04}]}\x0a#00"), Items{packet("#$}*")});
    EXPECT_EQ(parse(parser, "$a}#00"), Items{packet("a")}); // half an escape
}

TEST(GdbPacketParser, TakesAnyByteInsideAPacket) {
    std::string all;
    for (unsigned byte = 0; byte < 256; ++byte)
        all += static_cast<char>(byte);
    const auto items = parse(frame(all));
    ASSERT_EQ(items.size(), 1U);
    EXPECT_EQ(items[0], packet(all)); // neither is 0x03 an interrupt there, nor '+' an acknowledgment
}

TEST(GdbPacketParser, ComparesChecksumsUntilToldNotTo) {
    EXPECT_EQ(parse("$g#68"), Items{bad});
    EXPECT_EQ(parse("$g#6x"), Items{bad});
    EXPECT_EQ(parse("$g###"), Items{bad});
    EXPECT_EQ(parse("$g#66+$g#67"), (Items{bad, ack, packet("g")}));
    PacketParser parser;
    parser.check_sums(false);
    EXPECT_EQ(parse(parser, "$g#00$g#xx"), (Items{packet("g"), packet("g")}));
    parser.check_sums(true);
    EXPECT_EQ(parse(parser, "$g#00"), Items{bad});
}

TEST(GdbPacketParser, BeginsAnewAtADollar) {
    EXPECT_EQ(parse("$vCont$g#67"), Items{packet("g")});
    EXPECT_EQ(parse("$$$g#67"), Items{packet("g")});
    EXPECT_EQ(parse("$a}$g#67"), Items{packet("g")});
    EXPECT_EQ(parse("$a#$g#67"), Items{packet("g")});
    EXPECT_EQ(parse("$a#6$g#67"), Items{packet("g")});
}

TEST(GdbPacketParser, BoundsThePayload) {
    const std::string longest(PacketParser::max_payload, 'x');
    PacketParser parser;
    parser.check_sums(false);
    EXPECT_EQ(parse(parser, '$' + longest + "#00"), Items{packet(longest)});
    EXPECT_EQ(parse(parser, '$' + longest + "x#00+$g#67"), (Items{bad, ack, packet("g")}));
    EXPECT_EQ(parse(parser, '$' + longest + "xx$g#67"), Items{packet("g")});
    // An escape is one byte of payload.
    std::string escaped = "$";
    for (std::size_t i = 0; i < PacketParser::max_payload; ++i)
        escaped += "}]";
    EXPECT_EQ(parse(parser, escaped + "#00"), Items{packet(std::string(PacketParser::max_payload, '}'))});
    EXPECT_EQ(parse(parser, escaped + "}]#00"), Items{bad});
}

TEST(GdbPacketParser, DoesNotDependOnHowTheStreamIsCut) {
    const std::string stream = "+$qSupported:xmlRegisters=i386#77junk-$g#68\x03$X10,4:\x03}\x03}]+#00$half" +
                               frame("m0,10") + "$#00+" + frame("a#$}*b") + "$a#$g#67$}#00$g#6";
    const Items whole = parse(stream);
    ASSERT_GE(whole.size(), 9U);
    for (std::size_t i = 0; i <= stream.size(); ++i) {
        for (std::size_t j = i; j <= stream.size(); ++j) {
            PacketParser parser;
            Items items;
            for (const std::string& piece :
                 {stream.substr(0, i), stream.substr(i, j - i), stream.substr(j)}) {
                const Items some = parse(parser, piece);
                items.insert(items.end(), some.begin(), some.end());
            }
            ASSERT_EQ(items, whole) << "cut at " << i << " and " << j;
        }
    }
}

// --- Framing

TEST(GdbPacketFrame, HasAChecksum) {
    EXPECT_EQ(frame(""), "$#00");
    EXPECT_EQ(frame("OK"), "$OK#9a");
    EXPECT_EQ(frame("\xff\xff\x03"), "$\xff\xff\x03#01");
}

TEST(GdbPacketFrame, EscapesTheProtocolsOwnCharacters) {
    EXPECT_EQ(frame("#"), "$}\x03#80");
    EXPECT_EQ(frame("$"), "$}\x04#81");
    EXPECT_EQ(frame("}"), "$}]#da");
    EXPECT_EQ(frame("*"), "$}\x0a#87");
    EXPECT_EQ(frame("####"), "$}\x03}\x03}\x03}\x03#00"); // an escape is never repeated by a count
}

TEST(GdbPacketFrame, EncodesRunsAsTheManualSays) {
    const auto data = [](std::size_t length) {
        const std::string framed = frame(std::string(length, '0'));
        return framed.substr(1, framed.size() - 4);
    };
    EXPECT_EQ(data(3), "000");
    EXPECT_EQ(data(4), "0* ");
    EXPECT_EQ(data(5), "0*!");
    EXPECT_EQ(data(6), "0*\"");
    EXPECT_EQ(data(7), "0*\"0");  // six repeats would be '#'
    EXPECT_EQ(data(8), "0*\"00"); // seven would be '$'
    EXPECT_EQ(data(9), "0*%");
    EXPECT_EQ(data(15), "0**0"); // fourteen: '+'
    EXPECT_EQ(data(17), "0*,0"); // sixteen: '-'
    EXPECT_EQ(data(98), "0*~");
    EXPECT_EQ(data(99), "0*~0");
    EXPECT_EQ(frame("x000000001y"), "$x0*\"001y#fe");
}

TEST(GdbPacketFrame, ComesBackWhateverIsInIt) {
    for (std::size_t length = 0; length < 400; ++length) {
        EXPECT_EQ(unframed(frame(std::string(length, '0'))), std::string(length, '0'));
        EXPECT_EQ(unframed(frame(std::string(length, '#'))), std::string(length, '#'));
    }
    std::mt19937 random(1); // NOLINT(cert-msc32-c,cert-msc51-cpp): the same each time
    for (unsigned round = 0; round < 3000; ++round) {
        constexpr std::string_view likely = "0f#$}*+-\x03";
        std::string payload;
        while (random() % 8 != 0)
            payload.append(random() % 3 == 0 ? random() % 120 : 1, likely[random() % likely.size()]);
        ASSERT_EQ(unframed(frame(payload)), payload);
    }
}

TEST(GdbPacketFrame, IsAtMostTwiceAsLong) {
    EXPECT_EQ(frame(std::string(1000, '#')).size(), 2004U);
    EXPECT_LT(frame(std::string(PacketParser::max_payload, '0')).size(), PacketParser::max_payload / 30);
}

// --- Hexadecimal

TEST(GdbHex, WritesPairsOfDigits) {
    constexpr std::array bytes{std::byte{0x00}, std::byte{0x9f}, std::byte{0xa0}, std::byte{0xff}};
    EXPECT_EQ(to_hex(bytes), "009fa0ff");
    EXPECT_EQ(to_hex("OK\n"), "4f4b0a");
    EXPECT_EQ(to_hex(""), "");
}

TEST(GdbHex, ReadsPairsOfDigits) {
    EXPECT_EQ(from_hex("009FfF"), (std::vector{std::byte{0}, std::byte{0x9f}, std::byte{0xff}}));
    EXPECT_EQ(from_hex(""), std::vector<std::byte>{});
    EXPECT_EQ(text_from_hex("4f4B"), "OK");
    for (const std::string_view bad_digits : {"0", "000", "0g", "g0", " 0", "0x", "-1", "+1"}) {
        EXPECT_EQ(from_hex(bad_digits), std::nullopt) << bad_digits;
        EXPECT_EQ(text_from_hex(bad_digits), std::nullopt) << bad_digits;
    }
}

// --- Cursor

TEST(GdbCursor, TakesAPayloadApart) {
    Cursor cursor("Z2,ffffffff81000000,4;X1,0");
    EXPECT_FALSE(cursor.take('z'));
    EXPECT_TRUE(cursor.take('Z'));
    EXPECT_EQ(cursor.hex(), 2U);
    EXPECT_TRUE(cursor.take(','));
    EXPECT_EQ(cursor.hex(), 0xffff'ffff'8100'0000U);
    EXPECT_EQ(cursor.hex(), std::nullopt); // a comma
    EXPECT_EQ(cursor.rest(), ",4;X1,0");
    EXPECT_EQ(cursor.until(';'), ",4");
    EXPECT_FALSE(cursor.take("X1;"));
    EXPECT_TRUE(cursor.take("X1,"));
    EXPECT_EQ(cursor.size(), 1U);
    EXPECT_EQ(cursor.until(';'), "0");
    EXPECT_TRUE(cursor.empty());
    EXPECT_EQ(cursor.until(';'), "");
    EXPECT_EQ(cursor.hex(), std::nullopt);
    EXPECT_FALSE(cursor.take('0'));
}

TEST(GdbCursor, KnowsHowLargeANumberMayBe) {
    Cursor largest("ffffFFFFffffFFFF");
    EXPECT_EQ(largest.hex(), ~std::uint64_t{0});
    EXPECT_TRUE(largest.empty());
    Cursor zeros("000000000000000000000012");
    EXPECT_EQ(zeros.hex(), 0x12U);
    Cursor too_large("10000000000000000,");
    EXPECT_EQ(too_large.hex(), std::nullopt);
    EXPECT_EQ(too_large.rest(), "10000000000000000,"); // left where it is
}

TEST(GdbCursor, TakesBytes) {
    Cursor cursor("9090cc,9");
    EXPECT_EQ(cursor.bytes(4), std::nullopt); // a comma
    EXPECT_EQ(cursor.bytes(5), std::nullopt); // too few
    EXPECT_EQ(cursor.bytes(~std::size_t{0}), std::nullopt);
    EXPECT_EQ(cursor.bytes(3), (std::vector{std::byte{0x90}, std::byte{0x90}, std::byte{0xcc}}));
    EXPECT_EQ(cursor.bytes(0), std::vector<std::byte>{});
    EXPECT_EQ(cursor.rest(), ",9");
}

} // namespace
} // namespace umbra
