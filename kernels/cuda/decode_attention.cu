// Attention of single query rows (decode) over paged K and V, bound by reading the cache once.
//
// An item is (sequence, kv head, run of pages). All query heads of the kv head share the item: they are the columns of the
// products, S^T = K · Q^T and O^T = V^T · P^T, so that 8 heads fill a tile and K and V are the A operands, straight from
// memory into registers. The warps of a block take pages in turn, each with its own running maximum; they merge in shared
// memory. Of a sequence cut into several items, the block that finishes last merges the parts.
//
// Order of k inside a product is free when both operands agree: a lane loads 16 neighbouring bytes of K, and row r of the
// S^T tile is token 4·(r/2 mod 4) + r mod 2 + 2·(r/8), so that four neighbouring tokens of V^T are one lane's operand.
#include "common.cuh"

constexpr int BLOCK = 16; // tokens in a page
constexpr int WARPS = 4;

struct DecodeAttention {
    const void *q;             // rows of `q_stride` values, the query heads first
    const void *cache;         // this layer's pages
    void *out;                 // [rows][num_heads · D]
    const int *plan;           // [0] items, [1] pages in an item
    const int2 *items;         // (sequence, part)
    const int *rows;           // [sequences] query row
    const int *context_lens;   // [sequences]
    const int *table_starts;   // [sequences] first entry in `blocks`
    const int *blocks;         // block tables, one after another
    float *parts;              // [item][kv head][head in group][D], then maximum and sum for each
    int *arrived;              // [sequences][kv heads], zero between launches
    int num_heads, num_kv_heads, q_stride, window;
    float scale;               // 1/√D · log2(e)
};

__device__ __forceinline__ uint32_t transpose8x8(uint32_t v) {
    uint32_t r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}

template <typename T, int D, int TILES> __device__ __forceinline__ void decode_attention(const DecodeAttention &p) {
    using N = Num<T>;
    constexpr int KBLOCKS = D / 32, MTILES = D / 16, COLUMNS = 8 * TILES;
    __shared__ float merged[WARPS][COLUMNS][D + 4];
    __shared__ float maxima[WARPS][COLUMNS], sums[WARPS][COLUMNS];
    __shared__ int is_last;
    let_next_start();
    wait_for_previous();
    const int item = blockIdx.x, kv_head = blockIdx.y;
    if (item >= p.plan[0]) return;
    const int2 work = p.items[item];
    const int seq = work.x, part = work.y, part_pages = p.plan[1];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    const int heads = p.num_heads / p.num_kv_heads;
    const int length = p.context_lens[seq], row = p.rows[seq];
    const int first_token = p.window > 0 ? max(0, length - p.window) : 0;
    const int first_page = first_token / BLOCK, pages = (length + BLOCK - 1) / BLOCK;
    const int begin = first_page + part * part_pages, end = min(begin + part_pages, pages);
    const int num_parts = (pages - first_page + part_pages - 1) / part_pages;
    const int *table = p.blocks + p.table_starts[seq];
    const long page_values = 2l * p.num_kv_heads * BLOCK * D;
    const T *cache = static_cast<const T *>(p.cache);

    // Q^T: column = head, k in the lanes' order.
    uint32_t q[TILES][KBLOCKS][4];
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        const int head = t * 8 + group;
#pragma unroll
        for (int b = 0; b < KBLOCKS; b++) {
            Vec8 v;
            v.v = make_uint4(0, 0, 0, 0);
            if (head < heads) v.v = *reinterpret_cast<const uint4 *>(static_cast<const T *>(p.q) + (long)row * p.q_stride + (kv_head * heads + head) * D + b * 32 + quad * 8);
#pragma unroll
            for (int j = 0; j < 4; j++) q[t][b][j] = v.w[j];
        }
    }
    float out[TILES][MTILES][4], maximum[TILES][2], sum[TILES][2];
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        maximum[t][0] = maximum[t][1] = -INFINITY;
        sum[t][0] = sum[t][1] = 0.f;
