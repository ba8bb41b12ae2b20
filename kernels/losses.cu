// The losses that are not fused: cross-entropy, soft Dice and squared error of images, and the weighted
// mean of their values. What the fused kernels are compared with, so each makes no more passes over memory
// than an operation of its own must: every element is read once forward (twice where a gradient needs its
// image's sums first) and written once backward, 16 bytes a thread and access. Beside them the overlap of masks,
// which validation counts.
//
// An image of len elements is cut into pieces of kPiece, a block each. A thread adds up to 16 terms in f32,
// the block adds those in f64, and the sums of all pieces go to `partial`, [image][piece][sum]. Whoever
// needs an image's sums adds its pieces in one warp, in an order that depends on their number alone.
//
// Bytes a pixel in f32: sums 8, gradients 12, for Dice 8 more. About 25 instructions a pixel for cross-entropy
// and for its gradient, 5 for the others: on an H200, whose 28·10¹² lanes a second have 48 instructions for
// 8 bytes from memory, all are bound by memory in f32 (predicted); cross-entropy in bf16 is even.
//
// Tensors of any length and alignment: where vectors do not fit, elements are moved one by one.
#include "device.cuh"

constexpr int kThreads = 256;

// Elements of one piece.
constexpr int kPiece = 4096;

// max(z, 0) − z·g + ln(1 + e^−|z|). The logarithm is 2·artanh(s) of s = e/(2 + e) ≤ 1/3 by its series, which
// keeps full relative accuracy where e is small.
struct CrossEntropy {
    static constexpr int kSums = 1;
    __device__ __forceinline__ void operator()(float (&sum)[1], float z, float g) const {
        const float e = __expf(-fabsf(z));
        const float s = __fdividef(e, e + 2.0f);
        const float square = s * s;
        float series = 2.0f / 17.0f;
#pragma unroll
        for (int k = 15; k >= 1; k -= 2) series = fmaf(series, square, 2.0f / k);
        const float positive = z < 0.0f ? 0.0f : z;  // a NaN stays
        sum[0] += fmaf(-z, g, positive) + s * series;
    }
};

// Σmg and Σ(m + g).
struct Dice {
    static constexpr int kSums = 2;
    __device__ __forceinline__ void operator()(float (&sum)[2], float m, float g) const {
        sum[0] = fmaf(m, g, sum[0]);
        sum[1] += m + g;
    }
};

// Pixels in both masks, and in the one plus in the other: a logit of 0 or more is inside, and so is a pixel that is at
// least half lesion. Counts of a piece are exact.
struct Overlap {
    static constexpr int kSums = 2;
    __device__ __forceinline__ void operator()(float (&sum)[2], float z, float g) const {
        const bool predicted = z >= 0.0f, truth = g >= 0.5f;
        if (predicted && truth) sum[0] += 1.0f;
        if (predicted) sum[1] += 1.0f;
        if (truth) sum[1] += 1.0f;
    }
};

struct SquaredError {
    static constexpr int kSums = 1;
    __device__ __forceinline__ void operator()(float (&sum)[1], float a, float b) const {
        sum[0] = fmaf(a - b, a - b, sum[0]);
    }
};

// Which elements a block works on.
struct Piece {
    int image, piece, count;
    size_t start;

    __device__ __forceinline__ Piece(int len, int pieces) {
        image = static_cast<int>(blockIdx.x) / pieces;
        piece = static_cast<int>(blockIdx.x) % pieces;
        count = min(len - piece * kPiece, kPiece);
        // Unsigned: sums of sign-extended offsets keep nvcc from storing whole vectors.
        start = static_cast<size_t>(image) * static_cast<unsigned>(len) +
                static_cast<unsigned>(piece * kPiece);
    }
};

// Elements moved at once of tensors of two types.
template <class A, class B>
constexpr int kWidth = 16 / (sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));

template <class T, class G, class Term>
__device__ __forceinline__ void piece_sums(const T* a, const G* b, double* partial, int len, int pieces,
                                           Term term) {
    constexpr int n = kWidth<T, G>;
    SHARED(double, scratch, kThreads / 32, Term::kSums);
    const Piece at(len, pieces);
    a += at.start;
    b += at.start;
    float sums[Term::kSums] = {};
    int done = 0;
    if (is_aligned<sizeof(T) * n>(a) && is_aligned<sizeof(G) * n>(b)) {
        done = at.count / n * n;
        constexpr int kVectors = kPiece / (kThreads * n);
        Vector<T, n> x[kVectors];
        Vector<G, n> y[kVectors];
        // All of a thread's loads are under way before the first is used.
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            const int i = (v * kThreads + static_cast<int>(threadIdx.x)) * n;
            if (i >= done) continue;
            x[v] = *reinterpret_cast<const Vector<T, n>*>(a + i);
            y[v] = *reinterpret_cast<const Vector<G, n>*>(b + i);
        }
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            if ((v * kThreads + static_cast<int>(threadIdx.x)) * n >= done) continue;
#pragma unroll
            for (int k = 0; k < n; ++k) term(sums, to_float(x[v].at[k]), to_float(y[v].at[k]));
        }
    }
