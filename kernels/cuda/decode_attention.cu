// Attention of single query rows (decode) over paged K and V, bound by reading the cache once.
//
// An item is (rows, kv head, run of pages): one row, or several whose tables begin with the same pages, which are then read
// once for all of them. All query heads of the kv head share the item: rows times heads are the columns of the products,
// S^T = K · Q^T and O^T = V^T · P^T, so that 8 columns fill a tile and K and V are the A operands, straight from memory into
// registers. The warps of a block take pages in turn, each with its own running maximum; they merge in shared memory. Of a row
// that several items work for, the block that finishes last merges the parts.
//
// With a rotary table q and k come as the product made them: q is rotated (after its norm, where there is one) on its way in,
// and the item with a row's last token rotates k, computes with k and v, and writes both to their page. Work lists and pages
// of earlier tokens are nothing that an earlier kernel of the step writes, so they are read before the kernel waits for it.
#include "decode_pages.cuh"

constexpr int NARROW = 4, WIDE = 16; // warps of a block; a wide one has a multiprocessor for itself

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
    float scale;               // 1/√D · log2(e), and K's scale
    float eps;
    float value_scale;         // of eight-bit floats, as the rest
    float inverse_key_scale, inverse_value_scale;
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

constexpr int KNOWN_SLOTS = 32;

