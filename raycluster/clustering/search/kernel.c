/* The scan behind engine="int8": nearest centroids by 8-bit products with a proven error bound, decided in float.

   A row x and a centroid c (both about the centroids' mean) are rounded to 8 bits with a scale of their own, x = X + dx
   and c = C + dc. Then |x.c - X.C| <= |dx| |c| + |X| |dc| (Cauchy-Schwarz), where all four norms are known. So the score
   x.c - |c|^2 / 2 of every centroid lies in a known interval; only those whose interval reaches above the best lower end
   are candidates. They are computed again in float32, near-ties of these in float64. What even float64 cannot separate
   (equal centroids) is left to the caller. Nothing of size rows x centroids is ever stored.

   Integers are exact, so every processor finds the same candidates up to rounding, and bitwise identical labels. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define X86 1
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")))
#define AVX2 __attribute__((target("avx2,fma")))
#endif

#define PANEL 64       /* centroids that are scanned together */
#define GROUP 6        /* rows that are scanned together */
#define SUMS_PER_ROW 32       /* sums of a float64 distance */
#define TILE 384       /* rows whose candidates are kept at a time, a multiple of GROUP */
/* INFLATE and ROUNDING, bounds on rounding errors in float32, are those of bounds.py: passed by the compiler's flags,
   as is CANDIDATES, the capacity per row; a row with more is left to the caller. */

enum { PORTABLE = 0, WITH_AVX2 = 1, WITH_AVX512 = 2 };

typedef struct {
    int64_t num_centroids, dim, levels;
    const float *exact;    /* (K, D) the centroids as they are */
    const float *centre;   /* (D,) their mean */
    const float *offsets;  /* (K,) -|centred|^2 / 2 */
    const uint8_t *packed; /* (K / 64, D / 4, 64, 4) 8-bit values + levels, zero-padded */
    const float *scales, *norms, *errors, *tops; /* (K padded): scale, |c|, |dc|, offset + its rounding error */
    float max_norm, error_bound;    /* largest |centred|; relative error of two float32 scores */
} prepared_t;

typedef struct {
    const float *values;          /* (n, D) rows whose nearest are looked for */
    const int64_t *own, *samples; /* (n,) and (K,) sample ids; a row does not find its own */
    int64_t width;                /* how many are kept */
    int64_t *ids;                 /* (n, width) the nearest so far: sample ids, */
    double *distances;            /* (n, width) and squared distances, by (distance, id) */
} nearest_t;

typedef struct {
    int8_t *values;        /* (TILE, padded dim) */
    float *rows;           /* (TILE, dim) about the centre */
    int32_t *start;        /* (TILE) -levels * sum of values: undoes the shift of the centroids */
    float *scale, *error, *length, *error_bound, *floor; /* (TILE): see pack; floor is the best lower end of a score so far */
    int32_t *count, *index; /* (TILE), (TILE, CANDIDATES) */
    float *top;            /* (TILE, CANDIDATES) upper ends */
    double *square;        /* (TILE) |row|^2, for nearest only */
    const int64_t *places; /* (TILE) where the rows stand in nearest */
    const nearest_t *nearest; /* NULL in a search of labels */
} tile_t;

int raycluster_support(void) {
#ifdef X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return WITH_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return WITH_AVX2;
#endif
    return PORTABLE;
}

/* ------------------------------------------------------------------------------------------------ rounding to 8 bits */

/* One vector to integers in [-levels, levels]; gives its scale, |v|, |v - scale q|, and the sum of q.
   Eight partial sums: the compiler may use vectors without being allowed to reorder additions. */
static inline __attribute__((always_inline)) void round_vector(const float *v, int64_t dim, float levels, int8_t *q,
                                                               float *scale, float *norm, float *error, int32_t *sum) {
    float most[16] = {0}, squares[16] = {0}, misses[16] = {0};
    int64_t whole = dim & ~(int64_t)15, d, j;
    for (d = 0; d < whole; d += 16)
        for (j = 0; j < 16; j++) {
            float size = fabsf(v[d + j]);
            most[j] = size > most[j] ? size : most[j];
        }
    for (; d < dim; d++) most[0] = fabsf(v[d]) > most[0] ? fabsf(v[d]) : most[0];
    float largest = 0;
    for (j = 0; j < 16; j++) largest = most[j] > largest ? most[j] : largest;
    int tiny = largest < 0x1p-60f; /* squares might vanish: such a vector counts as zero, and its size as its error */
    float unit = tiny ? 0 : largest / levels, inverse = tiny ? 0 : levels / largest;
    int32_t total = 0, totals[16] = {0};
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    for (d = 0; d < whole; d += 16)
        for (j = 0; j < 16; j++) {
            float rounded = (v[d + j] * inverse + magic) - magic;
            float miss = v[d + j] - rounded * unit;
            int32_t whole_number = (int32_t)rounded;
            q[d + j] = (int8_t)whole_number;
            totals[j] += whole_number;
            squares[j] += v[d + j] * v[d + j];
            misses[j] += miss * miss;
        }
    for (; d < dim; d++) {
        float rounded = (v[d] * inverse + magic) - magic, miss = v[d] - rounded * unit;
        q[d] = (int8_t)(int32_t)rounded;
        total += (int32_t)rounded;
        squares[0] += v[d] * v[d];
        misses[0] += miss * miss;
    }
    float square = 0, missed = 0;
    for (j = 0; j < 16; j++) square += squares[j], missed += misses[j], total += totals[j];
    *scale = unit;
    *norm = tiny ? largest * (float)dim : sqrtf(square) * INFLATE;
    *error = tiny ? *norm : sqrtf(missed) * INFLATE + *norm * ROUNDING;
    *sum = total;
}

