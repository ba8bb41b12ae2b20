//! Losses. Those of images give one value per image (`N×1×1×1`); [`WeightedMean`] makes a scalar of
//! them.
//!
//! Sums run over pieces of fixed size, in lanes of the element type for a few hundred elements and in
//! `f64` from there, and the pieces are added in order. So they do on a GPU (`kernels/losses.cu`).

use rayon::prelude::*;

use super::pointwise::{PIECE, Scale, same, sigmoid};
use super::{Kernel, Op};
use crate::device::cpu::Io;
use crate::device::gpu::launch::{Full, Grid, Launches, Pointer, Stored, kernel};
use crate::device::simd::{self, Lanes, MAX_LANES};
use crate::error::{Error, Result};
use crate::gradcheck::{Case, Sampler};
use crate::tape::Backward;
use crate::tensor::{Real, Shape};

/// Vectors that are added up before their sum moves on to `f64`.
const RUN: usize = 32;

/// What is summed over each image: `K` functions of two tensors' elements.
trait Terms<T: Real, const K: usize>: Copy + Send + Sync {
    fn at<L: Lanes<Elem = T>>(self, a: L, b: L) -> [L; K];
}

/// What is written for each element, given `K` numbers of its image.
trait Spread<T: Real, const K: usize>: Copy + Send + Sync {
    fn at<L: Lanes<Elem = T>>(self, image: [L; K], a: L, b: L) -> L;
}

fn pieces(shape: Shape) -> usize {
    (shape.len() / shape.n).div_ceil(PIECE)
}

/// Threads of a block in `kernels/losses.cu`, and elements that a block works on.
const THREADS: u32 = 256;
const DEVICE_PIECE: usize = 4096;

/// How a GPU's kernels see a batch: elements of an image, pieces of an image, blocks.
#[derive(Clone, Copy)]
pub(super) struct Pieces {
    pub len: i32,
    pub pieces: i32,
    pub grid: Grid,
}

impl Pieces {
    pub fn of(at: &Launches<'_>, shape: Shape) -> Result<Self> {
        let len = shape.len() / shape.n;
        let pieces = len.div_ceil(DEVICE_PIECE);
        Ok(Self {
            len: at.int(len)?,
            pieces: at.int(pieces)?,
            grid: Grid::new(shape.n * pieces, THREADS),
        })
    }

    /// Bytes of `sums` sums in `f64` for each piece of a batch.
    pub fn bytes(shape: Shape, sums: usize) -> usize {
        let pieces = (shape.len() / shape.n).div_ceil(DEVICE_PIECE);
        size_of::<f64>() * sums * shape.n * pieces
    }
}

/// One warp for each image.
pub(super) fn warp_per_image(shape: Shape) -> Grid {
    Grid::new(shape.n, 32)
}

kernel! {
    /// `y = Σ / len` for each image.
    struct ImageMeans = "image_means" { partial: Full, y: Full, len: i32, pieces: i32 }
}

/// Adds the pieces of each image up to its mean.
fn launch_means(at: &mut Launches<'_>, shape: Shape) -> Result<()> {
    let Pieces { len, pieces, .. } = Pieces::of(at, shape)?;
    let arguments = ImageMeans {
        partial: at.scratch().into(),
        y: at.output(0).into(),
        len,
        pieces,
    };
    at.launch(warp_per_image(shape), &arguments)
}

/// Whether targets are f32 beside logits in bf16, as labels are.
fn in_full(targets: Pointer, logits: Pointer) -> bool {
    logits.is_narrow() && !targets.is_narrow()
}

/// Calls `each` with every image's number and sums. `scratch` holds `n · pieces · K` elements.
fn sum_images<T: Real, const K: usize>(
    (a, b, shape): (&[T], &[T], Shape),
    scratch: &mut [T],
    terms: impl Terms<T, K>,
    mut each: impl FnMut(usize, [f64; K]),
) {
    let (image, pieces) = (shape.len() / shape.n, pieces(shape));
    let partial = &mut scratch[..shape.n * pieces * K];
    partial
        .par_chunks_mut(K)
        .enumerate()
        .for_each(|(i, partial)| {
            let (first, end) = (i / pieces * image, (i / pieces + 1) * image);
            let start = first + i % pieces * PIECE;
            let at = start..end.min(start + PIECE);
            let (a, b) = (&a[at.clone()], &b[at]);
            let sums = simd::dispatch(Sum { terms, a, b });
            partial.copy_from_slice(&sums.map(T::of));
        });
    for (n, partial) in partial.chunks_exact(pieces * K).enumerate() {
        let sum = |k| partial[k..].iter().step_by(K).map(|x: &T| x.wide()).sum();
        each(n, std::array::from_fn(sum));
    }
}

