// A session of gdb or LLDB: what the packets of the remote protocol mean for the guest.
//
// GDB manual, appendix "GDB Remote Serial Protocol", sections "Packets", "Stop Reply Packets" and "General
// Query Packets"; physical memory as QEMU's stub offers it (Qqemu.PhyMemMode). LLDB: "lldb-gdb-remote" of its
// documents.
#pragma once

#include "vmm/debug/debugger.hpp"
#include "vmm/debug/monitor_command.hpp"
#include "vmm/debug/packet.hpp"
#include "vmm/debug/registers.hpp"
#include "vmm/debug/server.hpp"
#include "vmm/engine.hpp"
#include "vmm/symbols.hpp"

#include <chrono>
#include <deque>
#include <functional>
#include <optional>
#include <string>
#include <string_view>

namespace umbra {

class GdbSession final : public DebugFrontend {
  public:
    struct Config {
        bool pause = false;             ///< the guest waits for the first client
        bool leave_with_client = false; ///< the run ends when the client goes
        /// Of the registers that clients are told of; nothing: 64 bits if the guest is in long mode when the
        /// client asks, which for gdb is when it connects.
        std::optional<TargetWidth> width{};
    };
    /// `server` and `symbols` outlive this.
    GdbSession(GdbServer& server, const Symbols& symbols, Config config);

    /// What runs the guest, from when it is made; a new one after a reset.
    void serve_engine(Engine& engine, const Machine& machine) {
        engine_ = &engine;
        machine_ = &machine;
        begun_ = std::chrono::steady_clock::now();
    }

    void attach(Debugger* debugger) override;
    [[nodiscard]] bool poll() override;
    void stopped(const Stop& stop) override;
    [[nodiscard]] Serve serve() override;
    [[nodiscard]] bool connected() const override { return connected_; }
    [[nodiscard]] bool wants_pause() const override { return pause_ || connected_; }
    void ended(const Verdict& verdict) override;
    [[nodiscard]] std::optional<std::uint64_t> read_register(unsigned number) const override;
    void print(std::string_view text) override;

  private:
    void take_events();
    [[nodiscard]] std::optional<Serve> handle(const ServerEvent& event);
    [[nodiscard]] std::optional<Serve> handle_packet(std::string_view payload);
    [[nodiscard]] std::optional<Serve> handle_resume(std::string_view actions);
    [[nodiscard]] Serve go_on(Resume how);
    void report_stop();
    [[nodiscard]] std::string stop_reply() const;

    [[nodiscard]] std::string query(std::string_view payload);
    [[nodiscard]] std::string read_memory(Cursor arguments);
    [[nodiscard]] std::string write_memory(GuestVirt at, std::span<const std::byte> bytes);
    [[nodiscard]] std::string search_memory(std::string_view arguments);
    [[nodiscard]] std::string checksum_memory(Cursor arguments);
    [[nodiscard]] std::string answer_register(Cursor arguments);
    [[nodiscard]] std::string write_register(Cursor arguments);
    [[nodiscard]] ExtendedState extended() const;
    [[nodiscard]] std::string edit_registers(const std::function<bool(const CpuEdit&)>& edit);
    [[nodiscard]] std::string change_point(std::string_view payload, bool insert);
    [[nodiscard]] std::size_t read(std::uint64_t at, std::span<std::byte> into);
    [[nodiscard]] std::size_t write(std::uint64_t at, std::span<const std::byte> from);
    void set_width();

    [[nodiscard]] std::string command(std::string_view line);
    [[nodiscard]] std::string trace(std::span<const std::string> words);
    [[nodiscard]] std::string watch_physical(MonitorCommand command, std::span<const std::string> words);
    [[nodiscard]] std::string bind(std::span<const std::string> words);

    GdbServer& server_;
    const Symbols& symbols_;
    Config config_;
    Engine* engine_ = nullptr;
    const Machine* machine_ = nullptr;
    std::chrono::steady_clock::time_point begun_;
    Debugger* debugger_ = nullptr;

    std::deque<ServerEvent> events_;
    bool pause_;
    bool connected_ = false;
    bool client_waits_ = false; ///< for a stop reply: it believes that the guest runs
    bool physical_ = false;     ///< memory packets name physical addresses
    bool reset_asked_ = false, quit_asked_ = false;
    RegisterSet registers_;
    Stop stop_;
};

} // namespace umbra