/* |v|^2. */
static inline __attribute__((always_inline)) double squared(const float *v, int64_t dim) {
    double sums[16] = {0}, total = 0;
    int64_t d = 0;
    for (; d + 16 <= dim; d += 16)
        for (int j = 0; j < 16; j++) sums[j] += (double)v[d + j] * v[d + j];
    for (; d < dim; d++) sums[0] += (double)v[d] * v[d];
    for (int j = 0; j < 16; j++) total += sums[j];
    return total;
}

static inline __attribute__((always_inline)) float prepare(const float *exact, const float *centre, int64_t num_centroids,
                                                           int64_t dim, int64_t levels, float *offsets, uint8_t *packed,
                                                           float *scales, float *norms, float *errors, float *tops,
                                                           float *centred) {
    int64_t quads = (dim + 3) / 4, padded = (num_centroids + PANEL - 1) / PANEL * PANEL;
    int8_t *q = (int8_t *)(centred + quads * 4);
    int32_t unused;
    double most = 0;
    for (int64_t k = 0; k < padded; k++) {
        memset(q, 0, quads * 4);
        scales[k] = norms[k] = errors[k] = 0;
        tops[k] = -INFINITY;
        if (k < num_centroids) {
            for (int64_t d = 0; d < dim; d++) centred[d] = exact[k * dim + d] - centre[d];
            round_vector(centred, dim, (float)levels, q, scales + k, norms + k, errors + k, &unused);
            double square = squared(centred, dim);
            most = square > most ? square : most;
            offsets[k] = (float)(-square / 2);
            tops[k] = offsets[k] + norms[k] * norms[k] * ROUNDING;
        }
        for (int64_t d = 0; d < quads * 4; d++) q[d] = (int8_t)(uint8_t)(q[d] + levels);
        uint8_t *panel = packed + k / PANEL * quads * PANEL * 4 + k % PANEL * 4;
        for (int64_t d = 0; d < quads; d++) memcpy(panel + d * PANEL * 4, q + d * 4, 4);
    }
    return (float)sqrt(most);
}

#define PREPARE(suffix, ...)                                                                                            \
    __VA_ARGS__ static float prepare_##suffix(const float *exact, const float *centre, int64_t num_centroids, int64_t dim, \
                                              int64_t levels, float *offsets, uint8_t *packed, float *scales, float *norms, \
                                              float *errors, float *tops, float *centred) {                             \
        return prepare(exact, centre, num_centroids, dim, levels, offsets, packed, scales, norms, errors, tops, centred); \
    }

PREPARE(portable, )
#ifdef X86
PREPARE(avx512, AVX512)
PREPARE(avx2, AVX2)
#endif

/* Make the centroids ready; see prepared_t. scales, norms, errors, tops have room for a multiple of 64. Returns the
   largest norm about the centre, or -1 if there is no memory. */
float raycluster_prepare(const float *exact, const float *centre, int64_t num_centroids, int64_t dim, int64_t levels,
                         int64_t support, float *offsets, uint8_t *packed, float *scales, float *norms, float *errors,
                         float *tops) {
    float *centred = malloc((dim + 3) / 4 * 4 * (sizeof(float) + 1)), largest;
    if (!centred) return -1;
#define ARGUMENTS exact, centre, num_centroids, dim, levels, offsets, packed, scales, norms, errors, tops, centred
#ifdef X86
    if (support == WITH_AVX512)
        largest = prepare_avx512(ARGUMENTS);
    else if (support == WITH_AVX2)
        largest = prepare_avx2(ARGUMENTS);
    else
#endif
        largest = prepare_portable(ARGUMENTS);
    free(centred);
    return largest;
}

/* values: of one row. */
static inline __attribute__((always_inline)) void pack_row(const float *values, int64_t row, const prepared_t *prepared,
                                                           tile_t *tile) {
    int64_t dim = prepared->dim, width = (dim + 3) / 4 * 4;
    float *about = tile->rows + row * dim, norm;
    int32_t sum;
    for (int64_t d = 0; d < dim; d++) about[d] = values[d] - prepared->centre[d];
    round_vector(about, dim, 127, tile->values + row * width, tile->scale + row, &norm, tile->error + row, &sum);
    tile->start[row] = -(int32_t)prepared->levels * sum;
    tile->length[row] = norm + tile->error[row];
    tile->error_bound[row] = prepared->error_bound * prepared->max_norm * (norm + prepared->max_norm / 2);
    tile->floor[row] = -INFINITY;
    tile->count[row] = 0;
}

/* ------------------------------------------------------------------------------------------------------ several nearest */

