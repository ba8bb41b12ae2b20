//! Two-dimensional convolution and its gradients, on tensors `N×H×W×C` with weights `out×kh×kw×in`.
//!
//! [`Conv2d`] is the operation; a linear layer is the convolution with a 1×1 kernel of a 1×1 image
//! ([`Conv2d::linear`]). [`forward`], [`input_gradient`] and [`weight_gradient`] compute on slices.
//!
//! All three are direct: no matrix of patches is built. One micro-kernel (`tile`) holds a block of sums in
//! registers; `correlate` walks it over the output of a convolution or the input gradient, `weights` over the
//! weight gradient.

mod correlate;
pub(super) mod device;
mod geometry;
mod tile;
mod weights;

pub use geometry::{Geometry, forward, forward_with_statistics, input_gradient, weight_gradient};

use std::sync::atomic::{AtomicBool, Ordering};

use super::activation::{Activation, Epilogue};
use super::pointwise::SumTo;
use super::{Copied, Kernel, Op, norm, statistics};
use crate::device::cpu::Io;
use crate::device::gpu::launch::{Launches, Pointer};
use crate::device::simd::Level;
use crate::error::{Error, Result};
use crate::gradcheck::{Case, Sampler};
use crate::tape::Backward;
use crate::tensor::{Real, Shape};

/// `y = x ∗ w`, inputs `x` (`N×H×W×C`) and `w` (`out×kh×kw×C`); rows before columns in both parameters.
///
/// With `statistics`, the mean and the biased variance of each channel of `y` over the batch follow as outputs 1
/// and 2 (per channel, in full precision), for [`Normalize::of_batch`](super::batch_norm::Normalize): they are taken
/// while `y` is in cache, which saves batch normalisation a pass over it. They are those of `y` before it is rounded
/// to what it is stored as, except on a GPU where a convolution is computed from its definition (kernels larger
/// than 11×16, and images of 2³¹ elements): there, of `y` as stored. They have no derivative of their own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Conv2d {
    /// How far the kernel moves from one output pixel to the next.
    pub stride: [usize; 2],
    /// Zeros around the image, on either side.
    pub padding: [usize; 2],
    /// Whether mean and variance are taken.
    pub statistics: bool,
}

impl Conv2d {
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

    /// `y = x·wᵀ` for vectors `N×1×1×C` and weights `out×1×1×C`.
    pub const fn linear() -> Self {
        Self::new(1, 0)
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

impl<T: Real> Kernel<T> for Conv2d {
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

impl Op for Conv2d {
    fn name(&self) -> &'static str {
        "conv2d"
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
            geometry.forward_scratch()
        }
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let geometry = self.geometry(at.input_shape(0), at.input_shape(1))?;
        let pointers = [at.input(0), at.input(1), at.output(0)];
        let finish = device::Finish {
            statistics: self.statistics.then(|| [at.output(1), at.output(2)]),
            ..Default::default()
        };
        device::forward(at, &geometry, pointers, finish)
    }
    fn device_copy(&self, inputs: &[Shape], _: &[Shape]) -> Option<Copied> {
        let geometry = self.accepted(inputs[0], inputs[1]);
        copied(1, device::forward_copy(&geometry, self.statistics))
    }
    fn device_scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        device::forward_scratch(&self.accepted(inputs[0], inputs[1]), self.statistics)
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
        let bias = at.inputs() == 3 && at.wants(2);
        if at.wants(1) || bias {
            let op = Conv2dWeightGradient { geometry, bias };
            let gradients = at.push_all(op, &[x, dy])?;
            for (i, &gradient) in gradients.iter().enumerate() {
                at.set(1 + i, gradient)?;
            }
        }
        if at.wants(0) {
            let dx = at.push(Conv2dInputGradient { geometry }, &[w, dy])?;
            at.set(0, dx)?;
        }
        Ok(())
    }
}

