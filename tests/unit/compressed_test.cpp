// Unit tests of vmm/loader/compressed: each format whole, repeated, padded, cut, damaged and too large.
#include "vmm/loader/compressed.hpp"

#include "vmm/error.hpp"
#include "vmm/loader/lz4.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <asm/bootparam.h>
#include <gtest/gtest.h>
#include <lzma.h>
#include <zlib.h>
#include <zstd.h>

namespace umbra {
namespace {

using Bytes = std::vector<std::byte>;
using namespace std::string_view_literals;

constexpr std::uint64_t mib = std::uint64_t{1} << 20;

Bytes bytes_of(std::string_view text) {
    const auto* const begin = reinterpret_cast<const std::byte*>(text.data());
    return {begin, begin + text.size()};
}

Bytes operator+(Bytes left, const Bytes& right) {
    left.insert(left.end(), right.begin(), right.end());
    return left;
}

Bytes zeros(std::size_t count) {
    return Bytes(count);
}

template<class T>
Bytes raw(const T& value) {
    Bytes bytes(sizeof value);
    std::memcpy(bytes.data(), &value, sizeof value);
    return bytes;
}

Bytes first(const Bytes& bytes, std::size_t count) {
    return {bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(count)};
}

/// Text that repeats itself here and there, so that every format finds something to do.
Bytes sample(std::size_t size) {
    std::mt19937 random(1);
    std::string text;
    while (text.size() < size)
        text += random() % 3 == 0 ? "the same words again " : std::to_string(random());
    text.resize(size);
    return bytes_of(text);
}

/// The message with which `action` is refused; nothing if it is not.
std::optional<std::string> refusal(const std::function<void()>& action) {
    try {
        action();
    } catch (const StartupError& error) {
        EXPECT_EQ(error.code(), ExitCode::bad_usage);
        std::string message = error.what();
        EXPECT_FALSE(message.empty());
        EXPECT_EQ(message.find('\n'), std::string::npos) << "one line";
        return message;
    }
    return std::nullopt;
}

std::string unpack_refusal(const Bytes& file, std::uint64_t limit = mib) {
    return refusal([&] { (void)unpack(file, limit); }).value_or("");
}

// --- packing

Bytes pack_gzip(const Bytes& data) {
    z_stream stream{};
    EXPECT_EQ(deflateInit2(&stream, 9, Z_DEFLATED, 16 + MAX_WBITS, 8, Z_DEFAULT_STRATEGY), Z_OK);
    Bytes packed(deflateBound(&stream, data.size()));
    Bytes input = data; // zlib wants it writable
    stream.next_in = reinterpret_cast<Bytef*>(input.data());
    stream.avail_in = static_cast<uInt>(input.size());
    stream.next_out = reinterpret_cast<Bytef*>(packed.data());
    stream.avail_out = static_cast<uInt>(packed.size());
    EXPECT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
    packed.resize(stream.total_out);
    deflateEnd(&stream);
    return packed;
}

/// As Linux packs itself: with the filter for x86 and CRC32.
Bytes pack_xz(const Bytes& data) {
    lzma_options_lzma options{};
    EXPECT_EQ(lzma_lzma_preset(&options, 1), 0);
    const std::array<lzma_filter, 3> filters{
        {{LZMA_FILTER_X86, nullptr}, {LZMA_FILTER_LZMA2, &options}, {LZMA_VLI_UNKNOWN, nullptr}}};
    Bytes packed(lzma_stream_buffer_bound(data.size()));
    std::size_t size = 0;
    EXPECT_EQ(lzma_stream_buffer_encode(const_cast<lzma_filter*>(filters.data()), LZMA_CHECK_CRC32, nullptr,
                                        reinterpret_cast<const std::uint8_t*>(data.data()), data.size(),
                                        reinterpret_cast<std::uint8_t*>(packed.data()), &size, packed.size()),
              LZMA_OK);
    packed.resize(size);
    return packed;
}

Bytes pack_zstd(const Bytes& data) {
    const std::unique_ptr<ZSTD_CCtx, std::size_t (*)(ZSTD_CCtx*)> context(ZSTD_createCCtx(), ZSTD_freeCCtx);
    ZSTD_CCtx_setParameter(context.get(), ZSTD_c_checksumFlag, 1);
    Bytes packed(ZSTD_compressBound(data.size()));
    packed.resize(ZSTD_compress2(context.get(), packed.data(), packed.size(), data.data(), data.size()));
    return packed;
}

/// Literals only, in blocks of at most 8 MiB; matches have tests of their own.
Bytes pack_lz4(const Bytes& data) {
    Bytes packed = raw(lz4_legacy_magic);
    for (std::size_t at = 0; at < data.size(); at += lz4_legacy_block) {
        const std::size_t size = std::min(lz4_legacy_block, data.size() - at);
        Bytes block{static_cast<std::byte>(std::min<std::size_t>(size, 15) << 4)};
        if (size >= 15) {
            block.resize(1 + (size - 15) / 255, std::byte{255});
            block.push_back(static_cast<std::byte>((size - 15) % 255));
        }
        const auto begin = data.begin() + static_cast<std::ptrdiff_t>(at);
        block.insert(block.end(), begin, begin + static_cast<std::ptrdiff_t>(size));
        packed = packed + raw(static_cast<std::uint32_t>(block.size())) + block;
    }
    return packed;
}

// --- every format

struct Format {
    Compression compression;
    Bytes (*pack)(const Bytes&);
    std::size_t padding; ///< so many zeros may follow; 0: none
    bool has_checksum;
};

class CompressedTest : public testing::TestWithParam<Format> {};

TEST_P(CompressedTest, UnpacksWhatWasPacked) {
    for (const std::size_t size : {std::size_t{1}, std::size_t{14}, std::size_t{15}, std::size_t{270},
                                   std::size_t{4096}, std::size_t{100'000}, 9 * mib}) {
        const Bytes data = sample(size);
        const Bytes packed = GetParam().pack(data);
        EXPECT_EQ(compression_of(packed), GetParam().compression);
        EXPECT_TRUE(unpack(packed, 16 * mib) == data) << size;
    }
    EXPECT_EQ(unpack(GetParam().pack({}), mib), Bytes());
}

TEST_P(CompressedTest, UnpacksMembersOneAfterTheOther) {
    const Bytes left = sample(1000), right = bytes_of("and more");
    EXPECT_EQ(unpack(GetParam().pack(left) + GetParam().pack(right) + GetParam().pack(left), mib),
              left + right + left);
}

TEST_P(CompressedTest, TakesThePaddingOfItsFormatAndNothingElse) {
    const Bytes data = sample(1000);
    const Bytes packed = GetParam().pack(data);
    if (GetParam().padding != 0) {
        EXPECT_EQ(unpack(packed + zeros(GetParam().padding), mib), data);
        EXPECT_EQ(unpack(packed + zeros(512), mib), data);
    } else {
        EXPECT_NE(unpack_refusal(packed + zeros(4)), "");
    }
    EXPECT_NE(unpack_refusal(packed + bytes_of("something else behind it")), "");
    EXPECT_NE(unpack_refusal(packed + zeros(8) + bytes_of("something else behind it")), "");
}

TEST_P(CompressedTest, EveryTruncationIsRefused) {
    const Bytes whole = GetParam().pack(sample(300));
    ASSERT_EQ(unpack_refusal(whole), "");
    for (std::size_t size = 0; size < whole.size(); ++size) {
        // A legacy frame of LZ4 has no end mark: without blocks it is an empty one.
        if (GetParam().compression == Compression::lz4 && size == sizeof lz4_legacy_magic)
            continue;
        const std::string message = unpack_refusal(first(whole, size));
        EXPECT_NE(message, "") << size;
        if (size > 6) { // behind the magic number
            EXPECT_NE(message.find("truncated file: its " + std::string(name(GetParam().compression))),
                      std::string::npos)
                << size << ": " << message;
        }
    }
}

TEST_P(CompressedTest, DamageIsRefusedOrHarmless) {
    const Bytes data = sample(300);
    const Bytes whole = GetParam().pack(data);
    unsigned refused = 0;
    for (std::size_t bit = 0; bit < whole.size() * 8; ++bit) {
        Bytes damaged = whole;
        damaged[bit / 8] ^= std::byte{1} << (bit % 8);
        Bytes unpacked;
        const bool is_refused = refusal([&] { unpacked = unpack(damaged, mib); }).has_value();
        refused += is_refused ? 1 : 0;
        if (!is_refused && GetParam().has_checksum) {
            EXPECT_EQ(unpacked, data) << "bit " << bit; // of gzip's time stamp, for example
        }
        EXPECT_LE(unpacked.size(), mib);
    }
    EXPECT_GT(refused, GetParam().has_checksum ? whole.size() * 7 : 40U);
}

TEST_P(CompressedTest, OutputIsBounded) {
    const Bytes data = sample(10'000);
    const Bytes packed = GetParam().pack(data);
    EXPECT_EQ(unpack(packed, data.size()), data);
    const std::string message = unpack_refusal(packed, data.size() - 1);
    EXPECT_NE(message.find("more than 9999 bytes"), std::string::npos) << message;
    EXPECT_NE(unpack_refusal(packed, 0), "");
    EXPECT_NE(unpack_refusal(GetParam().pack(zeros(64 * mib)), mib), "");
}

INSTANTIATE_TEST_SUITE_P(Formats, CompressedTest,
                         testing::Values(Format{Compression::gzip, pack_gzip, 1, true},
                                         Format{Compression::xz, pack_xz, 4, true},
                                         Format{Compression::zstd, pack_zstd, 0, true},
                                         Format{Compression::lz4, pack_lz4, 0, false}),
                         [](const auto& format) { return std::string(name(format.param.compression)); });

// --- single formats

TEST(CompressionTest, IsToldByTheMagicNumber) {
    struct Case {
        Compression compression;
        std::string_view name, magic;
        bool can_unpack;
    };
    constexpr std::array<Case, 7> cases{{{Compression::gzip, "gzip", "\x1f\x8b\x08"sv, true},
                                         {Compression::xz, "xz", "\xfd\x37\x7a\x58\x5a\0"sv, true},
                                         {Compression::zstd, "zstd", "\x28\xb5\x2f\xfd"sv, true},
                                         {Compression::lz4, "lz4", "\x02\x21\x4c\x18"sv, true},
                                         {Compression::bzip2, "bzip2", "BZh"sv, false},
                                         {Compression::lzma, "lzma", "\x5d\0\0"sv, false},
                                         {Compression::lzo, "lzo", "\x89LZO\0\r\n\x1a\n"sv, false}}};
    for (const Case& c : cases) {
        const Bytes magic = bytes_of(c.magic);
        EXPECT_EQ(compression_of(magic), c.compression) << c.name;
        EXPECT_EQ(compression_of(magic + bytes_of("more")), c.compression) << c.name;
        EXPECT_EQ(compression_of(first(magic, magic.size() - 1)), Compression::none) << c.name;
        EXPECT_EQ(name(c.compression), c.name);
        EXPECT_EQ(can_unpack(c.compression), c.can_unpack) << c.name;
        if (!c.can_unpack) {
            EXPECT_NE(unpack_refusal(magic).find(c.name), std::string::npos) << c.name;
        }
    }
    EXPECT_EQ(compression_of({}), Compression::none);
    EXPECT_EQ(compression_of(bytes_of("\x7f"
                                      "ELF")),
              Compression::none);
    EXPECT_FALSE(can_unpack(Compression::none));
    EXPECT_EQ(name(Compression::none), "none");
    EXPECT_NE(unpack_refusal({}), "");
}

TEST(CompressionTest, XzPaddingIsOfMultiplesOfFour) {
    const Bytes data = sample(100);
    EXPECT_EQ(unpack(pack_xz(data) + zeros(8) + pack_xz(data), mib), data + data);
    EXPECT_NE(unpack_refusal(pack_xz(data) + zeros(3)), "");
}

TEST(CompressionTest, XzDictionaryIsBounded) {
    Bytes packed = pack_xz(sample(100));
    // The block header is behind the 12 bytes of the stream header. It names its size in words, then its
    // filters, of which LZMA2 is 21, 01 and its dictionary's size, and ends with its CRC32 (.xz file
    // format, 3.1).
    constexpr std::size_t block = 12;
    const std::size_t size = 4 * std::to_integer<std::size_t>(packed[block]);
    const Bytes lzma2 = bytes_of("\x21\x01");
    const auto end = packed.begin() + block + static_cast<std::ptrdiff_t>(size);
    const auto filter = std::search(packed.begin() + block, end, lzma2.begin(), lzma2.end());
    ASSERT_LT(filter, end - 2);
    filter[2] = std::byte{40}; // 4 GiB - 1
    const std::uint32_t sum = lzma_crc32(reinterpret_cast<const std::uint8_t*>(&packed[block]), size, 0);
    std::memcpy(&packed[block + size], &sum, sizeof sum);
    const std::string message = unpack_refusal(packed);
    EXPECT_NE(message.find("dictionary is too large"), std::string::npos) << message;
}

TEST(CompressionTest, ZstdSkipsFramesThatAreToBeSkipped) {
    const Bytes data = sample(100);
    const Bytes skipped = bytes_of("\x50\x2a\x4d\x18\x03\0\0\0abc"sv);
    EXPECT_EQ(unpack(pack_zstd(data) + skipped + pack_zstd(data) + skipped, mib), data + data);
    EXPECT_NE(unpack_refusal(pack_zstd(data) + first(skipped, skipped.size() - 1)), "");
}

TEST(CompressionTest, ZstdWindowIsBounded) {
    // A frame without content size and check sum, its window, and an empty last block (RFC 8878, 3.1.1).
    const Bytes largest = bytes_of("\x28\xb5\x2f\xfd\x00\x88\x01\0\0"sv); // 128 MiB
    const Bytes larger = bytes_of("\x28\xb5\x2f\xfd\x00\x90\x01\0\0"sv);  // 256 MiB
    EXPECT_EQ(unpack(largest, mib), Bytes());
    EXPECT_NE(unpack_refusal(larger).find("too much memory"), std::string::npos) << unpack_refusal(larger);
}

TEST(CompressionTest, Lz4ReadsWhatItsOwnToolWrites) {
    const Bytes packed = bytes_of("\x02\x21\x4c\x18\x16\x00\x00\x00\x3f"
                                  "abc\x03\x00\x1a\xe0 the end of it"sv);
    EXPECT_EQ(unpack(packed, mib),
              bytes_of("abcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabc the end of it"));
}

TEST(CompressionTest, Lz4BlocksAreReadToTheirLastBit) {
    struct Case {
        std::string_view what, block;
        std::optional<std::string_view> unpacked;
    };
    constexpr std::string_view long_run = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaz";
    constexpr std::array<Case, 12> cases{{
        {"nothing", ""sv, std::nullopt},
        {"no literals", "\x00"sv, ""sv},
        {"literals",
         "\x30"
         "abc"sv,
         "abc"sv},
        {"too few literals",
         "\x40"
         "abc"sv,
         std::nullopt},
        {"a match",
         "\x30"
         "abc\x03\x00\x10"
         "z"sv,
         "abcabcaz"sv},
        {"a match that overlaps itself, of extended length",
         "\x1f"
         "a\x01\x00\x14\x10"
         "z"sv,
         long_run},
        {"an extended length that does not end", "\xf0\xff"sv, std::nullopt},
        {"an offset of 0",
         "\x30"
         "abc\x00\x00\x10z"sv,
         std::nullopt},
        {"an offset before the output",
         "\x30"
         "abc\x04\x00\x10z"sv,
         std::nullopt},
        {"half of an offset",
         "\x30"
         "abc\x03"sv,
         std::nullopt},
        {"no sequence behind a match",
         "\x30"
         "abc\x03\x00"sv,
         std::nullopt},
        {"a match longer than the room",
         "\x1f"
         "a\x01\x00\xff\xff\xff\x00\x10z"sv,
         std::nullopt},
    }};
    for (const Case& c : cases) {
        Bytes out(100);
        const auto size = unpack_lz4_block(bytes_of(c.block), out);
        ASSERT_EQ(size.has_value(), c.unpacked.has_value()) << c.what;
        if (size) {
            EXPECT_EQ(first(out, *size), bytes_of(*c.unpacked)) << c.what;
        }
    }
    std::array<std::byte, 2> small{};
    EXPECT_EQ(unpack_lz4_block(bytes_of("\x30"
                                        "abc"),
                               small),
              std::nullopt);
}

// --- bzImage

constexpr std::uint64_t setup_size = 1024;

/// A bzImage of boot protocol 2.15 with this payload 16 bytes into its code.
struct BzImage {
    setup_header header{};
    std::uint8_t header_length = 0x6a; // from 0x202: up to and with kernel_info_offset
    Bytes payload;

    explicit BzImage(Bytes contents) : payload(std::move(contents)) {
        header.setup_sects = 1;
        header.boot_flag = 0xaa55;
        header.header = 0x53726448;
        header.version = 0x020f;
        header.payload_offset = 16;
        header.payload_length = static_cast<std::uint32_t>(payload.size());
    }
    [[nodiscard]] Bytes bytes() const {
        Bytes file(setup_size + 16);
        std::memcpy(file.data() + 0x1f1, &header, sizeof header);
        file[0x201] = std::byte{header_length};
        return file + payload;
    }
};

std::string payload_refusal(const BzImage& image) {
    const Bytes file = image.bytes();
    return refusal([&] { (void)bzimage_payload(file); }).value_or("");
}

TEST(BzImagePayloadTest, IsWhereTheHeaderSays) {
    BzImage image(bytes_of("the payload"));
    Bytes file = image.bytes();
    const auto payload = bzimage_payload(file);
    EXPECT_EQ(Bytes(payload.begin(), payload.end()), image.payload);
    EXPECT_EQ(payload.data(), file.data() + setup_size + 16);

    image.header.setup_sects = 0; // means 4
    image.header.payload_offset = 0;
    image.header.payload_length = 3;
    file = image.bytes();
    file.resize(5 * 512 + 3);
    EXPECT_EQ(bzimage_payload(file).data(), file.data() + std::size_t{5} * 512);
    EXPECT_EQ(bzimage_payload(file).size(), 3U);
}

TEST(BzImagePayloadTest, OutsideTheFileIsRefused) {
    const BzImage good(bytes_of("the payload"));
    EXPECT_EQ(payload_refusal(good), "");

    BzImage image = good;
    image.header.payload_length += 1;
    EXPECT_NE(payload_refusal(image).find("outside the file"), std::string::npos);
    image = good;
    image.header.payload_offset += 1;
    EXPECT_NE(payload_refusal(image).find("outside the file"), std::string::npos);
    image.header.payload_offset = ~std::uint32_t{0};
    EXPECT_NE(payload_refusal(image).find("outside the file"), std::string::npos);
    image = good;
    image.header.payload_length = 0;
    EXPECT_NE(payload_refusal(image).find("does not tell"), std::string::npos);
    image = good;
    image.header.version = 0x0207;
    EXPECT_NE(payload_refusal(image).find("does not tell"), std::string::npos);
    image = good;
    image.header_length = 0x48 - 2; // the header ends before payload_offset
    EXPECT_NE(payload_refusal(image).find("too short for boot protocol 2.15"), std::string::npos);
}

Bytes vmlinux() {
    return bytes_of("\x7f"
                    "ELF") +
           sample(500);
}

std::string unpack_payload_refusal(const Bytes& payload, std::uint64_t limit = mib) {
    return refusal([&] { (void)unpack_payload(payload, limit); }).value_or("");
}

TEST(BzImagePayloadTest, UnpacksWithItsSizeBehindIt) {
    const Bytes size = raw(static_cast<std::uint32_t>(vmlinux().size()));
    EXPECT_EQ(unpack_payload(pack_gzip(vmlinux()), mib), vmlinux()) << "gzip ends with the size by itself";
    EXPECT_EQ(unpack_payload(pack_xz(vmlinux()) + size, mib), vmlinux());
    EXPECT_EQ(unpack_payload(pack_zstd(vmlinux()) + size, mib), vmlinux());
    EXPECT_EQ(unpack_payload(pack_lz4(vmlinux()) + size, mib), vmlinux());
}

TEST(BzImagePayloadTest, WhatIsWrongIsRefused) {
    const Bytes size = raw(static_cast<std::uint32_t>(vmlinux().size()));
    const Bytes wrong = raw(static_cast<std::uint32_t>(vmlinux().size() + 1));
    for (const auto pack : {pack_xz, pack_zstd, pack_lz4}) {
        EXPECT_NE(unpack_payload_refusal(pack(vmlinux()) + wrong).find("not the 505"), std::string::npos);
        EXPECT_NE(unpack_payload_refusal(pack(vmlinux())), "");
        EXPECT_NE(unpack_payload_refusal(pack(sample(504)) + size).find("not an ELF"), std::string::npos);
        EXPECT_NE(unpack_payload_refusal(pack(vmlinux()) + size, 503).find("more than 503"),
                  std::string::npos);
    }
    EXPECT_NE(unpack_payload_refusal(pack_gzip(sample(504))).find("not an ELF"), std::string::npos);
    EXPECT_NE(unpack_payload_refusal(pack_gzip(vmlinux()) + size), "");
    EXPECT_NE(unpack_payload_refusal(bytes_of("BZh9....")).find("bzip2"), std::string::npos);
    EXPECT_NE(unpack_payload_refusal(vmlinux()).find("none"), std::string::npos);
    EXPECT_NE(unpack_payload_refusal(bytes_of("abc")).find("3 bytes"), std::string::npos);
    EXPECT_NE(unpack_payload_refusal({}).find("0 bytes"), std::string::npos);
}

} // namespace
} // namespace umbra