/* Squared distance in float64, added in the order of `pair_distances` in rerank.py: bitwise the same. */
static inline __attribute__((always_inline)) double distance(const float *a, const float *b, int64_t dim) {
    double sums[SUMS_PER_ROW] = {0}, half[SUMS_PER_ROW / 2], s[SUMS_PER_ROW / 4];
    int64_t d = 0;
    for (; d + SUMS_PER_ROW <= dim; d += SUMS_PER_ROW)
        for (int j = 0; j < SUMS_PER_ROW; j++) {
            double difference = (double)a[d + j] - b[d + j];
            sums[j] += difference * difference;
        }
    for (int j = 0; d + j < dim; j++) sums[j] += ((double)a[d + j] - b[d + j]) * ((double)a[d + j] - b[d + j]);
    for (int j = 0; j < SUMS_PER_ROW / 2; j++) half[j] = sums[j] + sums[j + SUMS_PER_ROW / 2];
    for (int j = 0; j < SUMS_PER_ROW / 4; j++) s[j] = half[j] + half[j + SUMS_PER_ROW / 4];
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

/* The score x.c - |c|^2 / 2 about the centre of what is as far as the last that is kept, or slightly less: by at least
   twice the rounding errors. */
static inline __attribute__((always_inline)) float floor_at(double square, double farthest, int64_t dim) {
    return (float)((square - farthest) / 2 - square * (double)(dim + 8) * 0x1p-22 - farthest * 0x1p-22 - 0x1p-120);
}

/* Keep a centroid if it is among the nearest; returns whether it is. */
static inline __attribute__((always_inline)) int offer(int64_t place, int64_t k, const nearest_t *nearest,
                                                       const prepared_t *prepared) {
    int64_t sample = nearest->samples[k], *ids = nearest->ids + place * nearest->width, i = nearest->width - 1;
    double *distances = nearest->distances + place * nearest->width;
    if (sample == nearest->own[place]) return 0;
    double squared = distance(nearest->values + place * prepared->dim, prepared->exact + k * prepared->dim, prepared->dim);
    if (squared > distances[i] || (squared == distances[i] && sample >= ids[i])) return 0;
    for (; i > 0 && (squared < distances[i - 1] || (squared == distances[i - 1] && sample < ids[i - 1])); i--) {
        distances[i] = distances[i - 1];
        ids[i] = ids[i - 1];
    }
    distances[i] = squared;
    ids[i] = sample;
    return 1;
}

/* Offer those of a panel that may be near enough, a bit of `found` each, likely nearest first. */
static inline __attribute__((always_inline)) void rank(tile_t *tile, int64_t row, int64_t first, const prepared_t *prepared,
                                                       const float *tops, uint64_t found) {
    const nearest_t *nearest = tile->nearest;
    int64_t place = tile->places[row], last = (place + 1) * nearest->width - 1, left = prepared->num_centroids - first;
    if (left < PANEL) found &= left > 0 ? ((uint64_t)1 << left) - 1 : 0; /* without the padding */
    while (found) {
        int j = __builtin_ctzll(found);
        for (uint64_t others = found & (found - 1); others; others &= others - 1) {
            int other = __builtin_ctzll(others);
            if (tops[other] > tops[j]) j = other;
        }
        if (!(tops[j] >= tile->floor[row])) return;
        found ^= (uint64_t)1 << j;
        if (offer(place, first + j, nearest, prepared))
            tile->floor[row] = floor_at(tile->square[row], nearest->distances[last], prepared->dim);
    }
}

/* ---------------------------------------------------------------------------------------------------------- the scan */

/* Keep the candidates of one row among the 64 of a panel, whose upper ends are known. Rare once the floor is good. */
static void keep(tile_t *tile, int64_t row, int64_t first, const prepared_t *prepared, const float *tops) {
    float *top = tile->top + row * CANDIDATES;
    int32_t *index = tile->index + row * CANDIDATES, count = tile->count[row];
    float best = tile->floor[row];
    for (int j = 0; j < PANEL; j++) {
        int64_t k = first + j;
        float below = tops[j] - 2.002f * (tile->error[row] * prepared->norms[k] + tile->length[row] * prepared->errors[k] +
                                          ROUNDING * prepared->norms[k] * prepared->norms[k]) - tile->error_bound[row];
        if (below > best) best = below;
    }
    for (int j = 0; j < PANEL; j++) {
        if (tops[j] < best || count > CANDIDATES) continue;
        if (count == CANDIDATES) {
            int32_t kept = 0;
            for (int32_t i = 0; i < count; i++)
                if (top[i] >= best) top[kept] = top[i], index[kept++] = index[i];
            count = kept;
        }
        if (count < CANDIDATES) {
            top[count] = tops[j];
            index[count] = (int32_t)(first + j);
        }
        count++; /* one too many marks an overflow */
    }
    tile->floor[row] = best;
    tile->count[row] = count;
}

static void scan_portable(tile_t *tile, int64_t num_rows, const prepared_t *prepared) {
    int64_t quads = (prepared->dim + 3) / 4, num_panels = (prepared->num_centroids + PANEL - 1) / PANEL;
    for (int64_t p = 0; p < num_panels; p++)
        for (int64_t row = 0; row < num_rows; row++) {
            const uint8_t *panel = prepared->packed + p * quads * PANEL * 4;
            const int8_t *x = tile->values + row * quads * 4;
            int32_t dots[PANEL];
            float tops[PANEL];
            uint64_t found = 0;
            for (int j = 0; j < PANEL; j++) dots[j] = tile->start[row];
            for (int64_t d = 0; d < quads; d++, panel += PANEL * 4)
                for (int j = 0; j < PANEL; j++)
                    for (int i = 0; i < 4; i++) dots[j] += panel[j * 4 + i] * x[d * 4 + i];
            for (int j = 0; j < PANEL; j++) {
                int64_t k = p * PANEL + j;
                tops[j] = dots[j] * prepared->scales[k] * tile->scale[row] + prepared->tops[k] +
                          tile->error[row] * prepared->norms[k] + tile->length[row] * prepared->errors[k];
                found |= (uint64_t)(tops[j] >= tile->floor[row]) << j;
            }
            if (found && tile->nearest)
                rank(tile, row, p * PANEL, prepared, tops, found);
            else if (found)
                keep(tile, row, p * PANEL, prepared, tops);
        }
}

#ifdef X86
/* As keep, with the 64 upper ends in four vectors. */
AVX512 static void keep_avx512(tile_t *tile, int64_t row, int64_t first, const prepared_t *prepared, const __m512 *tops) {
    float *top = tile->top + row * CANDIDATES;
    int32_t *index = tile->index + row * CANDIDATES, count = tile->count[row];
    __m512 error = _mm512_set1_ps(tile->error[row]), length = _mm512_set1_ps(tile->length[row]);
    __m512 twice = _mm512_set1_ps(-2.002f), rounding = _mm512_set1_ps(ROUNDING), best = _mm512_set1_ps(-INFINITY);
    for (int c = 0; c < 4; c++) {
        __m512 norm = _mm512_loadu_ps(prepared->norms + first + 16 * c);
        __m512 half = _mm512_mul_ps(length, _mm512_loadu_ps(prepared->errors + first + 16 * c));
        half = _mm512_fmadd_ps(error, norm, half);
        half = _mm512_fmadd_ps(rounding, _mm512_mul_ps(norm, norm), half);
        best = _mm512_max_ps(best, _mm512_fmadd_ps(twice, half, tops[c]));
    }
    float floor = _mm512_reduce_max_ps(best) - tile->error_bound[row];
    if (!(floor > tile->floor[row])) floor = tile->floor[row];
    tile->floor[row] = floor;
    for (int c = 0; c < 4 && count <= CANDIDATES; c++) {
        __mmask16 found = _mm512_cmp_ps_mask(tops[c], _mm512_set1_ps(floor), _CMP_GE_OQ);
        int32_t more = _mm_popcnt_u32(found);
        if (count + more > CANDIDATES) {
            int32_t kept = 0;
            for (int32_t i = 0; i < count; i++)
                if (top[i] >= floor) top[kept] = top[i], index[kept++] = index[i];
            count = kept;
        }
        if (more && count + more <= CANDIDATES) {
            __m512i places = _mm512_add_epi32(_mm512_set1_epi32((int32_t)first + 16 * c),
                                              _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
            _mm512_mask_compressstoreu_ps(top + count, found, tops[c]);
            _mm512_mask_compressstoreu_epi32(index + count, found, places);
        }
        count = count + more <= CANDIDATES ? count + more : CANDIDATES + 1; /* one too many marks an overflow */
    }
    tile->count[row] = count;
}

/* Products of 6 rows and 64 centroids. Named sums: an array of them would not stay in registers. */
AVX512 static inline __attribute__((always_inline)) void products_avx512(const int8_t *x, const uint8_t *panel,
                                                                         int64_t quads, const int32_t *start,
                                                                         __m512i dots[GROUP][4]) {
#define BEGIN(r) __m512i s##r = _mm512_set1_epi32(start[r]), d##r##0 = s##r, d##r##1 = s##r, d##r##2 = s##r, d##r##3 = s##r;
#define STEP(r)                                                      \
    {                                                                \
        int32_t four;                                                \
        memcpy(&four, x + (r * quads + d) * 4, 4);                   \
        __m512i one = _mm512_set1_epi32(four);                       \
        d##r##0 = _mm512_dpbusd_epi32(d##r##0, c0, one);             \
        d##r##1 = _mm512_dpbusd_epi32(d##r##1, c1, one);             \
        d##r##2 = _mm512_dpbusd_epi32(d##r##2, c2, one);             \
        d##r##3 = _mm512_dpbusd_epi32(d##r##3, c3, one);             \
    }
#define END(r) dots[r][0] = d##r##0, dots[r][1] = d##r##1, dots[r][2] = d##r##2, dots[r][3] = d##r##3;
    BEGIN(0) BEGIN(1) BEGIN(2) BEGIN(3) BEGIN(4) BEGIN(5)
    for (int64_t d = 0; d < quads; d++, panel += PANEL * 4) {
        __m512i c0 = _mm512_loadu_si512(panel), c1 = _mm512_loadu_si512(panel + 64);
        __m512i c2 = _mm512_loadu_si512(panel + 128), c3 = _mm512_loadu_si512(panel + 192);
        STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5)
    }
    END(0) END(1) END(2) END(3) END(4) END(5)
}

AVX512 static void scan_avx512(tile_t *tile, int64_t num_rows, const prepared_t *prepared) {
    int64_t quads = (prepared->dim + 3) / 4, num_panels = (prepared->num_centroids + PANEL - 1) / PANEL;
    for (int64_t p = 0; p < num_panels; p++)
        for (int64_t row = 0; row < num_rows; row += GROUP) {
            __m512i dots[GROUP][4];
            products_avx512(tile->values + row * quads * 4, prepared->packed + p * quads * PANEL * 4, quads,
                            tile->start + row, dots);
            const float *scales = prepared->scales + p * PANEL, *norms = prepared->norms + p * PANEL;
            const float *errors = prepared->errors + p * PANEL, *ends = prepared->tops + p * PANEL;
            for (int r = 0; r < GROUP; r++) {
                __m512 scale = _mm512_set1_ps(tile->scale[row + r]), error = _mm512_set1_ps(tile->error[row + r]);
                __m512 length = _mm512_set1_ps(tile->length[row + r]), floor = _mm512_set1_ps(tile->floor[row + r]);
                __m512 tops[4];
                uint64_t found = 0;
                for (int c = 0; c < 4; c++) {
                    __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[r][c]), _mm512_loadu_ps(scales + 16 * c));
                    __m512 top = _mm512_fmadd_ps(product, scale, _mm512_loadu_ps(ends + 16 * c));
                    top = _mm512_fmadd_ps(error, _mm512_loadu_ps(norms + 16 * c), top);
                    tops[c] = _mm512_fmadd_ps(length, _mm512_loadu_ps(errors + 16 * c), top);
                    found |= (uint64_t)_mm512_cmp_ps_mask(tops[c], floor, _CMP_GE_OQ) << 16 * c;
                }
                if (found && tile->nearest) {
                    float all[PANEL];
                    for (int c = 0; c < 4; c++) _mm512_storeu_ps(all + 16 * c, tops[c]);
                    rank(tile, row + r, p * PANEL, prepared, all, found);
                } else if (found) {
                    keep_avx512(tile, row + r, p * PANEL, prepared, tops);
                }
            }
        }
}

