/* The kernels of a CPU that torch has no single operation for: paged attention, rotary embedding with the KV store, RMSNorm, SiLU·up.
 *
 * Plain C with the vector extensions of gcc, compiled for the machine at hand by cpu_library.py; OpenMP's runtime is torch's.
 * Every row (token, or query and head) is computed by the same sequence of operations whatever else is in the batch: its bits depend on
 * nothing but its own inputs. Shapes as in attention.py: T tokens, H heads, G KV heads, D head_dim, B tokens a cache block.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t hvec __attribute__((vector_size(32), aligned(2), may_alias));
typedef int8_t bvec __attribute__((vector_size(16), aligned(1), may_alias));
typedef float half_vec __attribute__((vector_size(32)));
typedef float quarter_vec __attribute__((vector_size(16)));

enum { LANES = 16, TILE = 64, ROWS = 32, WIDEST = 256 };  /* keys a tile; rows of a query tile; the largest head_dim */
enum kind { F32 = 0, BF16 = 1, INT8 = 2 };
enum mode { STATIC_HEAD = 0, STATIC_CHANNEL = 1, DYNAMIC = 2, PLAIN = 3 };

static inline float sum(vec v) {
    union { vec v; half_vec h[2]; } a = {v};
    union { half_vec h; quarter_vec q[2]; } b = {a.h[0] + a.h[1]};
    quarter_vec c = b.q[0] + b.q[1];
    return (c[0] + c[2]) + (c[1] + c[3]);
}

static inline float bf16_to_float(uint16_t x) {
    union { uint32_t u; float f; } a = {(uint32_t)x << 16};
    return a.f;
}

static inline uint16_t float_to_bf16(float x) {
    union { float f; uint32_t u; } a = {x};
    if ((a.u & 0x7fffffff) > 0x7f800000) return 0x7fc0;  /* NaN */
    return (uint16_t)((a.u + 0x7fff + ((a.u >> 16) & 1)) >> 16);  /* to nearest, halves to even */
}

/* n numbers as floats; what is left of the last vector is zero. to has room for whole vectors. */
static inline void load(const void *from, enum kind kind, int n, float *to) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        if (kind == F32) *(vec *)(to + i) = *(const vec *)((const float *)from + i);
        else if (kind == BF16) {
            uvec wide = __builtin_convertvector(*(const hvec *)((const uint16_t *)from + i), uvec) << 16;
            *(uvec *)(to + i) = wide;
        } else *(vec *)(to + i) = __builtin_convertvector(*(const bvec *)((const int8_t *)from + i), vec);
    }
    if (i < n) *(vec *)(to + i) = (vec){0};
    for (; i < n; i++)
        to[i] = kind == F32 ? ((const float *)from)[i] : kind == BF16 ? bf16_to_float(((const uint16_t *)from)[i])
                                                                      : (float)((const int8_t *)from)[i];
}

static inline void store(const float *from, enum kind kind, int n, void *to) {
    if (kind == F32) memcpy(to, from, n * sizeof(float));
    else for (int i = 0; i < n; i++) ((uint16_t *)to)[i] = float_to_bf16(from[i]);
}

static inline float rounded(float x, enum kind kind) { return kind == BF16 ? bf16_to_float(float_to_bf16(x)) : x; }

/* exp of numbers of at most 88; what is less than -87 gives 0. Cephes' polynomial: 2 units in the last place. */
static inline vec exponential(vec x) {
    ivec tiny = x < -87.0f;
    x = (vec)(((ivec)x & ~tiny) | ((ivec)(vec){0} & tiny));
    vec n = x * 1.44269504088896341f + 12582912.0f;  /* 1.5 · 2^23: rounds to an integer */
    n -= 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    return (vec)((ivec)(p * (vec)power) & ~tiny);
}

struct cache {
    const void *k, *v;         /* [blocks, G, B, D] */
    const float *k_scale, *v_scale, *v_zero;
    int kind, mode, block;     /* block: B */
};

/* Rows `count` (query and head of one KV head, queries in order), q scaled already. at: each row's position. offset: what the zero point
   of K adds to a row's scores, which only matters under a cap: else it cancels in the softmax. */
