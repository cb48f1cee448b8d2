// Products of at most 64 rows with four-bit weights, for Hopper: y[m][n] = Σk x[m][k] · w[n][k], fp16.
//
// The weights are the A operand and go through registers: the copy engine brings words of all rows several steps ahead, by pairs of
// steps, because 64 bytes of a row take it as long as 128, and a thread turns its words of its own rows into fp16 and multiplies by
// warpgroup with x, the B operand, in shared memory. So a weight is turned once for all tokens and never written back. Words hold
// what a thread multiplies (int4.cuh), so that x is multiplied in the order in which it comes.
//
// Two blocks stay on a multiprocessor, of one product or of two: while one adds up and writes, or waits for the product in front,
// the other's weights come.
//
// Where there are fewer tiles than room for blocks, the blocks of a cluster share the columns of a tile. Each adds up and writes
// some of the tile, in the order of the blocks, reading the others' sums from their shared memory.
#include "hopper.cuh"
#include "int4.cuh"
#include "skinny.cuh"

constexpr int STEP = 128; // columns of a step
constexpr int CONSUMERS = 2 * 128, THREADS = CONSUMERS + 32, ROWS = 2 * 64; // two warpgroups multiply, each 64 rows of w

// What a cell has beside the scale, and whether groups are as wide as a step.
enum Scheme { ZEROS, OFFSETS, GROUPS_OF_128 };

template <Scheme SCHEME, int TOKENS> struct Memory {
    static constexpr int X_BYTES = TOKENS * STEP * 2, WORDS_BYTES = ROWS * STEP / 2, CELLS_BYTES = ROWS * 4 * (SCHEME == GROUPS_OF_128 ? 1 : 4);
    // Steps in flight, of weights and of x: as much as two blocks have room for. Words and cells come by pairs.
    static constexpr int DEPTH = TOKENS <= 32 ? 8 : 6, X_DEPTH = TOKENS <= 16 ? 8 : TOKENS <= 32 ? 4 : 3;
    static constexpr int WORDS = X_DEPTH * X_BYTES, CELLS = WORDS + DEPTH * WORDS_BYTES;
    static constexpr int FULL_X = CELLS + DEPTH * CELLS_BYTES, EMPTY = FULL_X + X_DEPTH * 8, FULL = EMPTY + X_DEPTH * 8;
    // The sums lie where x and the weights were; 4 floats more a token, so that a warp's stores meet no bank twice.
    static constexpr int PITCH = ROWS + 4;
    static_assert(TOKENS * PITCH * 4 <= FULL_X, "sums and barriers");
};

// A barrier of all of the cluster's threads, in two parts; the first shows the others what was written, or only that the thread is here.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// Four floats at this address of another block's shared memory.
__device__ __forceinline__ float4 read_of(uint32_t address, int rank) {
    uint32_t there;
    float4 v;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(there) : "memory");
    return v;
}

// The steps of a block that shares a tile with others, an even number.
struct Work : Steps {
    int tile, rank, splits;
    __device__ __forceinline__ Work(const Skinny &p) {
        asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(splits));
        tile = blockIdx.x / splits, rank = blockIdx.x % splits;
        const int pairs = (p.k + 2 * STEP - 1) / (2 * STEP);
        first = pairs * rank / splits * 2, steps = pairs * (rank + 1) / splits * 2 - first;
        begin = (long)(steps / 2) * tile / (gridDim.x / splits) * 2;
    }
};

// The tensors that the copy engine reads.
struct Maps {
    const CUtensorMap *words, *cells, *x;
};

// Asks for the words and cells of a pair of steps. Of SILU_MUL half of a tile's rows are gates, and behind them lie the ups.
template <typename M, Output OUTPUT>
__device__ __forceinline__ void ask_for_weights(const Skinny &p, const Work &work, const Maps &maps, uint32_t memory, int step) {
    constexpr int PARTS = OUTPUT == SILU_MUL ? 2 : 1, PART_ROWS = ROWS / PARTS;
    const int place = step % M::DEPTH, column = work.place(step), cell_rows = max(1, 8 >> min(p.group_shift, 3));
    const uint32_t full = memory + M::FULL + place / 2 * 8;
    barrier_expect(full, 2 * M::WORDS_BYTES + ROWS * 4 * cell_rows);
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        const int row = work.tile * PART_ROWS + part * p.n;
        copy_box(memory + M::WORDS + place * M::WORDS_BYTES + part * PART_ROWS * STEP, maps.words, full, column * (STEP / 8), row);
        copy_box(memory + M::CELLS + place * M::CELLS_BYTES + part * PART_ROWS * 4 * cell_rows, maps.cells, full, row, column * 4 >> p.group_shift);
    }
}

