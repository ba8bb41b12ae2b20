// Small kernels that are right, each using one thing the emulator must do as a GPU does. Their
// results are compared with plain loops in tests/emulator.rs.
#include "../device.cuh"

// y[b] = sum of block b's stretch of x, `each` elements.
extern "C" __global__ void __launch_bounds__(256)
selftest_block_sum(const float* __restrict__ x, float* __restrict__ y, int each) {
    SHARED(float, scratch, 256 / 32);
    const float* mine = x + static_cast<size_t>(blockIdx.x) * each;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < each; i += 256) sum += mine[i];
    sum = block_reduce<256>(sum, scratch, Sum());
    if (threadIdx.x == 0) y[blockIdx.x] = sum;
}

// y[w] = sum of 32 elements, one warp each, by shuffles alone.
extern "C" __global__ void __launch_bounds__(128)
selftest_warp_sum(const float* __restrict__ x, float* __restrict__ y, int warps) {
    int warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (warp >= warps) return;
    float sum = x[warp * 32 + threadIdx.x % 32];
    for (int offset = 16; offset > 0; offset /= 2) {
        sum += __shfl_down_sync(kFullWarp, sum, offset);
    }
    if (threadIdx.x % 32 == 0) y[warp] = sum;
}

// c = a·b for n×n matrices, 32×32 tiles and 1024 threads.
extern "C" __global__ void __launch_bounds__(1024)
selftest_matmul(const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ c, int n) {
    SHARED(float, left, 32, 33);
    SHARED(float, right, 32, 33);
    int x = threadIdx.x, y = threadIdx.y;
    int column = blockIdx.x * 32 + x, row = blockIdx.y * 32 + y;
    float sum = 0.0f;
    for (int k = 0; k < n; k += 32) {
        left[y][x] = row < n && k + x < n ? a[row * n + k + x] : 0.0f;
        right[y][x] = column < n && k + y < n ? b[(k + y) * n + column] : 0.0f;
        __syncthreads();
        for (int i = 0; i < 32; ++i) sum = fmaf(left[y][i], right[i][x], sum);
        __syncthreads();
    }
    if (row < n && column < n) c[row * n + column] = sum;
}

// c (m×n, f32) = a (m×k) · b (k×n), bf16: double-buffered cp.async, ldmatrix and mma. A block of four
// warps makes 32×32 of c. k and n are multiples of 8.
extern "C" __global__ void __launch_bounds__(128)
selftest_gemm(const bf16* __restrict__ a, const bf16* __restrict__ b, float* __restrict__ c,
              int m, int n, int k) {
#if ECHOGRAD_EMULATOR || __CUDA_ARCH__ >= 800
    constexpr int kTile = 32, kPitch = kTile + 8;
    SHARED(bf16, left, 2, kTile, kPitch);
    SHARED(bf16, right, 2, kTile, kPitch);
    int row0 = blockIdx.y * kTile, column0 = blockIdx.x * kTile;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    auto fetch = [&](int stage, int k0) {
        int y = threadIdx.x / 4, x = threadIdx.x % 4 * 8;
        bool in_a = row0 + y < m && k0 + x < k, in_b = k0 + y < k && column0 + x < n;
        const bf16* from_a = in_a ? a + static_cast<size_t>(row0 + y) * k + k0 + x : a;
        const bf16* from_b = in_b ? b + static_cast<size_t>(k0 + y) * n + column0 + x : b;
        cp_async<16>(&left[stage][y][x], from_a, in_a ? 16 : 0);
        cp_async<16>(&right[stage][y][x], from_b, in_b ? 16 : 0);
        cp_async_commit();
    };
    float sums[2][4] = {};
    int steps = (k + kTile - 1) / kTile;
    fetch(0, 0);
    for (int step = 0; step < steps; ++step) {
        fetch((step + 1) % 2, (step + 1) * kTile);  // past the end it fills with zeros
        cp_async_wait<1>();
        __syncthreads();
        int stage = step % 2;
        for (int k0 = 0; k0 < kTile; k0 += 16) {
            unsigned fa[4], fb[4];
            ldmatrix(fa, &left[stage][warp / 2 * 16 + lane % 16][k0 + lane / 16 * 8]);
            ldmatrix<4, true>(fb, &right[stage][k0 + lane % 16][warp % 2 * 16 + lane / 16 * 8]);
            mma_bf16(sums[0], fa, {fb[0], fb[1]});
            mma_bf16(sums[1], fa, {fb[2], fb[3]});
        }
        __syncthreads();
    }
    for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i) {
            int row = row0 + warp / 2 * 16 + lane / 4 + i / 2 * 8;
            int column = column0 + warp % 2 * 16 + half * 8 + lane % 4 * 2 + i % 2;
            if (row < m && column < n) c[static_cast<size_t>(row) * n + column] = sums[half][i];
        }
    }
