// What a warp of decode attention holds of K and V at once, in registers, and its products.
//
// Order of k inside a product is free when both operands agree: a lane loads 16 neighbouring bytes of K, and row r of an S^T
// tile is a token such that neighbouring tokens of V^T are one lane's operand. In 16 bits that is one page, 4 tokens of V^T a
// lane; eight-bit floats are two pages, 8 tokens a lane and two tiles, so that as many bytes are on their way.
#pragma once
#include "fp8.cuh"

constexpr int BLOCK = 16; // tokens in a page

template <typename T, typename KV, int D> struct Pages;

template <typename T, int D> struct Pages<T, T, D> {
    static constexpr int PAGES = 1, TILES = 1, KBLOCKS = D / 32, MTILES = D / 16;
    using Entry = int; // of the block table
    using Values = T;  // what is multiplied
    using N = Num<T>;
    const int group, quad, token0; // of the lane
    Vec8 k[KBLOCKS][2];
    uint2 v[MTILES][2];

    __device__ __forceinline__ Pages(int group, int quad) : group(group), quad(quad), token0(4 * (group / 2) + group % 2) {}

    // Rows `group` and `group + 8` of a tile of S^T are tokens first_token and first_token + 2.
    __device__ __forceinline__ int first_token(int) const { return token0; }
    // The first of the 8 values of a head that a lane has of the queries' block b.
    __device__ __forceinline__ int dim(int b) const { return b * 32 + quad * 8; }

    __device__ __forceinline__ Entry look_up(const int *table, int page, int end) const { return page < end ? table[page] : 0; }
    __device__ __forceinline__ void load_keys(const T *cache, long page_values, long head, Entry block) {
        const T *keys = cache + block * page_values + head + (first_token(0) * D + quad * 8);
#pragma unroll
        for (int b = 0; b < KBLOCKS; b++) {
            k[b][0].v = load_once16(keys + b * 32);
            k[b][1].v = load_once16(keys + 2 * D + b * 32);
        }
    }
    __device__ __forceinline__ void load_values(const T *cache, long page_values, long head, Entry block) {
        const T *values = cache + block * page_values + head + (group * BLOCK + quad * 4);
#pragma unroll
        for (int i = 0; i < MTILES; i++) {
            v[i][0] = load_once8(values + i * 16 * BLOCK);
            v[i][1] = load_once8(values + (i * 16 + 8) * BLOCK);
        }
    }

    // Puts the k and v of one token among those of the pages.
    __device__ __forceinline__ void put(const T *key, const T *value, int token) {
#pragma unroll
        for (int b = 0; b < KBLOCKS; b++) {
            const uint4 w = *reinterpret_cast<const uint4 *>(key + b * 32 + quad * 8);
            if (first_token(0) == token) k[b][0].v = w;
            if (first_token(0) + 2 == token) k[b][1].v = w;
        }
        if (quad != token / 4) return;
        const uint32_t shift = token % 2 * 16, keep = 0xffff0000u >> shift;
        auto put = [&](uint2 &word, int dim) {
            const uint32_t bits = (uint32_t)reinterpret_cast<const uint16_t *>(value)[dim] << shift;
            if (token % 4 < 2) word.x = (word.x & keep) | bits;
            else word.y = (word.y & keep) | bits;
        };
#pragma unroll
        for (int i = 0; i < MTILES; i++) put(v[i][0], i * 16 + group), put(v[i][1], i * 16 + group + 8);
    }
    // V's tokens that are not to be kept become zero; `start` is the pages' first token.
    template <typename Keep> __device__ __forceinline__ void mask_values(int start, Keep keep) {
        start += quad * 4;
        const uint32_t m0 = (keep(start) ? 0xffffu : 0u) | (keep(start + 1) ? 0xffff0000u : 0u);
        const uint32_t m1 = (keep(start + 2) ? 0xffffu : 0u) | (keep(start + 3) ? 0xffff0000u : 0u);
#pragma unroll
        for (int i = 0; i < MTILES; i++) {
            v[i][0].x &= m0, v[i][1].x &= m0;
            v[i][0].y &= m1, v[i][1].y &= m1;
        }
    }

    // s = K · Q^T; `query(t, b)` is block b of column tile t.
    template <int COLUMN_TILES, typename Query> __device__ __forceinline__ void scores(float (*s)[TILES][4], Query query) const {
#pragma unroll
        for (int t = 0; t < COLUMN_TILES; t++) {
#pragma unroll
            for (int j = 0; j < 4; j++) s[t][0][j] = 0.f;
#pragma unroll
            for (int b = 0; b < KBLOCKS; b++) {
                const uint32_t first[4] = {k[b][0].w[0], k[b][1].w[0], k[b][0].w[1], k[b][1].w[1]};
                const uint32_t second[4] = {k[b][0].w[2], k[b][1].w[2], k[b][0].w[3], k[b][1].w[3]};
                const uint4 w = query(t, b);
                N::mma(s[t][0], first, w.x, w.y);
                N::mma(s[t][0], second, w.z, w.w);
            }
        }
    }
    // out += V^T · P^T
    template <int COLUMN_TILES> __device__ __forceinline__ void add(float (*out)[MTILES][4], const uint32_t (*weights)[TILES][2]) const {
#pragma unroll
        for (int t = 0; t < COLUMN_TILES; t++)
#pragma unroll
            for (int i = 0; i < MTILES; i++) {
                const uint32_t a[4] = {v[i][0].x, v[i][1].x, v[i][0].y, v[i][1].y};
                N::mma(out[t][i], a, weights[t][0][0], weights[t][0][1]);
            }
    }
};

