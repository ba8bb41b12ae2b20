//! Operations on single elements.
//!
//! Broadcasting is of one kind only: in [`Add`] and [`Mul`], the second operand may have one value per
//! channel (`1×1×1×C`) or per image and channel (`N×1×1×C`).
//!
//! Costs count a comparison, a division and an exponential as one operation each.

use std::fmt::Debug;
use std::marker::PhantomData;
use std::sync::Arc;

use rayon::prelude::*;

use super::{Kernel, Op};
use crate::device::cpu::Io;
use crate::device::gpu::launch::{
    Argument, Arguments, Full, Grid, Launches, Pointer, Stored, Word, kernel,
};
use crate::device::simd::{self, Lanes};
use crate::error::{Error, Result};
use crate::gradcheck::{Case, Sampler};
use crate::tape::{Backward, Var};
use crate::tensor::{Real, Shape};

/// Elements of one piece of parallel work: a fixed size, so that results cannot depend on threads.
pub(super) const PIECE: usize = 1 << 14;

/// Elements that loops over rows of few channels handle at a time, as a whole number of rows.
const WIDTH: usize = 64;

/// Threads of a block of `kernels/pointwise.cu` and `reduce.cu`, and bytes of each tensor that a thread moves
/// at a time.
pub(super) const THREADS: usize = 256;
const BYTES: usize = 16;

/// Such moves of a thread of `kernels/pointwise.cu`.
const VECTORS: usize = 2;

/// Elements that a thread moves at a time.
pub(super) fn width(narrow: bool) -> usize {
    BYTES / if narrow { 2 } else { 4 }
}

/// How threads share out the channels of a pixel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Units {
    /// Units of a pixel.
    pub each: usize,
    /// Whether a unit is what a thread moves at a time; else it is one channel.
    pub vector: bool,
}

impl Units {
    /// For `channels` channels stored as those of the first of `pointers`, all of which are read or written.
    pub fn new(channels: usize, pointers: &[Pointer]) -> Self {
        let width = width(pointers[0].is_narrow());
        let aligned = pointers
            .iter()
            .all(|pointer| pointer.is_aligned(BYTES as u64));
        let vector = aligned && channels.is_multiple_of(width);
        let each = if vector { channels / width } else { channels };
        Self { each, vector }
    }
}

/// Blocks for `moves` moves.
pub(super) fn grid_of_moves(moves: usize) -> Grid {
    Grid::new(moves.div_ceil(VECTORS * THREADS), THREADS as u32)
}

/// Blocks for `len` elements stored as those of `pointer`.
pub(crate) fn grid(len: usize, pointer: Pointer) -> Grid {
    grid_of_moves(len.div_ceil(width(pointer.is_narrow())))
}

/// What has kernels of its own name, one for each type of storage.
pub(super) trait Named {
    const KERNEL: &'static str;
}

/// The arguments of `F`'s kernel.
#[derive(Clone)]
struct Call<F> {
    words: Vec<Word>,
    kernel: PhantomData<F>,
}

impl<F: Named> Call<F> {
    fn new(words: impl Into<Vec<Word>>) -> Self {
        Self {
            words: words.into(),
            kernel: PhantomData,
        }
    }
}

// SAFETY: the two functions below make it: they pass what every kernel of their kind takes, with the length
// of the step's values; `more` is what the operation that names the kernel says it takes beside.
unsafe impl<F: Named> Arguments for Call<F> {
    const KERNEL: &'static str = F::KERNEL;
    fn words(&self) -> Vec<Word> {
        self.words.clone()
    }
}

/// Launches `y = f(x)` for input 0, `more` being what `F`'s kernel takes beside.
fn launch_map<F: Named>(at: &mut Launches<'_>, more: &[Word]) -> Result<()> {
    let (x, y, len) = (at.input(0), at.output(0), at.output_shape(0).len());
    let words = [
        Stored::from(x).word(),
        Stored::from(y).word(),
        (len as u64).word(),
    ];
    at.launch(grid(len, y), &Call::<F>::new([&words, more].concat()))
}

/// Launches `y = f(a, b)` for inputs 0 and 1 of one shape, `more` being what `F`'s kernel takes beside. The
/// kernels are told at run time how `b` is stored: it may differ from `a` and `y`.
pub(super) fn launch_zip<F: Named>(at: &mut Launches<'_>, more: &[Word]) -> Result<()> {
    let (a, b, y, len) = (
        at.input(0),
        at.input(1),
        at.output(0),
        at.output_shape(0).len(),
    );
    let words = [
        Stored::from(a).word(),
        b.address().word(),
        i32::from(b.is_narrow()).word(),
        Stored::from(y).word(),
        (len as u64).word(),
    ];
    at.launch(grid(len, y), &Call::<F>::new([&words, more].concat()))
}

/// A function of two elements with kernels for a broadcast second operand too.
trait Broadcast: Named {
    const ROWS: &'static str;
}

/// [`Broadcast::ROWS`] as a kernel's name.
struct Rows<F>(F);

impl<F: Broadcast> Named for Rows<F> {
    const KERNEL: &'static str = F::ROWS;
}

