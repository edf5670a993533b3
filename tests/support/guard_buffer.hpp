// SPDX-License-Identifier: Apache-2.0
//
// Memory in which one byte too many is a fault. The address sanitizer misses reads into the slack
// of a vector's capacity and reads by some intrinsics; a page without access misses nothing.
//
// Under the address sanitizer run with ASAN_OPTIONS=handle_segv=0: with its own handler an overread
// is still a failure, but it is reported as one of a wild pointer.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <csetjmp>
#include <cstddef>
#include <cstring>
#include <new>
#include <type_traits>

namespace test_support {

enum class guard { before, after };

/// `size` elements that start right after (guard::before) or end right before (guard::after) a page
/// without access; the far side has such a page too, within a page's distance. Bytes are 0xff until
/// written, a NaN in every float type, and so is the slack on the far side.
template <class T>
class guard_buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  explicit guard_buffer(std::ptrdiff_t size, guard side = guard::after) : size_(size) {
    const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    const std::size_t used_bytes = static_cast<std::size_t>(size) * sizeof(T);
    inner_bytes_ = (used_bytes + page - 1) / page * page;
    mapped_bytes_ = inner_bytes_ + 2 * page;
    void* mapped = ::mmap(nullptr, mapped_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    mapped_ = static_cast<std::byte*>(mapped);
    inner_ = mapped_ + page;
    if (inner_bytes_ > 0) {
      protect(PROT_READ | PROT_WRITE);
      std::memset(inner_, 0xff, inner_bytes_);
    }
    std::byte* first = side == guard::before ? inner_ : inner_ + inner_bytes_ - used_bytes;
    data_ = reinterpret_cast<T*>(first);
  }
  guard_buffer(const guard_buffer&) = delete;
  guard_buffer& operator=(const guard_buffer&) = delete;
  ~guard_buffer() { ::munmap(mapped_, mapped_bytes_); }

  /// From here on a write is a fault too.
  void read_only() { protect(PROT_READ); }

  T* data() { return data_; }
  const T* data() const { return data_; }
  std::ptrdiff_t size() const { return size_; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }
  const T* begin() const { return data_; }
  const T* end() const { return data_ + size_; }

 private:
  void protect(int access) {
    if (inner_bytes_ > 0 && ::mprotect(inner_, inner_bytes_, access) != 0) throw std::bad_alloc();
  }

  std::ptrdiff_t size_;
  std::size_t inner_bytes_ = 0;
  std::size_t mapped_bytes_ = 0;
  std::byte* mapped_ = nullptr;
  std::byte* inner_ = nullptr;
  T* data_ = nullptr;
};

namespace detail {
inline sigjmp_buf fault_return;
}

/// 1 if `access()` touches memory it may not, which ends it there without running destructors;
/// otherwise 0. For the control tests that plant an overread; not reentrant, one thread at a time.
template <class F>
int faults(F access) {
  struct sigaction trap = {};
  trap.sa_handler = [](int) { siglongjmp(detail::fault_return, 1); };
  sigemptyset(&trap.sa_mask);
  struct sigaction old_segv = {};
  struct sigaction old_bus = {};
  ::sigaction(SIGSEGV, &trap, &old_segv);
  ::sigaction(SIGBUS, &trap, &old_bus);
  volatile int count = 0;  // volatile, or its value is lost by the jump
  if (sigsetjmp(detail::fault_return, 1) == 0) {
    access();
  } else {
    count = 1;
  }
  ::sigaction(SIGSEGV, &old_segv, nullptr);
  ::sigaction(SIGBUS, &old_bus, nullptr);
  return count;
}

}  // namespace test_support
