// Sixteen lanes on every machine: one AVX-512 register, two of AVX2, four of NEON, or an array.
//
// A level provides F32 and F64 (16 lanes each), Source<dtype>, which turns one block of stored elements into V vectors,
// and ROWS, how many rows its registers can take at a time (which changes no result). What lane holds which column is
// the same everywhere (column_of), and so is the order of every sum: results agree to the bit.
//
// Everything lives in an unnamed namespace: the same template compiled with two sets of flags must never be merged by
// the linker. For the same reason nothing here may call a function template or inline function of the standard library.
#pragma once

#include "job.hpp"

#include <cmath>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // from GCC's own intrinsics headers (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define LLMFP_INLINE inline __attribute__((always_inline))

namespace llmfp {
namespace {

// Bits of a stored element.
template <Dtype D> struct BitsOf { using type = uint8_t; };
template <> struct BitsOf<Dtype::BF16> { using type = uint16_t; };
template <> struct BitsOf<Dtype::F16> { using type = uint16_t; };
template <> struct BitsOf<Dtype::F32> { using type = uint32_t; };
template <> struct BitsOf<Dtype::F64> { using type = uint64_t; };
template <Dtype D> using Bits = typename BitsOf<D>::type;

template <Dtype D> struct Format {
    static constexpr Bits<D> MAGNITUDE = static_cast<Bits<D>>(~Bits<D>(0)) >> 1;
    // The least magnitude, as an integer, that is infinite or NaN.
    static constexpr Bits<D> NONFINITE = D == Dtype::BF16      ? 0x7f80
                                         : D == Dtype::F16     ? 0x7c00
                                         : D == Dtype::F32     ? 0x7f800000
                                         : D == Dtype::F64     ? static_cast<Bits<D>>(0x7ff0000000000000)
                                         : D == Dtype::F8_E4M3 ? 0x7f
                                                               : 0x7c;
    // Lanes hold stored values divided by this: e4m3 moved into the exponent field of a float16 comes out 2^8 too small.
    static constexpr double SCALE = D == Dtype::F8_E4M3 ? 256 : 1;
    // Columns that are read together: a cache line, or two of float32.
    static constexpr size_t BLOCK = itemsize(D) == 1 ? 64 : 32;
    static constexpr size_t V = BLOCK / 16;
};

// The column within its block that lane l of vector v holds. bf16 pairs split into even and odd (a shift and a mask
// decode 32 elements); fp8 pairs likewise, into float16.
template <Dtype D> constexpr size_t column_of(size_t v, size_t l) {
    return D == Dtype::BF16 ? 2 * l + v : itemsize(D) == 1 ? 32 * (v & 1) + 2 * l + (v >> 1) : 16 * v + l;
}

LLMFP_INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// Finite float16 only. Both branches are cheap, so that the compiler can vectorise; no float32 subnormal is touched.
LLMFP_INLINE float float_of_half(uint32_t half) {
    const uint32_t magnitude = half & 0x7fff, sign = (half & 0x8000) << 16;
    const float small = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
    const float normal = float_of((magnitude << 13) + (112u << 23));
    uint32_t bits;
    const float value = magnitude < 0x400 ? small : normal;
    memcpy(&bits, &value, 4);
    return float_of(bits | sign);
}

// A finite stored element divided by Format<D>::SCALE.
template <Dtype D> LLMFP_INLINE float value_of(Bits<D> bits) {
    if constexpr (D == Dtype::BF16) return float_of(static_cast<uint32_t>(bits) << 16);
    if constexpr (D == Dtype::F16) return float_of_half(bits);
    if constexpr (D == Dtype::F32) return float_of(bits);
    if constexpr (D == Dtype::F8_E5M2) return float_of_half(static_cast<uint32_t>(bits) << 8);
    if constexpr (D == Dtype::F8_E4M3) return float_of_half((bits & 0x80u) << 8 | (bits & 0x7fu) << 7);
    return 0;
}

template <Dtype D> LLMFP_INLINE Bits<D> bits_at(const unsigned char *p) {
    Bits<D> bits;
    memcpy(&bits, p, sizeof bits);
    return bits;
}

// Any float16, infinite and NaN too.
LLMFP_INLINE float half_at(const unsigned char *p) {
#if defined(__F16C__)
    return _cvtsh_ss(bits_at<Dtype::F16>(p));
#endif
    const uint32_t half = bits_at<Dtype::F16>(p), magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) return float_of((half & 0x8000) << 16 | 0x7f800000u | (magnitude & 0x3ff) << 13);
    return float_of_half(half);
}

struct Scalar {
    static constexpr int ROWS = 1;
    struct F32 {
        float lane[16];
        static F32 zero() { return {}; }
        static F32 load(const float *p) {
            F32 a;
            memcpy(a.lane, p, 64);
            return a;
        }
        void store(float *p) const { memcpy(p, lane, 64); }
        static F32 splat(float x) {
            F32 a;
            for (float &l : a.lane) l = x;
            return a;
        }
        // Sixteen bytes as numbers; as signed ones; as places in a table of 16; as small floats, NaN not among them.
        static F32 bytes(const uint8_t *q) { return each([=](int l) { return static_cast<float>(q[l]); }); }
        static F32 signed_bytes(const uint8_t *q) {
            return each([=](int l) { return static_cast<float>(static_cast<int8_t>(q[l])); });
        }
        static F32 look_up(const float *table, const uint8_t *q) {
            return each([=](int l) { return table[q[l] & 15]; });
        }
        template <Dtype D> static F32 small_floats(const uint8_t *q) {
            return each([=](int l) { return value_of<D>(q[l]) * static_cast<float>(Format<D>::SCALE); });
        }
        // Sixteen float16, infinite and NaN too; `bits` of each 32-bit word from `low` up.
        static F32 halves(const uint16_t *q) {
            return each([=](int l) { return half_at(reinterpret_cast<const unsigned char *>(q + l)); });
        }
        static F32 words(const uint8_t *q, unsigned low, unsigned mask) {
            return each([=](int l) { return static_cast<float>(bits_at<Dtype::F32>(q + 4 * l) >> low & mask); });
        }
        template <class F> static F32 each(F f) {
            float lane[16];
            for (int l = 0; l < 16; l++) lane[l] = f(l);
            return load(lane);
        }
        // The larger magnitude, of finite numbers.
        static F32 larger(F32 a, F32 b) {
            return each([&](int l) { return __builtin_fabsf(b.lane[l]) > a.lane[l] ? __builtin_fabsf(b.lane[l]) : a.lane[l]; });
        }
        static bool any_above(F32 a, float limit) {
            for (float x : a.lane)
                if (x > limit) return true;
            return false;
        }
        friend F32 operator+(F32 a, F32 b) {
            for (int l = 0; l < 16; l++) a.lane[l] += b.lane[l];
            return a;
        }
        friend F32 operator-(F32 a, F32 b) {
            for (int l = 0; l < 16; l++) a.lane[l] -= b.lane[l];
            return a;
        }
        friend F32 operator*(F32 a, F32 b) {
            for (int l = 0; l < 16; l++) a.lane[l] *= b.lane[l];
            return a;
        }
        friend F32 fma(F32 a, F32 b, F32 c) {
            for (int l = 0; l < 16; l++) c.lane[l] = __builtin_fmaf(a.lane[l], b.lane[l], c.lane[l]);
            return c;
        }
    };
    struct F64 {
        double lane[16];
        static F64 zero() { return {}; }
        static F64 load(const double *p) {
            F64 a;
            memcpy(a.lane, p, 128);
            return a;
        }
        void store(double *p) const { memcpy(p, lane, 128); }
        static F64 splat(double x) {
            F64 a;
            for (double &l : a.lane) l = x;
            return a;
        }
        static F64 widen(F32 x) {
            F64 a;
            for (int l = 0; l < 16; l++) a.lane[l] = x.lane[l];
            return a;
        }
        friend F64 operator+(F64 a, F64 b) {
            for (int l = 0; l < 16; l++) a.lane[l] += b.lane[l];
            return a;
        }
        friend F64 operator-(F64 a, F64 b) {
            for (int l = 0; l < 16; l++) a.lane[l] -= b.lane[l];
            return a;
        }
        friend F64 operator*(F64 a, F64 b) {
            for (int l = 0; l < 16; l++) a.lane[l] *= b.lane[l];
            return a;
        }
        // The upper half onto the lower, until one is left: the tree that every level follows.
        double sum() const {
            double t[16];
            memcpy(t, lane, 128);
            for (int half = 8; half; half /= 2)
                for (int l = 0; l < half; l++) t[l] += t[l + half];
            return t[0];
        }
    };
    template <Dtype D> struct Source {
        using Packed = const unsigned char *;
        struct Max {
            Bits<D> most = 0;
            Bits<D> bits() const { return most; }
        };
        static void pack(const unsigned char *p, Max &max, Packed &packed) {
            packed = p;
            for (size_t i = 0; i < Format<D>::BLOCK; i++) {
                const Bits<D> m = bits_at<D>(p + i * sizeof(Bits<D>)) & Format<D>::MAGNITUDE;
                max.most = m > max.most ? m : max.most;
            }
        }
        static F32 get(const Packed &p, size_t v) {
            F32 a;
            for (size_t l = 0; l < 16; l++)
                a.lane[l] = value_of<D>(bits_at<D>(p + column_of<D>(v, l) * sizeof(Bits<D>)));
            return a;
        }
    };
};

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

struct Avx512 {
    static constexpr int ROWS = 4; // 4 rows x 4 sums = 16 of 32 registers
    struct F32 {
        __m512 v;
        static LLMFP_INLINE F32 zero() { return {_mm512_setzero_ps()}; }
        static LLMFP_INLINE F32 load(const float *p) { return {_mm512_loadu_ps(p)}; }
        static LLMFP_INLINE F32 splat(float x) { return {_mm512_set1_ps(x)}; }
        LLMFP_INLINE void store(float *p) const { _mm512_storeu_ps(p, v); }
        static LLMFP_INLINE __m128i sixteen(const uint8_t *q) {
            return _mm_loadu_si128(reinterpret_cast<const __m128i *>(q));
        }
        static LLMFP_INLINE F32 bytes(const uint8_t *q) {
            return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(sixteen(q)))};
        }
        static LLMFP_INLINE F32 signed_bytes(const uint8_t *q) {
            return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen(q)))};
        }
        static LLMFP_INLINE F32 look_up(const float *table, const uint8_t *q) {
            return {_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(sixteen(q)), _mm512_loadu_ps(table))};
        }
        template <Dtype D> static LLMFP_INLINE F32 small_floats(const uint8_t *q) {
            __m256i half = _mm256_slli_epi16(_mm256_cvtepu8_epi16(sixteen(q)), 8);
            if constexpr (D == Dtype::F8_E4M3) half = _mm256_and_si256(_mm256_srai_epi16(half, 1), _mm256_set1_epi16(-0x4080));
            return F32{_mm512_cvtph_ps(half)} * splat(static_cast<float>(Format<D>::SCALE));
        }
        static LLMFP_INLINE F32 halves(const uint16_t *q) {
            return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(q)))};
        }
        static LLMFP_INLINE F32 words(const uint8_t *q, unsigned low, unsigned mask) {
            const __m512i from = _mm512_srl_epi32(_mm512_loadu_si512(q), _mm_cvtsi32_si128(static_cast<int>(low)));
            return {_mm512_cvtepi32_ps(_mm512_and_si512(from, _mm512_set1_epi32(static_cast<int>(mask))))};
        }
        static LLMFP_INLINE F32 larger(F32 a, F32 b) { return {_mm512_range_ps(a.v, b.v, 0x0b)}; }
        static LLMFP_INLINE bool any_above(F32 a, float limit) {
            return _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
        }
        friend LLMFP_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
        friend LLMFP_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
        friend LLMFP_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
        friend LLMFP_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    };
    struct F64 {
        __m512d v[2];
        static LLMFP_INLINE F64 zero() { return {{_mm512_setzero_pd(), _mm512_setzero_pd()}}; }
        static LLMFP_INLINE F64 load(const double *p) { return {{_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}}; }
        static LLMFP_INLINE F64 splat(double x) { return {{_mm512_set1_pd(x), _mm512_set1_pd(x)}}; }
        LLMFP_INLINE void store(double *p) const { _mm512_storeu_pd(p, v[0]), _mm512_storeu_pd(p + 8, v[1]); }
        static LLMFP_INLINE F64 widen(F32 x) {
            return {{_mm512_cvtps_pd(_mm512_castps512_ps256(x.v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1))}};
        }
        friend LLMFP_INLINE F64 operator+(F64 a, F64 b) {
            return {{_mm512_add_pd(a.v[0], b.v[0]), _mm512_add_pd(a.v[1], b.v[1])}};
        }
        friend LLMFP_INLINE F64 operator-(F64 a, F64 b) {
            return {{_mm512_sub_pd(a.v[0], b.v[0]), _mm512_sub_pd(a.v[1], b.v[1])}};
        }
        friend LLMFP_INLINE F64 operator*(F64 a, F64 b) {
            return {{_mm512_mul_pd(a.v[0], b.v[0]), _mm512_mul_pd(a.v[1], b.v[1])}};
        }
        LLMFP_INLINE double sum() const {
            const __m512d eight = _mm512_add_pd(v[0], v[1]);
            const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
            const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
            return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
        }
    };
    template <Dtype D> struct Source {
        // bf16 decodes from a register, float16 and float32 from memory; fp8 goes to the stack as float16 first, because
        // the conversion takes one operation from memory and two from a register.
        struct Packed {
            const unsigned char *p;
            __m512i pairs;
            alignas(64) unsigned char half[itemsize(D) == 1 ? 128 : 1];
        };
        struct Max {
            __m512i most = _mm512_setzero_si512();
            Bits<D> bits() const {
                Bits<D> lane[64 / sizeof(Bits<D>)], most_bits = 0;
                _mm512_storeu_si512(lane, most);
                for (Bits<D> b : lane) most_bits = b > most_bits ? b : most_bits;
                return most_bits;
            }
        };
        static LLMFP_INLINE void pack(const unsigned char *p, Max &max, Packed &packed) {
            packed.p = p;
            const __m512i pairs = _mm512_loadu_si512(p);
            if constexpr (sizeof(Bits<D>) == 4) {
                const __m512i mask = _mm512_set1_epi32(0x7fffffff), second = _mm512_loadu_si512(p + 64);
                max.most = _mm512_max_epu32(max.most, _mm512_and_si512(pairs, mask));
                max.most = _mm512_max_epu32(max.most, _mm512_and_si512(second, mask));
            } else if constexpr (sizeof(Bits<D>) == 2) {
                packed.pairs = pairs;
                max.most = _mm512_max_epu16(max.most, _mm512_and_si512(pairs, _mm512_set1_epi32(0x7fff7fff)));
            } else {
                max.most = _mm512_max_epu8(max.most, _mm512_and_si512(pairs, _mm512_set1_epi32(0x7f7f7f7f)));
                __m512i even = _mm512_slli_epi16(pairs, 8), odd;
                if constexpr (D == Dtype::F8_E5M2) {
                    odd = _mm512_and_si512(pairs, _mm512_set1_epi16(static_cast<short>(0xff00)));
                } else { // sign stays, exponent and mantissa one place down, the sign's copy between them out
                    const __m512i keep = _mm512_set1_epi16(static_cast<short>(0xbf80));
                    even = _mm512_and_si512(_mm512_srai_epi16(even, 1), keep);
                    odd = _mm512_and_si512(_mm512_srai_epi16(pairs, 1), keep);
                }
                _mm512_store_si512(packed.half, even);
                _mm512_store_si512(packed.half + 64, odd);
                __asm__("" : "+m"(packed.half)); // or the compiler extracts from registers again
            }
        }
        static LLMFP_INLINE F32 get(const Packed &packed, size_t v) {
            if constexpr (D == Dtype::BF16)
                return {_mm512_castsi512_ps(v == 0 ? _mm512_slli_epi32(packed.pairs, 16)
                                                   : _mm512_and_si512(packed.pairs, _mm512_set1_epi32(-65536)))};
            if constexpr (D == Dtype::F32) return {_mm512_loadu_ps(packed.p + 64 * v)};
            const unsigned char *half = D == Dtype::F16 ? packed.p : packed.half;
            return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(half + 32 * v)))};
        }
    };
};

