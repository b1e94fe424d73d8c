/* What a training step in bfloat16 does between its matrix products: normalisation, SwiGLU and the slope of the
   cross-entropy, each forward and backward in one pass over its rows, computed in float32.

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
