// Normalisation y = a(γ·x̂ + β), x̂ = (x − μ)/√(σ² + ε), with statistics of the batch, of groups of channels
// of an image, or given; layer normalisation is at the end. See src/ops/norm.rs for the mathematics.
//
// A tensor is a row-major matrix of C columns for each segment (the whole batch, or one image). It is walked
// in tiles: a block has `across` vectors of 16 bytes side by side and kThreads / across rows of them, and goes
// down in steps of as many rows, so that a thread keeps its columns, and what belongs to them stays in
// registers. Rows that do not consist of whole vectors are taken several at a time, as one row (a period) that
// does. Where C is odd and too large for that, elements are moved one by one.
//
//     launch                  bytes an element, f32 / bf16
//     norm_statistics         4 / 2      mean and squared deviations of pieces
//     normalize               8 / 4      the elementwise pass, with any statistics
//     norm_gradient_sums      8 / 4      Σg and Σg·(x − μ) of pieces
//     norm_gradient           12 / 6
//
// and between them one launch that adds the pieces up in f64, in an order that depends on sizes alone.
#include "device.cuh"
#include "epilogue.cuh"

constexpr int kThreads = 256;
// Threads that add up the pieces of a group.
constexpr int kFinishThreads = 128;
// Vectors that a thread has under way: in the elementwise passes all that it moves.
constexpr int kVectors = 4;
constexpr int kGradientVectors = 2;

// Elements of a vector.
template <class T>
constexpr int kWidth = 16 / sizeof(T);

// The sizes of all tiles of a launch.
struct Walk {
    size_t len;         // elements of a segment
    unsigned channels;  // C
    unsigned period;    // elements of a row as it is walked: C, or several rows of C
    unsigned across;    // vectors of a block along a period
    unsigned strips;    // blocks along a period; 1 where that is several rows
    unsigned pieces;    // blocks down a segment
    unsigned steps;     // steps of a block

    // Rows of a block at a step.
    __device__ __forceinline__ unsigned down() const { return kThreads / across; }
};

// What a thread does: the vectors of n elements at at, at + stride, ... below end, `count` of whose columns
// exist. Grid: segments * pieces * strips blocks of kThreads.
template <int n>
struct Tile {
    size_t at, end, stride;
    unsigned segment, piece, strip, row;
    unsigned column;
    int count;

    __device__ __forceinline__ explicit Tile(const Walk& walk) {
        strip = blockIdx.x % walk.strips;
        const unsigned block = blockIdx.x / walk.strips;
        piece = block % walk.pieces;
        segment = block / walk.pieces;
        row = threadIdx.x / walk.across;
        column = (strip * walk.across + threadIdx.x % walk.across) * n;
        const unsigned left = column < walk.period ? walk.period - column : 0;
        count = row < walk.down() ? static_cast<int>(left < n ? left : n) : 0;
        stride = static_cast<size_t>(walk.down()) * walk.period;
        const size_t base = segment * walk.len, begin = piece * (walk.steps * stride);
        const size_t last = begin + walk.steps * stride;
        at = base + begin + static_cast<size_t>(row) * walk.period + column;
        end = base + (last < walk.len ? last : walk.len);
    }

    // Whether all but the last of them are whole vectors at aligned addresses.
    __device__ __forceinline__ bool is_whole(const void* x, const void* y) const {
        return count == n && at % n == 0 && stride % n == 0 && is_aligned<16>(x) && is_aligned<16>(y);
    }
    // How many elements of the vector at `from` exist.
    __device__ __forceinline__ int width(size_t from) const {
        return end - from < static_cast<size_t>(count) ? static_cast<int>(end - from) : count;
    }
};

// Columns of a block whose numbers are told apart when they are merged: channels, all of them where a period is
// several rows.
template <int n>
__device__ __forceinline__ unsigned distinct(const Walk& walk) {
    return walk.period > walk.channels ? walk.channels : walk.across * n;
}

// Merges the numbers of a block's threads and stores, for each channel, the last two of them as its pair.
template <int n, int K, class Merge>
__device__ __forceinline__ void store_partials(float (&slots)[K][kThreads * (n + 1)], float* partials,
                                               const Walk& walk, const Tile<n>& tile, Merge merge) {
    const unsigned all = walk.down() * walk.across * n;
    fold<kThreads, n>(slots, all, distinct<n>(walk), merge, [&](unsigned column, const float (&a)[K]) {
        const unsigned channel = tile.strip * walk.across * n + column;
        if (channel >= walk.channels) return;
        store_pair(partial(partials, tile.segment, walk.pieces, tile.piece, walk.channels, channel), a[K - 2],
                   a[K - 1]);
    });
}

// ---- Statistics ----

