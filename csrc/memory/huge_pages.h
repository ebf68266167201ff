// Fresh large buffers cost more in 4 KiB page faults than in the bytes written to them.
#pragma once

#include <cstdint>

namespace pyrlk {

// Asks for 2 MiB pages over [address, address + bytes) before its first touch; a hint, never an
// error.
void advise_huge_pages(std::uint64_t address, std::uint64_t bytes) noexcept;

}  // namespace pyrlk
