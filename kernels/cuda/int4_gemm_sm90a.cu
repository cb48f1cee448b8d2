// Products of many rows with four-bit weights, for Hopper: y[m][n] = Σk x[m][k] · w[n][k] + bias, fp16.
//
// A block computes TILE_M rows × 128 outputs. The copy engine brings x, 64 columns at a time, in a ring; threads read weights
// straight into registers, several steps ahead, and write them as fp16 into a second, shorter ring, swizzled as the copy engine
// would; both are operands of warpgroups' products. While the products of a step run, the weights of the next are turned into
// fp16. Where there are fewer tiles than multiprocessors, several blocks share the columns of a tile, and the one that ends
// last adds up their parts, in their order.
#include "hopper.cuh"
#include "int4.cuh"

constexpr int TILE_N = 128, STEP = 64, THREADS = 256, GROUP_THREADS = 128;
constexpr int B_STAGES = 3; // one being multiplied, one perhaps still, one being written
constexpr int AHEAD = 4;    // steps that weights are loaded ahead

struct Int4Gemm {
    const uint4 *words;    // [n][k/32]
    const uint32_t *cells; // [groups][n]
    const __half *bias;    // [n] or null
    __half *y;             // [m][n]
    float4 *parts;         // [tile][split][register / 4][thread]
    int *arrived;          // [tile], zero between launches
    int m, n, k, splits;
    int group_shift; // a group is 2^this chunks of 32 columns
};

template <int TILE_M> struct Memory {
    static constexpr int A_STAGES = TILE_M == 256 ? 4 : 6;
    static constexpr int A_BYTES = TILE_M * STEP * 2, B_BYTES = TILE_N * STEP * 2;
    static constexpr int A = 0, B = A_STAGES * A_BYTES, BARRIERS = B + B_STAGES * B_BYTES;
    // Of 64 rows both warpgroups compute all, each with half of the outputs; of more each has its own.
    static constexpr int COLUMNS = TILE_M == 64 ? 64 : 128, TILES = TILE_M == 256 ? 2 : 1;
};

template <bool AFFINE, int TILE_M> __device__ __forceinline__ void int4_gemm(const Int4Gemm &p, const CUtensorMap *x_map) {
    using M = Memory<TILE_M>;
    constexpr int REGISTERS = M::COLUMNS / 2;
    extern __shared__ __align__(1024) char shared[];
    __shared__ int is_last;
    const uint32_t memory = shared_address(shared);
    const int thread = threadIdx.x, warpgroup = thread / GROUP_THREADS;
    const int n_tile = blockIdx.x, m_tile = blockIdx.y / p.splits, split = blockIdx.y % p.splits;
    const int all_steps = p.k / STEP, share = (all_steps + p.splits - 1) / p.splits;
    const int first = split * share, steps = min(share, all_steps - first);

    // Two threads read a row's 64 columns of a step.
    const int my_row = thread / 2, my_half = thread % 2, row = min(n_tile * TILE_N + my_row, p.n - 1);
    const uint4 *words = p.words + (long)row * (p.k / 32) + first * 2 + my_half;
    Vec8 raw[AHEAD];
    uint32_t cells[AHEAD];
    auto load = [&](int u, int step) {
        if (step < steps) {
            raw[u].v = load_stream(words + step * 2);
            cells[u] = __ldg(p.cells + (long)(((first + step) * 2 + my_half) >> p.group_shift) * p.n + row);
        }
    };
    auto write_weights = [&](int u, int stage) {
        char *to = shared + M::B + stage * M::B_BYTES + my_row * 128;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            Vec8 values;
            dequantize<AFFINE>(raw[u].w[i], cells[u], values.w);
            *reinterpret_cast<uint4 *>(to + ((my_half * 4 + i) ^ (my_row & 7)) * 16) = values.v;
        }
        fence_async();
    };
    auto barrier = [&](int stage) { return memory + M::BARRIERS + stage * 8; };
    auto copy_rows = [&](int step) {
        const int stage = step % M::A_STAGES;
        barrier_expect(barrier(stage), M::A_BYTES);
        copy_box(memory + M::A + stage * M::A_BYTES, x_map, barrier(stage), (first + step) * STEP, m_tile * TILE_M);
    };
#pragma unroll
    for (int u = 0; u < AHEAD; u++) load(u, u);
    if (thread == 0) {
        for (int stage = 0; stage < M::A_STAGES; stage++) barrier_init(barrier(stage), 1);
        barrier_init_done();
        prefetch_map(x_map);
    }
    let_next_start();
    write_weights(0, 0);
    load(0, AHEAD);
    __syncthreads();
    wait_for_previous();
    if (thread == 0)
        for (int step = 0; step < min(steps, M::A_STAGES); step++) copy_rows(step);

    float acc[M::TILES][REGISTERS];
#pragma unroll
    for (int t = 0; t < M::TILES; t++)
