// Hopper's own instructions (sm_90a): tensor copies that arrive on barriers in shared memory, and products by warpgroups.
// PTX ISA 9.0, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate" and "cp.async.bulk.tensor".
#pragma once
#include <cuda.h>

#include "common.cuh"

__device__ __forceinline__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and tells the barrier to wait for as many bytes of copies.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits until the phase of this parity is over.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile("{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra WAIT;\n}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

// Copies a box of a tensor; coordinates outside of the tensor (negative ones too) read as zero and count as bytes.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap *map, uint32_t barrier, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to), "l"(map),
                 "r"(barrier), "r"(x), "r"(y)
                 : "memory");
}
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap *map, uint32_t barrier, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to), "l"(map),
                 "r"(barrier), "r"(x), "r"(y), "r"(z)
                 : "memory");
}
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap *map, uint32_t barrier, int x, int y, int z, int w) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
                 : "memory");
}
// Copies a run of bytes; both addresses and the length are multiples of 16.
__device__ __forceinline__ void copy_bytes(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes),
                 "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap *map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// Makes ordinary stores to shared memory visible to the copy engine and the tensor cores.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Named barriers among some of a block's threads.
__device__ __forceinline__ void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

template <int REGISTERS> __device__ __forceinline__ void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
template <int REGISTERS> __device__ __forceinline__ void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }

// How a matrix lies in shared memory: rows of 16-bit values along the product's inner dimension, swizzled as the copy
// engine does it. 128: rows of 128 bytes, groups of 8 rows in 1,024; 32: rows of 32 bytes, groups in 256.
template <int SWIZZLE> __device__ __forceinline__ uint64_t matrix_at(uint32_t address) {
    static_assert(SWIZZLE == 128 || SWIZZLE == 32, "the two layouts in use");
    constexpr uint64_t GROUP = SWIZZLE * 8 / 16, KIND = SWIZZLE == 128 ? 1 : 3;
    return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)1 << 16 | GROUP << 32 | KIND << 62;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most N committed groups are still running.
template <int N> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

#define REGISTERS_32 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define OUTPUTS_32(d) \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
    "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
    "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
    "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define REGISTERS_48 REGISTERS_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define OUTPUTS_48(d) \
    OUTPUTS_32(d), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
    "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define REGISTERS_56 REGISTERS_48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define OUTPUTS_56(d) \
    OUTPUTS_48(d), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define REGISTERS_64 REGISTERS_56 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define OUTPUTS_64(d) \
    OUTPUTS_56(d), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define REGISTERS_4 "%0,%1,%2,%3"
#define OUTPUTS_4(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define REGISTERS_8 REGISTERS_4 ",%4,%5,%6,%7"
#define OUTPUTS_8(d) OUTPUTS_4(d), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define REGISTERS_16 REGISTERS_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define OUTPUTS_16(d) \
    OUTPUTS_8(d), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
// d[64 rows × N] (+)= a · b with a in shared memory; one warpgroup. HALF is N / 2, the registers that d takes of each thread.
#define WGMMA_SHARED(TYPE, N, HALF, A, B, ADD) \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " ADD ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE \
                 " {" REGISTERS_##HALF "}, " A ", " B ", p, 1, 1, 0, 0;}" \
                 : OUTPUTS_##HALF(d) : "l"(a), "l"(b), "r"(add));
#define WGMMA_SHARED_64(TYPE) WGMMA_SHARED(TYPE, 64, 32, "%32", "%33", "%34")
#define WGMMA_SHARED_96(TYPE) WGMMA_SHARED(TYPE, 96, 48, "%48", "%49", "%50")
#define WGMMA_SHARED_112(TYPE) WGMMA_SHARED(TYPE, 112, 56, "%56", "%57", "%58")
#define WGMMA_SHARED_128(TYPE) WGMMA_SHARED(TYPE, 128, 64, "%64", "%65", "%66")
// The same with a in registers: 64 rows × 16, as mma.sync holds them.
#define WGMMA_REGISTERS(TYPE, N, HALF, A0, A1, A2, A3, B, ADD) \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " ADD ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE \
                 " {" REGISTERS_##HALF "}, {" A0 "," A1 "," A2 "," A3 "}, " B ", p, 1, 1, 0;}" \
                 : OUTPUTS_##HALF(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
#define WGMMA_REGISTERS_8(TYPE) WGMMA_REGISTERS(TYPE, 8, 4, "%4", "%5", "%6", "%7", "%8", "%9")
#define WGMMA_REGISTERS_16(TYPE) WGMMA_REGISTERS(TYPE, 16, 8, "%8", "%9", "%10", "%11", "%12", "%13")
#define WGMMA_REGISTERS_32(TYPE) WGMMA_REGISTERS(TYPE, 32, 16, "%16", "%17", "%18", "%19", "%20", "%21")
#define WGMMA_REGISTERS_64(TYPE) WGMMA_REGISTERS(TYPE, 64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
#define WGMMA_REGISTERS_128(TYPE) WGMMA_REGISTERS(TYPE, 128, 64, "%64", "%65", "%66", "%67", "%68", "%69")

template <typename T, int N> struct Warpgroup;
// Few columns are multiplied with rows in registers alone.
#define DEFINE_NARROW_WARPGROUP(N)                                                                                                \
    template <> struct Warpgroup<__half, N> {                                                                                     \
        static __device__ __forceinline__ void mma(float *d, const uint32_t *a, uint64_t b, int add) { WGMMA_REGISTERS_##N("f16") } \
    };
DEFINE_NARROW_WARPGROUP(8)
DEFINE_NARROW_WARPGROUP(16)
DEFINE_NARROW_WARPGROUP(32)
#define DEFINE_SHARED_WARPGROUP(N)                                                                                            \
    template <> struct Warpgroup<__half, N> {                                                                                 \
        static __device__ __forceinline__ void mma(float *d, uint64_t a, uint64_t b, int add) { WGMMA_SHARED_##N("f16") }     \
    };
DEFINE_SHARED_WARPGROUP(96)
DEFINE_SHARED_WARPGROUP(112)
#define DEFINE_WARPGROUP(T, TYPE, N)                                                                                              \
    template <> struct Warpgroup<T, N> {                                                                                          \
        static __device__ __forceinline__ void mma(float *d, uint64_t a, uint64_t b, int add) { WGMMA_SHARED_##N(TYPE) }          \
        static __device__ __forceinline__ void mma(float *d, const uint32_t *a, uint64_t b, int add) { WGMMA_REGISTERS_##N(TYPE) } \
    };
DEFINE_WARPGROUP(__nv_bfloat16, "bf16", 64)
DEFINE_WARPGROUP(__nv_bfloat16, "bf16", 128)
DEFINE_WARPGROUP(__half, "f16", 64)
DEFINE_WARPGROUP(__half, "f16", 128)