// Asks for a step's x.
template <typename M> __device__ __forceinline__ void ask_for_x(const Work &work, const Maps &maps, uint32_t memory, int step) {
    const int place = step % M::X_DEPTH;
    const uint32_t full = memory + M::FULL_X + place * 8, to = memory + place * M::X_BYTES;
    barrier_expect(full, M::X_BYTES);
#pragma unroll
    for (int half = 0; half < 2; half++) copy_box(to + half * (M::X_BYTES / 2), maps.x, full, work.place(step) * STEP + half * (STEP / 2), 0);
}

// One thread asks for all that comes, for what follows a step as soon as the step is multiplied.
template <typename M, Output OUTPUT>
__device__ __forceinline__ void bring(const Skinny &p, const Work &work, const Maps &maps, uint32_t memory) {
    const bool asks = threadIdx.x == CONSUMERS;
    if (asks)
        for (int step = 0; step < min(M::DEPTH, work.steps); step += 2) ask_for_weights<M, OUTPUT>(p, work, maps, memory, step);
    wait_for_previous(); // for x, and for what y was to it
    if (!asks) return;
    for (int step = 0; step < min(M::X_DEPTH, work.steps); step++) ask_for_x<M>(work, maps, memory, step);
    for (int step = 0; step + M::X_DEPTH < work.steps; step++) {
        barrier_wait(memory + M::EMPTY + step % M::X_DEPTH * 8, step / M::X_DEPTH & 1);
        ask_for_x<M>(work, maps, memory, step + M::X_DEPTH);
        // Both steps of a pair are multiplied.
        if (step % 2 == 1 && step - 1 + M::DEPTH < work.steps) ask_for_weights<M, OUTPUT>(p, work, maps, memory, step - 1 + M::DEPTH);
    }
}

