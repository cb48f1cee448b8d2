// Products whose results do not depend on the number of rows: y[m][n] = Σk x[m][k] · w[n][k] + bias[n], for every architecture
// from sm_80.
//
// A block computes 64 rows × 128 outputs, with four warps of 32 × 64, over steps of 64 columns that four stages of asynchronous
// copies bring in. Each sum is one accumulator that takes K in ascending order by 16s, in one block; rows and outputs outside
// the matrices, and columns behind K, are zeros. So a row has the same bits alone and among others, in any place of a tile.
#include "common.cuh"

constexpr int TILE_M = 64, TILE_N = 128, STEP = 64, STAGES = 4, THREADS = 128;
constexpr int ROW = STEP * 2, CHUNKS = STEP / 8; // bytes and 16-byte chunks of a row in shared memory
constexpr int X_BYTES = TILE_M * ROW, STAGE = X_BYTES + TILE_N * ROW;
constexpr int NEIGHBOURS = 16; // tiles of rows that read the same weights at about the same time

struct InvariantGemm {
    const void *x;      // [m][k]
    const void *weight; // [n][k]
    const void *bias;   // [n] or null
    void *y;            // [m][n] of T or f32
    int m, n, k;        // n even, k a multiple of 8
};

// Asks for ROWS rows from `first` on of a matrix of `rows` rows, columns `column` to `column + 64`.
template <int ROWS, typename T>
__device__ __forceinline__ void load_rows(uint32_t to, const T *from, int first, int rows, int column, int k) {
    const int chunk = threadIdx.x % CHUNKS, at = column + chunk * 8;
#pragma unroll
    for (int i = 0; i < ROWS * CHUNKS / THREADS; i++) {
        const int row = threadIdx.x / CHUNKS + i * (THREADS / CHUNKS);
        const bool valid = first + row < rows && at < k;
        copy16(to + row * ROW + (chunk ^ (row & 7)) * 16, from + (valid ? (long)(first + row) * k + at : 0), valid);
    }
}

template <typename T> __device__ __forceinline__ void store_pair(T *y, float a, float b) {
    *reinterpret_cast<uint32_t *>(y) = Num<T>::pack(a, b);
}
template <> __device__ __forceinline__ void store_pair(float *y, float a, float b) { *reinterpret_cast<float2 *>(y) = make_float2(a, b); }

template <typename T, typename OUT> __device__ __forceinline__ void invariant_gemm(const InvariantGemm &p) {
    using N = Num<T>;
    extern __shared__ __align__(128) char memory[];
    const uint32_t base = (uint32_t)__cvta_generic_to_shared(memory);
    // Blocks that run at once cover a square of tiles rather than a line, so that both matrices are found in the L2.
    const int m_tiles = (p.m + TILE_M - 1) / TILE_M, n_tiles = (p.n + TILE_N - 1) / TILE_N;
    const int band = blockIdx.x / (NEIGHBOURS * n_tiles), within = blockIdx.x % (NEIGHBOURS * n_tiles);
    const int band_tiles = min(NEIGHBOURS, m_tiles - band * NEIGHBOURS);
    const int first_row = (band * NEIGHBOURS + within % band_tiles) * TILE_M, first_output = within / band_tiles * TILE_N;
    const T *x = static_cast<const T *>(p.x), *weight = static_cast<const T *>(p.weight);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    const int warp_row = warp / 2 * 32, warp_output = warp % 2 * 64;
    const int steps = (p.k + STEP - 1) / STEP;
    let_next_start();
    wait_for_previous(); // for the weights too, which a kernel may just have turned into 16 bits

    const auto load_step = [&](int step) {
        if (step < steps) {
            const uint32_t at = base + step % STAGES * STAGE;
            load_rows<TILE_M>(at, x, first_row, p.m, step * STEP, p.k);
            load_rows<TILE_N>(at + X_BYTES, weight, first_output, p.n, step * STEP, p.k);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) load_step(step);

    float sums[2][8][4];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) sums[i][j][c] = 0.f;
    // Addresses of ldmatrix: lane → row and half of a 16×16 tile, once for A (rows first) and once for B (columns first).
    const int a_row = warp_row + (lane & 15), a_half = lane >> 4;
    const int b_row = warp_output + (lane & 7) + ((lane >> 4) << 3), b_half = (lane >> 3) & 1;
    for (int step = 0; step < steps; step++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        // This step is there for all, and all have done with the one before it, whose stage is filled next.
        __syncthreads();
        load_step(step + STAGES - 1);
        if (first_row + warp_row >= p.m) continue;
        const uint32_t x_at = base + step % STAGES * STAGE, w_at = x_at + X_BYTES;
#pragma unroll
        for (int k = 0; k < STEP / 16; k++) {
            uint32_t a[2][4], b[4][4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int row = a_row + i * 16;
                load_matrices(a[i], x_at + row * ROW + ((k * 2 + a_half) ^ (row & 7)) * 16);
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int row = b_row + j * 16;
                load_matrices(b[j], w_at + row * ROW + ((k * 2 + b_half) ^ (row & 7)) * 16);
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < 8; j++) N::mma(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const int n = first_output + warp_output + j * 8 + quad * 2;
        if (n >= p.n) continue;
        const float2 bias = p.bias ? N::unpack(reinterpret_cast<const uint32_t *>(p.bias)[n / 2]) : make_float2(0.f, 0.f);
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int m = first_row + warp_row + i * 16 + half * 8 + group;
                const float *pair = sums[i][j] + half * 2;
                if (m < p.m) store_pair(static_cast<OUT *>(p.y) + (long)m * p.n + n, pair[0] + bias.x, pair[1] + bias.y);
            }
    }
}

#define DEFINE(SUFFIX, T)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS) invariant_gemm_##SUFFIX(const __grid_constant__ InvariantGemm p) {       \
        invariant_gemm<T, T>(p);                                                                                                   \
    }                                                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) invariant_gemm_f32_##SUFFIX(const __grid_constant__ InvariantGemm p) {   \
        invariant_gemm<T, float>(p);                                                                                               \
    }
FOR_BOTH(DEFINE)