/// Sums of `terms` over the elements of two slices.
struct Sum<'a, T, F, const K: usize> {
    terms: F,
    a: &'a [T],
    b: &'a [T],
}

impl<T: Real, F: Terms<T, K>, const K: usize> simd::Kernel<T> for Sum<'_, T, F, K> {
    type Out = [f64; K];
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) -> [f64; K] {
        let mut total = [0.0; K];
        for (a, b) in self.a.chunks(RUN * L::N).zip(self.b.chunks(RUN * L::N)) {
            let mut sum = [L::zero(); K];
            for (a, b) in a.chunks_exact(L::N).zip(b.chunks_exact(L::N)) {
                let terms = self.terms.at(L::load(a), L::load(b));
                for (sum, term) in sum.iter_mut().zip(terms) {
                    *sum = *sum + term;
                }
            }
            for (total, sum) in total.iter_mut().zip(sum) {
                *total += sum.reduce_sum().wide();
            }
            // The lanes beyond the end hold terms too: of zeros, which need not be zero.
            let rest = a.len() % L::N;
            let at = a.len() - rest;
            let terms = (self.terms).at(L::load_first(&a[at..]), L::load_first(&b[at..]));
            for (total, term) in total.iter_mut().zip(terms) {
                let mut lanes = [T::zero(); MAX_LANES];
                term.store(&mut lanes);
                *total += lanes[..rest].iter().map(|x| x.wide()).sum::<f64>();
            }
        }
        total
    }
}

/// `y = f(image, a, b)` for each element of two tensors of one shape.
fn spread_images<T: Real, const K: usize>(
    (a, b, shape): (&[T], &[T], Shape),
    y: &mut [T],
    f: impl Spread<T, K>,
    image: impl Fn(usize) -> [T; K] + Sync,
) {
    let len = shape.len() / shape.n;
    y.par_chunks_mut(len).enumerate().for_each(|(n, y)| {
        let image = image(n);
        y.par_chunks_mut(PIECE).enumerate().for_each(|(i, y)| {
            let start = n * len + i * PIECE;
            let at = start..start + y.len();
            let (a, b) = (&a[at.clone()], &b[at]);
            simd::dispatch(Spreading { f, image, a, b, y });
        });
    });
}

struct Spreading<'a, T, F, const K: usize> {
    f: F,
    image: [T; K],
    a: &'a [T],
    b: &'a [T],
    y: &'a mut [T],
}

impl<T: Real, F: Spread<T, K>, const K: usize> simd::Kernel<T> for Spreading<'_, T, F, K> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let image = self.image.map(L::splat);
        let inputs = self.a.chunks(L::N).zip(self.b.chunks(L::N));
        for ((a, b), y) in inputs.zip(self.y.chunks_mut(L::N)) {
            let value = self.f.at(image, L::load_first(a), L::load_first(b));
            value.store_first(y);
        }
    }
}

/// Refuses tensors without elements, which have no mean.
pub(super) fn not_empty(op: &'static str, shape: Shape) -> Result<()> {
    if shape.is_empty() {
        let problem = format!("expected at least one image and pixel, found {shape}");
        return Err(Error::shape(op, problem));
    }
    Ok(())
}

/// The shape rule of a loss per image of two tensors.
fn per_image(op: &'static str, inputs: &[Shape]) -> Result<Vec<Shape>> {
    same(op, inputs)?;
    not_empty(op, inputs[0])?;
    Ok(vec![Shape::per_image(inputs[0].n, 1)])
}

