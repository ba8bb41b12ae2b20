// Convolution and its gradients as products of matrices that are never built (implicit GEMM).
//
//     correlate         y[pixel, o] = Σₖ x[pixel + tap, c] · w[o, k],  k = (row, column, c) of the kernel
//     weight gradient   dw[o, k] = Σ dy[pixel, o] · x[pixel + tap, c], summed over pixels
//
// The input gradient is a correlation too: of dy, for each phase of the stride, with the taps that meet it, turned
// round (Correlation below says how each phase walks); so is a transposed convolution. bf16 goes through mma.sync, or
// on sm_90a where it is asked for through wgmma, with f32 sums, f32 through fused multiply-adds: exact products, in an
// order that depends on sizes alone.
//
// A block makes a tile of the result. Operands come by cp.async, 16 bytes a thread, into a ring of kStages stages of
// shared memory; one barrier a stage. Channels are contiguous in memory and a multiple of 16 bytes, so each vector
// of k lies in one tap: a thread walks (row, column, channel) by additions, and its pixels, which stay, are known by
// an offset and two rows of bits, one for each tap's row and column that lies inside of the image. Vectors outside,
// and behind the end of k, arrive as zeros.
//
// Shared memory is swizzled: rows of 64 bytes, whose vector v lies at v ^ (row / 2 % 4), and rows of 128 bytes and
// more, at v ^ (row % 8), give eight rows' vectors of one number 32 different banks, as ldmatrix and 16-byte loads
// want them.
//
// What of the results goes to memory is put together in shared memory first, so that whole rows of channels are
// written by 16 bytes a thread.
//
// wgmma reads the same stages as they are: rows of k of 64 bytes, and blocks of rows of 128, are its swizzles. Its products
// run behind the threads' backs, so that one stage less is fetched ahead: into that of the products before the last, which
// all warps have waited for when they meet.
#include "device.cuh"
#include "epilogue.cuh"

constexpr int kStages = 4;
// A row of k in a stage of `correlate`.
constexpr int kRowBytes = 64;
constexpr int kRowVectors = kRowBytes / 16;

// Instantiations for GPUs with products of bf16; elsewhere those kernels are empty.
#define ANYWHERE(...) __VA_ARGS__
#if ECHOGRAD_EMULATOR || __CUDA_ARCH__ >= 800
#define TENSOR_CORES(...) __VA_ARGS__
#else
#define TENSOR_CORES(...)
#endif
// Those that need wgmma are launched nowhere else; other code than sm_90a's would leave y as it was.
#if ECHOGRAD_WGMMA
#define WARPGROUPS(...) __VA_ARGS__
#else
#define WARPGROUPS(...) __trap();
#endif

// Elements of 16 bytes.
template <class T>
constexpr int kWidth = 16 / sizeof(T);

// i / divisor for i < 2^31, by a multiplication: multiplier = ceil(2^shift / divisor), shift = 31 + ceil(log2).
struct FastDivision {
    unsigned multiplier, shift;
    __device__ __forceinline__ int operator()(int i) const {
        return static_cast<int>(static_cast<unsigned long long>(static_cast<unsigned>(i)) * multiplier >> shift);
    }
};

// How a correlation walks its tensors, as src/ops/conv2d/device.rs writes it; offsets in elements.
//
//     y[start + n·image + i·row + j·column + o]
//         = Σ x[n, i·stride + r + top, j·stride + s + left, c] · w[start + o·output + r·row + s·column + c]
struct __align__(16) Correlation {
    int x_rows, x_columns, channels;
    // Output pixels of an image, of the batch, and output channels.
    int rows, columns, pixels, outputs;
    int taps[2], stride[2], origin[2];
    int y_start, y_image, y_row, y_column;
    int w_start, w_row, w_column, w_output;
    FastDivision by_rows, by_columns;
    // One tap, of the pixel itself, in a y without gaps: pixel i is at i·channels, and i·outputs in y.
    int flat;
    int unused[2];
};

// An output pixel.
struct Pixel {
    int image, row, column;
    __device__ __forceinline__ Pixel(const Correlation& of, int i) {
        const int rows = of.by_columns(i);
        column = i - rows * of.columns;
        image = of.by_rows(rows);
        row = rows - image * of.rows;
    }
};

// Bits first .. first + taps − 1 of which are set where first + tap is in 0 .. extent.
__device__ __forceinline__ unsigned inside(int first, int taps, int extent) {
    const int low = max(0, -first), high = min(taps, extent - first);
    return low < high ? (1u << high) - (1u << low) : 0u;
}

// Where a stage of the weight gradient has Depth pixels of Width elements each. bf16: blocks of 64 elements, in each
// of which a pixel has 128 bytes, swizzled. f32: pixels one after another, which are read along.
template <class T, int Depth, int Width>
struct Stage {
    static constexpr int kBytes = Depth * Width * static_cast<int>(sizeof(T));
    static __device__ __forceinline__ int at(int pixel, int vector) {
        if (sizeof(T) == 4) return (pixel * (Width / 4) + vector) * 16;
        static_assert(Width % 64 == 0, "whole blocks");
        return (vector / 8 * Depth + pixel) * 128 + (vector % 8 ^ pixel % 8) * 16;
    }
};

// ---- Sums of a warp: which element of the tile a thread has where, and how they are made ----
//
// kPending: stages whose products may be under way when `add` returns; `finish` waits for all. kGroup: warps whose
// statistics are merged before they are stored.

#if ECHOGRAD_EMULATOR || __CUDA_ARCH__ >= 800
// RowTiles·16 × ColumnPairs·16 sums, bf16 operands.
template <int RowTiles, int ColumnPairs>
struct TensorSums {
    static constexpr int kPending = 0, kGroup = 1;
    static constexpr int kRows = 2 * RowTiles, kColumns = 4 * ColumnPairs;
    // Size of the warp's tile, and lanes along its rows.
    static constexpr int kTileRows = 16 * RowTiles, kTileColumns = 16 * ColumnPairs, kLanes = 4;
    float sums[RowTiles][2 * ColumnPairs][4];

