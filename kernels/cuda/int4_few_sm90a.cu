// Products of one or two rows with four-bit weights in groups of 128, for Hopper: y[m][n] = Σk x[m][k] · w[n][k], fp16.
//
// Bound by reading w once, and before that by instructions: the fewer a kilobyte of w takes, the better. So weights stay integers:
// a word is two registers of bytes after two maskings, and bytes are multiplied exactly. A token's x is, for each group, a scale
// and integers of 16 bits, finer than halves are near the group's largest value; high and low bytes are two columns of the
// product. Zeros are subtracted from the sums. The weights are the A operand, the tokens' bytes the B operand.
//
// A block stays on its multiprocessor and has two tiles of 16 rows of w at a time; eight warps share a tile's columns. The copy
// engine brings words and cells by boxes, and each warp has boxes of its own in flight and waits for these alone, the first ones
// while the kernel before still runs. x, normed on the way if it is to be, is laid out once in shared memory, behind the boxes
// and their barriers, in the order in which lanes take it.
#include "hopper.cuh"
#include "int4.cuh"
#include "skinny.cuh"

constexpr int ALL_WARPS = 2 * WARPS, THREADS = ALL_WARPS * 32;
constexpr int TOKENS = 2;
constexpr int ROWS = 16, STEP = 128; // of w in a tile; columns that a lane's four multiply at once, which are those of a group
constexpr int BOX = 2;               // steps of a box: 128 bytes of a row, in the copy engine's order
constexpr int BOX_BYTES = BOX * ROWS * STEP / 2, CELLS_BYTES = BOX * ROWS * 4;

// DEPTH boxes of each warp are in flight. Behind all boxes lie their cells, [step][row].
template <int DEPTH> struct Memory {
    static constexpr int PLACES = ALL_WARPS * DEPTH, CELLS = PLACES * BOX_BYTES, BARRIERS = CELLS + PLACES * CELLS_BYTES;
    static constexpr int X = BARRIERS + PLACES * 8;
};

// d += a · b exactly; a is 16×32 unsigned bytes by rows, b 32×8 signed ones by columns.
__device__ __forceinline__ void multiply_bytes(int *d, const uint32_t *a, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What a token's group is scaled with, and the sum of its integers.
struct Group {
    float scale;
    int sum;
};

// How x lies: two columns of bytes for each token, [step][quad][word], and behind all of them the tokens' groups.
struct Layout {
    int steps, pitch;
    __device__ __forceinline__ Layout(const Skinny &p) {
        steps = p.k / STEP;
        pitch = steps * STEP + 16; // neighbouring columns begin in other banks
    }
    __device__ __forceinline__ Group *groups(const Skinny &p, char *x) const { return reinterpret_cast<Group *>(x + 2 * p.m * pitch); }
};

// Lays out the eight columns of a token that a word of w has; 16 neighbouring lanes have those of a group.
__device__ __forceinline__ void lay_out(const Vec8 &x, char *column, int next_column, bool first, Group *group) {
    constexpr float LARGEST = 127 * 256 + 127;
    float v[8], most = 0.f;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float2 two = Num<__half>::unpack(x.w[j]);
        v[2 * j] = two.x, v[2 * j + 1] = two.y;
    }
#pragma unroll
    for (int j = 0; j < 8; j++) most = fmaxf(most, fabsf(v[j]) < INFINITY ? fabsf(v[j]) : INFINITY); // also what is no number
#pragma unroll
    for (int o = 8; o > 0; o >>= 1) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, o));
    const float by = most > 0.f ? LARGEST / most : 0.f;
    int sum = 0;
    uint32_t high[2] = {}, low[2] = {};
#pragma unroll
    for (int j = 0; j < 8; j++) {
        // A word's low nibbles are those of pairs 0, 2, 0, 2, its high ones of pairs 1, 3, 1, 3: two first columns, two second ones.
        const int nibbles = j / 2 % 2, byte = (j / 4 + j % 2 * 2) * 8;
        const int q = __float2int_rn(v[j] * by);
        sum += q;
        high[nibbles] |= (uint32_t)((q + 128) >> 8 & 255) << byte;
        low[nibbles] |= (uint32_t)(q & 255) << byte;
    }
#pragma unroll
    for (int o = 8; o > 0; o >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    *reinterpret_cast<uint2 *>(column) = make_uint2(high[0], high[1]);
    *reinterpret_cast<uint2 *>(column + next_column) = make_uint2(low[0], low[1]);
    if (first) *group = Group{most < INFINITY ? most / LARGEST : NAN, sum};
}

