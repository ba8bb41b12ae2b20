// CUDA C++ on the CPU, as far as the kernels of this folder use it.
//
// build.rs force-includes this file before every kernel file, compiled by the host's C++ compiler.
// It declares what a CUDA compiler has built in; the definitions are in runtime.cpp, which is built
// without instrumentation: whatever touches memory on behalf of a kernel without being the kernel
// belongs there. `ECHOGRAD_SCAN` leaves the keywords alone, so that build.rs can find the kernels
// in preprocessed text.
#pragma once
#define ECHOGRAD_EMULATOR 1

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#ifndef ECHOGRAD_SCAN
#define __global__ __attribute__((noinline))
#define __launch_bounds__(...)
#endif
#define __device__
#define __host__
#define __constant__ const
#define __restrict__ __restrict
#define __align__(bytes) alignas(bytes)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __shared__ static_assert(false, "shared memory is declared by SHARED or DYNAMIC_SHARED of device.cuh");

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

#define ECHOGRAD_VECTOR(type, name)                                                             \
    struct alignas(2 * sizeof(type)) name##2 {                                                  \
        type x, y;                                                                              \
    };                                                                                          \
    struct alignas(4 * sizeof(type)) name##4 {                                                  \
        type x, y, z, w;                                                                        \
    };                                                                                          \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                            \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
ECHOGRAD_VECTOR(float, float)
ECHOGRAD_VECTOR(int, int)
ECHOGRAD_VECTOR(unsigned, uint)
ECHOGRAD_VECTOR(unsigned short, ushort)
ECHOGRAD_VECTOR(unsigned char, uchar)
#undef ECHOGRAD_VECTOR

namespace emulator {

// Where a barrier or collective was called: threads that meet must have called the same one.
using Where = std::source_location;

enum class Vote : int { Any, All, Ballot, MatchAny };
enum class Shuffle : int { Index, Up, Down, Xor };
enum class Reduce : int { Add, Min, Max, MinSigned, MaxSigned, And, Or, Xor };
enum class Atomic : int { Add, Min, Max, MinSigned, MaxSigned, And, Or, Xor, Exchange, Swap };
enum class Element : int { Bf16, F16, Tf32 };

// One of the two is constant for a thread and one for a launch, so calls may be merged.
[[gnu::const]] uint3 thread_index();
[[gnu::const]] uint3 block_index();
[[gnu::const]] dim3 block_size();
[[gnu::const]] dim3 grid_size();

// Two calls stay two, each with its line: Clang would make one of calls in both arms of an `if`.
#if __has_attribute(nomerge)
#define ECHOGRAD_CALL __attribute__((nomerge))
#else
#define ECHOGRAD_CALL
#endif

// Waits for the block; returns for how many threads `predicate` held.
ECHOGRAD_CALL int barrier(bool predicate, const char* name, Where where);
ECHOGRAD_CALL void warp_barrier(unsigned mask, Where where);
ECHOGRAD_CALL uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t bits, int operand, int width, Where where);
ECHOGRAD_CALL unsigned vote(Vote kind, unsigned mask, uint64_t value, Where where);
ECHOGRAD_CALL unsigned reduce(Reduce kind, unsigned mask, unsigned value, Where where);
// `bytes` is 4 or 8; returns the old value.
uint64_t atomic(Atomic kind, void* address, int bytes, uint64_t value, uint64_t compare);
void fence();
[[noreturn]] void trap();

// The array of this declaration in the block's shared memory, made at first sight.
void* shared_array(const void* identity, const char* name, size_t bytes, Where where);
void* dynamic_shared(size_t element);

