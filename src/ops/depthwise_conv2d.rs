//! Depthwise convolution: every channel with a kernel of its own, on tensors `N×H×W×C` with weights
//! `C×kh×kw×1`.
//!
//! There is little arithmetic to an element, so the work is to read everything once. Lanes run over channels.
//! The convolution and its input gradient are one correlation, an output row to a task: away from the border a
//! few neighbouring pixels are computed together, so that what they share is loaded once; at the border taps
//! are left out one by one. The weight gradient sums over the pixels of a row in registers, over rows in the
//! element type, and over chunks of rows in `f64`.

mod device;

use std::ops::Range;

use rayon::prelude::*;

use super::activation::{Activation, Epilogue};
use super::conv2d::{expect, outputs};
use super::{Kernel, Op, norm, statistics};
use crate::device::cpu::Io;
use crate::device::gpu::launch::Launches;
use crate::device::simd::{self, Lanes, Level};
use crate::error::{Error, Result};
use crate::gradcheck::{Case, Sampler};
use crate::tape::Backward;
use crate::tensor::{Real, Shape};

/// Tasks that chunks of rows are made for; fixed, as the chunks decide how sums are rounded.
const TASKS: usize = 32;
/// Channels of a task of the weight gradient: a multiple of every vector.
const BLOCK: usize = 64;
/// Least output pixels of a task of the convolution, in whole rows: enough to pay for the sums of its statistics.
const ROW_PIXELS: usize = 64;
/// Output pixels that are computed together.
const PIXELS: usize = 4;

/// `y[n, i, j, c] = Σ x[n, i·sh + r − ph, j·sw + s − pw, c] · w[c, r, s]`, inputs `x` (N×H×W×C) and `w`
/// (C×kh×kw×1); rows before columns in both parameters.
///
/// With `statistics`, the mean and the biased variance of each channel of `y` over the batch follow, as those of
/// [`Conv2d`](super::conv2d::Conv2d) do.
///
/// Passes over memory: reads `x`, writes `y`. The gradients: reads `dy` and writes `dx`; reads `x` and `dy`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DepthwiseConv2d {
    /// How far the kernel moves from one output pixel to the next.
    pub stride: [usize; 2],
    /// Zeros around the image, on either side.
    pub padding: [usize; 2],
    /// Whether mean and variance are taken.
    pub statistics: bool,
}

impl DepthwiseConv2d {
    /// The same stride and padding along both axes.
    pub const fn new(stride: usize, padding: usize) -> Self {
        Self {
            stride: [stride; 2],
            padding: [padding; 2],
            statistics: false,
        }
    }

    /// The same convolution with statistics.
    pub const fn with_statistics(self) -> Self {
        Self {
            statistics: true,
            ..self
        }
    }

    fn geometry(&self, x: Shape, w: Shape) -> Result<Geometry> {
        Geometry::new(x, w, self.stride, self.padding)
    }

    /// The geometry of shapes that [`Op::outputs`] has accepted.
    fn accepted(&self, x: Shape, w: Shape) -> Geometry {
        self.geometry(x, w)
            .expect("the shape rule accepts only what has a geometry")
    }
}

/// The extents of a depthwise convolution. Rows come before columns in every pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    x: Shape,
    w: Shape,
    stride: [usize; 2],
    padding: [usize; 2],
}

impl Geometry {
    /// A convolution of `x` (N×H×W×C) with the weights `w` (C×kh×kw×1): the kernels move by `stride` over the
    /// image widened by `padding` zeros on every side.
    ///
    /// # Errors
    /// [`Error::Shape`] if the channels differ, an extent or stride is zero, or the kernel does not fit.
    pub fn new(x: Shape, w: Shape, stride: [usize; 2], padding: [usize; 2]) -> Result<Self> {
        let fail = |problem: String| Err(Error::shape("depthwise_conv2d", problem));
        if (w.n, w.c) != (x.c, 1) {
            return fail(format!(
                "expected weights {}×kh×kw×1 for input {x}, found {w}",
                x.c
            ));
        }
        if x.is_empty() || w.is_empty() {
            return fail(format!("nothing to do for input {x} and weights {w}"));
        }
        if stride.contains(&0) {
            return fail(format!("expected strides of at least 1, found {stride:?}"));
        }
        if w.h > x.h + 2 * padding[0] || w.w > x.w + 2 * padding[1] {
            return fail(format!(
                "kernel of weights {w} exceeds input {x} with padding {padding:?}"
            ));
        }
        Ok(Self {
            x,
            w,
            stride,
            padding,
        })
    }

    /// Extent of the output.
    pub fn output(&self) -> Shape {
        let count = |axis: usize, extent: usize, kernel: usize| {
            (extent + 2 * self.padding[axis] - kernel) / self.stride[axis] + 1
        };
        let (x, w) = (self.x, self.w);
        Shape::new(x.n, count(0, x.h, w.h), count(1, x.w, w.w), x.c)
    }

    /// Floating-point operations of the convolution, and of either gradient; a fused multiply-add counts two.
    pub fn flops(&self) -> u64 {
        2 * (self.output().len() * self.w.pixels()) as u64
    }

    /// Elements of scratch that [`forward`] and [`input_gradient`] need.
    pub fn scratch(&self) -> usize {
        self.w.len()
    }

    /// Elements of scratch that [`forward_with_statistics`] needs.
    pub fn statistics_scratch(&self) -> usize {
        self.scratch() + self.blocks() * statistics::len(self.x.c)
    }

    /// Output rows of a task of the convolution, which leaves the sums of its statistics.
    fn rows(&self) -> usize {
        ROW_PIXELS.div_ceil(self.output().w)
    }

    fn blocks(&self) -> usize {
        let y = self.output();
        (y.n * y.h).div_ceil(self.rows())
    }

    /// Elements of scratch that [`weight_gradient`] needs.
    pub fn weight_gradient_scratch(&self) -> usize {
        let [chunks, blocks] = self.cut();
        chunks * blocks * self.w.pixels() * BLOCK
    }