    static __device__ __forceinline__ int row(int i) {
        return i / 2 * 16 + i % 2 * 8 + static_cast<int>(threadIdx.x) % 32 / 4;
    }
    static __device__ __forceinline__ int column(int j) {
        return j / 2 * 8 + j % 2 + static_cast<int>(threadIdx.x) % 4 * 2;
    }
    __device__ __forceinline__ float& at(int i, int j) { return sums[i / 2][j / 2][i % 2 * 2 + j % 2]; }

    __device__ __forceinline__ void multiply(const unsigned (&a)[RowTiles][4],
                                             const unsigned (&b)[ColumnPairs][4]) {
#pragma unroll
        for (int i = 0; i < RowTiles; ++i) {
#pragma unroll
            for (int j = 0; j < ColumnPairs; ++j) {
                mma_bf16(sums[i][2 * j], a[i], {b[j][0], b[j][1]});
                mma_bf16(sums[i][2 * j + 1], a[i], {b[j][2], b[j][3]});
            }
        }
    }

    // Where a lane reads in a stage of rows of k, in bytes, the warp's tile beginning in rows a and b.
    struct Reader {
        int a[2], b[2];
        __device__ __forceinline__ Reader(int a_row, int b_row) {
            const int lane = threadIdx.x % 32;
            a_row += lane % 16;
            b_row += lane / 16 * 8 + lane % 8;
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                a[k] = hold(a_row * kRowBytes + ((lane / 16 + 2 * k) ^ (a_row / 2 % 4)) * 16);
                b[k] = hold(b_row * kRowBytes + ((lane / 8 % 2 + 2 * k) ^ (b_row / 2 % 4)) * 16);
            }
        }
    };
    __device__ __forceinline__ void add(const unsigned char* stage, const Reader& at) {
        static_assert(kRowVectors == 4, "two products deep");
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            unsigned left[RowTiles][4], right[ColumnPairs][4];
#pragma unroll
            for (int i = 0; i < RowTiles; ++i) ldmatrix(left[i], stage + at.a[k] + i * 16 * kRowBytes);
#pragma unroll
            for (int j = 0; j < ColumnPairs; ++j) ldmatrix(right[j], stage + at.b[k] + j * 16 * kRowBytes);
            multiply(left, right);
        }
    }
    __device__ __forceinline__ void finish() {}

    // The same for a stage of Depth pixels, each of A elements and behind them all of B, from elements a and b of them
    // on.
    template <int Depth, int A, int B>
    struct TransposedReader {
        int a[RowTiles], b[ColumnPairs];
        __device__ __forceinline__ TransposedReader(int a_first, int b_first) {
            const int lane = threadIdx.x % 32;
#pragma unroll
            for (int i = 0; i < RowTiles; ++i) {
                a[i] = hold(Stage<bf16, Depth, A>::at(lane / 16 * 8 + lane % 8, a_first / 8 + lane / 8 % 2 + 2 * i));
            }
#pragma unroll
            for (int j = 0; j < ColumnPairs; ++j) {
                b[j] = hold(Stage<bf16, Depth, A>::kBytes +
                            Stage<bf16, Depth, B>::at(lane % 16, b_first / 8 + lane / 16 + 2 * j));
            }
        }
    };
    template <int Depth, int A, int B>
    __device__ __forceinline__ void add(const unsigned char* stage, const TransposedReader<Depth, A, B>& at) {
#pragma unroll
        for (int k = 0; k < Depth; k += 16) {
            unsigned left[RowTiles][4], right[ColumnPairs][4];
#pragma unroll
            for (int i = 0; i < RowTiles; ++i) ldmatrix<4, true>(left[i], stage + at.a[i] + k * 128);
#pragma unroll
            for (int j = 0; j < ColumnPairs; ++j) ldmatrix<4, true>(right[j], stage + at.b[j] + k * 128);
            multiply(left, right);
        }
    }
};
#endif

#if ECHOGRAD_WGMMA
// 32 × Columns sums, bf16 operands: a warp's part of the 128 × Columns of its warpgroup, by wgmma.
//
// Copies stay cp.async, of one thread per vector: the copy engine's im2col mode would take a tensor map for each
// tensor, phase of the stride and tile, made by the driver for addresses that only a session knows, to save
// instructions that are issued while products are under way.
template <int Columns>
struct WarpgroupSums {
    static constexpr int kPending = 1, kGroup = 4;
    static constexpr int kRows = 4, kColumns = Columns / 4;
    static constexpr int kTileRows = 32, kTileColumns = Columns, kLanes = 4;
    // Of a warpgroup's sixteen eights of rows the even and the odd ones, 64 rows each, are a product: of both a warp has
    // two eights, and so four that follow one another.
    float sums[2][Columns / 8][4];

    static __device__ __forceinline__ int row(int i) { return i * 8 + static_cast<int>(threadIdx.x) % 32 / 4; }
    static __device__ __forceinline__ int column(int j) {
        return j / 2 * 8 + j % 2 + static_cast<int>(threadIdx.x) % 4 * 2;
    }
    __device__ __forceinline__ float& at(int i, int j) { return sums[i % 2][j / 2][i / 2 * 2 + j % 2]; }

    // Where the operands of the warpgroup lie in a stage, in bytes.
    struct Reader {
        int a, b;
        __device__ __forceinline__ Reader(int a_row, int b_row)
            : a(hold(a_row / 128 * 128 * kRowBytes)), b(hold(b_row * kRowBytes)) {}
    };
    // Returns with this stage's products under way, and those before done.
    __device__ __forceinline__ void add(const unsigned char* stage, const Reader& at) {
        constexpr int eight = 8 * kRowBytes;
        const unsigned long long a = wgmma_matrix<kRowBytes>(stage + at.a, 16, 2 * eight);
        const unsigned long long b = wgmma_matrix<kRowBytes>(stage + at.b, 16, eight);
        hold(sums[0]);
        hold(sums[1]);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kRowBytes; k += 32) {
#pragma unroll
            for (int i = 0; i < 2; ++i) wgmma_bf16<Columns>(sums[i], a + (i * eight + k) / 16, b + k / 16);
        }
        wgmma_commit();
        wgmma_wait<kPending>();
    }
    __device__ __forceinline__ void finish() {
        wgmma_wait<0>();
        hold(sums[0]);
        hold(sums[1]);
    }
};

