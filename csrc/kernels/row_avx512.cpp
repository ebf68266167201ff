#include "row_kernels.h"

namespace pyrlk {
extern const RowKernels k_avx512;
const RowKernels k_avx512 = kernels("avx512");
}  // namespace pyrlk
