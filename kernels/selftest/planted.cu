// Pairs of kernels, one right and one with a planted bug that GPUs forgive on most days. The emulator
// must report the second of each pair and pass the first (tests/emulator.rs).
#include "../device.cuh"

#define PAIR(name, threads)                                                                      \
    extern "C" __global__ void __launch_bounds__(threads)                                        \
    planted_##name##_good(const float* __restrict__ x, float* __restrict__ y) { name<true>(x, y); } \
    extern "C" __global__ void __launch_bounds__(threads)                                        \
    planted_##name##_bad(const float* __restrict__ x, float* __restrict__ y) { name<false>(x, y); }

// Each of 128 threads reads what a thread of another warp wrote.
template <bool Good>
__device__ void block_barrier(const float* x, float* y) {
    SHARED(float, tile, 128);
    int i = threadIdx.x;
    tile[i] = x[i];
    if (Good) __syncthreads();
    y[i] = tile[127 - i];
}
PAIR(block_barrier, 128)

// Each lane reads what its neighbour wrote.
template <bool Good>
__device__ void warp_barrier(const float* x, float* y) {
    SHARED(float, tile, 32);
    int i = threadIdx.x;
    tile[i] = x[i];
    if (Good) __syncwarp();
    y[i] = tile[i ^ 1];
}
PAIR(warp_barrier, 32)

// The second __syncwarp keeps a lane from overwriting what its neighbour is yet to read.
template <bool Good>
__device__ void warp_reuse(const float* x, float* y) {
    SHARED(float, tile, 32);
    int i = threadIdx.x;
    tile[i] = x[i];
    __syncwarp();
    float other = tile[i ^ 1];
    if (Good) __syncwarp();
    tile[i] = other + 1.0f;
    __syncwarp();
    y[i] = tile[i ^ 1];
}
PAIR(warp_reuse, 32)

// Double-buffered cp.async: the barrier at the end keeps the next copy from overwriting a buffer that
// a slower warp still reads.
template <bool Good>
__device__ void buffer_reuse(const float* x, float* y) {
    SHARED(float, stages, 2, 128);
    int i = threadIdx.x;
    cp_async<4>(&stages[0][i], &x[i]);
    cp_async_commit();
    float sum = 0.0f;
    for (int step = 0; step < 4; ++step) {
        if (step < 3) cp_async<4>(&stages[(step + 1) % 2][i], &x[128 * (step + 1) + i]);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        sum += stages[step % 2][127 - i];
        if (Good) __syncthreads();
    }
    y[i] = sum;
}
PAIR(buffer_reuse, 128)

// A wait that leaves the group in flight whose data are read.
template <bool Good>
__device__ void early_read(const float* x, float* y) {
    SHARED(float, tile, 32);
    int i = threadIdx.x;
    cp_async<4>(&tile[i], &x[i]);
    cp_async_commit();
    cp_async_wait<Good ? 0 : 1>();
    __syncwarp();
    y[i] = tile[31 - i];
}
PAIR(early_read, 32)

// The last thread reads one past the end.
template <bool Good>
__device__ void shared_index(const float* x, float* y) {
    SHARED(float, tile, 64);
    SHARED(float, next, 64);
    int i = threadIdx.x;
    const float* row = tile;
    tile[i] = x[i];
    next[i] = x[i];
    __syncthreads();
    y[i] = row[Good ? (i + 1) % 64 : i + 1];
}
PAIR(shared_index, 64)

// A row overrun that stays inside of the array.
template <bool Good>
__device__ void row_index(const float* x, float* y) {
    SHARED(float, tile, 4, 16);
    int i = threadIdx.x;
    tile[i / 16][i % 16] = x[i];
    __syncthreads();
    y[i] = i / 16 < 3 ? tile[i / 16][i % 16 + (Good ? 0 : 1)] : 0.0f;
}
PAIR(row_index, 64)

// One thread more than there are elements in global memory (64).
template <bool Good>
__device__ void global_index(const float* x, float* y) {
    int i = threadIdx.x;
    if (Good ? i < 64 : i <= 64) y[i] = x[i];
}
PAIR(global_index, 96)

// Only 31 of 32 elements are written before all are summed.
template <bool Good>
__device__ void uninitialised(const float* x, float* y) {
    SHARED(float, tile, 32);
    int i = threadIdx.x;
    if (Good || i < 31) tile[i] = x[i];
    __syncthreads();
    float sum = 0.0f;
    for (int k = 0; k < 32; ++k) sum += tile[k];
    y[i] = sum;
}
PAIR(uninitialised, 32)

