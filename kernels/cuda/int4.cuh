// Four-bit weights as fp16.
//
// Four words hold 32 neighbouring columns: word q the columns 8b + 2q and 8b + 2q + 1, b = 0..3, in nibbles b and b + 4 (from the
// lowest), so that two neighbours come out of one masking as a pair. So a word has what the thread with place q in its quad takes of
// the 32 columns as the A operand of two products, in their order. A cell, one for each group and row, is a pair too: the scale,
// and 1024 + zero. Or, of weights w = q * scale + offset ("affine"), the scale and the offset.
#pragma once
#include "common.cuh"

// (a & mask) | bits, in one instruction: the compiler alone takes two where both are constants.
__device__ __forceinline__ uint32_t masked(uint32_t a, uint32_t mask, uint32_t bits) {
#ifdef __CUDA_ARCH__
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(a), "r"(mask), "r"(bits));
    return result;
#else
    return (a & mask) | bits;
#endif
}
__device__ __forceinline__ __half2 as_half2(uint32_t v) { return *reinterpret_cast<const __half2 *>(&v); }
__device__ __forceinline__ uint32_t as_word(__half2 v) { return *reinterpret_cast<const uint32_t *>(&v); }

// Pair b of a word, dequantised. 0x6400 | q is 1024 + q in fp16, and 0x6400 | 16q is 1024 + 16q: q - zero comes out of either
// exactly, the latter times 1/16, and its product with the scale, and the offset, are rounded once.
template <bool AFFINE> __device__ __forceinline__ uint32_t dequantized(uint32_t word, int b, uint32_t cell) {
    const __half2 scale = __low2half2(as_half2(cell)), second = __high2half2(as_half2(cell));
    const __half2 zero = AFFINE ? as_half2(0x64006400u) : second; // 1024 + z
    const uint32_t four = word >> (b / 2 * 8);
    __half2 q;
    if (b % 2 == 0) {
        q = __hsub2(as_half2(masked(four, 0x000f000fu, 0x64006400u)), zero);
    } else {
        const __half2 high_zero = __hsub2(as_half2(0x63806380u), zero); // 960 - (1024 + z) = -(64 + z)
        q = __hfma2(as_half2(masked(four, 0x00f000f0u, 0x64006400u)), as_half2(0x2c002c00u), high_zero);
    }
    return as_word(AFFINE ? __hfma2(q, scale, second) : __hmul2(q, scale));
}

// The same pair as integers q - zero, exact: their sums are to be multiplied with the scale. 0x5400 | 16q is 64 + q in fp16.
__device__ __forceinline__ uint32_t integers(uint32_t word, int b, __half2 zero, __half2 high_zero) {
    const uint32_t four = word >> (b / 2 * 8);
    if (b % 2 == 0) return as_word(__hsub2(as_half2(masked(four, 0x000f000fu, 0x64006400u)), zero));
    return as_word(__hsub2(as_half2(masked(four, 0x00f000f0u, 0x54005400u)), high_zero));
}

// The eight neighbouring columns 8b to 8b + 7 of four words.
template <bool AFFINE> __device__ __forceinline__ void dequantize_eight(const uint32_t *words, int b, uint32_t cell, uint32_t *pairs) {
#pragma unroll
    for (int q = 0; q < 4; q++) pairs[q] = dequantized<AFFINE>(words[q], b, cell);
}

// The steps of a block, from another one on: blocks that all read the same part of x at once would all ask the same part of the
// L2 cache.
struct Steps {
    int first, steps, begin;
    // Where the columns of a step are, in steps.
    __device__ __forceinline__ int place(int step) const { return first + (begin + step < steps ? begin + step : begin + step - steps); }
};

// Copies BYTES (4 or 16) to shared memory in the background; weights, read once.
template <int BYTES> __device__ __forceinline__ void copy_ahead(void *to, const void *from) {
    const uint32_t address = (uint32_t)__cvta_generic_to_shared(to);
    if (BYTES == 16) asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(from) : "memory");
}
