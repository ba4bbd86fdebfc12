/* Rotary embedding and causal attention over whole windows in bfloat16, as calibration needs them: no cache, no batch of mixed lengths.
 *
 * Compiled for the machine at hand by cpu_library.py, for processors with AVX-512 BF16; OpenMP's runtime is torch's. Shapes: W windows of L
 * tokens, H query heads, G KV heads, D head_dim, a multiple of 16.
 *
 * Attention goes by blocks of QUERIES queries of a head over tiles of KEYS keys, with a running maximum and sum (Dao et al. 2022, Algorithm 1).
 * The floor is the processor's bfloat16 rate: keys and values are packed once so that both products are chains of vdpbf16ps.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

/* A block's scores, weights and sums (16, 8 and 8 KiB at D = 64) stay in the nearest cache; 8 rows by 2 vectors fill its registers. */
enum { LANES = 16, QUERIES = 32, KEYS = 128, ROWS = 8, WIDEST = 256 };

int has_causal(void) { return 1; }

INLINE __m512 wide(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

/* out [W, L, H, D] = x, turned by each token's angles: x[i] with x[i + D/2]. Strides of x in numbers; cos, sin: [L, D/2]. */
void rotate(const uint16_t *x, uint16_t *out, int64_t windows, int64_t length, int64_t heads, int64_t d, int64_t window_stride,
            int64_t token_stride, int64_t head_stride, const float *cos, const float *sin) {
    int64_t half = d / 2;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < windows * length; t++) {
        const float *c = cos + t % length * half, *s = sin + t % length * half;
        for (int64_t h = 0; h < heads; h++) {
            const uint16_t *from = x + t / length * window_stride + t % length * token_stride + h * head_stride;
            uint16_t *to = out + (t * heads + h) * d;
            for (int64_t i = 0; i < half; i += LANES) {
                __mmask16 mask = half - i >= LANES ? 0xffff : (1u << (half - i)) - 1;
                __m512 a = wide(_mm256_maskz_loadu_epi16(mask, from + i)), b = wide(_mm256_maskz_loadu_epi16(mask, from + half + i));
                __m512 ci = _mm512_maskz_loadu_ps(mask, c + i), si = _mm512_maskz_loadu_ps(mask, s + i);
                __m512 first = _mm512_fmsub_ps(a, ci, _mm512_mul_ps(b, si)), second = _mm512_fmadd_ps(b, ci, _mm512_mul_ps(a, si));
                _mm256_mask_storeu_epi16(to + i, mask, (__m256i)_mm512_cvtneps_pbh(first));
                _mm256_mask_storeu_epi16(to + half + i, mask, (__m256i)_mm512_cvtneps_pbh(second));
            }
        }
    }
}

/* 2 to the x, for x of at most 0: within 4e-6 of it. */
INLINE __m512 power_of_two(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);  /* the second is what a NaN gives: it stays one */
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.00961813f), r, _mm512_set1_ps(0.05550411f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.24022651f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.69314718f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* sums [ROWS][2 vectors, `stride` apart a row] += a [ROWS, 2 · pairs] · b [pairs, 2 vectors of pairs]. a: each row at rows[r]. */
INLINE void product(const int zero, const uint16_t *const *rows, const uint16_t *b, int64_t b_stride, int64_t b_half, int pairs, float *sums,
                    int64_t stride) {
    __m512 acc[ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) acc[r][v] = zero ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * stride + v * LANES);
    for (int j = 0; j < pairs; j++) {
        __m512bh left = (__m512bh)_mm512_loadu_si512(b + j * b_stride), right = (__m512bh)_mm512_loadu_si512(b + j * b_stride + b_half);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            int32_t pair;
            memcpy(&pair, rows[r] + 2 * j, sizeof pair);
            __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
            acc[r][0] = _mm512_dpbf16_ps(acc[r][0], a, left);
            acc[r][1] = _mm512_dpbf16_ps(acc[r][1], a, right);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) _mm512_storeu_ps(sums + r * stride + v * LANES, acc[r][v]);
}