// Eight-bit floats, multiplied as halves, which they are exactly.
template <typename T, int D> struct Pages<T, uint8_t, D> {
    static constexpr int PAGES = 2, TILES = 2, KBLOCKS = D / 32, MTILES = D / 16;
    struct Entry {
        int key, value; // the pages of this lane's K and V
    };
    using Values = __half;
    using N = Num<__half>;
    const int group, quad;
    uint2 k[TILES][2][KBLOCKS];
    uint2 v[MTILES][2];

    __device__ __forceinline__ Pages(int group, int quad) : group(group), quad(quad) {}

    __device__ __forceinline__ int first_token(int tile) const { return 8 * (group / 2) + 4 * tile + group % 2; }
    // 16 bytes are two blocks; the last of an odd number of blocks comes in 8.
    __device__ __forceinline__ int dim(int b) const { return b + 1 == KBLOCKS && b % 2 == 0 ? b * 32 + quad * 8 : b / 2 * 64 + quad * 16 + b % 2 * 8; }

    // Behind the end the last page stands in, to be masked.
    __device__ __forceinline__ Entry look_up(const int *table, int page, int end) const {
        if (page >= end) return {0, 0};
        return {table[min(page + group / 4, end - 1)], table[min(page + quad / 2, end - 1)]};
    }
    __device__ __forceinline__ void load_keys(const uint8_t *cache, long page_values, long head, Entry block) {
        const uint8_t *keys = cache + block.key * page_values + head + first_token(0) % BLOCK * D;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int token = 4 * tile + 2 * r; // behind the first, in the same page
#pragma unroll
                for (int b = 0; b + 1 < KBLOCKS; b += 2) {
                    const uint4 w = load_once16(keys + quad * 16 + (token * D + b * 32));
                    k[tile][r][b] = make_uint2(w.x, w.y), k[tile][r][b + 1] = make_uint2(w.z, w.w);
                }
                if constexpr (KBLOCKS % 2) k[tile][r][KBLOCKS - 1] = load_once8(keys + quad * 8 + (token * D + (KBLOCKS - 1) * 32));
            }
    }
    __device__ __forceinline__ void load_values(const uint8_t *cache, long page_values, long head, Entry block) {
        const uint8_t *values = cache + block.value * page_values + head + (group * BLOCK + quad % 2 * 8);
#pragma unroll
        for (int i = 0; i < MTILES; i++) {
            v[i][0] = load_once8(values + i * 16 * BLOCK);
            v[i][1] = load_once8(values + (i * 16 + 8) * BLOCK);
        }
    }

    __device__ __forceinline__ void put(const uint8_t *key, const uint8_t *value, int token) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int b = 0; b < KBLOCKS; b++)
                    if (first_token(tile) + 2 * r == token) k[tile][r][b] = *reinterpret_cast<const uint2 *>(key + dim(b));
        if (quad != token / 8) return;
        const uint32_t shift = token % 4 * 8, keep = ~(0xffu << shift);
        auto put = [&](uint2 &word, int dim) {
            const uint32_t bits = (uint32_t)value[dim] << shift;
            if (token % 8 < 4) word.x = (word.x & keep) | bits;
            else word.y = (word.y & keep) | bits;
        };
#pragma unroll
        for (int i = 0; i < MTILES; i++) put(v[i][0], i * 16 + group), put(v[i][1], i * 16 + group + 8);
    }
    template <typename Keep> __device__ __forceinline__ void mask_values(int start, Keep keep) {
        start += quad * 8;
        uint32_t m[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < 8; i++) m[i / 4] |= keep(start + i) ? 0xffu << i % 4 * 8 : 0u;
#pragma unroll
        for (int i = 0; i < MTILES; i++) {
            v[i][0].x &= m[0], v[i][1].x &= m[0];
            v[i][0].y &= m[1], v[i][1].y &= m[1];
        }
    }

    // Four values of two rows as an operand.
    static __device__ __forceinline__ void operand(uint32_t *a, uint32_t row, uint32_t row8) {
        uint32_t low[2], high[2];
        widen<__half>(row, low);
        widen<__half>(row8, high);
        a[0] = low[0], a[1] = high[0], a[2] = low[1], a[3] = high[1];
    }
    template <int COLUMN_TILES, typename Query> __device__ __forceinline__ void scores(float (*s)[TILES][4], Query query) const {
#pragma unroll
        for (int t = 0; t < COLUMN_TILES; t++)
#pragma unroll
            for (int tile = 0; tile < TILES; tile++)
#pragma unroll
                for (int j = 0; j < 4; j++) s[t][tile][j] = 0.f;
#pragma unroll
        for (int b = 0; b < KBLOCKS; b++) {
            uint4 w[COLUMN_TILES];
#pragma unroll
            for (int t = 0; t < COLUMN_TILES; t++) w[t] = query(t, b);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                uint32_t first[4], second[4];
                operand(first, k[tile][0][b].x, k[tile][1][b].x);
                operand(second, k[tile][0][b].y, k[tile][1][b].y);
#pragma unroll
                for (int t = 0; t < COLUMN_TILES; t++) {
                    N::mma(s[t][tile], first, w[t].x, w[t].y);
                    N::mma(s[t][tile], second, w[t].z, w[t].w);
                }
            }
        }
    }
    template <int COLUMN_TILES> __device__ __forceinline__ void add(float (*out)[MTILES][4], const uint32_t (*weights)[TILES][2]) const {
#pragma unroll
        for (int i = 0; i < MTILES; i++)
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                uint32_t a[4];
                operand(a, tile ? v[i][0].y : v[i][0].x, tile ? v[i][1].y : v[i][1].x);
#pragma unroll
                for (int t = 0; t < COLUMN_TILES; t++) N::mma(out[t][i], a, weights[t][tile][0], weights[t][tile][1]);
            }
    }
};