/// The shape rule of its gradient, whose inputs are `dy` per image and the two tensors.
fn like_second(op: &'static str, inputs: &[Shape]) -> Result<Vec<Shape>> {
    let expected = per_image(op, &inputs[1..])?[0];
    if inputs[0] != expected {
        let problem = format!("expected a gradient of {expected}, found {}", inputs[0]);
        return Err(Error::shape(op, problem));
    }
    Ok(vec![inputs[1]])
}

/// Records `gradient` of `dy` and both inputs as the gradient of input 0.
fn backward_of_first(at: &mut Backward<'_>, gradient: impl Op + 'static) -> Result<()> {
    if let Some(dy) = at.gradient(0) {
        let gradient = at.push(gradient, &[dy, at.input(0), at.input(1)])?;
        at.set(0, gradient)?;
    }
    Ok(())
}

/// `ln(1 + e)` for `0 ≤ e ≤ 1`, to full relative accuracy: `2·artanh(e/(2 + e))` by its series, whose
/// argument is at most 1/3.
#[inline(always)]
fn ln_1p<L: Lanes>(e: L) -> L {
    let terms = if size_of::<L::Elem>() == 4 { 9 } else { 18 };
    let s = e / (e + L::splat(L::Elem::of(2.0)));
    let square = s * s;
    let mut sum = L::zero();
    for k in (0..terms).rev() {
        let coefficient = L::splat(L::Elem::of(2.0 / f64::from(2 * k + 1)));
        sum = sum.mul_add(square, coefficient);
    }
    s * sum
}

/// Mean over each image of the binary cross-entropy of logits `z` (input 0) against targets `g`
/// (input 1, of the same shape, in 0..=1, taken as constants): `max(z, 0) − z·g + ln(1 + e^−|z|)`,
/// which neither overflows nor cancels.
#[derive(Clone, Copy, Debug)]
pub struct BceWithLogits;

impl<T: Real> Terms<T, 1> for BceWithLogits {
    #[inline(always)]
    fn at<L: Lanes<Elem = T>>(self, z: L, g: L) -> [L; 1] {
        let positive = L::select(z.lt(L::zero()), L::zero(), z);
        [positive - z * g + ln_1p((-z.abs()).exp())]
    }
}

impl<T: Real> Kernel<T> for BceWithLogits {
    fn run(&self, io: &mut Io<'_, T>) {
        mean_images(io, *self);
    }
}

/// The mean over each image of one term per element.
fn mean_images<T: Real>(io: &mut Io<'_, T>, terms: impl Terms<T, 1>) {
    let shape = io.input_shape(0);
    let len = (shape.len() / shape.n) as f64;
    let (y, scratch) = (io.output(0), io.scratch());
    let inputs = (io.input(0), io.input(1), shape);
    sum_images(inputs, scratch, terms, |n, [sum]| y[n] = T::of(sum / len));
}

impl Op for BceWithLogits {
    fn name(&self) -> &'static str {
        "bce_with_logits"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        per_image(self.name(), inputs)
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        // exp 1, ln 1, the rest 6, sum 1
        9 * inputs[0].len() as u64
    }
    fn scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        inputs[0].n * pieces(inputs[0])
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        backward_of_first(at, BceGradient)
    }
    fn narrow(&self, _: usize, _: &[bool]) -> bool {
        false
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let shape = at.input_shape(0);
        let Pieces { len, pieces, grid } = Pieces::of(at, shape)?;
        let (a, b, partial) = (at.input(0), at.input(1), at.scratch().into());
        if in_full(b, a) {
            let (a, b) = (a.into(), b.into());
            at.launch(
                grid,
                &BceLabelSums {
                    a,
                    b,
                    partial,
                    len,
                    pieces,
                },
            )?;
        } else {
            let (a, b) = (a.into(), b.into());
            at.launch(
                grid,
                &BceSums {
                    a,
                    b,
                    partial,
                    len,
                    pieces,
                },
            )?;
        }
        launch_means(at, shape)
    }
    fn device_scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        Pieces::bytes(inputs[0], 1)
    }
}

kernel! {
    struct BceSums = "bce_sums" { a: Stored, b: Stored, partial: Full, len: i32, pieces: i32 }
}
kernel! {
    struct BceLabelSums = "bce_label_sums" { a: Stored, b: Full, partial: Full, len: i32, pieces: i32 }
}

