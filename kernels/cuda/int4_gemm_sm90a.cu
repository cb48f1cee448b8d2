// Products of many rows with four-bit weights, for Hopper: y[m][n] = Σk x[m][k] · w[n][k] + bias, fp16.
//
// A block computes TILE_M rows × TILE_N outputs, 64 columns a step, by a ring of steps. Two warpgroups copy weights several steps
// ahead and write them as fp16, swizzled as the copy engine would. Two others multiply, each half of the rows, and have the copy
// engine bring their own x as soon as there is room.
//
// Where there are fewer tiles than multiprocessors, several blocks share the columns of a tile. Each adds the others' sums of a
// part of the tile to its own, in a fixed order, so that results repeat. They wait for each other, all run at once, and begin one
// behind the other, so that of whatever else runs none can keep them apart for good.
#include "hopper.cuh"
#include "int4.cuh"

constexpr int STEP = 64, GROUP_THREADS = 128;
constexpr int CONSUMERS = 256, PRODUCERS = 256, THREADS = CONSUMERS + PRODUCERS;
constexpr int AHEAD = 5; // steps that weights are copied ahead

struct Int4Gemm {
    const uint4 *words;    // [n][k/32]
    const uint32_t *cells; // [groups][n]
    const __half *bias;    // [n] or null
    __half *y;             // [m][n]
    float4 *parts;         // [tile][split][register / 4][consumer]
    int *arrived;          // [tile][2], zero between launches: blocks that left their sums, and that have seen all of them
    int m, n, k, splits;
    int group_shift; // a group is 2^this chunks of 32 columns
};

template <int TILE_M, int TILE_N> struct Memory {
    static constexpr int STAGES = TILE_M == 128 ? 6 : 4, THREADS_OF_ROW = 2, BRINGING = TILE_N * THREADS_OF_ROW; // threads that bring weights
    static constexpr int A_BYTES = TILE_M * STEP * 2, B_BYTES = TILE_N * STEP * 2;
    static constexpr int A = 0, B = STAGES * A_BYTES, RAW = B + STAGES * B_BYTES;
    static constexpr int RAW_CELLS = RAW + AHEAD * PRODUCERS * 16, FULL = RAW_CELLS + AHEAD * PRODUCERS * 4;
    static constexpr int EMPTY = FULL + STAGES * 8;
    static constexpr int FULL_X = EMPTY + STAGES * 8, EMPTY_X = FULL_X + 2 * STAGES * 8; // of each warpgroup
    static constexpr int TILES = TILE_M / 128; // of 64 rows, of a warpgroup
};

// What a block works on.
struct Work : Steps {
    int n_tile, m_tile, split;
    __device__ __forceinline__ explicit Work(const Int4Gemm &p) {
        n_tile = blockIdx.x / p.splits, m_tile = blockIdx.y, split = blockIdx.x % p.splits;
        const int all = p.k / STEP, share = (all + p.splits - 1) / p.splits;
        first = split * share, steps = min(share, all - first);
        begin = (long)steps * n_tile / (gridDim.x / p.splits);
    }
};

template <bool AFFINE, int TILE_M, int TILE_N>
__device__ __forceinline__ void produce(const Int4Gemm &p, const Work &work, char *shared, uint32_t memory) {
    using M = Memory<TILE_M, TILE_N>;
    const int thread = threadIdx.x - CONSUMERS, my_row = thread / M::THREADS_OF_ROW, my_half = thread % M::THREADS_OF_ROW;
    if (thread >= M::BRINGING) return;
    const int row = min(work.n_tile * TILE_N + my_row, p.n - 1);
    const uint4 *words = p.words + (long)row * (p.k / 32);
    const uint32_t *cells_of_row = p.cells + row;
    uint4 *my_words = reinterpret_cast<uint4 *>(shared + M::RAW) + thread;
    uint32_t *my_cells = reinterpret_cast<uint32_t *>(shared + M::RAW_CELLS) + thread;
    const auto load = [&](int place, int step) {
        if (step < work.steps) {
            const int chunk = work.place(step) * 2 + my_half;
            copy_ahead<16>(my_words + place * PRODUCERS, words + chunk);
            copy_ahead<4>(my_cells + place * PRODUCERS, cells_of_row + (long)(chunk >> p.group_shift) * p.n);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
#pragma unroll
    for (int i = 0; i < AHEAD; i++) load(i, i);
    int stage = 0, parity = 1, place = 0; // of the first round all stages are empty
    for (int step = 0; step < work.steps; step++) {
        // What lies in the stage is multiplied.
        barrier_wait(memory + M::EMPTY + stage * 8, parity);
        asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD - 1) : "memory");
        char *to = shared + M::B + stage * M::B_BYTES + my_row * 128;
        Vec8 raw;
        raw.v = my_words[place * PRODUCERS];
        const uint32_t cell = my_cells[place * PRODUCERS];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            Vec8 values;
            dequantize_eight<AFFINE>(raw.w, i, cell, values.w);
            *reinterpret_cast<uint4 *>(to + ((my_half * 4 + i) ^ (my_row & 7)) * 16) = values.v;
        }
        fence_async();
        __syncwarp();
        if (thread % 32 == 0) barrier_arrive(memory + M::FULL + stage * 8);
        load(place, step + AHEAD);
        if (++place == AHEAD) place = 0;
        if (++stage == M::STAGES) stage = 0, parity ^= 1;
    }
    asm volatile("cp.async.wait_group 0;" ::: "memory");
}