/// `y = a(x ∗ w + b)`, inputs `x`, `w` as of [`Conv2d`] and `b` (per output channel): a layer with a bias, and in
/// inference a convolution with all that follows it, where normalisation is part of `w` and `b`. It has a gradient if
/// `a` is the identity.
///
/// Passes over memory: those of the convolution; bias and activation are applied while its sums are in cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Conv2dBias {
    /// The convolution.
    pub conv: Conv2d,
    /// Applied to the result.
    pub activation: Activation,
}

impl<T: Real> Kernel<T> for Conv2dBias {
    fn run(&self, io: &mut Io<'_, T>) {
        let geometry = self.conv.accepted(io.input_shape(0), io.input_shape(1));
        let (x, w) = (io.input(0), io.input(1));
        let epilogue = Epilogue {
            bias: io.input(2),
            activation: self.activation,
        };
        let (y, scratch) = (io.output(0), io.scratch());
        geometry::correlate(
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

impl Op for Conv2dBias {
    fn name(&self) -> &'static str {
        "conv2d_bias"
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
        let (x, w) = (at.input_shape(0), at.input_shape(1));
        let geometry = self.conv.geometry(x, w)?;
        let pointers = [at.input(0), at.input(1), at.output(0)];
        let finish = device::Finish {
            bias: Some(at.input(2)),
            activation: self.activation,
            statistics: None,
        };
        device::forward(at, &geometry, pointers, finish)
    }
    fn device_copy(&self, inputs: &[Shape], outputs: &[Shape]) -> Option<Copied> {
        self.conv.device_copy(inputs, outputs)
    }
    fn device_scratch(&self, inputs: &[Shape], outputs: &[Shape]) -> usize {
        self.conv.device_scratch(inputs, outputs)
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        if self.activation != Activation::Identity {
            let problem = "has no derivative with an activation";
            return Err(Error::shape(self.name(), problem));
        }
        self.conv.backward(at)
    }
}

/// The gradient of [`Conv2d`] for `x`; inputs `w`, `dy`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Conv2dInputGradient {
    /// Extents of the convolution.
    pub geometry: Geometry,
}

impl<T: Real> Kernel<T> for Conv2dInputGradient {
    fn run(&self, io: &mut Io<'_, T>) {
        let (w, dy) = (io.input(0), io.input(1));
        let (dx, scratch) = (io.output(0), io.scratch());
        input_gradient(Level::current(), &self.geometry, w, dy, dx, scratch);
    }
}

impl Op for Conv2dInputGradient {
    fn name(&self) -> &'static str {
        "conv2d_input_gradient"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        expect(
            self.name(),
            inputs,
            [self.geometry.w, self.geometry.output()],
        )?;
        Ok(vec![self.geometry.x])
    }
    fn flops(&self, _: &[Shape], _: &[Shape]) -> u64 {
        self.geometry.flops()
    }
    fn scratch(&self, _: &[Shape], _: &[Shape]) -> usize {
        self.geometry.input_gradient_scratch()
    }
    /// As the output's gradient.
    fn narrow(&self, _: usize, inputs: &[bool]) -> bool {
        inputs[1]
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let pointers = [at.input(0), at.input(1), at.output(0)];
        device::input_gradient(at, &self.geometry, pointers)
    }
    fn device_copy(&self, _: &[Shape], _: &[Shape]) -> Option<Copied> {
        copied(0, device::input_gradient_copy(&self.geometry))
    }
    fn device_scratch(&self, _: &[Shape], _: &[Shape]) -> usize {
        device::input_gradient_scratch(&self.geometry)
    }
}

/// The gradient of [`Conv2d`] for `w`, and of [`Conv2dBias`] for `b` as output 1; inputs `x`, `dy`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Conv2dWeightGradient {
    /// Extents of the convolution.
    pub geometry: Geometry,
    /// Whether there is a bias.
    pub bias: bool,
}

