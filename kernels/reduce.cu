// Column sums: the gradient of an operand that was broadcast over rows.
//
// x is a row-major matrix of C columns for each group (all rows of a tensor, or those of one image).
// Its elements are walked as a stream: a block takes as many whole vectors at a step as make whole rows,
// so that a thread keeps its columns from step to step, and adds them up in registers. Rows too wide for
// that are cut into strips of columns. The block's threads then add up in shared memory, by a tree, what
// belongs to the same column, and the sums of a piece of kSteps steps or more go to memory, where a second
// kernel adds the pieces in f64. Pieces depend on sizes alone. A single piece is its own result.
//
// Bytes an element: 4 f32, 2 bf16, twice that for sums of products. Of partial sums, less than 1/16 of that
// is written and read again. Predicted: 90 % of copy's bandwidth from 32 MB on, bound by launches and
// latency (about 5 µs) below 4 MB.
#include "device.cuh"

constexpr int kThreads = 256;
// Steps whose loads a thread has under way, written out below.
constexpr int kUnroll = 4;

template <class T>
constexpr int kWidth = 16 / sizeof(T);

// Adds up the n sums of each thread, of columns column .. column + n of a step of `stride` elements, which
// is a whole number of rows (the threads' columns are then taken modulo channels) or one row, of which the
// block has a strip. `shared` has room for a step.
template <int n, class T>
__device__ __forceinline__ void combine(const T (&sums)[n], T* shared, float* out, unsigned column,
                                        unsigned stride, unsigned channels) {
    if (stride == channels && channels > kThreads * n) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
            if (column + i < channels) out[column + i] = static_cast<float>(sums[i]);
        }
        return;
    }
    if (column < stride) {
#pragma unroll
        for (int i = 0; i < n; ++i) shared[column + i] = sums[i];
    }
    __syncthreads();
    for (unsigned rows = stride / channels; rows > 1;) {
        const unsigned half = (rows + 1) / 2;
        for (unsigned i = threadIdx.x; i < (rows - half) * channels; i += kThreads) {
            shared[i] += shared[i + half * channels];
        }
        __syncthreads();
        rows = half;
    }
    for (unsigned i = threadIdx.x; i < channels; i += kThreads) out[i] = static_cast<float>(shared[i]);
}

// What is added up: elements of a, or products with those of b.
template <class A, class B, int n>
struct Product {
    Loaded<A, n> a;
    Loaded<B, n> b;
    __device__ __forceinline__ Product(const A* x, const B* y) : a(x), b(y) {}
    __device__ __forceinline__ float add(int i, float sum) const { return fmaf(a[i], b[i], sum); }
    static __device__ __forceinline__ float add_one(const A* x, const B* y, float sum) {
        return fmaf(to_float(*x), to_float(*y), sum);
    }
};
struct Nothing {};
template <class A, int n>
struct Product<A, Nothing, n> {
    Loaded<A, n> a;
    __device__ __forceinline__ Product(const A* x, const Nothing*) : a(x) {}
    __device__ __forceinline__ float add(int i, float sum) const { return sum + a[i]; }
    static __device__ __forceinline__ float add_one(const A* x, const Nothing*, float sum) {
        return sum + to_float(*x);
    }
};

// Adds to total[i] the elements at + i, at + i + stride, ... below end, where `width` of a thread's columns
// exist.
template <int n, class A, class B>
__device__ __forceinline__ void add_columns(float (&total)[n], const A* a, const B* b, size_t at, size_t end,
                                            size_t stride, int width) {
    using Term = Product<A, B, n>;
    const bool vector = width == n && stride % n == 0 && is_aligned<16>(a) && is_aligned<16>(b);
    if (vector) {
        for (; at + (kUnroll - 1) * stride + n <= end; at += kUnroll * stride) {
            const Term terms[kUnroll] = {Term(a + at, b + at), Term(a + at + stride, b + at + stride),
                                         Term(a + at + 2 * stride, b + at + 2 * stride),
                                         Term(a + at + 3 * stride, b + at + 3 * stride)};
#pragma unroll
            for (int k = 0; k < kUnroll; ++k) {
#pragma unroll
                for (int i = 0; i < n; ++i) total[i] = terms[k].add(i, total[i]);
            }
        }
    }
#pragma unroll 1
    for (; at < end; at += stride) {
        if (vector && at + n <= end) {
            const Term term(a + at, b + at);
#pragma unroll
            for (int i = 0; i < n; ++i) total[i] = term.add(i, total[i]);
        } else {
            const int count = end - at < static_cast<size_t>(width) ? static_cast<int>(end - at) : width;
#pragma unroll
            for (int i = 0; i < n; ++i) {
                if (i >= count) break;
                total[i] = Term::add_one(a + at + i, b + at + i, total[i]);
            }
        }
    }
}

