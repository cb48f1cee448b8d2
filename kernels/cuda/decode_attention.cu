// Attention of single query rows (decode) over paged K and V, bound by reading the cache once.
//
// An item is (rows, kv head, run of pages): one row, or several whose tables begin with the same pages, which are then read
// once for all of them. All query heads of the kv head share the item: rows times heads are the columns of the products,
// S^T = K · Q^T and O^T = V^T · P^T, so that 8 columns fill a tile and K and V are the A operands, straight from memory into
// registers. The warps of a block take pages in turn, each with its own running maximum; they merge in shared memory. Of a row
// that several items work for, the block that finishes last merges the parts.
//
// Order of k inside a product is free when both operands agree: a lane loads 16 neighbouring bytes of K, and row r of the
// S^T tile is token 4·(r/2 mod 4) + r mod 2 + 2·(r/8), so that four neighbouring tokens of V^T are one lane's operand.
//
// With a rotary table q and k come as the product made them: q is rotated (after its norm, where there is one) on its way in,
// and the item with a row's last token rotates k, computes with k and v, and writes both to their page. Work lists and pages
// of earlier tokens are nothing that an earlier kernel of the step writes, so they are read before the kernel waits for it.
#include "common.cuh"

constexpr int BLOCK = 16; // tokens in a page
constexpr int WARPS = 4;

struct Item {
    int first_member, num_members; // in `members`
    int begin, end;                // pages
    int slot;                      // of the first member's part; the others' follow
    int pad[3];
};

struct DecodeAttention {
    const void *q;             // rows of `q_stride` values, the query heads first
    void *cache;               // this layer's pages
    void *out;                 // [rows][num_heads · D]
    const int *num_items;
    const Item *items;
    const int *members;        // sequences
    const int2 *seq_parts;     // [sequences] (first in `slots`, parts)
    const int *slots;          // of each sequence's parts, in order
    const int *rows;           // [sequences] query row
    const int *context_lens;   // [sequences]
    const int *table_starts;   // [sequences] first entry in `blocks`
    const int *blocks;         // block tables, one after another
    float *parts;              // [slot]: [heads][D] values, then (maximum, sum, -, -) of each head
    int *arrived;              // [sequences][kv heads], zero between launches
    const float2 *rope;        // [position][D/2] (cos, sin), or null: q is rotated and the cache written
    const void *query_norm;    // [D] or null
    const void *key_norm;      // [D] or null
    int num_heads, num_kv_heads, q_stride, window;
    float scale;               // 1/√D · log2(e)
    float eps;
};

__device__ __forceinline__ uint32_t transpose8x8(uint32_t v) {
    uint32_t r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}

// A head as four lanes of a group hold it, 8 values of every 32: normed if there is a norm, then rotated. As in rope.cu.
template <typename T, int D> __device__ __forceinline__ void rotate(uint32_t (*head)[4], const void *norm, const float2 *angles, float eps) {
    using N = Num<T>;
    constexpr int KBLOCKS = D / 32, HALF = KBLOCKS / 2;
    const int quad = threadIdx.x % 4;
    if (norm) {
        float sum = 0.f;
#pragma unroll
        for (int b = 0; b < KBLOCKS; b++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float2 v = N::unpack(head[b][j]);
                sum += v.x * v.x + v.y * v.y;
            }
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const float scale = rsqrtf(sum / D + eps);
#pragma unroll
        for (int b = 0; b < KBLOCKS; b++) {
            Vec8 w;
            w.v = static_cast<const uint4 *>(norm)[b * 4 + quad];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float2 v = N::unpack(head[b][j]), n = N::unpack(w.w[j]);
                head[b][j] = N::pack(v.x * scale * n.x, v.y * scale * n.y);
            }
        }
    }
