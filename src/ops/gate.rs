//! Gating: a feature map times the logistic function of logits that its pixels or its channels share, as in
//! squeeze-and-excite (Hu, Shen, Sun 2018) and attention gates (Oktay et al. 2018).

use std::sync::Arc;

use rayon::prelude::*;

use super::pointwise::{THREADS, Units, Walk, extent, grid, rows_of_piece, sigmoid};
use super::rows::{Lanewise, Rows};
use super::{Cost, Kernel, Op};
use crate::device::cpu::Io;
use crate::device::gpu::launch::{Full, Grid, Launches, Stored, kernel};
use crate::device::simd::{self, Lanes};
use crate::error::{Error, Result};
use crate::gradcheck::{Case, Sampler};
use crate::tape::{Backward, Var};
use crate::tensor::{Real, Shape};

/// Pixels whose gates are computed at once.
const PIXELS: usize = 64;

/// `y = x·σ(z)`, inputs `x` (N×H×W×C) and `z`, one logit per image and channel (N×1×1×C) or per pixel
/// (N×H×W×1).
///
/// Passes over memory: reads `x`, writes `y` (in place where `x` is not read again). The gradient reads `x` and
/// `dy` once, for `dx = dy·σ(z)` (over `dy` where it can) and `dz = σ(z)·σ(−z)·Σ dy·x` together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gate;

/// Who shares a logit.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shared {
    /// The pixels of a channel in an image.
    Channel,
    /// The channels of a pixel.
    Pixel,
}

fn shared(x: Shape, z: Shape) -> Option<Shared> {
    if z == Shape::per_image(x.n, x.c) {
        Some(Shared::Channel)
    } else if z == (Shape { c: 1, ..x }) {
        Some(Shared::Pixel)
    } else {
        None
    }
}

/// `σ(z)` and `σ(−z)` for one number.
fn gate<T: Real>(z: T) -> [T; 2] {
    let e = (-z.abs()).exp();
    let large = (T::one() + e).recip();
    if z < T::zero() {
        [e * large, large]
    } else {
        [large, e * large]
    }
}

