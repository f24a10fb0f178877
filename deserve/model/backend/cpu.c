/* Kernels for CPUs: attention over pages where they lie; norms and activations in one pass over memory.
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

/* The upper half of it is x in bfloat16. */
static inline uint32_t rounded(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    /* NaN stays NaN; others go to the nearest, or to even. */
    return x != x ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
}

static inline scalar narrow(float x) { return rounded(x) >> 16; }
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

#define TALL 6 /* rows and vectors of a product that registers hold */
#define WIDE 4
#define KEYS 96 /* at a time; a multiple of TALL and PACK */
#define LINES ((BLOCK * GROUP + LANES - 1) / LANES * LANES) /* queries that read one KV head */
#define INLINE static inline __attribute__((always_inline))

/* A unit is the elements that one lane multiplies and adds up at once. */
#if defined(BFLOAT16) && defined(__AVX512BF16__)
#include <immintrin.h>
#define PACK 2
typedef int32_t unit;
typedef ivec units;

static inline vec multiply(vec sum, unit a, units b) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
}

static inline unit pack(scalar first, scalar second) { return first | (uint32_t)second << 16; }

static inline unit pack_weights(float first, float second) {
    return rounded(first) >> 16 | (rounded(second) & 0xffff0000);
}

static inline void pack_head(unit *to, const scalar *head) { memcpy(to, head, HEAD_DIM * sizeof *head); }
#else
#define PACK 1
typedef float unit;
typedef vec units;

static inline vec multiply(vec sum, unit a, units b) { return sum + a * b; }

static inline unit pack(scalar first, scalar second) { return widen(first); }

static inline unit pack_weights(float first, float second) { return first; }

static inline void pack_head(unit *to, const scalar *head) {
    for (int i = 0; i < HEAD_DIM; i++) to[i] = widen(head[i]);
}
#endif

/* c [TALL, n vectors] = a b + factors c; without factors a b. As in `product`. */
INLINE void tile(const unit *a, int64_t down, int64_t along, const unit *b, int64_t width, int64_t depth, float *c,
                 const float *factors, const int n) {
    vec sums[TALL][WIDE]; /* in registers */
    for (int i = 0; i < TALL; i++)
        for (int j = 0; j < n; j++) {
            sums[i][j] = (vec){0};
            if (factors) {
                memcpy(&sums[i][j], c + i * width + j * LANES, sizeof(vec));
                sums[i][j] *= factors[i];
            }
        }
    for (int64_t k = 0; k < depth; k++) {
        units other[WIDE];
        for (int j = 0; j < n; j++) memcpy(&other[j], b + k * width + j * LANES, sizeof(units));
        for (int i = 0; i < TALL; i++)
            for (int j = 0; j < n; j++) sums[i][j] = multiply(sums[i][j], a[i * down + k * along], other[j]);
    }
    for (int i = 0; i < TALL; i++)
        for (int j = 0; j < n; j++) memcpy(c + i * width + j * LANES, &sums[i][j], sizeof(vec));
}

/* c [rows, width] = a [rows, depth] b [depth, width], plus factors [rows] times c unless that is NULL. Element (i, k) of
 * a is a[i * down + k * along]. There is room for TALL - 1 rows more; `width` is a multiple of LANES. */
static inline void product(const unit *a, int64_t rows, int64_t down, int64_t along, const unit *b, int64_t width,
                           int64_t depth, float *c, const float *factors) {
    for (int64_t j = 0; j < width; j += WIDE * LANES)
        for (int64_t i = 0; i < rows; i += TALL) {
            const unit *from = a + i * down;
            float *to = c + i * width + j;
            const float *scales = factors ? factors + i : NULL;
            switch ((width - j) / LANES) { /* so that n is known where it is compiled */
            case 1: tile(from, down, along, b + j, width, depth, to, scales, 1); break;
            case 2: tile(from, down, along, b + j, width, depth, to, scales, 2); break;
            case 3: tile(from, down, along, b + j, width, depth, to, scales, 3); break;
            default: tile(from, down, along, b + j, width, depth, to, scales, WIDE);
            }
        }
}

/* What a block of queries is computed in. A line is a query of one head. */
struct scratch {
    unit q[HEAD_DIM / PACK * LINES], k[KEYS][HEAD_DIM / PACK], v[KEYS / PACK][HEAD_DIM];
    float scores[KEYS * LINES], out[LINES + TALL][HEAD_DIM], top[LINES], total[LINES], factors[LINES + TALL];
    int32_t lengths[LINES];
};

/* Like `attend`, for many tokens that read the same pages. Block i, at blocks[3 * i], is a row of `tables`, and from
 * where to where its tokens, BLOCK at most, are in `tokens` and `lengths`, which grow within it. (FlashAttention, arXiv
 * 2205.14135.) */