    /// Chunks of output rows and blocks of channels of the weight gradient.
    fn cut(&self) -> [usize; 2] {
        let (y, blocks) = (self.output(), self.x.c.div_ceil(BLOCK));
        [TASKS.div_ceil(blocks).min(y.n * y.h), blocks]
    }

    fn extent(&self, axis: usize) -> [usize; 3] {
        let (x, w, y) = (self.x, self.w, self.output());
        [[x.h, w.h, y.h], [x.w, w.w, y.w]][axis]
    }

    /// The convolution along an axis.
    fn axis(&self, axis: usize) -> Axis {
        let [from, taps, pixels] = self.extent(axis);
        Axis {
            from,
            pixels,
            stride: self.stride[axis],
            origin: -(self.padding[axis] as isize),
            taps,
            first: 0,
            step: 1,
            start: 0,
            spacing: 1,
        }
    }

    /// The input gradient at the pixels `i ≡ phase (mod stride)` of the input. They see only the taps
    /// `r ≡ i + padding (mod stride)`, at neighbouring output pixels and in descending order: a correlation of
    /// stride 1 of the output gradient with those taps turned round.
    fn phase(&self, axis: usize, phase: usize) -> Axis {
        let [to, kernel, from] = self.extent(axis);
        let (stride, shifted) = (self.stride[axis], phase + self.padding[axis]);
        let first = shifted % stride;
        let taps = kernel.saturating_sub(first).div_ceil(stride);
        Axis {
            from,
            pixels: to.saturating_sub(phase).div_ceil(stride),
            stride: 1,
            origin: (shifted / stride) as isize + 1 - taps as isize,
            taps,
            first: first + stride * taps.saturating_sub(1),
            step: -(stride as isize),
            start: phase,
            spacing: stride,
        }
    }
}

/// A correlation along one axis: pixel `i` sums over the taps `t` at `i·stride + origin + t` of what is read,
/// with the weights at `first + t·step`, and lies at `start + i·spacing` of what is written.
#[derive(Clone, Copy)]
struct Axis {
    /// Extent of what is read.
    from: usize,
    pixels: usize,
    stride: usize,
    origin: isize,
    taps: usize,
    first: usize,
    step: isize,
    start: usize,
    spacing: usize,
}

impl Axis {
    /// Position of tap 0 of a pixel.
    fn at(&self, pixel: usize) -> isize {
        (pixel * self.stride) as isize + self.origin
    }

    /// The taps of a pixel that lie inside of what is read.
    fn inside(&self, pixel: usize) -> Range<usize> {
        let (at, taps) = (self.at(pixel), self.taps as isize);
        let first = (-at).clamp(0, taps);
        let end = (self.from as isize - at).clamp(first, taps);
        first as usize..end as usize
    }

    /// The pixels whose taps `taps` all lie inside of what is read.
    fn covered(&self, taps: Range<usize>) -> Range<usize> {
        let stride = self.stride as isize;
        let first = -(self.origin + taps.start as isize);
        let first = if first > 0 {
            (first + stride - 1) / stride
        } else {
            0
        };
        let end = (self.from as isize - self.origin - taps.end as isize).div_euclid(stride) + 1;
        let end = end.clamp(0, self.pixels as isize);
        first.min(end) as usize..end as usize
    }
}

/// `y = x ∗ w`, each channel by itself.
///
/// # Panics
/// If a slice does not have the length its shape demands.
pub fn forward<T: Real>(
    level: Level,
    geometry: &Geometry,
    x: &[T],
    w: &[T],
    y: &mut [T],
    scratch: &mut [T],
) {
    correlate(level, geometry, x, w, None, y, scratch);
}

/// [`forward`] with an epilogue.
fn correlate<T: Real>(
    level: Level,
    geometry: &Geometry,
    x: &[T],
    w: &[T],
    epilogue: Option<Epilogue<'_, T>>,
    y: &mut [T],
    scratch: &mut [T],
) {
    check(geometry, x.len(), w.len(), y.len());
    let packed = pack(geometry, w, scratch);
    let len = geometry.rows() * geometry.output().w * geometry.x.c;
    y.par_chunks_mut(len)
        .enumerate()
        .for_each(|(block, y)| correlate_block(level, geometry, block, x, packed, epilogue, y));
}

/// As [`forward`], and the mean and biased variance of each channel of `y` over the batch.
///
/// # Panics
/// If a slice does not have the length its shape demands.
pub fn forward_with_statistics<T: Real>(
    level: Level,
    geometry: &Geometry,
    x: &[T],
    w: &[T],
    y: &mut [T],
    [mean, var]: [&mut [T]; 2],
    scratch: &mut [T],
) {
    check(geometry, x.len(), w.len(), y.len());
    let (sums, scratch) = scratch.split_at_mut(geometry.blocks() * statistics::len(geometry.x.c));
    let packed = pack(geometry, w, scratch);
    let (c, rows) = (geometry.x.c, y.len() / geometry.x.c);
    let pixels = geometry.rows() * geometry.output().w;
    y.par_chunks_mut(pixels * c)
        .zip(sums.par_chunks_mut(statistics::len(c)))
        .enumerate()
        .for_each(|(block, (y, sums))| {
            correlate_block(level, geometry, block, x, packed, None, y);
            let channels = c;
            simd::dispatch_at(level, statistics::Taken { y, channels, sums });
        });
    let pixels_of = |block| pixels.min(rows - block * pixels);
    statistics::finish(sums, geometry.blocks(), pixels_of, mean, var);
}

/// The convolution's output rows from `block · Geometry::rows` on.
fn correlate_block<T: Real>(
    level: Level,
    geometry: &Geometry,
    block: usize,
    x: &[T],
    packed: &[T],
    epilogue: Option<Epilogue<'_, T>>,
    y: &mut [T],
) {
    let (from, to) = (geometry.x, geometry.output());
    for (i, y) in y.chunks_exact_mut(to.w * to.c).enumerate() {
        let row = block * geometry.rows() + i;
        let row = Row {
            x: image(x, from, row / to.h),
            c: to.c,
            w: packed,
            kernel: geometry.w.w,
            rows: geometry.axis(0),
            row: row % to.h,
            columns: |_| geometry.axis(1),
            phases: 1,
            epilogue,
            y,
        };
        simd::dispatch_at(level, row);
    }
}

