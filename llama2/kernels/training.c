/* What a training step in bfloat16 does between its matrix products: normalisation, rotation, softmax, SwiGLU and the
   slope of the cross-entropy, each forward and backward in one pass over its rows, computed in float32.

   Rows are independent of each other and of the number of threads. Definitions: model/fused.py. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "numbers.h"

/* out = round(x / rms(x)) * weight; inverse [n] is kept for the way back. */
void rms_norm(const bf16 *x, const bf16 *weight, bf16 *out, float *inverse, int64_t n, int64_t dim, float eps) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < n; row++) {
        const bf16 *xs = x + row * dim;
        bf16 *outs = out + row * dim;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < dim; i++) squares += wide(xs[i]) * wide(xs[i]);
        float r = inverse[row] = 1.0f / sqrtf(squares / (float)dim + eps);
#pragma omp simd
        for (int64_t i = 0; i < dim; i++) outs[i] = narrow(wide(narrow(wide(xs[i]) * r)) * wide(weight[i]));
    }
}

/* d_weight [ceil(n / 64) dim] has a part for every 64 rows, so that their sum does not depend on threads. */
void rms_norm_backward(const bf16 *grad, const bf16 *x, const bf16 *weight, const float *inverse, bf16 *d_x,
                       float *d_weight, int64_t n, int64_t dim) {
    const int64_t block = 64;
#pragma omp parallel for schedule(static)
    for (int64_t part = 0; part < (n + block - 1) / block; part++) {
        float *sums = d_weight + part * dim;
        memset(sums, 0, (size_t)dim * sizeof(float));
        for (int64_t row = part * block; row < n && row < (part + 1) * block; row++) {
            const bf16 *xs = x + row * dim, *gs = grad + row * dim;
            bf16 *outs = d_x + row * dim;
            float r = inverse[row], along = 0;
#pragma omp simd reduction(+ : along)
            for (int64_t i = 0; i < dim; i++) along += wide(gs[i]) * wide(weight[i]) * wide(xs[i]);
            float back = along * r * r / (float)dim;
#pragma omp simd
            for (int64_t i = 0; i < dim; i++) {
                outs[i] = narrow(r * (wide(gs[i]) * wide(weight[i]) - wide(xs[i]) * back));
                sums[i] += wide(gs[i]) * (wide(xs[i]) * r);
            }
        }
    }
}

/* out = a / (1 + e^-a) * b */
void swiglu(const bf16 *a, const bf16 *b, bf16 *out, int64_t n) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < n; i++) {
        float x = wide(a[i]);
        out[i] = narrow(x / (1.0f + exponential(-x)) * wide(b[i]));
    }
}

void swiglu_backward(const bf16 *grad, const bf16 *a, const bf16 *b, bf16 *d_a, bf16 *d_b, int64_t n) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < n; i++) {
        float x = wide(a[i]), g = wide(grad[i]), gate = 1.0f / (1.0f + exponential(-x));
        d_b[i] = narrow(g * x * gate);
        d_a[i] = narrow(g * wide(b[i]) * gate * (1.0f + x * (1.0f - gate)));
    }
}

/* Turn each pair of each head and lay it out anew: [batch, from_time.., heads] by strides to strides, both with whole
   heads of `dim` together. turns: cos, sin of each pair [turn_batches time dim/2 2]; none: only laid out anew. */
void rotate(const bf16 *x, const float *turns, bf16 *out, int64_t batch, int64_t time, int64_t heads, int64_t dim,
            const int64_t *from, const int64_t *to, int64_t turn_batches, float scale, float sign) {
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t t = 0; t < time; t++) {
            const float *angle = turns ? turns + ((turn_batches == 1 ? 0 : b) * time + t) * dim : 0;
            for (int64_t h = 0; h < heads; h++) {
                const bf16 *xs = x + b * from[0] + t * from[1] + h * from[2];
                bf16 *outs = out + b * to[0] + t * to[1] + h * to[2];
                if (!turns) {
                    memcpy(outs, xs, (size_t)dim * sizeof(bf16));
                    continue;
                }
#pragma omp simd
                for (int64_t i = 0; i < dim / 2; i++) {
                    float re = wide(xs[2 * i]), im = wide(xs[2 * i + 1]);
                    float c = angle[2 * i] * scale, s = angle[2 * i + 1] * scale * sign;
                    outs[2 * i] = narrow(re * c - im * s);
                    outs[2 * i + 1] = narrow(re * s + im * c);
                }
            }
        }
}

/* Softmax, in place, of scores [batch heads queries keys] over the keys that a query sees: those whose mask
   [mask_batches all_queries keys_of_mask] is not 0, or without a mask those up to its own position first + query.
   The others become 0. */
