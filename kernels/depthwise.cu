// Depthwise convolution, every channel with a kernel of its own, and its gradients. Tensors are N×H×W×C,
// weights C×kh×kw in f32. See src/ops/depthwise_conv2d.rs for the mathematics.
//
// The fast kernels serve kernels of 3×3 and 5×5, stride 1 and 2, the padding that keeps the extent, and channels
// that are whole vectors of 16 bytes. Threads go along channels first, kAcross vectors side by side (128 bytes),
// then along pixels. A thread computes some neighbouring pixels of a row: what it reads of an input row serves
// all of them, and the weights of a tap, which a block keeps in shared memory in f32, are read once for them.
// Rows of the input are read again for each row of the kernel, from the first-level cache: neighbouring rows
// belong to the same block. The input gradient at stride 1 is the same correlation with the weights turned round;
// at stride 2 each pixel of dx sees the taps of its parity. In the weight gradient a thread has one row of the
// kernel, so that its sums fit into registers, and walks along rows of the output.
//
// Instructions of a warp for 16 bytes a lane of the output (of dy, in the weight gradient), from the machine code
// of sm_90a, against the 192 that an H200 issues while as much moves in and out, and the share of the bandwidth
// of a copy that this predicts; with statistics about 25 instructions more:
//
//     stride 1                 multiply-adds   all in bf16   predicted, bf16 / f32
//     depthwise_k3             72              185           90 / 95 %
//     depthwise_k5             200             430           45 / 80 %
//     weight gradient 3×3      72              225           80 / 90 %
//     weight gradient 5×5      200             570           33 / 65 %
//
// A 5×5 kernel is bound by instructions in bf16: 200 multiply-adds in f32 alone take as long as the copy.
//
// The simple kernels, a thread for a channel and some pixels, serve everything else and say most plainly what is
// computed.
#include "device.cuh"
#include "epilogue.cuh"

constexpr int kThreads = 256;
// Most vectors of a block along channels.
constexpr int kAcross = 8;
// Warps of a block that adds up pieces, each of which takes every so manieth piece.
constexpr int kFinishWarps = 16;

// Elements of a vector.
template <class T>
constexpr int kWidth = 16 / sizeof(T);

// Pixels of a thread along a row: as many as the registers hold with the columns that they see.
template <class T, int S>
constexpr int kPixels = sizeof(T) == 2 && S == 2 ? 2 : 4;
// Those of the weight gradient, which keeps the sums of a row of the kernel too.
template <class T, int K>
constexpr int kWeightPixels = sizeof(T) == 2 && K == 5 ? 2 : 4;

// The extents of a convolution from x to y.
struct Extents {
    int images, height, width;  // of x
    int rows, columns;          // of y
    unsigned channels;
};

// A vector of a tensor, or zeros outside of it.
template <class T>
struct Pixel {
    Vector<unsigned, 4> words;

    __device__ __forceinline__ void load(const T* x, bool inside) {
        words = {};
        if (inside) words = *reinterpret_cast<const Vector<unsigned, 4>*>(x);
    }
    // Of words, not of halves of them, which compilers would cut out first and then widen.
    __device__ __forceinline__ float operator[](int i) const {
        if (sizeof(T) == 4) return __uint_as_float(words.at[i]);
        const unsigned word = words.at[i / 2];
        return __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
    }
};

// The weights of a block's channels, in f32: those of tap and vector at [tap][part][vector][4], parts of four
// being what a thread reads at once. Between taps lie four floats, so that a warp, which loads weights with taps
// side by side, does not write all of them to one bank.
template <class T, int K>
struct Weights {
    static constexpr int n = kWidth<T>;
    static constexpr int kSize = K * K * (kAcross * n + 4);
    const float* shared;
    unsigned across;

    // Loads them from w, turned round if `flip`. Every thread of the block must call it.
    __device__ __forceinline__ Weights(float* to, const float* w, unsigned first, unsigned channels,
                                       unsigned across, bool flip)
        : shared(to), across(across) {
        const unsigned count = across * n;
        for (unsigned i = threadIdx.x; i < count * (K * K); i += kThreads) {
            const unsigned channel = i / (K * K), tap = i % (K * K), part = channel % n / 4;
            const unsigned at = (flip ? K * K - 1 - tap : tap) * (across * n + 4) + part * (across * 4);
            const bool exists = first + channel < channels;
            to[at + channel / n * 4 + channel % 4] =
                exists ? w[static_cast<size_t>(first) * (K * K) + i] : 0.0f;
        }
        __syncthreads();
    }
    __device__ __forceinline__ void load(int tap, unsigned vector, float (&v)[n]) const {
#pragma unroll
        for (int part = 0; part < n / 4; ++part) {
            const Loaded<float, 4> four(shared + tap * (across * n + 4) + (part * across + vector) * 4);
#pragma unroll
            for (int i = 0; i < 4; ++i) v[4 * part + i] = four[i];
        }
    }
};

