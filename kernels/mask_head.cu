// The mask head: everything the losses and the shape features need to know of mask logits z and a ground
// truth g, per image: cross-entropy, soft Dice, seven moments and the perimeter of m = σ(κz); and the
// gradient of all that with respect to z.
//
// What it moves. Forward: one read of z and g, next to nothing back (64 bytes a piece). Backward: one read
// of z and g, one write of dz. A composition of primitive operations reads or writes a tensor of this size
// about 15 times forward and 25 times backward.
//
// A group of lanes marches down a band of rows, each lane with eight neighbouring columns, one or two
// 16-byte loads a tensor. Nothing is shared through shared memory: horizontal neighbours come by shuffle,
// vertical ones are still in registers. As soon as a row's logits have become a mask its registers are
// loaded again, with the row after next, so that one to two rows are always on their way. A group is 32
// lanes, so 256 columns make one strip; narrow images use smaller groups, several in a warp; wider images
// have several strips, whose outer lanes also load the columns beyond the edge (forward one, backward two).
//
// Corners. Sobel's two derivatives follow from the sums B of the mask over the four pixels around each
// corner of the grid. With u = B(lower right) − B(upper left) and v = B(upper right) − B(lower left) of
// a pixel, gx = u + v and gy = u − v, hence gx² + gy² = 2(u² + v²) and
//
//     √((gx/8)² + (gy/8)² + ε²) = √(u² + v² + 32ε²) / √32.
//
// That is 4 additions a pixel for the stencil instead of 6 and two rows of corners in registers; the
// transposed stencil adds the unit vector (u, v)/√… back to the corners and from there to the pixels.
//
// Backward a row waits for two more rows before the perimeter's part of its gradient is known; meanwhile the
// rest of the gradient and the slope σ'(κz) lie in shared memory, each thread's for itself.
//
// Sums are f32 over at most a band, moments about the lane's own columns and the band's middle row; at
// the end of a band they are moved to a column near the band's own centroid, so that f32 loses nothing to
// cancellation. mask_head_finish adds bands in f64, in order.
//
// For a lane's eight pixels of a row (κ = 3, sm_90a, counted in the machine code; halo rows and setup apart):
//
//     kernel           instructions a pixel   of them MUFU   registers   warps on an SM   loads in flight
//     bands, f32               45                 4.4           120            16          32 to 64 KiB
//     bands, bf16              48                 4.4           114            16          16 to 32 KiB
//     gradient, f32            55                 3.3           168            12          24 to 48 KiB
//     gradient, bf16           59                 3.3           168            12          12 to 24 KiB
//
// Predicted for 256 masks of 256², an H200 (4.2 TB/s, 132 multiprocessors at 1.75 GHz that issue 4
// instructions a cycle), not measured:
//
//     kernel           bytes moved    memory    issue slots   bound by
//     bands, f32          136 MB       33 µs       26 µs      memory
//     bands, bf16          68 MB       16 µs       28 µs      issue
//     gradient, f32       205 MB       49 µs       33 µs      memory
//     gradient, bf16      103 MB       25 µs       35 µs      issue
//
// Steps that led here, by count: corners instead of Sobel's two stencils, −3 instructions a pixel and −2
// shuffles a row; σ and m by one reciprocal of their product, −1 MUFU; −log max(σ, 1 − σ) instead of
// log(1 + e^−|z|), so that z needs no absolute value and no selection by sign, −4; the row's moments from
// sums and differences of mirrored columns, −2; waiting rows in shared memory, no spill at 168
// registers; both ends of the march decided by row numbers relative to it, −2.
//
#include "device.cuh"

constexpr int kThreads = 128;
// Columns of a lane.
constexpr int kColumns = 8;
// Floats of a piece's partial sums, and how many of them are used.
constexpr int kPartials = 16;
constexpr int kSums = 12;
enum { kEntropy, kOverlap, kPredicted, kTruth, kArea, kEnergy, kX, kY, kXx, kYy, kXy, kPerimeter };
// 32ε² of the perimeter's softening ε = 1e-3, its root, and 1/√32 (see Corners above).
constexpr float kSoftening = 32e-6f;
constexpr float kSofteningRoot = 5.65685424949238e-3f;
constexpr float kUnit = 0.17677669529663687f;
// Exponents of 2 at which e^−z and e^−κz end: their product with each other stays finite, and so does
// its reciprocal. σ(z) is then 5e-10 instead of less.
constexpr float kPlainLimit = 31.0f;
constexpr float kSharpLimit = 93.0f;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// ---- What a lane works on ----

// One band of rows of one strip of columns of one image, marched through row by row by `lanes` lanes,
// and this lane's part of it. Rows before and behind the band are its halo.
template <int Halo>
struct Piece {
    unsigned index, image;
    int lane;             // in the group
    int strip, strips;
    int column, columns;  // first column of the lane, and how many of its eight the image has
    int low, high;        // the band
    int first, step;      // row where the march begins, and its direction
    int steps, skip;      // rows of the march, and how many of them complete no stencil
    int own;              // the march's first row of the band
    int middle;           // the band's first and last row, added
    int inside, insides;  // its first row of the image, and how many from there on
    bool is_left, is_right;  // the group's first and last lane

