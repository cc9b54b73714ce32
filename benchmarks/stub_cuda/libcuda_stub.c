// A libcuda.so.1 that does nothing at once: what the launchers of Triton 3.6 to 3.9 and fastddim/step_kernel.hpp call, as an
// H100 would answer. The environment may say more:
//   STUB_CUDA_RECORD      a file to which every launch and what leads to it is written, a line of JSON each; beside it go the
//                         images that are loaded, named as the lines say
//   STUB_CUDA_MACHINE     a folder with a Unix socket, `socket`, to what executes the launches, and a file, `memory`, for the
//                         device's memory (tests/ptx/stub.py); it needs STUB_CUDA_RECORD
//   STUB_CUDA_CAPABILITY  the compute capability, 90 by default
//   STUB_CUDA_FAIL        "cuName:code": the call that fails, and with what

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "cuda.h"

// Where no loader or allocator puts anything, sanitizers' included, so that an address means the same in two processes.
#define MEMORY ((char *)0x200000000000)

// For the caller to read: kernels launched so far, and the grid of the last one.
unsigned long long stub_launch_count = 0;
int stub_last_grid[3] = {0, 0, 0};

// What executes the launches: takes a line of the record, and answers a CUresult and a text. A caller in this process sets it.
int (*stub_machine)(const char *line, char *text, size_t size) = NULL;

// Its last text: the bytes of a function's parameters, or what is wrong.
static char answer[4096];

static CUcontext current_context = 0;

// Any address but null will do: nobody follows a handle.
static char handle;

// What a module's and its function's handles lead to.
typedef struct {
  int image;
  char entry[64];
  // The bytes of the parameters, as far as a machine says.
  int sizes[64];
  int parameters;
} Loaded;

static FILE *record(void) {
  static FILE *file = NULL;
  static int asked = 0;
  if (!asked) {
    const char *path = getenv("STUB_CUDA_RECORD");
    asked = 1;
    if (path) file = fopen(path, "a");
    if (file) setvbuf(file, NULL, _IOLBF, 0);
  }
  return file;
}

// What STUB_CUDA_FAIL has for a call.
static CUresult fault(const char *call) {
  const char *text = getenv("STUB_CUDA_FAIL");
  size_t length = strlen(call);
  if (!text || strncmp(text, call, length) || text[length] != ':') return CUDA_SUCCESS;
  return (CUresult)atoi(text + length + 1);
}

static int capability(void) {
  const char *text = getenv("STUB_CUDA_CAPABILITY");
  return text ? atoi(text) : 90;
}

static int ask_over_socket(const char *line, char *text, size_t size) {
  static FILE *answers = NULL;
  static int lines = -1;
  int code;
  if (!answers) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s/socket", getenv("STUB_CUDA_MACHINE"));
    lines = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (!connect(lines, (struct sockaddr *)&address, sizeof address)) answers = fdopen(lines, "r");
  }
  snprintf(text, size, "no machine answers in STUB_CUDA_MACHINE");
  if (!answers || dprintf(lines, "%s\n", line) < 0 || fscanf(answers, "%d", &code) != 1 || fgetc(answers) != ' ' ||
      !fgets(text, (int)size, answers))
    return CUDA_ERROR_LAUNCH_FAILED;
  text[strcspn(text, "\n")] = 0;
  return code;
}

// Records a call, and lets the machine do it.
static CUresult tell(const char *format, ...) {
  char line[4096];
  va_list values;
  if (!stub_machine && getenv("STUB_CUDA_MACHINE")) stub_machine = ask_over_socket;
  if (!stub_machine && !record()) return CUDA_SUCCESS;
  va_start(values, format);
  vsnprintf(line, sizeof line, format, values);
  va_end(values);
  if (record()) fprintf(record(), "%s\n", line);
  return stub_machine ? (CUresult)stub_machine(line, answer, sizeof answer) : CUDA_SUCCESS;
}

// Memory of the file that the machine has too, never given out twice; 0 where there is none left.
static CUdeviceptr take_shared(size_t bytes) {
  static size_t size = 0, taken = 0;
  CUdeviceptr address;
  if (!size) {
    char path[4096];
    struct stat status;
    int file;
    snprintf(path, sizeof path, "%s/memory", getenv("STUB_CUDA_MACHINE"));
    file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0 || fstat(file, &status) ||
        mmap(MEMORY, status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, file, 0) != MEMORY ||
        tell("{\"call\": \"map\", \"address\": %llu, \"path\": \"%s\"}", (unsigned long long)MEMORY, path))
      return 0;
    size = status.st_size;
  }
  if (bytes > size - taken) return 0;
  address = (CUdeviceptr)(MEMORY + taken);
  // A gap, so that nothing is at the end of anything.
  taken += (bytes + 511) / 256 * 256;
  if (taken > size) taken = size;
  return address;
}

// Bytes of an image: PTX ends with a zero, and in an ELF file (64 bit) the last section or table ends it.
static size_t image_size(const unsigned char *image) {
  unsigned long long section_table, end, offset, size;
  unsigned short entries;
  unsigned int kind;
  if (memcmp(image, "\x7f" "ELF", 4)) return strlen((const char *)image);
  memcpy(&section_table, image + 40, 8);
  memcpy(&entries, image + 60, 2);
  end = section_table + 64ull * entries;
  memcpy(&offset, image + 32, 8);
  memcpy(&kind, image + 54, 4);
  size = offset + (unsigned long long)(kind & 0xffff) * (kind >> 16);
  if (size > end) end = size;
  for (int i = 0; i < entries; i++) {
    memcpy(&kind, image + section_table + 64ull * i + 4, 4);
    memcpy(&offset, image + section_table + 64ull * i + 24, 8);
    memcpy(&size, image + section_table + 64ull * i + 32, 8);
    // One without contents has a size all the same.
    if (kind != 8 && offset + size > end) end = offset + size;
  }
  return end;
}

