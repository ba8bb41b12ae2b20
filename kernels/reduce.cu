// Column sums: the gradient of an operand that was broadcast over rows, averages of images, and the gradients of
// gates, which are column or row sums beside a product.
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

// n elements a thread with the gaps of `combine`.
template <int n>
constexpr int kSpread = kThreads * n / 32 * 33;

// Adds up the n sums of each thread, of columns column .. column + n of a step of `stride` elements, which
// is a whole number of rows (the threads' columns are then taken modulo channels) or one row, of which the
// block has a strip. `shared` has room for a step, with a gap after every 32 elements, so that the n elements of
// each thread go to banks of their own.
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
    auto at = [&](unsigned i) -> T& { return shared[i + i / 32]; };
    if (column < stride) {
#pragma unroll
        for (int i = 0; i < n; ++i) at(column + i) = sums[i];
    }
    __syncthreads();
    for (unsigned rows = stride / channels; rows > 1;) {
        const unsigned half = (rows + 1) / 2;
        for (unsigned i = threadIdx.x; i < (rows - half) * channels; i += kThreads) {
            at(i) += at(i + half * channels);
        }
        __syncthreads();
        rows = half;
    }
    for (unsigned i = threadIdx.x; i < channels; i += kThreads) out[i] = static_cast<float>(at(i));
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
    SHARED(float, shared, kSpread<n>);
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
    SHARED(double, shared, kSpread<1>);
    const unsigned column = blockIdx.x % strips * kThreads + threadIdx.x;
    const size_t group = blockIdx.x / strips, len = static_cast<size_t>(pieces) * channels;
    double total[1] = {};
    if (column < stride) {
#pragma unroll 4
        for (size_t at = column; at < len; at += stride) total[0] += partials[group * len + at];
    }
    combine(total, &shared[0], sums + group * channels, column, stride, channels);
}

// A column's sum over the pieces of partials[group][piece][c], in f64, for 32 columns by a block: its warps take
// pieces in turn.
struct Column {
    // group * channels + c; only threads of `mine` have one.
    size_t at;
    double sum;
    bool mine;
};
__device__ __forceinline__ Column add_pieces(const float* partials, unsigned channels, unsigned strips,
                                             unsigned pieces) {
    constexpr unsigned warps = kThreads / 32;
    SHARED(double, shared, warps, 32);
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const unsigned c = blockIdx.x % strips * 32 + lane;
    const size_t group = blockIdx.x / strips;
    double sum = 0.0;
    if (c < channels) {
        const float* from = partials + group * pieces * channels + c;
#pragma unroll 8
        for (unsigned piece = warp; piece < pieces; piece += warps) {
            sum += from[static_cast<size_t>(piece) * channels];
        }
    }
    shared[warp][lane] = sum;
    __syncthreads();
    if (warp == 0) {
#pragma unroll
        for (unsigned i = 1; i < warps; ++i) sum += shared[i][lane];
    }
    return {group * channels + c, sum, warp == 0 && c < channels};
}

// y[group][c] = factor · Σ partials[group][piece][c] over the pieces: the averages of images.
// Grid: groups * strips blocks of kThreads, strips = ceil(channels / 32).
#define MEAN_OF_PIECES(T, suffix)                                                                \
    extern "C" __global__ void __launch_bounds__(kThreads)                                       \
        mean_of_pieces_##suffix(const float* partials, T* y, unsigned channels, unsigned strips, \
                                unsigned pieces, double factor) {                                \
        const Column column = add_pieces(partials, channels, strips, pieces);                    \
        if (column.mine) y[column.at] = from_float<T>(static_cast<float>(factor * column.sum));  \
    }
MEAN_OF_PIECES(float, f32)
MEAN_OF_PIECES(bf16, bf16)

// ---- The gradient of gates of channels ----

// Steps whose loads a thread has under way, written out below.
constexpr int kGateUnroll = 2;

