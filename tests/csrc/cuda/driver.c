/* libcuda.so.1 for a machine without a GPU: kernels "load" and their launches are written down, byte for byte.

   What Triton's own launcher asks a driver for, no more. Addresses are the host's; a tensor map is made of its address,
   first, and a digest of everything else it was encoded from. */
#include <cuda.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MOST_PARAMETERS 128
#define EXPORT __attribute__((visibility("default")))

static int sizes[MOST_PARAMETERS], parameters;
static unsigned char* written;
static size_t used, room;

static void append(const void* bytes, size_t n) {
  if (used + n > room) written = realloc(written, room = 2 * (used + n));
  memcpy(written + used, bytes, n);
  used += n;
}

/* The sizes of the parameters of the next kernel to be launched. */
EXPORT void expect(int n, const int* bytes) {
  parameters = n;
  memcpy(sizes, bytes, n * sizeof(int));
}

/* Everything launched since: function, grid, block, shared memory as seven 64-bit numbers and one more, parameters. */
EXPORT size_t take(const unsigned char** bytes) {
  size_t n = used;
  *bytes = written;
  used = 0;
  return n;
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** kernel_parameters, void** extra) {
  uint64_t head[8] = {(uintptr_t)f, c->gridDimX,  c->gridDimY,  c->gridDimZ,
                      c->blockDimX, c->blockDimY, c->blockDimZ, c->sharedMemBytes};
  append(head, sizeof head);
  for (int i = 0; i < parameters; i++) append(kernel_parameters[i], sizes[i]);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                       const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion l2,
                                       CUtensorMapFloatOOBfill fill) {
  uint64_t about[16] = {(uintptr_t)address, type, rank, interleave, swizzle, l2, fill};
  for (cuuint32_t i = 0; i < rank && i < 2; i++) {
    about[7 + i] = dims[i];
    about[9 + i] = i + 1 < rank ? strides[i] : 0;
    about[11 + i] = box[i];
    about[13 + i] = steps[i];
  }
  if ((uintptr_t)address % 16 || rank > 2) return CUDA_ERROR_INVALID_VALUE;
  for (cuuint32_t i = 0; i + 1 < rank; i++)
    if (strides[i] % 16) return CUDA_ERROR_INVALID_VALUE;
  memcpy(map, about, sizeof about);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = (CUmodule)1;
  return memcmp(image, "\177ELF", 4) ? CUDA_ERROR_INVALID_IMAGE : CUDA_SUCCESS;
}
EXPORT CUresult cuModuleGetFunction(CUfunction* f, CUmodule module, const char* name) {
  static uintptr_t loaded;
  *f = (CUfunction)++loaded;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction f) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR   ? 9
           : attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT     ? 132
           : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? 0
                                                                       : 227 << 10; /* bytes of shared memory */
  return CUDA_SUCCESS;
}
EXPORT CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  memcpy(value, &pointer, sizeof pointer);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetCurrent(CUcontext* context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
EXPORT CUresult cuGetErrorString(CUresult error, const char** text) { return *text = "refused", CUDA_SUCCESS; }

EXPORT CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
EXPORT CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache cache) { return CUDA_SUCCESS; }

/* Linked, never called. */
__attribute__((used)) static CUresult unused(void) { return CUDA_ERROR_UNKNOWN; }
#define UNUSED(name) __asm__(".globl " #name "\n.set " #name ", unused");
UNUSED(cuCtxGetDevice)
UNUSED(cuCtxGetLimit)
UNUSED(cuCtxSetCurrent)
UNUSED(cuCtxSetLimit)
UNUSED(cuDevicePrimaryCtxRetain)
UNUSED(cuModuleUnload)
UNUSED(cuOccupancyMaxActiveClusters)
UNUSED(cuStreamIsCapturing)
UNUSED(cuTensorMapEncodeIm2col)
