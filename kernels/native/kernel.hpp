// Row and column statistics of whole units, written once for every SIMD level and dtype.
//
// Fast path: one pass over the stored bytes. Rows are taken L::ROWS at a time, so that column sums are loaded and stored
// once for several rows; sums and sums of squares in float32 lanes, at most 32 additions deep, then float64 (columns)
// or a second float32 level of at most 32 and then float64 (rows). Traffic: each stored byte once; column sums (8 bytes
// a column, twice that under a row weight) stay in cache.
//
// Unshifted sums lose digits when a mean is large against its std, float32 when values are extreme. So every unit is
// judged by its own sums, and one that fails is done again by the exact path: float64, two passes, centred, reading
// the unit (about 2 MB) from cache. float64 elements have only that path.
//
// Elements that are quantised, or that an adapter adds to, are STAGED: of a band of rows, a segment at a time is laid
// out in the first-level cache (segment.hpp) and becomes float32 in registers, in stored order; row sums are then at
// most 64 additions deep. The largest magnitude is looked for only where a segment's scales allow a new one.
#pragma once

#include "segment.hpp"

namespace llmfp {
namespace {

constexpr size_t FOLD_ROWS = 32;                    // rows per float32 column sum
constexpr size_t SEGMENT_STEPS = 32;                // vectors per float32 row sum, and such sums per second-level sum
constexpr double TINY = 0x1p-100, HUGE_SUM = 1e300; // float32 squares below TINY may have underflowed
constexpr double MOST = 0x1p60, LEAST = 0x1p-50;    // abs_max between these keeps squares far inside float32

// A unit goes to the exact path when count * mean^2 exceeds this share of M2 in any row or column: rounding errors of
// the sums then reach the std enlarged by no more than 1 + CANCELLATION.
constexpr double CANCELLATION = 1;

constexpr double canonical_nan() { return __builtin_nan(""); }
LLMFP_INLINE double canonical(double x) { return x == x ? x : canonical_nan(); }

enum class Weighted { NO, BY_COLUMN, BY_ROW };

// Whether float32 sums S of x and Q of x^2 can be trusted; M2 and mean as derived from them.
LLMFP_INLINE bool sound(double s, double q, double mean, double m2) {
    return (q <= HUGE_SUM) & ((q >= TINY) | ((q == 0) & (s == 0))) & (s * mean <= CANCELLATION * m2);
}

struct Moment {
    double mean, m2;
};

LLMFP_INLINE Moment moment(double s, double q, double inverse) {
    const double mean = s * inverse, m2 = q - s * mean;
    return {mean, m2 > 0 ? m2 : 0};
}

// ---------------------------------------------------------------------------------------------------------- fast path

// The largest magnitude so far, of each lane; `bits` of all of them, as of the stored dtype.
template <class L, Dtype D, bool STAGED> struct Largest : L::template Source<D>::Max {};
template <class L> struct Largest<L, Dtype::F32, true> {
    Known<typename L::F32> known;
    uint32_t bits() const { return most_bits(known.most); }
};

template <class L, Dtype D, Weighted W, bool STAGED> struct Fast {
    using F32 = typename L::F32;
    using F64 = typename L::F64;
    using Source = typename L::template Source<D>;
    using Max = Largest<L, D, STAGED>;
    using Form = Format<D>;
    static constexpr size_t ITEM = itemsize(D), BLOCK = Form::BLOCK, V = Form::V;
    static constexpr size_t SEGMENT = SEGMENT_STEPS * 16;
    static constexpr int SUMS = W == Weighted::BY_COLUMN ? 4 : 2; // of a row: x, x^2, (g x), (g x)^2

    template <int R> struct Rows {
        F32 sum[R][SUMS];
        LLMFP_INLINE void clear() {
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                for (int k = 0; k < SUMS; k++) sum[r][k] = F32::zero();
        }
    };

    // Sums of R rows: float32 ones of segments, and float64 ones of every SEGMENT_STEPS of those.
    template <int R> struct RowSums {
        Rows<R> second;
        F64 wide[R][SUMS];
        size_t depth = 0;
        RowSums() {
            second.clear();
            for (auto &row : wide)
                for (F64 &each : row) each = F64::zero();
        }
        LLMFP_INLINE void add(const Rows<R> &segment) {
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                for (int k = 0; k < SUMS; k++) second.sum[r][k] = second.sum[r][k] + segment.sum[r][k];
            if (++depth % SEGMENT_STEPS) return;
            for (int r = 0; r < R; r++)
                for (int k = 0; k < SUMS; k++) wide[r][k] = wide[r][k] + F64::widen(second.sum[r][k]);
            second.clear();
        }
        // Their means and M2; whether all of them can be trusted.
        bool finish(const Job &job, size_t row) const {
            double total[R][SUMS];
            for (int r = 0; r < R; r++)
                for (int k = 0; k < SUMS; k++) total[r][k] = (wide[r][k] + F64::widen(second.sum[r][k])).sum();
            return finish_rows<R>(job, row, total);
        }
    };

    // x of row r into all sums; those of columns are in `sum` and the like.
    struct Columns {
        F32 sum, square, wsum, wsquare, gain;
        LLMFP_INLINE void load(const Scratch &s, size_t at) {
            sum = F32::load(s.fast[0] + at), square = F32::load(s.fast[1] + at);
            if constexpr (W == Weighted::BY_ROW) wsum = F32::load(s.fast[2] + at), wsquare = F32::load(s.fast[3] + at);
            if constexpr (W == Weighted::BY_COLUMN) gain = F32::load(s.gain_blocked + at);
        }
        LLMFP_INLINE void store(const Scratch &s, size_t at) const {
            sum.store(s.fast[0] + at), square.store(s.fast[1] + at);
            if constexpr (W == Weighted::BY_ROW) wsum.store(s.fast[2] + at), wsquare.store(s.fast[3] + at);
        }
        template <int R> LLMFP_INLINE void add(F32 x, int r, const float *row_weight, Rows<R> &rows) {
            sum = sum + x;
            square = fma(x, x, square);
            rows.sum[r][0] = rows.sum[r][0] + x;
            rows.sum[r][1] = fma(x, x, rows.sum[r][1]);
            if constexpr (W == Weighted::BY_COLUMN) {
                const F32 t = x * gain;
                rows.sum[r][2] = rows.sum[r][2] + t;
                rows.sum[r][3] = fma(t, t, rows.sum[r][3]);
            }
            if constexpr (W == Weighted::BY_ROW) {
                const F32 t = x * F32::splat(row_weight[r]);
                wsum = wsum + t;
                wsquare = fma(t, t, wsquare);
            }
        }
    };

    // One block of R rows. `data` is row 0's block; `ahead` is where to prefetch, relative to it.
    template <int R>
    static LLMFP_INLINE void step(const unsigned char *data, size_t stride, ptrdiff_t ahead, size_t column,
                                  const Scratch &s, const float *row_weight, Rows<R> &rows, Max &max) {
        typename Source::Packed packed[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            Source::pack(data + r * stride, max, packed[r]);
            // The same columns of the next rows, which the hardware does not foresee: 9 % faster from memory (bf16).
            for (size_t line = 0; line < BLOCK * ITEM; line += 64)
                __builtin_prefetch(data + r * stride + ahead + line, 0, 2);
        }
#pragma GCC unroll 4
        for (size_t v = 0; v < V; v++) {
            const size_t at = column + 16 * v;
            Columns columns;
            columns.load(s, at);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) columns.add(Source::get(packed[r], v), r, row_weight, rows);
            columns.store(s, at);
        }
    }