// Multiplies, and leaves the sums in shared memory: [token][row of the tile].
// Of groups of 128, which a step is, integers are multiplied and their sums scaled, where that is less work.
template <typename M, Scheme SCHEME, int TOKENS, Output OUTPUT>
__device__ __forceinline__ void multiply(const Skinny &p, const Work &work, char *shared, uint32_t memory) {
    constexpr bool SCALES_SUMS = SCHEME == GROUPS_OF_128 && TOKENS <= 16;
    constexpr int REGISTERS = TOKENS / 2;
    const int thread = threadIdx.x, lane = thread % 32, quad = lane % 4, group = lane / 4;
    const int row_of_warp = thread / 32 * 16;
    // Rows of one copy, and where those are that the thread takes: of SILU_MUL 8 gates and 8 ups.
    constexpr int PART_ROWS = OUTPUT == SILU_MUL ? ROWS / 2 : ROWS, APART = OUTPUT == SILU_MUL ? PART_ROWS : 8;
    const int first_row = OUTPUT == SILU_MUL ? thread / 32 * 8 : row_of_warp;
    // A lane says where a row of 32 columns is, and is given its place's word of all four of them.
    const uint32_t my_words = memory + M::WORDS + (first_row + lane % 8) * STEP;
    uint32_t words_of_step[2];
#pragma unroll
    for (int step = 0; step < 2; step++) words_of_step[step] = ((step * 4 + lane / 8) ^ lane % 8) * 16;
    const char *my_cells = shared + M::CELLS + (first_row + group) * 4;
    constexpr bool ONE_GROUP = SCHEME == GROUPS_OF_128; // in a step
    const int shift = min(p.group_shift, 3), cell_rows = ONE_GROUP ? 2 : 8 >> shift;

    float acc[REGISTERS], sums[REGISTERS]; // `sums` of a step alone
#pragma unroll
    for (int i = 0; i < REGISTERS; i++) acc[i] = 0.f;
    float scales[2] = {};
    const uint64_t matrix = matrix_at<128>(memory);
    for (int round = 0; round * M::DEPTH < work.steps; round++)
#pragma unroll
        for (int place = 0; place < M::DEPTH; place++) {
            const int stage = place % M::X_DEPTH;
            if (round * M::DEPTH + place >= work.steps) break;
            if (place % 2 == 0) barrier_wait(memory + M::FULL + place / 2 * 8, round & 1);
            uint32_t words[2][4], cells[2][ONE_GROUP ? 1 : 4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                load_matrices(words[i], my_words + place / 2 * 2 * M::WORDS_BYTES + words_of_step[place % 2] + i * APART * STEP);
                const char *from = my_cells + place / 2 * 2 * M::CELLS_BYTES + i * (OUTPUT == SILU_MUL ? PART_ROWS * cell_rows : 8) * 4;
#pragma unroll
                for (int w = 0; w < (ONE_GROUP ? 1 : 4); w++)
                    cells[i][w] = *reinterpret_cast<const uint32_t *>(from + (ONE_GROUP ? place % 2 : (place % 2 * 4 + w) >> shift) * PART_ROWS * 4);
            }
            wgmma_wait<0>();
            if (place > 0 || round > 0) {
                // The step before is multiplied.
                if (lane == 0) barrier_arrive(memory + M::EMPTY + (stage + M::X_DEPTH - 1) % M::X_DEPTH * 8);
                if (SCALES_SUMS)
#pragma unroll
                    for (int i = 0; i < REGISTERS; i++) acc[i] += scales[i / 2 % 2] * sums[i];
            }
            uint32_t a[4][2][4];
#pragma unroll
            for (int w = 0; w < 4; w++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const uint32_t cell = cells[i][ONE_GROUP ? 0 : w];
                    const __half2 zero = __high2half2(as_half2(cell)), high_zero = __hsub2(zero, as_half2(0x63806380u)); // 1024 + z - 960
                    if (SCALES_SUMS) scales[i] = __low2float(as_half2(cell));
#pragma unroll
                    for (int b = 0; b < 4; b++)
                        a[w][b / 2][b % 2 * 2 + i] = SCALES_SUMS ? integers(words[i][w], b, zero, high_zero) : dequantized<SCHEME == OFFSETS>(words[i][w], b, cell);
                }
            }
            barrier_wait(memory + M::FULL_X + stage * 8, (round * (M::DEPTH / M::X_DEPTH) + place / M::X_DEPTH) & 1);
            wgmma_fence();
#pragma unroll
            for (int w = 0; w < 4; w++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const uint64_t here = matrix + stage * (M::X_BYTES / 16) + w / 2 * (TOKENS * 8) + (w % 2 * 2 + i) * 2;
                    if (SCALES_SUMS) Warpgroup<__half, TOKENS>::mma(sums, a[w][i], here, w + i > 0);
                    else Warpgroup<__half, TOKENS>::mma(acc, a[w][i], here, 1);
                }
            wgmma_commit();
        }
    wgmma_wait<0>();
    if (SCALES_SUMS && work.steps > 0)
#pragma unroll
        for (int i = 0; i < REGISTERS; i++) acc[i] += scales[i / 2 % 2] * sums[i];
    named_sync(1, CONSUMERS); // none reads x or weights any more
    float *to = reinterpret_cast<float *>(shared) + row_of_warp + group;
#pragma unroll
    for (int i = 0; i < REGISTERS; i++) to[(i / 4 * 8 + quad * 2 + i % 2) * M::PITCH + i / 2 % 2 * 8] = acc[i];
}

