// What every kernel file stands on: storage types, vector access, shared memory, reductions, and
// all inline PTX. Where a function has two bodies, the first is for the GPU and the second for the
// emulator (emulator/emulator.h); kernels themselves have one.
//
// No headers are included, so that NVRTC needs no include path.
#pragma once

#ifndef ECHOGRAD_EMULATOR
#define ECHOGRAD_EMULATOR 0
#endif

constexpr unsigned kFullWarp = 0xffffffffu;

// ---- Shared memory ----

template <class T, int... Sizes>
struct SharedType {
    using Type = T;
};
template <class T, int Size, int... Sizes>
struct SharedType<T, Size, Sizes...> {
    using Type = typename SharedType<T, Sizes...>::Type[Size];
};

// SHARED(float, tile, 32, 33): an array float tile[32][33] of the block, aligned to 16 bytes.
// DYNAMIC_SHARED(float, rows): a float* to the launch's dynamic shared memory, aligned to 1024, in which every
// swizzle of wgmma repeats.
#if !ECHOGRAD_EMULATOR
#define SHARED(type, name, ...) \
    __shared__ __align__(16) typename SharedType<type, __VA_ARGS__>::Type name
#define DYNAMIC_SHARED(type, name)                                    \
    extern __shared__ __align__(1024) unsigned char dynamic_shared[]; \
    type* const name = reinterpret_cast<type*>(dynamic_shared)
#else
#define SHARED(type, name, ...)                                                                  \
    auto& name = *static_cast<typename SharedType<type, __VA_ARGS__>::Type*>(                    \
        emulator::shared_array([] { static constexpr char here = 0; return &here; }(), #name,    \
                               sizeof(typename SharedType<type, __VA_ARGS__>::Type),             \
                               emulator::Where::current()))
#define DYNAMIC_SHARED(type, name) \
    type* const name = static_cast<type*>(emulator::dynamic_shared(sizeof(type)))
#endif

// ---- Storage types ----

// bfloat16 and IEEE half as stored; arithmetic is in float.
struct bf16 {
    unsigned short bits;
};
struct f16 {
    unsigned short bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) {
    return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}

// Rounds to nearest, ties to even; NaN stays NaN.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
#if !ECHOGRAD_EMULATOR && __CUDA_ARCH__ >= 800
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#else
    unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    return {static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
}

// Two bf16 in one register, the first in the low half.
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
#if !ECHOGRAD_EMULATOR && __CUDA_ARCH__ >= 800
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return from_float<bf16>(low).bits | static_cast<unsigned>(from_float<bf16>(high).bits) << 16;
#endif
}

// f32 rounded to the 10 mantissa bits of tf32, to nearest, ties away from zero.
__device__ __forceinline__ unsigned to_tf32(float x) {
#if !ECHOGRAD_EMULATOR && __CUDA_ARCH__ >= 800
    unsigned y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
#else
    unsigned bits = __float_as_uint(x);
    if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
    return (bits + 0x1000u) & 0xffffe000u;
#endif
}

// ---- Vector access ----

// Count elements that are moved as one, 16 bytes at most; addresses must be multiples of its size.
template <class T, int Count>
struct __align__(sizeof(T) * Count) Vector {
    static_assert(sizeof(T) * Count <= 16 && (Count & (Count - 1)) == 0, "one load at most");
    T at[Count];
};

template <int Bytes>
__device__ __forceinline__ bool is_aligned(const void* address) {
    return reinterpret_cast<unsigned long long>(address) % Bytes == 0;
}

// An address that was read from memory, of which the compiler is told that it is one of global memory:
// accesses by it are then cheaper.
template <class T>
__device__ __forceinline__ T* global_address(T* address) {
#if !ECHOGRAD_EMULATOR
    __builtin_assume(__isGlobal(address));
#endif
    return address;
}

