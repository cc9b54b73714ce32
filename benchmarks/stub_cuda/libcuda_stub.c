// A libcuda.so.1 that does nothing at once: what the launchers of Triton 3.6 to 3.9 and fastddim/step_kernel.hpp call, as an
// H100 would answer. The environment may say more:
//   STUB_CUDA_RECORD      a file to which every launch and what leads to it is written, a line of JSON each; beside it go the
//                         images that are loaded, named as the lines say
//   STUB_CUDA_PARAMETERS  "entry:8,8,4;entry:8": the bytes of each kernel's parameters, which launches are recorded by
//   STUB_CUDA_CAPABILITY  the compute capability, 90 by default
//   STUB_CUDA_FAIL        "cuName:code": the call that fails, and with what

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

// For the caller to read: kernels launched so far, and the grid of the last one.
unsigned long long stub_launch_count = 0;
int stub_last_grid[3] = {0, 0, 0};

static CUcontext current_context = 0;

// Any address but null will do: nobody follows a handle.
static char handle;

// What a module's and its function's handles lead to.
typedef struct {
  int image;
  char entry[64];
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

static void record_launch(const Loaded *loaded, const unsigned *grid, const unsigned *block, unsigned shared,
                          CUstream stream, void **params) {
  FILE *file = record();
  const char *text = getenv("STUB_CUDA_PARAMETERS");
  size_t length = strlen(loaded->entry);
  if (!file) return;
  while (text && (strncmp(text, loaded->entry, length) || text[length] != ':')) {
    text = strchr(text, ';');
    if (text) text++;
  }
  fprintf(file, "{\"call\": \"launch\", \"entry\": \"%s\", \"image\": %d, \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], ",
          loaded->entry, loaded->image, grid[0], grid[1], grid[2], block[0], block[1], block[2]);
  fprintf(file, "\"shared\": %u, \"stream\": %llu, \"parameters\": [", shared, (unsigned long long)stream);
  if (text) {
    text += length;
    for (int i = 0; *text == ':' || *text == ','; i++) {
      char *end;
      long bytes = strtol(text + 1, &end, 10);
      fprintf(file, "%s\"", i ? ", " : "");
      for (long k = 0; k < bytes; k++) fprintf(file, "%02x", ((unsigned char *)params[i])[k]);
      fprintf(file, "\"");
      text = end;
    }
  }
  fprintf(file, "]}\n");
}

CUresult cuInit(unsigned int flags) { return fault("cuInit"); }

CUresult cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "an error of the stub driver";
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
  *address = (CUdeviceptr)aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (record()) fprintf(record(), "{\"call\": \"alloc\", \"address\": %llu, \"bytes\": %zu}\n", *address, bytes);
  return *address ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuMemFree(CUdeviceptr address) {
  free((void *)address);
  return CUDA_SUCCESS;
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
  if (record()) fprintf(record(), "{\"call\": \"unload\", \"image\": %d}\n", ((Loaded *)module)->image);
  free(module);
  return CUDA_SUCCESS;
}

// A module has one function here, so they share a handle.
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  CUresult failed = fault("cuModuleGetFunction");
  snprintf(((Loaded *)module)->entry, sizeof ((Loaded *)module)->entry, "%s", name);
  *function = (CUfunction)module;
  return failed;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (record())
    fprintf(record(), "{\"call\": \"attribute\", \"image\": %d, \"attribute\": %d, \"value\": %d}\n",
            ((Loaded *)function)->image, attribute, value);
  return CUDA_SUCCESS;
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
  if (record()) {
    const unsigned block[3] = {config->blockDimX, config->blockDimY, config->blockDimZ};
    record_launch((Loaded *)function, (const unsigned *)stub_last_grid, block, config->sharedMemBytes, config->hStream, params);
  }
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **params,
                        void **extra) {
  const unsigned grid[3] = {grid_x, grid_y, grid_z}, block[3] = {block_x, block_y, block_z};
  CUresult failed = fault("cuLaunchKernel");
  if (!failed) record_launch((Loaded *)function, grid, block, shared, stream, params);
  return failed;
}