/// `dz = dy·(σ(z) − g)/len`, written as `σ(z)(1 − g) − σ(−z)g` so that nothing cancels; inputs `dy`, `z`,
/// `g`.
#[derive(Clone, Copy, Debug)]
pub struct BceGradient;

impl<T: Real> Spread<T, 1> for BceGradient {
    #[inline(always)]
    fn at<L: Lanes<Elem = T>>(self, [scale]: [L; 1], z: L, g: L) -> L {
        let (s, t) = sigmoid(z);
        scale * (s * (L::splat(T::one()) - g) - t * g)
    }
}

impl<T: Real> Kernel<T> for BceGradient {
    fn run(&self, io: &mut Io<'_, T>) {
        let (dy, shape) = (io.input(0), io.input_shape(1));
        let scale = T::of(1.0 / (shape.len() / shape.n) as f64);
        let inputs = (io.input(1), io.input(2), shape);
        spread_images(inputs, io.output(0), *self, |n| [dy[n] * scale]);
    }
}

impl Op for BceGradient {
    fn name(&self) -> &'static str {
        "bce_gradient"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        like_second(self.name(), inputs)
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        10 * inputs[1].len() as u64
    }
    fn narrow(&self, _: usize, inputs: &[bool]) -> bool {
        inputs[1]
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let Pieces { len, pieces, grid } = Pieces::of(at, at.input_shape(1))?;
        let (dy, z, g, dz) = (at.input(0).into(), at.input(1), at.input(2), at.output(0));
        if in_full(g, z) {
            let (z, g, dz) = (z.into(), g.into(), dz.into());
            at.launch(
                grid,
                &BceLabelGradientKernel {
                    dy,
                    z,
                    g,
                    dz,
                    len,
                    pieces,
                },
            )
        } else {
            let (z, g, dz) = (z.into(), g.into(), dz.into());
            at.launch(
                grid,
                &BceGradientKernel {
                    dy,
                    z,
                    g,
                    dz,
                    len,
                    pieces,
                },
            )
        }
    }
}

kernel! {
    struct BceGradientKernel = "bce_gradient" {
        dy: Full, z: Stored, g: Stored, dz: Stored, len: i32, pieces: i32
    }
}
kernel! {
    struct BceLabelGradientKernel = "bce_label_gradient" {
        dy: Full, z: Stored, g: Full, dz: Stored, len: i32, pieces: i32
    }
}

/// `1 − (2Σmg + 1)/(Σm + Σg + 1)` of each image: one minus the Dice coefficient of soft masks `m` and
/// `g` (inputs 0 and 1, in 0..=1), smoothed so that two empty masks agree perfectly.
#[derive(Clone, Copy, Debug)]
pub struct SoftDice;

impl<T: Real> Terms<T, 2> for SoftDice {
    #[inline(always)]
    fn at<L: Lanes<Elem = T>>(self, m: L, g: L) -> [L; 2] {
        [m * g, m + g]
    }
}

impl<T: Real> Kernel<T> for SoftDice {
    fn run(&self, io: &mut Io<'_, T>) {
        let (y, scratch) = (io.output(0), io.scratch());
        let inputs = (io.input(0), io.input(1), io.input_shape(0));
        sum_images(inputs, scratch, *self, |n, [both, either]| {
            y[n] = T::of(1.0 - (2.0 * both + 1.0) / (either + 1.0));
        });
    }
}

impl Op for SoftDice {
    fn name(&self) -> &'static str {
        "soft_dice"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        per_image(self.name(), inputs)
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        4 * inputs[0].len() as u64
    }
    fn scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        2 * inputs[0].n * pieces(inputs[0])
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = at.gradient(0) else {
            return Ok(());
        };
        for (this, other) in [(0, 1), (1, 0)] {
            if at.wants(this) {
                let inputs = [dy, at.input(this), at.input(other)];
                let gradient = at.push(SoftDiceGradient, &inputs)?;
                at.set(this, gradient)?;
            }
        }
        Ok(())
    }
    fn narrow(&self, _: usize, _: &[bool]) -> bool {
        false
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        launch_dice_sums(at, 0)?;
        let shape = at.input_shape(0);
        let arguments = SoftDiceKernel {
            partial: at.scratch().into(),
            y: at.output(0).into(),
            pieces: Pieces::of(at, shape)?.pieces,
        };
        at.launch(warp_per_image(shape), &arguments)
    }
    fn device_scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        Pieces::bytes(inputs[0], 2)
    }
}

