/* The passes over the rows behind sinkhorn: which clusters matter to a row, and what their scalings make of it.

   Every logit is one chain of fused multiply-adds over the features, in their order. So it does not depend on which rows
   are computed together, nor on the width of the vectors. Sums over rows are whole numbers. Hence every result is the same
   to the bit for any blocks of rows in any order. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define X86 1
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define AVX2 __attribute__((target("avx2,fma")))
#endif

#define INLINE static inline __attribute__((always_inline))
#define PANEL 64 /* clusters whose weights lie together */
#define GROUP 6  /* rows that are multiplied together */
#define TILE 48  /* rows whose logits are kept at a time, a multiple of GROUP */
#define DEPTH 256 /* features that are multiplied at a time, so that a panel of weights stays in the cache */
#define LANES 8

enum { UNSUPPORTED = 0, WITH_AVX2 = 1, WITH_AVX512 = 2 };

typedef struct {
    int64_t num_clusters, dim;
    const float *packed; /* (K / 64, D, 64) weights, zero-padded; NULL where the rows are the logits */
    const float *bias;   /* (K padded) */
    const double *scaling; /* (K,) u, -infinity for clusters that take no rows */
    double sharpness, depth;
} head_t;

/* Row i has the candidates first[i] to first[i + 1]. */
typedef struct {
    int64_t num_rows, most; /* most: the largest number of candidates of a row */
    const int64_t *first;
    const int32_t *cluster;
    const double *score; /* sharpness * logit + u, less the largest of its row: in [-depth, 0] */
    double negligible;   /* what is so far below the best of its row has no share */
} candidates_t;

int sinkhorn_support(void) {
#ifdef X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return WITH_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return WITH_AVX2;
#endif
    return UNSUPPORTED;
}

/* ------------------------------------------------------------------------------------------------------------- logits */