// Walks as add_columns does: dx = gate·dy, and adds dy·x.
template <int n, class T, class X>
__device__ __forceinline__ void gate_columns(float (&total)[n], const float (&gate)[n], const T* dy, const X* x,
                                             T* dx, size_t at, size_t end, size_t stride, int width) {
    struct Both {
        Loaded<T, n> dy;
        Loaded<X, n> x;
    };
    auto load = [&](size_t from) { return Both{Loaded<T, n>(dy + from), Loaded<X, n>(x + from)}; };
    auto finish = [&](const Both& both, size_t to) {
        float v[n];
#pragma unroll
        for (int i = 0; i < n; ++i) {
            v[i] = gate[i] * both.dy[i];
            total[i] = fmaf(both.dy[i], both.x[i], total[i]);
        }
        store_vector(dx + to, v);
    };
    const bool vector =
        width == n && stride % n == 0 && is_aligned<16>(dy) && is_aligned<16>(x) && is_aligned<16>(dx);
    if (vector) {
        for (; at + (kGateUnroll - 1) * stride + n <= end; at += kGateUnroll * stride) {
            const Both one = load(at), two = load(at + stride);
            finish(one, at);
            finish(two, at + stride);
        }
    }
#pragma unroll 1
    for (; at < end; at += stride) {
        if (vector && at + n <= end) {
            finish(load(at), at);
        } else {
            const int count = end - at < static_cast<size_t>(width) ? static_cast<int>(end - at) : width;
#pragma unroll
            for (int i = 0; i < n; ++i) {
                if (i >= count) break;
                const float gradient = to_float(dy[at + i]);
                total[i] = fmaf(gradient, to_float(x[at + i]), total[i]);
                dx[at + i] = from_float<T>(gate[i] * gradient);
            }
        }
    }
}

// dx = dy·σ(z), z with one row of channels a group, and sums[group][piece][c] = Σ dy·x; parameters and grid as
// for partial_sums, dx may be dy. Bytes an element: 12 f32, 6 bf16; predicted: 90 % of copy's bandwidth.
template <class T, class X>
__device__ __forceinline__ void gate_gradient(const T* dy, const X* x, Elements z, T* dx, float* sums, size_t len,
                                              unsigned channels, unsigned stride, unsigned strips,
                                              unsigned pieces, unsigned steps) {
    constexpr int n = kWidth<T>;
    SHARED(float, shared, kSpread<n>);
    const unsigned strip = blockIdx.x % strips, piece = blockIdx.x / strips % pieces;
    const size_t group = blockIdx.x / strips / pieces;
    const unsigned column = (strip * kThreads + threadIdx.x) * n;
    const size_t begin = static_cast<size_t>(piece) * steps * stride;
    const size_t part = static_cast<size_t>(steps) * stride;
    const size_t end = len - begin < part ? len : begin + part;
    float total[n] = {};
    if (column < stride) {
        const int width = stride - column < n ? static_cast<int>(stride - column) : n;
        float gate[n];
#pragma unroll
        for (int i = 0; i < n; ++i) {
            gate[i] = i < width ? sigmoid(z.get(group * channels + (column + i) % channels)).value : 0.0f;
        }
        const size_t from = group * len;
        gate_columns(total, gate, dy + from, x + from, dx + from, begin + column, end, stride, width);
    }
    combine(total, &shared[0], sums + (group * pieces + piece) * channels, column, stride, channels);
}

#define GATE_GRADIENT(T, suffix)                                                                 \
    extern "C" __global__ void __launch_bounds__(kThreads, 3)                                    \
        gate_rows_gradient_##suffix(const T* dy, const void* x, int x_narrow, void* z, int z_narrow, \
                                    T* dx, float* sums, size_t len, unsigned channels,           \
                                    unsigned stride, unsigned strips, unsigned pieces,           \
                                    unsigned steps) {                                            \
        const Elements logits{z, z_narrow != 0};                                                 \
        if (x_narrow != 0) {                                                                     \
            gate_gradient(dy, static_cast<const bf16*>(x), logits, dx, sums, len, channels,      \
                          stride, strips, pieces, steps);                                        \
        } else {                                                                                 \
            gate_gradient(dy, static_cast<const float*>(x), logits, dx, sums, len, channels,     \
                          stride, strips, pieces, steps);                                        \
        }                                                                                        \
    }
GATE_GRADIENT(float, f32)
GATE_GRADIENT(bf16, bf16)

