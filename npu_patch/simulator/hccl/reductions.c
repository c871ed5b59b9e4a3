/* Reductions: in the order of the ranks, rounded to the dtype after each step, as a chain of NPUs does. */
#include "hccl.h"

static float bits(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static uint32_t of(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
static float from_bf16(uint16_t h) { return bits((uint32_t)h << 16); }
static uint16_t to_bf16(float f) {
    uint32_t u = of(f);
    return f != f ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static float from_fp16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest < 0x400) return (sign ? -1.0f : 1.0f) * (float)rest * 0x1p-24f;
    return bits(sign | ((rest << 13) + (112u << 23)));
}
static uint16_t to_fp16(float f) {
    uint32_t u = of(f), sign = (u >> 16) & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (u >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (u < 0x38800000) return (uint16_t)(sign | (of(bits(u) + 0.5f) - of(0.5f))); /* subnormal: 0.5 has its step */
    return (uint16_t)(sign | ((u - (112u << 23) + 0xfff + ((u >> 13) & 1)) >> 13));
}

/* `sum` is unsigned for integers, whose sums and products wrap round; `compared` has the sign. */
#define SAME(x) (x)
#define EACH(type, wide, in, out, expression) \
    for (uint64_t i = 0; i < count; i++) { \
        wide a = in(((type *)into)[i]), b = in(((const type *)from)[i]); \
        ((type *)into)[i] = (type)out(expression); \
    } \
    break;
#define ANY_OP(type, sum, compared, in, out) \
    switch (op) { \
        case SUM: EACH(type, sum, in, out, a + b) \
        case PROD: EACH(type, sum, in, out, a * b) \
        case MAX: EACH(type, compared, in, out, a != a || a > b ? a : b) \
        default: EACH(type, compared, in, out, a != a || a < b ? a : b) \
    } \
    break;

void combine(void *into, const void *from, uint64_t count, uint32_t dtype, uint32_t op) {
    switch (dtype) {
        case INT8: ANY_OP(int8_t, uint64_t, int64_t, SAME, SAME)
        case INT16: ANY_OP(int16_t, uint64_t, int64_t, SAME, SAME)
        case INT32: ANY_OP(int32_t, uint64_t, int64_t, SAME, SAME)
        case INT64: ANY_OP(int64_t, uint64_t, int64_t, SAME, SAME)
        case FP16: ANY_OP(uint16_t, float, float, from_fp16, to_fp16)
        case BF16: ANY_OP(uint16_t, float, float, from_bf16, to_bf16)
        case FP32: ANY_OP(float, float, float, SAME, SAME)
    }
}
