// The shape features and the prior φ of one mask, from its sums, forward and backward: the device's copy
// of src/features/{shape,prior}.rs, where the formulas are derived. All in f64: a covariance's determinant
// cancels, and there is one mask per thread, not per pixel.
#pragma once

constexpr double kPi = 3.14159265358979323846;

// Area below which a mask shows no measurable lesion, in pixels.
constexpr double kMeasurableArea = 32.0;

// Variance of a uniform distribution over one pixel.
constexpr double kPixelVariance = 1.0 / 12.0;

constexpr int kMoments = 7;

// Σm, Σm², Σxm, Σym from the image's centre, Σ(x−x̄)²m, Σ(y−ȳ)²m, Σ(x−x̄)(y−ȳ)m, and the perimeter. Also
// the gradient with respect to them.
struct MaskSums {
    double area, energy, x, y, xx, yy, xy, perimeter;
};

__device__ __forceinline__ MaskSums load_sums(const float* moments, const float* perimeters, int image) {
    const float* m = moments + static_cast<size_t>(image) * kMoments;
    return {m[0], m[1], m[2], m[3], m[4], m[5], m[6], perimeters[image]};
}

__device__ __forceinline__ void store_sums(const MaskSums& sums, float* moments, float* perimeters,
                                           int image) {
    const double values[kMoments] = {sums.area, sums.energy, sums.x, sums.y, sums.xx, sums.yy, sums.xy};
    float* m = moments + static_cast<size_t>(image) * kMoments;
#pragma unroll
    for (int k = 0; k < kMoments; ++k) m[k] = static_cast<float>(values[k]);
    perimeters[image] = static_cast<float>(sums.perimeter);
}

// A NaN counts as measurable, so that it is seen.
__device__ __forceinline__ bool is_measurable(double area) { return !(area < kMeasurableArea); }

// How decided a measurable mask is.
__device__ __forceinline__ double confidence(const MaskSums& m) {
    return fmax(2.0 * m.energy / m.area - 1.0, 0.0);
}

// Irregularity, orientation, margin, roundness. Also the gradient with respect to them.
struct ShapeFeatures {
    double at[4];
};

// The covariance, and what forward and backward share of the ellipse that has it.
struct Ellipse {
    double xx, yy, xy, trace, root, axes, h, roundness;

    __device__ __forceinline__ explicit Ellipse(const MaskSums& m) {
        double per_area = 1.0 / m.area;
        xx = m.xx * per_area + kPixelVariance;
        yy = m.yy * per_area + kPixelVariance;
        xy = m.xy * per_area;
        trace = xx + yy;
        // The bound holds exactly; moments rounded to f32 can miss it for a diagonal line.
        root = sqrt(fmax(xx * yy - xy * xy, kPixelVariance * kPixelVariance));
        double squared = trace + 2.0 * root;
        axes = sqrt(squared);
        h = (trace - 2.0 * root) / squared;
        roundness = 2.0 * root / trace;
    }

    // Ramanujan's second formula.
    __device__ __forceinline__ double perimeter() const {
        return 2.0 * kPi * axes * (1.0 + 3.0 * h / (10.0 + sqrt(4.0 - 3.0 * h)));
    }
};

// Of a measurable mask.
__device__ __forceinline__ ShapeFeatures features_of(const MaskSums& m) {
    Ellipse e(m);
    double p = m.perimeter, pe = e.perimeter();
    double p2 = p * p, disc = 4.0 * kPi * m.energy;
    return {{(p2 - disc) / (p2 + disc), (e.yy - e.xx) / e.trace, (p - pe) / (p + pe), e.roundness}};
}

// The gradient of Σ grad·feature with respect to the sums of a measurable mask.
__device__ __forceinline__ MaskSums features_gradient(const MaskSums& m, const ShapeFeatures& grad) {
    Ellipse e(m);
    double p = m.perimeter, pe = e.perimeter();
    double p2 = p * p, disc = 4.0 * kPi * m.energy;
    double irregularity = grad.at[0] * 2.0 / ((p2 + disc) * (p2 + disc));
    double orientation = grad.at[1] * 2.0 / (e.trace * e.trace);
    double margin = grad.at[2] * 2.0 / ((p + pe) * (p + pe));

    // The ellipse's perimeter by trace and √det.
    double s = sqrt(4.0 - 3.0 * e.h);
    double factor = 1.0 + 3.0 * e.h / (10.0 + s);
    double dfactor = 3.0 / (10.0 + s) + 4.5 * e.h / (s * (10.0 + s) * (10.0 + s));
    double squared = e.axes * e.axes;
    double by_axes = kPi * factor / e.axes;
    double by_h = 2.0 * kPi * e.axes * dfactor * 4.0 / (squared * squared);

    // To trace and √det, then to the covariance, then to the sums.
    double trace = -margin * p * (by_axes + by_h * e.root) - grad.at[3] * e.roundness / e.trace;
    double root = -margin * p * (2.0 * by_axes - by_h * e.trace) + grad.at[3] * 2.0 / e.trace;
    double det = root / (2.0 * e.root);
    double per_area = 1.0 / m.area;
    double xx = (trace + det * e.yy - orientation * e.yy) * per_area;
    double yy = (trace + det * e.xx + orientation * e.xx) * per_area;
    double xy = -2.0 * det * e.xy * per_area;
    return {-(xx * m.xx + yy * m.yy + xy * m.xy) * per_area,
            -irregularity * p2 * 4.0 * kPi,
            0.0,
            0.0,
            xx,
            yy,
            xy,
            irregularity * disc * 2.0 * p + margin * pe};
}

// σ(x) and σ(−x), each to full relative accuracy.
struct Logistic {
    double positive, negative;

    __device__ __forceinline__ explicit Logistic(double x) {
        double e = exp(-fabs(x));
        double large = 1.0 / (1.0 + e), small = e * large;
        positive = x < 0.0 ? small : large;
        negative = x < 0.0 ? large : small;
    }
};

// φ = σ(b + Σ wₖ zₖ) of z = (f − μ)/s, on pointers to four values each and one b.
struct Prior {
    const float *weight, *bias, *mean, *sd;

    __device__ __forceinline__ ShapeFeatures standardise(const ShapeFeatures& f) const {
        ShapeFeatures z;
#pragma unroll
        for (int k = 0; k < 4; ++k) z.at[k] = (f.at[k] - static_cast<double>(mean[k])) / sd[k];
        return z;
    }

    __device__ __forceinline__ Logistic phi(const ShapeFeatures& z) const {
        double eta = bias[0];
#pragma unroll
        for (int k = 0; k < 4; ++k) eta += z.at[k] * weight[k];
        return Logistic(eta);
    }

    // The gradient of eta·(b + Σ wₖ zₖ) with respect to the features.
    __device__ __forceinline__ ShapeFeatures features_gradient(double eta) const {
        ShapeFeatures grad;
#pragma unroll
        for (int k = 0; k < 4; ++k) grad.at[k] = eta * weight[k] / sd[k];
        return grad;
    }
};
