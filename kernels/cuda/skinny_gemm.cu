// Products with few rows (decode): y[m][n] = Σk x[m][k] · w[n][k], bound by reading w once.
//
// A block owns 16 rows of w and its warps share K among them. The weights are the A operand (16 outputs), the tokens the
// B operand (8 a tile), so one token wastes no memory traffic. The order of k inside a product is free as long as both
// operands agree, so a lane takes 8 neighbouring values (16 bytes) and feeds two products with them.
// The first weights are on their way before the kernel waits for the one before it.
#include "skinny.cuh"

template <typename T, int TILES, Output OUTPUT> __device__ __forceinline__ void skinny(const Skinny &p) {
    using N = Num<T>;
    constexpr int M = 8 * TILES;
    constexpr int UNROLL = TILES == 1 ? 8 : 4; // blocks of 32 k in flight per warp
    __shared__ float scales[M];
    __shared__ float partial[WARPS][16][M + 1];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    const int blocks = p.k / 32, share = (blocks + WARPS - 1) / WARPS;
    const int begin = warp * share, end = min(begin + share, blocks);
    int row0, row1;
    tile_rows<OUTPUT>(p, blockIdx.x, group, &row0, &row1);
    const T *w0 = static_cast<const T *>(p.weight) + (long)row0 * p.k + quad * 8;
    const T *w1 = static_cast<const T *>(p.weight) + (long)row1 * p.k + quad * 8;
    Vec8 a0[UNROLL], a1[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        const int b = min(begin + u, blocks - 1);
        a0[u].v = load_stream(w0 + b * 32);
        a1[u].v = load_stream(w1 + b * 32);
    }
    let_next_start();
    wait_for_previous();
    if (p.norm) norm_scales(p, scales);
    float acc[TILES][4];
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[t][i] = 0.f;
    float scale[TILES];
#pragma unroll
    for (int t = 0; t < TILES; t++) scale[t] = p.norm && t * 8 + group < p.m ? scales[t * 8 + group] : 1.f;

    for (int base = begin; base < end; base += UNROLL) {
        // All tokens' loads of a round first: products that each waited for their own would leave the weights waiting.
        Vec8 x[UNROLL][TILES];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const long at = min(base + u, blocks - 1) * 32 + quad * 8;
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                x[u][t].v = make_uint4(0, 0, 0, 0);
                if (t * 8 + group < p.m) x[u][t].v = *reinterpret_cast<const uint4 *>(static_cast<const T *>(p.x) + (long)(t * 8 + group) * p.k + at);
            }
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int b = base + u;
            if (b < end) {
                const uint32_t first[4] = {a0[u].w[0], a1[u].w[0], a0[u].w[1], a1[u].w[1]};
                const uint32_t second[4] = {a0[u].w[2], a1[u].w[2], a0[u].w[3], a1[u].w[3]};
                if (p.norm) {
                    Vec8 norm;
                    norm.v = *reinterpret_cast<const uint4 *>(static_cast<const T *>(p.norm) + b * 32 + quad * 8);
#pragma unroll
                    for (int t = 0; t < TILES; t++) apply_norm<T>(&x[u][t], norm, scale[t]);
                }
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    N::mma(acc[t], first, x[u][t].w[0], x[u][t].w[1]);
                    N::mma(acc[t], second, x[u][t].w[2], x[u][t].w[3]);
                }
            }
            const int next = base + u + UNROLL;
            if (next < end) {
                a0[u].v = load_stream(w0 + next * 32);
                a1[u].v = load_stream(w1 + next * 32);
            }
        }
    }
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        partial[warp][group][t * 8 + quad * 2] = acc[t][0];
        partial[warp][group][t * 8 + quad * 2 + 1] = acc[t][1];
        partial[warp][group + 8][t * 8 + quad * 2] = acc[t][2];
        partial[warp][group + 8][t * 8 + quad * 2 + 1] = acc[t][3];
    }
    __syncthreads();
    finish_tile<T, M, OUTPUT>(p, partial, blockIdx.x);
}

#define DEFINE_TILES(SUFFIX, T, TILES)                                                                                          \
    extern "C" __global__ void __launch_bounds__(256) skinny_store_##TILES##_##SUFFIX(const __grid_constant__ Skinny p) {       \
        skinny<T, TILES, STORE>(p);                                                                                             \
    }                                                                                                                           \
    extern "C" __global__ void __launch_bounds__(256) skinny_f32_##TILES##_##SUFFIX(const __grid_constant__ Skinny p) {         \
        skinny<T, TILES, STORE_F32>(p);                                                                                         \
    }                                                                                                                           \
    extern "C" __global__ void __launch_bounds__(256) skinny_add_##TILES##_##SUFFIX(const __grid_constant__ Skinny p) {         \
        skinny<T, TILES, ADD_RESIDUAL>(p);                                                                                      \
    }                                                                                                                           \
    extern "C" __global__ void __launch_bounds__(256) skinny_silu_##TILES##_##SUFFIX(const __grid_constant__ Skinny p) {        \
        skinny<T, TILES, SILU_MUL>(p);                                                                                          \
    }
#define DEFINE(SUFFIX, T) DEFINE_TILES(SUFFIX, T, 1) DEFINE_TILES(SUFFIX, T, 2) DEFINE_TILES(SUFFIX, T, 4)
FOR_BOTH(DEFINE)
