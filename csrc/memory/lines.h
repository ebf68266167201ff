// The inner loops of pack: 64-byte lines, copied and summed at once, one object file an ISA.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyrlk {

// `bytes` from src to dst with the sum of pack.h; src[0] belongs to word `first`, a multiple of 16.
// stream: non-temporal stores (dst must lie on a 64-byte boundary). `next` is read after this range
// and is only prefetched: any address will do.
using SumLines = std::uint64_t (*)(const char* src, std::size_t bytes, std::uint64_t first,
                                   const char* next);
using CopyLines = std::uint64_t (*)(char* dst, const char* src, std::size_t bytes,
                                    std::uint64_t first, const char* next);
struct LineOps {
  SumLines sum;
  CopyLines copy_sum;
  CopyLines stream_sum;
  CopyLines stream;  // a plain copy: returns 0
};

const LineOps& lines_base();
#if defined(__x86_64__)
const LineOps& lines_avx2();
const LineOps& lines_avx512();
#endif

// The widest set that this processor runs.
const LineOps& lines();

}  // namespace pyrlk
