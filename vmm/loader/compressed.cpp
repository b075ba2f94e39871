// Feeds the decoders of zlib, liblzma and libzstd, and umbra's own for LZ4.
#include "vmm/loader/compressed.hpp"

#include "vmm/loader/file_bytes.hpp"
#include "vmm/loader/lz4.hpp"
#include "vmm/loader/reject.hpp"
#include "vmm/loader/setup_header.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <new>

#include <lzma.h>
#include <zlib.h>
#include <zstd.h>

namespace umbra {

namespace {

constexpr std::uint64_t decoder_memory_limit = std::uint64_t{256} << 20;
// The largest window of `zstd --ultra -22`, with which Linux is packed: 128 MiB.
constexpr int zstd_window_log_limit = 27;

struct Magic {
    Compression compression;
    std::string_view name;
    std::string_view bytes;
};

using namespace std::string_view_literals;

// linux/lib/decompress.c and the formats' specifications. gzip: with its only method, deflate.
constexpr std::array<Magic, 8> magics{{{Compression::none, "none", {}},
                                       {Compression::gzip, "gzip", "\x1f\x8b\x08"sv},
                                       {Compression::xz, "xz",
                                        "\xfd"
                                        "7zXZ\0"sv},
                                       {Compression::zstd, "zstd", "\x28\xb5\x2f\xfd"sv},
                                       {Compression::bzip2, "bzip2", "BZh"sv},
                                       {Compression::lzma, "lzma", "\x5d\0\0"sv},
                                       {Compression::lzo, "lzo", "\x89LZO\0\r\n\x1a\n"sv},
                                       {Compression::lz4, "lz4", "\x02\x21\x4c\x18"sv}}};

/// What has been unpacked so far; grows as it must, up to a limit.
class Output {
  public:
    Output(std::uint64_t limit, std::uint64_t packed) : limit_(limit) { grow(4 * packed); }

    /// Room for more, at least a byte: a decoder that has filled the limit still finds out that it is done.
    [[nodiscard]] std::span<std::byte> room() {
        if (size_ == bytes_.size())
            grow(2 * size_);
        return std::span(bytes_).subspan(size_);
    }
    void wrote(std::size_t count) {
        size_ += count;
        if (size_ > limit_)
            reject("the compressed file unpacks to more than {} bytes", limit_);
    }
    void append(std::span<const std::byte> bytes) {
        while (!bytes.empty()) {
            const auto target = room();
            const std::size_t count = std::min(target.size(), bytes.size());
            std::ranges::copy(bytes.first(count), target.begin());
            bytes = bytes.subspan(count);
            wrote(count);
        }
    }
    [[nodiscard]] std::vector<std::byte> take() {
        bytes_.resize(size_);
        return std::move(bytes_);
    }

  private:
    void grow(std::uint64_t wanted) {
        constexpr std::uint64_t least = 4096;
        bytes_.resize(std::min(limit_ + 1, std::max(least, wanted)));
    }

