// The inner loops of pack: 64-byte lines, copied and summed at once, one object file an ISA.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyrlk {

// `bytes` from src to dst with the sum of pack.h; src[0] belongs to word `first`, a multiple of 16.
// dst null: sum only. stream: non-temporal stores (dst must lie on a 64-byte boundary).
struct LineOps {
  std::uint64_t (*sum)(const char* src, std::size_t bytes, std::uint64_t first);
  std::uint64_t (*copy_sum)(char* dst, const char* src, std::size_t bytes, std::uint64_t first);
  std::uint64_t (*stream_sum)(char* dst, const char* src, std::size_t bytes, std::uint64_t first);
};

const LineOps& lines_base();
#if defined(__x86_64__)
const LineOps& lines_avx2();
const LineOps& lines_avx512();
#endif

// The widest set that this processor runs.
const LineOps& lines();

}  // namespace pyrlk
