// Eight-bit weights, turned into 16 bits, and multiplied as they are by few rows (decode); and rows of eight-bit floats for
// cuBLASLt's products with many.
//
// Floats (e4m3) have a scale for each row of the matrix, in f32, which the sum is multiplied with. Integers have a cell for each
// group of 16·2^n columns and row: w = q · scale + offset, a pair of halves.
#include "fp8.cuh"
#include "skinny.cuh"

struct Fp8 {
    static constexpr bool CELLS = false;
    template <typename T> static __device__ __forceinline__ void decode(uint32_t four, uint32_t, uint32_t *pairs) { widen<T>(four, pairs); }
};
struct Int8 {
    static constexpr bool CELLS = true;
    // 0x6400 | (q + 128) is 1152 + q in fp16.
    template <typename T> static __device__ __forceinline__ void decode(uint32_t four, uint32_t cell, uint32_t *pairs) {
        const __half2 both = *reinterpret_cast<const __half2 *>(&cell), scale = __low2half2(both), offset = __high2half2(both);
        const __half2 bias = __float2half2_rn(1152.f);
        const uint32_t raised = four ^ 0x80808080u;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t bits = __byte_perm(raised, 0x64646464u, i ? 0x4342 : 0x4140);
            const __half2 value = __hfma2(__hsub2(*reinterpret_cast<const __half2 *>(&bits), bias), scale, offset);
            pairs[i] = *reinterpret_cast<const uint32_t *>(&value);
        }
    }
};

// y[m][n] = Σk x[m][k] · w[n][k] as in skinny_gemm.cu: a lane takes 16 neighbouring values (16 bytes) of a row, a quad 64.
template <typename W, typename T, int TILES, Output OUTPUT> __device__ __forceinline__ void skinny_eight_bit(const Skinny &p) {
    using N = Num<T>;
    constexpr int M = 8 * TILES;
    constexpr int UNROLL = TILES == 1 ? 4 : 2; // blocks of 64 k in flight per warp
    __shared__ float scales[M];
    __shared__ float partial[WARPS][16][M + 1];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    const int chunks = p.k / 16, blocks = (chunks + 3) / 4, share = (blocks + WARPS - 1) / WARPS;
    const int begin = warp * share, end = min(begin + share, blocks);
    const long weight_rows = OUTPUT == SILU_MUL ? 2L * p.n : p.n;
    int rows[2];
    tile_rows<OUTPUT>(p, blockIdx.x, group, &rows[0], &rows[1]);
    const uint4 *w[2];
#pragma unroll
    for (int i = 0; i < 2; i++) w[i] = static_cast<const uint4 *>(p.weight) + (long)rows[i] * chunks;
    Vec8 a[UNROLL][2];
    uint32_t cells[UNROLL][2];
    const auto load = [&](int u, int block) {
        // Behind the end of a row x is zero, so that any finite weight will do.
        const int chunk = min(block * 4 + quad, chunks - 1);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            a[u][i].v = load_stream(w[i] + chunk);
            cells[u][i] = W::CELLS ? __ldg(p.cells + (long)(chunk >> p.group_shift) * weight_rows + rows[i]) : 0;
        }
    };
#pragma unroll
    for (int u = 0; u < UNROLL; u++) load(u, min(begin + u, blocks - 1));
    let_next_start();
    wait_for_previous();
    if (p.norm) {
        norm_scales(p, scales);
        __syncthreads();
    }
    float acc[TILES][4];
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[t][i] = 0.f;
    float scale[TILES];
#pragma unroll
    for (int t = 0; t < TILES; t++) scale[t] = p.norm && t * 8 + group < p.m ? scales[t * 8 + group] : 1.f;

    for (int base = begin; base < end; base += UNROLL) {
        // All tokens' loads of a round first, so that the products do not each wait for their own.
        Vec8 x[UNROLL][2][TILES];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int chunk = (base + u) * 4 + quad;
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                const bool valid = chunk < chunks && t * 8 + group < p.m;
                const uint4 *from = reinterpret_cast<const uint4 *>(static_cast<const T *>(p.x) + (long)(t * 8 + group) * p.k);
#pragma unroll
                for (int h = 0; h < 2; h++) x[u][h][t].v = valid ? from[chunk * 2 + h] : make_uint4(0, 0, 0, 0);
            }
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            if (base + u < end) {
                const int chunk = min((base + u) * 4 + quad, chunks - 1);
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    if (p.norm) {
                        Vec8 norm;
                        norm.v = reinterpret_cast<const uint4 *>(p.norm)[chunk * 2 + h];
#pragma unroll
                        for (int t = 0; t < TILES; t++) apply_norm<T>(&x[u][h][t], norm, scale[t]);
                    }
                    uint32_t low[4], high[4];
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        W::template decode<T>(a[u][0].w[h * 2 + i], cells[u][0], low + 2 * i);
                        W::template decode<T>(a[u][1].w[h * 2 + i], cells[u][1], high + 2 * i);
                    }
                    const uint32_t first[4] = {low[0], high[0], low[1], high[1]};
                    const uint32_t second[4] = {low[2], high[2], low[3], high[3]};