    std::uint64_t limit_;
    std::uint64_t size_ = 0;
    std::vector<std::byte> bytes_;
};

[[noreturn]] void reject_truncated(Compression compression) {
    reject("truncated file: its {} data has no end", name(compression));
}

[[noreturn]] void reject_damaged(Compression compression, std::string_view why) {
    reject("damaged file: its {} data cannot be unpacked ({})", name(compression), why);
}

// --- gzip

/// What zlib can be given at a time.
uInt piece(std::size_t size) {
    return static_cast<uInt>(std::min<std::size_t>(size, std::numeric_limits<uInt>::max()));
}

void unpack_gzip(std::span<const std::byte> in, Output& out) {
    constexpr int gzip_with_any_window = 16 + MAX_WBITS;
    z_stream stream{};
    if (inflateInit2(&stream, gzip_with_any_window) != Z_OK)
        throw std::bad_alloc();
    const std::unique_ptr<z_stream, int (*)(z_stream*)> end(&stream, inflateEnd);
    while (true) {
        const auto room = out.room();
        const uInt offered = piece(in.size());
        const uInt space = piece(room.size());
        // zlib's interface is older than `const`: it does not write to its input.
        stream.next_in = const_cast<Bytef*>(reinterpret_cast<const Bytef*>(in.data()));
        stream.avail_in = offered;
        stream.next_out = reinterpret_cast<Bytef*>(room.data());
        stream.avail_out = space;
        const int result = inflate(&stream, Z_NO_FLUSH);
        in = in.subspan(offered - stream.avail_in);
        out.wrote(space - stream.avail_out);
        if (result == Z_MEM_ERROR)
            throw std::bad_alloc();
        if (result == Z_BUF_ERROR) // there was room
            reject_truncated(Compression::gzip);
        if (result != Z_OK && result != Z_STREAM_END)
            reject_damaged(Compression::gzip, stream.msg != nullptr ? stream.msg : zError(result));
        if (result == Z_OK)
            continue;
        if (std::all_of(in.begin(), in.end(), [](std::byte byte) { return byte == std::byte{0}; }))
            return;
        inflateReset(&stream);
    }
}

// --- xz

std::string_view xz_failure(lzma_ret result) {
    if (result == LZMA_OPTIONS_ERROR)
        return "it uses filters that are not supported";
    if (result == LZMA_MEMLIMIT_ERROR)
        return "its dictionary is too large";
    if (result == LZMA_FORMAT_ERROR)
        return "something else follows";
    return "its contents or check sums are wrong";
}

void unpack_xz(std::span<const std::byte> in, Output& out) {
    lzma_stream stream = LZMA_STREAM_INIT;
    if (lzma_stream_decoder(&stream, decoder_memory_limit, LZMA_CONCATENATED) != LZMA_OK)
        throw std::bad_alloc();
    const std::unique_ptr<lzma_stream, void (*)(lzma_stream*)> end(&stream, lzma_end);
    stream.next_in = reinterpret_cast<const std::uint8_t*>(in.data());
    stream.avail_in = in.size();
    while (true) {
        const auto room = out.room();
        stream.next_out = reinterpret_cast<std::uint8_t*>(room.data());
        stream.avail_out = room.size();
        const lzma_ret result = lzma_code(&stream, LZMA_FINISH);
        out.wrote(room.size() - stream.avail_out);
        if (result == LZMA_STREAM_END)
            return;
        if (result == LZMA_MEM_ERROR)
            throw std::bad_alloc();
        if (result == LZMA_BUF_ERROR) // there was room
            reject_truncated(Compression::xz);
        if (result != LZMA_OK)
            reject_damaged(Compression::xz, xz_failure(result));
    }
}

// --- zstd

void unpack_zstd(std::span<const std::byte> file, Output& out) {
    const std::unique_ptr<ZSTD_DCtx, std::size_t (*)(ZSTD_DCtx*)> context(ZSTD_createDCtx(), ZSTD_freeDCtx);
    if (!context ||
        ZSTD_isError(ZSTD_DCtx_setParameter(context.get(), ZSTD_d_windowLogMax, zstd_window_log_limit)) != 0)
        throw std::bad_alloc();
    ZSTD_inBuffer in{file.data(), file.size(), 0};
    while (true) {
        const auto room = out.room();
        ZSTD_outBuffer target{room.data(), room.size(), 0};
        const std::size_t left = ZSTD_decompressStream(context.get(), &target, &in);
        if (ZSTD_isError(left) != 0)
            reject_damaged(Compression::zstd, ZSTD_getErrorName(left));
        out.wrote(target.pos);
        if (in.pos < in.size || target.pos == target.size)
            continue;
        if (left == 0)
            return;
        reject_truncated(Compression::zstd);
    }
}

// --- lz4

void unpack_lz4(std::span<const std::byte> in, Output& out) {
    constexpr std::size_t most_of_a_byte = 256; // each byte that lengthens a match makes 255
    std::vector<std::byte> unpacked(std::min(lz4_legacy_block, in.size() * most_of_a_byte));
    while (!in.empty()) {
        const auto size = read_object<std::uint32_t>(in, 0);
        if (!size)
            reject_truncated(Compression::lz4);
        in = in.subspan(sizeof *size);
        if (*size == lz4_legacy_magic) // another frame
            continue;
        const auto block = range_of(in, 0, *size);
        if (!block)
            reject_truncated(Compression::lz4);
        const auto count = unpack_lz4_block(*block, unpacked);
        if (!count)
            reject_damaged(Compression::lz4, "a block's contents are wrong");
        out.append(std::span(unpacked).first(*count));
        in = in.subspan(block->size());
    }
}

} // namespace

std::string_view name(Compression compression) {
    return std::ranges::find(magics, compression, &Magic::compression)->name;
}

Compression compression_of(std::span<const std::byte> file) {
    const std::string_view text(reinterpret_cast<const char*>(file.data()), file.size());
    const auto* const found = std::ranges::find_if(
        magics, [text](const Magic& magic) { return !magic.bytes.empty() && text.starts_with(magic.bytes); });
    return found == magics.end() ? Compression::none : found->compression;
}

bool can_unpack(Compression compression) {
    return compression == Compression::gzip || compression == Compression::xz ||
           compression == Compression::zstd || compression == Compression::lz4;
}

std::vector<std::byte> unpack(std::span<const std::byte> file, std::uint64_t limit) {
    const Compression compression = compression_of(file);
    if (!can_unpack(compression))
        reject("not supported: compression by {}; gzip, xz, zstd and lz4 can be", name(compression));
    Output out(limit, file.size());
    if (compression == Compression::gzip)
        unpack_gzip(file, out);
    else if (compression == Compression::xz)
        unpack_xz(file, out);
    else if (compression == Compression::zstd)
        unpack_zstd(file, out);
    else
        unpack_lz4(file, out);
    return out.take();
}

std::span<const std::byte> bzimage_payload(std::span<const std::byte> file) {
    const setup_header header = read_setup_header(file);
    if (header.version < first_version_with_payload || header.payload_length == 0)
        reject("the bzImage does not tell where its compressed kernel is");
    const auto payload =
        range_of(file, protected_mode_offset(header) + header.payload_offset, header.payload_length);
    if (!payload)
        reject("truncated bzImage: its compressed kernel lies outside the file");
    return *payload;
}

std::vector<std::byte> unpack_payload(std::span<const std::byte> payload, std::uint64_t limit) {
    using Size = std::uint32_t;
    if (payload.size() < sizeof(Size))
        reject("truncated bzImage: {} bytes are no compressed kernel", payload.size());
    const auto stream = payload.first(payload.size() - sizeof(Size));
    const auto size = read_object<Size>(payload, stream.size());
    std::vector<std::byte> unpacked =
        unpack(compression_of(payload) == Compression::gzip ? payload : stream, limit);
    if (size != static_cast<Size>(unpacked.size()))
        reject("damaged bzImage: its kernel unpacks to {} bytes, not the {} it is said to have",
               unpacked.size(), size.value_or(0));
    if (!is_elf(unpacked))
        reject("damaged bzImage: what it contains is not an ELF file");
    return unpacked;
}

} // namespace umbra