    // Odd bands march upwards: neighbours then read the rows they share at the same time, and the
    // second finds them in the cache.
    __device__ __forceinline__ Piece(unsigned pieces, int height, int width, int rows, int lanes) {
        const unsigned groups = kThreads / lanes;
        lane = static_cast<int>(threadIdx.x) % lanes;
        index = blockIdx.x * groups + threadIdx.x / lanes;
        strips = (width + kColumns * lanes - 1) / (kColumns * lanes);
        const unsigned bands = (height + rows - 1) / rows;
        strip = static_cast<int>(index % strips);
        const int band = static_cast<int>(index / strips % bands);
        image = index / strips / bands;
        is_left = lane == 0;
        is_right = lane == lanes - 1;
        column = (strip * lanes + lane) * kColumns;
        columns = min(max(width - column, 0), kColumns);
        low = band * rows;
        high = min(low + rows, height);
        middle = low + high - 1;
        // Beyond the image all is zero, so a march that begins there may begin at the image.
        const bool is_top = low == 0, is_bottom = high == height;
        const int above = is_top ? 0 : Halo, below = is_bottom ? 0 : Halo;
        // At the other end it completes the stencils of the frame's outer row.
        const int last = Halo == 1 ? 1 : 2;
        const bool is_down = band % 2 == 0;
        const int before = is_down ? above : below;
        first = is_down ? low - before : high - 1 + before;
        step = is_down ? 1 : -1;
        steps = high - low + before + ((is_down ? is_bottom : is_top) ? 2 : last);
        skip = before == 0 ? 0 : 2;
        own = before;
        const int outside = is_down ? -first : first - (height - 1);
        inside = max(outside, 0);
        insides = (is_down ? height - first : first + 1) - inside;
        if (index >= pieces) {
            columns = 0;
            steps = skip = 0;
        }
        if (columns == 0) {
            low = high;
            insides = 0;
        }
    }

    // The longest march of the warp.
    __device__ __forceinline__ int longest() const {
        int most = steps;
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) {
            most = max(most, __shfl_xor_sync(kFullWarp, most, offset));
        }
        return most;
    }

    // Whether row j of the march is in the band, in the image (and this lane has columns there).
    __device__ __forceinline__ bool owns(int j) const {
        return static_cast<unsigned>(j - own) < static_cast<unsigned>(high - low);
    }
    __device__ __forceinline__ bool contains(int j) const {
        return static_cast<unsigned>(j - inside) < static_cast<unsigned>(insides);
    }
    // Whether it completes a stencil.
    __device__ __forceinline__ bool completes(int j) const {
        return static_cast<unsigned>(j - skip) < static_cast<unsigned>(steps - skip);
    }
};

// ---- Sigmoids ----

// σ(z) and σ(κz) from E = e^−z and F = e^−κz, by one reciprocal.
struct Sigmoids {
    float e, sharp_e, plain, sharp;

    template <bool Cubed>
    __device__ __forceinline__ static Sigmoids of(float z, float sharpness) {
        Sigmoids s;
        s.e = fast_exp2(minimum(z * -kLog2E, kPlainLimit));
        if (Cubed) {
            s.sharp_e = s.e * s.e * s.e;
        } else {
            s.sharp_e = fast_exp2(minimum(z * (-kLog2E * sharpness), kSharpLimit));
        }
        const float one_plus = 1.0f + s.e, sharp_one_plus = 1.0f + s.sharp_e;
        const float reciprocal = fast_reciprocal(one_plus * sharp_one_plus);
        s.plain = reciprocal * sharp_one_plus;
        s.sharp = reciprocal * one_plus;
        return s;
    }

    template <bool Cubed>
    __device__ __forceinline__ static float sharp_of(float z, float sharpness) {
        if (Cubed) {
            const float e = fast_exp2(minimum(z * -kLog2E, kPlainLimit));
            return fast_reciprocal(fmaf(e * e, e, 1.0f));
        }
        return fast_reciprocal(1.0f + fast_exp2(minimum(z * (-kLog2E * sharpness), kSharpLimit)));
    }
};

// ---- Rows in flight ----