// Merges the parts of one row's heads, in their order; a thread has 4 neighbouring values. `first_slots` are KNOWN_SLOTS, or null.
template <typename T, typename KV, int D, int WARPS>
__device__ __forceinline__ void merge_parts(const DecodeAttention &p, int2 mine, const int *first_slots, int kv_head, T *result) {
    using N = Num<T>;
    constexpr int AHEAD = 8;
    const int heads = p.num_heads / p.num_kv_heads;
    const long stride = (long)p.num_heads * (D + 4);
    for (int i = threadIdx.x * 4; i < heads * D; i += WARPS * 32 * 4) {
        const long value_at = (long)kv_head * heads * D + i, stats_at = (long)p.num_heads * D + (kv_head * heads + i / D) * 4;
        float m = -INFINITY, total = 0.f;
        float4 value = make_float4(0.f, 0.f, 0.f, 0.f);
        for (int first = 0; first < mine.y; first += AHEAD) {
            // One pointer for either memory, so that all loads go out together.
            const int *slots = first_slots && first + AHEAD <= KNOWN_SLOTS ? first_slots + first : p.slots + mine.x + first;
            float4 values[AHEAD];
            float2 stats[AHEAD];
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                const bool valid = first + j < mine.y;
                const float *part = p.parts + (valid ? slots[j] : 0) * stride;
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
        const float inverse = (sizeof(KV) == 1 ? p.value_scale : 1.f) / total;
        *reinterpret_cast<uint2 *>(result + i) = make_uint2(N::pack(value.x * inverse, value.y * inverse), N::pack(value.z * inverse, value.w * inverse));
    }
}

template <typename T, typename KV, int D, int TILES, bool SHARED_Q, int WARPS> __device__ __forceinline__ void decode_attention(const DecodeAttention &p) {
    using N = Num<T>;
    using Held = Pages<T, KV, D>;
    using Values = Num<typename Held::Values>;
    constexpr bool FP8 = sizeof(KV) == 1;
    constexpr int KBLOCKS = Held::KBLOCKS, MTILES = Held::MTILES, COLUMNS = 8 * TILES, PAGES = Held::PAGES, STEP = WARPS * PAGES;
    // What a wide block's warps leave takes more shared memory than a kernel has without asking.
    extern __shared__ __align__(16) float asked_for[];
    __shared__ float there[WARPS == WIDE ? 1 : WARPS][COLUMNS][D + 4];
    float(*merged)[COLUMNS][D + 4] = WARPS == WIDE ? reinterpret_cast<float(*)[COLUMNS][D + 4]>(asked_for) : there;
    __shared__ float maxima[WARPS][COLUMNS], sums[WARPS][COLUMNS];
    __shared__ __align__(16) KV new_key[D], new_value[D];
    __shared__ int finished; // bit per member: all its parts are there
    // A few rows' attention lasts as long as memory takes to answer, which the next kernel's weights would keep waiting: that
    // starts once all pages are on their way.
    constexpr bool LATE_START = WARPS == WIDE;
    if (!LATE_START) let_next_start();
    const int kv_head = blockIdx.x;
    // There is an item at least, so the launch does not end before the one that it waits for.
    if (blockIdx.y >= p.num_items[0]) return;
    const Item item = p.items[blockIdx.y];
    const int *members = p.members + item.first_member;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    const int heads = p.num_heads / p.num_kv_heads;
    const int seq = members[0], length = p.context_lens[seq];
    // What the end needs to know of the first member is read while the kernel in front still runs.
    __shared__ int first_slots[KNOWN_SLOTS];
    const int2 seq_parts = p.seq_parts[seq];
    const int row = p.rows[seq];
    if (seq_parts.y > 1 && threadIdx.x < min(seq_parts.y, KNOWN_SLOTS)) first_slots[threadIdx.x] = p.slots[seq_parts.x + threadIdx.x];
    auto row_of = [&](int member) { return member == 0 ? row : p.rows[members[member]]; };
    auto length_of = [&](int member) { return member == 0 ? length : p.context_lens[members[member]]; };
    auto parts_of = [&](int member) { return member == 0 ? seq_parts : p.seq_parts[members[member]]; };
    const int first_token = p.window > 0 ? max(0, length - p.window) : 0;
    const int begin = item.begin, end = item.end;
    const int *table = p.blocks + p.table_starts[seq];
    const long page_values = 2l * p.num_kv_heads * BLOCK * D;
    KV *cache = static_cast<KV *>(p.cache);
    Held held(group, quad);
    auto load_keys = [&](typename Held::Entry entry) { held.load_keys(cache, page_values, (long)kv_head * BLOCK * D, entry); };
    auto load_values = [&](typename Held::Entry entry) { held.load_values(cache, page_values, (long)(p.num_kv_heads + kv_head) * BLOCK * D, entry); };
    int page = begin + warp * PAGES;
    auto entry = held.look_up(table, page, end);
    // The table's entries of the pages after the next are on their way while these are computed.
    auto next_entry = held.look_up(table, page + STEP, end);
    // Without a table these pages were written by the kernel in front.
    const bool early = p.rope && page < end;
    if (early) load_keys(entry), load_values(entry);
    wait_for_previous();
    if (!early && page < end) load_keys(entry), load_values(entry);

    // Q^T: column = (member, head), k in the lanes' order; in registers, or in shared memory to leave more of them, and to
    // change the order, which is one for the rotation and another for eight-bit floats.
    constexpr bool STORED_Q = SHARED_Q || FP8;
    constexpr int Q_STRIDE = D * 2 + (FP8 ? 16 : 64); // rows that are read together begin in other banks
    __shared__ __align__(16) char queries[STORED_Q ? COLUMNS * Q_STRIDE : 16];
    uint32_t q[SHARED_Q ? 1 : TILES][KBLOCKS][4];
    auto make_queries = [&](int t, uint32_t (&tile)[KBLOCKS][4]) {
        const int column = t * 8 + group, member = column / heads;
        const bool valid = member < item.num_members;
        const int theirs = valid ? member : 0;
        const T *from = static_cast<const T *>(p.q) + (long)row_of(theirs) * p.q_stride + (kv_head * heads + column % heads) * D;
#pragma unroll
        for (int b = 0; b < KBLOCKS; b++) {
            Vec8 w;
            w.v = make_uint4(0, 0, 0, 0);
            if (valid) w.v = *reinterpret_cast<const uint4 *>(from + b * 32 + quad * 8);
#pragma unroll
            for (int j = 0; j < 4; j++) tile[b][j] = w.w[j];
        }
        if constexpr (D % 64 == 0)
            if (p.rope) rotate<T, D>(tile, p.query_norm, p.rope + (long)(length_of(theirs) - 1) * (D / 2), p.eps);
    };
    if constexpr (STORED_Q) {
        for (int t = warp; t < TILES; t += WARPS) {
            make_queries(t, q[0]);
#pragma unroll
            for (int b = 0; b < KBLOCKS; b++) {
                if constexpr (FP8)
#pragma unroll
                    for (int j = 0; j < 4; j++) q[0][b][j] = to_halves<T>(q[0][b][j]);
                *reinterpret_cast<uint4 *>(queries + (t * 8 + group) * Q_STRIDE + b * 64 + quad * 16) = make_uint4(q[0][b][0], q[0][b][1], q[0][b][2], q[0][b][3]);
            }
        }
    } else {
#pragma unroll
        for (int t = 0; t < TILES; t++) make_queries(t, q[t]);
    }
    // The warp with the row's last token makes its k and v.
    const int last_page = (length - 1) / BLOCK, offset = (length - 1) % BLOCK;
    const bool has_last = p.rope && item.num_members == 1 && last_page >= begin && last_page < end && (last_page - begin) / PAGES % WARPS == warp;
    const int last_unit = last_page - (last_page - begin) % PAGES; // the first of the pages that a warp takes with it
    if constexpr (D % 64 == 0) {
        if (has_last) {
            const T *key = static_cast<const T *>(p.q) + (long)row * p.q_stride + (p.num_heads + kv_head) * D, *value = key + p.num_kv_heads * D;
            uint32_t new_k[KBLOCKS][4];
#pragma unroll
            for (int b = 0; b < KBLOCKS; b++) {
                Vec8 w;
                w.v = *reinterpret_cast<const uint4 *>(key + b * 32 + quad * 8);
#pragma unroll
                for (int j = 0; j < 4; j++) new_k[b][j] = w.w[j];
            }
            rotate<T, D>(new_k, p.key_norm, p.rope + (long)(length - 1) * (D / 2), p.eps);
            KV *to = cache + table[last_page] * page_values + (long)kv_head * BLOCK * D, *value_to = to + (long)p.num_kv_heads * BLOCK * D;
            if (group == 0) {
#pragma unroll
                for (int b = 0; b < KBLOCKS; b++) {
                    const auto w = Stored<T, KV>::eight(new_k[b], p.inverse_key_scale);
                    *reinterpret_cast<typename Stored<T, KV>::Eight *>(to + offset * D + b * 32 + quad * 8) = w;
                    *reinterpret_cast<typename Stored<T, KV>::Eight *>(new_key + b * 32 + quad * 8) = w;
                }
            }
#pragma unroll
            for (int i = 0; i < D / 32; i++) {
                const KV one = Stored<T, KV>::one(value[i * 32 + lane], p.inverse_value_scale);
                new_value[i * 32 + lane] = one;
                value_to[(i * 32 + lane) * BLOCK + offset] = one;
            }
            __syncwarp();
        }
    }
    if (STORED_Q) __syncthreads();
    auto query_at = [&](int t, int b) { return *reinterpret_cast<const uint4 *>(queries + (t * 8 + group) * Q_STRIDE + held.dim(b) * 2); };
    if constexpr (STORED_Q && !SHARED_Q) {
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int b = 0; b < KBLOCKS; b++) {
                const uint4 w = query_at(t, b);
                q[t][b][0] = w.x, q[t][b][1] = w.y, q[t][b][2] = w.z, q[t][b][3] = w.w;
            }
    }
    // Behind the item's end another page stands in.
    const int limit = PAGES > 1 ? min(length, end * BLOCK) : length;
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
    for (; page < end; page += STEP) {
        if constexpr (D % 64 == 0)
            if (has_last && page == last_unit) held.put(new_key, new_value, (last_page - last_unit) * BLOCK + offset);
        float s[TILES][Held::TILES][4];
        held.template scores<TILES>(s, [&](int t, int b) {
            if constexpr (SHARED_Q) return query_at(t, b);
            else return make_uint4(q[t][b][0], q[t][b][1], q[t][b][2], q[t][b][3]);
        });
        entry = next_entry;
        const bool more = page + STEP < end;
        if (LATE_START && !more) let_next_start();
        if (more) {
            load_keys(entry);
            next_entry = held.look_up(table, page + 2 * STEP, end);
        }
        const bool whole = (page + PAGES) * BLOCK <= limit && page * BLOCK >= first_token;
        if (!whole) {
            // What lies behind the last token may be anything, NaN too.
            auto keep = [&](int token) { return token < limit && token >= first_token; };
            held.mask_values(page * BLOCK, keep);
#pragma unroll
            for (int t = 0; t < TILES; t++)
#pragma unroll
                for (int i = 0; i < Held::TILES; i++) {
                    const int position = page * BLOCK + held.first_token(i);
                    if (!keep(position)) s[t][i][0] = s[t][i][1] = -INFINITY;
                    if (!keep(position + 2)) s[t][i][2] = s[t][i][3] = -INFINITY;
                }
        }
        uint32_t weights[TILES][Held::TILES][2];
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            float m[2] = {fmaxf(s[t][0][0], s[t][0][2]), fmaxf(s[t][0][1], s[t][0][3])};
#pragma unroll
            for (int i = 1; i < Held::TILES; i++) {
                m[0] = fmaxf(m[0], fmaxf(s[t][i][0], s[t][i][2]));
                m[1] = fmaxf(m[1], fmaxf(s[t][i][1], s[t][i][3]));
            }
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
#pragma unroll
            for (int i = 0; i < Held::TILES; i++) {
                const float e0 = exp2_fast(s[t][i][0] * p.scale - shift[0]), e1 = exp2_fast(s[t][i][1] * p.scale - shift[1]);
                const float e2 = exp2_fast(s[t][i][2] * p.scale - shift[0]), e3 = exp2_fast(s[t][i][3] * p.scale - shift[1]);
                sum[t][0] += e0 + e2;
                sum[t][1] += e1 + e3;
                weights[t][i][0] = transpose8x8(Values::pack(e0, e1)), weights[t][i][1] = transpose8x8(Values::pack(e2, e3));
            }
            if constexpr (!FP8) held.template add<1>(out + t, weights + t);
        }
        // Eight-bit floats become halves once for all columns.
        if constexpr (FP8) held.template add<TILES>(out, weights);
        if (more) load_values(entry);
    }
    if (LATE_START) let_next_start(); // also of warps without pages
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
    const bool whole_row = seq_parts.y == 1;
    auto result_of = [&](int member) { return static_cast<T *>(p.out) + (long)row_of(member) * p.num_heads * D + kv_head * heads * D; };
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
            const float inverse = (FP8 ? p.value_scale : 1.f) / total;
            *reinterpret_cast<uint2 *>(result_of(0) + i) =
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
        if (atomicAdd(arrived, 1) == (threadIdx.x == 0 ? seq_parts : p.seq_parts[their_seq]).y - 1) {
            *arrived = 0;
            atomicOr(&finished, 1 << threadIdx.x);
        }
    }
    __syncthreads();
    if (!finished) return;
    __threadfence();
    for (int member = 0; member < item.num_members; member++)
        if (finished >> member & 1) merge_parts<T, KV, D, WARPS>(p, parts_of(member), member == 0 ? first_slots : nullptr, kv_head, result_of(member));
}