// x, which the compiler is to keep in a register rather than to compute again wherever it is used.
__device__ __forceinline__ int hold(int x) {
#if !ECHOGRAD_EMULATOR
    asm("" : "+r"(x));
#endif
    return x;
}

// Count consecutive elements in as few accesses of at most 16 bytes as they take, kept as stored until
// they are wanted, so that several loads can be under way. Addresses are multiples of 16 or, where all
// are fewer bytes, of their size.
template <class T, int Count>
struct Loaded {
    static constexpr int kWidth = Count * sizeof(T) > 16 ? 16 / sizeof(T) : Count;
    Vector<T, kWidth> parts[Count / kWidth];

    __device__ __forceinline__ explicit Loaded(const T* x) {
#pragma unroll
        for (int i = 0; i < Count / kWidth; ++i) {
            parts[i] = reinterpret_cast<const Vector<T, kWidth>*>(x)[i];
        }
    }
    __device__ __forceinline__ float operator[](int i) const {
        return to_float(parts[i / kWidth].at[i % kWidth]);
    }
};

// Elements that are stored as bf16 or f32, as is known when a kernel runs.
struct Elements {
    void* address;
    bool narrow;
    __device__ __forceinline__ float get(size_t i) const {
        return narrow ? to_float(static_cast<const bf16*>(address)[i]) : static_cast<const float*>(address)[i];
    }
    __device__ __forceinline__ void set(size_t i, float x) const {
        if (narrow) {
            static_cast<bf16*>(address)[i] = from_float<bf16>(x);
        } else {
            static_cast<float*>(address)[i] = x;
        }
    }
};

// Rounds and stores 16 bytes of elements, to an address that is a multiple of 16.
__device__ __forceinline__ void store_vector(float* y, const float (&v)[4]) {
    *reinterpret_cast<Vector<float, 4>*>(y) = {{v[0], v[1], v[2], v[3]}};
}
__device__ __forceinline__ void store_vector(bf16* y, const float (&v)[8]) {
    *reinterpret_cast<Vector<unsigned, 4>*>(y) = {{pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]),
                                                   pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])}};
}

// A single element, for code that takes vectors of one.
template <class T>
__device__ __forceinline__ void store_vector(T* y, const float (&v)[1]) {
    *y = from_float<T>(v[0]);
}

// Four words to global memory as one. Compilers split a plain store of words that inline PTX made.
__device__ __forceinline__ void store_16_bytes(void* to, unsigned a, unsigned b, unsigned c, unsigned d) {
#if !ECHOGRAD_EMULATOR
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 ::"l"(__cvta_generic_to_global(to)), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
#else
    *static_cast<uint4*>(to) = make_uint4(a, b, c, d);
#endif
}

// i / extent and i % extent, by the short division where i allows it.
struct Division {
    size_t quotient;
    unsigned remainder;
};
__device__ __forceinline__ Division divide(size_t i, unsigned extent) {
    if (i <= 0xffffffffu) {
        const unsigned low = static_cast<unsigned>(i);
        return {low / extent, low % extent};
    }
    return {i / extent, static_cast<unsigned>(i % extent)};
}

// ---- Functions ----

// (σ(x), σ(−x)) to full relative accuracy in both tails; NaN for NaN.
struct Sigmoid {
    float value, complement;
};
__device__ __forceinline__ Sigmoid sigmoid(float x) {
    const float e = expf(-fabsf(x));
    const float large = __fdividef(1.0f, 1.0f + e), small = e * large;
    return x < 0.0f ? Sigmoid{small, large} : Sigmoid{large, small};
}

