#include "memory/pack.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory/lines.h"
#include "memory/threads.h"

namespace pyrlk {
namespace {

// A grain is what one thread does at a stretch: small enough to share the work evenly, large enough
// that its bookkeeping vanishes. A multiple of 64, so that every grain starts on a whole line.
constexpr std::uint64_t kGrain = 1 << 20;
constexpr std::uint64_t kLine = 64;
// Strided data goes through tiles that stay in the first-level cache between copy and sum.
constexpr std::uint64_t kTile = 16 << 10;
// Below this one thread is done within a millisecond, and waiting for others on a busy machine can
// take longer than that.
constexpr std::uint64_t kSerial = 8 << 20;
// From here on stores go around the cache: a line that is written whole need not be read first.
constexpr std::uint64_t kStream = 16 << 20;

enum class Task { kPack, kUnpack, kSum };

// A piece with its dimensions merged as far as its strides allow; strides in bytes.
struct Walk {
  char* data;
  char* flat;
  std::uint64_t bytes;
  std::int64_t itemsize;  // of the innermost contiguous run
  int ndim;               // 0: one contiguous run
  std::int64_t sizes[kMaxDims];
  std::int64_t strides[kMaxDims];
};

Walk walk_of(const Piece& piece, char* flat) {
  Walk walk{};
  walk.data = static_cast<char*>(piece.data);
  walk.flat = flat;
  walk.bytes = piece_bytes(piece);
  walk.itemsize = piece.itemsize;
  // From the innermost dimension outwards: merge where the outer stride is the inner extent.
  std::int64_t sizes[kMaxDims], strides[kMaxDims];
  int kept = 0;
  for (int d = piece.ndim - 1; d >= 0; --d) {
    const std::int64_t size = piece.sizes[d];
    if (size == 1) continue;
    const std::int64_t stride = piece.strides[d] * piece.itemsize;
    if (kept == 0 && stride == walk.itemsize) {
      walk.itemsize *= size;
    } else if (kept > 0 && stride == sizes[kept - 1] * strides[kept - 1]) {
      sizes[kept - 1] *= size;
    } else {
      sizes[kept] = size;
      strides[kept] = stride;
      ++kept;
    }
  }
  walk.ndim = kept;
  for (int d = 0; d < kept; ++d) {
    walk.sizes[d] = sizes[kept - 1 - d];
    walk.strides[d] = strides[kept - 1 - d];
  }
  return walk;
}

template <typename T>
void gather(char* flat, const char* data, std::int64_t count, std::int64_t stride) {
  for (std::int64_t i = 0; i < count; ++i) {
    std::memcpy(flat + i * sizeof(T), data + i * stride, sizeof(T));
  }
}

template <typename T>
void scatter(char* data, const char* flat, std::int64_t count, std::int64_t stride) {
  for (std::int64_t i = 0; i < count; ++i) {
    std::memcpy(data + i * stride, flat + i * sizeof(T), sizeof(T));
  }
}

// `count` runs of `itemsize` bytes, `stride` apart in the tensor, dense in the buffer.
void copy_runs(Task task, char* data, char* flat, std::int64_t itemsize, std::int64_t count,
               std::int64_t stride) {
  const bool in = task == Task::kPack;
  switch (itemsize) {
    case 1:
      return in ? gather<std::uint8_t>(flat, data, count, stride)
                : scatter<std::uint8_t>(data, flat, count, stride);
    case 2:
      return in ? gather<std::uint16_t>(flat, data, count, stride)
                : scatter<std::uint16_t>(data, flat, count, stride);
    case 4:
      return in ? gather<std::uint32_t>(flat, data, count, stride)
                : scatter<std::uint32_t>(data, flat, count, stride);
    case 8:
      return in ? gather<std::uint64_t>(flat, data, count, stride)
                : scatter<std::uint64_t>(data, flat, count, stride);
    default:
      for (std::int64_t i = 0; i < count; ++i) {
        char* there = data + i * stride;
        char* here = flat + i * itemsize;
        in ? std::memcpy(here, there, itemsize) : std::memcpy(there, here, itemsize);
      }
  }
}

// Logical bytes [begin, end) of a strided piece. A bound may cut a run in two.
void copy_strided(Task task, const Walk& walk, std::uint64_t begin, std::uint64_t end) {
  const auto item = static_cast<std::uint64_t>(walk.itemsize);
  while (begin < end) {
    const std::uint64_t index = begin / item;
    const std::uint64_t skip = begin % item;
    std::uint64_t rest = index;
    std::int64_t at = 0, inner = 0;
    for (int d = walk.ndim - 1; d >= 0; --d) {
      const auto i = static_cast<std::int64_t>(rest % walk.sizes[d]);
      rest /= walk.sizes[d];
      at += i * walk.strides[d];
      if (d == walk.ndim - 1) inner = i;
    }
    char* data = walk.data + at + skip;
    char* flat = walk.flat + begin;
    if (skip != 0 || end - begin < item) {
      const std::uint64_t bytes = std::min(item - skip, end - begin);
      task == Task::kPack ? std::memcpy(flat, data, bytes) : std::memcpy(data, flat, bytes);
      begin += bytes;
      continue;
    }
    const std::int64_t left = walk.sizes[walk.ndim - 1] - inner;
    const std::int64_t count =
        std::min<std::int64_t>(left, static_cast<std::int64_t>((end - begin) / item));
    copy_runs(task, data, flat, walk.itemsize, count, walk.strides[walk.ndim - 1]);
    begin += count * item;
  }
}

bool on_line(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 64 == 0; }

// Logical bytes [begin, end) of one piece; returns their share of the piece's sum.
std::uint64_t do_range(Task task, const LineOps& ops, const Walk& walk, std::uint64_t begin,
                       std::uint64_t end, const char* next, bool stream, bool want_sum) {
  const std::uint64_t bytes = end - begin;
  if (task == Task::kSum) return ops.sum(walk.flat + begin, bytes, begin / 4, next);
  if (walk.ndim == 0) {
    char* dst = (task == Task::kPack ? walk.flat : walk.data) + begin;
    const char* src = (task == Task::kPack ? walk.data : walk.flat) + begin;
    if (stream && on_line(dst)) {
      return (want_sum ? ops.stream_sum : ops.stream)(dst, src, bytes, begin / 4, next);
    }
    if (want_sum) return ops.copy_sum(dst, src, bytes, begin / 4, next);
    std::memcpy(dst, src, bytes);
    return 0;
  }
  std::uint64_t sum = 0;
  for (std::uint64_t at = begin; at < end; at += kTile) {
    const std::uint64_t stop = std::min(end, at + kTile);
    copy_strided(task, walk, at, stop);
    if (want_sum) sum += ops.sum(walk.flat + at, stop - at, at / 4, walk.flat + stop);
  }
  return sum;
}

const char* source(Task task, const Walk& walk) {
  return task == Task::kPack ? walk.data : walk.flat;
}

// Threads take grains of equal bytes, however many tensors those are: grain g holds the bytes
// [g, g + 1)·kGrain of all pieces one after another, where every piece counts in whole lines, so
// that a cut never falls inside one.
void run(Task task, const std::vector<Walk>& walks, int threads, std::uint64_t* sums) {
  std::vector<std::uint64_t> start(walks.size() + 1, 0);
  std::uint64_t bytes = 0;
  for (std::size_t i = 0; i < walks.size(); ++i) {
    start[i + 1] = start[i] + (walks[i].bytes + kLine - 1) / kLine * kLine;
    bytes += walks[i].bytes;
    if (sums != nullptr) sums[i] = 0;
  }
  const auto grains = static_cast<std::int64_t>((start.back() + kGrain - 1) / kGrain);
  if (grains == 0) return;
  threads = bytes < kSerial ? 1 : usable_threads(threads);
  threads = static_cast<int>(std::min<std::int64_t>(threads, grains));
  const bool stream = bytes >= kStream;
  const LineOps& ops = lines();

  auto grain = [&](std::int64_t g) {
    const std::uint64_t begin = static_cast<std::uint64_t>(g) * kGrain;
    const std::uint64_t end = std::min(begin + kGrain, start.back());
    // The last piece that starts at or before `begin`: empty ones share its start and come first.
    const auto it = std::upper_bound(start.begin(), start.end(), begin);
    for (auto i = static_cast<std::size_t>(it - start.begin()) - 1; start[i] < end; ++i) {
      const std::uint64_t from = std::max(begin, start[i]) - start[i];
      const std::uint64_t to = std::min(walks[i].bytes, end - start[i]);
      if (from == to) continue;  // an empty piece, perhaps without an address
      const char* next = to < walks[i].bytes || i + 1 == walks.size() ? source(task, walks[i]) + to
                                                                      : source(task, walks[i + 1]);
      const std::uint64_t part =
          do_range(task, ops, walks[i], from, to, next, stream, sums != nullptr);
      // Addition mod 2^64 commutes: the order in which threads arrive does not matter.
      if (sums != nullptr) __atomic_fetch_add(&sums[i], part, __ATOMIC_RELAXED);
    }
  };
  // A region of one thread still enters OpenMP, which a forked child must not.
  if (threads == 1) {
    for (std::int64_t g = 0; g < grains; ++g) grain(g);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (std::int64_t g = 0; g < grains; ++g) grain(g);
}

void check_range(std::uint64_t offset, std::uint64_t bytes, std::uint64_t buffer_bytes) {
  if (offset > buffer_bytes || bytes > buffer_bytes - offset) {
    throw std::invalid_argument("range [" + std::to_string(offset) + ", +" + std::to_string(bytes) +
                                ") leaves a buffer of " + std::to_string(buffer_bytes) + " bytes");
  }
}

void run_pieces(Task task, char* buffer, std::uint64_t buffer_bytes, const Piece* pieces,
                std::size_t count, int threads, std::uint64_t* sums) {
  std::vector<Walk> walks;
  walks.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    check_range(pieces[i].offset, piece_bytes(pieces[i]), buffer_bytes);
    walks.push_back(walk_of(pieces[i], buffer + pieces[i].offset));
  }
  run(task, walks, threads, sums);
}

}  // namespace

const LineOps& lines() {
#if defined(__x86_64__)
  static const LineOps& best = __builtin_cpu_supports("avx512f") ? lines_avx512()
                               : __builtin_cpu_supports("avx2")  ? lines_avx2()
                                                                 : lines_base();
  return best;
#else
  return lines_base();
#endif
}

std::uint64_t piece_bytes(const Piece& piece) {
  if (piece.itemsize < 1 || piece.itemsize > 16) {
    throw std::invalid_argument("itemsize must be 1 to 16, got " + std::to_string(piece.itemsize));
  }
  if (piece.ndim < 0 || piece.ndim > kMaxDims) {
    throw std::invalid_argument("ndim must be 0 to 16, got " + std::to_string(piece.ndim));
  }
  bool empty = false;
  for (int d = 0; d < piece.ndim; ++d) {
    if (piece.sizes[d] < 0 || piece.strides[d] < 0) {
      throw std::invalid_argument("sizes and strides must not be negative");
    }
    empty = empty || piece.sizes[d] == 0;
  }
  if (empty) return 0;
  std::int64_t bytes = piece.itemsize;
  for (int d = 0; d < piece.ndim; ++d) {
    if (__builtin_mul_overflow(bytes, piece.sizes[d], &bytes)) {
      throw std::invalid_argument("a tensor of 2^63 bytes or more");
    }
  }
  return static_cast<std::uint64_t>(bytes);
}

void pack(void* buffer, std::uint64_t buffer_bytes, const Piece* pieces, std::size_t count,
          int threads, std::uint64_t* sums) {
  run_pieces(Task::kPack, static_cast<char*>(buffer), buffer_bytes, pieces, count, threads, sums);
}

void unpack(const void* buffer, std::uint64_t buffer_bytes, const Piece* pieces, std::size_t count,
            int threads, std::uint64_t* sums) {
  // The buffer side of a Walk is only read by an unpack.
  char* flat = const_cast<char*>(static_cast<const char*>(buffer));
  run_pieces(Task::kUnpack, flat, buffer_bytes, pieces, count, threads, sums);
}

void checksum(const void* buffer, std::uint64_t buffer_bytes, const Range* ranges,
              std::size_t count, int threads, std::uint64_t* sums) {
  char* flat = const_cast<char*>(static_cast<const char*>(buffer));
  std::vector<Walk> walks(count);
  for (std::size_t i = 0; i < count; ++i) {
    check_range(ranges[i].offset, ranges[i].bytes, buffer_bytes);
    walks[i].flat = flat + ranges[i].offset;
    walks[i].bytes = ranges[i].bytes;
  }
  run(Task::kSum, walks, threads, sums);
}

}  // namespace pyrlk
