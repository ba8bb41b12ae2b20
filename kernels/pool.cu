// Maximum and average over windows, and bilinear upsampling by two, with their gradients.
//
// A thread computes one unit of one pixel: 16 bytes of channels, or one channel where they are not a multiple
// of that. Neighbouring threads have neighbouring channels, so every access of a warp is of whole lines. Of what
// several threads read, all but the first access is one of the first-level cache. All gradients gather: each
// element of dx is written by the thread that adds it up.
//
// Shares of copy's bandwidth that are predicted: kernels/README.md.
//
// Parameters that all of them have: `count`, units in all; `units`, those of a pixel; `vector`, whether they
// are of 16 bytes, which all addresses are then multiples of. Grid: ceil(count / kThreads) blocks of kThreads.
#include "device.cuh"

constexpr int kThreads = 256;

template <class T>
constexpr int kWidth = 16 / sizeof(T);

// A kernel's body for units of a vector and of one element: f(width) with the width as a type.
template <int n>
struct Width {
    static constexpr int value = n;
};
template <class T, class F>
__device__ __forceinline__ void by_width(int vector, F f) {
    if (vector != 0) {
        f(Width<kWidth<T>>{});
    } else {
        f(Width<1>{});
    }
}

__device__ __forceinline__ size_t thread_index() { return blockIdx.x * size_t(kThreads) + threadIdx.x; }

// Channels channel.. of one pixel of an N×rows×columns×C map.
struct Place {
    size_t image;
    int row, column;
    unsigned channel;
};
// Where unit i lies if the pixels' channels are cut into `units` units of n.
template <int n>
__device__ __forceinline__ Place place_of(size_t i, unsigned units, int rows, int columns) {
    const Division unit = divide(i, units);
    const Division column = divide(unit.quotient, static_cast<unsigned>(columns));
    const Division row = divide(column.quotient, static_cast<unsigned>(rows));
    return {row.quotient, static_cast<int>(row.remainder), static_cast<int>(column.remainder),
            unit.remainder * n};
}
// The offset of a pixel's first element.
__device__ __forceinline__ size_t pixel_offset(size_t image, int row, int column, int rows, int columns,
                                               unsigned channels) {
    return ((image * rows + row) * columns + column) * channels;
}

// Windows along one axis.
struct Axis {
    int kernel, stride, padding;
};
struct Range {
    int begin, end;
};
// The part of window o that lies inside the image, of `size`.
__device__ __forceinline__ Range inside(Axis axis, int o, int size) {
    const int start = o * axis.stride - axis.padding;
    const int end = start + axis.kernel;
    return {start < 0 ? 0 : start, end < size ? end : size};
}
// The windows, of `count`, that position i lies in.
__device__ __forceinline__ Range covering(Axis axis, int i, int count) {
    const int first = i + axis.padding + 1 - axis.kernel;
    const int end = (i + axis.padding) / axis.stride + 1;
    return {first <= 0 ? 0 : (first + axis.stride - 1) / axis.stride, end < count ? end : count};
}
// 2×2 windows that tile the image.
__device__ __forceinline__ bool is_halves(Axis rows, Axis columns) {
    return rows.kernel == 2 && rows.stride == 2 && rows.padding == 0 && columns.kernel == 2 &&
           columns.stride == 2 && columns.padding == 0;
}

#define FOR_EACH_TYPE(kernel) kernel(float, f32) kernel(bf16, bf16)

// ---- Maximum ----

template <int n, class T>
__device__ __forceinline__ void max_pool(Width<n>, const T* x, T* y, size_t count, unsigned units, int h, int w,
                                         int oh, int ow, Axis rows, Axis columns) {
    const size_t i = thread_index();
    if (i >= count) return;
    const unsigned channels = units * n;
    const Place to = place_of<n>(i, units, oh, ow);
    float largest[n];
    if (is_halves(rows, columns)) {
        const T* upper =
            x + pixel_offset(to.image, 2 * to.row, 2 * to.column, h, w, channels) + to.channel;
        const T* lower = upper + static_cast<size_t>(w) * channels;
        const Loaded<T, n> a(upper), b(upper + channels), c(lower), d(lower + channels);
#pragma unroll
        for (int k = 0; k < n; ++k) largest[k] = maximum(maximum(a[k], b[k]), maximum(c[k], d[k]));
    } else {
        const Range r = inside(rows, to.row, h), s = inside(columns, to.column, w);
#pragma unroll
        for (int k = 0; k < n; ++k) largest[k] = -__int_as_float(0x7f800000);
        for (int row = r.begin; row < r.end; ++row) {
            const T* at = x + pixel_offset(to.image, row, s.begin, h, w, channels) + to.channel;
            for (int column = s.begin; column < s.end; ++column, at += channels) {
                const Loaded<T, n> v(at);
#pragma unroll
                for (int k = 0; k < n; ++k) largest[k] = maximum(largest[k], v[k]);
            }
        }
    }
    store_vector(y + i * n, largest);
}