kernel! {
    struct DiceSums = "dice_sums" { a: Stored, b: Stored, partial: Full, len: i32, pieces: i32 }
}
kernel! {
    struct SoftDiceKernel = "soft_dice" { partial: Full, y: Full, pieces: i32 }
}

/// The sums over the pieces of the masks that are inputs `first` and following.
fn launch_dice_sums(at: &mut Launches<'_>, first: usize) -> Result<()> {
    let Pieces { len, pieces, grid } = Pieces::of(at, at.input_shape(first))?;
    let (a, b) = (at.input(first).into(), at.input(first + 1).into());
    let partial = at.scratch().into();
    at.launch(
        grid,
        &DiceSums {
            a,
            b,
            partial,
            len,
            pieces,
        },
    )
}

/// `dm = dy·(q − 2g)/(Σm + Σg + 1)` with `q = (2Σmg + 1)/(Σm + Σg + 1)`; inputs `dy`, `m`, `g`. The loss is
/// symmetric, so this serves both of its inputs.
#[derive(Clone, Copy, Debug)]
pub struct SoftDiceGradient;

impl<T: Real> Spread<T, 2> for SoftDiceGradient {
    #[inline(always)]
    fn at<L: Lanes<Elem = T>>(self, [q, scale]: [L; 2], _: L, g: L) -> L {
        scale * (q - (g + g))
    }
}

impl<T: Real> Kernel<T> for SoftDiceGradient {
    fn run(&self, io: &mut Io<'_, T>) {
        let (dy, shape) = (io.input(0), io.input_shape(1));
        let inputs = (io.input(1), io.input(2), shape);
        let (images, scratch) = io.scratch().split_at_mut(2 * shape.n);
        sum_images(inputs, scratch, SoftDice, |n, [both, either]| {
            images[2 * n] = T::of((2.0 * both + 1.0) / (either + 1.0));
            images[2 * n + 1] = T::of(dy[n].wide() / (either + 1.0));
        });
        spread_images(inputs, io.output(0), *self, |n| {
            [images[2 * n], images[2 * n + 1]]
        });
    }
}

impl Op for SoftDiceGradient {
    fn name(&self) -> &'static str {
        "soft_dice_gradient"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        like_second(self.name(), inputs)
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        7 * inputs[1].len() as u64
    }
    fn scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        2 * inputs[1].n * (1 + pieces(inputs[1]))
    }
    fn narrow(&self, _: usize, inputs: &[bool]) -> bool {
        inputs[1]
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        launch_dice_sums(at, 1)?;
        let Pieces { len, pieces, grid } = Pieces::of(at, at.input_shape(1))?;
        let arguments = DiceGradientKernel {
            dy: at.input(0).into(),
            g: at.input(2).into(),
            partial: at.scratch().into(),
            dm: at.output(0).into(),
            len,
            pieces,
        };
        at.launch(grid, &arguments)
    }
    fn device_scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        Pieces::bytes(inputs[1], 2)
    }
}

kernel! {
    struct DiceGradientKernel = "dice_gradient" {
        dy: Full, g: Stored, partial: Full, dm: Stored, len: i32, pieces: i32
    }
}

/// Mean of `(a − b)²` over each image.
#[derive(Clone, Copy, Debug)]
pub struct Mse;

impl<T: Real> Terms<T, 1> for Mse {
    #[inline(always)]
    fn at<L: Lanes<Elem = T>>(self, a: L, b: L) -> [L; 1] {
        let difference = a - b;
        [difference * difference]
    }
}

impl<T: Real> Kernel<T> for Mse {
    fn run(&self, io: &mut Io<'_, T>) {
        mean_images(io, *self);
    }
}

