// Operations on single elements, all bound by memory: each thread moves 16 bytes of every tensor.
//
// y may be x itself (in place): a thread reads its elements before it writes them, and no pointer is
// `__restrict__`. Any length and alignment: the last vector, and tensors whose addresses are no
// multiple of 16, go element by element.
#include "device.cuh"

constexpr int kThreads = 256;

// Elements of a thread.
template <class T>
constexpr int kWidth = 16 / sizeof(T);

// y[i] = f(x[i]) for i < len. Grid: ceil(len / (kWidth * kThreads)) blocks of kThreads.
template <class T, class F>
__device__ __forceinline__ void map(const T* x, T* y, size_t len, F f) {
    constexpr int n = kWidth<T>;
    const size_t at = (static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x) * n;
    if (at >= len) return;
    if (len - at >= n && is_aligned<16>(x) && is_aligned<16>(y)) {
        Vector<T, n> v = *reinterpret_cast<const Vector<T, n>*>(x + at);
#pragma unroll
        for (int i = 0; i < n; ++i) v.at[i] = from_float<T>(f(to_float(v.at[i])));
        *reinterpret_cast<Vector<T, n>*>(y + at) = v;
    } else {
        for (size_t i = at; i < len && i < at + n; ++i) y[i] = from_float<T>(f(to_float(x[i])));
    }
}

#define FOR_EACH_TYPE(kernel) kernel(float, f32) kernel(bf16, bf16)

// y = x.
#define COPY(T, suffix)                                                                          \
    extern "C" __global__ void __launch_bounds__(kThreads)                                       \
        copy_##suffix(const T* x, T* y, size_t len) {                                            \
        map(x, y, len, [](float v) { return v; });                                               \
    }
FOR_EACH_TYPE(COPY)

// y = factor * x.
#define SCALE(T, suffix)                                                                         \
    extern "C" __global__ void __launch_bounds__(kThreads)                                       \
        scale_##suffix(const T* x, T* y, size_t len, float factor) {                             \
        map(x, y, len, [factor](float v) { return factor * v; });                                \
    }
FOR_EACH_TYPE(SCALE)
