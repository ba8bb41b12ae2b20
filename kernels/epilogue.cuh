// What becomes of a tensor's values while a kernel has them in registers: the activation, and statistics of
// each channel. To be included behind device.cuh.
//
// Statistics follow Chan, Golub & LeVeque (1983): a few values of a channel have mean and squared deviations of
// their own, which are merged with those before; so are threads, and the pieces of blocks. Nothing is ever the
// difference of large sums.
#pragma once

// ---- The activation ----

// σ(u) of relative accuracy 2⁻¹⁷ down to −88, 0 below; NaN for NaN.
__device__ __forceinline__ float logistic(float u) {
    return fast_reciprocal(1.0f + fast_exp2(-1.44269504f * u));
}

// a(u) and dy·a′(u).
struct Identity {
    static __device__ __forceinline__ float apply(float u) { return u; }
    static __device__ __forceinline__ float gradient(float, float dy) { return dy; }
};
struct Relu {
    static __device__ __forceinline__ float apply(float u) { return u < 0.0f ? 0.0f : u; }
    static __device__ __forceinline__ float gradient(float u, float dy) { return u > 0.0f ? dy : 0.0f; }
};
struct Silu {
    static __device__ __forceinline__ float apply(float u) { return u * logistic(u); }
    static __device__ __forceinline__ float gradient(float u, float dy) {
        const float s = logistic(u);
        return dy * (s * fmaf(u, 1.0f - s, 1.0f));
    }
};

// Calls f with the activation of that number: Activation::number in src/ops/activation.rs.
template <class F>
__device__ __forceinline__ void with_activation(int activation, F f) {
    if (activation == 0) {
        f(Identity{});
    } else if (activation == 1) {
        f(Relu{});
    } else {
        f(Silu{});
    }
}

// ---- Numbers of the columns of a block ----

// K numbers for each of Threads * n columns, those of a thread one after another and padded, so that
// neighbouring threads are in different banks.
template <int Threads, int n, int K>
using Slots = float[K][Threads * (n + 1)];

template <int n>
__device__ __forceinline__ unsigned slot(unsigned column) {
    return column + column / n;
}

// Merges the numbers of columns that are `width` apart, of `all` columns, by a tree: merge(a, b) puts those of b
// into a. Then calls write(column, numbers) for each of the `width`.
template <int Threads, int n, int K, class Merge, class Write>
__device__ __forceinline__ void fold(float (&slots)[K][Threads * (n + 1)], unsigned all, unsigned width,
                                     Merge merge, Write write) {
    __syncthreads();
    for (unsigned rows = all / width; rows > 1;) {
        const unsigned half = (rows + 1) / 2;
        for (unsigned i = threadIdx.x; i < (rows - half) * width; i += Threads) {
            float a[K], b[K];
#pragma unroll
            for (int k = 0; k < K; ++k) {
                a[k] = slots[k][slot<n>(i)];
                b[k] = slots[k][slot<n>(i + half * width)];
            }
            merge(a, b);
#pragma unroll
            for (int k = 0; k < K; ++k) slots[k][slot<n>(i)] = a[k];
        }
        __syncthreads();
        rows = half;
    }
    for (unsigned i = threadIdx.x; i < width; i += Threads) {
        float a[K];
#pragma unroll
        for (int k = 0; k < K; ++k) a[k] = slots[k][slot<n>(i)];
        write(i, a);
    }
}

struct Add {
    template <int K>
    __device__ __forceinline__ void operator()(float (&a)[K], const float (&b)[K]) const {
#pragma unroll
        for (int k = 0; k < K; ++k) a[k] += b[k];
    }
};

// ---- Statistics ----

// Of the values that a thread has seen of n channels, as many of each: their mean and Σ (x − mean)².
template <int n>
struct Statistics {
    float seen = 0.0f;
    float mean[n] = {}, squares[n] = {};

    // One more value of channel i; `weight` is 1 / (seen + 1). The caller counts.
    __device__ __forceinline__ void add_one(int i, float x, float weight) {
        const float before = x - mean[i];
        mean[i] = fmaf(before, weight, mean[i]);
        squares[i] = fmaf(before, x - mean[i], squares[i]);
    }
    // One more value x(i) of each channel.
    template <class X>
    __device__ __forceinline__ void add(X x) {
        const float weight = __fdividef(1.0f, seen + 1.0f);
#pragma unroll
        for (int i = 0; i < n; ++i) add_one(i, x(i), weight);
        seen += 1.0f;
    }
    // Four more values x(k, i) of each channel.
    template <class X>
    __device__ __forceinline__ void add_four(X x) {
        const float weight = __fdividef(4.0f, seen + 4.0f), product = seen * weight;
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const float centre = 0.25f * ((x(0, i) + x(1, i)) + (x(2, i) + x(3, i)));
            float own = 0.0f;
#pragma unroll
            for (int k = 0; k < 4; ++k) own = fmaf(x(k, i) - centre, x(k, i) - centre, own);
            const float apart = centre - mean[i];
            mean[i] = fmaf(apart, weight, mean[i]);
            squares[i] += fmaf(apart * apart, product, own);
        }
        seen += 4.0f;
    }
    // Takes them from there again: volatile, or compilers keep them in registers after all.
    template <int Size>
    __device__ __forceinline__ void load(const volatile float (&slots)[3][Size], unsigned thread) {
        seen = slots[0][thread * (n + 1)];
#pragma unroll
        for (int i = 0; i < n; ++i) {
            mean[i] = slots[1][thread * (n + 1) + i];
            squares[i] = slots[2][thread * (n + 1) + i];
        }
    }
    // Puts them where `fold` finds those of a thread.
    template <int Size>
    __device__ __forceinline__ void store(float (&slots)[3][Size], unsigned thread) const {
#pragma unroll
        for (int i = 0; i < n; ++i) {
            slots[0][thread * (n + 1) + i] = seen;
            slots[1][thread * (n + 1) + i] = mean[i];
            slots[2][thread * (n + 1) + i] = squares[i];
        }
    }
};

// Merges two of (count, mean, Σ (x − mean)²), of which either may be empty.
struct MergeStatistics {
    __device__ __forceinline__ void operator()(float (&a)[3], const float (&b)[3]) const {
        const float count = a[0] + b[0], apart = b[1] - a[1];
        const float weight = count > 0.0f ? __fdividef(b[0], count) : 0.0f;
        a[1] = fmaf(apart, weight, a[1]);
        a[2] += fmaf(apart * apart, a[0] * weight, b[2]);
        a[0] = count;
    }
};

// Where the pair of a channel of a piece of a segment is: partials[segment][piece][channel]. A multiple of 8.
template <class Pointer>
__device__ __forceinline__ Pointer partial(Pointer partials, unsigned segment, unsigned pieces, unsigned piece,
                                           unsigned channels, unsigned channel) {
    return partials + 2 * ((static_cast<size_t>(segment) * pieces + piece) * channels + channel);
}

__device__ __forceinline__ void store_pair(float* to, float a, float b) {
    *reinterpret_cast<Vector<float, 2>*>(to) = {{a, b}};
}
