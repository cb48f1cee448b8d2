// Causal attention of many query rows over paged K and V for Hopper: what prefill_attention.cu computes, by the copy engine
// and products of warpgroups.
//
// Blocks stay and walk over work units (128 query rows of one head). One warp copies: Q, and tiles of 128 tokens of K and
// V, a page's box at a time, two stages deep. Two warpgroups compute 64 rows each: Q·Kᵀ of the next tile is queued before
// P·V of the present one, whose P comes from registers, and the two groups take turns, so that one's softmax runs under
// the other's products (flash attention 3, arXiv 2407.08608). Tiles go from the last to the first: only the first ones
// need masks. A V page, [dim][16 tokens], is exactly one step of the product, with rows of 32 bytes.
//
// Pages of eight-bit floats are copied as they are, into a ring of tiles; seven more warps turn them into the same stages of
// halves, which hold them exactly, as P does; Q becomes halves when it is there.
//
// A row's result does not depend on the rows beside it: tiles begin at multiples of 128 tokens, and a tile that a row does
// not see changes nothing.
#include <type_traits>

#include "prefill_copies.cuh"

// Named barriers: turns of the two groups, and a group alone.
constexpr int TURN = 1, ALONE = 3;

// What is multiplied: the pages' type, or halves for eight-bit floats.
template <typename T, typename KV> using Multiplied = std::conditional_t<sizeof(KV) == 1, __half, T>;

