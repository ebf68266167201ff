// Where a row of logits lies: [70000, 151936] has more elements than 32 bits count.
#include "../kernels/kernels.h"
#include "check.h"

using pyrlk::DType;
using pyrlk::Rows;

int main() {
  constexpr int64_t kRows = 70000, kVocab = 151936;
  char* const base = reinterpret_cast<char*>(int64_t(1) << 20);
  const Rows flat{base, DType::kBFloat16, kRows, kVocab, kVocab, kRows, 0, kVocab};
  CHECK(flat.row(kRows - 1) - base == (kRows - 1) * kVocab * 2);
  CHECK(flat.row(14135) - base == int64_t{14135} * 151936 * 2);
  // Sequences of 7000 positions, one position beyond them in the buffer.
  const Rows view{base, DType::kFloat32, kRows, kVocab, kVocab, 7000, 7001 * kVocab, kVocab};
  CHECK(view.row(kRows - 1) - base == (int64_t{9} * 7001 + 6999) * kVocab * 4);
  return failures() != 0;
}