// y = the maximum over windows; padding never wins, NaN always does. h, w: rows and columns of x; oh, ow: of y;
// units are those of y.
#define MAX_POOL2D(T, suffix)                                                                          \
    extern "C" __global__ void __launch_bounds__(kThreads)                                             \
        max_pool2d_##suffix(const T* x, T* y, size_t count, unsigned units, int vector, int h, int w,  \
                            int oh, int ow, int kernel_h, int kernel_w, int stride_h, int stride_w,    \
                            int padding_h, int padding_w) {                                            \
        const Axis rows{kernel_h, stride_h, padding_h}, columns{kernel_w, stride_w, padding_w};        \
        by_width<T>(vector, [&](auto width) {                                                          \
            max_pool(width, x, y, count, units, h, w, oh, ow, rows, columns);                          \
        });                                                                                            \
    }
FOR_EACH_TYPE(MAX_POOL2D)

// A 2×2 cell of dx, of which parts may lie outside: then there is no window.
template <int n, class T, class D>
__device__ __forceinline__ void max_halves_gradient(const T* x, const D* dy, T* dx, Place cell, unsigned channels,
                                                    int h, int w, int oh, int ow) {
    const int row = 2 * cell.row, column = 2 * cell.column;
    const size_t upper = pixel_offset(cell.image, row, column, h, w, channels) + cell.channel;
    const size_t lower = upper + static_cast<size_t>(w) * channels;
    const size_t at[4] = {upper, upper + channels, lower, lower + channels};
    if (cell.row >= oh || cell.column >= ow) {
        const float zeros[n] = {};
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            if (row + p / 2 < h && column + p % 2 < w) store_vector(dx + at[p], zeros);
        }
        return;
    }
    const Loaded<T, n> values[4] = {Loaded<T, n>(x + at[0]), Loaded<T, n>(x + at[1]),
                                    Loaded<T, n>(x + at[2]), Loaded<T, n>(x + at[3])};
    const Loaded<D, n> gradient(dy + pixel_offset(cell.image, cell.row, cell.column, oh, ow, channels) +
                                cell.channel);
    float largest[n];
    bool taken[n];
#pragma unroll
    for (int k = 0; k < n; ++k) {
        largest[k] = maximum(maximum(values[0][k], values[1][k]), maximum(values[2][k], values[3][k]));
        taken[k] = false;
    }
#pragma unroll
    for (int p = 0; p < 4; ++p) {
        float v[n];
#pragma unroll
        for (int k = 0; k < n; ++k) {
            // No element is smaller than NaN: the first one takes it.
            const bool takes = !taken[k] && !(values[p][k] < largest[k]);
            v[k] = takes ? gradient[k] : 0.0f;
            taken[k] = taken[k] || takes;
        }
        store_vector(dx + at[p], v);
    }
}

