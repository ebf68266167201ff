#include "memory/scatter.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory/threads.h"

namespace pyrlk {
namespace {

// What one thread does at a stretch, and below which one thread does everything; as in pack.cpp.
constexpr std::int64_t kGrain = 1 << 20;
constexpr std::int64_t kSerial = 8 << 20;

std::int64_t width(Format format, std::int32_t itemsize) {
  if (format == Format::kSame) return itemsize;
  return format == Format::kFloat32 ? 4 : 2;
}

// One copy in byte strides, the last dimension innermost.
struct Walk {
  char* dst;
  const char* src;
  Format from, to;
  std::int64_t src_width, dst_width;
  int ndim;
  std::int64_t sizes[kMaxDims + 1], src_steps[kMaxDims + 1], dst_steps[kMaxDims + 1];

  std::int64_t rows() const {
    std::int64_t n = 1;
    for (int d = 0; d + 1 < ndim; ++d) n *= sizes[d];
    return n;
  }
};

float to_float(Format format, const char* p) {
  std::uint32_t bits = 0;
  if (format == Format::kFloat32) {
    std::memcpy(&bits, p, 4);
  } else {
    std::uint16_t half;
    std::memcpy(&half, p, 2);
    if (format == Format::kBfloat16) {
      bits = static_cast<std::uint32_t>(half) << 16;
    } else {
      const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
      std::uint32_t exponent = (half >> 10) & 31u, mantissa = half & 1023u;
      if (exponent == 31) {
        bits = sign | 0x7f800000u | mantissa << 13;
      } else if (exponent != 0) {
        bits = sign | (exponent + 112) << 23 | mantissa << 13;
      } else {
        const float value = static_cast<float>(mantissa) * 0x1p-24f;
        std::memcpy(&bits, &value, 4);
        bits |= sign;
      }
    }
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

std::uint16_t to_bfloat16(std::uint32_t bits) {
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

std::uint16_t to_float16(std::uint32_t bits) {
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {                       // below 2^-14: a multiple of 2^-24
    float value;
    std::memcpy(&value, &magnitude, 4);
    // Adding 1/2 leaves units of 2^-24 in the mantissa, rounded to even by the addition itself.
    value += 0.5f;
    std::uint32_t shifted;
    std::memcpy(&shifted, &value, 4);
    return sign | static_cast<std::uint16_t>(shifted - 0x3f000000u);
  }
  return sign | static_cast<std::uint16_t>(
                    (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}

void convert(const Walk& walk, char* dst, const char* src) {
  const float value = to_float(walk.from, src);
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (walk.to == Format::kFloat32) {
    std::memcpy(dst, &bits, 4);
  } else {
    const std::uint16_t half = walk.to == Format::kBfloat16 ? to_bfloat16(bits) : to_float16(bits);
    std::memcpy(dst, &half, 2);
  }
}

void copy_row(const Walk& walk, char* dst, const char* src) {
  const int last = walk.ndim - 1;
  const std::int64_t count = walk.sizes[last];
  const std::int64_t src_step = walk.src_steps[last], dst_step = walk.dst_steps[last];
  if (walk.from != Format::kSame) {
    for (std::int64_t i = 0; i < count; ++i) convert(walk, dst + i * dst_step, src + i * src_step);
    return;
  }
  if (src_step == walk.src_width && dst_step == walk.src_width) {
    std::memcpy(dst, src, static_cast<std::size_t>(count * walk.src_width));
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    std::memcpy(dst + i * dst_step, src + i * src_step, static_cast<std::size_t>(walk.src_width));
  }
}

void copy_rows(const Walk& walk, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    std::int64_t rest = row, from = 0, to = 0;
    for (int d = walk.ndim - 2; d >= 0; --d) {
      const std::int64_t i = rest % walk.sizes[d];
      rest /= walk.sizes[d];
      from += i * walk.src_steps[d];
      to += i * walk.dst_steps[d];
    }
    copy_row(walk, walk.dst + to, walk.src + from);
  }
}

void check(const Scatter& item, std::uint64_t buffer_bytes) {
  const bool same = item.from == Format::kSame;
  if (same != (item.to == Format::kSame) || item.from > Format::kFloat16 ||
      item.to > Format::kFloat16) {
    throw std::invalid_argument("formats must be 0 on both sides, or 1 to 3");
  }
  if (same && item.itemsize != 1 && item.itemsize != 2 && item.itemsize != 4 &&
      item.itemsize != 8) {
    throw std::invalid_argument("itemsize must be 1, 2, 4 or 8");
  }
  if (item.ndim < 0 || item.ndim > kMaxDims) throw std::invalid_argument("ndim must be 0 to 16");
  const std::int64_t size = width(item.from, item.itemsize);
  std::int64_t last = 0;  // byte offset of the furthest element
  for (int d = 0; d < item.ndim; ++d) {
    std::int64_t reach;
    if (item.sizes[d] < 1 || item.src_strides[d] < 0 || item.dst_strides[d] < 0 ||
        __builtin_mul_overflow(item.sizes[d] - 1, item.src_strides[d], &reach) ||
        __builtin_mul_overflow(reach, size, &reach) || __builtin_add_overflow(last, reach, &last)) {
      throw std::invalid_argument("sizes must be positive, strides not negative, both in range");
    }
  }
  const auto end = static_cast<std::uint64_t>(last) + static_cast<std::uint64_t>(size);
  if (item.src_offset > buffer_bytes || end > buffer_bytes - item.src_offset) {
    throw std::invalid_argument("a source leaves the buffer of " + std::to_string(buffer_bytes) +
                                " bytes");
  }
}

// Dimensions of size 1 go, neighbours merge where both sides allow it, and a long row is cut so
// that threads can share it.
void add_walks(const Scatter& item, const char* buffer, std::vector<Walk>& walks) {
  Walk walk{};
  walk.dst = static_cast<char*>(item.dst);
  walk.src = buffer + item.src_offset;
  walk.from = item.from;
  walk.to = item.to;
  walk.src_width = width(item.from, item.itemsize);
  walk.dst_width = width(item.to, item.itemsize);
  for (int d = 0; d < item.ndim; ++d) {
    if (item.sizes[d] == 1) continue;
    const std::int64_t from = item.src_strides[d] * walk.src_width;
    const std::int64_t to = item.dst_strides[d] * walk.dst_width;
    const int top = walk.ndim - 1;
    if (top >= 0 && walk.src_steps[top] == from * item.sizes[d] &&
        walk.dst_steps[top] == to * item.sizes[d]) {
      walk.sizes[top] *= item.sizes[d];
      walk.src_steps[top] = from;
      walk.dst_steps[top] = to;
      continue;
    }
    walk.sizes[walk.ndim] = item.sizes[d];
    walk.src_steps[walk.ndim] = from;
    walk.dst_steps[walk.ndim] = to;
    ++walk.ndim;
  }
  if (walk.ndim == 0) {
    walk.ndim = 1;
    walk.sizes[0] = 1;
    walk.src_steps[0] = walk.src_width;
    walk.dst_steps[0] = walk.dst_width;
  }
  const std::int64_t row = kGrain / walk.dst_width;
  if (walk.ndim > 1 || walk.sizes[0] <= row) {
    walks.push_back(walk);
    return;
  }
  for (std::int64_t at = 0; at < walk.sizes[0]; at += row) {
    Walk part = walk;
    part.src += at * walk.src_steps[0];
    part.dst += at * walk.dst_steps[0];
    part.sizes[0] = std::min(row, walk.sizes[0] - at);
    walks.push_back(part);
  }
}

struct Grain {
  std::uint32_t walk;
  std::int64_t begin, end;  // rows
};

}  // namespace

void scatter(const void* buffer, std::uint64_t buffer_bytes, const Scatter* items,
             std::size_t count, int threads) {
  std::vector<Walk> walks;
  walks.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    check(items[i], buffer_bytes);
    add_walks(items[i], static_cast<const char*>(buffer), walks);
  }
  std::vector<Grain> grains;
  grains.reserve(walks.size());
  std::int64_t bytes = 0;
  for (std::size_t i = 0; i < walks.size(); ++i) {
    const std::int64_t rows = walks[i].rows();
    const std::int64_t row_bytes = walks[i].sizes[walks[i].ndim - 1] * walks[i].dst_width;
    const std::int64_t step = std::max<std::int64_t>(1, kGrain / row_bytes);
    for (std::int64_t at = 0; at < rows; at += step) {
      grains.push_back({static_cast<std::uint32_t>(i), at, std::min(rows, at + step)});
    }
    bytes += rows * row_bytes;
  }
  const auto total = static_cast<std::int64_t>(grains.size());
  threads = bytes < kSerial ? 1 : usable_threads(threads);
  auto run = [&](std::int64_t g) {
    copy_rows(walks[grains[g].walk], grains[g].begin, grains[g].end);
  };
  // A region of one thread still enters OpenMP, which a forked child must not.
  if (threads == 1) {
    for (std::int64_t g = 0; g < total; ++g) run(g);
    return;
  }
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads)
  for (std::int64_t g = 0; g < total; ++g) run(g);
}

}  // namespace pyrlk
