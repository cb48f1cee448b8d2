// Causal attention of many query rows over paged K and V for Hopper: what prefill_attention.cu computes, by the copy engine
// and products of warpgroups.
//
// Blocks stay and walk over work units (128 query rows of one head). One warp copies: Q, and tiles of 128 tokens of K and
// V, a page's box at a time, two stages deep. Two warpgroups compute 64 rows each: Q·Kᵀ of the next tile is queued before
// P·V of the present one, whose P comes from registers, and the two groups take turns, so that one's softmax runs under
// the other's products (flash attention 3, arXiv 2407.08608). Tiles go from the last to the first: only the first ones
// need masks. A V page, [dim][16 tokens], is exactly one step of the product, with rows of 32 bytes.
//
// A row's result does not depend on the rows beside it: tiles begin at multiples of 128 tokens, and a tile that a row does
// not see changes nothing.
#include "hopper.cuh"

constexpr int BLOCK = 16, TILE_ROWS = 128, TILE_TOKENS = 128, PAGES = TILE_TOKENS / BLOCK, STAGES = 2;
constexpr int GROUPS = 2, GROUP_ROWS = TILE_ROWS / GROUPS, GROUP_THREADS = 128, THREADS = (GROUPS + 1) * GROUP_THREADS;
// Named barriers: turns of the two groups, and a group alone.
constexpr int TURN = 1, ALONE = 3;

struct PrefillAttention {
    const void *q;
    const void *cache;
    void *out;
    const int2 *items;
    const int *rows;
    const int *query_lens;
    const int *context_lens;
    const int *table_starts;
    const int *blocks;
    int num_heads, num_kv_heads, q_stride, window;
    float scale;
    int num_items;
};

template <int D> struct Memory {
    static constexpr int HALVES = D / 64; // K and Q lie in halves of 64 values, 128 bytes a row
    static constexpr int Q_HALF = TILE_ROWS * 128, K_HALF = TILE_TOKENS * 128, V_PAGE = D * BLOCK * 2;
    static constexpr int Q = 0, K = Q + HALVES * Q_HALF, V = K + STAGES * HALVES * K_HALF, BARRIERS = V + STAGES * PAGES * V_PAGE;
    static constexpr int K_BYTES = HALVES * K_HALF, V_BYTES = PAGES * V_PAGE, Q_BYTES = HALVES * Q_HALF;
};
enum Barrier { Q_FULL, Q_EMPTY, K_FULL, K_EMPTY = K_FULL + STAGES, V_FULL = K_EMPTY + STAGES, V_EMPTY = V_FULL + STAGES };

// One work unit, and which tokens it sees.
struct Work {
    int seq, head, query_row, position, num_rows, context, first_tile, tiles;
    __device__ __forceinline__ Work(const PrefillAttention &p, int index) {
        const int2 item = p.items[index / p.num_heads];
        seq = item.x;
        head = index % p.num_heads;
        const int query_len = p.query_lens[seq], first_row = item.y * TILE_ROWS;
        context = p.context_lens[seq];
        query_row = p.rows[seq] + first_row;
        num_rows = min(TILE_ROWS, query_len - first_row);
        position = context - query_len + first_row;
        const int last_token = min(context, position + num_rows);
        first_tile = p.window > 0 ? max(0, position + 1 - p.window) / TILE_TOKENS : 0;
        tiles = (last_token + TILE_TOKENS - 1) / TILE_TOKENS;
    }
};

// Units go longest first, forth and back over the blocks, so that each block gets about the same work.
__device__ __forceinline__ int unit(int round) { return round * gridDim.x + (round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x); }

