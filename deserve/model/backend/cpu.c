/* Kernels for CPUs: attention of sequences that decode, over their pages where they lie; norms and activations in one
 * pass over memory.
 *
 * Compiled for one model: HEADS, KV_HEADS, HEAD_DIM (a multiple of 16), BFLOAT16 or else float. Sums are float32.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define GROUP (HEADS / KV_HEADS)
#define PARTS (HEAD_DIM / LANES) /* vectors of a head */
#define LINE 64 /* bytes of a cache line */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

#ifdef BFLOAT16
typedef uint16_t scalar;
typedef uint16_t half_vec __attribute__((vector_size(2 * LANES)));

static inline vec load(const scalar *from) {
    half_vec x;
    memcpy(&x, from, sizeof x);
    return (vec)(__builtin_convertvector(x, ivec) << 16);
}

static inline float widen(scalar x) {
    const uint32_t bits = (uint32_t)x << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

static inline scalar narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return (bits >> 16) | 0x40; /* stays NaN */
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16; /* to the nearest, or to even */
}
#else
typedef float scalar;

static inline vec load(const scalar *from) {
    vec x;
    memcpy(&x, from, sizeof x);
    return x;
}

static inline float widen(scalar x) { return x; }

static inline scalar narrow(float x) { return x; }
#endif

static inline void prefetch(const scalar *head) {
    for (size_t at = 0; at < HEAD_DIM * sizeof(scalar); at += LINE) __builtin_prefetch((const char *)head + at);
}

#define FOLD(a, b, low, high) (__builtin_shuffle(a, b, (ivec)low) + __builtin_shuffle(a, b, (ivec)high))
#define LANE(...) {__VA_ARGS__}