#pragma unroll
    for (int b = 0; b < HALF; b++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float4 a = *reinterpret_cast<const float4 *>(angles + b * 32 + quad * 8 + j * 2);
            const float2 l = N::unpack(head[b][j]), h = N::unpack(head[b + HALF][j]);
            head[b][j] = N::pack(l.x * a.x - h.x * a.y, l.y * a.z - h.y * a.w);
            head[b + HALF][j] = N::pack(h.x * a.x + l.x * a.y, h.y * a.z + l.y * a.w);
        }
}

// Merges the parts of one row's heads, in their order; a thread has 4 neighbouring values.
template <typename T, int D> __device__ __forceinline__ void merge_parts(const DecodeAttention &p, int seq, int kv_head, T *result) {
    using N = Num<T>;
    constexpr int AHEAD = 8;
    const int heads = p.num_heads / p.num_kv_heads;
    const int2 mine = p.seq_parts[seq];
    const long stride = (long)p.num_heads * (D + 4);
    for (int i = threadIdx.x * 4; i < heads * D; i += WARPS * 32 * 4) {
        const long value_at = (long)kv_head * heads * D + i, stats_at = (long)p.num_heads * D + (kv_head * heads + i / D) * 4;
        float m = -INFINITY, total = 0.f;
        float4 value = make_float4(0.f, 0.f, 0.f, 0.f);
        for (int first = 0; first < mine.y; first += AHEAD) {
            float4 values[AHEAD];
            float2 stats[AHEAD];
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                const bool valid = first + j < mine.y;
                const float *part = p.parts + (valid ? p.slots[mine.x + first + j] : 0) * stride;
                values[j] = valid ? __ldcg(reinterpret_cast<const float4 *>(part + value_at)) : make_float4(0.f, 0.f, 0.f, 0.f);
                stats[j] = valid ? __ldcg(reinterpret_cast<const float2 *>(part + stats_at)) : make_float2(-INFINITY, 0.f);
            }
            float now = m;
#pragma unroll
            for (int j = 0; j < AHEAD; j++) now = fmaxf(now, stats[j].x);
            const float old = m == -INFINITY ? 0.f : exp2_fast((m - now) * p.scale);
            total *= old;
            value.x *= old, value.y *= old, value.z *= old, value.w *= old;
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                const float factor = stats[j].x == -INFINITY ? 0.f : exp2_fast((stats[j].x - now) * p.scale);
                total += stats[j].y * factor;
                value.x += values[j].x * factor, value.y += values[j].y * factor;
                value.z += values[j].z * factor, value.w += values[j].w * factor;
            }
            m = now;
        }
        const float inverse = 1.f / total;
        *reinterpret_cast<uint2 *>(result + i) = make_uint2(N::pack(value.x * inverse, value.y * inverse), N::pack(value.z * inverse, value.w * inverse));
    }
}