static void attend_tile(const struct cache *cache, const int32_t *table, int kv_head, int kv_heads, int d, int count, const float *q,
                        const int *at, int window, float cap, const float *offset, float *out, float *scratch) {
    int padded = (d + LANES - 1) / LANES * LANES, vectors = padded / LANES;
    float *k = scratch, *v = k + TILE * padded, *p = v + TILE * padded;
    float k_scale[TILE], v_scale[TILE], top[ROWS], total[ROWS];
    int item = cache->kind == F32 ? 4 : cache->kind == BF16 ? 2 : 1;
    int last = 0, first = INT32_MAX;
    for (int r = 0; r < count; r++) {
        int low = window && at[r] + 1 > window ? at[r] + 1 - window : 0;
        if (at[r] > last) last = at[r];
        if (low < first) first = low;
        top[r] = -INFINITY;
        total[r] = 0;
    }
    memset(out, 0, (size_t)count * padded * sizeof(float));
    for (int start = first / TILE * TILE; start <= last; start += TILE) {
        int from = first > start ? first - start : 0, to = last + 1 - start < TILE ? last + 1 - start : TILE;
        if (from || to < TILE) {  /* what no row sees may hold anything, and zero times NaN is NaN */
            memset(k, 0, (size_t)TILE * padded * sizeof(float));
            memset(v, 0, (size_t)TILE * padded * sizeof(float));
        }
        for (int i = from; i < to; i++) {
            int64_t place = ((int64_t)table[(start + i) / cache->block] * kv_heads + kv_head) * cache->block + (start + i) % cache->block;
            load((const char *)cache->k + place * d * item, cache->kind, d, k + i * padded);
            load((const char *)cache->v + place * d * item, cache->kind, d, v + i * padded);
            if (cache->mode == DYNAMIC) {
                k_scale[i] = cache->k_scale[place];
                v_scale[i] = cache->v_scale[place];
            }
        }
        for (int r = 0; r < count; r++) {
            int low = window && at[r] + 1 > window ? at[r] + 1 - window : 0;
            int begin = low > start ? low - start : 0, end = at[r] + 1 - start < TILE ? at[r] + 1 - start : TILE;
            if (begin >= end) continue;
            float score[TILE];
            for (int i = 0; i < TILE; i++) score[i] = -1e30f;
            const float *row = q + (size_t)r * padded;
            for (int i = begin; i < end; i++) {
                vec dot = (vec){0};
                for (int j = 0; j < vectors; j++) dot += *(const vec *)(row + j * LANES) * *(const vec *)(k + i * padded + j * LANES);
                score[i] = sum(dot) * (cache->mode == DYNAMIC ? k_scale[i] : 1.0f);
                if (cap > 0) score[i] = cap * tanhf((score[i] + offset[r]) / cap);
            }
            float best = top[r];
            for (int i = begin; i < end; i++) best = score[i] > best ? score[i] : best;
            vec added = (vec){0};
            for (int i = 0; i < TILE; i += LANES) {
                vec e = exponential(*(vec *)(score + i) - best);
                *(vec *)(p + i) = e;
                added += e;
            }
            float shrink = top[r] == -INFINITY ? 0.0f : expf(top[r] - best);
            total[r] = total[r] * shrink + sum(added);
            top[r] = best;
            if (cache->mode == DYNAMIC) for (int i = begin; i < end; i++) p[i] *= v_scale[i];
            float *sums = out + (size_t)r * padded;
            for (int j = 0; j < vectors; j += 4) {  /* four vectors of channels at a time stay in registers */
                vec acc[4];
                int wide = vectors - j < 4 ? vectors - j : 4;
                for (int c = 0; c < wide; c++) acc[c] = *(vec *)(sums + (j + c) * LANES) * shrink;
                if (wide == 4) for (int i = begin; i < end; i++)
                    for (int c = 0; c < 4; c++) acc[c] += p[i] * *(const vec *)(v + i * padded + (j + c) * LANES);
                else for (int i = begin; i < end; i++)
                    for (int c = 0; c < wide; c++) acc[c] += p[i] * *(const vec *)(v + i * padded + (j + c) * LANES);
                for (int c = 0; c < wide; c++) *(vec *)(sums + (j + c) * LANES) = acc[c];
            }
        }
    }
    for (int r = 0; r < count; r++)
        for (int c = 0; c < d; c++) {
            float value = out[(size_t)r * padded + c] / total[r];
            if (cache->mode < DYNAMIC) {
                value *= cache->v_scale[kv_head * d + c];
                if (cache->v_zero) value += cache->v_zero[kv_head * d + c];
            }
            out[(size_t)r * padded + c] = value;
        }
}

