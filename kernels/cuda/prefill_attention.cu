// Causal attention of many query rows (prefill, chunked prefill) over paged K and V, for every architecture from sm_80.
//
// A block computes 128 query rows of one head, 32 rows a warp, over tiles of 64 tokens that two stages of asynchronous
// copies bring in. V pages are stored as [dim][token], so both products read their operands without a transposition.
// Flash attention 2 (arXiv 2307.08691), with an online softmax in base 2. Tiles of eight-bit floats come as they are, and become
// T, which holds them exactly, once for all rows.
//
// A row's result depends on nothing but the row and its tokens, bit for bit: tiles begin at multiples of 64 tokens wherever the
// query does, tokens that a row does not see add exact zeros, and what other rows of the warp find never rescales it.
//
// Blocks start with the longest items of all heads, so that the last to end are short.
#include "prefill.cuh"

constexpr int TILE_TOKENS = 64, WARPS = 4, PAGES = TILE_TOKENS / BLOCK;

// Bytes of shared memory: rows of D = 96 are stored 128 wide, so that the swizzle stays inside a row.
template <int D> constexpr int STRIDE = D == 96 ? 128 : D;

template <typename T, typename KV, int D, int RUN> __device__ __forceinline__ void prefill_attention(const PrefillAttention &p) {
    using N = Num<T>;
    constexpr int ROW = STRIDE<D> * 2, CHUNKS = D / 8; // bytes and 16-byte chunks of a row
    constexpr int K_BYTES = TILE_TOKENS * ROW, V_BYTES = TILE_TOKENS * D * 2, STAGE = K_BYTES + V_BYTES;
    constexpr bool FP8 = sizeof(KV) == 1;
    // Eight-bit floats: one stage of T, and behind it the next tile's pages as they are.
    constexpr int RAW_PAGE = BLOCK * D, RAW_CHUNKS = RAW_PAGE / 16;
    extern __shared__ __align__(128) char memory[];
    const uint32_t q_at = (uint32_t)__cvta_generic_to_shared(memory), kv_at = q_at + TILE_ROWS * ROW;
    let_next_start();
    wait_for_previous();
    const int2 work = p.items[blockIdx.x / p.num_heads];
    const int seq = work.x, head = blockIdx.x % p.num_heads, kv_head = head / (p.num_heads / p.num_kv_heads);
    const int query_len = p.query_lens[seq], context = p.context_lens[seq], first_row = work.y * TILE_ROWS;
    const int num_rows = min(TILE_ROWS, query_len - first_row);
    if (num_rows <= 0) return; // a captured step's padding
    const int position = context - query_len + first_row; // of the tile's first row
    const int last_token = min(context, position + num_rows);
    const int first_token = p.window > 0 ? max(0, position + 1 - p.window) : 0;
    const int first_tile = first_token / TILE_TOKENS, tiles = (last_token + TILE_TOKENS - 1) / TILE_TOKENS;
    const int *table = p.blocks + p.table_starts[seq];
    const long page_values = 2l * p.num_kv_heads * BLOCK * D;
    const KV *cache = static_cast<const KV *>(p.cache);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;

    const T *q = static_cast<const T *>(p.q) + (long)(p.rows[seq] + first_row) * p.q_stride + head * D;
    for (int i = threadIdx.x; i < TILE_ROWS * CHUNKS; i += WARPS * 32) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        copy16(q_at + row * ROW + (chunk ^ (row & 7)) * 16, q + (long)min(row, num_rows - 1) * p.q_stride + chunk * 8, row < num_rows);
    }
    // The table's entries of the next tile to be loaded.
    int entries[PAGES];
    auto look_up = [&](int tile) {
#pragma unroll
        for (int page = 0; page < PAGES; page++) {
            const int logical = tile * PAGES + page;
            entries[page] = logical * BLOCK < context ? table[logical] : 0;
        }
    };
    look_up(first_tile);
    auto load_tile = [&](int tile, int stage) {
        if (tile < tiles) {
            const uint32_t k_at = kv_at + stage * STAGE, v_at = k_at + K_BYTES;
            constexpr int PER_PAGE = BLOCK * CHUNKS;
#pragma unroll
            for (int page = 0; page < PAGES; page++) {
                const int logical = tile * PAGES + page;
                const bool valid = logical * BLOCK < context;
                const KV *keys = cache + entries[page] * page_values + (long)kv_head * BLOCK * D;
                const KV *values = keys + (long)p.num_kv_heads * BLOCK * D;
                if constexpr (FP8) {
                    const uint32_t raw_at = kv_at + STAGE + page * 2 * RAW_PAGE;
                    for (int i = threadIdx.x; i < 2 * RAW_CHUNKS; i += WARPS * 32)
                        copy16(raw_at + i * 16, i < RAW_CHUNKS ? keys + i * 16 : values + (i - RAW_CHUNKS) * 16, valid);
                } else {
                    for (int i = threadIdx.x; i < PER_PAGE; i += WARPS * 32) {
                        const int token = page * BLOCK + i / CHUNKS, chunk = i % CHUNKS;
                        copy16(k_at + token * ROW + (chunk ^ (token & 7)) * 16, keys + i * 8, valid);
                        const int dim = i / 2;
                        copy16(v_at + page * BLOCK * D * 2 + dim * 32 + ((i & 1) ^ ((dim >> 2) & 1)) * 16, values + i * 8, valid);
                    }
                }
            }
            look_up(tile + 1);
        }
        asm volatile("cp.async.commit_group;");
    };
    load_tile(first_tile, 0);
    // The tile that has been loaded, as T.
    auto widen_tile = [&] {
        const char *raw = memory + TILE_ROWS * ROW + STAGE;
        char *k = memory + TILE_ROWS * ROW, *v = k + K_BYTES;
        for (int i = threadIdx.x; i < PAGES * 2 * RAW_CHUNKS; i += WARPS * 32) {
            Vec8 low, high;
            widen<T>(*reinterpret_cast<const uint4 *>(raw + i * 16), &low, &high);
            const int page = i / (2 * RAW_CHUNKS), chunk = i % RAW_CHUNKS;
            if (i / RAW_CHUNKS % 2 == 0) {
                const int token = page * BLOCK + chunk / (D / 16), at = chunk % (D / 16) * 2;
                *reinterpret_cast<uint4 *>(k + token * ROW + (at ^ (token & 7)) * 16) = low.v;
                *reinterpret_cast<uint4 *>(k + token * ROW + ((at + 1) ^ (token & 7)) * 16) = high.v;
            } else {
                char *dim = v + (page * D + chunk) * 32;
                *reinterpret_cast<uint4 *>(dim + (chunk >> 2 & 1) * 16) = low.v;
                *reinterpret_cast<uint4 *>(dim + (~chunk >> 2 & 1) * 16) = high.v;
            }
        }
    };

    constexpr int NTILES = D / 8;
    float out[2][NTILES][4], maximum[2][2], sum[2][2];