// Philox4x32-10 (Salmon et al. 2011), as src/device/philox.rs: block `counter` of a stream of a seed.
__device__ __forceinline__ uint4 philox(unsigned long long seed, unsigned long long stream,
                                        unsigned long long counter) {
    unsigned key0 = static_cast<unsigned>(seed), key1 = static_cast<unsigned>(seed >> 32);
    uint4 x = make_uint4(static_cast<unsigned>(counter), static_cast<unsigned>(counter >> 32),
                         static_cast<unsigned>(stream), static_cast<unsigned>(stream >> 32));
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const unsigned long long a = 0xD2511F53ull * x.x, b = 0xCD9E8D57ull * x.z;
        x = make_uint4(static_cast<unsigned>(b >> 32) ^ x.y ^ key0, static_cast<unsigned>(b),
                       static_cast<unsigned>(a >> 32) ^ x.w ^ key1, static_cast<unsigned>(a));
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return x;
}

// ---- Fast functions: one instruction each, relative error at most 2⁻²², subnormals taken as zero ----
// NaN stays NaN.

#if ECHOGRAD_EMULATOR
#define ECHOGRAD_FAST(name, instruction, host) \
    __device__ __forceinline__ float name(float x) { return host; }
#else
#define ECHOGRAD_FAST(name, instruction, host)             \
    __device__ __forceinline__ float name(float x) {       \
        float y;                                           \
        asm(instruction " %0, %1;" : "=f"(y) : "f"(x));    \
        return y;                                          \
    }
#endif
ECHOGRAD_FAST(fast_exp2, "ex2.approx.ftz.f32", exp2f(x))
// Its error is 2⁻²² absolute between 1/2 and 2.
ECHOGRAD_FAST(fast_log2, "lg2.approx.ftz.f32", log2f(x))
ECHOGRAD_FAST(fast_reciprocal, "rcp.approx.ftz.f32", 1.0f / x)
ECHOGRAD_FAST(fast_sqrt, "sqrt.approx.ftz.f32", sqrtf(x))
ECHOGRAD_FAST(fast_rsqrt, "rsqrt.approx.ftz.f32", 1.0f / sqrtf(x))
#undef ECHOGRAD_FAST

// The smaller of the two, and NaN if either is (fminf would drop it).
__device__ __forceinline__ float minimum(float x, float y) {
#if !ECHOGRAD_EMULATOR && __CUDA_ARCH__ >= 800
    float z;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
#else
    return x < y || x != x ? x : y;
#endif
}

// The larger of the two, and NaN if either is (fmaxf would drop it).
__device__ __forceinline__ float maximum(float x, float y) {
#if !ECHOGRAD_EMULATOR && __CUDA_ARCH__ >= 800
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
#else
    return x > y || x != x ? x : y;
#endif
}

// ---- Reductions: fixed trees, so the same bits at every run ----

struct Sum {
    template <class T>
    __device__ __forceinline__ T operator()(T a, T b) const {
        return a + b;
    }
};
struct Max {
    __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// The reduction over all 32 lanes, in every lane.
template <class T, class F>
__device__ __forceinline__ T warp_reduce(T x, F combine) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        x = combine(x, __shfl_xor_sync(kFullWarp, x, offset));
    }
    return x;
}

// The reduction over a block of Threads threads (a multiple of 32), in every thread. All of them
// must call it. `scratch` is Threads / 32 elements of shared memory, free again after the next barrier.
template <int Threads, class T, class F>
__device__ __forceinline__ T block_reduce(T x, T* scratch, F combine) {
    static_assert(Threads % 32 == 0 && Threads <= 1024, "whole warps");
    x = warp_reduce(x, combine);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    x = scratch[0];
#pragma unroll
    for (int warp = 1; warp < Threads / 32; ++warp) x = combine(x, scratch[warp]);
    return x;
}

// Count sums at once, at the price of one barrier: x[k] over a block of Threads threads, in thread k
// alone (others receive 0). All of them must call it. `scratch` is free again after the next barrier.
template <int Threads, class T, int Count>
__device__ __forceinline__ T block_sums(const T (&x)[Count], T (&scratch)[Threads / 32][Count]) {
    static_assert(Threads % 32 == 0 && Threads <= 1024 && Count <= Threads, "whole warps");
#pragma unroll
    for (int k = 0; k < Count; ++k) {
        T sum = warp_reduce(x[k], Sum{});
        if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32][k] = sum;
    }
    __syncthreads();
    T sum = 0;
    if (threadIdx.x < Count) {
#pragma unroll
        for (int warp = 0; warp < Threads / 32; ++warp) sum += scratch[warp][threadIdx.x];
    }
    return sum;
}