// Eight neighbouring elements as they lie in memory. Aligned: all of them or none, at a multiple of 16
// bytes.
template <class T, bool Aligned>
struct Pixels {
    T at[kColumns] = {};
    __device__ __forceinline__ void load(const T* from, int count) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            if (i < count) at[i] = from[i];
        }
    }
    __device__ __forceinline__ float operator[](int i) const { return to_float(at[i]); }
    __device__ __forceinline__ static void store(T* to, const float (&x)[kColumns], int count) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            if (i < count) to[i] = from_float<T>(x[i]);
        }
    }
};
template <>
struct Pixels<float, true> {
    Vector<float, 4> part[2] = {};
    __device__ __forceinline__ void load(const float* from, int) {
        part[0] = reinterpret_cast<const Vector<float, 4>*>(from)[0];
        part[1] = reinterpret_cast<const Vector<float, 4>*>(from)[1];
    }
    __device__ __forceinline__ float operator[](int i) const { return part[i / 4].at[i % 4]; }
    __device__ __forceinline__ static void store(float* to, const float (&x)[kColumns], int) {
        reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
        reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
    }
};
template <>
struct Pixels<bf16, true> {
    Vector<unsigned, 4> pairs = {};
    __device__ __forceinline__ void load(const bf16* from, int) {
        pairs = *reinterpret_cast<const Vector<unsigned, 4>*>(from);
    }
    __device__ __forceinline__ float operator[](int i) const {
        const unsigned pair = pairs.at[i / 2];
        return __uint_as_float(i % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
    }
    __device__ __forceinline__ static void store(bf16* to, const float (&x)[kColumns], int) {
        store_16_bytes(to, pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
                       pack_bf16(x[6], x[7]));
    }
};

// A row of a piece on its way from memory: the lane's pixels, and for the outer lanes of a strip that
// has neighbours the logits beyond its edge, the nearest first.
template <class T, bool Aligned, int Halo>
struct Row {
    Pixels<T, Aligned> logits, truth;
    T beyond[Halo] = {};

    // Row j of the march; the pointers are to the lane's first column there.
    __device__ __forceinline__ void load(const T* z, const T* g, const Piece<Halo>& piece, int j,
                                         int width) {
        if (!piece.contains(j)) return;
        logits.load(z, piece.columns);
        if (piece.owns(j)) truth.load(g, piece.columns);
        if (piece.strips > 1) {
#pragma unroll
            for (int k = 0; k < Halo; ++k) {
                if (is_beyond(piece, width, k)) beyond[k] = z[piece.is_left ? -1 - k : kColumns + k];
            }
        }
    }

    // The mask of a row in the halo.
    template <bool Cubed>
    __device__ __forceinline__ void masks(int columns, float sharpness, float (&m)[kColumns]) const {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            m[i] = Sigmoids::sharp_of<Cubed>(logits[i], sharpness);
            if (!Aligned && i >= columns) m[i] = 0.0f;
        }
    }

    template <bool Cubed>
    __device__ __forceinline__ void masks_beyond(const Piece<Halo>& piece, int j, int width, float sharpness,
                                                 float (&m)[Halo]) const {
        if (!piece.contains(j)) return;
#pragma unroll
        for (int k = 0; k < Halo; ++k) {
            if (is_beyond(piece, width, k)) {
                m[k] = Sigmoids::sharp_of<Cubed>(to_float(beyond[k]), sharpness);
            }
        }
    }

    // Whether this lane has a column beyond the edge, number k from there, to read.
    __device__ __forceinline__ static bool is_beyond(const Piece<Halo>& piece, int width, int k) {
        return piece.is_left ? piece.strip > 0 : piece.is_right && piece.column + kColumns + k < width;
    }
};

// ---- The stencil's first half: sums around the pixels' corners ----

// Pair sums along one row of the mask at the nine corners of a lane's pixels, m[i-1] + m[i]; for edge
// lanes also the pair beyond, when Halo is 2.
template <int Halo>
struct Corners {
    float at[kColumns + 1] = {};
    float outer = 0.0f;

    // `beyond`: the mask in the columns beyond the strip's edge, for its outer lanes.
    __device__ __forceinline__ void pairs(const float (&m)[kColumns], const float (&beyond)[Halo],
                                          const Piece<Halo>& piece, int lanes) {
        float left = __shfl_up_sync(kFullWarp, m[kColumns - 1], 1, lanes);
        float right = __shfl_down_sync(kFullWarp, m[0], 1, lanes);
        if (piece.is_left) left = beyond[0];
        if (piece.is_right) right = beyond[0];
        at[0] = left + m[0];
#pragma unroll
        for (int i = 1; i < kColumns; ++i) at[i] = m[i - 1] + m[i];
        at[kColumns] = m[kColumns - 1] + right;
        if (Halo == 2) outer = beyond[0] + beyond[Halo - 1];
    }

    __device__ __forceinline__ void add(const Corners& a, const Corners& b) {
#pragma unroll
        for (int i = 0; i <= kColumns; ++i) at[i] = a.at[i] + b.at[i];
        if (Halo == 2) outer = a.outer + b.outer;
    }
};

// ---- Forward ----

template <class T, bool Aligned, bool Cubed>
struct Forward {
    using Pixel = Piece<1>;
    using Loaded = Row<T, Aligned, 1>;

    const Pixel& piece;
    const T *logits, *truth;
    long long next;     // element of the row that is loaded next
    int row_step;       // elements from one row of the march to the next
    int width, lanes;
    float sharpness;
    float v;            // the row, from the band's middle
    float edge;         // 1 where the frame's outer column is this lane's to count
    float sums[kSums];

