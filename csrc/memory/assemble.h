// Parts of tensors -> whole tensors in one flat buffer, with the 64-bit sum of pack.h on the way.
//
//     whole[start + i] = part[i]      for every index i of the part
//
// A whole lies dense in the buffer; a part may have any strides. One pass over memory: rows of the
// whole are put together tile by tile, and a tile is summed while it is in the cache.
#pragma once

#include <cstddef>
#include <cstdint>

#include "memory/pack.h"

namespace pyrlk {

struct Whole {
  std::uint64_t offset;  // in the buffer, in bytes
  std::int32_t itemsize;
  std::int32_t ndim;  // at least 1
  std::int64_t sizes[kMaxDims];
  std::size_t parts;  // its parts follow those of the whole before it
};

struct Part {
  const void* data;
  std::int64_t starts[kMaxDims];
  std::int64_t sizes[kMaxDims];
  std::int64_t strides[kMaxDims];  // in elements, never negative
};

// sums: one a whole, or null. The parts of a whole must cover it once; that is the caller's to
// know. Throws std::invalid_argument where a part leaves its whole, or a whole the buffer.
void assemble(void* buffer, std::uint64_t buffer_bytes, const Whole* wholes, std::size_t count,
              const Part* parts, std::size_t part_count, int threads, std::uint64_t* sums);

}  // namespace pyrlk
