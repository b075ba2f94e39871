// What a guest prints, gathered so that a burst of single-byte port writes becomes one write to the terminal.
#pragma once

#include <cstddef>
#include <functional>
#include <span>
#include <string>

namespace umbra {

/// Where a guest's output goes: a terminal, a file, a test's string. Called on the thread that runs the vCPU;
/// must not throw. An empty function discards.
using OutputSink = std::function<void(std::span<const char>)>;

/// Holds output back until a line ends, `capacity` bytes are waiting, or flush() is called. What waits is not
/// flushed by destruction: the owner decides how the last line is shown.
class OutputBuffer {
  public:
    static constexpr std::size_t capacity = 1024;

    explicit OutputBuffer(OutputSink sink) : sink_(std::move(sink)) { waiting_.reserve(capacity); }

    void put(char character);
    void flush();
    [[nodiscard]] bool waits() const { return !waiting_.empty(); }

  private:
    OutputSink sink_;
    std::string waiting_;
};

} // namespace umbra
