// Top-k and top-p over a short list: what can be kept is nearly always among a few hundred tokens. The w-th largest of what
// the threads saw at most is a bound that at least w tokens reach; those that reach it are sorted, and all else is decided
// among them.
#pragma once
#include "sampling.cuh"

// A sortable word: greater logits first, lower ids first among equals.
__device__ __forceinline__ unsigned long long sort_key(float value, int id) {
    const uint32_t bits = __float_as_uint(value);
    return (unsigned long long)(bits & 0x80000000u ? bits : ~bits & 0x7fffffffu) << 32 | (uint32_t)id;
}
__device__ __forceinline__ float key_value(unsigned long long key) {
    const uint32_t bits = key >> 32;
    return __uint_as_float(bits & 0x80000000u ? bits : ~bits & 0x7fffffffu);
}
__device__ __forceinline__ int key_id(unsigned long long key) { return (int)(uint32_t)key; }

// Sorts the first `count` words, ascending; what is behind them up to a power of two is overwritten.
__device__ __forceinline__ void sort(unsigned long long *words, int count) {
    int size = 2;
    while (size < count) size *= 2;
    for (int i = threadIdx.x; i < size; i += THREADS)
        if (i >= count) words[i] = ~0ull;
    __syncthreads();
    for (int length = 2; length <= size; length *= 2)
        for (int distance = length / 2; distance > 0; distance /= 2) {
            const int pair = threadIdx.x, low = pair / distance * distance * 2 + pair % distance, high = low + distance;
            if (pair < size / 2) {
                const unsigned long long a = words[low], b = words[high];
                if ((a > b) == ((low & length) == 0)) words[low] = b, words[high] = a;
            }
            // Pairs of one warp stay in one warp as long as they are close.
            if (distance > 32 || distance == 1) __syncthreads();
            else __syncwarp();
        }
}

// The candidates that reach a bound which `wanted` tokens reach (all, if there are fewer), most likely first: their number,
// or more than LIST when they do not fit. `own` is the largest logit that this thread has seen in a pass by `for_each`.
__device__ __forceinline__ int list_best(Shared &s, const View &view, float own, int wanted) {
    uint32_t bound = 0; // as an ascending key
    if (view.vocab > LIST) {
        const uint32_t mine = ~(uint32_t)(sort_key(own, 0) >> 32);
        for (int bit = 31; bit >= 0; bit--) {
            const uint32_t higher = bound | 1u << bit;
            if (__syncthreads_count(mine >= higher) >= wanted) bound = higher;
        }
    }
    if (threadIdx.x == 0) s.num_listed = 0;
    __syncthreads();
    for_each(view.logits, view.vocab, [&](int i, float v) {
        const unsigned long long key = sort_key(v, i);
        if (~(uint32_t)(key >> 32) < bound || !view.candidate(v)) return;
        const uint32_t at = atomicAdd(&s.num_listed, 1u);
        if (at < LIST) s.list[at] = key;
    });
    __syncthreads();
    const int count = s.num_listed;
    if (count <= LIST) sort(s.list, count);
    return count;
}

// Sums of the weights of words 2·thread and the one behind it, and of all before: in `first` and `second` inclusive sums.
template <typename W> __device__ __forceinline__ void scan_pairs(Shared &s, int count, W weight, unsigned long long &first, unsigned long long &second) {
    const int i = threadIdx.x * 2, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned long long a = i < count ? weight(i) : 0, b = i + 1 < count ? weight(i + 1) : 0;
    unsigned long long sum = a + b;
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
        const unsigned long long up = __shfl_up_sync(0xffffffffu, sum, o);
        if (lane >= o) sum += up;
    }
    if (lane == 31) s.warp_mass[warp] = sum;
    __syncthreads();
    for (int w = 0; w < warp; w++) sum += s.warp_mass[w];
    __syncthreads();
    first = sum - b, second = sum;
}

