// Flat buffer -> many tensors, where a source may be a strided part of what lies in the buffer and
// may change its dtype on the way: the copies of a recorded load plan that unpack cannot do.
//
//     dst[i] = cast(src[i])   for every index i of `sizes`, each side with its own strides
#pragma once

#include <cstddef>
#include <cstdint>

#include "memory/pack.h"

namespace pyrlk {

// Bits alone (kSame), or a float format on each side; float32 → float16/bfloat16 rounds to nearest
// even, NaN stays NaN.
enum class Format : std::uint8_t { kSame = 0, kFloat32 = 1, kBfloat16 = 2, kFloat16 = 3 };

struct Scatter {
  void* dst;
  std::uint64_t src_offset;  // in the buffer, in bytes
  std::int32_t itemsize;     // of both sides, for kSame: 1, 2, 4 or 8
  Format from, to;           // kSame on both sides or on neither
  std::int32_t ndim;
  std::int64_t sizes[kMaxDims];
  std::int64_t src_strides[kMaxDims];  // in elements, never negative
  std::int64_t dst_strides[kMaxDims];
};

// Throws std::invalid_argument on a bad field or a source that leaves the buffer. Destinations must
// not overlap.
void scatter(const void* buffer, std::uint64_t buffer_bytes, const Scatter* items,
             std::size_t count, int threads);

}  // namespace pyrlk
