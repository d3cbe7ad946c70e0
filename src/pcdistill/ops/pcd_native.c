/* PCD: loss and gradient of float32 logits on a CPU, for any number of stages.

   Compiled on first use by pcd_native.py. Each row is ranked and summed up by segments, sixteen classes at a time; then
   the arithmetic of the groups, in double precision, is done for eight rows at once. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

#define ROWS 8
#define LANES 16
#define OCTAVES 12   /* below the largest difference, with bins of their own; what is smaller shares the last bin */
#define NARROW 24.0f /* logits / T within this of the row's middle need no maximum: exp(2 * 24) is a float's */

enum { DONE = 0, TOO_WIDE = 1 };

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef double Rows __attribute__((vector_size(8 * ROWS)));
typedef int64_t RowInts __attribute__((vector_size(8 * ROWS)));

typedef struct {
    int32_t bits, index;
    float t, s;
} Item;

/* Segments are padded to whole vectors in p and q, whose padding is 0. */
typedef struct {
    float *p, *q;     /* [ROWS, padded] exp(z / T) of teacher and student in ranked order, up to a factor per row */
    int32_t *order;   /* [ROWS, C] and LANES more: the class of every rank */
    float *t, *s;     /* [C + LANES] one row's logits in ranked order */
    int32_t *bits;    /* [C] its differences */
    uint32_t *end;    /* [bins] */
    Item *items;      /* [C] */
    float *sums;      /* [5, K] */
    Rows *statistics; /* [6, K] */
    Rows *of_group;   /* [G + 1, 4], the last all 0 */
    Rows *factors;    /* [4, K] */
} Work;

typedef struct {
    int64_t classes, padded, segments, groups, layers;
    const int32_t *edges, *spans, *group_of;
    double temperature;
    int32_t ranking, weighting, detach, shift, bins;
} Problem;

static inline Floats load(const float *from) {
    Floats x;
    memcpy(&x, from, sizeof x);
    return x;
}

static inline Ints numbers(void) {
    Ints lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return lane;
}

static inline Floats all(float x) { return x - (Floats){0}; }

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define PICK(x, y, ...) __builtin_shuffle(x, y, (Ints){__VA_ARGS__})
#endif