// dz = σ(z)·σ(−z)·Σ partials[group][piece][c] over the pieces. Grid: as for mean_of_pieces.
#define GATE_ROWS_LOGITS_GRADIENT(T, suffix)                                                     \
    extern "C" __global__ void __launch_bounds__(kThreads)                                       \
        gate_rows_logits_gradient_##suffix(const float* partials, const T* z, T* dz,             \
                                           unsigned channels, unsigned strips, unsigned pieces) { \
        const Column column = add_pieces(partials, channels, strips, pieces);                    \
        if (column.mine) {                                                                       \
            const Sigmoid s = sigmoid(to_float(z[column.at]));                                   \
            dz[column.at] = from_float<T>(s.value * s.complement * static_cast<float>(column.sum)); \
        }                                                                                        \
    }
GATE_ROWS_LOGITS_GRADIENT(float, f32)
GATE_ROWS_LOGITS_GRADIENT(bf16, bf16)

// ---- The gradient of gates of pixels ----

// The lanes of a pixel go along its channels, unit by unit of n, and add up by shuffles.
template <int n, class T, class X>
__device__ __forceinline__ void gate_pixels(const T* dy, const X* x, Elements z, T* dx, Elements dz, size_t pixels,
                                            unsigned units, int lanes) {
    const Division place = divide(blockIdx.x * size_t(kThreads) + threadIdx.x, static_cast<unsigned>(lanes));
    const size_t pixel = place.quotient;
    float sum = 0.0f;
    Sigmoid s{};
    if (pixel < pixels) {
        s = sigmoid(z.get(pixel));
        for (unsigned unit = place.remainder; unit < units; unit += lanes) {
            const size_t at = (pixel * units + unit) * n;
            const Loaded<T, n> gradient(dy + at);
            const Loaded<X, n> values(x + at);
            float v[n];
#pragma unroll
            for (int i = 0; i < n; ++i) {
                v[i] = s.value * gradient[i];
                sum = fmaf(gradient[i], values[i], sum);
            }
            store_vector(dx + at, v);
        }
    }
    for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
    if (pixel < pixels && place.remainder == 0) dz.set(pixel, s.value * s.complement * sum);
}

// By units of a vector or of one element.
template <class T, class X>
__device__ __forceinline__ void gate_pixels_by(int vector, const T* dy, const X* x, Elements z, T* dx, Elements dz,
                                               size_t pixels, unsigned units, int lanes) {
    if (vector != 0) {
        gate_pixels<kWidth<T>>(dy, x, z, dx, dz, pixels, units, lanes);
    } else {
        gate_pixels<1>(dy, x, z, dx, dz, pixels, units, lanes);
    }
}

// dx = dy·σ(z), z with one element a pixel, and dz = σ(z)·σ(−z)·Σ dy·x over a pixel's channels; dx may be dy.
// units: those of a pixel, of 16 bytes if `vector` (all addresses are then multiples of that), else of one
// channel; lanes: those of a pixel, a power of two up to 32. Bytes an element: 12 f32, 6 bf16; predicted: 90 % of
// copy's bandwidth. Grid: ceil(pixels * lanes / kThreads) blocks of kThreads.
#define GATE_PIXELS_GRADIENT(T, suffix)                                                          \
    extern "C" __global__ void __launch_bounds__(kThreads)                                       \
        gate_pixels_gradient_##suffix(const T* dy, const void* x, int x_narrow, void* z,         \
                                      int z_narrow, T* dx, void* dz, int dz_narrow,              \
                                      size_t pixels, unsigned units, int vector, int lanes) {    \
        const Elements logits{z, z_narrow != 0}, gradients{dz, dz_narrow != 0};                  \
        if (x_narrow != 0) {                                                                     \
            gate_pixels_by(vector, dy, static_cast<const bf16*>(x), logits, dx, gradients,       \
                           pixels, units, lanes);                                                \
        } else {                                                                                 \
            gate_pixels_by(vector, dy, static_cast<const float*>(x), logits, dx, gradients,      \
                           pixels, units, lanes);                                                \
        }                                                                                        \
    }
GATE_PIXELS_GRADIENT(float, f32)
GATE_PIXELS_GRADIENT(bf16, bf16)
