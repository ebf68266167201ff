#include "memory/assemble.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory/lines.h"
#include "memory/threads.h"

namespace pyrlk {
namespace {

// As in pack.cpp: what one thread does at a stretch, what stays in the first-level cache between
// copy and sum, below what one thread is enough, and from where on stores go around the cache.
constexpr std::int64_t kGrain = 1 << 20;
constexpr std::int64_t kTile = 16 << 10;
constexpr std::uint64_t kSerial = 8 << 20;
constexpr std::uint64_t kStream = 16 << 20;
constexpr std::int64_t kLine = 64;

// A part, in bytes: rows [first, last) of the whole, each of them runs that are contiguous on both
// sides. Dimensions are merged as far as both sides allow.
struct Walk {
  const char* data;
  std::int64_t first, last;
  std::int64_t row_stride;  // of the part
  std::int64_t at;          // where a row of the part begins within a row of the whole
  std::int64_t run;
  int ndim;
  std::int64_t sizes[kMaxDims], from[kMaxDims], to[kMaxDims];  // innermost first
};

Walk walk_of(const Whole& whole, const Part& part) {
  Walk walk{};
  const std::int64_t item = whole.itemsize;
  walk.data = static_cast<const char*>(part.data);
  walk.first = part.starts[0];
  walk.last = part.starts[0] + part.sizes[0];
  walk.row_stride = part.strides[0] * item;
  walk.run = item;
  std::int64_t extent = item;  // of one step along dimension d of the whole
  for (int d = whole.ndim - 1; d > 0; --d) {
    const std::int64_t size = part.sizes[d], from = part.strides[d] * item, to = extent;
    walk.at += part.starts[d] * extent;
    extent *= whole.sizes[d];
    if (size == 1) continue;
    const int k = walk.ndim;
    if (k == 0 && from == walk.run && to == walk.run) {
      walk.run *= size;
    } else if (k > 0 && from == walk.sizes[k - 1] * walk.from[k - 1] &&
               to == walk.sizes[k - 1] * walk.to[k - 1]) {
      walk.sizes[k - 1] *= size;
    } else {
      walk.sizes[k] = size;
      walk.from[k] = from;
      walk.to[k] = to;
      ++walk.ndim;
    }
  }
  return walk;
}

template <typename T>
void copy_items(char* to, const char* from, std::int64_t count, std::int64_t to_stride,
                std::int64_t from_stride) {
  for (std::int64_t i = 0; i < count; ++i) {
    std::memcpy(to + i * to_stride, from + i * from_stride, sizeof(T));
  }
}

void copy_runs(char* to, const char* from, std::int64_t run, std::int64_t count,
               std::int64_t to_stride, std::int64_t from_stride) {
  switch (run) {
    case 1:
      return copy_items<std::uint8_t>(to, from, count, to_stride, from_stride);
    case 2:
      return copy_items<std::uint16_t>(to, from, count, to_stride, from_stride);
    case 4:
      return copy_items<std::uint32_t>(to, from, count, to_stride, from_stride);
    case 8:
      return copy_items<std::uint64_t>(to, from, count, to_stride, from_stride);
    default:
      for (std::int64_t i = 0; i < count; ++i) {
        std::memcpy(to + i * to_stride, from + i * from_stride, static_cast<std::size_t>(run));
      }
  }
}

void copy_row(const Walk& walk, int dims, char* to, const char* from) {
  if (dims == 0) {
    std::memcpy(to, from, static_cast<std::size_t>(walk.run));
  } else if (dims == 1) {
    copy_runs(to, from, walk.run, walk.sizes[0], walk.to[0], walk.from[0]);
  } else {
    const int d = dims - 1;
    for (std::int64_t i = 0; i < walk.sizes[d]; ++i) {
      copy_row(walk, d, to + i * walk.to[d], from + i * walk.from[d]);
    }
  }
}

struct Tensor {
  char* flat;
  std::int64_t rows, row_bytes;
  std::int64_t step;  // rows after which a row starts on a whole line of the tensor
  const Walk* walks;
  std::size_t parts;
};

// Rows that lie in both sides without a gap are one run.
bool dense(const Walk& walk, std::int64_t row_bytes) {
  return walk.ndim == 0 && walk.run == row_bytes && walk.row_stride == row_bytes;
}

void copy_rows(const Tensor& tensor, std::int64_t begin, std::int64_t end) {
  for (std::size_t p = 0; p < tensor.parts; ++p) {
    const Walk& walk = tensor.walks[p];
    const std::int64_t first = std::max(begin, walk.first), last = std::min(end, walk.last);
    if (first >= last) continue;
    char* to = tensor.flat + first * tensor.row_bytes + walk.at;
    const char* from = walk.data + (first - walk.first) * walk.row_stride;
    if (dense(walk, tensor.row_bytes)) {
      std::memcpy(to, from, static_cast<std::size_t>((last - first) * tensor.row_bytes));
    } else if (walk.ndim == 0) {
      copy_runs(to, from, walk.run, last - first, tensor.row_bytes, walk.row_stride);
    } else {
      for (std::int64_t r = first; r < last; ++r) {
        copy_row(walk, walk.ndim, to, from);
        to += tensor.row_bytes;
        from += walk.row_stride;
      }
    }
  }
}

// Rows [begin, end); returns their share of the sum. `begin` is a multiple of `step`.
std::uint64_t do_rows(const LineOps& ops, const Tensor& tensor, std::int64_t begin,
                      std::int64_t end, bool stream, bool want_sum) {
  const auto word = [&](std::int64_t row) {
    return static_cast<std::uint64_t>(row * tensor.row_bytes / 4);
  };
  for (std::size_t p = 0; p < tensor.parts; ++p) {
    const Walk& walk = tensor.walks[p];
    if (walk.first > begin || walk.last < end || !dense(walk, tensor.row_bytes)) continue;
    char* to = tensor.flat + begin * tensor.row_bytes;
    const char* from = walk.data + (begin - walk.first) * tensor.row_bytes;
    const auto bytes = static_cast<std::size_t>((end - begin) * tensor.row_bytes);
    const bool on_line = reinterpret_cast<std::uintptr_t>(to) % kLine == 0;
    if (stream && on_line) {
      return (want_sum ? ops.stream_sum : ops.stream)(to, from, bytes, word(begin), from + bytes);
    }
    if (want_sum) return ops.copy_sum(to, from, bytes, word(begin), from + bytes);
    std::memcpy(to, from, bytes);
    return 0;
  }
  if (!want_sum) {
    copy_rows(tensor, begin, end);
    return 0;
  }
  const std::int64_t rows =
      std::max<std::int64_t>(1, kTile / (tensor.step * tensor.row_bytes)) * tensor.step;
  std::uint64_t sum = 0;
  for (std::int64_t at = begin; at < end; at += rows) {
    const std::int64_t stop = std::min(end, at + rows);
    copy_rows(tensor, at, stop);
    const char* from = tensor.flat + at * tensor.row_bytes;
    const auto bytes = static_cast<std::size_t>((stop - at) * tensor.row_bytes);
    sum += ops.sum(from, bytes, word(at), from + bytes);
  }
  return sum;
}

void check_part(const Whole& whole, const Part& part) {
  Piece piece{};  // sizes and strides are judged as pack judges them
  piece.itemsize = whole.itemsize;
  piece.ndim = whole.ndim;
  std::copy_n(part.sizes, whole.ndim, piece.sizes);
  std::copy_n(part.strides, whole.ndim, piece.strides);
  piece_bytes(piece);
  for (int d = 0; d < whole.ndim; ++d) {
    if (part.starts[d] < 0 || part.starts[d] > whole.sizes[d] ||
        part.sizes[d] > whole.sizes[d] - part.starts[d]) {
      throw std::invalid_argument("a part leaves its tensor in dimension " + std::to_string(d));
    }
  }
}

std::uint64_t check_whole(const Whole& whole, std::uint64_t buffer_bytes) {
  if (whole.ndim < 1) throw std::invalid_argument("a whole tensor needs a dimension");
  Piece piece{};
  piece.itemsize = whole.itemsize;
  piece.ndim = whole.ndim;
  std::copy_n(whole.sizes, std::min<int>(whole.ndim, kMaxDims), piece.sizes);
  const std::uint64_t bytes = piece_bytes(piece);
  if (whole.offset > buffer_bytes || bytes > buffer_bytes - whole.offset) {
    throw std::invalid_argument("a whole tensor leaves a buffer of " +
                                std::to_string(buffer_bytes) + " bytes");
  }
  return bytes;
}

// Rows of one tensor that one thread does at a stretch.
struct Unit {
  std::size_t tensor;
  std::int64_t begin, end;
};

}  // namespace

void assemble(void* buffer, std::uint64_t buffer_bytes, const Whole* wholes, std::size_t count,
              const Part* parts, std::size_t part_count, int threads, std::uint64_t* sums) {
  std::vector<Walk> walks;
  walks.reserve(part_count);
  std::vector<Tensor> tensors(count);
  std::vector<Unit> units;
  std::uint64_t total = 0;
  std::size_t next = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const Whole& whole = wholes[i];
    const std::uint64_t bytes = check_whole(whole, buffer_bytes);
    if (whole.parts > part_count - next) throw std::invalid_argument("fewer parts than stated");
    if (sums != nullptr) sums[i] = 0;
    Tensor& tensor = tensors[i];
    tensor.walks = walks.data() + walks.size();
    for (std::size_t p = 0; p < whole.parts; ++p, ++next) {
      check_part(whole, parts[next]);
      const auto* sizes = parts[next].sizes;
      if (std::find(sizes, sizes + whole.ndim, 0) == sizes + whole.ndim) {
        walks.push_back(walk_of(whole, parts[next]));
        ++tensor.parts;
      }
    }
    if (bytes == 0) continue;
    tensor.flat = static_cast<char*>(buffer) + whole.offset;
    tensor.rows = whole.sizes[0];
    tensor.row_bytes = static_cast<std::int64_t>(bytes) / tensor.rows;
    tensor.step = kLine / std::gcd(tensor.row_bytes, kLine);
    const std::int64_t rows =
        std::max<std::int64_t>(1, kGrain / (tensor.step * tensor.row_bytes)) * tensor.step;
    for (std::int64_t at = 0; at < tensor.rows; at += rows) {
      units.push_back({i, at, std::min(tensor.rows, at + rows)});
    }
    total += bytes;
  }
  if (next != part_count) throw std::invalid_argument("more parts than stated");
  const bool stream = total >= kStream;
  const LineOps& ops = lines();
  const auto unit = [&](std::int64_t u) {
    const auto [i, begin, end] = units[static_cast<std::size_t>(u)];
    const std::uint64_t part = do_rows(ops, tensors[i], begin, end, stream, sums != nullptr);
    if (sums != nullptr) __atomic_fetch_add(&sums[i], part, __ATOMIC_RELAXED);
  };
  const auto all = static_cast<std::int64_t>(units.size());
  threads = total < kSerial ? 1 : usable_threads(threads);
  // A region of one thread still enters OpenMP, which a forked child must not.
  if (threads == 1) {
    for (std::int64_t u = 0; u < all; ++u) unit(u);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (std::int64_t u = 0; u < all; ++u) unit(u);
}

}  // namespace pyrlk
