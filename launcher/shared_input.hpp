// Reading from a descriptor that others read from, too, such as the standard input of several programs of one
// script.
#pragma once

#include "vmm/kvm/file.hpp"

#include <cstddef>

#include <sys/types.h>

namespace umbra {

/// What poll() has said of it may have been taken by somebody else meanwhile, and a read that then waits
/// would hold up everything: the time limit, signals, the end. To make the descriptor itself one that does
/// not block would change it for the others.
class SharedInput {
  public:
    SharedInput() = default;
    explicit SharedInput(File file);

    /// To be polled; -1: there is none.
    [[nodiscard]] int get() const { return file_.get(); }
    /// As read(), but does not wait: EAGAIN. Where a terminal or pipe may not be opened, another user's, it
    /// may wait.
    [[nodiscard]] ssize_t read(void* buffer, std::size_t size) const;

  private:
    File file_;
    File own_; ///< the same pipe or terminal, opened anew: it does not block; none for others, and if that is
               ///< not allowed
};

} // namespace umbra
