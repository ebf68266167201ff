#include "memory/cuda_driver.h"

#include <dlfcn.h>
#include <stdlib.h>

#include <algorithm>
#include <initializer_list>
#include <iterator>
#include <map>
#include <mutex>

namespace pyrlk::cuda {
namespace {

// The driver's ABI, as far as it is used here (cuda.h of CUDA 11 and later).
using Result = int;
using Device = int;
using Context = void*;
constexpr Result kSuccess = 0;
constexpr Result kInvalidValue = 1;
constexpr unsigned kLazyPeerAccess = 1;

struct IpcHandle {
  unsigned char reserved[64];
};

struct Driver {
  Result (*init)(unsigned);
  Result (*error_name)(Result, const char**);
  Result (*error_string)(Result, const char**);
  Result (*device_get_count)(int*);
  Result (*device_get)(Device*, int);
  Result (*device_get_uuid)(void*, Device);
  Result (*primary_retain)(Context*, Device);
  Result (*ctx_push)(Context);
  Result (*ctx_pop)(Context*);
  Result (*ctx_synchronize)();
  Result (*mem_alloc)(Address*, std::size_t);
  Result (*mem_free)(Address);
  Result (*address_range)(Address*, std::size_t*, Address);
  Result (*ipc_get)(IpcHandle*, Address);
  Result (*ipc_open)(Address*, IpcHandle, unsigned);
  Result (*ipc_close)(Address);
  Result (*copy_dtoh)(void*, Address, std::size_t);
  Result (*copy_htod)(Address, const void*, std::size_t);

  std::string path;
  std::string problem;  // empty: loaded and initialised
  std::mutex mutex;
  std::map<int, Context> contexts;
};

template <typename F>
bool find(void* library, F& function, std::initializer_list<const char*> names) {
  for (const char* name : names) {
    if (void* symbol = dlsym(library, name)) {
      function = reinterpret_cast<F>(symbol);
      return true;
    }
  }
  return false;
}

std::string describe(const Driver& driver, Result result) {
  const char* name = nullptr;
  const char* text = nullptr;
  if (driver.error_name != nullptr) driver.error_name(result, &name);
  if (driver.error_string != nullptr) driver.error_string(result, &text);
  return std::string(name != nullptr ? name : "CUDA error " + std::to_string(result)) +
         (text != nullptr ? std::string(" (") + text + ")" : "");
}

std::string library_path() {
  const char* path = getenv("PYRLK_LIBCUDA");
  return path != nullptr && *path != '\0' ? path : "libcuda.so.1";
}

void load(Driver& d) {
  void* library = dlopen(d.path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* why = dlerror();
    d.problem = std::string("no CUDA driver: ") + (why != nullptr ? why : d.path);
    return;
  }
  const bool complete =
      find(library, d.init, {"cuInit"}) && find(library, d.error_name, {"cuGetErrorName"}) &&
      find(library, d.error_string, {"cuGetErrorString"}) &&
      find(library, d.device_get_count, {"cuDeviceGetCount"}) &&
      find(library, d.device_get, {"cuDeviceGet"}) &&
      find(library, d.device_get_uuid, {"cuDeviceGetUuid_v2", "cuDeviceGetUuid"}) &&
      find(library, d.primary_retain, {"cuDevicePrimaryCtxRetain"}) &&
      find(library, d.ctx_push, {"cuCtxPushCurrent_v2"}) &&
      find(library, d.ctx_pop, {"cuCtxPopCurrent_v2"}) &&
      find(library, d.ctx_synchronize, {"cuCtxSynchronize"}) &&
      find(library, d.mem_alloc, {"cuMemAlloc_v2"}) &&
      find(library, d.mem_free, {"cuMemFree_v2"}) &&
      find(library, d.address_range, {"cuMemGetAddressRange_v2"}) &&
      find(library, d.ipc_get, {"cuIpcGetMemHandle"}) &&
      find(library, d.ipc_open, {"cuIpcOpenMemHandle_v2", "cuIpcOpenMemHandle"}) &&
      find(library, d.ipc_close, {"cuIpcCloseMemHandle"}) &&
      find(library, d.copy_dtoh, {"cuMemcpyDtoH_v2"}) &&
      find(library, d.copy_htod, {"cuMemcpyHtoD_v2"});
  if (!complete) {
    d.problem = d.path + " lacks a function of the CUDA driver API: update the driver";
    return;
  }
  if (const Result result = d.init(0)) d.problem = "cuInit: " + describe(d, result);
}

// Kept to the end of the process: a context must outlive every pointer into it. One that was not
// there is looked for again where PYRLK_LIBCUDA has changed: a fork may name another.
Driver& driver_or_problem() {
  static std::mutex mutex;
  static Driver* driver = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::string path = library_path();
  if (driver == nullptr || (!driver->problem.empty() && driver->path != path)) {
    auto* d = new Driver{};
    d->path = path;
    load(*d);
    driver = d;
  }
  return *driver;
}

Driver& driver() {
  Driver& d = driver_or_problem();
  if (!d.problem.empty()) throw CudaError(d.problem);
  return d;
}

void check(const Driver& d, Result result, const std::string& what) {
  if (result != kSuccess) throw CudaError(what + ": " + describe(d, result));
}

Device device_of(const Driver& d, int ordinal) {
  Device device;
  check(d, d.device_get(&device, ordinal), "cuDeviceGet(" + std::to_string(ordinal) + ")");
  return device;
}

// The primary context of a device, current for as long as this object lives.
class Scope {
 public:
  Scope(Driver& d, int ordinal) : driver_(d) {
    Context context;
    {
      const std::lock_guard<std::mutex> lock(d.mutex);
      auto it = d.contexts.find(ordinal);
      if (it == d.contexts.end()) {
        Context retained;
        check(d, d.primary_retain(&retained, device_of(d, ordinal)), "cuDevicePrimaryCtxRetain");
        it = d.contexts.emplace(ordinal, retained).first;
      }
      context = it->second;
    }
    check(d, d.ctx_push(context), "cuCtxPushCurrent");
  }
  ~Scope() {
    Context popped;
    driver_.ctx_pop(&popped);
  }
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;

