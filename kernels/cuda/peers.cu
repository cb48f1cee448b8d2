// What tensor-parallel ranks do together, over each other's memory: sums fused with the residual and its norm, the
// logits' columns, both inside graphs. No rank ever waits for the host, nor longer than a time limit for another rank.
//
// Two buffers take turns, in everything that peers read or write: a rank that has come to use n has had every peer's part
// of use n − 1, so each peer has ended its use n − 2 of the same buffer.
#include "common.cuh"

constexpr int MAX_RANKS = 8;
constexpr uint32_t LOOKS = 256;             // at a flag, between looks at the clock
constexpr uint64_t TIME_LIMIT = 5000000000; // nanoseconds

// As `Peers::group` lays it out.
struct Group {
    uint64_t mail[MAX_RANKS]; // packets: [2][ranks][rows][width / 4]
    uint64_t flags[MAX_RANKS]; // of barriers: [blocks][ranks] u32
    uint64_t deltas[2][MAX_RANKS]; // [rows, width]
    uint32_t *turns;  // this rank's: [rows] of `mail`, then [blocks] of barriers
    uint32_t *lost;   // this rank's: 1 + a rank that did not answer
    uint32_t *report; // the same for the host
    uint32_t rank, ranks, mail_rows;
};

__device__ __forceinline__ uint64_t now() {
    uint64_t t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

// Waits as long as `arrived` says no. After a time limit, once, everyone stops waiting: what follows is not used.
template <typename F> __device__ __forceinline__ void wait_for(const Group &g, uint32_t peer, F arrived) {
    uint64_t deadline = 0;
    for (uint32_t look = 1; !arrived(); look++) {
        if (look % LOOKS != 0) continue;
        if (*reinterpret_cast<volatile uint32_t *>(g.lost)) return;
        const uint64_t t = now();
        if (deadline == 0) deadline = t + TIME_LIMIT;
        if (t > deadline) {
            *reinterpret_cast<volatile uint32_t *>(g.lost) = 1 + peer;
            *reinterpret_cast<volatile uint32_t *>(g.report) = 1 + peer;
            __threadfence_system();
            return;
        }
    }
}

__device__ __forceinline__ void send(uint64_t to, uint32_t a, uint32_t b, uint32_t flag) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(a), "r"(flag), "r"(b), "r"(flag) : "memory");
}
// Words and flag of a packet are written together: halves of 8 bytes are never torn.
__device__ __forceinline__ bool receive(uint64_t from, uint32_t &a, uint32_t &b, uint32_t flag) {
    uint32_t f0, f1;
    asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(a), "=r"(f0), "=r"(b), "=r"(f1) : "l"(from) : "memory");
    return f0 == flag && f1 == flag;
}

// All blocks of this number on all ranks have come here, and what they wrote before is seen behind it.
__device__ __forceinline__ void meet(const Group &g, uint32_t turn) {
    __syncthreads();
    if (threadIdx.x < g.ranks) {
        const uint32_t peer = threadIdx.x;
        const uint64_t theirs = g.flags[peer] + 4ull * (blockIdx.x * g.ranks + g.rank);
        const uint64_t mine = g.flags[g.rank] + 4ull * (blockIdx.x * g.ranks + peer);
        asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(theirs), "r"(turn) : "memory");
        wait_for(g, peer, [&] {
            uint32_t flag;
            asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(flag) : "l"(mine) : "memory");
            return flag == turn;
        });
    }
    __syncthreads();
}

// A thread holds `VECTORS` 16-byte vectors of a row.
template <typename T, int VECTORS> struct Row {
    using N = Num<T>;
    float sums[VECTORS][8];
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
#pragma unroll
            for (int j = 0; j < 8; j++) sums[i][j] = 0.f;
    }
    __device__ __forceinline__ void add(int i, const uint32_t *words) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 a = N::unpack(words[j]);
            sums[i][2 * j] += a.x;
            sums[i][2 * j + 1] += a.y;
        }
    }
    // The sum rounded to T, as a rank alone would round its product.
    __device__ __forceinline__ Vec8 rounded(int i) const {
        Vec8 v;
#pragma unroll
        for (int j = 0; j < 4; j++) v.w[j] = N::pack(sums[i][2 * j], sums[i][2 * j + 1]);
        return v;
    }
};

