// Four-bit weights, w = (q - zero) * scale, fp16 beside them: turned into fp16, and multiplied as they are by few rows (decode).
#include "int4.cuh"
#include "skinny.cuh"

// out[n][8·words] from weight[n][words] and cells[groups][n]. One thread per word. Bound by memory: half a byte in, two out.
template <bool AFFINE>
__device__ __forceinline__ void dequantize_all(const uint32_t *weight, const uint32_t *cells, uint4 *out, int n, int words, int words_per_group) {
    let_next_start();
    const long row = blockIdx.x;
    const int word = blockIdx.y * blockDim.x + threadIdx.x;
    if (word >= words) return;
    // Weights may be read before the earlier kernels end; `out` may still be in use by one of them.
    Vec8 values;
    dequantize<AFFINE>(weight[row * words + word], cells[(long)(word / words_per_group) * n + row], values.w);
    wait_for_previous();
    out[row * words + word] = values.v;
}

// Words of random bits from a hash of (seed, index), all with the same cell, for models without weights.
extern "C" __global__ void int4_random(uint32_t *words, long count, uint32_t *cells, long cell_count, uint32_t cell, uint64_t seed) {
    const long first = (long)blockIdx.x * blockDim.x + threadIdx.x, step = (long)gridDim.x * blockDim.x;
    for (long i = first; i < count; i += step) {
        uint64_t x = (i + 1) * 0x9E3779B97F4A7C15ull + seed;
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
        x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
        words[i] = (uint32_t)(x >> 32);
    }
    for (long i = first; i < cell_count; i += step) cells[i] = cell;
}

// y[m][n] = Σk x[m][k] · w[n][k] as in skinny_gemm.cu, with 16·ROW_TILES rows of w in a block: the more tokens, the more rows
// share the reading of x. A lane takes 32 neighbouring values (16 bytes) of a row, a quad 128, and feeds eight products.
template <bool AFFINE, int TILES, int ROW_TILES, Output OUTPUT> __device__ __forceinline__ void skinny_int4(const Skinny &p) {
    using N = Num<__half>;
    constexpr int M = 8 * TILES;
    constexpr int UNROLL = 4 / ROW_TILES; // blocks of 128 k in flight per warp
    constexpr int AHEAD = TILES <= 2 ? 4 : 1; // vectors of a token that are loaded before the first is multiplied
    __shared__ float scales[M];
    __shared__ float partial[WARPS][16][M + 1];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    const int chunks = p.k / 32, blocks = (chunks + 3) / 4, share = (blocks + WARPS - 1) / WARPS;
    const int begin = warp * share, end = min(begin + share, blocks);
    const long weight_rows = OUTPUT == SILU_MUL ? 2L * p.n : p.n;
    int rows[ROW_TILES][2];
    const uint4 *w[ROW_TILES][2];
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
        tile_rows<OUTPUT>(p, blockIdx.x * ROW_TILES + r, group, &rows[r][0], &rows[r][1]);
#pragma unroll
        for (int i = 0; i < 2; i++) w[r][i] = static_cast<const uint4 *>(p.weight) + (long)rows[r][i] * chunks;
    }
    Vec8 a[UNROLL][ROW_TILES][2];
    uint32_t cells[UNROLL][ROW_TILES][2];
    const auto load = [&](int u, int block) {
        // Behind the end of a row x is zero, so that any finite weight will do.
        const int chunk = min(block * 4 + quad, chunks - 1);
        const long cell = (long)(chunk >> p.group_shift) * weight_rows;
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                a[u][r][i].v = load_stream(w[r][i] + chunk);
                cells[u][r][i] = __ldg(p.cells + cell + rows[r][i]);
            }
    };
#pragma unroll
    for (int u = 0; u < UNROLL; u++) load(u, min(begin + u, blocks - 1));
    let_next_start();
    wait_for_previous();
    if (p.norm) norm_scales(p, scales);
    float acc[ROW_TILES][TILES][4];
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) acc[r][t][i] = 0.f;
    float scale[TILES];