    // Columns [column, column + 16 * vectors) of R staged rows, a segment. `ahead` is where what comes next is stored,
    // relative to them.
    template <int R, Kept KEPT, Scaling SCALING, bool LOOK>
    static __attribute__((noinline)) void staged(const Job &job, Spread spread, const Segment *segment, ptrdiff_t ahead,
                                                 size_t column, size_t vectors, const float *row_weight,
                                                 RowSums<R> &sums, Max &all_max) {
        const Scratch s = job.scratch; // copies, which stores of sums cannot change
        const uint8_t *code[R];
        for (int r = 0; r < R; r++) code[r] = segment[r].code;
        const float *table = job.coding.table;
        const size_t step = KEPT == Kept::WORDS ? 64 : job.coding.packing == Packing::GGML ? 17 : 2 * job.coding.bits;
        Rows<R> rows;
        rows.clear();
        F32 most = all_max.known.most;
        auto add = [&](size_t v) {
            const size_t at = column + 16 * v, entry = (v + spread.skew) >> spread.shift;
            Columns columns;
            columns.load(s, at);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                constexpr bool SHARED = SCALING == Scaling::SHARED;
                const F32 x = sixteen<L, KEPT, SCALING>(segment[r], segment[SHARED ? 0 : r],
                                                        code[SHARED && KEPT == Kept::WORDS ? 0 : r], table, v, entry);
                if constexpr (LOOK) most = F32::larger(most, x);
                columns.add(x, r, row_weight, rows);
            }
            columns.store(s, at);
        };
        size_t v = 0;
        for (; v + 4 <= vectors; v += 4) {
            for (int r = 0; r < R; r++) // the hardware does not foresee the next rows
                __builtin_prefetch(segment[r].stored + ahead + v * step + (KEPT == Kept::WORDS ? 64 * r : 0), 0, 3);
#pragma GCC unroll 1 // more, and sums no longer fit in registers
            for (size_t k = 0; k < 4; k++) add(v + k);
        }
        for (; v != vectors; v++) add(v);
        all_max.known.most = most;
        sums.add(rows);
    }

