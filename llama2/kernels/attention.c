/* Causal attention for training in bfloat16: rotation, scores, softmax and sums of one head at a time, in float32.

   Scores are never kept: the backward pass makes them again from the logarithm of each query's sum (as FlashAttention
   does, arXiv:2205.14135). Of each block of queries only the keys are touched that one of them sees, so documents in
   one row cost what they would cost alone. Nothing depends on the number of threads. Definition: model/fused.py. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "numbers.h"

#define LANES 16
#define ROWS 8   /* of a tile that is summed in registers, up to three vectors wide */
#define BLOCK 16 /* queries at a time */
#define INLINE static inline __attribute__((always_inline))

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));

static int64_t round_up(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

/* Of a row over keys: a vector more than it must have, for the rows of a power of two would fight for one cache line. */
static int64_t room(int64_t time) { return round_up(time) + LANES; }

/* c [ROWS, width * LANES] (+)= sum over k of a[i * a_row + k * a_step] * b[k * b_row + ..] */
INLINE void tile(const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_row, float *c, int64_t c_row,
                 int64_t depth, int add, const int width) {
    lanes sums[ROWS][3];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
        for (int w = 0; w < width; w++) sums[i][w] = add ? *(const lanes *)(c + i * c_row + w * LANES) : (lanes){0};
    for (int64_t k = 0; k < depth; k++)
#pragma GCC unroll 3
        for (int w = 0; w < width; w++) {
            lanes other = *(const lanes *)(b + k * b_row + w * LANES);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++) sums[i][w] += a[i * a_row + k * a_step] * other;
        }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
        for (int w = 0; w < width; w++) *(lanes *)(c + i * c_row + w * LANES) = sums[i][w];
}

/* The same for any number of rows that is a multiple of ROWS, and of columns that is one of LANES. */
static void product(const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_row, float *c,
                    int64_t c_row, int64_t rows, int64_t depth, int64_t columns, int add) {
    for (int64_t j = 0; j < columns;) {
        const int64_t left = (columns - j) / LANES, width = left >= 3 && left != 4 ? 3 : left >= 2 ? 2 : 1;
        for (int64_t i = 0; i < rows; i += ROWS) {
            const float *x = a + i * a_row, *y = b + j;
            float *z = c + i * c_row + j;
            if (width == 3)
                tile(x, a_row, a_step, y, b_row, z, c_row, depth, add, 3);
            else if (width == 2)
                tile(x, a_row, a_step, y, b_row, z, c_row, depth, add, 2);
            else
                tile(x, a_row, a_step, y, b_row, z, c_row, depth, add, 1);
        }
        j += width * LANES;
    }
}

/* A head's row of bfloat16 in float32, each pair turned by its angle (where there is one) and scaled. */
INLINE void load(const bf16 *x, const float *angle, float scale, float *out, int64_t dim) {
    if (!angle) {
#pragma omp simd
        for (int64_t d = 0; d < dim; d++) out[d] = wide(x[d]);
        return;
    }
#pragma omp simd
    for (int64_t i = 0; i < dim / 2; i++) {
        float re = wide(x[2 * i]), im = wide(x[2 * i + 1]), c = angle[2 * i] * scale, s = angle[2 * i + 1] * scale;
        out[2 * i] = re * c - im * s;
        out[2 * i + 1] = re * s + im * c;
    }
}

/* And back. */
INLINE void store(const float *x, const float *angle, float scale, bf16 *out, int64_t dim) {
    if (!angle) {
#pragma omp simd
        for (int64_t d = 0; d < dim; d++) out[d] = narrow(x[d] * scale);
        return;
    }
#pragma omp simd
    for (int64_t i = 0; i < dim / 2; i++) {
        float re = x[2 * i], im = x[2 * i + 1], c = angle[2 * i] * scale, s = angle[2 * i + 1] * scale;
        out[2 * i] = narrow(re * c + im * s);
        out[2 * i + 1] = narrow(im * c - re * s);
    }
}

static void transpose(const float *x, float *out, int64_t rows, int64_t columns, int64_t out_row, int64_t x_row) {
    for (int64_t t = 0; t < rows; t++)
        for (int64_t d = 0; d < columns; d++) out[d * out_row + t] = x[t * x_row + d];
}

/* The keys that queries from `first` to `end` see lie between *low and *high, both multiples of LANES.
   seen [time time]: not 0 where a query sees a key, which is never a later one; none: all up to itself. */