#ifdef X86
/* 6 rows by 64 clusters, `depth` features more. Named sums: an array of them would not stay in registers. */
AVX512 INLINE void multiply_avx512(const float *x, int64_t stride, const float *panel, int64_t depth, float *out,
                                   int64_t width) {
#define LOAD(r)                                                                                                       \
    __m512 s##r##0 = _mm512_loadu_ps(out + r * width), s##r##1 = _mm512_loadu_ps(out + r * width + 16),               \
           s##r##2 = _mm512_loadu_ps(out + r * width + 32), s##r##3 = _mm512_loadu_ps(out + r * width + 48);
#define STEP(r)                                                                                                       \
    {                                                                                                                 \
        __m512 one = _mm512_set1_ps(x[r * stride + d]);                                                               \
        s##r##0 = _mm512_fmadd_ps(one, w0, s##r##0), s##r##1 = _mm512_fmadd_ps(one, w1, s##r##1);                     \
        s##r##2 = _mm512_fmadd_ps(one, w2, s##r##2), s##r##3 = _mm512_fmadd_ps(one, w3, s##r##3);                     \
    }
#define STORE(r)                                                                                                      \
    _mm512_storeu_ps(out + r * width, s##r##0), _mm512_storeu_ps(out + r * width + 16, s##r##1),                      \
        _mm512_storeu_ps(out + r * width + 32, s##r##2), _mm512_storeu_ps(out + r * width + 48, s##r##3);
    LOAD(0) LOAD(1) LOAD(2) LOAD(3) LOAD(4) LOAD(5)
    for (int64_t d = 0; d < depth; d++, panel += PANEL) {
        __m512 w0 = _mm512_loadu_ps(panel), w1 = _mm512_loadu_ps(panel + 16);
        __m512 w2 = _mm512_loadu_ps(panel + 32), w3 = _mm512_loadu_ps(panel + 48);
        STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5)
    }
    STORE(0) STORE(1) STORE(2) STORE(3) STORE(4) STORE(5)
#undef LOAD
#undef STEP
#undef STORE
}

AVX2 INLINE void multiply_avx2(const float *x, int64_t stride, const float *panel, int64_t depth, float *out,
                               int64_t width) {
    for (int part = 0; part < PANEL; part += 16) { /* 16 clusters by 6 rows: 12 sums fit the registers */
#define LOAD(r)                                                                                                       \
    __m256 s##r##0 = _mm256_loadu_ps(out + r * width + part), s##r##1 = _mm256_loadu_ps(out + r * width + part + 8);
#define STEP(r)                                                                                                       \
    {                                                                                                                 \
        __m256 one = _mm256_set1_ps(x[r * stride + d]);                                                               \
        s##r##0 = _mm256_fmadd_ps(one, w0, s##r##0), s##r##1 = _mm256_fmadd_ps(one, w1, s##r##1);                     \
    }
#define STORE(r)                                                                                                      \
    _mm256_storeu_ps(out + r * width + part, s##r##0), _mm256_storeu_ps(out + r * width + part + 8, s##r##1);
        LOAD(0) LOAD(1) LOAD(2) LOAD(3) LOAD(4) LOAD(5)
        for (int64_t d = 0; d < depth; d++) {
            __m256 w0 = _mm256_loadu_ps(panel + d * PANEL + part), w1 = _mm256_loadu_ps(panel + d * PANEL + part + 8);
            STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5)
        }
        STORE(0) STORE(1) STORE(2) STORE(3) STORE(4) STORE(5)
#undef LOAD
#undef STEP
#undef STORE
    }
}
#endif

/* e^x for x <= 0 by adds, multiplications and shifts: every compiler makes the same bits of it. */
INLINE double exponential(double x) {
    const double magic = 6755399441055744.0; /* 1.5 * 2^52: adding it rounds to a whole number, found in the low bits */
    x = x < -700 ? -700 : x;
    double shifted = x * 1.4426950408889634 + magic, whole = shifted - magic;
    double r = (x - whole * 0.693147180369123816490) - whole * 1.90821492927058770002e-10;
    double p = 1.0 / 479001600;
    p = p * r + 1.0 / 39916800;
    p = p * r + 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    p = p * r + 1;
    p = p * r + 1;
    uint64_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 1023) << 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

INLINE double largest_of(const double *values, int64_t padded) {
    double lanes[LANES], result = -INFINITY;
    for (int j = 0; j < LANES; j++) lanes[j] = -INFINITY;
    for (int64_t k = 0; k < padded; k += LANES)
        for (int j = 0; j < LANES; j++) lanes[j] = values[k + j] > lanes[j] ? values[k + j] : lanes[j];
    for (int j = 0; j < LANES; j++) result = lanes[j] > result ? lanes[j] : result;
    return result;
}

/* values become e^(values - largest); gives their sum. */
INLINE double exponentials(double *values, int64_t padded, double largest) {
    double lanes[LANES] = {0}, sum = 0;
    for (int64_t k = 0; k < padded; k += LANES)
        for (int j = 0; j < LANES; j++) {
            values[k + j] = exponential(values[k + j] - largest);
            lanes[j] += values[k + j];
        }
    for (int j = 0; j < LANES; j++) sum += lanes[j];
    return sum;
}

/* --------------------------------------------------------------------------------------------------------- candidates */

/* The candidates of one row, from its logits: those at most `depth` below the best. Gives their number. */
INLINE int64_t choose(const float *logits, const head_t *head, double *scores, int32_t *cluster, double *score,
                      double *top, double *norm) {
    int64_t num_clusters = head->num_clusters, padded = (num_clusters + LANES - 1) / LANES * LANES, count = 0;
    for (int64_t k = 0; k < num_clusters; k++) scores[k] = logits[k];
    for (int64_t k = num_clusters; k < padded; k++) scores[k] = -INFINITY;
    double largest = largest_of(scores, padded);
    *norm = largest + log(exponentials(scores, padded, largest));
    for (int64_t k = 0; k < num_clusters; k++) scores[k] = head->sharpness * logits[k] + head->scaling[k];
    for (int64_t k = num_clusters; k < padded; k++) scores[k] = -INFINITY;
    double best = largest_of(scores, padded), floor = best - head->depth;
    for (int64_t k = 0; k < padded; k += LANES) {
        int found = 0;
        for (int j = 0; j < LANES; j++) found |= scores[k + j] >= floor;
        if (!found) continue;
        for (int j = 0; j < LANES; j++)
            if (scores[k + j] >= floor && scores[k + j] > -INFINITY) {
                cluster[count] = (int32_t)(k + j);
                score[count++] = scores[k + j] - best;
            }
    }
    *top = best;
    return count;
}

#define CANDIDATES(suffix, ...)                                                                                        \
    __VA_ARGS__ static void logits_##suffix(const float *rows, int64_t count, const head_t *head, float *tile) {      \
        int64_t dim = head->dim, width = (head->num_clusters + PANEL - 1) / PANEL * PANEL;                            \
        for (int64_t row = 0; row < TILE; row++) memcpy(tile + row * width, head->bias, width * sizeof(float));       \
        for (int64_t d = 0; d < dim; d += DEPTH)                                                                      \
            for (int64_t k = 0; k < width; k += PANEL)                                                                \
                for (int64_t row = 0; row < count; row += GROUP)                                                      \
                    multiply_##suffix(rows + row * dim + d, dim, head->packed + k * dim + d * PANEL,                  \
                                      dim - d < DEPTH ? dim - d : DEPTH, tile + row * width + k, width);              \
    }                                                                                                                 \
    __VA_ARGS__ static void candidates_##suffix(const float *rows, int64_t num_rows, const head_t *head,              \
                                                char *memory, int64_t *first, int32_t *cluster, double *score,        \
                                                double *top, double *norm) {                                          \
        int64_t dim = head->dim, width = (head->num_clusters + PANEL - 1) / PANEL * PANEL;                            \
        double *scores = (double *)memory;                                                                            \
        float *tile = (float *)(scores + width), *last = tile + TILE * width;                                         \
        first[0] = 0;                                                                                                 \
        for (int64_t start = 0; start < num_rows; start += TILE) {                                                    \
            int64_t count = num_rows - start < TILE ? num_rows - start : TILE;                                        \
            const float *here = rows + start * dim, *logits = here;                                                   \
            int64_t stride = dim;                                                                                     \
            if (head->packed) {                                                                                       \
                if (count % GROUP) here = memcpy(last, here, count * dim * sizeof(float));                            \
                logits_##suffix(here, count, head, tile);                                                             \
                logits = tile, stride = width;                                                                        \
            }                                                                                                         \
            for (int64_t row = 0; row < count; row++) {                                                               \
                int64_t i = start + row, at = first[i];                                                               \
                first[i + 1] =                                                                                        \
                    at + choose(logits + row * stride, head, scores, cluster + at, score + at, top + i, norm + i);    \
            }                                                                                                         \
        }                                                                                                             \
    }