impl<T: Real> Kernel<T> for Gate {
    fn run(&self, io: &mut Io<'_, T>) {
        let (shape, z) = (io.input_shape(0), io.input(1));
        let x = (!io.in_place()).then(|| io.input(0));
        let (y, tables) = (io.output(0), io.scratch());
        match shared(shape, io.input_shape(1)) {
            Some(Shared::Channel) => {
                let rows = Rows::of_images(shape);
                rows.tables(tables, |n, c| [gate(z[n * shape.c + c])[0]]);
                rows.map(Times, [x], tables, y);
            }
            _ => {
                let pixels = rows_of_piece(shape.c);
                let len = pixels * shape.c;
                let pieces = y.par_chunks_mut(len).zip(z.par_chunks(pixels));
                pieces.enumerate().for_each(|(i, (y, z))| {
                    let x = x.map(|x| &x[i * len..][..y.len()]);
                    simd::dispatch(ByPixel { x, z, y });
                });
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Times;

impl Lanewise<1, 1, 1> for Times {
    #[inline(always)]
    fn at<L: Lanes>(self, [x]: [L; 1], [gate]: [L; 1]) -> [L; 1] {
        [x * gate]
    }
}

/// `y = x·σ(z)` with one `z` per pixel; `y = y·σ(z)` where there is no `x`.
struct ByPixel<'a, T> {
    x: Option<&'a [T]>,
    z: &'a [T],
    y: &'a mut [T],
}

impl<T: Real> simd::Kernel<T> for ByPixel<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let c = self.y.len() / self.z.len();
        let mut gates = [[T::zero(); PIXELS]; 2];
        for (strip, (y, z)) in (self.y.chunks_mut(PIXELS * c))
            .zip(self.z.chunks(PIXELS))
            .enumerate()
        {
            gates_of::<L>(z, &mut gates);
            let x = self.x.map(|x| &x[strip * PIXELS * c..][..y.len()]);
            for (pixel, y) in y.chunks_exact_mut(c).enumerate() {
                let gate = L::splat(gates[0][pixel]);
                for channel in (0..c).step_by(L::N) {
                    let y = &mut y[channel..];
                    let x = match x {
                        Some(x) => L::load_first(&x[pixel * c + channel..(pixel + 1) * c]),
                        None => L::load_first(y),
                    };
                    (x * gate).store_first(y);
                }
            }
        }
    }
}

/// `σ(z)` and `σ(−z)` of at most [`PIXELS`] logits.
#[inline(always)]
fn gates_of<L: Lanes>(z: &[L::Elem], gates: &mut [[L::Elem; PIXELS]; 2]) {
    let [open, closed] = gates;
    for (i, z) in z.chunks(L::N).enumerate() {
        let (s, t) = sigmoid(L::load_first(z));
        s.store_first(&mut open[i * L::N..]);
        t.store_first(&mut closed[i * L::N..]);
    }
}

impl Op for Gate {
    fn name(&self) -> &'static str {
        "gate"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        let (x, z) = (inputs[0], inputs[1]);
        if shared(x, z).is_some() {
            return Ok(vec![x]);
        }
        let (channel, pixel) = (Shape::per_image(x.n, x.c), Shape { c: 1, ..x });
        let problem = format!("expected logits of {channel} or {pixel} for {x}, found {z}");
        Err(Error::shape(self.name(), problem))
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        (inputs[0].len() + 5 * inputs[1].len()) as u64
    }
    fn in_place(&self) -> Option<usize> {
        Some(0)
    }
    fn scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        match shared(inputs[0], inputs[1]) {
            Some(Shared::Channel) => Rows::of_images(inputs[0]).tables_len(1),
            _ => 0,
        }
    }
    fn rerun(&self, inputs: &[Var], _: &[Var]) -> Option<(Arc<dyn Op>, Vec<Var>)> {
        Some((Arc::new(*self), inputs.to_vec()))
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = at.gradient(0) else {
            return Ok(());
        };
        let gradients = at.push_all(GateGradient, &[dy, at.input(0), at.input(1)])?;
        (0..2).try_for_each(|i| at.set(i, gradients[i]))
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let (x, z, y) = (at.input(0), at.input(1), at.output(0));
        let shape = at.input_shape(0);
        let len = shape.len() as u64;
        let channels = extent(self.name(), shape.c)?;
        match shared(shape, at.input_shape(1)) {
            Some(Shared::Channel) => {
                let arguments = GateRows {
                    x: x.into(),
                    z: z.address(),
                    z_narrow: z.is_narrow().into(),
                    y: y.into(),
                    len,
                    channels,
                    rows: shape.pixels() as u64,
                };
                at.launch(grid(shape.len(), y), &arguments)
            }
            _ => {
                let arguments = GatePixels {
                    x: x.into(),
                    z: z.address(),
                    z_narrow: z.is_narrow().into(),
                    y: y.into(),
                    len,
                    channels,
                };
                at.launch(grid(shape.len(), y), &arguments)
            }
        }
    }
}

kernel! {
    struct GateRows = "gate_rows" {
        x: Stored, z: u64, z_narrow: i32, y: Stored, len: u64, channels: u32, rows: u64
    }
}

kernel! {
    struct GatePixels = "gate_pixels" {
        x: Stored, z: u64, z_narrow: i32, y: Stored, len: u64, channels: u32
    }
}

kernel! {
    struct GateRowsGradient = "gate_rows_gradient" {
        dy: Stored,
        x: u64,
        x_narrow: i32,
        z: u64,
        z_narrow: i32,
        dx: Stored,
        sums: Full,
        len: u64,
        channels: u32,
        stride: u32,
        strips: u32,
        pieces: u32,
        steps: u32,
    }
}

kernel! {
    struct GateRowsLogitsGradient = "gate_rows_logits_gradient" {
        partials: Full, z: Stored, dz: Stored, channels: u32, strips: u32, pieces: u32
    }
}