    // as(staged<...>) with what is known at run time.
    template <int R, Kept KEPT, Scaling SCALING, class As> static LLMFP_INLINE void reduce(bool look, As as) {
        look ? as(staged<R, KEPT, SCALING, true>) : as(staged<R, KEPT, SCALING, false>);
    }
    template <int R, Kept KEPT, class As> static LLMFP_INLINE void reduce_columns(bool same, bool look, As as) {
        same ? reduce<R, KEPT, Scaling::SHARED>(look, as) : as(staged<R, KEPT, Scaling::COLUMNS, true>);
    }
    template <int R, Kept KEPT, class As>
    static LLMFP_INLINE void reduce_bytes(Scaling scaling, bool same, bool look, As as) {
        switch (scaling) {
        case Scaling::FACTOR: return reduce<R, KEPT, Scaling::FACTOR>(look, as);
        case Scaling::AFFINE: return reduce<R, KEPT, Scaling::AFFINE>(look, as);
        case Scaling::ZERO: return reduce<R, KEPT, Scaling::ZERO>(look, as);
        case Scaling::COLUMNS:
        case Scaling::SHARED: return reduce_columns<R, KEPT>(same, look, as);
        }
    }

    // The same of rows that are yet to be laid out; n columns, at most a segment. What is stored at `next` comes next.
    template <int R>
    static void lay_out(const Job &job, const Kind &kind, size_t row, size_t column, size_t n, const unsigned char *next,
                        RowSums<R> &sums, Max &max) {
        Segment segment[R];
        const size_t vectors = (n + 15) / 16;
        bool look = false;
        for (int r = 0; r < R; r++) {
            lay<L>(job, kind, row + static_cast<size_t>(r), column, n, segment[r]);
            if (kind.kept == Kept::FLOATS)
                for (size_t j = n; j % 16; j++) segment[r].floats[j] = 0;
        }
        const bool columns = kind.kept != Kept::FLOATS && kind.scaling == Scaling::COLUMNS;
        const bool same = columns && shared<R>(segment, kind.kept);
        if (same) look = column_bound<L>(*segment, vectors, column, max.known) > max.known.all;
        else
            for (const Segment &each : segment) look |= may_exceed<L>(kind, each, vectors, max.known);
        const float *row_weight = job.row_weight + (W == Weighted::BY_ROW ? row : 0);
        auto as = [&](auto reduce) {
            reduce(job, kind.spread, segment, next - segment->stored, column, vectors, row_weight, sums, max);
        };
        using S = Scaling;
        switch (kind.kept) {
        case Kept::FLOATS: as(staged<R, Kept::FLOATS, S::FACTOR, true>); break;
        case Kept::HALVES: reduce<R, Kept::HALVES, S::FACTOR>(look, as); break;
        case Kept::TABLE: reduce<R, Kept::TABLE, S::FACTOR>(look, as); break;
        case Kept::WORDS: reduce_columns<R, Kept::WORDS>(same, look, as); break;
        case Kept::SIGNED: reduce_bytes<R, Kept::SIGNED>(kind.scaling, same, look, as); break;
        case Kept::UNSIGNED: reduce_bytes<R, Kept::UNSIGNED>(kind.scaling, same, look, as);
        }
        if (look) max.known.all = float_of(max.bits());
    }

    // Columns [column, column + n) of R rows as they are stored. What is stored at `next` comes next.
    template <int R>
    static void as_stored(const Job &job, size_t row, size_t column, size_t n, const unsigned char *next,
                          RowSums<R> &sums, Max &all_max) {
        const unsigned char *data = job.data + row * job.row_stride;
        const size_t stop = column + n, full = smaller(stop, job.cols / BLOCK * BLOCK), stride = job.row_stride;
        const ptrdiff_t ahead = next - (data + column * ITEM);
        const float *row_weight = job.row_weight + (W == Weighted::BY_ROW ? row : 0);
        const Scratch s = job.scratch; // a copy, which stores of sums cannot change
        Max max = all_max;
        Rows<R> rows;
        while (column < stop) {
            rows.clear();
            if (column < full) {
                for (const size_t end = smaller(full, column + SEGMENT); column < end; column += BLOCK)
                    step<R>(data + column * ITEM, stride, ahead, column, s, row_weight, rows, max);
            } else { // the last columns, with zeros behind them
                alignas(64) unsigned char tail[R][BLOCK * ITEM];
                memset(tail, 0, sizeof tail);
                for (int r = 0; r < R; r++) memcpy(tail[r], data + r * stride + full * ITEM, (stop - full) * ITEM);
                step<R>(tail[0], BLOCK * ITEM, 0, full, s, row_weight, rows, max);
                column = stop;
            }
            sums.add(rows);
        }
        all_max = max;
    }

