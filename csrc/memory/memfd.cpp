#include "memory/memfd.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <limits>
#include <string>
#include <system_error>

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif
#ifndef MADV_HUGEPAGE
#define MADV_HUGEPAGE 14
#endif

namespace pyrlk {
namespace {

[[noreturn]] void fail(int error, const std::string& what) {
  throw std::system_error(error, std::generic_category(), what);
}

void check_size(std::uint64_t bytes) {
  if (bytes == 0 || bytes > static_cast<std::uint64_t>(std::numeric_limits<off_t>::max())) {
    fail(EINVAL, "a segment of " + std::to_string(bytes) + " bytes");
  }
}

// MemAvailable in bytes; the maximum where /proc does not say. memfd has no size limit of its own:
// without this look a request that is too large ends with the kernel killing some process.
std::uint64_t available_memory() {
  std::uint64_t kib = std::numeric_limits<std::uint64_t>::max() >> 10;
  if (FILE* file = fopen("/proc/meminfo", "re")) {
    char line[128];
    unsigned long long value;
    while (fgets(line, sizeof line, file) != nullptr) {
      if (sscanf(line, "MemAvailable: %llu kB", &value) == 1) {
        kib = value;
        break;
      }
    }
    fclose(file);
  }
  return kib << 10;
}

void* map(int fd, std::uint64_t bytes, int protection, bool inherit) {
  void* address = mmap(nullptr, bytes, protection, MAP_SHARED, fd, 0);
  if (address == MAP_FAILED) fail(errno, "mmap of " + std::to_string(bytes) + " bytes");
  // Both are hints: huge pages where the system gives them to shared memory, and the page table
  // filled at once instead of fault by fault.
  (void)madvise(address, bytes, MADV_HUGEPAGE);
#ifdef MADV_POPULATE_READ
  (void)madvise(address, bytes,
                (protection & PROT_WRITE) ? MADV_POPULATE_WRITE : MADV_POPULATE_READ);
#endif
  // A forked child must not hold the publisher's memory.
  if (!inherit) (void)madvise(address, bytes, MADV_DONTFORK);
  return address;
}

}  // namespace

Segment segment_create(std::uint64_t bytes, bool inherit) {
  check_size(bytes);
  if (bytes > available_memory()) {
    fail(ENOMEM, "a segment of " + std::to_string(bytes) + " bytes is more than the free memory");
  }
  const int fd = memfd_create("pyrlk-weights", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) fail(errno, "memfd_create");
  void* address = nullptr;
  try {
    const int error = posix_fallocate(fd, 0, static_cast<off_t>(bytes));
    if (error != 0) fail(error, "posix_fallocate of " + std::to_string(bytes) + " bytes");
    address = map(fd, bytes, PROT_READ | PROT_WRITE, inherit);
    const int seals = F_SEAL_SHRINK | F_SEAL_GROW;
    // FUTURE_WRITE (Linux 5.1): nobody who gets the descriptor can map it writable.
    if (fcntl(fd, F_ADD_SEALS, seals | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL) != 0 &&
        fcntl(fd, F_ADD_SEALS, seals | F_SEAL_SEAL) != 0) {
      fail(errno, "F_ADD_SEALS");
    }
  } catch (...) {
    if (address != nullptr) munmap(address, bytes);
    close(fd);
    throw;
  }
  return {fd, address};
}

void* segment_open(int fd, std::uint64_t bytes) {
  check_size(bytes);
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0) fail(errno, "not a memfd: F_GET_SEALS");
  if ((seals & (F_SEAL_SHRINK | F_SEAL_GROW)) != (F_SEAL_SHRINK | F_SEAL_GROW)) {
    fail(EPERM, "the memfd is not sealed against SHRINK and GROW");
  }
  struct stat status;
  if (fstat(fd, &status) != 0) fail(errno, "fstat");
  if (static_cast<std::uint64_t>(status.st_size) != bytes) {
    fail(EINVAL, "the memfd has " + std::to_string(status.st_size) + " bytes, announced are " +
                     std::to_string(bytes));
  }
  return map(fd, bytes, PROT_READ, false);
}

void segment_close(void* address, std::uint64_t bytes) {
  if (munmap(address, bytes) != 0) fail(errno, "munmap");
}

}  // namespace pyrlk