// What one warpgroup keeps between tiles, as mma.sync would hold it: a thread has the rows `lane / 4` and 8 below of its
// warp's 16, and in each run of 8 columns the two at `lane % 4 · 2`.
template <typename T, int D> struct Rows { // of what is multiplied
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
    template <typename Out> __device__ __forceinline__ void store(Out *result, long stride, int row, int num_rows, float value_scale) {
        const int quad = threadIdx.x % 4;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float total = sum[r];
            total += __shfl_xor_sync(0xffffffffu, total, 1);
            total += __shfl_xor_sync(0xffffffffu, total, 2);
            const float inverse = value_scale / total;
#pragma unroll
            for (int n = 0; n < D / 32; n++) {
                uint32_t w[4];
#pragma unroll
                for (int i = 0; i < 4; i++) w[i] = Num<Out>::pack(out[(n * 4 + i) * 4 + r * 2] * inverse, out[(n * 4 + i) * 4 + r * 2 + 1] * inverse);
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

template <typename T, typename KV, int D> __device__ __forceinline__ void compute_all(const PrefillAttention &p, char *shared, uint32_t memory, int units) {
    using M = Memory<D>;
    using C = Multiplied<T, KV>;
    const int group = (threadIdx.x - COPYING<KV>) / GROUP_THREADS, thread = threadIdx.x % GROUP_THREADS, lane = threadIdx.x % 32;
    const int my_row = group * GROUP_ROWS + thread / 32 * 16 + lane / 4; // and 8 below
    auto barrier = [&](int which) { return memory + M::BARRIERS + which * 8; };
    auto release = [&](int which) {
        __syncwarp();
        if (lane == 0) barrier_arrive(barrier(which));
    };
    const uint32_t queries = memory + M::Q + group * GROUP_ROWS * 128;
    if (group == 1) named_arrive(TURN, GROUPS * GROUP_THREADS); // the first turn is group 0's
    Rows<C, D> rows;
    float s[TILE_TOKENS / 2], factor[2];
#pragma unroll
    for (int i = 0; i < TILE_TOKENS / 2; i++) s[i] = 0.f;
    auto multiply_keys = [&](int n) {
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            const int half = k / 4, step = k % 4 * 32; // bytes
            Warpgroup<C, TILE_TOKENS>::mma(s, matrix_at<128>(queries + half * M::Q_HALF + step),
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
        // What lies behind the last token in its page may be anything, NaN too, and 0 · NaN is not 0; so may eight-bit pages that
        // are not there. Both groups write the same zeros, each before its own product.
        auto clear_tail = [&](int tile, int n) {
            const int present = work.context - tile * TILE_TOKENS;
            if (present >= TILE_TOKENS || (sizeof(KV) > 1 && present % BLOCK == 0)) return;
            if (thread < D) {
                char *row = shared + (values_at(n) - memory) + present / BLOCK * M::V_PAGE + thread * 32;
                for (int token = present % BLOCK; token < BLOCK; token++)
                    *reinterpret_cast<uint16_t *>(row + ((token >> 3) ^ ((thread >> 2) & 1)) * 16 + (token & 7) * 2) = 0;
                for (int page = present / BLOCK + 1; sizeof(KV) == 1 && page < PAGES; page++) {
                    row += M::V_PAGE;
                    uint4 *both = reinterpret_cast<uint4 *>(row);
                    both[0] = both[1] = make_uint4(0, 0, 0, 0);
                }
            }
            fence_async();
            named_sync(ALONE + group, GROUP_THREADS);
        };
        // This group's rows of Q as halves, in place.
        auto convert_queries = [&] {
            for (int half = 0; half < M::HALVES; half++)
                for (int i = thread; i < GROUP_ROWS * 8; i += GROUP_THREADS) {
                    Vec8 *at = reinterpret_cast<Vec8 *>(shared + (queries - memory) + half * M::Q_HALF) + i;
                    Vec8 eight = *at;
#pragma unroll
                    for (int j = 0; j < 4; j++) eight.w[j] = to_halves<T>(eight.w[j]);
                    *at = eight;
                }
            fence_async();
            named_sync(ALONE + group, GROUP_THREADS);
        };
        rows.start();
        int tile = work.tiles - 1;
        barrier_wait(barrier(Q_FULL), round & 1);
        if constexpr (!std::is_same_v<C, T>) convert_queries();
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
        rows.store(static_cast<T *>(p.out) + work.query_row * stride + work.head * D, stride, my_row, work.num_rows,
                   sizeof(KV) == 1 ? p.value_scale : 1.f);
    }
}

template <typename T, typename KV, int D>
__device__ __forceinline__ void prefill_attention(const PrefillAttention &p, const CUtensorMap *q_map, const CUtensorMap *k_map,
                                                  const CUtensorMap *v_map) {
    using M = Memory<D>;
    constexpr bool FP8 = sizeof(KV) == 1;
    extern __shared__ __align__(1024) char shared[];
    const uint32_t memory = shared_address(shared);
    const int units = p.num_items * p.num_heads;
    if (threadIdx.x == 0) {
        auto init = [&](int which, int arrivals) { barrier_init(memory + M::BARRIERS + which * 8, arrivals); };
        constexpr int WARPS = GROUPS * GROUP_THREADS / 32, FILLERS = FP8 ? WIDENING_WARPS : 1;
        init(Q_FULL, 1);
        init(Q_EMPTY, WARPS);
        for (int stage = 0; stage < STAGES; stage++) {
            init(K_FULL + stage, FILLERS);
            init(K_EMPTY + stage, WARPS);
            init(V_FULL + stage, FILLERS);
            init(V_EMPTY + stage, WARPS);
        }
        for (int slot = 0; FP8 && slot < RAW_SLOTS; slot++) {
            init(RAW_FULL + slot, 1);
            init(RAW_EMPTY + slot, WIDENING_WARPS);
        }
        barrier_init_done();
        prefetch_map(q_map);
        if (!FP8) {
            prefetch_map(k_map);
            prefetch_map(v_map);
        }
    }
    __syncthreads();
    let_next_start();
    wait_for_previous();
    if (threadIdx.x < COPYING<KV>) {
        fewer_registers<FP8 ? 40 : 24>();
        if constexpr (FP8) {
            if (threadIdx.x < 32) copy_raw<D>(p, q_map, memory, units);
            else widen_all<D>(p, shared, memory, units);
        } else if (threadIdx.x < 32) {
            copy_all<D>(p, q_map, k_map, v_map, memory, units);
        }
    } else {
        more_registers<FP8 ? 216 : 240>();
        compute_all<T, KV, D>(p, shared, memory, units);
    }
}

#define DEFINE_DIM(SUFFIX, T, D)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(COPYING<T> + 256, 1) prefill_attention_hopper_##D##_##SUFFIX(                         \
        const __grid_constant__ PrefillAttention p, const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,      \
        const __grid_constant__ CUtensorMap v) {                                                                                       \
        prefill_attention<T, T, D>(p, &q, &k, &v);                                                                                     \
    }                                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(COPYING<uint8_t> + 256, 1) prefill_attention_hopper_##D##_##SUFFIX##_fp8(             \
        const __grid_constant__ PrefillAttention p, const __grid_constant__ CUtensorMap q) {                                           \
        prefill_attention<T, uint8_t, D>(p, &q, nullptr, nullptr);                                                                     \
    }
#define DEFINE(SUFFIX, T) DEFINE_DIM(SUFFIX, T, 64) DEFINE_DIM(SUFFIX, T, 128)
FOR_BOTH(DEFINE)
