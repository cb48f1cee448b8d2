// Rotary embedding of q and k (with the heads' norms where a model has them), and K and V into their pages.
//
// A page of a layer is `[K | V][kv_head]`, K as [token][dim], V as [dim][token]: both then come out of a page in the
// order in which tensor cores want them, without a transposition.
#include "fp8.cuh"

// cos and sin of position · frequency, in f64, kept as f32: `table[position][pair]`.
extern "C" __global__ void rope_table(const double *inverse_frequencies, float2 *table, int pairs, int positions) {
    const long at = (long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (long)pairs * positions) return;
    double s, c;
    sincos((double)(at / pairs) * inverse_frequencies[at % pairs], &s, &c);
    table[at] = make_float2((float)c, (float)s);
}

// A block takes TILE_ROWS rows of TILE_HEADS heads. LANES threads hold a head of a row, each 8 neighbours of its lower half and the
// 8 of its upper half that they turn with; 16 threads a row, so that a row's angles are loaded once for all of its heads.
// V is turned over in shared memory: tokens of a page are neighbours there, and they are written together.
constexpr int TILE_ROWS = 16, TILE_HEADS = 4, ROW_THREADS = 16;

template <typename T, typename KV, int LANES>
__device__ __forceinline__ void rope_write_kv(T *qkv, const T *query_norm, const T *key_norm, const float2 *table,
                                              const uint32_t *positions, const long *slot_mapping, KV *cache, int rows, int num_heads,
                                              int num_kv_heads, int head_dim, int block_size, float eps, float inverse_key_scale,
                                              float inverse_value_scale) {
    using N = Num<T>;
    using S = Stored<T, KV>;
    constexpr int AT_ONCE = ROW_THREADS / LANES, STEPS = TILE_HEADS / AT_ONCE;
    extern __shared__ __align__(16) unsigned char turned[]; // [TILE_HEADS][TILE_ROWS][head_dim + 8] of T
    T *tile = reinterpret_cast<T *>(turned);
    const int stride = head_dim + 8, half = head_dim / 2, heads = num_heads + 2 * num_kv_heads, first_value = num_heads + num_kv_heads;
    const int tile_row = threadIdx.x / ROW_THREADS, dim = threadIdx.x % LANES * 8, first_head = blockIdx.y * TILE_HEADS;
    const long row = (long)blockIdx.x * TILE_ROWS + tile_row;
    const bool valid = row < rows && dim < half;
    let_next_start();
    wait_for_previous();
    Vec8 low[STEPS], high[STEPS];
    const auto head_of = [&](int step) { return step * AT_ONCE + (int)threadIdx.x % ROW_THREADS / LANES; };
    const auto values_of = [&](int step) { return qkv + (row * heads + first_head + head_of(step)) * head_dim + dim; };
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        low[i].v = high[i].v = make_uint4(0, 0, 0, 0);
        if (!valid || first_head + head_of(i) >= heads) continue;
        low[i].v = *reinterpret_cast<const uint4 *>(values_of(i));
        high[i].v = *reinterpret_cast<const uint4 *>(values_of(i) + half);
    }
    float4 angles[4]; // cosine and sine of two neighbours
