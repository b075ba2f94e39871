// Unit tests of launcher/shared_input: a read never waits, whatever others have taken of what poll() saw.
#include "launcher/shared_input.hpp"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdlib>

#include <gtest/gtest.h>

namespace umbra {
namespace {

File duplicate(const File& file) {
    return File(::fcntl(file.get(), F_DUPFD_CLOEXEC, 0));
}

bool readable(int fd) {
    pollfd polled{fd, POLLIN, 0};
    return ::poll(&polled, 1, 1000) == 1;
}

/// Two readers of what `writer` writes; each line is for one of them.
void share(const File& reader, const File& writer) {
    const SharedInput input(duplicate(reader));
    std::array<char, 16> buffer{};
    ASSERT_EQ(::write(writer.get(), "a\n", 2), 2);
    ASSERT_TRUE(readable(input.get()));
    ASSERT_EQ(::read(reader.get(), buffer.data(), buffer.size()), 2);
    const auto waits = ::alarm(20); // which would end the test
    EXPECT_EQ(input.read(buffer.data(), buffer.size()), -1);
    EXPECT_EQ(errno, EAGAIN);
    (void)::alarm(waits);

    ASSERT_EQ(::write(writer.get(), "b\n", 2), 2);
    ASSERT_TRUE(readable(input.get()));
    EXPECT_EQ(input.read(buffer.data(), buffer.size()), 2);
    EXPECT_EQ(buffer[0], 'b');
    EXPECT_EQ(::fcntl(reader.get(), F_GETFL) & O_NONBLOCK, 0); // the others' is as it was
}

TEST(SharedInput, PipesDoNotWait) {
    std::array<int, 2> ends{};
    ASSERT_EQ(::pipe2(ends.data(), O_CLOEXEC), 0);
    share(File(ends[0]), File(ends[1]));
}

TEST(SharedInput, SocketsDoNotWait) {
    std::array<int, 2> ends{};
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()), 0);
    share(File(ends[0]), File(ends[1]));
}

TEST(SharedInput, TerminalsDoNotWait) {
    const File master(::posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC));
    ASSERT_EQ(::grantpt(master.get()) | ::unlockpt(master.get()), 0);
    share(File(::open(::ptsname(master.get()), O_RDWR | O_NOCTTY | O_CLOEXEC)), master);
}

/// Also where the writer has gone before, and by the other side of a terminal.
TEST(SharedInput, EndsAreSeen) {
    std::array<int, 2> ends{};
    ASSERT_EQ(::pipe2(ends.data(), O_CLOEXEC), 0);
    const File reader(ends[0]);
    ASSERT_EQ(::write(ends[1], "x", 1), 1);
    (void)::close(ends[1]);
    const SharedInput input(duplicate(reader));
    std::array<char, 16> buffer{};
    for (const ssize_t size : {1, 0, 0}) {
        ASSERT_TRUE(readable(input.get()));
        EXPECT_EQ(input.read(buffer.data(), buffer.size()), size);
    }
    const File master(::posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC));
    ASSERT_EQ(::grantpt(master.get()) | ::unlockpt(master.get()), 0);
    const SharedInput other(duplicate(master));
    const File slave(::open(::ptsname(master.get()), O_RDWR | O_NOCTTY | O_CLOEXEC));
    ASSERT_EQ(::write(slave.get(), "x", 1), 1);
    ASSERT_TRUE(readable(other.get()));
    EXPECT_EQ(other.read(buffer.data(), buffer.size()), 1);
}

TEST(SharedInput, NoneIsNone) {
    EXPECT_EQ(SharedInput().get(), -1);
    EXPECT_EQ(SharedInput(File()).get(), -1);
}

} // namespace
} // namespace umbra