    // At most FOLD_ROWS rows, staged ones a segment of all of them at a time, so that the segment's column sums stay in the
    // first-level cache. False if a row's sums cannot be trusted.
    static bool band(const Job &job, size_t start, size_t stop, Max &max) {
        constexpr int R = L::ROWS;
        constexpr size_t ROUND = STAGED ? 16 : BLOCK;
        RowSums<R> groups[FOLD_ROWS / R];
        RowSums<1> alone[R];
        const size_t together = start + (stop - start) / R * R;
        Kind kind = {};
        if constexpr (STAGED) kind = kind_of(job);
        const Kept kept = kind.kept;
        for (size_t column = 0, n; column < job.cols; column += n) {
            n = STAGED ? smaller(job.cols - column, STAGE_COLS) : job.cols;
            if constexpr (STAGED) {
                kind.kept = n < 16 ? Kept::FLOATS : kept;
                if (kind.kept != Kept::FLOATS) n = n / 16 * 16; // the last columns become floats, with zeros behind them
                kind.spread = spread_of(job.coding, job.first_col + column, n);
            }
            const bool last = column + n == job.cols;
            auto reduce = [&](size_t i, size_t after, auto &sums) {
                const auto *next = after < stop ? stored_at(job, after, column)
                                   : last       ? stored_at(job, stop, 0)
                                                : stored_at(job, start, column + n);
                if constexpr (STAGED) lay_out(job, kind, i, column, n, next, sums, max);
                else as_stored(job, i, column, n, next, sums, max);
            };
            for (size_t i = start; i < together; i += R) reduce(i, i + R, groups[(i - start) / R]);
            for (size_t i = together; i < stop; i++) reduce(i, i + 1, alone[i - together]);
            fold(job, column, (n + ROUND - 1) / ROUND * ROUND);
        }
        bool good = true;
        for (size_t i = start; i < together; i += R) good &= groups[(i - start) / R].finish(job, i);
        for (size_t i = together; i < stop; i++) good &= alone[i - together].finish(job, i);
        return good;
    }

    // Means and M2 of R rows from their sums; whether all of them can be trusted.
    template <int R> static bool finish_rows(const Job &job, size_t row, const double (*total)[SUMS]) {
        const double inverse = 1.0 / static_cast<double>(job.cols);
        bool good = true;
        for (int r = 0; r < R; r++) {
            const double s = total[r][0] * Form::SCALE, q = total[r][1] * (Form::SCALE * Form::SCALE);
            const Moment m = moment(s, q, inverse);
            job.row_mean[row + r] = m.mean, job.row_m2[row + r] = m.m2;
            good &= sound(s, q, m.mean, m.m2);
            if (underflows() && q == 0) good &= all_zero(job, row + r, 1, 0, job.cols);
            if constexpr (W == Weighted::BY_COLUMN) {
                const double ws = total[r][2] * Form::SCALE, wq = total[r][3] * (Form::SCALE * Form::SCALE);
                const Moment w = moment(ws, wq, inverse);
                job.weighted_row_mean[row + r] = w.mean, job.weighted_row_m2[row + r] = w.m2;
                good &= sound(ws, wq, w.mean, w.m2) & ((wq != 0) | (q == 0));
            }
        }
        return good;
    }

    // The smallest float16 and fp8 values have squares that float32 holds.
    static constexpr bool underflows() { return D == Dtype::BF16 || D == Dtype::F32; }

    // Whether elements whose squares sum to zero are zero.
    static bool all_zero(const Job &job, size_t row, size_t rows, size_t column, size_t cols) {
        if constexpr (STAGED) {
            float *x = job.scratch.stage;
            for (size_t i = row; i < row + rows; i++)
                for (size_t j = column, n; j < column + cols; j += n) {
                    n = smaller(column + cols - j, STAGE_COLS);
                    decode<L>(job, i, j, n, x);
                    for (size_t k = 0; k < n; k++)
                        if (x[k] != 0) return false;
                }
            return true;
        }
        for (size_t i = row; i < row + rows; i++)
            for (size_t j = column; j < column + cols; j++)
                if (bits_at<D>(job.data + i * job.row_stride + j * ITEM) & Form::MAGNITUDE) return false;
        return true;
    }

