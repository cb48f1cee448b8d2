// Four-bit weights, w = (q - zero) * scale, fp16 beside them: turned into fp16, and multiplied as they are by few rows (decode).
#include "int4.cuh"
#include "skinny.cuh"

// out[n][8·eights] from weight[n][eights] and cells[groups][n]. A thread makes eight columns of each of DEQUANTIZE_ROWS rows, four
// threads those of the same four words. Bound by memory: half a byte in, two out.
constexpr int DEQUANTIZE_ROWS = 4;
template <bool AFFINE>
__device__ __forceinline__ void dequantize_all(const uint4 *weight, const uint32_t *cells, uint4 *out, int n, int eights, int eights_per_group) {
    let_next_start();
    const int first = blockIdx.x * DEQUANTIZE_ROWS, eight = blockIdx.y * blockDim.x + threadIdx.x;
    if (eight >= eights) return;
    // Weights may be read before the earlier kernels end; `out` may still be in use by one of them.
    Vec8 packed[DEQUANTIZE_ROWS];
    uint32_t cell[DEQUANTIZE_ROWS];
#pragma unroll
    for (int i = 0; i < DEQUANTIZE_ROWS; i++) {
        const long row = min(first + i, n - 1);
        packed[i].v = weight[row * (eights / 4) + eight / 4];
        cell[i] = cells[(long)(eight / eights_per_group) * n + row];
    }
    wait_for_previous();
#pragma unroll
    for (int i = 0; i < DEQUANTIZE_ROWS; i++) {
        Vec8 values;
#pragma unroll
        for (int q = 0; q < 4; q++) values.w[q] = dequantized<AFFINE>(packed[i].w[q] >> (eight % 4 * 4), 0, cell[i]);
        if (first + i < n) out[(long)(first + i) * eights + eight] = values.v;
    }
}

// Words of random bits from a hash of (seed, index), all with the same cell but for the sign of its scale, so that they are 0 in
// the mean: for models without weights.
extern "C" __global__ void int4_random(uint32_t *words, long count, uint32_t *cells, long cell_count, uint32_t cell, uint64_t seed) {
    const long first = (long)blockIdx.x * blockDim.x + threadIdx.x, step = (long)gridDim.x * blockDim.x;
    for (long i = first; i < count; i += step) {
        uint64_t x = (i + 1) * 0x9E3779B97F4A7C15ull + seed;
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
        x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
        words[i] = (uint32_t)(x >> 32);
    }
    for (long i = first; i < cell_count; i += step) cells[i] = cell ^ (uint32_t)(i * 0x9E3779B97F4A7C15ull >> 63) << 15;
}

// Blocks on a multiprocessor, as skinny.rs launches them, and steps in flight, for which it reserves memory.
template <int TILES, int ROW_TILES> constexpr int BLOCKS = ROW_TILES == 1 ? 3 : TILES <= 4 ? 2 : 1;
template <int TILES, int ROW_TILES> constexpr int IN_FLIGHT = ROW_TILES == 1 ? 6 : TILES <= 4 ? 4 : 2;

// What a cell has beside the scale, and whether the scale is left to the sums.
enum Scheme { ZEROS, OFFSETS, GROUPS_OF_128 };

