// A batch of augmented images and masks from samples in device memory: what src/data/augment.rs computes on the
// CPU, from the same random numbers and operation by operation, so that a batch is the same, bit for bit,
// wherever it is made. Hence `times_plus`: no product is fused with a sum.
//
// What is drawn for an image is drawn by the host (a few hundred numbers); pixels are the device's work: where
// each comes from (affine map and spline), blur, gain over depth, speckle, tone curve.
//
// A block makes a tile of 32×32 pixels. Where an image is blurred or speckled (one in five and one in three by
// default), the block makes up to 8 more pixels on each side, 2¼ times the work for that part, and filters them in
// shared memory: with separate passes, images would travel to memory and back four times. Of 10 bytes a pixel in
// f32 (2 read, 8 written) the kernel is not bound by memory: about 100 instructions for a pixel that is moved, 70
// more for each Gaussian with its margin, 250 for the noise, each pixel of which draws a Philox block of its own.
// Predicted for 16 images of 256² on an H200: 10 µs, against 4 µs for the bytes alone.
#include "device.cuh"

constexpr int kThreads = 256;
constexpr int kTile = 32;
// Taps on either side of the largest Gaussian.
constexpr int kRadius = 8;
constexpr int kWide = kTile + 2 * kRadius;
// Neighbouring pixels of a thread.
constexpr int kPixels = 4;
static_assert(kTile * kTile == kThreads * kPixels, "a thread for every four pixels");
// Intervals of a tone curve; its table has one entry more, and one beyond that.
constexpr int kTones = 1024;
// First Philox block of the noise.
constexpr unsigned long long kNoise = 1ull << 32;

// The taps of a Gaussian, 2·radius + 1 of them; radius 0 for none.
struct Gaussian {
    int radius;
    float taps[2 * kRadius + 1];
};

// What one image undergoes, as the host writes it.
struct Change {
    long long sample;           // −1: the image is black
    unsigned long long stream;  // of the noise
    float matrix[6];            // source = matrix·output in pixels from the centre, two rows of three
    int moves;                  // 0: every pixel stays where it is
    int elastic;                // whether there is a displacement field
    int retones;                // whether there is a tone curve
    float speckle;              // factor of the filtered noise, 0 for none
    float gain[2];              // linear and quadratic part
    Gaussian blur, grain;
};

// The four control points about a coordinate.
struct Basis {
    int cell;
    float weights[4];
};

// An image's and its mask's intensity at one place, from 0 to 255 in 8 bits.
using Pixel = Vector<unsigned char, 2>;
struct Values {
    float image, mask;
};

// a·b + c, rounded twice.
__device__ __forceinline__ float times_plus(float a, float b, float c) { return __fadd_rn(__fmul_rn(a, b), c); }

struct Source {
    const Pixel* pixels;    // size × size
    const float* control;   // (cells + 3)² displacements
    const Basis* basis;     // of each coordinate
    int size, points;

    __device__ __forceinline__ Pixel at(int x, int y) const {
        const bool inside = x >= 0 && x < size && y >= 0 && y < size;
        return inside ? pixels[static_cast<size_t>(y) * size + x] : Pixel{{0, 0}};
    }

    // The displacement at (x, y): the grid is collapsed along y, then along x.
    __device__ __forceinline__ void displace(int x, int y, float& u, float& v) const {
        const Basis across = basis[x], down = basis[y];
        float dx = 0.0f, dy = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float cx = 0.0f, cy = 0.0f;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const float* point = control + 2 * ((down.cell + k) * points + across.cell + j);
                cx = times_plus(down.weights[k], point[0], cx);
                cy = times_plus(down.weights[k], point[1], cy);
            }
            dx = times_plus(across.weights[j], cx, dx);
            dy = times_plus(across.weights[j], cy, dy);
        }
        u = __fadd_rn(u, dx);
        v = __fadd_rn(v, dy);
    }

    // What comes to (x, y), by bilinear interpolation; background beyond the border.
    __device__ __forceinline__ Values operator()(const Change& change, int x, int y) const {
        if (change.moves == 0) {
            const Pixel p = at(x, y);
            return {static_cast<float>(p.at[0]) / 255.0f, static_cast<float>(p.at[1]) / 255.0f};
        }
        const float centre = static_cast<float>(size - 1) / 2.0f, last = static_cast<float>(size);
        float u = static_cast<float>(x) - centre, v = static_cast<float>(y) - centre;
        if (change.elastic != 0) displace(x, y, u, v);
        const float* m = change.matrix;
        const auto coordinate = [=](float a, float b, float t) {
            const float turned = __fadd_rn(times_plus(a, u, __fmul_rn(b, v)), t);
            return fminf(fmaxf(__fadd_rn(turned, centre), -1.0f), last) + 1.0f;
        };
        // From one pixel left of and above the image.
        const float sx = coordinate(m[0], m[1], m[2]), sy = coordinate(m[3], m[4], m[5]);
        const int column = static_cast<int>(sx), row = static_cast<int>(sy);
        const float fx = sx - static_cast<float>(column), fy = sy - static_cast<float>(row);
        const Pixel p = at(column - 1, row - 1), q = at(column, row - 1);
        const Pixel r = at(column - 1, row), s = at(column, row);
        const auto mix = [=](int k) {
            const float a = p.at[k], b = q.at[k], c = r.at[k], d = s.at[k];
            const float upper = times_plus(fx, b - a, a), lower = times_plus(fx, d - c, c);
            return times_plus(fy, lower - upper, upper) / 255.0f;
        };
        return {mix(0), mix(1)};
    }
};