/// As [`launch_zip`], where input 1 may be broadcast.
fn launch_broadcast<F: Broadcast>(at: &mut Launches<'_>) -> Result<()> {
    let (shape, other) = (at.output_shape(0), at.input_shape(1));
    if shape == other {
        return launch_zip::<F>(at, &[]);
    }
    if shape.is_empty() {
        return Ok(());
    }
    let rows = (shape.rows() / other.n) as u64;
    launch_zip::<Rows<F>>(at, &[extent(F::ROWS, shape.c)?.word(), rows.word()])
}

/// A function of one element, written once for the lanes of every instruction set.
pub(super) trait Unary<T: Real>: Copy + Send + Sync {
    fn at<L: Lanes<Elem = T>>(self, x: L) -> L;
}

/// A function of two elements.
pub(super) trait Binary<T: Real>: Copy + Send + Sync {
    fn at<L: Lanes<Elem = T>>(self, a: L, b: L) -> L;
}

/// `y = f(x)` for input 0, in place where the plan says so.
pub(super) fn map<T: Real>(io: &mut Io<'_, T>, f: impl Unary<T>) {
    let y = io.output(0);
    let x = (!io.in_place()).then(|| io.input(0));
    y.par_chunks_mut(PIECE).enumerate().for_each(|(i, y)| {
        let x = x.map(|x| &x[i * PIECE..][..y.len()]);
        simd::dispatch(Map { f, x, y });
    });
}

/// `y = f(x)`, or `y = f(y)` where there is no `x`.
struct Map<'a, T, F> {
    f: F,
    x: Option<&'a [T]>,
    y: &'a mut [T],
}

impl<T: Real, F: Unary<T>> simd::Kernel<T> for Map<'_, T, F> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        match self.x {
            Some(x) => {
                for (x, y) in x.chunks(L::N).zip(self.y.chunks_mut(L::N)) {
                    self.f.at(L::load_first(x)).store_first(y);
                }
            }
            None => {
                for y in self.y.chunks_mut(L::N) {
                    self.f.at(L::load_first(y)).store_first(y);
                }
            }
        }
    }
}

/// `y = f(a, b)` for inputs 0 and 1, in place of input 0 where the plan says so. Input 1 has the
/// same shape or is broadcast.
pub(super) fn zip<T: Real>(io: &mut Io<'_, T>, f: impl Binary<T>) {
    let (shape, other) = (io.output_shape(0), io.input_shape(1));
    let (y, b) = (io.output(0), io.input(1));
    let a = (!io.in_place()).then(|| io.input(0));
    if shape == other {
        y.par_chunks_mut(PIECE).enumerate().for_each(|(i, y)| {
            let at = i * PIECE..i * PIECE + y.len();
            let a = a.map(|a| &a[at.clone()]);
            simd::dispatch(Zip { f, a, b: &b[at], y });
        });
        return;
    }
    if y.is_empty() {
        return;
    }
    let (group, piece) = (y.len() / other.n, rows_of_piece(shape.c) * shape.c);
    y.par_chunks_mut(group).enumerate().for_each(|(g, y)| {
        let a = a.map(|a| &a[g * group..][..group]);
        let b = &b[g * shape.c..][..shape.c];
        y.par_chunks_mut(piece).enumerate().for_each(|(i, y)| {
            let a = a.map(|a| &a[i * piece..][..y.len()]);
            simd::dispatch(ZipRows { f, a, b, y });
        });
    });
}

/// Rows of `c` channels in one piece of parallel work.
pub(super) fn rows_of_piece(c: usize) -> usize {
    (PIECE / c).max(1)
}

/// `y = f(a, b)`, or `y = f(y, b)` where there is no `a`.
struct Zip<'a, T, F> {
    f: F,
    a: Option<&'a [T]>,
    b: &'a [T],
    y: &'a mut [T],
}

impl<T: Real, F: Binary<T>> simd::Kernel<T> for Zip<'_, T, F> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let pairs = self.b.chunks(L::N).zip(self.y.chunks_mut(L::N));
        match self.a {
            Some(a) => {
                for (a, (b, y)) in a.chunks(L::N).zip(pairs) {
                    let value = self.f.at(L::load_first(a), L::load_first(b));
                    value.store_first(y);
                }
            }
            None => {
                for (b, y) in pairs {
                    let value = self.f.at(L::load_first(y), L::load_first(b));
                    value.store_first(y);
                }
            }
        }
    }
}

/// As [`Zip`], with the same `b` for each row. Rows of few channels are taken several at a time
/// against as many copies of `b`, so that their lanes are full.
struct ZipRows<'a, T, F> {
    f: F,
    a: Option<&'a [T]>,
    b: &'a [T],
    y: &'a mut [T],
}

impl<T: Real, F: Binary<T>> simd::Kernel<T> for ZipRows<'_, T, F> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let (f, c) = (self.f, self.b.len());
        let mut copies = [T::zero(); WIDTH];
        let b = match WIDTH / c {
            0 => self.b,
            rows => {
                let copies = &mut copies[..rows * c];
                copies
                    .chunks_exact_mut(c)
                    .for_each(|row| row.copy_from_slice(self.b));
                copies
            }
        };
        for (i, y) in self.y.chunks_mut(b.len()).enumerate() {
            let a = self.a.map(|a| &a[i * b.len()..][..y.len()]);
            let b = &b[..y.len()];
            Zip { f, a, b, y }.run::<L>();
        }
    }
}