/* Products of 7-bit centroids and 8-bit rows: sums of two fit 16 bits. */
AVX2 static void scan_avx2(tile_t *tile, int64_t num_rows, const prepared_t *prepared) {
    int64_t quads = (prepared->dim + 3) / 4, num_panels = (prepared->num_centroids + PANEL - 1) / PANEL;
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t p = 0; p < num_panels; p++)
        for (int64_t row = 0; row < num_rows; row += GROUP)
            for (int half = 0; half < 4; half++) { /* 16 centroids by 6 rows: 12 sums fit the registers */
                const uint8_t *panel = prepared->packed + p * quads * PANEL * 4 + half * 64;
                const int8_t *x = tile->values + row * quads * 4;
                __m256i dots[GROUP][2];
                for (int r = 0; r < GROUP; r++) dots[r][0] = dots[r][1] = _mm256_set1_epi32(tile->start[row + r]);
                for (int64_t d = 0; d < quads; d++, panel += PANEL * 4) {
                    __m256i c0 = _mm256_loadu_si256((const void *)panel);
                    __m256i c1 = _mm256_loadu_si256((const void *)(panel + 32));
#pragma GCC unroll 6
                    for (int r = 0; r < GROUP; r++) {
                        int32_t four;
                        memcpy(&four, x + (r * quads + d) * 4, 4);
                        __m256i one = _mm256_set1_epi32(four);
                        __m256i a = _mm256_madd_epi16(_mm256_maddubs_epi16(c0, one), ones);
                        __m256i b = _mm256_madd_epi16(_mm256_maddubs_epi16(c1, one), ones);
                        dots[r][0] = _mm256_add_epi32(dots[r][0], a);
                        dots[r][1] = _mm256_add_epi32(dots[r][1], b);
                    }
                }
                int64_t first = p * PANEL + half * 16;
                for (int r = 0; r < GROUP; r++) {
                    float tops[PANEL];
                    uint64_t found = 0;
                    int32_t stored[16];
                    _mm256_storeu_si256((void *)stored, dots[r][0]);
                    _mm256_storeu_si256((void *)(stored + 8), dots[r][1]);
                    for (int j = 0; j < 16; j++) {
                        tops[j] = stored[j] * prepared->scales[first + j] * tile->scale[row + r] + prepared->tops[first + j] +
                                  tile->error[row + r] * prepared->norms[first + j] +
                                  tile->length[row + r] * prepared->errors[first + j];
                        found |= (uint64_t)(tops[j] >= tile->floor[row + r]) << j;
                    }
                    if (found && tile->nearest) {
                        rank(tile, row + r, first, prepared, tops, found);
                    } else if (found) {
                        float all[PANEL];
                        for (int j = 0; j < PANEL; j++) all[j] = -INFINITY;
                        memcpy(all + half * 16, tops, sizeof(float) * 16);
                        keep(tile, row + r, p * PANEL, prepared, all);
                    }
                }
            }
}
#endif