impl Op for Mse {
    fn name(&self) -> &'static str {
        "mse"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        per_image(self.name(), inputs)
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        3 * inputs[0].len() as u64
    }
    fn scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        inputs[0].n * pieces(inputs[0])
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = at.gradient(0) else {
            return Ok(());
        };
        let da = at.push(MseGradient, &[dy, at.input(0), at.input(1)])?;
        at.set(0, da)?;
        if at.wants(1) {
            let db = at.push(Scale { factor: -1.0 }, &[da])?;
            at.set(1, db)?;
        }
        Ok(())
    }
    fn narrow(&self, _: usize, _: &[bool]) -> bool {
        false
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let shape = at.input_shape(0);
        let Pieces { len, pieces, grid } = Pieces::of(at, shape)?;
        let (a, b) = (at.input(0).into(), at.input(1).into());
        let partial = at.scratch().into();
        at.launch(
            grid,
            &MseSums {
                a,
                b,
                partial,
                len,
                pieces,
            },
        )?;
        launch_means(at, shape)
    }
    fn device_scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        Pieces::bytes(inputs[0], 1)
    }
}

kernel! {
    struct MseSums = "mse_sums" { a: Stored, b: Stored, partial: Full, len: i32, pieces: i32 }
}

/// `da = dy·2(a − b)/len`; inputs `dy`, `a`, `b`.
#[derive(Clone, Copy, Debug)]
pub struct MseGradient;

impl<T: Real> Spread<T, 1> for MseGradient {
    #[inline(always)]
    fn at<L: Lanes<Elem = T>>(self, [scale]: [L; 1], a: L, b: L) -> L {
        scale * (a - b)
    }
}

impl<T: Real> Kernel<T> for MseGradient {
    fn run(&self, io: &mut Io<'_, T>) {
        let (dy, shape) = (io.input(0), io.input_shape(1));
        let scale = T::of(2.0 / (shape.len() / shape.n) as f64);
        let inputs = (io.input(1), io.input(2), shape);
        spread_images(inputs, io.output(0), *self, |n| [dy[n] * scale]);
    }
}

impl Op for MseGradient {
    fn name(&self) -> &'static str {
        "mse_gradient"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        like_second(self.name(), inputs)
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        2 * inputs[1].len() as u64
    }
    fn narrow(&self, _: usize, inputs: &[bool]) -> bool {
        inputs[1]
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let Pieces { len, pieces, grid } = Pieces::of(at, at.input_shape(1))?;
        let arguments = MseGradientKernel {
            dy: at.input(0).into(),
            a: at.input(1).into(),
            b: at.input(2).into(),
            da: at.output(0).into(),
            len,
            pieces,
        };
        at.launch(grid, &arguments)
    }
}

kernel! {
    struct MseGradientKernel = "mse_gradient" {
        dy: Full, a: Stored, b: Stored, da: Stored, len: i32, pieces: i32
    }
}

/// `Σwv / Σw`, a scalar, of values `v` (input 0) and constant weights `w ≥ 0` (input 1) per image, both
/// `N×1×1×1`; 0 where no weight is positive. Values of weight 0 are left out altogether, so that
/// padding may hold anything.
#[derive(Clone, Copy, Debug)]
pub struct WeightedMean;

/// `1/Σw`, or 0 if there is no weight.
pub(super) fn inverse_weight<T: Real>(w: &[T]) -> f64 {
    let sum: f64 = w.iter().map(|w| w.wide()).sum();
    if sum > 0.0 { 1.0 / sum } else { 0.0 }
}

impl<T: Real> Kernel<T> for WeightedMean {
    fn run(&self, io: &mut Io<'_, T>) {
        let (v, w) = (io.input(0), io.input(1));
        let terms = v.iter().zip(w).filter(|(_, w)| **w != T::zero());
        let sum: f64 = terms.map(|(v, w)| v.wide() * w.wide()).sum();
        io.output(0)[0] = T::of(sum * inverse_weight(w));
    }
}

impl Op for WeightedMean {
    fn name(&self) -> &'static str {
        "weighted_mean"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        not_empty(self.name(), inputs[0])?;
        let expected = Shape::per_image(inputs[0].n, 1);
        match inputs.iter().find(|&&s| s != expected) {
            Some(other) => {
                let problem = format!("expected one value per image, found {other}");
                Err(Error::shape(self.name(), problem))
            }
            None => Ok(vec![Shape::SCALAR]),
        }
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        3 * inputs[0].len() as u64
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        if let Some(dy) = at.gradient(0) {
            let gradient = at.push(WeightedMeanGradient, &[dy, at.input(1)])?;
            at.set(0, gradient)?;
        }
        Ok(())
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let arguments = WeightedMeanKernel {
            v: at.input(0).into(),
            w: at.input(1).into(),
            y: at.output(0).into(),
            n: at.int(at.input_shape(0).n)?,
        };
        at.launch(Grid::new(1, THREADS), &arguments)
    }
}

