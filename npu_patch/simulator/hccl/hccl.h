/*
 * HCCL between the processes of one machine: what the files of this folder share. They make libhccl.so, whose functions
 * torch_npu's ProcessGroupHCCL calls (2.9 is linked against some, 2.13 looks all of them up by name).
 *
 * A communicator is one Unix socket per pair of ranks, and one to itself. A message is a header and a file in memory
 * that holds a copy of the data, so that a sender never waits for its receiver: a collective sends all it has to send,
 * then receives in the order of the ranks. Everything is done when a call returns.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* HcclResult, HcclDataType, HcclReduceOp of hccl_types.h */
enum { SUCCESS, BAD_PARAMETER, BAD_POINTER, NO_MEMORY, INTERNAL, UNSUPPORTED, SYSTEM_CALL = 8, TIMED_OUT, REMOTE = 21 };
enum { INT8, INT16, INT32, FP16, FP32, INT64, UINT64, UINT8, UINT16, UINT32, FP64, BF16, INT128,
       HIF8 = 14, FP8E4M3, FP8E5M2, FP8E8M0, DTYPES };
enum { SUM, PROD, MAX, MIN, OPS };
/* What is counted, and what ranks have to agree upon; collectives.py has the names in the same order. */
enum { ALL_REDUCE, REDUCE, ALL_GATHER, REDUCE_SCATTER, BROADCAST, SCATTER, ALL_TO_ALL, SEND, RECEIVE, BARRIER,
       ALL_GATHER_V, REDUCE_SCATTER_V, CALLS };

/* op and root: 0 where a call has none; number: of a collective among those of its communicator */
typedef struct { uint32_t call, dtype, op, root; uint64_t count, number; } Header;
typedef struct Comm Comm;

void simulator_set_error(const char *message); /* cann_stub.c: what torch_npu puts into its exception */
#define FAIL(code, ...) do { \
    char text_[480]; \
    snprintf(text_, sizeof text_, __VA_ARGS__); \
    simulator_set_error(text_); \
    return code; \
} while (0)
#define TRY(call) do { int code_ = (call); if (code_) return code_; } while (0)

int simulator_is_captured(void *stream); /* cann_streams.c */

/* names.c */
extern const uint64_t bytes_of[DTYPES]; /* 0: no such dtype */
extern const char *const call_names[CALLS];
const char *dtype_name(uint32_t dtype);
const char *op_name(uint32_t op);
void describe(char *into, size_t room, const Header *header);

/* communicators.c */
struct Comm {
    uint32_t size, rank;
    int32_t device;
    uint64_t collectives;      /* called so far */
    int broken;                /* it failed: what its ranks send from now on belongs to no call of this one */
    char name[128];
    Comm *next, *previous;     /* all of this process, for its forked children */
    struct Received **waiting; /* of each rank, the messages that were received while others could not be sent */
    int to_self;               /* the sending end; socket[rank] is the receiving one */
    int socket[];
};
long seconds_of(const char *variable, long otherwise);
double now(void);

/* messages.c */
extern uint64_t simulator_hccl_counted[CALLS][2]; /* calls, and bytes sent to other ranks; read by collectives.py */
int file_of(int *file);
int add_to(int file, const void *data, uint64_t bytes);
int put(Comm *comm, uint32_t peer, Header header, int file, uint64_t offset);
int take(Comm *comm, uint32_t peer, Header expected, void *into);
int take_and_reduce(Comm *comm, uint32_t peer, Header expected, void *into);

/* reductions.c */
void combine(void *into, const void *from, uint64_t count, uint32_t dtype, uint32_t op);
