// A block of a ggml type → signed bytes, and for every sixteen of them a scale and what is added to code * scale.
//
// Every type comes out exactly: its levels are integers below 128 (IQ1's in eighths), its scales products of a float16
// and a few bits. The definition is gguf.dequantize. Byte loops of fixed length are left to the compiler's vectoriser;
// what it does not see (look-ups, a bit per byte) is written in vectors of sixteen bytes.
#pragma once

#include "lanes.hpp"

namespace llmfp {
namespace {

using Sixteen = uint8_t __attribute__((vector_size(16)));

LLMFP_INLINE Sixteen sixteen_at(const void *p) {
    Sixteen x;
    memcpy(&x, p, 16);
    return x;
}

// Sixteen bits → sixteen bytes, all ones where the bit is set.
LLMFP_INLINE Sixteen bytes_of_bits(unsigned low, unsigned high) {
    constexpr Sixteen BIT = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const uint64_t twice[2] = {low * 0x0101010101010101u, high * 0x0101010101010101u};
    return reinterpret_cast<Sixteen>((sixteen_at(twice) & BIT) == BIT);
}

// The entries of a table of sixteen at these places, each below 16.
LLMFP_INLINE Sixteen picked(Sixteen table, Sixteen at) {
#if defined(__clang__) // which has no shuffle by variable places
    Sixteen x;
    for (int j = 0; j < 16; j++) x[j] = table[at[j]];
    return x;
#else
    return __builtin_shuffle(table, at);
#endif
}

// Doubled e2m1, as ggml has it: exact, with a halved scale.
constexpr Sixteen E2M1_DOUBLED = {0, 1, 2, 3, 4, 6, 8, 12, 0, 255, 254, 253, 252, 250, 248, 244};
constexpr Sixteen IQ4_LEVELS = {129, 152, 173, 191, 207, 221, 234, 246, 1, 13, 25, 38, 53, 69, 89, 113};

// Sixteen bytes' low halves, then their high ones, from a table of signed bytes.
LLMFP_INLINE void look_up(Sixteen levels, Sixteen both, int8_t *q) {
    const Sixteen low = picked(levels, both & 15), high = picked(levels, both >> 4);
    memcpy(q, &low, 16), memcpy(q + 16, &high, 16);
}

// Half an E8M0 scale.
LLMFP_INLINE float half_exponent(uint8_t e) {
    return float_of(e < 2 ? 0x00200000u << e : static_cast<uint32_t>(e - 1) << 23);
}

// 6-bit scales and minima of Q4_K and Q5_K: eight of each in twelve bytes.
LLMFP_INLINE void scales_of(const unsigned char *s, int i, int &scale, int &least) {
    if (i < 4) scale = s[i] & 63, least = s[i + 4] & 63;
    else scale = (s[i + 4] & 15) | (s[i - 4] >> 6 << 4), least = (s[i + 4] >> 4) | (s[i] >> 6 << 4);
}

// 7 sign bits and their parity as the eighth.
LLMFP_INLINE unsigned signs_of(unsigned seven) {
    unsigned parity = seven ^ seven >> 4;
    parity ^= parity >> 2;
    parity ^= parity >> 1;
    return seven | (parity & 1) << 7;
}

// Sixteen bytes of two or four of a grid's points, negative where a bit is set.
LLMFP_INLINE void signed_points(Sixteen points, unsigned low, unsigned high, int8_t *q) {
    const Sixteen minus = bytes_of_bits(low, high), x = (points ^ minus) - minus;
    memcpy(q, &x, 16);
}

LLMFP_INLINE Sixteen two_points(const int8_t *grid, size_t first, size_t second) {
    Sixteen x;
    memcpy(&x, grid + 8 * first, 8);
    memcpy(reinterpret_cast<unsigned char *>(&x) + 8, grid + 8 * second, 8);
    return x;
}

// Whether something is added to its levels' products with scales.
constexpr bool has_minimum(Ggml type) {
    return type == Ggml::Q4_1 || type == Ggml::Q5_1 || type == Ggml::Q2_K || type == Ggml::Q4_K || type == Ggml::Q5_K;
}

// `grid`: for IQ1, IQ2 and IQ3 the type's points, int8[n][8 or 4].
template <Ggml B>
LLMFP_INLINE void block(const unsigned char *__restrict b, const int8_t *__restrict grid, int8_t *__restrict q,
                        float *__restrict scale, float *__restrict plus) {
    constexpr int SIXTEENS =
        B == Ggml::NVFP4 ? 4
        : B == Ggml::Q4_0 || B == Ggml::Q4_1 || B == Ggml::Q5_0 || B == Ggml::Q5_1 || B == Ggml::Q8_0 ||
                B == Ggml::MXFP4 || B == Ggml::IQ4_NL
            ? 2
            : 16;
    (void)grid;
    auto word = [](const unsigned char *p) {
        uint32_t x;
        memcpy(&x, p, 4);
        return x;
    };
    if constexpr (!has_minimum(B))
        for (int s = 0; s < SIXTEENS; s++) plus[s] = 0;
    if constexpr (SIXTEENS == 2) scale[0] = scale[1] = B == Ggml::MXFP4 ? half_exponent(b[0]) : half_at(b);
    if constexpr (B == Ggml::Q4_1 || B == Ggml::Q5_1) plus[0] = plus[1] = half_at(b + 2);
    if constexpr (B == Ggml::Q4_0 || B == Ggml::Q4_1) {
        const Sixteen both = sixteen_at(b + (B == Ggml::Q4_0 ? 2 : 4));
        constexpr uint8_t MIDDLE = B == Ggml::Q4_0 ? 8 : 0;
        const Sixteen low = (both & 15) - MIDDLE, high = (both >> 4) - MIDDLE;
        memcpy(q, &low, 16), memcpy(q + 16, &high, 16);
    } else if constexpr (B == Ggml::Q5_0 || B == Ggml::Q5_1) {
        constexpr int AT = B == Ggml::Q5_0 ? 2 : 4;
        constexpr uint8_t MIDDLE = B == Ggml::Q5_0 ? 16 : 0;
        const Sixteen both = sixteen_at(b + AT + 4);
        const Sixteen low = ((both & 15) | (bytes_of_bits(b[AT], b[AT + 1]) & 16)) - MIDDLE;
        const Sixteen high = ((both >> 4) | (bytes_of_bits(b[AT + 2], b[AT + 3]) & 16)) - MIDDLE;
        memcpy(q, &low, 16), memcpy(q + 16, &high, 16);
    } else if constexpr (B == Ggml::Q8_0) {
        memcpy(q, b + 2, 32);
    } else if constexpr (B == Ggml::Q2_K) {
        const float d = half_at(b + 80), least = half_at(b + 82);
        for (int g = 0; g < 8; g++)
            for (int j = 0; j < 32; j++) q[32 * g + j] = b[16 + g / 4 * 32 + j] >> (g % 4 * 2) & 3;
        for (int s = 0; s < 16; s++)
            scale[s] = d * static_cast<float>(b[s] & 15), plus[s] = -(least * static_cast<float>(b[s] >> 4));
    } else if constexpr (B == Ggml::Q3_K) {
        const float d = half_at(b + 108);
        for (int g = 0; g < 8; g++)
            for (int j = 0; j < 32; j++)
                q[32 * g + j] = static_cast<int8_t>(
                    ((b[32 + g / 4 * 32 + j] >> (g % 4 * 2) & 3) | (b[j] >> g & 1) << 2) - 4);
        const unsigned char *low = b + 96, *high = b + 104;
        for (int s = 0; s < 16; s++) {
            const int six = (s < 8 ? low[s] & 15 : low[s - 8] >> 4) | (high[s % 4] >> (s / 4 * 2) & 3) << 4;
            scale[s] = d * static_cast<float>(six - 32);
        }
    } else if constexpr (B == Ggml::Q4_K || B == Ggml::Q5_K) {
        constexpr int AT = B == Ggml::Q5_K ? 48 : 16;
        const float d = half_at(b), least = half_at(b + 2);
        for (int s = 0; s < 8; s++) {
            for (int j = 0; j < 32; j++) {
                unsigned code = b[AT + s / 2 * 32 + j] >> (s % 2 * 4) & 15;
                if constexpr (B == Ggml::Q5_K) code |= (b[16 + j] >> s & 1u) << 4;
                q[32 * s + j] = static_cast<int8_t>(code);
            }
            int six, minimum;
            scales_of(b + 4, s, six, minimum);
            scale[2 * s] = scale[2 * s + 1] = d * static_cast<float>(six);
            plus[2 * s] = plus[2 * s + 1] = -(least * static_cast<float>(minimum));
        }
    } else if constexpr (B == Ggml::Q6_K) {
        const float d = half_at(b + 208);
        for (int g = 0; g < 8; g++)
            for (int j = 0; j < 32; j++)
                q[32 * g + j] = static_cast<int8_t>(((b[g / 4 * 64 + g % 2 * 32 + j] >> (g % 4 / 2 * 4) & 15) |
                                                     (b[128 + g / 4 * 32 + j] >> (g % 4 * 2) & 3) << 4) -
                                                    32);
        for (int s = 0; s < 16; s++) scale[s] = d * static_cast<float>(static_cast<int8_t>(b[192 + s]));
    } else if constexpr (B == Ggml::TQ1_0) {
        constexpr uint8_t POWER[5] = {1, 3, 9, 27, 81};
        auto trits = [&](const unsigned char *from, int n, int powers) {
            for (int p = 0; p < powers; p++, q += n)
                for (int j = 0; j < n; j++)
                    q[j] = static_cast<int8_t>((static_cast<uint8_t>(from[j] * POWER[p]) * 3 >> 8) - 1);
        };
        trits(b, 32, 5), trits(b + 32, 16, 5), trits(b + 48, 4, 4);
        for (int s = 0; s < 16; s++) scale[s] = half_at(b + 52);
    } else if constexpr (B == Ggml::TQ2_0) {
        for (int g = 0; g < 8; g++)
            for (int j = 0; j < 32; j++)
                q[32 * g + j] = static_cast<int8_t>((b[g / 4 * 32 + j] >> (g % 4 * 2) & 3) - 1);
        for (int s = 0; s < 16; s++) scale[s] = half_at(b + 64);
    } else if constexpr (B == Ggml::MXFP4) {
        look_up(E2M1_DOUBLED, sixteen_at(b + 1), q);
    } else if constexpr (B == Ggml::IQ4_NL) {
        look_up(IQ4_LEVELS, sixteen_at(b + 2), q);
    } else if constexpr (B == Ggml::NVFP4) {
        for (int s = 0; s < 4; s++) { // unsigned e4m3, halved; 0x7f stands for 0
            scale[s] = b[s] == 0x7f ? 0 : value_of<Dtype::F8_E4M3>(b[s] & 0x7f) * 128;
            int8_t both[32] = {};
            Sixteen eight = {};
            memcpy(&eight, b + 4 + 8 * s, 8);
            look_up(E2M1_DOUBLED, eight, both);
            memcpy(q + 16 * s, both, 8), memcpy(q + 16 * s + 8, both + 16, 8);
        }
    } else if constexpr (B == Ggml::IQ4_XS) {
        const float d = half_at(b);
        const unsigned high = b[2] | b[3] << 8;
        for (int s = 0; s < 8; s++) {
            const int six = (b[4 + s / 2] >> (s % 2 * 4) & 15) | (high >> (2 * s) & 3) << 4;
            scale[2 * s] = scale[2 * s + 1] = d * static_cast<float>(six - 32);
            look_up(IQ4_LEVELS, sixteen_at(b + 8 + 16 * s), q + 32 * s);
        }
    } else if constexpr (B == Ggml::IQ2_XXS) {
        const float d = half_at(b);
        for (int s = 0; s < 8; s++) {
            const unsigned char *at = b + 2 + 8 * s;
            const uint32_t rest = word(at + 4);
            scale[2 * s] = scale[2 * s + 1] = d * (0.5f + static_cast<float>(rest >> 28)) * 0.25f;
            signed_points(two_points(grid, at[0], at[1]), signs_of(rest & 127), signs_of(rest >> 7 & 127), q + 32 * s);
            signed_points(two_points(grid, at[2], at[3]), signs_of(rest >> 14 & 127), signs_of(rest >> 21 & 127),
                          q + 32 * s + 16);
        }
    } else if constexpr (B == Ggml::IQ2_XS) {
        const float d = half_at(b);
        for (int s = 0; s < 16; s++) {
            const uint32_t two = word(b + 2 + 4 * s);
            scale[s] = d * (0.5f + static_cast<float>(b[66 + s / 2] >> (s % 2 * 4) & 15)) * 0.25f;
            signed_points(two_points(grid, two & 511, two >> 16 & 511), signs_of(two >> 9 & 127), signs_of(two >> 25),
                          q + 16 * s);
        }
    } else if constexpr (B == Ggml::IQ2_S) {
        const float d = half_at(b);
        for (int s = 0; s < 16; s++) {
            const unsigned high = b[66 + s / 2] >> (s % 2 * 4);
            scale[s] = d * (0.5f + static_cast<float>(b[74 + s / 2] >> (s % 2 * 4) & 15)) * 0.25f;
            signed_points(two_points(grid, b[2 + 2 * s] | (high & 3) << 8, b[3 + 2 * s] | (high >> 2 & 3) << 8),
                          b[34 + 2 * s], b[35 + 2 * s], q + 16 * s);
        }
    } else if constexpr (B == Ggml::IQ3_XXS || B == Ggml::IQ3_S) {
        const float d = half_at(b);
        for (int s = 0; s < 16; s++) {
            unsigned at[4], low, high;
            if constexpr (B == Ggml::IQ3_XXS) {
                const uint32_t rest = word(b + 66 + s / 2 * 4), signs = rest >> (s % 2 * 14);
                scale[s] = d * (0.5f + static_cast<float>(rest >> 28)) * 0.5f;
                low = signs_of(signs & 127), high = signs_of(signs >> 7 & 127);
                for (int k = 0; k < 4; k++) at[k] = b[2 + 4 * s + k];
            } else {
                const unsigned ninth = b[66 + s / 2] >> (s % 2 * 4);
                scale[s] = d * static_cast<float>(1 + 2 * (b[106 + s / 4] >> (s / 2 % 2 * 4) & 15));
                low = b[74 + 2 * s], high = b[75 + 2 * s];
                for (int k = 0; k < 4; k++) at[k] = b[2 + 4 * s + k] | (ninth >> k & 1) << 8;
            }
            uint32_t points[4];
            for (int k = 0; k < 4; k++) memcpy(points + k, grid + 4 * at[k], 4);
            signed_points(sixteen_at(points), low, high, q + 16 * s);
        }
    } else {
        static_assert(B == Ggml::IQ1_S || B == Ggml::IQ1_M);
        constexpr bool S = B == Ggml::IQ1_S;
        unsigned char bits[2] = {};
        if constexpr (!S)
            for (int i = 0; i < 4; i++)
                bits[i / 2] = static_cast<unsigned char>(bits[i / 2] | b[49 + 2 * i] >> 4 << (i % 2 * 4));
        const float d = S ? half_at(b) : half_at(bits);
        for (int s = 0; s < 16; s++) { // a level is a point and plus or minus an eighth
            unsigned at[2], three;
            bool down[2];
            if constexpr (S) {
                const unsigned high = b[34 + s / 2 * 2] | b[35 + s / 2 * 2] << 8;
                for (int k = 0; k < 2; k++)
                    at[k] = b[2 + 2 * s + k] | (high >> ((2 * s + k) % 4 * 3) & 7) << 8, down[k] = high >> 15;
                three = high >> 12 & 7;
            } else {
                for (int k = 0; k < 2; k++) {
                    const unsigned high = b[32 + s] >> (4 * k) & 15;
                    at[k] = b[2 * s + k] | (high & 7) << 8, down[k] = high >> 3;
                }
                three = (b[48 + s / 4 * 2] | b[49 + s / 4 * 2] << 8) >> (s % 4 * 3) & 7;
            }
            scale[s] = d * static_cast<float>(2 * three + 1) * 0.125f;
            const Sixteen x = two_points(grid, at[0], at[1]) * 8 + 1 + (bytes_of_bits(down[0] * 255u, down[1] * 255u) & 254);
            memcpy(q + 16 * s, &x, 16);
        }
    }
}

constexpr size_t LARGEST_BLOCK = 256;

// No level of a type has a larger magnitude.
inline float most_of(Ggml type) {
    switch (type) {
    case Ggml::Q4_0: return 8;
    case Ggml::Q5_0: return 16;
    case Ggml::Q3_K: return 4;
    case Ggml::Q6_K: return 32;
    case Ggml::TQ1_0:
    case Ggml::TQ2_0: return 2;
    case Ggml::MXFP4:
    case Ggml::NVFP4: return 12;
    case Ggml::Q2_K: return 3;
    case Ggml::Q4_1:
    case Ggml::Q4_K: return 15;
    case Ggml::Q5_1:
    case Ggml::Q5_K: return 31;
    default: return 128;
    }
}

template <Ggml B>
void blocks(const unsigned char *b, size_t bytes, size_t n, const int8_t *grid, int8_t *q, float *scale, float *plus) {
    constexpr size_t COLS[] = {
#define LLMFP_GGML(NAME, COLS, BYTES, POINTS) COLS,
#include "ggml_types.inc"
#undef LLMFP_GGML
    };
    constexpr size_t EACH = COLS[static_cast<size_t>(B)];
    for (size_t done = 0; done < n; done += EACH, b += bytes)
        block<B>(b, grid, q + done, scale + done / 16, plus + done / 16);
}

// Whole blocks of n columns from b: their signed bytes, and per sixteen a scale and what is added.
inline void take_apart(const Coding &c, const unsigned char *b, size_t n, int8_t *q, float *scale, float *plus) {
    switch (c.ggml) {
#define LLMFP_GGML(NAME, COLS, BYTES, POINTS)                                                                          \
    case Ggml::NAME: return blocks<Ggml::NAME>(b, c.block_bytes, n, c.grid, q, scale, plus);
#include "ggml_types.inc"
#undef LLMFP_GGML
    }
}

} // namespace
} // namespace llmfp