void masked_softmax(bf16 *scores, const uint8_t *mask, int64_t batch, int64_t heads, int64_t queries, int64_t keys,
                    int64_t mask_batches, int64_t mask_rows, int64_t mask_keys, int64_t first) {
#pragma omp parallel
    {
        float *row = malloc((size_t)keys * sizeof(float));
#pragma omp for collapse(2) schedule(static)
        for (int64_t each = 0; each < batch * heads; each++)
            for (int64_t q = 0; q < queries; q++) {
                bf16 *s = scores + (each * queries + q) * keys;
                const uint8_t *seen =
                    mask ? mask + ((mask_batches == 1 ? 0 : each / heads) * mask_rows + first + q) * mask_keys : 0;
                int64_t from = 0, end = first + q + 1 < keys ? first + q + 1 : keys;
                if (mask) { /* what is seen lies mostly together: a document */
                    for (end = keys; end > 0 && !seen[end - 1];) end--;
                    while (from < end && !seen[from]) from++;
                }
                float highest = -INFINITY, sum = 0;
                if (mask) {
#pragma omp simd reduction(max : highest)
                    for (int64_t k = from; k < end; k++) {
                        row[k] = seen[k] ? wide(s[k]) : -INFINITY;
                        highest = row[k] > highest ? row[k] : highest;
                    }
                } else {
#pragma omp simd reduction(max : highest)
                    for (int64_t k = from; k < end; k++) {
                        row[k] = wide(s[k]);
                        highest = row[k] > highest ? row[k] : highest;
                    }
                }
#pragma omp simd reduction(+ : sum)
                for (int64_t k = from; k < end; k++) {
                    row[k] = exponential(row[k] - highest);
                    sum += row[k];
                }
                float share = 1.0f / sum;
#pragma omp simd
                for (int64_t k = from; k < end; k++) s[k] = narrow(row[k] * share);
                memset(s, 0, (size_t)from * sizeof(bf16));
                memset(s + end, 0, (size_t)(keys - end) * sizeof(bf16));
            }
        free(row);
    }
}

/* In place: grad = p * (grad - sum(p * grad)), row by row. */
void softmax_backward(const bf16 *p, bf16 *grad, int64_t n, int64_t keys) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < n; row++) {
        const bf16 *ps = p + row * keys;
        bf16 *gs = grad + row * keys;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t k = 0; k < keys; k++) sum += wide(ps[k]) * wide(gs[k]);
#pragma omp simd
        for (int64_t k = 0; k < keys; k++) gs[k] = narrow(wide(ps[k]) * (wide(gs[k]) - sum));
    }
}

/* Of logits [n vocab] times `factor` and a target each: ln p(target) and the entropy (where asked for), 0 for targets
   below 0. With `weights` [n], in place, the slope: (softmax - onehot(target)) * weight, 0 for targets below 0. */
void target_logprobs(bf16 *logits, const int64_t *targets, const float *weights, float *logprobs, float *entropy,
                     int64_t n, int64_t vocab, float factor) {
#pragma omp parallel
    {
        float *row = malloc((size_t)vocab * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i++) {
            bf16 *s = logits + i * vocab;
            int64_t target = targets[i];
            if (target < 0) {
                if (logprobs) logprobs[i] = 0;
                if (entropy) entropy[i] = 0;
                if (weights) memset(s, 0, (size_t)vocab * sizeof(bf16));
                continue;
            }
            float aimed = wide(s[target]) * factor, highest = -INFINITY, sum = 0, expected = 0;
#pragma omp simd reduction(max : highest)
            for (int64_t k = 0; k < vocab; k++) {
                float x = wide(s[k]);
                highest = x > highest ? x : highest;
            }
            highest *= factor;
            if (entropy) {
#pragma omp simd reduction(+ : sum, expected)
                for (int64_t k = 0; k < vocab; k++) {
                    float x = wide(s[k]) * factor - highest;
                    row[k] = exponential(x);
                    sum += row[k];
                    expected += row[k] > 0 ? row[k] * x : 0;
                }
            } else {
#pragma omp simd reduction(+ : sum)
                for (int64_t k = 0; k < vocab; k++) {
                    row[k] = exponential(wide(s[k]) * factor - highest);
                    sum += row[k];
                }
            }
            if (logprobs) logprobs[i] = aimed - highest - logf(sum);
            if (entropy) entropy[i] = logf(sum) - expected / sum;
            if (weights) {
                float share = weights[i] / sum;
#pragma omp simd
                for (int64_t k = 0; k < vocab; k++) s[k] = narrow(row[k] * share);
                s[target] = narrow(row[target] * share - weights[i]);
            }
        }
        free(row);
    }
}