// y[m][n] = Σk x[m][k] · w[n][k] as in skinny_gemm.cu, with 16·ROW_TILES rows of w in a tile: the more tokens, the more rows
// share the reading of x. A lane takes 32 neighbouring values (16 bytes) of a row, a quad 128, and feeds eight products.
// Of groups of 128, which a quad takes at once, integers are multiplied, and a group's sums with its scale (GROUPS_OF_128).
// Blocks stay and walk over tiles, so that a tile's first weights are on their way while the one before it is finished. A lane
// copies its weights to places of its own in shared memory, several steps ahead: no barrier, and no wait for a later load.
template <Scheme SCHEME, int TILES, int ROW_TILES, Output OUTPUT> __device__ __forceinline__ void skinny_int4(const Skinny &p) {
    using N = Num<__half>;
    constexpr bool AFFINE = SCHEME == OFFSETS, SCALES_SUMS = SCHEME == GROUPS_OF_128;
    constexpr int M = 8 * TILES, STEPS = IN_FLIGHT<TILES, ROW_TILES>, VECTORS = 2 * ROW_TILES, THREADS_HERE = WARPS * 32;
    constexpr int AHEAD = TILES <= 2 ? 4 : 1; // vectors of a token that are loaded before the first is multiplied
    constexpr int TILE_ROWS = (OUTPUT == SILU_MUL ? 8 : 16) * ROW_TILES;
    extern __shared__ __align__(16) uint4 in_flight[]; // [STEPS][VECTORS][thread], then the cells likewise
    __shared__ float scales[M];
    __shared__ float partial[WARPS][16][M + 1];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    const int chunks = p.k / 32, blocks = (chunks + 3) / 4, share = (blocks + WARPS - 1) / WARPS;
    const int begin = min(warp * share, blocks), end = min(begin + share, blocks);
    const int tiles = (p.n + TILE_ROWS - 1) / TILE_ROWS;
    const int weight_rows = OUTPUT == SILU_MUL ? 2 * p.n : p.n;
    uint4 *my_words = in_flight + threadIdx.x;
    uint32_t *my_cells = reinterpret_cast<uint32_t *>(in_flight + STEPS * VECTORS * THREADS_HERE) + threadIdx.x;
    int rows[VECTORS], load_tile = begin < end ? (int)blockIdx.x : tiles, load_block = begin, load_step = 0;
    const uint4 *words_at[VECTORS]; // of the step that is loaded next, with SCALES_SUMS
    const uint32_t *cells_at[VECTORS];
    const auto find_rows = [&]() {
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) tile_rows<OUTPUT>(p, load_tile * ROW_TILES + r, group, &rows[2 * r], &rows[2 * r + 1]);
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            words_at[i] = static_cast<const uint4 *>(p.weight) + (long)rows[i] * chunks + begin * 4 + quad;
            cells_at[i] = p.cells + (long)begin * weight_rows + rows[i];
        }
    };
    const auto load = [&]() {
        if (SCALES_SUMS && load_tile < tiles) {
#pragma unroll
            for (int i = 0; i < VECTORS; i++) {
                const int place = (load_step * VECTORS + i) * THREADS_HERE;
                copy_ahead<16>(my_words + place, words_at[i]);
                copy_ahead<4>(my_cells + place, cells_at[i]);
                words_at[i] += 4;
                cells_at[i] += weight_rows;
            }
        } else if (load_tile < tiles) {
            // Behind the end of a row x is zero, so that any finite weight will do.
            const int chunk = min(load_block * 4 + quad, chunks - 1);
            const uint32_t *cells = p.cells + (long)(chunk >> p.group_shift) * weight_rows;
#pragma unroll
            for (int i = 0; i < VECTORS; i++) {
                const int place = (load_step * VECTORS + i) * THREADS_HERE;
                copy_ahead<16>(my_words + place, static_cast<const uint4 *>(p.weight) + (long)rows[i] * chunks + chunk);
                copy_ahead<4>(my_cells + place, cells + rows[i]);
            }
        }
        if (load_tile < tiles) {
            if (++load_block == end) {
                load_block = begin;
                load_tile += gridDim.x;
                find_rows();
            }
            if (++load_step == STEPS) load_step = 0;
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    find_rows();
#pragma unroll
    for (int i = 0; i < STEPS; i++) load();
    let_next_start();
    wait_for_previous();
    if (p.norm) {
        norm_scales(p, scales);
        __syncthreads();
    }
    float scale[TILES];
#pragma unroll
    for (int t = 0; t < TILES; t++) scale[t] = p.norm && t * 8 + group < p.m ? scales[t * 8 + group] : 1.f;

    int step = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        float acc[ROW_TILES][TILES][4];
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int t = 0; t < TILES; t++)
#pragma unroll
                for (int i = 0; i < 4; i++) acc[r][t][i] = 0.f;
        for (int block = begin; block < end; block++) {
            const int chunk = block * 4 + quad;
            Vec8 x[AHEAD][TILES];
            const auto load_x = [&](int first) {
#pragma unroll
                for (int i = 0; i < AHEAD; i++)
#pragma unroll
                    for (int t = 0; t < TILES; t++) {
                        const bool valid = chunk < chunks && t * 8 + group < p.m;
                        const uint4 *from = reinterpret_cast<const uint4 *>(static_cast<const __half *>(p.x) + (long)(t * 8 + group) * p.k);
                        x[i][t].v = valid ? from[chunk * 4 + first + i] : make_uint4(0, 0, 0, 0);
                    }
            };
            load_x(0);
            asm volatile("cp.async.wait_group %0;" ::"n"(STEPS - 1) : "memory");
            Vec8 a[VECTORS];
            uint32_t cells[VECTORS];
#pragma unroll
            for (int i = 0; i < VECTORS; i++) {
                const int place = (step * VECTORS + i) * THREADS_HERE;
                a[i].v = my_words[place];
                cells[i] = my_cells[place];
            }
            float sums[ROW_TILES][TILES][4];
            __half2 zeros[VECTORS], high_zeros[VECTORS];
            if (SCALES_SUMS) {
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                    for (int t = 0; t < TILES; t++)
#pragma unroll
                        for (int j = 0; j < 4; j++) sums[r][t][j] = 0.f;
#pragma unroll
                for (int i = 0; i < VECTORS; i++) {
                    zeros[i] = __high2half2(as_half2(cells[i]));
                    high_zeros[i] = __hsub2(zeros[i], as_half2(0x63806380u)); // 1024 + z - 960
                }
            }
#pragma unroll
            for (int first = 0; first < 4; first += AHEAD) {
                if (first > 0) load_x(first);
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
                        if (SCALES_SUMS) {
#pragma unroll
                            for (int q = 0; q < 4; q++) {
                                low[q] = integers(a[2 * r].w[q], first + i, zeros[2 * r], high_zeros[2 * r]);
                                high[q] = integers(a[2 * r + 1].w[q], first + i, zeros[2 * r + 1], high_zeros[2 * r + 1]);
                            }
                        } else {
                            dequantize_eight<AFFINE>(a[2 * r].w, first + i, cells[2 * r], low);
                            dequantize_eight<AFFINE>(a[2 * r + 1].w, first + i, cells[2 * r + 1], high);
                        }
                        const uint32_t even[4] = {low[0], high[0], low[1], high[1]};
                        const uint32_t odd[4] = {low[2], high[2], low[3], high[3]};
#pragma unroll
                        for (int t = 0; t < TILES; t++) {
                            float *into = SCALES_SUMS ? sums[r][t] : acc[r][t];
                            N::mma(into, even, x[i][t].w[0], x[i][t].w[1]);
                            N::mma(into, odd, x[i][t].w[2], x[i][t].w[3]);
                        }
                    }
                }
            }
            if (SCALES_SUMS) {
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const float by = __low2float(as_half2(cells[2 * r + j / 2]));
#pragma unroll
                        for (int t = 0; t < TILES; t++) acc[r][t][j] += by * sums[r][t][j];
                    }
            }
            load(); // into the place that was just read
            if (++step == STEPS) step = 0;
        }
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
            __syncthreads(); // the tile before has been read
