//! The mask head: everything the losses and the shape features need to know of the mask logits, in
//! one read forward, and one read and one write backward.
//!
//! For logits `z` and a ground truth `g` it stands for this composition, which the tests hold it to:
//!
//! - binary cross-entropy of `σ(z)` with `g`, the mean over an image's pixels;
//! - soft Dice loss `1 − (2Σσ(z)g + 1)/(Σσ(z) + Σg + 1)`;
//! - [`Moments`] of the sharpened mask `m = σ(κz)`;
//! - its perimeter ([`crate::features::perimeter()`]).
//!
//! An image is cut into bands of [`BAND`] rows, each a piece of parallel work that reads a halo of one
//! row (forward) or two (backward) beyond its own. Within a band rows stream through once: the
//! sigmoids of a row are computed, then Sobel's stencil for the row before it, then (backward) the
//! transposed stencil for the row before that. Only the last three rows of each are remembered, in
//! scratch that stays in the first-level cache.
//!
//! On a GPU (`kernels/mask_head.cu`) a band is a piece of some warp's columns, and rows are remembered in
//! registers.
//!
//! Single precision suffices because nothing large is summed in it: each column keeps `Σm`, `Σvm`
//! and `Σv²m` of one band, with `v` from the band's middle, and the moments are put together from
//! those in `f64`.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use rayon::prelude::*;

use super::moments::single_channel;
use super::{Kernel, Op};
use crate::device::cpu::Io;
use crate::device::gpu::launch::{Arguments, Full, Grid, Launches, Pointer, Stored, Word, kernel};
use crate::device::simd::{self, Lanes, MAX_LANES};
use crate::error::{Error, Result};
use crate::features::{EPSILON, Moments};
use crate::gradcheck::{Case, Sampler};
use crate::tape::Backward;
use crate::tensor::{Real, Shape};

/// Rows of one piece of parallel work.
pub const BAND: usize = 64;

/// Added to numerator and denominator of the Dice coefficient, so that two empty masks agree.
const DICE_SMOOTHING: f64 = 1.0;

/// Where a sigmoid is 0 or 1 to any precision. Stopping there keeps products with `e⁻ᶻ` out of the
/// subnormal numbers, with which processors are a hundred times slower.
const SATURATION: f64 = 60.0;

/// Logits and ground truth, both `N×H×W×1`, to five outputs:
///
/// 0. binary cross-entropy, `N×1×1×1`;
/// 1. soft Dice loss, `N×1×1×1`;
/// 2. `Σσ(z)g`, `Σσ(z)`, `Σg`, `N×1×1×3`, for the backward; a gradient on it is ignored;
/// 3. moments of `σ(κz)`, `N×1×1×7`;
/// 4. perimeter of `σ(κz)`, `N×1×1×1`.
///
/// The ground truth receives no gradient.
#[derive(Clone, Copy, Debug)]
pub struct MaskHead {
    /// `κ`, positive. 3 costs two multiplications, any other value an exponential a pixel.
    pub sharpness: f64,
}

impl Default for MaskHead {
    /// `κ = 3`: sharp enough that haze around a lesion does not reach the features.
    fn default() -> Self {
        Self { sharpness: 3.0 }
    }
}

/// What a band, and then an image, adds up to.
#[derive(Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
struct Sums {
    cross_entropy: f64,
    overlap: f64,
    predicted: f64,
    truth: f64,
    /// About the image's centre.
    moments: Moments,
    perimeter: f64,
}

/// Elements that hold a band's [`Sums`] in scratch of `f32` (in scratch of `f64`, twice).
const SUMS: usize = size_of::<Sums>() / size_of::<f32>();

/// Elements before the first pixel of a row buffer: zeros that the stencil reads.
const PAD: usize = MAX_LANES;

/// Row buffers of the forward pass, the first of them for the sums, and of the backward pass.
const FORWARD_ROWS: usize = 11;
const BACKWARD_ROWS: usize = 19;

/// Length of a row buffer: the padded frame's columns, rounded up to full vectors, and padding.
fn stride(width: usize) -> usize {
    (width + 2).next_multiple_of(MAX_LANES) + 2 * PAD
}

