// Operations on single elements, and joining rows of several tensors: all bound by memory.
//
// A thread moves 16 bytes of every tensor at a time, kVectors times a block's width apart. While a warp of
// an H200 moves 16 bytes a lane to and fro, its multiprocessor can issue about 200 instructions (4 in a
// cycle; 4.8 TB/s are 21 bytes in a cycle of one of 132), which is what the percentages are predicted from.
//
//     kernel                          bytes an element, f32 / bf16  of copy's bandwidth, predicted
//     copy, scale, relu               8 / 4                         95 %
//     fill                            4 / 2                         95 % of writing alone
//     sigmoid, silu                   8 / 4                         95 / 85 %: two slow instructions an element
//     add, add_relu, mul              12 / 6                        95 %
//     relu_gradient                   12 / 6                        95 %
//     sigmoid_, silu_gradient         12 / 6                        95 / 85 %: 207 instructions for each 48 bytes
//     add_rows, mul_rows              8 / 4, the row is cached      90 %; 80 % where C is no multiple of 4 / 8
//     dropout                         8 / 4                         90 / 80 %: 195 instructions for each 32 bytes,
//                                                                   38 of them multiplications at half speed
//     join_rows                       8 / 4                         90 % in units of 16 bytes
//     gate_rows                       8 / 4, the row is cached      90 / 85 %: as silu
//     gate_pixels                     8 / 4, and a logit a pixel    90 %: one sigmoid a vector
//     stochastic_depth                12 / 6; 8 / 4 for images without the branch   90 %
//     its gradient                    8 / 4; 4 / 2 likewise         90 %
//     spread_rows                     4 / 2                         90 % of writing alone
//
// y may be the first operand itself (in place): a thread reads its elements before it writes them, and
// no pointer is `__restrict__`. Any length and alignment: the last vector, and tensors whose addresses
// are no multiple of 16, go element by element. The second operand b may be stored in another type than
// a and y (`b_narrow`: bf16), as gradients of f32 results of bf16 activations are.
#include "device.cuh"

constexpr int kThreads = 256;
// Vectors of a thread.
constexpr int kVectors = 2;

// Elements of a vector.
template <class T>
constexpr int kWidth = 16 / sizeof(T);