impl Conv2dWeightGradient {
    /// The sum that is the gradient of a bias.
    fn of_bias(&self) -> Option<SumTo> {
        let shape = Shape::per_channel(self.geometry.w.n);
        self.bias.then_some(SumTo { shape })
    }
}

impl<T: Real> Kernel<T> for Conv2dWeightGradient {
    fn run(&self, io: &mut Io<'_, T>) {
        let (x, dy) = (io.input(0), io.input(1));
        let (dw, scratch) = (io.output(0), io.scratch());
        weight_gradient(Level::current(), &self.geometry, x, dy, dw, scratch);
        if let Some(sum) = self.of_bias() {
            sum.compute(io.input_shape(1), dy, None, io.output(1), scratch);
        }
    }
}

impl Op for Conv2dWeightGradient {
    fn name(&self) -> &'static str {
        "conv2d_weight_gradient"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        expect(
            self.name(),
            inputs,
            [self.geometry.x, self.geometry.output()],
        )?;
        let bias = self.of_bias().map(|sum| sum.shape);
        Ok([self.geometry.w].into_iter().chain(bias).collect())
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        let bias = self.of_bias().map_or(0, |_| inputs[1].len() as u64);
        self.geometry.flops() + bias
    }
    fn scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        let bias = self.of_bias();
        let bias = bias.map_or(0, |sum| sum.scratch(&inputs[1..], &[sum.shape]));
        self.geometry.weight_gradient_scratch().max(bias)
    }
    /// Never: it is the gradient of a parameter.
    fn narrow(&self, _: usize, _: &[bool]) -> bool {
        false
    }
    fn device_scratch(&self, _: &[Shape], _: &[Shape]) -> usize {
        device::weight_gradient_scratch(&self.geometry, self.bias)
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let db = match self.bias {
            true => at.output(1),
            false => Pointer::NULL,
        };
        let pointers = [at.input(0), at.input(1), at.output(0), db];
        device::weight_gradient(at, &self.geometry, pointers)
    }
}

/// The copy of input `input` that takes `bytes`, if it takes any.
pub(super) fn copied(input: usize, bytes: usize) -> Option<Copied> {
    (bytes > 0).then_some(Copied { input, bytes })
}

/// The outputs of a convolution that gives `y`.
pub(super) fn outputs(op: &'static str, y: Shape, statistics: bool) -> Result<Vec<Shape>> {
    if !statistics {
        return Ok(vec![y]);
    }
    norm::enough(op, y)?;
    let vector = Shape::per_channel(y.c);
    Ok(vec![y, vector, vector])
}

/// Refuses inputs that do not have the extents that the convolution gives them.
pub(super) fn expect<const N: usize>(
    op: &'static str,
    inputs: &[Shape],
    expected: [Shape; N],
) -> Result<()> {
    if inputs == expected {
        Ok(())
    } else {
        Err(Error::shape(
            op,
            format!("expected {expected:?}, found {inputs:?}"),
        ))
    }
}

pub(super) fn conv2d_case(s: &mut Sampler) -> Case {
    // On devices, where kernels choose their tiles by it, some have many channels in place of many pixels.
    let wide = s.is_large() && s.chance(0.4);
    let mut axis = || {
        let (kernel, stride) = (s.size(1, 4), s.size(1, 3));
        let padding = s.size(0, kernel);
        let more = if wide { s.size(0, 16) } else { s.extent(0, 5) };
        // The smallest image that the kernel fits on, or a larger one.
        let extent = kernel.saturating_sub(2 * padding).max(1) + more;
        (kernel, stride, padding, extent)
    };
    let (kh, sh, ph, h) = axis();
    let (kw, sw, pw, w) = axis();
    let n = s.size(1, 3);
    let mut channels = || match wide {
        true if s.chance(0.3) => 128,
        true => s.size(17, 72),
        false => s.size(1, 4),
    };
    let (c, out) = (channels(), channels());
    let op = Conv2d {
        stride: [sh, sw],
        padding: [ph, pw],
        statistics: false,
    };
    case(s, op, Shape::new(n, h, w, c), Shape::new(out, kh, kw, c))
}

