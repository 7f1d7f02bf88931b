// Sixteen virtual lanes of float32, spelled for each instruction set, and loads of 32 stored elements into two of them.
//
// Every level computes the same sixteen lanes with the same operations in the same order, so all agree to the bit.
// A pair (a, b) holds 32 neighbouring columns: for bf16, a the even and b the odd ones (one operation each to widen),
// for everything else a the first and b the last sixteen. `slot` says where a column of a group of 32 ends up.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(LLMFP_AVX512) || defined(LLMFP_AVX2)
#include <immintrin.h>
#elif defined(LLMFP_NEON)
#include <arm_neon.h>
#endif

namespace {

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// IEEE binary16 → binary32, exact.
inline float float_of_half(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31u, mantissa = half & 1023u;
    if (exponent == 31) return float_of(sign | 0x7f800000u | (mantissa << 13));
    if (exponent) return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
    const float value = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -value : value;
}

#if defined(LLMFP_AVX512)

struct F32x16 {
    __m512 v;
    static F32x16 zero() { return {_mm512_setzero_ps()}; }
    static F32x16 all(float x) { return {_mm512_set1_ps(x)}; }
    static F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    friend F32x16 operator+(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
    friend F32x16 operator*(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
    static F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    void add_to(double* p) const {
        const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
        const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
        _mm512_storeu_pd(p, _mm512_add_pd(_mm512_loadu_pd(p), low));
        _mm512_storeu_pd(p + 8, _mm512_add_pd(_mm512_loadu_pd(p + 8), high));
    }
};

// The largest magnitude seen, as raw bits without the sign, in elements of the stored width.
struct MaxBits {
    __m512i v = _mm512_setzero_si512();
    void take32(__m512i x) { v = _mm512_max_epu32(v, _mm512_and_si512(x, _mm512_set1_epi32(0x7fffffff))); }
    void take16(__m512i x) { v = _mm512_max_epu16(v, _mm512_and_si512(x, _mm512_set1_epi16(0x7fff))); }
    void take8(__m256i x) {
        v = _mm512_castsi256_si512(_mm256_max_epu8(_mm512_castsi512_si256(v), _mm256_and_si256(x, _mm256_set1_epi8(127))));
    }
    template <typename T> uint32_t largest() const {
        T lanes[64 / sizeof(T)] = {};
        if (sizeof(T) == 1) _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), _mm512_castsi512_si256(v));
        else _mm512_storeu_si512(lanes, v);
        uint32_t most = 0;
        for (T lane : lanes) most = lane > most ? lane : most;
        return most;
    }
};

inline void load_bf16(const uint8_t* p, F32x16& a, F32x16& b, MaxBits& most) {
    const __m512i x = _mm512_loadu_si512(p);
    most.take16(x);
    a.v = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    b.v = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

inline void load_f16(const uint8_t* p, F32x16& a, F32x16& b, MaxBits& most) {
    const __m512i x = _mm512_loadu_si512(p);
    most.take16(x);
    a.v = _mm512_cvtph_ps(_mm512_castsi512_si256(x));
    b.v = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1));
}

inline void load_f32(const uint8_t* p, F32x16& a, F32x16& b, MaxBits& most) {
    const __m512i x = _mm512_loadu_si512(p), y = _mm512_loadu_si512(p + 64);
    most.take32(x);
    most.take32(y);
    a.v = _mm512_castsi512_ps(x);
    b.v = _mm512_castsi512_ps(y);
}

inline void load_e5m2(const uint8_t* p, F32x16& a, F32x16& b, MaxBits& most) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    most.take8(x);
    const __m512i halves = _mm512_slli_epi16(_mm512_cvtepu8_epi16(x), 8);
    a.v = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    b.v = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
}

inline void load_e4m3(const uint8_t* p, F32x16& a, F32x16& b, MaxBits& most) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    most.take8(x);
    const __m512i wide = _mm512_slli_epi16(_mm512_cvtepi8_epi16(x), 7);
    const __m512i halves = _mm512_and_si512(wide, _mm512_set1_epi16(static_cast<short>(0xbfff)));
    a.v = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    b.v = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
}

constexpr int kRowGroup = 4;

#elif defined(LLMFP_AVX2)

