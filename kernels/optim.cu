// The optimizer: the norm of all gradients, then one launch that updates all parameters.
//
// Both kernels go over a table with an entry for each chunk of a tensor, so that a network's hundreds of
// small tensors cost one launch. All tensors are f32.
//
//     kernel               bytes an element                          predicted of copy's bandwidth
//     global_norm          4                                         90 % from 8 M elements on
//     adamw                28, with the average 36                   85 %: each block waits for its table and
//                                                                    coefficients before its first tensor
//
// Squares are added in f64: they neither overflow nor vanish, and their sum is as good as one rounding
// at the end. That is free where f64 runs at half the speed of f32 (sm_80, sm_90); where it runs at 1/64
// the norm is bound by it, at about twice the time of its bytes.
#include "device.cuh"

constexpr int kThreads = 256;

// A part of a gradient.
struct Piece {
    const float* elements;
    unsigned long long len;
};

// partials[chunk] = Σ x² over a part of at most a few thousand elements.
// Grid: one block of kThreads for each part. Any alignment.
extern "C" __global__ void __launch_bounds__(kThreads)
global_norm(const Piece* pieces, double* partials) {
    SHARED(double, scratch, kThreads / 32);
    const Piece piece = pieces[blockIdx.x];
    const float* x = global_address(piece.elements);
    const int len = static_cast<int>(piece.len);
    double sums[4] = {};
    int i = threadIdx.x * 4;
    if (is_aligned<16>(x)) {
#pragma unroll 4
        for (; i + 4 <= len; i += 4 * kThreads) {
            const Loaded<float, 4> v(x + i);
#pragma unroll
            for (int k = 0; k < 4; ++k) sums[k] = fma(static_cast<double>(v[k]), static_cast<double>(v[k]), sums[k]);
        }
    }
#pragma unroll 1
    for (; i < len; i += 4 * kThreads) {
#pragma unroll 1
        for (int k = i; k < len && k < i + 4; ++k) {
            sums[0] = fma(static_cast<double>(x[k]), static_cast<double>(x[k]), sums[0]);
        }
    }
    const double sum = block_reduce<kThreads>((sums[0] + sums[1]) + (sums[2] + sums[3]), &scratch[0], Sum());
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// norm = √Σ partials. Grid: one block of kThreads.
extern "C" __global__ void __launch_bounds__(kThreads)
global_norm_finish(const double* partials, float* norm, int count) {
    SHARED(double, scratch, kThreads / 32);
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += kThreads) sum += partials[i];
    sum = block_reduce<kThreads>(sum, &scratch[0], Sum());
    if (threadIdx.x == 0) *norm = static_cast<float>(sqrt(sum));
}

// A part of a parameter, or of running statistics, which have no gradient.
struct Chunk {
    const float* gradient;  // or null
    float* value;
    float* first;
    float* second;
    float* average;  // or null
    unsigned len;
    unsigned flags;
};
constexpr unsigned kDecay = 1, kNonnegative = 2;

// What is the same for all elements.
struct Settings {
    float clip, keep, size, correction, fresh;
};

// One step of AdamW and of the moving averages (the formulas stand in src/optim.rs), unless the norm is not
// finite. `step`, `rate` and `decay` are the numbers of the control vector's elements. log_beta: ln β; 1 − βᵗ is
// taken from it in f64, which costs no accuracy however small it is. Grid: one block of kThreads for each
// chunk, which has at most a few thousand elements. Any alignment; 16 bytes at a time where a chunk's tensors
// allow it.
extern "C" __global__ void __launch_bounds__(kThreads)
adamw(const Chunk* chunks, const float* norm, const float* control, int step, int rate, int decay,
      double log_beta1, double log_beta2, float beta1, float beta2, float fresh1, float fresh2, float eps,
      double clip, double weight_decay) {
    SHARED(Settings, settings, 1);
    Chunk chunk = chunks[blockIdx.x];
    chunk.gradient = global_address(chunk.gradient);
    chunk.value = global_address(chunk.value);
    chunk.first = global_address(chunk.first);
    chunk.second = global_address(chunk.second);
    chunk.average = global_address(chunk.average);
    const float length = *norm;
    // Warps share the work.
    if (threadIdx.x == 0) {
        settings[0].size = static_cast<float>(control[rate] / -expm1(control[step] * log_beta1));
    } else if (threadIdx.x == 32) {
        settings[0].correction = static_cast<float>(sqrt(-expm1(control[step] * log_beta2)));
    } else if (threadIdx.x == 64) {
        settings[0].clip = length > clip ? static_cast<float>(clip / length) : 1.0f;
        settings[0].keep = (chunk.flags & kDecay) != 0
            ? static_cast<float>(1.0 - static_cast<double>(control[rate]) * weight_decay) : 1.0f;
        settings[0].fresh = 1.0f - control[decay];
    }
    __syncthreads();
    if (!(fabsf(length) <= 3.402823466e38f)) return;

    const Settings s = settings[0];
    const bool nonnegative = (chunk.flags & kNonnegative) != 0;
    auto update = [&](float g, float& p, float& m, float& v) {
        g *= s.clip;
        m = fmaf(beta1, m, fresh1 * g);
        v = fmaf(beta2, v, fresh2 * g * g);
        const float denominator = sqrtf(v) / s.correction + eps;
        p = fmaf(p, s.keep, -(s.size * m / denominator));
        if (nonnegative && p < 0.0f) p = 0.0f;
    };
    auto follow = [&](float x, float& a) { a = fmaf(s.fresh, x - a, a); };

    constexpr int n = 4;
    const bool learned = chunk.gradient != nullptr, averaged = chunk.average != nullptr;
    const bool aligned = is_aligned<16>(chunk.gradient) && is_aligned<16>(chunk.value)
        && is_aligned<16>(chunk.first) && is_aligned<16>(chunk.second) && is_aligned<16>(chunk.average);
    for (unsigned i = threadIdx.x * n; i < chunk.len; i += kThreads * n) {
        if (aligned && i + n <= chunk.len) {
            using Four = Vector<float, n>;
            auto at = [i](float* x) { return reinterpret_cast<Four*>(x + i); };
            Four p = *at(chunk.value), a = {};
            if (averaged) a = *at(chunk.average);
            if (learned) {
                const Four g = *reinterpret_cast<const Four*>(chunk.gradient + i);
                Four m = *at(chunk.first), v = *at(chunk.second);
#pragma unroll
                for (int k = 0; k < n; ++k) update(g.at[k], p.at[k], m.at[k], v.at[k]);
                *at(chunk.value) = p;
                *at(chunk.first) = m;
                *at(chunk.second) = v;
            }
            if (averaged) {
#pragma unroll
                for (int k = 0; k < n; ++k) follow(p.at[k], a.at[k]);
                *at(chunk.average) = a;
            }
        } else {
#pragma unroll 1
            for (unsigned k = i; k < chunk.len && k < i + n; ++k) {
                if (learned) update(chunk.gradient[k], chunk.value[k], chunk.first[k], chunk.second[k]);
                if (averaged) follow(chunk.value[k], chunk.average[k]);
            }
        }
    }
}