// Draws among the listed tokens; false when the list does not hold all that may be kept. `all` is the sum of all candidates'
// weights where top-k does not cut it.
__device__ __forceinline__ bool draw_listed(Shared &s, const View &view, int count, uint32_t top_k, float top_p, unsigned long long all,
                                            double uniform, uint32_t &token) {
    int kept = top_k ? min(count, (int)top_k) : count;
    auto weight = [&](int i) { return view.weight(key_value(s.list[i])); };
    unsigned long long first, second;
    if (top_p < 1.f) {
        scan_pairs(s, kept, weight, first, second);
        unsigned long long total = all;
        if (top_k) {
            if (threadIdx.x == THREADS - 1) s.bin_mass = second;
            __syncthreads();
            total = s.bin_mass;
        }
        const unsigned long long wanted = max(1ull, (unsigned long long)((double)total * top_p));
        // As many as do not reach the mass, and one.
        const int below = __syncthreads_count(threadIdx.x * 2 < kept && first < wanted) + __syncthreads_count(threadIdx.x * 2 + 1 < kept && second < wanted);
        if (below >= kept && !top_k) return false;
        kept = min(kept, below + 1);
    }
    for (int i = threadIdx.x; i < kept; i += THREADS) s.by_id[i] = (unsigned long long)(uint32_t)key_id(s.list[i]) << 32 | (uint32_t)i;
    __syncthreads();
    sort(s.by_id, kept);
    scan_pairs(s, kept, [&](int i) { return weight((int)(uint32_t)s.by_id[i]); }, first, second);
    if (threadIdx.x == THREADS - 1) s.bin_mass = second;
    if (threadIdx.x == 0) s.token = NO_TOKEN_FORBIDDEN;
    __syncthreads();
    const unsigned long long target = target_of(uniform, s.bin_mass);
    const int i = threadIdx.x * 2;
    const unsigned long long own_first = i < kept ? weight((int)(uint32_t)s.by_id[i]) : 0;
    if (i < kept && target < first && target >= first - own_first) s.token = s.by_id[i] >> 32;
    if (i + 1 < kept && target < second && target >= first) s.token = s.by_id[i + 1] >> 32;
    __syncthreads();
    token = s.token;
    return true;
}

// Draws among all candidates: a warp sums a run of ids, and the one with the target looks where in its run it is.
__device__ __forceinline__ uint32_t draw_all(Shared &s, const View &view, double uniform) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int share = ((view.vocab + WARPS - 1) / WARPS + 127) / 128 * 128;
    const int begin = min(warp * share, view.vocab), end = min(begin + share, view.vocab);
    const bool aligned = view.vocab % 4 == 0;
    auto load = [&](int i, float (&v)[4]) {
        if (aligned && i < end) {
            const float4 f = *reinterpret_cast<const float4 *>(view.logits + i);
            v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
        } else {
            for (int j = 0; j < 4; j++) v[j] = i + j < end ? view.logits[i + j] : -INFINITY;
        }
    };
    auto weight = [&](float v) -> unsigned long long { return view.candidate(v) ? view.weight(v) : 0; };
    unsigned long long mass = 0;
#pragma unroll 4
    for (int i = begin + lane * 4; i < end; i += 128) {
        float v[4];
        load(i, v);
#pragma unroll
        for (int j = 0; j < 4; j++) mass += weight(v[j]);
    }
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) mass += __shfl_xor_sync(0xffffffffu, mass, o);
    if (lane == 0) s.warp_mass[warp] = mass;
    if (threadIdx.x == 0) s.token = NO_TOKEN_FORBIDDEN;
    __syncthreads();
    unsigned long long total = 0, before = 0;
    for (int w = 0; w < WARPS; w++) {
        if (w == warp) before = total;
        total += s.warp_mass[w];
    }
    const unsigned long long target = target_of(uniform, total);
    if (total > 0 && target >= before && target < before + mass) {
        for (int base = begin; base < end; base += 128) {
            float v[4];
            load(base + lane * 4, v);
            unsigned long long mine = 0;
#pragma unroll
            for (int j = 0; j < 4; j++) mine += weight(v[j]);
            unsigned long long scan = mine;
#pragma unroll
            for (int o = 1; o < 32; o *= 2) {
                const unsigned long long up = __shfl_up_sync(0xffffffffu, scan, o);
                if (lane >= o) scan += up;
            }
            unsigned long long at = before + scan - mine;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const unsigned long long one = weight(v[j]);
                if (target >= at && target < at + one) s.token = base + lane * 4 + j;
                at += one;
            }
            before += __shfl_sync(0xffffffffu, scan, 31);
            if (before > target) break;
        }
    }
    __syncthreads();
    return s.token;
}