void cp_async(void* shared, const void* global, int bytes, int valid);
void cp_async_commit();
void cp_async_wait(int pending_groups);
ECHOGRAD_CALL void ldmatrix(unsigned* fragments, int matrices, bool transpose, const void* row, Where where);
// D += A·B on one warp: 16×8×16 for 16-bit elements, 16×8×8 for tf32.
ECHOGRAD_CALL void mma(Element element, float* d, const unsigned* a, const unsigned* b, Where where);
// An address as wgmma's descriptors have it.
unsigned shared_address(const void* shared);
void async_proxy_fence();
ECHOGRAD_CALL void wgmma_fence(Where where);
// D += A·B of bf16 on a warpgroup, 64×columns×16, matrices by their descriptors; `d` is read and written until the wait.
ECHOGRAD_CALL void wgmma(float* d, int columns, uint64_t a, uint64_t b, bool transposed, Where where);
ECHOGRAD_CALL void wgmma_commit(Where where);
ECHOGRAD_CALL void wgmma_wait(int pending_groups, Where where);

template <class T>
uint64_t to_bits(T value) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    if constexpr (sizeof(T) == 4) {
        return __builtin_bit_cast(uint32_t, value);
    } else {
        return __builtin_bit_cast(uint64_t, value);
    }
}
template <class T>
T from_bits(uint64_t bits) {
    if constexpr (sizeof(T) == 4) {
        return __builtin_bit_cast(T, static_cast<uint32_t>(bits));
    } else {
        return __builtin_bit_cast(T, bits);
    }
}

// How build.rs lists a kernel: its parameters are unpacked from `void**` as cuLaunchKernel does.
struct Entry {
    const char* name;
    void (*run)(void* const* arguments);
    unsigned max_threads;  // __launch_bounds__, or 1024
    unsigned parameters;
    const unsigned* sizes;  // bytes of each parameter
};

template <auto Kernel>
struct Launch;
template <class... P, void (*Kernel)(P...)>
struct Launch<Kernel> {
    static constexpr unsigned count = sizeof...(P);
    static constexpr unsigned sizes[count + 1] = {sizeof(P)..., 0};
    template <size_t... I>
    __attribute__((no_sanitize("thread"), no_sanitize("address"))) static void unpack(
        void* const* arguments, std::index_sequence<I...>) {
        Kernel(*static_cast<std::remove_const_t<P>*>(arguments[I])...);
    }
    __attribute__((no_sanitize("thread"), no_sanitize("address"))) static void run(
        void* const* arguments) {
        unpack(arguments, std::make_index_sequence<count>());
    }
};

}  // namespace emulator

#define ECHOGRAD_KERNEL(name, ...)                                                              \
    extern "C" constexpr emulator::Entry echograd_kernel_##name = {                             \
        #name, emulator::Launch<&name>::run, ECHOGRAD_FIRST(__VA_ARGS__),                       \
        emulator::Launch<&name>::count, emulator::Launch<&name>::sizes};
#define ECHOGRAD_FIRST(...) ECHOGRAD_FIRST_(__VA_ARGS__, )
#define ECHOGRAD_FIRST_(first, ...) first

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())
constexpr int warpSize = 32;

__forceinline__ void __syncthreads(emulator::Where where = emulator::Where::current()) {
    emulator::barrier(false, "__syncthreads", where);
}
__forceinline__ int __syncthreads_count(int predicate, emulator::Where where = emulator::Where::current()) {
    return emulator::barrier(predicate != 0, "__syncthreads_count", where);
}
__forceinline__ int __syncthreads_or(int predicate, emulator::Where where = emulator::Where::current()) {
    return emulator::barrier(predicate != 0, "__syncthreads_or", where) != 0;
}
__forceinline__ int __syncthreads_and(int predicate, emulator::Where where = emulator::Where::current()) {
    return emulator::barrier(predicate == 0, "__syncthreads_and", where) == 0;
}
__forceinline__ void __syncwarp(unsigned mask = ~0u, emulator::Where where = emulator::Where::current()) {
    emulator::warp_barrier(mask, where);
}
__forceinline__ void __threadfence() { emulator::fence(); }
__forceinline__ void __threadfence_block() {}
[[noreturn]] __forceinline__ void __trap() { emulator::trap(); }