// The gradient of one pixel: of every window that it lies in, if it is the first of the largest there.
template <int n, class T, class D>
__device__ __forceinline__ void max_gather(const T* x, const D* dy, T* dx, Place at, unsigned channels, int h,
                                           int w, int oh, int ow, Axis rows, Axis columns) {
    const Range r = covering(rows, at.row, oh), s = covering(columns, at.column, ow);
    float total[n] = {};
#pragma unroll 1
    for (int oy = r.begin; oy < r.end; ++oy) {
        const Range window_rows = inside(rows, oy, h);
#pragma unroll 1
        for (int ox = s.begin; ox < s.end; ++ox) {
            const Range window_columns = inside(columns, ox, w);
            const Loaded<D, n> gradient(dy + pixel_offset(at.image, oy, ox, oh, ow, channels) + at.channel);
            const int self = (at.row - window_rows.begin) * columns.kernel + at.column - window_columns.begin;
            float largest[n];
            int first[n];
#pragma unroll
            for (int k = 0; k < n; ++k) {
                largest[k] = -__int_as_float(0x7f800000);
                first[k] = 0;
            }
#pragma unroll 1
            for (int row = window_rows.begin; row < window_rows.end; ++row) {
                const T* from =
                    x + pixel_offset(at.image, row, window_columns.begin, h, w, channels) + at.channel;
                int position = (row - window_rows.begin) * columns.kernel;
#pragma unroll 1
                for (int column = window_columns.begin; column < window_columns.end; ++column) {
                    const Loaded<T, n> v(from);
#pragma unroll
                    for (int k = 0; k < n; ++k) {
                        // NaN is never exceeded, and gives the gradient to the window's first element.
                        if (v[k] > largest[k]) {
                            largest[k] = v[k];
                            first[k] = position;
                        } else if (v[k] != v[k]) {
                            largest[k] = v[k];
                            first[k] = 0;
                        }
                    }
                    from += channels;
                    ++position;
                }
            }
#pragma unroll
            for (int k = 0; k < n; ++k) {
                if (first[k] == self) total[k] += gradient[k];
            }
        }
    }
    store_vector(dx + pixel_offset(at.image, at.row, at.column, h, w, channels) + at.channel, total);
}

// For 2×2 windows that tile the image, units are those of cells of four pixels; else of pixels of x.
template <int n, class T, class D>
__device__ __forceinline__ void max_pool_gradient(Width<n>, const T* x, const D* dy, T* dx, size_t count,
                                                  unsigned units, int h, int w, int oh, int ow, Axis rows,
                                                  Axis columns) {
    const size_t i = thread_index();
    if (i >= count) return;
    if (is_halves(rows, columns)) {
        const Place cell = place_of<n>(i, units, (h + 1) / 2, (w + 1) / 2);
        max_halves_gradient<n>(x, dy, dx, cell, units * n, h, w, oh, ow);
    } else {
        const Place at = place_of<n>(i, units, h, w);
        max_gather<n>(x, dy, dx, at, units * n, h, w, oh, ow, rows, columns);
    }
}

// dx = dy at the first of the largest elements of each window. `dy_narrow`: bf16.
#define MAX_POOL2D_GRADIENT(T, suffix)                                                                 \
    extern "C" __global__ void __launch_bounds__(kThreads)                                             \
        max_pool2d_gradient_##suffix(const T* x, const void* dy, int dy_narrow, T* dx, size_t count,   \
                                     unsigned units, int vector, int h, int w, int oh, int ow,         \
                                     int kernel_h, int kernel_w, int stride_h, int stride_w,           \
                                     int padding_h, int padding_w) {                                   \
        const Axis rows{kernel_h, stride_h, padding_h}, columns{kernel_w, stride_w, padding_w};        \
        by_width<T>(vector, [&](auto width) {                                                          \
            if (dy_narrow != 0) {                                                                      \
                max_pool_gradient(width, x, static_cast<const bf16*>(dy), dx, count, units, h, w, oh,  \
                                  ow, rows, columns);                                                  \
            } else {                                                                                   \
                max_pool_gradient(width, x, static_cast<const float*>(dy), dx, count, units, h, w, oh, \
                                  ow, rows, columns);                                                  \
            }                                                                                          \
        });                                                                                            \
    }
FOR_EACH_TYPE(MAX_POOL2D_GRADIENT)

// ---- Average ----