/// The shape rule of operations whose inputs all have one shape, which is the output's too.
pub(super) fn same(op: &'static str, inputs: &[Shape]) -> Result<Vec<Shape>> {
    match inputs.iter().find(|&&s| s != inputs[0]) {
        Some(other) => Err(Error::shape(
            op,
            format!("expected {}, found {other}", inputs[0]),
        )),
        None => Ok(vec![inputs[0]]),
    }
}

/// The shape rule of operations with a broadcast second operand.
fn broadcast(op: &'static str, inputs: &[Shape]) -> Result<Vec<Shape>> {
    let (a, b) = (inputs[0], inputs[1]);
    if b == a || b == Shape::per_channel(a.c) || b == Shape::per_image(a.n, a.c) {
        return Ok(vec![a]);
    }
    let (channel, image) = (Shape::per_channel(a.c), Shape::per_image(a.n, a.c));
    Err(Error::shape(
        op,
        format!("expected {a}, {channel} or {image}, found {b}"),
    ))
}

/// A constant tensor.
#[derive(Clone, Copy, Debug)]
pub struct Fill {
    /// Extent.
    pub shape: Shape,
    /// Value of every element.
    pub value: f64,
}

kernel! {
    struct FillKernel = "fill" { y: Stored, len: u64, value: f32 }
}

impl<T: Real> Kernel<T> for Fill {
    fn run(&self, io: &mut Io<'_, T>) {
        io.output(0).fill(T::of(self.value));
    }
}

impl Op for Fill {
    fn name(&self) -> &'static str {
        "fill"
    }
    fn outputs(&self, _: &[Shape]) -> Result<Vec<Shape>> {
        Ok(vec![self.shape])
    }
    fn flops(&self, _: &[Shape], _: &[Shape]) -> u64 {
        0
    }
    fn constant(&self) -> Option<f64> {
        Some(self.value)
    }
    fn backward(&self, _: &mut Backward<'_>) -> Result<()> {
        Ok(())
    }
    fn rerun(&self, inputs: &[Var], _: &[Var]) -> Option<(Arc<dyn Op>, Vec<Var>)> {
        Some((Arc::new(*self), inputs.to_vec()))
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let (y, len) = (at.output(0), self.shape.len());
        let arguments = FillKernel {
            y: y.into(),
            len: len as u64,
            value: self.value as f32,
        };
        at.launch(grid(len, y), &arguments)
    }
}

/// `y = a + b`; `b` may be broadcast, its gradient is then the sum over what shared it.
#[derive(Clone, Copy, Debug)]
pub struct Add;

impl Named for Add {
    const KERNEL: &'static str = "add";
}

impl Broadcast for Add {
    const ROWS: &'static str = "add_rows";
}

impl<T: Real> Binary<T> for Add {
    #[inline(always)]
    fn at<L: Lanes<Elem = T>>(self, a: L, b: L) -> L {
        a + b
    }
}

impl<T: Real> Kernel<T> for Add {
    fn run(&self, io: &mut Io<'_, T>) {
        zip(io, *self);
    }
}

impl Op for Add {
    fn name(&self) -> &'static str {
        "add"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        broadcast(self.name(), inputs)
    }
    fn in_place(&self) -> Option<usize> {
        Some(0)
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        add_backward(at)
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        launch_broadcast::<Add>(at)
    }
}

fn add_backward(at: &mut Backward<'_>) -> Result<()> {
    let Some(dy) = at.gradient(0) else {
        return Ok(());
    };
    at.set(0, dy)?;
    let shape = at.shape(at.input(1));
    if shape == at.shape(dy) {
        at.set(1, dy)?;
    } else if at.wants(1) {
        let gradient = at.push(SumTo { shape }, &[dy])?;
        at.set(1, gradient)?;
    }
    Ok(())
}

/// `y = x + b` with one `b` per channel (`1×1×1×C`): [`Add`] under the name it has in a layer.
#[derive(Clone, Copy, Debug)]
pub struct BiasAdd;

impl<T: Real> Kernel<T> for BiasAdd {
    fn run(&self, io: &mut Io<'_, T>) {
        zip(io, Add);
    }
}

impl Op for BiasAdd {
    fn name(&self) -> &'static str {
        "bias_add"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        let expected = Shape::per_channel(inputs[0].c);
        if inputs[1] != expected {
            let problem = format!("expected a bias of {expected}, found {}", inputs[1]);
            return Err(Error::shape(self.name(), problem));
        }
        Ok(vec![inputs[0]])
    }
    fn in_place(&self) -> Option<usize> {
        Some(0)
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        add_backward(at)
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        launch_broadcast::<Add>(at)
    }
}

/// `y = a · b`; `b` may be broadcast, its gradient is then the sum over what shared it.
#[derive(Clone, Copy, Debug)]
pub struct Mul;

impl Named for Mul {
    const KERNEL: &'static str = "mul";
}

impl Broadcast for Mul {
    const ROWS: &'static str = "mul_rows";
}

impl<T: Real> Binary<T> for Mul {
    #[inline(always)]
    fn at<L: Lanes<Elem = T>>(self, a: L, b: L) -> L {
        a * b
    }
}

impl<T: Real> Kernel<T> for Mul {
    fn run(&self, io: &mut Io<'_, T>) {
        zip(io, *self);
    }
}