// Stores a vector as one: compilers split plain stores in kernels that hold several of these loops.
__device__ __forceinline__ void store_whole(float* y, const float (&v)[4]) {
    store_16_bytes(y, __float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
}
__device__ __forceinline__ void store_whole(bf16* y, const float (&v)[8]) {
    store_16_bytes(y, pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}

// y[i] = f(x[i], b) for the vectors of T at first, first + stride, ... (Vectors of them).
template <int Vectors, class T, class Operand, class F>
__device__ __forceinline__ void vectors(const T* x, T* y, size_t first, const Operand& operand, F f) {
    constexpr int n = kWidth<T>;
    using Raw = typename Operand::template Raw<n>;
    struct Both {
        Loaded<T, n> x;
        Raw b;
    };
    auto load = [&](int k) {
        const size_t at = first + k * size_t(kThreads * n);
        return Both{Loaded<T, n>(x + at), operand.template load<n>(at)};
    };
    auto store = [&](int k, const Both& both) {
        typename Operand::Value b[n];
        operand.values(both.b, b);
        float v[n];
#pragma unroll
        for (int i = 0; i < n; ++i) v[i] = f(both.x[i], b[i]);
        store_whole(y + first + k * size_t(kThreads * n), v);
    };
    if constexpr (Vectors == 1) {
        store(0, load(0));
    } else {
        static_assert(Vectors == 2, "as many as are written out here");
        const Both one = load(0), two = load(1);
        store(0, one);
        store(1, two);
    }
}

// y[i] = f(x[i], b) for begin ≤ i < end, b from the operand: load<n>(at) begins to fetch what belongs to the
// vector at `at`, values() ends it, and at(i) is the value for one element. `block`: number of this block among
// ceil((end - begin) / (kVectors * kThreads * kWidth)) of kThreads.
template <class T, class Operand, class F>
__device__ __forceinline__ void transform(const T* x, T* y, size_t begin, size_t end, unsigned block,
                                          const Operand& operand, F f) {
    constexpr int n = kWidth<T>;
    constexpr size_t stride = kThreads * n;
    const size_t first = begin + block * (kVectors * stride) + threadIdx.x * n;
    const bool aligned = begin % n == 0 && is_aligned<16>(x) && is_aligned<16>(y) && operand.is_aligned();
    if (aligned && first + (kVectors - 1) * stride + n <= end) {
        vectors<kVectors>(x, y, first, operand, f);
        return;
    }
#pragma unroll 1
    for (size_t at = first; at < end && at < first + kVectors * stride; at += stride) {
        if (aligned && at + n <= end) {
            vectors<1>(x, y, at, operand, f);
        } else {
#pragma unroll 1
            for (size_t i = at; i < end && i < at + n; ++i) {
                y[i] = from_float<T>(f(to_float(x[i]), operand.at(i)));
            }
        }
    }
}

// The same for i < len, by a grid of that many blocks.
template <class T, class Operand, class F>
__device__ __forceinline__ void transform(const T* x, T* y, size_t len, const Operand& operand, F f) {
    transform(x, y, 0, len, blockIdx.x, operand, f);
}

// No second operand.
struct None {
    struct Value {};
    template <int n>
    struct Raw {};
    __device__ __forceinline__ bool is_aligned() const { return true; }
    template <int n>
    __device__ __forceinline__ Raw<n> load(size_t) const {
        return {};
    }
    template <int n>
    __device__ __forceinline__ void values(Raw<n>, Value (&)[n]) const {}
    __device__ __forceinline__ Value at(size_t) const { return {}; }
};

// A tensor of the same shape.
template <class B>
struct Same {
    using Value = float;
    template <int n>
    using Raw = Loaded<B, n>;
    const B* b;
    __device__ __forceinline__ bool is_aligned() const { return ::is_aligned<16>(b); }
    template <int n>
    __device__ __forceinline__ Raw<n> load(size_t at) const {
        return Raw<n>(b + at);
    }
    template <int n>
    __device__ __forceinline__ void values(const Raw<n>& raw, float (&v)[n]) const {
#pragma unroll
        for (int i = 0; i < n; ++i) v[i] = raw[i];
    }
    __device__ __forceinline__ float at(size_t i) const { return to_float(b[i]); }
};

// Of an operand that costs no wait for memory nothing is fetched in advance.
template <int n>
struct Position {
    size_t at;
};

// One value a channel for each group of `rows` rows, so few that they are in the cache.
template <class B>
struct Rows {
    using Value = float;
    template <int n>
    using Raw = Position<n>;
    const B* b;
    unsigned channels;
    size_t rows;
    __device__ __forceinline__ bool is_aligned() const { return ::is_aligned<16>(b); }
    // The group of a row. One group is the common case, and needs no division.
    __device__ __forceinline__ size_t group(size_t row) const { return row < rows ? 0 : row / rows; }
    template <int n>
    __device__ __forceinline__ Raw<n> load(size_t at) const {
        return {at};
    }
    template <int n>
    __device__ __forceinline__ void values(const Raw<n>& raw, float (&v)[n]) const {
        Division place = divide(raw.at, channels);
        const size_t of = group(place.quotient);
        const B* row = b + of * channels;
        if (channels % n == 0) {
            const Loaded<B, n> loaded(row + place.remainder);
#pragma unroll
            for (int i = 0; i < n; ++i) v[i] = loaded[i];
            return;
        }
        size_t left = (of + 1) * rows - place.quotient;
#pragma unroll
        for (int i = 0; i < n; ++i) {
            v[i] = to_float(row[place.remainder]);
            if (++place.remainder == channels) {
                place.remainder = 0;
                // There may be no next row, but then there is no next element either.
                if (--left == 0 && i + 1 < n) {
                    left = rows;
                    row += channels;
                }
            }
        }
    }
    __device__ __forceinline__ float at(size_t i) const {
        const Division place = divide(i, channels);
        return to_float(b[group(place.quotient) * channels + place.remainder]);
    }
};

#define FOR_EACH_TYPE(kernel) kernel(float, f32) kernel(bf16, bf16)

// ---- One operand: grid and block as for `transform`; any alignment ----

#define UNARY(name, T, suffix, function)                                                         \
    extern "C" __global__ void __launch_bounds__(kThreads)                                       \
        name##_##suffix(const T* x, T* y, size_t len) {                                          \
        transform(x, y, len, None{}, [](float v, None::Value) { return function; });             \
    }

// y = x.
#define COPY(T, suffix) UNARY(copy, T, suffix, v)
FOR_EACH_TYPE(COPY)

// y = max(x, 0), NaN for NaN.
#define RELU(T, suffix) UNARY(relu, T, suffix, v < 0.0f ? 0.0f : v)
FOR_EACH_TYPE(RELU)

// y = σ(x).
#define SIGMOID(T, suffix) UNARY(sigmoid, T, suffix, sigmoid(v).value)
FOR_EACH_TYPE(SIGMOID)

// y = x·σ(x).
#define SILU(T, suffix) UNARY(silu, T, suffix, v * sigmoid(v).value)
FOR_EACH_TYPE(SILU)

// y = factor * x.
#define SCALE(T, suffix)                                                                         \
    extern "C" __global__ void __launch_bounds__(kThreads)                                       \
        scale_##suffix(const T* x, T* y, size_t len, float factor) {                             \
        transform(x, y, len, None{}, [factor](float v, None::Value) { return factor * v; });     \
    }