/* out [T, H, D] of q [T, H, D] (rows q_stride apart). sequences: S; query_start [S + 1], contexts [S], block_table [S, most].
   window: keys that a query sees at most; cap: scores become cap · tanh(score / cap); 0: neither. Returns 1 where there was no memory. */
int paged_attention(const void *q, void *out, int kind, int64_t q_stride, const void *k_cache, const void *v_cache, const float *k_scale,
                    const float *v_scale, const float *v_zero, int cache_kind, int mode, int block, const int32_t *block_table, int most,
                    const int32_t *query_start, const int32_t *contexts, int sequences, int heads, int kv_heads, int d, float sm_scale,
                    int window, float cap, const float *k_zero) {
    struct cache cache = {k_cache, v_cache, k_scale, v_scale, v_zero, cache_kind, mode, block};
    int shared = heads / kv_heads, padded = (d + LANES - 1) / LANES * LANES;
    int queries = shared < ROWS ? ROWS / shared : 1, pieces = (shared + ROWS - 1) / ROWS;  /* of a tile; of a KV head's query heads */
    int tiles = 0, failed = 0;
    for (int s = 0; s < sequences; s++) tiles += (query_start[s + 1] - query_start[s] + queries - 1) / queries;
    int32_t *of = malloc(sizeof(int32_t) * 2 * (tiles + 1));
    if (!of) return 1;
    for (int s = 0, n = 0; s < sequences; s++)
        for (int i = query_start[s]; i < query_start[s + 1]; i += queries, n++) {
            of[2 * n] = s;
            of[2 * n + 1] = i;
        }
    int item = kind == F32 ? 4 : 2;
#pragma omp parallel
    {
        float *scratch = malloc(sizeof(float) * ((size_t)(2 * TILE + 2 * ROWS) * padded + TILE));
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < (int64_t)tiles * kv_heads * pieces; task++) {
            if (!scratch) {
#pragma omp atomic write
                failed = 1;
                continue;
            }
            /* Late queries, which see the most keys, first: threads end together. */
            int n = tiles - 1 - (int)(task / (kv_heads * pieces)), head = (int)(task / pieces % kv_heads), piece = (int)(task % pieces);
            int s = of[2 * n], begin = of[2 * n + 1], stop = begin + queries < query_start[s + 1] ? begin + queries : query_start[s + 1];
            float *rows = scratch + (size_t)2 * TILE * padded + TILE, *result = rows + (size_t)ROWS * padded;
            int at[ROWS], count = 0;
            float offset[ROWS];
            int low = piece * ROWS, high = low + ROWS < shared ? low + ROWS : shared;
            for (int t = begin; t < stop; t++)
                for (int h = low; h < high; h++, count++) {
                    float *row = rows + (size_t)count * padded;
                    load((const char *)q + ((int64_t)t * q_stride + (int64_t)(head * shared + h) * d) * item, kind, d, row);
                    offset[count] = 0;
                    if (cap > 0 && k_zero)
                        for (int c = 0; c < d; c++) offset[count] += row[c] * sm_scale * k_zero[mode == STATIC_HEAD ? head : head * d + c];
                    for (int c = 0; c < d; c++)
                        row[c] *= sm_scale * (mode == STATIC_HEAD ? k_scale[head] : mode == STATIC_CHANNEL ? k_scale[head * d + c] : 1.0f);
                    at[count] = contexts[s] - (query_start[s + 1] - t);
                }
            attend_tile(&cache, block_table + (int64_t)s * most, head, kv_heads, d, count, rows, at, window, cap, offset, result,
                        scratch);
            count = 0;
            for (int t = begin; t < stop; t++)
                for (int h = low; h < high; h++, count++)
                    store(result + (size_t)count * padded, kind, d,
                          (char *)out + ((int64_t)t * heads + head * shared + h) * d * item);
        }
        free(scratch);
    }
    free(of);
    return failed;
}