// A barrier that half of the block does not reach.
template <bool Good>
__device__ void divergent_barrier(const float* x, float* y) {
    int i = threadIdx.x;
    float v = x[i];
    if (Good || i < 32) __syncthreads();
    y[i] = v;
}
PAIR(divergent_barrier, 64)

// Two barriers in two branches.
template <bool Good>
__device__ void two_barriers(const float* x, float* y) {
    int i = threadIdx.x;
    float v = x[i];
    if (Good) {
        __syncthreads();
    } else if (i < 32) {
        __syncthreads();
    } else {
        v += 1.0f;
        __syncthreads();
    }
    y[i] = v;
}
PAIR(two_barriers, 64)

// A full-warp shuffle that only half of the warp reaches.
template <bool Good>
__device__ void divergent_shuffle(const float* x, float* y) {
    int i = threadIdx.x;
    float v = x[i];
    if (Good || i < 16) v += __shfl_xor_sync(kFullWarp, v, 1);
    y[i] = v;
}
PAIR(divergent_shuffle, 32)

// A float4 read from an address that is only a multiple of 4.
template <bool Good>
__device__ void misaligned(const float* x, float* y) {
    int i = threadIdx.x;
    float4 v = *reinterpret_cast<const float4*>(x + 4 * i + (Good ? 0 : 1));
    y[i] = v.x + v.y + v.z + v.w;
}
PAIR(misaligned, 8)

// A cp.async that copies nothing, from an address that it could not copy from.
template <bool Good>
__device__ void misaligned_copy(const float* x, float* y) {
    SHARED(float, tile, 32);
    int i = threadIdx.x;
    cp_async<16>(&tile[4 * i], x + 4 * i + (Good ? 0 : 1), 0);
    cp_async_commit();
    cp_async_wait<0>();
    y[i] = tile[4 * i];
}
PAIR(misaligned_copy, 8)

// A product of wgmma, and what goes wrong with one.
enum class Bug { None, Wait, Proxy, Fence, Barrier, Reuse, Pattern, Warp };

// Of a matrix of 64 rows of 32 elements, the first half, with itself; the vectors of a row are swizzled.
template <Bug Is>
__device__ void product(const float* x, float* y) {
#if ECHOGRAD_WGMMA
    DYNAMIC_SHARED(unsigned char, stage);
    int i = threadIdx.x;
    auto store = [&] {
        for (int at = i; at < 64 * 32; at += 128) {
            int row = at / 32, k = at % 32, place = row * 32 + ((k / 8) ^ (row / 2 % 4)) * 8 + k % 8;
            reinterpret_cast<bf16*>(stage)[place] = from_float<bf16>(x[at % 512]);
        }
    };
    store();
    if (Is != Bug::Proxy) async_proxy_fence();
    if (Is != Bug::Barrier) __syncthreads();
    float sums[8][4] = {};
    hold(sums);
    unsigned long long matrix = wgmma_matrix<64>(stage + (Is == Bug::Pattern ? 64 : 0), 16, 512);
    if (Is != Bug::Fence) wgmma_fence();
    if (Is != Bug::Warp || i < 96) wgmma_bf16<64>(sums, matrix, matrix);
    wgmma_commit();
    if (Is == Bug::Reuse) store();
    if (Is != Bug::Wait) wgmma_wait<0>();
    hold(sums);
    y[i] = sums[0][0] + sums[7][3];
    if (Is == Bug::Wait) wgmma_wait<0>();
#endif
}
#define PRODUCT(name, bug)                                        \
    template <bool Good>                                          \
    __device__ void product_##name(const float* x, float* y) {    \
        product<Good ? Bug::None : Bug::bug>(x, y);               \
    }                                                             \
    PAIR(product_##name, 128)
// Its sums are read before it is waited for.
PRODUCT(wait, Wait)
// What threads wrote is not made visible to it.
PRODUCT(proxy, Proxy)
// The sums are set to zero, and no fence follows.
PRODUCT(fence, Fence)
// No barrier between other threads' writes and it.
PRODUCT(barrier, Barrier)
// What it reads is overwritten before it is waited for.
PRODUCT(reuse, Reuse)
// Its matrix begins where the swizzle does not.
PRODUCT(pattern, Pattern)
// One of four warps leaves it out.
PRODUCT(warp, Warp)