template <int D>
__device__ __forceinline__ void copy_all(const PrefillAttention &p, const CUtensorMap *q_map, const CUtensorMap *k_map, const CUtensorMap *v_map,
                                         uint32_t memory, int units) {
    using M = Memory<D>;
    const int lane = threadIdx.x % 32;
    auto barrier = [&](int which) { return memory + M::BARRIERS + which * 8; };
    int count = 0; // tiles so far: which stage, and which phase of its barriers
    for (int round = 0, index; (index = unit(round)) < units; round++) {
        const Work work(p, index);
        const int *table = p.blocks + p.table_starts[work.seq];
        const int kv_head = work.head / (p.num_heads / p.num_kv_heads), pages = (work.context + BLOCK - 1) / BLOCK;
        auto page_of = [&](int tile) {
            const int logical = tile * PAGES + lane;
            return lane < PAGES && logical < pages ? table[logical] : -1;
        };
        if (lane == 0) {
            barrier_wait(barrier(Q_EMPTY), (round & 1) ^ 1);
            barrier_expect(barrier(Q_FULL), M::Q_BYTES);
            for (int half = 0; half < M::HALVES; half++)
                copy_box(memory + M::Q + half * M::Q_HALF, q_map, barrier(Q_FULL), work.head * D + half * 64, work.query_row);
        }
        __syncwarp();
        auto copy_keys = [&](int page, int n) {
            const int stage = n % STAGES, parity = n / STAGES & 1;
            barrier_wait(barrier(K_EMPTY + stage), parity ^ 1);
            if (lane == 0) barrier_expect(barrier(K_FULL + stage), M::K_BYTES);
            __syncwarp();
            if (lane < PAGES)
                for (int half = 0; half < M::HALVES; half++)
                    copy_box(memory + M::K + (stage * M::HALVES + half) * M::K_HALF + lane * BLOCK * 128, k_map, barrier(K_FULL + stage), half * 64, 0,
                             kv_head, page);
        };
        auto copy_values = [&](int page, int n) {
            const int stage = n % STAGES, parity = n / STAGES & 1;
            barrier_wait(barrier(V_EMPTY + stage), parity ^ 1);
            if (lane == 0) barrier_expect(barrier(V_FULL + stage), M::V_BYTES);
            __syncwarp();
            if (lane < PAGES) copy_box(memory + M::V + (stage * PAGES + lane) * M::V_PAGE, v_map, barrier(V_FULL + stage), 0, 0, kv_head, page);
        };
        int page = page_of(work.tiles - 1);
        copy_keys(page, count);
        for (int tile = work.tiles - 2; tile >= work.first_tile; tile--) {
            const int next = page_of(tile);
            copy_keys(next, count + 1);
            copy_values(page, count);
            page = next;
            count++;
        }
        copy_values(page, count);
        count++;
    }
}

// What one warpgroup keeps between tiles, as mma.sync would hold it: a thread has the rows `lane / 4` and 8 below of its
// warp's 16, and in each run of 8 columns the two at `lane % 4 · 2`.
template <typename T, int D> struct Rows {
    float out[D / 2], maximum[2], sum[2];
    uint32_t p[PAGES][4];

    __device__ __forceinline__ void start() {
#pragma unroll
        for (int i = 0; i < D / 2; i++) out[i] = 0.f;
        maximum[0] = maximum[1] = -INFINITY;
        sum[0] = sum[1] = 0.f;
    }
    // Turns products into exponentials; the factors are for what was summed up so far.
    __device__ __forceinline__ void softmax(float (&s)[TILE_TOKENS / 2], float scale, float (&factor)[2]) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float now = maximum[r];
#pragma unroll
            for (int n = 0; n < TILE_TOKENS / 8; n++) now = fmaxf(now, fmaxf(s[n * 4 + r * 2], s[n * 4 + r * 2 + 1]));
            now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 1));
            now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 2));
            const float shift = now == -INFINITY ? 0.f : now * scale;
            factor[r] = exp2_fast(maximum[r] * scale - shift); // of -∞: 0
            maximum[r] = now;
            float total = 0.f;
