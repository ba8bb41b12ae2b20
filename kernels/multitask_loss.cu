// Everything of the loss that follows the mask head, image by image: the weighted means of cross-entropy and
// Dice loss, the malignancy's cross-entropy, the shape features, the prior φ and the consistency term, and
// the gradient of the total with respect to each of their inputs, in one launch.
//
// Operation by operation these are about 25 launches of a few microseconds each, all of them waiting for
// memory and for each other: a batch of 16 images is 16·17 numbers. One block has the batch in its registers;
// a launch costs one latency. 80 bytes and about 900 operations in f64 an image, forward and backward.
//
// Two sweeps over the images: what all share (sums of weights, the number of measurable lesions), then values
// and gradients. Sums are trees of fixed shape in f64; so is everything between the inputs and the outputs in
// f32, since features are differences of nearly equal numbers.
#include "device.cuh"
#include "shape.cuh"

constexpr int kThreads = 256;

// Element of the control vector that ramps the consistency term.
constexpr int kRamp = 2;

// 1/x, or 0 where there is no weight.
__device__ __forceinline__ double inverse(double x) { return x > 0.0 ? 1.0 / x : 0.0; }

// Of n images, with inputs that are absent given as null: without `cross_entropy` no mask's terms, without
// `malignancy` no classification, without `prior_weight` no consistency. `by_classification` and
// `by_consistency` are the terms' weights λ; with `stop_p` consistency moves the classifier not, with
// `stop_mask` the mask not; `unweighted` lets all measurable lesions count alike. Outputs: the total, the terms before λ (null for absent ones), and the
// gradients of the total, times `dtotal` unless that is null: `dmean` of both cross-entropy and Dice loss.
// Images of weight 0 count in nothing and receive exactly zero; so do moments and perimeters of images
// without a measurable lesion. One block.
template <class T>
__device__ __forceinline__ void multitask_loss(
    const float* dtotal, const float* cross_entropy, const float* dice, const float* moments, const float* perimeters,
    const float* weight, const T* malignancy, const float* label, const float* class_weight,
    const float* prior_weight, const float* prior_bias, const float* prior_mean, const float* prior_sd,
    const float* control, int n, double by_classification, double by_consistency, int stop_p,
    int stop_mask, int unweighted, float* total, float* mean_cross_entropy, float* mean_dice, float* classification,
    float* consistency, float* dmean, float* dmoments, float* dperimeters, T* dmalignancy, float* dweight,
    float* dbias) {
    constexpr int kShared = 3, kSums = 9;
    SHARED(double, scratch, kThreads / 32, kSums);
    SHARED(double, shared_scratch, kThreads / 32, kShared);
    SHARED(double, totals, kSums);
    const bool masks = cross_entropy != nullptr, classes = malignancy != nullptr;
    const bool tied = prior_weight != nullptr;
    const double seed = dtotal != nullptr ? dtotal[0] : 1.0;

    double weights[kShared] = {};  // of masks, of classes, number of measurable lesions
    for (int image = static_cast<int>(threadIdx.x); image < n; image += kThreads) {
        if (masks) weights[0] += weight[image];
        if (classes) weights[1] += class_weight[image];
        if (tied && weight[image] > 0.0f &&
            is_measurable(moments[static_cast<size_t>(image) * kMoments])) {
            weights[2] += 1.0;
        }
    }
    const double sum = block_sums<kThreads>(weights, shared_scratch);
    if (threadIdx.x < kShared) totals[threadIdx.x] = sum;
    __syncthreads();
    const double per_weight = inverse(totals[0]), per_class_weight = inverse(totals[1]);
    const double per_lesion = tied ? control[kRamp] / fmax(totals[2], 1.0) : 0.0;
    __syncthreads();

    // Cross-entropy, Dice loss, classification, consistency; the prior's weights and bias.
    double sums[kSums] = {};
    const Prior prior = {prior_weight, prior_bias, prior_mean, prior_sd};
    for (int image = static_cast<int>(threadIdx.x); image < n; image += kThreads) {
        if (masks) {
            const double w = weight[image];
            if (w != 0.0) {
                sums[0] += w * per_weight * cross_entropy[image];
                sums[1] += w * per_weight * dice[image];
            }
            dmean[image] = static_cast<float>(w * per_weight * seed);
        }
        double dlogit = 0.0;
        if (classes && class_weight[image] != 0.0f) {
            const double w = class_weight[image] * per_class_weight;
            const double z = to_float(malignancy[image]), g = label[image];
            const Logistic p(z);
            sums[2] += w * ((z < 0.0 ? 0.0 : z) - z * g + log1p(exp(-fabs(z))));
            dlogit = seed * by_classification * w * (p.positive * (1.0 - g) - p.negative * g);
        }
        MaskSums dsums = {};
        if (tied && weight[image] > 0.0f) {
            const MaskSums m = load_sums(moments, perimeters, image);
            if (is_measurable(m.area)) {
                const ShapeFeatures z = prior.standardise(features_of(m));
                const Logistic phi = prior.phi(z), p(to_float(malignancy[image]));
                const double difference = p.positive - phi.positive;
                const double factor = per_lesion * weight[image] * (unweighted ? 1.0 : confidence(m));
                sums[3] += factor * difference * difference;
                const double slope = seed * by_consistency * 2.0 * factor * difference;
                if (!stop_p) dlogit += slope * p.positive * p.negative;
                const double eta = -slope * phi.positive * phi.negative;
#pragma unroll
                for (int k = 0; k < 4; ++k) sums[4 + k] += eta * z.at[k];
                sums[8] += eta;
                if (!stop_mask) dsums = features_gradient(m, prior.features_gradient(eta));
            }
        }
        if (masks) store_sums(dsums, dmoments, dperimeters, image);
        if (classes) dmalignancy[image] = from_float<T>(static_cast<float>(dlogit));
    }
    const double own = block_sums<kThreads>(sums, scratch);
    if (threadIdx.x < kSums) totals[threadIdx.x] = own;
    __syncthreads();
    if (threadIdx.x == 0) {
        total[0] = static_cast<float>(totals[0] + totals[1] + by_classification * totals[2] +
                                      by_consistency * totals[3]);
        if (masks) {
            mean_cross_entropy[0] = static_cast<float>(totals[0]);
            mean_dice[0] = static_cast<float>(totals[1]);
        }
        if (classes) classification[0] = static_cast<float>(totals[2]);
        if (tied) {
            consistency[0] = static_cast<float>(totals[3]);
            dbias[0] = static_cast<float>(totals[8]);
#pragma unroll
            for (int k = 0; k < 4; ++k) dweight[k] = static_cast<float>(totals[4 + k]);
        }
    }
}

