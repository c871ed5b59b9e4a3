/*
 * CANN on host memory: the C functions that torch_npu's shared library is linked against or looks up by name.
 *
 * Device memory is host memory, streams run at once, and there is no kernel: what would launch one returns an error, so
 * that nothing is left uncomputed in silence. The kernels themselves are in Python (aten.py, fused/). One source serves
 * every CANN library that torch_npu needs; it is compiled once per library name (cann.py).
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <search.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define ERROR_INVALID_PARAMETER 107000
#define ERROR_CONTEXT_NULL 107002
#define ERROR_OUT_OF_MEMORY 207001
#define ERROR_NOT_SUPPORTED 207000

/* ---- Errors: the last one is read back by torch_npu and becomes part of the exception's message. ---- */

static __thread char last_error[512];

const char *aclGetRecentErrMsg(void) { return last_error; }
/* For other files: each library has its own copy of this one, and only the first one's is asked. */
void simulator_set_error(const char *message) { snprintf(last_error, sizeof last_error, "%s", message); }

static int refuse(const char *what, const char *name) {
    snprintf(last_error, sizeof last_error, "npu_patch.simulator does not emulate %s %s", what, name ? name : "");
    return ERROR_NOT_SUPPORTED;
}

int aclopCompileAndExecute(const char *operator_type) { return refuse("the operator", operator_type); }
int aclopCompileAndExecuteV2(const char *operator_type) { return refuse("the operator", operator_type); }
int rtKernelLaunch(void) { return refuse("kernel launches by", "rtKernelLaunch"); }
int aclrtLaunchKernelWithHostArgs(void) { return refuse("kernel launches by", "aclrtLaunchKernelWithHostArgs"); }
int aclrtBinaryLoadFromData(void) { return refuse("device binaries:", "aclrtBinaryLoadFromData"); }
int aclrtBinaryGetFunction(void) { return refuse("device binaries:", "aclrtBinaryGetFunction"); }

/* Virtual memory (expandable segments) and memory shared between processes. */
#define UNSUPPORTED(name) int name(void) { return refuse("the runtime function", #name); }
UNSUPPORTED(aclrtReserveMemAddress) UNSUPPORTED(aclrtReleaseMemAddress)
UNSUPPORTED(aclrtMallocPhysical) UNSUPPORTED(aclrtFreePhysical)
UNSUPPORTED(aclrtMapMem) UNSUPPORTED(aclrtUnmapMem)
UNSUPPORTED(aclrtMemExportToShareableHandle) UNSUPPORTED(aclrtMemImportFromShareableHandle)
UNSUPPORTED(aclrtMemSetPidToShareableHandle)

/* ---- Devices. ---- */

#define MOST_DEVICES 16
static int device_count = 1;
static uint64_t memory_of_a_device = 64ull << 30; /* Ascend910B3: 64 GB; set by cann.py to what the host can hold. */
static uint64_t memory_used[MOST_DEVICES];
static pthread_mutex_t memory_lock = PTHREAD_MUTEX_INITIALIZER;
static int poison;
static __thread int current_device = -1; /* as on a real NPU: a thread has none until it sets one */
static char contexts[MOST_DEVICES];
static char opened[MOST_DEVICES];

/* Called by cann.py right after loading. */
void simulator_configure(int devices, uint64_t bytes, int poison_memory) {
    device_count = devices;
    memory_of_a_device = bytes;
    poison = poison_memory;
}

const char *aclrtGetSocName(void) { return "Ascend910B3"; }
int aclrtGetDeviceCount(uint32_t *count) { *count = (uint32_t)device_count; return 0; }
/* torch_npu asks before it sets a device. Were the answer 0, it would never set device 0, and so never note that the
 * device is in use: empty_cache() goes over the devices in use. */
