#include "vmm/devices/rtc_timer.hpp"

#include <csignal>
#include <utility>

namespace umbra {

RtcTimer::RtcTimer(Rtc& rtc) : rtc_(rtc) {
    rtc_.observe([this] { accessed(); });
}

RtcTimer::~RtcTimer() {
    rtc_.observe({});
}

/// On the thread that runs the vCPU.
void RtcTimer::accessed() {
    if (!rtc_.update() && !thread_.joinable())
        return; // as it is for most guests
    {
        const std::scoped_lock lock(mutex_);
        accessed_ = true;
    }
    if (thread_.joinable()) {
        awaited_.notify_one();
        return;
    }
    sigset_t all, before; // signals are for other threads
    sigfillset(&all);
    (void)::pthread_sigmask(SIG_SETMASK, &all, &before);
    thread_ = std::jthread([this](const std::stop_token& stop) { run(stop); });
    (void)::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void RtcTimer::run(const std::stop_token& stop) {
    std::unique_lock lock(mutex_);
    while (!stop.stop_requested()) {
        accessed_ = false;
        const auto next = rtc_.update();
        const auto again = [this] { return accessed_; };
        if (next)
            (void)awaited_.wait_for(lock, stop, *next, again);
        else
            (void)awaited_.wait(lock, stop, again);
    }
}

} // namespace umbra