/// A convolution with statistics and the batch normalisation that takes them.
pub(super) fn conv2d_norm_case(s: &mut Sampler) -> Case {
    let (kernel, stride) = (2 * s.size(0, 1) + 1, s.size(1, 2));
    let op = Conv2d::new(stride, kernel / 2).with_statistics();
    // Of two values alone the gradient would now and then be the difference of almost equal numbers.
    let (n, c, out) = (s.size(2, 3), s.size(1, 4), s.extent(1, 4));
    let x = Shape::new(n, s.extent(1, 6), s.extent(3, 6), c);
    norm::case_of_batch(s, op, x, Shape::new(out, kernel, kernel, c))
}

/// A layer with a bias.
pub(super) fn conv2d_bias_case(s: &mut Sampler) -> Case {
    let kernel = s.size(1, 3);
    let conv = Conv2d::new(s.size(1, 2), kernel / 2);
    let (activation, c, out) = (Activation::Identity, s.size(1, 4), s.extent(1, 4));
    let extent = |s: &mut Sampler| kernel + s.extent(0, 5);
    let x = Shape::new(s.size(1, 3), extent(s), extent(s), c);
    let (w, b) = (Shape::new(out, kernel, kernel, c), Shape::per_channel(out));
    let op = Conv2dBias { conv, activation };
    Case::new(format!("{x} ∗ {w} + b, {conv:?}"), move |t, v| {
        Ok(vec![t.push(op, v)?])
    })
    .with("x", x, s.values(x.len(), -1.0, 1.0))
    .narrow()
    .with("w", w, s.narrow_values(w.len(), -1.0, 1.0))
    .with("b", b, s.values(b.len(), -1.0, 1.0))
}

/// Channels that fill wide tiles, few on one side so that the CPU is done in time; in a large case, of one tap, enough
/// pixels for the widest.
pub(super) fn conv2d_wide_case(s: &mut Sampler) -> Case {
    let kernel = if s.is_large() {
        1
    } else {
        2 * s.size(0, 1) + 1
    };
    let many = if s.chance(0.6) { (65, 128) } else { (33, 160) };
    let mut channels = [s.size(1, 8), s.size(many.0, many.1)];
    if s.chance(0.5) {
        channels.reverse();
    }
    let [c, out] = channels;
    let (low, high) = if s.is_large() { (128, 136) } else { (1, 24) };
    let x = Shape::new(2, s.size(low, high), s.size(low, high), c);
    let w = Shape::new(out, kernel, kernel, c);
    case(s, Conv2d::new(1, kernel / 2), x, w)
}

/// A convolution with all that follows it in inference.
pub(super) fn conv2d_inference_case(s: &mut Sampler) -> Case {
    let (kernel, stride) = (2 * s.size(0, 1) + 1, s.size(1, 2));
    let (n, c, out) = (s.size(1, 3), s.size(1, 9), s.extent(1, 8));
    let x = Shape::new(n, s.extent(1, 6), s.extent(1, 6), c);
    let conv = Conv2d::new(stride, kernel / 2);
    inference_case(s, x, Shape::new(out, kernel, kernel, c), |activation| {
        Conv2dBias { conv, activation }
    })
}

/// An operation on `x`, `w` and a bias, without a gradient.
pub(super) fn inference_case<O: Op + Copy + 'static>(
    s: &mut Sampler,
    x: Shape,
    w: Shape,
    op: impl Fn(Activation) -> O,
) -> Case {
    let op = op([Activation::Identity, Activation::Relu, Activation::Silu][s.size(0, 2)]);
    let b = Shape::per_channel(w.n);
    Case::new(format!("{x} ∗ {w} + b, {op:?}"), move |t, v| {
        Ok(vec![t.push(op, v)?])
    })
    .with_constant("x", x, s.values(x.len(), -1.0, 1.0))
    .narrow()
    .with_constant("w", w, s.narrow_values(w.len(), -1.0, 1.0))
    .with_constant("b", b, s.values(b.len(), -1.0, 1.0))
}