template <class T>
__device__ __forceinline__ void statistics(const T* x, float* partials, const Walk& walk) {
    constexpr int n = kWidth<T>;
    SHARED(float, slots, 3, kThreads * (n + 1));
    const Tile<n> tile(walk);
    Statistics<n> seen;
    int more = 0;  // columns of the last step, if that was no whole vector
    const bool whole = tile.is_whole(x, x);
    size_t at = tile.at;
    const size_t stride = tile.stride;
    if (whole) {
        for (; at + 3 * stride + n <= tile.end; at += 4 * stride) {
            const Loaded<T, n> v[4] = {Loaded<T, n>(x + at), Loaded<T, n>(x + at + stride),
                                       Loaded<T, n>(x + at + 2 * stride), Loaded<T, n>(x + at + 3 * stride)};
            seen.add_four([&](int k, int i) { return v[k][i]; });
        }
    }
    if (tile.count > 0) {
#pragma unroll 1
        for (; at < tile.end; at += stride) {
            const int width = tile.width(at);
            if (whole && width == n) {
                const Loaded<T, n> v(x + at);
                seen.add([&](int i) { return v[i]; });
                continue;
            }
            const float weight = __fdividef(1.0f, seen.seen + 1.0f);
#pragma unroll
            for (int i = 0; i < n; ++i) {
                if (i < width) seen.add_one(i, to_float(x[at + i]), weight);
            }
            if (width == tile.count) {
                seen.seen += 1.0f;
            } else {
                more = width;
            }
        }
    }
    seen.store(slots, threadIdx.x);
#pragma unroll
    for (int i = 0; i < n; ++i) {
        if (i < more) slots[0][threadIdx.x * (n + 1) + i] = seen.seen + 1.0f;
        if (i >= tile.count) slots[0][threadIdx.x * (n + 1) + i] = 0.0f;
    }
    store_partials(slots, partials, walk, tile, MergeStatistics{});
}

#define FOR_EACH_TYPE(kernel) kernel(float, f32) kernel(bf16, bf16)

#define WALK_PARAMETERS                                                                          \
    size_t len, unsigned channels, unsigned period, unsigned across, unsigned strips,            \
        unsigned pieces, unsigned steps
#define WALK Walk{len, channels, period, across, strips, pieces, steps}

// partials[segment][piece][channel] = mean and Σ (x − mean)² of a channel's values in a piece.
// Grid as for `Tile`; any alignment of x, 8 bytes of partials.
#define STATISTICS(T, suffix)                                                                    \
    extern "C" __global__ void __launch_bounds__(kThreads, 4)                                    \
        norm_statistics_##suffix(const T* x, float* partials, WALK_PARAMETERS) {                 \
        statistics(x, partials, WALK);                                                           \
    }
FOR_EACH_TYPE(STATISTICS)

// mean[segment][group] and var[segment][group] of `width` channels each, from their pieces of counts[piece] rows
// each or, where that is null, of rows_of_piece, the last of which has fewer. Grid: segments * channels / width blocks of kFinishThreads.
extern "C" __global__ void __launch_bounds__(kFinishThreads)
norm_statistics_finish(const float* partials, const float* counts, float* mean, float* var, size_t rows, size_t rows_of_piece,
                       unsigned channels, unsigned width, unsigned pieces) {
    SHARED(double, scratch, 2, kFinishThreads / 32);
    const unsigned groups = channels / width, group = blockIdx.x % groups, segment = blockIdx.x / groups;
    auto each = [&](auto f) {
        double sum = 0.0;
#pragma unroll 4
        for (unsigned i = threadIdx.x; i < pieces * width; i += kFinishThreads) {
            const unsigned piece = i / width, channel = group * width + i % width;
            const size_t left = rows - piece * rows_of_piece;
            const float* from = partial(partials, segment, pieces, piece, channels, channel);
            const double own = counts != nullptr ? counts[piece] : left < rows_of_piece ? left : rows_of_piece;
            sum += f(own, from);
        }
        return sum;
    };
    const double count = static_cast<double>(rows) * width;
    const double sum = each([](double n, const float* of) { return n * of[0]; });
    const double centre = block_reduce<kFinishThreads>(sum, scratch[0], Sum{}) / count;
    const double deviations = each([centre](double n, const float* of) {
        const double apart = of[0] - centre;
        return of[1] + n * apart * apart;
    });
    const double squares = block_reduce<kFinishThreads>(deviations, scratch[1], Sum{});
    if (threadIdx.x == 0) {
        mean[blockIdx.x] = static_cast<float>(centre);
        var[blockIdx.x] = static_cast<float>(squares / count);
    }
}

// A layer's statistics of the batch, and its running ones.
struct Running {
    const float *mean, *var;
    float *running_mean, *running_var;
    float mean_weight, var_weight;
    unsigned long long channels;
};

// running = keep * running + weight * new, for both statistics of a channel of each layer.
// Grid: (ceil(most channels / kThreads), layers) blocks of kThreads.
extern "C" __global__ void __launch_bounds__(kThreads)
running_statistics(const Running* layers, float keep) {
    const Running of = layers[blockIdx.y];
    const unsigned i = blockIdx.x * kThreads + threadIdx.x;
    if (i >= of.channels) return;
    float *const mean = global_address(of.running_mean) + i, *const var = global_address(of.running_var) + i;
    *mean = fmaf(keep, *mean, of.mean_weight * global_address(of.mean)[i]);
    *var = fmaf(keep, *var, of.var_weight * global_address(of.var)[i]);
}

// ---- What belongs to the columns of a thread ----

