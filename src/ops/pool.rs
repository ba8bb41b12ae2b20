//! Pooling: maximum and average over windows, and the average over whole images.

mod device;

use std::ops::Range;
use std::sync::Arc;

use rand::seq::SliceRandom;
use rayon::prelude::*;

use super::pointwise::{Add, Scale, THREADS, Walk, extent, grid};
use super::rows::{Identity, Lanewise, Rows};
use super::{Kernel, Op};
use crate::device::cpu::Io;
use crate::device::gpu::launch::{Full, Grid, Launches, Pointer, Stored, kernel};
use crate::device::simd::{self, Lanes};
use crate::error::{Error, Result};
use crate::gradcheck::{Case, Sampler};
use crate::tape::{Backward, Var};
use crate::tensor::{Real, Shape};

/// Rows of the input whose gradient is one piece of parallel work, where windows overlap.
const BAND: usize = 8;

/// Windows over an H×W image, each size given as `[rows, columns]`. Those that would reach beyond the padding
/// are left out (PyTorch's floor mode).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Windows {
    kernel: [usize; 2],
    stride: [usize; 2],
    padding: [usize; 2],
}

impl Windows {
    /// 2×2 windows that tile the image, but for the last row or column of odd sizes.
    const HALVES: Self = Self {
        kernel: [2, 2],
        stride: [2, 2],
        padding: [0, 0],
    };

    /// Shape of the pooled map.
    fn output(&self, op: &'static str, x: Shape) -> Result<Shape> {
        let (kernel, padding) = (self.kernel, self.padding);
        let count = |size: usize, axis: usize| {
            let inside = (size + 2 * padding[axis]).checked_sub(kernel[axis])?;
            let valid =
                kernel[axis] > 0 && self.stride[axis] > 0 && padding[axis] <= kernel[axis] / 2;
            valid.then(|| inside / self.stride[axis] + 1)
        };
        match (count(x.h, 0), count(x.w, 1)) {
            (Some(h), Some(w)) => Ok(Shape::new(x.n, h, w, x.c)),
            _ => Err(Error::shape(
                op,
                format!(
                    "expected padding ≤ kernel/2, stride ≥ 1 and kernel ≤ padded size, found {self:?} on {x}"
                ),
            )),
        }
    }

    /// The part of window `o` that lies inside the image: positions along `axis`, of `size`.
    fn inside(&self, axis: usize, o: usize, size: usize) -> Range<usize> {
        let (start, padding) = (o * self.stride[axis], self.padding[axis]);
        start.saturating_sub(padding)..(start + self.kernel[axis] - padding).min(size)
    }

    /// The windows, of `count` along `axis`, that overlap with the given positions.
    fn covering(&self, axis: usize, positions: Range<usize>, count: usize) -> Range<usize> {
        let (stride, padding) = (self.stride[axis], self.padding[axis]);
        let first = (positions.start + padding + 1)
            .saturating_sub(self.kernel[axis])
            .div_ceil(stride);
        let end = (positions.end + padding).div_ceil(stride);
        first..end.min(count)
    }
}

/// The larger of two; NaN if either is.
#[inline(always)]
fn larger<L: Lanes>(a: L, b: L) -> L {
    let infinity = L::splat(num_traits::Float::infinity());
    // The sum is reached with `a` infinite or NaN: infinite if both are, else NaN.
    L::select(b.lt(a), a, L::select(a.lt(infinity), b, a + b))
}

/// Maximum over windows; padding never wins. NaN in a window gives NaN. Input `x` (N×H×W×C), output
/// N×H′×W′×C with `H′ = ⌊(H + 2·padding − kernel)/stride⌋ + 1`.
///
/// The gradient goes to the first element, in scan order, that equals the maximum, as in PyTorch. It is found
/// again from `x`, so no indices are kept.
///
/// Passes over memory: reads `x`, writes `y`; the gradient reads `x` and `dy` and writes `dx`.
#[derive(Clone, Copy, Debug)]
pub struct MaxPool2d {
    /// Rows and columns of a window.
    pub kernel: [usize; 2],
    /// Distance between windows.
    pub stride: [usize; 2],
    /// Rows and columns added on each side, at most half the kernel.
    pub padding: [usize; 2],
}