    __device__ __forceinline__ Forward(const Pixel& piece, const T* logits, const T* truth, int height,
                                       int width, int lanes, float sharpness)
        : piece(piece), logits(logits), truth(truth), width(width), lanes(lanes), sharpness(sharpness) {
        v = static_cast<float>(piece.first) - 0.5f * static_cast<float>(piece.middle);
        const bool at_frame = piece.is_left ? piece.strip == 0
                                            : piece.is_right && piece.column + kColumns == width;
        edge = at_frame ? 1.0f : 0.0f;
        next = (static_cast<long long>(piece.image) * height + piece.first) * width + piece.column;
        row_step = piece.step * width;
#pragma unroll
        for (int k = 0; k < kSums; ++k) sums[k] = 0.0f;
    }

    __device__ __forceinline__ void load(Loaded& row, int j) {
        row.load(logits + next, truth + next, piece, j, width);
        next += row_step;
    }

    // Sums over one row of the band, and its mask.
    __device__ __forceinline__ void add_row(const Loaded& row, float (&m)[kColumns]) {
        float product = 1.0f;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            const float z = row.logits[i], g = row.truth[i];
            Sigmoids s = Sigmoids::of<Cubed>(z, sharpness);
            if (!Aligned && i >= piece.columns) s.plain = s.sharp = 0.0f;
            m[i] = s.sharp;
            // −log max(σ, 1−σ) + max(z, 0) − z·g; what lies beyond the image has z = g = 0, and σ = 0.
            product *= fabsf(s.plain - 0.5f) + 0.5f;
            sums[kEntropy] = fmaf(-z, g, sums[kEntropy] + fmaxf(z, 0.0f));
            sums[kOverlap] = fmaf(s.plain, g, sums[kOverlap]);
            sums[kPredicted] += s.plain;
            sums[kTruth] += g;
            sums[kEnergy] = fmaf(s.sharp, s.sharp, sums[kEnergy]);
        }
        sums[kEntropy] = fmaf(-kLn2, fast_log2(product), sums[kEntropy]);
        // Moments of the row about the lane's middle, by symmetry.
        float area = 0.0f, x = 0.0f, xx = 0.0f;
#pragma unroll
        for (int k = 0; k < kColumns / 2; ++k) {
            const float left = m[kColumns / 2 - 1 - k], right = m[kColumns / 2 + k];
            const float both = left + right, offset = static_cast<float>(k) + 0.5f;
            area += both;
            x = fmaf(offset, right - left, x);
            xx = fmaf(offset * offset, both, xx);
        }
        const float va = v * area;
        sums[kArea] += area;
        sums[kX] += x;
        sums[kXx] += xx;
        sums[kY] += va;
        sums[kYy] = fmaf(v, va, sums[kYy]);
        sums[kXy] = fmaf(v, x, sums[kXy]);
    }

    // Step j of the march: row `row` was loaded, and the pairs and corners of the row before are known.
    __device__ __forceinline__ void step(int j, Loaded& row, const Corners<1>& old_pairs,
                                         const Corners<1>& old_corners, Corners<1>& pairs,
                                         Corners<1>& corners) {
        float m[kColumns], beyond[1] = {};
        if (piece.owns(j)) {
            add_row(row, m);
        } else {
#pragma unroll
            for (int i = 0; i < kColumns; ++i) m[i] = 0.0f;
            if (piece.contains(j)) row.template masks<Cubed>(piece.columns, sharpness, m);
        }
        if (piece.strips > 1) row.template masks_beyond<Cubed>(piece, j, width, sharpness, beyond);
        load(row, j + 2);
        v += static_cast<float>(piece.step);

        pairs.pairs(m, beyond, piece, lanes);
        corners.add(old_pairs, pairs);
        if (!piece.completes(j)) return;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            add_length(corners.at[i + 1] - old_corners.at[i], old_corners.at[i + 1] - corners.at[i], 1.0f);
        }
        add_length(piece.is_right ? corners.at[kColumns] : corners.at[0],
                   piece.is_right ? old_corners.at[kColumns] : old_corners.at[0], edge);
    }

    // √(q + s) − √s as q/(√(q + s) + √s), which does not cancel where the mask is nearly flat.
    __device__ __forceinline__ void add_length(float u, float v, float weight) {
        const float q = fmaf(u, u, v * v);
        const float reciprocal = fast_reciprocal(fast_sqrt(q + kSoftening) + kSofteningRoot);
        sums[kPerimeter] = fmaf(weight * q, reciprocal, sums[kPerimeter]);
    }

    __device__ __forceinline__ void march() {
        Loaded even, odd;
        Corners<1> pairs, corners, other_pairs, other_corners;
        load(even, 0);
        load(odd, 1);
        const int steps = piece.longest();
        for (int j = 0; j < steps; j += 2) {
            step(j, even, pairs, corners, other_pairs, other_corners);
            step(j + 1, odd, other_pairs, other_corners, pairs, corners);
        }
    }

    __device__ __forceinline__ float reduce(float x) const {
        for (int offset = lanes / 2; offset > 0; offset /= 2) {
            x += __shfl_xor_sync(kFullWarp, x, offset);
        }
        return x;
    }

    // Adds up the lanes. Second moments are moved from the lanes' middles to a column near the piece's
    // own centroid, where nothing cancels; that column goes with them.
    __device__ __forceinline__ void finish(float* partials) {
        const float here = static_cast<float>(piece.column) + 0.5f * (kColumns - 1);
        const float area = reduce(sums[kArea]);
        const float first = reduce(fmaf(here, sums[kArea], sums[kX]));
        const float centre = area > 0.0f ? rintf(first / area) : 0.0f;
        const float d = here - centre;
        sums[kXx] += d * fmaf(d, sums[kArea], 2.0f * sums[kX]);
        sums[kXy] = fmaf(d, sums[kY], sums[kXy]);
        sums[kX] = fmaf(d, sums[kArea], sums[kX]);
        sums[kPerimeter] *= kUnit;
#pragma unroll
        for (int k = 0; k < kSums; ++k) sums[k] = reduce(sums[k]);
        if (piece.is_left && piece.steps > 0) {
            auto to = reinterpret_cast<Vector<float, 4>*>(
                partials + static_cast<size_t>(piece.index) * kPartials);
#pragma unroll
            for (int k = 0; k < kSums / 4; ++k) {
                to[k] = {{sums[4 * k], sums[4 * k + 1], sums[4 * k + 2], sums[4 * k + 3]}};
            }
            to[kSums / 4] = {{centre, 0.0f, 0.0f, 0.0f}};
        }
    }
};