/* -------------------------------------------------------------------------------------------------------- the decision */

/* Score in float32 of a row about the centre and centroid k. */
static inline __attribute__((always_inline)) float score(const float *row, int64_t k, const prepared_t *prepared) {
    const float *c = prepared->exact + k * prepared->dim, *m = prepared->centre;
    float sums[32] = {0}, total = 0;
    int64_t dim = prepared->dim, d = 0;
    for (; d + 32 <= dim; d += 32)
        for (int j = 0; j < 32; j++) sums[j] += row[d + j] * (c[d + j] - m[d + j]);
    for (; d < dim; d++) sums[0] += row[d] * (c[d] - m[d]);
    for (int j = 0; j < 32; j++) total += sums[j];
    return total + prepared->offsets[k];
}

/* Nearest of the candidates by float64 distances; -1 where their rounding errors could decide. */
static inline __attribute__((always_inline)) int64_t decide_in_float64(const float *x, const int32_t *index, int32_t count,
                                                            const prepared_t *prepared) {
    double best = INFINITY, second = INFINITY;
    int64_t label = -1;
    for (int32_t i = 0; i < count; i++) {
        double squared = distance(x, prepared->exact + index[i] * prepared->dim, prepared->dim);
        if (squared < best) {
            second = best;
            best = squared;
            label = index[i];
        } else if (squared < second) {
            second = squared;
        }
    }
    return second - best > 4 * (prepared->dim + 8) * 0x1p-53 * second ? label : -1;
}