FOR_EACH_TYPE(SCALE)

// y = value. Grid and block as for `transform`; any alignment.
#define FILL(T, suffix)                                                                          \
    extern "C" __global__ void __launch_bounds__(kThreads)                                       \
        fill_##suffix(T* y, size_t len, float value) {                                           \
        transform(y, y, len, None{}, [value](float, None::Value) { return value; });             \
    }
FOR_EACH_TYPE(FILL)

// ---- Two operands of one shape: grid and block as for `transform`; any alignment ----

#define BINARY(name, T, suffix, function)                                                        \
    extern "C" __global__ void __launch_bounds__(kThreads)                                       \
        name##_##suffix(const T* a, const void* b, int b_narrow, T* y, size_t len) {             \
        auto f = [](float u, float v) { return function; };                                      \
        if (b_narrow != 0) {                                                                     \
            transform(a, y, len, Same<bf16>{static_cast<const bf16*>(b)}, f);                    \
        } else {                                                                                 \
            transform(a, y, len, Same<float>{static_cast<const float*>(b)}, f);                  \
        }                                                                                        \
    }

// y = a + b.
#define ADD(T, suffix) BINARY(add, T, suffix, u + v)
FOR_EACH_TYPE(ADD)

// y = max(a + b, 0), NaN for NaN.
#define ADD_RELU(T, suffix) BINARY(add_relu, T, suffix, u + v < 0.0f ? 0.0f : u + v)
FOR_EACH_TYPE(ADD_RELU)

// y = a·b.
#define MUL(T, suffix) BINARY(mul, T, suffix, u * v)
FOR_EACH_TYPE(MUL)

// dx = dy where y > 0, else 0; a is dy, b is y.
#define RELU_GRADIENT(T, suffix) BINARY(relu_gradient, T, suffix, v > 0.0f ? u : 0.0f)
FOR_EACH_TYPE(RELU_GRADIENT)