// The thread's pixels of the tile after the Gaussian, from field(column, row) with coordinates in and up to its
// radius outside of the tile. All threads of the block call it.
template <class F>
__device__ __forceinline__ void filter(const Gaussian& gaussian, float (&wide)[kWide][kWide],
                                       float (&narrow)[kWide][kTile], F field, float (&v)[kPixels]) {
    const int radius = gaussian.radius, side = kTile + 2 * radius;
    const int thread = static_cast<int>(threadIdx.x);
    // Whatever used the memory before is done.
    __syncthreads();
    for (int i = thread; i < side * side; i += kThreads) {
        wide[i / side][i % side] = field(i % side - radius, i / side - radius);
    }
    __syncthreads();
    for (int i = thread; i < side * kTile; i += kThreads) {
        const int row = i / kTile, column = i % kTile;
        float sum = 0.0f;
        for (int k = 0; k <= 2 * radius; ++k) sum = times_plus(gaussian.taps[k], wide[row][column + k], sum);
        narrow[row][column] = sum;
    }
    __syncthreads();
    const int row = thread / (kTile / kPixels), column = thread % (kTile / kPixels) * kPixels;
#pragma unroll
    for (int i = 0; i < kPixels; ++i) v[i] = 0.0f;
    for (int k = 0; k <= 2 * radius; ++k) {
#pragma unroll
        for (int i = 0; i < kPixels; ++i) v[i] = times_plus(gaussian.taps[k], narrow[row + k][column + i], v[i]);
    }
}

// White noise of mean 0 and variance 1 at pixel i of an image: one byte of a Philox block for 16 pixels.
__device__ __forceinline__ float white_noise(unsigned long long seed, unsigned long long stream, size_t i) {
    const uint4 block = philox(seed, stream, kNoise + i / 16);
    const unsigned word = i / 4 % 4;
    const unsigned low = word == 0 ? block.x : block.y, high = word == 2 ? block.z : block.w;
    const unsigned byte = (word < 2 ? low : high) >> (i % 4 * 8) & 0xffu;
    return (static_cast<float>(byte) - 127.5f) / 73.90038f;
}

__device__ __forceinline__ int wrap(int i, int size) {
    const int rest = i % size;
    return rest < 0 ? rest + size : rest;
}
__device__ __forceinline__ int clamp(int i, int size) { return min(max(i, 0), size - 1); }

// Writes the thread's pixels, those that exist, of a row of `size`.
template <class T>
__device__ __forceinline__ void store_pixels(T* row, int column, int size, const float (&v)[kPixels]) {
    if constexpr (sizeof(T) == 4) {
        if (column + kPixels <= size && is_aligned<16>(row + column)) {
            store_vector(row + column, v);
            return;
        }
    } else {
        if (column + kPixels <= size && is_aligned<8>(row + column)) {
            *reinterpret_cast<Vector<unsigned, 2>*>(row + column) = {{pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3])}};
            return;
        }
    }
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
        if (column + i < size) row[column + i] = from_float<T>(v[i]);
    }
}

