/* NF4 to numbers: two codes a byte, the first one in the high half, and a scale for each block of 64.

   A product with the scale is rounded once, to nearest even, as PyTorch rounds it: the same bits as the plain twin in
   model/quantized.py. With AVX-512 a register is the table, and 32 codes are looked up at once. */

#include <stdint.h>

#include "numbers.h"
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#define BLOCK 64

void nf4_to_bfloat16(const uint8_t *codes, const float *scales, const float *table, uint16_t *out, int64_t n_blocks) {
    for (int64_t block = 0; block < n_blocks; block++, codes += BLOCK / 2, out += BLOCK) {
        uint16_t value[32];
        for (int i = 0; i < 16; i++) value[i] = value[i + 16] = narrow(table[i] * scales[block]);
#ifdef __AVX512BW__
        const __m512i values = _mm512_loadu_si512(value), low = _mm512_set1_epi32(15);
        for (int half = 0; half < 2; half++) {
            __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + 16 * half)));
            __m512i index = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(_mm512_and_si512(byte, low), 16));
            _mm512_storeu_si512(out + 32 * half, _mm512_permutexvar_epi16(index, values));
        }
#else
        for (int i = 0; i < BLOCK / 2; i++) {
            out[2 * i] = value[codes[i] >> 4];
            out[2 * i + 1] = value[codes[i] & 15];
        }
#endif
    }
}

void nf4_to_float32(const uint8_t *codes, const float *scales, const float *table, float *out, int64_t n_blocks) {
    for (int64_t block = 0; block < n_blocks; block++, codes += BLOCK / 2, out += BLOCK) {
        float value[16];
        for (int i = 0; i < 16; i++) value[i] = table[i] * scales[block];
        for (int i = 0; i < BLOCK / 2; i++) {
            out[2 * i] = value[codes[i] >> 4];
            out[2 * i + 1] = value[codes[i] & 15];
        }
    }
}