// The arguments of u = (x − μ)·γ/√(σ² + ε) + β: mean and var per segment and group of `width` channels.
struct Affine {
    const float *mean, *var, *gamma, *beta;
    float eps;
    unsigned width;
};

// Calls set(i, at, channel) for each of n columns, `at` being where the group of its channel is.
template <int n, class F>
__device__ __forceinline__ void each_column(const Tile<n>& tile, unsigned channels, unsigned width, F set) {
    const unsigned groups = channels / width;
    unsigned channel = tile.column % channels;
#pragma unroll
    for (int i = 0; i < n; ++i) {
        set(i, tile.segment * groups + channel / width, channel);
        if (++channel == channels) channel = 0;
    }
}

template <int n>
struct Columns {
    float mean[n], scale[n], shift[n];

    __device__ __forceinline__ Columns(const Affine& of, const Tile<n>& tile, unsigned channels) {
        if (of.width == 1 && channels % n == 0 && is_aligned<16>(of.mean) && is_aligned<16>(of.var) &&
            is_aligned<16>(of.gamma) && is_aligned<16>(of.beta)) {
            const size_t at = static_cast<size_t>(tile.segment) * channels + tile.column;
            const Loaded<float, n> m(of.mean + at), v(of.var + at);
            const Loaded<float, n> gamma(of.gamma + tile.column), beta(of.beta + tile.column);
#pragma unroll
            for (int i = 0; i < n; ++i) {
                mean[i] = m[i];
                scale[i] = gamma[i] * rsqrtf(v[i] + of.eps);
                shift[i] = beta[i];
            }
        } else {
            each_column(tile, channels, of.width, [&](int i, unsigned at, unsigned channel) {
                mean[i] = of.mean[at];
                scale[i] = of.gamma[channel] * rsqrtf(of.var[at] + of.eps);
                shift[i] = of.beta[channel];
            });
        }
    }
};

// ---- y = a(u) ----

template <class T, class Activation>
__device__ __forceinline__ void normalize(const T* x, T* y, const Affine& affine, const Walk& walk,
                                          Activation activation) {
    constexpr int n = kWidth<T>;
    const Tile<n> tile(walk);
    if (tile.count == 0 || tile.at >= tile.end) return;
    const size_t at = tile.at, stride = tile.stride;
    const bool whole = tile.is_whole(x, y);
    auto result = [&](const Columns<n>& of, float value, int i) {
        return activation.apply(fmaf(value - of.mean[i], of.scale[i], of.shift[i]));
    };
    auto store = [&](const Columns<n>& of, const Loaded<T, n>& loaded, size_t to) {
        float v[n];
#pragma unroll
        for (int i = 0; i < n; ++i) v[i] = result(of, loaded[i], i);
        store_vector(y + to, v);
    };
    if (whole && at + (kVectors - 1) * stride + n <= tile.end) {
        static_assert(kVectors == 4, "as many as are written out here");
        const Loaded<T, n> v[4] = {Loaded<T, n>(x + at), Loaded<T, n>(x + at + stride),
                                   Loaded<T, n>(x + at + 2 * stride), Loaded<T, n>(x + at + 3 * stride)};
        const Columns<n> of(affine, tile, walk.channels);
#pragma unroll
        for (int k = 0; k < 4; ++k) store(of, v[k], at + k * stride);
        return;
    }
    const Columns<n> of(affine, tile, walk.channels);
#pragma unroll 1
    for (size_t to = at; to < tile.end; to += stride) {
        const int width = tile.width(to);
        if (whole && width == n) {
            store(of, Loaded<T, n>(x + to), to);
            continue;
        }
#pragma unroll
        for (int i = 0; i < n; ++i) {
            if (i < width) y[to + i] = from_float<T>(result(of, to_float(x[to + i]), i));
        }
    }
}

#define AFFINE_PARAMETERS                                                                        \
    const float *mean, const float *var, const float *gamma, const float *beta, float eps,       \
        unsigned width, int activation
#define AFFINE Affine{mean, var, gamma, beta, eps, width}

// y = a(γ·(x − mean)/√(var + eps) + β); y may be x. Grid as for `Tile` with kVectors steps; any alignment.
#define NORMALIZE(T, suffix)                                                                     \
    extern "C" __global__ void __launch_bounds__(kThreads)                                       \
        normalize_##suffix(const T* x, T* y, AFFINE_PARAMETERS, WALK_PARAMETERS) {               \
        with_activation(activation, [&](auto a) { normalize(x, y, AFFINE, WALK, a); });          \
    }
FOR_EACH_TYPE(NORMALIZE)

// ---- Gradients ----

