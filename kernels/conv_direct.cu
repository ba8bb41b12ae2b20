// Convolution and its gradients as their definitions have them, one thread or a few for each element of the
// result: for a handful of pixels, where a second launch would cost more than the work (the layers between vectors
// of a batch), for what conv.cu does not serve (a kernel of more than 11 rows, an image of 2^31 elements, x and dy in different
// storage), and what conv.cu is compared with.
//
//     y[n, i, j, o] = Σ x[n, i·sh + r − ph, j·sw + s − pw, c] · w[o, r, s, c]
//
// All tensors NHWC, weights and their gradient f32, channels before columns before rows before images. Sums are
// f32 and run over (r, s, c), (r, s, o) or the pixels of a piece in this order; with several lanes an element, each
// takes every lanes-th channel, and they are added in a fixed order. Each element's operands come from the caches, so this is
// bound by loads: two for each product, shared by a warp where one operand has no channels of its own.
#include "device.cuh"
#include "epilogue.cuh"

constexpr int kThreads = 256;

// What all three take: rows, columns and channels of x and y; rows and columns of the kernel, stride, padding.
#define GEOMETRY int h, int w, int c, int oh, int ow, int o, int kh, int kw, int sh, int sw, int ph, int pw

__device__ __forceinline__ size_t at(size_t image, int row, int column, int rows, int columns, int channels) {
    return ((image * rows + row) * columns + column) * channels;
}

// A pixel of a batch of images, from its number.
struct Pixel {
    size_t image;
    int row, column;

    __device__ __forceinline__ Pixel(size_t i, int rows, int columns) {
        const Division by_column = divide(i, columns), by_row = divide(by_column.quotient, rows);
        image = by_row.quotient;
        row = by_row.remainder;
        column = by_column.remainder;
    }
};

// Which element a thread works on, and as which of the lanes, a power of two, that share it.
struct Share {
    size_t element;
    int lane;
    __device__ __forceinline__ explicit Share(int lanes) {
        const size_t i = static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x;
        element = i / static_cast<unsigned>(lanes);
        lane = threadIdx.x & (lanes - 1);
    }
};
__device__ __forceinline__ float add_lanes(float sum, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
    return sum;
}

// y = activation(x ∗ w + bias), of len elements; bias may be null. Grid: ceil(len · lanes / kThreads) blocks of
// kThreads. Any alignment.
template <class T>
__device__ __forceinline__ void convolve(const T* x, const float* weights, const float* bias, T* y, size_t len,
                                         int lanes, int activation, GEOMETRY) {
    const Share share(lanes);
    const size_t i = share.element;
    float sum = 0.0f;
    if (i < len) {
        const Division channel = divide(i, o);
        const Pixel pixel(channel.quotient, oh, ow);
        const int top = pixel.row * sh - ph, left = pixel.column * sw - pw;
        const float* v = weights + static_cast<size_t>(channel.remainder) * kh * kw * c;
        for (int r = 0; r < kh; ++r) {
            if (top + r < 0 || top + r >= h) continue;
            for (int s = 0; s < kw; ++s) {
                if (left + s < 0 || left + s >= w) continue;
                const T* u = x + at(pixel.image, top + r, left + s, h, w, c);
                const float* tap = v + static_cast<size_t>(r * kw + s) * c;
                for (int k = share.lane; k < c; k += lanes) sum = fmaf(to_float(u[k]), tap[k], sum);
            }
        }
        if (bias != nullptr && share.lane == 0) sum += bias[channel.remainder];
    }
    sum = add_lanes(sum, lanes);
    if (i < len && share.lane == 0) {
        with_activation(activation, [&](auto a) { y[i] = from_float<T>(a.apply(sum)); });
    }
}

