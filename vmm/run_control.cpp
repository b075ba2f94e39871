#include "vmm/run_control.hpp"

#include "vmm/kvm/kvm.hpp"

#include <csignal>

#include <unistd.h>

namespace umbra {
namespace {

// The signal that takes a thread out of KVM_RUN. Its handler has nothing to do: KVM_RUN returns because a
// signal came, and a signal that comes too early is covered by Vcpu::request_exit.
constexpr int kick_signal = SIGUSR1;

void ignore(int /*signal*/) {}

} // namespace

RunControl::RunControl() {
    struct sigaction action {};
    action.sa_handler = ignore;
    sigemptyset(&action.sa_mask);
    sigaction(kick_signal, &action, nullptr);
}

void RunControl::attach(Vcpu& vcpu) {
    const std::lock_guard lock(mutex_);
    vcpu_ = &vcpu;
    thread_ = pthread_self();
    if (pending_)
        vcpu_->request_exit();
}

void RunControl::detach() {
    insist(false);
    look_regularly(false);
    const std::lock_guard lock(mutex_);
    vcpu_ = nullptr;
}

void RunControl::wait() {
    std::unique_lock lock(mutex_);
    woken_.wait(lock, [this] { return pending(); });
}

void RunControl::insist(bool on) {
    constexpr timespec millisecond{0, 1'000'000};
    repeat(insisting_, on, millisecond);
}

void RunControl::look_regularly(bool on) {
    constexpr timespec quarter_second{0, 250'000'000};
    repeat(looking_, on, quarter_second);
}

/// A timer that kicks the calling thread again and again, while it is on.
void RunControl::repeat(std::optional<timer_t>& timer, bool on, timespec interval) {
    if (on == timer.has_value())
        return;
    if (!on) {
        timer_delete(*timer);
        timer.reset();
        return;
    }
    sigevent event{};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = kick_signal;
    event._sigev_un._tid = ::gettid();
    timer_t made{};
    if (timer_create(CLOCK_MONOTONIC, &event, &made) != 0)
        return; // the guest's next trap will do
    timer = made;
    const itimerspec when{interval, interval};
    (void)timer_settime(made, 0, &when, nullptr);
}

void RunControl::request(std::atomic<bool>& flag) {
    flag = true;
    kick();
}

void RunControl::input(std::string_view text) {
    {
        const std::lock_guard lock(mutex_);
        input_ += text;
    }
    kick();
}

void RunControl::flush_output() {
    if (output_waits_.load(std::memory_order_relaxed))
        kick();
}

void RunControl::kick() {
    const std::lock_guard lock(mutex_);
    pending_.store(true, std::memory_order_release);
    woken_.notify_all();
    if (vcpu_ == nullptr)
        return;
    vcpu_->request_exit();
    if (!pthread_equal(thread_, pthread_self()))
        pthread_kill(thread_, kick_signal);
}

RunControl::Requests RunControl::take() {
    const std::lock_guard lock(mutex_);
    if (vcpu_ != nullptr)
        vcpu_->clear_exit_request();
    pending_ = timed_out_ || interrupted_ || met_;
    Requests requests{timed_out_, interrupted_, met_, debugger_.exchange(false), {}};
    requests.input.swap(input_);
    return requests;
}

} // namespace umbra
