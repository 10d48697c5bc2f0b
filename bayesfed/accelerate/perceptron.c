/* Mean cross-entropy of a multi-layer perceptron and its gradient, for float32 on a CPU; bayesfed/accelerate/perceptron.py calls it.
   Matrices are torch's, row by row; to Fortran's sgemm they are transposed. NaN passes through: comparisons are false with it. */

#include <math.h>
#include <stdint.h>

enum { SIGMOID, RELU };

/* MOST_LAYERS comes from bayesfed/accelerate/library.py, which compiles this file. */

/* Pointers to 64-bit numbers serve a BLAS with 32-bit ones too: little-endian machines have the lower half first. */
typedef void (*sgemm)(const char *, const char *, const int64_t *, const int64_t *, const int64_t *, const float *, const float *,
                      const int64_t *, const float *, const int64_t *, const float *, float *, const int64_t *);

/* exp(x) to 2 units in the last place, for x between -87.3 and 88.3 and the values there beyond; vectorizable.
   x = n ln 2 + r, and the polynomial of Cephes (Moshier, 1989) for exp(r). */
static inline float exponential(float x) {
    union { uint32_t bits; float value; } power;
    x = x < -87.3f ? -87.3f : x;
    x = x > 88.3f ? 88.3f : x;
    float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* rounded to a whole number by the loss of digits */
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    power.bits = (uint32_t)((int32_t)n + 127) << 23;
    return p * power.value;
}

/* out = f(out + bias), row by row; `bias` may be NULL, `kind` -1 stands for no f. */
static void activate(int64_t rows, int64_t columns, const float *bias, int kind, float *out) {
    for (int64_t r = 0; r < rows; r++) {
        float *row = out + r * columns;
        for (int64_t c = 0; bias && c < columns; c++) row[c] += bias[c];
        if (kind == SIGMOID)
            for (int64_t c = 0; c < columns; c++) row[c] = 1 / (1 + exponential(-row[c]));
        if (kind == RELU)
            for (int64_t c = 0; c < columns; c++) row[c] = row[c] < 0 ? 0 : row[c];
    }
}

/* The mean cross-entropy of logits (rows, columns), which become its gradient. */
static float cross_entropy(int64_t rows, int64_t columns, const int64_t *labels, float *logits) {
    double total = 0;
    for (int64_t r = 0; r < rows; r++) {
        float *row = logits + r * columns, largest = row[0], sum = 0;
        for (int64_t c = 1; c < columns; c++) largest = row[c] > largest ? row[c] : largest;
        float mine = row[labels[r]] - largest;
        for (int64_t c = 0; c < columns; c++) {
            row[c] = exponential(row[c] - largest);
            sum += row[c];
        }
        total += logf(sum) - mine;
        float scale = 1 / (sum * (float)rows);
        for (int64_t c = 0; c < columns; c++) row[c] *= scale;
        row[labels[r]] -= 1 / (float)rows;
    }
    return (float)(total / (double)rows);
}

/* The loss at inputs x (batch, widths[0]) with `labels`, and its gradient with respect to weights (widths[l + 1], widths[l]) and biases
   of all layers. A bias may be NULL. `work` holds 2 batch (widths[1] + ... + widths[layers]) numbers.
   Returns 0, or 1 if a label is no class: then nothing is written. */
int perceptron(sgemm multiply, int64_t layers, const int64_t *widths, int64_t batch, int kind, const float *x, const int64_t *labels,
               const float *const *weights, const float *const *biases, float *const *weight_gradients,
               float *const *bias_gradients, float *work, float *loss) {
    const float one = 1, zero = 0;
    float *outputs[MOST_LAYERS];
    for (int64_t r = 0; r < batch; r++)
        if (labels[r] < 0 || labels[r] >= widths[layers]) return 1;

    for (int64_t l = 0; l < layers; l++) {
        const int64_t *in = &widths[l], *out = &widths[l + 1];
        outputs[l] = work;
        work += batch * *out;
        multiply("T", "N", out, &batch, in, &one, weights[l], in, l ? outputs[l - 1] : x, in, &zero, outputs[l], out);
        activate(batch, *out, biases[l], l < layers - 1 ? kind : -1, outputs[l]);
    }

    float *delta = outputs[layers - 1]; /* the gradient with respect to what the activation of layer l gets */
    *loss = cross_entropy(batch, widths[layers], labels, delta);
    for (int64_t l = layers - 1; l >= 0; l--) {
        const int64_t *in = &widths[l], *out = &widths[l + 1];
        float *before = l ? outputs[l - 1] : (float *)x, *sums = bias_gradients[l];
        multiply("N", "T", in, out, &batch, &one, before, in, delta, out, &zero, weight_gradients[l], in);
        for (int64_t c = 0; sums && c < *out; c++) sums[c] = 0;
        for (int64_t r = 0; sums && r < batch; r++)
            for (int64_t c = 0; c < *out; c++) sums[c] += delta[r * *out + c];
        if (l == 0) break;
        multiply("N", "N", in, &batch, out, &one, weights[l], in, delta, out, &zero, work, in);
        for (int64_t i = 0; kind == SIGMOID && i < batch * *in; i++) work[i] *= before[i] * (1 - before[i]);
        for (int64_t i = 0; kind == RELU && i < batch * *in; i++) work[i] = before[i] <= 0 ? 0 : work[i];
        delta = work;
        work += batch * *in;
    }
    return 0;
}