kernel! {
    struct GatePixelsGradient = "gate_pixels_gradient" {
        dy: Stored,
        x: u64,
        x_narrow: i32,
        z: u64,
        z_narrow: i32,
        dx: Stored,
        dz: u64,
        dz_narrow: i32,
        pixels: u64,
        units: u32,
        vector: i32,
        lanes: i32,
    }
}

/// Gradient of [`Gate`]; inputs `dy`, `x`, `z`, outputs `dx`, `dz`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct GateGradient;

impl<T: Real> Kernel<T> for GateGradient {
    fn run(&self, io: &mut Io<'_, T>) {
        let (shape, x, z) = (io.input_shape(1), io.input(1), io.input(2));
        let dy = (!io.in_place()).then(|| io.input(0));
        let (dx, dz, scratch) = (io.output(0), io.output(1), io.scratch());
        match shared(shape, io.input_shape(2)) {
            Some(Shared::Channel) => {
                let rows = Rows::of_images(shape);
                let (tables, sums) = scratch.split_at_mut(rows.tables_len(1));
                rows.tables(tables, |n, c| [gate(z[n * shape.c + c])[0]]);
                rows.map_sum(TimesAndProduct, [dy, Some(x)], tables, dx, sums);
                for (i, (dz, &z)) in dz.iter_mut().zip(z).enumerate() {
                    let [open, closed] = gate(z);
                    *dz = open * closed * sums[rows.total::<1>(i / shape.c, 0, i % shape.c)];
                }
            }
            _ => {
                let pixels = rows_of_piece(shape.c);
                let len = pixels * shape.c;
                let pieces = dx.par_chunks_mut(len).zip(dz.par_chunks_mut(pixels));
                pieces.enumerate().for_each(|(i, (dx, dz))| {
                    let at = i * len..i * len + dx.len();
                    simd::dispatch(ByPixelGradient {
                        dy: dy.map(|dy| &dy[at.clone()]),
                        x: &x[at],
                        z: &z[i * pixels..][..dz.len()],
                        dx,
                        dz,
                    });
                });
            }
        }
    }
}

#[derive(Clone, Copy)]
struct TimesAndProduct;

impl Lanewise<2, 1, 2> for TimesAndProduct {
    #[inline(always)]
    fn at<L: Lanes>(self, [dy, x]: [L; 2], [gate]: [L; 1]) -> [L; 2] {
        [dy * gate, dy * x]
    }
}

struct ByPixelGradient<'a, T> {
    /// Where there is none, `dx` holds it.
    dy: Option<&'a [T]>,
    x: &'a [T],
    z: &'a [T],
    dx: &'a mut [T],
    dz: &'a mut [T],
}

impl<T: Real> simd::Kernel<T> for ByPixelGradient<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let c = self.x.len() / self.z.len();
        let mut gates = [[T::zero(); PIXELS]; 2];
        for (pixel, (dz, x)) in self.dz.iter_mut().zip(self.x.chunks_exact(c)).enumerate() {
            let slot = pixel % PIXELS;
            if slot == 0 {
                let end = self.z.len().min(pixel + PIXELS);
                gates_of::<L>(&self.z[pixel..end], &mut gates);
            }
            let gate = L::splat(gates[0][slot]);
            let mut sum = L::zero();
            for channel in (0..c).step_by(L::N) {
                let at = pixel * c + channel..(pixel + 1) * c;
                let dx = &mut self.dx[at.clone()];
                let dy = L::load_first(self.dy.map_or(&*dx, |dy| &dy[at]));
                sum = dy.mul_add(L::load_first(&x[channel..]), sum);
                (dy * gate).store_first(dx);
            }
            *dz = gates[0][slot] * gates[1][slot] * sum.reduce_sum();
        }
    }
}