template <class T, class D, class Activation>
__device__ __forceinline__ void gradient_sums(const T* x, const D* dy, const Affine& affine, const Walk& walk,
                                              const Tile<kWidth<T>>& tile, float (&of_g)[kWidth<T>],
                                              float (&of_gx)[kWidth<T>], Activation activation) {
    constexpr int n = kWidth<T>;
    size_t at = tile.at;
    const size_t stride = tile.stride;
    if (tile.count == 0 || at >= tile.end) return;
    const Columns<n> of(affine, tile, walk.channels);
    const bool whole = tile.is_whole(x, dy);
    auto include = [&](float value, float slope, int i) {
        const float d = value - of.mean[i];
        const float g = activation.gradient(fmaf(d, of.scale[i], of.shift[i]), slope);
        of_g[i] += g;
        of_gx[i] = fmaf(g, d, of_gx[i]);
    };
    if (whole) {
        static_assert(kGradientVectors == 2, "as many as are written out here");
        for (; at + stride + n <= tile.end; at += 2 * stride) {
            const Loaded<T, n> v[2] = {Loaded<T, n>(x + at), Loaded<T, n>(x + at + stride)};
            const Loaded<D, n> w[2] = {Loaded<D, n>(dy + at), Loaded<D, n>(dy + at + stride)};
#pragma unroll
            for (int k = 0; k < 2; ++k) {
#pragma unroll
                for (int i = 0; i < n; ++i) include(v[k][i], w[k][i], i);
            }
        }
    }
#pragma unroll 1
    for (; at < tile.end; at += stride) {
        const int width = tile.width(at);
        if (whole && width == n) {
            const Loaded<T, n> v(x + at);
            const Loaded<D, n> w(dy + at);
#pragma unroll
            for (int i = 0; i < n; ++i) include(v[i], w[i], i);
            continue;
        }
#pragma unroll
        for (int i = 0; i < n; ++i) {
            if (i < width) include(to_float(x[at + i]), to_float(dy[at + i]), i);
        }
    }
}

// partials[segment][piece][channel] = Σg and Σg·(x − mean) of a piece, g = dy·a′(u); dy_narrow: dy is bf16.
// Grid as for `Tile`; any alignment of x and dy, 8 bytes of partials.
template <class T>
__device__ __forceinline__ void partial_gradient_sums(const T* x, const void* dy, int dy_narrow, float* partials,
                                                      const Affine& affine, int activation, const Walk& walk) {
    constexpr int n = kWidth<T>;
    SHARED(float, slots, 2, kThreads * (n + 1));
    const Tile<n> tile(walk);
    float of_g[n] = {}, of_gx[n] = {};
    with_activation(activation, [&](auto a) {
        if (dy_narrow != 0) {
            gradient_sums(x, static_cast<const bf16*>(dy), affine, walk, tile, of_g, of_gx, a);
        } else {
            gradient_sums(x, static_cast<const float*>(dy), affine, walk, tile, of_g, of_gx, a);
        }
    });
#pragma unroll
    for (int i = 0; i < n; ++i) {
        slots[0][threadIdx.x * (n + 1) + i] = of_g[i];
        slots[1][threadIdx.x * (n + 1) + i] = of_gx[i];
    }
    store_partials(slots, partials, walk, tile, Add{});
}
#define GRADIENT_SUMS(T, suffix)                                                                 \
    extern "C" __global__ void __launch_bounds__(kThreads, 2)                                    \
        norm_gradient_sums_##suffix(const T* x, const void* dy, int dy_narrow, float* partials,  \
                                    AFFINE_PARAMETERS, WALK_PARAMETERS) {                        \
        partial_gradient_sums(x, dy, dy_narrow, partials, AFFINE, activation, WALK);             \
    }
FOR_EACH_TYPE(GRADIENT_SUMS)

// The first `channels` blocks: dgamma and dbeta of a channel. The others, one for each segment and group:
// coefficients[segment][group] = mean(γ·g)/√(σ² + ε) and mean(γ·g·(x − μ))/√(σ² + ε)³ over the group's `count`
// elements, which dx needs. Where a group is one channel of one segment, a channel's block writes them too;
// where statistics are constants, coefficients is null. Blocks of kFinishThreads.
extern "C" __global__ void __launch_bounds__(kFinishThreads)
norm_gradient_finish(const float* partials, const float* var, const float* gamma, float eps,
                     float* dgamma, float* dbeta, float* coefficients, size_t count, unsigned channels,
                     unsigned width, unsigned segments, unsigned pieces) {
    SHARED(double, scratch, 2, kFinishThreads / 32);
    const unsigned groups = channels / width;
    auto scale = [&](unsigned segment, unsigned group) {
        return static_cast<double>(rsqrtf(var[segment * groups + group] + eps));
    };
    double of_g = 0.0, of_gx = 0.0;
    if (blockIdx.x < channels) {
        const unsigned channel = blockIdx.x;
#pragma unroll 4
        for (unsigned i = threadIdx.x; i < segments * pieces; i += kFinishThreads) {
            const float* from = partial(partials, i / pieces, pieces, i % pieces, channels, channel);
            of_g += from[0];
            of_gx += from[1] * scale(i / pieces, channel / width);
        }
        of_g = block_reduce<kFinishThreads>(of_g, scratch[0], Sum{});
        of_gx = block_reduce<kFinishThreads>(of_gx, scratch[1], Sum{});
        if (threadIdx.x == 0) {
            dbeta[channel] = static_cast<float>(of_g);
            dgamma[channel] = static_cast<float>(of_gx);
            if (coefficients != nullptr && segments * width == 1) {
                const double rstd = scale(0, channel), factor = rstd * gamma[channel] / count;
                store_pair(coefficients + 2 * static_cast<size_t>(channel), static_cast<float>(factor * of_g),
                           static_cast<float>(factor * rstd * of_gx));
            }
        }
    } else {
        const unsigned block = blockIdx.x - channels, segment = block / groups, group = block % groups;
#pragma unroll 4
        for (unsigned i = threadIdx.x; i < pieces * width; i += kFinishThreads) {
            const unsigned channel = group * width + i % width;
            const float* from = partial(partials, segment, pieces, i / width, channels, channel);
            of_g += static_cast<double>(gamma[channel]) * from[0];
            of_gx += static_cast<double>(gamma[channel]) * from[1];
        }
        of_g = block_reduce<kFinishThreads>(of_g, scratch[0], Sum{});
        of_gx = block_reduce<kFinishThreads>(of_gx, scratch[1], Sum{});
        if (threadIdx.x == 0) {
            const double rstd = scale(segment, group), factor = rstd / count;
            store_pair(coefficients + 2 * static_cast<size_t>(block), static_cast<float>(factor * of_g),
                       static_cast<float>(factor * rstd * rstd * of_gx));
        }
    }
}