static inline int8_t code(float x, float zero, float scale, float lowest) {
    float value = rintf((x - zero) / scale);
    return (int8_t)(value < lowest ? lowest : value > 127.0f ? 127.0f : value);
}

static void rotate(float *x, const float *cos, const float *sin, int half, enum kind kind) {
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[i + half], c = cos[i], s = sin[i];
        x[i] = rounded(a * c - b * s, kind);
        x[i + half] = rounded(b * c + a * s, kind);
    }
}

/* q [T, H, D] rotated in place; k, rotated, and v [T, G, D] into their slots. cos, sin [T, D / 2] or NULL. */
void kv_store(void *q, const void *k, const void *v, int kind, int64_t q_stride, int64_t k_stride, int64_t v_stride, const float *cos,
              const float *sin, const int64_t *slots, void *k_cache, void *v_cache, float *k_scale, float *v_scale, const float *k_zero,
              const float *v_zero, int cache_kind, int mode, int block, int tokens, int heads, int kv_heads, int d) {
    int item = kind == F32 ? 4 : 2, half = d / 2;
#pragma omp parallel for if (tokens > 8)
    for (int t = 0; t < tokens; t++) {
        float x[WIDEST];
        if (cos)
            for (int h = 0; h < heads; h++) {
                char *place = (char *)q + ((int64_t)t * q_stride + (int64_t)h * d) * item;
                load(place, kind, d, x);
                rotate(x, cos + (int64_t)t * half, sin + (int64_t)t * half, half, kind);
                store(x, kind, d, place);
            }
        if (slots[t] < 0) continue;
        for (int g = 0; g < 2 * kv_heads; g++) {
            int head = g % kv_heads, value = g >= kv_heads;
            load((const char *)(value ? v : k) + ((int64_t)t * (value ? v_stride : k_stride) + (int64_t)head * d) * item, kind, d, x);
            if (cos && !value) rotate(x, cos + (int64_t)t * half, sin + (int64_t)t * half, half, kind);
            int64_t place = (slots[t] / block * kv_heads + head) * block + slots[t] % block;
            float *scales = value ? v_scale : k_scale;
            const float *zeros = value ? v_zero : k_zero;
            int8_t *codes = (int8_t *)(value ? v_cache : k_cache) + place * d;
            if (mode == PLAIN) {
                store(x, cache_kind, d, (char *)(value ? v_cache : k_cache) + place * d * (cache_kind == F32 ? 4 : 2));
            } else if (mode == DYNAMIC) {
                float most = 0;
                for (int c = 0; c < d; c++) most = fabsf(x[c]) > most ? fabsf(x[c]) : most;
                float scale = most / 127.0f;
                if (!(scale > 0)) scale = 1;
                scales[place] = scale;
                for (int c = 0; c < d; c++) codes[c] = code(x[c], 0, scale, -127.0f);
            } else {
                for (int c = 0; c < d; c++) {
                    int i = !value && mode == STATIC_HEAD ? head : head * d + c;
                    codes[c] = code(x[c], zeros ? zeros[i] : 0, scales[i], -128.0f);
                }
            }
        }
    }
}

/* y [T, K] = the norm of x, or of x + residual, which then replaces residual. Rows of x lie x_stride apart. */
void rms_norm(const void *x, void *residual, const float *weight, void *y, int kind, int64_t tokens, int k, int64_t x_stride, float eps) {
    int item = kind == F32 ? 4 : 2;
#pragma omp parallel for if (tokens * k > 32768)
    for (int64_t t = 0; t < tokens; t++) {
        const char *row = (const char *)x + t * x_stride * item;
        char *rest = residual ? (char *)residual + t * k * item : NULL, *target = (char *)y + t * k * item;
        float a[LANES], b[LANES];
        vec power = (vec){0};
        for (int i = 0; i < k; i += LANES) {
            int n = k - i < LANES ? k - i : LANES;
            load(row + (int64_t)i * item, kind, n, a);
            if (rest) {
                load(rest + (int64_t)i * item, kind, n, b);
                for (int c = 0; c < LANES; c++) a[c] = rounded(a[c] + b[c], kind);
                store(a, kind, n, rest + (int64_t)i * item);
            }
            power += *(vec *)a * *(vec *)a;
        }
        float scale = 1.0f / sqrtf(sum(power) / (float)k + eps);
        for (int i = 0; i < k; i += LANES) {
            int n = k - i < LANES ? k - i : LANES;
            load((rest ? rest : row) + (int64_t)i * item, kind, n, a);
            for (int c = 0; c < n; c++) a[c] = a[c] * scale * weight[i + c];
            store(a, kind, n, target + (int64_t)i * item);
        }
    }
}