// What a thread of a fast kernel computes of a tensor of `rows` × `columns`: `pixels` columns of `deep` rows.
// Grid: pieces * strips blocks of kThreads; a piece is as many groups of such pixels as a block holds.
struct Place {
    unsigned strip, piece, vector, channel;
    int image, row, column;
    bool exists;

    __device__ __forceinline__ Place(unsigned channels, int images, int rows, int columns, unsigned across,
                                     unsigned strips, int deep, int pixels, int n) {
        strip = blockIdx.x % strips;
        piece = blockIdx.x / strips;
        vector = threadIdx.x % across;
        channel = (strip * across + vector) * n;
        const unsigned groups = kThreads / across, group = threadIdx.x / across;
        const unsigned along = (columns + pixels - 1) / pixels, down = (rows + deep - 1) / deep;
        const unsigned at = piece * groups + group;
        image = static_cast<int>(at / along / down);
        row = static_cast<int>(at / along % down) * deep;
        column = static_cast<int>(at % along) * pixels;
        exists = group < groups && channel < channels && image < images;
    }
};

// ---- y = a(x ∗ w + b) ----

template <class T, int K, int S, bool kStatistics>
__device__ __forceinline__ void correlate(const T* x, const float* w, const float* bias, T* y, float* partials,
                                          float* counts, const Extents& e, unsigned across, unsigned strips,
                                          int deep, bool flip, int activation) {
    constexpr int n = kWidth<T>, P = kPixels<T, S>, kColumns = (P - 1) * S + K;
    using W = Weights<T, K>;
    SHARED(float, shared, W::kSize);
    const Place place(e.channels, e.images, e.rows, e.columns, across, strips, deep, P, n);
    const W weights(&shared[0], w, place.strip * across * n, e.channels, across, flip);
    SHARED(float, slots, 3, kStatistics ? kThreads * (n + 1) : 1);
    if constexpr (kStatistics) Statistics<n>().store(slots, threadIdx.x);
    const int last = place.exists ? min(place.row + deep, e.rows) : 0;
#pragma unroll 1
    for (int row = place.row; row < last; ++row) {
        float sums[P][n] = {};
        const int top = row * S - K / 2, left = place.column * S - K / 2;
#pragma unroll 1
        for (int r = 0; r < K; ++r) {
            if (static_cast<unsigned>(top + r) >= static_cast<unsigned>(e.height)) continue;
            const T* from = x + (static_cast<size_t>(place.image * e.height + top + r) * e.width + left) *
                                    e.channels + place.channel;
            Pixel<T> pixels[kColumns];
#pragma unroll
            for (int k = 0; k < kColumns; ++k) {
                const bool inside = static_cast<unsigned>(left + k) < static_cast<unsigned>(e.width);
                pixels[k].load(from + static_cast<size_t>(k) * e.channels, inside);
            }
#pragma unroll
            for (int s = 0; s < K; ++s) {
                float tap[n];
                weights.load(r * K + s, place.vector, tap);
#pragma unroll
                for (int k = 0; k < P; ++k) {
#pragma unroll
                    for (int i = 0; i < n; ++i) sums[k][i] = fmaf(pixels[k * S + s][i], tap[i], sums[k][i]);
                }
            }
        }
        if (bias != nullptr) {
            const Loaded<float, n> b(bias + place.channel);
            with_activation(activation, [&](auto a) {
#pragma unroll
                for (int k = 0; k < P; ++k) {
#pragma unroll
                    for (int i = 0; i < n; ++i) sums[k][i] = a.apply(sums[k][i] + b[i]);
                }
            });
        }
        T* to = y + (static_cast<size_t>(place.image * e.rows + row) * e.columns + place.column) * e.channels +
                place.channel;
        const bool whole = place.column + P <= e.columns;
#pragma unroll
        for (int k = 0; k < P; ++k) {
            if (whole || place.column + k < e.columns) {
                store_vector(to + static_cast<size_t>(k) * e.channels, sums[k]);
            }
        }
        if constexpr (kStatistics) {
            // They wait in shared memory: registers are short while pixels are added up.
            Statistics<n> statistics;
            statistics.load(slots, threadIdx.x);
            if (P == 4 && whole) {
                statistics.add_four([&](int k, int i) { return sums[k % P][i]; });
            } else {
#pragma unroll
                for (int k = 0; k < P; ++k) {
                    if (place.column + k < e.columns) statistics.add([&](int i) { return sums[k][i]; });
                }
            }
            statistics.store(slots, threadIdx.x);
        }
    }
    if constexpr (kStatistics) {
        const unsigned width = across * n;
        fold<kThreads, n>(slots, kThreads / across * width, width, MergeStatistics{},
                          [&](unsigned column, const float (&a)[3]) {
                              const unsigned channel = place.strip * width + column;
                              if (channel >= e.channels) return;
                              if (channel == 0) counts[place.piece] = a[0];
                              store_pair(partial(partials, 0, 0, place.piece, e.channels, channel), a[1], a[2]);
                          });
    }
}

