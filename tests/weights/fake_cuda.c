// A CUDA driver for tests: "device memory" is a shared file, a handle is its path. It keeps the
// driver's rules: handles are of whole allocations, the exporter cannot open its own, a double close
// is an error; and it writes each call to $FAKE_CUDA_LOG. $FAKE_CUDA_FAIL is "<call> <anything>": for
// each new value that call fails once; "<call>*2 <anything>": twice.
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef int CUresult;
typedef unsigned long long CUdeviceptr;
typedef struct {
  char path[52];
  int pid;
  size_t bytes;
} Reserved;
typedef struct {
  char reserved[64];
} CUipcMemHandle;

enum { kAllocations = 64, kSkew = 2048 };
static struct {
  char* base;
  size_t bytes;
  char path[52];
  int opened;
} table[kAllocations];

static void note(const char* what) {
  const char* log = getenv("FAKE_CUDA_LOG");
  if (log == NULL) return;
  char text[128];
  int length = snprintf(text, sizeof text, "%d %s\n", (int)getpid(), what);
  int fd = open(log, O_WRONLY | O_APPEND | O_CREAT, 0600);
  if (write(fd, text, (size_t)length) != length) abort();
  close(fd);
}

static int fails(const char* what) {
  static char done[64];
  static int left;
  const char* wanted = getenv("FAKE_CUDA_FAIL");
  const size_t length = strlen(what);
  if (wanted == NULL || strncmp(wanted, what, length) != 0) return 0;
  if (wanted[length] != ' ' && wanted[length] != '*') return 0;
  if (strcmp(wanted, done) != 0) {
    strncpy(done, wanted, sizeof done - 1);
    left = wanted[length] == '*' ? atoi(wanted + length + 1) : 1;
  }
  if (left == 0) return 0;
  --left;
  note("failed");
  return 1;
}

static int find(CUdeviceptr at) {
  for (int i = 0; i < kAllocations; ++i) {
    char* p = (char*)at;
    if (table[i].base != NULL && p >= table[i].base && p < table[i].base + table[i].bytes) return i;
  }
  return -1;
}

static int map(const char* path, size_t bytes, int opened) {
  int i = 0;
  while (i < kAllocations && table[i].base != NULL) ++i;
  if (i == kAllocations) return -1;
  int fd = open(path, O_RDWR | O_CREAT, 0600);
  if (fd < 0 || ftruncate(fd, (off_t)bytes) != 0) return -1;
  table[i].base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  table[i].bytes = bytes;
  table[i].opened = opened;
  strcpy(table[i].path, path);
  return i;
}

CUresult cuInit(unsigned flags) { return flags != 0 || getenv("FAKE_CUDA_BROKEN") ? 999 : 0; }
CUresult cuGetErrorName(CUresult e, const char** s) {
  *s = e == 1 ? "CUDA_ERROR_INVALID_VALUE" : e == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_FAKE";
  return 0;
}
CUresult cuGetErrorString(CUresult e, const char** s) {
  (void)e;
  *s = "fake";
  return 0;
}
CUresult cuDeviceGetCount(int* n) {
  *n = 2;
  return 0;
}
CUresult cuDeviceGet(int* d, int i) {
  *d = i;
  return i >= 0 && i < 2 ? 0 : 101;
}
// $FAKE_CUDA_SWAP: this process sees the two GPUs in the other order.
CUresult cuDeviceGetUuid(void* uuid, int d) {
  if (fails("uuid")) return 999;
  memset(uuid, 0xa0 + (getenv("FAKE_CUDA_SWAP") ? 1 - d : d), 16);
  return 0;
}
CUresult cuDevicePrimaryCtxRetain(void** c, int d) {
  *c = (void*)(size_t)(d + 1);
  return 0;
}
static int depth = 0;
CUresult cuCtxPushCurrent_v2(void* c) {
  if (fails("push")) return 999;
  if (c == NULL) return 201;
  ++depth;
  return 0;
}
CUresult cuCtxPopCurrent_v2(void** c) {
  *c = NULL;
  return --depth < 0 ? 201 : 0;
}
CUresult cuCtxSynchronize(void) {
  if (fails("sync")) return 999;
  note("sync");
  return depth == 1 ? 0 : 201;
}
CUresult cuMemAlloc_v2(CUdeviceptr* p, size_t bytes) {
  if (fails("alloc")) return 999;
  static int count = 0;
  char path[52];
  if (bytes > (size_t)1 << 32) return 2;
  if (snprintf(path, sizeof path, "/dev/shm/pyrlk-fake-%d-%d", (int)getpid(), count++) < 0) return 1;
  // As the driver does: several requests share one allocation, this one starts inside it.
  int i = map(path, bytes + kSkew, 0);
  if (i < 0) return 2;
  *p = (CUdeviceptr)table[i].base + kSkew;
  note("alloc");
  return 0;
}
static CUresult drop(CUdeviceptr p, int opened) {
  int i = find(p);
  if (i < 0 || table[i].opened != opened) return 1;
  munmap(table[i].base, table[i].bytes);
  if (!opened) unlink(table[i].path);
  table[i].base = NULL;
  return 0;
}
CUresult cuMemFree_v2(CUdeviceptr p) {
  if (fails("free")) return 999;
  note("free");
  return drop(p, 0);
}
CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* bytes, CUdeviceptr p) {
  if (fails("range")) return 999;
  int i = find(p);
  if (i < 0) return 1;
  *base = (CUdeviceptr)table[i].base;
  *bytes = table[i].bytes;
  return 0;
}
CUresult cuIpcGetMemHandle(CUipcMemHandle* handle, CUdeviceptr p) {
  if (fails("export")) return 999;
  int i = find(p);
  if (getenv("FAKE_CUDA_NO_EXPORT") || i < 0 || (char*)p != table[i].base) return 1;
  Reserved r = {.pid = (int)getpid(), .bytes = table[i].bytes};
  strcpy(r.path, table[i].path);
  memset(handle, 0, sizeof *handle);
  memcpy(handle, &r, sizeof r);
  note("export");
  return 0;
}
CUresult cuIpcOpenMemHandle_v2(CUdeviceptr* p, CUipcMemHandle handle, unsigned flags) {
  if (fails("open")) return 999;
  Reserved r;
  memcpy(&r, &handle, sizeof r);
  if (flags != 1 || access(r.path, R_OK) != 0) return 1;
  if (r.pid == (int)getpid()) return 201;
  int i = map(r.path, r.bytes, 1);
  if (i < 0) return 1;
  *p = (CUdeviceptr)table[i].base;
  note("open");
  return 0;
}
CUresult cuIpcCloseMemHandle(CUdeviceptr p) {
  if (fails("close")) return 999;
  note("close");
  return drop(p, 1);
}
CUresult cuMemcpyDtoH_v2(void* d, CUdeviceptr s, size_t n) {
  memcpy(d, (void*)s, n);
  return 0;
}
CUresult cuMemcpyHtoD_v2(CUdeviceptr d, const void* s, size_t n) {
  memcpy((void*)d, s, n);
  return 0;
}