#endif
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

struct Avx2 {
    static constexpr int ROWS = 2;
    struct F32 {
        __m256 v[2];
        static LLMFP_INLINE F32 zero() { return splat(0); }
        static LLMFP_INLINE F32 load(const float *p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
        static LLMFP_INLINE F32 splat(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
        LLMFP_INLINE void store(float *p) const { _mm256_storeu_ps(p, v[0]), _mm256_storeu_ps(p + 8, v[1]); }
        static LLMFP_INLINE __m128i eight(const uint8_t *q) {
            return _mm_loadl_epi64(reinterpret_cast<const __m128i *>(q));
        }
        static LLMFP_INLINE F32 bytes(const uint8_t *q) {
            return {{_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight(q))),
                     _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight(q + 8)))}};
        }
        static LLMFP_INLINE F32 signed_bytes(const uint8_t *q) {
            return {{_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight(q))),
                     _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight(q + 8)))}};
        }
        static LLMFP_INLINE F32 look_up(const float *table, const uint8_t *q) {
            const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
            F32 x;
            for (int i = 0; i < 2; i++) {
                const __m256i at = _mm256_cvtepu8_epi32(eight(q + 8 * i)); // bit 3, moved to the sign, picks the half
                x.v[i] = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, at), _mm256_permutevar8x32_ps(high, at),
                                          _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
            }
            return x;
        }
        template <Dtype D> static LLMFP_INLINE F32 small_floats(const uint8_t *q) {
            F32 x;
            for (int i = 0; i < 2; i++) {
                __m128i half = _mm_slli_epi16(_mm_cvtepu8_epi16(eight(q + 8 * i)), 8);
                if constexpr (D == Dtype::F8_E4M3) half = _mm_and_si128(_mm_srai_epi16(half, 1), _mm_set1_epi16(-0x4080));
                x.v[i] = _mm256_cvtph_ps(half);
            }
            return x * splat(static_cast<float>(Format<D>::SCALE));
        }
        static LLMFP_INLINE F32 halves(const uint16_t *q) {
            const __m128i *half = reinterpret_cast<const __m128i *>(q);
            return {{_mm256_cvtph_ps(_mm_loadu_si128(half)), _mm256_cvtph_ps(_mm_loadu_si128(half + 1))}};
        }
        static LLMFP_INLINE F32 words(const uint8_t *q, unsigned low, unsigned mask) {
            F32 x;
            for (int i = 0; i < 2; i++) {
                const __m256i from = _mm256_srl_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(q + 32 * i)),
                                                      _mm_cvtsi32_si128(static_cast<int>(low)));
                x.v[i] = _mm256_cvtepi32_ps(_mm256_and_si256(from, _mm256_set1_epi32(static_cast<int>(mask))));
            }
            return x;
        }
        static LLMFP_INLINE F32 larger(F32 a, F32 b) {
            const __m256 sign = _mm256_set1_ps(-0.f);
            return {{_mm256_max_ps(a.v[0], _mm256_andnot_ps(sign, b.v[0])),
                     _mm256_max_ps(a.v[1], _mm256_andnot_ps(sign, b.v[1]))}};
        }
        static LLMFP_INLINE bool any_above(F32 a, float limit) {
            const __m256 most = _mm256_set1_ps(limit);
            return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(a.v[0], most, _CMP_GT_OQ),
                                                   _mm256_cmp_ps(a.v[1], most, _CMP_GT_OQ))) != 0;
        }
        friend LLMFP_INLINE F32 operator+(F32 a, F32 b) {
            return {{_mm256_add_ps(a.v[0], b.v[0]), _mm256_add_ps(a.v[1], b.v[1])}};
        }
        friend LLMFP_INLINE F32 operator-(F32 a, F32 b) {
            return {{_mm256_sub_ps(a.v[0], b.v[0]), _mm256_sub_ps(a.v[1], b.v[1])}};
        }
        friend LLMFP_INLINE F32 operator*(F32 a, F32 b) {
            return {{_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}};
        }
        friend LLMFP_INLINE F32 fma(F32 a, F32 b, F32 c) {
            return {{_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])}};
        }
    };
    struct F64 {
        __m256d v[4];
        static LLMFP_INLINE F64 zero() { return splat(0); }
        static LLMFP_INLINE F64 load(const double *p) {
            return {{_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4), _mm256_loadu_pd(p + 8), _mm256_loadu_pd(p + 12)}};
        }
        static LLMFP_INLINE F64 splat(double x) {
            const __m256d a = _mm256_set1_pd(x);
            return {{a, a, a, a}};
        }
        LLMFP_INLINE void store(double *p) const {
            for (int i = 0; i < 4; i++) _mm256_storeu_pd(p + 4 * i, v[i]);
        }
        static LLMFP_INLINE F64 widen(F32 x) {
            return {{_mm256_cvtps_pd(_mm256_castps256_ps128(x.v[0])), _mm256_cvtps_pd(_mm256_extractf128_ps(x.v[0], 1)),
                     _mm256_cvtps_pd(_mm256_castps256_ps128(x.v[1])), _mm256_cvtps_pd(_mm256_extractf128_ps(x.v[1], 1))}};
        }
        friend LLMFP_INLINE F64 operator+(F64 a, F64 b) {
            return {{_mm256_add_pd(a.v[0], b.v[0]), _mm256_add_pd(a.v[1], b.v[1]), _mm256_add_pd(a.v[2], b.v[2]),
                     _mm256_add_pd(a.v[3], b.v[3])}};
        }
        friend LLMFP_INLINE F64 operator-(F64 a, F64 b) {
            return {{_mm256_sub_pd(a.v[0], b.v[0]), _mm256_sub_pd(a.v[1], b.v[1]), _mm256_sub_pd(a.v[2], b.v[2]),
                     _mm256_sub_pd(a.v[3], b.v[3])}};
        }
        friend LLMFP_INLINE F64 operator*(F64 a, F64 b) {
            return {{_mm256_mul_pd(a.v[0], b.v[0]), _mm256_mul_pd(a.v[1], b.v[1]), _mm256_mul_pd(a.v[2], b.v[2]),
                     _mm256_mul_pd(a.v[3], b.v[3])}};
        }
        LLMFP_INLINE double sum() const {
            const __m256d four = _mm256_add_pd(_mm256_add_pd(v[0], v[2]), _mm256_add_pd(v[1], v[3]));
            const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
            return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
        }
    };
    template <Dtype D> struct Source {
        struct Packed {
            const unsigned char *p;
            __m256i pairs[2];
            alignas(32) unsigned char half[itemsize(D) == 1 ? 128 : 1];
        };
        struct Max {
            __m256i most = _mm256_setzero_si256();
            Bits<D> bits() const {
                Bits<D> lane[32 / sizeof(Bits<D>)], most_bits = 0;
                memcpy(lane, &most, 32);
                for (Bits<D> b : lane) most_bits = b > most_bits ? b : most_bits;
                return most_bits;
            }
        };
        static LLMFP_INLINE __m256i load(const unsigned char *p) {
            return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
        }
        static LLMFP_INLINE void pack(const unsigned char *p, Max &max, Packed &packed) {
            packed.p = p;
            if constexpr (sizeof(Bits<D>) == 4) {
                for (int i = 0; i < 4; i++)
                    max.most = _mm256_max_epu32(max.most,
                                                _mm256_and_si256(load(p + 32 * i), _mm256_set1_epi32(0x7fffffff)));
            } else {
                for (int i = 0; i < 2; i++) {
                    const __m256i pairs = load(p + 32 * i);
                    if constexpr (sizeof(Bits<D>) == 2) {
                        packed.pairs[i] = pairs;
                        max.most = _mm256_max_epu16(max.most, _mm256_and_si256(pairs, _mm256_set1_epi32(0x7fff7fff)));
                        continue;
                    }
                    max.most = _mm256_max_epu8(max.most, _mm256_and_si256(pairs, _mm256_set1_epi32(0x7f7f7f7f)));
                    __m256i even = _mm256_slli_epi16(pairs, 8), odd;
                    if constexpr (D == Dtype::F8_E5M2) {
                        odd = _mm256_and_si256(pairs, _mm256_set1_epi16(static_cast<short>(0xff00)));
                    } else {
                        const __m256i keep = _mm256_set1_epi16(static_cast<short>(0xbf80));
                        even = _mm256_and_si256(_mm256_srai_epi16(even, 1), keep);
                        odd = _mm256_and_si256(_mm256_srai_epi16(pairs, 1), keep);
                    }
                    _mm256_store_si256(reinterpret_cast<__m256i *>(packed.half + 32 * i), even);
                    _mm256_store_si256(reinterpret_cast<__m256i *>(packed.half + 64 + 32 * i), odd);
                }
            }
        }
        static LLMFP_INLINE F32 get(const Packed &packed, size_t v) {
            F32 x;
            for (int i = 0; i < 2; i++) {
                if constexpr (D == Dtype::BF16) {
                    x.v[i] = _mm256_castsi256_ps(v == 0 ? _mm256_slli_epi32(packed.pairs[i], 16)
                                                        : _mm256_and_si256(packed.pairs[i], _mm256_set1_epi32(-65536)));
                } else if constexpr (D == Dtype::F32) {
                    x.v[i] = _mm256_castsi256_ps(load(packed.p + 64 * v + 32 * i));
                } else {
                    const unsigned char *half = (D == Dtype::F16 ? packed.p : packed.half) + 32 * v + 16 * i;
                    x.v[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(half)));
                }
            }
            return x;
        }
    };
};

