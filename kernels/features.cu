// The shape features that are not fused: soft moments and soft perimeter of masks, and what follows from
// them image by image. What the mask head and the multitask loss are compared with.
//
// Masks are read once forward, and read and written once backward, 16 bytes a thread and access where rows
// allow it (a width that is a multiple of 4 in f32, 8 in bf16), else element by element. A thread works
// on a patch: a few rows of as many columns as 16 bytes hold. The stencils of the perimeter read one or two
// pixels more on each side, which lie in the first-level cache.
//
// Moments: in f32 only within a patch, about its corner, where coordinates are small; moved to the image's
// centre in f64 (20 operations for 16 or 32 pixels) and to the mask's centroid when the image's sums are
// complete. In f32 about the centre a lesion of radius 5 near the edge would lose its variance.
//
// Bytes a pixel in f32: sums 4, gradients 8. Instructions a pixel, counted in the machine code of sm_90a: moments
// 22 (half of them to add up a block), their gradient 15, perimeter 30, its gradient 45 (the patch's margin
// included). At 48 for 8 bytes (kernels/losses.cu) perimeters are bound by arithmetic, moments by both alike.
#include "device.cuh"
#include "shape.cuh"

constexpr int kThreads = 256;
constexpr int kPerimeterThreads = 128;

// Rows of a patch.
constexpr int kRows = 4;
constexpr int kGradientRows = 8;

// Softening of the gradient's length, times the 8 by which Sobel's stencil is too large.
constexpr float kSoftening = 8e-3f;

// Columns of a patch.
template <class T>
constexpr int kWidth = 16 / sizeof(T);

// An image's pixels, zero outside.
template <class T>
struct Mask {
    const T* pixels;
    int height, width;
    // Whether a patch's row is one vector.
    bool vectors;

    __device__ __forceinline__ Mask(const T* masks, int image, int height, int width)
        : pixels(masks + static_cast<size_t>(image) * height * width), height(height), width(width),
          vectors(width % kWidth<T> == 0 && is_aligned<16>(masks)) {}

    // Columns column − Margin to column + kWidth + Margin − 1 of a row; `column` is a patch's first.
    template <int Margin>
    __device__ __forceinline__ void load(int row, int column, float (&m)[kWidth<T> + 2 * Margin]) const {
        constexpr int n = kWidth<T>;
#pragma unroll
        for (int k = 0; k < n + 2 * Margin; ++k) m[k] = 0.0f;
        if (row < 0 || row >= height) return;
        const T* of = pixels + static_cast<size_t>(row) * width;
        if (vectors) {
            if (column >= 0 && column < width) {
                const Vector<T, n> v = *reinterpret_cast<const Vector<T, n>*>(of + column);
#pragma unroll
                for (int k = 0; k < n; ++k) m[Margin + k] = to_float(v.at[k]);
            }
#pragma unroll
            for (int k = 0; k < Margin; ++k) {
                const int left = column - Margin + k, right = column + n + k;
                if (left >= 0 && left < width) m[k] = to_float(of[left]);
                if (right >= 0 && right < width) m[Margin + n + k] = to_float(of[right]);
            }
        } else {
#pragma unroll
            for (int k = 0; k < n + 2 * Margin; ++k) {
                const int x = column - Margin + k;
                if (x >= 0 && x < width) m[k] = to_float(of[x]);
            }
        }
    }

    // Writes a patch's row of an image laid out as this one.
    __device__ __forceinline__ void store(T* images, int image, int row, int column,
                                          const float (&d)[kWidth<T>]) const {
        constexpr int n = kWidth<T>;
        if (row >= height) return;
        T* of = images + (static_cast<size_t>(image) * height + row) * width;
        if (vectors && is_aligned<16>(images)) {
            Vector<T, n> v;
#pragma unroll
            for (int k = 0; k < n; ++k) v.at[k] = from_float<T>(d[k]);
            *reinterpret_cast<Vector<T, n>*>(of + column) = v;
        } else {
#pragma unroll
            for (int k = 0; k < n; ++k) {
                if (column + k < width) of[column + k] = from_float<T>(d[k]);
            }
        }
    }
};

