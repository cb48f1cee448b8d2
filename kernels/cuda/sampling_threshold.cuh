// Top-k and top-p over a whole row, however many tokens they keep: three rounds of histograms over a 32-bit key, the distance
// to the largest logit, find the threshold; ties there go to the lowest ids. For rows too flat for sampling_list.cuh.
#pragma once
#include "sampling.cuh"

// The threshold at which the best candidates reach `count` (count mode) or `mass`: its key, how many with that key belong.
struct Threshold {
    uint32_t key, ties, tie_count;
    unsigned long long above_mass, mass; // of keys better than `key`; of all that belong
};
__device__ Threshold find_threshold(Shared &s, const View &view, bool by_count, uint32_t count, unsigned long long mass) {
    uint32_t prefix = 0, above_count = 0;
    unsigned long long above_mass = 0;
    const int shifts[4] = {32, 21, 10, 0};
    for (int level = 0; level < 3; level++) {
        const int low = shifts[level + 1], high = shifts[level];
        const uint32_t bins = 1u << (high - low);
        for (int i = threadIdx.x; i < BINS; i += THREADS) s.counts[i] = 0, s.masses[i] = 0;
        __syncthreads();
        for_each(view.logits, view.vocab, [&](int, float v) {
            if (!view.candidate(v)) return;
            const uint32_t key = view.key(v);
            if (level > 0 && key >> high != prefix) return;
            const uint32_t bin = (key >> low) & (bins - 1);
            atomicAdd(&s.counts[bin], 1u);
            atomicAdd(&s.masses[bin], view.weight(v));
        });
        __syncthreads();
        // Two bins a thread, scanned over the block.
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const uint32_t c0 = s.counts[threadIdx.x * 2], c1 = s.counts[threadIdx.x * 2 + 1];
        const unsigned long long m0 = s.masses[threadIdx.x * 2], m1 = s.masses[threadIdx.x * 2 + 1];
        uint32_t c = c0 + c1;
        unsigned long long m = m0 + m1;
#pragma unroll
        for (int o = 1; o < 32; o *= 2) {
            const uint32_t pc = __shfl_up_sync(0xffffffffu, c, o);
            const unsigned long long pm = __shfl_up_sync(0xffffffffu, m, o);
            if (lane >= o) c += pc, m += pm;
        }
        if (lane == 31) s.warp_count[warp] = c, s.warp_mass[warp] = m;
        if (threadIdx.x == 0) s.bin = 0xffffffffu;
        __syncthreads();
        uint32_t base_c = above_count;
        unsigned long long base_m = above_mass;
        for (int w = 0; w < warp; w++) base_c += s.warp_count[w], base_m += s.warp_mass[w];
        c += base_c, m += base_m;
        const uint32_t before_c = c - c0 - c1;
        const unsigned long long before_m = m - m0 - m1;
        auto reached = [&](uint32_t cc, unsigned long long mm) { return by_count ? cc >= count : mm >= mass; };
        if (c0 && !reached(before_c, before_m) && reached(before_c + c0, before_m + m0)) {
            s.bin = threadIdx.x * 2, s.bin_count = c0, s.bin_mass = m0, s.above_count = before_c, s.above_mass = before_m;
        } else if (c1 && !reached(before_c + c0, before_m + m0) && reached(c, m)) {
            s.bin = threadIdx.x * 2 + 1, s.bin_count = c1, s.bin_mass = m1, s.above_count = before_c + c0, s.above_mass = before_m + m0;
        }
        __syncthreads();
        // Never reached: everything belongs.
        if (s.bin == 0xffffffffu) {
            unsigned long long all = above_mass;
            for (int w = 0; w < WARPS; w++) all += s.warp_mass[w];
            __syncthreads();
            return {0xffffffffu, 0xffffffffu, 0, all, all};
        }
        prefix = level == 0 ? s.bin : (prefix << (high - low)) | s.bin;
        above_count = s.above_count, above_mass = s.above_mass;
        __syncthreads();
    }
    uint32_t ties;
    const unsigned long long each = max(1ull, s.bin_mass / s.bin_count);
    if (by_count) {
        ties = count - above_count;
    } else {
        ties = (uint32_t)min((unsigned long long)s.bin_count, (mass - above_mass + each - 1) / each);
    }
    const unsigned long long kept = ties >= s.bin_count ? s.bin_mass : each * ties;
    Threshold t = {prefix, ties, s.bin_count, above_mass, above_mass + kept};
    __syncthreads();
    return t;
}

