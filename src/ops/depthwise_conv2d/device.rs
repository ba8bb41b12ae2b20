//! What GPUs launch for a depthwise convolution and its gradients: `kernels/depthwise.cu`.

use super::Geometry;
use crate::device::gpu::launch::{Full, Grid, Launches, Pointer, Stored, kernel};
use crate::error::{Error, Result};
use crate::ops::activation::Activation;
use crate::ops::norm::Partials;
use crate::ops::pointwise::{extent, width};

/// Threads of a block, and elements of a block that adds up pieces of the weight gradient, of so many threads.
const THREADS: usize = 256;
const FINISH_ELEMENTS: usize = 32;
const FINISH_THREADS: u32 = 512;
/// Most vectors of a block along channels, and channels of a block of the simple kernels.
const ACROSS: usize = 8;
const CHANNELS: usize = 32;
/// Blocks that are enough for any GPU: beyond, threads get more to do. Of the weight gradient, whose blocks all
/// leave sums, fewer.
const BLOCKS: usize = 1024;
const WEIGHT_BLOCKS: usize = 512;
/// Most rows of a thread of the fast kernels, and fewest pixels of one of the simple ones.
const ROWS: usize = 8;
const PIXELS: usize = 8;

/// Channels of blocks side by side: how many vectors of one, and how many blocks.
fn strips(vectors: usize, most: usize) -> (usize, usize) {
    let strips = vectors.div_ceil(most);
    (vectors.div_ceil(strips), strips)
}

/// How a fast kernel is launched.
#[derive(Clone, Copy, Debug)]
struct Fast {
    /// Extent of the kernel, and stride, along both axes.
    kernel: usize,
    stride: usize,
    across: usize,
    strips: usize,
    /// Blocks of each strip, and what each of them takes: rows of a thread, or lines of the output.
    pieces: usize,
    deep: usize,
}

impl Fast {
    /// The kernel and stride, and the strips; nothing where there is no fast kernel.
    fn of(geometry: &Geometry, narrow: bool) -> Option<Self> {
        let (w, n) = (geometry.w, width(narrow));
        let (kernel, stride) = (w.h, geometry.stride[0]);
        let fits = [3, 5].contains(&kernel)
            && w.w == kernel
            && [1, 2].contains(&stride)
            && geometry.stride[1] == stride
            && geometry.padding == [kernel / 2; 2]
            && w.n.is_multiple_of(n);
        let (across, strips) = strips(w.n.div_ceil(n), ACROSS);
        fits.then_some(Self {
            kernel,
            stride,
            across,
            strips,
            pieces: 0,
            deep: 1,
        })
    }

    /// Over `images` of `rows` × `columns` pixels, of which a thread computes several of a row.
    fn over(self, images: usize, rows: usize, columns: usize, pixels: usize) -> Self {
        let groups = THREADS / self.across;
        let pieces = |deep: usize| {
            (images * rows.div_ceil(deep) * columns.div_ceil(pixels)).div_ceil(groups)
        };
        let deep = (pieces(1) * self.strips / BLOCKS).clamp(1, ROWS);
        Self {
            pieces: pieces(deep),
            deep,
            ..self
        }
    }

    fn forward(geometry: &Geometry, narrow: bool) -> Option<Self> {
        let (fast, y) = (Self::of(geometry, narrow)?, geometry.output());
        // `kPixels` of depthwise.cu.
        let pixels = if narrow && fast.stride == 2 { 2 } else { 4 };
        Some(fast.over(y.n, y.h, y.w, pixels))
    }

    fn input_gradient(geometry: &Geometry, narrow: bool) -> Option<Self> {
        let (fast, x) = (Self::of(geometry, narrow)?, geometry.x);
        Some(fast.over(x.n, x.h, x.w, 4))
    }

    fn weight_gradient(geometry: &Geometry, narrow: bool) -> Option<Self> {
        let (fast, y) = (Self::of(geometry, narrow)?, geometry.output());
        let (lines, groups) = (y.n * y.h, THREADS / (fast.across * fast.kernel));
        let deep = (lines * fast.strips).div_ceil(WEIGHT_BLOCKS);
        let deep = deep.max(1).next_multiple_of(groups);
        Some(Self {
            pieces: lines.div_ceil(deep),
            deep,
            ..fast
        })
    }

