// What all ways to draw share: parameters, passes over a row of logits, and a row as a draw sees it. One block per row.
#pragma once
#include "common.cuh"

constexpr int THREADS = 1024, WARPS = THREADS / 32, BINS = 2048;
constexpr int LIST = 2048; // candidates that are sorted in shared memory
constexpr uint32_t NO_TOKEN_NON_FINITE = 0xffffffffu, NO_TOKEN_FORBIDDEN = 0xfffffffeu;

struct SampleRow {
    uint32_t slot, logit_row, position, choice;
    unsigned long long seed;
    float temperature, top_p, min_p, repetition, presence, frequency;
    uint32_t top_k, num_logprobs; // num_logprobs: 0 = none, n + 1 = n most likely tokens
    int bias, num_bias;           // in `extra`: (token, bits of the float) pairs
    int forbidden, num_forbidden; // in `extra`: tokens
    int mask;                     // in `extra`: ⌈vocab/32⌉ words, or -1
    int has_counts;
};

struct Sampling {
    float *logits;           // [logit rows][vocab], overwritten
    const SampleRow *rows;
    const uint32_t *extra;
    uint16_t *counts;        // [slots][vocab]: times in the output, top bit: in the prompt
    uint32_t *last_tokens;   // [slots]
    uint32_t *tokens;        // [rows]
    float *logprobs;         // [rows][max_logprobs + 1]: the drawn token's, then the most likely ones'
    uint32_t *logprob_ids;   // [rows][max_logprobs]
    int vocab, max_logprobs;
};

__device__ __forceinline__ void philox(uint32_t *c, uint32_t k0, uint32_t k1) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        if (round) k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        const uint32_t l0 = 0xD2511F53u * c[0], h0 = __umulhi(0xD2511F53u, c[0]);
        const uint32_t l1 = 0xCD9E8D57u * c[2], h1 = __umulhi(0xCD9E8D57u, c[2]);
        const uint32_t a = h1 ^ c[1] ^ k0, b = h0 ^ c[3] ^ k1;
        c[0] = a, c[1] = l1, c[2] = b, c[3] = l0;
    }
}

struct Best {
    float value;
    int id;
};
__device__ __forceinline__ Best better(Best a, Best b) { return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a; }

struct Shared {
    union {
        struct {
            uint32_t counts[BINS];
            unsigned long long masses[BINS];
        };
        struct {
            unsigned long long list[LIST];
            unsigned long long by_id[LIST];
        };
    };
    unsigned long long warp_mass[WARPS];
    uint32_t warp_count[WARPS];
    Best best[WARPS];
    float low[WARPS];
    uint32_t bin, bin_count;
    unsigned long long bin_mass, above_mass;
    uint32_t above_count;
    uint32_t token;
    uint32_t num_listed;
    Best tops[64];
};

// Calls `f(id, logit)` for every token, four neighbours and several loads at a time where the rows are aligned to that.
template <typename F> __device__ __forceinline__ void for_each(const float *logits, int vocab, F f) {
    if (vocab % 4) {
        for (int i = threadIdx.x; i < vocab; i += THREADS) f(i, logits[i]);
        return;
    }
    constexpr int AHEAD = 4;
    const float4 *fours = reinterpret_cast<const float4 *>(logits);
    const int count = vocab / 4;
    auto four = [&](int i, const float4 &v) { f(4 * i, v.x), f(4 * i + 1, v.y), f(4 * i + 2, v.z), f(4 * i + 3, v.w); };
    int i = threadIdx.x;
    for (; i + (AHEAD - 1) * THREADS < count; i += AHEAD * THREADS) {
        float4 v[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) v[j] = fours[i + j * THREADS];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) four(i + j * THREADS, v[j]);
    }
    for (; i < count; i += THREADS) four(i, fours[i]);
}

// Largest logit (lowest id among equals), smallest finite one, and whether any is NaN or infinite (−∞ allowed if masked).
// `own` is the largest that this thread has seen.
__device__ __forceinline__ void extremes(Shared &s, const float *logits, int vocab, Best &best, float &low, bool &broken, float &own) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Best mine = {-INFINITY, 0x7fffffff};
    float least = INFINITY;
    bool bad = false;
    for_each(logits, vocab, [&](int i, float v) {
        bad |= !(fabsf(v) < INFINITY);
        if (v > -INFINITY) least = fminf(least, v);
        mine = better(mine, {v, i});
    });
    own = mine.value;
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        mine = better(mine, {__shfl_xor_sync(0xffffffffu, mine.value, o), __shfl_xor_sync(0xffffffffu, mine.id, o)});
        least = fminf(least, __shfl_xor_sync(0xffffffffu, least, o));
    }
    if (lane == 0) s.best[warp] = mine, s.low[warp] = least;
    broken = __syncthreads_or(bad);
    best = s.best[0], low = s.low[0];
    for (int w = 1; w < WARPS; w++) best = better(best, s.best[w]), low = fminf(low, s.low[w]);
    __syncthreads();
}

// A row as the draw sees it: key 0 is the most likely, and weight in fixed point.
struct View {
    const float *logits;
    int vocab;
    float max, scale, cutoff, key_scale;
    __device__ __forceinline__ bool candidate(float v) const { return v >= cutoff && v > -INFINITY; }
    __device__ __forceinline__ uint32_t key(float v) const { return __float2uint_rz(fminf((max - v) * key_scale, 4294967040.f)); }
    __device__ __forceinline__ unsigned long long weight(float v) const {
        return (unsigned long long)(__expf((v - max) * scale) * 1099511627776.f);
    }
};

// ln Σ e^logit.
__device__ __forceinline__ float log_sum_exp(Shared &s, const float *logits, int vocab, float max) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float sum = 0.f;
    for_each(logits, vocab, [&](int, float v) { sum += __expf(v - max); });
    sum = warp_sum(sum);
    if (lane == 0) s.low[warp] = sum;
    __syncthreads();
    double total = 0;
    for (int w = 0; w < WARPS; w++) total += s.low[w];
    __syncthreads();
    return max + (float)log(total);
}

// Sum over the block, the same in every thread; ends in a barrier.
__device__ __forceinline__ unsigned long long block_sum(Shared &s, unsigned long long v) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
    if (threadIdx.x % 32 == 0) s.warp_mass[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0;
    for (int w = 0; w < WARPS; w++) v += s.warp_mass[w];
    __syncthreads();
    return v;
}

// Philox's uniform number of a row, in [0, 1).
__device__ __forceinline__ double uniform_of(const SampleRow &row) {
    uint32_t c[4] = {row.position, 0, row.choice, 0};
    philox(c, (uint32_t)row.seed, (uint32_t)(row.seed >> 32));
    const unsigned long long bits = ((unsigned long long)c[0] << 21) ^ (c[1] >> 11);
    return (double)bits * (1.0 / 9007199254740992.0);
}
__device__ __forceinline__ unsigned long long target_of(double uniform, unsigned long long total) {
    return min((unsigned long long)(uniform * (double)total), total - 1);
}