// What a row needs beside the sums. A thread of one vector has room to load it while the sums are on their way.
template <typename T, int VECTORS> struct Beside {
    Vec8 residual[VECTORS], weight[VECTORS];
    __device__ __forceinline__ void load(const T *from, Vec8 *to, int vectors) {
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            const int at = threadIdx.x + i * blockDim.x;
            if (at < vectors) to[i].v = reinterpret_cast<const uint4 *>(from)[at];
        }
    }
};

// residual += the rounded sums; out = residual / rms(residual) · weight.
template <typename T, int VECTORS>
__device__ __forceinline__ void add_norm(Vec8 *values, const Beside<T, VECTORS> &beside, T *residual, T *out, int vectors, int width,
                                         float eps, float *scratch) {
    using N = Num<T>;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const int at = threadIdx.x + i * blockDim.x;
        if (at >= vectors) break;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 a = N::unpack(values[i].w[j]), b = N::unpack(beside.residual[i].w[j]);
            values[i].w[j] = N::pack(a.x + b.x, a.y + b.y);
            const float2 c = N::unpack(values[i].w[j]);
            sum += c.x * c.x + c.y * c.y;
        }
        reinterpret_cast<uint4 *>(residual)[at] = values[i].v;
    }
    const float scale = rsqrtf(block_sum(sum, scratch) / width + eps);
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const int at = threadIdx.x + i * blockDim.x;
        if (at >= vectors) break;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 a = N::unpack(values[i].w[j]), b = N::unpack(beside.weight[i].w[j]);
            values[i].w[j] = N::pack(a.x * scale * b.x, a.y * scale * b.y);
        }
        reinterpret_cast<uint4 *>(out)[at] = values[i].v;
    }
}

// Few rows: each rank sends its row into every peer's mail, in packets that carry their own flag, so the way takes one
// flight over the link and no barrier. A row has a turn of its own.
template <typename T, int VECTORS>
__device__ __forceinline__ void reduce_by_mail(const Group &g, const T *delta, const T *weight, T *residual, T *out, int rows,
                                               int width, float eps) {
    __shared__ float scratch[33];
    const int vectors = width / 8;
    const uint64_t row_bytes = 4ull * width; // of packets
    Beside<T, VECTORS> beside;
    if constexpr (VECTORS == 1) beside.load(weight, beside.weight, vectors);
    let_next_start();
    wait_for_previous();
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        const uint32_t turn = g.turns[row] + 1;
        const auto place = [&](uint32_t at, uint32_t from) {
            return g.mail[at] + (((turn & 1) * g.ranks + from) * (uint64_t)g.mail_rows + row) * row_bytes;
        };
        Vec8 own[VECTORS];
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            const int at = threadIdx.x + i * blockDim.x;
            if (at >= vectors) break;
            own[i].v = reinterpret_cast<const uint4 *>(delta + (long)row * width)[at];
            for (uint32_t step = 1; step < g.ranks; step++) {
                const uint32_t peer = (g.rank + step) % g.ranks;
                const uint64_t to = place(peer, g.rank) + 32ull * at;
                send(to, own[i].w[0], own[i].w[1], turn);
                send(to + 16, own[i].w[2], own[i].w[3], turn);
            }
        }
        if constexpr (VECTORS == 1) beside.load(residual + (long)row * width, beside.residual, vectors);
        Row<T, VECTORS> sum;
        sum.clear();
        for (uint32_t from = 0; from < g.ranks; from++) {
#pragma unroll
            for (int i = 0; i < VECTORS; i++) {
                const int at = threadIdx.x + i * blockDim.x;
                if (at >= vectors) break;
                if (from == g.rank) {
                    sum.add(i, own[i].w);
                    continue;
                }
                const uint64_t mail = place(g.rank, from) + 32ull * at;
                uint32_t words[4];
                wait_for(g, from, [&] {
                    const bool first = receive(mail, words[0], words[1], turn);
                    return receive(mail + 16, words[2], words[3], turn) && first;
                });
                sum.add(i, words);
            }
        }
        Vec8 values[VECTORS];
