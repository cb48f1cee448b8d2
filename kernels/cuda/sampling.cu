// Draws one token per row of logits. One block per row; order: penalties and bias → mask → temperature → min-p → top-k →
// renormalise → top-p, then the inverse of the cumulative distribution in order of ids at Philox(seed, choice, position).
//
// Weights are summed as 24.40 fixed-point integers, so a sum does not depend on its order: the same request draws the same
// token whatever runs beside it. Among equal logits the lowest ids are kept.
#include "sampling.cuh"
#include "sampling_list.cuh"
#include "sampling_threshold.cuh"

// Tokens that a nucleus is first looked for among.
constexpr int NUCLEUS = 512;

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

// Draws for a row, over its temperature.
__device__ __forceinline__ uint32_t draw_row(Shared &s, const View &view, const SampleRow &row, float own) {
    const double uniform = uniform_of(row);
    const uint32_t top_k = row.top_k < view.vocab ? row.top_k : 0;
    if (top_k == 0 && row.top_p >= 1.f) return draw_all(s, view, uniform);
    unsigned long long all = 0;
    if (top_k == 0) {
        for_each(view.logits, view.vocab, [&](int, float v) { all += view.candidate(v) ? view.weight(v) : 0; });
        all = block_sum(s, all);
    }
    uint32_t token;
    const int wanted = top_k ? (int)top_k : NUCLEUS;
    const int listed = wanted <= THREADS ? list_best(s, view, own, wanted) : LIST + 1;
    if (listed <= LIST && draw_listed(s, view, listed, top_k, row.top_p, all, uniform, token)) return token;
    __syncthreads();
    Threshold t = {0xffffffffu, 0xffffffffu, 0, 0, 0};
    if (top_k) t = find_threshold(s, view, true, top_k, 0), all = t.mass;
    if (row.top_p < 1.f) {
        const Threshold p_cut = find_threshold(s, view, false, 0, max(1ull, (unsigned long long)((double)all * row.top_p)));
        if (p_cut.key < t.key || (p_cut.key == t.key && p_cut.ties < t.ties)) t = p_cut;
    }
    return draw(s, view, t, uniform);
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
    float low, own;
    bool broken;
    extremes(s, logits, vocab, best, low, broken, own);
    if (!broken && (counts || row.num_bias)) {
        if (counts) apply_penalties(row, logits, counts, vocab);
        __syncthreads();
        for (int i = threadIdx.x; i < row.num_bias; i += THREADS) {
            const uint32_t token = p.extra[row.bias + 2 * i];
            if (token < vocab) atomicAdd(&logits[token], __uint_as_float(p.extra[row.bias + 2 * i + 1]));
        }
        __syncthreads();
        extremes(s, logits, vocab, best, low, broken, own);
    }
    uint32_t token = NO_TOKEN_NON_FINITE;
    if (!broken) {
        float lse = 0.f, *values = p.logprobs + (long)blockIdx.x * (p.max_logprobs + 1);
        const float range = fmaxf(best.value - low, 1e-30f);
        if (row.num_logprobs) {
            lse = log_sum_exp(s, logits, vocab, best.value);
            const View all = {logits, vocab, best.value, 1.f, -INFINITY, 4294967040.f / range};
            const int wanted = min((int)row.num_logprobs - 1, vocab);
            uint32_t *ids = p.logprob_ids + (long)blockIdx.x * p.max_logprobs;
            if (wanted > 0 && list_best(s, all, own, wanted) > LIST) {
                top_logprobs(s, all, lse, wanted, values + 1, ids);
            } else if (threadIdx.x < wanted) {
                const unsigned long long key = s.list[threadIdx.x];
                values[1 + threadIdx.x] = fminf(key_value(key) - lse, 0.f), ids[threadIdx.x] = key_id(key);
            }
            __syncthreads();
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
            extremes(s, logits, vocab, best, low, masked, own);
        }
        if (best.value == -INFINITY) {
            token = NO_TOKEN_FORBIDDEN;
        } else if (row.temperature < 1e-5f) {
            token = best.id;
        } else {
            const float cutoff = row.min_p > 0.f ? best.value + row.temperature * __logf(row.min_p) : -INFINITY;
            const float lowest = fmaxf(low, cutoff);
            const View view = {logits, vocab, best.value, 1.f / row.temperature, cutoff, 4294967040.f / fmaxf(best.value - lowest, 1e-30f)};
            token = draw_row(s, view, row, own);
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