/// `dx[n, i·sh + r − ph, j·sw + s − pw, c] = Σ dy[n, i, j, c] · w[c, r, s]`.
///
/// # Panics
/// If a slice does not have the length its shape demands.
pub fn input_gradient<T: Real>(
    level: Level,
    geometry: &Geometry,
    w: &[T],
    dy: &[T],
    dx: &mut [T],
    scratch: &mut [T],
) {
    check(geometry, dx.len(), w.len(), dy.len());
    let packed = pack(geometry, w, scratch);
    let (from, to) = (geometry.output(), geometry.x);
    dx.par_chunks_mut(to.w * to.c)
        .enumerate()
        .for_each(|(row, dx)| {
            let (n, row) = (row / to.h, row % to.h);
            let stride = geometry.stride;
            let row = Row {
                x: image(dy, from, n),
                c: to.c,
                w: packed,
                kernel: geometry.w.w,
                rows: geometry.phase(0, row % stride[0]),
                row: row / stride[0],
                columns: |phase| geometry.phase(1, phase),
                phases: stride[1],
                epilogue: None,
                y: dx,
            };
            simd::dispatch_at(level, row);
        });
}

fn check(geometry: &Geometry, x: usize, w: usize, y: usize) {
    assert_eq!(x, geometry.x.len(), "input");
    assert_eq!(w, geometry.w.len(), "weights");
    assert_eq!(y, geometry.output().len(), "output");
}

/// One image of a batch.
fn image<T>(x: &[T], shape: Shape, n: usize) -> &[T] {
    let len = shape.pixels() * shape.c;
    &x[n * len..][..len]
}

/// The weights with their channels side by side, `kh×kw×C`.
fn pack<'a, T: Real>(geometry: &Geometry, w: &[T], scratch: &'a mut [T]) -> &'a [T] {
    let (c, taps) = (geometry.x.c, geometry.w.pixels());
    let packed = &mut scratch[..taps * c];
    packed
        .par_chunks_exact_mut(c)
        .enumerate()
        .for_each(|(tap, packed)| {
            let weights = w[tap..].iter().step_by(taps);
            packed.iter_mut().zip(weights).for_each(|(to, &w)| *to = w);
        });
    packed
}

/// One row of a correlation.
struct Row<'a, T, F> {
    /// The image that is read.
    x: &'a [T],
    c: usize,
    /// Weights, kh×kw×C, and kw.
    w: &'a [T],
    kernel: usize,
    rows: Axis,
    /// The pixel along `rows`.
    row: usize,
    /// The correlation along columns in each phase.
    columns: F,
    phases: usize,
    epilogue: Option<Epilogue<'a, T>>,
    y: &'a mut [T],
}

/// Distances between the operands of [`block`], in elements.
#[derive(Clone, Copy)]
struct Steps {
    x_row: usize,
    x_pixel: usize,
    w_row: isize,
    w_tap: isize,
    y_pixel: usize,
}

impl<T: Real, F: Fn(usize) -> Axis> simd::Kernel<T> for Row<'_, T, F> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(mut self) {
        for phase in 0..self.phases {
            let columns = (self.columns)(phase);
            let interior = columns.covered(0..columns.taps);
            match (columns.taps, columns.stride) {
                (1, 1) => self.interior::<L, 1, 1>(&columns, interior.clone()),
                (2, 1) => self.interior::<L, 2, 1>(&columns, interior.clone()),
                (3, 1) => self.interior::<L, 3, 1>(&columns, interior.clone()),
                (5, 1) => self.interior::<L, 5, 1>(&columns, interior.clone()),
                (3, 2) => self.interior::<L, 3, 2>(&columns, interior.clone()),
                (5, 2) => self.interior::<L, 5, 2>(&columns, interior.clone()),
                _ => interior
                    .clone()
                    .for_each(|pixel| self.pixel::<L>(&columns, pixel, 0)),
            }
            for pixel in (0..interior.start).chain(interior.end..columns.pixels) {
                self.pixel::<L>(&columns, pixel, 0);
            }
        }
        if let Some(epilogue) = &self.epilogue {
            let (c, pixels) = (self.c, self.y.len() / self.c);
            // SAFETY: the row of `y` holds so many pixels.
            unsafe { epilogue.finish::<L>(self.y.as_mut_ptr(), pixels, c, 0..c) };
        }
    }
}