impl MaxPool2d {
    fn windows(&self) -> Windows {
        Windows {
            kernel: self.kernel,
            stride: self.stride,
            padding: self.padding,
        }
    }
}

/// The output rows of an image, for one rayon task each: `f(image, row, y)`.
fn for_each_row<T: Real>(y: &mut [T], shape: Shape, f: impl Fn(usize, usize, &mut [T]) + Sync) {
    y.par_chunks_mut(shape.w * shape.c)
        .enumerate()
        .for_each(|(row, y)| f(row / shape.h, row % shape.h, y));
}

/// One image of a batch.
fn image<T>(x: &[T], shape: Shape, n: usize) -> &[T] {
    let len = shape.pixels() * shape.c;
    &x[n * len..][..len]
}

impl<T: Real> Kernel<T> for MaxPool2d {
    fn run(&self, io: &mut Io<'_, T>) {
        let (x, y) = (io.input(0), io.output(0));
        let (from, to) = (io.input_shape(0), io.output_shape(0));
        let windows = self.windows();
        for_each_row(y, to, |n, row, y| {
            let x = image(x, from, n);
            if windows == Windows::HALVES {
                let x = &x[2 * row * from.w * from.c..][..2 * from.w * from.c];
                simd::dispatch(MaxHalves { x, c: from.c, y });
            } else {
                simd::dispatch(MaxRow {
                    windows,
                    shape: from,
                    x,
                    row,
                    y,
                });
            }
        });
    }
}

/// A row of 2×2 maxima from two rows `x`.
struct MaxHalves<'a, T> {
    x: &'a [T],
    c: usize,
    y: &'a mut [T],
}

impl<T: Real> simd::Kernel<T> for MaxHalves<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let c = self.c;
        let (upper, lower) = self.x.split_at(self.x.len() / 2);
        for ((y, upper), lower) in self
            .y
            .chunks_exact_mut(c)
            .zip(upper.chunks_exact(2 * c))
            .zip(lower.chunks_exact(2 * c))
        {
            let window = [&upper[..c], &upper[c..], &lower[..c], &lower[c..]];
            for channel in (0..c).step_by(L::N) {
                let at = |i: usize| L::load_first(&window[i][channel..]);
                larger(larger(at(0), at(1)), larger(at(2), at(3))).store_first(&mut y[channel..]);
            }
        }
    }
}

/// The maximum of the rows × columns of `x`, for the channels from `channel` on.
#[inline(always)]
fn maximum<L: Lanes>(
    x: &[L::Elem],
    shape: Shape,
    rows: Range<usize>,
    columns: Range<usize>,
    channel: usize,
) -> L {
    let mut largest = L::splat(num_traits::Float::neg_infinity());
    for row in rows {
        for column in columns.clone() {
            largest = larger(largest, pixel(x, shape, row, column, channel));
        }
    }
    largest
}

/// The channels from `channel` on of a pixel.
#[inline(always)]
fn pixel<L: Lanes>(x: &[L::Elem], shape: Shape, row: usize, column: usize, channel: usize) -> L {
    let start = (row * shape.w + column) * shape.c;
    L::load_first(&x[start + channel..start + shape.c])
}

struct MaxRow<'a, T> {
    windows: Windows,
    shape: Shape,
    x: &'a [T],
    row: usize,
    y: &'a mut [T],
}

impl<T: Real> simd::Kernel<T> for MaxRow<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let rows = self.windows.inside(0, self.row, self.shape.h);
        for (o, y) in self.y.chunks_exact_mut(self.shape.c).enumerate() {
            let columns = self.windows.inside(1, o, self.shape.w);
            for (v, y) in y.chunks_mut(L::N).enumerate() {
                maximum::<L>(self.x, self.shape, rows.clone(), columns.clone(), v * L::N)
                    .store_first(y);
            }
        }
    }
}

