// The reduction of one chunk, written once over sixteen virtual lanes; each simd_*.cpp compiles it for one level.
//
// A unit is summed unshifted in float32 and folded into float64 after at most 32 additions per lane. Then it checks
// itself: where float32 might have lost digits (see `settle`) the unit is reduced again in float64, in two passes.
// Everything depends on the unit's own numbers and shape alone, and every level does the same operations in the same
// order (explicit fused multiply-add, -ffp-contract=off): the same bits on every machine.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

// What one call reduces, and where the answers go; see llmfp/marginals.py for the meaning of each array.
struct Request {
    const uint8_t* data;  // element (0, 0)
    ptrdiff_t rows, cols, row_stride, unit_rows;
    const float* col_weight;  // at most one of the two
    const float* row_weight;
    double *row_mean, *row_m2;            // [rows]
    double *col_mean, *col_m2;            // [units, cols]
    double *weighted_mean, *weighted_m2;  // [rows] or [units, cols]
    double* cross;                        // [units, cols] or null
    double* scratch;                      // scratch_doubles(cols)
    double abs_max;
    int64_t nonfinite;
};

enum Dtype { kBF16, kF16, kF32, kF64, kE4M3, kE5M2 };

// What a level offers to the module.
struct Level {
    const char* name;
    void (*reduce)(Dtype, Request&);
    // Folds one unit's column moments (n rows) into those of the `total` rows before it (Chan, Golub & LeVeque 1979).
    void (*fold)(double total, double* mean, double* m2, double n, const double* unit_mean, const double* unit_m2,
                 ptrdiff_t cols);
};

inline ptrdiff_t padded(ptrdiff_t cols) { return (cols + 31) / 32 * 32; }

// Five column accumulators in float64 and the gain in float32, all padded; the exact path needs one row.
inline ptrdiff_t scratch_doubles(ptrdiff_t cols) { return 6 * padded(cols); }

#ifdef LLMFP_LEVEL

#include "lanes.hpp"