    // cross_j += m_i x_ij over `rows` rows that were just read and are still in cache.
    static void cross(const Job &job, size_t row, size_t rows) {
        const unsigned char *data = job.data + row * job.row_stride;
        const double *mean = (W == Weighted::BY_COLUMN ? job.weighted_row_mean : job.row_mean) + row;
        const size_t full = job.cols / BLOCK * BLOCK, stride = job.row_stride;
        float m[FOLD_ROWS];
        for (size_t i = 0; i < rows; i++) m[i] = static_cast<float>(mean[i]);
        typename Source::Max ignored;
        if constexpr (STAGED) {
            for (size_t column = 0, n; column < job.cols; column += n) {
                n = smaller(job.cols - column, SEGMENT);
                float *stage = job.scratch.stage;
                for (size_t i = 0; i < rows; i++) {
                    decode<L>(job, row + i, column, n, stage + i * SEGMENT);
                    for (size_t j = n; j < padded(n); j++) stage[i * SEGMENT + j] = 0;
                }
                for (size_t j = 0; j < padded(n); j += 16) {
                    F32 sum = F32::zero();
                    for (size_t i = 0; i < rows; i++) sum = fma(F32::splat(m[i]), F32::load(stage + i * SEGMENT + j), sum);
                    double *to = job.scratch.sum[2] + column + j;
                    (F64::load(to) + F64::widen(sum)).store(to);
                }
            }
            return;
        }
        for (size_t column = 0; column < job.cols; column += BLOCK) {
            F32 sum[V];
#pragma GCC unroll 4
            for (size_t v = 0; v < V; v++) sum[v] = F32::zero();
            alignas(64) unsigned char tail[BLOCK * ITEM];
            if (column == full) memset(tail, 0, sizeof tail);
            for (size_t i = 0; i < rows; i++) {
                const unsigned char *block = data + i * stride + column * ITEM;
                if (column == full) block = static_cast<unsigned char *>(memcpy(tail, block, (job.cols - full) * ITEM));
                typename Source::Packed packed;
                Source::pack(block, ignored, packed);
#pragma GCC unroll 4
                for (size_t v = 0; v < V; v++) sum[v] = fma(F32::splat(m[i]), Source::get(packed, v), sum[v]);
            }
#pragma GCC unroll 4
            for (size_t v = 0; v < V; v++) {
                double *to = job.scratch.sum[2] + column + 16 * v;
                (F64::load(to) + F64::widen(sum[v])).store(to);
            }
        }
    }

    // float32 sums of columns [column, column + n) onto the unit's float64 ones; the former start again at zero.
    static void fold(const Job &job, size_t column, size_t n) {
        for (int k = 0; k < (W == Weighted::BY_ROW ? 4 : 2); k++) {
            float *from = job.scratch.fast[k];
            double *to = job.scratch.sum[k];
            for (size_t j = column; j < column + n; j += 16) {
                (F64::load(to + j) + F64::widen(F32::load(from + j))).store(to + j);
                F32::zero().store(from + j);
            }
        }
    }

    // Blocked order to stored order.
    static void unblock(const double *from, double *to, size_t cols) {
        if (column_of<D>(0, 1) == 1) {
            memcpy(to, from, 8 * cols);
            return;
        }
        for (size_t block = 0; block < cols; block += BLOCK) {
            if (block + BLOCK <= cols) {
                for (size_t v = 0; v < V; v++)
                    for (size_t l = 0; l < 16; l++) to[block + column_of<D>(v, l)] = from[block + 16 * v + l];
            } else {
                for (size_t v = 0; v < V; v++)
                    for (size_t l = 0; l < 16; l++)
                        if (const size_t j = block + column_of<D>(v, l); j < cols) to[j] = from[block + 16 * v + l];
            }
        }
    }

    // Means and M2 of the unit's columns from their sums, in place; whether all of them can be trusted.
    static bool finish_columns(const Job &job, size_t row, size_t rows, double *sum, double *square, bool plain) {
        const double inverse = 1.0 / static_cast<double>(rows);
        const size_t n = padded(job.cols);
        uint64_t bad = 0, zeros = 0;
        for (size_t j = 0; j < n; j++) {
            const double s = sum[j] * Form::SCALE, q = square[j] * (Form::SCALE * Form::SCALE);
            const double mean = s * inverse;
            double m2 = q - s * mean;
            m2 = m2 > 0 ? m2 : 0;
            bad |= static_cast<uint64_t>(!sound(s, q, mean, m2));
            zeros |= static_cast<uint64_t>(q == 0);
            sum[j] = mean, square[j] = m2;
        }
        if (bad) return false;
        if (!zeros || !plain || !underflows()) return true;
        for (size_t j = 0; j < n; j++)
            if (const size_t c = j / BLOCK * BLOCK + column_of<D>(j % BLOCK / 16, j % 16);
                c < job.cols && sum[j] == 0 && square[j] == 0 && !all_zero(job, row, rows, c, 1))
                return false;
        return true;
    }

