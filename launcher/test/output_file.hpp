// Files that results are written to, by umbra's user or another program to read, while the tests run or
// afterwards.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace umbra {

/// A file that grows with the run: what has been written is there, whatever becomes of umbra. After the first
/// error nothing more is written.
class OutputFile {
  public:
    /// An empty file at `path`, or standard output for "-". StartupError(bad_usage) if it cannot be opened.
    explicit OutputFile(const std::string& path);
    OutputFile(const OutputFile&) = delete;
    OutputFile& operator=(const OutputFile&) = delete;
    OutputFile(OutputFile&&) = delete;
    OutputFile& operator=(OutputFile&&) = delete;
    ~OutputFile();

    /// All of `text` at once: a reader sees whole events only.
    void write(std::string_view text);
    /// "cannot write 'PATH': REASON", once something could not be.
    [[nodiscard]] const std::optional<std::string>& problem() const { return problem_; }

  private:
    std::string path_;
    int fd_;
    std::optional<std::string> problem_;
};

/// Writes all of `text` to `fd`, which may be non-blocking. False, with errno, if it could not.
[[nodiscard]] bool write_all(int fd, std::string_view text);

/// StartupError(bad_usage) if replace_file() would fail for reasons that are known beforehand: the folder is
/// missing or not writable, or `path` is a folder. To be asked before an hour of tests.
void require_replaceable(const std::string& path);

/// Makes `contents` what the file holds, in one step: who reads `path` finds the old file or the whole new
/// one. What is there and is no regular file (a device, a pipe) is written to instead. Returns what went
/// wrong, if anything did, as OutputFile::problem(); the old file is still there then.
[[nodiscard]] std::optional<std::string> replace_file(const std::string& path, std::string_view contents);

} // namespace umbra