// sums[group][piece][c] = Σ a, or Σ a·b, over the rows of a piece, of column c.
//
// len: elements of a group; stride: elements of a step, a multiple of channels and of kWidth and at most
// kThreads * kWidth, or channels where that is impossible; b_storage: 0 without b, 1 for f32, 2 for bf16.
// Grid: groups * pieces * strips blocks of kThreads, strips = ceil(stride / (kThreads * kWidth)). Any
// alignment.
template <class T>
__device__ __forceinline__ void partial_sums(const T* a, const void* b, int b_storage, float* sums,
                                             size_t len, unsigned channels, unsigned stride,
                                             unsigned strips, unsigned pieces, unsigned steps) {
    constexpr int n = kWidth<T>;
    SHARED(float, shared, kThreads * n);
    const unsigned strip = blockIdx.x % strips, piece = blockIdx.x / strips % pieces;
    const size_t group = blockIdx.x / strips / pieces;
    const unsigned column = (strip * kThreads + threadIdx.x) * n;
    const size_t begin = static_cast<size_t>(piece) * steps * stride;
    const size_t part = static_cast<size_t>(steps) * stride;
    const size_t end = len - begin < part ? len : begin + part;
    float total[n] = {};
    if (column < stride) {
        const int width = stride - column < n ? static_cast<int>(stride - column) : n;
        const size_t at = begin + column, from = group * len;
        if (b_storage == 0) {
            const Nothing* none = nullptr;
            add_columns(total, a + from, none, at, end, stride, width);
        } else if (b_storage == 1) {
            add_columns(total, a + from, static_cast<const float*>(b) + from, at, end, stride, width);
        } else {
            add_columns(total, a + from, static_cast<const bf16*>(b) + from, at, end, stride, width);
        }
    }
    combine(total, &shared[0], sums + (group * pieces + piece) * channels, column, stride, channels);
}

#define SUM_TO(T, suffix)                                                                        \
    extern "C" __global__ void __launch_bounds__(kThreads, 4)                                    \
        sum_to_##suffix(const T* a, const void* b, int b_storage, float* sums, size_t len,       \
                        unsigned channels, unsigned stride, unsigned strips, unsigned pieces,    \
                        unsigned steps) {                                                        \
        partial_sums(a, b, b_storage, sums, len, channels, stride, strips, pieces, steps);       \
    }
SUM_TO(float, f32)
SUM_TO(bf16, bf16)

// sums[group][c] = Σ partials[group][piece][c] over the pieces, in f64.
// stride: the most rows of `channels` that kThreads elements hold, in elements, or channels if that is
// more. Grid: groups * strips blocks of kThreads, strips = ceil(stride / kThreads).
extern "C" __global__ void __launch_bounds__(kThreads)
sum_to_finish(const float* partials, float* sums, unsigned channels, unsigned stride, unsigned strips,
              unsigned pieces) {
    SHARED(double, shared, kThreads);
    const unsigned column = blockIdx.x % strips * kThreads + threadIdx.x;
    const size_t group = blockIdx.x / strips, len = static_cast<size_t>(pieces) * channels;
    double total[1] = {};
    if (column < stride) {
#pragma unroll 4
        for (size_t at = column; at < len; at += stride) total[0] += partials[group * len + at];
    }
    combine(total, &shared[0], sums + group * channels, column, stride, channels);
}
