// When the memory of shadow tables may be written: inside an EditScope.
//
// Whoever can write a shadow table can give a guest any page of the machine. Where the host offers it, the
// pool's memory is therefore read-only for umbra itself but for the code that edits tables, and a stray write
// from anywhere else dies on the spot. How the host does that is its own affair: shadow/ only opens and
// closes.
#pragma once

namespace umbra {

/// What keeps a pool's memory from being written. Reading is always allowed. Scopes nest, and several threads
/// may have them at the same time; a scope begins and ends on one thread. Neither function fails.
class PoolGuard {
  public:
    PoolGuard() = default;
    PoolGuard(const PoolGuard&) = delete;
    PoolGuard& operator=(const PoolGuard&) = delete;
    PoolGuard(PoolGuard&&) = delete;
    PoolGuard& operator=(PoolGuard&&) = delete;
    virtual ~PoolGuard() = default;

    /// Lets this thread write. True if `close` must follow; false if it could write before.
    [[nodiscard]] virtual bool open() = 0;
    virtual void close() = 0;
    /// What it works by, for reports: "protection key".
    [[nodiscard]] virtual const char* name() const = 0;
};

/// While it exists, this thread may write to the tables. Cheap enough to have one around each edit; what
/// edits many entries has one around all of them.
class [[nodiscard]] EditScope {
  public:
    /// `guard`: nullptr where nothing is guarded; otherwise it outlives the scope.
    explicit EditScope(PoolGuard* guard) : opened_(guard != nullptr && guard->open() ? guard : nullptr) {}
    ~EditScope() {
        if (opened_ != nullptr)
            opened_->close();
    }
    EditScope(const EditScope&) = delete;
    EditScope& operator=(const EditScope&) = delete;
    EditScope(EditScope&&) = delete;
    EditScope& operator=(EditScope&&) = delete;

  private:
    PoolGuard* opened_;
};

} // namespace umbra
