// A row's segment as the fast path takes it: sixteen columns at a time, from stored codes to floats in registers.
//
// Codes that are whole bytes, and words of GPTQ's, are taken from where they are stored; other codes become bytes first
// (a segment's fit in 512), 8-bit floats float16. Each sixteen is then a level, and a level becomes a number by one or
// two operations with a scale in memory. What fits none of this is decoded to floats by decode(), as is what an adapter
// adds to.
#pragma once

#include "decode.hpp"

namespace llmfp {
namespace {

// What sixteen columns of a segment are kept as.
enum class Kept { FLOATS, HALVES, SIGNED, UNSIGNED, WORDS, TABLE };

// What makes numbers of levels: scale * level, scale * level + plus and (level - zero) * scale with one entry for sixteen
// columns, or the last with one for each column, which several rows may share (and WORDS their words).
enum class Scaling { FACTOR, AFFINE, ZERO, COLUMNS, SHARED };

// Where a segment keeps the entries of scales: its v-th sixteen columns have that of (v + skew) >> shift.
struct Spread {
    unsigned skew, shift;
};

struct Kind {
    Kept kept;
    Scaling scaling;
    Spread spread;
    float least, most; // of all levels
};

constexpr size_t VECTORS = STAGE_COLS / 16;

struct Segment {
    const uint8_t *code;              // SIGNED, UNSIGNED, WORDS, TABLE
    const unsigned char *stored;      // where the first column lies
    unsigned low, mask;               // WORDS: where in each word a code lies
    float least, most;                // of its levels
    bool reached;                     // whether there are such levels, not only bounds
    const float *scale, *zero;        // COLUMNS: of the segment's
    alignas(64) float scales[VECTORS + 16], offsets[VECTORS + 16]; // FACTOR, AFFINE, ZERO: see Spread
    union {
        alignas(64) uint8_t bytes[STAGE_COLS + 16];
        alignas(64) uint16_t halves[STAGE_COLS];
        alignas(64) float floats[STAGE_COLS + 16]; // decode() may write a vector too many
    };
};

// The levels that a code can stand for lie between these.
inline void bound_levels(const Coding &c, Kind &kind) {
    const float codes = static_cast<float>(1u << c.bits);
    switch (kind.kept) {
    case Kept::FLOATS: return;
    case Kept::HALVES: kind.most = c.levels == Levels::F8_E4M3 ? 1.75f : 57344; break; // the former divided by 2^8
    case Kept::UNSIGNED:
    case Kept::WORDS: kind.most = codes - 1; return;
    case Kept::SIGNED:
        if (c.packing == Packing::GGML) kind.most = most_of(c.ggml);
        else if (c.levels == Levels::UINT) kind.most = codes - 1;
        else kind.most = codes / 2;
        if (c.levels == Levels::UINT && c.packing != Packing::GGML) return;
        break;
    case Kept::TABLE:
        for (size_t k = 0; k < size_t(1) << c.bits; k++) {
            const float level = c.table[k] < 0 ? -c.table[k] : c.table[k];
            kind.most = level > kind.most ? level : kind.most;
        }
    }
    kind.least = -kind.most;
}

// How the segments of a chunk are laid out.
inline Kind kind_of(const Job &job) {
    Kind kind = {};
    const Coding &c = job.coding;
    const size_t first = job.first_col, last = first + job.cols - 1;
    if (!job.has_coding || job.rank) return kind;
    if (c.packing == Packing::GGML) {
        kind.kept = Kept::SIGNED;
        kind.scaling = has_minimum(c.ggml) ? Scaling::AFFINE : Scaling::FACTOR;
        bound_levels(c, kind);
        return kind;
    }
    if (c.zero) kind.scaling = Scaling::ZERO;
    else if (c.shift) kind.scaling = Scaling::AFFINE;
    if (c.flat_block) {
        if (c.flat_block % 16 || c.tensor_cols % 16 || first % 16) return kind;
    } else if (c.col_group) {
        return kind;
    } else if (c.col_block == 1 && c.zero) {
        kind.scaling = Scaling::COLUMNS;
    } else if ((c.col_block % 16 || first % 16) && first / c.col_block != last / c.col_block) {
        return kind;
    }
    const bool whole = c.packing == Packing::ROW && c.bits == 8, factor = kind.scaling == Scaling::FACTOR;
    const bool words = c.packing == Packing::DOWN && 32 % c.bits == 0 && kind.scaling == Scaling::COLUMNS;
    switch (c.levels) {
    case Levels::F8_E4M3:
    case Levels::F8_E5M2: kind.kept = factor && whole ? Kept::HALVES : Kept::FLOATS; break;
    case Levels::TABLE: kind.kept = factor ? Kept::TABLE : Kept::FLOATS; break;
    case Levels::UINT: kind.kept = words ? Kept::WORDS : c.bits == 8 ? Kept::UNSIGNED : Kept::SIGNED; break;
    case Levels::INT:
    case Levels::OFFSET: kind.kept = Kept::SIGNED; break;
    }
    bound_levels(c, kind);
    return kind;
}

// The same for n columns from `col` of any row. Blocks that lie elsewhere in each row, or are no power of two, have their
// entries repeated for every sixteen columns.
inline Spread spread_of(const Coding &c, size_t col, size_t n) {
    const size_t block = c.col_block, at = block ? col % block : 0;
    if (c.packing == Packing::GGML || c.flat_block) return {0, 0};
    if (at + n <= block) return {0, 31};
    if (block % 16 || block & (block - 1)) return {0, 0};
    return {static_cast<unsigned>(at / 16), static_cast<unsigned>(__builtin_ctzll(block / 16))};
}

// n floats, and what follows them of `there`, up to a multiple of 16; else zeros. Each times a factor.
template <class L> LLMFP_INLINE void copied(const float *from, size_t n, size_t there, float factor, float *to) {
    using F32 = typename L::F32;
    if ((n + 15) / 16 * 16 <= there) {
        for (size_t k = 0; k < n; k += 16) (F32::load(from + k) * F32::splat(factor)).store(to + k);
    } else {
        for (size_t k = 0; k < (n + 15) / 16 * 16; k++) to[k] = k < n ? from[k] * factor : 0;
    }
}

template <class L> void lay_scales(const Job &job, const Kind &kind, size_t row, size_t col, size_t n, float factor, Segment &to) {
    const Coding &c = job.coding;
    const size_t i = job.first_row + row;
    size_t group = c.row_group ? static_cast<size_t>(c.row_group[i]) : c.row_block == 1 ? i : i / c.row_block;
    group = group < c.scale_rows ? group : group % c.scale_rows;
    const size_t block = c.flat_block ? c.flat_block : c.col_block;
    size_t at = c.flat_block ? i * c.tensor_cols + col : col, entry = c.flat_block ? 0 : group * c.scale_cols;
    if (at >= block) entry += at / block, at %= block;
    const float *scale = c.scale + entry, *offset = c.zero ? c.zero : c.shift;
    offset = offset ? offset + entry : nullptr;
    if (kind.scaling == Scaling::COLUMNS) {
        to.scale = scale, to.zero = offset;
        return;
    }
    if (kind.spread.shift || block == 16) {
        const size_t entries = ((n / 16 + kind.spread.skew - 1) >> kind.spread.shift) + 1;
        const size_t there = c.scale_rows * c.scale_cols - entry;
        copied<L>(scale, entries, there, factor, to.scales);
        if (offset) copied<L>(offset, entries, there, 1, to.offsets);
        return;
    }
    for (size_t v = 0, run = (block - at + 15) / 16; 16 * v < n; v += run, run = block / 16, scale++) {
        const float x = *scale * factor, y = offset ? *offset++ : 0;
        for (size_t k = v; k < v + run && 16 * k < n; k++) to.scales[k] = x, to.offsets[k] = y;
    }
    for (size_t k = n / 16; k % 16; k++) to.scales[k] = to.offsets[k] = 0;
}

// Codes of an 8-bit float → float16; for e4m3 divided by 2^8. Returns the largest magnitude's code.
template <Dtype D> uint8_t widened(const uint8_t *__restrict code, size_t n, uint16_t *__restrict to) {
    uint8_t most = 0;
    for (size_t j = 0; j < n; j++) {
        // e4m3: sign stays, exponent and mantissa one place down, the sign's copy between them out
        if constexpr (D == Dtype::F8_E5M2) to[j] = static_cast<uint16_t>(code[j] << 8);
        else to[j] = static_cast<uint16_t>(static_cast<int8_t>(code[j]) << 7) & 0xbf80;
        const uint8_t magnitude = code[j] & 0x7f;
        most = magnitude > most ? magnitude : most;
    }
    return most;
}

// Where what is stored of an element begins, counted from the chunk's first column.
inline const unsigned char *stored_at(const Job &job, size_t row, size_t column) {
    const Coding &c = job.coding;
    const size_t col = job.first_col + column;
    if (!job.has_coding) return job.data + row * job.row_stride + column * itemsize(job.dtype);
    if (c.packing == Packing::DOWN) return job.data + row * c.bits / 32 * job.row_stride + 4 * col;
    const size_t bytes = c.packing == Packing::GGML ? col / c.block_cols * c.block_bytes : col * c.bits / 8;
    return job.data + row * job.row_stride + bytes;
}

// Columns [column, column + n) of row `row` of the chunk; n: a multiple of 16, or FLOATS.
template <class L> void lay(const Job &job, const Kind &kind, size_t row, size_t column, size_t n, Segment &to) {
    const Coding &c = job.coding;
    const size_t col = job.first_col + column;
    to.stored = stored_at(job, row, column), to.least = kind.least, to.most = kind.most, to.reached = false;
    if (kind.kept == Kept::FLOATS) return decode<L>(job, row, column, n, to.floats);
    to.code = to.bytes;
    if (c.packing == Packing::GGML) {
        take_apart(c, to.stored, n, reinterpret_cast<int8_t *>(to.bytes), to.scales, to.offsets);
        for (size_t k = n / 16; k % 16; k++) to.scales[k] = to.offsets[k] = 0;
        return;
    }
    const unsigned char *p = job.data + row * job.row_stride;
    const bool whole = c.packing == Packing::ROW && c.bits == 8;
    float factor = 1;
    if (kind.kept == Kept::HALVES) {
        if (c.levels == Levels::F8_E4M3) {
            const uint8_t most = widened<Dtype::F8_E4M3>(p + col, n, to.halves);
            to.most = value_of<Dtype::F8_E4M3>(most);
            factor = static_cast<float>(Format<Dtype::F8_E4M3>::SCALE); // float16 would not show a NaN
            if (most >= Format<Dtype::F8_E4M3>::NONFINITE) factor = __builtin_nanf("");
        } else {
            to.most = value_of<Dtype::F8_E5M2>(widened<Dtype::F8_E5M2>(p + col, n, to.halves));
        }
        to.least = -to.most, to.reached = true;
    } else if (kind.kept == Kept::WORDS) {
        to.code = to.stored;
        to.low = row * c.bits % 32, to.mask = (1u << c.bits) - 1;
    } else if (whole && c.levels != Levels::OFFSET) {
        to.code = p + col;
    } else {
        unpack(job, row, col, n, to.bytes);
        if (c.levels == Levels::INT || c.levels == Levels::OFFSET) {
            const uint8_t half = static_cast<uint8_t>(1u << (c.bits - 1)), flip = c.levels == Levels::INT ? half : 0;
            for (size_t j = 0; j < n; j++) to.bytes[j] = static_cast<uint8_t>((to.bytes[j] ^ flip) - half);
        }
    }
    lay_scales<L>(job, kind, row, col, n, factor, to);
}

// The largest magnitude of all lanes, as an integer.
template <class F32> LLMFP_INLINE uint32_t most_bits(F32 x) {
    uint32_t lane[16], most = 0;
    memcpy(lane, &x, sizeof lane);
    for (uint32_t bits : lane) {
        const uint32_t magnitude = bits & Format<Dtype::F32>::MAGNITUDE;
        most = magnitude > most ? magnitude : most;
    }
    return most;
}

// The largest magnitude that each of sixteen scales can make of a segment's levels: rounding keeps the order of what is
// rounded, so one of the levels' ends makes it.
template <class L>
LLMFP_INLINE typename L::F32 bound(Scaling scaling, const Segment &s, typename L::F32 scale, typename L::F32 offset) {
    using F32 = typename L::F32;
    const F32 least = F32::splat(s.least), most = F32::splat(s.most);
    auto larger = [&](F32 a, F32 b) { return F32::larger(F32::larger(F32::zero(), a), b); };
    if (scaling == Scaling::FACTOR) return larger(scale * least, scale * most);
    if (scaling == Scaling::AFFINE) return larger(fma(scale, least, offset), fma(scale, most, offset));
    return larger((least - offset) * scale, (most - offset) * scale);
}

// The largest magnitude so far of staged elements.
template <class F32> struct Known {
    F32 most = F32::zero(); // of each lane
    float all = 0;          // of all lanes, or what it was a while ago
    // The bounds of the last segments whose columns have scales of their own: they hold for many rows.
    const float *scale[8] = {};
    float bound[8];
};

template <class L> float column_bound(const Segment &s, size_t vectors, size_t column, Known<typename L::F32> &known) {
    using F32 = typename L::F32;
    const size_t slot = column / STAGE_COLS % 8;
    if (known.scale[slot] == s.scale) return known.bound[slot];
    F32 worst = F32::zero();
    for (size_t v = 0; v < vectors; v++)
        worst = F32::larger(worst, bound<L>(Scaling::COLUMNS, s, F32::load(s.scale + 16 * v), F32::load(s.zero + 16 * v)));
    known.scale[slot] = s.scale;
    return known.bound[slot] = float_of(most_bits(worst));
}

// Whether all elements of a segment have to be looked at for one above what is known. One scale and levels that are
// reached tell without.
template <class L>
LLMFP_INLINE bool may_exceed(const Kind &kind, const Segment &s, size_t vectors, Known<typename L::F32> &known) {
    using F32 = typename L::F32;
    if (kind.kept == Kept::FLOATS || kind.scaling == Scaling::COLUMNS) return true;
    const size_t entries = ((vectors - 1 + kind.spread.skew) >> kind.spread.shift) + 1;
    F32 worst = F32::zero();
    for (size_t e = 0; e < entries; e += 16)
        worst = F32::larger(worst, bound<L>(kind.scaling, s, F32::load(s.scales + e), F32::load(s.offsets + e)));
    if (!F32::any_above(worst, known.all)) return false;
    if (entries > 1 || !s.reached) return true;
    known.most = F32::larger(known.most, bound<L>(kind.scaling, s, F32::splat(s.scales[0]), F32::splat(s.offsets[0])));
    known.all = float_of(most_bits(known.most));
    return false;
}

// Whether all of R segments of COLUMNS take the same scales, and what words they are in.
template <int R> LLMFP_INLINE bool shared(const Segment *s, Kept kept) {
    bool same = true;
    for (int r = 1; r < R; r++) same &= s[r].scale == s->scale && (kept != Kept::WORDS || s[r].code == s->code);
    return same;
}

// The v-th sixteen columns of a segment, whose scale is entry e or lies in `columns`. `code` is handed over apart:
// stores of sums could change what it points to.
template <class L, Kept KEPT, Scaling SCALING>
LLMFP_INLINE typename L::F32 sixteen(const Segment &s, const Segment &columns, const uint8_t *code, const float *table,
                                       size_t v, size_t e) {
    using F32 = typename L::F32;
    F32 x;
    if constexpr (KEPT == Kept::FLOATS) return F32::load(s.floats + 16 * v);
    if constexpr (KEPT == Kept::HALVES) x = F32::halves(s.halves + 16 * v);
    if constexpr (KEPT == Kept::SIGNED) x = F32::signed_bytes(code + 16 * v);
    if constexpr (KEPT == Kept::UNSIGNED) x = F32::bytes(code + 16 * v);
    if constexpr (KEPT == Kept::WORDS) x = F32::words(code + 64 * v, s.low, s.mask);
    if constexpr (KEPT == Kept::TABLE) x = F32::look_up(table, code + 16 * v);
    if constexpr (SCALING == Scaling::FACTOR) return F32::splat(s.scales[e]) * x;
    else if constexpr (SCALING == Scaling::AFFINE) return fma(F32::splat(s.scales[e]), x, F32::splat(s.offsets[e]));
    else if constexpr (SCALING == Scaling::ZERO) return (x - F32::splat(s.offsets[e])) * F32::splat(s.scales[e]);
    return (x - F32::load(columns.zero + 16 * v)) * F32::load(columns.scale + 16 * v);
}

} // namespace
} // namespace llmfp