 private:
  Driver& driver_;
};

}  // namespace

std::string unavailable() {
  const Driver& d = driver_or_problem();
  if (!d.problem.empty()) return d.problem;
  int count = 0;
  if (const Result result = d.device_get_count(&count)) {
    return "cuDeviceGetCount: " + describe(d, result);
  }
  return count > 0 ? "" : "the CUDA driver sees no GPU";
}

int device_count() {
  Driver& d = driver();
  int count = 0;
  check(d, d.device_get_count(&count), "cuDeviceGetCount");
  return count;
}

Uuid device_uuid(int device) {
  Driver& d = driver();
  Uuid uuid{};
  check(d, d.device_get_uuid(uuid.data(), device_of(d, device)), "cuDeviceGetUuid");
  return uuid;
}

int device_by_uuid(const Uuid& uuid) {
  const int count = device_count();
  for (int device = 0; device < count; ++device) {
    if (device_uuid(device) == uuid) return device;
  }
  static const char* digits = "0123456789abcdef";
  std::string text = "GPU-";
  for (std::size_t i = 0; i < uuid.size(); ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    text += digits[uuid[i] >> 4];
    text += digits[uuid[i] & 15];
  }
  throw CudaError(text + " is not among the " + std::to_string(count) +
                  " GPUs that this process sees: check CUDA_VISIBLE_DEVICES");
}

Address alloc(int device, std::uint64_t bytes) {
  Driver& d = driver();
  const Scope scope(d, device);
  Address address = 0;
  check(d, d.mem_alloc(&address, bytes), "cuMemAlloc of " + std::to_string(bytes) + " bytes");
  return address;
}

void free(int device, Address address) {
  Driver& d = driver();
  const Scope scope(d, device);
  check(d, d.mem_free(address), "cuMemFree");
}

Export ipc_export(int device, Address address) {
  Driver& d = driver();
  const Scope scope(d, device);
  Address base = 0;
  std::size_t bytes = 0;
  check(d, d.address_range(&base, &bytes, address), "cuMemGetAddressRange");
  IpcHandle handle;
  const Result result = d.ipc_get(&handle, base);
  if (result == kInvalidValue) {
    throw CudaError("cuIpcGetMemHandle: " + describe(d, result) +
                    ": this memory does not come from cuMemAlloc or cudaMalloc (virtual-memory "
                    "allocators such as expandable_segments cannot be exported this way); copy it "
                    "into a buffer that does");
  }
  check(d, result, "cuIpcGetMemHandle");
  Export out{};
  std::copy(std::begin(handle.reserved), std::end(handle.reserved), out.handle.begin());
  out.offset = address - base;
  out.bytes = bytes;
  return out;
}

Address ipc_open(int device, const Handle& handle) {
  Driver& d = driver();
  const Scope scope(d, device);
  IpcHandle raw;
  std::copy(handle.begin(), handle.end(), std::begin(raw.reserved));
  Address base = 0;
  check(d, d.ipc_open(&base, raw, kLazyPeerAccess),
        "cuIpcOpenMemHandle (two processes in one container, or with the same pid and ipc "
        "namespaces, are needed)");
  return base;
}

void ipc_close(int device, Address base) {
  Driver& d = driver();
  const Scope scope(d, device);
  check(d, d.ipc_close(base), "cuIpcCloseMemHandle");
}

void copy_to_host(int device, void* dst, Address src, std::uint64_t bytes) {
  Driver& d = driver();
  const Scope scope(d, device);
  check(d, d.ctx_synchronize(), "cuCtxSynchronize");
  check(d, d.copy_dtoh(dst, src, bytes), "cuMemcpyDtoH");
}

void copy_to_device(int device, Address dst, const void* src, std::uint64_t bytes) {
  Driver& d = driver();
  const Scope scope(d, device);
  check(d, d.ctx_synchronize(), "cuCtxSynchronize");
  check(d, d.copy_htod(dst, src, bytes), "cuMemcpyHtoD");
  check(d, d.ctx_synchronize(), "cuCtxSynchronize");
}

void synchronize(int device) {
  Driver& d = driver();
  const Scope scope(d, device);
  check(d, d.ctx_synchronize(), "cuCtxSynchronize");
}

}  // namespace pyrlk::cuda