    // False: this unit is for the exact path.
    static bool unit(const Job &job, size_t index, size_t row, size_t rows, double &abs_max) {
        const Scratch &s = job.scratch;
        const size_t n = padded(job.cols);
        constexpr int COLUMN_SUMS = W == Weighted::BY_ROW ? 4 : 2;
        for (int k = 0; k < COLUMN_SUMS; k++) memset(s.fast[k], 0, 4 * n), memset(s.sum[k], 0, 8 * n);
        if (job.cross) memset(s.sum[2], 0, 8 * n);
        Max max;
        for (size_t start = row; start < row + rows; start += FOLD_ROWS) {
            const size_t stop = smaller(row + rows, start + FOLD_ROWS);
            if (!band(job, start, stop, max)) return false;
            if (job.cross) cross(job, start, stop - start);
        }
        const Bits<D> most = max.bits();
        if (most >= Form::NONFINITE) return false;
        abs_max = static_cast<double>(value_of<D>(most)) * Form::SCALE;
        if (abs_max > MOST || (abs_max > 0 && abs_max < LEAST)) return false;
        if constexpr (W == Weighted::BY_ROW)
            for (size_t j = 0; j < n; j++)
                if (s.sum[3][j] == 0 && s.sum[1][j] != 0) return false;
        if (!finish_columns(job, row, rows, s.sum[0], s.sum[1], abs_max > 0)) return false;
        if constexpr (W == Weighted::BY_ROW)
            if (!finish_columns(job, row, rows, s.sum[2], s.sum[3], false)) return false;
        if (job.cross) {
            uint64_t bad = 0;
            for (size_t j = 0; j < n; j++) {
                bad |= static_cast<uint64_t>(!(s.sum[2][j] <= HUGE_SUM && s.sum[2][j] >= -HUGE_SUM));
                s.sum[2][j] *= Form::SCALE;
            }
            if (bad) return false;
            unblock(s.sum[2], job.cross_sum + index * job.cols, job.cols);
        }
        unblock(s.sum[0], job.col_mean + index * job.cols, job.cols);
        unblock(s.sum[1], job.col_m2 + index * job.cols, job.cols);
        if constexpr (W == Weighted::BY_ROW) {
            unblock(s.sum[2], job.weighted_col_mean + index * job.cols, job.cols);
            unblock(s.sum[3], job.weighted_col_m2 + index * job.cols, job.cols);
        }
        return true;
    }
};

// --------------------------------------------------------------------------------------------------------- exact path