template <typename T, int D, int TILES, bool SHARED_Q> __device__ __forceinline__ void decode_attention(const DecodeAttention &p) {
    using N = Num<T>;
    constexpr int KBLOCKS = D / 32, MTILES = D / 16, COLUMNS = 8 * TILES;
    __shared__ float merged[WARPS][COLUMNS][D + 4];
    __shared__ float maxima[WARPS][COLUMNS], sums[WARPS][COLUMNS];
    __shared__ __align__(16) T new_key[D], new_value[D];
    __shared__ int finished; // bit per member: all its parts are there
    let_next_start();
    const int kv_head = blockIdx.x;
    // There is an item at least, so the launch does not end before the one that it waits for.
    if (blockIdx.y >= p.num_items[0]) return;
    const Item item = p.items[blockIdx.y];
    const int *members = p.members + item.first_member;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    const int heads = p.num_heads / p.num_kv_heads;
    const int seq = members[0], length = p.context_lens[seq];
    const int first_token = p.window > 0 ? max(0, length - p.window) : 0;
    const int begin = item.begin, end = item.end;
    const int *table = p.blocks + p.table_starts[seq];
    const long page_values = 2l * p.num_kv_heads * BLOCK * D;
    T *cache = static_cast<T *>(p.cache);
    const int token0 = 4 * (group / 2) + group % 2, token1 = token0 + 2; // within a page
    Vec8 k[KBLOCKS][2];
    uint2 v[MTILES][2];
    auto load_keys = [&](int block) {
        const T *keys = cache + block * page_values + (long)kv_head * BLOCK * D;
#pragma unroll
        for (int b = 0; b < KBLOCKS; b++) {
            k[b][0].v = load_once16(keys + token0 * D + b * 32 + quad * 8);
            k[b][1].v = load_once16(keys + token1 * D + b * 32 + quad * 8);
        }
    };
    auto load_values = [&](int block) {
        const T *values = cache + block * page_values + (long)(p.num_kv_heads + kv_head) * BLOCK * D;
#pragma unroll
        for (int i = 0; i < MTILES; i++) {
            v[i][0] = load_once8(values + (i * 16 + group) * BLOCK + quad * 4);
            v[i][1] = load_once8(values + (i * 16 + group + 8) * BLOCK + quad * 4);
        }
    };
    int page = begin + warp;
    int block = page < end ? table[page] : 0;
    // The table's entry of the page after the next is on its way while a page is computed.
    int next_block = page + WARPS < end ? table[page + WARPS] : 0;
    // Without a table these pages were written by the kernel in front.
    const bool early = p.rope && page < end;
    if (early) load_keys(block), load_values(block);
    wait_for_previous();
    if (!early && page < end) load_keys(block), load_values(block);

    // Q^T: column = (member, head), k in the lanes' order; in registers, or in shared memory to leave more of them.
    constexpr int Q_STRIDE = D * 2 + 64; // rows begin in alternate halves of the banks
    __shared__ __align__(16) char queries[SHARED_Q ? COLUMNS * Q_STRIDE : 16];
    uint32_t q[SHARED_Q ? 1 : TILES][KBLOCKS][4];
    auto make_queries = [&](int t, uint32_t (&tile)[KBLOCKS][4]) {
        const int column = t * 8 + group, member = column / heads;
        const bool valid = member < item.num_members;
        const int their_seq = members[valid ? member : 0];
        const T *from = static_cast<const T *>(p.q) + (long)p.rows[their_seq] * p.q_stride + (kv_head * heads + column % heads) * D;
#pragma unroll
        for (int b = 0; b < KBLOCKS; b++) {
            Vec8 w;
            w.v = make_uint4(0, 0, 0, 0);
            if (valid) w.v = *reinterpret_cast<const uint4 *>(from + b * 32 + quad * 8);
#pragma unroll
            for (int j = 0; j < 4; j++) tile[b][j] = w.w[j];
        }
        if constexpr (D % 64 == 0)
            if (p.rope) rotate<T, D>(tile, p.query_norm, p.rope + (long)(p.context_lens[their_seq] - 1) * (D / 2), p.eps);
    };
    if constexpr (SHARED_Q) {
        for (int t = warp; t < TILES; t += WARPS) {
            make_queries(t, q[0]);
#pragma unroll
            for (int b = 0; b < KBLOCKS; b++)
                *reinterpret_cast<uint4 *>(queries + (t * 8 + group) * Q_STRIDE + b * 64 + quad * 16) = make_uint4(q[0][b][0], q[0][b][1], q[0][b][2], q[0][b][3]);
        }
    } else {
#pragma unroll
        for (int t = 0; t < TILES; t++) make_queries(t, q[t]);
    }
    // The warp with the row's last token makes its k and v.
    const int last_page = (length - 1) / BLOCK, offset = (length - 1) % BLOCK;
    const bool has_last = p.rope && item.num_members == 1 && last_page >= begin && last_page < end && (last_page - begin) % WARPS == warp;
    if constexpr (D % 64 == 0) {
        if (has_last) {
            const T *key = static_cast<const T *>(p.q) + (long)p.rows[seq] * p.q_stride + (p.num_heads + kv_head) * D, *value = key + p.num_kv_heads * D;
            uint32_t new_k[KBLOCKS][4];
#pragma unroll
            for (int b = 0; b < KBLOCKS; b++) {
                Vec8 w;
                w.v = *reinterpret_cast<const uint4 *>(key + b * 32 + quad * 8);
#pragma unroll
                for (int j = 0; j < 4; j++) new_k[b][j] = w.w[j];
            }
            rotate<T, D>(new_k, p.key_norm, p.rope + (long)(length - 1) * (D / 2), p.eps);
            T *to = cache + table[last_page] * page_values + (long)kv_head * BLOCK * D, *value_to = to + (long)p.num_kv_heads * BLOCK * D;
            if (group == 0) {
#pragma unroll
                for (int b = 0; b < KBLOCKS; b++) {
                    const uint4 w = make_uint4(new_k[b][0], new_k[b][1], new_k[b][2], new_k[b][3]);
                    *reinterpret_cast<uint4 *>(to + offset * D + b * 32 + quad * 8) = w;
                    *reinterpret_cast<uint4 *>(new_key + b * 32 + quad * 8) = w;
                }
            }
#pragma unroll
            for (int i = 0; i < D / 32; i++) {
                const T one = value[i * 32 + lane];
                new_value[i * 32 + lane] = one;
                value_to[(i * 32 + lane) * BLOCK + offset] = one;
            }
            __syncwarp();
        }
    }
    if (SHARED_Q) __syncthreads();
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
    for (; page < end; page += WARPS) {
        if constexpr (D % 64 == 0) {
            if (has_last && page == last_page) {
#pragma unroll
                for (int b = 0; b < KBLOCKS; b++) {
                    const uint4 w = *reinterpret_cast<const uint4 *>(new_key + b * 32 + quad * 8);
                    if (token0 == offset) k[b][0].v = w;
                    if (token1 == offset) k[b][1].v = w;
                }
                if (quad == offset / 4) {
                    const uint32_t shift = offset % 2 * 16, keep = 0xffff0000u >> shift;
                    auto put = [&](uint2 &word, int dim) {
                        const uint32_t bits = (uint32_t)reinterpret_cast<const uint16_t *>(new_value)[dim] << shift;
                        if (offset % 4 < 2) word.x = (word.x & keep) | bits;
                        else word.y = (word.y & keep) | bits;
                    };
#pragma unroll
                    for (int i = 0; i < MTILES; i++) put(v[i][0], i * 16 + group), put(v[i][1], i * 16 + group + 8);
                }
            }
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
                if constexpr (SHARED_Q) {
                    const uint4 w = *reinterpret_cast<const uint4 *>(queries + (t * 8 + group) * Q_STRIDE + b * 64 + quad * 16);
                    N::mma(s[t], first, w.x, w.y);
                    N::mma(s[t], second, w.z, w.w);
                } else {
                    N::mma(s[t], first, q[t][b][0], q[t][b][1]);
                    N::mma(s[t], second, q[t][b][2], q[t][b][3]);
                }
            }
        }
        block = next_block;
        const bool more = page + WARPS < end;
        if (more) {
            load_keys(block);
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
                const float factor = old == -INFINITY ? 0.f : exp2_fast(old * p.scale - shift[c]);
                sum[t][c] *= factor;
#pragma unroll
                for (int i = 0; i < MTILES; i++) {
                    out[t][i][c] *= factor;
                    out[t][i][c + 2] *= factor;
                }
            }
            const float e0 = exp2_fast(s[t][0] * p.scale - shift[0]), e1 = exp2_fast(s[t][1] * p.scale - shift[1]);
            const float e2 = exp2_fast(s[t][2] * p.scale - shift[0]), e3 = exp2_fast(s[t][3] * p.scale - shift[1]);
            sum[t][0] += e0 + e2;
            sum[t][1] += e1 + e3;
            const uint32_t b0 = transpose8x8(N::pack(e0, e1)), b1 = transpose8x8(N::pack(e2, e3));
#pragma unroll
            for (int i = 0; i < MTILES; i++) {
                const uint32_t a[4] = {v[i][0].x, v[i][1].x, v[i][0].y, v[i][1].y};
                N::mma(out[t][i], a, b0, b1);
            }
        }
        if (more) load_values(block);
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
    if (threadIdx.x == 0) finished = 0;
    __syncthreads();
    const bool whole_row = p.seq_parts[seq].y == 1;
    auto result_of = [&](int their_seq) { return static_cast<T *>(p.out) + (long)p.rows[their_seq] * p.num_heads * D + kv_head * heads * D; };
    for (int i = threadIdx.x * 4; i < heads * item.num_members * D; i += WARPS * 32 * 4) {
        const int column = i / D, dim = i % D, member = column / heads, head = column % heads;
        float m = -INFINITY;
#pragma unroll
        for (int w = 0; w < WARPS; w++) m = fmaxf(m, maxima[w][column]);
        float4 value = make_float4(0.f, 0.f, 0.f, 0.f);
        float total = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float factor = maxima[w][column] == -INFINITY ? 0.f : exp2_fast((maxima[w][column] - m) * p.scale);
            const float4 theirs = *reinterpret_cast<const float4 *>(&merged[w][column][dim]);
            value.x += theirs.x * factor, value.y += theirs.y * factor, value.z += theirs.z * factor, value.w += theirs.w * factor;
            total += sums[w][column] * factor;
        }
        if (whole_row) {
            const float inverse = 1.f / total;
            *reinterpret_cast<uint2 *>(result_of(seq) + i) =
                make_uint2(N::pack(value.x * inverse, value.y * inverse), N::pack(value.z * inverse, value.w * inverse));
        } else {
            float *part = p.parts + (long)(item.slot + member) * p.num_heads * (D + 4);
            *reinterpret_cast<float4 *>(part + (kv_head * heads + head) * D + dim) = value;
            if (dim == 0) *reinterpret_cast<float2 *>(part + p.num_heads * D + (kv_head * heads + head) * 4) = make_float2(m, total);
        }
    }
    if (whole_row) return;
    // The block that comes last merges a row's parts, in their order.
    __threadfence();
    __syncthreads();
    if (threadIdx.x < item.num_members) {
        const int their_seq = members[threadIdx.x];
        int *arrived = &p.arrived[their_seq * p.num_kv_heads + kv_head];
        if (atomicAdd(arrived, 1) == p.seq_parts[their_seq].y - 1) {
            *arrived = 0;
            atomicOr(&finished, 1 << threadIdx.x);
        }
    }
    __syncthreads();
    if (!finished) return;
    __threadfence();
    for (int member = 0; member < item.num_members; member++)
        if (finished >> member & 1) merge_parts<T, D>(p, members[member], kv_head, result_of(members[member]));
}