template <int TILE_M, int TILE_N, bool SHARED>
__device__ __forceinline__ void consume(const Int4Gemm &p, const Work &work, const CUtensorMap *x_map, uint32_t memory) {
    using M = Memory<TILE_M, TILE_N>;
    constexpr int REGISTERS = TILE_N / 2;
    const int thread = threadIdx.x, warpgroup = thread / GROUP_THREADS;
    const int n_tile = work.n_tile, m_tile = work.m_tile, split = work.split;
    float acc[M::TILES][REGISTERS]; // set by the first step
    const uint32_t my_a = memory + M::A + warpgroup * M::TILES * 64 * 128;
    const uint32_t my_b = memory + M::B, full_x = memory + M::FULL_X + warpgroup * M::STAGES * 8, empty_x = memory + M::EMPTY_X + warpgroup * M::STAGES * 8;
    const auto ask_for_x = [&](int step, int stage) {
        barrier_expect(full_x + stage * 8, M::A_BYTES / 2);
        copy_box(my_a + stage * M::A_BYTES, x_map, full_x + stage * 8, work.place(step) * STEP, work.m_tile * TILE_M + warpgroup * (TILE_M / 2));
    };
    if (thread % GROUP_THREADS == 0)
        for (int step = 0; step < min(M::STAGES, work.steps); step++) ask_for_x(step, step);
    int stage = 0, parity = 0, before = 0, before_parity = 0;
    for (int step = 0; step < work.steps; step++) {
        barrier_wait(full_x + stage * 8, parity);
        barrier_wait(memory + M::FULL + stage * 8, parity);
        const uint32_t a = my_a + stage * M::A_BYTES, b = my_b + stage * M::B_BYTES;
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < STEP / 16; k++)
#pragma unroll
            for (int t = 0; t < M::TILES; t++)
                Warpgroup<__half, TILE_N>::mma(acc[t], matrix_at<128>(a + t * 64 * 128 + k * 32), matrix_at<128>(b + k * 32), step + k > 0);
        wgmma_commit();
        wgmma_wait<1>();
        // The step before is multiplied.
        if (step > 0 && thread % 32 == 0) {
            barrier_arrive(memory + M::EMPTY + before * 8);
            barrier_arrive(empty_x + before * 8);
            const int next = step - 1 + M::STAGES;
            if (thread % GROUP_THREADS == 0 && next < work.steps) {
                barrier_wait(empty_x + before * 8, before_parity); // by all four warps
                ask_for_x(next, before);
            }
        }
        __syncwarp();
        before = stage, before_parity = parity;
        if (++stage == M::STAGES) stage = 0, parity ^= 1;
    }
    wgmma_wait<0>();

    constexpr int RUNS = (TILE_N + 31) / 32; // of 32 outputs of 64 rows, which a block finishes or leaves to another
    if (SHARED) {
        const int tile = m_tile * (gridDim.x / p.splits) + n_tile, finishers = min(p.splits, M::TILES * RUNS);
        const auto part = [&](int of, int t, int quad) {
            return p.parts + ((long)(tile * p.splits + of) * (M::TILES * REGISTERS / 4) + t * (REGISTERS / 4) + quad) * CONSUMERS + thread;
        };
#pragma unroll
        for (int t = 0; t < M::TILES; t++)
#pragma unroll
            for (int quad = 0; quad < REGISTERS / 4; quad++) {
                const float *sums = acc[t] + quad * 4;
                if ((t * RUNS + quad / 4) % p.splits != split) *part(split, t, quad) = make_float4(sums[0], sums[1], sums[2], sums[3]);
            }
        named_sync(1, CONSUMERS);
        int *arrived = p.arrived + 2 * tile, *left = arrived + 1;
        if (thread == 0) add_release(arrived, 1); // for all of the block's stores
        if (split >= finishers) return;
        if (thread == 0) {
            wait_until(arrived, p.splits);
            // The counters are left at zero.
            if (atomicAdd(left, 1) == finishers - 1) *arrived = 0, *left = 0;
        }
        named_sync(1, CONSUMERS);
#pragma unroll
        for (int t = 0; t < M::TILES; t++)
#pragma unroll
            for (int run = 0; run < RUNS; run++) {
                if ((t * RUNS + run) % p.splits != split) continue;
                for (int of = 0; of < p.splits; of++) {
                    if (of == split) continue;
                    float4 other[4];
#pragma unroll
                    for (int i = 0; i < 4 && run * 4 + i < REGISTERS / 4; i++) other[i] = __ldcg(part(of, t, run * 4 + i));
#pragma unroll
                    for (int i = 0; i < 4 && run * 4 + i < REGISTERS / 4; i++) {
                        float *sums = acc[t] + (run * 4 + i) * 4;
                        sums[0] += other[i].x, sums[1] += other[i].y, sums[2] += other[i].z, sums[3] += other[i].w;
                    }
                }
            }
    }
    // A thread has the rows `lane / 4` and 8 below of its warp's 16, and in each run of 8 outputs the two at `lane % 4 · 2`;
    // four threads of a row exchange words, so that each writes 16 bytes at once.
    const int lane = thread % 32, quad = lane % 4, warp_row = thread % GROUP_THREADS / 32 * 16 + lane / 4;
    const int column0 = n_tile * TILE_N;
