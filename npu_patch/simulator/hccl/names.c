/* Names, for the messages. */
#include "hccl.h"

const uint64_t bytes_of[DTYPES] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2, 16, 0, 1, 1, 1, 1};
const char *const call_names[CALLS] = {"HcclAllReduce", "HcclReduce", "HcclAllGather", "HcclReduceScatter",
    "HcclBroadcast", "HcclScatter", "HcclAlltoAll", "HcclSend", "HcclRecv", "HcclBarrier", "HcclAllGatherV",
    "HcclReduceScatterV"};

const char *dtype_name(uint32_t dtype) {
    static const char *const names[DTYPES] = {"int8", "int16", "int32", "float16", "float32", "int64", "uint64", "uint8",
        "uint16", "uint32", "float64", "bfloat16", "int128", NULL, "hif8", "float8_e4m3", "float8_e5m2", "float8_e8m0"};
    return dtype < DTYPES && names[dtype] ? names[dtype] : "an unknown HcclDataType";
}

const char *op_name(uint32_t op) {
    static const char *const names[OPS] = {"sum", "prod", "max", "min"};
    return op < OPS ? names[op] : "an unknown HcclReduceOp";
}

/* "HcclReduce of 4 float32, sum, root 1 (collective 7)" */
void describe(char *into, size_t room, const Header *header) {
    uint32_t call = header->call;
    int reduces = call == ALL_REDUCE || call == REDUCE || call == REDUCE_SCATTER || call == REDUCE_SCATTER_V;
    int has_root = call == REDUCE || call == BROADCAST || call == SCATTER;
    char root[24] = "", number[40] = "";
    if (has_root) snprintf(root, sizeof root, ", root %u", header->root);
    if (header->number) snprintf(number, sizeof number, " (collective %llu)", (unsigned long long)header->number);
    snprintf(into, room, "%s of %llu %s%s%s%s%s", call < CALLS ? call_names[call] : "?", (unsigned long long)header->count,
             dtype_name(header->dtype), reduces ? ", " : "", reduces ? op_name(header->op) : "", root,
             number);
}
