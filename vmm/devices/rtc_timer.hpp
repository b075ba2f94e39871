// Who keeps the time of the RTC's interrupts: a thread, from the guest's first use of them on.
#pragma once

#include "vmm/devices/rtc.hpp"

#include <condition_variable>
#include <mutex>
#include <thread>

namespace umbra {

class RtcTimer {
  public:
    /// `rtc` outlives it, and nobody else observes it.
    explicit RtcTimer(Rtc& rtc);
    RtcTimer(const RtcTimer&) = delete;
    RtcTimer& operator=(const RtcTimer&) = delete;
    RtcTimer(RtcTimer&&) = delete;
    RtcTimer& operator=(RtcTimer&&) = delete;
    ~RtcTimer();

  private:
    void accessed();
    void run(const std::stop_token& stop);

    Rtc& rtc_;
    std::mutex mutex_; ///< of what follows
    std::condition_variable_any awaited_;
    bool accessed_ = false; ///< since the thread has looked
    std::jthread thread_;
};

} // namespace umbra