#pragma unroll
        for (int i = 0; i < VECTORS; i++) values[i] = sum.rounded(i);
        if constexpr (VECTORS != 1) {
            beside.load(residual + (long)row * width, beside.residual, vectors);
            beside.load(weight, beside.weight, vectors);
        }
        add_norm<T, VECTORS>(values, beside, residual + (long)row * width, out + (long)row * width, vectors, width, eps, scratch);
        // Behind the barriers of the norm: every thread has read the turn.
        if (threadIdx.x == 0) g.turns[row] = turn;
    }
}

// The sum over the ranks, in their order, of the vector at this place of the rows, rounded to T as a rank alone would round
// its product. All of it is on its way before the first is used.
template <typename T> __device__ __forceinline__ Vec8 sum_of_ranks(const Group &g, int slot, long at) {
    Vec8 parts[MAX_RANKS];
#pragma unroll
    for (int from = 0; from < MAX_RANKS; from++)
        if (from < g.ranks) parts[from].v = load_once16(reinterpret_cast<const uint4 *>(g.deltas[slot][from]) + at);
    Row<T, 1> sum;
    sum.clear();
#pragma unroll
    for (int from = 0; from < MAX_RANKS; from++)
        if (from < g.ranks) sum.add(0, parts[from].w);
    return sum.rounded(0);
}

// What both ways below end with: `value(at)` are the sums at this place, for the rows of this block.
template <typename T, int VECTORS, typename F>
__device__ __forceinline__ void add_norm_rows(Beside<T, VECTORS> &beside, const T *weight, T *residual, T *out, int rows, int width,
                                              float eps, F value) {
    __shared__ float scratch[33];
    const int vectors = width / 8;
    for (long row = blockIdx.x; row < rows; row += gridDim.x) {
        Vec8 values[VECTORS];
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            const int at = threadIdx.x + i * blockDim.x;
            if (at < vectors) values[i] = value(row * vectors + at);
        }
        if (VECTORS != 1 || row != blockIdx.x) beside.load(residual + row * width, beside.residual, vectors);
        if constexpr (VECTORS != 1) beside.load(weight, beside.weight, vectors);
        add_norm<T, VECTORS>(values, beside, residual + row * width, out + row * width, vectors, width, eps, scratch);
    }
}

// Some rows: once every rank's product is there, each reads all of them where they lie.
template <typename T, int VECTORS>
__device__ __forceinline__ void reduce_by_reading(const Group &g, int slot, const T *weight, T *residual, T *out, int rows, int width,
                                                  float eps) {
    Beside<T, VECTORS> beside;
    if constexpr (VECTORS == 1) beside.load(weight, beside.weight, width / 8);
    let_next_start();
    wait_for_previous();
    uint32_t *turns = g.turns + g.mail_rows;
    const uint32_t turn = turns[blockIdx.x] + 1;
    if constexpr (VECTORS == 1) beside.load(residual + (long)blockIdx.x * width, beside.residual, width / 8);
    meet(g, turn);
    add_norm_rows<T, VECTORS>(beside, weight, residual, out, rows, width, eps, [&](long at) { return sum_of_ranks<T>(g, slot, at); });
    __syncthreads();
    if (threadIdx.x == 0) turns[blockIdx.x] = turn;
}