template <class L, Dtype D, bool STAGED> struct Exact {
    using F32 = typename L::F32;
    using F64 = typename L::F64;
    using Form = Format<D>;
    static constexpr size_t ITEM = itemsize(D);

    static LLMFP_INLINE double decoded(Bits<D> bits) {
        if constexpr (D == Dtype::F64) {
            double x;
            memcpy(&x, &bits, 8);
            return x;
        } else {
            return static_cast<double>(value_of<D>(bits)) * Form::SCALE;
        }
    }

    // The largest magnitude in a row, as an integer.
    static Bits<D> largest(const Job &job, size_t row) {
        const unsigned char *p = job.data + row * job.row_stride;
        Bits<D> most = 0;
        for (size_t j = 0; j < job.cols; j++) {
            const Bits<D> magnitude = bits_at<D>(p + j * ITEM) & Form::MAGNITUDE;
            most = magnitude > most ? magnitude : most;
        }
        return most;
    }

    // One row into scratch.row; zero in place of what is not finite.
    static void decode(const Job &job, size_t row, bool finite) {
        const unsigned char *p = job.data + row * job.row_stride;
        double *x = job.scratch.row;
        if (finite) {
            for (size_t j = 0; j < job.cols; j++) x[j] = decoded(bits_at<D>(p + j * ITEM));
        } else {
            for (size_t j = 0; j < job.cols; j++) {
                const Bits<D> bits = bits_at<D>(p + j * ITEM);
                x[j] = (bits & Form::MAGNITUDE) < Form::NONFINITE ? decoded(bits) : 0;
            }
        }
    }

    // Marks the columns of a row's non-finite elements and counts these; `most` becomes the largest finite magnitude.
    static uint64_t mark(const Job &job, size_t row, Bits<D> &most) {
        const unsigned char *p = job.data + row * job.row_stride;
        uint64_t count = 0;
        Bits<D> m = 0;
        for (size_t j = 0; j < job.cols; j++) {
            const Bits<D> magnitude = bits_at<D>(p + j * ITEM) & Form::MAGNITUDE;
            const bool finite = magnitude < Form::NONFINITE;
            m = finite && magnitude > m ? magnitude : m;
            job.scratch.bad[j] |= !finite;
            count += !finite;
        }
        most = m;
        return count;
    }

    // A staged row into scratch.row, zero in place of what is not finite, whose columns are marked; the number of these.
    static uint64_t load(const Job &job, size_t row, double &magnitude) {
        double *x = job.scratch.row;
        uint64_t count = 0;
        magnitude = 0;
        for (size_t j = 0, n; j < job.cols; j += n) {
            n = smaller(job.cols - j, STAGE_COLS);
            llmfp::decode<L>(job, row, j, n, x + j);
        }
        for (size_t j = 0; j < job.cols; j++) {
            const double m = x[j] < 0 ? -x[j] : x[j];
            if (m - m == 0) {
                magnitude = m > magnitude ? m : magnitude;
            } else {
                x[j] = 0, job.scratch.bad[j] = 1, count++;
            }
        }
        return count;
    }

    // Mean and M2 of n doubles, each times its gain if there are gains: two passes of 16 lanes.
    template <bool GAIN> static Moment centred(const double *x, const float *gain, size_t n) {
        const size_t full = n / 16 * 16;
        double lane[16];
        auto at = [&](size_t j) { return GAIN ? x[j] * static_cast<double>(gain[j]) : x[j]; };
        auto sixteen = [&](size_t j) {
            return GAIN ? F64::load(x + j) * F64::widen(F32::load(gain + j)) : F64::load(x + j);
        };
        F64 sum = F64::zero(), square = F64::zero();
        for (size_t j = 0; j < full; j += 16) sum = sum + sixteen(j);
        sum.store(lane);
        for (size_t j = full; j < n; j++) lane[j - full] += at(j);
        const double mean = F64::load(lane).sum() / static_cast<double>(n);
        const F64 centre = F64::splat(mean);
        for (size_t j = 0; j < full; j += 16) {
            const F64 d = sixteen(j) - centre;
            square = square + d * d;
        }
        square.store(lane);
        for (size_t j = full; j < n; j++) {
            const double d = at(j) - mean;
            lane[j - full] += d * d;
        }
        return {mean, F64::load(lane).sum()};
    }

    static void unit(Job &job, size_t index, size_t row, size_t rows) {
        const Scratch &s = job.scratch;
        const size_t cols = job.cols;
        double *__restrict const sum = s.sum[0], *__restrict const square = s.sum[1];
        double *__restrict const wsum = s.sum[2], *__restrict const wsquare = s.sum[3];
        const double *__restrict const x = s.row;
        for (double *each : s.sum) memset(each, 0, 8 * cols);
        memset(s.bad, 0, cols);
        for (size_t i = row; i < row + rows; i++) {
            double magnitude;
            uint64_t bad = 0;
            if constexpr (STAGED) {
                bad = load(job, i, magnitude);
            } else {
                Bits<D> most = largest(job, i);
                if (most >= Form::NONFINITE) bad = mark(job, i, most);
                decode(job, i, !bad);
                magnitude = decoded(most);
            }
            job.abs_max = magnitude > job.abs_max ? magnitude : job.abs_max;
            job.nonfinite += bad;
            Moment m = centred<false>(x, nullptr, cols), w = m;
            if (bad) m.mean = m.m2 = canonical_nan();
            job.row_mean[i] = canonical(m.mean), job.row_m2[i] = canonical(m.m2);
            if (job.has_col_weight) {
                w = centred<true>(x, s.gain, cols);
                bool overflow = false; // of a product, which counts as non-finite; that of a sum does not
                for (size_t j = 0; j < cols && !(w.mean - w.mean == 0); j++) {
                    const double t = x[j] * static_cast<double>(s.gain[j]);
                    overflow |= !(t - t == 0);
                }
                if (bad || overflow) w.mean = w.m2 = canonical_nan();
                job.weighted_row_mean[i] = canonical(w.mean), job.weighted_row_m2[i] = canonical(w.m2);
            } else {
                w = m;
            }
            for (size_t j = 0; j < cols; j++) sum[j] += x[j];
            if (job.row_weight) {
                const double g = job.row_weight[i];
                for (size_t j = 0; j < cols; j++) wsum[j] += g * x[j];
            } else if (job.cross) {
                for (size_t j = 0; j < cols; j++) wsum[j] += w.mean * x[j];
            }
        }
        const double n = static_cast<double>(rows);
        if (job.cross)
            for (size_t j = 0; j < cols; j++)
                job.cross_sum[index * cols + j] =
                    wsum[j] - wsum[j] == 0 && !s.bad[j] ? wsum[j] : canonical_nan();
        for (size_t j = 0; j < cols; j++) sum[j] /= n, wsum[j] /= n;
        for (size_t i = row; i < row + rows; i++) {
            if constexpr (STAGED) {
                double ignored;
                load(job, i, ignored);
            } else {
                decode(job, i, true); // a non-finite element spoils its own column alone, whose results are NaN anyway
            }
            for (size_t j = 0; j < cols; j++) {
                const double d = x[j] - sum[j];
                square[j] += d * d;
            }
            if (job.row_weight) {
                const double g = job.row_weight[i];
                for (size_t j = 0; j < cols; j++) {
                    const double d = g * x[j] - wsum[j];
                    wsquare[j] += d * d;
                }
            }
        }
        double *mean = job.col_mean + index * cols, *m2 = job.col_m2 + index * cols;
        for (size_t j = 0; j < cols; j++) {
            mean[j] = s.bad[j] ? canonical_nan() : canonical(sum[j]);
            m2[j] = s.bad[j] ? canonical_nan() : canonical(square[j]);
        }
        if (!job.row_weight) return;
        mean = job.weighted_col_mean + index * cols, m2 = job.weighted_col_m2 + index * cols;
        for (size_t j = 0; j < cols; j++) {
            bool bad = s.bad[j];
            if (!(wsum[j] - wsum[j] == 0)) // as for rows: did a product overflow, or only the sum?
                for (size_t i = row; i < row + rows; i++) {
                    double x;
                    if constexpr (STAGED) llmfp::decode<L>(job, i, j, 1, &x);
                    else x = decoded(bits_at<D>(job.data + i * job.row_stride + j * ITEM));
                    const double t = x * static_cast<double>(job.row_weight[i]);
                    bad |= !(t - t == 0);
                }
            mean[j] = bad ? canonical_nan() : canonical(wsum[j]);
            m2[j] = bad ? canonical_nan() : canonical(wsquare[j]);
        }
    }
};