// x[0] + x[stride] + … over `count` numbers, by one warp, in every lane: how the partial sums of blocks are
// added. The order depends on the count alone.
__device__ __forceinline__ double warp_sum(const double* x, int count, int stride) {
    double sum = 0.0;
    for (int i = static_cast<int>(threadIdx.x) % 32; i < count; i += 32) {
        sum += x[static_cast<size_t>(i) * stride];
    }
    return warp_reduce(sum, Sum{});
}

// Whether this block is the last of `blocks` to come here, in all its threads, which must all call it. What the others
// wrote before is then in memory, to be read as volatile. `counter` is 0 before the first block and after the last.
__device__ __forceinline__ bool is_last_block(unsigned* counter, unsigned blocks) {
    SHARED(int, last, 1);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last[0] = atomicAdd(counter, 1u) == blocks - 1;
        if (last[0] != 0) atomicExch(counter, 0u);
        __threadfence();
    }
    __syncthreads();
    return last[0] != 0;
}

// ---- cp.async: global to shared memory behind the threads' backs (a plain copy before sm_80) ----

// Copies `valid` of Bytes (4, 8 or 16) and fills up with zeros. Both addresses are multiples of Bytes, also where
// valid is 0. Cached: through the first-level cache, which only 16 bytes can go past.
template <int Bytes, bool Cached = (Bytes < 16)>
__device__ __forceinline__ void cp_async(void* shared, const void* global, int valid = Bytes) {
    static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "sizes of cp.async");
    static_assert(Cached || Bytes == 16, "cp.async.cg copies 16 bytes");
#if ECHOGRAD_EMULATOR
    emulator::cp_async(shared, global, Bytes, valid);
#elif __CUDA_ARCH__ >= 800
    unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    if constexpr (!Cached) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     ::"r"(to), "l"(__cvta_generic_to_global(global)), "r"(valid) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     ::"r"(to), "l"(__cvta_generic_to_global(global)), "n"(Bytes), "r"(valid)
                     : "memory");
    }
#else
    using Words = Vector<unsigned, Bytes / 4>;
    Words& to = *static_cast<Words*>(shared);
    if (valid == Bytes) {
        to = *static_cast<const Words*>(global);
    } else {
        to = {};
        for (int i = 0; i < valid; ++i) static_cast<char*>(shared)[i] = static_cast<const char*>(global)[i];
    }
#endif
}

// Closes the group of the copies issued since the last one.
__device__ __forceinline__ void cp_async_commit() {
#if ECHOGRAD_EMULATOR
    emulator::cp_async_commit();
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most Pending of this thread's groups are unfinished. Other threads see the data
// after a barrier that follows.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
#if ECHOGRAD_EMULATOR
    emulator::cp_async_wait(Pending);
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// ---- Tensor cores (sm_80 on); fragments as in the PTX manual ----

#if ECHOGRAD_EMULATOR || __CUDA_ARCH__ >= 750
// Loads Count (1, 2, 4) 8×8 matrices of 16-bit elements from shared memory. Lane i gives the address
// of row i % 8 of matrix i / 8, 16 bytes on a multiple of 16; register m of lane i receives elements
// 2(i % 4) and the next of row i / 4 of matrix m, or of the transposed matrix.
template <int Count, bool Transpose = false>
__device__ __forceinline__ void ldmatrix(unsigned (&fragments)[Count], const void* row) {
    static_assert(Count == 1 || Count == 2 || Count == 4, "sizes of ldmatrix");
#if ECHOGRAD_EMULATOR
    emulator::ldmatrix(fragments, Count, Transpose, row, emulator::Where::current());
#else
    unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
    if constexpr (Count == 1 && !Transpose) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                     : "=r"(fragments[0]) : "r"(from) : "memory");
    } else if constexpr (Count == 1) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                     : "=r"(fragments[0]) : "r"(from) : "memory");
    } else if constexpr (Count == 2 && !Transpose) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(fragments[0]), "=r"(fragments[1]) : "r"(from) : "memory");
    } else if constexpr (Count == 2) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(fragments[0]), "=r"(fragments[1]) : "r"(from) : "memory");
    } else if constexpr (!Transpose) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                     : "r"(from) : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                     : "r"(from) : "memory");
    }