impl Op for Mul {
    fn name(&self) -> &'static str {
        "mul"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        broadcast(self.name(), inputs)
    }
    fn in_place(&self) -> Option<usize> {
        Some(0)
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = at.gradient(0) else {
            return Ok(());
        };
        let (a, b) = (at.input(0), at.input(1));
        if at.wants(0) {
            let gradient = at.push(Mul, &[dy, b])?;
            at.set(0, gradient)?;
        }
        if at.wants(1) {
            let shape = at.shape(b);
            let gradient = if shape == at.shape(a) {
                at.push(Mul, &[dy, a])?
            } else {
                at.push(SumTo { shape }, &[dy, a])?
            };
            at.set(1, gradient)?;
        }
        Ok(())
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        launch_broadcast::<Mul>(at)
    }
}

/// The gradient of a broadcast operand: the sum of the input, or of the product of two inputs, over
/// all pixels (and, for `1×1×1×C`, all images) that shared one of its elements.
///
/// Pieces of fixed size are summed into `f64` and rounded; the pieces are then added in order.
#[derive(Clone, Copy, Debug)]
pub struct SumTo {
    /// Extent of the operand.
    pub shape: Shape,
}

impl SumTo {
    /// Pieces of work for one row of the result.
    fn pieces(&self, x: Shape) -> usize {
        (x.rows() / self.shape.n).div_ceil(rows_of_piece(x.c))
    }
}

/// Threads and pieces of column sums on a GPU (`kernels/reduce.cu`), where the rows of a group are walked in
/// steps that are as many whole rows as a block has threads for, or one row in several strips.
#[derive(Clone, Copy, Debug)]
pub(super) struct Walk {
    /// Groups, elements of one, and channels.
    pub groups: usize,
    pub len: usize,
    pub channels: usize,
    /// Elements of a step.
    pub stride: usize,
    /// Blocks across a step.
    pub strips: usize,
    /// Blocks along a group.
    pub pieces: usize,
    /// Steps of a block.
    pub steps: usize,
}

/// Steps of a block that adds up columns, of `work` steps in all: as many as a thread has loads under way, and up to
/// twice that where there are blocks for all multiprocessors of a GPU; beyond 1024 blocks, which are enough for any,
/// their steps grow.
pub(super) fn steps(work: usize) -> usize {
    const BUSY: usize = 264;
    const BLOCKS: usize = 1024;
    (work / BUSY).clamp(4, 8).max(work.div_ceil(BLOCKS))
}

impl Walk {
    /// Over the rows of `x`, which has elements, in `groups` groups, by threads that take 16 bytes at a time.
    pub fn over(groups: usize, x: Shape, narrow: bool) -> Self {
        let (len, channels, width) = (x.len() / groups, x.c, width(narrow));
        let whole = channels / gcd(channels, width);
        let stride = match THREADS / whole {
            0 => channels,
            times => times * whole * width,
        };
        let strips = stride.div_ceil(THREADS * width);
        let total = len.div_ceil(stride);
        let steps = steps(total * groups * strips);
        Self {
            groups,
            len,
            channels,
            stride,
            strips,
            pieces: total.div_ceil(steps),
            steps,
        }
    }

    /// Bytes of the pieces' sums, however `x` is stored.
    pub fn scratch(groups: usize, x: Shape) -> usize {
        if x.is_empty() {
            return 0;
        }
        let pieces = [false, true].map(|narrow| Self::over(groups, x, narrow).pieces);
        size_of::<f32>() * groups * x.c * pieces.into_iter().max().unwrap_or(0)
    }

    /// A thread for each vector of a step of each piece.
    pub fn grid(&self) -> Grid {
        Grid::new(self.groups * self.pieces * self.strips, THREADS as u32)
    }

    /// Launches the sums of the columns of `a`, or of its products with `b` if that is not null, by groups and
    /// pieces.
    pub fn launch_sums(
        &self,
        at: &mut Launches<'_>,
        [a, b]: [Pointer; 2],
        sums: Pointer,
    ) -> Result<()> {
        let extent = |n| extent(SumToKernel::KERNEL, n);
        let arguments = SumToKernel {
            a: a.into(),
            b: b.address(),
            b_storage: match b == Pointer::NULL {
                true => 0,
                false => 1 + i32::from(b.is_narrow()),
            },
            sums: sums.into(),
            len: self.len as u64,
            channels: extent(self.channels)?,
            stride: extent(self.stride)?,
            strips: extent(self.strips)?,
            pieces: extent(self.pieces)?,
            steps: extent(self.steps)?,
        };
        at.launch(self.grid(), &arguments)
    }
}

pub(super) fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