impl<T: Real> Kernel<T> for MaskHead {
    fn run(&self, io: &mut Io<'_, T>) {
        let shape = io.input_shape(0);
        let (logits, truth) = (io.input(0), io.input(1));
        let bands = shape.h.div_ceil(BAND);
        let block = FORWARD_ROWS * stride(shape.w);
        let scratch = &mut io.scratch()[..shape.n * bands * block];
        scratch
            .par_chunks_exact_mut(block)
            .enumerate()
            .for_each(|(piece, block)| {
                let (image, band) = (piece / bands, piece % bands);
                let pixels = image * shape.pixels()..(image + 1) * shape.pixels();
                let (sums, rows) = block.split_at_mut(stride(shape.w));
                let found = simd::dispatch(Forward {
                    logits: &logits[pixels.clone()],
                    truth: &truth[pixels],
                    shape,
                    band: band * BAND..shape.h.min((band + 1) * BAND),
                    sharpness: self.sharpness,
                    rows,
                });
                bytemuck::cast_slice_mut(&mut sums[..SUMS])[0] = found;
            });

        let outputs: [_; 5] = std::array::from_fn(|o| io.output(o));
        let [cross_entropy, dice, overlap, moments, perimeter] = outputs;
        for (image, blocks) in scratch.chunks_exact(bands * block).enumerate() {
            let mut sums = [0.0; size_of::<Sums>() / size_of::<f64>()];
            for block in blocks.chunks_exact(block) {
                let band: &[f64] = bytemuck::cast_slice(&block[..SUMS]);
                sums.iter_mut()
                    .zip(band)
                    .for_each(|(sum, band)| *sum += band);
            }
            let sums: Sums = bytemuck::cast(sums);
            cross_entropy[image] = T::of(sums.cross_entropy / shape.pixels() as f64);
            let union = sums.predicted + sums.truth + DICE_SMOOTHING;
            dice[image] = T::of(1.0 - (2.0 * sums.overlap + DICE_SMOOTHING) / union);
            let known = [sums.overlap, sums.predicted, sums.truth].map(T::of);
            overlap[3 * image..][..3].copy_from_slice(&known);
            sums.moments
                .about_centroid()
                .write(&mut moments[Moments::COUNT * image..][..Moments::COUNT]);
            perimeter[image] = T::of(sums.perimeter);
        }
    }
}

kernel! {
    /// Sums over the bands of each image.
    struct BandsKernel = "mask_head_bands" {
        logits: Stored, truth: Stored, partials: Full, pieces: u32,
        height: i32, width: i32, rows: i32, lanes: i32, sharpness: f32,
    }
}

kernel! {
    /// The outputs from those sums.
    struct FinishKernel = "mask_head_finish" {
        partials: Full, cross_entropy: Full, dice: Full, overlap: Full, moments: Full, perimeter: Full,
        images: u32, height: i32, width: i32, rows: i32, lanes: i32,
    }
}

kernel! {
    /// The gradient with respect to the logits.
    struct GradientKernel = "mask_head_gradient" {
        logits: Stored, truth: Stored, overlap: Full, moments: Full, dentropy: Full, ddice: Full,
        dmoments: Full, dperimeter: Full, dlogits: Stored, pieces: u32,
        height: i32, width: i32, rows: i32, lanes: i32, sharpness: f32,
    }
}

/// The same kernel for rows that cannot be read 16 bytes at a time.
struct Any<A>(A);

// SAFETY: the kernel takes the same parameters and touches the same memory.
unsafe impl Arguments for Any<BandsKernel> {
    const KERNEL: &'static str = "mask_head_bands_any";
    fn words(&self) -> Vec<Word> {
        self.0.words()
    }
}

// SAFETY: as above.
unsafe impl Arguments for Any<GradientKernel> {
    const KERNEL: &'static str = "mask_head_gradient_any";
    fn words(&self) -> Vec<Word> {
        self.0.words()
    }
}

/// Threads of a block in `kernels/mask_head.cu`, and columns of a lane.
const THREADS: usize = 128;
const COLUMNS: usize = 8;
/// Bytes of the sums of a piece.
const PIECE_BYTES: usize = 64;
/// Bands are as high as leaves this many warps, enough to keep a large GPU's memory busy. Rows of a
/// band's halo are computed twice, so bands are never very low; forward, sums of many rows lose digits.
const WARPS: usize = 1024;
const LOW: usize = 8;
const HIGH: usize = 32;
const HIGH_BACKWARD: usize = 64;

