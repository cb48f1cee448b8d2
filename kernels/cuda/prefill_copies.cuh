// How Q, K and V come to the products of prefill_attention_sm90a.cu: the work units, shared memory, and the warps that fill it.
#pragma once
#include "hopper.cuh"
#include "prefill.cuh"

constexpr int TILE_TOKENS = 128, PAGES = TILE_TOKENS / BLOCK, STAGES = 2;
constexpr int GROUPS = 2, GROUP_ROWS = TILE_ROWS / GROUPS, GROUP_THREADS = 128;
constexpr int RAW_SLOTS = 4, WIDENING_WARPS = 7;
// Threads in front of the two groups.
template <typename KV> constexpr int COPYING = sizeof(KV) == 1 ? 256 : 128;

template <int D> struct Memory {
    static constexpr int HALVES = D / 64; // K and Q lie in halves of 64 values, 128 bytes a row
    static constexpr int Q_HALF = TILE_ROWS * 128, K_HALF = TILE_TOKENS * 128, V_PAGE = D * BLOCK * 2;
    static constexpr int Q = 0, K = Q + HALVES * Q_HALF, V = K + STAGES * HALVES * K_HALF, BARRIERS = V + STAGES * PAGES * V_PAGE;
    // Eight-bit tiles, K or V, behind the barriers.
    static constexpr int RAW_PAGE = D * BLOCK, RAW_BYTES = PAGES * RAW_PAGE, RAW = BARRIERS + 256;
    static constexpr int K_BYTES = HALVES * K_HALF, V_BYTES = PAGES * V_PAGE, Q_BYTES = HALVES * Q_HALF;
};
enum Barrier { Q_FULL, Q_EMPTY, K_FULL, K_EMPTY = K_FULL + STAGES, V_FULL = K_EMPTY + STAGES, V_EMPTY = V_FULL + STAGES,
    RAW_FULL = V_EMPTY + STAGES, RAW_EMPTY = RAW_FULL + RAW_SLOTS };

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

// Visits the tiles in the order in which they are needed: K of a tile before V of the one before. `n` counts tiles: which stage,
// and which phase of its barriers.
template <typename Unit, typename Keys, typename Values>
__device__ __forceinline__ void walk(const PrefillAttention &p, int units, Unit &&begin, Keys &&keys, Values &&values) {
    int n = 0;
    for (int round = 0, index; (index = unit(round)) < units; round++) {
        const Work work(p, index);
        begin(work, round);
        keys(work.tiles - 1, n);
        for (int tile = work.tiles - 2; tile >= work.first_tile; tile--) {
            keys(tile, n + 1);
            values(n);
            n++;
        }
        values(n);
        n++;
    }
}

// Where a lane's page of the next tiles lies, and the copy of Q, which opens a work unit.
template <int D> struct Source {
    using M = Memory<D>;
    const PrefillAttention &p;
    const uint32_t memory;
    const int *table;
    int kv_head, pages, even, odd; // the lane's page of the tiles of even and odd number, -1 for none

    __device__ __forceinline__ uint32_t barrier(int which) const { return memory + M::BARRIERS + which * 8; }
    __device__ __forceinline__ void begin(const Work &work, int round, const CUtensorMap *q_map) {
        table = p.blocks + p.table_starts[work.seq];
        kv_head = work.head / (p.num_heads / p.num_kv_heads);
        pages = (work.context + BLOCK - 1) / BLOCK;
        if (threadIdx.x == 0) {
            barrier_wait(barrier(Q_EMPTY), (round & 1) ^ 1);
            barrier_expect(barrier(Q_FULL), M::Q_BYTES);
            for (int half = 0; half < M::HALVES; half++)
                copy_box(memory + M::Q + half * M::Q_HALF, q_map, barrier(Q_FULL), work.head * D + half * 64, work.query_row);
        }
        __syncwarp();
    }
    __device__ __forceinline__ int look_up(int tile, int n) {
        const int lane = threadIdx.x % 32, logical = tile * PAGES + lane;
        const int page = lane < PAGES && logical < pages ? table[logical] : -1;
        if (n & 1) odd = page;
        else even = page;
        return page;
    }
    __device__ __forceinline__ int page(int n) const { return n & 1 ? odd : even; }
};

