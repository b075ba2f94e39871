// The line buffer between a guest's output device and the terminal.
#include "vmm/devices/output.hpp"

namespace umbra {

void OutputBuffer::put(char character) {
    waiting_.push_back(character);
    if (character == '\n' || waiting_.size() >= capacity)
        flush();
}

void OutputBuffer::flush() {
    if (sink_ && !waiting_.empty())
        sink_(waiting_);
    waiting_.clear();
}

} // namespace umbra
