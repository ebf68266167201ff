// The CUDA driver by dlopen: device memory that another process can open. No toolkit, no runtime.
//
// exporter:  alloc → ipc_export (handle of the base allocation + offset) → … → free
// importer:  ipc_open (base) → base + offset → … → ipc_close, before the exporter frees
//
// Every call runs in the device's primary context, the one that torch uses. The library is
// libcuda.so.1, or what PYRLK_LIBCUDA names. Without it every function throws CudaError.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace pyrlk::cuda {

struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Uuid = std::array<unsigned char, 16>;
using Handle = std::array<unsigned char, 64>;
using Address = std::uint64_t;

struct Export {
  Handle handle;         // of the whole allocation
  std::uint64_t offset;  // of the exported address in it
  std::uint64_t bytes;   // of the allocation
};

// Empty where the driver works; else why it does not, in one sentence.
std::string unavailable();

int device_count();
Uuid device_uuid(int device);
// The ordinal of a GPU here; throws where this process does not see it.
int device_by_uuid(const Uuid& uuid);

Address alloc(int device, std::uint64_t bytes);
void free(int device, Address address);

Export ipc_export(int device, Address address);
Address ipc_open(int device, const Handle& handle);
void ipc_close(int device, Address base);

// Ordered after all work of the device; return when the bytes have arrived.
void copy_to_host(int device, void* dst, Address src, std::uint64_t bytes);
void copy_to_device(int device, Address dst, const void* src, std::uint64_t bytes);
void synchronize(int device);

}  // namespace pyrlk::cuda