kernel! {
    struct SumToKernel = "sum_to" {
        a: Stored,
        b: u64,
        b_storage: i32,
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
    struct SumToFinish = "sum_to_finish" {
        partials: Full,
        sums: Full,
        channels: u32,
        stride: u32,
        strips: u32,
        pieces: u32,
    }
}

impl SumTo {
    /// Adds up `a`, of extent `shape`, or its products with `b`.
    pub(super) fn compute<T: Real>(
        &self,
        shape: Shape,
        a: &[T],
        b: Option<&[T]>,
        sums: &mut [T],
        scratch: &mut [T],
    ) {
        if shape.is_empty() {
            return sums.fill(T::zero());
        }
        let (c, pieces) = (shape.c, self.pieces(shape));
        let (group, piece) = (shape.len() / self.shape.n, rows_of_piece(c) * c);
        let partial = &mut scratch[..self.shape.n * pieces * c];
        partial.par_chunks_mut(c).enumerate().for_each(|(i, sums)| {
            let start = (i % pieces) * piece;
            let at = i / pieces * group + start..i / pieces * group + group.min(start + piece);
            let (a, b) = (&a[at.clone()], b.map(|b| &b[at]));
            simd::dispatch(SumRows { a, b, sums });
        });
        let rows = sums.chunks_exact_mut(c);
        for (row, partial) in rows.zip(partial.chunks_exact(pieces * c)) {
            for (channel, sum) in row.iter_mut().enumerate() {
                let column = partial[channel..].iter().step_by(c);
                *sum = T::of(column.map(|x| x.wide()).sum());
            }
        }
    }

    /// Launches the sums of `a`, of extent `x`, or of its products with `b` if that is not null.
    pub(super) fn launch_of(
        &self,
        at: &mut Launches<'_>,
        x: Shape,
        [a, b]: [Pointer; 2],
        sums: Pointer,
    ) -> Result<()> {
        if x.is_empty() {
            let arguments = FillKernel {
                y: sums.into(),
                len: self.shape.len() as u64,
                value: 0.0,
            };
            return at.launch(grid(self.shape.len(), sums), &arguments);
        }
        let walk = Walk::over(self.shape.n, x, a.is_narrow());
        let partials = if walk.pieces == 1 { sums } else { at.scratch() };
        walk.launch_sums(at, [a, b], partials)?;
        if walk.pieces == 1 {
            return Ok(());
        }
        let stride = x.c * (THREADS / x.c).max(1);
        let strips = stride.div_ceil(THREADS);
        let arguments = SumToFinish {
            partials: partials.into(),
            sums: sums.into(),
            channels: extent(self.name(), x.c)?,
            stride: extent(self.name(), stride)?,
            strips: extent(self.name(), strips)?,
            pieces: extent(self.name(), walk.pieces)?,
        };
        at.launch(Grid::new(self.shape.n * strips, THREADS as u32), &arguments)
    }
}

impl<T: Real> Kernel<T> for SumTo {
    fn run(&self, io: &mut Io<'_, T>) {
        let (shape, a) = (io.input_shape(0), io.input(0));
        let b = (io.inputs() == 2).then(|| io.input(1));
        let (sums, scratch) = (io.output(0), io.scratch());
        self.compute(shape, a, b, sums, scratch);
    }
}

impl Op for SumTo {
    fn name(&self) -> &'static str {
        "sum_to"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        same(self.name(), inputs)?;
        broadcast(self.name(), &[inputs[0], self.shape])?;
        Ok(vec![self.shape])
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        inputs.iter().map(|s| s.len() as u64).sum()
    }
    fn scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        match inputs[0].is_empty() {
            true => 0,
            false => self.shape.len() * self.pieces(inputs[0]),
        }
    }
    /// Never: it is the gradient of a parameter, or small.
    fn narrow(&self, _: usize, _: &[bool]) -> bool {
        false
    }
    fn device_scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        Walk::scratch(self.shape.n, inputs[0])
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let (a, x, sums) = (at.input(0), at.input_shape(0), at.output(0));
        let b = match at.inputs() {
            1 => Pointer::NULL,
            _ => at.input(1),
        };
        self.launch_of(at, x, [a, b], sums)
    }
}

/// `n` as kernels take extents.
pub(super) fn extent(kernel: &str, n: usize) -> Result<u32> {
    u32::try_from(n).map_err(|_| {
        let problem = format!("an extent of {n} is more than its kernel can take");
        Error::device(kernel, problem)
    })
}

/// Column sums of the rows of `a`, or of `a · b`.
struct SumRows<'a, T> {
    a: &'a [T],
    b: Option<&'a [T]>,
    sums: &'a mut [T],
}

impl<T: Real> simd::Kernel<T> for SumRows<'_, T> {
    type Out = ();
    /// Walks down strips of at most `WIDTH` columns. Rows of few channels are taken several at a time,
    /// as in [`ZipRows`]. Every 32 terms a sum moves on to `f64`.
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let c = self.sums.len();
        let wide = (WIDTH / c).max(1) * c;
        self.sums.fill(T::zero());
        for strip in (0..wide).step_by(WIDTH) {
            let mut total = [0.0f64; WIDTH];
            for block in (0..self.a.len()).step_by(32 * wide) {
                let mut sum = [T::zero(); WIDTH];
                let end = self.a.len().min(block + 32 * wide);
                for row in (block..end).step_by(wide) {
                    let at = end.min(row + strip)..end.min(row + wide).min(row + strip + WIDTH);
                    let a = &self.a[at.clone()];
                    match self.b {
                        Some(b) => {
                            for ((sum, &a), &b) in sum.iter_mut().zip(a).zip(&b[at]) {
                                *sum += a * b;
                            }
                        }
                        None => {
                            for (sum, &a) in sum.iter_mut().zip(a) {
                                *sum += a;
                            }
                        }
                    }
                }
                for (total, sum) in total.iter_mut().zip(sum) {
                    *total += sum.wide();
                }
            }
            let columns = (wide - strip).min(WIDTH);
            if wide == c {
                for (sum, &total) in self.sums[strip..].iter_mut().zip(&total[..columns]) {
                    *sum = T::of(total);
                }
            } else {
                for (channel, sum) in self.sums.iter_mut().enumerate() {
                    *sum = T::of(total[channel..columns].iter().step_by(c).sum());
                }
            }
        }
    }
}