// The coefficients of a thread's columns.
template <int n>
struct Means {
    float of_g[n], of_gx[n];

    __device__ __forceinline__ Means(const float* coefficients, const Affine& affine, const Tile<n>& tile,
                                     unsigned channels) {
        if (affine.width == 1 && channels % n == 0 && is_aligned<16>(coefficients)) {
            const size_t at = static_cast<size_t>(tile.segment) * channels + tile.column;
            const Loaded<float, 2 * n> pairs(coefficients + 2 * at);
#pragma unroll
            for (int i = 0; i < n; ++i) {
                of_g[i] = pairs[2 * i];
                of_gx[i] = pairs[2 * i + 1];
            }
        } else {
            each_column(tile, channels, affine.width, [&](int i, unsigned at, unsigned) {
                of_g[i] = coefficients[2 * static_cast<size_t>(at)];
                of_gx[i] = coefficients[2 * static_cast<size_t>(at) + 1];
            });
        }
    }
    // Of constant statistics.
    __device__ __forceinline__ Means() {
#pragma unroll
        for (int i = 0; i < n; ++i) of_g[i] = of_gx[i] = 0.0f;
    }
};

template <class T, class D, class Activation>
__device__ __forceinline__ void gradient(const T* x, const D* dy, const float* coefficients, T* dx,
                                         const Affine& affine, const Walk& walk, Activation activation) {
    constexpr int n = kWidth<T>;
    const Tile<n> tile(walk);
    if (tile.count == 0 || tile.at >= tile.end) return;
    const size_t at = tile.at, stride = tile.stride;
    const bool whole = tile.is_whole(x, dy) && is_aligned<16>(dx);
    const Columns<n> of(affine, tile, walk.channels);
    const Means<n> means = coefficients == nullptr ? Means<n>()
                                                   : Means<n>(coefficients, affine, tile, walk.channels);
    auto result = [&](float value, float slope, int i) {
        const float d = value - of.mean[i];
        const float g = activation.gradient(fmaf(d, of.scale[i], of.shift[i]), slope);
        return fmaf(g, of.scale[i], -fmaf(d, means.of_gx[i], means.of_g[i]));
    };
    auto store = [&](const Loaded<T, n>& v, const Loaded<D, n>& w, size_t to) {
        float r[n];
#pragma unroll
        for (int i = 0; i < n; ++i) r[i] = result(v[i], w[i], i);
        store_vector(dx + to, r);
    };
    size_t to = at;
    if (whole) {
        for (; to + stride + n <= tile.end; to += 2 * stride) {
            const Loaded<T, n> v[2] = {Loaded<T, n>(x + to), Loaded<T, n>(x + to + stride)};
            const Loaded<D, n> w[2] = {Loaded<D, n>(dy + to), Loaded<D, n>(dy + to + stride)};
            store(v[0], w[0], to);
            store(v[1], w[1], to + stride);
        }
    }
#pragma unroll 1
    for (; to < tile.end; to += stride) {
        const int width = tile.width(to);
        if (whole && width == n) {
            store(Loaded<T, n>(x + to), Loaded<D, n>(dy + to), to);
            continue;
        }
#pragma unroll
        for (int i = 0; i < n; ++i) {
            if (i < width) dx[to + i] = from_float<T>(result(to_float(x[to + i]), to_float(dy[to + i]), i));
        }
    }
}

// dx = γ·g/√(σ² + ε) − (x − μ)·coefficients[1] − coefficients[0], without those two where they are null; dx may
// be dy if they are stored alike. Grid as for `Tile`; any alignment.
#define GRADIENT(T, suffix)                                                                      \
    extern "C" __global__ void __launch_bounds__(kThreads, 2)                                    \
        norm_gradient_##suffix(const T* x, const void* dy, int dy_narrow,                        \
                               const float* coefficients, T* dx, AFFINE_PARAMETERS,              \
                               WALK_PARAMETERS) {                                                \
        with_activation(activation, [&](auto a) {                                                \
            if (dy_narrow != 0) {                                                                \
                gradient(x, static_cast<const bf16*>(dy), coefficients, dx, AFFINE, WALK, a);    \
            } else {                                                                             \
                gradient(x, static_cast<const float*>(dy), coefficients, dx, AFFINE, WALK, a);   \
            }                                                                                    \
        });                                                                                      \
    }