// Bounded for one block a multiprocessor: there is one in all, and its registers are its batch.
#define MULTITASK_LOSS(T, suffix)                                                                \
    extern "C" __global__ void __launch_bounds__(kThreads, 1) multitask_loss_##suffix(           \
        const float* dtotal, const float* cross_entropy, const float* dice,                      \
        const float* moments, const float* perimeters, const float* weight, const T* malignancy, \
        const float* label, const float* class_weight, const float* prior_weight,                \
        const float* prior_bias, const float* prior_mean, const float* prior_sd,                 \
        const float* control, int n, double by_classification, double by_consistency,            \
        int stop_p, int stop_mask, int unweighted, float* total, float* mean_cross_entropy,      \
        float* mean_dice, float* classification, float* consistency, float* dmean,               \
        float* dmoments, float* dperimeters, T* dmalignancy, float* dweight, float* dbias) {     \
        multitask_loss(dtotal, cross_entropy, dice, moments, perimeters, weight, malignancy,     \
                       label, class_weight, prior_weight, prior_bias, prior_mean, prior_sd,      \
                       control, n, by_classification, by_consistency, stop_p, stop_mask,         \
                       unweighted, total, mean_cross_entropy, mean_dice, classification,         \
                       consistency, dmean, dmoments, dperimeters, dmalignancy, dweight, dbias);  \
    }
MULTITASK_LOSS(float, f32)
MULTITASK_LOSS(bf16, bf16)