#pragma unroll
            for (int t = 0; t < TILES; t++)
#pragma unroll
                for (int i = 0; i < 4; i++) partial[warp][group + i / 2 * 8][t * 8 + quad * 2 + i % 2] = acc[r][t][i];
            __syncthreads();
            const int part = tile * ROW_TILES + r;
            if (part * (OUTPUT == SILU_MUL ? 8 : 16) < p.n) finish_tile<__half, M, OUTPUT>(p, partial, part);
        }
    }
    asm volatile("cp.async.wait_group 0;" ::: "memory");
}

#define DEFINE(NAME, SCHEME, TILES, ROW_TILES)                                                                                 \
    extern "C" __global__ void __launch_bounds__(256, BLOCKS<TILES, ROW_TILES>) NAME##_store_##TILES##x##ROW_TILES(const __grid_constant__ Skinny p) {   \
        skinny_int4<SCHEME, TILES, ROW_TILES, STORE>(p);                                                                       \
    }                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(256, BLOCKS<TILES, ROW_TILES>) NAME##_add_##TILES##x##ROW_TILES(const __grid_constant__ Skinny p) {     \
        skinny_int4<SCHEME, TILES, ROW_TILES, ADD_RESIDUAL>(p);                                                                \
    }                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(256, BLOCKS<TILES, ROW_TILES>) NAME##_silu_##TILES##x##ROW_TILES(const __grid_constant__ Skinny p) {    \
        skinny_int4<SCHEME, TILES, ROW_TILES, SILU_MUL>(p);                                                                    \
    }
#define DEFINE_ALL(NAME, SCHEME)                                                                                               \
    DEFINE(NAME, SCHEME, 1, 1)                                                                                                 \
    DEFINE(NAME, SCHEME, 1, 2)                                                                                                 \
    DEFINE(NAME, SCHEME, 2, 2)                                                                                                 \
    DEFINE(NAME, SCHEME, 4, 2)                                                                                                 \
    DEFINE(NAME, SCHEME, 8, 2)                                                                                                 \
    extern "C" __global__ void NAME##_dequantize(const uint4 *weight, const uint32_t *cells, uint4 *out, int n, int eights,    \
                                                 int eights_per_group) {                                                       \
        dequantize_all<SCHEME == OFFSETS>(weight, cells, out, n, eights, eights_per_group);                                    \
    }
DEFINE_ALL(int4, ZEROS)
DEFINE_ALL(int4_affine, OFFSETS)
DEFINE(int4_128, GROUPS_OF_128, 1, 1)
DEFINE(int4_128, GROUPS_OF_128, 1, 2)
DEFINE(int4_128, GROUPS_OF_128, 2, 2)