FOR_EACH_TYPE(GRADIENT)

// ---- Layer normalisation: over the channels of each pixel ----
//
// Some lanes of a warp, a power of two, have a row of x and go along it as often as they need, the second and
// third time in the first-level cache. The gradient makes three passes over x and dy: for the statistics and means
// of each row, for the columns' sums, which are walked in tiles as above, and for dx, which may overwrite dy.
//
//     layer_norm                 8 / 4     layer_norm_rows          8 / 4
//     layer_norm_gradient        12 / 6    layer_norm_gradient_sums 8 / 4

// A lane's part of a row of `channels` elements: n at a time, lanes * n apart. Grid: ceil(rows / (kThreads / lanes))
// blocks of kThreads. Lanes without a row take part in the sums.
struct Lanes {
    size_t row;
    unsigned lane, lanes, channels;
    // 1 / channels, once: a division is a call.
    float share;
    bool exists;

    __device__ __forceinline__ Lanes(size_t rows, unsigned channels, unsigned lanes)
        : row(blockIdx.x * static_cast<size_t>(kThreads / lanes) + threadIdx.x / lanes),
          lane(threadIdx.x % lanes), lanes(lanes), channels(channels),
          share(1.0f / static_cast<float>(channels)), exists(row < rows) {}

    // Adds to sums what f does over the row, in all of its lanes; f adds n elements from a channel on.
    template <int n, int Count, class F>
    __device__ __forceinline__ void add(float (&sums)[Count], F f) const {
        if (exists) {
            for (unsigned channel = lane * n; channel < channels; channel += lanes * n) f(channel, sums);
        }
        for (unsigned offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
            for (int k = 0; k < Count; ++k) {
                sums[k] += __shfl_xor_sync(kFullWarp, sums[k], static_cast<int>(offset));
            }
        }
    }
};

// Mean and 1/√(σ² + ε) of a row.
struct Moments {
    float mean, rstd;
};
template <int n, class T>
__device__ __forceinline__ Moments row_moments(const T* from, const Lanes& of, float eps) {
    float sum[1] = {}, squares[1] = {};
    of.add<n>(sum, [&](unsigned channel, float (&sum)[1]) {
        const Loaded<T, n> v(from + channel);
#pragma unroll
        for (int i = 0; i < n; ++i) sum[0] += v[i];
    });
    const float mean = sum[0] * of.share;
    of.add<n>(squares, [&](unsigned channel, float (&sum)[1]) {
        const Loaded<T, n> v(from + channel);
#pragma unroll
        for (int i = 0; i < n; ++i) sum[0] = fmaf(v[i] - mean, v[i] - mean, sum[0]);
    });
    return {mean, rsqrtf(squares[0] * of.share + eps)};
}

template <int n, class T>
__device__ __forceinline__ void store_some(T* y, const float (&v)[n]) {
    if constexpr (n == kWidth<T>) {
        store_vector(y, v);
    } else {
        static_assert(n == 1, "a vector or an element");
        *y = from_float<T>(v[0]);
    }
}

template <int n, class T>
__device__ __forceinline__ void layer_norm(const T* x, T* y, const float* gamma, const float* beta, float eps,
                                           const Lanes& of) {
    const T* from = x + of.row * of.channels;
    const Moments row = row_moments<n>(from, of, eps);
    if (!of.exists) return;
    for (unsigned channel = of.lane * n; channel < of.channels; channel += of.lanes * n) {
        const Loaded<T, n> v(from + channel);
        const Loaded<float, n> scale(gamma + channel), shift(beta + channel);
        float r[n];
#pragma unroll
        for (int i = 0; i < n; ++i) r[i] = fmaf(v[i] - row.mean, scale[i] * row.rstd, shift[i]);
        store_some<n>(y + of.row * of.channels + channel, r);
    }
}

// y = γ·x̂ + β; y may be x. Grid as for `Lanes`; any alignment.
#define LAYER_NORM(T, suffix)                                                                    \
    extern "C" __global__ void __launch_bounds__(kThreads)                                       \
        layer_norm_##suffix(const T* x, T* y, const float* gamma, const float* beta, float eps,  \
                            size_t rows, unsigned channels, unsigned lanes) {                    \
        const Lanes of(rows, channels, lanes);                                                   \
        const bool whole = channels % kWidth<T> == 0 && is_aligned<16>(x) && is_aligned<16>(y) && \
                           is_aligned<16>(gamma) && is_aligned<16>(beta);                        \
        if (whole) {                                                                             \
            layer_norm<kWidth<T>>(x, y, gamma, beta, eps, of);                                   \
        } else {                                                                                 \
            layer_norm<1>(x, y, gamma, beta, eps, of);                                           \
        }                                                                                        \
    }
FOR_EACH_TYPE(LAYER_NORM)