#define FOR_EACH_TYPE(kernel) kernel(float, f32) kernel(bf16, bf16)
#define FOR_EACH_SHAPE(kernel, T, suffix)                                                        \
    kernel(T, suffix, 3, 1) kernel(T, suffix, 3, 2) kernel(T, suffix, 5, 1) kernel(T, suffix, 5, 2)

#define EXTENTS_PARAMETERS                                                                       \
    int images, int height, int width, int rows, int columns, unsigned channels
#define EXTENTS Extents{images, height, width, rows, columns, channels}

// y = x ∗ w, or a(x ∗ w + bias) unless bias is null; with flip, weights are turned round: the input gradient of a
// convolution of stride 1, where x is dy. Grid as for `Place` over y; all pointers are multiples of 16.
#define DEPTHWISE(T, suffix, K, S)                                                               \
    extern "C" __global__ void __launch_bounds__(kThreads, 2)                                    \
        depthwise_k##K##_s##S##_##suffix(const T* x, const float* w, const float* bias, T* y,    \
                                         int flip, int activation, EXTENTS_PARAMETERS,           \
                                         unsigned across, unsigned strips, int deep) {           \
        correlate<T, K, S, false>(x, w, bias, y, nullptr, nullptr, EXTENTS, across, strips, deep, \
                                  flip != 0, activation);                                        \
    }
#define FOR_DEPTHWISE(T, suffix) FOR_EACH_SHAPE(DEPTHWISE, T, suffix)
FOR_EACH_TYPE(FOR_DEPTHWISE)

// y = x ∗ w, and partials[piece][channel] = mean and Σ (y − mean)² of the counts[piece] values of a channel in a
// piece, before they are rounded. Grid and pointers as above, and 8 bytes of partials.
#define DEPTHWISE_STATISTICS(T, suffix, K, S)                                                    \
    extern "C" __global__ void __launch_bounds__(kThreads, 2)                                    \
        depthwise_statistics_k##K##_s##S##_##suffix(const T* x, const float* w, T* y,            \
                                                    float* partials, float* counts,              \
                                                    EXTENTS_PARAMETERS, unsigned across,         \
                                                    unsigned strips, int deep) {                 \
        correlate<T, K, S, true>(x, w, nullptr, y, partials, counts, EXTENTS, across, strips,    \
                                 deep, false, 0);                                                \
    }
#define FOR_DEPTHWISE_STATISTICS(T, suffix) FOR_EACH_SHAPE(DEPTHWISE_STATISTICS, T, suffix)
FOR_EACH_TYPE(FOR_DEPTHWISE_STATISTICS)

// ---- The input gradient of stride 2 ----

