//! Bilinear upsampling by two.

use std::sync::Arc;

use rayon::prelude::*;

use super::pointwise::{THREADS, Units, extent, width};
use super::{Kernel, Op};
use crate::device::cpu::Io;
use crate::device::gpu::launch::{Grid, Launches, Pointer, Stored, kernel};
use crate::device::simd::{self, Lanes};
use crate::error::{Error, Result};
use crate::gradcheck::{Case, Sampler};
use crate::tape::{Backward, Var};
use crate::tensor::{Real, Shape};

/// Twice the rows and columns by bilinear interpolation between pixel centres, the border repeated
/// (PyTorch's `align_corners = false`): N×H×W×C → N×2H×2W×C. Along each axis
/// `y[2i] = ¼x[i−1] + ¾x[i]` and `y[2i+1] = ¾x[i] + ¼x[i+1]`.
///
/// With a second input `skip`, N×2H×2W×S, what a U-Net's decoder joins: N×2H×2W×(S+C), the channels of `skip` before
/// those of `x`. Upsampling and [`Concat`](super::concat::Concat) would write and read the larger map once more, and
/// their gradients too.
///
/// Passes over memory: reads `x` and `skip`, writes `y`; the gradient gathers from `dy` and writes `dx` and `dskip`.
#[derive(Clone, Copy, Debug)]
pub struct Upsample2x;

impl<T: Real> Kernel<T> for Upsample2x {
    fn run(&self, io: &mut Io<'_, T>) {
        let (x, y) = (io.input(0), io.output(0));
        let skip = (io.inputs() == 2).then(|| io.input(1));
        let Shape { h, w, c, .. } = io.input_shape(0);
        let pitch = io.output_shape(0).c;
        let start = pitch - c;
        y.par_chunks_mut(2 * w * pitch)
            .enumerate()
            .for_each(|(row, y)| {
                if let Some(skip) = skip {
                    let skip = skip[row * 2 * w * start..].chunks_exact(start);
                    for (y, skip) in y.chunks_exact_mut(pitch).zip(skip) {
                        y[..start].copy_from_slice(skip);
                    }
                }
                let (image, row) = (row / (2 * h), row % (2 * h));
                let (near, far) = neighbours(row, h);
                let x = |i: usize| &x[(image * h + i) * w * c..][..w * c];
                simd::dispatch(Row {
                    near: x(near),
                    far: x(far),
                    c,
                    pitch,
                    y,
                });
            });
    }
}

/// The two pixels between which pixel `o` of an axis of `2·size` lies: the nearer with weight ¾.
fn neighbours(o: usize, size: usize) -> (usize, usize) {
    let near = o / 2;
    let far = if o.is_multiple_of(2) {
        near.saturating_sub(1)
    } else {
        (near + 1).min(size - 1)
    };
    (near, far)
}

/// One row of the result from two rows of the input: the last `c` of each pixel's `pitch` channels.
struct Row<'a, T> {
    near: &'a [T],
    far: &'a [T],
    c: usize,
    pitch: usize,
    y: &'a mut [T],
}

impl<T: Real> simd::Kernel<T> for Row<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let (c, pitch, pixels) = (self.c, self.pitch, self.near.len() / self.c);
        let (less, more) = (L::splat(T::of(0.25)), L::splat(T::of(0.75)));
        for channel in (0..c).step_by(L::N) {
            let at = Channels {
                pitch: c,
                from: channel,
            };
            let rows = [self.near, self.far];
            // Each blend of the two rows serves three columns.
            let mut centre = blend::<L>(rows, 0, at);
            let mut left = centre;
            for pixel in 0..pixels {
                let right = if pixel + 1 < pixels {
                    blend::<L>(rows, pixel + 1, at)
                } else {
                    centre
                };
                let most = centre * more;
                let y = &mut self.y[2 * pixel * pitch..2 * (pixel + 1) * pitch];
                let (even, odd) = y.split_at_mut(pitch);
                let [even, odd] = [even, odd].map(|y| &mut y[pitch - c + channel..]);
                left.mul_add(less, most).store_first(even);
                right.mul_add(less, most).store_first(odd);
                (left, centre) = (centre, right);
            }
        }
    }
}

/// The lanes of a pixel of `pitch` channels that begin at channel `from`.
#[derive(Clone, Copy)]
struct Channels {
    pitch: usize,
    from: usize,
}

