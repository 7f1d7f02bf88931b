// Stored codes → numbers, a part of a row at a time, as float or double: for the exact path, for what segment.hpp has no
// shorter way for, and for whoever wants the numbers themselves.
//
// kernels/codes.py is the definition. Every operation is written so that it has one rounding, wherever it runs:
// (level - zero) * scale is a subtraction and a multiplication, scale * level + shift one fused operation. Codes are laid
// out as bytes first, by loops that the compiler vectorises, and then become numbers sixteen at a time.
#pragma once

#include "ggml.hpp"

namespace llmfp {
namespace {

LLMFP_INLINE size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

constexpr size_t STAGE_COLS = 1024; // columns at a time: a segment of the fast path

LLMFP_INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
LLMFP_INLINE double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

// ------------------------------------------------------------------------------------------------------- plain floats

template <Dtype D, class T> void plain(const unsigned char *p, size_t n, T *to) {
    for (size_t j = 0; j < n; j++) {
        const Bits<D> bits = bits_at<D>(p + j * itemsize(D));
        if constexpr (D == Dtype::F64) {
            double x;
            memcpy(&x, &bits, 8);
            to[j] = static_cast<T>(x);
        } else {
            const bool finite = (bits & Format<D>::MAGNITUDE) < Format<D>::NONFINITE;
            to[j] = finite ? static_cast<T>(value_of<D>(bits)) * static_cast<T>(Format<D>::SCALE)
                           : static_cast<T>(__builtin_nanf(""));
        }
    }
}

// -------------------------------------------------------------------------------------------------------------- codes

// Two codes of a byte into two bytes, by what `apart` makes of it, for n codes.
template <class F>
LLMFP_INLINE void halves(const unsigned char *__restrict p, size_t n, uint8_t *__restrict to, F apart) {
    for (size_t j = 0; j < (n + 1) / 2; j++) {
        const uint16_t two = static_cast<uint16_t>(apart(p[j]) & 0x0f0f);
        memcpy(to + 2 * j, &two, 2);
    }
}

// n codes of a run of bits, from the one of that number on.
LLMFP_INLINE void one_by_one(const unsigned char *p, size_t bits, size_t first, size_t n, uint8_t *__restrict to) {
    for (size_t j = 0; j < n; j++) {
        const size_t bit = (first + j) * bits, low = bit % 8;
        uint32_t both = p[bit / 8];
        if (low + bits > 8) both |= static_cast<uint32_t>(p[bit / 8 + 1]) << 8;
        to[j] = static_cast<uint8_t>(both >> low) & static_cast<uint8_t>((1u << bits) - 1);
    }
}

// The same for a multiple of eight codes, which begin with a byte and so lie in as many bytes as a code has bits.
template <size_t BITS> LLMFP_INLINE void in_eights(const unsigned char *__restrict p, size_t n, uint8_t *__restrict to) {
    for (size_t j = 0; j < n; j += 8, p += BITS) {
        uint64_t eight = 0;
        memcpy(&eight, p, BITS);
        for (size_t k = 0; k < 8; k++) to[j + k] = static_cast<uint8_t>(eight >> (BITS * k)) & ((1u << BITS) - 1);
    }
}

// Two words of AWQ's → their sixteen codes. A word's bytes hold columns 0 and 2, 4 and 6, 1 and 3, 5 and 7.
LLMFP_INLINE void in_words(const unsigned char *__restrict p, size_t n, uint8_t *__restrict to) {
    constexpr Sixteen ORDER = {0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15};
    for (size_t j = 0; j < n; j += 16, p += 8) {
        uint64_t both[2];
        memcpy(both, p, 8);
        both[1] = both[0] >> 4;
        const Sixteen codes = picked(sixteen_at(both) & 15, ORDER);
        memcpy(to + j, &codes, 16);
    }
}

// Codes of columns [col, col + n) of the tensor in row `row` of the chunk, one to a byte.
inline void unpack(const Job &job, size_t row, size_t col, size_t n, uint8_t *__restrict to) {
    const Coding &c = job.coding;
    const size_t bits = c.bits;
    const uint8_t mask = static_cast<uint8_t>((1u << bits) - 1);
    const unsigned char *__restrict p = job.data + row * job.row_stride;
    switch (c.packing) {
    case Packing::ROW:
        if (bits == 8) {
            memcpy(to, p + col, n);
        } else if (bits == 4 && col % 2 == 0) {
            halves(p + col / 2, n, to, [](unsigned x) { return x | x << 4; });
        } else if (const size_t eights = col % 8 ? 0 : n / 8 * 8; bits == 2 || bits == 3 || bits == 5 || bits == 6) {
            const unsigned char *__restrict from = p + col * bits / 8;
            if (bits == 2) in_eights<2>(from, eights, to);
            if (bits == 3) in_eights<3>(from, eights, to);
            if (bits == 5) in_eights<5>(from, eights, to);
            if (bits == 6) in_eights<6>(from, eights, to);
            one_by_one(p, bits, col + eights, n - eights, to + eights);
        } else {
            one_by_one(p, bits, col, n, to);
        }
        return;
    case Packing::ROW_HIGH:
        if (col % 2 == 0) {
            halves(p + col / 2, n, to, [](unsigned x) { return x >> 4 | x << 8; });
        } else {
            for (size_t j = 0; j < n; j++) to[j] = p[(col + j) / 2] >> ((col + j) % 2 ? 0 : 4) & 15;
        }
        return;
    case Packing::DOWN: {
        const size_t bit = row * bits, low = bit % 32;
        p = job.data + bit / 32 * job.row_stride + 4 * col;
        for (size_t j = 0; j < n; j++) {
            uint32_t word;
            memcpy(&word, p + 4 * j, 4);
            to[j] = static_cast<uint8_t>(word >> low) & mask;
        }
        if (low + bits <= 32) return;
        p += job.row_stride;
        for (size_t j = 0; j < n; j++) {
            uint32_t word;
            memcpy(&word, p + 4 * j, 4);
            to[j] = (to[j] | static_cast<uint8_t>(word << (32 - low))) & mask;
        }
        return;
    }
    case Packing::AWQ: {
        constexpr uint8_t PLACE[8] = {0, 16, 4, 20, 8, 24, 12, 28};
        const size_t whole = col % 8 ? 0 : n / 16 * 16;
        in_words(p + col / 2, whole, to);
        for (size_t j = whole; j < n; j++) {
            uint32_t word;
            memcpy(&word, p + (col + j) / 8 * 4, 4);
            to[j] = word >> PLACE[(col + j) % 8] & 15;
        }
        return;
    }
    case Packing::PLANE:
        for (size_t j = 0; j < n; j++) to[j] = static_cast<uint8_t>(p[col + j] >> c.place) & mask;
        return;
    case Packing::GGML: return;
    }
}

// y = f(codes) for n codes, f made for sixteen floats at a time or for one double.
template <class L, class T, class F> LLMFP_INLINE void each(size_t n, T *__restrict y, F f) {
    if constexpr (sizeof(T) == 4) {
        for (size_t j = 0; j < n; j += 16) f(j).store(y + j);
    } else {
        for (size_t j = 0; j < n; j++) y[j] = f(j);
    }
}

// What the lanes of a level and a single double have in common.
template <class L, class T> struct Number {
    using Type = double;
    static LLMFP_INLINE double load(const float *p) { return static_cast<double>(*p); }
    static LLMFP_INLINE double splat(double x) { return x; }
    static LLMFP_INLINE double bytes(const uint8_t *q) { return *q; }
    static LLMFP_INLINE double signed_bytes(const uint8_t *q) { return static_cast<int8_t>(*q); }
    static LLMFP_INLINE double look_up(const float *table, const uint8_t *q) { return static_cast<double>(table[*q & 15]); }
    template <Dtype D> static LLMFP_INLINE double small_floats(const uint8_t *q) {
        return static_cast<double>(value_of<D>(*q)) * Format<D>::SCALE;
    }
};
template <class L> struct Number<L, float> : L::F32 {
    using Type = typename L::F32;
};
LLMFP_INLINE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }

// `run` neighbours that share one entry of the scale; in float, up to 15 numbers more are written.
template <class L, class T, class Level>
LLMFP_INLINE void one_scale(const Coding &c, size_t entry, size_t run, const uint8_t *code, T *to, Level level) {
    using N = Number<L, T>;
    const auto scale = N::splat(c.scale[entry]);
    if (c.zero) {
        const auto minus = N::splat(-c.zero[entry]);
        each<L>(run, to, [=](size_t j) { return (level(code + j) + minus) * scale; });
    } else if (c.shift) {
        const auto shift = N::splat(c.shift[entry]);
        each<L>(run, to, [=](size_t j) { return fma(scale, level(code + j), shift); });
    } else {
        each<L>(run, to, [=](size_t j) { return level(code + j) * scale; });
    }
}

template <class L, class T, class Level>
void scaled(const Job &job, size_t row, size_t col, size_t n, const uint8_t *code, T *to, Level level) {
    using N = Number<L, T>;
    const Coding &c = job.coding;
    const size_t i = job.first_row + row;
    if (c.flat_block) {
        for (size_t done = 0, run; done < n; done += run) {
            const size_t flat = i * c.tensor_cols + col + done;
            run = smaller(n - done, c.flat_block - flat % c.flat_block);
            one_scale<L>(c, flat / c.flat_block, run, code + done, to + done, level);
        }
        return;
    }
    const size_t base = (c.row_group ? static_cast<size_t>(c.row_group[i]) : i / c.row_block % c.scale_rows) * c.scale_cols;
    if (c.col_group) {
        for (size_t j = 0; j < n; j++)
            one_scale<L>(c, base + static_cast<size_t>(c.col_group[col + j]), 1, code + j, to + j, level);
    } else if (c.col_block > 1) {
        for (size_t done = 0, run, at = col % c.col_block, entry = base + col / c.col_block; done < n;
             done += run, at = 0, entry++) {
            run = smaller(n - done, c.col_block - at);
            one_scale<L>(c, entry, run, code + done, to + done, level);
        }
    } else {
        const size_t full = sizeof(T) == 4 ? n / 16 * 16 : n; // a scale may end with the last column
        const float *scale = c.scale + base + col, *zero = c.zero + base + col, *shift = c.shift + base + col;
        if (c.zero)
            each<L>(full, to, [=](size_t j) { return (level(code + j) + N::load(zero + j) * N::splat(-1)) * N::load(scale + j); });
        else if (c.shift)
            each<L>(full, to, [=](size_t j) { return fma(N::load(scale + j), level(code + j), N::load(shift + j)); });
        else
            each<L>(full, to, [=](size_t j) { return level(code + j) * N::load(scale + j); });
        for (size_t j = full; j < n; j++) one_scale<L>(c, base + col + j, 1, code + j, to + j, level);
    }
}

// NaN in place of codes that stand for no finite number.
template <Dtype D, class T> void spoil(const uint8_t *code, size_t n, T *to) {
    uint8_t most = 0;
    for (size_t j = 0; j < n; j++) {
        const uint8_t magnitude = code[j] & 0x7f;
        most = magnitude > most ? magnitude : most;
    }
    if (most < Format<D>::NONFINITE) return;
    for (size_t j = 0; j < n; j++)
        if ((code[j] & 0x7f) >= Format<D>::NONFINITE) to[j] = static_cast<T>(__builtin_nanf(""));
}

template <class L, class T> void coded(const Job &job, size_t row, size_t col, size_t n, T *to) {
    using N = Number<L, T>;
    const Coding &c = job.coding;
    const unsigned half = 1u << (c.bits - 1);
    uint8_t code[STAGE_COLS + 16] = {};
    unpack(job, row, col, n, code);
    auto with = [&](auto level) { scaled<L>(job, row, col, n, code, to, level); };
    switch (c.levels) {
    case Levels::UINT: return with([](const uint8_t *q) { return N::bytes(q); });
    case Levels::INT: // two's complement, moved to where `offset` counts from
        if (c.bits == 8) return with([](const uint8_t *q) { return N::signed_bytes(q); });
        for (uint8_t &q : code) q ^= static_cast<uint8_t>(half);
        [[fallthrough]];
    case Levels::OFFSET: {
        const auto minus = N::splat(-static_cast<float>(half));
        return with([=](const uint8_t *q) { return N::bytes(q) + minus; });
    }
    case Levels::F8_E4M3:
        with([](const uint8_t *q) { return N::template small_floats<Dtype::F8_E4M3>(q); });
        return spoil<Dtype::F8_E4M3>(code, n, to);
    case Levels::F8_E5M2:
        with([](const uint8_t *q) { return N::template small_floats<Dtype::F8_E5M2>(q); });
        return spoil<Dtype::F8_E5M2>(code, n, to);
    case Levels::TABLE: return with([&c](const uint8_t *q) { return N::look_up(c.table, q); });
    }
}

// --------------------------------------------------------------------------------------------------- ggml block types

template <class T> void ggml(const Job &job, size_t row, size_t col, size_t n, T *to) {
    const Coding &c = job.coding;
    const unsigned char *p = job.data + row * job.row_stride + col / c.block_cols * c.block_bytes;
    int8_t q[LARGEST_BLOCK];
    float scale[LARGEST_BLOCK / 16], plus[LARGEST_BLOCK / 16];
    for (size_t at = col % c.block_cols; n; at = 0, p += c.block_bytes) {
        const size_t stop = smaller(c.block_cols, at + n);
        take_apart(c, p, c.block_cols, q, scale, plus);
        n -= stop - at;
        for (; at < stop; at++)
            *to++ = fused(static_cast<T>(scale[at / 16]), static_cast<T>(q[at]), static_cast<T>(plus[at / 16]));
    }
}

// ---------------------------------------------------------------------------------------------------------- any chunk

// Columns [col, col + n), at most STAGE_COLS, of row `row` of the chunk, with what an adapter adds. There is room for
// STAGE_COLS floats.
template <class L, class T> void decode(const Job &job, size_t row, size_t col, size_t n, T *to) {
    if (!job.has_coding) {
        const unsigned char *p = job.data + row * job.row_stride + col * itemsize(job.dtype);
        switch (job.dtype) {
        case Dtype::BF16: plain<Dtype::BF16>(p, n, to); break;
        case Dtype::F16: plain<Dtype::F16>(p, n, to); break;
        case Dtype::F32: plain<Dtype::F32>(p, n, to); break;
        case Dtype::F64: plain<Dtype::F64>(p, n, to); break;
        case Dtype::F8_E4M3: plain<Dtype::F8_E4M3>(p, n, to); break;
        case Dtype::F8_E5M2: plain<Dtype::F8_E5M2>(p, n, to); break;
        }
    } else if (job.coding.packing == Packing::GGML) {
        ggml(job, row, job.first_col + col, n, to);
    } else {
        coded<L>(job, row, job.first_col + col, n, to);
    }
    for (size_t k = 0; k < job.rank; k++) {
        const T left = static_cast<T>(job.left[(job.first_row + row) * job.rank + k]);
        const float *__restrict right = job.right + k * job.right_cols + job.first_col + col;
        for (size_t j = 0; j < n; j++) to[j] = fused(left, static_cast<T>(right[j]), to[j]);
    }
}

} // namespace
} // namespace llmfp
