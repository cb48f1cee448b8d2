// What both kernels of prompts' attention are told.
#pragma once
#include "fp8.cuh"

constexpr int BLOCK = 16, TILE_ROWS = 128;

struct PrefillAttention {
    const void *q;           // rows of `q_stride` values, the query heads first
    const void *cache;       // this layer's pages
    void *out;               // [rows][num_heads · D]
    const int2 *items;       // (sequence, tile of rows), longest first
    const int *rows;         // [sequences] first query row
    const int *query_lens;   // [sequences]
    const int *context_lens; // [sequences]
    const int *table_starts; // [sequences] first entry in `blocks`
    const int *blocks;       // block tables, one after another
    int num_heads, num_kv_heads, q_stride, window;
    float scale;             // 1/√D · log2(e), and K's scale
    int num_items;
    float value_scale;       // of eight-bit floats
};