/* y [T, K] = silu(gate) · up, both [T, K] with rows `stride` numbers apart. */
void silu_mul(const void *gates, const void *ups, int64_t stride, void *y, int kind, int64_t tokens, int k) {
    int item = kind == F32 ? 4 : 2;
#pragma omp parallel for if (tokens * k > 16384)
    for (int64_t t = 0; t < tokens; t++) {
        const char *gate_row = (const char *)gates + t * stride * item, *up_row = (const char *)ups + t * stride * item;
        float gate[LANES], up[LANES];
        for (int i = 0; i < k; i += LANES) {
            int n = k - i < LANES ? k - i : LANES;
            load(gate_row + (int64_t)i * item, kind, n, gate);
            load(up_row + (int64_t)i * item, kind, n, up);
            vec g = *(vec *)gate, low = -g;
            ivec huge = low > 88.0f;  /* exp would overflow: the quotient is nearly 0 */
            low = (vec)(((ivec)low & ~huge) | ((ivec)((vec){0} + 88.0f) & huge));
            *(vec *)gate = g / (1.0f + exponential(low)) * *(vec *)up;
            store(gate, kind, n, (char *)y + ((int64_t)t * k + i) * item);
        }
    }
}

/* Products. A result is one chain of additions over the input channels, in their order, whatever the number of rows: the same bits alone
 * and in a batch. */
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#include <omp.h>

#define INLINE static inline __attribute__((always_inline))
/* Of a tile of an int4 product: tokens; vectors of 16 output channels. Sums, weights and what decodes them fill the 32 registers. */
enum { MOST_ROWS = 8, MOST_WIDE = 4, FEW_ROWS = 4 };

int has_products(void) { return 1; }

/* codes [blocks, K / 8, 32]: 16 bits of lane 2n + p hold the codes of channel n of the block for inputs 8s + p, 8s + 2 + p, …, low bits
   first. scales, zeros [K / group, 16 · blocks]. bias: float32 [16 · blocks], or NULL. */
struct int4 {
    const uint16_t *codes, *x;
    uint16_t *y;
    const void *scales;
    const uint8_t *zeros;
    const float *bias;
    int scale_kind, n, k, group, padded;
    int64_t x_stride;
};

INLINE void int4_tile(const int rows, const int wide, const struct int4 *w, int block, int row) {
    /* bfloat16 of -16 … 15, all exact: a code less its zero point, plus 16, is looked up. */
    static const uint16_t values[32] = {
        0xc180, 0xc170, 0xc160, 0xc150, 0xc140, 0xc130, 0xc120, 0xc110, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
    const __m512i table = _mm512_loadu_si512(values), low = _mm512_set1_epi16(15);
    const uint16_t *x = w->x + (int64_t)row * w->x_stride;
    const int steps = w->k / 8, of_group = w->group / 8;
    __m512 total[MOST_ROWS][MOST_WIDE];
    for (int r = 0; r < rows; r++)
        for (int b = 0; b < wide; b++) total[r][b] = _mm512_setzero_ps();
    for (int g = 0; g * of_group < steps; g++) {
        __m512 part[MOST_ROWS][MOST_WIDE];
        __m512i offset[MOST_WIDE];
        const int64_t place = (int64_t)g * w->padded + block * LANES;
#pragma GCC unroll 4
        for (int b = 0; b < wide; b++) {
            __m512i zero = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(w->zeros + place + b * LANES)));
            offset[b] = _mm512_sub_epi16(_mm512_set1_epi16(16), _mm512_or_si512(zero, _mm512_slli_epi32(zero, 16)));
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int b = 0; b < wide; b++) part[r][b] = _mm512_setzero_ps();
        for (int s = g * of_group; s < (g + 1) * of_group; s++) {
            __m512i word[MOST_WIDE];
#pragma GCC unroll 4
            for (int b = 0; b < wide; b++) {
                const uint16_t *from = w->codes + ((int64_t)(block + b) * steps + s) * 32;
                word[b] = _mm512_loadu_si512(from);
                if (rows <= FEW_ROWS) _mm_prefetch((const char *)(from + 32 * 16), _MM_HINT_T0);
            }
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                __m512bh weight[MOST_WIDE];
#pragma GCC unroll 4
                for (int b = 0; b < wide; b++) {
                    __m512i code = _mm512_and_si512(_mm512_srli_epi16(word[b], 4 * j), low);
                    weight[b] = (__m512bh)_mm512_permutexvar_epi16(_mm512_add_epi16(code, offset[b]), table);
                }
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++) {
                    int pair;
                    memcpy(&pair, x + (int64_t)r * w->x_stride + 8 * s + 2 * j, 4);
                    __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
                    for (int b = 0; b < wide; b++) part[r][b] = _mm512_dpbf16_ps(part[r][b], both, weight[b]);
                }
            }
        }