#define ECHOGRAD_SHUFFLE(name, kind, type)                                                      \
    template <class T>                                                                          \
    __forceinline__ T name(unsigned mask, T value, type operand, int width = 32,                                \
           emulator::Where where = emulator::Where::current()) {                                \
        return emulator::from_bits<T>(emulator::shuffle(emulator::Shuffle::kind, mask,          \
            emulator::to_bits(value), static_cast<int>(operand), width, where));                \
    }
ECHOGRAD_SHUFFLE(__shfl_sync, Index, int)
ECHOGRAD_SHUFFLE(__shfl_up_sync, Up, unsigned)
ECHOGRAD_SHUFFLE(__shfl_down_sync, Down, unsigned)
ECHOGRAD_SHUFFLE(__shfl_xor_sync, Xor, int)
#undef ECHOGRAD_SHUFFLE

__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate, emulator::Where where = emulator::Where::current()) {
    return emulator::vote(emulator::Vote::Ballot, mask, predicate != 0, where);
}
__forceinline__ int __any_sync(unsigned mask, int predicate, emulator::Where where = emulator::Where::current()) {
    return emulator::vote(emulator::Vote::Any, mask, predicate != 0, where) != 0;
}
__forceinline__ int __all_sync(unsigned mask, int predicate, emulator::Where where = emulator::Where::current()) {
    return emulator::vote(emulator::Vote::All, mask, predicate != 0, where) != 0;
}
template <class T>
__forceinline__ unsigned __match_any_sync(unsigned mask, T value, emulator::Where where = emulator::Where::current()) {
    return emulator::vote(emulator::Vote::MatchAny, mask, emulator::to_bits(value), where);
}

#define ECHOGRAD_REDUCE(name, of_unsigned, of_signed)                                           \
    __forceinline__ unsigned name(unsigned mask, unsigned value,                                         \
                         emulator::Where where = emulator::Where::current()) {                  \
        return emulator::reduce(emulator::Reduce::of_unsigned, mask, value, where);             \
    }                                                                                           \
    __forceinline__ int name(unsigned mask, int value,                                                   \
                    emulator::Where where = emulator::Where::current()) {                       \
        return static_cast<int>(emulator::reduce(emulator::Reduce::of_signed, mask,             \
                                                 static_cast<unsigned>(value), where));         \
    }
ECHOGRAD_REDUCE(__reduce_add_sync, Add, Add)
ECHOGRAD_REDUCE(__reduce_min_sync, Min, MinSigned)
ECHOGRAD_REDUCE(__reduce_max_sync, Max, MaxSigned)
#undef ECHOGRAD_REDUCE
#define ECHOGRAD_REDUCE(name, kind)                                                             \
    __forceinline__ unsigned name(unsigned mask, unsigned value,                                         \
                         emulator::Where where = emulator::Where::current()) {                  \
        return emulator::reduce(emulator::Reduce::kind, mask, value, where);                    \
    }
ECHOGRAD_REDUCE(__reduce_and_sync, And)
ECHOGRAD_REDUCE(__reduce_or_sync, Or)
ECHOGRAD_REDUCE(__reduce_xor_sync, Xor)
#undef ECHOGRAD_REDUCE

// Integers only: the order of floating-point atomics is not defined, and results must be.
#define ECHOGRAD_ATOMIC(name, kind, type)                                                       \
    __forceinline__ type name(type* address, type value) {                                               \
        return static_cast<type>(emulator::atomic(emulator::Atomic::kind, address,              \
                                                  sizeof(type), static_cast<uint64_t>(value), 0)); \
    }