// Which patch a thread works on: `blocks` blocks of Threads for each image, patches row by row, `across` of
// them in a row.
template <int Threads>
struct Patch {
    int image, band, group;

    __device__ __forceinline__ Patch(int blocks, int across) {
        image = static_cast<int>(blockIdx.x) / blocks;
        const int index = static_cast<int>(blockIdx.x) % blocks * Threads + static_cast<int>(threadIdx.x);
        band = index / across;
        group = index % across;
    }
};

// ---- Moments ----

// Partial sums, [image][block][7] about the image's centre. Grid: images * blocks of kThreads with
// blocks = ceil(ceil(height / kRows) * ceil(width / kWidth) / kThreads). `partial` is aligned to 8.
template <class T>
__device__ __forceinline__ void moments_sums(const T* masks, double* partial, int height, int width,
                                             int blocks) {
    constexpr int n = kWidth<T>;
    SHARED(double, scratch, kThreads / 32, kMoments);
    const Patch<kThreads> at(blocks, (width + n - 1) / n);
    const Mask<T> mask(masks, at.image, height, width);
    const int row = at.band * kRows, column = at.group * n;
    float area = 0.0f, energy = 0.0f, x = 0.0f, y = 0.0f, xx = 0.0f, yy = 0.0f, xy = 0.0f;
    if (row < height) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            float m[n];
            mask.template load<0>(row + r, column, m);
            float sum = 0.0f, first = 0.0f, second = 0.0f;
#pragma unroll
            for (int k = 0; k < n; ++k) {
                sum += m[k];
                energy = fmaf(m[k], m[k], energy);
                first = fmaf(static_cast<float>(k), m[k], first);
                second = fmaf(static_cast<float>(k * k), m[k], second);
            }
            area += sum;
            x += first;
            xx += second;
            y = fmaf(static_cast<float>(r), sum, y);
            yy = fmaf(static_cast<float>(r * r), sum, yy);
            xy = fmaf(static_cast<float>(r), first, xy);
        }
    }
    // From the patch's corner to the image's centre.
    const double dx = column - 0.5 * (width - 1), dy = row - 0.5 * (height - 1);
    const double wide = area, wide_x = x, wide_y = y;
    const double sums[kMoments] = {wide,
                                   energy,
                                   wide_x + dx * wide,
                                   wide_y + dy * wide,
                                   xx + dx * (2.0 * wide_x + dx * wide),
                                   yy + dy * (2.0 * wide_y + dy * wide),
                                   xy + dx * wide_y + dy * (wide_x + dx * wide)};
    const double total = block_sums<kThreads>(sums, scratch);
    if (threadIdx.x < kMoments) {
        partial[static_cast<size_t>(blockIdx.x) * kMoments + threadIdx.x] = total;
    }
}

// x̄ and ȳ, the image's centre for an empty mask.
__device__ __forceinline__ void centroid(double area, double x, double y, double& cx, double& cy) {
    cx = area == 0.0 ? 0.0 : x / area;
    cy = area == 0.0 ? 0.0 : y / area;
}

// The moments of each image, the second ones about the mask's centroid. Grid: one warp per image.
extern "C" __global__ void __launch_bounds__(32)
    moments(const double* partial, float* moments, int blocks) {
    const int image = static_cast<int>(blockIdx.x);
    double m[kMoments];
#pragma unroll
    for (int k = 0; k < kMoments; ++k) {
        m[k] = warp_sum(partial + static_cast<size_t>(image) * blocks * kMoments + k, blocks, kMoments);
    }
    if (threadIdx.x != 0) return;
    double cx, cy;
    centroid(m[0], m[2], m[3], cx, cy);
    m[4] -= cx * m[2];
    m[5] -= cy * m[3];
    m[6] -= cx * m[3];
    float* to = moments + static_cast<size_t>(image) * kMoments;
#pragma unroll
    for (int k = 0; k < kMoments; ++k) to[k] = static_cast<float>(m[k]);
}