#pragma unroll 1
    for (int i = done + static_cast<int>(threadIdx.x); i < at.count; i += kThreads) {
        term(sums, to_float(a[i]), to_float(b[i]));
    }
    double wide[Term::kSums];
#pragma unroll
    for (int k = 0; k < Term::kSums; ++k) wide[k] = sums[k];
    const double total = block_sums<kThreads>(wide, scratch);
    if (threadIdx.x < Term::kSums) {
        partial[static_cast<size_t>(blockIdx.x) * Term::kSums + threadIdx.x] = total;
    }
}

// Sum k of an image from its pieces, by a warp, in every lane.
template <int Sums>
__device__ __forceinline__ double image_sum(const double* partial, int image, int pieces, int k) {
    return warp_sum(partial + static_cast<size_t>(image) * pieces * Sums + k, pieces, Sums);
}

// y[i] = f(a[i], b[i]) over a piece. y is neither a nor b.
template <class T, class G, class F>
__device__ __forceinline__ void spread(const Piece& at, const T* a, const G* b, T* y, F f) {
    constexpr int n = kWidth<T, G>;
    a += at.start;
    b += at.start;
    y += at.start;
    int done = 0;
    if (is_aligned<sizeof(T) * n>(a) && is_aligned<sizeof(G) * n>(b) && is_aligned<sizeof(T) * n>(y)) {
        done = at.count / n * n;
        constexpr int kVectors = kPiece / (kThreads * n);
        Vector<T, n> x[kVectors];
        Vector<G, n> g[kVectors];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            const int i = (v * kThreads + static_cast<int>(threadIdx.x)) * n;
            if (i >= done) continue;
            x[v] = *reinterpret_cast<const Vector<T, n>*>(a + i);
            g[v] = *reinterpret_cast<const Vector<G, n>*>(b + i);
        }
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            const int i = (v * kThreads + static_cast<int>(threadIdx.x)) * n;
            if (i >= done) continue;
#pragma unroll
            for (int k = 0; k < n; ++k) {
                x[v].at[k] = from_float<T>(f(to_float(x[v].at[k]), to_float(g[v].at[k])));
            }
            *reinterpret_cast<Vector<T, n>*>(y + i) = x[v];
        }
    }
#pragma unroll 1
    for (int i = done + static_cast<int>(threadIdx.x); i < at.count; i += kThreads) {
        y[i] = from_float<T>(f(to_float(a[i]), to_float(b[i])));
    }
}

// FAMILY_sums: partial of the family's terms. Grid: images * pieces blocks of kThreads,
// pieces = ceil(len / kPiece). `partial` is aligned to 8.
#define SUMS(name, Term, T, G)                                                                   \
    extern "C" __global__ void __launch_bounds__(kThreads)                                       \
        name(const T* a, const G* b, double* partial, int len, int pieces) {                     \
        piece_sums(a, b, partial, len, pieces, Term{});                                          \
    }
SUMS(bce_sums_f32, CrossEntropy, float, float)
SUMS(bce_sums_bf16, CrossEntropy, bf16, bf16)
SUMS(dice_sums_f32, Dice, float, float)
SUMS(dice_sums_bf16, Dice, bf16, bf16)
SUMS(overlap_sums_f32, Overlap, float, float)
SUMS(overlap_sums_bf16, Overlap, bf16, bf16)
SUMS(mse_sums_f32, SquaredError, float, float)
SUMS(mse_sums_bf16, SquaredError, bf16, bf16)
// The targets in f32 whatever the logits: labels, one per image.
SUMS(bce_label_sums_f32, CrossEntropy, float, float)
SUMS(bce_label_sums_bf16, CrossEntropy, bf16, float)

// y[image] = Σ / len. Grid: one warp per image.
extern "C" __global__ void __launch_bounds__(32)
    image_means(const double* partial, float* y, int len, int pieces) {
    const int image = static_cast<int>(blockIdx.x);
    const double sum = image_sum<1>(partial, image, pieces, 0);
    if (threadIdx.x == 0) y[image] = static_cast<float>(sum / len);
}

// y[image] = 1 − (2Σmg + 1)/(Σ(m + g) + 1). Grid: one warp per image.
extern "C" __global__ void __launch_bounds__(32) soft_dice(const double* partial, float* y, int pieces) {
    const int image = static_cast<int>(blockIdx.x);
    const double both = image_sum<2>(partial, image, pieces, 0);
    const double either = image_sum<2>(partial, image, pieces, 1);
    if (threadIdx.x == 0) y[image] = static_cast<float>(1.0 - (2.0 * both + 1.0) / (either + 1.0));
}