INLINE void range(const uint8_t *seen, int64_t first, int64_t end, int64_t time, int64_t *low, int64_t *high) {
    int64_t from = seen ? end : 0;
    for (int64_t t = first; seen && t < end; t++) {
        const uint8_t *found = memchr(seen + t * time, 1, (size_t)from);
        if (found) from = found - (seen + t * time);
    }
    *low = from / LANES * LANES;
    *high = round_up(end);
}

/* What a query sees of its scores from low to high; -infinity is put where it does not. */
INLINE void hide(float *scores, const uint8_t *seen, int64_t query, int64_t time, int64_t low, int64_t high) {
    if (seen) {
        const uint8_t *row = seen + query * time;
#pragma omp simd
        for (int64_t k = low; k <= query; k++) scores[k] = row[k] ? scores[k] : -INFINITY;
    }
    for (int64_t k = query + 1; k < high; k++) scores[k] = -INFINITY;
}

/* Scores to shares, by the logarithm of their sum, and the slope of shares to that of scores. */
static void softmax_backward(float *row, float *slope, int64_t n, float sum) {
    float along = 0;
#pragma omp simd reduction(+ : along)
    for (int64_t i = 0; i < n; i++) {
        row[i] = exponential(row[i] - sum);
        along += row[i] * slope[i];
    }
#pragma omp simd
    for (int64_t i = 0; i < n; i++) slope[i] = row[i] * (slope[i] - along);
}

/* q, out [batch time heads dim], k, v [batch time kv_heads dim], turns [turn_batches time dim], seen
   [seen_batches time time] or none; sums [batch heads time]: the logarithm of each query's sum of e^score. */
void attention(const bf16 *q, const bf16 *k, const bf16 *v, const float *turns, const uint8_t *seen, bf16 *out,
               float *sums, int64_t batch, int64_t time, int64_t heads, int64_t kv_heads, int64_t dim,
               int64_t turn_batches, int64_t seen_batches, float scale) {
    const int64_t group = heads / kv_heads, padded = room(time), wide_dim = round_up(dim);
#pragma omp parallel
    {
        float *space = calloc((size_t)(padded * (dim + 2 * wide_dim + BLOCK) + 2 * BLOCK * wide_dim), sizeof(float));
        float *keys = space, *values = keys + padded * wide_dim, *keys_t = values + padded * wide_dim;
        float *scores = keys_t + dim * padded, *asked = scores + BLOCK * padded, *found = asked + BLOCK * wide_dim;
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < batch; b++)
            for (int64_t head = 0; head < kv_heads; head++) {
                const float *angles = turns + (turn_batches == 1 ? 0 : b) * time * dim;
                const uint8_t *mask = seen ? seen + (seen_batches == 1 ? 0 : b) * time * time : 0;
                for (int64_t t = 0; t < time; t++) {
                    const int64_t at = ((b * time + t) * kv_heads + head) * dim;
                    load(k + at, angles + t * dim, 1.0f, keys + t * wide_dim, dim);
                    load(v + at, 0, 1.0f, values + t * wide_dim, dim);
                }
                transpose(keys, keys_t, time, dim, padded, wide_dim);
                for (int64_t first = 0; first < time; first += BLOCK) {
                    const int64_t end = first + BLOCK < time ? first + BLOCK : time;
                    int64_t low, high;
                    range(mask, first, end, time, &low, &high);
                    for (int64_t h = head * group; h < (head + 1) * group; h++) {
                        for (int64_t t = first; t < end; t++)
                            load(q + ((b * time + t) * heads + h) * dim, angles + t * dim, scale,
                                 asked + (t - first) * wide_dim, dim);
                        product(asked, wide_dim, 1, keys_t + low, padded, scores + low, padded, BLOCK, dim, high - low,
                                0);
                        for (int64_t t = first; t < end; t++) {
                            float *row = scores + (t - first) * padded;
                            hide(row, mask, t, time, low, high);
                            sums[(b * heads + h) * time + t] = softmax(row + low, high - low);
                        }
                        product(scores + low, padded, 1, values + low * wide_dim, wide_dim, found, wide_dim, BLOCK,
                                high - low, wide_dim, 0);
                        for (int64_t t = first; t < end; t++)
                            store(found + (t - first) * wide_dim, 0, 1.0f, out + ((b * time + t) * heads + h) * dim,
                                  dim);
                    }
                }
            }
        free(space);
    }
}