/* Queries [first, first + count) of one head. keys: [tokens / 16, D / 2, 16, 2]; values: [tokens / 2, D, 2], both padded to whole tiles. */
static void attend(const uint16_t *q, int64_t q_stride, const uint16_t *keys, const uint16_t *values, uint16_t *out, int64_t out_stride,
                   int64_t first, int count, int64_t d, float scale, int64_t window) {
    float scores[QUERIES * KEYS], sums[QUERIES * (WIDEST + LANES)], top[QUERIES], total[QUERIES];
    uint16_t weights[QUERIES * KEYS];
    const uint16_t *q_rows[QUERIES], *weight_rows[QUERIES];
    int64_t padded = (d + 2 * LANES - 1) / (2 * LANES) * (2 * LANES);
    for (int r = 0; r < QUERIES; r++) {
        q_rows[r] = q + (r < count ? r : count - 1) * q_stride;  /* rows beyond the last are computed and not written */
        weight_rows[r] = weights + r * KEYS;
        top[r] = -FLT_MAX;
        total[r] = 0;
    }
    memset(sums, 0, sizeof(float) * QUERIES * padded);
    int64_t last = first + count - 1, low = window && first + 1 > window ? first + 1 - window : 0;
    for (int64_t start = low / KEYS * KEYS; start <= last; start += KEYS) {
        int used = last - start + 1 < KEYS ? (int)((last - start) / (2 * LANES) + 1) * 2 * LANES : KEYS;  /* keys that some row may see */
        for (int r = 0; r < count; r += ROWS)
            for (int c = 0; c < used; c += 2 * LANES)
                product(1, q_rows + r, keys + (start + c) * d, 2 * LANES, LANES * d, (int)d / 2, scores + r * KEYS + c, KEYS);
        for (int r = 0; r < count; r++) {
            int64_t end = first + r - start + 1, begin = window && end > window ? end - window : 0;  /* the keys it sees, of this tile */
            float *row = scores + r * KEYS;
            __m512 high = _mm512_set1_ps(-INFINITY), x[KEYS / LANES];
            for (int c = 0; c < used; c += LANES) {
                __m512 s = _mm512_mul_ps(_mm512_loadu_ps(row + c), _mm512_set1_ps(scale));
                if (c + LANES > end || c < begin) {
                    __m512i at = _mm512_add_epi32(_mm512_set1_epi32(c), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
                    __mmask16 seen = _mm512_cmplt_epi32_mask(at, _mm512_set1_epi32((int)(end < KEYS ? end : KEYS)))
                                     & _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32((int)(begin < KEYS ? begin : KEYS)));
                    s = _mm512_mask_blend_ps(seen, _mm512_set1_ps(-INFINITY), s);
                }
                x[c / LANES] = s;
                high = _mm512_max_ps(high, s);
            }
            float best = _mm512_reduce_max_ps(high), now = best > top[r] ? best : top[r];
            __m512 sum = _mm512_setzero_ps(), base = _mm512_set1_ps(now);
            for (int c = 0; c < used; c += LANES) {
                __m512 s = _mm512_sub_ps(x[c / LANES], base);
                __mmask16 gone = _mm512_cmp_ps_mask(s, _mm512_set1_ps(-126.0f), _CMP_LT_OQ);
                __m512 p = _mm512_mask_blend_ps(gone, power_of_two(s), _mm512_setzero_ps());
                sum = _mm512_add_ps(sum, p);
                _mm256_storeu_si256((__m256i *)(weights + r * KEYS + c), (__m256i)_mm512_cvtneps_pbh(p));
            }
            float fade = exp2f(top[r] - now);
            total[r] = total[r] * fade + _mm512_reduce_add_ps(sum);
            top[r] = now;
            if (fade != 1.0f)
                for (int64_t c = 0; c < padded; c += LANES)
                    _mm512_storeu_ps(sums + r * padded + c, _mm512_mul_ps(_mm512_loadu_ps(sums + r * padded + c), _mm512_set1_ps(fade)));
        }
        for (int r = count; r < (count + ROWS - 1) / ROWS * ROWS; r++) memset(weights + r * KEYS, 0, sizeof(uint16_t) * used);
        for (int r = 0; r < count; r += ROWS)
            for (int64_t c = 0; c < padded; c += 2 * LANES)
                product(0, weight_rows + r, values + (start * padded + c * 2), 2 * padded, 2 * LANES, used / 2, sums + r * padded + c, padded);
    }
    for (int r = 0; r < count; r++)
        for (int64_t c = 0; c < d; c += LANES) {
            __m512 y = _mm512_div_ps(_mm512_loadu_ps(sums + r * padded + c), _mm512_set1_ps(total[r]));
            _mm256_storeu_si256((__m256i *)(out + r * out_stride + c), (__m256i)_mm512_cvtneps_pbh(y));
        }
}

