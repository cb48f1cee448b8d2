// Draws one token per row of logits. One block per row; order: penalties and bias → mask → temperature → min-p → top-k →
// renormalise → top-p, then the inverse of the cumulative distribution in order of ids at Philox(seed, choice, position).
//
// Weights are summed as 24.40 fixed-point integers, so a sum does not depend on its order: the same request draws the same
// token whatever runs beside it. Top-k and top-p find their threshold by three rounds of histograms over a 32-bit key, the
// distance to the largest logit; ties at the threshold go to the lowest ids.
#include "common.cuh"

constexpr int THREADS = 1024, WARPS = THREADS / 32, BINS = 2048;
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
    uint32_t counts[BINS];
    unsigned long long masses[BINS];
    unsigned long long warp_mass[WARPS];
    uint32_t warp_count[WARPS];
    Best best[WARPS];
    float low[WARPS];
    int flag;
    uint32_t bin, bin_count;
    unsigned long long bin_mass, above_mass;
    uint32_t above_count;
    uint32_t token;
    uint32_t num_listed;
    Best list[64];
};

// Largest logit (lowest id among equals), smallest finite one, and whether any is NaN or infinite (−∞ allowed if masked).
__device__ __forceinline__ void extremes(Shared &s, const float *logits, int vocab, Best &best, float &low, bool &broken) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Best mine = {-INFINITY, 0x7fffffff};
    float least = INFINITY;
    bool bad = false;
    for (int i = threadIdx.x; i < vocab; i += THREADS) {
        const float v = logits[i];
        bad |= isnan(v) || isinf(v);
        if (v > -INFINITY) least = fminf(least, v);
        mine = better(mine, {v, i});
    }
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
        for (int i = threadIdx.x; i < view.vocab; i += THREADS) {
            const float v = view.logits[i];
            if (!view.candidate(v)) continue;
            const uint32_t key = view.key(v);
            if (level > 0 && key >> high != prefix) continue;
            const uint32_t bin = (key >> low) & (bins - 1);
            atomicAdd(&s.counts[bin], 1u);
            atomicAdd(&s.masses[bin], view.weight(v));
        }
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

// ln Σ e^logit.
__device__ float log_sum_exp(Shared &s, const float *logits, int vocab, float max) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float sum = 0.f;
    for (int i = threadIdx.x; i < vocab; i += THREADS) sum += __expf(logits[i] - max);
    sum = warp_sum(sum);
    if (lane == 0) s.low[warp] = sum;
    __syncthreads();
    double total = 0;
    for (int w = 0; w < WARPS; w++) total += s.low[w];
    __syncthreads();
    return max + (float)log(total);
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
            if (at < 64) s.list[at] = {v, i};
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
        if (threadIdx.x == 0) s.list[s.num_listed++] = {view.logits[id], id};
        last = id;
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        const int n = s.num_listed;
        for (int i = 1; i < n; i++) {
            const Best item = s.list[i];
            int j = i;
            while (j > 0 && (s.list[j - 1].value < item.value || (s.list[j - 1].value == item.value && s.list[j - 1].id > item.id))) {
                s.list[j] = s.list[j - 1];
                j--;
            }
            s.list[j] = item;
        }
        for (int i = 0; i < n; i++) values[i] = fminf(s.list[i].value - lse, 0.f), ids[i] = s.list[i].id;
    }
    __syncthreads();
}