impl Op for MaxPool2d {
    fn name(&self) -> &'static str {
        "max_pool2d"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        Ok(vec![self.windows().output(self.name(), inputs[0])?])
    }
    fn flops(&self, _: &[Shape], outputs: &[Shape]) -> u64 {
        (self.kernel[0] * self.kernel[1] * outputs[0].len()) as u64
    }
    fn rerun(&self, inputs: &[Var], _: &[Var]) -> Option<(Arc<dyn Op>, Vec<Var>)> {
        Some((Arc::new(*self), inputs.to_vec()))
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = at.gradient(0) else {
            return Ok(());
        };
        let dx = at.push(MaxPool2dGradient(self.windows()), &[at.input(0), dy])?;
        at.set(0, dx)
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        device::max_pool2d(at, self.windows())
    }
}

/// Gradient of [`MaxPool2d`]; inputs `x`, `dy`.
#[derive(Clone, Copy, Debug)]
struct MaxPool2dGradient(Windows);

impl<T: Real> Kernel<T> for MaxPool2dGradient {
    fn run(&self, io: &mut Io<'_, T>) {
        let (x, dy, dx) = (io.input(0), io.input(1), io.output(0));
        let (from, to) = (io.input_shape(0), io.input_shape(1));
        let windows = self.0;
        let row = from.w * from.c;
        let band = if windows == Windows::HALVES { 2 } else { BAND };
        dx.par_chunks_mut(from.h * row)
            .enumerate()
            .for_each(|(n, dx)| {
                let (x, dy) = (image(x, from, n), image(dy, to, n));
                dx.par_chunks_mut(band * row)
                    .enumerate()
                    .for_each(|(b, dx)| {
                        if windows == Windows::HALVES && dx.len() == 2 * row {
                            let x = &x[2 * b * row..][..2 * row];
                            let dy = &dy[b * to.w * to.c..][..to.w * to.c];
                            simd::dispatch(MaxHalvesGradient {
                                x,
                                dy,
                                c: from.c,
                                dx,
                            });
                        } else {
                            simd::dispatch(MaxBandGradient {
                                windows,
                                from,
                                to,
                                x,
                                dy,
                                first: b * band,
                                dx,
                            });
                        }
                    });
            });
    }
}

struct MaxHalvesGradient<'a, T> {
    x: &'a [T],
    dy: &'a [T],
    c: usize,
    dx: &'a mut [T],
}

impl<T: Real> simd::Kernel<T> for MaxHalvesGradient<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let c = self.c;
        let (upper, lower) = self.x.split_at(self.x.len() / 2);
        let (upper_dx, lower_dx) = self.dx.split_at_mut(upper.len());
        let covered = self.dy.len() * 2;
        upper_dx[covered..].fill(T::zero());
        lower_dx[covered..].fill(T::zero());
        for (o, dy) in self.dy.chunks_exact(c).enumerate() {
            let pixels = 2 * o * c..2 * (o + 1) * c;
            let (upper, lower) = (&upper[pixels.clone()], &lower[pixels.clone()]);
            let (upper_dx, lower_dx) = (&mut upper_dx[pixels.clone()], &mut lower_dx[pixels]);
            let window = [&upper[..c], &upper[c..], &lower[..c], &lower[c..]];
            let (a, b) = upper_dx.split_at_mut(c);
            let (d, e) = lower_dx.split_at_mut(c);
            let mut gradients = [a, b, d, e];
            for channel in (0..c).step_by(L::N) {
                let mut x = [L::zero(); 4];
                for (x, window) in x.iter_mut().zip(window) {
                    *x = L::load_first(&window[channel..]);
                }
                let largest = larger(larger(x[0], x[1]), larger(x[2], x[3]));
                let mut rest = L::load_first(&dy[channel..]);
                for (x, dx) in x.iter().zip(&mut gradients) {
                    let taken;
                    (taken, rest) = take(*x, largest, rest);
                    taken.store_first(&mut dx[channel..]);
                }
            }
        }
    }
}

/// Splits `rest` into what goes to `x`, if that is `largest`, and what is left for later elements.
#[inline(always)]
fn take<L: Lanes>(x: L, largest: L, rest: L) -> (L, L) {
    let smaller = x.lt(largest);
    (
        L::select(smaller, L::zero(), rest),
        L::select(smaller, rest, L::zero()),
    )
}