#pragma unroll
        for (int i = 0; i < MTILES; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) out[t][i][j] = 0.f;
    }
    const int token0 = 4 * (group / 2) + group % 2, token1 = token0 + 2; // within a page
    Vec8 k[KBLOCKS][2];
    int page = begin + warp;
    // The table's entry of the page after the next is on its way while a page is computed.
    int block = page < end ? table[page] : 0;
    if (page < end) {
        const T *keys = cache + block * page_values + (long)kv_head * BLOCK * D;
#pragma unroll
        for (int b = 0; b < KBLOCKS; b++) {
            k[b][0].v = load_once16(keys + token0 * D + b * 32 + quad * 8);
            k[b][1].v = load_once16(keys + token1 * D + b * 32 + quad * 8);
        }
    }
    int next_block = page + WARPS < end ? table[page + WARPS] : 0;
    for (; page < end; page += WARPS) {
        const T *values = cache + block * page_values + (long)(p.num_kv_heads + kv_head) * BLOCK * D;
        uint2 v[MTILES][2];
#pragma unroll
        for (int i = 0; i < MTILES; i++) {
            v[i][0] = load_once8(values + (i * 16 + group) * BLOCK + quad * 4);
            v[i][1] = load_once8(values + (i * 16 + group + 8) * BLOCK + quad * 4);
        }
        float s[TILES][4];
#pragma unroll
        for (int t = 0; t < TILES; t++) {
#pragma unroll
            for (int j = 0; j < 4; j++) s[t][j] = 0.f;
#pragma unroll
            for (int b = 0; b < KBLOCKS; b++) {
                const uint32_t first[4] = {k[b][0].w[0], k[b][1].w[0], k[b][0].w[1], k[b][1].w[1]};
                const uint32_t second[4] = {k[b][0].w[2], k[b][1].w[2], k[b][0].w[3], k[b][1].w[3]};
                N::mma(s[t], first, q[t][b][0], q[t][b][1]);
                N::mma(s[t], second, q[t][b][2], q[t][b][3]);
            }
        }
        block = next_block;
        if (page + WARPS < end) {
            const T *keys = cache + block * page_values + (long)kv_head * BLOCK * D;
#pragma unroll
            for (int b = 0; b < KBLOCKS; b++) {
                k[b][0].v = load_once16(keys + token0 * D + b * 32 + quad * 8);
                k[b][1].v = load_once16(keys + token1 * D + b * 32 + quad * 8);
            }
            next_block = page + 2 * WARPS < end ? table[page + 2 * WARPS] : 0;
        }
        const int position0 = page * BLOCK + token0, position1 = page * BLOCK + token1;
        const bool whole = (page + 1) * BLOCK <= length && page * BLOCK >= first_token;
        if (!whole) {
            // What lies behind the last token may be anything, NaN too.
            const int start = page * BLOCK + quad * 4;
            auto keep = [&](int token) { return token < length && token >= first_token; };
            const uint32_t m0 = (keep(start) ? 0xffffu : 0u) | (keep(start + 1) ? 0xffff0000u : 0u);
            const uint32_t m1 = (keep(start + 2) ? 0xffffu : 0u) | (keep(start + 3) ? 0xffff0000u : 0u);
#pragma unroll
            for (int i = 0; i < MTILES; i++) {
                v[i][0].x &= m0, v[i][1].x &= m0;
                v[i][0].y &= m1, v[i][1].y &= m1;
            }
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                if (!keep(position0)) s[t][0] = s[t][1] = -INFINITY;
                if (!keep(position1)) s[t][2] = s[t][3] = -INFINITY;
            }
        }
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            float m[2] = {fmaxf(s[t][0], s[t][2]), fmaxf(s[t][1], s[t][3])};
#pragma unroll
            for (int o = 4; o < 32; o *= 2) {
                m[0] = fmaxf(m[0], __shfl_xor_sync(0xffffffffu, m[0], o));
                m[1] = fmaxf(m[1], __shfl_xor_sync(0xffffffffu, m[1], o));
            }
            float shift[2];
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const float old = maximum[t][c], now = fmaxf(old, m[c]);
                maximum[t][c] = now;
                shift[c] = now == -INFINITY ? 0.f : now * p.scale;
                const float factor = old == -INFINITY ? 0.f : exp2f(old * p.scale - shift[c]);
                sum[t][c] *= factor;
#pragma unroll
                for (int i = 0; i < MTILES; i++) {
                    out[t][i][c] *= factor;
                    out[t][i][c + 2] *= factor;
                }
            }
            const float e0 = exp2f(s[t][0] * p.scale - shift[0]), e1 = exp2f(s[t][1] * p.scale - shift[1]);
            const float e2 = exp2f(s[t][2] * p.scale - shift[0]), e3 = exp2f(s[t][3] * p.scale - shift[1]);
            sum[t][0] += e0 + e2;
            sum[t][1] += e1 + e3;
            const uint32_t b0 = transpose8x8(N::pack(e0, e1)), b1 = transpose8x8(N::pack(e2, e3));