// dm = dS₀ + 2m·dS₂ + x·dSx + y·dSy + u²·dSxx + v²·dSyy + uv·dSxy with (u, v) from the mask's centroid.
// Grid as moments_sums.
template <class T>
__device__ __forceinline__ void moments_gradient(const float* dmoments, const T* masks,
                                                 const float* moments, T* dmasks, int height, int width,
                                                 int blocks) {
    constexpr int n = kWidth<T>;
    const Patch<kThreads> at(blocks, (width + n - 1) / n);
    const Mask<T> mask(masks, at.image, height, width);
    const int row = at.band * kRows, column = at.group * n;
    if (row >= height) return;
    const float* m = moments + static_cast<size_t>(at.image) * kMoments;
    const float* d = dmoments + static_cast<size_t>(at.image) * kMoments;
    double cx, cy;
    centroid(m[0], m[2], m[3], cx, cy);
    const float x = static_cast<float>(column) - 0.5f * static_cast<float>(width - 1);
    const float y = static_cast<float>(row) - 0.5f * static_cast<float>(height - 1);
    const float u = static_cast<float>(x - cx), v = static_cast<float>(y - cy);
    float pixels[kRows][n];
#pragma unroll
    for (int r = 0; r < kRows; ++r) mask.template load<0>(row + r, column, pixels[r]);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const float down = v + static_cast<float>(r);
        const float level = fmaf(d[5] * down, down, fmaf(d[3], y + static_cast<float>(r), d[0]));
        const float slope = d[6] * down;
#pragma unroll
        for (int k = 0; k < n; ++k) {
            const float along = u + static_cast<float>(k);
            float sum = fmaf(2.0f * d[1], pixels[r][k], level);
            sum = fmaf(d[2], x + static_cast<float>(k), sum);
            pixels[r][k] = fmaf(fmaf(d[4], along, slope), along, sum);
        }
        mask.store(dmasks, at.image, row + r, column, pixels[r]);
    }
}

// ---- Perimeter ----

// The halves of Sobel's stencils along a row: m₋ + 2m + m₊ and m₊ − m₋ for all but the outer two pixels.
template <int N>
__device__ __forceinline__ void halves(const float (&m)[N + 2], float (&smooth)[N], float (&difference)[N]) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
        smooth[k] = fmaf(2.0f, m[k + 1], m[k] + m[k + 2]);
        difference[k] = m[k + 2] - m[k];
    }
}