/// The gradient of the rows `first..` of an image: every window that overlaps with them is searched, and
/// what falls on other rows is left to other pieces.
struct MaxBandGradient<'a, T> {
    windows: Windows,
    from: Shape,
    to: Shape,
    x: &'a [T],
    dy: &'a [T],
    first: usize,
    dx: &'a mut [T],
}

impl<T: Real> simd::Kernel<T> for MaxBandGradient<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let Self {
            windows,
            from,
            to,
            x,
            dy,
            first,
            dx,
        } = self;
        dx.fill(T::zero());
        let band = first..first + dx.len() / (from.w * from.c);
        for oy in windows.covering(0, band.clone(), to.h) {
            let rows = windows.inside(0, oy, from.h);
            for ox in 0..to.w {
                let columns = windows.inside(1, ox, from.w);
                for channel in (0..from.c).step_by(L::N) {
                    let largest = maximum::<L>(x, from, rows.clone(), columns.clone(), channel);
                    let mut rest = pixel::<L>(dy, to, oy, ox, channel);
                    for row in rows.clone() {
                        for column in columns.clone() {
                            let taken;
                            (taken, rest) =
                                take(pixel::<L>(x, from, row, column, channel), largest, rest);
                            if band.contains(&row) {
                                let start = ((row - first) * from.w + column) * from.c;
                                let dx = &mut dx[start + channel..start + from.c];
                                (L::load_first(dx) + taken).store_first(dx);
                            }
                        }
                    }
                }
            }
        }
    }
}

impl Op for MaxPool2dGradient {
    fn name(&self) -> &'static str {
        "max_pool2d_gradient"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        Ok(vec![inputs[0]])
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        (2 * self.0.kernel[0] * self.0.kernel[1] * inputs[1].len()) as u64
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        device::max_pool2d_gradient(at, self.0)
    }
}

/// Average over windows, padding counted as zeros (PyTorch's `count_include_pad`). Input `x` (N×H×W×C), output
/// as for [`MaxPool2d`].
///
/// Passes over memory: reads `x`, writes `y`; the gradient reads `dy` and writes `dx`.
#[derive(Clone, Copy, Debug)]
pub struct AvgPool2d {
    /// Rows and columns of a window.
    pub kernel: [usize; 2],
    /// Distance between windows.
    pub stride: [usize; 2],
    /// Rows and columns added on each side, at most half the kernel.
    pub padding: [usize; 2],
}

impl AvgPool2d {
    fn windows(&self) -> Windows {
        Windows {
            kernel: self.kernel,
            stride: self.stride,
            padding: self.padding,
        }
    }
}

impl<T: Real> Kernel<T> for AvgPool2d {
    fn run(&self, io: &mut Io<'_, T>) {
        let (x, y) = (io.input(0), io.output(0));
        let (from, to) = (io.input_shape(0), io.output_shape(0));
        let windows = self.windows();
        for_each_row(y, to, |n, row, y| {
            simd::dispatch(AverageRow {
                x: image(x, from, n),
                shape: from,
                rows: windows.inside(0, row, from.h),
                columns: |o| windows.inside(1, o, from.w),
                area: self.kernel[0] * self.kernel[1],
                y,
            });
        });
    }
}

/// A row of sums of `x` over `rows` × `columns(o)`, divided by `area`.
struct AverageRow<'a, T, F> {
    x: &'a [T],
    shape: Shape,
    rows: Range<usize>,
    columns: F,
    area: usize,
    y: &'a mut [T],
}

impl<T: Real, F: Fn(usize) -> Range<usize>> simd::Kernel<T> for AverageRow<'_, T, F> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let weight = L::splat(T::of(1.0 / self.area as f64));
        for (o, y) in self.y.chunks_exact_mut(self.shape.c).enumerate() {
            let columns = (self.columns)(o);
            for (v, y) in y.chunks_mut(L::N).enumerate() {
                let mut sum = L::zero();
                for row in self.rows.clone() {
                    for column in columns.clone() {
                        sum = sum + pixel(self.x, self.shape, row, column, v * L::N);
                    }
                }
                (sum * weight).store_first(y);
            }
        }
    }
}