template <int n, class T, class D>
__device__ __forceinline__ void layer_norm_rows(const T* x, const D* dy, const float* gamma, float* moments,
                                                float eps, const Lanes& of) {
    const T* from = x + of.row * of.channels;
    const D* slopes = dy + of.row * of.channels;
    const Moments row = row_moments<n>(from, of, eps);
    // Σ γ·dy and Σ γ·dy·x̂.
    float sums[2] = {};
    of.add<n>(sums, [&](unsigned channel, float (&sums)[2]) {
        const Loaded<T, n> v(from + channel);
        const Loaded<D, n> w(slopes + channel);
        const Loaded<float, n> scale(gamma + channel);
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const float g = w[i] * scale[i];
            sums[0] += g;
            sums[1] = fmaf(g, (v[i] - row.mean) * row.rstd, sums[1]);
        }
    });
    if (!of.exists || of.lane != 0) return;
    *reinterpret_cast<Vector<float, 4>*>(moments + 4 * of.row) = {{row.mean, row.rstd, sums[0] * of.share,
                                                                  sums[1] * of.share}};
}

template <int n, class T, class D>
__device__ __forceinline__ void layer_norm_gradient(const T* x, const D* dy, const float* gamma,
                                                    const float* moments, T* dx, const Lanes& of) {
    if (!of.exists) return;
    const Loaded<float, 4> row(moments + 4 * of.row);
    for (unsigned channel = of.lane * n; channel < of.channels; channel += of.lanes * n) {
        const size_t at = of.row * of.channels + channel;
        const Loaded<T, n> v(x + at);
        const Loaded<D, n> w(dy + at);
        const Loaded<float, n> scale(gamma + channel);
        float r[n];
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const float normal = (v[i] - row[0]) * row[1];
            r[i] = row[1] * (fmaf(w[i], scale[i], -row[2]) - normal * row[3]);
        }
        store_some<n>(dx + at, r);
    }
}

// The type of dy and the width of a move, chosen when a kernel runs.
#define WITH_TYPE_AND_WIDTH(function, T, ...)                                                    \
    const Lanes of(rows, channels, lanes);                                                       \
    const bool whole = channels % kWidth<T> == 0 && is_aligned<16>(x) && is_aligned<16>(dy) &&   \
                       is_aligned<16>(gamma) && is_aligned<16>(dx);                              \
    const auto *wide = static_cast<const float*>(dy);                                            \
    const auto *narrow = static_cast<const bf16*>(dy);                                           \
    if (whole && dy_narrow != 0) {                                                               \
        function<kWidth<T>>(x, narrow, __VA_ARGS__);                                             \
    } else if (whole) {                                                                          \
        function<kWidth<T>>(x, wide, __VA_ARGS__);                                               \
    } else if (dy_narrow != 0) {                                                                 \
        function<1>(x, narrow, __VA_ARGS__);                                                     \
    } else {                                                                                     \
        function<1>(x, wide, __VA_ARGS__);                                                       \
    }

// moments[row] = mean, 1/√(var + eps), mean(γ·dy) and mean(γ·dy·x̂) of a row, a multiple of 16.
// Grid as for `Lanes`; any alignment of the others.
#define LAYER_NORM_ROWS(T, suffix)                                                               \
    extern "C" __global__ void __launch_bounds__(kThreads)                                       \
        layer_norm_rows_##suffix(const T* x, const void* dy, int dy_narrow, const float* gamma,  \
                                 float* moments, float eps, size_t rows, unsigned channels,      \
                                 unsigned lanes) {                                               \
        const T* dx = x;                                                                         \
        WITH_TYPE_AND_WIDTH(layer_norm_rows, T, gamma, moments, eps, of)                         \
    }
FOR_EACH_TYPE(LAYER_NORM_ROWS)

// dx = (γ·dy − mean(γ·dy) − x̂·mean(γ·dy·x̂))/√(var + eps); dx may be dy if they are stored alike.
// Grid as for `Lanes`; any alignment, 16 bytes of moments.
#define LAYER_NORM_GRADIENT(T, suffix)                                                           \
    extern "C" __global__ void __launch_bounds__(kThreads)                                       \
        layer_norm_gradient_##suffix(const T* x, const void* dy, int dy_narrow,                  \
                                     const float* gamma, const float* moments, T* dx,            \
                                     size_t rows, unsigned channels, unsigned lanes) {           \
        WITH_TYPE_AND_WIDTH(layer_norm_gradient, T, gamma, moments, dx, of)                      \
    }
FOR_EACH_TYPE(LAYER_NORM_GRADIENT)