/* The slopes of q, k and v, laid out as these, from that of the answer, laid out as q. */
void attention_backward(const bf16 *grad, const bf16 *q, const bf16 *k, const bf16 *v, const float *turns,
                        const uint8_t *seen, const float *sums, bf16 *d_q, bf16 *d_k, bf16 *d_v, int64_t batch,
                        int64_t time, int64_t heads, int64_t kv_heads, int64_t dim, int64_t turn_batches,
                        int64_t seen_batches, float scale) {
    const int64_t group = heads / kv_heads, padded = room(time), wide_dim = round_up(dim);
#pragma omp parallel
    {
        const int64_t whole = padded * wide_dim, block = BLOCK * wide_dim;
        float *space = calloc((size_t)(3 * whole + 2 * dim * padded + 2 * BLOCK * padded + 3 * block), sizeof(float));
        float *keys = space, *d_keys = keys + whole, *d_values = d_keys + whole, *keys_t = d_values + whole;
        float *values_t = keys_t + dim * padded, *shares = values_t + dim * padded, *slopes = shares + BLOCK * padded;
        float *asked = slopes + BLOCK * padded, *given = asked + block, *found = given + block;
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < batch; b++)
            for (int64_t head = 0; head < kv_heads; head++) {
                const float *angles = turns + (turn_batches == 1 ? 0 : b) * time * dim;
                const uint8_t *mask = seen ? seen + (seen_batches == 1 ? 0 : b) * time * time : 0;
                for (int64_t t = 0; t < time; t++)
                    load(v + ((b * time + t) * kv_heads + head) * dim, 0, 1.0f, keys + t * wide_dim, dim);
                transpose(keys, values_t, time, dim, padded, wide_dim);
                for (int64_t t = 0; t < time; t++)
                    load(k + ((b * time + t) * kv_heads + head) * dim, angles + t * dim, 1.0f, keys + t * wide_dim,
                         dim);
                transpose(keys, keys_t, time, dim, padded, wide_dim);
                memset(d_keys, 0, (size_t)(2 * whole) * sizeof(float));
                for (int64_t first = 0; first < time; first += BLOCK) {
                    const int64_t end = first + BLOCK < time ? first + BLOCK : time;
                    int64_t low, high;
                    range(mask, first, end, time, &low, &high);
                    for (int64_t h = head * group; h < (head + 1) * group; h++) {
                        for (int64_t t = first; t < end; t++) {
                            const int64_t at = ((b * time + t) * heads + h) * dim;
                            load(q + at, angles + t * dim, scale, asked + (t - first) * wide_dim, dim);
                            load(grad + at, 0, 1.0f, given + (t - first) * wide_dim, dim);
                        }
                        product(asked, wide_dim, 1, keys_t + low, padded, shares + low, padded, BLOCK, dim, high - low,
                                0);
                        product(given, wide_dim, 1, values_t + low, padded, slopes + low, padded, BLOCK, dim,
                                high - low, 0);
                        for (int64_t t = first; t < first + BLOCK; t++) {
                            float *share = shares + (t - first) * padded, *slope = slopes + (t - first) * padded;
                            if (t >= end) { /* rows that only fill the block */
                                memset(share + low, 0, (size_t)(high - low) * sizeof(float));
                                memset(slope + low, 0, (size_t)(high - low) * sizeof(float));
                                continue;
                            }
                            hide(share, mask, t, time, low, high);
                            softmax_backward(share + low, slope + low, high - low, sums[(b * heads + h) * time + t]);
                        }
                        product(slopes + low, padded, 1, keys + low * wide_dim, wide_dim, found, wide_dim, BLOCK,
                                high - low, wide_dim, 0);
                        for (int64_t t = first; t < end; t++)
                            store(found + (t - first) * wide_dim, angles + t * dim, scale,
                                  d_q + ((b * time + t) * heads + h) * dim, dim);
                        product(slopes + low, 1, padded, asked, wide_dim, d_keys + low * wide_dim, wide_dim,
                                high - low, BLOCK, wide_dim, 1);
                        product(shares + low, 1, padded, given, wide_dim, d_values + low * wide_dim, wide_dim,
                                high - low, BLOCK, wide_dim, 1);
                    }
                }
                for (int64_t t = 0; t < time; t++) {
                    const int64_t at = ((b * time + t) * kv_heads + head) * dim;
                    store(d_keys + t * wide_dim, angles + t * dim, 1.0f, d_k + at, dim);
                    store(d_values + t * wide_dim, 0, 1.0f, d_v + at, dim);
                }
            }
        free(space);
    }
}