impl Channels {
    #[inline(always)]
    fn load<L: Lanes>(self, row: &[L::Elem], pixel: usize) -> L {
        L::load_first(&row[pixel * self.pitch..][self.from..self.pitch])
    }
}

/// Three quarters of the nearer row and one of the other.
#[inline(always)]
fn blend<L: Lanes>([near, far]: [&[L::Elem]; 2], pixel: usize, at: Channels) -> L {
    let (near, far) = (at.load::<L>(near, pixel), at.load::<L>(far, pixel));
    near * L::splat(L::Elem::of(0.75)) + far * L::splat(L::Elem::of(0.25))
}

impl Op for Upsample2x {
    fn name(&self) -> &'static str {
        "upsample2x"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        let Shape { n, h, w, c } = inputs[0];
        let up = Shape::new(n, 2 * h, 2 * w, c);
        let Some(&skip) = inputs.get(1) else {
            return Ok(vec![up]);
        };
        let expected = Shape { c: skip.c, ..up };
        if skip != expected {
            let problem = format!("{skip} beside {}: expected {expected}", inputs[0]);
            return Err(Error::shape(self.name(), problem));
        }
        let c = skip.c + c;
        Ok(vec![Shape { c, ..up }])
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        8 * 4 * inputs[0].len() as u64
    }
    fn rerun(&self, inputs: &[Var], _: &[Var]) -> Option<(Arc<dyn Op>, Vec<Var>)> {
        Some((Arc::new(*self), inputs.to_vec()))
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = at.gradient(0) else {
            return Ok(());
        };
        let c = at.shape(at.input(0)).c;
        let gradients = at.push_all(Upsample2xGradient { c }, &[dy])?;
        for (i, gradient) in gradients.into_iter().enumerate() {
            at.set(i, gradient)?;
        }
        Ok(())
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let (x, y, from) = (at.input(0), at.output(0), at.input_shape(0));
        let skip = if at.inputs() == 2 { at.input(1) } else { x };
        let units = SplitUnits::new(at.output_shape(0).c, from.c, [x, y, skip])?;
        let count = from.rows() * units.each as usize;
        let arguments = UpsampleKernel {
            x: x.into(),
            skip: skip.into(),
            y: y.into(),
            count: count as u64,
            units: units.each,
            skip_units: units.skip,
            vector: units.vector.into(),
            h: at.int(2 * from.h)? / 2,
            w: at.int(2 * from.w)? / 2,
        };
        at.launch(Grid::cover(count, THREADS as u32), &arguments)
    }
}

/// [`Units`] of a pixel of `y` or `dy`, and how many of them are of the skip connection.
struct SplitUnits {
    each: u32,
    skip: u32,
    vector: bool,
}

impl SplitUnits {
    /// Of `both` channels the last `c` are upsampled.
    fn new(both: usize, c: usize, pointers: [Pointer; 3]) -> Result<Self> {
        let name = Upsample2x.name();
        // A multiple of a power of two that both are: their bits below it are 0.
        let Units { vector, .. } = Units::new(both | c, &pointers);
        let units = |channels| {
            let width = if vector {
                width(pointers[0].is_narrow())
            } else {
                1
            };
            extent(name, channels / width)
        };
        Ok(Self {
            each: units(both)?,
            skip: units(both - c)?,
            vector,
        })
    }
}

kernel! {
    struct UpsampleKernel = "upsample2x" {
        x: Stored, skip: Stored, y: Stored, count: u64, units: u32, skip_units: u32, vector: i32, h: i32, w: i32
    }
}

kernel! {
    struct UpsampleGradientKernel = "upsample2x_gradient" {
        dy: Stored, dx: Stored, dskip: Stored, count: u64, units: u32, skip_units: u32, vector: i32, h: i32, w: i32
    }
}

/// Gradient of [`Upsample2x`]; input `dy`, outputs `dx` and, if `dy` has more channels than that, `dskip`.
#[derive(Clone, Copy, Debug)]
struct Upsample2xGradient {
    /// Channels of `dx`, the last of `dy`.
    c: usize,
}