#endif
}

// d (16×8) = a (16×8) · b (8×8) by one tf32 mma, fragments loaded element by element.
extern "C" __global__ void __launch_bounds__(32)
selftest_mma_tf32(const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ d) {
#if ECHOGRAD_EMULATOR || __CUDA_ARCH__ >= 800
    int group = threadIdx.x / 4, member = threadIdx.x % 4;
    unsigned fa[4], fb[2];
    float fd[4] = {};
    for (int i = 0; i < 4; ++i) fa[i] = to_tf32(a[(group + i % 2 * 8) * 8 + member + i / 2 * 4]);
    for (int i = 0; i < 2; ++i) fb[i] = to_tf32(b[(member + i * 4) * 8 + group]);
    mma_tf32(fd, fa, fb);
    for (int i = 0; i < 4; ++i) d[(group + i / 2 * 8) * 8 + member * 2 + i % 2] = fd[i];
#endif
}

// d (16×8) = a (16×16) · b (16×8), IEEE halves.
extern "C" __global__ void __launch_bounds__(32)
selftest_mma_f16(const f16* __restrict__ a, const f16* __restrict__ b, float* __restrict__ d) {
#if ECHOGRAD_EMULATOR || __CUDA_ARCH__ >= 800
    SHARED(f16, left, 16, 16);
    SHARED(f16, right, 16, 8);
    int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) left[i / 16][i % 16] = a[i];
    for (int i = lane; i < 128; i += 32) right[i / 8][i % 8] = b[i];
    __syncwarp();
    unsigned fa[4], fb[2];
    float fd[4] = {};
    ldmatrix(fa, &left[lane % 16][lane / 16 * 8]);
    ldmatrix<2, true>(fb, &right[lane % 16][0]);
    mma_f16(fd, fa, fb);
    for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = fd[i];
#endif
}

// y[i] = x[i] rounded to bf16, and to tf32 in z[i]; pairs[i] = two neighbours packed.
extern "C" __global__ void __launch_bounds__(256)
selftest_round(const float* __restrict__ x, bf16* __restrict__ y, unsigned* __restrict__ z,
               unsigned* __restrict__ pairs, int n) {
#if ECHOGRAD_EMULATOR || __CUDA_ARCH__ >= 800
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    y[i] = from_float<bf16>(x[i]);
    z[i] = to_tf32(x[i]);
    if (i % 2 == 0 && i + 1 < n) pairs[i / 2] = pack_bf16(x[i], x[i + 1]);
#endif
}

// counts[v] += how often v (below 16) occurs in x: integer atomics, shared then global.
extern "C" __global__ void __launch_bounds__(128)
selftest_histogram(const unsigned* __restrict__ x, unsigned* __restrict__ counts, int n) {
    SHARED(unsigned, bins, 16);
    if (threadIdx.x < 16) bins[threadIdx.x] = 0;
    __syncthreads();
    for (int i = blockIdx.x * 128 + threadIdx.x; i < n; i += gridDim.x * 128) {
        atomicAdd(&bins[x[i]], 1u);
    }
    __syncthreads();
    if (threadIdx.x < 16) atomicAdd(&counts[threadIdx.x], bins[threadIdx.x]);
}