impl<T: Real, F> Row<'_, T, F> {
    /// Pixels all of whose `K` taps along the row lie inside the image.
    #[inline(always)]
    fn interior<L: Lanes<Elem = T>, const K: usize, const S: usize>(
        &mut self,
        columns: &Axis,
        pixels: Range<usize>,
    ) {
        let together = pixels.len() / PIXELS * PIXELS;
        let (first, rest) = (pixels.start, pixels.start + together);
        for pixel in (first..rest).step_by(PIXELS) {
            self.pixels::<L, K, S, PIXELS>(columns, pixel);
        }
        for pixel in rest..pixels.end {
            self.pixels::<L, K, S, 1>(columns, pixel);
        }
    }

    /// `P` neighbouring pixels from `pixel` on.
    #[inline(always)]
    fn pixels<L: Lanes<Elem = T>, const K: usize, const S: usize, const P: usize>(
        &mut self,
        columns: &Axis,
        pixel: usize,
    ) {
        let (c, taps) = (self.c, self.rows.inside(self.row));
        if taps.is_empty() {
            // A row of padding alone, which has no place in the image.
            (pixel..pixel + P).for_each(|pixel| self.pixel::<L>(columns, pixel, 0));
            return;
        }
        let full = c - c % L::N;
        let steps = Steps {
            x_row: columns.from * c,
            x_pixel: c,
            w_row: self.rows.step * (self.kernel * c) as isize,
            w_tap: columns.step * c as isize,
            y_pixel: columns.spacing * c,
        };
        let x_row = (self.rows.at(self.row) + taps.start as isize) as usize;
        let x = (x_row * columns.from + columns.at(pixel) as usize) * c;
        let w_row = self.rows.first as isize + taps.start as isize * self.rows.step;
        let w = (w_row as usize * self.kernel + columns.first) * c;
        let y = (columns.start + pixel * columns.spacing) * c;
        for channel in (0..full).step_by(L::N) {
            // SAFETY: the rows of `taps` and, the pixels being interior, all columns of their taps lie in the
            // image, the weights' rows and columns in the kernel, the pixels in the row of `y`; and a vector from
            // `channel` on ends within the pixel.
            unsafe {
                block::<L, K, S, P>(
                    self.x.as_ptr().add(x + channel),
                    self.w.as_ptr().add(w + channel),
                    self.y.as_mut_ptr().add(y + channel),
                    taps.len(),
                    steps,
                );
            }
        }
        if full < c {
            (pixel..pixel + P).for_each(|pixel| self.pixel::<L>(columns, pixel, full));
        }
    }

    /// The channels from `first` on of any pixel.
    #[inline(always)]
    fn pixel<L: Lanes<Elem = T>>(&mut self, columns: &Axis, pixel: usize, first: usize) {
        let c = self.c;
        let (rows, taps) = (self.rows.inside(self.row), columns.inside(pixel));
        let weight =
            |axis: &Axis, tap: usize| (axis.first as isize + tap as isize * axis.step) as usize;
        let y = &mut self.y[(columns.start + pixel * columns.spacing) * c..][..c];
        for channel in (first..c).step_by(L::N) {
            let mut sum = L::zero();
            for r in rows.clone() {
                let x_row = (self.rows.at(self.row) + r as isize) as usize * columns.from;
                let w_row = weight(&self.rows, r) * self.kernel;
                for s in taps.clone() {
                    let x = (x_row + (columns.at(pixel) + s as isize) as usize) * c;
                    let w = (w_row + weight(columns, s)) * c;
                    let x = L::load_first(&self.x[x + channel..x + c]);
                    sum = x.mul_add(L::load_first(&self.w[w + channel..w + c]), sum);
                }
            }
            sum.store_first(&mut y[channel..]);
        }
    }
}

/// A vector of channels of `P` pixels, `rows` × `K` taps each, pixels `S` apart in what is read.
///
/// # Safety
/// `x` must be readable for a vector at every `row·x_row + i·x_pixel` for `i` up to `(P − 1)·S + K − 1`, `w` at
/// every `row·w_row + tap·w_tap`, and `y` writable at every `i·y_pixel`.
#[inline(always)]
unsafe fn block<L: Lanes, const K: usize, const S: usize, const P: usize>(
    mut x: *const L::Elem,
    mut w: *const L::Elem,
    y: *mut L::Elem,
    rows: usize,
    steps: Steps,
) {
    let mut sums = [L::zero(); P];
    // SAFETY: the caller's.
    unsafe {
        for _ in 0..rows {
            for tap in 0..K {
                let weight = L::load_ptr(w.offset(tap as isize * steps.w_tap));
                for (i, sum) in sums.iter_mut().enumerate() {
                    let x = L::load_ptr(x.add((i * S + tap) * steps.x_pixel));
                    *sum = x.mul_add(weight, *sum);
                }
            }
            x = x.wrapping_add(steps.x_row);
            w = w.wrapping_offset(steps.w_row);
        }
        for (i, sum) in sums.iter().enumerate() {
            sum.store_ptr(y.add(i * steps.y_pixel));
        }
    }
}

/// `dw[c, r, s] = Σ dy[n, i, j, c] · x[n, i·sh + r − ph, j·sw + s − pw, c]`.
///
/// # Panics
/// If a slice does not have the length its shape demands.
pub fn weight_gradient<T: Real>(
    level: Level,
    geometry: &Geometry,
    x: &[T],
    dy: &[T],
    dw: &mut [T],
    scratch: &mut [T],
) {
    check(geometry, x.len(), dw.len(), dy.len());
    let [chunks, blocks] = geometry.cut();
    let taps = geometry.w.pixels();
    let partial = &mut scratch[..chunks * blocks * taps * BLOCK];
    partial
        .par_chunks_exact_mut(taps * BLOCK)
        .enumerate()
        .for_each(|(task, sums)| {
            let task = Task {
                geometry,
                chunk: task / blocks,
                chunks,
                first: task % blocks * BLOCK,
                x,
                dy,
                sums,
            };
            simd::dispatch_at(level, task);
        });
    let partial = &*partial;
    dw.par_chunks_mut(taps * BLOCK)
        .enumerate()
        .for_each(|(block, dw)| {
            for (i, dw) in dw.iter_mut().enumerate() {
                let (channel, tap) = (i / taps, i % taps);
                let at = |chunk: usize| ((chunk * blocks + block) * taps + tap) * BLOCK + channel;
                *dw = T::of((0..chunks).map(|chunk| partial[at(chunk)].wide()).sum());
            }
        });
}

/// The weight gradient of a block of channels from `first` on, over one chunk of output rows.
struct Task<'a, T> {
    geometry: &'a Geometry,
    chunk: usize,
    chunks: usize,
    first: usize,
    x: &'a [T],
    dy: &'a [T],
    /// kh×kw×BLOCK.
    sums: &'a mut [T],
}

impl<T: Real> simd::Kernel<T> for Task<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let (x, w, y) = (self.geometry.x, self.geometry.w, self.geometry.output());
        let (rows, columns) = (self.geometry.axis(0), self.geometry.axis(1));
        self.sums.fill(T::zero());
        let total = y.n * y.h;
        for row in self.chunk * total / self.chunks..(self.chunk + 1) * total / self.chunks {
            let (n, i) = (row / y.h, row % y.h);
            let taps = rows.inside(i);
            if taps.is_empty() {
                continue;
            }
            let x_row = (rows.at(i) + taps.start as isize) as usize;
            let x = &image(self.x, x, n)[x_row * x.w * x.c..][..taps.len() * x.w * x.c];
            let mut row = WeightRow {
                columns,
                c: y.c,
                taps: taps.len(),
                x,
                dy: &self.dy[row * y.w * y.c..][..y.w * y.c],
                sums: &mut self.sums[taps.start * w.w * BLOCK..taps.end * w.w * BLOCK],
            };
            let end = y.c.min(self.first + BLOCK);
            for channel in (self.first..end).step_by(L::N) {
                row.add::<L>(channel, channel - self.first);
            }
        }
    }
}