// Sums of a thread's columns.
template <class T, class D>
__device__ __forceinline__ void layer_sums(const T* x, const D* dy, const float* moments, const Walk& walk,
                                           const Tile<kWidth<T>>& tile, float (&of_g)[kWidth<T>],
                                           float (&of_gx)[kWidth<T>]) {
    constexpr int n = kWidth<T>;
    const bool whole = tile.is_whole(x, dy), single = walk.period == walk.channels;
    size_t row = tile.at / walk.channels;
    const size_t down = tile.stride / walk.channels;
    if (tile.count == 0) return;
    auto add = [&](int i, float value, float slope, float mean, float rstd) {
        of_g[i] += slope;
        of_gx[i] = fmaf(slope, (value - mean) * rstd, of_gx[i]);
    };
#pragma unroll 2
    for (size_t at = tile.at; at < tile.end; at += tile.stride, row += down) {
        const int width = tile.width(at);
        if (whole && single && width == n) {
            const Loaded<T, n> v(x + at);
            const Loaded<D, n> w(dy + at);
            const Loaded<float, 2> of(moments + 4 * row);
#pragma unroll
            for (int i = 0; i < n; ++i) add(i, v[i], w[i], of[0], of[1]);
            continue;
        }
        size_t other = row;
        unsigned channel = tile.column % walk.channels;
#pragma unroll
        for (int i = 0; i < n; ++i) {
            if (i < width) {
                add(i, to_float(x[at + i]), to_float(dy[at + i]), moments[4 * other], moments[4 * other + 1]);
            }
            if (++channel == walk.channels) {
                channel = 0;
                ++other;
            }
        }
    }
}

// partials[piece][channel] = Σ dy and Σ dy·x̂ over the rows of a piece. Grid as for `Tile`, of one segment.
#define LAYER_NORM_GRADIENT_SUMS(T, suffix)                                                      \
    extern "C" __global__ void __launch_bounds__(kThreads, 3)                                    \
        layer_norm_gradient_sums_##suffix(const T* x, const void* dy, int dy_narrow,             \
                                          const float* moments, float* partials,                 \
                                          WALK_PARAMETERS) {                                     \
        layer_partials(x, dy, dy_narrow, moments, partials, WALK);                               \
    }
template <class T>
__device__ __forceinline__ void layer_partials(const T* x, const void* dy, int dy_narrow, const float* moments,
                                               float* partials, const Walk& walk) {
    constexpr int n = kWidth<T>;
    SHARED(float, slots, 2, kThreads * (n + 1));
    const Tile<n> tile(walk);
    float of_g[n] = {}, of_gx[n] = {};
    if (dy_narrow != 0) {
        layer_sums(x, static_cast<const bf16*>(dy), moments, walk, tile, of_g, of_gx);
    } else {
        layer_sums(x, static_cast<const float*>(dy), moments, walk, tile, of_g, of_gx);
    }
#pragma unroll
    for (int i = 0; i < n; ++i) {
        slots[0][threadIdx.x * (n + 1) + i] = of_g[i];
        slots[1][threadIdx.x * (n + 1) + i] = of_gx[i];
    }
    store_partials(slots, partials, walk, tile, Add{});
}
FOR_EACH_TYPE(LAYER_NORM_GRADIENT_SUMS)

// dbeta and dgamma of a channel. Grid: channels blocks of kFinishThreads.
extern "C" __global__ void __launch_bounds__(kFinishThreads)
layer_norm_gradient_finish(const float* partials, float* dgamma, float* dbeta, unsigned channels,
                           unsigned pieces) {
    SHARED(double, scratch, 2, kFinishThreads / 32);
    double of_g = 0.0, of_gx = 0.0;
#pragma unroll 4
    for (unsigned piece = threadIdx.x; piece < pieces; piece += kFinishThreads) {
        const float* from = partial(partials, 0, pieces, piece, channels, blockIdx.x);
        of_g += from[0];
        of_gx += from[1];
    }
    of_g = block_reduce<kFinishThreads>(of_g, scratch[0], Sum{});
    of_gx = block_reduce<kFinishThreads>(of_gx, scratch[1], Sum{});
    if (threadIdx.x == 0) {
        dbeta[blockIdx.x] = static_cast<float>(of_g);
        dgamma[blockIdx.x] = static_cast<float>(of_gx);
    }
}

// ---- Weights of a network in inference, of which normalisations are a part ----

// A part of a tensor of weights, and where it goes: as it is, or each filter times γ/√(σ² + ε) of the normalisation
// behind it, whose filters then have a bias.
struct Folded {
    const float* from;
    float* to;
    const float *gamma, *beta, *mean, *variance;  // null: as it is
    float* bias;
    unsigned first, len;  // elements of the tensor
    unsigned filter;      // elements of a filter
};

// Makes the weights of a table, in f64 and with the roundings of src/nn/weights.rs, so that no bit depends on where they
// are made. Grid: one block of kThreads for each part, which has at most a few thousand elements. Any alignment.
extern "C" __global__ void __launch_bounds__(kThreads) fold_norm(const Folded* parts, double eps) {
    const Folded part = parts[blockIdx.x];
    const float* from = global_address(part.from);
    float* to = global_address(part.to);
    for (unsigned i = part.first + threadIdx.x; i < part.first + part.len; i += kThreads) {
        const float w = from[i];
        if (part.gamma == nullptr) {
            to[i] = w;
            continue;
        }
        const unsigned o = i / part.filter;
        const double spread = sqrt(__dadd_rn(part.variance[o], eps)), factor = part.gamma[o] / spread;
        to[i] = static_cast<float>(__dmul_rn(factor, w));
        if (i == o * part.filter) {
            part.bias[o] = static_cast<float>(__dadd_rn(part.beta[o], -__dmul_rn(factor, part.mean[o])));
        }
    }
}
