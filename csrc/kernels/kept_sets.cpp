#include "kept_sets.h"

#include <algorithm>

#include "../memory/threads.h"
#include "kernels.h"

namespace pyrlk {
namespace {

// Sets the bits of ascending ids; a word is stored once.
void set_bits(const int32_t* ids, int64_t count, uint32_t* bits) {
  int64_t at = 0;
  uint32_t word = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] / 32 != at) {
      bits[at] = word;
      at = ids[i] / 32;
      word = 0;
    }
    word |= 1u << (ids[i] % 32);
  }
  bits[at] = word;
}

}  // namespace

void KeptSets::set(int64_t row, const int32_t* ids, int64_t count) {
  Row& kept = rows_[row];
  kept = {};
  kept.count = count;
  if (count == 0) return;
  const int64_t words = ids[count - 1] / 32 + 1;
  if (count <= words) {
    kept.ids.assign(ids, ids + count);
  } else {
    kept.bits.resize(words);
    set_bits(ids, count, kept.bits.data());
  }
}

int64_t KeptSets::total() const {
  int64_t n = 0;
  for (const Row& row : rows_) n += row.count;
  return n;
}

void KeptSets::write(int32_t* ids, int64_t capacity, int64_t* offsets, uint32_t* bits,
                     int64_t words, uint8_t* status, int threads) const {
  const int64_t rows = int64_t(rows_.size());
  offsets[0] = 0;
  for (int64_t b = 0; b < rows; ++b) offsets[b + 1] = offsets[b] + rows_[b].count;
  constexpr int64_t kIdsAThread = 1 << 16;
  threads = int(std::clamp<int64_t>(offsets[rows] / kIdsAThread, 1, usable_threads(threads)));
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int64_t b = 0; b < rows; ++b) {
    const Row& row = rows_[b];
    if (row.count == 0) continue;
    if (offsets[b + 1] <= capacity) {
      if (row.bits.empty()) {
        std::copy(row.ids.begin(), row.ids.end(), ids + offsets[b]);
      } else {
        row_kernels().ids_of_bits(row.bits.data(), row.count, ids + offsets[b]);
      }
    } else {
      uint32_t* out = bits + b * words;
      std::fill_n(out, words, 0);
      if (row.bits.empty()) {
        set_bits(row.ids.data(), row.count, out);
      } else {
        std::copy(row.bits.begin(), row.bits.end(), out);
      }
      status[b] |= kOverflow;
    }
  }
}

}  // namespace pyrlk