struct F32x16 {
    __m256 v[2];
    static F32x16 zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
    static F32x16 all(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
    static F32x16 load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
    void store(float* p) const {
        _mm256_storeu_ps(p, v[0]);
        _mm256_storeu_ps(p + 8, v[1]);
    }
    friend F32x16 operator+(F32x16 a, F32x16 b) {
        return {{_mm256_add_ps(a.v[0], b.v[0]), _mm256_add_ps(a.v[1], b.v[1])}};
    }
    friend F32x16 operator*(F32x16 a, F32x16 b) {
        return {{_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}};
    }
    static F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
        return {{_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])}};
    }
    void add_to(double* p) const {
        for (int i = 0; i < 2; i++) {
            const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v[i]));
            const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(v[i], 1));
            _mm256_storeu_pd(p + 8 * i, _mm256_add_pd(_mm256_loadu_pd(p + 8 * i), low));
            _mm256_storeu_pd(p + 8 * i + 4, _mm256_add_pd(_mm256_loadu_pd(p + 8 * i + 4), high));
        }
    }
};

struct MaxBits {
    __m256i v = _mm256_setzero_si256();
    void take32(__m256i x) { v = _mm256_max_epu32(v, _mm256_and_si256(x, _mm256_set1_epi32(0x7fffffff))); }
    void take16(__m256i x) { v = _mm256_max_epu16(v, _mm256_and_si256(x, _mm256_set1_epi16(0x7fff))); }
    void take8(__m256i x) { v = _mm256_max_epu8(v, _mm256_and_si256(x, _mm256_set1_epi8(127))); }
    template <typename T> uint32_t largest() const {
        T lanes[32 / sizeof(T)];
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), v);
        uint32_t most = 0;
        for (T lane : lanes) most = lane > most ? lane : most;
        return most;
    }
};

inline __m256i load256(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

inline void load_bf16(const uint8_t* p, F32x16& a, F32x16& b, MaxBits& most) {
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    for (int i = 0; i < 2; i++) {
        const __m256i x = load256(p + 32 * i);
        most.take16(x);
        a.v[i] = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
        b.v[i] = _mm256_castsi256_ps(_mm256_and_si256(x, mask));
    }
}

inline void widen_halves(__m256i x, F32x16& out) {
    out.v[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(x));
    out.v[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1));
}

inline void load_f16(const uint8_t* p, F32x16& a, F32x16& b, MaxBits& most) {
    const __m256i x = load256(p), y = load256(p + 32);
    most.take16(x);
    most.take16(y);
    widen_halves(x, a);
    widen_halves(y, b);
}

inline void load_f32(const uint8_t* p, F32x16& a, F32x16& b, MaxBits& most) {
    for (int i = 0; i < 4; i++) {
        const __m256i x = load256(p + 32 * i);
        most.take32(x);
        (i < 2 ? a : b).v[i & 1] = _mm256_castsi256_ps(x);
    }
}

inline void load_e5m2(const uint8_t* p, F32x16& a, F32x16& b, MaxBits& most) {
    const __m256i x = load256(p);
    most.take8(x);
    widen_halves(_mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(x)), 8), a);
    widen_halves(_mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm256_extracti128_si256(x, 1)), 8), b);
}

inline __m256i halves_of_e4m3(__m128i x) {
    const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(x), 7);
    return _mm256_and_si256(wide, _mm256_set1_epi16(static_cast<short>(0xbfff)));
}

inline void load_e4m3(const uint8_t* p, F32x16& a, F32x16& b, MaxBits& most) {
    const __m256i x = load256(p);
    most.take8(x);
    widen_halves(halves_of_e4m3(_mm256_castsi256_si128(x)), a);
    widen_halves(halves_of_e4m3(_mm256_extracti128_si256(x, 1)), b);
}

constexpr int kRowGroup = 1;

#elif defined(LLMFP_NEON)

struct F32x16 {
    float32x4_t v[4];
    static F32x16 zero() { return all(0.0f); }
    static F32x16 all(float x) {
        const float32x4_t q = vdupq_n_f32(x);
        return {{q, q, q, q}};
    }
    static F32x16 load(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
    void store(float* p) const {
        for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, v[i]);
    }
    friend F32x16 operator+(F32x16 a, F32x16 b) {
        for (int i = 0; i < 4; i++) a.v[i] = vaddq_f32(a.v[i], b.v[i]);
        return a;
    }
    friend F32x16 operator*(F32x16 a, F32x16 b) {
        for (int i = 0; i < 4; i++) a.v[i] = vmulq_f32(a.v[i], b.v[i]);
        return a;
    }
    static F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
        for (int i = 0; i < 4; i++) c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]);
        return c;
    }
    void add_to(double* p) const {
        for (int i = 0; i < 4; i++) {
            vst1q_f64(p + 4 * i, vaddq_f64(vld1q_f64(p + 4 * i), vcvt_f64_f32(vget_low_f32(v[i]))));
            vst1q_f64(p + 4 * i + 2, vaddq_f64(vld1q_f64(p + 4 * i + 2), vcvt_high_f64_f32(v[i])));
        }
    }
};