#pragma GCC unroll 4
        for (int b = 0; b < wide; b++) {
            __m512 scale;
            if (w->scale_kind == F32) scale = _mm512_loadu_ps((const float *)w->scales + place + b * LANES);
            else scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(
                _mm256_loadu_si256((const __m256i *)((const uint16_t *)w->scales + place + b * LANES))), 16));
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) total[r][b] = _mm512_fmadd_ps(part[r][b], scale, total[r][b]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int b = 0; b < wide; b++) {
            int channel = (block + b) * LANES, left = w->n - channel;
            __m512 value = w->bias ? _mm512_add_ps(total[r][b], _mm512_loadu_ps(w->bias + channel)) : total[r][b];
            __mmask16 mask = left >= LANES ? 0xffff : (__mmask16)((1u << left) - 1);
            _mm256_mask_storeu_epi16(w->y + (int64_t)(row + r) * w->n + channel, mask, (__m256i)_mm512_cvtneps_pbh(value));
        }
}

static void int4_rows(int rows, int wide, const struct int4 *w, int block, int row) {
#define WITH(r, v) case 8 * v + r: int4_tile(r, v, w, block, row); return;
    switch (8 * wide + rows) {
        WITH(1, 4) WITH(2, 4) WITH(3, 4) WITH(4, 4) WITH(5, 2) WITH(6, 2) WITH(7, 2) WITH(8, 2)
        WITH(1, 1) WITH(2, 1) WITH(3, 1) WITH(4, 1) WITH(5, 1) WITH(6, 1) WITH(7, 1) WITH(8, 1)
    }
#undef WITH
}

/* y [M, N] = x Wᵀ + bias, in bfloat16. */
void int4_matmul(const void *x, int64_t x_stride, int m, const void *codes, const void *scales, int scale_kind, const void *zeros,
                 const float *bias, int n, int k, int group, void *y) {
    int blocks = (n + LANES - 1) / LANES;
    struct int4 w = {codes, x, y, scales, zeros, bias, scale_kind, n, k, group, blocks * LANES, x_stride};
    /* Blocks that a thread takes at once stay in its cache while all rows pass. */
    int chunk = blocks / (omp_get_max_threads() * 4) / 4 * 4;
    chunk = chunk < 4 ? 4 : chunk > 8 ? 8 : chunk;
#pragma omp parallel for schedule(dynamic)
    for (int first = 0; first < blocks; first += chunk) {
        int stop = first + chunk < blocks ? first + chunk : blocks;
        for (int row = 0; row < m;) {
            /* Nine rows go as five and four: one row alone uses the machine badly. */
            int left = m - row, rows = left <= MOST_ROWS ? left : left < 2 * MOST_ROWS ? (left + 1) / 2 : MOST_ROWS;
            int wide = rows <= FEW_ROWS ? 4 : 2, block = first;
            for (; block + wide <= stop; block += wide) int4_rows(rows, wide, &w, block, row);
            for (; block < stop; block++) int4_rows(rows, 1, &w, block, row);
            row += rows;
        }
    }
}