namespace {

constexpr ptrdiff_t kBlock = 32;        // rows whose column sums stay in float32
constexpr ptrdiff_t kFold = 512;        // columns whose row sums stay in float32: 32 additions in each of 16 lanes
constexpr ptrdiff_t kTile = 2048;       // columns worked on at a time: their accumulators fit the first-level cache
constexpr double kLargest = 0x1p60, kSmallest = 0x1p-50;  // magnitudes whose squares are safe in float32
constexpr double kTiny = 0x1p-100;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

enum Weight { kPlain, kColWeight, kRowWeight };

double sum_lanes(const double* lanes) {
    double s[8];
    for (int i = 0; i < 8; i++) s[i] = lanes[i] + lanes[i + 8];
    for (int width = 4; width; width /= 2)
        for (int i = 0; i < width; i++) s[i] = s[i] + s[i + width];
    return s[0];
}

// Mean and M2 from a sum and a sum of squares; false where float32 sums do not carry them: overflow, underflow, or a
// mean over four standard deviations, which costs more than four binary digits by cancellation.
bool settle(double sum, double squares, double n, double scale, double& mean, double& m2) {
    if (!(squares <= std::numeric_limits<double>::max())) return false;
    if (squares < kTiny && !(squares == 0.0 && sum == 0.0)) return false;
    mean = sum / n;
    const double offset = sum * mean;
    m2 = squares - offset;
    if (sum != 0.0 && !(offset <= 16.0 * m2)) return false;
    mean *= scale;
    m2 = std::max(m2, 0.0) * (scale * scale);
    return true;
}

// One row's running sums: plain sum, sum of squares, weighted sum, weighted sum of squares.
struct RowSums {
    double of[4];
};

// The float32 column accumulators of one tile, in slot order.
struct TileSums {
    alignas(64) float of[4][kTile];
};

template <class T>
struct Padded {
    alignas(64) uint8_t bytes[32 * sizeof(typename T::Bits)] = {};
};

// 32 columns of `Rows` rows: into the row accumulators and, row after row, into the tile's column accumulators.
template <class T, Weight W, int Rows>
inline void reduce_group(const uint8_t* const (&at)[Rows], TileSums& tile, ptrdiff_t slot, const float* gain,
                         const float* row_weight, F32x16 (&row)[Rows][4], MaxBits& most) {
    F32x16 sum[2], squares[2], weighted_sum[2], weighted_squares[2], g[2];
    for (int h = 0; h < 2; h++) {
        sum[h] = F32x16::load(tile.of[0] + slot + 16 * h);
        squares[h] = F32x16::load(tile.of[1] + slot + 16 * h);
        if (W == kRowWeight) {
            weighted_sum[h] = F32x16::load(tile.of[2] + slot + 16 * h);
            weighted_squares[h] = F32x16::load(tile.of[3] + slot + 16 * h);
        }
        if (W == kColWeight) g[h] = F32x16::load(gain + slot + 16 * h);
    }
    for (int r = 0; r < Rows; r++) {
        F32x16 x[2];
        T::load(at[r], x[0], x[1], most);
        for (int h = 0; h < 2; h++) {
            sum[h] = sum[h] + x[h];
            squares[h] = F32x16::fma(x[h], x[h], squares[h]);
            row[r][0] = row[r][0] + x[h];
            row[r][1] = F32x16::fma(x[h], x[h], row[r][1]);
            if (W == kColWeight) {
                const F32x16 y = x[h] * g[h];
                row[r][2] = row[r][2] + y;
                row[r][3] = F32x16::fma(y, y, row[r][3]);
            }
            if (W == kRowWeight) {
                const F32x16 y = x[h] * F32x16::all(row_weight[r]);
                weighted_sum[h] = weighted_sum[h] + y;
                weighted_squares[h] = F32x16::fma(y, y, weighted_squares[h]);
            }
        }
    }
    for (int h = 0; h < 2; h++) {
        sum[h].store(tile.of[0] + slot + 16 * h);
        squares[h].store(tile.of[1] + slot + 16 * h);
        if (W == kRowWeight) {
            weighted_sum[h].store(tile.of[2] + slot + 16 * h);
            weighted_squares[h].store(tile.of[3] + slot + 16 * h);
        }
    }
}

// `Rows` rows of one tile of `cols` columns.
template <class T, Weight W, int Rows>
void reduce_rows(const uint8_t* data, ptrdiff_t stride, ptrdiff_t cols, TileSums& tile, const float* gain,
                 const float* row_weight, RowSums* sums, MaxBits& most) {
    constexpr ptrdiff_t size = sizeof(typename T::Bits);
    constexpr int kinds = W == kColWeight ? 4 : 2;
    alignas(64) double lanes[Rows][kinds][16] = {};
    for (ptrdiff_t start = 0; start < cols; start += kFold) {
        F32x16 row[Rows][4];
        for (auto& each : row)
            for (auto& kind : each) kind = F32x16::zero();
        const ptrdiff_t stop = std::min(start + kFold, cols);
        ptrdiff_t c = start;
        for (; c + 32 <= stop; c += 32) {
            const uint8_t* at[Rows];
            for (int r = 0; r < Rows; r++) {
                at[r] = data + r * stride + c * size;
                __builtin_prefetch(at[r] + kRowGroup * stride, 0, 2);
                if (size > 2) __builtin_prefetch(at[r] + kRowGroup * stride + 64, 0, 2);
            }
            reduce_group<T, W, Rows>(at, tile, c, gain, row_weight, row, most);
        }
        if (c < stop) {
            Padded<T> tail[Rows];
            const uint8_t* at[Rows];
            for (int r = 0; r < Rows; r++) {
                std::memcpy(tail[r].bytes, data + r * stride + c * size, static_cast<size_t>((stop - c) * size));
                at[r] = tail[r].bytes;
            }
            reduce_group<T, W, Rows>(at, tile, c, gain, row_weight, row, most);
        }
        for (int r = 0; r < Rows; r++)
            for (int kind = 0; kind < kinds; kind++) row[r][kind].add_to(lanes[r][kind]);
    }
    for (int r = 0; r < Rows; r++)
        for (int kind = 0; kind < kinds; kind++) sums[r].of[kind] += sum_lanes(lanes[r][kind]);
}

// cross_j += m_i · x_ij over one tile of a block of rows, whose means are now known and whose bytes are in cache.
template <class T>
void cross_rows(const uint8_t* data, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t cols, const float* centre, float* into) {
    constexpr ptrdiff_t size = sizeof(typename T::Bits);
    MaxBits unused;
    for (ptrdiff_t c = 0; c < cols; c += 32) {
        F32x16 a = F32x16::zero(), b = F32x16::zero(), x, y;
        for (ptrdiff_t i = 0; i < rows; i++) {
            const uint8_t* at = data + i * stride + c * size;
            Padded<T> tail;
            if (c + 32 > cols) {
                std::memcpy(tail.bytes, at, static_cast<size_t>((cols - c) * size));
                at = tail.bytes;
            }
            T::load(at, x, y, unused);
            a = F32x16::fma(F32x16::all(centre[i]), x, a);
            b = F32x16::fma(F32x16::all(centre[i]), y, b);
        }
        a.store(into + c);
        b.store(into + c + 16);
    }
}

void fold_tile(const float* from, double* into, ptrdiff_t cols) {
    for (ptrdiff_t c = 0; c < cols; c += 16) F32x16::load(from + c).add_to(into + c);
}

// One unit in float32; false where it must be done exactly.
template <class T, Weight W>
bool reduce_unit(Request& q, ptrdiff_t first, ptrdiff_t rows, ptrdiff_t unit, const float* gain) {
    const ptrdiff_t width = padded(q.cols);
    const double n = static_cast<double>(rows), cols = static_cast<double>(q.cols);
    double* const columns = q.scratch;  // [5][width]: sum, squares, weighted sum, weighted squares, cross
    std::fill(columns, columns + 5 * width, 0.0);
    MaxBits most;
    TileSums tile;
    for (ptrdiff_t block = 0; block < rows; block += kBlock) {
        const ptrdiff_t block_rows = std::min(kBlock, rows - block), row = first + block;
        const uint8_t* data = q.data + row * q.row_stride;
        const float* row_weight = W == kRowWeight ? q.row_weight + row : nullptr;
        RowSums sums[kBlock] = {};
        for (ptrdiff_t start = 0; start < q.cols; start += kTile) {
            const ptrdiff_t tile_cols = std::min(kTile, q.cols - start), tile_width = padded(tile_cols);
            const uint8_t* at = data + start * static_cast<ptrdiff_t>(sizeof(typename T::Bits));
            for (int kind = 0; kind < (W == kRowWeight ? 4 : 2); kind++)
                std::fill(tile.of[kind], tile.of[kind] + tile_width, 0.0f);
            ptrdiff_t i = 0;
            for (; i + kRowGroup <= block_rows; i += kRowGroup)
                reduce_rows<T, W, kRowGroup>(at + i * q.row_stride, q.row_stride, tile_cols, tile, gain + start,
                                             row_weight + (row_weight ? i : 0), sums + i, most);
            for (; i < block_rows; i++)
                reduce_rows<T, W, 1>(at + i * q.row_stride, q.row_stride, tile_cols, tile, gain + start,
                                     row_weight + (row_weight ? i : 0), sums + i, most);
            for (int kind = 0; kind < (W == kRowWeight ? 4 : 2); kind++)
                fold_tile(tile.of[kind], columns + kind * width + start, tile_width);
        }
        float centre[kBlock];
        for (ptrdiff_t i = 0; i < block_rows; i++) {
            const RowSums& s = sums[i];
            if (!settle(s.of[0], s.of[1], cols, T::kScale, q.row_mean[row + i], q.row_m2[row + i])) return false;
            if (W == kColWeight &&
                !settle(s.of[2], s.of[3], cols, T::kScale, q.weighted_mean[row + i], q.weighted_m2[row + i]))
                return false;
            centre[i] = static_cast<float>((W == kColWeight ? s.of[2] : s.of[0]) / cols);
        }
        if (q.cross)
            for (ptrdiff_t start = 0; start < q.cols; start += kTile) {
                const ptrdiff_t tile_cols = std::min(kTile, q.cols - start);
                const uint8_t* at = data + start * static_cast<ptrdiff_t>(sizeof(typename T::Bits));
                cross_rows<T>(at, q.row_stride, block_rows, tile_cols, centre, tile.of[0]);
                fold_tile(tile.of[0], columns + 4 * width + start, padded(tile_cols));
            }
    }
    const uint32_t bits = most.template largest<typename T::Bits>();
    if (bits >= T::kNonfinite) return false;
    const double largest = T::value(static_cast<typename T::Bits>(bits));
    if (largest > kLargest || (largest > 0 && largest < kSmallest)) return false;
    for (ptrdiff_t c = 0; c < q.cols; c++) {
        const double* at = columns + c / 32 * 32 + T::slot(static_cast<int>(c % 32));
        const ptrdiff_t out = unit * q.cols + c;
        if (!settle(at[0], at[width], n, T::kScale, q.col_mean[out], q.col_m2[out])) return false;
        if (W == kRowWeight &&
            !settle(at[2 * width], at[3 * width], n, T::kScale, q.weighted_mean[out], q.weighted_m2[out]))
            return false;
        if (q.cross) q.cross[out] = at[4 * width] * (T::kScale * T::kScale);
    }
    q.abs_max = std::max(q.abs_max, largest);
    return true;
}

void make_nan_if_not_finite(double& mean, double& m2) {
    if (!(std::isfinite(mean) && std::isfinite(m2))) mean = m2 = kNan;
}

// Sum, over one row in float64, of f(j), in sixteen lanes.
template <class F>
double sum_row(ptrdiff_t cols, F f) {
    double lanes[16] = {};
    ptrdiff_t c = 0;
    for (; c + 16 <= cols; c += 16)
        for (int lane = 0; lane < 16; lane++) lanes[lane] += f(c + lane);
    for (int lane = 0; c + lane < cols; lane++) lanes[lane] += f(c + lane);
    return sum_lanes(lanes);
}

template <class T>
void decode_row(const uint8_t* at, ptrdiff_t cols, double* into) {
    for (ptrdiff_t c = 0; c < cols; c++) {
        typename T::Bits bits;
        std::memcpy(&bits, at + c * static_cast<ptrdiff_t>(sizeof bits), sizeof bits);
        into[c] = T::value(bits);
    }
}

// One unit in float64, two passes, as kernels/reference.py defines it.
template <class T, Weight W>
void reduce_unit_exactly(Request& q, ptrdiff_t first, ptrdiff_t rows, ptrdiff_t unit) {
    const double n = static_cast<double>(rows), width = static_cast<double>(q.cols);
    const ptrdiff_t cols = q.cols;
    double* const x = q.scratch;
    double *mean = q.col_mean + unit * cols, *m2 = q.col_m2 + unit * cols;
    double *weighted_mean = nullptr, *weighted_m2 = nullptr, *cross = q.cross ? q.cross + unit * cols : nullptr;
    std::fill(mean, mean + cols, 0.0);
    std::fill(m2, m2 + cols, 0.0);
    if (W == kRowWeight) {
        weighted_mean = q.weighted_mean + unit * cols, weighted_m2 = q.weighted_m2 + unit * cols;
        std::fill(weighted_mean, weighted_mean + cols, 0.0);
        std::fill(weighted_m2, weighted_m2 + cols, 0.0);
    }
    if (cross) std::fill(cross, cross + cols, 0.0);
    const float* const g = q.col_weight;
    for (ptrdiff_t i = first; i < first + rows; i++) {
        decode_row<T>(q.data + i * q.row_stride, cols, x);
        for (ptrdiff_t c = 0; c < cols; c++) {
            if (std::isfinite(x[c])) q.abs_max = std::max(q.abs_max, std::fabs(x[c]));
            else q.nonfinite++;
        }
        q.row_mean[i] = sum_row(cols, [x](ptrdiff_t c) { return x[c]; }) / width;
        if (W == kColWeight) q.weighted_mean[i] = sum_row(cols, [x, g](ptrdiff_t c) { return x[c] * g[c]; }) / width;
        for (ptrdiff_t c = 0; c < cols; c++) mean[c] += x[c];
        if (W == kRowWeight) {
            const double h = q.row_weight[i];
            for (ptrdiff_t c = 0; c < cols; c++) weighted_mean[c] += x[c] * h;
        }
    }
    for (ptrdiff_t c = 0; c < cols; c++) mean[c] /= n;
    if (W == kRowWeight)
        for (ptrdiff_t c = 0; c < cols; c++) weighted_mean[c] /= n;
    for (ptrdiff_t i = first; i < first + rows; i++) {
        decode_row<T>(q.data + i * q.row_stride, cols, x);
        const double row_mean = q.row_mean[i];
        q.row_m2[i] = sum_row(cols, [x, row_mean](ptrdiff_t c) { return (x[c] - row_mean) * (x[c] - row_mean); });
        make_nan_if_not_finite(q.row_mean[i], q.row_m2[i]);
        if (W == kColWeight) {
            const double centre = q.weighted_mean[i];
            q.weighted_m2[i] = sum_row(
                cols, [x, g, centre](ptrdiff_t c) { return (x[c] * g[c] - centre) * (x[c] * g[c] - centre); });
            make_nan_if_not_finite(q.weighted_mean[i], q.weighted_m2[i]);
        }
        for (ptrdiff_t c = 0; c < cols; c++) m2[c] += (x[c] - mean[c]) * (x[c] - mean[c]);
        if (W == kRowWeight) {
            const double h = q.row_weight[i];
            for (ptrdiff_t c = 0; c < cols; c++)
                weighted_m2[c] += (x[c] * h - weighted_mean[c]) * (x[c] * h - weighted_mean[c]);
        }
        if (cross) {
            const double centre = W == kColWeight ? q.weighted_mean[i] : q.row_mean[i];
            for (ptrdiff_t c = 0; c < cols; c++) cross[c] += centre * x[c];
        }
    }
    for (ptrdiff_t c = 0; c < cols; c++) {
        make_nan_if_not_finite(mean[c], m2[c]);
        if (W == kRowWeight) make_nan_if_not_finite(weighted_mean[c], weighted_m2[c]);
        if (cross && !std::isfinite(cross[c])) cross[c] = kNan;
    }
}

// The gain in slot order, padded with zeros, at the end of the scratch space.
template <class T>
const float* arrange_gain(Request& q) {
    const ptrdiff_t width = padded(q.cols);
    float* const gain = reinterpret_cast<float*>(q.scratch + 5 * width);
    std::fill(gain, gain + width, 0.0f);
    if (q.col_weight)
        for (ptrdiff_t c = 0; c < q.cols; c++)
            gain[c / 32 * 32 + T::slot(static_cast<int>(c % 32))] = q.col_weight[c];
    return gain;
}

template <class T, Weight W>
void reduce(Request& q) {
    const float* gain = arrange_gain<T>(q);
    for (ptrdiff_t first = 0, unit = 0; first < q.rows; first += q.unit_rows, unit++) {
        const ptrdiff_t rows = std::min(q.unit_rows, q.rows - first);
        if (!reduce_unit<T, W>(q, first, rows, unit, gain)) reduce_unit_exactly<T, W>(q, first, rows, unit);
    }
}


template <Weight W>
void reduce_doubles(Request& q) {
    for (ptrdiff_t first = 0, unit = 0; first < q.rows; first += q.unit_rows, unit++)
        reduce_unit_exactly<F64, W>(q, first, std::min(q.unit_rows, q.rows - first), unit);
}

template <Weight W>
void reduce_dtype(Dtype dtype, Request& q) {
    switch (dtype) {
        case kBF16: return reduce<BF16, W>(q);
        case kF16: return reduce<F16, W>(q);
        case kF32: return reduce<F32, W>(q);
        case kF64: return reduce_doubles<W>(q);
        case kE4M3: return reduce<E4M3, W>(q);
        case kE5M2: return reduce<E5M2, W>(q);
    }
}

void reduce_chunk(Dtype dtype, Request& q) {
    q.abs_max = 0.0;
    q.nonfinite = 0;
    if (q.col_weight) return reduce_dtype<kColWeight>(dtype, q);
    if (q.row_weight) return reduce_dtype<kRowWeight>(dtype, q);
    reduce_dtype<kPlain>(dtype, q);
}

void fold_unit(double total, double* mean, double* m2, double n, const double* unit_mean, const double* unit_m2,
               ptrdiff_t cols) {
    const double share = n / (total + n), product = total * share;
    for (ptrdiff_t c = 0; c < cols; c++) {
        const double delta = unit_mean[c] - mean[c];
        mean[c] = mean[c] + delta * share;
        m2[c] = m2[c] + unit_m2[c] + delta * delta * product;
    }
}

}  // namespace

extern const Level LLMFP_LEVEL;
const Level LLMFP_LEVEL = {LLMFP_NAME, reduce_chunk, fold_unit};

#endif  // LLMFP_LEVEL