/// What one output row adds to the weight gradient.
struct WeightRow<'a, T> {
    columns: Axis,
    c: usize,
    /// Kernel rows that lie inside the image.
    taps: usize,
    /// The rows of the input under them.
    x: &'a [T],
    dy: &'a [T],
    /// taps×kw×BLOCK.
    sums: &'a mut [T],
}

impl<T: Real> WeightRow<'_, T> {
    /// Adds the terms of the vector of channels from `channel` on to the sums from `slot` on.
    #[inline(always)]
    fn add<L: Lanes<Elem = T>>(&mut self, channel: usize, slot: usize) {
        let whole = 0..self.columns.pixels;
        let interior = self.columns.covered(0..self.columns.taps);
        let full = channel + L::N <= self.c && !interior.is_empty();
        match self.columns.taps {
            3 if full => self.interior::<L, 3, 3>(interior.clone(), channel, slot),
            5 if full => self.interior::<L, 5, 2>(interior.clone(), channel, slot),
            _ => return self.pixels::<L>(whole, channel, slot),
        }
        self.pixels::<L>(0..interior.start, channel, slot);
        self.pixels::<L>(interior.end..whole.end, channel, slot);
    }

    /// Pixels all of whose `K` taps along the row lie inside the image, `R` kernel rows at a time.
    #[inline(always)]
    fn interior<L: Lanes<Elem = T>, const K: usize, const R: usize>(
        &mut self,
        pixels: Range<usize>,
        channel: usize,
        slot: usize,
    ) {
        let (c, columns) = (self.c, &self.columns);
        let x_row = columns.from * c;
        let start = columns.at(pixels.start) as usize * c + channel;
        let mut row = 0;
        while row < self.taps {
            // SAFETY: the taps of interior pixels lie in the rows of `x`, the pixels in that of `dy`, and a
            // vector from `channel` on ends within the pixel, as one from `slot` on does within its block.
            unsafe {
                let x = self.x.as_ptr().add(row * x_row + start);
                let dy = self.dy.as_ptr().add(pixels.start * c + channel);
                let sums = self.sums.as_mut_ptr().add(row * K * BLOCK + slot);
                let steps = [x_row, columns.stride * c, c];
                if row + R <= self.taps {
                    products::<L, K, R>(x, dy, sums, pixels.len(), steps);
                    row += R;
                } else {
                    products::<L, K, 1>(x, dy, sums, pixels.len(), steps);
                    row += 1;
                }
            }
        }
    }

    /// Any pixels; taps that lie outside of the image are left out.
    #[inline(always)]
    fn pixels<L: Lanes<Elem = T>>(&mut self, pixels: Range<usize>, channel: usize, slot: usize) {
        let (c, columns) = (self.c, &self.columns);
        for tap in 0..self.taps * columns.taps {
            let (r, s) = (tap / columns.taps, tap % columns.taps);
            let covered = columns.covered(s..s + 1);
            let mut sum = L::zero();
            for pixel in covered.start.max(pixels.start)..covered.end.min(pixels.end) {
                let x = r * columns.from + (columns.at(pixel) + s as isize) as usize;
                let x = L::load_first(&self.x[x * c + channel..(x + 1) * c]);
                let dy = L::load_first(&self.dy[pixel * c + channel..(pixel + 1) * c]);
                sum = x.mul_add(dy, sum);
            }
            let sums = &mut self.sums[tap * BLOCK + slot..];
            (L::load(sums) + sum).store(sums);
        }
    }
}

/// Adds `Σ x·dy` over `pixels` pixels to `R` × `K` vectors of sums. `steps`: from one row of `x` to the next, and
/// from one pixel to the next in `x` and in `dy`. Taps are as far apart as the pixels of `dy`.
///
/// # Safety
/// `x` must be readable for a vector at every `row·steps[0] + pixel·steps[1] + tap·steps[2]`, `dy` at every
/// `pixel·steps[2]`, and `sums` readable and writable at every `(row·K + tap)·BLOCK`.
#[inline(always)]
unsafe fn products<L: Lanes, const K: usize, const R: usize>(
    mut x: *const L::Elem,
    mut dy: *const L::Elem,
    sums: *mut L::Elem,
    pixels: usize,
    steps: [usize; 3],
) {
    let mut products = [[L::zero(); K]; R];
    // SAFETY: the caller's.
    unsafe {
        for _ in 0..pixels {
            let vector = L::load_ptr(dy);
            for (r, products) in products.iter_mut().enumerate() {
                for (s, product) in products.iter_mut().enumerate() {
                    let x = L::load_ptr(x.add(r * steps[0] + s * steps[2]));
                    *product = x.mul_add(vector, *product);
                }
            }
            x = x.wrapping_add(steps[1]);
            dy = dy.wrapping_add(steps[2]);
        }
        for (i, &product) in products.as_flattened().iter().enumerate() {
            let sum = sums.add(i * BLOCK);
            (L::load_ptr(sum) + product).store_ptr(sum);
        }
    }
}

impl<T: Real> Kernel<T> for DepthwiseConv2d {
    fn run(&self, io: &mut Io<'_, T>) {
        let geometry = self.accepted(io.input_shape(0), io.input_shape(1));
        let (x, w) = (io.input(0), io.input(1));
        let (level, y, scratch) = (Level::current(), io.output(0), io.scratch());
        if self.statistics {
            let statistics = [io.output(1), io.output(2)];
            forward_with_statistics(level, &geometry, x, w, y, statistics, scratch);
        } else {
            forward(level, &geometry, x, w, y, scratch);
        }
    }
}