/// `y = factor · x`.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// The constant.
    pub factor: f64,
}

impl Named for Scale {
    const KERNEL: &'static str = "scale";
}

impl<T: Real> Unary<T> for Scale {
    #[inline(always)]
    fn at<L: Lanes<Elem = T>>(self, x: L) -> L {
        x * L::splat(T::of(self.factor))
    }
}

impl<T: Real> Kernel<T> for Scale {
    fn run(&self, io: &mut Io<'_, T>) {
        map(io, *self);
    }
}

impl Op for Scale {
    fn name(&self) -> &'static str {
        "scale"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        same(self.name(), inputs)
    }
    fn in_place(&self) -> Option<usize> {
        Some(0)
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = at.gradient(0) else {
            return Ok(());
        };
        let gradient = at.push(*self, &[dy])?;
        at.set(0, gradient)
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        launch_map::<Scale>(at, &[(self.factor as f32).word()])
    }
}

/// `y = x`, through which no gradient passes.
#[derive(Clone, Copy, Debug)]
pub struct StopGradient;

impl Named for StopGradient {
    const KERNEL: &'static str = "copy";
}

impl<T: Real> Kernel<T> for StopGradient {
    fn run(&self, io: &mut Io<'_, T>) {
        if !io.in_place() {
            io.output(0).copy_from_slice(io.input(0));
        }
    }
}

impl Op for StopGradient {
    fn name(&self) -> &'static str {
        "stop_gradient"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        same(self.name(), inputs)
    }
    fn flops(&self, _: &[Shape], _: &[Shape]) -> u64 {
        0
    }
    fn in_place(&self) -> Option<usize> {
        Some(0)
    }
    fn backward(&self, _: &mut Backward<'_>) -> Result<()> {
        Ok(())
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        if at.input(0) == at.output(0) {
            return Ok(());
        }
        launch_map::<StopGradient>(at, &[])
    }
}

/// A nonlinearity of single elements, which is an operation of one input. Its gradient is [`Slope`].
pub trait Nonlinearity: Copy + Debug + Send + Sync + 'static {
    /// [`Op::name`], of the operation and of its gradient.
    const NAMES: [&'static str; 2];
    /// Floating-point operations for one element, likewise.
    const FLOPS: [u64; 2];
    /// Whether the gradient is taken from the operation's output instead of its input.
    const FROM_OUTPUT: bool;
    /// The value.
    fn value<L: Lanes>(x: L) -> L;
    /// `dy` times the derivative, from `x` or from the value there.
    fn gradient<L: Lanes>(dy: L, from: L) -> L;
}

impl<F: Nonlinearity> Named for F {
    const KERNEL: &'static str = F::NAMES[0];
}

impl<T: Real, F: Nonlinearity> Unary<T> for F {
    #[inline(always)]
    fn at<L: Lanes<Elem = T>>(self, x: L) -> L {
        F::value(x)
    }
}

impl<T: Real, F: Nonlinearity> Kernel<T> for F {
    fn run(&self, io: &mut Io<'_, T>) {
        map(io, *self);
    }
}

impl<F: Nonlinearity> Op for F {
    fn name(&self) -> &'static str {
        F::NAMES[0]
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        same(self.name(), inputs)
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        F::FLOPS[0] * inputs[0].len() as u64
    }
    fn in_place(&self) -> Option<usize> {
        Some(0)
    }
    fn rerun(&self, inputs: &[Var], _: &[Var]) -> Option<(Arc<dyn Op>, Vec<Var>)> {
        Some((Arc::new(*self), inputs.to_vec()))
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = at.gradient(0) else {
            return Ok(());
        };
        let from = if F::FROM_OUTPUT {
            at.output(0)
        } else {
            at.input(0)
        };
        let gradient = at.push(Slope(*self), &[dy, from])?;
        at.set(0, gradient)
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        launch_map::<F>(at, &[])
    }
}

/// The gradient of a [`Nonlinearity`]; inputs `dy`, and `x` or the value there.
#[derive(Clone, Copy, Debug)]
pub struct Slope<F>(pub F);

impl<F: Nonlinearity> Named for Slope<F> {
    const KERNEL: &'static str = F::NAMES[1];
}

impl<T: Real, F: Nonlinearity> Binary<T> for Slope<F> {
    #[inline(always)]
    fn at<L: Lanes<Elem = T>>(self, dy: L, from: L) -> L {
        F::gradient(dy, from)
    }
}

impl<T: Real, F: Nonlinearity> Kernel<T> for Slope<F> {
    fn run(&self, io: &mut Io<'_, T>) {
        zip(io, *self);
    }
}

impl<F: Nonlinearity> Op for Slope<F> {
    fn name(&self) -> &'static str {
        F::NAMES[1]
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        same(self.name(), inputs)
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        F::FLOPS[1] * inputs[0].len() as u64
    }
    fn in_place(&self) -> Option<usize> {
        Some(0)
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        launch_zip::<Self>(at, &[])
    }
}

