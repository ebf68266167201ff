// Anonymous shared memory that can be handed to another process and cannot shrink under it.
//
// create: memfd_create → posix_fallocate (no page is missing later: a full machine is an error
// here, not a SIGBUS at the first write) → map read-write → seal SHRINK | GROW | FUTURE_WRITE |
// SEAL. open (the receiving side): check seals and size → map read-only.
#pragma once

#include <cstdint>

namespace pyrlk {

struct Segment {
  int fd;
  void* address;
};

// Throws std::system_error with the errno and the failing step. inherit: a forked child keeps the
// mapping (a trainer's own tensors); staging memory is not for it.
Segment segment_create(std::uint64_t bytes, bool inherit = false);
void* segment_open(int fd, std::uint64_t bytes);
void segment_close(void* address, std::uint64_t bytes);

}  // namespace pyrlk
