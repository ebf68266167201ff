// Many tensors <-> one flat buffer, with a 64-bit sum of each tensor on the way.
//
// The sum of a tensor: its bytes in logical (row-major) order, read as little-endian 32-bit words
// w_0, w_1, … with a zero-padded tail:
//
//     S = Σ w_i · (2i + 1)   mod 2^64
//
// Additive: a range that starts at a multiple of four bytes is summed alone, with its own i, and
// added. One changed word always changes S (its weight is odd). Two swapped, unequal words always
// change S when they lie less than 8 GiB apart: |w_i − w_j| · 2|i − j| < 2^64. This guards against
// faults, not against forgery.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyrlk {

constexpr int kMaxDims = 16;

// A tensor on one side, a range of the flat buffer (dense, row-major) on the other.
struct Piece {
  void* data;
  std::uint64_t offset;  // of the range in the buffer, in bytes
  std::int32_t itemsize;
  std::int32_t ndim;
  std::int64_t sizes[kMaxDims];
  std::int64_t strides[kMaxDims];  // in elements, never negative
};

struct Range {
  std::uint64_t offset;
  std::uint64_t bytes;
};

// Bytes of a piece; throws std::invalid_argument on a bad itemsize, ndim, size or stride, or a
// product above 2^63 − 1.
std::uint64_t piece_bytes(const Piece& piece);

// Tensors → buffer. sums: one an entry, or null for a plain copy. Throws std::invalid_argument
// where a range leaves the buffer. Ranges must not overlap.
void pack(void* buffer, std::uint64_t buffer_bytes, const Piece* pieces, std::size_t count,
          int threads, std::uint64_t* sums);

// Buffer → tensors. sums: of the words as they went into the tensors, or null.
void unpack(const void* buffer, std::uint64_t buffer_bytes, const Piece* pieces, std::size_t count,
            int threads, std::uint64_t* sums);

// Sums of ranges of the buffer, without copying.
void checksum(const void* buffer, std::uint64_t buffer_bytes, const Range* ranges,
              std::size_t count, int threads, std::uint64_t* sums);

}  // namespace pyrlk