impl Op for GateGradient {
    fn name(&self) -> &'static str {
        "gate_gradient"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        Ok(inputs[1..].to_vec())
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        (3 * inputs[1].len() + 7 * inputs[2].len()) as u64
    }
    fn cost(&self, inputs: &[Shape], outputs: &[Shape]) -> Cost {
        Cost {
            flops: self.flops(inputs, outputs),
            elements: (3 * inputs[1].len() + 2 * inputs[2].len()) as u64,
        }
    }
    fn in_place(&self) -> Option<usize> {
        Some(0)
    }
    fn scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        match shared(inputs[1], inputs[2]) {
            Some(Shared::Channel) => {
                let rows = Rows::of_images(inputs[1]);
                rows.tables_len(1) + rows.sums_len(1)
            }
            _ => 0,
        }
    }
    /// Each gradient as what it belongs to, but `dx` as `dy`, which it may overwrite.
    fn narrow(&self, output: usize, inputs: &[bool]) -> bool {
        inputs[[0, 2][output]]
    }
    fn device_scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        match shared(inputs[1], inputs[2]) {
            Some(Shared::Channel) => Walk::scratch(inputs[1].n, inputs[1]),
            _ => 0,
        }
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let (dy, x, z) = (at.input(0), at.input(1), at.input(2));
        let (dx, dz, shape) = (at.output(0), at.output(1), at.input_shape(1));
        if shape.is_empty() {
            return Ok(());
        }
        let extent = |n| extent(self.name(), n);
        match shared(shape, at.input_shape(2)) {
            Some(Shared::Channel) => {
                let walk = Walk::over(shape.n, shape, dy.is_narrow());
                let arguments = GateRowsGradient {
                    dy: dy.into(),
                    x: x.address(),
                    x_narrow: x.is_narrow().into(),
                    z: z.address(),
                    z_narrow: z.is_narrow().into(),
                    dx: dx.into(),
                    sums: at.scratch().into(),
                    len: walk.len as u64,
                    channels: extent(shape.c)?,
                    stride: extent(walk.stride)?,
                    strips: extent(walk.strips)?,
                    pieces: extent(walk.pieces)?,
                    steps: extent(walk.steps)?,
                };
                at.launch(walk.grid(), &arguments)?;
                let strips = shape.c.div_ceil(32);
                let arguments = GateRowsLogitsGradient {
                    partials: at.scratch().into(),
                    z: z.into(),
                    dz: dz.into(),
                    channels: extent(shape.c)?,
                    strips: extent(strips)?,
                    pieces: extent(walk.pieces)?,
                };
                at.launch(Grid::new(shape.n * strips, THREADS as u32), &arguments)
            }
            _ => {
                let units = Units::new(shape.c, &[dx, dy, x]);
                let lanes = units.each.next_power_of_two().min(32);
                let arguments = GatePixelsGradient {
                    dy: dy.into(),
                    x: x.address(),
                    x_narrow: x.is_narrow().into(),
                    z: z.address(),
                    z_narrow: z.is_narrow().into(),
                    dx: dx.into(),
                    dz: dz.address(),
                    dz_narrow: dz.is_narrow().into(),
                    pixels: shape.rows() as u64,
                    units: extent(units.each)?,
                    vector: units.vector.into(),
                    lanes: at.int(lanes)?,
                };
                at.launch(
                    Grid::cover(shape.rows() * lanes, THREADS as u32),
                    &arguments,
                )
            }
        }
    }
}