// Adds up the blocks' sums of this block's share of the outputs, and does with them what OUTPUT says.
template <typename M, Output OUTPUT> __device__ __forceinline__ void finish(const Skinny &p, const Work &work, uint32_t memory) {
    using N = Num<__half>;
    constexpr int COLUMNS = OUTPUT == SILU_MUL ? ROWS / 2 : ROWS, FOURS = COLUMNS / 4;
    const __half *bias = static_cast<const __half *>(p.bias);
    for (int item = work.rank * CONSUMERS + threadIdx.x; item < p.m * FOURS; item += work.splits * CONSUMERS) {
        const int token = item / FOURS, four = item % FOURS, column = work.tile * COLUMNS + four * 4;
        // Of 16 rows 8 are gates and 8 ups.
        const int row = OUTPUT == SILU_MUL ? four / 2 * 16 + four % 2 * 4 : four * 4;
        const uint32_t at = memory + (token * M::PITCH + row) * 4;
        float s[4] = {}, up[4] = {};
#pragma unroll 8
        for (int rank = 0; rank < work.splits; rank++) {
            const float4 part = read_of(at, rank);
            s[0] += part.x, s[1] += part.y, s[2] += part.z, s[3] += part.w;
            if (OUTPUT == SILU_MUL) {
                const float4 other = read_of(at + 32, rank);
                up[0] += other.x, up[1] += other.y, up[2] += other.z, up[3] += other.w;
            }
        }
        const bool valid = column < p.n; // a multiple of 4
        if (bias && valid)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[i] += N::to(bias[column + i]);
                if (OUTPUT == SILU_MUL) up[i] += N::to(bias[p.n + column + i]);
            }
        uint2 *y = reinterpret_cast<uint2 *>(static_cast<__half *>(p.y) + (long)token * p.n + column);
        if (OUTPUT == SILU_MUL) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float g = N::to(N::from(s[i])), u = N::to(N::from(up[i]));
                s[i] = g / (1.f + __expf(-g)) * u;
            }
        }
        uint2 result = make_uint2(N::pack(s[0], s[1]), N::pack(s[2], s[3]));
        if (OUTPUT == ADD_RESIDUAL) {
            float square = 0.f;
            if (valid) {
                const uint2 stream = *y;
                const float2 a = N::unpack(stream.x), b = N::unpack(stream.y), c = N::unpack(result.x), d = N::unpack(result.y);
                result = make_uint2(N::pack(a.x + c.x, a.y + c.y), N::pack(b.x + d.x, b.y + d.y));
                const float2 low = N::unpack(result.x), high = N::unpack(result.y);
                square = low.x * low.x + low.y * low.y + high.x * high.x + high.y * high.y;
            }
            // Four neighbouring threads hold 16 outputs of one token.
            square += __shfl_xor_sync(0xffffffffu, square, 1);
            square += __shfl_xor_sync(0xffffffffu, square, 2);
            if (valid && four % 4 == 0) p.sums_out[(long)(column / 16) * p.m + token] = square;
        }
        if (valid) *y = result;
    }
}

template <Scheme SCHEME, int TOKENS, Output OUTPUT>
__device__ __forceinline__ void int4_skinny(const Skinny &p, const Maps &maps) {
    using M = Memory<SCHEME, TOKENS>;
    extern __shared__ __align__(1024) char shared[];
    const uint32_t memory = shared_address(shared);
    const Work work(p);
    if (threadIdx.x == CONSUMERS) {
        for (int stage = 0; stage < M::X_DEPTH; stage++) {
            barrier_init(memory + M::FULL_X + stage * 8, 1); // who asks
            barrier_init(memory + M::EMPTY + stage * 8, CONSUMERS / 32);
        }
        for (int pair = 0; pair < M::DEPTH / 2; pair++) barrier_init(memory + M::FULL + pair * 8, 1);
        barrier_init_done();
        prefetch_map(maps.words);
        prefetch_map(maps.cells);
        prefetch_map(maps.x);
    }
    __syncthreads();
    let_next_start();
    if (threadIdx.x >= CONSUMERS) {
        bring<M, OUTPUT>(p, work, maps, memory);
    } else {
        multiply<M, SCHEME, TOKENS, OUTPUT>(p, work, shared, memory);
        wait_for_previous(); // for what y was to it
    }
    cluster_arrive();
    cluster_wait();
    if (threadIdx.x < CONSUMERS) finish<M, OUTPUT>(p, work, memory);
    // Until the others have read this block's sums. What they read is in what they have written, so that none needs to wait until
    // that is seen everywhere, as a release would.
    cluster_arrive_relaxed();
    cluster_wait();
}

#define DEFINE_ONE(NAME, OUTPUT, SCHEME, TOKENS)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME##_##TOKENS(const __grid_constant__ Skinny p,                   \
        const __grid_constant__ CUtensorMap words, const __grid_constant__ CUtensorMap cells, const __grid_constant__ CUtensorMap x) { \
        int4_skinny<SCHEME, TOKENS, OUTPUT>(p, Maps{&words, &cells, &x});                                                          \
    }
#define DEFINE(NAME, SCHEME, TOKENS)                         \
    DEFINE_ONE(NAME##_store, STORE, SCHEME, TOKENS)          \
    DEFINE_ONE(NAME##_add, ADD_RESIDUAL, SCHEME, TOKENS)     \
    DEFINE_ONE(NAME##_silu, SILU_MUL, SCHEME, TOKENS)
#define DEFINE_ALL(NAME, SCHEME) \
    DEFINE(NAME, SCHEME, 8)      \
    DEFINE(NAME, SCHEME, 16)     \
    DEFINE(NAME, SCHEME, 32)     \
    DEFINE(NAME, SCHEME, 64)
DEFINE_ALL(int4_hopper, ZEROS)
DEFINE_ALL(int4_affine_hopper, OFFSETS)
DEFINE_ALL(int4_128_hopper, GROUPS_OF_128)
