// Embedding, RMS norms, SiLU·up, gathering rows, random weights. All bound by memory: 16-byte accesses, each byte once.
#include "common.cuh"

// Token id that stands for the token which the row's slot drew last.
constexpr uint32_t TOKEN_FROM_SLOT = 0xffffffffu;
constexpr int MAX_VECTORS = 4; // 16-byte vectors of a row in one thread's registers

enum Source { EMBED, ADD, STREAM };

// The embedding, in pieces of `rows` rows, one for each tensor-parallel rank.
struct Tables {
    const void *of[8];
};

// residual = embedding[token], or residual += delta, or as it is;   out = residual / rms(residual) · weight.
// `sums` takes the row's sum of squares, for consumers that do the norm themselves. One block per row.
template <typename T, Source SOURCE>
__device__ __forceinline__ void norm_row(const uint32_t *tokens, const int *row_slots, const uint32_t *last_tokens,
                                         const Tables &tables, uint32_t table_rows, const T *delta, const T *weight, T *residual, T *out, float *sums, int width, float eps) {
    __shared__ float scratch[33];
    using N = Num<T>;
    let_next_start();
    wait_for_previous();
    const long row = blockIdx.x;
    const int vectors = width / 8;
    const T *source;
    if (SOURCE == EMBED) {
        uint32_t token = tokens[row];
        if (token == TOKEN_FROM_SLOT) token = last_tokens[row_slots[row]];
        source = reinterpret_cast<const T *>(tables.of[token / table_rows]) + (long)(token % table_rows) * width;
    } else {
        source = (SOURCE == ADD ? delta : residual) + row * width;
    }
    Vec8 values[MAX_VECTORS];
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < MAX_VECTORS; i++) {
        const int at = threadIdx.x + i * blockDim.x;
        if (at >= vectors) break;
        values[i].v = reinterpret_cast<const uint4 *>(source)[at];
        if (SOURCE == ADD) {
            Vec8 r;
            r.v = reinterpret_cast<const uint4 *>(residual + row * width)[at];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float2 a = N::unpack(values[i].w[j]), b = N::unpack(r.w[j]);
                values[i].w[j] = N::pack(a.x + b.x, a.y + b.y);
            }
        }
        if (SOURCE != STREAM) reinterpret_cast<uint4 *>(residual + row * width)[at] = values[i].v;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 a = N::unpack(values[i].w[j]);
            sum += a.x * a.x + a.y * a.y;
        }
    }
    sum = block_sum(sum, scratch);
    if (sums && threadIdx.x == 0) sums[row] = sum;
    const float scale = rsqrtf(sum / width + eps);
#pragma unroll
    for (int i = 0; i < MAX_VECTORS; i++) {
        const int at = threadIdx.x + i * blockDim.x;
        if (at >= vectors) break;
        Vec8 w;
        w.v = reinterpret_cast<const uint4 *>(weight)[at];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 a = N::unpack(values[i].w[j]), b = N::unpack(w.w[j]);
            values[i].w[j] = N::pack(a.x * scale * b.x, a.y * scale * b.y);
        }
        reinterpret_cast<uint4 *>(out + row * width)[at] = values[i].v;
    }
}

// out = silu(gate) · up; gate and up are the halves of a row of 2·width. One thread per 8 values.
template <typename T> __device__ __forceinline__ void silu_mul_row(const T *gate_up, T *out, int width, int rows) {
    using N = Num<T>;
    let_next_start();
    wait_for_previous();
    const int vectors = width / 8;
    const long at = (long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (long)vectors * rows) return;
    const long row = at / vectors, column = at % vectors;
    Vec8 g, u;
    g.v = reinterpret_cast<const uint4 *>(gate_up + row * 2 * width)[column];
    u.v = reinterpret_cast<const uint4 *>(gate_up + row * 2 * width + width)[column];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float2 a = N::unpack(g.w[j]), b = N::unpack(u.w[j]);
        g.w[j] = N::pack(a.x / (1.f + __expf(-a.x)) * b.x, a.y / (1.f + __expf(-a.y)) * b.y);
    }
    reinterpret_cast<uint4 *>(out + row * width)[column] = g.v;
}

#define DEFINE(SUFFIX, T)                                                                                                          \
    extern "C" __global__ void embed_norm_##SUFFIX(const uint32_t *tokens, const int *row_slots, const uint32_t *last_tokens,      \
                                                   __grid_constant__ const Tables tables, uint32_t table_rows, const T *weight,    \
                                                   T *residual, T *out, float *sums, int width, float eps) {                       \
        norm_row<T, EMBED>(tokens, row_slots, last_tokens, tables, table_rows, nullptr, weight, residual, out, sums, width, eps);  \
    }                                                                                                                              \
    extern "C" __global__ void add_norm_##SUFFIX(const T *delta, const T *weight, T *residual, T *out, int width, float eps) {     \
        norm_row<T, ADD>(nullptr, nullptr, nullptr, Tables{}, 1, delta, weight, residual, out, nullptr, width, eps);               \
    }                                                                                                                              \
    extern "C" __global__ void norm_##SUFFIX(const T *weight, T *residual, T *out, int width, float eps) {                             \
        norm_row<T, STREAM>(nullptr, nullptr, nullptr, Tables{}, 1, nullptr, weight, residual, out, nullptr, width, eps);              \
    }                                                                                                                              \
    extern "C" __global__ void silu_mul_##SUFFIX(const T *gate_up, T *out, int width, int rows) {                                  \
        silu_mul_row<T>(gate_up, out, width, rows);                                                                                \
    }
FOR_BOTH(DEFINE)
#undef DEFINE

// out[i] = in[rows[i]], rows of `vectors` 16-byte vectors. One block per row.
extern "C" __global__ void gather_rows(const uint4 *in, const int *rows, uint4 *out, int vectors) {
    let_next_start();
    wait_for_previous();
    const long from = rows[blockIdx.x], to = blockIdx.x;
    for (int i = threadIdx.x; i < vectors; i += blockDim.x) out[to * vectors + i] = in[from * vectors + i];
}

// Uniform numbers in ±scale from a hash of (seed, index), for models without weights.
template <typename T> __device__ __forceinline__ void fill_random(T *out, long count, uint64_t seed, float scale) {
    for (long i = (long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (long)gridDim.x * blockDim.x) {
        uint64_t x = (i + 1) * 0x9E3779B97F4A7C15ull + seed;
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
        x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
        x ^= x >> 31;
        out[i] = Num<T>::from(((float)(x >> 40) * (2.f / 16777216.f) - 1.f) * scale);
    }
}
extern "C" __global__ void fill_random_bf16(__nv_bfloat16 *out, long count, uint64_t seed, float scale) { fill_random(out, count, seed, scale); }
extern "C" __global__ void fill_random_f16(__half *out, long count, uint64_t seed, float scale) { fill_random(out, count, seed, scale); }