#pragma unroll
    for (int t = 0; t < TILES; t++) scale[t] = p.norm && t * 8 + group < p.m ? scales[t * 8 + group] : 1.f;

    for (int base = begin; base < end; base += UNROLL) {
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int chunk = (base + u) * 4 + quad;
            if (base + u < end) {
#pragma unroll
                for (int first = 0; first < 4; first += AHEAD) {
                    Vec8 x[AHEAD][TILES];
#pragma unroll
                    for (int i = 0; i < AHEAD; i++)
#pragma unroll
                        for (int t = 0; t < TILES; t++) {
                            const bool valid = chunk < chunks && t * 8 + group < p.m;
                            const uint4 *from = reinterpret_cast<const uint4 *>(static_cast<const __half *>(p.x) + (long)(t * 8 + group) * p.k);
                            x[i][t].v = valid ? from[chunk * 4 + first + i] : make_uint4(0, 0, 0, 0);
                        }
#pragma unroll
                    for (int i = 0; i < AHEAD; i++) {
                        if (p.norm) {
                            Vec8 norm;
                            norm.v = reinterpret_cast<const uint4 *>(p.norm)[min(chunk, chunks - 1) * 4 + first + i];
#pragma unroll
                            for (int t = 0; t < TILES; t++) apply_norm<__half>(&x[i][t], norm, scale[t]);
                        }
#pragma unroll
                        for (int r = 0; r < ROW_TILES; r++) {
                            uint32_t low[4], high[4];
                            dequantize<AFFINE>(a[u][r][0].w[first + i], cells[u][r][0], low);
                            dequantize<AFFINE>(a[u][r][1].w[first + i], cells[u][r][1], high);
                            const uint32_t even[4] = {low[0], high[0], low[1], high[1]};
                            const uint32_t odd[4] = {low[2], high[2], low[3], high[3]};
#pragma unroll
                            for (int t = 0; t < TILES; t++) {
                                N::mma(acc[r][t], even, x[i][t].w[0], x[i][t].w[1]);
                                N::mma(acc[r][t], odd, x[i][t].w[2], x[i][t].w[3]);
                            }
                        }
                    }
                }
            }
            if (base + u + UNROLL < end) load(u, base + u + UNROLL);
        }
    }
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
        if (r) __syncthreads();
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) partial[warp][group + i / 2 * 8][t * 8 + quad * 2 + i % 2] = acc[r][t][i];
        __syncthreads();
        const int tile = blockIdx.x * ROW_TILES + r;
        if (tile * (OUTPUT == SILU_MUL ? 8 : 16) < p.n) finish_tile<__half, M, OUTPUT>(p, partial, tile);
    }
}

#define DEFINE(NAME, AFFINE, TILES, ROW_TILES)                                                                                 \
    extern "C" __global__ void __launch_bounds__(256) NAME##_store_##TILES##x##ROW_TILES(const __grid_constant__ Skinny p) {   \
        skinny_int4<AFFINE, TILES, ROW_TILES, STORE>(p);                                                                       \
    }                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(256) NAME##_add_##TILES##x##ROW_TILES(const __grid_constant__ Skinny p) {     \
        skinny_int4<AFFINE, TILES, ROW_TILES, ADD_RESIDUAL>(p);                                                                \
    }                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(256) NAME##_silu_##TILES##x##ROW_TILES(const __grid_constant__ Skinny p) {    \
        skinny_int4<AFFINE, TILES, ROW_TILES, SILU_MUL>(p);                                                                    \
    }
#define DEFINE_ALL(NAME, AFFINE)                                                                                               \
    DEFINE(NAME, AFFINE, 1, 1)                                                                                                 \
    DEFINE(NAME, AFFINE, 1, 2)                                                                                                 \
    DEFINE(NAME, AFFINE, 2, 2)                                                                                                 \
    DEFINE(NAME, AFFINE, 4, 2)                                                                                                 \
    DEFINE(NAME, AFFINE, 8, 2)                                                                                                 \
    extern "C" __global__ void NAME##_dequantize(const uint32_t *weight, const uint32_t *cells, uint4 *out, int n, int words,  \
                                                 int words_per_group) {                                                        \
        dequantize_all<AFFINE>(weight, cells, out, n, words, words_per_group);                                                 \
    }
DEFINE_ALL(int4, false)
DEFINE_ALL(int4_affine, true)
DEFINE(int4, false, 4, 4)
DEFINE(int4, false, 8, 4)