impl Op for AvgPool2d {
    fn name(&self) -> &'static str {
        "avg_pool2d"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        Ok(vec![self.windows().output(self.name(), inputs[0])?])
    }
    fn flops(&self, _: &[Shape], outputs: &[Shape]) -> u64 {
        ((self.kernel[0] * self.kernel[1] + 1) * outputs[0].len()) as u64
    }
    fn rerun(&self, inputs: &[Var], _: &[Var]) -> Option<(Arc<dyn Op>, Vec<Var>)> {
        Some((Arc::new(*self), inputs.to_vec()))
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = at.gradient(0) else {
            return Ok(());
        };
        let gradient = AvgPool2dGradient {
            windows: self.windows(),
            x: at.shape(at.input(0)),
        };
        let dx = at.push(gradient, &[dy])?;
        at.set(0, dx)
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        device::avg_pool2d(at, self.windows(), false)
    }
}

/// Gradient of [`AvgPool2d`] with respect to an input of extent `x`; input `dy`. Each element of `dx` gathers
/// from the windows that cover it: an average over windows again.
#[derive(Clone, Copy, Debug)]
struct AvgPool2dGradient {
    windows: Windows,
    x: Shape,
}

impl<T: Real> Kernel<T> for AvgPool2dGradient {
    fn run(&self, io: &mut Io<'_, T>) {
        let (dy, dx) = (io.input(0), io.output(0));
        let (from, to) = (io.input_shape(0), self.x);
        let Windows { kernel, .. } = self.windows;
        for_each_row(dx, to, |n, row, dx| {
            simd::dispatch(AverageRow {
                x: image(dy, from, n),
                shape: from,
                rows: self.windows.covering(0, row..row + 1, from.h),
                columns: |o| self.windows.covering(1, o..o + 1, from.w),
                area: kernel[0] * kernel[1],
                y: dx,
            });
        });
    }
}

impl Op for AvgPool2dGradient {
    fn name(&self) -> &'static str {
        "avg_pool2d_gradient"
    }
    fn outputs(&self, _: &[Shape]) -> Result<Vec<Shape>> {
        Ok(vec![self.x])
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        (self.windows.kernel[0] * self.windows.kernel[1] * inputs[0].len() + self.x.len()) as u64
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        device::avg_pool2d(at, self.windows, true)
    }
}

/// Average of each channel over each image: N×H×W×C → N×1×1×C.
///
/// Passes over memory: reads `x`; the gradient writes `dx`, or adds to it where `x` has other uses.
#[derive(Clone, Copy, Debug)]
pub struct GlobalAvgPool;

impl<T: Real> Kernel<T> for GlobalAvgPool {
    fn run(&self, io: &mut Io<'_, T>) {
        let (x, y, sums) = (io.input(0), io.output(0), io.scratch());
        let shape = io.input_shape(0);
        let rows = Rows::of_images(shape);
        rows.sum(Identity, [x], &[], sums);
        let pixels = T::of(rows.pixels() as f64);
        for (n, y) in y.chunks_exact_mut(shape.c).enumerate() {
            for (c, y) in y.iter_mut().enumerate() {
                *y = sums[rows.total::<1>(n, 0, c)] / pixels;
            }
        }
    }
}