// Partial sums, [image][block], over the frame padded by one pixel. Patches begin one row and one patch
// before the image; what they hold beyond the frame adds exactly 0. Grid: images * blocks of
// kPerimeterThreads with blocks = ceil(ceil((height + 2) / kRows) * (width / kWidth + 2) /
// kPerimeterThreads). `partial` is aligned to 8.
template <class T>
__device__ __forceinline__ void perimeter_sums(const T* masks, double* partial, int height, int width,
                                               int blocks) {
    constexpr int n = kWidth<T>;
    SHARED(double, scratch, kPerimeterThreads / 32);
    const Patch<kPerimeterThreads> at(blocks, width / n + 2);
    const Mask<T> mask(masks, at.image, height, width);
    const int row = at.band * kRows - 1, column = (at.group - 1) * n;
    float sum = 0.0f;
    if (row <= height) {
        float smooth[3][n], difference[3][n];
#pragma unroll
        for (int r = 0; r < kRows + 2; ++r) {
            float m[n + 2];
            mask.template load<1>(row - 1 + r, column, m);
            halves<n>(m, smooth[r % 3], difference[r % 3]);
            if (r < 2) continue;
#pragma unroll
            for (int k = 0; k < n; ++k) {
                const float gx = fmaf(2.0f, difference[(r + 2) % 3][k],
                                      difference[(r + 1) % 3][k] + difference[r % 3][k]);
                const float gy = smooth[r % 3][k] - smooth[(r + 1) % 3][k];
                const float q = fmaf(gx, gx, gy * gy);
                const float squared = q + kSoftening * kSoftening;
                // √(q + ε²) − ε without cancellation where the mask is flat.
                const float length = squared * rsqrtf(squared);
                sum += __fdividef(q, length + kSoftening);
            }
        }
    }
    const double total = block_reduce<kPerimeterThreads>(static_cast<double>(sum), scratch, Sum{});
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// Grid: one warp per image.
extern "C" __global__ void __launch_bounds__(32)
    perimeter(const double* partial, float* perimeters, int blocks) {
    const int image = static_cast<int>(blockIdx.x);
    const double sum = warp_sum(partial + static_cast<size_t>(image) * blocks, blocks, 1);
    if (threadIdx.x == 0) perimeters[image] = static_cast<float>(sum / 8.0);
}

// dm: the transposed stencil of the unit normals, times −dP/8. Grid: images * blocks of kPerimeterThreads
// with blocks = ceil(ceil(height / kGradientRows) * ceil(width / kWidth) / kPerimeterThreads).
template <class T>
__device__ __forceinline__ void perimeter_gradient(const float* dperimeters, const T* masks, T* dmasks,
                                                   int height, int width, int blocks) {
    constexpr int n = kWidth<T>;
    const Patch<kPerimeterThreads> at(blocks, (width + n - 1) / n);
    const Mask<T> mask(masks, at.image, height, width);
    const int row = at.band * kGradientRows, column = at.group * n;
    if (row >= height) return;
    const float scale = -dperimeters[at.image] / 8.0f;
    // Of the last three rows: halves of the stencils with a margin of one pixel, and of the normals.
    float smooth[3][n + 2], difference[3][n + 2], across[3][n], along[3][n];
#pragma unroll
    for (int r = 0; r < kGradientRows + 4; ++r) {
        float m[n + 4];
        mask.template load<2>(row - 2 + r, column, m);
        halves<n + 2>(m, smooth[r % 3], difference[r % 3]);
        if (r < 2) continue;
        float u[n + 2], v[n + 2];
#pragma unroll
        for (int k = 0; k < n + 2; ++k) {
            const float gx = fmaf(2.0f, difference[(r + 2) % 3][k],
                                  difference[(r + 1) % 3][k] + difference[r % 3][k]);
            const float gy = smooth[r % 3][k] - smooth[(r + 1) % 3][k];
            const float reciprocal = rsqrtf(fmaf(gx, gx, fmaf(gy, gy, kSoftening * kSoftening)));
            u[k] = gx * reciprocal;
            v[k] = gy * reciprocal;
        }
#pragma unroll
        for (int k = 0; k < n; ++k) {
            across[r % 3][k] = u[k + 2] - u[k];
            along[r % 3][k] = fmaf(2.0f, v[k + 1], v[k] + v[k + 2]);
        }
        if (r < 4) continue;
        float d[n];
#pragma unroll
        for (int k = 0; k < n; ++k) {
            const float divergence =
                fmaf(2.0f, across[(r + 2) % 3][k], across[(r + 1) % 3][k] + across[r % 3][k]) +
                (along[r % 3][k] - along[(r + 1) % 3][k]);
            d[k] = scale * divergence;
        }
        mask.store(dmasks, at.image, row + r - 4, column, d);
    }
}

#define MASKS(T, suffix)                                                                         \
    extern "C" __global__ void __launch_bounds__(kThreads) moments_sums_##suffix(                \
        const T* masks, double* partial, int height, int width, int blocks) {                    \
        moments_sums(masks, partial, height, width, blocks);                                     \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(kThreads) moments_gradient_##suffix(            \
        const float* dmoments, const T* masks, const float* moments, T* dmasks, int height,      \
        int width, int blocks) {                                                                 \
        moments_gradient(dmoments, masks, moments, dmasks, height, width, blocks);               \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(kPerimeterThreads) perimeter_sums_##suffix(     \
        const T* masks, double* partial, int height, int width, int blocks) {                    \
        perimeter_sums(masks, partial, height, width, blocks);                                   \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(kPerimeterThreads) perimeter_gradient_##suffix( \
        const float* dperimeters, const T* masks, T* dmasks, int height, int width,              \
        int blocks) {                                                                            \
        perimeter_gradient(dperimeters, masks, dmasks, height, width, blocks);                   \
    }