static inline __attribute__((always_inline)) void label_tile(const float *values, int64_t num_rows, tile_t *tile,
                                                         const prepared_t *prepared, int64_t *labels) {
    for (int64_t row = 0; row < num_rows; row++) {
        int32_t *index = tile->index + row * CANDIDATES, count = tile->count[row], kept = 0;
        float *top = tile->top + row * CANDIDATES, best = -INFINITY;
        labels[row] = -1;
        if (count > CANDIDATES || !(tile->length[row] < 0x1p50f)) continue; /* too many, or squares leave float32 */
        for (int32_t i = 0; i < count; i++)
            if (top[i] >= tile->floor[row]) index[kept++] = index[i];
        if (kept == 1) {
            labels[row] = index[0];
            continue;
        }
        for (int32_t i = 0; i < kept; i++) {
            top[i] = score(tile->rows + row * prepared->dim, index[i], prepared);
            if (top[i] > best) best = top[i];
        }
        count = 0;
        for (int32_t i = 0; i < kept; i++)
            if (!(top[i] < best - tile->error_bound[row])) index[count++] = index[i];
        labels[row] = count == 1 ? index[0] : decide_in_float64(values + row * prepared->dim, index, count, prepared);
    }
}

/* A floor from a label that may still be right: fewer centroids become candidates. */
static inline __attribute__((always_inline)) void initial_floors(const int64_t *previous, int64_t num_rows, tile_t *tile,
                                                        const prepared_t *prepared) {
    for (int64_t row = 0; row < num_rows; row++) {
        int64_t k = previous[row];
        if (k < 0 || k >= prepared->num_centroids) continue;
        tile->floor[row] = score(tile->rows + row * prepared->dim, k, prepared) - 2.5f * tile->error_bound[row];
    }
}

#define SEARCH(name, scan)                                                                                       \
    static void name(const float *values, int64_t num_rows, const prepared_t *prepared, const int64_t *previous,     \
                     tile_t *tile, int64_t *labels) {                                                            \
        for (int64_t start = 0; start < num_rows; start += TILE) {                                               \
            int64_t count = num_rows - start < TILE ? num_rows - start : TILE;                                   \
            const float *rows = values + start * prepared->dim;                                                    \
            for (int64_t row = 0; row < count; row++) pack_row(rows + row * prepared->dim, row, prepared, tile);     \
            if (previous) initial_floors(previous + start, count, tile, prepared);                                          \
            for (int64_t row = count; row % GROUP; row++) tile->floor[row] = INFINITY; /* padding */ \
            scan(tile, count, prepared);                                                                           \
            label_tile(rows, count, tile, prepared, labels + start);                                                   \
        }                                                                                                        \
    }

SEARCH(search_portable, scan_portable)
#ifdef X86
AVX512 SEARCH(search_avx512, scan_avx512)
AVX2 SEARCH(search_avx2, scan_avx2)
#endif

/* Memory for a tile of some of the rows, to be freed; NULL if there is none. */
static char *allocate(tile_t *tile, int64_t num_rows, const prepared_t *prepared) {
    int64_t width = (prepared->dim + 3) / 4 * 4;
    size_t per_row = width + 4 * (prepared->dim + 9 + 2 * CANDIDATES) + 64;
    size_t size = num_rows < TILE ? (num_rows + GROUP - 1) / GROUP * GROUP : TILE;
    char *memory = calloc(size, per_row), *at = memory;
    if (!memory) return NULL;
    tile->nearest = NULL;
#define TAKE(field, count) tile->field = (void *)at, at += sizeof(*tile->field) * size * (count)
    TAKE(square, 1), TAKE(rows, prepared->dim), TAKE(start, 1), TAKE(scale, 1), TAKE(error, 1), TAKE(length, 1), TAKE(error_bound, 1);
    TAKE(floor, 1), TAKE(count, 1), TAKE(index, CANDIDATES), TAKE(top, CANDIDATES), TAKE(values, width);
    return memory;
}