#pragma unroll
            for (int i = 0; i < MTILES; i++) {
                const uint32_t a[4] = {v[i][0].x, v[i][1].x, v[i][0].y, v[i][1].y};
                N::mma(out[t][i], a, b0, b1);
            }
        }
    }
    // Merge the warps.
#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
#pragma unroll
            for (int o = 4; o < 32; o *= 2) sum[t][c] += __shfl_xor_sync(0xffffffffu, sum[t][c], o);
            const int column = t * 8 + quad * 2 + c;
            if (group == 0) {
                maxima[warp][column] = maximum[t][c];
                sums[warp][column] = sum[t][c];
            }
#pragma unroll
            for (int i = 0; i < MTILES; i++) {
                merged[warp][column][i * 16 + group] = out[t][i][c];
                merged[warp][column][i * 16 + group + 8] = out[t][i][c + 2];
            }
        }
    }
    __syncthreads();
    const long slot = (long)item * p.num_kv_heads + kv_head;
    float *my_parts = p.parts + slot * heads * (D + 2);
    T *result = static_cast<T *>(p.out) + (long)row * p.num_heads * D + kv_head * heads * D;
    for (int i = threadIdx.x; i < heads * D; i += WARPS * 32) {
        const int head = i / D, dim = i % D;
        float m = -INFINITY;
#pragma unroll
        for (int w = 0; w < WARPS; w++) m = fmaxf(m, maxima[w][head]);
        float value = 0.f, total = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float factor = maxima[w][head] == -INFINITY ? 0.f : exp2f((maxima[w][head] - m) * p.scale);
            value += merged[w][head][dim] * factor;
            total += sums[w][head] * factor;
        }
        if (num_parts == 1) {
            result[i] = N::from(value / total);
        } else {
            my_parts[head * (D + 2) + dim] = value;
            if (dim == 0) {
                my_parts[head * (D + 2) + D] = m;
                my_parts[head * (D + 2) + D + 1] = total;
            }
        }
    }
    if (num_parts == 1) return;
    // The block that comes last merges the sequence's parts, in their order. Items of a sequence are neighbours.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        const int before = atomicAdd(&p.arrived[seq * p.num_kv_heads + kv_head], 1);
        is_last = before == num_parts - 1;
        if (is_last) p.arrived[seq * p.num_kv_heads + kv_head] = 0;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    const long stride = (long)p.num_kv_heads * heads * (D + 2);
    const float *first = p.parts + ((long)(item - part) * p.num_kv_heads + kv_head) * heads * (D + 2);
    for (int i = threadIdx.x; i < heads * D; i += WARPS * 32) {
        const int head = i / D, dim = i % D;
        float m = -INFINITY, value = 0.f, total = 0.f;
        for (int j = 0; j < num_parts; j++) {
            const float *theirs = first + j * stride + head * (D + 2);
            const float their_m = __ldcg(theirs + D), now = fmaxf(m, their_m);
            const float mine = m == -INFINITY ? 0.f : exp2f((m - now) * p.scale);
            const float other = their_m == -INFINITY ? 0.f : exp2f((their_m - now) * p.scale);
            value = value * mine + __ldcg(theirs + dim) * other;
            total = total * mine + __ldcg(theirs + D + 1) * other;
            m = now;
        }
        result[i] = N::from(value / total);
    }
}

#define DEFINE_ONE(SUFFIX, T, D, TILES)                                                                                            \
    extern "C" __global__ void __launch_bounds__(128) decode_attention_##D##_##TILES##_##SUFFIX(const __grid_constant__ DecodeAttention p) { \
        decode_attention<T, D, TILES>(p);                                                                                          \
    }
// 16 heads of 256 values would not fit the registers.
#define DEFINE(SUFFIX, T)                                                                                                          \
    DEFINE_ONE(SUFFIX, T, 64, 1) DEFINE_ONE(SUFFIX, T, 64, 2) DEFINE_ONE(SUFFIX, T, 96, 1) DEFINE_ONE(SUFFIX, T, 96, 2)             \
    DEFINE_ONE(SUFFIX, T, 128, 1) DEFINE_ONE(SUFFIX, T, 128, 2) DEFINE_ONE(SUFFIX, T, 256, 1)
FOR_BOTH(DEFINE)