template <class T, bool Aligned, bool Cubed>
__device__ __forceinline__ void forward(const Piece<1>& piece, const T* logits, const T* truth,
                                        float* partials, int height, int width, int lanes,
                                        float sharpness) {
    Forward<T, Aligned, Cubed> band(piece, logits, truth, height, width, lanes, sharpness);
    band.march();
    band.finish(partials);
}

// Partial sums of every piece: `rows` (2 to 32) rows of 8·lanes columns of one of the images.
// `lanes` is 2, 4, 8, 16 or 32, 32 unless one strip is as wide as the image; `pieces` is the number of
// images · ceil(height / rows) · ceil(width / (8·lanes)), below 2³². Grid: ceil(pieces·lanes / kThreads)
// blocks of kThreads. partials: kPartials floats a piece, at a multiple of 16 bytes. mask_head_bands_f32 and
// _bf16 want width % 8 == 0, logits and truth at multiples of 16 bytes; _any_ takes all.
#define BANDS(T, name, aligned)                                                                     \
    extern "C" __global__ void __launch_bounds__(kThreads, 4)                                       \
        name(const T* __restrict__ logits, const T* __restrict__ truth, float* partials,            \
             unsigned pieces, int height, int width, int rows, int lanes, float sharpness) {        \
        const Piece<1> piece(pieces, height, width, rows, lanes);                                   \
        if (sharpness == 3.0f) {                                                                    \
            forward<T, aligned, true>(piece, logits, truth, partials, height, width, lanes, 3.0f);  \
        } else {                                                                                    \
            forward<T, aligned, false>(piece, logits, truth, partials, height, width, lanes,        \
                                       sharpness);                                                  \
        }                                                                                           \
    }
BANDS(float, mask_head_bands_f32, true)
BANDS(bf16, mask_head_bands_bf16, true)
BANDS(float, mask_head_bands_any_f32, false)
BANDS(bf16, mask_head_bands_any_bf16, false)