/* Labels of the nearest centroids, -1 where it could not be decided. previous: labels to start from, or NULL.
   Returns how many are -1, or -1 if there is no memory. */
int64_t raycluster_search(const float *values, int64_t num_rows, const prepared_t *prepared, const int64_t *previous,
                          int64_t support, int64_t *labels) {
    int64_t undecided = 0;
    tile_t tile;
    char *memory = allocate(&tile, num_rows, prepared);
    if (!memory) return -1;
#ifdef X86
    if (support == WITH_AVX512)
        search_avx512(values, num_rows, prepared, previous, &tile, labels);
    else if (support == WITH_AVX2)
        search_avx2(values, num_rows, prepared, previous, &tile, labels);
    else
#endif
        search_portable(values, num_rows, prepared, previous, &tile, labels);
    free(memory);
    for (int64_t row = 0; row < num_rows; row++) undecided += labels[row] < 0;
    return undecided;
}

/* Start from what is known of a row. One whose squares leave float32 is offered everything, and not scanned. */
static inline __attribute__((always_inline)) void start_row(int64_t row, const prepared_t *prepared, tile_t *tile) {
    const nearest_t *nearest = tile->nearest;
    int64_t place = tile->places[row];
    pack_row(nearest->values + place * prepared->dim, row, prepared, tile);
    double square = squared(tile->rows + row * prepared->dim, prepared->dim);
    tile->square[row] = square;
    tile->floor[row] = floor_at(square, nearest->distances[(place + 1) * nearest->width - 1], prepared->dim);
    if (tile->length[row] < 0x1p50f) return;
    for (int64_t k = 0; k < prepared->num_centroids; k++) offer(place, k, nearest, prepared);
    tile->floor[row] = INFINITY;
}

#define NEAREST(name, scan)                                                                                          \
    static void name(const int64_t *places, int64_t num_rows, const prepared_t *prepared, tile_t *tile) {            \
        for (int64_t start = 0; start < num_rows; start += TILE) {                                                   \
            int64_t count = num_rows - start < TILE ? num_rows - start : TILE;                                       \
            tile->places = places + start;                                                                           \
            for (int64_t row = 0; row < count; row++) start_row(row, prepared, tile);                                \
            for (int64_t row = count; row % GROUP; row++) tile->floor[row] = INFINITY; /* padding */                 \
            scan(tile, count, prepared);                                                                             \
        }                                                                                                            \
    }

NEAREST(nearest_portable, scan_portable)
#ifdef X86
AVX512 NEAREST(nearest_avx512, scan_avx512)
AVX2 NEAREST(nearest_avx2, scan_avx2)
#endif

/* Improve the nearest of some rows by those of the centroids, decided by float64 distances, of equal ones by sample id.
   places: (num_rows,) which rows. Returns -1 if there is no memory. */
int64_t raycluster_nearest(const float *values, const int64_t *own, const int64_t *places, int64_t num_rows,
                           const prepared_t *prepared, const int64_t *samples, int64_t width, int64_t support,
                           int64_t *ids, double *distances) {
    nearest_t nearest = {values, own, samples, width, ids, distances};
    tile_t tile;
    char *memory = allocate(&tile, num_rows, prepared);
    if (!memory) return -1;
    tile.nearest = &nearest;
#ifdef X86
    if (support == WITH_AVX512)
        nearest_avx512(places, num_rows, prepared, &tile);
    else if (support == WITH_AVX2)
        nearest_avx2(places, num_rows, prepared, &tile);
    else
#endif
        nearest_portable(places, num_rows, prepared, &tile);
    free(memory);
    return 0;
}

/* ---------------------------------------------------------------------------------------------------- all within limits */

/* The candidates of a tile whose float32 scores reach the floors, -1 for a row that is left to the caller. */
static inline __attribute__((always_inline)) void reaching_tile(int64_t num_rows, const tile_t *tile,
                                                            const prepared_t *prepared, int32_t *counts, int32_t *found) {
    for (int64_t row = 0; row < num_rows; row++) {
        const int32_t *index = tile->index + row * CANDIDATES;
        int32_t *kept = found + row * CANDIDATES, count = 0;
        counts[row] = -1;
        if (tile->count[row] > CANDIDATES || !(tile->length[row] < 0x1p50f)) continue;
        for (int32_t i = 0; i < tile->count[row]; i++)
            if (!(score(tile->rows + row * prepared->dim, index[i], prepared) < tile->floor[row])) kept[count++] = index[i];
        counts[row] = count;
    }
}