// dx[i, j] = Σ dy[(i + p − r) / 2, (j + p − s) / 2] · w[r, s] over the taps where both are whole, p = K / 2.
template <class T, int K>
__device__ __forceinline__ void input_gradient(const T* dy, const float* w, T* dx, const Extents& e,
                                               unsigned across, unsigned strips, int deep) {
    constexpr int n = kWidth<T>, P = 4, kParity = K / 2 % 2;
    // The columns of dy that the P columns of dx see, from that of the first on.
    constexpr int kFirst = -((K - 1 - kParity) / 2), kColumns = (P - 1 + kParity) / 2 - kFirst + 1;
    using W = Weights<T, K>;
    SHARED(float, shared, W::kSize);
    const Place place(e.channels, e.images, e.height, e.width, across, strips, deep, P, n);
    const W weights(&shared[0], w, place.strip * across * n, e.channels, across, false);
    const int last = place.exists ? min(place.row + deep, e.height) : 0;
    const int left = (place.column + K / 2 - kParity) / 2 + kFirst;
#pragma unroll 1
    for (int row = place.row; row < last; ++row) {
        float sums[P][n] = {};
#pragma unroll 1
        for (int r = (row + K / 2) % 2; r < K; r += 2) {
            const int line = (row + K / 2 - r) / 2;
            if (row + K / 2 < r || line >= e.rows) continue;
            const T* from = dy + (static_cast<size_t>(place.image * e.rows + line) * e.columns + left) *
                                     e.channels + place.channel;
            Pixel<T> pixels[kColumns];
#pragma unroll
            for (int k = 0; k < kColumns; ++k) {
                const bool inside = static_cast<unsigned>(left + k) < static_cast<unsigned>(e.columns);
                pixels[k].load(from + static_cast<size_t>(k) * e.channels, inside);
            }
#pragma unroll
            for (int s = 0; s < K; ++s) {
                float tap[n];
                weights.load(r * K + s, place.vector, tap);
#pragma unroll
                for (int k = 0; k < P; ++k) {
                    // Offsets are taken from an even number, so that none is negative.
                    constexpr int kEven = 2 * K;
                    if ((k + kParity - s + kEven) % 2 != 0) continue;
                    const int at = (k + kParity - s + kEven) / 2 - K - kFirst;
#pragma unroll
                    for (int i = 0; i < n; ++i) sums[k][i] = fmaf(pixels[at][i], tap[i], sums[k][i]);
                }
            }
        }
        T* to = dx + (static_cast<size_t>(place.image * e.height + row) * e.width + place.column) * e.channels +
                place.channel;
#pragma unroll
        for (int k = 0; k < P; ++k) {
            if (place.column + k < e.width) store_vector(to + static_cast<size_t>(k) * e.channels, sums[k]);
        }
    }
}

// Grid as for `Place` over dx; all pointers are multiples of 16.
#define INPUT_GRADIENT(T, suffix, K)                                                             \
    extern "C" __global__ void __launch_bounds__(kThreads, 2)                                    \
        depthwise_input_gradient_k##K##_s2_##suffix(const T* dy, const float* w, T* dx,          \
                                                    EXTENTS_PARAMETERS, unsigned across,         \
                                                    unsigned strips, int deep) {                 \
        input_gradient<T, K>(dy, w, dx, EXTENTS, across, strips, deep);                          \
    }
#define FOR_INPUT_GRADIENT(T, suffix) INPUT_GRADIENT(T, suffix, 3) INPUT_GRADIENT(T, suffix, 5)
FOR_EACH_TYPE(FOR_INPUT_GRADIENT)

// ---- The weight gradient ----

