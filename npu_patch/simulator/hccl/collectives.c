/* The calls: each sends all it has to send, then receives. */
#include "hccl.h"
#include <unistd.h>

/* ---- What is allowed. ---- */

static int begin(Comm *comm, void *stream, uint32_t call, uint32_t dtype) {
    if (dtype >= DTYPES || !bytes_of[dtype]) FAIL(BAD_PARAMETER, "%s: HcclDataType %u is unknown", call_names[call], dtype);
    if (simulator_is_captured(stream))
        FAIL(UNSUPPORTED, "%s: communication within a captured graph is not simulated", call_names[call]);
    if (call != SEND && call != RECEIVE) comm->collectives++;
    __sync_fetch_and_add(&simulator_hccl_counted[call][0], 1);
    return SUCCESS;
}
/* HCCL's documentation for Atlas A2: all of these dtypes, but no products of int16 and bfloat16. */
static int begin_reducing(Comm *comm, void *stream, uint32_t call, uint32_t dtype, uint32_t op) {
    if (op >= OPS) FAIL(BAD_PARAMETER, "%s: HcclReduceOp %u is unknown", call_names[call], op);
    if (dtype > INT64 && dtype != BF16)
        FAIL(UNSUPPORTED, "%s does not reduce %s (allowed: int8, int16, int32, int64, float16, bfloat16, float32)",
             call_names[call], dtype_name(dtype));
    if (op == PROD && (dtype == INT16 || dtype == BF16))
        FAIL(UNSUPPORTED, "%s: prod does not take %s", call_names[call], dtype_name(dtype));
    return begin(comm, stream, call, dtype);
}

/* ---- Sending to several. ---- */

#define EACH(peer) for (uint32_t peer = 0; peer < comm->size; peer++)
#define PART(buffer, elements) ((char *)(buffer) + (elements) * bytes_of[dtype])

/* The same to everyone but `omitted`. */
static int put_to_all(Comm *comm, Header header, const void *in, uint32_t omitted) {
    int file;
    TRY(file_of(&file));
    int code = add_to(file, in, header.count * bytes_of[header.dtype]);
    EACH(peer) if (!code && peer != omitted) code = put(comm, peer, header, file, 0);
    close(file);
    return code;
}

/* To each its part: `counts` elements from `offsets`; NULL: `header.count` for each, one after the other. */
static int put_parts(Comm *comm, Header header, const void *in, const uint64_t *counts, const uint64_t *offsets) {
    uint32_t dtype = header.dtype;
    uint64_t count = header.count, at = 0;
    int file;
    TRY(file_of(&file));
    int code = SUCCESS;
    EACH(peer) {
        header.count = counts ? counts[peer] : count;
        uint64_t bytes = header.count * bytes_of[dtype];
        if (!code) code = add_to(file, PART(in, offsets ? offsets[peer] : count * peer), bytes);
        if (!code) code = put(comm, peer, header, file, at);
        at += bytes;
    }
    close(file);
    return code;
}

static int take_parts(Comm *comm, Header header, void *out, const uint64_t *counts, const uint64_t *offsets) {
    uint32_t dtype = header.dtype;
    uint64_t count = header.count;
    EACH(peer) {
        header.count = counts ? counts[peer] : count;
        TRY(take(comm, peer, header, PART(out, offsets ? offsets[peer] : count * peer)));
    }
    return SUCCESS;
}

static int take_reduced(Comm *comm, Header header, void *out) {
    TRY(take(comm, 0, header, out));
    for (uint32_t peer = 1; peer < comm->size; peer++) TRY(take_and_reduce(comm, peer, header, out));
    return SUCCESS;
}

/* ---- Collectives. ---- */