// Each token's scale where x is normed.
__device__ __forceinline__ void token_scales(const Skinny &p, float *scales) {
    __shared__ float squares[TOKENS][ALL_WARPS];
    for (int m = 0; m < p.m; m++) {
        const uint4 *from = reinterpret_cast<const uint4 *>(static_cast<const __half *>(p.x) + (long)m * p.k);
        float square = 0.f;
        for (int i = threadIdx.x; i < p.k / 8; i += THREADS) {
            Vec8 x;
            x.v = from[i];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float2 v = Num<__half>::unpack(x.w[j]);
                square += v.x * v.x + v.y * v.y;
            }
        }
        square = warp_sum(square);
        if (threadIdx.x % 32 == 0) squares[m][threadIdx.x / 32] = square;
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < TOKENS; m++) {
        float square = 0.f;
#pragma unroll
        for (int warp = 0; warp < ALL_WARPS; warp++) square += squares[min(m, p.m - 1)][warp];
        scales[m] = rsqrtf(square / p.k + p.eps);
    }
}

// Of rows of 32 columns the pairs that belong to word `word`, counted over all rows.
__device__ __forceinline__ Vec8 columns_of(const void *rows, int word) {
    Vec8 pairs;
#pragma unroll
    for (int b = 0; b < 4; b++) pairs.w[b] = static_cast<const uint32_t *>(rows)[word / 4 * 16 + b * 4 + word % 4];
    return pairs;
}

// Lays out all of x, once the kernel before is over.
__device__ __forceinline__ void lay_out(const Skinny &p, char *to) {
    const Layout layout(p);
    const int words = p.k / 8; // a multiple of 32
    Vec8 first_norm;           // while the kernel before runs
    if (p.norm && threadIdx.x < words) first_norm = columns_of(p.norm, threadIdx.x);
    wait_for_previous();
    float scales[TOKENS];
    if (p.norm) token_scales(p, scales);
#pragma unroll
    for (int m = 0; m < TOKENS; m++) {
        if (m >= p.m) break;
        const __half *from = static_cast<const __half *>(p.x) + (long)m * p.k;
        for (int i = threadIdx.x; i < words; i += THREADS) {
            Vec8 x = columns_of(from, i);
            if (p.norm) apply_norm<__half>(&x, i < THREADS ? first_norm : columns_of(p.norm, i), scales[m]);
            Group *group = layout.groups(p, to) + m * layout.steps + i / 16;
            lay_out(x, to + 2 * m * layout.pitch + i * 8, layout.pitch, i % 16 == 0, group);
        }
    }
    __syncthreads();
}

// The boxes of a warp, tile after tile.
template <int DEPTH, Output OUTPUT> struct Walk {
    using Here = Memory<DEPTH>;
    int tile, box, first, boxes;
    // Asks for the next box, and goes on to the one behind it. One thread of the warp. Of gates and ups half a box each comes.
    __device__ __forceinline__ void ask(const CUtensorMap *words, const CUtensorMap *cells, uint32_t memory, int place, int tiles) {
        if (tile >= tiles) return;
        const uint32_t full = memory + Here::BARRIERS + place * 8;
        const int row = tile * (OUTPUT == SILU_MUL ? ROWS / 2 : ROWS), at = first + box;
        barrier_expect(full, BOX_BYTES + CELLS_BYTES);
        copy_box(memory + place * BOX_BYTES, words, full, 0, row, 0, at);
        copy_box(memory + Here::CELLS + place * CELLS_BYTES, cells, full, row, 0, at * BOX);
        if (++box == boxes) box = 0, tile += 2 * gridDim.x;
    }
};