// out[k][lane] = result of warp operation number k on x[lane].
extern "C" __global__ void __launch_bounds__(32)
selftest_warp(const unsigned* __restrict__ x, unsigned* __restrict__ out) {
    unsigned lane = threadIdx.x, v = x[lane];
    int row = 0;
    auto put = [&](unsigned value) { out[32 * row++ + lane] = value; };
    put(__shfl_sync(kFullWarp, v, static_cast<int>(lane * 5 + 3)));
    put(__shfl_up_sync(kFullWarp, v, 3, 8));
    put(__shfl_down_sync(kFullWarp, v, 3, 16));
    put(__shfl_xor_sync(kFullWarp, v, 9));
    put(__ballot_sync(kFullWarp, v % 3 == 0));
    put(static_cast<unsigned>(__any_sync(kFullWarp, v == 7)));
    put(static_cast<unsigned>(__all_sync(kFullWarp, v < 1000)));
#if ECHOGRAD_EMULATOR || __CUDA_ARCH__ >= 800
    put(__match_any_sync(kFullWarp, v % 4));
    put(__reduce_add_sync(kFullWarp, v));
    put(__reduce_max_sync(kFullWarp, v));
    put(static_cast<unsigned>(__reduce_min_sync(kFullWarp, static_cast<int>(v) - 50)));
#endif
}

// out[0..3] = count, or, and of a predicate over a block of 96 threads.
extern "C" __global__ void __launch_bounds__(96)
selftest_block_votes(const int* __restrict__ x, int* __restrict__ out) {
    int v = x[threadIdx.x];
    int count = __syncthreads_count(v > 0), any = __syncthreads_or(v > 5), all = __syncthreads_and(v > -9);
    if (threadIdx.x == 95) {
        out[0] = count;
        out[1] = any;
        out[2] = all;
    }
}

// For benches/emulator.rs: `rounds` block barriers; `rounds` shuffles; `rounds` mma.
extern "C" __global__ void __launch_bounds__(1024) selftest_barriers(int rounds) {
    for (int i = 0; i < rounds; ++i) __syncthreads();
}
extern "C" __global__ void __launch_bounds__(1024) selftest_shuffles(float* out, int rounds) {
    float x = static_cast<float>(threadIdx.x);
    for (int i = 0; i < rounds; ++i) x = __shfl_xor_sync(kFullWarp, x, 1);
    if (threadIdx.x == 0) out[blockIdx.x] = x;
}
extern "C" __global__ void __launch_bounds__(1024) selftest_mmas(float* out, int rounds) {
#if ECHOGRAD_EMULATOR || __CUDA_ARCH__ >= 800
    unsigned a[4] = {}, b[2] = {};
    float d[4] = {};
    for (int i = 0; i < rounds; ++i) mma_bf16(d, a, b);
    if (threadIdx.x == 0) out[blockIdx.x] = d[0];
#endif
}

// words[i] = the Philox block of counters[i] in a stream of a seed.
extern "C" __global__ void __launch_bounds__(32)
selftest_philox(unsigned long long seed, unsigned long long stream, const unsigned long long* counters,
                uint4* words, int count) {
    const int i = blockIdx.x * 32 + threadIdx.x;
    if (i < count) words[i] = philox(seed, stream, counters[i]);
}

// d (64×64) = a (64×16) · b (16×64), bf16, by wgmma. image: shared memory as it is to be, 16 KB; a and b: the
// descriptors, their addresses within the image. Dynamic shared memory: the image.
extern "C" __global__ void __launch_bounds__(128)
selftest_wgmma(const unsigned* image, unsigned long long a, unsigned long long b, int transposed, float* d) {
#if ECHOGRAD_WGMMA
    DYNAMIC_SHARED(unsigned, words);
    for (int i = threadIdx.x; i < 4096; i += 128) words[i] = image[i];
    async_proxy_fence();
    __syncthreads();
    const unsigned long long start = wgmma_matrix<64>(words, 0, 0) & 0x3fff;
    float sums[8][4] = {};
    hold(sums);
    wgmma_fence();
    if (transposed != 0) {
        wgmma_bf16<64, true>(sums, start + a, start + b);
    } else {
        wgmma_bf16<64>(sums, start + a, start + b);
    }
    wgmma_commit();
    wgmma_wait<0>();
    hold(sums);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            d[(16 * warp + lane / 4 + i / 2 * 8) * 64 + 8 * j + lane % 4 * 2 + i % 2] = sums[j][i];
        }
    }
#endif
}
