// SPDX-License-Identifier: Apache-2.0
#include "progress.hpp"

#include <unistd.h>

#include <cstdio>

namespace demo {

progress::progress()
    : terminal_(isatty(STDERR_FILENO) != 0),
      watcher_([this](const std::stop_token& stop) { watch(stop); }) {}

void progress::step(const std::string& what) {
  {
    const std::lock_guard lock(mutex_);
    erase();
    what_ = what;
    ++steps_;
  }
  changed_.notify_one();
}

void progress::erase() {
  if (shown_ && terminal_) std::fputs("\r\033[K", stderr);
  shown_ = false;
}

void progress::watch(const std::stop_token& stop) {
  std::unique_lock lock(mutex_);
  while (!stop.stop_requested()) {
    const int current = steps_;
    const auto next = [&] { return steps_ != current; };
    if (what_.empty() || shown_) {
      changed_.wait(lock, stop, next);
    } else if (!changed_.wait_for(lock, stop, std::chrono::seconds(1), next) &&
               !stop.stop_requested()) {
      std::fprintf(stderr, terminal_ ? "sattn-demo: %s ..." : "sattn-demo: %s ...\n",
                   what_.c_str());
      shown_ = true;
    }
  }
  erase();
}

}  // namespace demo