/* out [W, L, H, D] = causal attention of q over k and v, whose strides (window, token, head) are given in numbers; window 0: all keys.
 * Returns 1 where there was no memory. */
int causal_attention(const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *out, int64_t windows, int64_t length, int64_t heads,
                     int64_t kv_heads, int64_t d, const int64_t *q_strides, const int64_t *k_strides, const int64_t *v_strides, float scale,
                     int64_t window) {
    int64_t tokens = (length + KEYS - 1) / KEYS * KEYS, padded = (d + 2 * LANES - 1) / (2 * LANES) * (2 * LANES);
    int64_t pairs = windows * kv_heads, blocks = (length + QUERIES - 1) / QUERIES;
    uint16_t *keys = malloc(sizeof(uint16_t) * pairs * tokens * (d + padded));
    if (!keys) return 1;
    uint16_t *values = keys + pairs * tokens * d;
    static const uint16_t none[WIDEST];
    float turned = scale * 1.44269504f;  /* powers of 2, not of e */
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t pair = 0; pair < pairs; pair++) {
            const uint16_t *from_k = k + pair / kv_heads * k_strides[0] + pair % kv_heads * k_strides[2];
            const uint16_t *from_v = v + pair / kv_heads * v_strides[0] + pair % kv_heads * v_strides[2];
            uint16_t *to_k = keys + pair * tokens * d, *to_v = values + pair * tokens * padded;
            if (length < tokens) memset(to_k + length / LANES * LANES * d, 0, sizeof(uint16_t) * (tokens - length / LANES * LANES) * d);
            memset(to_v, 0, sizeof(uint16_t) * tokens * padded);
            for (int64_t t = 0; t < length; t++) {
                uint16_t *row = to_k + t / LANES * LANES * d + t % LANES * 2;
                for (int64_t i = 0; i < d; i += 2) memcpy(row + i * LANES, from_k + t * k_strides[1] + i, 2 * sizeof(uint16_t));
            }
            for (int64_t t = 0; t < length; t += 2) {
                const uint16_t *even = from_v + t * v_strides[1], *odd = t + 1 < length ? even + v_strides[1] : none;
                uint16_t *row = to_v + t * padded;
                for (int64_t i = 0; i < d; i++) {
                    uint32_t both = even[i] | (uint32_t)odd[i] << 16;
                    memcpy(row + 2 * i, &both, sizeof both);
                }
            }
        }
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t at = 0; at < windows * heads; at++)
            for (int64_t block = blocks - 1; block >= 0; block--) {  /* the longest first */
                int64_t which = at / heads, head = at % heads, pair = which * kv_heads + head / (heads / kv_heads), first = block * QUERIES;
                int count = length - first < QUERIES ? (int)(length - first) : QUERIES;
                attend(q + which * q_strides[0] + first * q_strides[1] + head * q_strides[2], q_strides[1], keys + pair * tokens * d,
                       values + pair * tokens * padded, out + ((which * length + first) * heads + head) * d, heads * d, first, count, d,
                       turned, window);
            }
    }
    free(keys);
    return 0;
}
#else
int has_causal(void) { return 0; }
void rotate(const uint16_t *x, uint16_t *out, int64_t windows, int64_t length, int64_t heads, int64_t d, int64_t window_stride,
            int64_t token_stride, int64_t head_stride, const float *cos, const float *sin) {
    (void)x, (void)out, (void)windows, (void)length, (void)heads, (void)d, (void)window_stride, (void)token_stride, (void)head_stride;
    (void)cos, (void)sin;
}
int causal_attention(const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *out, int64_t windows, int64_t length, int64_t heads,
                     int64_t kv_heads, int64_t d, const int64_t *q_strides, const int64_t *k_strides, const int64_t *v_strides, float scale,
                     int64_t window) {
    (void)q, (void)k, (void)v, (void)out, (void)windows, (void)length, (void)heads, (void)kv_heads, (void)d, (void)q_strides;
    (void)k_strides, (void)v_strides, (void)scale, (void)window;
    return 1;
}
#endif