#define DEFINE_ONE(SUFFIX, T, KV, D, TILES)                                                                                        \
    extern "C" __global__ void __launch_bounds__(128) decode_attention_##D##_##TILES##_##SUFFIX(const __grid_constant__ DecodeAttention p) { \
        decode_attention<T, KV, D, TILES, false, NARROW>(p);                                                                       \
    }
// Four blocks on a multiprocessor instead of three.
#define DEFINE_FOUR(SUFFIX, T, KV, D)                                                                                              \
    extern "C" __global__ void __launch_bounds__(128, 4) decode_attention_four_##D##_1_##SUFFIX(const __grid_constant__ DecodeAttention p) { \
        decode_attention<T, KV, D, 1, true, NARROW>(p);                                                                            \
    }
// For few rows: a block takes 16 pages of each at once, so that most need no parts.
#define DEFINE_WIDE(SUFFIX, T, KV, D)                                                                                              \
    extern "C" __global__ void __launch_bounds__(WIDE * 32, 1) decode_attention_wide_##D##_1_##SUFFIX(const __grid_constant__ DecodeAttention p) { \
        decode_attention<T, KV, D, 1, true, WIDE>(p);                                                                              \
    }
// 16 columns of 256 values would not fit the registers.
#define DEFINE_DIMS(SUFFIX, T, KV)                                                                                                 \
    DEFINE_ONE(SUFFIX, T, KV, 64, 1) DEFINE_ONE(SUFFIX, T, KV, 64, 2) DEFINE_ONE(SUFFIX, T, KV, 96, 1) DEFINE_ONE(SUFFIX, T, KV, 96, 2) \
    DEFINE_ONE(SUFFIX, T, KV, 128, 1) DEFINE_ONE(SUFFIX, T, KV, 128, 2) DEFINE_ONE(SUFFIX, T, KV, 256, 1) DEFINE_FOUR(SUFFIX, T, KV, 128) \
    DEFINE_WIDE(SUFFIX, T, KV, 64) DEFINE_WIDE(SUFFIX, T, KV, 128)
// Pages of T, and of eight-bit floats.
#define DEFINE(SUFFIX, T) DEFINE_DIMS(SUFFIX, T, T) DEFINE_DIMS(SUFFIX##_fp8, T, uint8_t)
FOR_BOTH(DEFINE)
