// OpenMP for ThreadSanitizer: the few functions of libgomp that g++ calls here, on std::thread.
//
// The real library synchronises by futexes that TSan does not see, so every parallel region would
// be reported. Loops hand out their chunks by relaxed atomics: they order nothing that the standard
// does not, and a race between two grains shows.
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace {

constexpr int kMaxLoops = 8;  // work-shared loops of one region

struct Loop {
  std::atomic<long> next{0};
  long end = 0, chunk = 1;
};

struct Team {
  explicit Team(int size) : size(size) {}

  void barrier() {
    std::unique_lock<std::mutex> lock(mutex);
    const int round = rounds;
    if (++waiting == size) {
      waiting = 0;
      ++rounds;
      all_here.notify_all();
    } else {
      all_here.wait(lock, [&] { return rounds != round; });
    }
  }

  const int size;
  Loop loops[kMaxLoops];
  std::once_flag started[kMaxLoops];
  std::mutex mutex;
  std::condition_variable all_here;
  int waiting = 0, rounds = 0;
};

thread_local Team* team = nullptr;
thread_local int number = 0;
thread_local int loop = -1;

void run(Team& shared, int thread, int first_loop, void (*body)(void*), void* data) {
  Team* const outer = team;
  const int outer_number = number, outer_loop = loop;
  team = &shared, number = thread, loop = first_loop;
  body(data);
  team = outer, number = outer_number, loop = outer_loop;
}

void run_team(Team& shared, int first_loop, void (*body)(void*), void* data) {
  std::vector<std::thread> threads;
  for (int i = 1; i < shared.size; ++i) {
    threads.emplace_back([&, i] { run(shared, i, first_loop, body, data); });
  }
  run(shared, 0, first_loop, body, data);
  for (auto& thread : threads) thread.join();
}

void set(Loop& it, long start, long end, long step, long chunk) {
  if (step != 1) std::abort();
  it.next.store(start, std::memory_order_relaxed);
  it.end = end, it.chunk = chunk;
}

bool take(long* begin, long* end) {
  Loop& it = team->loops[loop];
  *begin = it.next.fetch_add(it.chunk, std::memory_order_relaxed);
  *end = *begin + it.chunk < it.end ? *begin + it.chunk : it.end;
  return *begin < it.end;
}

}  // namespace

extern "C" {

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  Team shared(threads == 0 ? 2 : static_cast<int>(threads));
  run_team(shared, -1, body, data);
}

void GOMP_parallel_loop_nonmonotonic_dynamic(void (*body)(void*), void* data, unsigned threads,
                                             long start, long end, long step, long chunk,
                                             unsigned) {
  Team shared(threads == 0 ? 2 : static_cast<int>(threads));
  set(shared.loops[0], start, end, step, chunk);
  run_team(shared, 0, body, data);
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long* begin,
                                          long* stop) {
  if (++loop == kMaxLoops) std::abort();
  std::call_once(team->started[loop], [&] { set(team->loops[loop], start, end, step, chunk); });
  return take(begin, stop);
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* begin, long* stop) { return take(begin, stop); }
void GOMP_loop_end() { team->barrier(); }
void GOMP_loop_end_nowait() {}
void GOMP_barrier() { team->barrier(); }
int omp_get_thread_num() { return number; }
int omp_get_num_threads() { return team == nullptr ? 1 : team->size; }
}