/* Half of x, added to its other half, in the lower lanes; that of y in the upper ones. */
static inline Floats halve(Floats x, Floats y) {
    return PICK(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           PICK(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

/* The sums of w, x, y and z, to out[0], out[step], ... */
static inline void sum_four(Floats w, Floats x, Floats y, Floats z, float *out, int64_t step) {
    Floats wx = halve(w, x), yz = halve(y, z);
    Floats all = PICK(wx, yz, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                 PICK(wx, yz, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    all += PICK(all, all, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    all += PICK(all, all, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    for (int i = 0; i < 4; i++) out[i * step] = all[4 * i];
}

static inline float sum(Floats x) {
    float total;
    sum_four(x, x, x, x, &total, 0);
    return total;
}

/* e^x for |x| <= 2 NARROW: x = k log 2 + r, and the series of e^r. */
static inline Floats exp_near(Floats x) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, which is in the low bits */
    Floats k = x * 1.44269504f + shift;
    Ints power = ((Ints)k << 23) + 0x3F800000;
    k -= shift;
    Floats r = x - k * 0.693145752f - k * 1.42860677e-6f;
    Floats y = r * (1.0f / 5040) + 1.0f / 720;
    y = y * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    return y * (Floats)power;
}

/* log x for normal x > 0: x = 2^k m with m from sqrt(1/2) to sqrt(2), and log m = 2 artanh((m - 1) / (m + 1)). */
static inline Rows log_normal(Rows x) {
    RowInts bits = (RowInts)x, k = (bits - 0x3FE6A09E667F3BCD) >> 52;
    Rows m = (Rows)(bits - (k << 52)), z = (m - 1.0) / (m + 1.0), z2 = z * z, y = z2 * (1.0 / 21) + 1.0 / 19;
    for (int n = 17; n >= 1; n -= 2) y = y * z2 + 1.0 / n;
    return 2.0 * z * y + __builtin_convertvector(k, Rows) * 0.693147180559945309;
}

static inline Rows root(Rows x) {
    for (int r = 0; r < ROWS; r++) x[r] = sqrt(x[r]);
    return x;
}

/* p (expm1(d) - d) for d = log q - log p, as kl_terms in segments.py. */
static inline Floats kl_terms(Floats p, Floats q, Floats d) {
    Floats near = d * (1.0f / 362880) + 1.0f / 40320, far = q - p - p * d;
    near = near * d + 1.0f / 5040;
    near = near * d + 1.0f / 720;
    near = near * d + 1.0f / 120;
    near = near * d + 1.0f / 24;
    near = near * d + 1.0f / 6;
    near = (near * d + 0.5f) * d * d * p;
    Ints is_near = (d < 0.5f) & (d > -0.5f);
    return (Floats)(((Ints)near & is_near) | ((Ints)far & ~is_near));
}

static inline Rows positive(Rows x) { return (Rows)((RowInts)x & ~(x < 0.0)); }

static int by_rank(const void *a, const void *b) {
    const Item *x = a, *y = b;
    if (x->bits != y->bits) return x->bits > y->bits ? -1 : 1;
    return x->index < y->index ? -1 : 1;
}

static inline int32_t difference_bits(float t, float s) {
    float d = t - s;
    int32_t bits;
    memcpy(&bits, &d, sizeof bits);
    return bits & 0x7FFFFFFF;
}

/* Put ranks lo to hi - 1, now in the order of their classes, in the order of their differences. */
static void sort_range(const Work *w, int32_t *order, int64_t lo, int64_t hi) {
    int32_t n = (int32_t)(hi - lo);
    order += lo;
    float *t = w->t + lo, *s = w->s + lo;
    if (n <= LANES) {
        /* How many of the others come before each: no branch to mispredict. */
        Floats old_t = load(t), old_s = load(s);
        Ints key = (Ints)(old_t - old_s) & 0x7FFFFFFF, rank = {0}, lane = numbers(), old_order;
        memcpy(&old_order, order, sizeof old_order);
        for (int32_t i = 0; i < n; i++) rank -= ((key < key[i]) | ((key == key[i]) & (lane > i)));
        for (int32_t i = 0; i < n; i++) {
            order[rank[i]] = old_order[i];
            t[rank[i]] = old_t[i];
            s[rank[i]] = old_s[i];
        }
        return;
    }
    Item *items = w->items;
    for (int32_t i = 0; i < n; i++) items[i] = (Item){difference_bits(t[i], s[i]), order[i], t[i], s[i]};
    qsort(items, (size_t)n, sizeof *items, by_rank);
    for (int32_t i = 0; i < n; i++) {
        order[i] = items[i].index;
        t[i] = items[i].t;
        s[i] = items[i].s;
    }
}

/* Write the logits and classes of a row so that each segment holds the right ones, in any order inside it. The largest
   difference comes first; of equal ones, the lower class. Classes go into bins by the leading bits of their difference,
   and only bins that a boundary cuts are sorted. */
static void partition(const Problem *a, const Work *w, const float *student, const float *teacher, int32_t *order) {
    int32_t top = 0, *bits = w->bits;
    uint32_t *end = w->end, total = 0;
    const int64_t classes = a->classes;
    const int32_t shift = a->shift, bins = a->bins;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < classes; i++) {
        bits[i] = difference_bits(teacher[i], student[i]);
        top = bits[i] > top ? bits[i] : top;
    }
#pragma omp simd
    for (int64_t i = 0; i < classes; i++) {
        int32_t bin = (top - bits[i]) >> shift;
        bits[i] = bin < bins ? bin : bins - 1;
    }
    memset(end, 0, (size_t)bins * sizeof *end);
    for (int64_t i = 0; i < classes; i++) end[bits[i]]++;
    for (int32_t b = 0; b < bins; b++) {
        uint32_t count = end[b];
        end[b] = total;
        total += count;
    }
    for (int64_t i = 0; i < classes; i++) {
        uint32_t rank = end[bits[i]]++;
        order[rank] = (int32_t)i;
        w->t[rank] = teacher[i];
        w->s[rank] = student[i];
    }
    int32_t sorted = -1;
    for (int64_t k = 1; k < a->segments; k++) {
        int32_t edge = a->edges[k], bin = (top - difference_bits(w->t[edge], w->s[edge])) >> shift;
        bin = bin < bins ? bin : bins - 1;
        int64_t lo = bin ? end[bin - 1] : 0;
        if (bin != sorted && lo < edge) {
            sort_range(w, order, lo, end[bin]);
            sorted = bin;
        }
    }
}

/* The middle of the values' range, and whether all are numbers within `reach` of it. */
static int middle(const float *x, int64_t n, float reach, float *found) {
    float low = INFINITY, high = -INFINITY;
    int bad = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(| : bad)
    for (int64_t i = 0; i < n; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        bad |= !(x[i] <= INFINITY);
    }
    *found = low + (high - low) / 2;
    return !bad && (high - low) / 2 <= reach;
}

/* p and q of one row, and per segment the sums of p, q, p log(p / q), p^2, q^2 and p q. */
static int row_statistics(const Problem *a, const Work *w, const float *student, const float *teacher, int row) {
    float t_middle, s_middle, inverse = (float)(1.0 / a->temperature), reach = NARROW * (float)a->temperature;
    int64_t segments = a->segments;
    if (!middle(teacher, a->classes, reach, &t_middle) || !middle(student, a->classes, reach, &s_middle)) return 0;
    if (a->ranking)
        partition(a, w, student, teacher, w->order + row * a->classes);
    else {
        memcpy(w->t, teacher, (size_t)a->classes * sizeof *w->t);
        memcpy(w->s, student, (size_t)a->classes * sizeof *w->s);
    }
    float *p = w->p + row * a->padded, *q = w->q + row * a->padded;
    for (int64_t k = 0; k < segments; k++) {
        Floats mass_p = {0}, mass_q = {0}, gap = {0}, pp = {0}, qq = {0};
        for (int32_t i = a->edges[k]; i < a->edges[k + 1]; i += LANES, p += LANES, q += LANES) {
            Ints inside = numbers() < a->edges[k + 1] - i;
            Floats u = (load(w->t + i) - t_middle) * inverse, v = (load(w->s + i) - s_middle) * inverse;
            u = (Floats)((Ints)u & inside), v = (Floats)((Ints)v & inside);
            Floats x = (Floats)((Ints)exp_near(u) & inside), y = (Floats)((Ints)exp_near(v) & inside);
            memcpy(p, &x, sizeof x);
            memcpy(q, &y, sizeof y);
            mass_p += x;
            mass_q += y;
            gap += x * (u - v);
            pp += x * x;
            qq += y * y;
        }
        sum_four(mass_p, mass_q, gap, pp, w->sums + k, segments);
        w->sums[4 * segments + k] = sum(qq);
    }
    double *to = (double *)w->statistics + row;
    for (int64_t k = 0; k < 5 * segments; k++) to[k * ROWS] = w->sums[k];
    p = w->p + row * a->padded, q = w->q + row * a->padded;
    for (int64_t k = 0; k < segments; k++) {
        Floats apart = {0}, terms = {0};
        float *mass_p = w->sums + k, *mass_q = mass_p + segments, *pp = mass_p + 3 * segments, *qq = pp + segments;
        /* The squared distance of p and q at one norm: 1 - p.q / (|p| |q|) itself would cancel. Without the weighting,
           no small weight hides the rounding of KL: then it is summed in terms that do not cancel. */
        float ratio = a->weighting ? sqrtf(*pp / *qq) : *mass_p / *mass_q;
        float shift = a->weighting ? 0 : logf(ratio);
        for (int32_t i = a->edges[k]; i < a->edges[k + 1]; i += LANES, p += LANES, q += LANES) {
            Floats x = load(p), y = ratio * load(q);
            if (a->weighting)
                apart += (y - x) * (y - x);
            else {
                Ints inside = numbers() < a->edges[k + 1] - i;
                Floats u = (load(w->t + i) - t_middle) * inverse, v = (load(w->s + i) - s_middle) * inverse;
                terms += kl_terms(x, y, (Floats)((Ints)(v - u + shift) & inside));
            }
        }
        to[(5 * segments + k) * ROWS] = sum(apart);
        if (!a->weighting) to[(2 * segments + k) * ROWS] = sum(terms) + (double)*mass_p * log(ratio);
    }
    return 1;
}

/* Losses of eight rows, and the factors of q, p, p q and q^2 in the gradient of each segment. */
static Rows combine(const Problem *a, const Work *w) {
    const int64_t segments = a->segments;
    const double t = a->temperature;
    const Rows *of = w->statistics;
    Rows loss = {0}, *dots = w->statistics + 5 * segments;
    for (int64_t k = 0; k < segments; k++)
        dots[k] = root(of[3 * segments + k] * of[4 * segments + k]) * (1.0 - dots[k] / (2.0 * of[3 * segments + k]));
    for (int64_t g = 0; g < a->groups; g++) {
        double count = a->spans[3 * g + 2];
        Rows p = {0}, q = {0}, gap = {0}, pp = {0}, qq = {0}, dot = {0}, *out = w->of_group + 4 * g;
        for (int32_t k = a->spans[3 * g]; k < a->spans[3 * g + 1]; k++) {
            p += of[k];
            q += of[segments + k];
            gap += of[2 * segments + k];
            pp += of[3 * segments + k];
            qq += of[4 * segments + k];
            dot += dots[k];
        }
        /* As distil_groups in pcd_combine.py. One division serves three; the other two are exact at p = q. */
        Rows norm = root(pp * qq), shared = 1.0 / (p * q * qq), cosine = dot / norm;
        Rows per_p = q * qq * shared, per_q = p * qq * shared, per_qq = p * q * shared;
        Rows kl = positive(gap * per_p - log_normal(p / q)), weight = positive(1.0 - cosine);
        if (!a->weighting) weight = (Rows){0} + 1.0;
        loss += count * t * t * weight * kl;
        weight *= count * t;
        kl *= a->detach || !a->weighting ? 0.0 : count * t;
        out[0] = weight * per_q;
        out[1] = -weight * per_p;
        out[2] = -kl / norm;
        out[3] = kl * cosine * per_qq;
    }
    memset(w->of_group + 4 * a->groups, 0, 4 * sizeof(Rows));
    for (int64_t k = 0; k < segments; k++) {
        Rows c0 = {0}, c1 = {0}, c2 = {0}, c3 = {0};
        for (int64_t layer = 0; layer < a->layers; layer++) {
            const Rows *from = w->of_group + 4 * a->group_of[layer * segments + k];
            c0 += from[0];
            c1 += from[1];
            c2 += from[2];
            c3 += from[3];
        }
        w->factors[k] = c0;
        w->factors[segments + k] = c1;
        w->factors[2 * segments + k] = c2;
        w->factors[3 * segments + k] = c3;
    }
    return loss;
}

static void row_gradient(const Problem *a, const Work *w, int row, float *gradient) {
    const float *p = w->p + row * a->padded, *q = w->q + row * a->padded;
    const double *c = (const double *)w->factors + row;
    const int64_t next = a->segments * ROWS;
    float *ranked = w->t;
    for (int64_t k = 0; k < a->segments; k++, c += ROWS) {
        Floats c0 = all((float)c[0]), c1 = all((float)c[next]);
        Floats c2 = all((float)c[2 * next]), c3 = all((float)c[3 * next]);
        for (int32_t i = a->edges[k]; i < a->edges[k + 1]; i += LANES, p += LANES, q += LANES) {
            Floats x = load(p), y = load(q), g = y * (c0 + c2 * x + c3 * y) + c1 * x;
            memcpy(ranked + i, &g, sizeof g); /* what runs over the end is written again, or padding */
        }
    }
    if (a->ranking) {
        const int32_t *order = w->order + row * a->classes;
        for (int64_t i = 0; i < a->classes; i++) gradient[order[i]] = ranked[i];
    } else
        memcpy(gradient, ranked, (size_t)a->classes * sizeof *gradient);
}

static void *take(uintptr_t *at, int64_t bytes) {
    uintptr_t here = *at;
    *at += ((uintptr_t)bytes + 63) / 64 * 64;
    return (void *)here;
}

/* Where everything that a thread needs lies in memory from `at` on; returns its size. */
static size_t lay_out(const Problem *a, Work *w, uintptr_t at) {
    uintptr_t start = at;
    w->p = take(&at, ROWS * a->padded * 4);
    w->q = take(&at, ROWS * a->padded * 4);
    w->order = take(&at, (ROWS * a->classes + LANES) * 4);
    w->t = take(&at, (a->classes + LANES) * 4);
    w->s = take(&at, (a->classes + LANES) * 4);
    w->bits = take(&at, a->classes * 4);
    w->end = take(&at, a->bins * 4);
    w->items = take(&at, a->classes * (int64_t)sizeof(Item));
    w->sums = take(&at, 5 * a->segments * 4);
    w->statistics = take(&at, 6 * a->segments * (int64_t)sizeof(Rows));
    w->of_group = take(&at, 4 * (a->groups + 1) * (int64_t)sizeof(Rows));
    w->factors = take(&at, 4 * a->segments * (int64_t)sizeof(Rows));
    return at - start;
}

static Problem describe(int64_t classes, const int32_t *edges, int64_t segments, int64_t groups) {
    Problem a = {.classes = classes, .edges = edges, .segments = segments, .groups = groups};
    a.shift = 21; /* four bins an octave */
    while (a.shift > 15 && ((int64_t)16 << (23 - a.shift)) < classes) a.shift--;
    a.bins = OCTAVES << (23 - a.shift);
    for (int64_t k = 0; k < segments; k++) a.padded += (edges[k + 1] - edges[k] + LANES - 1) / LANES * LANES;
    return a;
}

/* Bytes of scratch that each thread needs, a multiple of 64. */
int64_t pcd_native_scratch(int64_t classes, const int32_t *edges, int64_t segments, int64_t groups) {
    Work w;
    Problem a = describe(classes, edges, segments, groups);
    return (int64_t)lay_out(&a, &w, 0);
}

/* Loss [N] and gradient [N, C] for student and teacher [N, C], all float32 and contiguous.

   edges: [K + 1] boundaries of the segments in ranks. spans: [G, 3] first segment, segment after the last, count.
   group_of: [layers, K] the group that holds the segment in the layer, G for none. scratch: for every thread, and 64
   bytes more. Returns TOO_WIDE, with loss and gradient undefined, if a row holds NaN or spans more than 2 NARROW T. */
int pcd_native(const float *student, const float *teacher, int64_t n, int64_t classes, const int32_t *edges,
               int64_t segments, const int32_t *spans, int64_t groups, const int32_t *group_of, int64_t layers,
               double temperature, int32_t ranking, int32_t weighting, int32_t detach, int32_t threads, void *scratch,
               float *loss, float *gradient) {
    int status = DONE;
    Problem a = describe(classes, edges, segments, groups);
    a.spans = spans, a.group_of = group_of, a.layers = layers, a.temperature = temperature;
    a.ranking = ranking, a.weighting = weighting, a.detach = detach;
    int64_t blocks = (n + ROWS - 1) / ROWS;
    uintptr_t memory = ((uintptr_t)scratch + 63) / 64 * 64;
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1 && blocks > 1)
    {
        Work w;
        size_t size = lay_out(&a, &w, 0);
        lay_out(&a, &w, memory + (uintptr_t)THREAD * size);
        memset(w.t, 0, (size_t)(classes + LANES) * sizeof *w.t);
        memset(w.s, 0, (size_t)(classes + LANES) * sizeof *w.s);
        for (int64_t i = 0; i < 6 * segments; i++) w.statistics[i] = (Rows){0} + 1.0; /* rows after the last one */
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            int64_t start = block * ROWS, rows = n - start < ROWS ? n - start : ROWS;
            int fits = 1;
            for (int r = 0; fits && r < rows; r++) {
                int64_t at = (start + r) * classes;
                fits = row_statistics(&a, &w, student + at, teacher + at, r);
            }
            if (!fits) {
#pragma omp atomic write
                status = TOO_WIDE;
                continue;
            }
            Rows losses = combine(&a, &w);
            for (int r = 0; r < rows; r++) {
                loss[start + r] = (float)losses[r];
                row_gradient(&a, &w, r, gradient + (start + r) * classes);
            }
        }
    }
    return status;
}