// What a lane reads and adds up: its row of a tile and the one eight on, of the token that its place in the quad says. Columns
// behind the last token's hold copies of it, which nobody reads.
template <int DEPTH> struct Lane {
    int row, quad;
    const char *shared, *x;
    const Group *of_x;
    __device__ __forceinline__ Lane(const Skinny &p, char *shared, int lane, int first_step) : shared(shared) {
        const Layout layout(p);
        char *all_x = shared + Memory<DEPTH>::X;
        quad = lane % 4;
        row = lane / 8 | (lane / 4 & 1) << 2; // lanes that read together meet no bank twice
        x = all_x + min(lane / 4, 2 * p.m - 1) * layout.pitch + first_step * STEP + quad * 32;
        of_x = layout.groups(p, all_x) + min(quad, p.m - 1) * layout.steps + first_step;
    }
    // Adds a box's products.
    __device__ __forceinline__ void multiply(float *acc, int place, int box) const {
        const char *words = shared + place * BOX_BYTES + row * STEP, *cells = shared + Memory<DEPTH>::CELLS + place * CELLS_BYTES + row * 4;
#pragma unroll
        for (int step = 0; step < BOX; step++) {
            Vec8 a[2], b[2];
            uint32_t cell[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                a[i].v = *reinterpret_cast<const uint4 *>(words + i * (8 * STEP) + ((step * 4 + quad) ^ row) * 16);
                cell[i] = *reinterpret_cast<const uint32_t *>(cells + (step * ROWS + i * 8) * 4);
                b[i].v = *reinterpret_cast<const uint4 *>(x + (box * BOX + step) * STEP + i * 16);
            }
            const Group group = of_x[box * BOX + step];
            int sums[4] = {};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t bytes[4] = {a[0].w[i] & 0x0f0f0f0fu, a[1].w[i] & 0x0f0f0f0fu, a[0].w[i] >> 4 & 0x0f0f0f0fu, a[1].w[i] >> 4 & 0x0f0f0f0fu};
                multiply_bytes(sums, bytes, b[i / 2].w[i % 2 * 2], b[i / 2].w[i % 2 * 2 + 1]);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                // The cell's zero is 1024 + z in fp16.
                const int whole = sums[2 * i] * 256 + sums[2 * i + 1] - (int)(cell[i] >> 16 & 15) * group.sum;
                acc[i] += __low2float(as_half2(cell[i])) * group.scale * (float)whole;
            }
        }
    }
};

template <int DEPTH, Output OUTPUT>
__device__ __forceinline__ void int4_few(const Skinny &p, const CUtensorMap *words, const CUtensorMap *cells) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ float partial[2][2][WARPS][ROWS][TOKENS + 1];
    const uint32_t memory = shared_address(shared), barriers = memory + Memory<DEPTH>::BARRIERS;
    // The shuffle tells the compiler that all lanes have the same.
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), half = warp / WARPS, lane = threadIdx.x % 32;
    const int rows = OUTPUT == SILU_MUL ? ROWS / 2 : ROWS, tiles = (p.n + rows - 1) / rows;
    const int first_tile = blockIdx.x + gridDim.x * half;
    // A warp's share of the columns, in boxes, as even as can be.
    const int all = p.k / (BOX * STEP), from = all * (warp % WARPS) / WARPS, boxes = all * (warp % WARPS + 1) / WARPS - from;
    Walk<DEPTH, OUTPUT> walk{boxes > 0 ? first_tile : tiles, 0, from, boxes};
    const int first_place = warp * DEPTH;
    if (lane == 0) {
        prefetch_map(words);
        prefetch_map(cells);
        for (int i = 0; i < DEPTH; i++) barrier_init(barriers + (first_place + i) * 8, 1);
        barrier_init_done();
        for (int i = 0; i < DEPTH; i++) walk.ask(words, cells, memory, first_place + i, tiles);
    }
    let_next_start();
    lay_out(p, shared + Memory<DEPTH>::X);

    const Lane<DEPTH> mine(p, shared, lane, from * BOX);
    int place = 0, buffer = 0;
    uint32_t parity = 0;
    for (int tile = first_tile; tile < tiles; tile += 2 * gridDim.x, buffer ^= 1) {
        float acc[2] = {};
        for (int box = 0; box < boxes; box++) {
            barrier_wait(barriers + (first_place + place) * 8, parity);
            mine.multiply(acc, first_place + place, box);
            __syncwarp(); // all lanes have read the box
            if (lane == 0) walk.ask(words, cells, memory, first_place + place, tiles);
            if (++place == DEPTH) place = 0, parity ^= 1;
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (mine.quad < TOKENS) partial[half][buffer][warp % WARPS][mine.row + i * 8][mine.quad] = acc[i];
        // One barrier a tile: the other buffer is written again only behind the next one.
        named_sync(1 + half, WARPS * 32);
        finish_tile<__half, TOKENS, OUTPUT>(p, partial[half][buffer], tile, threadIdx.x % (WARPS * 32));
    }
}

#define DEFINE_ONE(NAME, OUTPUT, DEPTH)                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME##_##DEPTH(const __grid_constant__ Skinny p,                       \
        const __grid_constant__ CUtensorMap words, const __grid_constant__ CUtensorMap cells) {                                     \
        int4_few<DEPTH, OUTPUT>(p, &words, &cells);                                                                                 \
    }
// Names end in the boxes that a warp has in flight.
#define DEFINE(DEPTH)                             \
    DEFINE_ONE(int4_few_store, STORE, DEPTH)      \
    DEFINE_ONE(int4_few_add, ADD_RESIDUAL, DEPTH) \
    DEFINE_ONE(int4_few_silu, SILU_MUL, DEPTH)
DEFINE(3)
DEFINE(4)
