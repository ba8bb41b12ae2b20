//! The extents of a convolution, and the convolution and its gradients on slices.

use super::correlate::{Bank, Correlation, Placement, Then};
use super::weights;
use crate::device::simd::Level;
use crate::error::{Error, Result};
use crate::ops::activation::Epilogue;
use crate::ops::statistics;
use crate::tensor::{Real, Shape};

/// The extents of a convolution. Rows come before columns in every pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Input.
    pub(super) x: Shape,
    /// Weights.
    pub(super) w: Shape,
    pub(super) stride: [usize; 2],
    pub(super) padding: [usize; 2],
}

impl Geometry {
    /// A convolution of `x` (`N×H×W×C`) with the weights `w` (`out×kh×kw×C`): the kernel moves by `stride`
    /// over the image widened by `padding` zeros on every side.
    ///
    /// # Errors
    /// [`Error::Shape`] if the channels differ, an extent or stride is zero, or the kernel does not fit.
    pub fn new(x: Shape, w: Shape, stride: [usize; 2], padding: [usize; 2]) -> Result<Self> {
        let fail = |problem: String| Err(Error::shape("conv2d", problem));
        if x.c != w.c {
            return fail(format!(
                "expected {} input channels as in weights {w}, found input {x}",
                w.c
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

    /// Extent of the input.
    pub fn input(&self) -> Shape {
        self.x
    }

    /// Extent of the output.
    pub fn output(&self) -> Shape {
        let count = |axis: usize, extent: usize, kernel: usize| {
            (extent + 2 * self.padding[axis] - kernel) / self.stride[axis] + 1
        };
        Shape::new(
            self.x.n,
            count(0, self.x.h, self.w.h),
            count(1, self.x.w, self.w.w),
            self.w.n,
        )
    }

    /// Floating-point operations of the convolution, and of either gradient; a fused multiply-add counts two.
    pub fn flops(&self) -> u64 {
        2 * self.output().rows() as u64 * self.w.len() as u64
    }

    /// Input rows or columns under `count` neighbouring output pixels.
    pub(super) fn reach(&self, axis: usize, count: usize) -> usize {
        (count - 1) * self.stride[axis] + [self.w.h, self.w.w][axis]
    }

    /// The same sums over one long row of pixels, for kernels that see single pixels.
    fn flattened(self) -> Self {
        if [self.w.h, self.w.w] == [1, 1] && self.stride == [1, 1] && self.padding == [0, 0] {
            Self {
                x: Shape::new(1, 1, self.x.rows(), self.x.c),
                ..self
            }
        } else {
            self
        }
    }

    pub(super) fn forward(&self) -> Correlation {
        let (x, w, y) = (self.x, self.w, self.output());
        Correlation {
            x,
            pixels: [y.h, y.w],
            channels: w.n,
            taps: [w.h, w.w],
            stride: self.stride,
            origin: self.padding.map(|p| -(p as isize)),
            y: Placement {
                start: 0,
                image: y.pixels() * y.c,
                row: y.w * y.c,
                column: y.c,
            },
            w: Bank {
                start: 0,
                row: (w.w * w.c) as isize,
                column: w.c as isize,
                input: 1,
                output: w.h * w.w * w.c,
            },
        }
    }

    /// The input gradient by phases: the pixels `i ≡ phase (mod stride)` of the input see only the taps
    /// `r ≡ i + padding (mod stride)`, at neighbouring output pixels and in descending order, so each phase is
    /// a correlation of stride 1 of the output gradient with those taps turned round.
    pub(super) fn phases(&self) -> impl Iterator<Item = Correlation> {
        let (x, w) = (self.x, self.w);
        let this = *self;
        (0..self.stride[0] * self.stride[1]).map(move |phase| {
            let phase = [phase / this.stride[1], phase % this.stride[1]];
            let axis = |axis: usize, extent: usize, kernel: usize| {
                let (stride, shifted) = (this.stride[axis], phase[axis] + this.padding[axis]);
                let first = shifted % stride;
                let taps = kernel.saturating_sub(first).div_ceil(stride);
                let pixels = extent.saturating_sub(phase[axis]).div_ceil(stride);
                let origin = (shifted / stride) as isize + 1 - taps as isize;
                (
                    pixels,
                    taps,
                    origin,
                    first + stride * taps.saturating_sub(1),
                )
            };
            let (rows, row_taps, top, last_row) = axis(0, x.h, w.h);
            let (columns, column_taps, left, last_column) = axis(1, x.w, w.w);
            Correlation {
                x: this.output(),
                pixels: [rows, columns],
                channels: x.c,
                taps: [row_taps, column_taps],
                stride: [1, 1],
                origin: [top, left],
                y: Placement {
                    start: (phase[0] * x.w + phase[1]) * x.c,
                    image: x.pixels() * x.c,
                    row: this.stride[0] * x.w * x.c,
                    column: this.stride[1] * x.c,
                },
                w: Bank {
                    start: (last_row * w.w + last_column) * w.c,
                    row: -((this.stride[0] * w.w * w.c) as isize),
                    column: -((this.stride[1] * w.c) as isize),
                    input: w.h * w.w * w.c,
                    output: 1,
                },
            }
        })
    }

    /// Elements of scratch that [`forward`] needs.
    pub fn forward_scratch(&self) -> usize {
        self.forward().scratch()
    }

    /// Elements of scratch that [`forward_with_statistics`] needs.
    pub fn statistics_scratch(&self) -> usize {
        let forward = self.forward();
        forward.blocks() * statistics::len(self.w.n) + forward.scratch()
    }

    /// Elements of scratch that [`input_gradient`] needs.
    pub fn input_gradient_scratch(&self) -> usize {
        self.phases()
            .map(|phase| phase.scratch())
            .max()
            .unwrap_or(0)
    }

    /// Elements of scratch that [`weight_gradient`] needs.
    pub fn weight_gradient_scratch(&self) -> usize {
        weights::scratch(&self.flattened())
    }
}

/// `y = x ∗ w`: `y[n, i, j, o] = Σ x[n, i·sh + r − ph, j·sw + s − pw, c] · w[o, r, s, c]`.
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
pub(super) fn correlate<T: Real>(
    level: Level,
    geometry: &Geometry,
    x: &[T],
    w: &[T],
    epilogue: Option<Epilogue<'_, T>>,
    y: &mut [T],
    scratch: &mut [T],
) {
    check(geometry, x.len(), w.len(), y.len());
    let then = epilogue.map_or(Then::Nothing, Then::Epilogue);
    geometry.forward().run(level, x, w, then, y, scratch);
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
    let forward = geometry.forward();
    let blocks = forward.blocks();
    let (sums, scratch) = scratch.split_at_mut(blocks * statistics::len(geometry.w.n));
    forward.run(level, x, w, Then::Statistics(sums), y, scratch);
    statistics::finish(sums, blocks, forward.pixels_of(), mean, var);
}

/// `dx[n, i·sh + r − ph, j·sw + s − pw, c] = Σ dy[n, i, j, o] · w[o, r, s, c]`.
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
    for phase in geometry.phases() {
        phase.run(level, dy, w, Then::Nothing, dx, scratch);
    }
}

/// `dw[o, r, s, c] = Σ dy[n, i, j, o] · x[n, i·sh + r − ph, j·sw + s − pw, c]`.
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
    weights::run(level, &geometry.flattened(), x, dy, dw, scratch);
}

fn check(geometry: &Geometry, x: usize, w: usize, y: usize) {
    assert_eq!(x, geometry.x.len(), "input");
    assert_eq!(w, geometry.w.len(), "weights");
    assert_eq!(y, geometry.output().len(), "output");
}
