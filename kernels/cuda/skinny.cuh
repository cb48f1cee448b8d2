// What products with few rows share: parameters, the norm's scales, and what becomes of the sums.
#pragma once
#include "common.cuh"

constexpr int WARPS = 8;

enum Output { STORE, STORE_F32, ADD_RESIDUAL, SILU_MUL };

struct Skinny {
    const void *x;            // [m][k]; with `norm`, the residual stream
    const void *weight;       // [n][k]; for SILU_MUL [2·n][k], gate then up
    const void *bias;         // [n] or null
    const void *norm;         // [k] or null: x is normed on the way in
    const float *sums;        // [num_sums][m] parts of the rows' sums of squares
    void *y;                  // [m][n]; for ADD_RESIDUAL the residual stream
    float *sums_out;          // [n/16][m], for ADD_RESIDUAL
    const uint32_t *cells;    // of integer weights, [groups][rows of weight]: see int4.cu and eight_bit.cu
    const float *row_scales;  // [rows of weight] or null: what the sums are multiplied with
    int *tickets;             // zero between launches: tiles that were given out; or null where blocks take tiles in turn
    int m, n, k, num_sums;
    float eps;
    int group_shift;          // of integer weights: a group is 2^this of what a lane takes at once
};

// Rows of w that a lane's group and the group eight rows on stand for, in tile `tile` of 16 rows.
template <Output OUTPUT> __device__ __forceinline__ void tile_rows(const Skinny &p, int tile, int group, int *row0, int *row1) {
    if (OUTPUT == SILU_MUL) {
        *row0 = min(tile * 8 + group, p.n - 1);
        *row1 = p.n + *row0;
    } else {
        *row0 = min(tile * 16 + group, p.n - 1);
        *row1 = min(tile * 16 + group + 8, p.n - 1);
    }
}

// Where x is normed: each token's scale, from the parts of its sum of squares. To be read behind a barrier.
__device__ __forceinline__ void norm_scales(const Skinny &p, float *scales) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int m = warp; m < p.m; m += WARPS) {
        float s = 0.f;
        for (int i = lane; i < p.num_sums; i += 32) s += p.sums[(long)i * p.m + m];
        s = warp_sum(s);
        if (lane == 0) scales[m] = rsqrtf(s / p.k + p.eps);
    }
}

// Eight values of a token, normed.
template <typename T> __device__ __forceinline__ void apply_norm(Vec8 *x, const Vec8 &norm, float scale) {
    using N = Num<T>;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float2 v = N::unpack(x->w[j]), n = N::unpack(norm.w[j]);
        x->w[j] = N::pack(v.x * scale * n.x, v.y * scale * n.y);
    }
}

// Sums the warps' parts of tile `tile` of 16 rows and does with the sums what OUTPUT says; `thread` among those of WARPS warps.
template <typename T, int M, Output OUTPUT>
__device__ __forceinline__ void finish_tile(const Skinny &p, float (*partial)[16][M + 1], int tile, int thread = threadIdx.x) {
    using N = Num<T>;
    constexpr int ROWS = OUTPUT == SILU_MUL ? 8 : 16;
    // Neighbouring threads hold neighbouring outputs of one token.
    for (int i = thread; i < ROWS * M; i += WARPS * 32) {
        const int r = i % ROWS, m = i / ROWS;
        const int n = tile * ROWS + r;
        const bool valid = n < p.n && m < p.m;
        float s = 0.f, up = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            s += partial[w][r][m];
            if (OUTPUT == SILU_MUL) up += partial[w][r + 8][m];
        }
        if (p.row_scales && valid) {
            s *= p.row_scales[n];
            if (OUTPUT == SILU_MUL) up *= p.row_scales[p.n + n];
        }
        if (p.bias && valid) {
            s += N::to(static_cast<const T *>(p.bias)[n]);
            if (OUTPUT == SILU_MUL) up += N::to(static_cast<const T *>(p.bias)[p.n + n]);
        }
        float square = 0.f;
        if (valid) {
            const long at = (long)m * p.n + n;
            if (OUTPUT == STORE_F32) {
                static_cast<float *>(p.y)[at] = s;
            } else if (OUTPUT == STORE) {
                static_cast<T *>(p.y)[at] = N::from(s);
            } else if (OUTPUT == SILU_MUL) {
                const float g = N::to(N::from(s)), u = N::to(N::from(up));
                static_cast<T *>(p.y)[at] = N::from(g / (1.f + __expf(-g)) * u);
            } else {
                const T sum = N::from(N::to(static_cast<T *>(p.y)[at]) + N::to(N::from(s)));
                static_cast<T *>(p.y)[at] = sum;
                square = N::to(sum) * N::to(sum);
            }
        }
        if (OUTPUT == ADD_RESIDUAL) {
            // 16 neighbouring threads hold the 16 outputs of one token.
#pragma unroll
            for (int o = 8; o > 0; o >>= 1) square += __shfl_xor_sync(0xffffffffu, square, o, 16);
            if (r == 0 && m < p.m) p.sums_out[(long)tile * p.m + m] = square;
        }
    }
}
