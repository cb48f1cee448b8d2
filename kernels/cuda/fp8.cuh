// Eight-bit floats, e4m3 (a sign, 4 bits of exponent, 3 of mantissa; up to 448): to 16 bits exactly, and back.
#pragma once
#include <cuda_fp8.h>

#include "common.cuh"

// Pairs (0,1) and (2,3) of four values. Moved to where a 16-bit float has its exponent, they lack the difference of the two
// biases, 120 for brain floats and 8 for halves: one exact product, of subnormal values too.
template <typename T> __device__ __forceinline__ void widen(uint32_t four, uint32_t *pairs);
template <> __device__ __forceinline__ void widen<__nv_bfloat16>(uint32_t four, uint32_t *pairs) {
    const uint32_t factor = 0x7b807b80u; // 2^120
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t high = __byte_perm(four, 0, i ? 0x3424 : 0x1404); // each in the upper byte of its half
        const uint32_t moved = (high & 0x80008000u) | ((high & 0x7f007f00u) >> 4);
        const __nv_bfloat162 value = __hmul2(*reinterpret_cast<const __nv_bfloat162 *>(&moved), *reinterpret_cast<const __nv_bfloat162 *>(&factor));
        pairs[i] = *reinterpret_cast<const uint32_t *>(&value);
    }
}
template <> __device__ __forceinline__ void widen<__half>(uint32_t four, uint32_t *pairs) {
#if __CUDA_ARCH__ >= 890
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b;}" : "=r"(pairs[0]), "=r"(pairs[1]) : "r"(four));
#else
    const uint32_t factor = 0x5c005c00u; // 2^8
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t high = __byte_perm(four, 0, i ? 0x3424 : 0x1404);
        const uint32_t moved = (high & 0x80008000u) | ((high & 0x7f007f00u) >> 1);
        const __half2 value = __hmul2(*reinterpret_cast<const __half2 *>(&moved), *reinterpret_cast<const __half2 *>(&factor));
        pairs[i] = *reinterpret_cast<const uint32_t *>(&value);
    }
#endif
}

// Sixteen neighbours.
template <typename T> __device__ __forceinline__ void widen(const uint4 &bytes, Vec8 *low, Vec8 *high) {
    widen<T>(bytes.x, low->w), widen<T>(bytes.y, low->w + 2);
    widen<T>(bytes.z, high->w), widen<T>(bytes.w, high->w + 2);
}

// A pair of T as a pair of halves; what is larger than the largest half becomes it.
template <typename T> __device__ __forceinline__ uint32_t to_halves(uint32_t pair);
template <> __device__ __forceinline__ uint32_t to_halves<__half>(uint32_t pair) { return pair; }
template <> __device__ __forceinline__ uint32_t to_halves<__nv_bfloat16>(uint32_t pair) {
    const float2 v = Num<__nv_bfloat16>::unpack(pair);
    auto cut = [](float v) { return fabsf(v) > 65504.f ? copysignf(65504.f, v) : v; };
    return Num<__half>::pack(cut(v.x), cut(v.y));
}

// The nearest two values, a in the lower byte; what is larger than the largest becomes it.
__device__ __forceinline__ uint16_t narrow(float a, float b) {
    return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
}
__device__ __forceinline__ uint8_t narrow(float a) { return __nv_cvt_float_to_fp8(a, __NV_SATFINITE, __NV_E4M3); }

// Values of T as a page stores them: as they are, or as eight-bit floats divided by a scale, whose inverse is given.
template <typename T, typename KV> struct Stored;
template <typename T> struct Stored<T, T> {
    using Eight = uint4; // eight neighbours
    static __device__ __forceinline__ Eight eight(const uint32_t *pairs, float) { return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]); }
    static __device__ __forceinline__ T one(T value, float) { return value; }
};
template <typename T> struct Stored<T, uint8_t> {
    using Eight = uint2;
    static __device__ __forceinline__ Eight eight(const uint32_t *pairs, float inverse) {
        uint32_t halves[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 two = Num<T>::unpack(pairs[j]);
            halves[j] = narrow(two.x * inverse, two.y * inverse);
        }
        return make_uint2(halves[0] | halves[1] << 16, halves[2] | halves[3] << 16);
    }
    static __device__ __forceinline__ uint8_t one(T value, float inverse) { return narrow(Num<T>::to(value) * inverse); }
};