    fn grid(&self) -> Grid {
        Grid::new(self.pieces * self.strips, THREADS as u32)
    }
}

/// How a simple kernel is launched.
#[derive(Clone, Copy, Debug)]
struct Simple {
    across: usize,
    strips: usize,
    pieces: usize,
    /// Pixels of a piece.
    pixels: usize,
}

impl Simple {
    fn over(channels: usize, pixels: usize, blocks: usize) -> Self {
        let (across, strips) = strips(channels, CHANNELS);
        let piece = (pixels * strips)
            .div_ceil(blocks)
            .max(PIXELS * (THREADS / across));
        Self {
            across,
            strips,
            pieces: pixels.div_ceil(piece),
            pixels: piece,
        }
    }

    fn forward(geometry: &Geometry) -> Self {
        Self::over(geometry.x.c, geometry.output().rows(), BLOCKS)
    }

    fn weight_gradient(geometry: &Geometry) -> Self {
        Self::over(geometry.x.c, geometry.output().rows(), WEIGHT_BLOCKS)
    }
}

/// The extents that all kernels are told.
#[derive(Clone, Copy)]
struct Extents {
    images: i32,
    height: i32,
    width: i32,
    rows: i32,
    columns: i32,
    channels: u32,
}

impl Extents {
    fn of(at: &Launches<'_>, geometry: &Geometry) -> Result<Self> {
        let (x, y) = (geometry.x, geometry.output());
        // Lines and pixels of rows are counted in `int`.
        at.int((x.n * x.h).max(y.n * y.h))?;
        Ok(Self {
            images: at.int(x.n)?,
            height: at.int(x.h)?,
            width: at.int(x.w)?,
            rows: at.int(y.h)?,
            columns: at.int(y.w)?,
            channels: extent("depthwise", x.c)?,
        })
    }
}