#pragma unroll
    for (int m = 0; m < 2; m++) {
        maximum[m][0] = maximum[m][1] = -INFINITY;
        sum[m][0] = sum[m][1] = 0.f;
#pragma unroll
        for (int n = 0; n < NTILES; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) out[m][n][j] = 0.f;
    }
    const int warp_row = warp * 32;
    // Addresses of ldmatrix: lane → row and half of a 16×16 tile, once for A (rows first) and once for B (columns first).
    const int a_row = lane & 15, a_half = lane >> 4;
    const int b_row = (lane & 7) + ((lane >> 4) << 3), b_half = (lane >> 3) & 1;

    for (int tile = first_tile; tile < tiles; tile++) {
        const int stage = FP8 ? 0 : (tile - first_tile) & 1;
        asm volatile("cp.async.wait_group 0;");
        __syncthreads(); // this tile is there, and nobody reads the one before it
        if constexpr (FP8) {
            widen_tile();
            __syncthreads();
        }
        load_tile(tile + 1, FP8 ? 0 : stage ^ 1);
        const uint32_t k_at = kv_at + stage * STAGE, v_at = k_at + K_BYTES;
        if ((tile + 1) * TILE_TOKENS > context) {
            // What lies behind the last token may be anything, NaN too.
            for (int i = threadIdx.x; i < TILE_TOKENS * D; i += WARPS * 32) {
                const int page = i / (BLOCK * D), dim = i / BLOCK % D, token = i % BLOCK;
                if (tile * TILE_TOKENS + page * BLOCK + token >= context) {
                    const int chunk = (token >> 3) ^ ((dim >> 2) & 1);
                    char *at = memory + (v_at - q_at) + page * BLOCK * D * 2 + dim * 32 + chunk * 16 + (token & 7) * 2;
                    *reinterpret_cast<uint16_t *>(at) = 0;
                }
            }
            __syncthreads();
        }
#pragma unroll
        for (int run = 0; run < TILE_TOKENS / RUN; run++) {
            const int token0 = tile * TILE_TOKENS + run * RUN;
            // This warp has no row, or its rows end before these tokens begin: nothing to see.
            if (warp_row >= num_rows || token0 > position + warp_row + 31) continue;
            float s[2][RUN / 8][4];
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int n = 0; n < RUN / 8; n++)
#pragma unroll
                    for (int j = 0; j < 4; j++) s[m][n][j] = 0.f;
#pragma unroll
            for (int k = 0; k < D / 16; k++) {
                uint32_t a[2][4], b[RUN / 16][4];
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    const int row = warp_row + m * 16 + a_row;
                    load_matrices(a[m], q_at + row * ROW + ((k * 2 + a_half) ^ (row & 7)) * 16);
                }
#pragma unroll
                for (int n = 0; n < RUN / 16; n++) {
                    const int token = run * RUN + n * 16 + b_row;
                    load_matrices(b[n], k_at + token * ROW + ((k * 2 + b_half) ^ (token & 7)) * 16);
                }
#pragma unroll
                for (int m = 0; m < 2; m++)
#pragma unroll
                    for (int n = 0; n < RUN / 8; n++) N::mma(s[m][n], a[m], b[n / 2][(n % 2) * 2], b[n / 2][(n % 2) * 2 + 1]);
            }
            const bool edge = token0 + RUN - 1 > position + warp_row || token0 + RUN > context ||
                              (p.window > 0 && token0 <= position + warp_row + 31 - p.window);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                if (edge) {
#pragma unroll
                    for (int n = 0; n < RUN / 8; n++)
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            const int row = position + warp_row + m * 16 + group + (j / 2) * 8;
                            const int token = token0 + n * 8 + quad * 2 + (j & 1);
                            if (token > row || token >= context || (p.window > 0 && token <= row - p.window)) s[m][n][j] = -INFINITY;
                        }
                }
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float now = maximum[m][r];
#pragma unroll
                    for (int n = 0; n < RUN / 8; n++) now = fmaxf(now, fmaxf(s[m][n][r * 2], s[m][n][r * 2 + 1]));
                    now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 1));
                    now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 2));
                    const float shift = now == -INFINITY ? 0.f : now * p.scale;
                    const bool grows = now > maximum[m][r];
                    if (__any_sync(0xffffffffu, grows)) {
                        // Of -∞: 0. A row that does not grow keeps its sums as they are: the fused product is not exact.
                        const float factor = grows ? exp2_fast(fmaf(maximum[m][r], p.scale, -shift)) : 1.f;
                        maximum[m][r] = now;
                        sum[m][r] *= factor;
#pragma unroll
                        for (int n = 0; n < NTILES; n++) {
                            out[m][n][r * 2] *= factor;
                            out[m][n][r * 2 + 1] *= factor;
                        }
                    }