#endif
#if defined(__aarch64__)

struct Neon {
    static constexpr int ROWS = 1; // 1 row x 4 sums x 4 registers = 16 of 32
    struct F32 {
        float32x4_t v[4];
        static LLMFP_INLINE F32 zero() { return splat(0); }
        static LLMFP_INLINE F32 splat(float x) {
            const float32x4_t a = vdupq_n_f32(x);
            return {{a, a, a, a}};
        }
        static LLMFP_INLINE F32 load(const float *p) {
            return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}};
        }
        LLMFP_INLINE void store(float *p) const {
            for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, v[i]);
        }
        // Sixteen bytes as numbers; as signed ones; as places in a table of 16; as small floats, NaN not among them.
        static F32 bytes(const uint8_t *q) { return each([=](int l) { return static_cast<float>(q[l]); }); }
        static F32 signed_bytes(const uint8_t *q) {
            return each([=](int l) { return static_cast<float>(static_cast<int8_t>(q[l])); });
        }
        static F32 look_up(const float *table, const uint8_t *q) {
            return each([=](int l) { return table[q[l] & 15]; });
        }
        template <Dtype D> static F32 small_floats(const uint8_t *q) {
            return each([=](int l) { return value_of<D>(q[l]) * static_cast<float>(Format<D>::SCALE); });
        }
        static LLMFP_INLINE F32 halves(const uint16_t *q) {
            F32 x;
            for (int i = 0; i < 4; i++) x.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(q + 4 * i)));
            return x;
        }
        static LLMFP_INLINE F32 words(const uint8_t *q, unsigned low, unsigned mask) {
            F32 x;
            for (int i = 0; i < 4; i++) {
                const uint32x4_t from = vshlq_u32(vreinterpretq_u32_u8(vld1q_u8(q + 16 * i)),
                                                  vdupq_n_s32(-static_cast<int>(low)));
                x.v[i] = vcvtq_f32_u32(vandq_u32(from, vdupq_n_u32(mask)));
            }
            return x;
        }
        template <class F> static F32 each(F f) {
            float lane[16];
            for (int l = 0; l < 16; l++) lane[l] = f(l);
            return load(lane);
        }
        static LLMFP_INLINE F32 larger(F32 a, F32 b) {
            for (int i = 0; i < 4; i++) a.v[i] = vmaxq_f32(a.v[i], vabsq_f32(b.v[i]));
            return a;
        }
        static LLMFP_INLINE bool any_above(F32 a, float limit) {
            return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3]))) > limit;
        }
        friend LLMFP_INLINE F32 operator+(F32 a, F32 b) {
            for (int i = 0; i < 4; i++) a.v[i] = vaddq_f32(a.v[i], b.v[i]);
            return a;
        }
        friend LLMFP_INLINE F32 operator-(F32 a, F32 b) {
            for (int i = 0; i < 4; i++) a.v[i] = vsubq_f32(a.v[i], b.v[i]);
            return a;
        }
        friend LLMFP_INLINE F32 operator*(F32 a, F32 b) {
            for (int i = 0; i < 4; i++) a.v[i] = vmulq_f32(a.v[i], b.v[i]);
            return a;
        }
        friend LLMFP_INLINE F32 fma(F32 a, F32 b, F32 c) {
            for (int i = 0; i < 4; i++) c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]);
            return c;
        }
    };
    struct F64 {
        float64x2_t v[8];
        static LLMFP_INLINE F64 zero() { return splat(0); }
        static LLMFP_INLINE F64 splat(double x) {
            F64 a;
            for (int i = 0; i < 8; i++) a.v[i] = vdupq_n_f64(x);
            return a;
        }
        static LLMFP_INLINE F64 load(const double *p) {
            F64 a;
            for (int i = 0; i < 8; i++) a.v[i] = vld1q_f64(p + 2 * i);
            return a;
        }
        LLMFP_INLINE void store(double *p) const {
            for (int i = 0; i < 8; i++) vst1q_f64(p + 2 * i, v[i]);
        }
        static LLMFP_INLINE F64 widen(F32 x) {
            F64 a;
            for (int i = 0; i < 4; i++) {
                a.v[2 * i] = vcvt_f64_f32(vget_low_f32(x.v[i]));
                a.v[2 * i + 1] = vcvt_high_f64_f32(x.v[i]);
            }
            return a;
        }
        friend LLMFP_INLINE F64 operator+(F64 a, F64 b) {
            for (int i = 0; i < 8; i++) a.v[i] = vaddq_f64(a.v[i], b.v[i]);
            return a;
        }
        friend LLMFP_INLINE F64 operator-(F64 a, F64 b) {
            for (int i = 0; i < 8; i++) a.v[i] = vsubq_f64(a.v[i], b.v[i]);
            return a;
        }
        friend LLMFP_INLINE F64 operator*(F64 a, F64 b) {
            for (int i = 0; i < 8; i++) a.v[i] = vmulq_f64(a.v[i], b.v[i]);
            return a;
        }
        LLMFP_INLINE double sum() const {
            float64x2_t t[4];
            for (int i = 0; i < 4; i++) t[i] = vaddq_f64(v[i], v[i + 4]);
            for (int i = 0; i < 2; i++) t[i] = vaddq_f64(t[i], t[i + 2]);
            return vpaddd_f64(vaddq_f64(t[0], t[1]));
        }
    };
    template <Dtype D> struct Source {
        struct Packed {
            const unsigned char *p;
            uint16x8_t half[itemsize(D) == 1 ? 8 : 1];
        };
        struct Max {
            uint8x16_t most = vdupq_n_u8(0);
            Bits<D> bits() const {
                if constexpr (sizeof(Bits<D>) == 4) return vmaxvq_u32(vreinterpretq_u32_u8(most));
                if constexpr (sizeof(Bits<D>) == 2) return vmaxvq_u16(vreinterpretq_u16_u8(most));
                return static_cast<Bits<D>>(vmaxvq_u8(most));
            }
        };
        static LLMFP_INLINE void pack(const unsigned char *p, Max &max, Packed &packed) {
            packed.p = p;
            for (size_t i = 0; i < Format<D>::BLOCK * sizeof(Bits<D>) / 16; i++) {
                const uint8x16_t raw = vld1q_u8(p + 16 * i);
                if constexpr (sizeof(Bits<D>) == 4) {
                    const uint32x4_t m = vandq_u32(vreinterpretq_u32_u8(raw), vdupq_n_u32(0x7fffffff));
                    max.most = vreinterpretq_u8_u32(vmaxq_u32(vreinterpretq_u32_u8(max.most), m));
                } else if constexpr (sizeof(Bits<D>) == 2) {
                    const uint16x8_t m = vandq_u16(vreinterpretq_u16_u8(raw), vdupq_n_u16(0x7fff));
                    max.most = vreinterpretq_u8_u16(vmaxq_u16(vreinterpretq_u16_u8(max.most), m));
                } else {
                    max.most = vmaxq_u8(max.most, vandq_u8(raw, vdupq_n_u8(0x7f)));
                    const uint16x8_t pairs = vreinterpretq_u16_u8(raw), even = vshlq_n_u16(pairs, 8);
                    if constexpr (D == Dtype::F8_E5M2) {
                        packed.half[i] = even;
                        packed.half[4 + i] = vandq_u16(pairs, vdupq_n_u16(0xff00));
                    } else {
                        const uint16x8_t keep = vdupq_n_u16(0xbf80);
                        packed.half[i] = vandq_u16(
                            vreinterpretq_u16_s16(vshrq_n_s16(vreinterpretq_s16_u16(even), 1)), keep);
                        packed.half[4 + i] = vandq_u16(
                            vreinterpretq_u16_s16(vshrq_n_s16(vreinterpretq_s16_u16(pairs), 1)), keep);
                    }
                }
            }
        }
        static LLMFP_INLINE F32 get(const Packed &packed, size_t v) {
            F32 x;
            for (size_t i = 0; i < 4; i++) {
                if constexpr (D == Dtype::BF16) {
                    const uint32x4_t pairs = vreinterpretq_u32_u8(vld1q_u8(packed.p + 16 * i));
                    x.v[i] = vreinterpretq_f32_u32(v == 0 ? vshlq_n_u32(pairs, 16)
                                                          : vandq_u32(pairs, vdupq_n_u32(0xffff0000)));
                } else if constexpr (D == Dtype::F32) {
                    x.v[i] = vreinterpretq_f32_u8(vld1q_u8(packed.p + 64 * v + 16 * i));
                } else if constexpr (D == Dtype::F16) {
                    x.v[i] = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(packed.p + 32 * v + 8 * i)));
                } else {
                    const uint16x8_t half = packed.half[2 * v + i / 2];
                    x.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(i % 2 ? vget_high_u16(half) : vget_low_u16(half)));
                }
            }
            return x;
        }
    };
};

#endif

} // namespace
} // namespace llmfp