impl<T: Real> Kernel<T> for Upsample2xGradient {
    fn run(&self, io: &mut Io<'_, T>) {
        let (dy, dx) = (io.input(0), io.output(0));
        let Shape { h, w, c, .. } = io.output_shape(0);
        let pitch = io.input_shape(0).c;
        let wide = 2 * w * pitch;
        let gather = |row: usize, dx: &mut [T]| {
            let (image, row) = (row / h, row % h);
            let rows = taps(row, h)
                .map(|(o, weight)| (&dy[(image * 2 * h + o) * wide..][..wide], T::of(weight)));
            simd::dispatch(GradientRow { rows, c, pitch, dx });
        };
        let rows = dx.par_chunks_mut(w * c).enumerate();
        if io.outputs() == 1 {
            rows.for_each(|(row, dx)| gather(row, dx));
            return;
        }
        let start = pitch - c;
        let dskip = io.output(1).par_chunks_mut(2 * 2 * w * start);
        rows.zip(dskip).for_each(|((row, dx), dskip)| {
            let dy = dy[2 * row * wide..].chunks_exact(pitch);
            for (dskip, dy) in dskip.chunks_exact_mut(start).zip(dy) {
                dskip.copy_from_slice(&dy[..start]);
            }
            gather(row, dx);
        });
    }
}

/// The pixels of an axis of `2·size` that pixel `i` contributes to, with their weights; at the border, where a
/// pixel stands for its missing neighbour too, one of them occurs twice.
fn taps(i: usize, size: usize) -> [(usize, f64); 4] {
    let (o, last) = (2 * i, 2 * size - 1);
    [
        (o.saturating_sub(1), 0.25),
        (o, 0.75),
        (o + 1, 0.75),
        ((o + 2).min(last), 0.25),
    ]
}

/// One row of `dx` from the last `c` of each pixel's `pitch` channels in four rows of `dy`.
struct GradientRow<'a, T> {
    rows: [(&'a [T], T); 4],
    c: usize,
    pitch: usize,
    dx: &'a mut [T],
}

impl<T: Real> simd::Kernel<T> for GradientRow<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let (c, pitch, pixels) = (self.c, self.pitch, self.dx.len() / self.c);
        let one = L::splat(T::of(1.0));
        let (less, more) = (L::splat(T::of(0.25)), L::splat(T::of(0.75)));
        for channel in (0..c).step_by(L::N) {
            let at = Channels {
                pitch,
                from: pitch - c + channel,
            };
            // As the taps along a column: of the four columns, two serve the next pixel too.
            let (mut before, mut first) = (L::zero(), column::<L>(&self.rows, 0, at));
            for pixel in 0..pixels {
                let last = pixel + 1 == pixels;
                let second = column::<L>(&self.rows, 2 * pixel + 1, at);
                let after = if last {
                    L::zero()
                } else {
                    column::<L>(&self.rows, 2 * pixel + 2, at)
                };
                let outer = (before + after) * less;
                let sum = first.mul_add(if pixel == 0 { one } else { more }, outer);
                second
                    .mul_add(if last { one } else { more }, sum)
                    .store_first(&mut self.dx[pixel * c..][channel..c]);
                (before, first) = (second, after);
            }
        }
    }
}

/// Column `o` of `dy`: its rows by their weights.
#[inline(always)]
fn column<L: Lanes>(rows: &[(&[L::Elem], L::Elem); 4], o: usize, at: Channels) -> L {
    let mut sum = L::zero();
    for &(dy, weight) in rows {
        sum = at.load::<L>(dy, o).mul_add(L::splat(weight), sum);
    }
    sum
}

impl Op for Upsample2xGradient {
    fn name(&self) -> &'static str {
        "upsample2x_gradient"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        let Shape { n, h, w, c } = inputs[0];
        let dx = Shape::new(n, h / 2, w / 2, self.c);
        let dskip = Shape {
            c: c - self.c,
            ..inputs[0]
        };
        Ok([dx, dskip].into_iter().filter(|s| s.c > 0).collect())
    }
    fn flops(&self, _: &[Shape], outputs: &[Shape]) -> u64 {
        40 * outputs[0].len() as u64
    }
    fn narrow(&self, _: usize, inputs: &[bool]) -> bool {
        inputs[0]
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let (dy, dx, to) = (at.input(0), at.output(0), at.output_shape(0));
        let dskip = if at.outputs() == 2 { at.output(1) } else { dx };
        let units = SplitUnits::new(at.input_shape(0).c, to.c, [dy, dx, dskip])?;
        let count = to.rows() * units.each as usize;
        let arguments = UpsampleGradientKernel {
            dy: dy.into(),
            dx: dx.into(),
            dskip: dskip.into(),
            count: count as u64,
            units: units.each,
            skip_units: units.skip,
            vector: units.vector.into(),
            h: at.int(2 * to.h)? / 2,
            w: at.int(2 * to.w)? / 2,
        };
        at.launch(Grid::cover(count, THREADS as u32), &arguments)
    }
}

