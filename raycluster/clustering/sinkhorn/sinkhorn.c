/* The passes over the rows behind sinkhorn: which clusters matter to a row, and what their scalings make of it.

   Every logit is one chain of fused multiply-adds over the features, in their order. So it does not depend on which rows
   are computed together, nor on the width of the vectors. Sums over rows are integers. Hence results are bitwise
   identical for any blocks of rows in any order. */

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

/* e^x for x <= 0 by adds, multiplications and shifts: bitwise identical with every compiler. */
INLINE double exponential(double x) {
    const double magic = 6755399441055744.0; /* 1.5 * 2^52: adding it rounds to an integer, found in the low bits */
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

/* sharpness * logit + u of one row, padded by -infinity; gives the best of them, and the log of the sum of e^logit. */
INLINE double score(const float *logits, const head_t *head, double *scores, double *norm) {
    int64_t num_clusters = head->num_clusters, padded = (num_clusters + LANES - 1) / LANES * LANES;
    for (int64_t k = 0; k < num_clusters; k++) scores[k] = logits[k];
    for (int64_t k = num_clusters; k < padded; k++) scores[k] = -INFINITY;
    double largest = largest_of(scores, padded);
    *norm = largest + log(exponentials(scores, padded, largest));
    for (int64_t k = 0; k < num_clusters; k++) scores[k] = head->sharpness * logits[k] + head->scaling[k];
    for (int64_t k = num_clusters; k < padded; k++) scores[k] = -INFINITY;
    return largest_of(scores, padded);
}

#ifdef X86
/* Those of `number` scores that reach best - depth: their ids (or places), and how far they are below the best. Scores
   are padded to whole lanes by -infinity; the outputs have room for a lane more than is kept. Gives how many. */
AVX512 INLINE int64_t keep_avx512(const double *scores, int64_t number, double best, double depth, const int32_t *ids,
                                  int32_t *kept, double *below) {
    __m512d floor = _mm512_set1_pd(best - depth), top = _mm512_set1_pd(best), least = _mm512_set1_pd(-INFINITY);
    __m256i places = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0), eight = _mm256_set1_epi32(8);
    int64_t count = 0;
    for (int64_t k = 0; k < number; k += 8, places = _mm256_add_epi32(places, eight)) {
        __m512d some = _mm512_loadu_pd(scores + k);
        __mmask8 found = _mm512_cmp_pd_mask(some, floor, _CMP_GE_OQ) & _mm512_cmp_pd_mask(some, least, _CMP_GT_OQ);
        if (!found) continue;
        __mmask8 there = (__mmask8)(number - k >= 8 ? 255 : (1 << (number - k)) - 1);
        __m256i names = ids ? _mm256_maskz_loadu_epi32(there, ids + k) : places;
        _mm512_storeu_pd(below + count, _mm512_maskz_compress_pd(found, _mm512_sub_pd(some, top)));
        _mm256_storeu_si256((void *)(kept + count), _mm256_maskz_compress_epi32(found, names));
        count += __builtin_popcount(found);
    }
    return count;
}

AVX2 INLINE int64_t keep_avx2(const double *scores, int64_t number, double best, double depth, const int32_t *ids,
                              int32_t *kept, double *below) {
    double floor = best - depth;
    int64_t count = 0;
    for (int64_t k = 0; k < number; k += LANES) {
        int found = 0;
        for (int j = 0; j < LANES; j++) found |= scores[k + j] >= floor;
        for (int j = 0; found && j < LANES; j++)
            if (scores[k + j] >= floor && scores[k + j] > -INFINITY) {
                kept[count] = ids ? ids[k + j] : (int32_t)(k + j);
                below[count++] = scores[k + j] - best;
            }
    }
    return count;
}
#endif

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
                                                char *memory, int64_t *first, int32_t *cluster, double *below,        \
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
                top[i] = score(logits + row * stride, head, scores, norm + i);                                        \
                first[i + 1] = at + keep_##suffix(scores, head->num_clusters, top[i], head->depth, NULL,              \
                                                  cluster + at, below + at);                                          \
            }                                                                                                         \
        }                                                                                                             \
    }

/* ------------------------------------------------------------------------------------------------- what is made of them */

/* Adding 1.5 * 2^52 rounds to an integer, whose low bits are then those of the float. */
#define MAGIC 6755399441055744.0

INLINE int64_t rounded(double value) {
    int64_t bits, zero;
    double shifted = value + MAGIC, magic = MAGIC;
    memcpy(&bits, &shifted, sizeof bits);
    memcpy(&zero, &magic, sizeof zero);
    return bits - zero;
}

/* Scores of one row at the scaling u + shift, padded by -infinity; gives the largest. */
INLINE double shifted(const candidates_t *all, int64_t row, const double *shift, double *scores) {
    int64_t first = all->first[row], number = all->first[row + 1] - first;
    for (int64_t j = 0; j < number; j++) scores[j] = all->score[first + j] + shift[all->cluster[first + j]];
    for (int64_t j = number; j % LANES; j++) scores[j] = -INFINITY;
    return largest_of(scores, (number + LANES - 1) / LANES * LANES);
}

/* Differences from the best score become shares; gives the log of the sum that they are divided by. */
INLINE double share_out(double *share, int64_t count) {
    for (int64_t j = count; j % LANES; j++) share[j] = -INFINITY;
    double sum = exponentials(share, (count + LANES - 1) / LANES * LANES, 0), unit = 1 / sum;
    for (int64_t j = 0; j < count; j++) share[j] *= unit;
    return log(sum);
}

#define PASSES(suffix, ...)                                                                                            \
    __VA_ARGS__ static int64_t shares_##suffix(const candidates_t *all, const double *shift, double value_scale,      \
                                               double *scores, int64_t *first, int32_t *cluster, double *share) {     \
        int64_t value = 0;                                                                                            \
        first[0] = 0;                                                                                                 \
        for (int64_t row = 0; row < all->num_rows; row++) {                                                           \
            int64_t at = first[row], from = all->first[row], number = all->first[row + 1] - from;                     \
            if (number == 1) { /* its only choice, whatever the scalings */                                           \
                cluster[at] = all->cluster[from], share[at] = 1, first[row + 1] = at + 1;                             \
                value += rounded((all->score[from] + shift[cluster[at]]) * value_scale);                              \
                continue;                                                                                             \
            }                                                                                                         \
            double best = shifted(all, row, shift, scores);                                                           \
            int64_t count = keep_##suffix(scores, number, best, all->negligible, all->cluster + from, cluster + at,   \
                                          share + at);                                                                \
            double one = best + share_out(share + at, count);                                                         \
            first[row + 1] = at + count;                                                                              \
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

/* Candidates of rows (n, D), or (n, K) logits. first: (n + 1). cluster, below: room for n * K + 8. top: (n) the largest
   sharpness * logit + u. norm: (n) log of the sum of e^logit. Returns their number, or -1 if there is no memory. */
int64_t sinkhorn_candidates(const float *rows, int64_t num_rows, const head_t *head, int64_t support, int64_t *first,
                            int32_t *cluster, double *below, double *top, double *norm) {
    int64_t width = (head->num_clusters + PANEL - 1) / PANEL * PANEL;
    char *memory = calloc(width * sizeof(double) + TILE * (width + head->dim) * sizeof(float), 1);
    if (!memory) return -1;
#ifdef X86
    if (support == WITH_AVX512)
        candidates_avx512(rows, num_rows, head, memory, first, cluster, below, top, norm);
    else
        candidates_avx2(rows, num_rows, head, memory, first, cluster, below, top, norm);
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
