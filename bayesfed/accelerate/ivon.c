/* A step of IVON in two passes over the memory, for float32 vectors on a CPU; clients/ivon/fused.py calls it.
   The formulas are those of clients/ivon/step.py. NaN passes through: comparisons are false with it, so all_finite looks first. */

#include <math.h>
#include <stdint.h>

#define BLOCK 1024

/* A vector, or one number that stands for a constant vector. */
typedef struct {
    const float *values; /* NULL: the number */
    float number;
} term;

/* The term's values from `start` on; a number is written out into `constant` when `fill` says so. */
static const float *values_of(const term *t, int64_t start, float *constant, int fill) {
    if (t->values) return t->values + start;
    for (int i = 0; fill && i < BLOCK; i++) constant[i] = t->number;
    return constant;
}

/* Whether no value of the pieces is infinite or nan: an exponent of ones has the largest bits. */
int all_finite(int64_t pieces, const int64_t *sizes, const uint32_t *const *values) {
    for (int64_t piece = 0; piece < pieces; piece++) {
        uint32_t largest = 0;
        for (int64_t i = 0; i < sizes[piece]; i++) {
            uint32_t size = values[piece][i] & 0x7fffffff;
            largest = size > largest ? size : largest;
        }
        if (largest >= 0x7f800000) return 0;
    }
    return 1;
}

/* noise = z root and sample = mean + scale noise; z are the points (rows of 4) that the lower 14 of every 16 bits pick. */
void ivon_draw(int64_t n, const uint16_t *bits, const float *points, const float *mean, const float *root, float scale,
               float *noise, float *sample) {
    float z[BLOCK];
    for (int64_t start = 0; start < n; start += BLOCK) {
        int count = n - start < BLOCK ? (int)(n - start) : BLOCK;
        const uint16_t *picks = bits + start / 4;
        for (int i = 0; i < (count + 3) / 4; i++) {
            const float *point = points + 4 * (picks[i] & 16383);
            for (int j = 0; j < 4; j++) z[4 * i + j] = point[j];
        }
#pragma GCC ivdep
        for (int i = 0; i < count; i++) {
            float value = z[i] * root[start + i];
            noise[start + i] = value;
            sample[start + i] = mean[start + i] + scale * value;
        }
    }
}

typedef struct {
    float scale, c, share, debias, rate, lift, clip;
} numbers;

static void update(int count, const float *z, const float *g, float *mean, float *total, float *root, float *momentum,
                   const float *slope, const float *offset, const float *factor, const float *bound, const numbers k) {
#pragma GCC ivdep
    for (int i = 0; i < count; i++) {
        float w = 1 - k.c + k.c * (slope[i] * root[i] * root[i]) + k.scale * (z[i] * g[i]);
        float precise = total[i] * (0.5f + 0.5f * w * w);
        precise = precise < bound[i] ? bound[i] : precise;
        float inverse = 1 / sqrtf(precise);
        float average = momentum[i] + k.share * (g[i] - momentum[i]);
        float step = (average + k.debias * (slope[i] * mean[i] - offset[i])) * (inverse * inverse);
        step = step > k.clip ? k.clip : step;
        step = step < -k.clip ? -k.clip : step;
        mean[i] += k.rate * (k.lift + factor[i]) * step;
        momentum[i] = average;
        total[i] = precise;
        root[i] = inverse;
    }
}

/* total = h + delta, root = 1/sqrt(total), momentum and mean after a single sample. `gradients` are consecutive pieces of the
   vector's gradient, `sizes` their lengths; `terms` are slope, offset, factor and bound. */
void ivon_update(int64_t pieces, const int64_t *sizes, const float *const *gradients, const float *noise, float *mean,
                 float *total, float *root, float *momentum, const term terms[4], const numbers *k) {
    float constants[4][BLOCK];
    const float *values[4];
    int64_t first = 0;
    for (int j = 0; j < 4; j++) values_of(&terms[j], 0, constants[j], 1);
    for (int64_t piece = 0; piece < pieces; piece++) {
        for (int64_t start = 0; start < sizes[piece]; start += BLOCK) {
            int64_t left = sizes[piece] - start, at = first + start;
            for (int j = 0; j < 4; j++) values[j] = values_of(&terms[j], at, constants[j], 0);
            update(left < BLOCK ? (int)left : BLOCK, noise + at, gradients[piece] + start, mean + at, total + at, root + at,
                   momentum + at, values[0], values[1], values[2], values[3], *k);
        }
        first += sizes[piece];
    }
}
