#include "row_kernels.h"

namespace pyrlk {
extern const RowKernels k_base;
const RowKernels k_base = kernels("base");
}  // namespace pyrlk