template <int n, class T>
__device__ __forceinline__ void avg_pool(Width<n>, const T* x, T* y, size_t count, unsigned units, int h, int w,
                                         int oh, int ow, bool gradient, Axis rows, Axis columns) {
    const size_t i = thread_index();
    if (i >= count) return;
    const unsigned channels = units * n;
    const Place to = place_of<n>(i, units, oh, ow);
    const Range r = gradient ? covering(rows, to.row, h) : inside(rows, to.row, h);
    const Range s = gradient ? covering(columns, to.column, w) : inside(columns, to.column, w);
    float sum[n] = {};
    for (int row = r.begin; row < r.end; ++row) {
        const T* at = x + pixel_offset(to.image, row, s.begin, h, w, channels) + to.channel;
        for (int column = s.begin; column < s.end; ++column, at += channels) {
            const Loaded<T, n> v(at);
#pragma unroll
            for (int k = 0; k < n; ++k) sum[k] += v[k];
        }
    }
    const float weight = 1.0f / (static_cast<float>(rows.kernel) * static_cast<float>(columns.kernel));
#pragma unroll
    for (int k = 0; k < n; ++k) sum[k] *= weight;
    store_vector(y + i * n, sum);
}

// y = the average over windows, padding counted as zeros; if `gradient`, y is dx and x is dy: the sum over the
// windows that a pixel lies in, by the same weight. h, w: rows and columns of what is read; oh, ow: of what is
// written, whose units are counted.
#define AVG_POOL2D(T, suffix)                                                                          \
    extern "C" __global__ void __launch_bounds__(kThreads)                                             \
        avg_pool2d_##suffix(const T* x, T* y, int gradient, size_t count, unsigned units, int vector,  \
                            int h, int w, int oh, int ow, int kernel_h, int kernel_w, int stride_h,    \
                            int stride_w, int padding_h, int padding_w) {                              \
        const Axis rows{kernel_h, stride_h, padding_h}, columns{kernel_w, stride_w, padding_w};        \
        by_width<T>(vector, [&](auto width) {                                                          \
            avg_pool(width, x, y, count, units, h, w, oh, ow, gradient != 0, rows, columns);           \
        });                                                                                            \
    }
FOR_EACH_TYPE(AVG_POOL2D)

// ---- Bilinear upsampling by two, between pixel centres, the border repeated ----

// The four results that surround a pixel, from its eight neighbours and itself. `pitch`: channels of a pixel of y,
// the last of which they are.
template <int n, class T>
__device__ __forceinline__ void upsample(const T* x, T* y, const Place& at, unsigned channels, unsigned pitch, int h,
                                         int w) {
    const int rows[3] = {at.row == 0 ? 0 : at.row - 1, at.row, at.row + 1 == h ? at.row : at.row + 1};
    const int left = at.column == 0 ? 0 : -1, right = at.column + 1 == w ? 0 : 1;
    // The three rows, each blended into the left and the right result.
    float blended[3][2][n];
#pragma unroll
    for (int r = 0; r < 3; ++r) {
        const T* from = x + pixel_offset(at.image, rows[r], at.column, h, w, channels) + at.channel;
        const long long step = channels;
        const Loaded<T, n> a(from + left * step), b(from), c(from + right * step);
#pragma unroll
        for (int k = 0; k < n; ++k) {
            const float centre = 0.75f * b[k];
            blended[r][0][k] = fmaf(0.25f, a[k], centre);
            blended[r][1][k] = fmaf(0.25f, c[k], centre);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        T* to = y + pixel_offset(at.image, 2 * at.row + r, 2 * at.column, 2 * h, 2 * w, pitch) +
                (pitch - channels) + at.channel;
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            float v[n];
#pragma unroll
            for (int k = 0; k < n; ++k) v[k] = fmaf(0.25f, blended[2 * r][s][k], 0.75f * blended[1][s][k]);
            store_vector(to + static_cast<size_t>(s) * pitch, v);
        }
    }
}

// Channels at.channel.. of the four pixels of the larger map at `at`, from pixels of from_pitch channels to such
// of to_pitch.
template <int n, class T>
__device__ __forceinline__ void copy_four(const T* from, unsigned from_pitch, T* to, unsigned to_pitch,
                                          const Place& at, int h, int w) {
    using Unit = Vector<T, n>;
    const size_t upper = pixel_offset(at.image, 2 * at.row, 2 * at.column, 2 * h, 2 * w, 1);
    const size_t pixels[4] = {upper, upper + 1, upper + 2 * w, upper + 2 * w + 1};
    Unit units[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        units[k] = *reinterpret_cast<const Unit*>(from + pixels[k] * from_pitch + at.channel);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        *reinterpret_cast<Unit*>(to + pixels[k] * to_pitch + at.channel) = units[k];
    }
}