// The outputs, from partial sums of the same `rows` and `lanes`: cross_entropy, dice and perimeter a float
// an image, overlap 3 (Σσg, Σσ, Σg), moments 7 (Σm, Σm², Σxm, Σym from the image's centre; Σxxm, Σyym,
// Σxym about the centroid). Grid: ceil(images / 4) blocks of kThreads, a warp an image.
extern "C" __global__ void __launch_bounds__(kThreads)
    mask_head_finish(const float* __restrict__ partials, float* cross_entropy, float* dice,
                     float* overlap, float* moments, float* perimeter, unsigned images, int height,
                     int width, int rows, int lanes) {
    const unsigned image = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
    if (image >= images) return;  // a whole warp
    const int strips = (width + kColumns * lanes - 1) / (kColumns * lanes);
    const int bands = (height + rows - 1) / rows;
    double sums[kSums] = {};
    for (int k = static_cast<int>(threadIdx.x) % 32; k < bands * strips; k += 32) {
        const float* piece = partials + (static_cast<size_t>(image) * bands * strips + k) * kPartials;
        const int low = k / strips * rows, high = min(low + rows, height);
        // Where the piece's moments are taken about, from the image's centre.
        const double x = static_cast<double>(piece[kSums]) - 0.5 * (width - 1);
        const double y = 0.5 * (low + high - 1) - 0.5 * (height - 1);
        const double area = piece[kArea], mx = piece[kX], my = piece[kY];
        const double moved_x = mx + x * area, moved_y = my + y * area;
#pragma unroll
        for (int s = 0; s <= kEnergy; ++s) sums[s] += piece[s];
        sums[kPerimeter] += piece[kPerimeter];
        sums[kX] += moved_x;
        sums[kY] += moved_y;
        sums[kXx] += piece[kXx] + x * (mx + moved_x);
        sums[kYy] += piece[kYy] + y * (my + moved_y);
        sums[kXy] += piece[kXy] + x * my + y * moved_x;
    }
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) {
            sums[s] += __shfl_xor_sync(kFullWarp, sums[s], offset);
        }
    }
    if (threadIdx.x % 32 != 0) return;
    cross_entropy[image] = static_cast<float>(sums[kEntropy] / (static_cast<double>(height) * width));
    const double together = sums[kPredicted] + sums[kTruth] + 1.0;
    dice[image] = static_cast<float>(1.0 - (2.0 * sums[kOverlap] + 1.0) / together);
    overlap += 3 * static_cast<size_t>(image);
    overlap[0] = static_cast<float>(sums[kOverlap]);
    overlap[1] = static_cast<float>(sums[kPredicted]);
    overlap[2] = static_cast<float>(sums[kTruth]);
    const double area = sums[kArea];
    const double x = area == 0.0 ? 0.0 : sums[kX] / area, y = area == 0.0 ? 0.0 : sums[kY] / area;
    moments += 7 * static_cast<size_t>(image);
    moments[0] = static_cast<float>(area);
    moments[1] = static_cast<float>(sums[kEnergy]);
    moments[2] = static_cast<float>(sums[kX]);
    moments[3] = static_cast<float>(sums[kY]);
    moments[4] = static_cast<float>(sums[kXx] - x * sums[kX]);
    moments[5] = static_cast<float>(sums[kYy] - y * sums[kY]);
    moments[6] = static_cast<float>(sums[kXy] - x * sums[kY]);
    perimeter[image] = static_cast<float>(sums[kPerimeter]);
}

// ---- Backward ----

// What an image's outputs ask of each pixel.
struct Coefficients {
    float entropy;             // by σ − g
    float overlap, predicted;  // by g·σ' and σ'
    float x, y;                // the centroid, from the image's centre
    float m[7];                // by the moments, times κ
    float perimeter;           // times κ/√32

    __device__ __forceinline__ Coefficients(size_t image, int height, int width, float sharpness,
                                            const float* overlaps, const float* moments,
                                            const float* dentropy, const float* ddice,
                                            const float* dmoments, const float* dperimeter) {
        entropy = dentropy[image] / (static_cast<float>(height) * static_cast<float>(width));
        const float* sums = overlaps + 3 * image;
        const float together = 1.0f / (sums[1] + sums[2] + 1.0f), dd = ddice[image] * together;
        overlap = -2.0f * dd;
        predicted = fmaf(2.0f, sums[0], 1.0f) * together * dd;
        const float* found = moments + 7 * image;
        x = found[0] == 0.0f ? 0.0f : found[2] / found[0];
        y = found[0] == 0.0f ? 0.0f : found[3] / found[0];
#pragma unroll
        for (int k = 0; k < 7; ++k) m[k] = sharpness * dmoments[7 * image + k];
        perimeter = sharpness * kUnit * dperimeter[image];
    }
};

using Four = Vector<float, 4>;

// Rows whose perimeter part is not known yet: the rest of their gradient, and σ'(κz)/κ. They wait for two
// rows in shared memory, of which each thread uses its own part alone; in registers they would leave too
// few for the others.
struct Waiting {
    static constexpr int kVectors = 2 * kColumns / 4;
    static constexpr int kRows = 3;
    Four* at;  // this thread's part of the newest row
    Four* end;

    __device__ __forceinline__ explicit Waiting(Four* rows) {
        at = rows + threadIdx.x;
        end = at + kRows * kVectors * kThreads;
    }
    // The newest row's place becomes the oldest.
    __device__ __forceinline__ Four* oldest() const {
        Four* next = at + kVectors * kThreads;
        return next == end ? next - kRows * kVectors * kThreads : next;
    }
    __device__ __forceinline__ void put(int k, const float (&rest)[4], const float (&slope)[4]) const {
        at[2 * k * kThreads] = {{rest[0], rest[1], rest[2], rest[3]}};
        at[(2 * k + 1) * kThreads] = {{slope[0], slope[1], slope[2], slope[3]}};
    }
};

template <class T, bool Aligned, bool Cubed>
struct Gradient {
    using Pixel = Piece<2>;
    using Loaded = Row<T, Aligned, 2>;

    const Pixel& piece;
    const Coefficients& c;
    const T *logits, *truth;
    T* dlogits;
    long long next;    // element of the row that is loaded next
    int row_step;      // elements from one row of the march to the next
    int width, lanes;
    float sharpness;
    float row, right;  // the row from the image's centre, the lane's first column from the centroid
    bool is_skipping;  // whether the warp leaves out the stencil where nobody needs it
    Waiting waiting;