// The same for stages of the weight gradient, whose blocks have 64 rows: the two products are of one of them each.
template <int Columns>
struct TransposedWarpgroupSums : WarpgroupSums<Columns> {
    using Base = WarpgroupSums<Columns>;
    using Base::sums;

    // From the first of the 32 rows of a warp of other kinds: of both products it has 16, as of its number.
    static __device__ __forceinline__ int row(int i) {
        const int thread = static_cast<int>(threadIdx.x), warp = thread / 32 % 4;
        return i % 2 * 64 + i / 2 * 8 + thread % 32 / 4 - warp * 16;
    }

    // Where the columns of a warpgroup lie; all have the same 128 rows.
    template <int Depth, int A, int B>
    struct TransposedReader {
        static_assert(A == 128, "the rows of one warpgroup");
        int b;
        __device__ __forceinline__ TransposedReader(int, int b_first)
            : b(hold(Stage<bf16, Depth, A>::kBytes + b_first / 64 * (Stage<bf16, Depth, 64>::kBytes))) {}
    };
    template <int Depth, int A, int B>
    __device__ __forceinline__ void add(const unsigned char* stage, const TransposedReader<Depth, A, B>& at) {
        constexpr int block = Stage<bf16, Depth, 64>::kBytes, eight = 8 * 128;
        const unsigned long long a = wgmma_matrix<128>(stage, block, eight);
        const unsigned long long b = wgmma_matrix<128>(stage + at.b, block, eight);
        hold(sums[0]);
        hold(sums[1]);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < Depth / 8 * eight; k += 2 * eight) {
#pragma unroll
            for (int i = 0; i < 2; ++i) wgmma_bf16<Columns, true>(sums[i], a + (i * block + k) / 16, b + k / 16);
        }
        wgmma_commit();
        wgmma_wait<Base::kPending>();
    }
};
#endif

// 8·(32 / Lanes) × 8·Lanes sums of f32 operands, 8 × 8 a thread. Transposed: for stages of rows of pixels.
template <int Lanes, bool Transposed = false>
struct FloatSums {
    static constexpr int kPending = 0, kGroup = 1;
    static constexpr int kRows = 8, kColumns = 8, kLanes = Lanes, kRowLanes = 32 / Lanes;
    static constexpr int kTileRows = 8 * kRowLanes, kTileColumns = 8 * Lanes;
    float sums[8][8];

    // Interleaved one by one, or by fours.
    static __device__ __forceinline__ int element(int i, int lane, int lanes) {
        return Transposed ? i / 4 * 4 * lanes + lane * 4 + i % 4 : i * lanes + lane;
    }
    static __device__ __forceinline__ int row(int i) {
        return element(i, static_cast<int>(threadIdx.x) % 32 / Lanes, kRowLanes);
    }
    static __device__ __forceinline__ int column(int j) {
        return element(j, static_cast<int>(threadIdx.x) % Lanes, Lanes);
    }
    __device__ __forceinline__ float& at(int i, int j) { return sums[i][j]; }

    // As of TensorSums.
    struct Reader {
        int a, b;
        __device__ __forceinline__ Reader(int a_row, int b_row)
            : a(hold((a_row + static_cast<int>(threadIdx.x) % 32 / Lanes) * kRowBytes)),
              b(hold((b_row + static_cast<int>(threadIdx.x) % Lanes) * kRowBytes)) {}
    };
    __device__ __forceinline__ void add(const unsigned char* stage, const Reader& at) {
        auto load = [&](int first, int lanes, int i, int k) {
            // Row / 2 % 4 of row first / kRowBytes + i·lanes, of which only the first is not known to the compiler.
            const int swizzle = (first / (2 * kRowBytes) % 4) ^ (i * lanes / 2 % 4);
            return *reinterpret_cast<const Vector<float, 4>*>(stage + first + i * lanes * kRowBytes +
                                                              (k ^ swizzle) * 16);
        };
        // Not all at once: the loads would all go first, and registers run out.
#pragma unroll 1
        for (int k = 0; k < kRowVectors; ++k) {
            Vector<float, 4> left[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) left[i] = load(at.a, kRowLanes, i, k);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const Vector<float, 4> right = load(at.b, Lanes, j, k);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
#pragma unroll
                    for (int i = 0; i < 8; ++i) sums[i][j] = fmaf(left[i].at[e], right.at[e], sums[i][j]);
                }
            }
        }
    }
    __device__ __forceinline__ void finish() {}

    template <int Depth, int A, int B>
    struct TransposedReader {
        int a, b;
        __device__ __forceinline__ TransposedReader(int a_first, int b_first)
            : a(hold((a_first + static_cast<int>(threadIdx.x) % 32 / Lanes * 4) * 4)),
              b(hold((Depth * A + b_first + static_cast<int>(threadIdx.x) % Lanes * 4) * 4)) {}
    };
    template <int Depth, int A, int B>
    __device__ __forceinline__ void add(const unsigned char* stage, const TransposedReader<Depth, A, B>& at) {
        // Rows of pixels are read along: no swizzle.
        auto load = [&](int from, int lanes, Vector<float, 4>(&to)[2]) {
            to[0] = *reinterpret_cast<const Vector<float, 4>*>(stage + from);
            to[1] = *reinterpret_cast<const Vector<float, 4>*>(stage + from + lanes * 16);
        };
#pragma unroll
        for (int k = 0; k < Depth; ++k) {
            Vector<float, 4> left[2], right[2];
            load(at.a + k * A * 4, kRowLanes, left);
            load(at.b + k * B * 4, Lanes, right);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    sums[i][j] = fmaf(left[i / 4].at[i % 4], right[j / 4].at[j % 4], sums[i][j]);
                }
            }
        }
    }
};

