// Products with few rows (decode): y[m][n] = Σk x[m][k] · w[n][k], bound by reading w once.
//
// Blocks stay and walk over tiles of 16 rows of w; a block's warps share K among them. The weights are the A operand (16
// outputs), the tokens the B operand (8 a tile), so one token wastes no memory traffic. The order of k inside a product is free
// as long as both operands agree, so a lane takes 8 neighbouring values (16 bytes) and feeds two products with them.
// The first weights are on their way before the kernel waits for the one before it, and a tile's before the tile before it is
// finished.
//
// Where x is normed, bf16 rows are multiplied by the norm's weights on their way in and by their scale at the end; halves, whose
// range that could leave, by both on their way in.
#include "skinny.cuh"

template <typename T, int TILES, int UNROLL, bool NORM, Output OUTPUT> __device__ __forceinline__ void skinny(const Skinny &p) {
    using N = Num<T>;
    constexpr int M = 8 * TILES, TILE_ROWS = OUTPUT == SILU_MUL ? 8 : 16, HALF = 4;
    constexpr bool STAYS = TILES > 1 || UNROLL > 4; // else a block has one tile: less code, which matters where that is short
    constexpr bool LATE_SCALE = NORM && N::WIDE_RANGE;
    __shared__ float scales[M];
    __shared__ float partial[STAYS ? 2 : 1][WARPS][16][M + 1];
    __shared__ int tile_after_next[2];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    const int blocks = p.k / 32, share = (blocks + WARPS - 1) / WARPS;
    const int begin = min(warp * share, blocks), end = min(begin + share, blocks);
    const int tiles = (p.n + TILE_ROWS - 1) / TILE_ROWS;
    const T *w0, *w1; // of the tile that is loaded
    const auto find_rows = [&](int tile) {
        int row0, row1;
        tile_rows<OUTPUT>(p, tile, group, &row0, &row1);
        w0 = static_cast<const T *>(p.weight) + (long)row0 * p.k + quad * 8;
        w1 = static_cast<const T *>(p.weight) + (long)row1 * p.k + quad * 8;
    };
    find_rows(blockIdx.x);
    Vec8 a0[UNROLL], a1[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        const int b = min(begin + u, blocks - 1);
        a0[u].v = load_stream(w0 + b * 32);
        a1[u].v = load_stream(w1 + b * 32);
    }
    let_next_start();
    wait_for_previous();
    float scale[TILES];
    if (NORM) norm_scales(p, scales);
    if (NORM && !LATE_SCALE) {
        __syncthreads();
#pragma unroll
        for (int t = 0; t < TILES; t++) scale[t] = t * 8 + group < p.m ? scales[t * 8 + group] : 1.f;
    }

    int buffer = 0, next_tile = STAYS ? blockIdx.x + gridDim.x : tiles;
    for (int tile = blockIdx.x; tile < tiles; buffer ^= STAYS) {
        // Tiles behind the second one go to whoever asks first, early enough to be known when their weights are asked for.
        int ticket = 0;
        const bool asks = STAYS && p.tickets && next_tile < tiles && threadIdx.x == 0;
        if (asks) ticket = atomicAdd(p.tickets, 1);
        float acc[TILES][4];
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) acc[t][i] = 0.f;
        for (int base = begin; base < end; base += UNROLL) {
            // What is loaded in place of what is multiplied: the tile's further steps, behind them the next tile's first ones.
            const bool last = base + UNROLL >= end, more = !last || (STAYS && next_tile < tiles);
            const int next = STAYS && last ? begin : base + UNROLL;
            if (STAYS && last && more) find_rows(next_tile);
#pragma unroll
            for (int half = 0; half < UNROLL; half += HALF) {
                // Some steps' loads of all tokens first: products that each waited for their own would leave the weights waiting.
                Vec8 x[HALF][TILES], norm[HALF];
#pragma unroll
                for (int u = 0; u < HALF; u++) {
                    const long at = min(base + half + u, blocks - 1) * 32 + quad * 8;
                    if (NORM) norm[u].v = *reinterpret_cast<const uint4 *>(static_cast<const T *>(p.norm) + at);
#pragma unroll
                    for (int t = 0; t < TILES; t++) {
                        x[u][t].v = make_uint4(0, 0, 0, 0);
                        if (t * 8 + group < p.m) x[u][t].v = *reinterpret_cast<const uint4 *>(static_cast<const T *>(p.x) + (long)(t * 8 + group) * p.k + at);
                    }
                }
                if (NORM) {
#pragma unroll
                    for (int u = 0; u < HALF; u++)
#pragma unroll
                        for (int t = 0; t < TILES; t++) {
                            if (LATE_SCALE) {
#pragma unroll
                                for (int j = 0; j < 4; j++) x[u][t].w[j] = N::multiply(x[u][t].w[j], norm[u].w[j]);
                            } else {
                                apply_norm<T>(&x[u][t], norm[u], scale[t]);
                            }
                        }
                }
#pragma unroll
                for (int u = 0; u < HALF; u++) {
                    Vec8 &low = a0[half + u], &high = a1[half + u];
                    if (base + half + u < end) {
                        const uint32_t first[4] = {low.w[0], high.w[0], low.w[1], high.w[1]};
                        const uint32_t second[4] = {low.w[2], high.w[2], low.w[3], high.w[3]};
#pragma unroll
                        for (int t = 0; t < TILES; t++) {
                            N::mma(acc[t], first, x[u][t].w[0], x[u][t].w[1]);
                            N::mma(acc[t], second, x[u][t].w[2], x[u][t].w[3]);
                        }
                    }
                    const int load = next + half + u;
                    if (more && load < end) {
                        low.v = load_stream(w0 + load * 32);
                        high.v = load_stream(w1 + load * 32);
                    }
                }
            }
        }
        if (LATE_SCALE && tile == blockIdx.x) __syncthreads(); // for `scales`, long since there
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int m = t * 8 + quad * 2 + i % 2;
                partial[buffer][warp][group + i / 2 * 8][m] = LATE_SCALE && m < p.m ? acc[t][i] * scales[m] : acc[t][i];
            }
        if (asks) {
            tile_after_next[buffer] = 2 * (int)gridDim.x + ticket;
            // Each block asks once in vain; after the last of them the counter is as it was.
            if (ticket == tiles - (int)gridDim.x - 1) *p.tickets = 0;
        }
        // One barrier a tile: the other buffer is written again only behind the next one.
        __syncthreads();
        finish_tile<T, M, OUTPUT>(p, partial[buffer], tile);
        if (!STAYS) break;
        tile = next_tile;
        if (next_tile < tiles) next_tile = p.tickets ? tile_after_next[buffer] : next_tile + (int)gridDim.x;
    }
}