#pragma unroll
    for (int t = 0; t < M::TILES; t++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int out_row = m_tile * TILE_M + warpgroup * M::TILES * 64 + t * 64 + warp_row + r * 8;
#pragma unroll
            for (int c = 0; c < RUNS; c++) {
                if (SHARED && (t * RUNS + c) % p.splits != split) continue;
                const int runs = min(4, TILE_N / 8 - c * 4);
                uint32_t w[4] = {};
#pragma unroll
                for (int i = 0; i < runs; i++) {
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
                if (out_row < p.m && column < p.n && quad < runs) *reinterpret_cast<uint4 *>(p.y + (long)out_row * p.n + column) = make_uint4(w[0], w[1], w[2], w[3]);
            }
        }
}

template <bool AFFINE, int TILE_M, int TILE_N, bool SHARED> __device__ __forceinline__ void int4_gemm(const Int4Gemm &p, const CUtensorMap *x_map) {
    using M = Memory<TILE_M, TILE_N>;
    extern __shared__ __align__(1024) char shared[];
    const uint32_t memory = shared_address(shared);
    const Work work(p);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < M::STAGES; stage++) {
            for (int group = 0; group < 2; group++) {
                barrier_init(memory + M::FULL_X + (group * M::STAGES + stage) * 8, 1); // who asks for it
                barrier_init(memory + M::EMPTY_X + (group * M::STAGES + stage) * 8, GROUP_THREADS / 32);
            }
            barrier_init(memory + M::FULL + stage * 8, M::BRINGING / 32);
            barrier_init(memory + M::EMPTY + stage * 8, CONSUMERS / 32);
        }
        barrier_init_done();
        prefetch_map(x_map);
    }
    __syncthreads();
    let_next_start();
    if (threadIdx.x >= CONSUMERS) {
        fewer_registers<72>();
        produce<AFFINE, TILE_M, TILE_N>(p, work, shared, memory);
    } else {
        more_registers<184>();
        wait_for_previous(); // for x, and for what the tile's parts and y were to it
        consume<TILE_M, TILE_N, SHARED>(p, work, x_map, memory);
    }
}

#define DEFINE_ONE(NAME, AFFINE, TILE_M, TILE_N, SHARED)                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                               \
        NAME##_##TILE_M##x##TILE_N(const __grid_constant__ Int4Gemm p, const __grid_constant__ CUtensorMap x) { \
        int4_gemm<AFFINE, TILE_M, TILE_N, SHARED>(p, &x);                                                  \
    }
#define DEFINE(NAME, AFFINE, SHARED)           \
    DEFINE_ONE(NAME, AFFINE, 128, 96, SHARED)  \
    DEFINE_ONE(NAME, AFFINE, 128, 112, SHARED) \
    DEFINE_ONE(NAME, AFFINE, 128, 128, SHARED) \
    DEFINE_ONE(NAME, AFFINE, 256, 96, SHARED)  \
    DEFINE_ONE(NAME, AFFINE, 256, 112, SHARED) \
    DEFINE_ONE(NAME, AFFINE, 256, 128, SHARED)
DEFINE(int4_gemm, false, false)
DEFINE(int4_gemm_shared, false, true)
DEFINE(int4_affine_gemm, true, false)
DEFINE(int4_affine_gemm_shared, true, true)