// One warp copies tiles of T.
template <int D>
__device__ __forceinline__ void copy_all(const PrefillAttention &p, const CUtensorMap *q_map, const CUtensorMap *k_map, const CUtensorMap *v_map,
                                         uint32_t memory, int units) {
    using M = Memory<D>;
    const int lane = threadIdx.x % 32;
    Source<D> source{p, memory};
    auto barrier = [&](int which) { return source.barrier(which); };
    walk(
        p, units, [&](const Work &work, int round) { source.begin(work, round, q_map); },
        [&](int tile, int n) {
            const int page = source.look_up(tile, n), stage = n % STAGES;
            barrier_wait(barrier(K_EMPTY + stage), (n / STAGES & 1) ^ 1);
            if (lane == 0) barrier_expect(barrier(K_FULL + stage), M::K_BYTES);
            __syncwarp();
            if (lane < PAGES)
                for (int half = 0; half < M::HALVES; half++)
                    copy_box(memory + M::K + (stage * M::HALVES + half) * M::K_HALF + lane * BLOCK * 128, k_map, barrier(K_FULL + stage), half * 64, 0,
                             source.kv_head, page);
        },
        [&](int n) {
            const int stage = n % STAGES;
            barrier_wait(barrier(V_EMPTY + stage), (n / STAGES & 1) ^ 1);
            if (lane == 0) barrier_expect(barrier(V_FULL + stage), M::V_BYTES);
            __syncwarp();
            if (lane < PAGES)
                copy_box(memory + M::V + (stage * PAGES + lane) * M::V_PAGE, v_map, barrier(V_FULL + stage), 0, 0, source.kv_head, source.page(n));
        });
}

// One warp copies eight-bit tiles as they are.
template <int D> __device__ __forceinline__ void copy_raw(const PrefillAttention &p, const CUtensorMap *q_map, uint32_t memory, int units) {
    using M = Memory<D>;
    const int lane = threadIdx.x % 32;
    const long head_bytes = M::RAW_PAGE, page_bytes = 2l * p.num_kv_heads * head_bytes;
    Source<D> source{p, memory};
    int slots = 0;
    auto copy = [&](int page, int head) {
        const int slot = slots % RAW_SLOTS;
        const uint32_t full = source.barrier(RAW_FULL + slot);
        barrier_wait(source.barrier(RAW_EMPTY + slot), (slots / RAW_SLOTS & 1) ^ 1);
        const unsigned present = __ballot_sync(0xffffffffu, page >= 0);
        if (lane == 0) barrier_expect(full, __popc(present) * M::RAW_PAGE);
        __syncwarp();
        if (page >= 0)
            copy_bytes(memory + M::RAW + slot * M::RAW_BYTES + lane * M::RAW_PAGE,
                       static_cast<const char *>(p.cache) + page * page_bytes + head * head_bytes, M::RAW_PAGE, full);
        slots++;
    };
    walk(
        p, units, [&](const Work &work, int round) { source.begin(work, round, q_map); },
        [&](int tile, int n) { copy(source.look_up(tile, n), source.kv_head); },
        [&](int n) { copy(source.page(n), p.num_kv_heads + source.kv_head); });
}

// The other warps in front turn them into halves, in the stages that `copy_all` fills. A page that is not there leaves what was.
template <int D> __device__ __forceinline__ void widen_all(const PrefillAttention &p, char *shared, uint32_t memory, int units) {
    using M = Memory<D>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 1;
    auto barrier = [&](int which) { return memory + M::BARRIERS + which * 8; };
    int slots = 0;
    auto widen_slot = [&](int full, int empty, int n, auto &&store) {
        const int slot = slots % RAW_SLOTS, stage = n % STAGES;
        barrier_wait(barrier(RAW_FULL + slot), slots / RAW_SLOTS & 1);
        barrier_wait(barrier(empty + stage), (n / STAGES & 1) ^ 1);
        const uint4 *raw = reinterpret_cast<const uint4 *>(shared + M::RAW + slot * M::RAW_BYTES);
#pragma unroll 2
        for (int i = warp * 32 + lane; i < M::RAW_BYTES / 16; i += WIDENING_WARPS * 32) {
            Vec8 low, high;
            widen<__half>(raw[i], &low, &high);
            store(i, low.v, high.v);
        }
        fence_async();
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(barrier(RAW_EMPTY + slot));
            barrier_arrive(barrier(full + stage));
        }
        slots++;
    };
    walk(
        p, units, [](const Work &, int) {},
        [&](int, int n) {
            char *keys = shared + M::K + n % STAGES * M::K_BYTES;
            widen_slot(K_FULL, K_EMPTY, n, [&](int i, uint4 low, uint4 high) {
                constexpr int ROW = D / 16; // 16 values each
                const int token = i / ROW, half = i % ROW / 4, at = i % 4 * 2;
                char *row = keys + half * M::K_HALF + token * 128;
                // The halves of a row lie in the same banks: one writes its second piece first.
                const int first = at + (half & 1), second = at + (~half & 1);
                *reinterpret_cast<uint4 *>(row + (first ^ (token & 7)) * 16) = half & 1 ? high : low;
                *reinterpret_cast<uint4 *>(row + (second ^ (token & 7)) * 16) = half & 1 ? low : high;
            });
        },
        [&](int n) {
            char *values = shared + M::V + n % STAGES * M::V_BYTES;
            widen_slot(V_FULL, V_EMPTY, n, [&](int i, uint4 low, uint4 high) {
                const int turn = i >> 2 & 1; // i % D is the dim
                *reinterpret_cast<uint4 *>(values + i * 32 + turn * 16) = low;
                *reinterpret_cast<uint4 *>(values + i * 32 + (turn ^ 1) * 16) = high;
            });
        });
}