// ---- Correlation ----

// f(sum) for each of a thread's.
template <class Sums, class F>
__device__ __forceinline__ void for_each(Sums& sums, F f) {
#pragma unroll
    for (int j = 0; j < Sums::kColumns; ++j) {
#pragma unroll
        for (int i = 0; i < Sums::kRows; ++i) f(sums.at(i, j));
    }
}

// Mean of `count` rows of a column, and Σ (y − mean)², of the columns of a warp's sums: one value a thread and
// column, put together over the lanes that share it. To statistics[group][output].
template <class Sums>
__device__ __forceinline__ void store_statistics(Sums& sums, Vector<float, 2>* statistics, int count, int group,
                                                 int column, int outputs) {
    const float per_count = 1.0f / static_cast<float>(count);
#pragma unroll
    for (int j = 0; j < Sums::kColumns; ++j) {
        float sum = 0.0f, squares = 0.0f;
#pragma unroll
        for (int i = 0; i < Sums::kRows; ++i) sum += Sums::row(i) < count ? sums.at(i, j) : 0.0f;
#pragma unroll
        for (int lanes = Sums::kLanes; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(kFullWarp, sum, lanes);
        const float mean = sum * per_count;
#pragma unroll
        for (int i = 0; i < Sums::kRows; ++i) {
            const float off = Sums::row(i) < count ? sums.at(i, j) - mean : 0.0f;
            squares = fmaf(off, off, squares);
        }
#pragma unroll
        for (int lanes = Sums::kLanes; lanes < 32; lanes *= 2) {
            squares += __shfl_xor_sync(kFullWarp, squares, lanes);
        }
        const int o = column + Sums::column(j);
        if (count > 0 && o < outputs && static_cast<int>(threadIdx.x) % 32 < Sums::kLanes) {
            statistics[static_cast<size_t>(group) * outputs + o] = {{mean, squares}};
        }
    }
}

// A block's sums, each thread's at [sum][thread] of parts[blockIdx.x][piece], and those of all pieces in the last of
// them, which is told so.
template <int Threads, class Sums>
__device__ __forceinline__ bool add_pieces(Sums& sums, float* parts, unsigned* counters, int pieces) {
    constexpr int each = Sums::kRows * Sums::kColumns * Threads;
    volatile float* const tile = parts + static_cast<size_t>(blockIdx.x) * pieces * each + threadIdx.x;
    int at = static_cast<int>(blockIdx.y) * each;
    for_each(sums, [&](float& sum) {
        tile[at] = sum;
        at += Threads;
    });
    if (!is_last_block(counters + blockIdx.x, pieces)) return false;
    sums = {};
    at = 0;
#pragma unroll 1
    for (int piece = 0; piece < pieces; ++piece) {
        for_each(sums, [&](float& sum) {
            sum += tile[at];
            at += Threads;
        });
    }
    return true;
}

// Merges the statistics of Group warps, each of Rows rows, at parts[warp][column], and stores those of the groups:
// as `store_statistics`. count: rows of the tile that there are.
template <int Rows, int Group, int TileRows, int TileColumns>
__device__ __forceinline__ void merge_statistics(const Vector<float, 2>* parts, Vector<float, 2>* statistics, int count,
                                                 int first_row, int column, int outputs) {
    constexpr int threads = 32 * (TileRows / Rows);
#pragma unroll
    for (int i = threadIdx.x; i < TileRows / (Rows * Group) * TileColumns; i += threads) {
        const int group = i / TileColumns, o = column + i % TileColumns;
        float all[3] = {};
#pragma unroll
        for (int k = 0; k < Group; ++k) {
            const int warp = group * Group + k, rows = min(count - warp * Rows, Rows);
            if (rows <= 0) break;
            const Vector<float, 2> part = parts[warp * TileColumns + i % TileColumns];
            MergeStatistics{}(all, {static_cast<float>(rows), part.at[0], part.at[1]});
        }
        if (all[0] > 0.0f && o < outputs) {
            statistics[static_cast<size_t>(first_row / (Rows * Group) + group) * outputs + o] = {{all[1], all[2]}};
        }
    }
}

// Waits for all but the Pending newest groups of copies, of all threads, so that products can read them.
template <class Sums, int Pending>
__device__ __forceinline__ void arrive() {
    cp_async_wait<Pending>();
#if ECHOGRAD_WGMMA
    if constexpr (Sums::kPending > 0) async_proxy_fence();
#endif
    __syncthreads();
}

// A tile of RowWarps × ColumnWarps warps' sums of y = activation(x ∗ w + bias), bias and statistics where they are
// not null. See CONV below.
template <class T, class Sums, int RowWarps, int ColumnWarps>
__device__ __forceinline__ void correlate(const T* x, const T* w, const float* bias, T* y, void* statistics,
                                          const Correlation* phases, int phase_count, int column_tiles,
                                          int activation, float* parts, unsigned* counters, int pieces) {
    constexpr int n = kWidth<T>, depth = kRowBytes / sizeof(T), threads = 32 * RowWarps * ColumnWarps;
    constexpr int tile_rows = RowWarps * Sums::kTileRows, tile_columns = ColumnWarps * Sums::kTileColumns;
    constexpr int step = threads / kRowVectors;  // rows that are fetched at once
    constexpr int x_count = tile_rows / step, w_count = tile_columns / step;
    constexpr int stage_bytes = (tile_rows + tile_columns) * kRowBytes;
    static_assert(step % 8 == 0 && x_count * step == tile_rows && w_count * step == tile_columns, "whole rows");
    DYNAMIC_SHARED(unsigned char, shared);
    // Where in y a row of the tile goes, or −1.
    SHARED(int, places, tile_rows);

    const unsigned tile = blockIdx.x / column_tiles;
    const Correlation of = phases[tile % phase_count];
    const int first_row = static_cast<int>(tile / phase_count) * tile_rows;
    const int first_column = static_cast<int>(blockIdx.x % column_tiles) * tile_columns;
    if (first_row >= of.pixels) return;  // a phase with fewer pixels than others: the whole block

    for (int i = threadIdx.x; i < tile_rows; i += threads) {
        const int at = first_row + i;
        int place = -1;
        if (at < of.pixels) {
            if (of.flat != 0) {
                place = at * of.outputs;
            } else {
                const Pixel pixel(of, at);
                place = of.y_start + pixel.image * of.y_image + pixel.row * of.y_row + pixel.column * of.y_column;
            }
        }
        places[i] = place;
    }

    // The rows that this thread fetches: pixels and output channels, one vector of k of each.
    const int fetch_row = threadIdx.x / kRowVectors, vector = threadIdx.x % kRowVectors;
    int x_at[x_count], w_at[w_count];
    unsigned taps[x_count], w_exists = 0;  // of w, a bit each
#pragma unroll
    for (int i = 0; i < x_count; ++i) {
        const int at = first_row + fetch_row + i * step;
        x_at[i] = 0;
        taps[i] = 0;
        if (at < of.pixels) {
            if (of.flat != 0) {
                x_at[i] = at * of.channels;
                taps[i] = 0x10001u;
            } else {
                const Pixel pixel(of, at);
                const int row = pixel.row * of.stride[0] + of.origin[0];
                const int column = pixel.column * of.stride[1] + of.origin[1];
                x_at[i] = ((pixel.image * of.x_rows + row) * of.x_columns + column) * of.channels;
                taps[i] = inside(row, of.taps[0], of.x_rows) | inside(column, of.taps[1], of.x_columns) << 16;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < w_count; ++i) {
        const int o = first_column + fetch_row + i * step;
        // Addresses of what is not copied are multiples of 16 bytes too.
        w_at[i] = of.w_start + (o < of.outputs ? o * of.w_output : 0);
        w_exists |= static_cast<unsigned>(o < of.outputs) << i;
    }

    const int terms = of.taps[0] * of.taps[1] * of.channels;
    const int all = (terms + depth - 1) / depth, each = (all + pieces - 1) / pieces;
    const int begin = static_cast<int>(blockIdx.y) * each, steps = min(each, all - begin);
    int k = begin * depth + vector * n, row = 0, column = 0, channel = k;
    auto wrap = [&] {
        while (channel >= of.channels) {
            channel -= of.channels;
            if (++column == of.taps[1]) {
                column = 0;
                ++row;
            }
        }
    };
    wrap();
    const int fetched = hold(fetch_row * kRowBytes + (vector ^ (fetch_row / 2 % 4)) * 16);
    auto fetch = [&](int stage) {
        unsigned char* to = shared + stage * stage_bytes + fetched;
        const int x_tap = (row * of.x_columns + column) * of.channels + channel;
        const int w_tap = row * of.w_row + column * of.w_column + channel;
#pragma unroll
        for (int i = 0; i < x_count; ++i) {
            // Behind the last row of taps there is no bit.
            const unsigned valid = taps[i] >> row & taps[i] >> (16 + column) & 1u;
            // The next column of taps finds most of it in the first-level cache.
            cp_async<16, true>(to + i * step * kRowBytes, x + (x_at[i] + x_tap), static_cast<int>(valid * 16));
        }
        to += tile_rows * kRowBytes;
#pragma unroll
        for (int i = 0; i < w_count; ++i) {
            const bool valid = (w_exists >> i & 1u) != 0 && k < terms;
            cp_async<16>(to + i * step * kRowBytes, w + (w_at[i] + w_tap), valid ? 16 : 0);
        }
        k += depth;
        channel += depth;
        wrap();
    };

    const int warp = threadIdx.x / 32;
    const int warp_row = warp % RowWarps * Sums::kTileRows;
    const int warp_column = warp / RowWarps * Sums::kTileColumns;
    const typename Sums::Reader reader(warp_row, tile_rows + warp_column);
    Sums sums = {};
    constexpr int ahead = kStages - 1 - Sums::kPending;
#pragma unroll
    for (int stage = 0; stage < ahead; ++stage) {
        if (stage < steps) fetch(stage);
        cp_async_commit();
    }
    unsigned stage = 0;
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
        arrive<Sums, ahead - 1>();
        // Into the stage that all have left, and whose products are done.
        if (i + ahead < steps) fetch((stage + ahead) % kStages);
        cp_async_commit();
        sums.add(shared + stage * stage_bytes, reader);
        stage = (stage + 1) % kStages;
    }
    cp_async_wait<0>();
    sums.finish();
    __syncthreads();
    if (pieces > 1 && !add_pieces<threads>(sums, parts, counters, pieces)) return;

    if (bias != nullptr) {
#pragma unroll
        for (int j = 0; j < Sums::kColumns; ++j) {
            const int o = first_column + warp_column + Sums::column(j);
            const float b = o < of.outputs ? bias[o] : 0.0f;
#pragma unroll
            for (int i = 0; i < Sums::kRows; ++i) sums.at(i, j) += b;
        }
    }
    with_activation(activation, [&](auto a) { for_each(sums, [&](float& y) { y = a.apply(y); }); });
    if (statistics != nullptr) {
        const int first = first_row + warp_row, count = min(of.pixels - first, Sums::kTileRows);
        Vector<float, 2>* const to = static_cast<Vector<float, 2>*>(statistics);
        if constexpr (Sums::kGroup == 1) {
            store_statistics(sums, to, count, first / Sums::kTileRows, first_column + warp_column, of.outputs);
        } else {
            static_assert(ColumnWarps == 1 && RowWarps * tile_columns * 8 <= kStages * stage_bytes, "fits into the ring");
            Vector<float, 2>* const of_warps = reinterpret_cast<Vector<float, 2>*>(shared);
            store_statistics(sums, of_warps, count, warp, 0, tile_columns);
            __syncthreads();
            merge_statistics<Sums::kTileRows, Sums::kGroup, tile_rows, tile_columns>(
                of_warps, to, of.pixels - first_row, first_row, first_column, of.outputs);
            __syncthreads();
        }
    }

    constexpr int pitch = tile_columns + n;
    static_assert(tile_rows * pitch * sizeof(T) <= kStages * stage_bytes, "the tile fits into the ring");
    T* const staged = reinterpret_cast<T*>(shared);
#pragma unroll
    for (int i = 0; i < Sums::kRows; ++i) {
        T* const to = staged + (warp_row + Sums::row(i)) * pitch + warp_column;
        if constexpr (sizeof(T) == 2) {
#pragma unroll
            for (int j = 0; j < Sums::kColumns; j += 2) {
                *reinterpret_cast<unsigned*>(to + Sums::column(j)) = pack_bf16(sums.at(i, j), sums.at(i, j + 1));
            }
        } else {
#pragma unroll
            for (int j = 0; j < Sums::kColumns; ++j) to[Sums::column(j)] = sums.at(i, j);
        }
    }
    __syncthreads();
    if (of.outputs % n == 0) {
        constexpr int vectors = tile_columns / n;
#pragma unroll
        for (int i = threadIdx.x; i < tile_rows * vectors; i += threads) {
            const int at = i / vectors, o = i % vectors * n, place = places[at];
            if (place >= 0 && first_column + o < of.outputs) {
                *reinterpret_cast<Vector<unsigned, 4>*>(y + place + first_column + o) =
                    *reinterpret_cast<const Vector<unsigned, 4>*>(staged + at * pitch + o);
            }
        }
    } else {
#pragma unroll 1
        for (int i = threadIdx.x; i < tile_rows * tile_columns; i += threads) {
            const int at = i / tile_columns, o = i % tile_columns, place = places[at];
            if (place >= 0 && first_column + o < of.outputs) y[place + first_column + o] = staged[at * pitch + o];
        }
    }
}

// y from x and w, weights in T's storage; tiles of `rows` × `columns`. bias: f32 or null; activation: of epilogue.cuh.
// statistics: null, or of pixels i·R .. of each output channel its mean and Σ (y − mean)², a Vector<float, 2> at
// [i][output], R the rows of a warp, or with wgmma of a warpgroup. phases: the correlations that make up y,
// `phase_count` of them.
// Grid: (phase_count · ceil(most pixels / rows) · column_tiles, pieces) blocks of `threads`, column_tiles =
// ceil(outputs / columns); of several pieces, each takes a part of the stages of k, and the last block of a tile adds
// them up: parts holds rows · columns f32 for each block, counters a number for each tile, 0 before and after. Dynamic
// shared memory: kStages · (rows + columns) · kRowBytes. x and w on multiples of
// 16 bytes, and channels a multiple of kWidth; so for y if outputs is one. Kernels of at most 11×16 taps.
#define CONV(name, T, where, threads, blocks, ...)                                                           \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                            \
        name(const T* x, const T* w, const float* bias, T* y, void* statistics, const Correlation* phases,   \
             int phase_count, int column_tiles, int activation, float* parts, unsigned* counters,            \
             int pieces) {                                                                                   \
        where(correlate<T, __VA_ARGS__>(x, w, bias, y, statistics, phases, phase_count, column_tiles,        \
                                        activation, parts, counters, pieces);)                               \
    }
CONV(conv_128x64_f32, float, ANYWHERE, 128, 3, FloatSums<8>, 4, 1)
CONV(conv_128x32_f32, float, ANYWHERE, 64, 6, FloatSums<4>, 2, 1)
CONV(conv_128x128_bf16, bf16, TENSOR_CORES, 256, 2, TensorSums<4, 2>, 2, 4)
CONV(conv_128x64_bf16, bf16, TENSOR_CORES, 128, 3, TensorSums<4, 2>, 2, 2)
CONV(conv_128x32_bf16, bf16, TENSOR_CORES, 128, 4, TensorSums<2, 2>, 4, 1)
CONV(conv_64x64_bf16, bf16, TENSOR_CORES, 128, 4, TensorSums<2, 2>, 2, 2)
CONV(conv_wgmma_256x128_bf16, bf16, WARPGROUPS, 256, 1, WarpgroupSums<128>, 8, 1)
CONV(conv_wgmma_128x128_bf16, bf16, WARPGROUPS, 128, 2, WarpgroupSums<128>, 4, 1)
CONV(conv_wgmma_256x64_bf16, bf16, WARPGROUPS, 256, 2, WarpgroupSums<64>, 8, 1)

// ---- Weight gradient ----

// The part of dw that is due to the output pixels of piece blockIdx.y, as `of`, a convolution, has them.
template <class T, class Sums, int RowWarps, int ColumnWarps>
__device__ __forceinline__ void weight_gradient(const T* x, const T* dy, float* dw, const Correlation* problem,
                                                int column_tiles, int piece) {
    constexpr int n = kWidth<T>, depth = kRowBytes / sizeof(T), threads = 32 * RowWarps * ColumnWarps;
    constexpr int tile_rows = RowWarps * Sums::kTileRows, tile_columns = ColumnWarps * Sums::kTileColumns;
    using Y = Stage<T, depth, tile_rows>;
    using X = Stage<T, depth, tile_columns>;
    constexpr int y_vectors = tile_rows / n, x_vectors = tile_columns / n;
    constexpr int y_step = threads / y_vectors, x_step = threads / x_vectors;
    constexpr int stage_bytes = Y::kBytes + X::kBytes;
    static_assert(y_step > 0 && x_step > 0 && depth % y_step == 0 && depth % x_step == 0, "whole rows");
    DYNAMIC_SHARED(unsigned char, shared);
    const Correlation of = *problem;
    const int first_row = static_cast<int>(blockIdx.x / column_tiles) * tile_rows;
    const int first_column = static_cast<int>(blockIdx.x % column_tiles) * tile_columns;
    const int terms = of.taps[0] * of.taps[1] * of.channels;
    const int begin = static_cast<int>(blockIdx.y) * piece, end = min(begin + piece, of.pixels);

    // Each thread fetches one column of vectors of either operand.
    const int y_row = threadIdx.x / y_vectors, y_vector = threadIdx.x % y_vectors;
    const int x_row = threadIdx.x / x_vectors, x_vector = threadIdx.x % x_vectors;
    const int o = first_row + y_vector * n, k = first_column + x_vector * n;
    const bool has_output = o < of.outputs, has_term = k < terms;
    const int tap = k / of.channels, tap_row = tap / of.taps[1];
    const int top = of.origin[0] + tap_row, left = of.origin[1] + tap - tap_row * of.taps[1];
    const int channel = k - tap * of.channels;
    auto fetch = [&](int stage, int first) {
        unsigned char* to = shared + stage * stage_bytes;
#pragma unroll
        for (int i = 0; i < depth / y_step; ++i) {
            const int row = y_row + i * y_step, at = first + row;
            const bool valid = has_output && at < end;
            cp_async<16>(to + Y::at(row, y_vector), dy + (at * of.outputs + o),
                         valid ? 16 : 0);
        }
        to += Y::kBytes;
#pragma unroll
        for (int i = 0; i < depth / x_step; ++i) {
            const int row = x_row + i * x_step, at = first + row;
            bool valid = has_term && at < end;
            int from = at * of.channels + channel;
            if (of.flat == 0) {
                const Pixel pixel(of, at);
                const int y = pixel.row * of.stride[0] + top, z = pixel.column * of.stride[1] + left;
                valid = valid && static_cast<unsigned>(y) < static_cast<unsigned>(of.x_rows) &&
                        static_cast<unsigned>(z) < static_cast<unsigned>(of.x_columns);
                from = ((pixel.image * of.x_rows + y) * of.x_columns + z) * of.channels + channel;
            }
            cp_async<16>(to + X::at(row, x_vector), x + from, valid ? 16 : 0);
        }
    };

    const int warp = threadIdx.x / 32;
    const int warp_row = warp % RowWarps * Sums::kTileRows;
    const int warp_column = warp / RowWarps * Sums::kTileColumns;
    const typename Sums::template TransposedReader<depth, tile_rows, tile_columns> reader(warp_row, warp_column);
    Sums sums = {};
    constexpr int ahead = kStages - 1 - Sums::kPending;
    int next = begin;
#pragma unroll
    for (int stage = 0; stage < ahead; ++stage, next += depth) {
        if (next < end) fetch(stage, next);
        cp_async_commit();
    }
    unsigned stage = 0;
#pragma unroll 1
    for (int at = begin; at < end; at += depth, next += depth) {
        arrive<Sums, ahead - 1>();
        if (next < end) fetch((stage + ahead) % kStages, next);
        cp_async_commit();
        sums.add(shared + stage * stage_bytes, reader);
        stage = (stage + 1) % kStages;
    }
    sums.finish();

    float* const part = dw + static_cast<size_t>(blockIdx.y) * of.outputs * terms;
#pragma unroll
    for (int i = 0; i < Sums::kRows; ++i) {
        const int to_row = first_row + warp_row + Sums::row(i);
        float* const to = part + static_cast<size_t>(to_row) * terms;
#pragma unroll
        for (int j = 0; j < Sums::kColumns; j += 2) {
            const int to_column = first_column + warp_column + Sums::column(j);
            if (to_row < of.outputs && to_column < terms) {
                *reinterpret_cast<Vector<float, 2>*>(to + to_column) = {{sums.at(i, j), sums.at(i, j + 1)}};
            }
        }
    }
}

// Of each piece of output pixels its part of dw, at dw + piece·outputs·terms; conv_add_pieces adds them.
// Grid: (ceil(outputs / rows) · column_tiles, ceil(pixels / piece)) blocks, column_tiles = ceil(terms / columns),
// terms = taps · channels. Dynamic shared memory: kStages · (rows + columns) · kRowBytes. x and dy on
// multiples of 16 bytes, their channels multiples of kWidth.
#define WEIGHT_GRADIENT(name, T, where, threads, blocks, ...)                                               \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                           \
        name(const T* x, const T* dy, float* dw, const Correlation* problem, int column_tiles, int piece) { \
        where(weight_gradient<T, __VA_ARGS__>(x, dy, dw, problem, column_tiles, piece);)                    \
    }
WEIGHT_GRADIENT(conv_weight_gradient_64x64_f32, float, ANYWHERE, 64, 6, FloatSums<8, true>, 2, 1)
WEIGHT_GRADIENT(conv_weight_gradient_128x128_bf16, bf16, TENSOR_CORES, 256, 2, TensorSums<4, 2>, 2, 4)
WEIGHT_GRADIENT(conv_weight_gradient_64x64_bf16, bf16, TENSOR_CORES, 128, 4, TensorSums<2, 2>, 2, 2)
WEIGHT_GRADIENT(conv_wgmma_weight_gradient_128x256_bf16, bf16, WARPGROUPS, 256, 1, TransposedWarpgroupSums<128>, 4,
                2)

// ---- Copies with channels that fill vectors, and statistics ----

constexpr int kThreads = 256;

// Rows of `channels` as rows of `padded`, a multiple of kWidth, filled up with zeros; also from f32 to bf16.
// vectors: of `to`. Grid: ceil(vectors / kThreads) blocks of kThreads; `to` on a multiple of 16 bytes.
template <class From, class To>
__device__ __forceinline__ void pad(const From* from, To* to, size_t vectors, int channels, int padded) {
    constexpr int n = kWidth<To>;
    const size_t i = static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= vectors) return;
    const Division row = divide(i, padded / n);
    const int c = row.remainder * n;
    from += row.quotient * channels + c;
    float v[n];
#pragma unroll
    for (int k = 0; k < n; ++k) v[k] = c + k < channels ? to_float(from[k]) : 0.0f;
    store_vector(to + i * n, v);
}

extern "C" __global__ void __launch_bounds__(kThreads)
conv_pad_f32(const float* from, float* to, size_t vectors, int channels, int padded) {
    pad(from, to, vectors, channels, padded);
}
extern "C" __global__ void __launch_bounds__(kThreads)
conv_pad_bf16(const bf16* from, bf16* to, size_t vectors, int channels, int padded) {
    pad(from, to, vectors, channels, padded);
}

// A copy of f32 weights that lie as [rows][taps][columns], by tiles of kCopyRows × kCopyColumns of each tap: with rows of
// `padded` columns or, turned, as [columns][taps][padded rows].
struct WeightCopy {
    const float* from;
    void* to;
    // The number of its first block, and tiles.
    int first, row_tiles, column_tiles;
    int rows, taps, columns, padded, flags;
};
constexpr int kTurned = 1, kNarrow = 2;
constexpr int kCopyRows = 32, kCopyColumns = 128;

// Makes all copies of a table, ordered by their first blocks.
// Grid: row_tiles · column_tiles · taps blocks of kThreads for each copy. Any alignment.
extern "C" __global__ void __launch_bounds__(kThreads, 4)
copy_weights(const WeightCopy* copies, int count) {
    SHARED(float, tile, kCopyRows, kCopyColumns + 1);
    constexpr int each = kCopyRows * kCopyColumns / kThreads;
    int low = 0, high = count;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (copies[middle].first <= static_cast<int>(blockIdx.x)) {
            low = middle;
        } else {
            high = middle;
        }
    }
    const WeightCopy of = copies[low];
    const bool turned = (of.flags & kTurned) != 0;
    const Elements to{global_address(of.to), (of.flags & kNarrow) != 0};
    const int block = static_cast<int>(blockIdx.x) - of.first, tiles = block / of.column_tiles;
    const int column = (block - tiles * of.column_tiles) * kCopyColumns, row = tiles % of.row_tiles * kCopyRows;
    const size_t tap = tiles / of.row_tiles, taps = of.taps;
    const float* const from = global_address(of.from);
    constexpr int down = kThreads / kCopyColumns, across = kThreads / kCopyRows;
    const int own = threadIdx.x / kCopyColumns, r = row + own, c = column + static_cast<int>(threadIdx.x) % kCopyColumns;
    float v[each];
#pragma unroll
    for (int i = 0; i < each; ++i) {
        const bool exists = r + i * down < of.rows && c < of.columns;
        v[i] = exists ? from[((r + i * down) * taps + tap) * of.columns + c] : 0.0f;
    }
    if (!turned) {  // all threads alike
#pragma unroll
        for (int i = 0; i < each; ++i) {
            if (r + i * down < of.rows && c < of.padded) to.set(((r + i * down) * taps + tap) * of.padded + c, v[i]);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < each; ++i) tile[own + i * down][threadIdx.x % kCopyColumns] = v[i];
    __syncthreads();
    const int lane = threadIdx.x % kCopyRows, first = threadIdx.x / kCopyRows;
#pragma unroll
    for (int i = 0; i < each; ++i) {
        const int to_row = column + first + i * across;
        if (to_row < of.columns && row + lane < of.padded) {
            to.set((to_row * taps + tap) * of.padded + row + lane, tile[lane][first + i * across]);
        }
    }
}

// Mean and variance (over N, not N − 1) of each output channel, of the statistics of groups of `rows` pixels, as
// `correlate` writes them. The `pixels` come in parts of part_pixels, the last of which may have fewer, whose
// part_groups groups are full but for the last.
// A block adds Σ y and Σ y² of a chunk of `chunk` groups, in f64, in which their difference later is as good as what it
// comes from; eight warps take every eighth group of 32 outputs. Where there are more chunks, their sums go to
// sums[chunk][output][2], and the last block of the outputs adds them.
// Grid: (ceil(outputs / 32), chunks) blocks of kThreads. counters: one for each blockIdx.x, 0 before and after.
extern "C" __global__ void __launch_bounds__(kThreads)
conv_statistics(const void* statistics, double* sums, unsigned* counters, float* mean, float* variance, int groups,
                int outputs, int pixels, int rows, int part_groups, int part_pixels, int chunk) {
    constexpr int warps = kThreads / 32;
    SHARED(double, parts, warps, 32, 2);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, o = blockIdx.x * 32 + lane;
    const int begin = blockIdx.y * chunk, end = min(begin + chunk, groups), chunks = gridDim.y;
    const bool first = warp == 0 && o < outputs;
    double sum = 0.0, squares = 0.0;
    // Those of all warps, in the first.
    auto add_warps = [&] {
        parts[warp][lane][0] = sum;
        parts[warp][lane][1] = squares;
        __syncthreads();
        if (!first) return;
#pragma unroll
        for (int i = 1; i < warps; ++i) {
            sum += parts[i][lane][0];
            squares += parts[i][lane][1];
        }
    };
    if (o < outputs) {
#pragma unroll 4
        for (int group = begin + warp; group < end; group += warps) {
            const Vector<float, 2> v =
                static_cast<const Vector<float, 2>*>(statistics)[static_cast<size_t>(group) * outputs + o];
            const int part = group / part_groups;
            const int left = min(part_pixels, pixels - part * part_pixels) - (group - part * part_groups) * rows;
            const double m = v.at[0], total = m * min(rows, left);
            sum += total;
            squares += v.at[1] + total * m;
        }
    }
    add_warps();
    if (chunks > 1) {
        volatile double* const all = sums;
        if (first) {
            const size_t to = (static_cast<size_t>(blockIdx.y) * outputs + o) * 2;
            all[to] = sum;
            all[to + 1] = squares;
        }
        if (!is_last_block(counters + blockIdx.x, chunks)) return;
        sum = squares = 0.0;
        if (o < outputs) {
#pragma unroll 4
            for (int i = warp; i < chunks; i += warps) {
                const size_t from = (static_cast<size_t>(i) * outputs + o) * 2;
                sum += all[from];
                squares += all[from + 1];
            }
        }
        add_warps();
    }
    if (first) {
        const double m = sum / pixels, v = squares / pixels - m * m;
        mean[o] = static_cast<float>(m);
        variance[o] = static_cast<float>(v < 0.0 ? 0.0 : v);  // NaN stays, as it would not in fmax
    }
}
