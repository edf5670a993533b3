// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/core/types.hpp>

#include <concepts>
#include <type_traits>

namespace sattn {

/// The caller's threads. A model guarantees:
/// * parallel_for(n, f) calls f(task, worker) once for each task in [0, n) and returns when all are
///   done; worker < concurrency(), and no two calls at the same time share a worker;
/// * concurrency() is 1 or more and does not change while a context uses it;
/// * it starts lower tasks first, more or less (the library puts long tasks first).
/// It may pass an exception of f on to the caller, as thread_pool does, or end the program: tasks
/// of the library throw nothing but std::bad_alloc, and only in estimators. Results never depend on
/// the order or on the number of workers.
template <class E>
concept parallel_executor = requires(E& executor, index_t n, void (*f)(index_t, index_t)) {
  { executor.concurrency() } -> std::convertible_to<index_t>;
  executor.parallel_for(n, f);
};

/// Runs everything on the calling thread.
class serial_executor {
 public:
  index_t concurrency() const { return 1; }
  template <class F>
  void parallel_for(index_t n, F&& f) {
    for (index_t task = 0; task < n; ++task) f(task, index_t{0});
  }
};

/// A reference to a callable (task, worker), without allocation.
class task_ref {
 public:
  template <class F>
    requires(!std::same_as<std::remove_cvref_t<F>, task_ref>)
  explicit task_ref(F& f)
      : object_(const_cast<void*>(static_cast<const void*>(&f))),
        call_([](void* object, index_t task, index_t worker) {
          (*static_cast<F*>(object))(task, worker);
        }) {}
  void operator()(index_t task, index_t worker) const { call_(object_, task, worker); }

 private:
  void* object_;
  void (*call_)(void*, index_t, index_t);
};

/// A reference to any executor: three pointers, no allocation. The executor must outlive it.
class executor_ref {
 public:
  template <parallel_executor E>
    requires(!std::same_as<E, executor_ref>)
  explicit executor_ref(E& executor)
      : object_(&executor),
        concurrency_([](void* object) {
          return static_cast<index_t>(static_cast<E*>(object)->concurrency());
        }),
        run_([](void* object, index_t n, task_ref task) {
          static_cast<E*>(object)->parallel_for(n, task);
        }) {}

  index_t concurrency() const { return concurrency_(object_); }
  template <class F>
  void parallel_for(index_t n, F&& f) const {
    if (n == 0) return;
    run_(object_, n, task_ref(f));
  }

 private:
  void* object_;
  index_t (*concurrency_)(void*);
  void (*run_)(void*, index_t, task_ref);
};

}  // namespace sattn