#endif
}
#endif

#if ECHOGRAD_EMULATOR || __CUDA_ARCH__ >= 800
#if ECHOGRAD_EMULATOR
#define ECHOGRAD_MMA(element, instruction) \
    emulator::mma(emulator::Element::element, d, a, b, emulator::Where::current())
#else
#define ECHOGRAD_MMA(element, instruction)                                                       \
    asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"  \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#endif
// d (16×8) += a (16×16, rows) · b (16×8, columns), over one warp.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    ECHOGRAD_MMA(Bf16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
}
__device__ __forceinline__ void mma_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    ECHOGRAD_MMA(F16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
}
// d (16×8) += a (16×8, rows) · b (8×8, columns); operands from to_tf32.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    ECHOGRAD_MMA(Tf32, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef ECHOGRAD_MMA
#endif

// ---- wgmma (sm_90a): products of matrices in shared memory, by a warpgroup ----
//
// A warpgroup is four warps, the first of a number divisible by four. Its products are under way by themselves until
// they are waited for: meanwhile neither their sums nor what they read may be touched. They see shared memory by
// another way (proxy) than threads: whoever wrote what they read calls async_proxy_fence before the barrier.

#if ECHOGRAD_EMULATOR || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ECHOGRAD_WGMMA 1

// What wgmma wants to know of a matrix of 16-bit elements in shared memory. Its eights of rows of Swizzle bytes (64
// or 128), rows of k or, transposed, of the other index, lie without gaps, at a multiple of 8·Swizzle bytes, and the
// vector v of 16 bytes of row r at v ^ (r·Swizzle / 128 % (Swizzle / 16)): those bits of the address decide.
//
//     bits  0–13  address in shared memory             each of the three in units of 16 bytes
//          16–29  leading: from one block of Swizzle bytes to the next along the index that lies along rows
//                 (rows of k have one block, and leading no meaning)
//          32–45  stride: from one eight of rows to the next
//          49–51  0: patterns of the swizzle begin at multiples of their size
//          62–63  1 for rows of 128 bytes, 2 for 64
//
// As of the PTX ISA, "Matrix Descriptor" and "Strides" of wgmma. The next 16 of k are 32 bytes, or transposed two
// eights of rows, further on: added to the address alone.
template <int Swizzle>
__device__ __forceinline__ unsigned long long wgmma_matrix(const void* start, int leading, int stride) {
    static_assert(Swizzle == 64 || Swizzle == 128, "the swizzles in use");
#if ECHOGRAD_EMULATOR
    const unsigned address = emulator::shared_address(start);
#else
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(start));
#endif
    const unsigned low = address / 16 | static_cast<unsigned>(leading / 16) << 16;
    const unsigned high = static_cast<unsigned>(stride / 16) | (Swizzle == 128 ? 1u : 2u) << 30;
    return static_cast<unsigned long long>(high) << 32 | low;
}

