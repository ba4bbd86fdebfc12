/* What quantising a weight does column by column or candidate by candidate, where one torch operation a step would cost more in calls
 * than in arithmetic: GPTQ's recursion, its refinement, and the losses of a range search.
 *
 * Plain C in float32, compiled for the machine at hand by cpu_library.py; OpenMP's runtime is torch's. Shapes: N output channels, K input
 * channels, G groups along K. Matrices are transposed, [K, N], so that a step's numbers lie side by side; a strip of output channels goes
 * through all its steps in the nearest cache.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { STRIP = 64 };

INLINE float nearest(float x, float lowest, float highest) {
    float code = rintf(x);
    code = code < lowest ? lowest : code;
    return code > highest ? highest : code;
}

INLINE void gptq_strip(const int wide, const float *w, float *codes, float *errors, int64_t n, const float *ratios, int64_t down, int64_t across,
                       const float *scales, const float *lowest, const float *highest, const int64_t *group_at, int start, int stop) {
    for (int i = start; i < stop; i++) {
        float x[STRIP];
        for (int c = 0; c < wide; c++) x[c] = w[i * n + c];
        for (int p = start; p < i; p++) {
            float ratio = ratios[p * down + i * across];
            for (int c = 0; c < wide; c++) x[c] += ratio * errors[p * n + c];
        }
        int64_t group = group_at[i] * n;
        for (int c = 0; c < wide; c++) {
            float scale = scales[group + c], code = nearest(x[c] / scale, lowest[group + c], highest[group + c]);
            codes[i * n + c] = code;
            errors[i * n + c] = code * scale - x[c];
        }
    }
}

/* Columns [start, stop) of GPTQ's recursion: their codes and errors [K, N], from w [K, N], which holds the corrections of all columns
 * before `start`. ratios: [K, K] with these strides; scales, lowest, highest: [G, N]; group_at: [K]. */
void gptq_columns(const float *w, float *codes, float *errors, int64_t n, const float *ratios, int64_t down, int64_t across, const float *scales,
                  const float *lowest, const float *highest, const int64_t *group_at, int start, int stop) {
#define PART(wide) \
    gptq_strip(wide, w + c, codes + c, errors + c, n, ratios, down, across, scales + c, lowest + c, highest + c, group_at, start, stop)
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < n; c += STRIP) {
        if (n - c >= STRIP) PART(STRIP);
        else PART((int)(n - c));
    }
#undef PART
}

INLINE void refine_strip(const int wide, const float *values, const float *slope, float *codes, float *changes, int64_t n,
                         const float *hessian, int64_t k, const float *scale, const float *lowest, const float *highest,
                         const float *curvature, int start, int stop) {
    for (int i = start; i < stop; i++) {
        float x[STRIP], own = curvature[i];
        for (int c = 0; c < wide; c++) x[c] = slope[i * n + c];
        for (int p = start; p < i; p++) {
            float h = hessian[p * k + i];
            for (int c = 0; c < wide; c++) x[c] -= h * changes[p * n + c];
        }
        for (int c = 0; c < wide; c++) {
            float value = values[i * n + c], code = nearest((value + x[c] / own) / scale[c], lowest[c], highest[c]);
            codes[i * n + c] = code;
            changes[i * n + c] = code * scale[c] - value;
        }
    }
}

/* Columns [start, stop) of one group in a pass of coordinate descent: their new codes, and what that changed in their values, [K, N].
 * slope: [K, N], half the descent at `start`; hessian: [K, K]; scale, lowest, highest: the group's, [N]; curvature: [K]. */
void refine_columns(const float *values, const float *slope, float *codes, float *changes, int64_t n, const float *hessian, int64_t k,
                    const float *scale, const float *lowest, const float *highest, const float *curvature, int start, int stop) {
#define PART(wide) \
    refine_strip(wide, values + c, slope + c, codes + c, changes + c, n, hessian, k, scale + c, lowest + c, highest + c, curvature, \
                 start, stop)
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < n; c += STRIP) {
        if (n - c >= STRIP) PART(STRIP);
        else PART((int)(n - c));
    }
#undef PART
}

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));

enum { LANES = 16, ROWS = 6, VECTORS = 4, MOST = 512 };

/* losses [count] = e H eᵀ for the rows e of errors [count, padded]; h: [size, padded], symmetric. */
INLINE void losses_of(const int count, const float *errors, int64_t size, int64_t padded, const float *h, float *losses) {
    vec total[ROWS];
    for (int r = 0; r < count; r++) total[r] = (vec){0};
    for (int64_t c = 0; c < padded; c += VECTORS * LANES) {
        int vectors = padded - c < VECTORS * LANES ? (int)((padded - c) / LANES) : VECTORS;
        if (vectors == VECTORS) {
            vec acc[ROWS][VECTORS];
#pragma GCC unroll 6
            for (int r = 0; r < count; r++)
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) acc[r][v] = (vec){0};
            for (int64_t i = 0; i < size; i++) {
                const float *row = h + i * padded + c;
#pragma GCC unroll 6
                for (int r = 0; r < count; r++)
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; v++) acc[r][v] += errors[r * padded + i] * *(const vec *)(row + v * LANES);
            }
#pragma GCC unroll 6
            for (int r = 0; r < count; r++)
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) total[r] += acc[r][v] * *(const vec *)(errors + r * padded + c + v * LANES);
        } else {
            for (int v = 0; v < vectors; v++)
                for (int r = 0; r < count; r++) {
                    vec acc = (vec){0};
                    for (int64_t i = 0; i < size; i++) acc += errors[r * padded + i] * *(const vec *)(h + i * padded + c + v * LANES);
                    total[r] += acc * *(const vec *)(errors + r * padded + c + v * LANES);
                }
        }
    }
    for (int r = 0; r < count; r++) {
        float sum = 0;
        for (int lane = 0; lane < LANES; lane++) sum += total[r][lane];
        losses[r] = sum;
    }
}

/* losses [G, N] of rounding a weight [N, G, size] to the grids scales, zeros [N, G] of codes 0 to `levels`: e H eᵀ of every group's error
 * and its block of the Hessian, [G, size, padded], padded with zeros to whole vectors. size: at most MOST. */
void block_losses(const float *weight, const float *scales, const float *zeros, const float *hessian, float *losses, int64_t n,
                  int64_t groups, int64_t size, int64_t padded, float levels) {
    int64_t chunk = 16 * ROWS;
#pragma omp parallel for schedule(dynamic) collapse(2)
    for (int64_t g = 0; g < groups; g++)
        for (int64_t first = 0; first < n; first += chunk) {
            float errors[ROWS * MOST];
            const float *h = hessian + g * size * padded;
            memset(errors, 0, sizeof(float) * ROWS * padded);
            int64_t stop = first + chunk < n ? first + chunk : n;
            for (int64_t row = first; row < stop; row += ROWS) {
                int count = stop - row < ROWS ? (int)(stop - row) : ROWS;
                for (int r = 0; r < count; r++) {
                    int64_t at = (row + r) * groups + g;
                    float scale = scales[at], zero = zeros[at];
                    const float *from = weight + at * size;
                    for (int64_t i = 0; i < size; i++)
                        errors[r * padded + i] = nearest(from[i] / scale, -zero, levels - zero) * scale - from[i];
                }
                if (count == ROWS) losses_of(ROWS, errors, size, padded, h, losses + g * n + row);
                else for (int r = 0; r < count; r++) losses_of(1, errors + r * padded, size, padded, h, losses + g * n + row + r);
            }
        }
}