__device__ __forceinline__ void apply_penalties(const SampleRow &row, float *logits, const uint16_t *counts, int vocab) {
    for (int i = threadIdx.x; i < vocab; i += THREADS) {
        const uint16_t c = counts[i];
        if (!c) continue;
        float v = logits[i];
        v = v > 0.f ? v / row.repetition : v * row.repetition;
        const int n = c & 0x7fff;
        if (n) v -= row.frequency * n + row.presence;
        logits[i] = v;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) sample(const __grid_constant__ Sampling p) {
    __shared__ Shared s;
    let_next_start();
    wait_for_previous();
    const SampleRow row = p.rows[blockIdx.x];
    const int vocab = p.vocab;
    float *logits = p.logits + (long)row.logit_row * vocab;
    uint16_t *counts = row.has_counts ? p.counts + (long)row.slot * vocab : nullptr;
    Best best;
    float low;
    bool broken;
    extremes(s, logits, vocab, best, low, broken);
    if (!broken && (counts || row.num_bias)) {
        if (counts) apply_penalties(row, logits, counts, vocab);
        __syncthreads();
        for (int i = threadIdx.x; i < row.num_bias; i += THREADS) {
            const uint32_t token = p.extra[row.bias + 2 * i];
            if (token < vocab) atomicAdd(&logits[token], __uint_as_float(p.extra[row.bias + 2 * i + 1]));
        }
        __syncthreads();
        extremes(s, logits, vocab, best, low, broken);
    }
    uint32_t token = NO_TOKEN_NON_FINITE;
    if (!broken) {
        float lse = 0.f, *values = p.logprobs + (long)blockIdx.x * (p.max_logprobs + 1);
        const float range = fmaxf(best.value - low, 1e-30f);
        if (row.num_logprobs) {
            lse = log_sum_exp(s, logits, vocab, best.value);
            const View all = {logits, vocab, best.value, 1.f, -INFINITY, 4294967040.f / range};
            top_logprobs(s, all, lse, row.num_logprobs - 1, values + 1, p.logprob_ids + (long)blockIdx.x * p.max_logprobs);
        }
        if (row.mask >= 0 || row.num_forbidden) {
            if (row.mask >= 0) {
                for (int i = threadIdx.x; i < vocab; i += THREADS)
                    if (!(p.extra[row.mask + i / 32] >> (i % 32) & 1)) logits[i] = -INFINITY;
            }
            for (int i = threadIdx.x; i < row.num_forbidden; i += THREADS) {
                const uint32_t forbidden = p.extra[row.forbidden + i];
                if (forbidden < vocab) logits[forbidden] = -INFINITY;
            }
            __syncthreads();
            bool masked;
            extremes(s, logits, vocab, best, low, masked);
        }
        if (best.value == -INFINITY) {
            token = NO_TOKEN_FORBIDDEN;
        } else if (row.temperature < 1e-5f) {
            token = best.id;
        } else {
            const float cutoff = row.min_p > 0.f ? best.value + row.temperature * __logf(row.min_p) : -INFINITY;
            const float lowest = fmaxf(low, cutoff);
            const View view = {logits, vocab, best.value, 1.f / row.temperature, cutoff, 4294967040.f / fmaxf(best.value - lowest, 1e-30f)};
            Threshold t = {0xffffffffu, 0xffffffffu, 0, 0, 0};
            unsigned long long total = 0;
            const bool cut = row.top_k > 0 && row.top_k < vocab;
            if (cut) {
                t = find_threshold(s, view, true, row.top_k, 0);
                total = t.mass;
            }
            if (row.top_p < 1.f) {
                if (!cut) total = find_threshold(s, view, true, 0xffffffffu, 0).mass;
                const unsigned long long wanted = (unsigned long long)((double)total * row.top_p);
                const Threshold p_cut = find_threshold(s, view, false, 0, max(1ull, wanted));
                if (p_cut.key < t.key || (p_cut.key == t.key && p_cut.ties < t.ties)) t = p_cut;
            }
            uint32_t c[4] = {row.position, 0, row.choice, 0};
            philox(c, (uint32_t)row.seed, (uint32_t)(row.seed >> 32));
            const unsigned long long bits = ((unsigned long long)c[0] << 21) ^ (c[1] >> 11);
            token = draw(s, view, t, (double)bits * (1.0 / 9007199254740992.0));
        }
        if (row.num_logprobs && threadIdx.x == 0 && token < vocab) values[0] = fminf(logits[token] - lse, 0.f);
    }
    if (threadIdx.x == 0) {
        p.tokens[blockIdx.x] = token;
        if (token < vocab) {
            p.last_tokens[row.slot] = token;
            if (counts && (counts[token] & 0x7fff) < 0x7fff) counts[token]++;
        }
    }
}

// Counts of a slot from nothing: its prompt's tokens marked, its output's counted. One block.
extern "C" __global__ void init_counts(uint16_t *counts, int slot, int vocab, const uint32_t *tokens, int num_prompt, int num_output) {
    let_next_start();
    wait_for_previous();
    uint16_t *mine = counts + (long)slot * vocab;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) mine[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < num_prompt; i += blockDim.x)
        if (tokens[i] < vocab) mine[tokens[i]] = 0x8000;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int i = num_prompt; i < num_prompt + num_output; i++)
            if (tokens[i] < vocab && (mine[tokens[i]] & 0x7fff) < 0x7fff) mine[tokens[i]]++;
}
