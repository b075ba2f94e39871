// Where debuggers connect.
#pragma once

#include "vmm/kvm/file.hpp"

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include <sys/types.h>

namespace umbra {

/// Where to serve: a TCP port, of this computer only unless a host is named, or a Unix socket.
struct GdbAddress {
    std::string path; ///< of the Unix socket; empty: TCP
    std::string host = "127.0.0.1";
    std::uint16_t port = 0; ///< 0: any that is free

    /// PORT, :PORT, HOST:PORT (a name, an IPv4 address, or an IPv6 address in brackets), each also after
    /// "tcp:", as QEMU spells it, or unix:PATH. StartupError (bad_usage) if it is none of them.
    [[nodiscard]] static GdbAddress parse(std::string_view text);

    friend bool operator==(const GdbAddress&, const GdbAddress&) = default;
};

/// A socket that is bound and, from listen() on, takes connections. The Unix socket's file goes with this
/// object.
class GdbListener {
  public:
    /// StartupError (bad_usage) if the address cannot be served: in use, unknown, not permitted.
    explicit GdbListener(const GdbAddress& where);
    /// What whoever started this process has bound for it, if they say so by `inherited_variable`.
    [[nodiscard]] static std::optional<GdbListener> inherited();
    /// SOCKET,TOLD,ADDRESS: two descriptors, of the socket and of what gets a byte when it takes connections,
    /// and where debuggers find it.
    static constexpr const char* inherited_variable = "UMBRA_DEBUGGERS";
    ~GdbListener();
    GdbListener(GdbListener&& other) noexcept;
    GdbListener& operator=(GdbListener&&) = delete;
    GdbListener(const GdbListener&) = delete;
    GdbListener& operator=(const GdbListener&) = delete;

    /// As gdb's `target remote` takes it: HOST:PORT, with the port that is served, or an absolute path.
    [[nodiscard]] const std::string& address() const { return address_; }
    /// StartupError (bad_usage) if another socket was quicker.
    void listen();
    /// Readable when somebody has come.
    [[nodiscard]] int get() const { return socket_.get(); }

    struct Connection {
        File socket;     ///< absent if there was none: errno says why
        std::string who; ///< for a log
    };
    /// Takes a connection, which does not block.
    [[nodiscard]] Connection accept() const;

  private:
    GdbListener(File socket, File told, std::string address)
        : socket_(std::move(socket)), told_(std::move(told)), address_(std::move(address)) {}
    void bind_tcp(const GdbAddress& where);
    void bind_unix(const std::string& path);

    File socket_, told_;
    std::string address_, path_;
    // Of the Unix socket's file, so that nobody else's is unlinked.
    ::dev_t device_ = 0;
    ::ino_t inode_ = 0;
};

} // namespace umbra