impl Op for DepthwiseConv2d {
    fn name(&self) -> &'static str {
        "depthwise_conv2d"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        let y = self.geometry(inputs[0], inputs[1])?.output();
        outputs(self.name(), y, self.statistics)
    }
    fn flops(&self, inputs: &[Shape], outputs: &[Shape]) -> u64 {
        let statistics = if self.statistics {
            statistics::FLOPS * outputs[0].len() as u64
        } else {
            0
        };
        self.accepted(inputs[0], inputs[1]).flops() + statistics
    }
    fn scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        let geometry = self.accepted(inputs[0], inputs[1]);
        if self.statistics {
            geometry.statistics_scratch()
        } else {
            geometry.scratch()
        }
    }
    fn device_scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        if !self.statistics {
            return 0;
        }
        device::statistics_scratch(&self.accepted(inputs[0], inputs[1]))
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let geometry = self.geometry(at.input_shape(0), at.input_shape(1))?;
        if self.statistics {
            device::forward_with_statistics(at, &geometry)
        } else {
            device::forward(at, &geometry, None)
        }
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        if self.statistics {
            norm::differentiable(self.name(), at)?;
        }
        let Some(dy) = at.gradient(0) else {
            return Ok(());
        };
        let (x, w) = (at.input(0), at.input(1));
        let geometry = self.geometry(at.shape(x), at.shape(w))?;
        // In this order `x`, which may have been computed again for this step alone, is gone when `dx` is written.
        if at.wants(1) {
            let dw = at.push(DepthwiseWeightGradient { geometry }, &[x, dy])?;
            at.set(1, dw)?;
        }
        if at.wants(0) {
            let dx = at.push(DepthwiseInputGradient { geometry }, &[dy, w])?;
            at.set(0, dx)?;
        }
        Ok(())
    }
}

/// `y = a(x ∗ w + b)`, inputs `x`, `w` as of [`DepthwiseConv2d`] and `b` (per channel), for inference: see
/// [`Conv2dBias`](super::conv2d::Conv2dBias). It has no gradient.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DepthwiseConv2dBias {
    /// The convolution.
    pub conv: DepthwiseConv2d,
    /// Applied to the result.
    pub activation: Activation,
}

impl<T: Real> Kernel<T> for DepthwiseConv2dBias {
    fn run(&self, io: &mut Io<'_, T>) {
        let geometry = self.conv.accepted(io.input_shape(0), io.input_shape(1));
        let (x, w) = (io.input(0), io.input(1));
        let epilogue = Epilogue {
            bias: io.input(2),
            activation: self.activation,
        };
        let (y, scratch) = (io.output(0), io.scratch());
        correlate(
            Level::current(),
            &geometry,
            x,
            w,
            Some(epilogue),
            y,
            scratch,
        );
    }
}

impl Op for DepthwiseConv2dBias {
    fn name(&self) -> &'static str {
        "depthwise_conv2d_bias"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        let y = self.conv.geometry(inputs[0], inputs[1])?.output();
        expect(self.name(), &inputs[2..], [Shape::per_channel(y.c)])?;
        Ok(vec![y])
    }
    fn flops(&self, inputs: &[Shape], outputs: &[Shape]) -> u64 {
        let each = 1 + self.activation.flops();
        self.conv.flops(inputs, outputs) + each * outputs[0].len() as u64
    }
    fn scratch(&self, inputs: &[Shape], outputs: &[Shape]) -> usize {
        self.conv.scratch(inputs, outputs)
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let geometry = (self.conv).geometry(at.input_shape(0), at.input_shape(1))?;
        let bias = (at.input(2), self.activation);
        device::forward(at, &geometry, Some(bias))
    }
}

/// The gradient of [`DepthwiseConv2d`] for `x`; inputs `dy`, `w`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DepthwiseInputGradient {
    /// Extents of the convolution.
    pub geometry: Geometry,
}

impl<T: Real> Kernel<T> for DepthwiseInputGradient {
    fn run(&self, io: &mut Io<'_, T>) {
        let (dy, w) = (io.input(0), io.input(1));
        let (dx, scratch) = (io.output(0), io.scratch());
        input_gradient(Level::current(), &self.geometry, w, dy, dx, scratch);
    }
}

impl Op for DepthwiseInputGradient {
    fn name(&self) -> &'static str {
        "depthwise_conv2d_input_gradient"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        let geometry = self.geometry;
        expect(self.name(), inputs, [geometry.output(), geometry.w])?;
        Ok(vec![geometry.x])
    }
    fn flops(&self, _: &[Shape], _: &[Shape]) -> u64 {
        self.geometry.flops()
    }
    fn scratch(&self, _: &[Shape], _: &[Shape]) -> usize {
        self.geometry.scratch()
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        device::input_gradient(at, &self.geometry)
    }
}

/// The gradient of [`DepthwiseConv2d`] for `w`; inputs `x`, `dy`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DepthwiseWeightGradient {
    /// Extents of the convolution.
    pub geometry: Geometry,
}

impl<T: Real> Kernel<T> for DepthwiseWeightGradient {
    fn run(&self, io: &mut Io<'_, T>) {
        let (x, dy) = (io.input(0), io.input(1));
        let (dw, scratch) = (io.output(0), io.scratch());
        weight_gradient(Level::current(), &self.geometry, x, dy, dw, scratch);
    }
}

impl Op for DepthwiseWeightGradient {
    fn name(&self) -> &'static str {
        "depthwise_conv2d_weight_gradient"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        let geometry = self.geometry;
        expect(self.name(), inputs, [geometry.x, geometry.output()])?;
        Ok(vec![geometry.w])
    }
    fn flops(&self, _: &[Shape], _: &[Shape]) -> u64 {
        self.geometry.flops()
    }
    fn scratch(&self, _: &[Shape], _: &[Shape]) -> usize {
        self.geometry.weight_gradient_scratch()
    }
    fn device_scratch(&self, _: &[Shape], _: &[Shape]) -> usize {
        device::weight_gradient_scratch(&self.geometry)
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        device::weight_gradient(at, &self.geometry)
    }
    fn narrow(&self, _: usize, _: &[bool]) -> bool {
        false
    }
}