/// `y = max(x, 0)`; the derivative at 0 is taken as 0.
#[derive(Clone, Copy, Debug)]
pub struct Relu;

impl Nonlinearity for Relu {
    const NAMES: [&'static str; 2] = ["relu", "relu_gradient"];
    const FLOPS: [u64; 2] = [1, 1];
    const FROM_OUTPUT: bool = true;
    #[inline(always)]
    fn value<L: Lanes>(x: L) -> L {
        // Not `max`: a NaN must pass on to where it is noticed.
        L::select(x.lt(L::zero()), L::zero(), x)
    }
    #[inline(always)]
    fn gradient<L: Lanes>(dy: L, y: L) -> L {
        L::select(L::zero().lt(y), dy, L::zero())
    }
}

/// `(σ(x), σ(−x))` to full relative accuracy in both tails; NaN for NaN.
#[inline(always)]
pub(super) fn sigmoid<L: Lanes>(x: L) -> (L, L) {
    let one = L::splat(L::Elem::of(1.0));
    let e = (-x.abs()).exp();
    let large = one / (one + e);
    let small = e * large;
    let negative = x.lt(L::zero());
    (
        L::select(negative, small, large),
        L::select(negative, large, small),
    )
}

/// `y = σ(x) = 1/(1 + e⁻ˣ)`.
///
/// The gradient `σ(x)·σ(−x)` is taken from `x`: `1 − y` has no accuracy left where `y` is near 1, and
/// `y` need not be kept.
#[derive(Clone, Copy, Debug)]
pub struct Sigmoid;

impl Nonlinearity for Sigmoid {
    const NAMES: [&'static str; 2] = ["sigmoid", "sigmoid_gradient"];
    const FLOPS: [u64; 2] = [5, 7];
    const FROM_OUTPUT: bool = false;
    #[inline(always)]
    fn value<L: Lanes>(x: L) -> L {
        sigmoid(x).0
    }
    #[inline(always)]
    fn gradient<L: Lanes>(dy: L, x: L) -> L {
        let (s, t) = sigmoid(x);
        dy * (s * t)
    }
}

/// `y = x·σ(x)` (Elfwing, Uchibe, Doya 2018), also called swish; its derivative is
/// `σ(x)·(1 + x·σ(−x))`.
#[derive(Clone, Copy, Debug)]
pub struct Silu;

impl Nonlinearity for Silu {
    const NAMES: [&'static str; 2] = ["silu", "silu_gradient"];
    const FLOPS: [u64; 2] = [6, 9];
    const FROM_OUTPUT: bool = false;
    #[inline(always)]
    fn value<L: Lanes>(x: L) -> L {
        x * sigmoid(x).0
    }
    #[inline(always)]
    fn gradient<L: Lanes>(dy: L, x: L) -> L {
        let (s, t) = sigmoid(x);
        dy * (s * x.mul_add(t, L::splat(L::Elem::of(1.0))))
    }
}

pub(super) fn add_case(s: &mut Sampler) -> Case {
    broadcast_case(s, Add)
}

pub(super) fn mul_case(s: &mut Sampler) -> Case {
    broadcast_case(s, Mul)
}

fn broadcast_case(s: &mut Sampler, op: impl Op + Copy + 'static) -> Case {
    let a = s.shape();
    let b = [a, Shape::per_channel(a.c), Shape::per_image(a.n, a.c)][s.size(0, 2)];
    let mut case = Case::new(format!("{a} with {b}"), move |t, v| {
        Ok(vec![t.push(op, v)?])
    });
    // Either may be an activation.
    for (name, shape) in [("a", a), ("b", b)] {
        case = case.with(name, shape, s.values(shape.len(), -2.0, 2.0));
        if s.chance(0.7) {
            case = case.narrow();
        }
    }
    case
}

pub(super) fn bias_add_case(s: &mut Sampler) -> Case {
    let shape = s.shape();
    let bias = Shape::per_channel(shape.c);
    Case::new(format!("{shape}"), |t, v| Ok(vec![t.push(BiasAdd, v)?]))
        .with("x", shape, s.values(shape.len(), -2.0, 2.0))
        .narrow()
        .with("b", bias, s.values(bias.len(), -2.0, 2.0))
}

fn unary_case(s: &mut Sampler, op: impl Op + Copy + 'static, gap: f64, high: f64) -> Case {
    let shape = s.shape();
    let values = s.values_off_zero(shape.len(), gap, high);
    Case::new(format!("{op:?} {shape}"), move |t, v| {
        Ok(vec![t.push(op, v)?])
    })
    .with("x", shape, values)
    .narrow()
}

pub(super) fn scale_case(s: &mut Sampler) -> Case {
    let factor = s.uniform(-3.0, 3.0);
    unary_case(s, Scale { factor }, 0.0, 2.0)
}

pub(super) fn relu_case(s: &mut Sampler) -> Case {
    unary_case(s, Relu, 1e-3, 2.0)
}

pub(super) fn sigmoid_case(s: &mut Sampler) -> Case {
    unary_case(s, Sigmoid, 0.0, 6.0)
}

pub(super) fn silu_case(s: &mut Sampler) -> Case {
    unary_case(s, Silu, 0.0, 6.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::apply;
    use crate::tape::Tape;

    /// Shapes that need several pieces, several strips of channels, and partial ones of each.
    const LARGE: [Shape; 4] = [
        Shape::new(2, 131, 127, 1),
        Shape::new(3, 47, 61, 7),
        Shape::new(2, 33, 29, 64),
        Shape::new(2, 19, 21, 150),
    ];

    fn noise(len: usize, seed: u64) -> Vec<f64> {
        Sampler::new(seed).values(len, -2.0, 2.0)
    }

    /// Index into a broadcast operand of `shape` for element `i` of `x`.
    fn shared(shape: Shape, x: Shape, i: usize) -> usize {
        let image = if shape.n == 1 { 0 } else { i / (x.len() / x.n) };
        image * x.c + i % x.c
    }

    #[test]
    fn broadcasting_and_its_sums_hold_over_many_pieces() {
        for x in LARGE {
            for shape in [Shape::per_channel(x.c), Shape::per_image(x.n, x.c)] {
                let (a, dy) = (noise(x.len(), 1), noise(x.len(), 2));
                let b = noise(shape.len(), 3);
                let product = apply(Mul, &[(x, &a), (shape, &b)]);
                let mut sums = vec![0.0; shape.len()];
                let mut products = vec![0.0; shape.len()];
                for i in 0..x.len() {
                    let j = shared(shape, x, i);
                    assert_eq!(product[i], a[i] * b[j], "{x} with {shape} at {i}");
                    sums[j] += dy[i];
                    products[j] += dy[i] * a[i];
                }
                let found = apply(SumTo { shape }, &[(x, &dy)]);
                let found_products = apply(SumTo { shape }, &[(x, &dy), (x, &a)]);
                for j in 0..shape.len() {
                    approx::assert_relative_eq!(found[j], sums[j], epsilon = 1e-9);
                    approx::assert_relative_eq!(found_products[j], products[j], epsilon = 1e-9);
                }
            }
        }
    }

    #[test]
    fn sums_of_f32_are_as_good_as_their_elements() {
        let x = Shape::new(4, 256, 256, 1);
        let dy: Vec<f32> = noise(x.len(), 4).iter().map(|&v| v as f32 + 2.0).collect();
        let exact: f64 = dy.iter().map(|&v| f64::from(v)).sum();
        let shape = Shape::SCALAR;
        let found = f64::from(apply(SumTo { shape }, &[(x, &dy)])[0]);
        assert!((found / exact - 1.0).abs() < 2e-7, "{found} {exact}");
    }

    #[test]
    fn both_tails_of_the_sigmoid_are_accurate_and_nan_passes() {
        let x = [-700.0f64, -40.0, -1e-9, 0.0, 3.0, 40.0, 700.0];
        let y = apply(Sigmoid, &[(Shape::per_channel(x.len()), &x)]);
        for (x, y) in x.into_iter().zip(y) {
            let exact = if x < 0.0 {
                x.exp() / (1.0 + x.exp())
            } else {
                1.0 / (1.0 + (-x).exp())
            };
            approx::assert_relative_eq!(y, exact, max_relative = 4e-15);
        }
        let slope = apply(
            Slope(Sigmoid),
            &[(Shape::SCALAR, &[1.0f32]), (Shape::SCALAR, &[40.0])],
        );
        approx::assert_relative_eq!(slope[0], (-40.0f32).exp(), max_relative = 1e-6);
        let one = [(Shape::SCALAR, &[f32::NAN][..])];
        assert!(apply(Sigmoid, &one)[0].is_nan());
        assert!(apply(Silu, &one)[0].is_nan());
        assert!(apply(Relu, &one)[0].is_nan());
        let extremes = [f32::NEG_INFINITY, -1e30, 1e30, f32::INFINITY];
        let y = apply(Sigmoid, &[(Shape::per_channel(4), &extremes)]);
        assert_eq!(y, [0.0, 0.0, 1.0, 1.0]);
    }

    #[test]
    fn stop_gradient_passes_values_and_no_gradient() {
        let x = [1.0f32, -2.0];
        assert_eq!(apply(StopGradient, &[(Shape::per_channel(2), &x)]), x);
        let mut tape = Tape::new();
        let x = tape.input("x", Shape::SCALAR);
        let y = tape.push(StopGradient, &[x]).unwrap();
        assert_eq!(tape.backward(y, &[x]).unwrap(), [None]);
        let z = tape.push(Mul, &[x, y]).unwrap();
        let dx = tape.backward(z, &[x]).unwrap()[0].unwrap();
        tape.keep(dx);
        let plan = crate::tape::Plan::new(&tape, Default::default()).unwrap();
        let mut session = crate::device::cpu::Session::<f64>::new(plan).unwrap();
        session.write(x, &[3.0]);
        session.run();
        assert_eq!(session.read(dx), [3.0]);
    }

    #[test]
    fn shapes_that_do_not_fit_are_named() {
        let x = Shape::new(2, 3, 4, 5);
        for wrong in [
            Shape::per_channel(4),
            Shape::per_image(3, 5),
            Shape::new(2, 3, 1, 5),
        ] {
            let error = Mul.outputs(&[x, wrong]).unwrap_err().to_string();
            assert!(error.starts_with("mul: ") && error.contains(&wrong.to_string()));
        }
        assert!(BiasAdd.outputs(&[x, Shape::per_image(2, 5)]).is_err());
        assert!(Relu.outputs(&[x, Shape::SCALAR]).is_err());
    }
}