pub(super) fn linear_case(s: &mut Sampler) -> Case {
    let (n, c, out) = (s.size(1, 5), s.size(1, 9), s.size(1, 5));
    let w = Shape::new(out, 1, 1, c);
    case(s, Conv2d::linear(), Shape::per_image(n, c), w)
}

fn case(s: &mut Sampler, op: Conv2d, x: Shape, w: Shape) -> Case {
    let description = format!(
        "{x} ∗ {w}, stride {:?}, padding {:?}",
        op.stride, op.padding
    );
    Case::new(description, move |t, v| Ok(vec![t.push(op, v)?]))
        .with("x", x, s.values(x.len(), -1.0, 1.0))
        .narrow()
        .with("w", w, s.narrow_values(w.len(), -1.0, 1.0))
}

/// Cuts `extent` into as few pieces of at most `most` as will do, all of one size but the last, and gives that
/// size and the number of pieces.
fn pieces(extent: usize, most: usize) -> (usize, usize) {
    let size = extent.div_ceil(extent.div_ceil(most));
    (size, extent.div_ceil(size))
}

/// The part of `scratch` that begins with a cache line: a vector across two of them is loaded at half the speed.
/// Leaves out less than a line.
fn aligned<T>(scratch: &mut [T]) -> &mut [T] {
    let skip = scratch.as_ptr().align_offset(64).min(scratch.len());
    &mut scratch[skip..]
}

/// Tasks that run at once at most, each with a slab of its own. A fixed number, so that neither the size of the
/// scratch nor the cut into tasks depends on the machine.
const SLOTS: usize = 32;

/// Slabs for the tasks that are running.
struct Slabs<T> {
    start: Shared<T>,
    len: usize,
    count: usize,
    taken: [AtomicBool; SLOTS],
}

impl<T: Copy + Send> Slabs<T> {
    /// Cuts `scratch` into `count` slabs of `len` elements.
    fn new(scratch: &mut [T], count: usize, len: usize) -> Self {
        assert!(count <= SLOTS && count * len <= scratch.len());
        Self {
            start: Shared(scratch.as_mut_ptr()),
            len,
            count,
            taken: [const { AtomicBool::new(false) }; SLOTS],
        }
    }

    /// Lends a slab to `task`: the one that this thread had last, if it can, since that is in its cache.
    fn lend(&self, task: impl FnOnce(&mut [T])) {
        let mut slot = rayon::current_thread_index().unwrap_or(0) % self.count;
        while self.taken[slot].swap(true, Ordering::Acquire) {
            slot = (slot + 1) % self.count;
        }
        let _lent = Lent(&self.taken[slot]);
        // SAFETY: `new` saw that the slab lies in the scratch, and nobody else has it.
        task(unsafe { std::slice::from_raw_parts_mut(self.start.at(slot * self.len), self.len) });
    }
}

/// Gives a slab back, also when its task panics: the others wait for it.
struct Lent<'a>(&'a AtomicBool);

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// A pointer whose users write to places of their own.
#[derive(Clone, Copy)]
struct Shared<T>(*mut T);

// SAFETY: every user of a `Shared` justifies that its accesses overlap with nobody's.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// The place of element `index`.
    ///
    /// # Safety
    /// It must lie in the slice that the pointer was made from.
    #[inline(always)]
    unsafe fn at(self, index: usize) -> *mut T {
        // SAFETY: the caller's.
        unsafe { self.0.add(index) }
    }
}

#[cfg(test)]
mod tests;