#pragma unroll
    for (int j = 0; j < 4; j++) angles[j] = make_float4(1.f, 0.f, 1.f, 0.f);
    if (valid && first_head < first_value) {
        const float4 *from = reinterpret_cast<const float4 *>(table + (long)positions[row] * half + dim);
#pragma unroll
        for (int j = 0; j < 4; j++) angles[j] = from[j];
    }
    const long slot = row < rows ? slot_mapping[row] : -1;
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        const int head = first_head + head_of(i);
        const bool is_query = head < num_heads, is_value = head >= first_value;
        float2 l[4], h[4];
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            l[j] = N::unpack(low[i].w[j]);
            h[j] = N::unpack(high[i].w[j]);
            sum += l[j].x * l[j].x + l[j].y * l[j].y + h[j].x * h[j].x + h[j].y * h[j].y;
        }
        if (query_norm) {
            // Of V too, unused: all lanes take part.
#pragma unroll
            for (int o = LANES / 2; o > 0; o >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
        }
        if (!valid || head >= heads) continue;
        if (is_value) {
            T *to = tile + (head_of(i) * TILE_ROWS + tile_row) * stride + dim;
            *reinterpret_cast<uint4 *>(to) = low[i].v;
            *reinterpret_cast<uint4 *>(to + half) = high[i].v;
            continue;
        }
        if (query_norm) {
            const T *norm = is_query ? query_norm : key_norm;
            const float scale = rsqrtf(sum / head_dim + eps);
            Vec8 a, b;
            a.v = *reinterpret_cast<const uint4 *>(norm + dim);
            b.v = *reinterpret_cast<const uint4 *>(norm + half + dim);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float2 by = N::unpack(a.w[j]), high_by = N::unpack(b.w[j]);
                l[j] = N::unpack(N::pack(l[j].x * scale * by.x, l[j].y * scale * by.y));
                h[j] = N::unpack(N::pack(h[j].x * scale * high_by.x, h[j].y * scale * high_by.y));
            }
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float4 at = angles[j];
            low[i].w[j] = N::pack(l[j].x * at.x - h[j].x * at.y, l[j].y * at.z - h[j].y * at.w);
            high[i].w[j] = N::pack(h[j].x * at.x + l[j].x * at.y, h[j].y * at.z + l[j].y * at.w);
        }
        if (is_query) {
            *reinterpret_cast<uint4 *>(values_of(i)) = low[i].v;
            *reinterpret_cast<uint4 *>(values_of(i) + half) = high[i].v;
        } else if (slot >= 0) {
            const long page = (slot / block_size * 2 * num_kv_heads + head - num_heads) * block_size;
            KV *to = cache + (page + slot % block_size) * head_dim + dim;
            *reinterpret_cast<typename S::Eight *>(to) = S::eight(low[i].w, inverse_key_scale);
            *reinterpret_cast<typename S::Eight *>(to + half) = S::eight(high[i].w, inverse_key_scale);
        }
    }
    if (first_head + TILE_HEADS <= first_value) return;
    __syncthreads();
    // A thread has one row throughout; threads of a warp that are neighbours have neighbouring rows.
    const int out_row = threadIdx.x % TILE_ROWS;
    const long out_slot = (long)blockIdx.x * TILE_ROWS + out_row < rows ? slot_mapping[(long)blockIdx.x * TILE_ROWS + out_row] : -1;
    if (out_slot < 0) return;
    for (int i = max(first_value - first_head, 0); i < TILE_HEADS && first_head + i < heads; i++) {
        const T *from = tile + (i * TILE_ROWS + out_row) * stride;
        const long page = (out_slot / block_size * 2 + 1) * num_kv_heads + first_head + i - first_value;
        KV *to = cache + page * block_size * head_dim + out_slot % block_size;
        for (int d = threadIdx.x / TILE_ROWS; d < head_dim; d += ROW_THREADS) to[d * block_size] = S::one(from[d], inverse_value_scale);
    }
}

// Names end in the threads that hold a head of a row: half of its values, by eights, as a power of two.
#define DEFINE_LANES(SUFFIX, T, KV, LANES)                                                                                      \
    extern "C" __global__ void __launch_bounds__(TILE_ROWS * ROW_THREADS, LANES == 16 ? 2 : 3) rope_write_kv_##LANES##_##SUFFIX( \
        T *qkv, const T *query_norm, const T *key_norm, const float2 *table, const uint32_t *positions, const long *slot_mapping, \
        KV *cache, int rows, int num_heads, int num_kv_heads, int head_dim, int block_size, float eps, float inverse_key_scale, \
        float inverse_value_scale) {                                                                                            \
        rope_write_kv<T, KV, LANES>(qkv, query_norm, key_norm, table, positions, slot_mapping, cache, rows, num_heads,          \
                                    num_kv_heads, head_dim, block_size, eps, inverse_key_scale, inverse_value_scale);           \
    }
#define DEFINE_KV(SUFFIX, T, KV) DEFINE_LANES(SUFFIX, T, KV, 4) DEFINE_LANES(SUFFIX, T, KV, 8) DEFINE_LANES(SUFFIX, T, KV, 16)
#define DEFINE(SUFFIX, T) DEFINE_KV(SUFFIX, T, T) DEFINE_KV(SUFFIX##_fp8, T, uint8_t)
FOR_BOTH(DEFINE)