// Inverse of the cumulative distribution of the kept tokens, in order of ids, at `uniform`.
__device__ uint32_t draw(Shared &s, const View &view, const Threshold &t, double uniform) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int share = ((view.vocab + WARPS - 1) / WARPS + 31) / 32 * 32;
    const int begin = warp * share, end = min(begin + share, view.vocab);
    uint32_t tie_base = 0;
    const bool some_ties = t.ties < t.tie_count;
    if (some_ties) {
        uint32_t ties = 0;
        for (int i = begin + lane; i < end; i += 32) ties += view.candidate(view.logits[i]) && view.key(view.logits[i]) == t.key;
        ties = __reduce_add_sync(0xffffffffu, ties);
        if (lane == 0) s.warp_count[warp] = ties;
        __syncthreads();
        for (int w = 0; w < warp; w++) tie_base += s.warp_count[w];
        __syncthreads();
    }
    // Weight of the token at `i` if it is kept; `seen` counts ties so far.
    auto kept = [&](int i, uint32_t &seen) -> unsigned long long {
        const float v = i < end ? view.logits[i] : -INFINITY;
        const bool candidate = view.candidate(v);
        const uint32_t key = view.key(v);
        const bool tie = candidate && key == t.key;
        bool keep = candidate && key < t.key;
        if (some_ties) {
            const uint32_t ballot = __ballot_sync(0xffffffffu, tie);
            keep |= tie && tie_base + seen + __popc(ballot & ((1u << lane) - 1)) < t.ties;
            seen += __popc(ballot);
        } else {
            keep |= tie;
        }
        return keep ? view.weight(v) : 0;
    };
    unsigned long long mass = 0;
    uint32_t seen = 0;
    for (int base = begin; base < begin + share; base += 32) mass += kept(base + lane, seen);
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
    const unsigned long long target = min((unsigned long long)(uniform * (double)total), total - 1);
    if (total > 0 && target >= before && target < before + s.warp_mass[warp]) {
        seen = 0;
        for (int base = begin; base < begin + share; base += 32) {
            const unsigned long long mine = kept(base + lane, seen);
            unsigned long long scan = mine;
#pragma unroll
            for (int o = 1; o < 32; o *= 2) {
                const unsigned long long up = __shfl_up_sync(0xffffffffu, scan, o);
                if (lane >= o) scan += up;
            }
            if (mine && target >= before + scan - mine && target < before + scan) s.token = base + lane;
            before += __shfl_sync(0xffffffffu, scan, 31);
            if (before > target) break;
        }
    }
    __syncthreads();
    return s.token;
}

// The `wanted` most likely tokens with their log-probabilities, most likely first.
__device__ void top_logprobs(Shared &s, const View &view, float lse, uint32_t wanted, float *values, uint32_t *ids) {
    wanted = min(wanted, (uint32_t)view.vocab);
    if (wanted == 0) return;
    const Threshold t = find_threshold(s, view, true, wanted, 0);
    if (threadIdx.x == 0) s.num_listed = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < view.vocab; i += THREADS) {
        const float v = view.logits[i];
        if (view.candidate(v) && view.key(v) < t.key) {
            const uint32_t at = atomicAdd(&s.num_listed, 1u);
            if (at < 64) s.tops[at] = {v, i};
        }
    }
    __syncthreads();
    // Ties at the threshold, lowest ids first.
    int last = -1;
    while (s.num_listed < wanted) {
        Best mine = {-INFINITY, 0x7fffffff};
        for (int i = threadIdx.x; i < view.vocab; i += THREADS) {
            const float v = view.logits[i];
            if (i > last && view.candidate(v) && view.key(v) == t.key) {
                mine = {v, i};
                break;
            }
        }
        int id = __reduce_min_sync(0xffffffffu, mine.id);
        if (threadIdx.x % 32 == 0) s.warp_count[threadIdx.x / 32] = id;
        __syncthreads();
        for (int w = 0; w < WARPS; w++) id = min(id, (int)s.warp_count[w]);
        __syncthreads();
        if (id == 0x7fffffff) break;
        if (threadIdx.x == 0) s.tops[s.num_listed++] = {view.logits[id], id};
        last = id;
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        const int n = s.num_listed;
        for (int i = 1; i < n; i++) {
            const Best item = s.tops[i];
            int j = i;
            while (j > 0 && (s.tops[j - 1].value < item.value || (s.tops[j - 1].value == item.value && s.tops[j - 1].id > item.id))) {
                s.tops[j] = s.tops[j - 1];
                j--;
            }
            s.tops[j] = item;
        }
        for (int i = 0; i < n; i++) values[i] = fminf(s.tops[i].value - lse, 0.f), ids[i] = s.tops[i].id;
    }
    __syncthreads();
}

