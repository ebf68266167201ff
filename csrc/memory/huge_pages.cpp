#include "huge_pages.h"

#include <sys/mman.h>

namespace pyrlk {

void advise_huge_pages(std::uint64_t address, std::uint64_t bytes) noexcept {
#ifdef MADV_HUGEPAGE
  constexpr std::uint64_t kPage = 4096;
  const std::uint64_t begin = (address + kPage - 1) / kPage * kPage;
  const std::uint64_t end = (address + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

}  // namespace pyrlk