#define NOBODY UINT32_MAX
int HcclAllReduce(void *in, void *out, uint64_t count, uint32_t dtype, uint32_t op, Comm *comm, void *stream) {
    Header header = {ALL_REDUCE, dtype, op, 0, count, 0};
    TRY(begin_reducing(comm, stream, ALL_REDUCE, dtype, op));
    TRY(put_to_all(comm, header, in, NOBODY));
    return take_reduced(comm, header, out);
}
int HcclReduce(void *in, void *out, uint64_t count, uint32_t dtype, uint32_t op, uint32_t root, Comm *comm, void *stream) {
    Header header = {REDUCE, dtype, op, root, count, 0};
    int file;
    TRY(begin_reducing(comm, stream, REDUCE, dtype, op));
    TRY(file_of(&file));
    int code = add_to(file, in, count * bytes_of[dtype]);
    if (!code) code = put(comm, root, header, file, 0);
    close(file);
    return code || comm->rank != root ? code : take_reduced(comm, header, out);
}
int HcclReduceScatter(void *in, void *out, uint64_t count, uint32_t dtype, uint32_t op, Comm *comm, void *stream) {
    Header header = {REDUCE_SCATTER, dtype, op, 0, count, 0};
    TRY(begin_reducing(comm, stream, REDUCE_SCATTER, dtype, op));
    TRY(put_parts(comm, header, in, NULL, NULL));
    return take_reduced(comm, header, out);
}
int HcclReduceScatterV(void *in, const uint64_t *counts, const uint64_t *offsets, void *out, uint64_t count,
                       uint32_t dtype, uint32_t op, Comm *comm, void *stream) {
    Header header = {REDUCE_SCATTER_V, dtype, op, 0, count, 0};
    TRY(begin_reducing(comm, stream, REDUCE_SCATTER_V, dtype, op));
    TRY(put_parts(comm, header, in, counts, offsets));
    return take_reduced(comm, header, out);
}
int HcclAllGather(void *in, void *out, uint64_t count, uint32_t dtype, Comm *comm, void *stream) {
    Header header = {ALL_GATHER, dtype, 0, 0, count, 0};
    TRY(begin(comm, stream, ALL_GATHER, dtype));
    TRY(put_to_all(comm, header, in, NOBODY));
    return take_parts(comm, header, out, NULL, NULL);
}
int HcclAllGatherV(void *in, uint64_t count, void *out, const uint64_t *counts, const uint64_t *offsets, uint32_t dtype,
                   Comm *comm, void *stream) {
    Header header = {ALL_GATHER_V, dtype, 0, 0, count, 0};
    TRY(begin(comm, stream, ALL_GATHER_V, dtype));
    TRY(put_to_all(comm, header, in, NOBODY));
    return take_parts(comm, header, out, counts, offsets);
}
int HcclBroadcast(void *buffer, uint64_t count, uint32_t dtype, uint32_t root, Comm *comm, void *stream) {
    Header header = {BROADCAST, dtype, 0, root, count, 0};
    TRY(begin(comm, stream, BROADCAST, dtype));
    return comm->rank == root ? put_to_all(comm, header, buffer, root) : take(comm, root, header, buffer);
}
int HcclScatter(void *in, void *out, uint64_t count, uint32_t dtype, uint32_t root, Comm *comm, void *stream) {
    Header header = {SCATTER, dtype, 0, root, count, 0};
    TRY(begin(comm, stream, SCATTER, dtype));
    if (comm->rank == root) TRY(put_parts(comm, header, in, NULL, NULL));
    return take(comm, root, header, out);
}
int HcclAlltoAllV(const void *in, const uint64_t *in_counts, const uint64_t *in_offsets, uint32_t dtype, void *out,
                  const uint64_t *counts, const uint64_t *offsets, uint32_t out_dtype, Comm *comm, void *stream) {
    Header header = {ALL_TO_ALL, dtype, 0, 0, 0, 0};
    if (dtype != out_dtype) FAIL(BAD_PARAMETER, "HcclAlltoAllV: %s in, %s out", dtype_name(dtype), dtype_name(out_dtype));
    TRY(begin(comm, stream, ALL_TO_ALL, dtype));
    TRY(put_parts(comm, header, in, in_counts, in_offsets));
    return take_parts(comm, header, out, counts, offsets);
}
int HcclAlltoAll(const void *in, uint64_t in_count, uint32_t dtype, void *out, uint64_t count, uint32_t out_dtype,
                 Comm *comm, void *stream) {
    Header header = {ALL_TO_ALL, dtype, 0, 0, count, 0};
    if (dtype != out_dtype || in_count != count)
        FAIL(BAD_PARAMETER, "HcclAlltoAll: %llu %s in, %llu %s out", (unsigned long long)in_count, dtype_name(dtype),
             (unsigned long long)count, dtype_name(out_dtype));
    TRY(begin(comm, stream, ALL_TO_ALL, dtype));
    TRY(put_parts(comm, header, in, NULL, NULL));
    return take_parts(comm, header, out, NULL, NULL);
}
int HcclAlltoAllVC(const void *in, const uint64_t *matrix, uint32_t dtype, void *out, uint32_t out_dtype, Comm *comm,
                   void *stream) {
    uint64_t counts[4][comm->size], sent = 0, received = 0; /* row i of the matrix: what rank i sends to each */
    EACH(peer) {
        counts[0][peer] = matrix[comm->rank * comm->size + peer], counts[1][peer] = sent, sent += counts[0][peer];
        counts[2][peer] = matrix[peer * comm->size + comm->rank], counts[3][peer] = received, received += counts[2][peer];
    }
    return HcclAlltoAllV(in, counts[0], counts[1], dtype, out, counts[2], counts[3], out_dtype, comm, stream);
}
int HcclBarrier(Comm *comm, void *stream) {
    Header header = {BARRIER, INT8, 0, 0, 0, 0};
    TRY(begin(comm, stream, BARRIER, INT8));
    TRY(put_to_all(comm, header, NULL, NOBODY));
    return take_parts(comm, header, NULL, NULL, NULL);
}