// -------------------------------------------------------------------------------------------------------------- units

template <class L, Dtype D, Weighted W, bool STAGED> void units(Job &job) {
    if constexpr (D != Dtype::F64 && W == Weighted::BY_COLUMN)
        for (size_t j = 0; j < padded(job.cols); j++) {
            constexpr size_t B = Format<D>::BLOCK;
            job.scratch.gain_blocked[j] = job.scratch.gain[j / B * B + column_of<D>(j % B / 16, j % 16)];
        }
    for (size_t row = 0, index = 0; row < job.rows; row += job.unit_rows, index++) {
        const size_t rows = smaller(job.unit_rows, job.rows - row);
        if constexpr (D != Dtype::F64) {
            double abs_max;
            if (!job.exact && Fast<L, D, W, STAGED>::unit(job, index, row, rows, abs_max)) {
                job.abs_max = abs_max > job.abs_max ? abs_max : job.abs_max;
                continue;
            }
        }
        Exact<L, D, STAGED>::unit(job, index, row, rows);
    }
}

template <class L, Dtype D, bool STAGED = false> void units_of(Job &job) {
    if (job.has_col_weight) return units<L, D, Weighted::BY_COLUMN, STAGED>(job);
    if (job.row_weight) return units<L, D, Weighted::BY_ROW, STAGED>(job);
    units<L, D, Weighted::NO, STAGED>(job);
}

inline void fold_unit(double total, double *mean, double *m2, double n, const unsigned char *unit_mean,
                      const unsigned char *unit_m2, size_t cols) {
    const double share = n / (total + n), between = total * share;
    for (size_t j = 0; j < cols; j++) {
        double x, y;
        memcpy(&x, unit_mean + 8 * j, 8), memcpy(&y, unit_m2 + 8 * j, 8);
        const double delta = x - mean[j];
        mean[j] = canonical(mean[j] + delta * share);
        m2[j] = canonical(m2[j] + y + delta * delta * between);
    }
}

template <class L> void expand(Job *job) {
    alignas(64) float stage[STAGE_COLS + 16]; // decoding may write a vector too many
    const float *__restrict gain = job->scratch.gain;
    for (size_t row = 0; row < job->rows; row++)
        for (size_t column = 0; column < job->cols; column += STAGE_COLS) {
            const size_t n = smaller(job->cols - column, STAGE_COLS);
            float *__restrict out = job->out + row * job->cols + column;
            decode<L>(*job, row, column, n, stage);
            if (gain)
                for (size_t j = 0; j < n; j++) stage[j] *= gain[column + j];
            else if (job->row_weight)
                for (size_t j = 0; j < n; j++) stage[j] *= job->row_weight[row];
            for (size_t j = 0; j < n; j++) out[j] = stage[j] - stage[j] == 0 ? stage[j] : __builtin_nanf("");
        }
}

template <class L> void marginals(Job *job) {
    if (job->has_coding || job->rank) return units_of<L, Dtype::F32, true>(*job);
    switch (job->dtype) {
    case Dtype::BF16: return units_of<L, Dtype::BF16>(*job);
    case Dtype::F16: return units_of<L, Dtype::F16>(*job);
    case Dtype::F32: return units_of<L, Dtype::F32>(*job);
    case Dtype::F64: return units_of<L, Dtype::F64>(*job);
    case Dtype::F8_E4M3: return units_of<L, Dtype::F8_E4M3>(*job);
    case Dtype::F8_E5M2: return units_of<L, Dtype::F8_E5M2>(*job);
    }
}

} // namespace
} // namespace llmfp