// Lets products that begin behind the next barrier see what this thread has written to shared memory.
__device__ __forceinline__ void async_proxy_fence() {
#if ECHOGRAD_EMULATOR
    emulator::async_proxy_fence();
#else
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Goes before products whose sums their threads have touched since the last wait.
__device__ __forceinline__ void wgmma_fence() {
#if ECHOGRAD_EMULATOR
    emulator::wgmma_fence(emulator::Where::current());
#else
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Closes the group of the products begun since the last one.
__device__ __forceinline__ void wgmma_commit() {
#if ECHOGRAD_EMULATOR
    emulator::wgmma_commit(emulator::Where::current());
#else
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most Pending groups are under way.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
#if ECHOGRAD_EMULATOR
    emulator::wgmma_wait(Pending, emulator::Where::current());
#else
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
#endif
}

// Sums that the compiler is to move past neither wgmma_fence nor wgmma_wait.
template <int Count>
__device__ __forceinline__ void hold([[maybe_unused]] float (&sums)[Count][4]) {
#if !ECHOGRAD_EMULATOR
#pragma unroll
    for (int i = 0; i < Count; ++i) {
#pragma unroll
        for (int k = 0; k < 4; ++k) asm volatile("" : "+f"(sums[i][k])::"memory");
    }
#endif
}

#if !ECHOGRAD_EMULATOR
#define ECHOGRAD_NUMBERS_32                                                                        \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ECHOGRAD_NUMBERS_64                                                                        \
    ECHOGRAD_NUMBERS_32 ", "                                                                       \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ECHOGRAD_SUMS_4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define ECHOGRAD_SUMS_32(i)                                                                           \
    ECHOGRAD_SUMS_4(i), ECHOGRAD_SUMS_4(i + 1), ECHOGRAD_SUMS_4(i + 2), ECHOGRAD_SUMS_4(i + 3),       \
        ECHOGRAD_SUMS_4(i + 4), ECHOGRAD_SUMS_4(i + 5), ECHOGRAD_SUMS_4(i + 6), ECHOGRAD_SUMS_4(i + 7)
// Behind the sums: the matrices, that the sums are added to and nothing is negated, and which are transposed.
#define ECHOGRAD_WGMMA_OPERANDS(a, b, transposed) \
    "}, %" #a ", %" #b ", 1, 1, 1, %" #transposed ", %" #transposed ";"
#endif

// d (64×Columns) += a (64×16) · b (16×Columns), bf16, of matrices with rows of k or, transposed, of the other index.
// Warp w of the group has rows 16w to 16w + 15; d[j] are a lane's of columns 8j to 8j + 7, as of mma_bf16.
template <int Columns, bool Transposed = false>
__device__ __forceinline__ void wgmma_bf16(float (&d)[Columns / 8][4], unsigned long long a,
                                           unsigned long long b) {
    static_assert(Columns == 64 || Columns == 128, "the widths in use");
#if ECHOGRAD_EMULATOR
    emulator::wgmma(&d[0][0], Columns, a, b, Transposed, emulator::Where::current());
#else
    if constexpr (Columns == 64) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" ECHOGRAD_NUMBERS_32
                     ECHOGRAD_WGMMA_OPERANDS(32, 33, 34)
                     : ECHOGRAD_SUMS_32(0)
                     : "l"(a), "l"(b), "n"(static_cast<int>(Transposed)));
    } else {
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" ECHOGRAD_NUMBERS_64
                     ECHOGRAD_WGMMA_OPERANDS(64, 65, 66)
                     : ECHOGRAD_SUMS_32(0), ECHOGRAD_SUMS_32(8)
                     : "l"(a), "l"(b), "n"(static_cast<int>(Transposed)));
    }
#endif
}
#if !ECHOGRAD_EMULATOR
#undef ECHOGRAD_NUMBERS_32
#undef ECHOGRAD_NUMBERS_64
#undef ECHOGRAD_SUMS_4
#undef ECHOGRAD_SUMS_32
#undef ECHOGRAD_WGMMA_OPERANDS
#endif
#else
#define ECHOGRAD_WGMMA 0
#endif
