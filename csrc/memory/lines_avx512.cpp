#include "memory/lines_impl.h"

namespace pyrlk {

const LineOps& lines_avx512() { return kOps; }

}  // namespace pyrlk