/* ------------------------------------------------------------------------------------------------- what is made of them */

/* Adding 1.5 * 2^52 rounds to a whole number, whose low bits are then those of the float. */
#define MAGIC 6755399441055744.0

INLINE int64_t rounded(double value) {
    int64_t bits, zero;
    double shifted = value + MAGIC, magic = MAGIC;
    memcpy(&bits, &shifted, sizeof bits);
    memcpy(&zero, &magic, sizeof zero);
    return bits - zero;
}

/* The part of a row's plan that is not negligible: the clusters and their shares, in order. Gives how many, and the
   logarithm of the row's sum. */
INLINE int64_t share_out(const candidates_t *all, int64_t row, const double *shift, double *scores, int32_t *cluster,
                         double *share, double *value) {
    int64_t first = all->first[row], number = all->first[row + 1] - first, count = 0;
    int64_t padded = (number + LANES - 1) / LANES * LANES;
    const int32_t *candidate = all->cluster + first;
    for (int64_t j = 0; j < number; j++) scores[j] = all->score[first + j] + shift[candidate[j]];
    if (number == 1) {
        cluster[0] = *candidate, share[0] = 1, *value = scores[0];
        return 1;
    }
    for (int64_t j = number; j < padded; j++) scores[j] = -INFINITY;
    double largest = largest_of(scores, padded), floor = largest - all->negligible;
    for (int64_t j = 0; j < padded; j += LANES) {
        int found = 0;
        for (int i = 0; i < LANES; i++) found |= scores[j + i] >= floor;
        if (!found) continue;
        for (int i = 0; i < LANES; i++)
            if (scores[j + i] >= floor) {
                cluster[count] = candidate[j + i];
                share[count++] = scores[j + i];
            }
    }
    for (int64_t j = count; j % LANES; j++) share[j] = -INFINITY;
    double sum = exponentials(share, (count + LANES - 1) / LANES * LANES, largest), unit = 1 / sum;
    for (int64_t j = 0; j < count; j++) share[j] *= unit;
    *value = largest + log(sum);
    return count;
}

