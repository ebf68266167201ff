// Memory for large gradients that stays warm from one step to the next.
//
// A fresh mapping costs a page fault every 4 KiB, more than the kernel that fills it. So a freed
// mapping is kept for the next request, in huge pages where the system has them, and the kernel may
// take its pages back whenever it is short (MADV_FREE). A block is in use until give_back(): it is
// never handed out twice. A request that no kept mapping can hold releases them all first, and at
// most two are kept, so that the blocks in use and the kept ones never exceed the most that was in
// use at once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyrlk {

// A page-aligned block of at least `bytes` with arbitrary contents, or null. Any thread may call.
void* take_warm_pages(std::size_t bytes) noexcept;
// Ends the use of a block that take_warm_pages returned. Any thread may call.
void give_back_warm_pages(void* block) noexcept;
// Unmaps what is kept; returns its bytes.
std::size_t release_warm_pages() noexcept;
// Bytes in blocks in use, and kept for later.
struct WarmPages {
  std::size_t used, kept;
};
WarmPages warm_pages() noexcept;

}  // namespace pyrlk