enum { DENSE_ROWS = 6, DENSE_COLUMNS = 4 };

/* ahead: fetches the next rows of the weight meanwhile: a processor's own foresight ends with each page, which is one short row. */
INLINE void dense_tile(const int rows, const int columns, const int ahead, const uint16_t *x, int64_t x_stride, const uint16_t *weight,
                       int64_t k, const float *bias, uint16_t *y, int64_t n) {
    __m512 acc[DENSE_ROWS][DENSE_COLUMNS];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++) acc[r][c] = _mm512_setzero_ps();
    for (int64_t i = 0; i < k; i += 32) {
        __mmask32 mask = k - i >= 32 ? 0xffffffffu : (1u << (k - i)) - 1;
        __m512bh w[DENSE_COLUMNS];
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++) {
            w[c] = (__m512bh)_mm512_maskz_loadu_epi16(mask, weight + c * k + i);
            if (ahead) _mm_prefetch((const char *)(weight + (c + columns) * k + i), _MM_HINT_T0);
        }
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            __m512bh a = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + r * x_stride + i);
#pragma GCC unroll 4
            for (int c = 0; c < columns; c++) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], a, w[c]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++) y[r * n + c] = float_to_bf16(_mm512_reduce_add_ps(acc[r][c]) + (bias ? bias[c] : 0.0f));
}

static void dense_rows(int rows, int columns, int ahead, const uint16_t *x, int64_t x_stride, const uint16_t *weight, int64_t k,
                       const float *bias, uint16_t *y, int64_t n) {
#define WITH(r, c) \
    case 8 * c + r: \
        if (ahead) dense_tile(r, c, 1, x, x_stride, weight, k, bias, y, n); \
        else dense_tile(r, c, 0, x, x_stride, weight, k, bias, y, n); \
        return;
    switch (8 * columns + rows) {
        WITH(1, 4) WITH(2, 4) WITH(3, 4) WITH(4, 4) WITH(5, 4) WITH(6, 4) WITH(1, 1) WITH(2, 1) WITH(3, 1) WITH(4, 1) WITH(5, 1) WITH(6, 1)
    }
#undef WITH
}

/* y [M, N] = x Wᵀ + bias for a bfloat16 weight [N, K]. */
void dense_matmul(const uint16_t *x, int64_t x_stride, int m, const uint16_t *weight, const float *bias, int n, int k, uint16_t *y) {
    int chunk = n / (omp_get_max_threads() * 4) / DENSE_COLUMNS * DENSE_COLUMNS;
    chunk = chunk < DENSE_COLUMNS ? DENSE_COLUMNS : chunk > 64 ? 64 : chunk;
#pragma omp parallel for schedule(dynamic)
    for (int first = 0; first < n; first += chunk) {
        int stop = first + chunk < n ? first + chunk : n;
        for (int row = 0; row < m; row += DENSE_ROWS) {
            int rows = m - row < DENSE_ROWS ? m - row : DENSE_ROWS;
            for (int c = first; c < stop;) {
                int columns = stop - c >= DENSE_COLUMNS ? DENSE_COLUMNS : 1;
                dense_rows(rows, columns, row == 0, x + row * x_stride, x_stride, weight + (int64_t)c * k, k, bias ? bias + c : NULL,
                           y + (int64_t)row * n + c, n);
                c += columns;
            }
        }
    }
}
#else
int has_products(void) { return 0; }
void int4_matmul(const void *x, int64_t x_stride, int m, const void *codes, const void *scales, int scale_kind, const void *zeros,
                 const float *bias, int n, int k, int group, void *y) {
    (void)x, (void)x_stride, (void)m, (void)codes, (void)scales, (void)scale_kind, (void)zeros, (void)bias, (void)n, (void)k, (void)group;
    (void)y;
}
void dense_matmul(const uint16_t *x, int64_t x_stride, int m, const uint16_t *weight, const float *bias, int n, int k, uint16_t *y) {
    (void)x, (void)x_stride, (void)m, (void)weight, (void)bias, (void)n, (void)k, (void)y;
}
#endif
