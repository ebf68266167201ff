#include "row_kernels.h"

namespace pyrlk {
extern const RowKernels k_avx2;
const RowKernels k_avx2 = kernels("avx2");
}  // namespace pyrlk