/// How `kernels/mask_head.cu` cuts up a batch: into pieces of `rows` rows and `lanes · COLUMNS` columns,
/// each for a group of `lanes` lanes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Cut {
    rows: usize,
    lanes: usize,
    pieces: usize,
}

impl Cut {
    /// With at most `rows` rows.
    fn of(shape: Shape, mut rows: usize) -> Self {
        // A group's first and last lane see to the columns beyond its strip: two lanes at least.
        let lanes = shape.w.div_ceil(COLUMNS).next_power_of_two().clamp(2, 32);
        let pieces = |rows| shape.n * shape.h.div_ceil(rows) * shape.w.div_ceil(COLUMNS * lanes);
        while rows > LOW && pieces(rows) * lanes < 32 * WARPS {
            rows /= 2;
        }
        Self {
            rows,
            lanes,
            pieces: pieces(rows),
        }
    }

    fn grid(self) -> Grid {
        Grid::cover(self.pieces * self.lanes, THREADS as u32)
    }
}

/// A size as kernels take it.
fn size<T: TryFrom<usize>>(op: &'static str, what: &str, value: usize) -> Result<T> {
    T::try_from(value)
        .map_err(|_| Error::shape(op, format!("{value} {what} are too many for a GPU")))
}

/// Whether rows can be read 16 bytes at a time.
fn is_aligned(width: usize, pointers: &[Pointer]) -> bool {
    width.is_multiple_of(COLUMNS) && pointers.iter().all(|p| p.is_aligned(16))
}

impl Op for MaskHead {
    fn name(&self) -> &'static str {
        "mask_head"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        let logits = single_channel(self.name(), inputs[0])?;
        if inputs[1] != logits {
            let problem = format!("logits {logits} with ground truth {}", inputs[1]);
            return Err(Error::shape(self.name(), problem));
        }
        Ok([1, 1, 3, Moments::COUNT, 1]
            .map(|c| Shape::per_image(logits.n, c))
            .to_vec())
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        70 * inputs[0].len() as u64
    }
    fn scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        let block = FORWARD_ROWS * stride(inputs[0].w);
        inputs[0].n * inputs[0].h.div_ceil(BAND) * block
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let mut inputs = vec![at.input(0), at.input(1), at.output(2), at.output(3)];
        for output in [0, 1, 3, 4] {
            inputs.push(at.gradient_or_zeros(output)?);
        }
        let gradient = MaskHeadGradient {
            sharpness: self.sharpness,
        };
        let gradient = at.push(gradient, &inputs)?;
        at.set(0, gradient)
    }
    fn narrow(&self, _: usize, _: &[bool]) -> bool {
        false
    }
    fn device_scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        Cut::of(inputs[0], HIGH).pieces * PIECE_BYTES
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let shape = at.input_shape(0);
        let cut = Cut::of(shape, HIGH);
        let height = size(self.name(), "rows", shape.h)?;
        let width = size(self.name(), "columns", shape.w)?;
        let (rows, lanes) = (cut.rows as i32, cut.lanes as i32);
        let (logits, truth) = (at.input(0), at.input(1));
        let bands = BandsKernel {
            logits: logits.into(),
            truth: truth.into(),
            partials: at.scratch().into(),
            pieces: size(self.name(), "bands of rows", cut.pieces)?,
            height,
            width,
            rows,
            lanes,
            sharpness: self.sharpness as f32,
        };
        if is_aligned(shape.w, &[logits, truth]) {
            at.launch(cut.grid(), &bands)?;
        } else {
            at.launch(cut.grid(), &Any(bands))?;
        }
        let finish = FinishKernel {
            partials: at.scratch().into(),
            cross_entropy: at.output(0).into(),
            dice: at.output(1).into(),
            overlap: at.output(2).into(),
            moments: at.output(3).into(),
            perimeter: at.output(4).into(),
            images: size(self.name(), "images", shape.n)?,
            height,
            width,
            rows,
            lanes,
        };
        at.launch(
            Grid::new(shape.n.div_ceil(THREADS / 32), THREADS as u32),
            &finish,
        )
    }
}