impl Op for GlobalAvgPool {
    fn name(&self) -> &'static str {
        "global_avg_pool"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        Ok(vec![Shape::per_image(inputs[0].n, inputs[0].c)])
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        inputs[0].len() as u64
    }
    fn scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        Rows::of_images(inputs[0]).sums_len(1)
    }
    fn rerun(&self, inputs: &[Var], _: &[Var]) -> Option<(Arc<dyn Op>, Vec<Var>)> {
        Some((Arc::new(*self), inputs.to_vec()))
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = at.gradient(0) else {
            return Ok(());
        };
        let x = at.shape(at.input(0));
        let Some(sum) = at.pending(0) else {
            let dx = at.push(GlobalAvgPoolGradient { x }, &[dy])?;
            return at.set(0, dx);
        };
        // Added to what there is, the gradient need not be spread over the image first.
        let factor = 1.0 / x.pixels() as f64;
        let each = at.push(Scale { factor }, &[dy])?;
        let dx = at.push(Add, &[sum, each])?;
        at.set_sum(0, dx)
    }
    fn device_scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        Walk::scratch(inputs[0].n, inputs[0])
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let (x, y, shape) = (at.input(0), at.output(0), at.input_shape(0));
        if shape.is_empty() {
            return Ok(());
        }
        let walk = Walk::over(shape.n, shape, x.is_narrow());
        walk.launch_sums(at, [x, Pointer::NULL], at.scratch())?;
        let strips = shape.c.div_ceil(32);
        let arguments = MeanOfPieces {
            partials: at.scratch().into(),
            y: y.into(),
            channels: extent(self.name(), shape.c)?,
            strips: extent(self.name(), strips)?,
            pieces: extent(self.name(), walk.pieces)?,
            factor: 1.0 / shape.pixels() as f64,
        };
        at.launch(Grid::new(shape.n * strips, THREADS as u32), &arguments)
    }
}

kernel! {
    struct MeanOfPieces = "mean_of_pieces" {
        partials: Full, y: Stored, channels: u32, strips: u32, pieces: u32, factor: f64
    }
}

/// Gradient of [`GlobalAvgPool`] with respect to an input of extent `x`; input `dy`.
#[derive(Clone, Copy, Debug)]
struct GlobalAvgPoolGradient {
    x: Shape,
}

impl<T: Real> Kernel<T> for GlobalAvgPoolGradient {
    fn run(&self, io: &mut Io<'_, T>) {
        let (dy, dx, tables) = (io.input(0), io.output(0), io.scratch());
        let rows = Rows::of_images(self.x);
        let pixels = T::of(rows.pixels() as f64);
        rows.tables(tables, |n, c| [dy[n * self.x.c + c] / pixels]);
        rows.map(Broadcast, [], tables, dx);
    }
}

#[derive(Clone, Copy)]
struct Broadcast;

impl Lanewise<0, 1, 1> for Broadcast {
    #[inline(always)]
    fn at<L: Lanes>(self, _: [L; 0], value: [L; 1]) -> [L; 1] {
        value
    }
}

impl Op for GlobalAvgPoolGradient {
    fn name(&self) -> &'static str {
        "global_avg_pool_gradient"
    }
    fn outputs(&self, _: &[Shape]) -> Result<Vec<Shape>> {
        Ok(vec![self.x])
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        inputs[0].len() as u64
    }
    fn scratch(&self, _: &[Shape], _: &[Shape]) -> usize {
        Rows::of_images(self.x).tables_len(1)
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let (dy, dx) = (at.input(0), at.output(0));
        let arguments = SpreadRows {
            dy: dy.into(),
            dx: dx.into(),
            len: self.x.len() as u64,
            channels: extent(self.name(), self.x.c)?,
            rows: self.x.pixels() as u64,
            factor: (1.0 / self.x.pixels() as f64) as f32,
        };
        at.launch(grid(self.x.len(), dx), &arguments)
    }
}

kernel! {
    struct SpreadRows = "spread_rows" {
        dy: Stored, dx: Stored, len: u64, channels: u32, rows: u64, factor: f32
    }
}

/// Random windows, and a feature map that holds at least one.
fn draw(s: &mut Sampler) -> (Windows, Shape) {
    let kernel = [s.size(1, 4), s.size(1, 4)];
    let windows = Windows {
        kernel,
        stride: [s.size(1, 3), s.size(1, 3)],
        padding: kernel.map(|k| s.size(0, k / 2)),
    };
    let windows = if s.chance(0.3) {
        Windows::HALVES
    } else {
        windows
    };
    let mut shape = s.shape();
    shape.h = shape.h.max(windows.kernel[0]);
    shape.w = shape.w.max(windows.kernel[1]);
    (windows, shape)
}