// partials[piece][tap][channel] = Σ x·dy over a piece of `lines` rows of the output.
// Grid: pieces * strips blocks of kThreads; all pointers are multiples of 16.
template <class T, int K, int S>
__device__ __forceinline__ void weight_gradient(const T* x, const T* dy, float* partials, const Extents& e,
                                                unsigned across, unsigned strips, int lines) {
    constexpr int n = kWidth<T>, P = kWeightPixels<T, K>, kColumns = (P - 1) * S + K;
    SHARED(float, slots, 1, kThreads * (n + 1));
    const unsigned strip = blockIdx.x % strips, piece = blockIdx.x / strips;
    const unsigned vector = threadIdx.x % across, r = threadIdx.x / across % K;
    const unsigned groups = kThreads / (across * K), group = threadIdx.x / (across * K);
    const unsigned channel = (strip * across + vector) * n;
    float sums[K][n] = {};
    if (group < groups && channel < e.channels) {
        const int begin = static_cast<int>(piece) * lines, all = e.images * e.rows;
        const int end = all - begin < lines ? all : begin + lines;
#pragma unroll 1
        for (int line = begin + static_cast<int>(group); line < end; line += static_cast<int>(groups)) {
            const int image = line / e.rows, row = line % e.rows * S - K / 2 + static_cast<int>(r);
            if (static_cast<unsigned>(row) >= static_cast<unsigned>(e.height)) continue;
            const T* from = x + static_cast<size_t>(image * e.height + row) * e.width * e.channels + channel;
            const T* slopes = dy + static_cast<size_t>(line) * e.columns * e.channels + channel;
#pragma unroll 1
            for (int column = 0; column < e.columns; column += P) {
                const int left = column * S - K / 2;
                Pixel<T> pixels[kColumns], slope[P];
#pragma unroll
                for (int k = 0; k < P; ++k) {
                    slope[k].load(slopes + static_cast<size_t>(column + k) * e.channels, column + k < e.columns);
                }
#pragma unroll
                for (int k = 0; k < kColumns; ++k) {
                    const bool inside = static_cast<unsigned>(left + k) < static_cast<unsigned>(e.width);
                    pixels[k].load(from + (static_cast<long long>(left) + k) * e.channels, inside);
                }
#pragma unroll
                for (int k = 0; k < P; ++k) {
#pragma unroll
                    for (int s = 0; s < K; ++s) {
#pragma unroll
                        for (int i = 0; i < n; ++i) {
                            sums[s][i] = fmaf(pixels[k * S + s][i], slope[k][i], sums[s][i]);
                        }
                    }
                }
            }
        }
    }
    const unsigned strip_width = across * n, width = strip_width * K;
#pragma unroll
    for (int s = 0; s < K; ++s) {
#pragma unroll
        for (int i = 0; i < n; ++i) slots[0][threadIdx.x * (n + 1) + i] = sums[s][i];
        fold<kThreads, n>(slots, groups * width, width, Add{}, [&](unsigned column, const float (&a)[1]) {
            const unsigned tap = column / strip_width * K + s, c = strip * strip_width + column % strip_width;
            if (c >= e.channels) return;
            partials[(static_cast<size_t>(piece) * (K * K) + tap) * e.channels + c] = a[0];
        });
        __syncthreads();
    }
}

#define WEIGHT_GRADIENT(T, suffix, K, S)                                                         \
    extern "C" __global__ void __launch_bounds__(kThreads, 2)                                    \
        depthwise_weight_gradient_k##K##_s##S##_##suffix(const T* x, const T* dy,                \
                                                         float* partials, EXTENTS_PARAMETERS,    \
                                                         unsigned across, unsigned strips,       \
                                                         int lines) {                            \
        weight_gradient<T, K, S>(x, dy, partials, EXTENTS, across, strips, lines);               \
    }
#define FOR_WEIGHT_GRADIENT(T, suffix) FOR_EACH_SHAPE(WEIGHT_GRADIENT, T, suffix)
FOR_EACH_TYPE(FOR_WEIGHT_GRADIENT)

// dw[channel][tap] = Σ partials[piece][tap][channel], in f64: warp k of a block takes pieces k, k + kFinishWarps,
// ..., and the warps are added in their order. Grid: ceil(taps * channels / 32) blocks of 32 * kFinishWarps.
extern "C" __global__ void __launch_bounds__(32 * kFinishWarps)
depthwise_weight_gradient_finish(const float* partials, float* dw, unsigned taps, unsigned channels,
                                 unsigned pieces) {
    SHARED(double, scratch, kFinishWarps, 32);
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, at = blockIdx.x * 32 + lane;
    const size_t count = static_cast<size_t>(taps) * channels;
    double sum = 0.0;
    if (at < count) {
#pragma unroll 4
        for (unsigned piece = warp; piece < pieces; piece += kFinishWarps) sum += partials[piece * count + at];
    }
    scratch[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && at < count) {
        sum = 0.0;
#pragma unroll
        for (int k = 0; k < kFinishWarps; ++k) sum += scratch[k][lane];
        dw[static_cast<size_t>(at % channels) * taps + at / channels] = static_cast<float>(sum);
    }
}

// ---- Any kernel, stride, padding and alignment ----

struct Kernel {
    int height, width, down, right, top, left;  // extents, strides, padding
};
#define KERNEL_PARAMETERS                                                                        \
    int kernel_height, int kernel_width, int down, int right, int top, int left
#define KERNEL Kernel{kernel_height, kernel_width, down, right, top, left}

// `across` channels of a block side by side, and the pixels that a thread takes of a piece of `pixels`: every
// one in kThreads / across. Grid: pieces * strips blocks of kThreads.
struct Lane {
    unsigned strip, piece, lane, group, groups, channel;
    size_t begin, end;
    bool exists;