kernel! {
    struct WeightedMeanKernel = "weighted_mean" { v: Full, w: Full, y: Full, n: i32 }
}

/// `dv = dy·w/Σw`; inputs `dy`, `w`.
#[derive(Clone, Copy, Debug)]
pub struct WeightedMeanGradient;

impl<T: Real> Kernel<T> for WeightedMeanGradient {
    fn run(&self, io: &mut Io<'_, T>) {
        let (dy, w) = (io.input(0)[0], io.input(1));
        let scale = dy.wide() * inverse_weight(w);
        for (dv, w) in io.output(0).iter_mut().zip(w) {
            *dv = T::of(w.wide() * scale);
        }
    }
}

impl Op for WeightedMeanGradient {
    fn name(&self) -> &'static str {
        "weighted_mean_gradient"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        Ok(vec![inputs[1]])
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        2 * inputs[1].len() as u64
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let arguments = WeightedMeanGradientKernel {
            dy: at.input(0).into(),
            w: at.input(1).into(),
            dv: at.output(0).into(),
            n: at.int(at.input_shape(1).n)?,
        };
        at.launch(Grid::new(1, THREADS), &arguments)
    }
}

kernel! {
    struct WeightedMeanGradientKernel = "weighted_mean_gradient" {
        dy: Full, w: Full, dv: Full, n: i32
    }
}

/// Step of the finite differences: long, since one element moves the mean of an image only a little, and
/// all these functions are smooth at a scale of 1.
const STEP: f64 = 1e-3;

pub(super) fn bce_case(s: &mut Sampler) -> Case {
    let shape = s.shape();
    let case = Case::new(format!("{shape}"), |t, v| {
        Ok(vec![t.push(BceWithLogits, v)?])
    })
    .with("z", shape, s.values(shape.len(), -6.0, 6.0))
    .narrow()
    .with_constant("g", shape, s.values(shape.len(), 0.0, 1.0))
    .with_step(STEP);
    // Masks are stored as the logits, labels in full.
    if s.chance(0.5) { case.narrow() } else { case }
}

pub(super) fn soft_dice_case(s: &mut Sampler) -> Case {
    let shape = s.shape();
    Case::new(format!("{shape}"), |t, v| Ok(vec![t.push(SoftDice, v)?]))
        .with("m", shape, s.values(shape.len(), 0.0, 1.0))
        .narrow()
        .with("g", shape, s.values(shape.len(), 0.0, 1.0))
        .narrow()
        .with_step(STEP)
}

pub(super) fn mse_case(s: &mut Sampler) -> Case {
    let shape = s.shape();
    Case::new(format!("{shape}"), |t, v| Ok(vec![t.push(Mse, v)?]))
        .with("a", shape, s.values(shape.len(), -2.0, 2.0))
        .narrow()
        .with("b", shape, s.values(shape.len(), -2.0, 2.0))
        .narrow()
        .with_step(STEP)
}

