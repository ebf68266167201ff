#include "memory/lines_impl.h"

namespace pyrlk {

const LineOps& lines_avx2() { return kOps; }

}  // namespace pyrlk
