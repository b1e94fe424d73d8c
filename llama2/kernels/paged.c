/* Attention of single queries over keys and values that lie in blocks of a pool (infer/paged.py).

   Every query is computed by itself, key after key in the order of positions: its bits depend neither on the others nor
   on the number of threads. Products and sums are in float32. This file includes itself, once for each type. */

#ifndef TYPE

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include "numbers.h"

#define BLOCK 16
#define SLOT(table, at) ((table)[(at) / BLOCK] * BLOCK + (at) % BLOCK)

/* Eight numbers at a time: gcc 12 leaves much of the same loops scalar. */
#define N 8
typedef float lanes __attribute__((vector_size(4 * N)));
typedef uint32_t bits __attribute__((vector_size(4 * N)));
typedef uint16_t halves __attribute__((vector_size(2 * N)));

static inline lanes load_bf16(const bf16 *from) {
    halves half;
    memcpy(&half, from, sizeof half);
    bits wide = __builtin_convertvector(half, bits) << 16;
    lanes out;
    memcpy(&out, &wide, sizeof out);
    return out;
}

static inline lanes load_float(const float *from) {
    lanes out;
    memcpy(&out, from, sizeof out);
    return out;
}

static inline float total(lanes v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

#define TYPE bf16
#define NAME paged_attention_bfloat16
#define ONE one_bfloat16
#define ONE_ANY any_bfloat16
#define LOAD load_bf16
#define WIDE wide
#define NARROW narrow
#include "paged.c"
#undef TYPE
#undef NAME
#undef ONE
#undef ONE_ANY
#undef LOAD
#undef WIDE
#undef NARROW

#define TYPE float
#define NAME paged_attention_float32
#define ONE one_float32
#define ONE_ANY any_float32
#define LOAD load_float
#define WIDE
#define NARROW
#include "paged.c"

#else

/* One query of `group` heads that share a key head: q, out [group dim], keys and values from that head on. */
static inline __attribute__((always_inline)) void ONE(const TYPE *restrict q, const TYPE *restrict keys,
                                                      const TYPE *restrict values, TYPE *restrict out,
                                                      const int64_t *restrict table, int64_t first, int64_t length,
                                                      int64_t group, int64_t stride, const int64_t dim, float scale,
                                                      float *restrict scores, float *restrict asked) {
    for (int64_t d = 0; d < group * dim; d++) asked[d] = WIDE(q[d]) * scale;
    for (int64_t s = 0; s < length; s++) {
        const TYPE *key = keys + SLOT(table, first + s) * stride;
        for (int64_t g = 0; g < group; g++) {
            lanes sum = load_float(asked + g * dim) * LOAD(key);
            for (int64_t d = N; d < dim; d += N) sum += load_float(asked + g * dim + d) * LOAD(key + d);
            scores[g * length + s] = total(sum);
        }
    }
    for (int64_t g = 0; g < group; g++) {
        float *shares = scores + g * length;
        softmax(shares, length);
        lanes found[dim / N];
        for (int64_t d = 0; d < dim / N; d++) found[d] = (lanes){0};
        for (int64_t s = 0; s < length; s++) {
            const TYPE *value = values + SLOT(table, first + s) * stride;
            for (int64_t d = 0; d < dim / N; d++) found[d] += shares[s] * LOAD(value + d * N);
        }
        for (int64_t d = 0; d < dim; d++) out[g * dim + d] = NARROW(found[d / N][d % N]);
    }
}

/* The same for heads of any size. */
static inline __attribute__((always_inline)) void ONE_ANY(const TYPE *q, const TYPE *keys, const TYPE *values, TYPE *out,
                                                      const int64_t *table, int64_t first, int64_t length,
                                                      int64_t group, int64_t stride, int64_t dim, float scale,
                                                      float *scores, float *asked) {
    float *found = asked + group * dim;
    for (int64_t d = 0; d < group * dim; d++) {
        asked[d] = WIDE(q[d]) * scale;
        found[d] = 0;
    }
    for (int64_t s = 0; s < length; s++) {
        const TYPE *key = keys + SLOT(table, first + s) * stride;
        for (int64_t g = 0; g < group; g++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t d = 0; d < dim; d++) sum += asked[g * dim + d] * WIDE(key[d]);
            scores[g * length + s] = sum;
        }
    }
    for (int64_t g = 0; g < group; g++) softmax(scores + g * length, length);
    for (int64_t s = 0; s < length; s++) {
        const TYPE *value = values + SLOT(table, first + s) * stride;
        for (int64_t g = 0; g < group; g++) {
            float share = scores[g * length + s];
#pragma omp simd
            for (int64_t d = 0; d < dim; d++) found[g * dim + d] += share * WIDE(value[d]);
        }
    }
    for (int64_t d = 0; d < group * dim; d++) out[d] = NARROW(found[d]);
}

/* q, out [.. heads dim], keys, values [blocks * BLOCK kv_heads dim], tables [.. width]: the blocks of each sequence.
   Query i of n is row rows[i], of sequence which[i], and sees the positions from firsts[i] up to ends[i]. */
void NAME(const TYPE *q, const TYPE *keys, const TYPE *values, TYPE *out, const int64_t *tables, const int64_t *which,
          const int64_t *rows, const int64_t *firsts, const int64_t *ends, int64_t n, int64_t width, int64_t heads,
          int64_t kv_heads, int64_t dim, float scale) {
    const int64_t group = heads / kv_heads;
#pragma omp parallel
    {
        float *scores = malloc((size_t)(group * width * BLOCK) * sizeof(float));
        float *asked = malloc((size_t)(2 * group * dim) * sizeof(float));
#pragma omp for collapse(2) schedule(static)
        for (int64_t i = 0; i < n; i++)
            for (int64_t head = 0; head < kv_heads; head++) {
                const int64_t at = (rows[i] * heads + head * group) * dim, to = head * dim;
#define FOR(ONE, DIM)                                                                                                  \
    ONE(q + at, keys + to, values + to, out + at, tables + which[i] * width, firsts[i], ends[i] - firsts[i], group,    \
        kv_heads * dim, DIM, scale, scores, asked)
                switch (dim) { /* a size known beforehand keeps its loops in registers */
                    case 32: FOR(ONE, 32); break;
                    case 40: FOR(ONE, 40); break;
                    case 48: FOR(ONE, 48); break;
                    case 64: FOR(ONE, 64); break;
                    case 128: FOR(ONE, 128); break;
                    default: FOR(ONE_ANY, dim);
                }
#undef FOR
            }
        free(scores);
        free(asked);
    }
}

#endif
