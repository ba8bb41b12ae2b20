//! Bilinear upsampling by two.

use std::sync::Arc;

use rayon::prelude::*;

use super::pointwise::{THREADS, Units, extent};
use super::{Kernel, Op};
use crate::device::cpu::Io;
use crate::device::gpu::launch::{Grid, Launches, Stored, kernel};
use crate::device::simd::{self, Lanes};
use crate::error::Result;
use crate::gradcheck::{Case, Sampler};
use crate::tape::{Backward, Var};
use crate::tensor::{Real, Shape};

/// Twice the rows and columns by bilinear interpolation between pixel centres, the border repeated
/// (PyTorch's `align_corners = false`): N×H×W×C → N×2H×2W×C. Along each axis
/// `y[2i] = ¼x[i−1] + ¾x[i]` and `y[2i+1] = ¾x[i] + ¼x[i+1]`.
///
/// Passes over memory: reads `x`, writes `y`; the gradient gathers from `dy` and writes `dx`.
#[derive(Clone, Copy, Debug)]
pub struct Upsample2x;

impl<T: Real> Kernel<T> for Upsample2x {
    fn run(&self, io: &mut Io<'_, T>) {
        let (x, y) = (io.input(0), io.output(0));
        let Shape { h, w, c, .. } = io.input_shape(0);
        y.par_chunks_mut(2 * w * c)
            .enumerate()
            .for_each(|(row, y)| {
                let (image, row) = (row / (2 * h), row % (2 * h));
                let (near, far) = neighbours(row, h);
                let x = |i: usize| &x[(image * h + i) * w * c..][..w * c];
                simd::dispatch(Row {
                    near: x(near),
                    far: x(far),
                    c,
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

/// One row of the result from two rows of the input.
struct Row<'a, T> {
    near: &'a [T],
    far: &'a [T],
    c: usize,
    y: &'a mut [T],
}

impl<T: Real> simd::Kernel<T> for Row<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let (c, pixels) = (self.c, self.near.len() / self.c);
        let (less, more) = (L::splat(T::of(0.25)), L::splat(T::of(0.75)));
        for channel in (0..c).step_by(L::N) {
            let at = Channels { c, channel };
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
                let y = &mut self.y[2 * pixel * c..2 * (pixel + 1) * c];
                let (even, odd) = y.split_at_mut(c);
                let [even, odd] = [&mut even[channel..], &mut odd[channel..]];
                left.mul_add(less, most).store_first(even);
                right.mul_add(less, most).store_first(odd);
                (left, centre) = (centre, right);
            }
        }
    }
}

/// The lanes of a pixel of `c` channels from `channel` on.
#[derive(Clone, Copy)]
struct Channels {
    c: usize,
    channel: usize,
}

impl Channels {
    #[inline(always)]
    fn load<L: Lanes>(self, row: &[L::Elem], pixel: usize) -> L {
        L::load_first(&row[pixel * self.c..][self.channel..self.c])
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
        Ok(vec![Shape::new(n, 2 * h, 2 * w, c)])
    }
    fn flops(&self, _: &[Shape], outputs: &[Shape]) -> u64 {
        8 * outputs[0].len() as u64
    }
    fn rerun(&self, inputs: &[Var], _: &[Var]) -> Option<(Arc<dyn Op>, Vec<Var>)> {
        Some((Arc::new(*self), inputs.to_vec()))
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = at.gradient(0) else {
            return Ok(());
        };
        let dx = at.push(Upsample2xGradient, &[dy])?;
        at.set(0, dx)
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let (x, y, shape) = (at.input(0), at.output(0), at.input_shape(0));
        let units = Units::new(shape.c, &[y, x]);
        let count = shape.rows() * units.each;
        let arguments = UpsampleKernel {
            x: x.into(),
            y: y.into(),
            count: count as u64,
            units: extent(self.name(), units.each)?,
            vector: units.vector.into(),
            h: at.int(2 * shape.h)? / 2,
            w: at.int(2 * shape.w)? / 2,
        };
        at.launch(Grid::cover(count, THREADS as u32), &arguments)
    }
}

kernel! {
    struct UpsampleKernel = "upsample2x" {
        x: Stored, y: Stored, count: u64, units: u32, vector: i32, h: i32, w: i32
    }
}

kernel! {
    struct UpsampleGradientKernel = "upsample2x_gradient" {
        dy: Stored, dx: Stored, count: u64, units: u32, vector: i32, h: i32, w: i32
    }
}

/// Gradient of [`Upsample2x`]; input `dy`.
#[derive(Clone, Copy, Debug)]
struct Upsample2xGradient;

impl<T: Real> Kernel<T> for Upsample2xGradient {
    fn run(&self, io: &mut Io<'_, T>) {
        let (dy, dx) = (io.input(0), io.output(0));
        let Shape { h, w, c, .. } = io.output_shape(0);
        let wide = 2 * w * c;
        dx.par_chunks_mut(w * c).enumerate().for_each(|(row, dx)| {
            let (image, row) = (row / h, row % h);
            let rows = taps(row, h)
                .map(|(o, weight)| (&dy[(image * 2 * h + o) * wide..][..wide], T::of(weight)));
            simd::dispatch(GradientRow { rows, c, dx });
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

struct GradientRow<'a, T> {
    rows: [(&'a [T], T); 4],
    c: usize,
    dx: &'a mut [T],
}

impl<T: Real> simd::Kernel<T> for GradientRow<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let (c, pixels) = (self.c, self.dx.len() / self.c);
        let one = L::splat(T::of(1.0));
        let (less, more) = (L::splat(T::of(0.25)), L::splat(T::of(0.75)));
        for channel in (0..c).step_by(L::N) {
            let at = Channels { c, channel };
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
        Ok(vec![Shape::new(n, h / 2, w / 2, c)])
    }
    fn flops(&self, _: &[Shape], outputs: &[Shape]) -> u64 {
        40 * outputs[0].len() as u64
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let (dy, dx, shape) = (at.input(0), at.output(0), at.output_shape(0));
        let units = Units::new(shape.c, &[dx, dy]);
        let count = shape.rows() * units.each;
        let arguments = UpsampleGradientKernel {
            dy: dy.into(),
            dx: dx.into(),
            count: count as u64,
            units: extent(self.name(), units.each)?,
            vector: units.vector.into(),
            h: at.int(2 * shape.h)? / 2,
            w: at.int(2 * shape.w)? / 2,
        };
        at.launch(Grid::cover(count, THREADS as u32), &arguments)
    }
}

pub(super) fn upsample2x_case(s: &mut Sampler) -> Case {
    let shape = s.shape();
    Case::new(format!("{shape}"), |t, v| Ok(vec![t.push(Upsample2x, v)?]))
        .with("x", shape, s.values(shape.len(), -2.0, 2.0))
        .narrow()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ops::apply;

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
    }
}
