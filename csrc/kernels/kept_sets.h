// The kept sets of a batch before anyone knows how many ids there are.
//
// A row is held as its ids, or as bits of the vocabulary where these take less: a batch of flat
// rows waits in a twentieth of the memory that its ids will fill.
#pragma once

#include <cstdint>
#include <vector>

namespace pyrlk {

class KeptSets {
 public:
  explicit KeptSets(int64_t rows) : rows_(rows) {}

  // `count` ids, ascending. Each row by any one thread.
  void set(int64_t row, const int32_t* ids, int64_t count);
  int64_t total() const;
  // CSR: rows that end within `capacity` go to ids; the others become `words` words of bits, and
  // OVERFLOW in status. offsets [rows + 1] are those of ids without end.
  void write(int32_t* ids, int64_t capacity, int64_t* offsets, uint32_t* bits, int64_t words,
             uint8_t* status, int threads) const;

 private:
  struct Row {
    int64_t count = 0;
    std::vector<int32_t> ids;  // one of the two
    std::vector<uint32_t> bits;
  };
  std::vector<Row> rows_;
};

}  // namespace pyrlk
