#include "memory/threads.h"

#include <pthread.h>

#include <atomic>

namespace pyrlk {
namespace {

std::atomic<bool> forked_child{false};

// Runs when the library is loaded, before any of its regions can.
const int registered = pthread_atfork(nullptr, nullptr, [] { forked_child.store(true); });

}  // namespace

bool is_forked_child() noexcept { return forked_child.load(std::memory_order_relaxed); }

int usable_threads(int requested) noexcept {
  (void)registered;
  if (requested <= 1 || is_forked_child()) return 1;
  return requested;
}

}  // namespace pyrlk