int attend_blocks(const scalar *pages, int64_t page_size, const int32_t *tables, int64_t width, const int64_t *blocks,
                  int64_t count, const int32_t *lengths, const int64_t *tokens, const scalar *queries, scalar *out,
                  float *log_sums, int threads) {
    const int64_t token = KV_HEADS * HEAD_DIM, half = page_size * token;
    const float scale = 1 / sqrtf(HEAD_DIM);
    static const scalar none[HEAD_DIM];
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        struct scratch *s = aligned_alloc(LINE, (sizeof *s + LINE - 1) / LINE * LINE);
        if (!s) {
#pragma omp atomic write
            failed = -1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t work = 0; work < count * KV_HEADS; work++) {
            if (!s) continue;
            const int64_t kv = work % KV_HEADS, *block = blocks + 3 * (work / KV_HEADS);
            const int64_t first = block[1], n = block[2] - first, longest = lengths[block[2] - 1];
            const int64_t lines = (n * GROUP + LANES - 1) / LANES * LANES; /* the last ones may repeat a token */
            const int32_t *table = tables + block[0] * width;
            float *scores = s->scores;
            unit *weights = (unit *)scores; /* take their place */
            for (int64_t line = 0; line < lines; line++) {
                const int64_t at = first + least(line / GROUP, n - 1);
                const scalar *q = queries + (tokens[at] * HEADS + kv * GROUP + line % GROUP) * HEAD_DIM;
                for (int i = 0; i < HEAD_DIM; i += PACK) s->q[i / PACK * lines + line] = pack(q[i], q[i + PACK - 1]);
                s->lengths[line] = lengths[at];
                s->top[line] = -INFINITY;
                s->total[line] = 0;
            }
            memset(s->out, 0, lines * sizeof *s->out);
            for (int64_t at = 0; at < longest; at += KEYS) {
                const int64_t end = least(KEYS, longest - at), keys = (end + TALL - 1) / TALL * TALL;
                for (int64_t t = 0; t < keys; t += PACK) {
                    const scalar *v[PACK];
                    for (int i = 0; i < PACK; i++) {
                        const int64_t place = at + t + i;
                        const int held = t + i < end; /* others have a weight of 0, but 0 times NaN is NaN */
                        const int64_t offset = place % page_size * token + kv * HEAD_DIM;
                        const scalar *k = held ? pages + 2 * table[place / page_size] * half + offset : none;
                        v[i] = held ? k + half : none;
                        pack_head(s->k[t + i], k);
                    }
                    for (int d = 0; d < HEAD_DIM; d++) s->v[t / PACK][d] = pack(v[0][d], v[PACK - 1][d]);
                }
                product(s->k[0], keys, HEAD_DIM / PACK, 1, s->q, lines, HEAD_DIM / PACK, scores, NULL);
                if (at + keys > s->lengths[0])
                    for (int64_t t = 0; t < keys; t++)
                        for (int64_t line = 0; line < lines; line++)
                            scores[t * lines + line] = at + t < s->lengths[line] ? scores[t * lines + line] : -INFINITY;
                for (int64_t line = 0; line < lines; line++) s->factors[line] = s->top[line];
                for (int64_t t = 0; t < keys; t++)
                    for (int64_t line = 0; line < lines; line++) {
                        const float score = scores[t * lines + line] * scale;
                        s->top[line] = score > s->top[line] ? score : s->top[line];
                    }
                for (int64_t line = 0; line < lines; line++) {
                    s->factors[line] = exponential(s->factors[line] - s->top[line]);
                    s->total[line] *= s->factors[line];
                }
                for (int64_t t = 0; t < keys; t += PACK)
                    for (int64_t line = 0; line < lines; line++) {
                        const float *score = scores + t * lines + line, top = s->top[line];
                        const float weight = exponential(score[0] * scale - top);
                        const float other = PACK == 1 ? 0 : exponential(score[(PACK - 1) * lines] * scale - top);
                        s->total[line] += weight + other;
                        weights[t / PACK * lines + line] = pack_weights(weight, other);
                    }
                product(weights, lines, 1, lines, s->v[0], HEAD_DIM, keys / PACK, s->out[0], s->factors);
            }
            for (int64_t line = 0; line < n * GROUP; line++) {
                const int64_t head = tokens[first + line / GROUP] * HEADS + kv * GROUP + line % GROUP;
                for (int i = 0; i < HEAD_DIM; i++) out[head * HEAD_DIM + i] = narrow(s->out[line][i] / s->total[line]);
                if (log_sums) log_sums[head] = s->top[line] + logf(s->total[line]);
            }
        }
        free(s);
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

/* out [tokens, heads, HEAD_DIM] = x, whose tokens are `stride` apart, with the first `size` elements of each head turned.
 * sines [tokens, size], of which the first halves are negated, and cosines. */
void rotate(const scalar *x, int64_t stride, const scalar *cosines, const scalar *sines, scalar *out, int64_t tokens,
            int64_t heads, int64_t size, int threads) {
    const int64_t half = size / 2;
#pragma omp parallel for num_threads(threads)
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t head = 0; head < heads; head++) {
            const scalar *from = x + token * stride + head * HEAD_DIM;
            const scalar *c = cosines + token * size, *s = sines + token * size;
            scalar *restrict to = out + (token * heads + head) * HEAD_DIM;
            for (int64_t i = 0; i < half; i++)
                to[i] = narrow(widen(from[i]) * widen(c[i]) + widen(from[half + i]) * widen(s[i]));
            for (int64_t i = half; i < size; i++)
                to[i] = narrow(widen(from[i]) * widen(c[i]) + widen(from[i - half]) * widen(s[i]));
            for (int64_t i = size; i < HEAD_DIM; i++) to[i] = from[i];
        }
}
