// SPDX-License-Identifier: Apache-2.0
//
// All forms are replaced, though by default most forward to two of them: a sanitizer's runtime
// brings its own of each, which would go uncounted.

#include "support/alloc_counter.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

namespace {

std::atomic<std::size_t> allocations{0};
thread_local std::size_t until_failure = 0;  // allocations; 0 = none fails

bool fails() { return until_failure > 0 && --until_failure == 0; }

void* allocate(std::size_t bytes) noexcept {
  allocations.fetch_add(1, std::memory_order_relaxed);
  if (fails()) return nullptr;
  return std::malloc(bytes == 0 ? 1 : bytes);
}

void* allocate(std::size_t bytes, std::align_val_t alignment) noexcept {
  allocations.fetch_add(1, std::memory_order_relaxed);
  if (fails()) return nullptr;
  const std::size_t least = sizeof(void*);  // what posix_memalign asks for
  void* p = nullptr;
  return ::posix_memalign(&p, std::max(static_cast<std::size_t>(alignment), least), bytes) == 0
             ? p
             : nullptr;
}

void* or_throw(void* p) {
  if (p == nullptr) throw std::bad_alloc();
  return p;
}

}  // namespace

namespace test_support {
std::size_t allocation_count::current() { return allocations.load(std::memory_order_relaxed); }
failing_allocation::failing_allocation(std::size_t successes) { until_failure = successes + 1; }
failing_allocation::~failing_allocation() { until_failure = 0; }
}  // namespace test_support

using std::align_val_t;
using std::nothrow_t;
using std::size_t;

void* operator new(size_t n) { return or_throw(allocate(n)); }
void* operator new[](size_t n) { return or_throw(allocate(n)); }
void* operator new(size_t n, align_val_t a) { return or_throw(allocate(n, a)); }
void* operator new[](size_t n, align_val_t a) { return or_throw(allocate(n, a)); }
void* operator new(size_t n, const nothrow_t&) noexcept { return allocate(n); }
void* operator new[](size_t n, const nothrow_t&) noexcept { return allocate(n); }
void* operator new(size_t n, align_val_t a, const nothrow_t&) noexcept { return allocate(n, a); }
void* operator new[](size_t n, align_val_t a, const nothrow_t&) noexcept { return allocate(n, a); }

void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
void operator delete[](void* p, size_t) noexcept { std::free(p); }
void operator delete(void* p, align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, align_val_t) noexcept { std::free(p); }
void operator delete(void* p, size_t, align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, size_t, align_val_t) noexcept { std::free(p); }
void operator delete(void* p, const nothrow_t&) noexcept { std::free(p); }
void operator delete[](void* p, const nothrow_t&) noexcept { std::free(p); }
void operator delete(void* p, align_val_t, const nothrow_t&) noexcept { std::free(p); }
void operator delete[](void* p, align_val_t, const nothrow_t&) noexcept { std::free(p); }