#define REACHING(name, scan)                                                                                        \
    static void name(const float *values, int64_t num_rows, const prepared_t *prepared, const float *floors,         \
                     tile_t *tile, int32_t *counts, int32_t *found) {                                                \
        for (int64_t start = 0; start < num_rows; start += TILE) {                                                   \
            int64_t count = num_rows - start < TILE ? num_rows - start : TILE;                                       \
            for (int64_t row = 0; row < count; row++) {                                                              \
                pack_row(values + (start + row) * prepared->dim, row, prepared, tile);                               \
                tile->floor[row] = floors[start + row] - 2.5f * tile->error_bound[row];                              \
                tile->error_bound[row] = INFINITY; /* the floor does not rise */                                     \
            }                                                                                                        \
            for (int64_t row = count; row % GROUP; row++) tile->floor[row] = INFINITY; /* padding */                 \
            scan(tile, count, prepared);                                                                             \
            reaching_tile(count, tile, prepared, counts + start, found + start * CANDIDATES);                        \
        }                                                                                                            \
    }

REACHING(reaching_portable, scan_portable)
#ifdef X86
AVX512 REACHING(reaching_avx512, scan_avx512)
AVX2 REACHING(reaching_avx2, scan_avx2)
#endif

/* Centroids whose score x.c - |c|^2 / 2 about the centre reaches the floor of the row, and maybe some that miss it by
   rounding: counts (n) and found (n, CANDIDATES); a count of -1 leaves the row to the caller. Returns -1 if there is no
   memory. */
int64_t raycluster_reaching(const float *values, int64_t num_rows, const prepared_t *prepared, const float *floors,
                            int64_t support, int32_t *counts, int32_t *found) {
    tile_t tile;
    char *memory = allocate(&tile, num_rows, prepared);
    if (!memory) return -1;
#ifdef X86
    if (support == WITH_AVX512)
        reaching_avx512(values, num_rows, prepared, floors, &tile, counts, found);
    else if (support == WITH_AVX2)
        reaching_avx2(values, num_rows, prepared, floors, &tile, counts, found);
    else
#endif
        reaching_portable(values, num_rows, prepared, floors, &tile, counts, found);
    free(memory);
    return 0;
}

/* ------------------------------------------------------------------------------------------------------ order-free sums */

/* Adding 1.5 * 2^52 rounds to an integer, whose low bits are then those of the float: no conversion is needed. */
#define MAGIC 6755399441055744.0

static inline __attribute__((always_inline)) int64_t bits(double value) {
    int64_t result;
    memcpy(&result, &value, sizeof result);
    return result;
}

#define SUMS(suffix, ...)                                                                                               \
    __VA_ARGS__ static void sums_##suffix(const float *values, const int64_t *labels, int64_t num_rows, int64_t dim, double scale, \
                              int64_t *totals) {                                                                    \
        for (int64_t row = 0; row < num_rows; row++) {                                                               \
            const float *x = values + row * dim;                                                                     \
            int64_t *restrict total = totals + labels[row] * dim;                                                    \
            for (int64_t d = 0; d < dim; d++) total[d] += bits(x[d] * scale + MAGIC) - bits(MAGIC);                  \
        }                                                                                                            \
    }                                                                                                                \
    __VA_ARGS__ static int64_t inertia_##suffix(const float *values, const int64_t *labels, int64_t num_rows, int64_t dim,        \
                                   double scale, const float *centroids) {                                          \
        int64_t sum = 0;                                                                                             \
        for (int64_t row = 0; row < num_rows; row++) {                                                               \
            const float *x = values + row * dim, *c = centroids + labels[row] * dim;                                 \
            for (int64_t d = 0; d < dim; d++) {                                                                      \
                double difference = (double)x[d] - c[d];                                                                  \
                sum += bits(difference * difference * scale + MAGIC) - bits(MAGIC);                                            \
            }                                                                                                        \
        }                                                                                                            \
        return sum;                                                                                                  \
    }

SUMS(portable, )
#ifdef X86
SUMS(avx512, AVX512)
SUMS(avx2, AVX2)
#endif

/* Add round(values * scale), |values * scale| < 2^51, to the totals (K, D) of their labels. */
void raycluster_sums(const float *values, const int64_t *labels, int64_t num_rows, int64_t dim, double scale,
                     int64_t support, int64_t *totals) {
#ifdef X86
    if (support == WITH_AVX512) return sums_avx512(values, labels, num_rows, dim, scale, totals);
    if (support == WITH_AVX2) return sums_avx2(values, labels, num_rows, dim, scale, totals);
#endif
    sums_portable(values, labels, num_rows, dim, scale, totals);
}

/* Sum of round((x - c)^2 * scale), each below 2^51, over all values of the rows and the centroids of their labels. */
int64_t raycluster_inertia(const float *values, const int64_t *labels, int64_t num_rows, int64_t dim, double scale,
                          int64_t support, const float *centroids) {
#ifdef X86
    if (support == WITH_AVX512) return inertia_avx512(values, labels, num_rows, dim, scale, centroids);
    if (support == WITH_AVX2) return inertia_avx2(values, labels, num_rows, dim, scale, centroids);
#endif
    return inertia_portable(values, labels, num_rows, dim, scale, centroids);
}
