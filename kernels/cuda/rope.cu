// Rotary embedding of q and k (with the heads' norms where a model has them), and K and V into their pages.
//
// A page of a layer is `[K | V][kv_head]`, K as [token][dim], V as [dim][token]: both then come out of a page in the
// order in which tensor cores want them, without a transposition.
#include "common.cuh"

// cos and sin of position · frequency, in f64, kept as f32: `table[position][pair]`.
extern "C" __global__ void rope_table(const double *inverse_frequencies, float2 *table, int pairs, int positions) {
    const long at = (long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (long)pairs * positions) return;
    double s, c;
    sincos((double)(at / pairs) * inverse_frequencies[at % pairs], &s, &c);
    table[at] = make_float2((float)c, (float)s);
}

// One warp per (row, head); a lane holds pairs of neighbours from both halves of the head: dims 2j, 2j+1 and half+2j, half+2j+1.
template <typename T>
__device__ __forceinline__ void rope_write_kv(T *qkv, const T *query_norm, const T *key_norm, const float2 *table,
                                              const uint32_t *positions, const long *slot_mapping, T *cache, int num_heads,
                                              int num_kv_heads, int head_dim, int block_size, float eps) {
    using N = Num<T>;
    let_next_start();
    wait_for_previous();
    const int heads = num_heads + 2 * num_kv_heads;
    const int head = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (head >= heads) return;
    const long row = blockIdx.x;
    const bool is_value = head >= num_heads + num_kv_heads, is_query = head < num_heads;
    T *values = qkv + (row * heads + head) * head_dim;
    const int half = head_dim / 2;
    constexpr int MAX_STEPS = 2; // head_dim ≤ 256
    float2 low[MAX_STEPS], high[MAX_STEPS];
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < MAX_STEPS; i++) {
        const int dim = 2 * (lane + 32 * i);
        if (dim >= half) break;
        low[i] = N::unpack(*reinterpret_cast<const uint32_t *>(values + dim));
        high[i] = N::unpack(*reinterpret_cast<const uint32_t *>(values + half + dim));
        sum += low[i].x * low[i].x + low[i].y * low[i].y + high[i].x * high[i].x + high[i].y * high[i].y;
    }
    if (!is_value && query_norm) {
        const T *norm = is_query ? query_norm : key_norm;
        const float scale = rsqrtf(warp_sum(sum) / head_dim + eps);
#pragma unroll
        for (int i = 0; i < MAX_STEPS; i++) {
            const int dim = 2 * (lane + 32 * i);
            if (dim >= half) break;
            const float2 a = N::unpack(*reinterpret_cast<const uint32_t *>(norm + dim));
            const float2 b = N::unpack(*reinterpret_cast<const uint32_t *>(norm + half + dim));
            low[i] = N::unpack(N::pack(low[i].x * scale * a.x, low[i].y * scale * a.y));
            high[i] = N::unpack(N::pack(high[i].x * scale * b.x, high[i].y * scale * b.y));
        }
    }
    if (!is_value) {
        const float2 *angles = table + (long)positions[row] * half;
#pragma unroll
        for (int i = 0; i < MAX_STEPS; i++) {
            const int dim = 2 * (lane + 32 * i);
            if (dim >= half) break;
            const float2 a = angles[dim], b = angles[dim + 1], l = low[i], h = high[i];
            low[i] = make_float2(l.x * a.x - h.x * a.y, l.y * b.x - h.y * b.y);
            high[i] = make_float2(h.x * a.x + l.x * a.y, h.y * b.x + l.y * b.y);
        }
    }
    if (is_query) {
#pragma unroll
        for (int i = 0; i < MAX_STEPS; i++) {
            const int dim = 2 * (lane + 32 * i);
            if (dim >= half) break;
            *reinterpret_cast<uint32_t *>(values + dim) = N::pack(low[i].x, low[i].y);
            *reinterpret_cast<uint32_t *>(values + half + dim) = N::pack(high[i].x, high[i].y);
        }
        return;
    }
    const long slot = slot_mapping[row];
    if (slot < 0) return;
    const long block = slot / block_size, offset = slot % block_size;
    const int kv_head = head - num_heads - (is_value ? num_kv_heads : 0);
    T *page = cache + ((block * 2 + is_value) * num_kv_heads + kv_head) * block_size * head_dim;
#pragma unroll
    for (int i = 0; i < MAX_STEPS; i++) {
        const int dim = 2 * (lane + 32 * i);
        if (dim >= half) break;
        if (is_value) {
            page[(dim + 0) * block_size + offset] = N::from(low[i].x);
            page[(dim + 1) * block_size + offset] = N::from(low[i].y);
            page[(half + dim + 0) * block_size + offset] = N::from(high[i].x);
            page[(half + dim + 1) * block_size + offset] = N::from(high[i].y);
        } else {
            *reinterpret_cast<uint32_t *>(page + offset * head_dim + dim) = N::pack(low[i].x, low[i].y);
            *reinterpret_cast<uint32_t *>(page + offset * head_dim + half + dim) = N::pack(high[i].x, high[i].y);
        }
    }
}

#define DEFINE(SUFFIX, T)                                                                                                       \
    extern "C" __global__ void rope_write_kv_##SUFFIX(T *qkv, const T *query_norm, const T *key_norm, const float2 *table,      \
                                                      const uint32_t *positions, const long *slot_mapping, T *cache,            \
                                                      int num_heads, int num_kv_heads, int head_dim, int block_size,            \
                                                      float eps) {                                                              \
        rope_write_kv<T>(qkv, query_norm, key_norm, table, positions, slot_mapping, cache, num_heads, num_kv_heads, head_dim,   \
                         block_size, eps);                                                                                      \
    }
FOR_BOTH(DEFINE)