// dx, of len elements, from dy: dx[n, i·sh + r − ph, j·sw + s − pw, c] = Σ dy[n, i, j, o] · w[o, r, s, c].
// Grid: ceil(len · lanes / kThreads) blocks of kThreads. Any alignment.
// The lanes of an element lie elements apart, so that neighbouring threads read neighbouring channels of w.
template <class T>
__device__ __forceinline__ void input_gradient(const T* dy, const float* weights, T* dx, size_t len, int lanes,
                                               GEOMETRY) {
    SHARED(float, sums, kThreads);
    const int elements = kThreads / lanes, own = threadIdx.x % elements, lane = threadIdx.x / elements;
    const size_t i = static_cast<size_t>(blockIdx.x) * elements + own;
    float sum = 0.0f;
    if (i < len) {
        const Division channel = divide(i, c);
        const Pixel pixel(channel.quotient, h, w);
        const size_t step = static_cast<size_t>(kh) * kw * c;
        for (int r = 0; r < kh; ++r) {
            const int row = pixel.row + ph - r;
            if (row < 0 || row % sh != 0 || row / sh >= oh) continue;
            for (int s = 0; s < kw; ++s) {
                const int column = pixel.column + pw - s;
                if (column < 0 || column % sw != 0 || column / sw >= ow) continue;
                const T* u = dy + at(pixel.image, row / sh, column / sw, oh, ow, o);
                const float* v = weights + static_cast<size_t>(r * kw + s) * c + channel.remainder;
                for (int k = lane; k < o; k += lanes) sum = fmaf(to_float(u[k]), v[k * step], sum);
            }
        }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (i < len && lane == 0) {
        for (int k = 1; k < lanes; ++k) sum += sums[own + k * elements];
        dx[i] = from_float<T>(sum);
    }
}

// Mean and variance (over N, not N − 1) of each channel of y, as stored, by a block each.
// Grid: o blocks of kThreads. Any alignment.
template <class T>
__device__ __forceinline__ void statistics(const T* y, float* mean, float* variance, size_t pixels, int o) {
    SHARED(double, sums, kThreads / 32);
    SHARED(double, squares, kThreads / 32);
    double sum = 0.0, square = 0.0;
    for (size_t i = threadIdx.x; i < pixels; i += kThreads) sum += to_float(y[i * o + blockIdx.x]);
    const double m = block_reduce<kThreads>(sum, &sums[0], Sum{}) / static_cast<double>(pixels);
    for (size_t i = threadIdx.x; i < pixels; i += kThreads) {
        const double off = to_float(y[i * o + blockIdx.x]) - m;
        square += off * off;
    }
    square = block_reduce<kThreads>(square, &squares[0], Sum{});
    if (threadIdx.x == 0) {
        mean[blockIdx.x] = static_cast<float>(m);
        variance[blockIdx.x] = static_cast<float>(square / static_cast<double>(pixels));
    }
}

// The part of dw, of len elements, that is due to the output pixels of piece blockIdx.y:
// dw[o, r, s, c] = Σ dy[n, i, j, o] · x[n, i·sh + r − ph, j·sw + s − pw, c], and behind it that of a bias,
// db[o] = Σ dy[n, i, j, o].
template <class X, class Y>
__device__ __forceinline__ void weight_gradient(const X* x, const Y* dy, float* dw, float* db, size_t len,
                                                size_t pixels, size_t piece, GEOMETRY) {
    const size_t i = static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= len) {
        const size_t channel = i - len;
        if (db == nullptr || channel >= static_cast<size_t>(o)) return;
        const Y* from = dy + channel;
        float sum = 0.0f;
#pragma unroll 4
        for (int left = static_cast<int>(pixels); left > 0; --left, from += o) sum += to_float(*from);
        db[channel] = sum;
        return;
    }
    const Division in = divide(i, c), column = divide(in.quotient, kw), row = divide(column.quotient, kh);
    const int top = static_cast<int>(row.remainder) - ph, left = static_cast<int>(column.remainder) - pw;
    const size_t first = blockIdx.y * piece;
    const size_t count = pixels - first < piece ? pixels - first : piece;
    Pixel pixel(first, oh, ow);
    float sum = 0.0f;
    for (size_t k = 0; k < count; ++k) {
        const int y = pixel.row * sh + top, z = pixel.column * sw + left;
        if (y >= 0 && y < h && z >= 0 && z < w) {
            const X u = x[at(pixel.image, y, z, h, w, c) + in.remainder];
            sum = fmaf(to_float(u), to_float(dy[(first + k) * o + row.quotient]), sum);
        }
        if (++pixel.column == ow) {
            pixel.column = 0;
            if (++pixel.row == oh) {
                pixel.row = 0;
                ++pixel.image;
            }
        }
    }
    dw[blockIdx.y * len + i] = sum;
}

