/*
 * aclnnConstantPadNd, which ProcessGroupHCCL launches below the dispatcher: it pads what it gathers to 512 bytes. No
 * other kernel of libopapi.so is there; some functions are, for who looks up whether this CANN has them.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ERROR_OUT_OF_MEMORY 207001
#define ERROR_NOT_SUPPORTED 207000
#define MOST_DIMENSIONS 8
void simulator_set_error(const char *message); /* cann_stub.c */

#define NAMED(name) int name(void) { simulator_set_error("npu_patch.simulator has this kernel in Python: " #name); return ERROR_NOT_SUPPORTED; }
NAMED(aclnnMatmulWeightNz) NAMED(aclnnAddmmWeightNz) NAMED(aclnnGroupedMatmulWeightNz) NAMED(aclnnQuantMatmulWeightNz)

typedef struct { int64_t sizes[MOST_DIMENSIONS], strides[MOST_DIMENSIONS], offset; uint64_t dims; int dtype; char *data; } Tensor;
typedef struct { uint64_t count; int64_t values[]; } IntArray;
typedef struct { char value[16]; } Scalar;
typedef struct { Tensor in, out; int64_t before[MOST_DIMENSIONS]; } Padding;

static const char bytes_of[] = {4, 2, 1, 4, 1, 0, 2, 2, 4, 8, 8, 8, 1, 0, 0, 0, 8, 16, [27] = 2, [33] = 4, 1, 1, 1, 1}; /* aclDataType */
#define DTYPES (int)sizeof bytes_of

void *aclCreateTensor(const int64_t *sizes, uint64_t dims, int dtype, const int64_t *strides, int64_t offset, int format,
                      const int64_t *storage_sizes, uint64_t storage_dims, void *data) {
    Tensor *made = dims <= MOST_DIMENSIONS ? calloc(1, sizeof *made) : NULL;
    if (!made) return NULL;
    *made = (Tensor){.offset = offset, .dims = dims, .dtype = dtype, .data = data};
    memcpy(made->sizes, sizes, dims * sizeof *sizes);
    memcpy(made->strides, strides, dims * sizeof *strides);
    return made;
}
void *aclCreateIntArray(const int64_t *values, uint64_t count) {
    IntArray *made = malloc(sizeof *made + count * sizeof *values);
    if (!made) return NULL;
    made->count = count;
    memcpy(made->values, values, count * sizeof *values);
    return made;
}
void *aclCreateScalar(const void *value, int dtype) {
    Scalar *made = calloc(1, sizeof *made);
    if (made && dtype >= 0 && dtype < DTYPES) memcpy(made->value, value, (size_t)bytes_of[dtype]);
    return made;
}
int aclDestroyTensor(void *made) { free(made); return 0; }
int aclDestroyIntArray(void *made) { free(made); return 0; }
int aclDestroyScalar(void *made) { free(made); return 0; }

int aclnnConstantPadNdGetWorkspaceSize(const Tensor *in, const IntArray *pad, const Scalar *value, Tensor *out,
                                       uint64_t *workspace, void **executor) {
    static const Scalar zero;
    if (memcmp(value, &zero, sizeof zero) || in->dtype < 0 || in->dtype >= DTYPES || !bytes_of[in->dtype]) {
        simulator_set_error("aclnnConstantPadNd: only padding of known dtypes with 0 is simulated");
        return ERROR_NOT_SUPPORTED;
    }
    Padding *made = calloc(1, sizeof *made);
    if (!made) return ERROR_OUT_OF_MEMORY;
    *made = (Padding){.in = *in, .out = *out};
    for (uint64_t i = 0; i < pad->count / 2; i++) made->before[in->dims - 1 - i] = pad->values[2 * i];
    *workspace = 0;
    *executor = made;
    return 0;
}
int aclnnConstantPadNd(void *workspace, uint64_t bytes, Padding *padding, void *stream) {
    Tensor *in = &padding->in, *out = &padding->out;
    int64_t size = bytes_of[in->dtype], total = 1;
    for (uint64_t d = 0; d < out->dims; d++) total *= out->sizes[d];
    for (int64_t i = 0; i < total; i++) {
        int64_t rest = i, from = in->offset, to = out->offset, inside = 1;
        for (int d = (int)out->dims - 1; d >= 0; d--) {
            int64_t at = rest % out->sizes[d], source = at - padding->before[d];
            rest /= out->sizes[d];
            to += at * out->strides[d];
            from += source * in->strides[d];
            inside &= source >= 0 && source < in->sizes[d];
        }
        if (inside) memcpy(out->data + to * size, in->data + from * size, (size_t)size);
        else memset(out->data + to * size, 0, (size_t)size);
    }
    free(padding);
    return 0;
}