template <class T>
__device__ __forceinline__ void augment(const Pixel* samples, const Change* changes, const float* control,
                                        const float* tones, const Basis* basis, T* images, void* masks,
                                        int masks_narrow, int size, int points, unsigned tiles,
                                        unsigned long long seed) {
    SHARED(float, wide, kWide, kWide);
    SHARED(float, narrow, kWide, kTile);
    const unsigned image = blockIdx.x / (tiles * tiles), tile = blockIdx.x % (tiles * tiles);
    const int left = static_cast<int>(tile % tiles) * kTile, top = static_cast<int>(tile / tiles) * kTile;
    const int thread = static_cast<int>(threadIdx.x);
    const int row = top + thread / (kTile / kPixels);
    const int column = left + thread % (kTile / kPixels) * kPixels;
    const Change& change = changes[image];
    const size_t area = static_cast<size_t>(size) * size;

    float v[kPixels] = {}, m[kPixels] = {};
    // All conditions with barriers behind them are the same for the whole block.
    if (change.sample >= 0) {
        const Source source{samples + change.sample * area, control + size_t(2) * image * points * points, basis, size,
                            points};
        if (row < size) {
#pragma unroll
            for (int i = 0; i < kPixels; ++i) {
                if (column + i < size) {
                    const Values values = source(change, column + i, row);
                    v[i] = values.image;
                    m[i] = values.mask;
                }
            }
        }
        if (change.blur.radius > 0) {
            const auto repeated = [&](int x, int y) {
                return source(change, clamp(left + x, size), clamp(top + y, size)).image;
            };
            filter(change.blur, wide, narrow, repeated, v);
        }
        float noise[kPixels];
        if (change.speckle > 0.0f) {
            const auto wrapped = [&](int x, int y) {
                const size_t i = static_cast<size_t>(wrap(top + y, size)) * size + wrap(left + x, size);
                return white_noise(seed, change.stream, i);
            };
            filter(change.grain, wide, narrow, wrapped, noise);
        }
        if (change.gain[0] != 0.0f || change.gain[1] != 0.0f || change.speckle > 0.0f || change.retones != 0) {
            // Legendre polynomials over depth.
            const float depth = 2.0f / static_cast<float>(size);
            const float t = times_plus(static_cast<float>(row) + 0.5f, depth, -1.0f);
            const float quadratic = times_plus(__fmul_rn(1.5f, t), t, -0.5f);
            const float gain = __fadd_rn(times_plus(change.gain[0], t, 1.0f), __fmul_rn(change.gain[1], quadratic));
            const float* tone = tones + static_cast<size_t>(image) * (kTones + 2);
#pragma unroll
            for (int i = 0; i < kPixels; ++i) {
                float value = __fmul_rn(v[i], gain);
                if (change.speckle > 0.0f) {
                    value = __fmul_rn(value, times_plus(change.speckle, noise[i], 1.0f));
                }
                value = fminf(fmaxf(value, 0.0f), 1.0f);
                if (change.retones != 0) {
                    const float scaled = value * static_cast<float>(kTones);
                    const int at = static_cast<int>(scaled);
                    const float low = tone[at], high = tone[at + 1];
                    value = times_plus(scaled - static_cast<float>(at), high - low, low);
                }
                v[i] = value;
            }
        }
    }
    if (row >= size) return;
    const size_t begin = image * area + static_cast<size_t>(row) * size;
    store_pixels(images + begin, column, size, v);
    if (masks_narrow != 0) {
        store_pixels(static_cast<bf16*>(masks) + begin, column, size, m);
    } else {
        store_pixels(static_cast<float*>(masks) + begin, column, size, m);
    }
}

// images, masks: a batch of size × size, in [0, 1]; one change for each image, with its control points (points²
// displacements in pixels) and its tone curve where it says so. seed: of the noise.
// Grid: tiles² blocks of kThreads for each image, tiles = ceil(size / kTile). images and masks: any alignment.
#define AUGMENT(T, suffix)                                                                       \
    extern "C" __global__ void __launch_bounds__(kThreads)                                       \
        augment_##suffix(const Pixel* samples, const Change* changes, const float* control,      \
                         const float* tones, const Basis* basis, T* images, void* masks,         \
                         int masks_narrow, int size, int points, unsigned tiles,                 \
                         unsigned long long seed) {                                              \
        augment(samples, changes, control, tones, basis, images, masks, masks_narrow, size,      \
                points, tiles, seed);                                                            \
    }
AUGMENT(float, f32)
AUGMENT(bf16, bf16)