// dx = dy·σ(x)·σ(−x); a is dy, b is x.
__device__ __forceinline__ float sigmoid_gradient(float dy, float x) {
    const Sigmoid s = sigmoid(x);
    return dy * (s.value * s.complement);
}
#define SIGMOID_GRADIENT(T, suffix) BINARY(sigmoid_gradient, T, suffix, sigmoid_gradient(u, v))
FOR_EACH_TYPE(SIGMOID_GRADIENT)

// dx = dy·σ(x)·(1 + x·σ(−x)); a is dy, b is x.
__device__ __forceinline__ float silu_gradient(float dy, float x) {
    const Sigmoid s = sigmoid(x);
    return dy * (s.value * fmaf(x, s.complement, 1.0f));
}
#define SILU_GRADIENT(T, suffix) BINARY(silu_gradient, T, suffix, silu_gradient(u, v))
FOR_EACH_TYPE(SILU_GRADIENT)

// ---- A second operand with one row of `channels` for each `rows` rows of a ----
// Grid and block as for `transform`; any alignment, 16 bytes at a time of b where channels are a multiple
// of the vector.

#define BROADCAST(name, T, suffix, function)                                                     \
    extern "C" __global__ void __launch_bounds__(kThreads)                                       \
        name##_##suffix(const T* a, const void* b, int b_narrow, T* y, size_t len,               \
                        unsigned channels, size_t rows) {                                        \
        auto f = [](float u, float v) { return function; };                                      \
        if (b_narrow != 0) {                                                                     \
            transform(a, y, len, Rows<bf16>{static_cast<const bf16*>(b), channels, rows}, f);    \
        } else {                                                                                 \
            transform(a, y, len, Rows<float>{static_cast<const float*>(b), channels, rows}, f);  \
        }                                                                                        \
    }

// y = a + b.
#define ADD_ROWS(T, suffix) BROADCAST(add_rows, T, suffix, u + v)
FOR_EACH_TYPE(ADD_ROWS)

// y = a·b.
#define MUL_ROWS(T, suffix) BROADCAST(mul_rows, T, suffix, u * v)
FOR_EACH_TYPE(MUL_ROWS)

// y = a·σ(b).
#define GATE_ROWS(T, suffix) BROADCAST(gate_rows, T, suffix, u * sigmoid(v).value)
FOR_EACH_TYPE(GATE_ROWS)

// y = factor·dy, dy with one row for each `rows` rows of y. Grid and block as for `transform`; any alignment.
#define SPREAD_ROWS(T, suffix)                                                                   \
    extern "C" __global__ void __launch_bounds__(kThreads)                                       \
        spread_rows_##suffix(const T* dy, T* y, size_t len, unsigned channels, size_t rows,      \
                             float factor) {                                                     \
        transform(y, y, len, Rows<T>{dy, channels, rows},                                        \
                  [factor](float, float v) { return factor * v; });                              \
    }
FOR_EACH_TYPE(SPREAD_ROWS)

// ---- Gates of pixels ----

// σ(z), one logit for each row of `channels`.
template <class Z>
struct PixelGates {
    using Value = float;
    template <int n>
    struct Raw {
        size_t row;
        unsigned channel;
        Z z;
    };
    const Z* z;
    unsigned channels;
    __device__ __forceinline__ bool is_aligned() const { return true; }
    template <int n>
    __device__ __forceinline__ Raw<n> load(size_t at) const {
        const Division place = divide(at, channels);
        return {place.quotient, place.remainder, z[place.quotient]};
    }
    template <int n>
    __device__ __forceinline__ void values(const Raw<n>& raw, float (&v)[n]) const {
        float gate = sigmoid(to_float(raw.z)).value;
        if (channels % n == 0) {
#pragma unroll
            for (int i = 0; i < n; ++i) v[i] = gate;
            return;
        }
        size_t row = raw.row;
        unsigned channel = raw.channel;
#pragma unroll
        for (int i = 0; i < n; ++i) {
            v[i] = gate;
            // There may be no next row, but then there is no next element either.
            if (++channel == channels && i + 1 < n) {
                channel = 0;
                gate = sigmoid(to_float(z[++row])).value;
            }
        }
    }
    __device__ __forceinline__ float at(size_t i) const {
        return sigmoid(to_float(z[divide(i, channels).quotient])).value;
    }
};