ECHOGRAD_ATOMIC(atomicAdd, Add, int)
ECHOGRAD_ATOMIC(atomicAdd, Add, unsigned)
ECHOGRAD_ATOMIC(atomicAdd, Add, unsigned long long)
ECHOGRAD_ATOMIC(atomicMin, MinSigned, int)
ECHOGRAD_ATOMIC(atomicMin, Min, unsigned)
ECHOGRAD_ATOMIC(atomicMax, MaxSigned, int)
ECHOGRAD_ATOMIC(atomicMax, Max, unsigned)
ECHOGRAD_ATOMIC(atomicAnd, And, unsigned)
ECHOGRAD_ATOMIC(atomicOr, Or, unsigned)
ECHOGRAD_ATOMIC(atomicXor, Xor, unsigned)
ECHOGRAD_ATOMIC(atomicExch, Exchange, int)
ECHOGRAD_ATOMIC(atomicExch, Exchange, unsigned)
#undef ECHOGRAD_ATOMIC
__forceinline__ unsigned atomicCAS(unsigned* address, unsigned compare, unsigned value) {
    return static_cast<unsigned>(
        emulator::atomic(emulator::Atomic::Swap, address, sizeof(unsigned), value, compare));
}

template <class T>
__forceinline__ T __ldg(const T* address) { return *address; }
template <class T>
__forceinline__ T __ldcs(const T* address) { return *address; }
template <class T>
__forceinline__ T __ldcg(const T* address) { return *address; }
template <class T>
__forceinline__ void __stcs(T* address, T value) { *address = value; }
template <class T>
__forceinline__ void __stcg(T* address, T value) { *address = value; }

__forceinline__ float __expf(float x) { return expf(x); }
__forceinline__ float __logf(float x) { return logf(x); }
__forceinline__ float __fdividef(float x, float y) { return x / y; }
__forceinline__ float __frcp_rn(float x) { return 1.0f / x; }
__forceinline__ float __fsqrt_rn(float x) { return sqrtf(x); }
__forceinline__ float __fmul_rn(float x, float y) { return x * y; }
__forceinline__ float __fadd_rn(float x, float y) { return x + y; }
__forceinline__ double __dmul_rn(double x, double y) { return x * y; }
__forceinline__ double __dadd_rn(double x, double y) { return x + y; }
__forceinline__ float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
__forceinline__ float rsqrtf(float x) { return 1.0f / sqrtf(x); }
__forceinline__ void sincospif(float x, float* s, float* c) {
    *s = static_cast<float>(sin(M_PI * static_cast<double>(x)));
    *c = static_cast<float>(cos(M_PI * static_cast<double>(x)));
}
__forceinline__ float __uint_as_float(unsigned bits) { return __builtin_bit_cast(float, bits); }
__forceinline__ float __int_as_float(int bits) { return __builtin_bit_cast(float, bits); }
__forceinline__ unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
__forceinline__ int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
__forceinline__ int __popc(unsigned x) { return __builtin_popcount(x); }
__forceinline__ int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
__forceinline__ int __ffs(int x) { return __builtin_ffs(x); }
__forceinline__ unsigned __umulhi(unsigned x, unsigned y) {
    return static_cast<unsigned>((static_cast<uint64_t>(x) * y) >> 32);
}
__forceinline__ unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    return static_cast<unsigned long long>((static_cast<unsigned __int128>(x) * y) >> 64);
}

__forceinline__ int min(int x, int y) { return x < y ? x : y; }
__forceinline__ int max(int x, int y) { return x > y ? x : y; }
__forceinline__ unsigned min(unsigned x, unsigned y) { return x < y ? x : y; }
__forceinline__ unsigned max(unsigned x, unsigned y) { return x > y ? x : y; }
__forceinline__ long long min(long long x, long long y) { return x < y ? x : y; }
__forceinline__ long long max(long long x, long long y) { return x > y ? x : y; }
__forceinline__ unsigned long long min(unsigned long long x, unsigned long long y) { return x < y ? x : y; }
__forceinline__ unsigned long long max(unsigned long long x, unsigned long long y) { return x > y ? x : y; }
__forceinline__ float min(float x, float y) { return fminf(x, y); }
__forceinline__ float max(float x, float y) { return fmaxf(x, y); }