pub(super) fn case(s: &mut Sampler) -> Case {
    let mut axis = || {
        let (kernel, stride) = (s.size(1, 6), s.size(1, 3));
        // Beyond the kernel there are rows and columns of padding alone.
        let padding = s.size(0, kernel + 1);
        // The smallest image that the kernel fits on, or a larger one.
        let extent = kernel.saturating_sub(2 * padding).max(1) + s.extent(0, 6);
        (kernel, stride, padding, extent)
    };
    let (kh, sh, ph, h) = axis();
    let (kw, sw, pw, w) = axis();
    let (n, c) = (s.size(1, 3), s.extent(1, 4));
    let op = DepthwiseConv2d {
        stride: [sh, sw],
        padding: [ph, pw],
        statistics: false,
    };
    let (x, w) = (Shape::new(n, h, w, c), Shape::new(c, kh, kw, 1));
    let description = format!("{x} ∗ {w}, {op:?}");
    Case::new(description, move |t, v| Ok(vec![t.push(op, v)?]))
        .with("x", x, s.values(x.len(), -1.0, 1.0))
        .narrow()
        .with("w", w, s.values(w.len(), -1.0, 1.0))
}

/// A depthwise convolution with statistics and the batch normalisation that takes them.
pub(super) fn norm_case(s: &mut Sampler) -> Case {
    let (kernel, stride) = (2 * s.size(1, 2) + 1, s.size(1, 2));
    let op = DepthwiseConv2d::new(stride, kernel / 2).with_statistics();
    // Of two values alone the gradient would now and then be the difference of almost equal numbers.
    let (n, c) = (s.size(2, 3), s.extent(1, 4));
    let x = Shape::new(n, s.extent(1, 6), s.extent(3, 6), c);
    norm::case_of_batch(s, op, x, Shape::new(c, kernel, kernel, 1))
}