// y = x·σ(z), z with one element for each row of `channels`. Grid and block as for `transform`; any alignment.
#define GATE_PIXELS(T, suffix)                                                                   \
    extern "C" __global__ void __launch_bounds__(kThreads)                                       \
        gate_pixels_##suffix(const T* x, const void* z, int z_narrow, T* y, size_t len,          \
                             unsigned channels) {                                                \
        auto f = [](float v, float gate) { return v * gate; };                                   \
        if (z_narrow != 0) {                                                                     \
            transform(x, y, len, PixelGates<bf16>{static_cast<const bf16*>(z), channels}, f);    \
        } else {                                                                                 \
            transform(x, y, len, PixelGates<float>{static_cast<const float*>(z), channels}, f);  \
        }                                                                                        \
    }
FOR_EACH_TYPE(GATE_PIXELS)

// ---- Dropout ----

// The random words of elements: word i % 4 of block i / 4.
struct Words {
    using Value = unsigned;
    template <int n>
    using Raw = Position<n>;
    unsigned long long seed, stream;
    __device__ __forceinline__ bool is_aligned() const { return true; }
    template <int n>
    __device__ __forceinline__ Raw<n> load(size_t at) const {
        return {at};
    }
    template <int n>
    __device__ __forceinline__ void values(const Raw<n>& raw, unsigned (&words)[n]) const {
        static_assert(n % 4 == 0, "whole blocks");
#pragma unroll
        for (int i = 0; i < n; i += 4) {
            const uint4 block = philox(seed, stream, (raw.at + i) / 4);
            words[i] = block.x;
            words[i + 1] = block.y;
            words[i + 2] = block.z;
            words[i + 3] = block.w;
        }
    }
    __device__ __forceinline__ unsigned at(size_t i) const {
        const uint4 block = philox(seed, stream, i / 4);
        const unsigned low = i % 2 == 0 ? block.x : block.y, high = i % 2 == 0 ? block.z : block.w;
        return i % 4 < 2 ? low : high;
    }
};

// y = scale·x where an element's random word reaches `threshold`, else 0. The stream is (layer, step), the
// step is the first element of `control`. Grid and block as for `transform`; any alignment.
#define DROPOUT(T, suffix)                                                                       \
    extern "C" __global__ void __launch_bounds__(kThreads)                                       \
        dropout_##suffix(const T* x, const float* control, T* y, size_t len,                     \
                         unsigned long long seed, unsigned layer, unsigned threshold, float scale) { \
        const auto step = static_cast<unsigned long long>(control[0]);                           \
        const Words operand{seed, static_cast<unsigned long long>(layer) << 32 | step};          \
        transform(x, y, len, operand, [threshold, scale](float v, unsigned word) {               \
            return word < threshold ? 0.0f : scale * v;                                          \
        });                                                                                      \
    }
FOR_EACH_TYPE(DROPOUT)

// ---- Stochastic depth ----

template <class T, class Operand>
__device__ __forceinline__ void add_branch(const T* x, T* y, size_t begin, size_t end, unsigned block,
                                           const Operand& operand, bool kept, float factor) {
    if (kept) {
        transform(x, y, begin, end, block, operand, [factor](float v, float r) { return fmaf(factor, v, r); });
    } else {
        transform(y, y, begin, end, block, operand, [](float, float r) { return r; });
    }
}

