// The one rule on threads: every parallel region names its size, and a forked child runs alone.
//
// OpenMP keeps its pool across fork() in name only: the child's first region waits for threads that
// do not exist there. pthread_atfork marks the child, and usable_threads() answers 1 in it.
#pragma once

namespace pyrlk {

// Threads a region may use now: `requested`, at least 1, and 1 in a forked child.
int usable_threads(int requested) noexcept;

// True in a process that was forked after this library was loaded (and did not exec).
bool is_forked_child() noexcept;

}  // namespace pyrlk