#pragma unroll
        for (int i = 0; i < REGISTERS; i++) acc[t][i] = 0.f;
    int a_stage = 0, a_parity = 0, b_stage = 0;
    for (int base = 0; base < steps; base += AHEAD) {
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            const int step = base + u;
            if (step < steps) {
                const int next_b = b_stage + 1 == B_STAGES ? 0 : b_stage + 1;
                barrier_wait(barrier(a_stage), a_parity);
                const uint32_t a = memory + M::A + a_stage * M::A_BYTES + (TILE_M == 64 ? 0 : warpgroup * M::TILES * 64 * 128);
                const uint32_t b = memory + M::B + b_stage * M::B_BYTES + (TILE_M == 64 ? warpgroup * 64 * 128 : 0);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < STEP / 16; k++)
#pragma unroll
                    for (int t = 0; t < M::TILES; t++)
                        Warpgroup<__half, M::COLUMNS>::mma(acc[t], matrix_at<128>(a + t * 64 * 128 + k * 32), matrix_at<128>(b + k * 32), 1);
                wgmma_commit();
                // No one reads the next stage any more: the products of two steps ago ended before the last barrier.
                if (step + 1 < steps) {
                    write_weights((u + 1) % AHEAD, next_b);
                    load((u + 1) % AHEAD, step + 1 + AHEAD);
                }
                wgmma_wait<1>();
                __syncthreads();
                // All have multiplied the rows of the step before.
                if (thread == 0 && step > 0 && step - 1 + M::A_STAGES < steps) copy_rows(step - 1 + M::A_STAGES);
                b_stage = next_b;
                if (++a_stage == M::A_STAGES) a_stage = 0, a_parity ^= 1;
            }
        }
    }
    wgmma_wait<0>();

    if (p.splits > 1) {
        const int tile = m_tile * gridDim.x + n_tile;
        constexpr int QUADS = M::TILES * REGISTERS / 4;
        float4 *parts = p.parts + (long)tile * p.splits * QUADS * THREADS + thread;
        float *mine = &acc[0][0];
#pragma unroll
        for (int i = 0; i < QUADS; i++)
            parts[(long)(split * QUADS + i) * THREADS] = make_float4(mine[i * 4], mine[i * 4 + 1], mine[i * 4 + 2], mine[i * 4 + 3]);
        __threadfence();
        __syncthreads();
        if (thread == 0) {
            is_last = atomicAdd(p.arrived + tile, 1) == p.splits - 1;
            if (is_last) p.arrived[tile] = 0;
        }
        __syncthreads();
        if (!is_last) return;
        __threadfence();
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            float4 sum = __ldcg(parts + (long)i * THREADS);
            for (int other = 1; other < p.splits; other++) {
                const float4 part = __ldcg(parts + (long)(other * QUADS + i) * THREADS);
                sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
            }
            mine[i * 4] = sum.x, mine[i * 4 + 1] = sum.y, mine[i * 4 + 2] = sum.z, mine[i * 4 + 3] = sum.w;
        }
    }
    // A thread has the rows `lane / 4` and 8 below of its warp's 16, and in each run of 8 outputs the two at `lane % 4 · 2`;
    // four threads of a row exchange words, so that each writes 16 bytes at once.
    const int lane = thread % 32, quad = lane % 4, warp_row = thread % GROUP_THREADS / 32 * 16 + lane / 4;
    const int column0 = n_tile * TILE_N + (TILE_M == 64 ? warpgroup * 64 : 0);
#pragma unroll
    for (int t = 0; t < M::TILES; t++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int out_row = m_tile * TILE_M + (TILE_M == 64 ? 0 : warpgroup * M::TILES * 64) + t * 64 + warp_row + r * 8;
#pragma unroll
            for (int c = 0; c < M::COLUMNS / 32; c++) {
                uint32_t w[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float2 v = make_float2(acc[t][(c * 4 + i) * 4 + r * 2], acc[t][(c * 4 + i) * 4 + r * 2 + 1]);
                    const int column = column0 + (c * 4 + i) * 8 + quad * 2;
                    if (p.bias && column < p.n) {
                        const float2 bias = __half22float2(*reinterpret_cast<const __half2 *>(p.bias + column));
                        v.x += bias.x, v.y += bias.y;
                    }
                    w[i] = Num<__half>::pack(v.x, v.y);
                }
                // A transposition of 4 × 4 words: first within pairs of threads, then between the pairs.
#pragma unroll
                for (int i = 0; i < 4; i += 2) {
                    const uint32_t other = __shfl_xor_sync(0xffffffffu, quad & 1 ? w[i] : w[i + 1], 1);
                    if (quad & 1) w[i] = other;
                    else w[i + 1] = other;
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const uint32_t other = __shfl_xor_sync(0xffffffffu, quad & 2 ? w[i] : w[i + 2], 2);
                    if (quad & 2) w[i] = other;
                    else w[i + 2] = other;
                }
                const int column = column0 + (c * 4 + quad) * 8;
                if (out_row < p.m && column < p.n) *reinterpret_cast<uint4 *>(p.y + (long)out_row * p.n + column) = make_uint4(w[0], w[1], w[2], w[3]);
            }
        }
}

#define DEFINE(NAME, AFFINE, TILE_M)                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, TILE_M == 64 ? 2 : 1) NAME##_##TILE_M(const __grid_constant__ Int4Gemm p,               \
                                                                             const __grid_constant__ CUtensorMap x) {         \
        int4_gemm<AFFINE, TILE_M>(p, &x);                                                                                      \
    }
DEFINE(int4_gemm, false, 64)
DEFINE(int4_gemm, false, 128)
DEFINE(int4_gemm, false, 256)
DEFINE(int4_affine_gemm, true, 64)
DEFINE(int4_affine_gemm, true, 128)
DEFINE(int4_affine_gemm, true, 256)