// y = skip's channels, then those of x with twice its h rows and w columns; units are those of a pixel of y, of
// which the first `skip_units`, or none, are copied.
#define UPSAMPLE2X(T, suffix)                                                                              \
    extern "C" __global__ void __launch_bounds__(kThreads)                                                 \
        upsample2x_##suffix(const T* x, const T* skip, T* y, size_t count, unsigned units,                 \
                            unsigned skip_units, int vector, int h, int w) {                               \
        by_width<T>(vector, [&](auto width) {                                                              \
            constexpr int n = decltype(width)::value;                                                      \
            const size_t i = thread_index();                                                               \
            if (i >= count) return;                                                                        \
            Place at = place_of<n>(i, units, h, w);                                                        \
            const unsigned before = skip_units * n, pitch = units * n;                                     \
            if (at.channel < before) {                                                                     \
                copy_four<n>(skip, before, y, pitch, at, h, w);                                            \
            } else {                                                                                       \
                at.channel -= before;                                                                      \
                upsample<n>(x, y, at, pitch - before, pitch, h, w);                                        \
            }                                                                                              \
        });                                                                                                \
    }
FOR_EACH_TYPE(UPSAMPLE2X)

// The pixels of an axis of 2·size that pixel i contributes to, with weights ¼, ¾, ¾, ¼; at the border, where a
// pixel stands for its missing neighbour too, one of them occurs twice.
struct Taps {
    int at[4];
    __device__ __forceinline__ Taps(int i, int size)
        : at{i == 0 ? 0 : 2 * i - 1, 2 * i, 2 * i + 1, i + 1 == size ? 2 * i + 1 : 2 * i + 2} {}
    static __device__ __forceinline__ float weight(int k) { return k == 0 || k == 3 ? 0.25f : 0.75f; }
};

// `pitch`: channels of a pixel of dy, whose last are those of dx.
template <int n, class T>
__device__ __forceinline__ void upsample_gradient(const T* dy, T* dx, const Place& at, unsigned channels,
                                                  unsigned pitch, int h, int w) {
    const Taps rows(at.row, h), columns(at.column, w);
    float sum[n] = {};
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const T* row = dy + pixel_offset(at.image, rows.at[r], 0, 2 * h, 2 * w, pitch) + (pitch - channels) +
                       at.channel;
        float line[n] = {};
#pragma unroll
        for (int s = 0; s < 4; ++s) {
            const Loaded<T, n> v(row + static_cast<size_t>(columns.at[s]) * pitch);
#pragma unroll
            for (int k = 0; k < n; ++k) line[k] = fmaf(Taps::weight(s), v[k], line[k]);
        }
#pragma unroll
        for (int k = 0; k < n; ++k) sum[k] = fmaf(Taps::weight(r), line[k], sum[k]);
    }
    store_vector(dx + pixel_offset(at.image, at.row, at.column, h, w, channels) + at.channel, sum);
}

// dskip and dx from dy, which has the channels of both and twice dx's h rows and w columns; units are those of a
// pixel of dy, of which the first `skip_units`, or none, are dskip's.
#define UPSAMPLE2X_GRADIENT(T, suffix)                                                                     \
    extern "C" __global__ void __launch_bounds__(kThreads)                                                 \
        upsample2x_gradient_##suffix(const T* dy, T* dx, T* dskip, size_t count, unsigned units,           \
                                     unsigned skip_units, int vector, int h, int w) {                      \
        by_width<T>(vector, [&](auto width) {                                                              \
            constexpr int n = decltype(width)::value;                                                      \
            const size_t i = thread_index();                                                               \
            if (i >= count) return;                                                                        \
            Place at = place_of<n>(i, units, h, w);                                                        \
            const unsigned before = skip_units * n, pitch = units * n;                                     \
            if (at.channel < before) {                                                                     \
                copy_four<n>(dy, pitch, dskip, before, at, h, w);                                          \
            } else {                                                                                       \
                at.channel -= before;                                                                      \
                upsample_gradient<n>(dy, dx, at, pitch - before, pitch, h, w);                             \
            }                                                                                              \
        });                                                                                                \
    }
FOR_EACH_TYPE(UPSAMPLE2X_GRADIENT)