#pragma unroll
                    for (int n = 0; n < RUN / 8; n++) {
                        s[m][n][r * 2] = exp2_fast(fmaf(s[m][n][r * 2], p.scale, -shift));
                        s[m][n][r * 2 + 1] = exp2_fast(fmaf(s[m][n][r * 2 + 1], p.scale, -shift));
                        sum[m][r] += s[m][n][r * 2] + s[m][n][r * 2 + 1];
                    }
                }
            }
#pragma unroll
            for (int page = 0; page < RUN / BLOCK; page++) {
                uint32_t a[2][4];
#pragma unroll
                for (int m = 0; m < 2; m++)
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        a[m][j * 2] = N::pack(s[m][page * 2 + j][0], s[m][page * 2 + j][1]);
                        a[m][j * 2 + 1] = N::pack(s[m][page * 2 + j][2], s[m][page * 2 + j][3]);
                    }
                const uint32_t page_at = v_at + (run * (RUN / BLOCK) + page) * BLOCK * D * 2;
#pragma unroll
                for (int n = 0; n < D / 16; n++) {
                    const int dim = n * 16 + b_row;
                    uint32_t b[4];
                    load_matrices(b, page_at + dim * 32 + (b_half ^ ((dim >> 2) & 1)) * 16);
#pragma unroll
                    for (int m = 0; m < 2; m++) {
                        N::mma(out[m][n * 2], a[m], b[0], b[1]);
                        N::mma(out[m][n * 2 + 1], a[m], b[2], b[3]);
                    }
                }
            }
        }
    }
    T *result = static_cast<T *>(p.out) + (long)(p.rows[seq] + first_row) * p.num_heads * D + head * D;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float total = sum[m][r];
            total += __shfl_xor_sync(0xffffffffu, total, 1);
            total += __shfl_xor_sync(0xffffffffu, total, 2);
            const int row = warp_row + m * 16 + r * 8 + group;
            if (row >= num_rows) continue;
            const float inverse = (FP8 ? p.value_scale : 1.f) / total;
#pragma unroll
            for (int n = 0; n < NTILES; n++) {
                const uint32_t packed = N::pack(out[m][n][r * 2] * inverse, out[m][n][r * 2 + 1] * inverse);
                *reinterpret_cast<uint32_t *>(result + (long)row * p.num_heads * D + n * 8 + quad * 2) = packed;
            }
        }
}

#define DEFINE_DIM(SUFFIX, T, KV, D)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) prefill_attention_##D##_##SUFFIX(const __grid_constant__ PrefillAttention p) {   \
        prefill_attention<T, KV, D, D <= 128 ? 64 : 32>(p);                                                                            \
    }
#define DEFINE_DIMS(SUFFIX, T, KV) \
    DEFINE_DIM(SUFFIX, T, KV, 64) DEFINE_DIM(SUFFIX, T, KV, 96) DEFINE_DIM(SUFFIX, T, KV, 128) DEFINE_DIM(SUFFIX, T, KV, 256)
// Pages of T, and of eight-bit floats.
#define DEFINE(SUFFIX, T) DEFINE_DIMS(SUFFIX, T, T) DEFINE_DIMS(SUFFIX##_fp8, T, uint8_t)
FOR_BOTH(DEFINE)