/// Gradient of [`MaskHead`] with respect to the logits; inputs logits, ground truth, the overlaps and
/// moments that [`MaskHead`] found, and the gradients of cross-entropy, Dice loss, moments and
/// perimeter.
#[derive(Clone, Copy, Debug)]
pub struct MaskHeadGradient {
    /// As [`MaskHead::sharpness`].
    pub sharpness: f64,
}

impl<T: Real> Kernel<T> for MaskHeadGradient {
    fn run(&self, io: &mut Io<'_, T>) {
        let shape = io.input_shape(0);
        let [
            logits,
            truth,
            overlap,
            moments,
            dentropy,
            ddice,
            dmoments,
            dperimeter,
        ] = std::array::from_fn(|i| io.input(i));
        let block = BACKWARD_ROWS * stride(shape.w);
        let (dlogits, scratch) = (io.output(0), io.scratch());
        dlogits
            .par_chunks_exact_mut(shape.pixels())
            .zip(scratch.par_chunks_exact_mut(shape.h.div_ceil(BAND) * block))
            .enumerate()
            .for_each(|(image, (dlogits, scratch))| {
                let pixels = image * shape.pixels()..(image + 1) * shape.pixels();
                let [overlap, predicted, truths] = [0, 1, 2].map(|k| overlap[3 * image + k].wide());
                let union = predicted + truths + DICE_SMOOTHING;
                let ddice = ddice[image].wide();
                let at = |x: &[T]| Moments::read(&x[Moments::COUNT * image..][..Moments::COUNT]);
                let coefficients = Coefficients {
                    cross_entropy: dentropy[image].wide() / shape.pixels() as f64,
                    overlap: -2.0 * ddice / union,
                    predicted: (2.0 * overlap + DICE_SMOOTHING) * ddice / (union * union),
                    centroid: at(moments).centroid(),
                    moments: at(dmoments),
                    perimeter: dperimeter[image].wide(),
                };
                dlogits
                    .par_chunks_mut(BAND * shape.w)
                    .zip(scratch.par_chunks_exact_mut(block))
                    .enumerate()
                    .for_each(|(band, (dlogits, rows))| {
                        simd::dispatch(Gradient {
                            logits: &logits[pixels.clone()],
                            truth: &truth[pixels.clone()],
                            shape,
                            band: band * BAND..shape.h.min((band + 1) * BAND),
                            sharpness: self.sharpness,
                            coefficients,
                            dlogits,
                            rows,
                        });
                    });
            });
    }
}

impl Op for MaskHeadGradient {
    fn name(&self) -> &'static str {
        "mask_head_gradient"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        Ok(vec![inputs[0]])
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        90 * inputs[0].len() as u64
    }
    fn scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        let block = BACKWARD_ROWS * stride(inputs[0].w);
        inputs[0].n * inputs[0].h.div_ceil(BAND) * block
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let shape = at.input_shape(0);
        let cut = Cut::of(shape, HIGH_BACKWARD);
        let (logits, truth, dlogits) = (at.input(0), at.input(1), at.output(0));
        let gradient = GradientKernel {
            logits: logits.into(),
            truth: truth.into(),
            overlap: at.input(2).into(),
            moments: at.input(3).into(),
            dentropy: at.input(4).into(),
            ddice: at.input(5).into(),
            dmoments: at.input(6).into(),
            dperimeter: at.input(7).into(),
            dlogits: dlogits.into(),
            pieces: size(self.name(), "bands of rows", cut.pieces)?,
            height: size(self.name(), "rows", shape.h)?,
            width: size(self.name(), "columns", shape.w)?,
            rows: cut.rows as i32,
            lanes: cut.lanes as i32,
            sharpness: self.sharpness as f32,
        };
        if is_aligned(shape.w, &[logits, truth, dlogits]) {
            at.launch(cut.grid(), &gradient)
        } else {
            at.launch(cut.grid(), &Any(gradient))
        }
    }
}

/// `σ(z)` and `σ(κz)` of a vector of logits.
struct Sigmoids<L> {
    negative: L,
    /// `1 + e^−|z|`, whose logarithm is what cross-entropy adds to its linear part.
    one_plus: L,
    plain: L,
    /// `σ(−z)`, from `e^−|z|` and so exact where `1 − σ` is not.
    complement: L,
    sharp: L,
    /// `σ'(κz)`, without the factor κ.
    sharp_slope: L,
}