    __device__ __forceinline__ Gradient(const Pixel& piece, const T* logits, const T* truth, T* dlogits,
                                        const Coefficients& c, int height, int width, int lanes,
                                        float sharpness, Four* rows)
        : piece(piece), c(c), logits(logits), truth(truth), dlogits(dlogits), width(width),
          lanes(lanes), sharpness(sharpness), is_skipping(lanes == 32), waiting(rows) {
        row = static_cast<float>(piece.first) - 0.5f * static_cast<float>(height - 1);
        right = static_cast<float>(piece.column) - 0.5f * static_cast<float>(width - 1) - c.x;
        next = (static_cast<long long>(piece.image) * height + piece.first) * width + piece.column;
        row_step = piece.step * width;
    }

    __device__ __forceinline__ void load(Loaded& loaded, int j) {
        loaded.load(logits + next, truth + next, piece, j, width);
        next += row_step;
    }

    // All but the perimeter's part of the gradient along one row of the band.
    __device__ __forceinline__ void begin_row(const Loaded& loaded, float (&m)[kColumns]) const {
        // The moments' part, a quadratic in the column: (k2·i + k1)·i + k0 with i from the lane's first.
        const float below = row - c.y;
        const float slope = fmaf(c.m[6], below, c.m[2]);
        const float level = fmaf(c.m[2], c.x, fmaf(c.m[3], row, fmaf(c.m[5] * below, below, c.m[0])));
        const float k2 = c.m[4];
        const float k1 = fmaf(2.0f * k2, right, slope);
        const float k0 = fmaf(fmaf(k2, right, slope), right, level);
        const float energy = 2.0f * c.m[1];
#pragma unroll
        for (int k = 0; k < kColumns / 4; ++k) {
            float rest[4], slopes[4];
#pragma unroll
            for (int l = 0; l < 4; ++l) {
                const int i = 4 * k + l;
                const float g = loaded.truth[i];
                Sigmoids s = Sigmoids::of<Cubed>(loaded.logits[i], sharpness);
                if (!Aligned && i >= piece.columns) s.sharp = 0.0f;
                m[i] = s.sharp;
                // By e = e^−z, which holds its digits where 1 − σ does not: σ' = σ·eσ and
                // σ − g = σ·((1 − g) − e·g).
                const float complement = s.e * s.plain;
                const float excess = fmaf(-s.e, g, 1.0f - g);
                slopes[l] = s.sharp_e * s.sharp * s.sharp;
                const float offset = static_cast<float>(i);
                const float by_mask = fmaf(energy, s.sharp, fmaf(fmaf(k2, offset, k1), offset, k0));
                const float by_plain = fmaf(c.overlap, g, c.predicted);
                const float by_sigmoid = fmaf(c.entropy, excess, by_plain * complement);
                rest[l] = fmaf(by_mask, slopes[l], by_sigmoid * s.plain);
            }
            waiting.put(k, rest, slopes);
        }
    }

    // Completes the row before last: `here` and `divergence` are what the corners above and below it
    // make of the unit vectors around.
    __device__ __forceinline__ void finish_row(const float (&here)[kColumns],
                                               const float (&divergence)[kColumns]) {
        const Four* from = waiting.oldest();
        float d[kColumns];
#pragma unroll
        for (int k = 0; k < kColumns / 4; ++k) {
            const Four rest = from[2 * k * kThreads], slope = from[(2 * k + 1) * kThreads];
#pragma unroll
            for (int l = 0; l < 4; ++l) {
                const int i = 4 * k + l;
                d[i] = fmaf(c.perimeter * slope.at[l], divergence[i] + here[i], rest.at[l]);
            }
        }
        // Row j + 2 was loaded last, this is row j − 2.
        const long long at = next - 5 * static_cast<long long>(row_step);
        Pixels<T, Aligned>::store(dlogits + at, d, piece.columns);
    }