MASKS(float, f32)
MASKS(bf16, bf16)

// ---- Image by image: features, prior, consistency ----

// Features (zeros below the gate), whether there is a measurable lesion, confidence. One thread per image,
// ceil(n / kThreads) blocks.
extern "C" __global__ void __launch_bounds__(kThreads)
    shape_features(const float* moments, const float* perimeters, float* features, float* measurable,
                   float* confidences, int n) {
    const int image = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
    if (image >= n) return;
    const MaskSums sums = load_sums(moments, perimeters, image);
    const bool found = is_measurable(sums.area);
    const ShapeFeatures f = features_of(sums);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        features[4 * static_cast<size_t>(image) + k] = found ? static_cast<float>(f.at[k]) : 0.0f;
    }
    measurable[image] = found ? 1.0f : 0.0f;
    confidences[image] = found ? static_cast<float>(confidence(sums)) : 0.0f;
}

// The gradient with respect to moments and perimeters, exactly zero below the gate. As shape_features.
extern "C" __global__ void __launch_bounds__(kThreads)
    shape_features_gradient(const float* dfeatures, const float* moments, const float* perimeters,
                            float* dmoments, float* dperimeters, int n) {
    const int image = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
    if (image >= n) return;
    const MaskSums sums = load_sums(moments, perimeters, image);
    ShapeFeatures grad;
#pragma unroll
    for (int k = 0; k < 4; ++k) grad.at[k] = dfeatures[4 * static_cast<size_t>(image) + k];
    MaskSums d = {};
    if (is_measurable(sums.area)) d = features_gradient(sums, grad);
    store_sums(d, dmoments, dperimeters, image);
}

__device__ __forceinline__ ShapeFeatures load_features(const float* features, int image) {
    ShapeFeatures f;
#pragma unroll
    for (int k = 0; k < 4; ++k) f.at[k] = features[4 * static_cast<size_t>(image) + k];
    return f;
}

// φ. One thread per image, ceil(n / kThreads) blocks.
extern "C" __global__ void __launch_bounds__(kThreads)
    prior(const float* features, const float* weight, const float* bias, const float* mean,
          const float* sd, float* phi, int n) {
    const int image = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
    if (image >= n) return;
    const Prior prior = {weight, bias, mean, sd};
    phi[image] = static_cast<float>(prior.phi(prior.standardise(load_features(features, image))).positive);
}

// The gradient with respect to features, weights and bias. One block.
extern "C" __global__ void __launch_bounds__(kThreads)
    prior_gradient(const float* dphi, const float* features, const float* weight, const float* bias,
                   const float* mean, const float* sd, float* dfeatures, float* dweight, float* dbias,
                   int n) {
    SHARED(double, scratch, kThreads / 32, 5);
    const Prior prior = {weight, bias, mean, sd};
    double sums[5] = {};
    for (int image = static_cast<int>(threadIdx.x); image < n; image += kThreads) {
        const ShapeFeatures z = prior.standardise(load_features(features, image));
        const Logistic phi = prior.phi(z);
        const double eta = dphi[image] * phi.positive * phi.negative;
        const ShapeFeatures d = prior.features_gradient(eta);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            dfeatures[4 * static_cast<size_t>(image) + k] = static_cast<float>(d.at[k]);
            sums[k] += eta * z.at[k];
        }
        sums[4] += eta;
    }
    const double total = block_sums<kThreads>(sums, scratch);
    if (threadIdx.x < 4) dweight[threadIdx.x] = static_cast<float>(total);
    if (threadIdx.x == 4) dbias[0] = static_cast<float>(total);
}