impl<L: Lanes> Sigmoids<L> {
    #[inline(always)]
    fn of(z: L, sharpness: f64) -> Self {
        let constant = |c: f64| L::splat(L::Elem::of(c));
        let one = constant(1.0);
        // Selections that keep a NaN, so that it reaches the loss.
        let at_most = |x: L, c: f64| L::select(constant(c).lt(x), constant(c), x);
        let at_least = |x: L, c: f64| L::select(x.lt(constant(c)), constant(c), x);
        let size = z.abs();
        let e = (-at_most(size, SATURATION)).exp();
        let sharp_e = if sharpness == 3.0 {
            let e = at_least(e, (-SATURATION / 3.0).exp());
            e * e * e
        } else {
            (-at_most(size * constant(sharpness), SATURATION)).exp()
        };
        // Both reciprocals from one division.
        let (one_plus, sharp_one_plus) = (one + e, one + sharp_e);
        let reciprocal = one / (one_plus * sharp_one_plus);
        let (upper, sharp_upper) = (reciprocal * sharp_one_plus, reciprocal * one_plus);
        let (lower, sharp_lower) = (e * upper, sharp_e * sharp_upper);
        let is_negative = z.lt(L::zero());
        Self {
            negative: L::select(is_negative, one, L::zero()),
            one_plus,
            plain: L::select(is_negative, lower, upper),
            complement: L::select(is_negative, upper, lower),
            sharp: L::select(is_negative, sharp_lower, sharp_upper),
            sharp_slope: sharp_upper * sharp_lower,
        }
    }
}

/// Lanes from `from[at..]`, filled up with `fill` beyond its end.
#[inline(always)]
fn load_filled<L: Lanes>(from: &[L::Elem], at: usize, fill: f64) -> L {
    let from = &from[at..];
    if from.len() >= L::N {
        return L::load(from);
    }
    let mut lanes = [L::Elem::of(fill); MAX_LANES];
    lanes[..from.len()].copy_from_slice(from);
    L::load(&lanes)
}

/// Splits scratch into row buffers.
#[inline(always)]
fn split<const N: usize, T>(rows: &mut [T], width: usize) -> [&mut [T]; N] {
    let mut rows = rows.chunks_exact_mut(stride(width));
    std::array::from_fn(|_| rows.next().expect("scratch holds a buffer per row"))
}

/// The horizontal halves of Sobel's two stencils along the row `mask`, for the vector at column
/// `frame` of the padded frame: `m₋ + 2m + m₊` and `m₊ − m₋`.
#[inline(always)]
fn halves<L: Lanes>(mask: &[L::Elem], frame: usize) -> (L, L) {
    let left = L::load(&mask[PAD + frame - 2..]);
    let here = L::load(&mask[PAD + frame - 1..]);
    let right = L::load(&mask[PAD + frame..]);
    let two = L::splat(L::Elem::of(2.0));
    (here.mul_add(two, left + right), right - left)
}

/// `∑ log xᵢ` of factors in [1, 2], as the logarithm of products.
struct LogProduct<L> {
    product: L,
    factors: usize,
    log: f64,
}

impl<L: Lanes> LogProduct<L> {
    /// Vectors that may be multiplied before the product has to be taken: 2¹²⁰ fits `f32` in each
    /// lane, 2¹⁰⁰⁰ fits `f64` over all lanes.
    const LIMIT: usize = if 1000 / L::N < 120 { 1000 / L::N } else { 120 };

    #[inline(always)]
    fn new() -> Self {
        Self {
            product: L::splat(L::Elem::of(1.0)),
            factors: 0,
            log: 0.0,
        }
    }

    /// Makes room for `factors` more.
    #[inline(always)]
    fn reserve(&mut self, factors: usize) {
        if self.factors + factors > Self::LIMIT {
            let mut lanes = [L::Elem::of(1.0); MAX_LANES];
            self.product.store(&mut lanes);
            let product: f64 = lanes.iter().map(|x| x.wide()).product();
            *self = Self {
                log: self.log + product.ln(),
                ..Self::new()
            };
        }
        self.factors += factors;
    }

    #[inline(always)]
    fn finish(mut self) -> f64 {
        self.reserve(Self::LIMIT + 1);
        self.log
    }
}

/// One band of the forward pass.
struct Forward<'a, T> {
    logits: &'a [T],
    truth: &'a [T],
    shape: Shape,
    band: Range<usize>,
    sharpness: f64,
    rows: &'a mut [T],
}