    // Step j: a row was loaded; pairs, corners, what goes down from the row before and what the corners
    // before that gave are known.
    __device__ __forceinline__ void step(int j, Loaded& loaded, const Corners<2>& old_pairs,
                                         const Corners<2>& old_corners, Corners<2>& pairs,
                                         Corners<2>& corners, float (&down)[kColumns + 1],
                                         float (&divergence)[kColumns]) {
        float m[kColumns], beyond[2] = {};
        if (piece.owns(j)) {
            begin_row(loaded, m);
        } else {
#pragma unroll
            for (int i = 0; i < kColumns; ++i) m[i] = 0.0f;
            if (piece.contains(j)) loaded.template masks<Cubed>(piece.columns, sharpness, m);
        }
        if (piece.strips > 1) loaded.template masks_beyond<Cubed>(piece, j, width, sharpness, beyond);
        load(loaded, j + 2);
        row += static_cast<float>(piece.step);

        pairs.pairs(m, beyond, piece, lanes);
        corners.add(old_pairs, pairs);
        if (!is_skipping || j >= piece.skip) {
            // Unit vectors of the row before, at columns −1 to 8 of the lane.
            float u[kColumns + 2], v[kColumns + 2];
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                const float a = corners.at[i + 1] - old_corners.at[i];
                const float b = old_corners.at[i + 1] - corners.at[i];
                const float r = fast_rsqrt(fmaf(a, a, fmaf(b, b, kSoftening)));
                u[i + 1] = a * r;
                v[i + 1] = b * r;
            }
            u[0] = __shfl_up_sync(kFullWarp, u[kColumns], 1, lanes);
            v[0] = __shfl_up_sync(kFullWarp, v[kColumns], 1, lanes);
            u[kColumns + 1] = __shfl_down_sync(kFullWarp, u[1], 1, lanes);
            v[kColumns + 1] = __shfl_down_sync(kFullWarp, v[1], 1, lanes);
            // The column beyond the strip's edge, by its outer lanes: the left form, which seen from the
            // other side is −v, −u.
            const float inner = piece.is_right ? corners.at[kColumns] : corners.at[0];
            const float old_inner = piece.is_right ? old_corners.at[kColumns] : old_corners.at[0];
            const float a = inner - old_corners.outer, b = old_inner - corners.outer;
            const float r = fast_rsqrt(fmaf(a, a, fmaf(b, b, kSoftening)));
            if (piece.is_left) {
                u[0] = a * r;
                v[0] = b * r;
            }
            if (piece.is_right) {
                u[kColumns + 1] = -b * r;
                v[kColumns + 1] = -a * r;
            }
            // The transposed stencil: back to the corners between this row and the one before, and from
            // there to the pixels.
            float corner[kColumns + 1], here[kColumns];
#pragma unroll
            for (int i = 0; i <= kColumns; ++i) {
                corner[i] = down[i] + (v[i] - u[i + 1]);
                down[i] = u[i] - v[i + 1];
            }
#pragma unroll
            for (int i = 0; i < kColumns; ++i) here[i] = corner[i] + corner[i + 1];
            if (piece.owns(j - 2)) finish_row(here, divergence);
#pragma unroll
            for (int i = 0; i < kColumns; ++i) divergence[i] = here[i];
        }
        waiting.at = waiting.oldest();
    }

    __device__ __forceinline__ void march() {
        Loaded even, odd;
        Corners<2> pairs, corners, other_pairs, other_corners;
        float down[kColumns + 1] = {}, divergence[kColumns] = {};
        load(even, 0);
        load(odd, 1);
        const int steps = piece.longest();
        for (int j = 0; j < steps; j += 2) {
            step(j, even, pairs, corners, other_pairs, other_corners, down, divergence);
            step(j + 1, odd, other_pairs, other_corners, pairs, corners, down, divergence);
        }
    }
};

template <class T, bool Aligned, bool Cubed>
__device__ __forceinline__ void gradient(const Piece<2>& piece, const T* logits, const T* truth,
                                         const Coefficients& c, T* dlogits, int height, int width,
                                         int lanes, float sharpness, Four* rows) {
    Gradient<T, Aligned, Cubed>(piece, logits, truth, dlogits, c, height, width, lanes, sharpness, rows)
        .march();
}

// dlogits, from what mask_head_finish found (overlap, moments) and the gradients of its other outputs. Pieces,
// grid and alignment (of dlogits too) as for mask_head_bands, `rows` from 2 on. dlogits overlaps no input.
#define GRADIENT(T, name, aligned, blocks)                                                           \
    extern "C" __global__ void __launch_bounds__(kThreads, blocks)                                   \
        name(const T* __restrict__ logits, const T* __restrict__ truth,                              \
             const float* __restrict__ overlap, const float* __restrict__ moments,                   \
             const float* __restrict__ dentropy, const float* __restrict__ ddice,                    \
             const float* __restrict__ dmoments, const float* __restrict__ dperimeter, T* dlogits,   \
             unsigned pieces, int height, int width, int rows, int lanes, float sharpness) {         \
        SHARED(Four, waiting, Waiting::kRows * Waiting::kVectors * kThreads);                        \
        const Piece<2> piece(pieces, height, width, rows, lanes);                                    \
        const Coefficients c(piece.index < pieces ? piece.image : 0, height, width, sharpness,       \
                             overlap, moments, dentropy, ddice, dmoments, dperimeter);               \
        if (sharpness == 3.0f) {                                                                     \
            gradient<T, aligned, true>(piece, logits, truth, c, dlogits, height, width, lanes, 3.0f, \
                                       waiting);                                                     \
        } else {                                                                                     \
            gradient<T, aligned, false>(piece, logits, truth, c, dlogits, height, width, lanes,      \
                                        sharpness, waiting);                                         \
        }                                                                                            \
    }
GRADIENT(float, mask_head_gradient_f32, true, 3)
GRADIENT(bf16, mask_head_gradient_bf16, true, 3)
GRADIENT(float, mask_head_gradient_any_f32, false, 2)
GRADIENT(bf16, mask_head_gradient_any_bf16, false, 2)