/// Launches the kernel of a [`Fast`]'s kernel and stride, which takes the given arguments and then the extents and
/// how they are cut.
macro_rules! launch_fast {
    ($at:expr, $geometry:expr, $fast:expr,
     [$($kernel:literal, $stride:literal: $name:literal),*] $fields:tt) => {{
        let (at, fast): (&mut Launches<'_>, &Fast) = ($at, $fast);
        let extents = Extents::of(at, $geometry)?;
        match (fast.kernel, fast.stride) {
            $(($kernel, $stride) => launch_fast!(at, extents, fast, $name $fields),)*
            _ => Err(Error::NoKernel { op: "depthwise_conv2d" }),
        }
    }};
    ($at:expr, $extents:expr, $fast:expr,
     $name:literal { $($field:ident: $type:ty = $value:expr),* $(,)? }) => {{
        kernel! {
            struct Shaped = $name {
                $($field: $type,)*
                images: i32, height: i32, width: i32, rows: i32, columns: i32, channels: u32,
                across: u32, strips: u32, deep: i32,
            }
        }
        let Extents { images, height, width, rows, columns, channels } = $extents;
        let arguments = Shaped {
            $($field: $value.into(),)*
            images, height, width, rows, columns, channels,
            across: extent($name, $fast.across)?,
            strips: extent($name, $fast.strips)?,
            deep: $at.int($fast.deep)?,
        };
        $at.launch($fast.grid(), &arguments)
    }};
}

/// Launches a simple kernel, which takes the given arguments and then the extents, the kernel's and how they are
/// cut.
macro_rules! launch_simple {
    ($at:expr, $geometry:expr, $simple:expr, $grid:expr,
     $name:literal { $($field:ident: $type:ty = $value:expr),* $(,)? }) => {{
        let (at, geometry): (&mut Launches<'_>, &Geometry) = ($at, $geometry);
        kernel! {
            struct Shaped = $name {
                $($field: $type,)*
                images: i32, height: i32, width: i32, rows: i32, columns: i32, channels: u32,
                kernel_height: i32, kernel_width: i32, down: i32, right: i32, top: i32, left: i32,
                across: u32, strips: u32, pixels: u32,
            }
        }
        let Extents { images, height, width, rows, columns, channels } = Extents::of(at, geometry)?;
        let arguments = Shaped {
            $($field: $value.into(),)*
            images, height, width, rows, columns, channels,
            kernel_height: at.int(geometry.w.h)?,
            kernel_width: at.int(geometry.w.w)?,
            down: at.int(geometry.stride[0])?,
            right: at.int(geometry.stride[1])?,
            top: at.int(geometry.padding[0])?,
            left: at.int(geometry.padding[1])?,
            across: extent($name, $simple.across)?,
            strips: extent($name, $simple.strips)?,
            pixels: extent($name, $simple.pixels)?,
        };
        at.launch($grid, &arguments)
    }};
}

impl Simple {
    fn grid(&self) -> Grid {
        Grid::new(self.pieces * self.strips, THREADS as u32)
    }
}

fn aligned(pointers: &[Pointer]) -> bool {
    pointers.iter().all(|p| p.is_aligned(16))
}

/// Launches `y = x ∗ w`, or `y = a(x ∗ w + b)` with a bias.
pub(super) fn forward(
    at: &mut Launches<'_>,
    geometry: &Geometry,
    bias: Option<(Pointer, Activation)>,
) -> Result<()> {
    let (bias, activation) = bias.unwrap_or((Pointer::NULL, Activation::Identity));
    let pointers = [at.input(0), at.input(1), at.output(0), bias];
    correlate(at, geometry, pointers, activation, false)
}

/// Launches `y = a(x ∗ w + b)`, without `b` where that is null; `turned` if weights are to be turned round, which
/// only the fast kernels do.
fn correlate(
    at: &mut Launches<'_>,
    geometry: &Geometry,
    [x, w, y, bias]: [Pointer; 4],
    activation: Activation,
    turned: bool,
) -> Result<()> {
    let activation = activation.number();
    match Fast::forward(geometry, x.is_narrow()).filter(|_| aligned(&[x, y, bias])) {
        Some(fast) => launch_fast!(at, geometry, &fast,
            [3, 1: "depthwise_k3_s1", 3, 2: "depthwise_k3_s2",
             5, 1: "depthwise_k5_s1", 5, 2: "depthwise_k5_s2"] {
            x: Stored = x, weights: Full = w, bias: Full = bias, y: Stored = y, flip: i32 = turned,
            activation: i32 = activation,
        }),
        None => {
            let simple = Simple::forward(geometry);
            launch_simple!(at, geometry, simple, simple.grid(), "depthwise_simple" {
                x: Stored = x, weights: Full = w, bias: Full = bias, y: Stored = y,
                partials: Full = Pointer::NULL, counts: Full = Pointer::NULL,
                activation: i32 = activation,
            })
        }
    }
}

/// Bytes of the values that each piece counts, before those of its channels.
fn counts(pieces: usize) -> usize {
    (size_of::<f32>() * pieces).next_multiple_of(16)
}

/// Bytes of working memory of [`forward_with_statistics`].
pub(super) fn statistics_scratch(geometry: &Geometry) -> usize {
    let fast = [false, true].map(|narrow| Fast::forward(geometry, narrow).map_or(0, |f| f.pieces));
    let pieces = fast[0].max(fast[1]).max(Simple::forward(geometry).pieces);
    counts(pieces) + 2 * size_of::<f32>() * pieces * geometry.x.c
}

/// Launches `y = x ∗ w`, and its mean and variance to outputs 1 and 2.
pub(super) fn forward_with_statistics(at: &mut Launches<'_>, geometry: &Geometry) -> Result<()> {
    let (x, w, y) = (at.input(0), at.input(1), at.output(0));
    let fast = Fast::forward(geometry, x.is_narrow()).filter(|_| aligned(&[x, y]));
    let simple = Simple::forward(geometry);
    let pieces = fast.map_or(simple.pieces, |fast| fast.pieces);
    let (counted, partials) = (at.scratch(), at.scratch().after(counts(pieces)));
    match fast {
        Some(fast) => launch_fast!(at, geometry, &fast,
            [3, 1: "depthwise_statistics_k3_s1", 3, 2: "depthwise_statistics_k3_s2",
             5, 1: "depthwise_statistics_k5_s1", 5, 2: "depthwise_statistics_k5_s2"] {
            x: Stored = x, weights: Full = w, y: Stored = y, partials: Full = partials,
            counts: Full = counted,
        }),
        None => launch_simple!(at, geometry, simple, simple.grid(), "depthwise_simple" {
            x: Stored = x, weights: Full = w, bias: Full = Pointer::NULL, y: Stored = y,
            partials: Full = partials, counts: Full = counted, activation: i32 = 0,
        }),
    }?;
    let statistics = [at.output(1), at.output(2)];
    Partials {
        partials,
        counts: counted,
        rows: geometry.output().rows(),
        rows_of_piece: 0,
        channels: geometry.x.c,
        width: 1,
        pieces,
    }
    .finish(at, 1, statistics)
}

/// Launches the gradient for `x`.
pub(super) fn input_gradient(at: &mut Launches<'_>, geometry: &Geometry) -> Result<()> {
    let (dy, w, dx) = (at.input(0), at.input(1), at.output(0));
    match Fast::input_gradient(geometry, dy.is_narrow()).filter(|_| aligned(&[dy, dx])) {
        Some(fast) if fast.stride == 1 => {
            let pointers = [dy, w, dx, Pointer::NULL];
            correlate(at, geometry, pointers, Activation::Identity, true)
        }
        Some(fast) => launch_fast!(at, geometry, &fast,
            [3, 2: "depthwise_input_gradient_k3_s2", 5, 2: "depthwise_input_gradient_k5_s2"] {
            dy: Stored = dy, weights: Full = w, dx: Stored = dx,
        }),
        None => {
            let simple = Simple::over(geometry.x.c, geometry.x.rows(), BLOCKS);
            launch_simple!(at, geometry, simple, simple.grid(), "depthwise_input_gradient_simple" {
                dy: Stored = dy, weights: Full = w, dx: Stored = dx,
            })
        }
    }
}

/// Bytes of working memory of [`weight_gradient`].
pub(super) fn weight_gradient_scratch(geometry: &Geometry) -> usize {
    let fast = [false, true].map(|n| Fast::weight_gradient(geometry, n).map_or(0, |f| f.pieces));
    let simple = Simple::weight_gradient(geometry).pieces;
    size_of::<f32>() * geometry.w.len() * fast[0].max(fast[1]).max(simple)
}

kernel! {
    struct WeightGradientFinish = "depthwise_weight_gradient_finish" {
        partials: Full, dw: Full, taps: u32, channels: u32, pieces: u32
    }
}

/// Launches the gradient for `w`.
pub(super) fn weight_gradient(at: &mut Launches<'_>, geometry: &Geometry) -> Result<()> {
    let (x, dy, partials) = (at.input(0), at.input(1), at.scratch());
    let fast = Fast::weight_gradient(geometry, x.is_narrow())
        .filter(|_| aligned(&[x, dy]) && x.is_narrow() == dy.is_narrow());
    let simple = Simple::weight_gradient(geometry);
    match fast {
        Some(fast) => launch_fast!(at, geometry, &fast,
            [3, 1: "depthwise_weight_gradient_k3_s1", 3, 2: "depthwise_weight_gradient_k3_s2",
             5, 1: "depthwise_weight_gradient_k5_s1", 5, 2: "depthwise_weight_gradient_k5_s2"] {
            x: Stored = x, dy: Stored = dy, partials: Full = partials,
        }),
        None => {
            let blocks = simple.pieces * simple.strips * geometry.w.pixels();
            let grid = Grid::new(blocks, THREADS as u32);
            launch_simple!(at, geometry, simple, grid, "depthwise_weight_gradient_simple" {
                x: Stored = x, dy: u64 = dy.address(), dy_narrow: i32 = dy.is_narrow(),
                partials: Full = partials,
            })
        }
    }?;
    let pieces = fast.map_or(simple.pieces, |fast| fast.pieces);
    let arguments = WeightGradientFinish {
        partials: partials.into(),
        dw: at.output(0).into(),
        taps: extent("depthwise", geometry.w.pixels())?,
        channels: extent("depthwise", geometry.x.c)?,
        pieces: extent("depthwise", pieces)?,
    };
    let blocks = geometry.w.len().div_ceil(FINISH_ELEMENTS);
    at.launch(Grid::new(blocks, FINISH_THREADS), &arguments)
}