struct MaxBits {
    uint32x4_t v = vdupq_n_u32(0);
    void take32(uint32x4_t x) { v = vmaxq_u32(v, vandq_u32(x, vdupq_n_u32(0x7fffffffu))); }
    void take16(uint16x8_t x) {
        v = vreinterpretq_u32_u16(vmaxq_u16(vreinterpretq_u16_u32(v), vandq_u16(x, vdupq_n_u16(0x7fff))));
    }
    void take8(uint8x16_t x) {
        v = vreinterpretq_u32_u8(vmaxq_u8(vreinterpretq_u8_u32(v), vandq_u8(x, vdupq_n_u8(127))));
    }
    template <typename T> uint32_t largest() const {
        T lanes[16 / sizeof(T)];
        std::memcpy(lanes, &v, 16);
        uint32_t most = 0;
        for (T lane : lanes) most = lane > most ? lane : most;
        return most;
    }
};

inline void load_bf16(const uint8_t* p, F32x16& a, F32x16& b, MaxBits& most) {
    for (int i = 0; i < 4; i++) {
        const uint32x4_t x = vreinterpretq_u32_u8(vld1q_u8(p + 16 * i));
        most.take16(vreinterpretq_u16_u32(x));
        a.v[i] = vreinterpretq_f32_u32(vshlq_n_u32(x, 16));
        b.v[i] = vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000u)));
    }
}

inline void widen_halves(uint16x8_t x, F32x16& out, int at) {
    out.v[at] = vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(x)));
    out.v[at + 1] = vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(x)));
}

inline void load_f16(const uint8_t* p, F32x16& a, F32x16& b, MaxBits& most) {
    for (int i = 0; i < 4; i++) {
        const uint16x8_t x = vreinterpretq_u16_u8(vld1q_u8(p + 16 * i));
        most.take16(x);
        widen_halves(x, i < 2 ? a : b, 2 * (i & 1));
    }
}

inline void load_f32(const uint8_t* p, F32x16& a, F32x16& b, MaxBits& most) {
    for (int i = 0; i < 8; i++) {
        const uint32x4_t x = vreinterpretq_u32_u8(vld1q_u8(p + 16 * i));
        most.take32(x);
        (i < 4 ? a : b).v[i & 3] = vreinterpretq_f32_u32(x);
    }
}

inline void load_e5m2(const uint8_t* p, F32x16& a, F32x16& b, MaxBits& most) {
    for (int i = 0; i < 2; i++) {
        const uint8x16_t x = vld1q_u8(p + 16 * i);
        most.take8(x);
        widen_halves(vshll_n_u8(vget_low_u8(x), 8), i ? b : a, 0);
        widen_halves(vshll_n_u8(vget_high_u8(x), 8), i ? b : a, 2);
    }
}

inline uint16x8_t halves_of_e4m3(uint8x8_t x) {
    const int16x8_t wide = vshlq_n_s16(vmovl_s8(vreinterpret_s8_u8(x)), 7);
    return vandq_u16(vreinterpretq_u16_s16(wide), vdupq_n_u16(0xbfff));
}

inline void load_e4m3(const uint8_t* p, F32x16& a, F32x16& b, MaxBits& most) {
    for (int i = 0; i < 2; i++) {
        const uint8x16_t x = vld1q_u8(p + 16 * i);
        most.take8(x);
        widen_halves(halves_of_e4m3(vget_low_u8(x)), i ? b : a, 0);
        widen_halves(halves_of_e4m3(vget_high_u8(x)), i ? b : a, 2);
    }
}

constexpr int kRowGroup = 1;

#else  // scalar

struct F32x16 {
    float v[16];
    static F32x16 zero() { return all(0.0f); }
    static F32x16 all(float x) {
        F32x16 r;
        for (float& lane : r.v) lane = x;
        return r;
    }
    static F32x16 load(const float* p) {
        F32x16 r;
        std::memcpy(r.v, p, sizeof r.v);
        return r;
    }
    void store(float* p) const { std::memcpy(p, v, sizeof v); }
    friend F32x16 operator+(F32x16 a, F32x16 b) {
        for (int i = 0; i < 16; i++) a.v[i] += b.v[i];
        return a;
    }
    friend F32x16 operator*(F32x16 a, F32x16 b) {
        for (int i = 0; i < 16; i++) a.v[i] *= b.v[i];
        return a;
    }
    static F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
        for (int i = 0; i < 16; i++) c.v[i] = std::fma(a.v[i], b.v[i], c.v[i]);
        return c;
    }
    void add_to(double* p) const {
        for (int i = 0; i < 16; i++) p[i] += static_cast<double>(v[i]);
    }
};

struct MaxBits {
    uint32_t v = 0;
    void take(uint32_t magnitude) { v = magnitude > v ? magnitude : v; }
    template <typename T> uint32_t largest() const { return v; }
};