pub(super) fn case(s: &mut Sampler) -> Case {
    let x = s.shape();
    let z = [Shape::per_image(x.n, x.c), Shape { c: 1, ..x }][s.size(0, 1)];
    Case::new(format!("{x} with {z}"), |t, v| Ok(vec![t.push(Gate, v)?]))
        .with("x", x, s.values(x.len(), -2.0, 2.0))
        .narrow()
        .with("z", z, s.values(z.len(), -6.0, 6.0))
        .narrow()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::{Element, Session};
    use crate::ops::pointwise::{Mul, Sigmoid};
    use crate::tape::{Plan, Tape};

    /// `y`, `dx` and `dz` for `dy` = 1, 2, 3, 1, 2, 3, …
    fn replay<T: Element>(fused: bool, shapes: [Shape; 2], values: &[Vec<f64>; 2]) -> [Vec<T>; 3] {
        let mut tape = Tape::new();
        let [x, z] = shapes.map(|s| tape.input("input", s));
        let y = if fused {
            tape.push(Gate, &[x, z]).unwrap()
        } else {
            let gate = tape.push(Sigmoid, &[z]).unwrap();
            tape.push(Mul, &[x, gate]).unwrap()
        };
        let dy = tape.input("dy", shapes[0]);
        let gradients = tape.backward_from(&[(y, dy)], &[x, z]).unwrap();
        let results = [y, gradients[0].unwrap(), gradients[1].unwrap()];
        results.iter().for_each(|&v| tape.keep(v));
        let mut session = Session::<T>::new(Plan::new(&tape, Default::default()).unwrap()).unwrap();
        for (var, values) in [x, z].into_iter().zip(values) {
            let values: Vec<T> = values.iter().map(|&v| T::of(v)).collect();
            session.write(var, &values);
        }
        let ramp = session.values_mut(dy).iter_mut().enumerate();
        ramp.for_each(|(i, dy)| *dy = T::of((i % 3 + 1) as f64));
        session.run();
        results.map(|v| session.read(v).to_vec())
    }

    fn close<T: Real>(found: &[T], expected: &[f64], tolerance: f64) {
        let largest = expected.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        assert_eq!(found.len(), expected.len());
        for (i, (a, b)) in found.iter().zip(expected).enumerate() {
            assert!(
                (a.wide() - b).abs() <= tolerance * largest,
                "{i}: {a} for {b}"
            );
        }
    }

    /// Shapes that need several pieces, strips and partial vectors.
    const LARGE: [Shape; 4] = [
        Shape::new(2, 131, 127, 1),
        Shape::new(3, 47, 61, 7),
        Shape::new(2, 33, 29, 64),
        Shape::new(2, 19, 21, 150),
    ];

    #[test]
    fn gates_per_channel_equal_sigmoid_and_product() {
        for x in LARGE {
            let z = Shape::per_image(x.n, x.c);
            let mut s = Sampler::new(5);
            let values = [s.values(x.len(), -2.0, 2.0), s.values(z.len(), -6.0, 6.0)];
            let expected = replay::<f64>(false, [x, z], &values);
            let double = replay::<f64>(true, [x, z], &values);
            let single = replay::<f32>(true, [x, z], &values);
            for ((expected, double), single) in expected.iter().zip(&double).zip(&single) {
                close(double, expected, 1e-13);
                close(single, expected, 1e-6);
            }
        }
    }

    #[test]
    fn gates_per_pixel_follow_their_definition() {
        for x in LARGE {
            let z = Shape { c: 1, ..x };
            let mut s = Sampler::new(6);
            let values = [s.values(x.len(), -2.0, 2.0), s.values(z.len(), -6.0, 6.0)];
            let open = |i: usize| 1.0 / (1.0 + (-values[1][i / x.c]).exp());
            let dy = |i: usize| (i % 3 + 1) as f64;
            let of = |f: &dyn Fn(usize) -> f64| (0..x.len()).map(f).collect::<Vec<f64>>();
            let mut dz = vec![0.0; z.len()];
            let slope = |i: usize| open(i) * (1.0 - open(i));
            (0..x.len()).for_each(|i| dz[i / x.c] += dy(i) * values[0][i] * slope(i));
            let expected = [
                of(&|i| values[0][i] * open(i)),
                of(&|i| dy(i) * open(i)),
                dz,
            ];
            let double = replay::<f64>(true, [x, z], &values);
            let single = replay::<f32>(true, [x, z], &values);
            for ((expected, double), single) in expected.iter().zip(&double).zip(&single) {
                close(double, expected, 1e-13);
                close(single, expected, 1e-6);
            }
        }
    }

    #[test]
    fn logits_that_do_not_fit_are_named() {
        let x = Shape::new(2, 3, 4, 5);
        for wrong in [x, Shape::per_channel(5), Shape::new(2, 3, 1, 1)] {
            let error = Gate.outputs(&[x, wrong]).unwrap_err().to_string();
            assert!(error.starts_with("gate: ") && error.contains(&wrong.to_string()));
        }
    }
}
