#include "memory/warm_pages.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#ifndef MADV_FREE
#define MADV_FREE 8
#endif
#ifndef MADV_HUGEPAGE
#define MADV_HUGEPAGE 14
#endif

namespace pyrlk {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kMostKept = 2;

struct Mapping {
  char* base;  // as mmap returned it
  std::size_t length;
  char* block;  // the first huge-page boundary in it
  std::size_t bytes;
};

struct State {
  std::mutex lock;
  std::unordered_map<void*, Mapping> used;
  std::vector<Mapping> kept;  // oldest first
};

// Never destroyed: tensors may outlive static objects at exit.
State& state() {
  static State* const made = new State;
  return *made;
}

void unmap(const Mapping& m) noexcept { munmap(m.base, m.length); }

std::size_t total(const std::vector<Mapping>& list) noexcept {
  std::size_t sum = 0;
  for (const Mapping& m : list) sum += m.bytes;
  return sum;
}

// A fork waits for the lock, so that the child finds the lists whole. What is kept is the parent's.
const int registered = pthread_atfork([] { state().lock.lock(); }, [] { state().lock.unlock(); },
                                      [] {
                                        for (const Mapping& m : state().kept) unmap(m);
                                        state().kept.clear();
                                        state().lock.unlock();
                                      });

bool map(std::size_t bytes, Mapping* out) noexcept {
  const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t rounded = (bytes + page - 1) / page * page, length = rounded + kHugePage;
  if (rounded < bytes || length < rounded) return false;
  void* base = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return false;
  const auto address = reinterpret_cast<std::uintptr_t>(base);
  const std::size_t skip = (kHugePage - address % kHugePage) % kHugePage;
  *out = {static_cast<char*>(base), length, static_cast<char*>(base) + skip, rounded};
  // Advice only, and not for the rest behind the last whole huge page: it would be all resident.
  madvise(out->block, rounded / kHugePage * kHugePage, MADV_HUGEPAGE);
  return true;
}

// The smallest kept mapping that holds `bytes`, taken off the list.
bool reuse(State& s, std::size_t bytes, Mapping* out) {
  auto best = s.kept.end();
  for (auto it = s.kept.begin(); it != s.kept.end(); ++it) {
    if (it->bytes >= bytes && (best == s.kept.end() || it->bytes < best->bytes)) best = it;
  }
  if (best == s.kept.end()) return false;
  *out = *best;
  s.kept.erase(best);
  return true;
}

}  // namespace

void* take_warm_pages(std::size_t bytes) noexcept try {
  (void)registered;
  State& s = state();
  const std::lock_guard<std::mutex> hold(s.lock);
  Mapping m;
  if (!reuse(s, bytes, &m)) {
    for (const Mapping& small : s.kept) unmap(small);
    s.kept.clear();
    if (!map(bytes, &m)) return nullptr;
  }
  s.used.emplace(m.block, m);
  return m.block;
} catch (const std::bad_alloc&) {
  return nullptr;
}

void give_back_warm_pages(void* block) noexcept {
  State& s = state();
  const std::lock_guard<std::mutex> hold(s.lock);
  const auto at = s.used.find(block);
  if (at == s.used.end()) return;
  const Mapping m = at->second;
  s.used.erase(at);
  if (madvise(m.block, m.bytes, MADV_FREE) != 0) return unmap(m);
  if (s.kept.size() == kMostKept) {
    unmap(s.kept.front());
    s.kept.erase(s.kept.begin());
  }
  try {
    s.kept.push_back(m);
  } catch (const std::bad_alloc&) {
    unmap(m);
  }
}

std::size_t release_warm_pages() noexcept {
  State& s = state();
  const std::lock_guard<std::mutex> hold(s.lock);
  const std::size_t released = total(s.kept);
  for (const Mapping& m : s.kept) unmap(m);
  s.kept.clear();
  return released;
}

WarmPages warm_pages() noexcept {
  State& s = state();
  const std::lock_guard<std::mutex> hold(s.lock);
  WarmPages w{0, total(s.kept)};
  for (const auto& [block, m] : s.used) w.used += m.bytes;
  return w;
}

}  // namespace pyrlk
