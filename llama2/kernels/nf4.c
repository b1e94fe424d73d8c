/* NF4 to numbers: two codes a byte, the first one in the high half, and for each block of 64 a scale, which is a code
   too: levels[code] times a number for 256 of them, plus the mean of all.

   Every product and sum is rounded by itself, to nearest even, as PyTorch rounds it: the same bits as the plain twin in
   model/quantized.py. With AVX-512 a register is the table, and 32 codes are looked up at once. */

#include <stdint.h>

#include "numbers.h"
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#define BLOCK 64
#define SCALES 256

/* The scales of all blocks: what is decoded by them. */
typedef struct {
    const uint8_t *codes;
    const float *scales, *levels, *mean;
} Scales;

static inline float scale_of(const Scales *all, int64_t block) {
    volatile float product = all->levels[all->codes[block]] * all->scales[block / SCALES]; /* no fused sum */
    return product + *all->mean;
}

void nf4_to_bfloat16(const uint8_t *codes, const uint8_t *scale_codes, const float *scale_scales, const float *levels,
                const float *mean, const float *table, bf16 *out, int64_t n_blocks) {
    const Scales all = {scale_codes, scale_scales, levels, mean};
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < n_blocks; block++) {
        const uint8_t *code = codes + block * BLOCK / 2;
        bf16 *to = out + block * BLOCK;
        const float scale = scale_of(&all, block);
        bf16 value[32];
        for (int i = 0; i < 16; i++) value[i] = value[i + 16] = narrow(table[i] * scale);
#ifdef __AVX512BW__
        const __m512i values = _mm512_loadu_si512(value), low = _mm512_set1_epi32(15);
        for (int half = 0; half < 2; half++) {
            __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(code + 16 * half)));
            __m512i index = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(_mm512_and_si512(byte, low), 16));
            _mm512_storeu_si512(to + 32 * half, _mm512_permutexvar_epi16(index, values));
        }
#else
        for (int i = 0; i < BLOCK / 2; i++) {
            to[2 * i] = value[code[i] >> 4];
            to[2 * i + 1] = value[code[i] & 15];
        }
#endif
    }
}

void nf4_to_float32(const uint8_t *codes, const uint8_t *scale_codes, const float *scale_scales, const float *levels,
                 const float *mean, const float *table, float *out, int64_t n_blocks) {
    const Scales all = {scale_codes, scale_scales, levels, mean};
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < n_blocks; block++) {
        const uint8_t *code = codes + block * BLOCK / 2;
        float *to = out + block * BLOCK;
        const float scale = scale_of(&all, block);
        float value[16];
        for (int i = 0; i < 16; i++) value[i] = table[i] * scale;
        for (int i = 0; i < BLOCK / 2; i++) {
            to[2 * i] = value[code[i] >> 4];
            to[2 * i + 1] = value[code[i] & 15];
        }
    }
}