#pragma unroll
            for (int n = 0; n < TILE_TOKENS / 8; n++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float &v = s[n * 4 + r * 2 + j];
                    v = exp2_fast(fmaf(v, scale, -shift));
                    total += v;
                }
            sum[r] = sum[r] * factor[r] + total;
        }
    }
    __device__ __forceinline__ void pack(const float (&s)[TILE_TOKENS / 2]) {
#pragma unroll
        for (int page = 0; page < PAGES; page++)
#pragma unroll
            for (int j = 0; j < 4; j++) p[page][j] = Num<T>::pack(s[page * 8 + j * 2], s[page * 8 + j * 2 + 1]);
    }
    __device__ __forceinline__ void rescale(const float (&factor)[2]) {
#pragma unroll
        for (int i = 0; i < D / 2; i++) out[i] *= factor[i / 2 % 2];
    }
    // out += P · V of one tile; runs on until waited for.
    __device__ __forceinline__ void add_values(uint32_t values) {
#pragma unroll
        for (int page = 0; page < PAGES; page++) Warpgroup<T, D>::mma(out, p[page], matrix_at<32>(values + page * Memory<D>::V_PAGE), 1);
        wgmma_commit();
    }
    // Normalises and writes; four threads of a row exchange words, so that each writes 16 bytes at once.
    __device__ __forceinline__ void store(T *result, long stride, int row, int num_rows) {
        const int quad = threadIdx.x % 4;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float total = sum[r];
            total += __shfl_xor_sync(0xffffffffu, total, 1);
            total += __shfl_xor_sync(0xffffffffu, total, 2);
            const float inverse = 1.f / total;
#pragma unroll
            for (int n = 0; n < D / 32; n++) {
                uint32_t w[4];
#pragma unroll
                for (int i = 0; i < 4; i++) w[i] = Num<T>::pack(out[(n * 4 + i) * 4 + r * 2] * inverse, out[(n * 4 + i) * 4 + r * 2 + 1] * inverse);
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
                if (row + r * 8 < num_rows)
                    *reinterpret_cast<uint4 *>(result + (row + r * 8) * stride + (n * 4 + quad) * 8) = make_uint4(w[0], w[1], w[2], w[3]);
            }
        }
    }
};

template <typename T, int D> __device__ __forceinline__ void compute_all(const PrefillAttention &p, char *shared, uint32_t memory, int units) {
    using M = Memory<D>;
    const int group = threadIdx.x / GROUP_THREADS - 1, thread = threadIdx.x % GROUP_THREADS, lane = threadIdx.x % 32;
    const int my_row = group * GROUP_ROWS + thread / 32 * 16 + lane / 4; // and 8 below
    auto barrier = [&](int which) { return memory + M::BARRIERS + which * 8; };
    auto release = [&](int which) {
        __syncwarp();
        if (lane == 0) barrier_arrive(barrier(which));
    };
    const uint32_t queries = memory + M::Q + group * GROUP_ROWS * 128;
    if (group == 1) named_arrive(TURN, GROUPS * GROUP_THREADS); // the first turn is group 0's
    Rows<T, D> rows;
    float s[TILE_TOKENS / 2], factor[2];
#pragma unroll
    for (int i = 0; i < TILE_TOKENS / 2; i++) s[i] = 0.f;
    auto multiply_keys = [&](int n) {
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            const int half = k / 4, step = k % 4 * 32; // bytes
            Warpgroup<T, TILE_TOKENS>::mma(s, matrix_at<128>(queries + half * M::Q_HALF + step),
                                           matrix_at<128>(memory + M::K + (n % STAGES * M::HALVES + half) * M::K_HALF + step), k > 0);
        }
        wgmma_commit();
    };
    auto values_at = [&](int n) { return memory + M::V + n % STAGES * M::V_BYTES; };
    int count = 0;
    for (int round = 0, index; (index = unit(round)) < units; round++) {
        const Work work(p, index);
        auto mask = [&](int tile) {
            const int token0 = tile * TILE_TOKENS, first = work.position + group * GROUP_ROWS, last = first + GROUP_ROWS - 1;
            if (token0 + TILE_TOKENS - 1 <= first && token0 + TILE_TOKENS <= work.context && (p.window == 0 || token0 > last - p.window)) return;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int row = work.position + my_row + r * 8;
                const int end = min(row + 1, work.context) - token0 - lane % 4 * 2, begin = p.window > 0 ? row - p.window + 1 - token0 - lane % 4 * 2 : -1;
#pragma unroll
                for (int n = 0; n < TILE_TOKENS / 8; n++)
#pragma unroll
                    for (int j = 0; j < 2; j++)
                        if (n * 8 + j >= end || n * 8 + j < begin) s[n * 4 + r * 2 + j] = -INFINITY;
            }
        };
        // What lies behind the last token in its page may be anything, NaN too, and 0 · NaN is not 0. Both groups write
        // the same zeros, each before its own product.
        auto clear_tail = [&](int tile, int n) {
            const int tail = work.context % BLOCK, page = work.context / BLOCK - tile * PAGES;
            if (tail == 0 || page >= PAGES) return;
            if (thread < D) {
                char *row = shared + (values_at(n) - memory) + page * M::V_PAGE + thread * 32;
                for (int token = tail; token < BLOCK; token++)
                    *reinterpret_cast<uint16_t *>(row + ((token >> 3) ^ ((thread >> 2) & 1)) * 16 + (token & 7) * 2) = 0;
            }
            fence_async();
            named_sync(ALONE + group, GROUP_THREADS);
        };
        rows.start();
        int tile = work.tiles - 1;
        barrier_wait(barrier(Q_FULL), round & 1);
        barrier_wait(barrier(K_FULL + count % STAGES), count / STAGES & 1);
        named_sync(TURN + group, GROUPS * GROUP_THREADS);
        wgmma_fence();
        multiply_keys(count);
        named_arrive(TURN + (group ^ 1), GROUPS * GROUP_THREADS);
        wgmma_wait<0>();
        release(K_EMPTY + count % STAGES);
        mask(tile);
        rows.softmax(s, p.scale, factor);
        rows.pack(s);
        barrier_wait(barrier(V_FULL + count % STAGES), count / STAGES & 1);
        clear_tail(tile, count);
        for (tile--; tile >= work.first_tile; tile--) {
            const int next = count + 1;
            barrier_wait(barrier(K_FULL + next % STAGES), next / STAGES & 1);
            named_sync(TURN + group, GROUPS * GROUP_THREADS);
            wgmma_fence();
            multiply_keys(next);
            barrier_wait(barrier(V_FULL + count % STAGES), count / STAGES & 1);
            rows.add_values(values_at(count));
            named_arrive(TURN + (group ^ 1), GROUPS * GROUP_THREADS);
            wgmma_wait<1>();
            release(K_EMPTY + next % STAGES);
            mask(tile);
            rows.softmax(s, p.scale, factor);
            wgmma_wait<0>();
            release(V_EMPTY + count % STAGES);
            rows.rescale(factor);
            rows.pack(s);
            count = next;
        }
        release(Q_EMPTY);
        barrier_wait(barrier(V_FULL + count % STAGES), count / STAGES & 1);
        wgmma_fence();
        rows.add_values(values_at(count));
        wgmma_wait<0>();
        release(V_EMPTY + count % STAGES);
        count++;
        const long stride = (long)p.num_heads * D;
        rows.store(static_cast<T *>(p.out) + work.query_row * stride + work.head * D, stride, my_row, work.num_rows);
    }
}