template <typename Bits, typename Widen>
inline void load_scalar(const uint8_t* p, float* a, float* b, MaxBits& most, Bits sign, Widen widen) {
    for (int i = 0; i < 32; i++) {
        Bits x;
        std::memcpy(&x, p + sizeof(Bits) * i, sizeof(Bits));
        most.take(x & static_cast<Bits>(~sign));
        (i < 16 ? a[i] : b[i - 16]) = widen(x);
    }
}

inline void load_bf16(const uint8_t* p, F32x16& a, F32x16& b, MaxBits& most) {
    for (int i = 0; i < 16; i++) {
        uint16_t x[2];
        std::memcpy(x, p + 4 * i, 4);
        most.take(x[0] & 0x7fffu);
        most.take(x[1] & 0x7fffu);
        a.v[i] = float_of(static_cast<uint32_t>(x[0]) << 16);
        b.v[i] = float_of(static_cast<uint32_t>(x[1]) << 16);
    }
}

inline void load_f16(const uint8_t* p, F32x16& a, F32x16& b, MaxBits& most) {
    load_scalar(p, a.v, b.v, most, uint16_t{0x8000}, float_of_half);
}

inline void load_f32(const uint8_t* p, F32x16& a, F32x16& b, MaxBits& most) {
    load_scalar(p, a.v, b.v, most, uint32_t{0x80000000u}, float_of);
}

inline void load_e5m2(const uint8_t* p, F32x16& a, F32x16& b, MaxBits& most) {
    load_scalar(p, a.v, b.v, most, uint8_t{0x80}, [](uint8_t x) { return float_of_half(static_cast<uint16_t>(x << 8)); });
}

inline void load_e4m3(const uint8_t* p, F32x16& a, F32x16& b, MaxBits& most) {
    load_scalar(p, a.v, b.v, most, uint8_t{0x80}, [](uint8_t x) {
        return float_of_half(static_cast<uint16_t>(((x & 0x80u) << 8) | ((x & 0x7fu) << 7)));
    });
}

constexpr int kRowGroup = 1;

#endif

// The stored types: how to load 32, what one element is exactly, and what is not finite.
// `kScale`: float16 stands in for e4m3 at 2^-8 of its value, undone once per sum instead of once per element.
struct BF16 {
    using Bits = uint16_t;
    static constexpr Bits kNonfinite = 0x7f80;
    static constexpr double kScale = 1.0;
    static constexpr int slot(int column) { return (column & 1) * 16 + (column >> 1); }
    static void load(const uint8_t* p, F32x16& a, F32x16& b, MaxBits& most) { load_bf16(p, a, b, most); }
    static double value(Bits x) { return float_of(static_cast<uint32_t>(x) << 16); }
};

struct F16 {
    using Bits = uint16_t;
    static constexpr Bits kNonfinite = 0x7c00;
    static constexpr double kScale = 1.0;
    static constexpr int slot(int column) { return column; }
    static void load(const uint8_t* p, F32x16& a, F32x16& b, MaxBits& most) { load_f16(p, a, b, most); }
    static double value(Bits x) { return float_of_half(x); }
};

struct F32 {
    using Bits = uint32_t;
    static constexpr Bits kNonfinite = 0x7f800000u;
    static constexpr double kScale = 1.0;
    static constexpr int slot(int column) { return column; }
    static void load(const uint8_t* p, F32x16& a, F32x16& b, MaxBits& most) { load_f32(p, a, b, most); }
    static double value(Bits x) { return float_of(x); }
};

struct E5M2 {
    using Bits = uint8_t;
    static constexpr Bits kNonfinite = 0x7c;
    static constexpr double kScale = 1.0;
    static constexpr int slot(int column) { return column; }
    static void load(const uint8_t* p, F32x16& a, F32x16& b, MaxBits& most) { load_e5m2(p, a, b, most); }
    static double value(Bits x) { return float_of_half(static_cast<uint16_t>(x << 8)); }
};

struct E4M3 {
    using Bits = uint8_t;
    static constexpr Bits kNonfinite = 0x7f;
    static constexpr double kScale = 256.0;
    static constexpr int slot(int column) { return column; }
    static void load(const uint8_t* p, F32x16& a, F32x16& b, MaxBits& most) { load_e4m3(p, a, b, most); }
    static double value(Bits x) {
        if ((x & 0x7f) == 0x7f) return std::nan("");
        return 256.0 * float_of_half(static_cast<uint16_t>(((x & 0x80u) << 8) | ((x & 0x7fu) << 7)));
    }
};

struct F64 {
    using Bits = uint64_t;
    static double value(Bits x) {
        double value;
        std::memcpy(&value, &x, 8);
        return value;
    }
};

}  // namespace
