// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <stop_token>
#include <string>
#include <thread>

namespace demo {

/// Says on stderr what the program is doing once that has taken more than a second. On a terminal
/// the words go away when the step ends, so that they do not stay between the lines of a table.
class progress {
 public:
  progress();
  void step(const std::string& what);
  void done() { step({}); }

 private:
  void watch(const std::stop_token& stop);
  void erase();

  const bool terminal_;
  std::mutex mutex_;
  std::condition_variable_any changed_;
  std::string what_;  // empty between steps
  int steps_ = 0;
  bool shown_ = false;
  std::jthread watcher_;  // last: it uses what stands above
};

}  // namespace demo