/// A depthwise convolution with all that follows it in inference.
pub(super) fn inference_case(s: &mut Sampler) -> Case {
    let (kernel, stride) = (2 * s.size(0, 2) + 1, s.size(1, 2));
    let (n, c) = (s.size(1, 3), s.extent(1, 9));
    let x = Shape::new(n, s.extent(1, 6), s.extent(1, 6), c);
    let conv = DepthwiseConv2d::new(stride, kernel / 2);
    super::conv2d::inference_case(s, x, Shape::new(c, kernel, kernel, 1), |activation| {
        DepthwiseConv2dBias { conv, activation }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn geometry() -> impl Strategy<Value = Geometry> {
        let channels = prop_oneof![3 => 1..20usize, 1 => Just(16), 2 => 60..150usize];
        let axis = || (1..=6usize, 1..=3usize, 1..20usize);
        (1..=3usize, channels, axis(), axis()).prop_flat_map(|(n, c, v, h)| {
            (0..=v.0, 0..=h.0).prop_map(move |(ph, pw)| {
                let extent = |(kernel, _, extra): (usize, usize, usize), padding: usize| {
                    // From the smallest image that the kernel fits on.
                    kernel.saturating_sub(2 * padding).max(1) + extra - 1
                };
                let x = Shape::new(n, extent(v, ph), extent(h, pw), c);
                let w = Shape::new(c, v.0, h.0, 1);
                Geometry::new(x, w, [v.1, h.1], [ph, pw]).unwrap()
            })
        })
    }

    /// Calls `f` with the element numbers of every product in the definition: (x, w, y).
    fn for_each_product(g: &Geometry, mut f: impl FnMut(usize, usize, usize)) {
        let (x, w, y) = (g.x, g.w, g.output());
        let at =
            |s: Shape, n: usize, i: usize, j: usize, c: usize| ((n * s.h + i) * s.w + j) * s.c + c;
        for (pixel, tap) in (0..y.rows()).flat_map(|p| (0..w.pixels()).map(move |t| (p, t))) {
            let (n, i, j) = (pixel / y.pixels(), pixel / y.w % y.h, pixel % y.w);
            let (r, s) = (tap / w.w, tap % w.w);
            let row = (i * g.stride[0] + r).wrapping_sub(g.padding[0]);
            let column = (j * g.stride[1] + s).wrapping_sub(g.padding[1]);
            if row < x.h && column < x.w {
                for c in 0..x.c {
                    f(
                        at(x, n, row, column, c),
                        at(w, c, r, s, 0),
                        at(y, n, i, j, c),
                    );
                }
            }
        }
    }

    fn values<T: Real>(len: usize, seed: usize) -> Vec<T> {
        // Exact in f32, so that both element types see one problem.
        let value = |i: usize| (i + seed).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 48;
        (0..len)
            .map(|i| T::of(value(i) as f64 / 32768.0 - 1.0))
            .collect()
    }

    fn check_epilogue<T: Real>(g: &Geometry) -> std::result::Result<(), TestCaseError> {
        let (x, w) = (values::<T>(g.x.len(), 1), values::<T>(g.w.len(), 2));
        let bias = values::<T>(g.x.c, 4);
        for level in Level::available() {
            let fresh = |len: usize| vec![T::nan(); len];
            let run = |epilogue| {
                let (mut y, mut scratch) = (fresh(g.output().len()), fresh(g.scratch()));
                correlate(level, g, &x, &w, epilogue, &mut y, &mut scratch);
                y
            };
            let sums = run(None);
            for activation in [Activation::Identity, Activation::Relu, Activation::Silu] {
                let found = run(Some(Epilogue {
                    bias: &bias,
                    activation,
                }));
                for (i, (found, sum)) in found.iter().zip(&sums).enumerate() {
                    let u = sum.wide() + bias[i % g.x.c].wide();
                    let expected = match activation {
                        Activation::Identity => u,
                        Activation::Relu => u.max(0.0),
                        Activation::Silu => u / (1.0 + (-u).exp()),
                    };
                    let error = (found.wide() - expected).abs();
                    let tolerance = 8.0 * T::epsilon().wide() * (1.0 + sum.wide().abs());
                    prop_assert!(
                        error <= tolerance,
                        "{level:?}, {activation:?}, {i}: {found} for {expected}"
                    );
                }
            }
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn bias_and_activation_are_those_of_the_sums(g in geometry()) {
            check_epilogue::<f32>(&g)?;
            check_epilogue::<f64>(&g)?;
        }
    }

    /// Output, mean and variance.
    fn with_statistics<T: Real>(level: Level, g: &Geometry) -> [Vec<T>; 3] {
        let (x, w) = (values::<T>(g.x.len(), 1), values::<T>(g.w.len(), 2));
        let fresh = |len: usize| vec![T::nan(); len];
        let [mut y, mut mean, mut var] = [g.output().len(), g.x.c, g.x.c].map(fresh);
        let statistics = [&mut mean[..], &mut var[..]];
        let mut scratch = fresh(g.statistics_scratch());
        forward_with_statistics(level, g, &x, &w, &mut y, statistics, &mut scratch);
        [y, mean, var]
    }

    fn ours<T: Real>(level: Level, g: &Geometry) -> [Vec<T>; 3] {
        let (x, w) = (values::<T>(g.x.len(), 1), values::<T>(g.w.len(), 2));
        let dy = values::<T>(g.output().len(), 3);
        // Whatever is not written shows.
        let fresh = |len: usize| vec![T::nan(); len];
        let [mut y, mut dx, mut dw] = [dy.len(), x.len(), w.len()].map(fresh);
        forward(level, g, &x, &w, &mut y, &mut fresh(g.scratch()));
        let [same, mean, var] = with_statistics(level, g);
        assert!(same == y, "{g:?}: statistics change the output");
        statistics::tests::check(&y, [&mean, &var]).unwrap_or_else(|e| panic!("{g:?}: {e}"));
        input_gradient(level, g, &w, &dy, &mut dx, &mut fresh(g.scratch()));
        let mut scratch = fresh(g.weight_gradient_scratch());
        weight_gradient(level, g, &x, &dy, &mut dw, &mut scratch);
        [y, dx, dw]
    }

    fn check_against_definition<T: Real>(g: &Geometry) {
        let (x, w) = (values::<f64>(g.x.len(), 1), values::<f64>(g.w.len(), 2));
        let dy = values::<f64>(g.output().len(), 3);
        // Sums, and sums of the terms' magnitudes.
        let mut sums = [dy.len(), x.len(), w.len()].map(|len| vec![[0.0f64; 2]; len]);
        for_each_product(g, |ix, iw, iy| {
            let terms = [
                (iy, x[ix] * w[iw]),
                (ix, dy[iy] * w[iw]),
                (iw, dy[iy] * x[ix]),
            ];
            for (sums, (i, term)) in sums.iter_mut().zip(terms) {
                sums[i] = [sums[i][0] + term, sums[i][1] + term.abs()];
            }
        });
        let terms = [g.w.pixels(), g.w.pixels(), g.output().rows()];
        for level in Level::available() {
            for ((sums, got), terms) in sums.iter().zip(ours::<T>(level, g)).zip(terms) {
                // Rounding errors of either sum accumulate like a random walk.
                let steps = T::epsilon().wide() * (2.0 + (terms as f64).sqrt());
                for (i, (got, [sum, magnitude])) in got.iter().zip(sums).enumerate() {
                    assert!(
                        (got.wide() - sum).abs() <= steps * magnitude,
                        "{g:?} with {level:?}, element {i}: {got} for {sum}"
                    );
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn matches_the_definition_on_every_instruction_set(g in geometry()) {
            check_against_definition::<f32>(&g);
            check_against_definition::<f64>(&g);
        }
    }

    /// The layers of EfficientNet, on maps with room for pixels inside, at every border and stride.
    #[test]
    fn common_layers_match_the_definition() {
        for (kernel, stride) in [(3, 1), (3, 2), (5, 1), (5, 2)] {
            for (h, w, c) in [(19, 24, 96), (8, 8, 144), (7, 31, 33), (2, 3, 240)] {
                let (x, w) = (Shape::new(2, h, w, c), Shape::new(c, kernel, kernel, 1));
                let g = Geometry::new(x, w, [stride; 2], [kernel / 2; 2]).unwrap();
                check_against_definition::<f32>(&g);
                check_against_definition::<f64>(&g);
            }
        }
    }

    #[test]
    fn bits_do_not_depend_on_threads() {
        for (kernel, stride, c) in [(3, 1, 40), (5, 2, 130), (4, 3, 7)] {
            let (x, w) = (Shape::new(3, 29, 27, c), Shape::new(c, kernel, kernel, 1));
            let g = Geometry::new(x, w, [stride; 2], [kernel / 2; 2]).unwrap();
            let on = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
                let pool = pool.build().unwrap();
                let level = Level::current();
                pool.install(|| (ours::<f32>(level, &g), with_statistics::<f32>(level, &g)))
            };
            let one = on(1);
            for threads in [2, 3] {
                assert!(on(threads) == one, "{g:?} on {threads} threads");
            }
        }
    }

    #[test]
    fn impossible_geometries_are_refused() {
        let x = Shape::new(1, 4, 4, 3);
        let refused = |w: Shape, stride, padding| Geometry::new(x, w, stride, padding).is_err();
        assert!(refused(Shape::new(3, 3, 3, 3), [1, 1], [0, 0]));
        assert!(refused(Shape::new(2, 3, 3, 1), [1, 1], [0, 0]));
        assert!(refused(Shape::new(3, 5, 3, 1), [1, 1], [0, 0]));
        assert!(refused(Shape::new(3, 3, 3, 1), [0, 1], [0, 0]));
        assert!(refused(Shape::new(3, 0, 3, 1), [1, 1], [0, 0]));
        assert!(!refused(Shape::new(3, 5, 3, 1), [1, 1], [1, 0]));
    }
}
