// Four-bit weights to 16 bits: w = (q - zero) * scale, rounded once. Bound by memory: half a byte in, two out, for each value.
#include "common.cuh"

// qweight[n][words], nibble j of a word (lowest first) is column 8·word + j; scales and zeros [groups][n]; out[n][8·words].
// One block column per row, one thread per word.
extern "C" __global__ void int4_dequantize(const uint32_t *qweight, const __half *scales, const uint8_t *zeros, uint4 *out, int n,
                                           int words, int words_per_group) {
    let_next_start();
    const long row = blockIdx.x;
    const int word = blockIdx.y * blockDim.x + threadIdx.x;
    if (word >= words) return;
    // Weights may be read before the earlier kernels end; `out` may still be in use by one of them.
    const long cell = (long)(word / words_per_group) * n + row;
    const uint32_t q = qweight[row * words + word];
    const float scale = __half2float(scales[cell]), zero = zeros[cell];
    Vec8 values;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float low = (q >> (8 * j)) & 15, high = (q >> (8 * j + 4)) & 15;
        values.w[j] = Num<__half>::pack((low - zero) * scale, (high - zero) * scale);
    }
    wait_for_previous();
    out[row * words + word] = values.v;
}