impl<T: Real> simd::Kernel<T> for Forward<'_, T> {
    type Out = Sums;

    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) -> Sums {
        let (width, height) = (self.shape.w, self.shape.h as isize);
        let band = self.band.start as isize..self.band.end as isize;
        let [mask, s0, s1, s2, d0, d1, d2, column0, column1, column2] = split(self.rows, width);
        for row in [&mut *mask, &mut *column0, &mut *column1, &mut *column2] {
            row.fill(T::zero());
        }
        let (mut smooth, mut difference) = ([s0, s1, s2], [d0, d1, d2]);
        let constant = |c: f64| L::splat(T::of(c));
        let softening = constant(8.0 * EPSILON);
        let middle = (self.band.start + self.band.end - 1) as f64 / 2.0;

        // Sums of sums of rows: the error of a long sum in f32 is that of its longest chain.
        let mut totals = [L::zero(); 6];
        let mut logs = LogProduct::<L>::new();
        // The frame's first and last row belong to the first and last band.
        let first = if band.start == 0 { -1 } else { band.start };
        let last = if band.end == height {
            height
        } else {
            band.end - 1
        };
        for y in first - 1..=last + 1 {
            let mut sums = [L::zero(); 6];
            let [linear, overlap, predicted, truths, energy, perimeter] = &mut sums;
            if !(0..height).contains(&y) {
                mask.fill(T::zero());
            } else {
                let row = y as usize * width..(y as usize + 1) * width;
                let (z, g) = (&self.logits[row.clone()], &self.truth[row]);
                if band.contains(&y) {
                    let v = constant(y as f64 - middle);
                    for start in (0..width).step_by(LogProduct::<L>::LIMIT * L::N) {
                        let end = width.min(start + LogProduct::<L>::LIMIT * L::N);
                        logs.reserve((end - start).div_ceil(L::N));
                        for x in (start..end).step_by(L::N) {
                            let (z, g) = (
                                load_filled::<L>(z, x, -SATURATION),
                                load_filled::<L>(g, x, 0.0),
                            );
                            let at = Sigmoids::of(z, self.sharpness);
                            logs.product = logs.product * at.one_plus;
                            // max(z, 0) − z·g
                            *linear = z.mul_add(constant(1.0) - at.negative - g, *linear);
                            *overlap = at.plain.mul_add(g, *overlap);
                            *predicted = *predicted + at.plain;
                            *truths = *truths + g;
                            let m = at.sharp;
                            *energy = m.mul_add(m, *energy);
                            let vm = v * m;
                            (L::load(&column0[x..]) + m).store(&mut column0[x..]);
                            (L::load(&column1[x..]) + vm).store(&mut column1[x..]);
                            vm.mul_add(v, L::load(&column2[x..]))
                                .store(&mut column2[x..]);
                            m.store(&mut mask[PAD + x..]);
                        }
                    }
                } else {
                    for x in (0..width).step_by(L::N) {
                        let z = load_filled::<L>(z, x, -SATURATION);
                        Sigmoids::of(z, self.sharpness)
                            .sharp
                            .store(&mut mask[PAD + x..]);
                    }
                }
            }
            smooth.rotate_left(1);
            difference.rotate_left(1);
            let complete = y > first;
            for frame in (0..width + 2).step_by(L::N) {
                let (s, d) = halves::<L>(mask, frame);
                s.store(&mut smooth[2][frame..]);
                d.store(&mut difference[2][frame..]);
                if complete {
                    let above = L::load(&difference[0][frame..]);
                    let here = L::load(&difference[1][frame..]);
                    let gx = here.mul_add(constant(2.0), above + d);
                    let gy = s - L::load(&smooth[0][frame..]);
                    let length = gx.mul_add(gx, gy.mul_add(gy, softening * softening)).sqrt();
                    *perimeter = *perimeter + (length - softening);
                }
            }
            for (total, sum) in totals.iter_mut().zip(sums) {
                *total = *total + sum;
            }
        }

        let [linear, overlap, predicted, truth, energy, perimeter] = totals.map(|lanes| {
            let mut elements = [T::zero(); MAX_LANES];
            lanes.store(&mut elements);
            elements.iter().map(|x| x.wide()).sum::<f64>()
        });
        let y = middle - (height as f64 - 1.0) / 2.0;
        let mut moments = Moments {
            energy,
            ..Moments::default()
        };
        let (mut m1, mut m2, mut mx1) = (0.0, 0.0, 0.0);
        for i in 0..width {
            let x = i as f64 - (width as f64 - 1.0) / 2.0;
            let [c0, c1, c2] = [&*column0, &*column1, &*column2].map(|column| column[i].wide());
            moments.area += c0;
            moments.x += x * c0;
            moments.xx += x * x * c0;
            m1 += c1;
            mx1 += x * c1;
            m2 += c2;
        }
        // From the band's middle to the image's.
        moments.y = m1 + y * moments.area;
        moments.yy = m2 + y * (2.0 * m1 + y * moments.area);
        moments.xy = mx1 + y * moments.x;
        Sums {
            cross_entropy: linear + logs.finish(),
            overlap,
            predicted,
            truth,
            moments,
            perimeter: perimeter / 8.0,
        }
    }
}