template <typename T, int D>
__device__ __forceinline__ void prefill_attention(const PrefillAttention &p, const CUtensorMap *q_map, const CUtensorMap *k_map,
                                                  const CUtensorMap *v_map) {
    using M = Memory<D>;
    extern __shared__ __align__(1024) char shared[];
    const uint32_t memory = shared_address(shared);
    const int units = p.num_items * p.num_heads;
    if (threadIdx.x == 0) {
        auto init = [&](int which, int arrivals) { barrier_init(memory + M::BARRIERS + which * 8, arrivals); };
        constexpr int WARPS = GROUPS * GROUP_THREADS / 32;
        init(Q_FULL, 1);
        init(Q_EMPTY, WARPS);
        for (int stage = 0; stage < STAGES; stage++) {
            init(K_FULL + stage, 1);
            init(K_EMPTY + stage, WARPS);
            init(V_FULL + stage, 1);
            init(V_EMPTY + stage, WARPS);
        }
        barrier_init_done();
        prefetch_map(q_map);
        prefetch_map(k_map);
        prefetch_map(v_map);
    }
    __syncthreads();
    let_next_start();
    wait_for_previous();
    if (threadIdx.x < GROUP_THREADS) {
        fewer_registers<24>();
        if (threadIdx.x < 32) copy_all<D>(p, q_map, k_map, v_map, memory, units);
    } else {
        more_registers<240>();
        compute_all<T, D>(p, shared, memory, units);
    }
}

#define DEFINE_DIM(SUFFIX, T, D)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) prefill_attention_hopper_##D##_##SUFFIX(                                  \
        const __grid_constant__ PrefillAttention p, const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,      \
        const __grid_constant__ CUtensorMap v) {                                                                                       \
        prefill_attention<T, D>(p, &q, &k, &v);                                                                                        \
    }
#define DEFINE(SUFFIX, T) DEFINE_DIM(SUFFIX, T, 64) DEFINE_DIM(SUFFIX, T, 128)
FOR_BOTH(DEFINE)