    __device__ __forceinline__ Lane(unsigned block, unsigned channels, size_t all, unsigned across,
                                    unsigned strips, unsigned pixels) {
        strip = block % strips;
        piece = block / strips;
        lane = threadIdx.x % across;
        group = threadIdx.x / across;
        groups = kThreads / across;
        channel = strip * across + lane;
        const size_t first = static_cast<size_t>(piece) * pixels;
        end = all - first < pixels ? all : first + pixels;
        begin = first + group;
        exists = group < groups && channel < channels;
    }
};

// y = a(x ∗ w + bias), bias and partials null or not, the latter as of depthwise_statistics.
#define SIMPLE(T, suffix)                                                                        \
    extern "C" __global__ void __launch_bounds__(kThreads)                                       \
        depthwise_simple_##suffix(const T* x, const float* w, const float* bias, T* y,           \
                                  float* partials, float* counts, int activation,                \
                                  EXTENTS_PARAMETERS, KERNEL_PARAMETERS, unsigned across,        \
                                  unsigned strips, unsigned pixels) {                            \
        simple(x, w, bias, y, partials, counts, activation, EXTENTS, KERNEL, across, strips, pixels); \
    }
template <class T>
__device__ __forceinline__ void simple(const T* x, const float* w, const float* bias, T* y, float* partials,
                                       float* counts, int activation, const Extents& e, const Kernel& kernel,
                                       unsigned across, unsigned strips, unsigned pixels) {
    SHARED(float, slots, 3, kThreads * 2);
    const size_t all = static_cast<size_t>(e.images) * e.rows * e.columns;
    const Lane at(blockIdx.x, e.channels, all, across, strips, pixels);
    Statistics<1> statistics;
    if (at.exists) {
        const float* taps = w + static_cast<size_t>(at.channel) * (kernel.height * kernel.width);
#pragma unroll 1
        for (size_t pixel = at.begin; pixel < at.end; pixel += at.groups) {
            const Division place = divide(pixel, e.columns), line = divide(place.quotient, e.rows);
            const int top = static_cast<int>(line.remainder) * kernel.down - kernel.top;
            const int left = static_cast<int>(place.remainder) * kernel.right - kernel.left;
            float sum = 0.0f;
#pragma unroll 1
            for (int r = max(0, -top); r < min(kernel.height, e.height - top); ++r) {
                const T* from = x + (line.quotient * e.height + (top + r)) * e.width * e.channels + at.channel;
#pragma unroll 1
                for (int s = max(0, -left); s < min(kernel.width, e.width - left); ++s) {
                    const float value = to_float(from[static_cast<size_t>(left + s) * e.channels]);
                    sum = fmaf(value, taps[r * kernel.width + s], sum);
                }
            }
            if (bias != nullptr) {
                with_activation(activation, [&](auto a) { sum = a.apply(sum + bias[at.channel]); });
            }
            y[pixel * e.channels + at.channel] = from_float<T>(sum);
            statistics.add([&](int) { return sum; });
        }
    }
    if (partials == nullptr) return;  // all threads alike
    statistics.store(slots, threadIdx.x);
    fold<kThreads, 1>(slots, at.groups * across, across, MergeStatistics{},
                      [&](unsigned column, const float (&a)[3]) {
                          const unsigned channel = at.strip * across + column;
                          if (channel >= e.channels) return;
                          if (channel == 0) counts[at.piece] = a[0];
                          store_pair(partial(partials, 0, 0, at.piece, e.channels, channel), a[1], a[2]);
                      });
}
FOR_EACH_TYPE(SIMPLE)