// y = residual + factor·x for the images whose random word reaches `threshold`, else residual; without a residual
// 0 in its place. What is left out is not read. `residual_storage`: 0 for none, 1 for f32, 2 for bf16; the word of
// image n is word n % 4 of block n / 4, the stream as for dropout. image: elements of an image. Grid: `blocks`
// blocks of kThreads for each image, as many as `transform` needs for it; any alignment.
#define STOCHASTIC_DEPTH(T, suffix)                                                              \
    extern "C" __global__ void __launch_bounds__(kThreads)                                       \
        stochastic_depth_##suffix(const T* x, const void* residual, int residual_storage,        \
                                  const float* control, T* y, size_t image, unsigned blocks,     \
                                  unsigned long long seed, unsigned layer, unsigned threshold,   \
                                  float factor) {                                                \
        const unsigned n = blockIdx.x / blocks, block = blockIdx.x % blocks;                     \
        const auto step = static_cast<unsigned long long>(control[0]);                           \
        const Words words{seed, static_cast<unsigned long long>(layer) << 32 | step};            \
        const bool kept = words.at(n) >= threshold;                                              \
        const size_t begin = n * image, end = begin + image;                                     \
        if (residual_storage == 1) {                                                             \
            const Same<float> operand{static_cast<const float*>(residual)};                      \
            add_branch(x, y, begin, end, block, operand, kept, factor);                          \
        } else if (residual_storage == 2) {                                                      \
            const Same<bf16> operand{static_cast<const bf16*>(residual)};                        \
            add_branch(x, y, begin, end, block, operand, kept, factor);                          \
        } else if (kept) {                                                                       \
            transform(x, y, begin, end, block, None{},                                           \
                      [factor](float v, None::Value) { return factor * v; });                    \
        } else {                                                                                 \
            transform(y, y, begin, end, block, None{}, [](float, None::Value) { return 0.0f; }); \
        }                                                                                        \
    }
FOR_EACH_TYPE(STOCHASTIC_DEPTH)

// ---- Joining rows ----

// Where units of 16, 8, 4 or 2 bytes come from: those of a row of y from `first` on.
struct Part {
    unsigned long long address;  // of the first row's unit
    unsigned long long pitch;    // units from row to row
    unsigned long long first;
};

// Each row of y is put together from parts of the rows of other tensors: channels of several tensors
// (concat), or some channels of one. len: units of y; width: units of a row of y, which are moved as U.
// The parts stand in the order of `first`, the first of them at 0. Threads go along y, so that each of
// its lines is written once, and as a whole. Grid: ceil(len / (kVectors * kThreads)) blocks of kThreads.
// All addresses are multiples of the unit.
template <class U>
__device__ __forceinline__ void join(const Part* parts, int count, U* y, size_t len, unsigned width) {
    U units[kVectors];
    const size_t start = blockIdx.x * size_t(kVectors * kThreads) + threadIdx.x;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
        const size_t at = start + k * kThreads;
        if (at >= len) continue;
        const Division place = divide(at, width);
        int part = 0;
        while (part + 1 < count && parts[part + 1].first <= place.remainder) ++part;
        const U* x = global_address(reinterpret_cast<const U*>(parts[part].address));
        units[k] = x[place.quotient * parts[part].pitch + (place.remainder - parts[part].first)];
    }
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
        const size_t at = start + k * kThreads;
        if (at < len) y[at] = units[k];
    }
}

// unit: bytes of a unit, 16, 8, 4 or 2.
extern "C" __global__ void __launch_bounds__(kThreads)
join_rows(const Part* parts, int count, void* y, size_t len, unsigned width, int unit) {
    if (unit == 16) {
        join(parts, count, static_cast<Vector<unsigned, 4>*>(y), len, width);
    } else if (unit == 8) {
        join(parts, count, static_cast<Vector<unsigned, 2>*>(y), len, width);
    } else if (unit == 4) {
        join(parts, count, static_cast<unsigned*>(y), len, width);
    } else {
        join(parts, count, static_cast<unsigned short*>(y), len, width);
    }
}