/// The derivative of the loss with respect to an image's sums, and the mask's centroid.
#[derive(Clone, Copy)]
struct Coefficients {
    cross_entropy: f64,
    overlap: f64,
    predicted: f64,
    centroid: (f64, f64),
    moments: Moments,
    perimeter: f64,
}

/// One band of the backward pass.
struct Gradient<'a, T> {
    logits: &'a [T],
    truth: &'a [T],
    shape: Shape,
    band: Range<usize>,
    sharpness: f64,
    coefficients: Coefficients,
    /// The band's rows only.
    dlogits: &'a mut [T],
    rows: &'a mut [T],
}

impl<T: Real> simd::Kernel<T> for Gradient<'_, T> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let (width, height) = (self.shape.w, self.shape.h as isize);
        let band = self.band.start as isize..self.band.end as isize;
        let [
            mask,
            coordinate,
            u,
            v,
            s0,
            s1,
            s2,
            d0,
            d1,
            d2,
            x0,
            x1,
            x2,
            y0,
            y1,
            y2,
            w0,
            w1,
            w2,
        ] = split(self.rows, width);
        mask.fill(T::zero());
        let (mut smooth, mut difference) = ([s0, s1, s2], [d0, d1, d2]);
        let (mut across, mut along) = ([x0, x1, x2], [y0, y1, y2]);
        let mut weight = [w0, w1, w2];
        let constant = |c: f64| L::splat(T::of(c));
        let softening = constant(8.0 * EPSILON);

        let c = self.coefficients;
        let (cx, cy) = c.centroid;
        for (i, u) in coordinate[..width].iter_mut().enumerate() {
            *u = T::of(i as f64 - (width as f64 - 1.0) / 2.0 - cx);
        }
        // Without a gradient on the perimeter, as below the gate, there is no stencil and no halo.
        let stencil = c.perimeter != 0.0;
        let halo = if stencil { 2 } else { 0 };
        for y in band.start - halo..band.end + halo {
            weight.rotate_left(1);
            if !(0..height).contains(&y) {
                mask.fill(T::zero());
            } else {
                let row = y as usize * width..(y as usize + 1) * width;
                let (z, g) = (&self.logits[row.clone()], &self.truth[row]);
                if band.contains(&y) {
                    let dz = &mut self.dlogits[(y - band.start) as usize * width..][..width];
                    // A quadratic in x for each row.
                    let from_centre = y as f64 - (height as f64 - 1.0) / 2.0;
                    let below = from_centre - cy;
                    let m = c.moments;
                    let level = m.area + m.x * cx + m.y * from_centre + m.yy * below * below;
                    let level = constant(level);
                    let slope = constant(m.x + m.xy * below);
                    let curvature = constant(m.xx);
                    let energy = constant(2.0 * m.energy);
                    let entropy = constant(c.cross_entropy);
                    let overlap = constant(c.overlap);
                    let predicted = constant(c.predicted);
                    let sharpness = constant(self.sharpness);
                    let perimeter = constant(-c.perimeter / 8.0);
                    for x in (0..width).step_by(L::N) {
                        let (z, g) = (
                            load_filled::<L>(z, x, -SATURATION),
                            load_filled::<L>(g, x, 0.0),
                        );
                        let at = Sigmoids::of(z, self.sharpness);
                        let u = L::load(&coordinate[x..]);
                        let by_mask = curvature
                            .mul_add(u, slope)
                            .mul_add(u, energy.mul_add(at.sharp, level));
                        let by_plain = overlap.mul_add(g, predicted) * (at.plain * at.complement);
                        // σ(z) − g in a form in which a truth of 1 cancels nothing.
                        let excess = at.plain.mul_add(constant(1.0) - g, -(at.complement * g));
                        let sharp_slope = at.sharp_slope * sharpness;
                        let d = by_mask.mul_add(sharp_slope, entropy.mul_add(excess, by_plain));
                        d.store_first(&mut dz[x..]);
                        if stencil {
                            at.sharp.store(&mut mask[PAD + x..]);
                            (sharp_slope * perimeter).store(&mut weight[2][x..]);
                        }
                    }
                } else {
                    for x in (0..width).step_by(L::N) {
                        let z = load_filled::<L>(z, x, -SATURATION);
                        Sigmoids::of(z, self.sharpness)
                            .sharp
                            .store(&mut mask[PAD + x..]);
                    }
                }
            }
            if !stencil {
                continue;
            }
            smooth.rotate_left(1);
            difference.rotate_left(1);
            across.rotate_left(1);
            along.rotate_left(1);
            // Unit normals of the row above, then their transposed stencil for the row above that.
            let normals = y >= band.start;
            let finish = y >= band.start + 2;
            for frame in (0..width + 2).step_by(L::N) {
                let (s, d) = halves::<L>(mask, frame);
                s.store(&mut smooth[2][frame..]);
                d.store(&mut difference[2][frame..]);
                if normals {
                    let above = L::load(&difference[0][frame..]);
                    let here = L::load(&difference[1][frame..]);
                    let gx = here.mul_add(constant(2.0), above + d);
                    let gy = s - L::load(&smooth[0][frame..]);
                    let length = gx.mul_add(gx, gy.mul_add(gy, softening * softening)).sqrt();
                    let reciprocal = constant(1.0) / length;
                    (gx * reciprocal).store(&mut u[frame..]);
                    (gy * reciprocal).store(&mut v[frame..]);
                }
            }
            if normals {
                let above = (y - 2 - band.start).max(0) as usize;
                let dz = &mut self.dlogits[above * width..][..width];
                for x in (0..width).step_by(L::N) {
                    let across_here = L::load(&u[x + 2..]) - L::load(&u[x..]);
                    let left = L::load(&v[x..]);
                    let here = L::load(&v[x + 1..]);
                    let right = L::load(&v[x + 2..]);
                    let along_here = here.mul_add(constant(2.0), left + right);
                    across_here.store(&mut across[2][x..]);
                    along_here.store(&mut along[2][x..]);
                    if finish {
                        let first = L::load(&across[0][x..]);
                        let second = L::load(&across[1][x..]);
                        let divergence = second.mul_add(constant(2.0), first + across_here)
                            + (along_here - L::load(&along[0][x..]));
                        let d =
                            divergence.mul_add(L::load(&weight[0][x..]), L::load_first(&dz[x..]));
                        d.store_first(&mut dz[x..]);
                    }
                }
            }
        }
    }
}

pub(super) fn case(s: &mut Sampler) -> Case {
    // Tall enough now and then for several bands, with a narrow last one.
    let tall = s.chance(0.1);
    let (low, high) = if tall {
        (BAND + 1, 2 * BAND + 2)
    } else {
        (1, 9)
    };
    let shape = Shape::new(
        s.size(1, 2),
        s.extent(low, high),
        s.extent(1, if tall { 3 } else { 19 }),
        1,
    );
    let sharpness = if s.chance(0.5) {
        3.0
    } else {
        s.uniform(0.5, 4.0)
    };
    let mut case = Case::new(format!("{shape}, sharpness {sharpness}"), move |t, v| {
        let mut outputs = t.push_all(MaskHead { sharpness }, v)?;
        outputs.remove(2);
        Ok(outputs)
    })
    .with("logits", shape, s.values(shape.len(), -3.0, 3.0))
    .narrow()
    .with_constant("truth", shape, s.values(shape.len(), 0.0, 1.0))
    .narrow();
    // The sums are large, and the softening of the perimeter is not reached by random masks.
    case.step = 1e-4;
    case
}
