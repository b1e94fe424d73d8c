/* bfloat16 as 16 bits, e^x and softmax: what several kernels share. Written so that loops over them become vector instructions. */

#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

static inline float wide(bf16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

static inline bf16 narrow(float value) { /* to nearest even; what is no number stays none */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bf16)(value != value ? 0x7fc0 : rounded);
}

/* e^x to two units in the last place of float32; 0 below -87, infinity above 88.3. */
static inline float exponential(float x) {
    float bounded = x < -87.0f ? -87.0f : x;
    bounded = bounded > 88.7f ? 88.7f : bounded;
    float n = __builtin_rintf(bounded * 1.44269504f);
    float r = bounded - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t shifted = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &shifted, 4);
    float out = p * power;
    return x != x ? x : x < -87.0f ? 0.0f : x > 88.7f ? INFINITY : out;
}

/* Scores to shares, in place; return the logarithm of the sum of e^score. A function of its own: within a parallel region
   gcc 12 leaves loops over `exponential` scalar. */
static inline float softmax(float *row, int64_t n) {
    float highest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : highest)
    for (int64_t i = 0; i < n; i++) highest = row[i] > highest ? row[i] : highest;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
        row[i] = exponential(row[i] - highest);
        sum += row[i];
    }
#pragma omp simd
    for (int64_t i = 0; i < n; i++) row[i] /= sum;
    return highest + logf(sum);
}