// Element of the control vector that ramps the consistency term.
constexpr int kRamp = 2;

// What the images of a batch have in common: ramp / max(1, measurable images of positive weight). Called by
// all threads of one block.
__device__ __forceinline__ double consistency_factor(const float* measurable, const float* weight,
                                                     const float* control, int n) {
    SHARED(double, counts, kThreads / 32);
    double count = 0.0;
    for (int image = static_cast<int>(threadIdx.x); image < n; image += kThreads) {
        if (measurable[image] > 0.0f && weight[image] > 0.0f) count += 1.0;
    }
    count = block_reduce<kThreads>(count, counts, Sum{});
    return control[kRamp] / fmax(count, 1.0);
}

// Σ factor·weight·confidence·(p − φ)² over measurable images of positive weight. One block.
template <class T>
__device__ __forceinline__ void consistency(const T* p, const float* phi, const float* measurable,
                                            const float* confidences, const float* weight,
                                            const float* control, float* y, int n) {
    SHARED(double, scratch, kThreads / 32);
    const double factor = consistency_factor(measurable, weight, control, n);
    double sum = 0.0;
    for (int image = static_cast<int>(threadIdx.x); image < n; image += kThreads) {
        if (!(measurable[image] > 0.0f && weight[image] > 0.0f)) continue;
        const double difference = static_cast<double>(to_float(p[image])) - phi[image];
        sum += static_cast<double>(weight[image]) * confidences[image] * difference * difference;
    }
    sum = block_reduce<kThreads>(sum, scratch, Sum{});
    if (threadIdx.x == 0) y[0] = static_cast<float>(factor * sum);
}

// dp = 2·dy·factor·weight·confidence·(p − φ) = −dφ, zero for images that do not count. One block.
template <class T>
__device__ __forceinline__ void consistency_gradient(const float* dy, const T* p, const float* phi,
                                                     const float* measurable, const float* confidences,
                                                     const float* weight, const float* control, T* dp,
                                                     float* dphi, int n) {
    const double factor = consistency_factor(measurable, weight, control, n);
    for (int image = static_cast<int>(threadIdx.x); image < n; image += kThreads) {
        float d = 0.0f;
        if (measurable[image] > 0.0f && weight[image] > 0.0f) {
            const double difference = static_cast<double>(to_float(p[image])) - phi[image];
            d = static_cast<float>(2.0 * dy[0] * factor * weight[image] * confidences[image] * difference);
        }
        dp[image] = from_float<T>(d);
        dphi[image] = -d;
    }
}

#define CONSISTENCY(T, suffix)                                                                   \
    extern "C" __global__ void __launch_bounds__(kThreads) consistency_##suffix(                 \
        const T* p, const float* phi, const float* measurable, const float* confidences,         \
        const float* weight, const float* control, float* y, int n) {                            \
        consistency(p, phi, measurable, confidences, weight, control, y, n);                     \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(kThreads) consistency_gradient_##suffix(        \
        const float* dy, const T* p, const float* phi, const float* measurable,                  \
        const float* confidences, const float* weight, const float* control, T* dp, float* dphi, \
        int n) {                                                                                 \
        consistency_gradient(dy, p, phi, measurable, confidences, weight, control, dp, dphi, n); \
    }
CONSISTENCY(float, f32)
CONSISTENCY(bf16, bf16)
