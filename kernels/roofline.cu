// What a GPU can do at best, for the profiler to measure others against: arithmetic on registers alone.
// Bandwidth is measured with `copy` of pointwise.cu.
#include "device.cuh"

constexpr int kThreads = 256;
// Independent chains of each thread or warp, so that latency does not count.
constexpr int kChains = 8;

// rounds * kChains fused multiply-adds a thread. Grid: any number of blocks of kThreads; one float of
// `out` a thread, so that the work is not optimised away.
extern "C" __global__ void __launch_bounds__(kThreads) rate_fma(float* out, int rounds) {
    const unsigned at = blockIdx.x * kThreads + threadIdx.x;
    float sums[kChains];
#pragma unroll
    for (int i = 0; i < kChains; ++i) sums[i] = static_cast<float>(threadIdx.x + i);
    for (int round = 0; round < rounds; ++round) {
#pragma unroll
        for (int i = 0; i < kChains; ++i) sums[i] = fmaf(sums[i], 0.5f, 0.25f);
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kChains; ++i) sum += sums[i];
    out[at] = sum;
}

// rounds * kChains products of 16x8x16 bf16 a warp, by mma.sync. Grid and `out` as rate_fma.
extern "C" __global__ void __launch_bounds__(kThreads) rate_mma(float* out, int rounds) {
    const unsigned at = blockIdx.x * kThreads + threadIdx.x;
    float sum = 0.0f;
#if ECHOGRAD_EMULATOR || __CUDA_ARCH__ >= 800
    float sums[kChains][4] = {};
    const unsigned one = pack_bf16(1.0f, 1.0f);
    const unsigned a[4] = {one, one, one, one};
    const unsigned b[2] = {one, one};
    for (int round = 0; round < rounds; ++round) {
#pragma unroll
        for (int i = 0; i < kChains; ++i) mma_bf16(sums[i], a, b);
    }
#pragma unroll
    for (int i = 0; i < kChains; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum += sums[i][j];
    }
#endif
    out[at] = sum;
}
