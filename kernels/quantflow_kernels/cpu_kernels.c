/* The kernels of a CPU that torch has no single operation for: paged attention, rotary embedding with the KV store, RMSNorm, SiLU·up.
 *
 * Plain C with the vector extensions of gcc and clang, compiled for the machine at hand by cpu_library.py; OpenMP's runtime is torch's.
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

/* Rows `count` (query and head of one KV head, queries in order), q scaled already. at: each row's position. */
static void attend_tile(const struct cache *cache, const int32_t *table, int kv_head, int kv_heads, int d, int count, const float *q,
                        const int *at, int window, float *out, float *scratch) {
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

/* out [T, H, D] of q [T, H, D] (rows q_stride apart). sequences: S; query_start [S + 1], contexts [S], block_table [S, most]. 1: no memory. */
int paged_attention(const void *q, void *out, int kind, int64_t q_stride, const void *k_cache, const void *v_cache, const float *k_scale,
                    const float *v_scale, const float *v_zero, int cache_kind, int mode, int block, const int32_t *block_table, int most,
                    const int32_t *query_start, const int32_t *contexts, int sequences, int heads, int kv_heads, int d, float sm_scale,
                    int window) {
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
            int low = piece * ROWS, high = low + ROWS < shared ? low + ROWS : shared;
            for (int t = begin; t < stop; t++)
                for (int h = low; h < high; h++, count++) {
                    float *row = rows + (size_t)count * padded;
                    load((const char *)q + ((int64_t)t * q_stride + (int64_t)(head * shared + h) * d) * item, kind, d, row);
                    for (int c = 0; c < d; c++)
                        row[c] *= sm_scale * (mode == STATIC_HEAD ? k_scale[head] : mode == STATIC_CHANNEL ? k_scale[head * d + c] : 1.0f);
                    at[count] = contexts[s] - (query_start[s + 1] - t);
                }
            attend_tile(&cache, block_table + (int64_t)s * most, head, kv_heads, d, count, rows, at, window, result, scratch);
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

/* y [T, K] = silu(gate) · up, from [T, 2K]. */
void silu_mul(const void *gate_up, void *y, int kind, int64_t tokens, int k) {
    int item = kind == F32 ? 4 : 2;
#pragma omp parallel for if (tokens * k > 16384)
    for (int64_t t = 0; t < tokens; t++) {
        const char *row = (const char *)gate_up + t * 2 * k * item;
        float gate[LANES], up[LANES];
        for (int i = 0; i < k; i += LANES) {
            int n = k - i < LANES ? k - i : LANES;
            load(row + (int64_t)i * item, kind, n, gate);
            load(row + ((int64_t)k + i) * item, kind, n, up);
            vec g = *(vec *)gate, low = -g;
            ivec huge = low > 88.0f;  /* exp would overflow: the quotient is nearly 0 */
            low = (vec)(((ivec)low & ~huge) | ((ivec)((vec){0} + 88.0f) & huge));
            *(vec *)gate = g / (1.0f + exponential(low)) * *(vec *)up;
            store(gate, kind, n, (char *)y + ((int64_t)t * k + i) * item);
        }
    }
}