// y[image] = (pixels in both masks, pixels in the one plus in the other). Grid: one warp per image.
extern "C" __global__ void __launch_bounds__(32) overlap(const double* partial, float* y, int pieces) {
    const int image = static_cast<int>(blockIdx.x);
    const double both = image_sum<2>(partial, image, pieces, 0);
    const double either = image_sum<2>(partial, image, pieces, 1);
    if (threadIdx.x < 2) y[2 * image + static_cast<int>(threadIdx.x)] = static_cast<float>(threadIdx.x == 0 ? both : either);
}

// dz = dy/len·(σ(z)(1 − g) − σ(−z)g), which cancels nowhere. Grid as FAMILY_sums.
template <class T, class G>
__device__ __forceinline__ void bce_gradient(const float* dy, const T* z, const G* g, T* dz, int len,
                                             int pieces) {
    const Piece at(len, pieces);
    const float scale = dy[at.image] / static_cast<float>(len);
    spread(at, z, g, dz, [scale](float z, float g) {
        const Sigmoid p = sigmoid(z);
        return scale * (p.value * (1.0f - g) - p.complement * g);
    });
}

// dm = dy·(q − 2g)/(Σ(m + g) + 1) with q = (2Σmg + 1)/(Σ(m + g) + 1). Grid as FAMILY_sums.
template <class T>
__device__ __forceinline__ void dice_gradient(const float* dy, const T* g, const double* partial, T* dm,
                                              int len, int pieces) {
    const Piece at(len, pieces);
    const double both = image_sum<2>(partial, at.image, pieces, 0);
    const double either = image_sum<2>(partial, at.image, pieces, 1);
    const float q = static_cast<float>((2.0 * both + 1.0) / (either + 1.0));
    const float scale = static_cast<float>(dy[at.image] / (either + 1.0));
    spread(at, g, g, dm, [q, scale](float g, float) { return scale * (q - (g + g)); });
}

// da = dy/len·2(a − b). Grid as FAMILY_sums.
template <class T>
__device__ __forceinline__ void mse_gradient(const float* dy, const T* a, const T* b, T* da, int len,
                                             int pieces) {
    const Piece at(len, pieces);
    const float scale = 2.0f * dy[at.image] / static_cast<float>(len);
    spread(at, a, b, da, [scale](float a, float b) { return scale * (a - b); });
}

#define BCE_GRADIENT(name, T, G)                                                                 \
    extern "C" __global__ void __launch_bounds__(kThreads)                                       \
        name(const float* dy, const T* z, const G* g, T* dz, int len, int pieces) {              \
        bce_gradient(dy, z, g, dz, len, pieces);                                                 \
    }
BCE_GRADIENT(bce_gradient_f32, float, float)
BCE_GRADIENT(bce_gradient_bf16, bf16, bf16)
BCE_GRADIENT(bce_label_gradient_f32, float, float)
BCE_GRADIENT(bce_label_gradient_bf16, bf16, float)

#define GRADIENTS(T, suffix)                                                                     \
    extern "C" __global__ void __launch_bounds__(kThreads)                                       \
        dice_gradient_##suffix(const float* dy, const T* g, const double* partial, T* dm,        \
                               int len, int pieces) {                                            \
        dice_gradient(dy, g, partial, dm, len, pieces);                                          \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(kThreads)                                       \
        mse_gradient_##suffix(const float* dy, const T* a, const T* b, T* da, int len,           \
                              int pieces) {                                                      \
        mse_gradient(dy, a, b, da, len, pieces);                                                 \
    }
GRADIENTS(float, f32)
GRADIENTS(bf16, bf16)

// y = Σwv / Σw over the n images, 0 without weight; values of weight 0 are left out. One block.
extern "C" __global__ void __launch_bounds__(kThreads)
    weighted_mean(const float* v, const float* w, float* y, int n) {
    SHARED(double, scratch, kThreads / 32, 2);
    SHARED(double, totals, 2);
    double sums[2] = {};
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) {
        if (w[i] != 0.0f) sums[0] += static_cast<double>(v[i]) * w[i];
        sums[1] += w[i];
    }
    const double total = block_sums<kThreads>(sums, scratch);
    if (threadIdx.x < 2) totals[threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.x == 0) y[0] = static_cast<float>(totals[1] > 0.0 ? totals[0] / totals[1] : 0.0);
}

// dv = dy·w/Σw, zeros without weight. One block.
extern "C" __global__ void __launch_bounds__(kThreads)
    weighted_mean_gradient(const float* dy, const float* w, float* dv, int n) {
    SHARED(double, scratch, kThreads / 32);
    double sum = 0.0;
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) sum += w[i];
    sum = block_reduce<kThreads>(sum, scratch, Sum{});
    const double scale = sum > 0.0 ? dy[0] / sum : 0.0;
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) {
        dv[i] = static_cast<float>(w[i] * scale);
    }
}