static CUresult launch(const Loaded *loaded, const unsigned *grid, const unsigned *block, unsigned shared, CUstream stream,
                       void **params) {
  char text[2048] = "";
  size_t length = 0;
  for (int i = 0; i < loaded->parameters; i++) {
    length += sprintf(text + length, "%s\"", i ? ", " : "");
    for (int k = 0; k < loaded->sizes[i]; k++) length += sprintf(text + length, "%02x", ((unsigned char *)params[i])[k]);
    length += sprintf(text + length, "\"");
  }
  return tell("{\"call\": \"launch\", \"entry\": \"%s\", \"image\": %d, \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], "
              "\"shared\": %u, \"stream\": %llu, \"parameters\": [%s]}",
              loaded->entry, loaded->image, grid[0], grid[1], grid[2], block[0], block[1], block[2], shared,
              (unsigned long long)stream, text);
}

CUresult cuInit(unsigned int flags) { return fault("cuInit"); }

CUresult cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_LAUNCH_FAILED && *answer ? answer : "an error of the stub driver";
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char **name) {
  *name = error == CUDA_ERROR_NO_BINARY_FOR_GPU ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : NULL;
  return *name ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
  *count = 1;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = capability() / 10; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = capability() % 10; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 * 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 228 * 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 1980000; break;
  case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 2619000; break;
  case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 5120; break;
  default: *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)&handle;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease(CUdevice device) { return CUDA_SUCCESS; }

CUresult cuCtxPushCurrent(CUcontext context) {
  current_context = context;
  return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(CUcontext *context) {
  *context = current_context;
  current_context = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize(void) { return CUDA_SUCCESS; }

CUresult cuMemAlloc(CUdeviceptr *address, size_t bytes) {
  CUresult failed = fault("cuMemAlloc");
  if (failed) return failed;
  *address = getenv("STUB_CUDA_MACHINE") ? take_shared(bytes) : (CUdeviceptr)aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (!*address) return CUDA_ERROR_OUT_OF_MEMORY;
  return tell("{\"call\": \"alloc\", \"address\": %llu, \"bytes\": %zu}", *address, bytes);
}

CUresult cuMemFree(CUdeviceptr address) {
  CUresult failed = tell("{\"call\": \"free\", \"address\": %llu}", address);
  if (!getenv("STUB_CUDA_MACHINE")) free((void *)address);
  return failed;
}

CUresult cuMemsetD8(CUdeviceptr address, unsigned char value, size_t bytes) {
  memset((void *)address, value, bytes);
  return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoD(CUdeviceptr to, const void *from, size_t bytes) {
  memcpy((void *)to, from, bytes);
  return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoH(void *to, CUdeviceptr from, size_t bytes) {
  memcpy(to, (const void *)from, bytes);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = current_context;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  current_context = context;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) {
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  static int images = 0;
  CUresult failed = fault("cuModuleLoadData");
  Loaded *loaded;
  if (failed) return failed;
  loaded = calloc(1, sizeof *loaded);
  loaded->image = images++;
  if (record()) {
    char path[4096];
    FILE *file;
    snprintf(path, sizeof path, "%s.%d", getenv("STUB_CUDA_RECORD"), loaded->image);
    file = fopen(path, "wb");
    fwrite(image, 1, image_size(image), file);
    fclose(file);
  }
  *module = (CUmodule)loaded;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {
  CUresult failed = tell("{\"call\": \"unload\", \"image\": %d}", ((Loaded *)module)->image);
  free(module);
  return failed;
}

// A module has one function here, so they share a handle.
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  Loaded *loaded = (Loaded *)module;
  CUresult failed = fault("cuModuleGetFunction");
  const char *path = getenv("STUB_CUDA_RECORD");
  char *sizes = answer;
  if (failed) return failed;
  snprintf(loaded->entry, sizeof loaded->entry, "%s", name);
  *answer = 0;
  failed = tell("{\"call\": \"function\", \"image\": %d, \"entry\": \"%s\", \"path\": \"%s.%d\"}", loaded->image, name,
                path ? path : "", loaded->image);
  for (loaded->parameters = 0; !failed && *sizes && loaded->parameters < 64; sizes += strspn(sizes, ","))
    loaded->sizes[loaded->parameters++] = (int)strtol(sizes, &sizes, 10);
  *function = (CUfunction)module;
  return failed;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return tell("{\"call\": \"attribute\", \"image\": %d, \"attribute\": %d, \"value\": %d}", ((Loaded *)function)->image,
              attribute, value);
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
  *clusters = 1;
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeIm2col(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                 const cuuint64_t *dims, const cuuint64_t *strides, const int *lower, const int *upper,
                                 cuuint32_t channels, cuuint32_t pixels, const cuuint32_t *element_strides,
                                 CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                 CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params, void **extra) {
  stub_launch_count++;
  stub_last_grid[0] = config->gridDimX;
  stub_last_grid[1] = config->gridDimY;
  stub_last_grid[2] = config->gridDimZ;
  if (!record() && !stub_machine) return CUDA_SUCCESS;
  const unsigned block[3] = {config->blockDimX, config->blockDimY, config->blockDimZ};
  return launch((Loaded *)function, (const unsigned *)stub_last_grid, block, config->sharedMemBytes, config->hStream, params);
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **params,
                        void **extra) {
  const unsigned grid[3] = {grid_x, grid_y, grid_z}, block[3] = {block_x, block_y, block_z};
  CUresult failed = fault("cuLaunchKernel");
  return failed ? failed : launch((Loaded *)function, grid, block, shared, stream, params);
}
