#include "memory/lines_impl.h"

namespace pyrlk {

const LineOps& lines_base() { return kOps; }

}  // namespace pyrlk