// Many rows on three ranks or more: each rank sums a slice of the columns and writes it into everyone's rows, over what it has
// just read there: two thirds of the bytes of reading all, or fewer.
template <typename T, int VECTORS>
__device__ __forceinline__ void reduce_in_two_shots(const Group &g, int slot, const T *weight, T *residual, T *out, int rows,
                                                    int width, float eps) {
    Beside<T, VECTORS> beside;
    if constexpr (VECTORS == 1) beside.load(weight, beside.weight, width / 8);
    let_next_start();
    wait_for_previous();
    uint32_t *turns = g.turns + g.mail_rows;
    uint32_t turn = turns[blockIdx.x] + 1;
    if constexpr (VECTORS == 1) beside.load(residual + (long)blockIdx.x * width, beside.residual, width / 8);
    meet(g, turn);
    const int vectors = width / 8, slice = (vectors + g.ranks - 1) / g.ranks;
    const int first = g.rank * slice, held = max(0, min(slice, vectors - first));
    const int block_rows = (rows - (int)blockIdx.x + gridDim.x - 1) / gridDim.x;
    for (int i = threadIdx.x; i < block_rows * held; i += blockDim.x) {
        const long at = (blockIdx.x + (long)(i / held) * gridDim.x) * vectors + first + i % held;
        const Vec8 sum = sum_of_ranks<T>(g, slot, at);
        for (uint32_t step = 0; step < g.ranks; step++)
            reinterpret_cast<uint4 *>(g.deltas[slot][(g.rank + step) % g.ranks])[at] = sum.v;
    }
    meet(g, ++turn);
    add_norm_rows<T, VECTORS>(beside, weight, residual, out, rows, width, eps, [&](long at) {
        Vec8 sum;
        sum.v = load_once16(reinterpret_cast<const uint4 *>(g.deltas[slot][g.rank]) + at);
        return sum;
    });
    __syncthreads();
    if (threadIdx.x == 0) turns[blockIdx.x] = turn;
}

#define DEFINE_WIDE(SUFFIX, T, VECTORS)                                                                                            \
    extern "C" __global__ void __launch_bounds__(1024)                                                                             \
        reduce_by_mail_##SUFFIX##_##VECTORS(__grid_constant__ const Group g, const T *delta, const T *weight, T *residual, T *out, \
                                            int rows, int width, float eps) {                                                      \
        reduce_by_mail<T, VECTORS>(g, delta, weight, residual, out, rows, width, eps);                                             \
    }                                                                                                                              \
    extern "C" __global__ void __launch_bounds__(1024)                                                                             \
        reduce_by_reading_##SUFFIX##_##VECTORS(__grid_constant__ const Group g, int slot, const T *weight, T *residual, T *out,    \
                                               int rows, int width, float eps) {                                                   \
        reduce_by_reading<T, VECTORS>(g, slot, weight, residual, out, rows, width, eps);                                           \
    }                                                                                                                              \
    extern "C" __global__ void __launch_bounds__(1024)                                                                             \
        reduce_in_two_shots_##SUFFIX##_##VECTORS(__grid_constant__ const Group g, int slot, const T *weight, T *residual, T *out,  \
                                                 int rows, int width, float eps) {                                                 \
        reduce_in_two_shots<T, VECTORS>(g, slot, weight, residual, out, rows, width, eps);                                         \
    }
#define DEFINE(SUFFIX, T) DEFINE_WIDE(SUFFIX, T, 1) DEFINE_WIDE(SUFFIX, T, 4)
FOR_BOTH(DEFINE)
#undef DEFINE
#undef DEFINE_WIDE

// Every rank's columns of the logits beside each other, on every rank: [rows, held] f32 → [rows, vocab]. Columns are
// multiples of four, and a rank's `held` lie from rank · held on.
struct Logits {
    uint64_t to[MAX_RANKS];
};
extern "C" __global__ void gather_columns(__grid_constant__ const Group g, __grid_constant__ const Logits logits, const float4 *from,
                                          int rows, int held, int vocab) {
    let_next_start();
    wait_for_previous();
    uint32_t *turns = g.turns + g.mail_rows;
    const uint32_t turn = turns[blockIdx.x] + 1;
    const int first = g.rank * held / 4, width = max(0, min(held, vocab - (int)g.rank * held)) / 4;
    const long count = (long)rows * width;
    for (long at = (long)blockIdx.x * blockDim.x + threadIdx.x; at < count; at += (long)gridDim.x * blockDim.x) {
        const long row = at / width, column = at % width;
        const float4 value = from[row * (held / 4) + column];
        for (uint32_t step = 0; step < g.ranks; step++) {
            const uint32_t peer = (g.rank + step) % g.ranks;
            reinterpret_cast<float4 *>(logits.to[peer])[row * (vocab / 4) + first + column] = value;
        }
    }
    meet(g, turn);
    if (threadIdx.x == 0) turns[blockIdx.x] = turn;
}