/* ---- Point to point. Within a group, receiving waits for the end of the group, when all is sent. ---- */

typedef struct { Comm *comm; uint32_t peer; Header header; void *data; } Receive;
static __thread struct { int depth; size_t count, room; Receive *items; } group;

int HcclSend(void *data, uint64_t count, uint32_t dtype, uint32_t peer, Comm *comm, void *stream) {
    int file;
    TRY(begin(comm, stream, SEND, dtype));
    TRY(file_of(&file));
    int code = add_to(file, data, count * bytes_of[dtype]);
    if (!code) code = put(comm, peer, (Header){SEND, dtype, 0, 0, count, 0}, file, 0);
    close(file);
    return code;
}
int HcclRecv(void *data, uint64_t count, uint32_t dtype, uint32_t peer, Comm *comm, void *stream) {
    Header sent = {SEND, dtype, 0, 0, count, 0};
    TRY(begin(comm, stream, RECEIVE, dtype));
    if (!group.depth) return take(comm, peer, sent, data);
    if (group.count == group.room) {
        Receive *more = realloc(group.items, (group.room * 2 + 8) * sizeof *more);
        if (!more) return NO_MEMORY;
        group.room = group.room * 2 + 8;
        group.items = more;
    }
    group.items[group.count++] = (Receive){comm, peer, sent, data};
    return SUCCESS;
}
int HcclGroupStart(void) { group.depth++; return SUCCESS; }
int HcclGroupEnd(void) {
    if (!group.depth || --group.depth) return SUCCESS;
    size_t count = group.count;
    group.count = 0;
    for (size_t i = 0; i < count; i++) {
        Receive *item = &group.items[i];
        TRY(take(item->comm, item->peer, item->header, item->data));
    }
    return SUCCESS;
}
typedef struct { int kind; void *data; uint64_t count; uint32_t dtype, peer; } Item; /* HcclSendRecvItem */
int HcclBatchSendRecv(Item *items, uint32_t count, Comm *comm, void *stream) {
    for (uint32_t i = 0; i < count; i++) if (items[i].kind == 0)
        TRY(HcclSend(items[i].data, items[i].count, items[i].dtype, items[i].peer, comm, stream));
    for (uint32_t i = 0; i < count; i++) if (items[i].kind == 1)
        TRY(HcclRecv(items[i].data, items[i].count, items[i].dtype, items[i].peer, comm, stream));
    return SUCCESS;
}