int aclrtGetDevice(int32_t *device) {
    if (current_device < 0) return ERROR_CONTEXT_NULL;
    *device = current_device;
    return 0;
}
int aclrtSetDevice(int32_t device) {
    if (device < 0 || device >= device_count) return ERROR_INVALID_PARAMETER;
    current_device = device;
    opened[device] = 1;
    return 0;
}
int aclrtGetCurrentContext(void **context) {
    if (current_device < 0) return ERROR_CONTEXT_NULL;
    *context = &contexts[current_device];
    return 0;
}
int aclrtSetCurrentContext(void *context) {
    ptrdiff_t device = (char *)context - contexts;
    return device >= 0 && device < device_count ? aclrtSetDevice((int)device) : ERROR_INVALID_PARAMETER;
}
int aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) {
    if (device < 0 || device >= device_count) return ERROR_INVALID_PARAMETER;
    if (flags) *flags = 0;
    *active = opened[device];
    return 0;
}
int aclrtGetLogicDevIdByUserDevId(int32_t user, int32_t *logical) { *logical = user; return 0; }
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) { *can = 0; return 0; }
int aclrtDeviceGetBareTgid(int32_t *process) { *process = getpid(); return 0; }
int aclrtDeviceGetUuid(int32_t device, char *uuid) { memset(uuid, 0, 16); uuid[15] = (char)device; return 0; }

/* ---- Memory. Each block has a header, so that freeing it can be accounted for. ---- */

typedef struct Header { uint64_t bytes; int device; struct Header *previous, *next; } Header;
#define HEADER_BYTES 512 /* keeps the 512-byte alignment that CANN guarantees */
#define POISON 0xFF      /* NaN in float64, float32, float16, bfloat16 and the 8-bit floats of CANN; -1 in integers */

static Header *live_blocks; /* a graph keeps addresses only, and asks before it runs whether they still are the device's */
static uint64_t blocks_freed;

uint64_t simulator_blocks_freed(void) { return blocks_freed; }
int simulator_is_allocated(const char *pointer) {
    pthread_mutex_lock(&memory_lock);
    Header *block = live_blocks;
    while (block && !(pointer >= (char *)block + HEADER_BYTES && pointer < (char *)block + HEADER_BYTES + block->bytes))
        block = block->next;
    pthread_mutex_unlock(&memory_lock);
    return block != NULL;
}

static int allocate(void **pointer, size_t bytes) {
    if (current_device < 0) return ERROR_CONTEXT_NULL;
    size_t rounded = (bytes + 32 + 511) / 512 * 512;
    pthread_mutex_lock(&memory_lock);
    int fits = memory_used[current_device] + rounded <= memory_of_a_device;
    if (fits) memory_used[current_device] += rounded;
    pthread_mutex_unlock(&memory_lock);
    char *block = fits ? aligned_alloc(512, rounded + HEADER_BYTES) : NULL;
    if (!block) {
        if (fits) {
            pthread_mutex_lock(&memory_lock);
            memory_used[current_device] -= rounded;
            pthread_mutex_unlock(&memory_lock);
        }
        snprintf(last_error, sizeof last_error, "out of device memory: %zu bytes asked for", bytes);
        return ERROR_OUT_OF_MEMORY;
    }
    Header *header = (Header *)block;
    *header = (Header){.bytes = rounded, .device = current_device};
    pthread_mutex_lock(&memory_lock);
    header->next = live_blocks;
    if (live_blocks) live_blocks->previous = header;
    live_blocks = header;
    pthread_mutex_unlock(&memory_lock);
    *pointer = block + HEADER_BYTES;
    if (poison) memset(*pointer, POISON, rounded);
    return 0;
}
int aclrtMalloc(void **pointer, size_t bytes, int policy) { return allocate(pointer, bytes); }
int aclrtMallocAlign32(void **pointer, size_t bytes, int policy) { return allocate(pointer, bytes); }
int aclrtFree(void *pointer) {
    if (!pointer) return 0;
    char *block = (char *)pointer - HEADER_BYTES;
    Header *header = (Header *)block;
    pthread_mutex_lock(&memory_lock);
    memory_used[header->device] -= header->bytes;
    *(header->previous ? &header->previous->next : &live_blocks) = header->next;
    if (header->next) header->next->previous = header->previous;
    blocks_freed++;
    pthread_mutex_unlock(&memory_lock);
    if (poison) memset(pointer, POISON, header->bytes);
    free(block);
    return 0;
}
int aclrtGetMemInfo(int kind, size_t *free_bytes, size_t *total_bytes) {
    pthread_mutex_lock(&memory_lock);
    if (current_device < 0) {
        pthread_mutex_unlock(&memory_lock);
        return ERROR_CONTEXT_NULL;
    }
    *total_bytes = memory_of_a_device;
    *free_bytes = memory_of_a_device - memory_used[current_device];
    pthread_mutex_unlock(&memory_lock);
    return 0;
}
int aclrtMallocHost(void **pointer, size_t bytes) {
    *pointer = aligned_alloc(512, (bytes + 511) / 512 * 512 + 512);
    return *pointer ? 0 : ERROR_OUT_OF_MEMORY;
}
int aclrtMallocHostWithCfg(void **pointer, size_t bytes, void *config) { return aclrtMallocHost(pointer, bytes); }
int aclrtFreeHost(void *pointer) { free(pointer); return 0; }

int aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int kind) {
    if (bytes > room) return ERROR_INVALID_PARAMETER;
    memmove(to, from, bytes);
    return 0;
}
int aclrtMemset(void *to, size_t room, int32_t value, size_t bytes) {
    if (bytes > room) return ERROR_INVALID_PARAMETER;
    memset(to, value, bytes);
    return 0;
}

/* ---- Poison within torch_npu's caching allocator: it reports each block that it hands out and takes back to a memory
 * checker, if one was preloaded (device.py says so while torch_npu asks). ---- */

typedef struct { uint32_t device; const void *pointer; uint64_t bytes; } Range;                  /* mstxMemVirtualRangeDesc_t */
typedef struct { void *heap; int kind; size_t count; const Range *ranges; void **made; } Ranges; /* mstxMemRegionsRegisterBatch_t */
typedef struct { int kind; const void *pointer; } Reference;                                     /* mstxMemRegionRef_t */
typedef struct { size_t count; const Reference *references; } References;                        /* mstxMemRegionsUnregisterBatch_t */

static void *blocks; /* a search tree of Range by pointer: what is taken back comes without its size */
static int by_pointer(const void *a, const void *b) {
    const char *left = ((const Range *)a)->pointer, *right = ((const Range *)b)->pointer;
    return left < right ? -1 : left > right;
}
void *mstxDomainCreateA(const char *name) { return &blocks; }
void *mstxMemHeapRegister(void *domain, const void *description) { return &blocks; }
void mstxMemRegionsRegister(void *domain, const Ranges *batch) {
    for (size_t i = 0; i < batch->count; i++) {
        Range *block = malloc(sizeof *block);
        if (!block) abort(); /* unpoisoned memory would be a wrong answer */
        *block = batch->ranges[i];
        memset((void *)block->pointer, POISON, block->bytes);
        pthread_mutex_lock(&memory_lock);
        Range *kept = *(Range **)tsearch(block, &blocks, by_pointer);
        if (kept != block) {
            kept->bytes = block->bytes;
            free(block);
        }
        pthread_mutex_unlock(&memory_lock);
    }
}
void mstxMemRegionsUnregister(void *domain, const References *batch) {
    for (size_t i = 0; i < batch->count; i++) {
        Range wanted = {.pointer = batch->references[i].pointer};
        pthread_mutex_lock(&memory_lock);
        Range **found = tfind(&wanted, &blocks, by_pointer), *block = found ? *found : NULL;
        if (block) tdelete(block, &blocks, by_pointer);
        pthread_mutex_unlock(&memory_lock);
        if (block) memset((void *)block->pointer, POISON, block->bytes);
        free(block);
    }
}

/* ---- Settings that torch_npu writes and reads back (determinism). ---- */

