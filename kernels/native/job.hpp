// What module.cpp hands to a SIMD level: plain data only, so that a jump out of a page fault skips no destructor.
#pragma once

#include <cstddef>
#include <cstdint>

static_assert(sizeof(void *) == 8, "64-bit platforms only");
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "stored weights are little-endian and so must be the machine"
#endif

namespace llmfp {

enum class Dtype { BF16, F16, F32, F64, F8_E4M3, F8_E5M2 };

constexpr size_t itemsize(Dtype dtype) {
    return dtype == Dtype::F64 ? 8 : dtype == Dtype::F32 ? 4 : dtype == Dtype::BF16 || dtype == Dtype::F16 ? 2 : 1;
}

enum class Packing { ROW, ROW_HIGH, DOWN, AWQ, PLANE, GGML };
enum class Levels { UINT, INT, OFFSET, F8_E4M3, F8_E5M2, TABLE };
enum class Ggml {
#define LLMFP_GGML(NAME, COLS, BYTES, POINTS) NAME,
#include "ggml_types.inc"
#undef LLMFP_GGML
};

// llmfp.marginals.Coding, checked. Pointers are null where there is none.
struct Coding {
    Packing packing;
    Levels levels;
    Ggml ggml;
    size_t block_cols, block_bytes; // of a ggml block
    const int8_t *grid;
    size_t bits, place;
    float table[16];
    const float *scale, *zero, *shift;
    size_t scale_rows, scale_cols, row_block, col_block, flat_block, tensor_cols;
    const int32_t *row_group, *col_group;
};

// Columns are padded to the widest block that any dtype is read in.
constexpr size_t PAD = 64;
constexpr size_t padded(size_t cols) { return (cols + PAD - 1) / PAD * PAD; }

// Temporary memory of one call. Every array has padded(cols) entries and starts on a cache line.
struct Scratch {
    float *gain;         // col_weight, zeros behind the last column
    float *gain_blocked; // the same in the order in which a block's vectors hold the columns
    float *fast[4];      // column sums and squares, plain and weighted by row, of up to 32 rows
    double *sum[4];      // the same over the unit; the third holds the cross products where they are asked for
    double *row;         // one decoded row (exact path)
    float *stage;        // decoded parts of FOLD_ROWS rows, for cross products of what is not reduced as it is stored
    uint8_t *bad;        // whether a column holds a non-finite element (exact path)
};

constexpr size_t SCRATCH_BYTES_PER_COLUMN = 2 * 4 + 4 * 4 + 4 * 8 + 8 + 1;
constexpr size_t STAGE_BYTES = 32 * 512 * 4 + 64; // decoding may write a vector too many

inline Scratch lay_out(unsigned char *memory, size_t cols) {
    const size_t n = padded(cols);
    Scratch s;
    auto take = [&](size_t bytes) { return (memory += bytes) - bytes; };
    for (double *&d : s.sum) d = reinterpret_cast<double *>(take(8 * n));
    s.row = reinterpret_cast<double *>(take(8 * n));
    for (float *&f : s.fast) f = reinterpret_cast<float *>(take(4 * n));
    s.gain = reinterpret_cast<float *>(take(4 * n));
    s.gain_blocked = reinterpret_cast<float *>(take(4 * n));
    s.bad = take(n);
    s.stage = reinterpret_cast<float *>(take(0));
    return s;
}

struct Job {
    const unsigned char *data; // element (i, j) at data + i * row_stride + j * itemsize, aligned to nothing
    Dtype dtype;
    size_t rows, cols, row_stride, unit_rows;
    const float *row_weight; // [rows] or null; the column weight is in scratch.gain
    bool has_col_weight, cross;
    bool has_coding;
    Coding coding;
    size_t rank; // of what is added to every element, 0 for nothing
    const float *left, *right;
    size_t right_cols, first_row, first_col;
    bool exact; // weights too large or small for float32 sums
    Scratch scratch;
    // Results: [rows] for rows, [units, cols] for columns; null where not asked for.
    double *row_mean, *row_m2, *weighted_row_mean, *weighted_row_m2;
    double *col_mean, *col_m2, *weighted_col_mean, *weighted_col_m2, *cross_sum;
    double abs_max;
    uint64_t nonfinite;
    float *out; // [rows, cols] of expand
};

struct Level {
    const char *name;
    void (*marginals)(Job *);
    // Elements times scratch.gain (by column) or row_weight, where there are such, as float into `out`.
    void (*expand)(Job *);
    // Column moments of n more rows onto those of the `total` rows before them; unit_mean, unit_m2: float64, unaligned.
    void (*fold)(double total, double *mean, double *m2, double n, const unsigned char *unit_mean,
                 const unsigned char *unit_m2, size_t cols);
};

// One per translation unit; null where the compiler does not target that level.
extern const Level *const avx512_level, *const avx2_level, *const neon_level, *const scalar_level;

} // namespace llmfp
