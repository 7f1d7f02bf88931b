// Stored codes → numbers, a row's segment at a time, as float (the fast path's stage) or double (the exact path).
//
// kernels/codes.py is the definition. Every operation is written so that it has one rounding, wherever it runs:
// (level - zero) * scale is a subtraction and a multiplication, scale * level + shift one fused operation. Codes are laid
// out as bytes first, by loops that the compiler vectorises, and then become numbers sixteen at a time.
#pragma once

#include "lanes.hpp"

namespace llmfp {
namespace {

LLMFP_INLINE size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

constexpr size_t STAGE_COLS = 512; // columns decoded at a time: a segment of the fast path

LLMFP_INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
LLMFP_INLINE double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

// Any float16, infinite and NaN too.
LLMFP_INLINE float half_at(const unsigned char *p) {
    const uint32_t half = bits_at<Dtype::F16>(p), magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) return float_of((half & 0x8000) << 16 | 0x7f800000u | (magnitude & 0x3ff) << 13);
    return float_of_half(half);
}

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
        } else {
            for (size_t j = 0; j < n; j++) {
                const size_t bit = (col + j) * bits, low = bit % 8;
                uint32_t both = p[bit / 8];
                if (low + bits > 8) both |= static_cast<uint32_t>(p[bit / 8 + 1]) << 8;
                to[j] = static_cast<uint8_t>(both >> low) & mask;
            }
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
        for (size_t j = 0; j < n; j++) {
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
//
// A block's bytes b → its values y. `grid`: for IQ1, IQ2 and IQ3 the type's points, int8[n][8 or 4].

// 6-bit scales and minima of Q4_K and Q5_K: eight of each in twelve bytes.
LLMFP_INLINE void scales_of(const unsigned char *s, int i, int &scale, int &least) {
    if (i < 4) scale = s[i] & 63, least = s[i + 4] & 63;
    else scale = (s[i + 4] & 15) | (s[i - 4] >> 6 << 4), least = (s[i + 4] >> 4) | (s[i] >> 6 << 4);
}

// Doubled e2m1 and half an E8M0 scale, as ggml has them: exact, and the product is the same.
constexpr float E2M1_DOUBLED[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
constexpr float IQ4_LEVELS[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

LLMFP_INLINE float half_exponent(uint8_t e) {
    return float_of(e < 2 ? 0x00200000u << e : static_cast<uint32_t>(e - 1) << 23);
}

// 7 sign bits and their parity as the eighth.
LLMFP_INLINE unsigned signs_of(unsigned seven) {
    unsigned parity = seven ^ seven >> 4;
    parity ^= parity >> 2;
    parity ^= parity >> 1;
    return seven | (parity & 1) << 7;
}

template <class T, size_t N>
LLMFP_INLINE void signed_points(T scale, const int8_t *point, unsigned signs, T *y) {
    for (size_t k = 0; k < N; k++) y[k] = scale * static_cast<T>(signs >> k & 1 ? -point[k] : point[k]);
}

// d * (code - offset) and d * code + shift for n codes, n a multiple of 16.
template <class L, class T> LLMFP_INLINE void centred(T d, float offset, const uint8_t *code, size_t n, T *y) {
    using N = Number<L, T>;
    const auto scale = N::splat(d), minus = N::splat(-offset);
    each<L>(n, y, [=](size_t j) { return (N::bytes(code + j) + minus) * scale; });
}

template <class L, class T> LLMFP_INLINE void affine(T d, T shift, const uint8_t *code, size_t n, T *y) {
    using N = Number<L, T>;
    const auto scale = N::splat(d), plus = N::splat(shift);
    each<L>(n, y, [=](size_t j) { return fma(scale, N::bytes(code + j), plus); });
}

using Sixteen = uint8_t __attribute__((vector_size(16)));

// All low halves of `bytes` bytes, then all high ones; bytes: 8 or a multiple of 16.
LLMFP_INLINE void apart(const unsigned char *q, size_t bytes, uint8_t *code) {
    if (bytes == 8) {
        for (size_t j = 0; j < 8; j++) code[j] = q[j] & 15, code[8 + j] = q[j] >> 4;
        return;
    }
    for (size_t j = 0; j < bytes; j += 16) { // stored as they are loaded again: the processor then hands them on
        Sixteen both;
        memcpy(&both, q + j, 16);
        const Sixteen low = both & 15, high = both >> 4;
        memcpy(code + j, &low, 16), memcpy(code + bytes + j, &high, 16);
    }
}

template <class L, class T>
LLMFP_INLINE void nibbles(T d, const unsigned char *q, const float *levels, size_t half, T *y) {
    using N = Number<L, T>;
    uint8_t code[32];
    apart(q, half, code);
    const auto scale = N::splat(d);
    each<L>(2 * half, y, [&](size_t j) { return N::look_up(levels, code + j) * scale; });
}

template <class L, Ggml B, class T> LLMFP_INLINE void block(const unsigned char *b, T *y, const int8_t *grid) {
    uint8_t code[256];
    auto half = [](const unsigned char *p) { return static_cast<T>(half_at(p)); };
    auto word = [](const unsigned char *p) {
        uint32_t x;
        memcpy(&x, p, 4);
        return x;
    };
    (void)grid, (void)half, (void)word, (void)code;
    if constexpr (B == Ggml::Q4_0) {
        apart(b + 2, 16, code);
        centred<L>(half(b), 8, code, 32, y);
    } else if constexpr (B == Ggml::Q4_1) {
        apart(b + 4, 16, code);
        affine<L>(half(b), half(b + 2), code, 32, y);
    } else if constexpr (B == Ggml::Q5_0 || B == Ggml::Q5_1) {
        constexpr int AT = B == Ggml::Q5_0 ? 2 : 4;
        const uint32_t high = word(b + AT);
        apart(b + AT + 4, 16, code);
        for (int j = 0; j < 32; j++) code[j] |= static_cast<uint8_t>((high >> j & 1) << 4);
        if constexpr (AT == 2) centred<L>(half(b), 16, code, 32, y);
        else affine<L>(half(b), half(b + 2), code, 32, y);
    } else if constexpr (B == Ggml::Q8_0) {
        using N = Number<L, T>;
        const auto d = N::splat(half(b));
        each<L>(32, y, [=](size_t j) { return N::signed_bytes(b + 2 + j) * d; });
    } else if constexpr (B == Ggml::Q2_K) {
        const T d = half(b + 80), least = half(b + 82);
        for (int g = 0; g < 8; g++)
            for (int j = 0; j < 32; j++) code[32 * g + j] = b[16 + g / 4 * 32 + j] >> (g % 4 * 2) & 3;
        for (int s = 0; s < 16; s++)
            affine<L>(d * static_cast<T>(b[s] & 15), -(least * static_cast<T>(b[s] >> 4)), code + 16 * s, 16, y + 16 * s);
    } else if constexpr (B == Ggml::Q3_K) {
        const T d = half(b + 108);
        for (int g = 0; g < 8; g++)
            for (int j = 0; j < 32; j++)
                code[32 * g + j] = static_cast<uint8_t>((b[32 + g / 4 * 32 + j] >> (g % 4 * 2) & 3) | (b[j] >> g & 1) << 2);
        for (int s = 0; s < 16; s++) {
            const unsigned char *scales = b + 96;
            const int scale = (s < 8 ? scales[s] & 15 : scales[s - 8] >> 4) | (scales[8 + s % 4] >> (s / 4 * 2) & 3) << 4;
            centred<L>(d * static_cast<T>(scale - 32), 4, code + 16 * s, 16, y + 16 * s);
        }
    } else if constexpr (B == Ggml::Q4_K || B == Ggml::Q5_K) {
        constexpr bool FIVE = B == Ggml::Q5_K;
        const T d = half(b), least = half(b + 2);
        for (int s = 0; s < 4; s++) apart(b + (FIVE ? 48 : 16) + 32 * s, 32, code + 64 * s);
        for (int s = 0; s < 8; s++) {
            if constexpr (FIVE)
                for (int j = 0; j < 32; j++) code[32 * s + j] |= static_cast<uint8_t>((b[16 + j] >> s & 1) << 4);
            int scale, minimum;
            scales_of(b + 4, s, scale, minimum);
            affine<L>(d * static_cast<T>(scale), -(least * static_cast<T>(minimum)), code + 32 * s, 32, y + 32 * s);
        }
    } else if constexpr (B == Ggml::Q6_K) {
        const T d = half(b + 208);
        for (int g = 0; g < 8; g++) // of 32 values
            for (int j = 0; j < 32; j++)
                code[32 * g + j] = static_cast<uint8_t>((b[g / 4 * 64 + g % 2 * 32 + j] >> (g % 4 / 2 * 4) & 15) |
                                                        (b[128 + g / 4 * 32 + j] >> (g % 4 * 2) & 3) << 4);
        for (int s = 0; s < 16; s++)
            centred<L>(d * static_cast<T>(static_cast<int8_t>(b[192 + s])), 32, code + 16 * s, 16, y + 16 * s);
    } else if constexpr (B == Ggml::TQ1_0) {
        const T d = half(b + 52);
        constexpr uint8_t POWER[5] = {1, 3, 9, 27, 81};
        auto trit = [&](uint8_t q, int power) {
            return d * static_cast<T>((static_cast<uint8_t>(q * POWER[power]) * 3 >> 8) - 1);
        };
        for (int p = 0; p < 5; p++)
            for (int j = 0; j < 32; j++) *y++ = trit(b[j], p);
        for (int p = 0; p < 5; p++)
            for (int j = 0; j < 16; j++) *y++ = trit(b[32 + j], p);
        for (int p = 0; p < 4; p++)
            for (int j = 0; j < 4; j++) *y++ = trit(b[48 + j], p);
    } else if constexpr (B == Ggml::TQ2_0) {
        const T d = half(b + 64);
        for (int s = 0; s < 8; s++)
            for (int j = 0; j < 32; j++) y[32 * s + j] = d * static_cast<T>((b[s / 4 * 32 + j] >> (s % 4 * 2) & 3) - 1);
    } else if constexpr (B == Ggml::MXFP4) {
        nibbles<L, T>(static_cast<T>(half_exponent(b[0])), b + 1, E2M1_DOUBLED, 16, y);
    } else if constexpr (B == Ggml::NVFP4) {
        for (int s = 0; s < 4; s++) {
            const float scale = value_of<Dtype::F8_E4M3>(b[s] & 0x7f) * 128; // unsigned e4m3, halved; 0x7f stands for 0
            const T d = b[s] == 0x7f ? 0 : static_cast<T>(scale);
            nibbles<L, T>(d, b + 4 + 8 * s, E2M1_DOUBLED, 8, y + 16 * s);
        }
    } else if constexpr (B == Ggml::IQ4_NL) {
        nibbles<L, T>(half(b), b + 2, IQ4_LEVELS, 16, y);
    } else if constexpr (B == Ggml::IQ4_XS) {
        const T d = half(b);
        const unsigned high = b[2] | b[3] << 8;
        for (int s = 0; s < 8; s++) {
            const int scale = (b[4 + s / 2] >> (s % 2 * 4) & 15) | (high >> (2 * s) & 3) << 4;
            nibbles<L, T>(d * static_cast<T>(scale - 32), b + 8 + 16 * s, IQ4_LEVELS, 16, y + 32 * s);
        }
    } else if constexpr (B == Ggml::IQ2_XXS) {
        const T d = half(b);
        for (int s = 0; s < 8; s++) {
            const uint32_t rest = word(b + 2 + 8 * s + 4);
            const T db = d * (static_cast<T>(0.5) + static_cast<T>(rest >> 28)) * static_cast<T>(0.25);
            for (int k = 0; k < 4; k++)
                signed_points<T, 8>(db, grid + 8 * b[2 + 8 * s + k], signs_of(rest >> (7 * k) & 127), y + 32 * s + 8 * k);
        }
    } else if constexpr (B == Ggml::IQ2_XS) {
        const T d = half(b);
        for (int k = 0; k < 32; k++) {
            const unsigned q = b[2 + 2 * k] | b[3 + 2 * k] << 8, scale = b[66 + k / 4] >> (k / 2 % 2 * 4) & 15;
            const T db = d * (static_cast<T>(0.5) + static_cast<T>(scale)) * static_cast<T>(0.25);
            signed_points<T, 8>(db, grid + 8 * (q & 511), signs_of(q >> 9), y + 8 * k);
        }
    } else if constexpr (B == Ggml::IQ2_S) {
        const T d = half(b);
        for (int k = 0; k < 32; k++) {
            const unsigned q = b[2 + k] | (b[66 + k / 4] >> (k % 4 * 2) & 3) << 8;
            const unsigned scale = b[74 + k / 4] >> (k / 2 % 2 * 4) & 15;
            const T db = d * (static_cast<T>(0.5) + static_cast<T>(scale)) * static_cast<T>(0.25);
            signed_points<T, 8>(db, grid + 8 * q, b[34 + k], y + 8 * k);
        }
    } else if constexpr (B == Ggml::IQ3_XXS) {
        const T d = half(b);
        for (int s = 0; s < 8; s++) {
            const uint32_t rest = word(b + 66 + 4 * s);
            const T db = d * (static_cast<T>(0.5) + static_cast<T>(rest >> 28)) * static_cast<T>(0.5);
            for (int k = 0; k < 8; k++)
                signed_points<T, 4>(db, grid + 4 * b[2 + 8 * s + k], signs_of(rest >> (7 * (k / 2)) & 127) >> (k % 2 * 4),
                                    y + 32 * s + 4 * k);
        }
    } else if constexpr (B == Ggml::IQ3_S) {
        const T d = half(b);
        for (int k = 0; k < 64; k++) {
            const unsigned q = b[2 + k] | (b[66 + k / 8] >> (k % 8) & 1) << 8;
            const unsigned scale = b[106 + k / 16] >> (k / 8 % 2 * 4) & 15;
            signed_points<T, 4>(d * static_cast<T>(1 + 2 * scale), grid + 4 * q, b[74 + k / 2] >> (k % 2 * 4), y + 4 * k);
        }
    } else if constexpr (B == Ggml::IQ1_S) {
        const T d = half(b);
        for (int k = 0; k < 32; k++) {
            const unsigned high = b[34 + k / 4 * 2] | b[35 + k / 4 * 2] << 8;
            const unsigned q = b[2 + k] | (high >> (k % 4 * 3) & 7) << 8;
            const T dl = d * static_cast<T>(2 * (high >> 12 & 7) + 1), delta = static_cast<T>(high & 0x8000 ? -0.125 : 0.125);
            for (int j = 0; j < 8; j++) y[8 * k + j] = dl * (static_cast<T>(grid[8 * q + j]) + delta);
        }
    } else if constexpr (B == Ggml::IQ1_M) {
        unsigned char bits[2] = {};
        for (int i = 0; i < 4; i++) {
            const unsigned nibble = b[48 + 2 * i + 1] >> 4;
            bits[i / 2] |= static_cast<unsigned char>(nibble << (i % 2 * 4));
        }
        const T d = half(bits);
        for (int k = 0; k < 32; k++) {
            const unsigned high = b[32 + k / 2] >> (k % 2 * 4) & 15, q = b[k] | (high & 7) << 8;
            const unsigned scales = b[48 + k / 8 * 2] | b[49 + k / 8 * 2] << 8;
            const T dl = d * static_cast<T>(2 * (scales >> (k / 2 % 4 * 3) & 7) + 1);
            const T delta = static_cast<T>(high & 8 ? -0.125 : 0.125);
            for (int j = 0; j < 8; j++) y[8 * k + j] = dl * (static_cast<T>(grid[8 * q + j]) + delta);
        }
    }
}

template <class L, class T> void ggml(const Job &job, size_t row, size_t col, size_t n, T *to) {
    const Coding &c = job.coding;
    const unsigned char *p = job.data + row * job.row_stride + col / c.block_cols * c.block_bytes;
    auto all = [&](auto decode_block) {
        for (size_t done = 0; done < n; done += c.block_cols, p += c.block_bytes) decode_block(p, to + done, c.grid);
    };
    switch (c.ggml) {
#define LLMFP_GGML(NAME, COLS, BYTES, POINTS)                                                                          \
    case Ggml::NAME: return all([](const unsigned char *b, T *y, const int8_t *grid) { block<L, Ggml::NAME>(b, y, grid); });
#include "ggml_types.inc"
#undef LLMFP_GGML
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
        ggml<L>(job, row, job.first_col + col, n, to);
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