// dx, pixels being those of x.
template <class T>
__device__ __forceinline__ void simple_input_gradient(const T* dy, const float* w, T* dx, const Extents& e,
                                                      const Kernel& kernel, unsigned across, unsigned strips,
                                                      unsigned pixels) {
    const size_t all = static_cast<size_t>(e.images) * e.height * e.width;
    const Lane at(blockIdx.x, e.channels, all, across, strips, pixels);
    if (!at.exists) return;
    const float* taps = w + static_cast<size_t>(at.channel) * (kernel.height * kernel.width);
#pragma unroll 1
    for (size_t pixel = at.begin; pixel < at.end; pixel += at.groups) {
        const Division place = divide(pixel, e.width), line = divide(place.quotient, e.height);
        const int bottom = static_cast<int>(line.remainder) + kernel.top;
        const int end = static_cast<int>(place.remainder) + kernel.left;
        float sum = 0.0f;
#pragma unroll 1
        for (int r = bottom % kernel.down; r < kernel.height && r <= bottom; r += kernel.down) {
            const int row = (bottom - r) / kernel.down;
            if (row >= e.rows) continue;
            const T* from = dy + (line.quotient * e.rows + row) * e.columns * e.channels + at.channel;
#pragma unroll 1
            for (int s = end % kernel.right; s < kernel.width && s <= end; s += kernel.right) {
                const int column = (end - s) / kernel.right;
                if (column >= e.columns) continue;
                const float value = to_float(from[static_cast<size_t>(column) * e.channels]);
                sum = fmaf(value, taps[r * kernel.width + s], sum);
            }
        }
        dx[pixel * e.channels + at.channel] = from_float<T>(sum);
    }
}
#define SIMPLE_INPUT_GRADIENT(T, suffix)                                                         \
    extern "C" __global__ void __launch_bounds__(kThreads)                                       \
        depthwise_input_gradient_simple_##suffix(const T* dy, const float* w, T* dx,             \
                                                 EXTENTS_PARAMETERS, KERNEL_PARAMETERS,          \
                                                 unsigned across, unsigned strips,               \
                                                 unsigned pixels) {                              \
        simple_input_gradient(dy, w, dx, EXTENTS, KERNEL, across, strips, pixels);               \
    }
FOR_EACH_TYPE(SIMPLE_INPUT_GRADIENT)

// partials[piece][tap][channel] for the pixels of a piece of y. Grid: taps * pieces * strips blocks.
template <class T, class D>
__device__ __forceinline__ void simple_weight_gradient(const T* x, const D* dy, float* partials, const Extents& e,
                                                       const Kernel& kernel, unsigned across, unsigned strips,
                                                       unsigned pixels) {
    SHARED(float, slots, 1, kThreads * 2);
    const unsigned taps = kernel.height * kernel.width, tap = blockIdx.x % taps;
    const int r = static_cast<int>(tap) / kernel.width, s = static_cast<int>(tap) % kernel.width;
    const size_t all = static_cast<size_t>(e.images) * e.rows * e.columns;
    const Lane at(blockIdx.x / taps, e.channels, all, across, strips, pixels);
    float sum = 0.0f;
    if (at.exists) {
#pragma unroll 1
        for (size_t pixel = at.begin; pixel < at.end; pixel += at.groups) {
            const Division place = divide(pixel, e.columns), line = divide(place.quotient, e.rows);
            const int row = static_cast<int>(line.remainder) * kernel.down - kernel.top + r;
            const int column = static_cast<int>(place.remainder) * kernel.right - kernel.left + s;
            if (row < 0 || row >= e.height || column < 0 || column >= e.width) continue;
            const size_t from = ((line.quotient * e.height + row) * e.width + column) * e.channels;
            sum = fmaf(to_float(x[from + at.channel]), to_float(dy[pixel * e.channels + at.channel]), sum);
        }
    }
    slots[0][slot<1>(threadIdx.x)] = sum;
    fold<kThreads, 1>(slots, at.groups * across, across, Add{}, [&](unsigned column, const float (&a)[1]) {
        const unsigned channel = at.strip * across + column;
        if (channel >= e.channels) return;
        partials[(static_cast<size_t>(at.piece) * taps + tap) * e.channels + channel] = a[0];
    });
}
#define SIMPLE_WEIGHT_GRADIENT(T, suffix)                                                        \
    extern "C" __global__ void __launch_bounds__(kThreads)                                       \
        depthwise_weight_gradient_simple_##suffix(const T* x, const void* dy, int dy_narrow,     \
                                                  float* partials, EXTENTS_PARAMETERS,           \
                                                  KERNEL_PARAMETERS, unsigned across,            \
                                                  unsigned strips, unsigned pixels) {            \
        if (dy_narrow != 0) {                                                                    \
            simple_weight_gradient(x, static_cast<const bf16*>(dy), partials, EXTENTS, KERNEL,   \
                                   across, strips, pixels);                                      \
        } else {                                                                                 \
            simple_weight_gradient(x, static_cast<const float*>(dy), partials, EXTENTS, KERNEL,  \
                                   across, strips, pixels);                                      \
        }                                                                                        \
    }
FOR_EACH_TYPE(SIMPLE_WEIGHT_GRADIENT)