// Of the weight gradient: Grid (ceil(len / kThreads), ceil(pixels / piece)) blocks of kThreads, or of len + o where db
// is not null, all pixels then being one piece; dw has len elements
// for each piece of as many output pixels, to be added by conv_add_pieces. dy may be stored unlike x (`dy_narrow`:
// bf16). Any alignment.
#define CONV_DIRECT(T, suffix)                                                                            \
    extern "C" __global__ void __launch_bounds__(kThreads)                                                \
        conv_direct_##suffix(const T* x, const float* weights, const float* bias, T* y, size_t len,       \
                             int lanes, int activation, GEOMETRY) {                                       \
        convolve(x, weights, bias, y, len, lanes, activation, h, w, c, oh, ow, o, kh, kw, sh, sw, ph,     \
                 pw);                                                                                     \
    }                                                                                                     \
    extern "C" __global__ void __launch_bounds__(kThreads)                                                \
        conv_direct_statistics_##suffix(const T* y, float* mean, float* variance, size_t pixels, int o) { \
        statistics(y, mean, variance, pixels, o);                                                         \
    }                                                                                                     \
    extern "C" __global__ void __launch_bounds__(kThreads)                                                \
        conv_direct_input_gradient_##suffix(const T* dy, const float* weights, T* dx, size_t len,         \
                                            int lanes, GEOMETRY) {                                        \
        input_gradient(dy, weights, dx, len, lanes, h, w, c, oh, ow, o, kh, kw, sh, sw, ph, pw);                 \
    }                                                                                                     \
    extern "C" __global__ void __launch_bounds__(kThreads)                                                \
        conv_direct_weight_gradient_##suffix(const T* x, const void* dy, int dy_narrow, float* dw,        \
                                             float* db, size_t len, size_t pixels, size_t piece,          \
                                             GEOMETRY) {                                                  \
        if (dy_narrow != 0) {                                                                             \
            weight_gradient(x, static_cast<const bf16*>(dy), dw, db, len, pixels, piece, h, w, c, oh, ow, \
                            o, kh, kw, sh, sw, ph, pw);                                                   \
        } else {                                                                                          \
            weight_gradient(x, static_cast<const float*>(dy), dw, db, len, pixels, piece, h, w, c, oh, ow, \
                            o, kh, kw, sh, sw, ph, pw);                                                   \
        }                                                                                                 \
    }
CONV_DIRECT(float, f32)
CONV_DIRECT(bf16, bf16)

// dw[i] = Σ over the pieces of what they have for element i, each a table of `len` elements that are rows of
// `padded` of which the first `channels` count; eight warps add in order, and their sums are then added in f64.
// Grid: ceil(elements / 32) blocks of kThreads. Any alignment.
extern "C" __global__ void __launch_bounds__(kThreads)
conv_add_pieces(const float* partials, float* dw, size_t elements, size_t len, int pieces, int channels,
                int padded) {
    constexpr int warps = kThreads / 32;
    SHARED(double, sums, warps, 32);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const size_t i = static_cast<size_t>(blockIdx.x) * 32 + lane;
    double sum = 0.0;
    if (i < elements) {
        const Division row = divide(i, channels);
        const float* from = partials + row.quotient * padded + row.remainder;
#pragma unroll 4
        for (int piece = warp; piece < pieces; piece += warps) sum += from[piece * len];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && i < elements) {
#pragma unroll
        for (int k = 1; k < warps; ++k) sum += sums[k][lane];
        dw[i] = static_cast<float>(sum);
    }
}