/* The sum of each of 16 vectors. Each step adds one half of the lanes to the other, of two vectors at once. */
static inline vec sums_of(const vec x[LANES]) {
    vec eights[8], fours[4], twos[2];
    for (int i = 0; i < 8; i++)
        eights[i] = FOLD(x[i], x[i + 8], LANE(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                         LANE(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
    for (int i = 0; i < 4; i++)
        fours[i] = FOLD(eights[i], eights[i + 4], LANE(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
                        LANE(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31));
    for (int i = 0; i < 2; i++)
        twos[i] = FOLD(fours[i], fours[i + 2], LANE(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
                       LANE(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
    return FOLD(twos[0], twos[1], LANE(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
                LANE(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31));
}

/* exp(x) for x <= 0, to 2e-7 of it: a power of two times a polynomial. NaN stays NaN. */
static inline float exponential(float x) {
    float y = x * 1.44269504f;
    y = y < -126 ? -126 : y;
    const float whole = rintf(y), f = y - whole;
    float p = 1.5403530e-4f;
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    const int32_t bits = ((int32_t)whole + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

/* Turn `length` scores, behind which there is room for LANES more, into exp(score - top). Returns their sum. */
static inline float exponentials(float *scores, int64_t length, float *top) {
    for (int i = 0; i < LANES; i++) scores[length + i] = -INFINITY;
    vec most;
    memcpy(&most, scores, sizeof most);
    for (int64_t at = LANES; at < length; at += LANES) {
        vec x;
        memcpy(&x, scores + at, sizeof x);
        const ivec larger = x > most;
        most = (vec)(((ivec)x & larger) | ((ivec)most & ~larger));
    }
    *top = most[0];
    for (int i = 1; i < LANES; i++) *top = most[i] > *top ? most[i] : *top;
    float total = 0;
    for (int64_t at = 0; at < length; at++) {
        scores[at] = exponential(scores[at] - *top);
        total += scores[at];
    }
    return total;
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* `pages` [pages, keys and values, page_size, KV_HEADS, HEAD_DIM]. Row r is token tokens[r] of `queries` and `out`
 * [tokens, HEADS, HEAD_DIM]; it attends to lengths[r] tokens on the pages tables[r * width...]. `log_sums`
 * [tokens, HEADS]: the logarithm of the sum of its exponential scores, unless NULL. Returns 0, or -1 without memory.
 */
int attend(const scalar *pages, int64_t page_size, const int32_t *tables, int64_t width, const int32_t *lengths,
           const int64_t *tokens, int64_t rows, const scalar *queries, scalar *out, float *log_sums, int threads) {
    const int64_t token = KV_HEADS * HEAD_DIM, half = page_size * token;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *scores = NULL;
        int64_t room = 0;
#pragma omp for schedule(dynamic, 4)
        for (int64_t row = 0; row < rows; row++) {
            const int64_t length = lengths[row], stride = length + LANES;
            const int32_t *table = tables + row * width;
            if (stride > room) {
                room = 2 * stride;
                free(scores);
                scores = malloc(room * HEADS * sizeof(float));
            }
            if (!scores) {
                room = 0;
#pragma omp atomic write
                failed = -1;
                continue;
            }
            vec q[HEADS][PARTS];
            for (int h = 0; h < HEADS; h++)
                for (int i = 0; i < PARTS; i++)
                    q[h][i] = load(queries + (tokens[row] * HEADS + h) * HEAD_DIM + i * LANES) / sqrtf(HEAD_DIM);
            for (int64_t at = 0; at < length; at += page_size) {
                const scalar *keys = pages + 2 * table[at / page_size] * half;
                const int64_t end = least(page_size, length - at);
                /* Pages lie anywhere, so the hardware does not guess the next one; behind the keys come the values. */
                const scalar *next =
                    at + page_size < length ? pages + 2 * table[at / page_size + 1] * half : pages + (2 * table[0] + 1) * half;
                for (int kv = 0; kv < KV_HEADS; kv++)
                    for (int64_t first = 0; first < end; first += LANES) {
                        vec products[GROUP][LANES];
                        for (int64_t t = first; t < least(first + LANES, end); t++) {
                            const int64_t offset = t * token + kv * HEAD_DIM;
                            prefetch(next + offset);
                            vec product[GROUP]; /* in registers */
                            for (int i = 0; i < PARTS; i++) {
                                const vec k = load(keys + offset + i * LANES);
                                for (int g = 0; g < GROUP; g++)
                                    product[g] = i ? product[g] + q[kv * GROUP + g][i] * k : q[kv * GROUP + g][i] * k;
                            }
                            for (int g = 0; g < GROUP; g++) products[g][t - first] = product[g];
                        }
                        for (int g = 0; g < GROUP; g++) { /* lanes behind the end are overwritten later */
                            const vec sums = sums_of(products[g]);
                            memcpy(scores + (kv * GROUP + g) * stride + at + first, &sums, sizeof sums);
                        }
                    }
            }
            float share[HEADS];
            for (int h = 0; h < HEADS; h++) {
                float top;
                const float total = exponentials(scores + h * stride, length, &top);
                share[h] = 1 / total;
                if (log_sums) log_sums[tokens[row] * HEADS + h] = top + logf(total);
            }
            vec sums[HEADS][PARTS];
            memset(sums, 0, sizeof sums);
            for (int64_t at = 0; at < length; at += page_size) {
                const scalar *values = pages + (2 * table[at / page_size] + 1) * half;
                const int64_t end = least(page_size, length - at);
                const scalar *next = at + page_size < length ? pages + (2 * table[at / page_size + 1] + 1) * half : values;
                for (int kv = 0; kv < KV_HEADS; kv++) {
                    vec part[GROUP][PARTS]; /* in registers */
                    memcpy(part, sums[kv * GROUP], sizeof part);
                    for (int64_t t = 0; t < end; t++) {
                        const int64_t offset = t * token + kv * HEAD_DIM;
                        prefetch(next + offset);
                        for (int i = 0; i < PARTS; i++) {
                            const vec v = load(values + offset + i * LANES);
                            for (int g = 0; g < GROUP; g++) part[g][i] += scores[(kv * GROUP + g) * stride + at + t] * v;
                        }
                    }
                    memcpy(sums[kv * GROUP], part, sizeof part);
                }
            }
            scalar *to = out + tokens[row] * HEADS * HEAD_DIM;
            for (int h = 0; h < HEADS; h++)
                for (int i = 0; i < HEAD_DIM; i++)
                    to[h * HEAD_DIM + i] = narrow(sums[h][i / LANES][i % LANES] * share[h]);
        }
        free(scores);
    }
    return failed;
}

/* out = RMSNorm of x, by rows [rows, n]; with a `residual` of residual + x, which it becomes. */
void rms_norm(const scalar *x, scalar *residual, const scalar *weight, scalar *out, int64_t rows, int64_t n, float eps,
              int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const scalar *from = x + row * n;
        if (residual) {
            scalar *sum = residual + row * n;
            for (int64_t i = 0; i < n; i++) sum[i] = narrow(widen(sum[i]) + widen(from[i]));
            from = sum;
        }
        float squares = 0;
        for (int64_t i = 0; i < n; i++) squares += widen(from[i]) * widen(from[i]);
        const float factor = 1 / sqrtf(squares / n + eps);
        scalar *to = out + row * n;
        for (int64_t i = 0; i < n; i++) to[i] = narrow(widen(from[i]) * factor * widen(weight[i]));
    }
}

/* out [rows, n] = silu(gate) * up of gate_up [rows, 2 * n]. */
void silu_and_mul(const scalar *gate_up, scalar *out, int64_t rows, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const scalar *gate = gate_up + row * 2 * n, *up = gate + n;
        scalar *to = out + row * n;
        for (int64_t i = 0; i < n; i++) {
            const float x = widen(gate[i]), e = exponential(-fabsf(x));
            to[i] = narrow(x * (x < 0 ? e : 1.0f) / (1 + e) * widen(up[i]));
        }
    }
}