#define DEFINE_ONE(SUFFIX, T, D, TILES)                                                                                            \
    extern "C" __global__ void __launch_bounds__(128) decode_attention_##D##_##TILES##_##SUFFIX(const __grid_constant__ DecodeAttention p) { \
        decode_attention<T, D, TILES, false>(p);                                                                                   \
    }
// Four blocks on a multiprocessor instead of three.
#define DEFINE_FOUR(SUFFIX, T, D)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128, 4) decode_attention_four_##D##_1_##SUFFIX(const __grid_constant__ DecodeAttention p) { \
        decode_attention<T, D, 1, true>(p);                                                                                        \
    }
// 16 columns of 256 values would not fit the registers.
#define DEFINE(SUFFIX, T)                                                                                                          \
    DEFINE_ONE(SUFFIX, T, 64, 1) DEFINE_ONE(SUFFIX, T, 64, 2) DEFINE_ONE(SUFFIX, T, 96, 1) DEFINE_ONE(SUFFIX, T, 96, 2)             \
    DEFINE_ONE(SUFFIX, T, 128, 1) DEFINE_ONE(SUFFIX, T, 128, 2) DEFINE_ONE(SUFFIX, T, 256, 1) DEFINE_FOUR(SUFFIX, T, 128)
FOR_BOTH(DEFINE)