static int64_t settings[64];
static int read_setting(int name, int64_t *value) { *value = name >= 0 && name < 64 ? settings[name] : 0; return 0; }
static int write_setting(int name, int64_t value) { if (name >= 0 && name < 64) settings[name] = value; return 0; }
int aclrtGetSysParamOpt(int name, int64_t *value) { return read_setting(name, value); }
int aclrtSetSysParamOpt(int name, int64_t value) { return write_setting(name, value); }
int aclrtCtxGetSysParamOpt(int name, int64_t *value) { return read_setting(name, value); }
int aclrtCtxSetSysParamOpt(int name, int64_t value) { return write_setting(name, value); }
int aclrtGetStreamOverflowSwitch(void *stream, uint32_t *flag) { *flag = 0; return 0; }
/* Ascend910B3: 20 AI cores with two vector cores each, 192 MB of L2. */
int aclGetDeviceCapability(uint32_t device, int kind, int64_t *value) {
    static const int64_t values[] = {20, 40, 192 << 20};
    *value = kind >= 0 && kind < 3 ? values[kind] : 0;
    return 0;
}

/* ---- Options of CANN's compiler for old-style operators. Ascend910B3 takes compiled kernels. ---- */

#define OP_JIT_COMPILE 10
static char jit_compile[8] = "disable";
size_t aclGetCompileoptSize(int option) { return option == OP_JIT_COMPILE ? sizeof jit_compile : 0; }
int aclGetCompileopt(int option, char *value, size_t length) {
    if (option != OP_JIT_COMPILE || length < sizeof jit_compile) return ERROR_INVALID_PARAMETER;
    strcpy(value, jit_compile);
    return 0;
}
int aclSetCompileopt(int option, const char *value) {
    if (option == OP_JIT_COMPILE) snprintf(jit_compile, sizeof jit_compile, "%s", value);
    return 0;
}

/* ---- Functions of which only the success matters. ---- */

#define OK(name) long name(void) { return 0; }
/* life cycle */
OK(aclInit) OK(aclFinalize) OK(aclrtResetDevice) OK(aclrtProcessReport) OK(aclrtDeviceEnablePeerAccess)
OK(aclrtSetDeviceSatMode)
OK(aclrtSetOpExecuteTimeOut) OK(aclrtSetOpWaitTimeout) OK(aclrtSetStreamOverflowSwitch)
OK(aclrtSetStreamFailureMode) OK(aclrtPeekAtLastError) OK(aclrtGetLastError)
/* operator descriptions: nothing reads them, since executing one is an error */
OK(aclCreateDataBuffer) OK(aclDestroyDataBuffer) OK(aclCreateTensorDesc) OK(aclDestroyTensorDesc)
OK(aclGetTensorDescDimV2) OK(aclGetTensorDescFormat) OK(aclGetTensorDescNumDims) OK(aclGetTensorDescType)
OK(aclSetTensorDescName) OK(aclSetTensorFormat) OK(aclSetTensorPlaceMent) OK(aclSetTensorShape)
OK(aclopCreateAttr) OK(aclopDestroyAttr) OK(aclopSetAttrBool) OK(aclopSetAttrDataType) OK(aclopSetAttrFloat)
OK(aclopSetAttrInt) OK(aclopSetAttrString) OK(aclopSetAttrListBool) OK(aclopSetAttrListFloat)
OK(aclopSetAttrListInt) OK(aclopSetAttrListListInt)
/* logs, dumps, profiling, registration of compiled kernels */
OK(aclAppLog) OK(aclmdlInitDump) OK(aclmdlSetDump) OK(aclmdlFinalizeDump) OK(MsprofGetHashId)
OK(MsprofRegisterCallback) OK(MsprofReportAdditionalInfo) OK(MsprofReportApi) OK(MsprofReportCompactInfo)
OK(MsprofSysCycleTime) OK(rtDevBinaryRegister) OK(rtFunctionRegister) OK(rtGetC2cCtrlAddr) OK(aclrtGetFunctionAddr)