template <int TILES, int UNROLL> constexpr int BLOCKS = TILES > 2 ? 1 : TILES == 1 && UNROLL == 4 ? 3 : 2; // on a multiprocessor

// Names end in the tiles of tokens and how many steps are in flight: 8 with two blocks on a multiprocessor, 4 with three.
#define DEFINE_ONE(SUFFIX, T, TILES, UNROLL, NAME, OUTPUT)                                                                      \
    extern "C" __global__ void __launch_bounds__(256, BLOCKS<TILES, UNROLL>) NAME##_##TILES##x##UNROLL##_##SUFFIX(               \
        const __grid_constant__ Skinny p) {                                                                                     \
        skinny<T, TILES, UNROLL, false, OUTPUT>(p);                                                                             \
    }                                                                                                                           \
    extern "C" __global__ void __launch_bounds__(256, BLOCKS<TILES, UNROLL>)                                                    \
        NAME##_norm_##TILES##x##UNROLL##_##SUFFIX(const __grid_constant__ Skinny p) {                                           \
        skinny<T, TILES, UNROLL, true, OUTPUT>(p);                                                                              \
    }
#define DEFINE_TILES(SUFFIX, T, TILES, UNROLL)                                                                                  \
    DEFINE_ONE(SUFFIX, T, TILES, UNROLL, skinny_store, STORE)                                                                   \
    DEFINE_ONE(SUFFIX, T, TILES, UNROLL, skinny_f32, STORE_F32)                                                                 \
    DEFINE_ONE(SUFFIX, T, TILES, UNROLL, skinny_add, ADD_RESIDUAL)                                                              \
    DEFINE_ONE(SUFFIX, T, TILES, UNROLL, skinny_silu, SILU_MUL)
#define DEFINE(SUFFIX, T) DEFINE_TILES(SUFFIX, T, 1, 8) DEFINE_TILES(SUFFIX, T, 1, 4) DEFINE_TILES(SUFFIX, T, 2, 4) DEFINE_TILES(SUFFIX, T, 4, 4)
FOR_BOTH(DEFINE)