pub(super) fn max_pool2d_case(s: &mut Sampler) -> Case {
    let (
        Windows {
            kernel,
            stride,
            padding,
        },
        shape,
    ) = draw(s);
    let op = MaxPool2d {
        kernel,
        stride,
        padding,
    };
    // Values further apart than the step of the finite differences, so that no maximum changes place.
    let mut values: Vec<f64> = (0..shape.len())
        .map(|i| (i as f64 - shape.len() as f64 / 2.0) * 0.01)
        .collect();
    values.shuffle(s.rng());
    Case::new(format!("{shape} {op:?}"), move |t, v| {
        Ok(vec![t.push(op, v)?])
    })
    .with("x", shape, values)
    .narrow()
}

pub(super) fn avg_pool2d_case(s: &mut Sampler) -> Case {
    let (
        Windows {
            kernel,
            stride,
            padding,
        },
        shape,
    ) = draw(s);
    let op = AvgPool2d {
        kernel,
        stride,
        padding,
    };
    Case::new(format!("{shape} {op:?}"), move |t, v| {
        Ok(vec![t.push(op, v)?])
    })
    .with("x", shape, s.values(shape.len(), -2.0, 2.0))
    .narrow()
}

pub(super) fn global_avg_pool_case(s: &mut Sampler) -> Case {
    let shape = s.shape();
    Case::new(format!("{shape}"), |t, v| {
        Ok(vec![t.push(GlobalAvgPool, v)?])
    })
    .with("x", shape, s.values(shape.len(), -2.0, 2.0))
    .narrow()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ops::apply;

    #[test]
    fn the_gradient_of_an_average_joins_that_of_other_uses() {
        use crate::device::cpu::Session;
        use crate::tape::{Plan, Tape};
        let shape = Shape::new(2, 3, 5, 4);
        let mut tape = Tape::new();
        let x = tape.input("x", shape);
        let average = tape.push(GlobalAvgPool, &[x]).unwrap();
        let other = tape.push(Scale { factor: 2.0 }, &[x]).unwrap();
        let seeds = [average, other].map(|y| {
            let dy = tape.input("dy", tape.shape(y));
            (y, dy)
        });
        let dx = tape.backward_from(&seeds, &[x]).unwrap()[0].unwrap();
        tape.keep(dx);
        let mut session =
            Session::<f64>::new(Plan::new(&tape, Default::default()).unwrap()).unwrap();
        let mut s = Sampler::new(1);
        let [of_average, of_other] =
            [shape.n * shape.c, shape.len()].map(|len| s.values(len, -1.0, 1.0));
        session.write(seeds[0].1, &of_average);
        session.write(seeds[1].1, &of_other);
        session.run();
        for (i, dx) in session.read(dx).iter().enumerate() {
            let average = of_average[i / (shape.len() / 2) * shape.c + i % shape.c];
            let expected = 2.0 * of_other[i] + average / 15.0;
            assert!((dx - expected).abs() < 1e-15, "{i}: {dx} for {expected}");
        }
        let spread = |step: &crate::tape::Step| step.op.name() == "global_avg_pool_gradient";
        assert!(!tape.steps().iter().any(spread));
    }

    /// What `combine` makes of each window's elements inside the image, in scan order.
    fn reference(
        windows: Windows,
        from: Shape,
        to: Shape,
        x: &[f64],
        combine: impl Fn(&[f64]) -> f64,
    ) -> Vec<f64> {
        let Windows {
            kernel,
            stride,
            padding,
        } = windows;
        let mut y = Vec::new();
        for (n, i) in (0..to.n).flat_map(|n| (0..to.h).map(move |i| (n, i))) {
            for (j, c) in (0..to.w).flat_map(|j| (0..to.c).map(move |c| (j, c))) {
                let mut inside = Vec::new();
                for (r, s) in (0..kernel[0]).flat_map(|r| (0..kernel[1]).map(move |s| (r, s))) {
                    let row = (i * stride[0] + r).wrapping_sub(padding[0]);
                    let column = (j * stride[1] + s).wrapping_sub(padding[1]);
                    if row < from.h && column < from.w {
                        inside.push(x[((n * from.h + row) * from.w + column) * from.c + c]);
                    }
                }
                y.push(combine(&inside));
            }
        }
        y
    }

    proptest! {
        #[test]
        fn windows_follow_their_definition(seed in any::<u64>(), c in 1..40usize) {
            let mut s = Sampler::new(seed);
            let (windows, shape) = draw(&mut s);
            let shape = Shape { c, ..shape };
            let x = s.values(shape.len(), -2.0, 2.0);
            let Windows { kernel, stride, padding } = windows;
            let to = windows.output("pool", shape).unwrap();

            let found = apply(MaxPool2d { kernel, stride, padding }, &[(shape, &x)]);
            let maximum = |x: &[f64]| x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            prop_assert_eq!(&found, &reference(windows, shape, to, &x, maximum));

            let found = apply(AvgPool2d { kernel, stride, padding }, &[(shape, &x)]);
            let area = (kernel[0] * kernel[1]) as f64;
            let average = |x: &[f64]| x.iter().sum::<f64>() / area;
            for (a, b) in found.iter().zip(reference(windows, shape, to, &x, average)) {
                prop_assert!((a - b).abs() < 1e-14);
            }

            let found = apply(GlobalAvgPool, &[(shape, &x)]);
            for (i, &y) in found.iter().enumerate() {
                let image = image(&x, shape, i / c);
                let sum: f64 = image.iter().skip(i % c).step_by(c).sum();
                prop_assert!((y - sum / shape.pixels() as f64).abs() < 1e-13);
            }
        }
    }

    #[test]
    fn the_first_of_equal_maxima_takes_the_gradient() {
        let shape = Shape::new(1, 2, 4, 1);
        let x = [3.0, 5.0, 7.0, 7.0, 5.0, 5.0, 7.0, 7.0];
        let halves = MaxPool2dGradient(Windows::HALVES);
        let dx = apply(
            halves,
            &[(shape, &x), (Shape::new(1, 1, 2, 1), &[1.0, 2.0])],
        );
        assert_eq!(dx, [0.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]);

        let overlapping = MaxPool2dGradient(Windows {
            kernel: [2, 3],
            stride: [1, 1],
            padding: [0, 1],
        });
        let dy = [1.0, 2.0, 4.0, 8.0];
        let dx = apply(overlapping, &[(shape, &x), (Shape::new(1, 1, 4, 1), &dy)]);
        assert_eq!(dx, [0.0, 1.0, 14.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn nan_passes_through_and_infinities_compare() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        for kernel in [[2, 2], [2, 1]] {
            let op = MaxPool2d {
                kernel,
                stride: [2, 2],
                padding: [0, 0],
            };
            for (position, other) in (0..2).flat_map(|p| [(p, nan), (p, inf), (p, -inf), (p, 1.0)])
            {
                let mut x = [other; 8];
                x[4 * position] = nan;
                let y = apply(op, &[(Shape::new(1, 2, 2, 2), &x)]);
                assert!(y[0].is_nan());
                assert_eq!(y[1].to_bits(), other.to_bits());
            }
            let x = [-inf, inf, -inf, inf, -inf, 2.0, -inf, inf];
            let y = apply(op, &[(Shape::new(1, 2, 2, 2), &x)]);
            assert_eq!(y, [-inf, inf]);
        }
    }

    #[test]
    fn windows_that_do_not_fit_are_refused() {
        let x = Shape::new(1, 4, 4, 1);
        let pool = |kernel, stride, padding| {
            MaxPool2d {
                kernel,
                stride,
                padding,
            }
            .outputs(&[x])
        };
        assert_eq!(
            pool([3, 3], [2, 2], [1, 1]).unwrap(),
            [Shape::new(1, 2, 2, 1)]
        );
        assert!(pool([5, 2], [1, 1], [0, 0]).is_err());
        assert!(pool([2, 2], [0, 1], [0, 0]).is_err());
        assert!(pool([3, 3], [1, 1], [2, 0]).is_err());
        assert!(pool([0, 1], [1, 1], [0, 0]).is_err());
    }
}
