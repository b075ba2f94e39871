// How other threads and signals reach a vCPU that runs.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>

#include <ctime>
#include <pthread.h>

namespace umbra {

class Vcpu;

/// Requests to a running vCPU. Whoever makes one wakes the vCPU's thread out of KVM_RUN; that thread takes
/// them.
class RunControl {
  public:
    RunControl();

    // Any thread.
    void time_out() { request(timed_out_); }
    void interrupt() { request(interrupted_); }
    /// The console has printed what the user waits for.
    void expectation_met() { request(met_); }
    void input(std::string_view text);
    /// The debugger's client has something to say.
    void debugger_calls() { request(debugger_); }
    /// Output that waits for the end of its line is to be passed on.
    void flush_output();
    /// The run is to end: nobody should wait for anything else.
    [[nodiscard]] bool ending() const { return timed_out_ || interrupted_; }

    // The vCPU's thread, around its run.
    void attach(Vcpu& vcpu);
    void detach();
    /// Waits until there is something to take.
    void wait();
    /// While on, the vCPU leaves KVM_RUN every millisecond: for a request that cannot be served where the
    /// last exit was.
    void insist(bool on);
    /// While on, the vCPU leaves KVM_RUN a few times a second, so that a guest that makes no exits is looked
    /// at.
    void look_regularly(bool on);
    /// Says, after every exit, whether there is output that flush_output() would have to do with.
    void output_waits(bool waits) { output_waits_.store(waits, std::memory_order_relaxed); }

    /// Whether take() has something to tell; also to be called after every interrupted run.
    [[nodiscard]] bool pending() const { return pending_.load(std::memory_order_acquire); }
    struct Requests {
        bool timed_out = false;
        bool interrupted = false;
        bool met = false;
        bool debugger = false;
        std::string input;
    };
    /// Endings stay requested; the rest is handed over once.
    [[nodiscard]] Requests take();

  private:
    void request(std::atomic<bool>& flag);
    void kick();
    static void repeat(std::optional<timer_t>& timer, bool on, timespec interval);

    std::atomic<bool> pending_ = false, timed_out_ = false, interrupted_ = false, met_ = false,
                      debugger_ = false, output_waits_ = false;
    std::mutex mutex_; ///< guards what follows
    std::condition_variable woken_;
    std::string input_;
    Vcpu* vcpu_ = nullptr;
    pthread_t thread_{};
    std::optional<timer_t> insisting_, looking_;
};

} // namespace umbra