pub(super) fn weighted_mean_case(s: &mut Sampler) -> Case {
    let shape = Shape::per_image(s.size(1, 9), 1);
    let mut weights = s.values(shape.n, 0.0, 1.0);
    let absent = s.chance(0.3);
    weights.iter_mut().for_each(|w| {
        if absent || s.chance(0.3) {
            *w = 0.0;
        }
    });
    Case::new(format!("{shape}, weights {weights:.2?}"), |t, v| {
        Ok(vec![t.push(WeightedMean, v)?])
    })
    .with("v", shape, s.values(shape.n, -2.0, 2.0))
    .with_constant("w", shape, weights)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::apply;

    struct Ln1p<'a, T>(&'a mut [T]);

    impl<T: Real> simd::Kernel<T> for Ln1p<'_, T> {
        type Out = ();
        #[inline(always)]
        fn run<L: Lanes<Elem = T>>(self) {
            for e in self.0.chunks_mut(L::N) {
                ln_1p(L::load_first(e)).store_first(e);
            }
        }
    }

    #[test]
    fn logarithms_are_accurate_from_zero_to_one() {
        let e: Vec<f64> = (0..=2000).map(|i| (-0.05 * f64::from(i)).exp()).collect();
        let mut found = e.clone();
        simd::dispatch(Ln1p(&mut found));
        let mut single: Vec<f32> = e.iter().map(|&e| e as f32).collect();
        simd::dispatch(Ln1p(&mut single));
        for i in 0..e.len() {
            approx::assert_relative_eq!(found[i], e[i].ln_1p(), max_relative = 1e-15);
            let exact = f64::from(e[i] as f32).ln_1p();
            approx::assert_relative_eq!(f64::from(single[i]), exact, max_relative = 4e-7);
        }
    }

    /// Images of several pieces whose last lanes are partial, against the formulas in plain `f64`.
    #[test]
    fn sums_hold_over_many_pieces() {
        let shape = Shape::new(3, 151, 149, 1);
        let len = shape.pixels();
        let mut s = Sampler::new(5);
        let z: Vec<f64> = s.values(shape.len(), -9.0, 9.0);
        let g: Vec<f64> = s.values(shape.len(), 0.0, 1.0);
        let inputs = [(shape, &z[..]), (shape, &g[..])];
        let (bce, dice) = (apply(BceWithLogits, &inputs), apply(SoftDice, &inputs));
        let mse = apply(Mse, &inputs);
        for n in 0..shape.n {
            let image = || (n * len..(n + 1) * len).map(|i| (z[i], g[i]));
            let mean = |f: fn((f64, f64)) -> f64| image().map(f).sum::<f64>() / len as f64;
            let expected = mean(|(z, g)| z.exp().ln_1p() - z * g);
            approx::assert_relative_eq!(bce[n], expected, max_relative = 1e-12);
            let expected = mean(|(z, g)| (z - g) * (z - g));
            approx::assert_relative_eq!(mse[n], expected, max_relative = 1e-12);
            let both: f64 = image().map(|(m, g)| m * g).sum();
            let either: f64 = image().map(|(m, g)| m + g).sum();
            let expected = 1.0 - (2.0 * both + 1.0) / (either + 1.0);
            approx::assert_relative_eq!(dice[n], expected, max_relative = 1e-12);
        }
    }

    #[test]
    fn cross_entropy_survives_extreme_logits() {
        let shape = Shape::per_channel(4);
        let one_image =
            |z: &[f32; 4], g: &[f32; 4]| apply(BceWithLogits, &[(shape, z), (shape, g)])[0];
        assert_eq!(
            one_image(&[-1e4, 1e4, 60.0, -60.0], &[0.0, 1.0, 1.0, 0.0]),
            8.756_511e-27 / 2.0
        );
        assert_eq!(
            one_image(&[1e4, -1e4, 1e4, -1e4], &[0.0, 1.0, 0.0, 1.0]),
            1e4
        );
        assert!(one_image(&[f32::NAN, 0.0, 0.0, 0.0], &[0.0; 4]).is_nan());
    }

    #[test]
    fn empty_masks_agree() {
        let shape = Shape::new(2, 1, 1, 3);
        let zeros = [0.0f32; 6];
        assert_eq!(
            apply(SoftDice, &[(shape, &zeros), (shape, &zeros)]),
            [0.0; 2]
        );
    }

    #[test]
    fn values_without_weight_do_not_count() {
        let shape = Shape::per_image(3, 1);
        let mean =
            |w: &[f32; 3]| apply(WeightedMean, &[(shape, &[f32::NAN, 2.0, 5.0]), (shape, w)]);
        assert_eq!(mean(&[0.0, 2.0, 1.0]), [3.0]);
        assert_eq!(mean(&[0.0; 3]), [0.0]);
        let gradient =
            |w: &[f32; 3]| apply(WeightedMeanGradient, &[(Shape::SCALAR, &[6.0]), (shape, w)]);
        assert_eq!(gradient(&[0.0, 2.0, 1.0]), [0.0, 4.0, 2.0]);
        assert_eq!(gradient(&[0.0; 3]), [0.0; 3]);
    }
}