#pragma unroll
                    for (int t = 0; t < TILES; t++) {
                        N::mma(acc[t], first, x[u][h][t].w[0], x[u][h][t].w[1]);
                        N::mma(acc[t], second, x[u][h][t].w[2], x[u][h][t].w[3]);
                    }
                }
            }
            if (base + u + UNROLL < end) load(u, base + u + UNROLL);
        }
    }
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) partial[warp][group + i / 2 * 8][t * 8 + quad * 2 + i % 2] = acc[t][i];
    __syncthreads();
    finish_tile<T, M, OUTPUT>(p, partial, blockIdx.x);
}

// out[n][16·chunks] from weight[n][chunks] of 16 values. One thread per chunk.
template <typename W, typename T>
__device__ __forceinline__ void dequantize(const uint4 *weight, const float *row_scales, const uint32_t *cells, uint4 *out, int n, int chunks,
                                           int group_shift) {
    using N = Num<T>;
    let_next_start();
    const long row = blockIdx.x;
    const int chunk = blockIdx.y * blockDim.x + threadIdx.x;
    if (chunk >= chunks) return;
    // Weights may be read before the earlier kernels end; `out` may still be in use by one of them.
    Vec8 from, to[2];
    from.v = load_stream(weight + row * chunks + chunk);
    const uint32_t cell = W::CELLS ? __ldg(cells + (long)(chunk >> group_shift) * n + row) : 0;
    const float scale = W::CELLS ? 1.f : row_scales[row];
#pragma unroll
    for (int i = 0; i < 4; i++) W::template decode<T>(from.w[i], cell, to[i / 2].w + i % 2 * 2);
    if (!W::CELLS) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float2 v = N::unpack(to[i / 4].w[i % 4]);
            to[i / 4].w[i % 4] = N::pack(v.x * scale, v.y * scale);
        }
    }
    wait_for_previous();
    out[(row * chunks + chunk) * 2] = to[0].v;
    out[(row * chunks + chunk) * 2 + 1] = to[1].v;
}

// Rows as e4m3 with a scale each, their largest value / 448: one block per row of k values, k a multiple of 8.
template <typename T> __device__ __forceinline__ void quantize_rows(const T *x, uint2 *q, float *scales, int k) {
    using N = Num<T>;
    __shared__ float largest[33];
    let_next_start();
    wait_for_previous();
    const uint4 *from = reinterpret_cast<const uint4 *>(x + (long)blockIdx.x * k);
    const int vectors = k / 8, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float most = 0.f;
    for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
        Vec8 v;
        v.v = from[i];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 pair = N::unpack(v.w[j]);
            most = fmaxf(most, fmaxf(fabsf(pair.x), fabsf(pair.y)));
        }
    }
    most = warp_max(most);
    if (lane == 0) largest[warp] = most;
    __syncthreads();
    if (warp == 0) {
        most = warp_max(lane < blockDim.x / 32 ? largest[lane] : 0.f);
        if (lane == 0) largest[32] = most;
    }
    __syncthreads();
    most = fmaxf(largest[32], 1e-20f);
    if (threadIdx.x == 0) scales[blockIdx.x] = most / 448.f;
    const float factor = 448.f / most;
    for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
        Vec8 v;
        v.v = from[i];
        uint32_t words[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float2 a = N::unpack(v.w[2 * j]), b = N::unpack(v.w[2 * j + 1]);
            words[j] = narrow(a.x * factor, a.y * factor) | (uint32_t)narrow(b.x * factor, b.y * factor) << 16;
        }
        q[(long)blockIdx.x * vectors + i] = make_uint2(words[0], words[1]);
    }
}

#define DEFINE_TILES(NAME, W, SUFFIX, T, TILES)                                                                                    \
    extern "C" __global__ void __launch_bounds__(256) NAME##_store_##TILES##_##SUFFIX(const __grid_constant__ Skinny p) {          \
        skinny_eight_bit<W, T, TILES, STORE>(p);                                                                                   \
    }                                                                                                                              \
    extern "C" __global__ void __launch_bounds__(256) NAME##_add_##TILES##_##SUFFIX(const __grid_constant__ Skinny p) {            \
        skinny_eight_bit<W, T, TILES, ADD_RESIDUAL>(p);                                                                            \
    }                                                                                                                              \
    extern "C" __global__ void __launch_bounds__(256) NAME##_silu_##TILES##_##SUFFIX(const __grid_constant__ Skinny p) {           \
        skinny_eight_bit<W, T, TILES, SILU_MUL>(p);                                                                                \
    }
#define DEFINE_WEIGHTS(NAME, W, SUFFIX, T)                                                                                         \
    DEFINE_TILES(NAME, W, SUFFIX, T, 1)                                                                                            \
    DEFINE_TILES(NAME, W, SUFFIX, T, 2)                                                                                            \
    DEFINE_TILES(NAME, W, SUFFIX, T, 4)                                                                                            \
    extern "C" __global__ void NAME##_dequantize_##SUFFIX(const uint4 *weight, const float *row_scales, const uint32_t *cells,     \
                                                          uint4 *out, int n, int chunks, int group_shift) {                        \
        dequantize<W, T>(weight, row_scales, cells, out, n, chunks, group_shift);                                                  \
    }
#define DEFINE(SUFFIX, T)                                                                                                          \
    DEFINE_WEIGHTS(fp8, Fp8, SUFFIX, T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(256) fp8_quantize_rows_##SUFFIX(const T *x, uint2 *q, float *scales, int k) {     \
        quantize_rows<T>(x, q, scales, k);                                                                                         \
    }
FOR_BOTH(DEFINE)
DEFINE_WEIGHTS(int8, Int8, f16, __half)