#define PASSES(suffix, ...)                                                                                            \
    __VA_ARGS__ static int64_t shares_##suffix(const candidates_t *all, const double *shift, double value_scale,      \
                                               double *scores, int64_t *first, int32_t *cluster, double *share) {     \
        int64_t value = 0;                                                                                            \
        first[0] = 0;                                                                                                 \
        for (int64_t row = 0; row < all->num_rows; row++) {                                                           \
            int64_t at = first[row];                                                                                  \
            double one;                                                                                               \
            first[row + 1] = at + share_out(all, row, shift, scores, cluster + at, share + at, &one);                 \
            value += rounded(one * value_scale);                                                                      \
        }                                                                                                             \
        return value;                                                                                                 \
    }                                                                                                                 \
    __VA_ARGS__ static void marginals_##suffix(const int32_t *cluster, const double *share, int64_t count,            \
                                               double scale, int64_t *marginals, int64_t *slopes) {                   \
        for (int64_t j = 0; j < count; j++) {                                                                         \
            marginals[cluster[j]] += rounded(share[j] * scale);                                                       \
            slopes[cluster[j]] += rounded(share[j] * (1 - share[j]) * scale);                                         \
        }                                                                                                             \
    }                                                                                                                 \
    __VA_ARGS__ static void product_##suffix(const int64_t *first, const int32_t *cluster, const double *share,       \
                                             int64_t num_rows, const double *vector, double scale, int64_t *result) { \
        for (int64_t row = 0; row < num_rows; row++) {                                                                \
            int64_t from = first[row], to = first[row + 1];                                                           \
            if (to - from == 1) continue;                                                                             \
            double mean = 0, lanes[4] = {0};                                                                          \
            for (int64_t j = from; j < to; j++) lanes[(j - from) % 4] += share[j] * vector[cluster[j]];               \
            for (int i = 0; i < 4; i++) mean += lanes[i];                                                             \
            for (int64_t j = from; j < to; j++)                                                                       \
                result[cluster[j]] += rounded(share[j] * (vector[cluster[j]] - mean) * scale);                        \
        }                                                                                                             \
    }

#ifdef X86
CANDIDATES(avx512, AVX512)
PASSES(avx512, AVX512)
CANDIDATES(avx2, AVX2)
PASSES(avx2, AVX2)
#endif

/* Candidates of rows (n, D), or (n, K) logits. first: (n + 1). cluster, score: room for n * K. top: (n) the largest
   sharpness * logit + u. norm: (n) log of the sum of e^logit. Returns their number, or -1 if there is no memory. */
int64_t sinkhorn_candidates(const float *rows, int64_t num_rows, const head_t *head, int64_t support, int64_t *first,
                            int32_t *cluster, double *score, double *top, double *norm) {
    int64_t width = (head->num_clusters + PANEL - 1) / PANEL * PANEL;
    char *memory = calloc(width * sizeof(double) + TILE * (width + head->dim) * sizeof(float), 1);
    if (!memory) return -1;
#ifdef X86
    if (support == WITH_AVX512)
        candidates_avx512(rows, num_rows, head, memory, first, cluster, score, top, norm);
    else
        candidates_avx2(rows, num_rows, head, memory, first, cluster, score, top, norm);
#endif
    free(memory);
    return first[num_rows];
}

/* The plan at the scaling u + shift, without what is negligible. first: (n + 1). cluster, share: room for all
   candidates and 8 more. Returns the sum of log(sum(e^(score + shift))) times value_scale; lowest if there is no memory. */
int64_t sinkhorn_shares(const candidates_t *all, const double *shift, double value_scale, int64_t support, int64_t *first,
                        int32_t *cluster, double *share) {
    double *scores = malloc((all->most + LANES) * sizeof(double));
    int64_t value = 0;
    if (!scores) return INT64_MIN;
#ifdef X86
    if (support == WITH_AVX512)
        value = shares_avx512(all, shift, value_scale, scores, first, cluster, share);
    else
        value = shares_avx2(all, shift, value_scale, scores, first, cluster, share);
#endif
    free(scores);
    return value;
}

/* Add shares to marginals (K) and share * (1 - share) to slopes (K), both times scale. */
void sinkhorn_marginals(const int32_t *cluster, const double *share, int64_t count, double scale, int64_t support,
                        int64_t *marginals, int64_t *slopes) {
#ifdef X86
    if (support == WITH_AVX512) return marginals_avx512(cluster, share, count, scale, marginals, slopes);
    marginals_avx2(cluster, share, count, scale, marginals, slopes);
#endif
}

/* Add to result (K) the derivative of the marginals along vector (K), times scale. */
void sinkhorn_product(const int64_t *first, const int32_t *cluster, const double *share, int64_t num_rows,
                      const double *vector, double scale, int64_t support, int64_t *result) {
#ifdef X86
    if (support == WITH_AVX512) return product_avx512(first, cluster, share, num_rows, vector, scale, result);
    product_avx2(first, cluster, share, num_rows, vector, scale, result);
#endif
}