pub(super) fn upsample2x_case(s: &mut Sampler) -> Case {
    let x = s.shape();
    let skip = s
        .chance(0.5)
        .then(|| Shape::new(x.n, 2 * x.h, 2 * x.w, s.extent(1, 5)));
    let beside = skip.map_or_else(String::new, |skip| format!(" beside {skip}"));
    let case = Case::new(format!("{x}{beside}"), |t, v| {
        Ok(vec![t.push(Upsample2x, v)?])
    });
    let inputs = [Some(("x", x)), skip.map(|skip| ("skip", skip))];
    inputs
        .into_iter()
        .flatten()
        .fold(case, |case, (name, shape)| {
            let values = s.values(shape.len(), -2.0, 2.0);
            case.with(name, shape, values).narrow()
        })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ops::concat::{Concat, SliceChannels};
    use crate::ops::{apply, apply_all};

    proptest! {
        #[test]
        fn pixels_are_interpolated_between_centres(
            n in 1..3usize, h in 1..6usize, w in 1..6usize, c in 1..40usize, seed in any::<u64>()
        ) {
            let shape = Shape::new(n, h, w, c);
            let x = Sampler::new(seed).values(shape.len(), -2.0, 2.0);
            let y = apply(Upsample2x, &[(shape, &x)]);
            // Position of an output pixel's centre in the input: its two neighbours, and its distance from the first.
            let place = |o: usize, size: usize| {
                let at = ((o as f64 + 0.5) / 2.0 - 0.5).clamp(0.0, (size - 1) as f64);
                (at.floor() as usize, (at.floor() as usize + 1).min(size - 1), at.fract())
            };
            for (i, &y) in y.iter().enumerate() {
                let (channel, pixel) = (i % c, i / c);
                let (column, row, image) = (pixel % (2 * w), pixel / (2 * w) % (2 * h), pixel / (4 * w * h));
                let x = |r: usize, s: usize| x[((image * h + r) * w + s) * c + channel];
                let (top, bottom, v) = place(row, h);
                let (left, right, u) = place(column, w);
                let expected = (1.0 - v) * ((1.0 - u) * x(top, left) + u * x(top, right))
                    + v * ((1.0 - u) * x(bottom, left) + u * x(bottom, right));
                prop_assert!((y - expected).abs() < 1e-14);
            }
        }

        /// Joined in one pass, bits and gradients are those of upsampling and concatenation.
        #[test]
        fn with_a_skip_connection_it_is_a_concatenation(
            n in 1..3usize, h in 1..6usize, w in 1..6usize, c in 1..40usize, s in 1..40usize, seed in any::<u64>()
        ) {
            let (x, skip) = (Shape::new(n, h, w, c), Shape::new(n, 2 * h, 2 * w, s));
            let values = |shape: Shape, k| Sampler::new(seed ^ k).values(shape.len(), -2.0, 2.0);
            let inputs = [(x, &values(x, 0)[..]), (skip, &values(skip, 1)[..])];
            let up = Shape { c, ..skip };
            let upsampled = apply(Upsample2x, &inputs[..1]);
            let joint = apply(Concat, &[inputs[1], (up, &upsampled)]);
            prop_assert_eq!(apply(Upsample2x, &inputs), joint);

            let both = Shape { c: s + c, ..skip };
            let dy = values(both, 2);
            let slice = |start, channels| apply(SliceChannels { start, channels }, &[(both, &dy)]);
            let dx = apply(Upsample2xGradient { c }, &[(up, &slice(s, c))]);
            let gradients = apply_all(Upsample2xGradient { c }, &[(both, &dy)]);
            prop_assert_eq!(gradients, [dx, slice(0, s)]);
        }
    }

    #[test]
    fn a_skip_connection_of_another_extent_is_named() {
        let error = Upsample2x.outputs(&[Shape::new(1, 2, 3, 4), Shape::new(1, 4, 5, 4)]);
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("1×4×5×4") && error.contains("1×4×6×4"),
            "{error}"
        );
    }
}
