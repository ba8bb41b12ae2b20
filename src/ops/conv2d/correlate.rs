//! Correlation of a batch of images with a bank of kernels: the convolution, and its input gradient.
//!
//! Work is cut into tasks: a block of output pixels times a range of output channels. A task copies the input
//! it reads, with the zero padding in place, to a slab that stays in cache, so that the inner loops have no
//! borders to mind and no power-of-two strides to suffer from; then it runs [`strip`] for each block of
//! channels and row of pixels, on weights packed in the order of that walk.

use rayon::prelude::*;

use super::tile::{Walk, strip, widest};
use super::{Shared, pieces};
use crate::device::simd::{self, Kernel, Lanes, Level, MAX_LANES};
use crate::tensor::{Real, Shape};

/// Tasks that run at once at most; each has its slab. A fixed number, so that the scratch does not depend on
/// the machine.
const SLOTS: usize = 32;
/// Elements of a slab that are aimed at: with as many bytes of weights it fits a core's second-level cache.
const SLAB: usize = 1 << 16;
/// Most pixels of a block, lest images of few channels make too few tasks.
const BLOCK: usize = 1 << 12;

/// `y[n, i, j, o] = Σ x[n, i·sh + r + top, j·sw + s + left, c] · w[o, r, s, c]`, zero outside the image.
#[derive(Clone, Copy, Debug)]
pub(super) struct Correlation {
    /// Extent of the input.
    pub x: Shape,
    /// Rows and columns of output pixels.
    pub pixels: [usize; 2],
    /// Output channels.
    pub channels: usize,
    /// Rows and columns of the kernel; may be zero, then so is the output.
    pub taps: [usize; 2],
    /// Input pixels from one output pixel to the next.
    pub stride: [usize; 2],
    /// Input row and column of the first tap of output pixel (0, 0).
    pub origin: [isize; 2],
    /// Where the output lies.
    pub y: Placement,
    /// Where the weights lie.
    pub w: Bank,
}

/// Offsets, in elements, into an output whose channels are contiguous.
#[derive(Clone, Copy, Debug)]
pub(super) struct Placement {
    pub start: usize,
    pub image: usize,
    pub row: usize,
    pub column: usize,
}

/// Offsets, in elements, into weights.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bank {
    pub start: usize,
    pub row: isize,
    pub column: isize,
    pub input: usize,
    pub output: usize,
}

/// How a correlation is cut into tasks.
#[derive(Clone, Copy)]
struct Cut {
    /// Output rows and columns of a block of pixels, and the number of blocks along each.
    block: [usize; 2],
    blocks: [usize; 2],
    /// Output channels of a task.
    channels: usize,
    /// Elements of a slab; 0 if the input can be read where it lies.
    slab: usize,
    tasks: usize,
}

impl Correlation {
    /// Terms in the sum of one output element.
    fn terms(&self) -> usize {
        self.taps[0] * self.taps[1] * self.x.c
    }

    /// Whether there is no output.
    fn is_empty(&self) -> bool {
        self.x.n * self.pixels[0] * self.pixels[1] * self.channels == 0
    }

    /// A correlation that looks at single pixels sees the batch as one long row of them.
    fn flattened(mut self) -> Self {
        let dense = Placement {
            start: self.y.start,
            image: self.pixels[0] * self.pixels[1] * self.channels,
            row: self.pixels[1] * self.channels,
            column: self.channels,
        };
        if self.taps == [1, 1]
            && self.stride == [1, 1]
            && self.origin == [0, 0]
            && self.pixels == [self.x.h, self.x.w]
            && (self.y.image, self.y.row, self.y.column) == (dense.image, dense.row, dense.column)
        {
            self.x = Shape::new(1, 1, self.x.rows(), self.x.c);
            self.pixels = [1, self.x.w];
        }
        self
    }

    /// Input rows or columns that `count` output pixels read.
    fn reach(&self, axis: usize, count: usize) -> usize {
        (count - 1) * self.stride[axis] + self.taps[axis]
    }

    fn cut(&self) -> Cut {
        // Blocks of pixels as square as they can be, for the least overlap.
        let side = |elements: usize| (elements / self.x.c.max(1)).isqrt();
        let edge = (2 * side(SLAB)).clamp(16, 512) / self.stride[1];
        let (columns, column_blocks) = pieces(self.pixels[1], edge.max(8));
        let row_len = self.reach(1, columns) * self.x.c;
        let rows = (SLAB / row_len.max(1)).saturating_sub(self.taps[0]) / self.stride[0] + 1;
        let (rows, row_blocks) = pieces(self.pixels[0], rows.min(BLOCK / columns).max(1));
        let inside = (0..2).all(|axis| {
            let extent = [self.x.h, self.x.w][axis] as isize;
            let end = self.origin[axis] + self.reach(axis, self.pixels[axis]) as isize;
            self.origin[axis] >= 0 && end <= extent
        });
        let blocks = self.x.n * row_blocks * column_blocks;
        // Maps too small to keep everyone busy are also cut by channels.
        let (channels, channel_blocks) = if blocks >= SLOTS {
            (self.channels, 1)
        } else {
            pieces_of(self.channels, 4 * MAX_LANES)
        };
        Cut {
            block: [rows, columns],
            blocks: [row_blocks, column_blocks],
            channels,
            slab: if inside {
                0
            } else {
                (self.reach(0, rows) * row_len).next_multiple_of(MAX_LANES)
            },
            tasks: blocks * channel_blocks,
        }
    }

    /// Elements of scratch that [`Correlation::run`] needs, with any lanes.
    pub fn scratch(&self) -> usize {
        if self.is_empty() {
            return 0;
        }
        let this = self.flattened();
        let cut = this.cut();
        this.terms() * this.channels.next_multiple_of(MAX_LANES) + cut.tasks.min(SLOTS) * cut.slab
    }

    /// Computes the correlation.
    pub fn run<T: Real>(&self, level: Level, x: &[T], w: &[T], y: &mut [T], scratch: &mut [T]) {
        if self.is_empty() {
            return;
        }
        let this = self.flattened();
        let cut = this.cut();
        let (packed, slabs) =
            scratch.split_at_mut(this.terms() * this.channels.next_multiple_of(MAX_LANES));
        pack(&this, level, w, packed);
        let slots = cut.tasks.min(SLOTS);
        let (y, slabs, packed) = (Shared(y.as_mut_ptr()), Shared(slabs.as_mut_ptr()), &*packed);
        (0..slots).into_par_iter().for_each(|slot| {
            // SAFETY: every slot has its own `slab` elements of the scratch.
            let slab =
                unsafe { std::slice::from_raw_parts_mut(slabs.at(slot * cut.slab), cut.slab) };
            for task in slot * cut.tasks / slots..(slot + 1) * cut.tasks / slots {
                let task = Task {
                    of: &this,
                    cut: &cut,
                    task,
                    x,
                    packed,
                    y,
                    slab,
                };
                simd::dispatch_at(level, task);
            }
        });
    }
}

/// Cuts `extent` into blocks of whole multiples of `unit`.
fn pieces_of(extent: usize, unit: usize) -> (usize, usize) {
    (unit.min(extent), extent.div_ceil(unit))
}

/// Lanes of a vector, and vectors of the widest tile.
struct Width;

impl<T: Real> Kernel<T> for Width {
    type Out = (usize, usize);
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) -> (usize, usize) {
        (L::N, widest::<L>())
    }
}

/// Copies weights to `[block of channels][row, column, input channel][lanes]`, a block being as wide as a tile;
/// missing channels of the last vector are zero.
fn pack<T: Real>(of: &Correlation, level: Level, w: &[T], packed: &mut [T]) {
    let (terms, bank) = (of.terms(), of.w);
    if terms == 0 {
        return;
    }
    let (lanes, vectors) = simd::dispatch_at::<T, _>(level, Width);
    packed[..terms * of.channels.next_multiple_of(lanes)]
        .par_chunks_mut(terms * lanes * vectors)
        .enumerate()
        .for_each(|(block, packed)| {
            let width = packed.len() / terms;
            let first = block * lanes * vectors;
            let present = width.min(of.channels - first);
            for (tap, packed) in packed.chunks_exact_mut(of.x.c * width).enumerate() {
                let (r, s) = ((tap / of.taps[1]) as isize, (tap % of.taps[1]) as isize);
                let start = (bank.start + first * bank.output)
                    .wrapping_add_signed(r * bank.row + s * bank.column);
                for (c, packed) in packed.chunks_exact_mut(width).enumerate() {
                    let start = start + c * bank.input;
                    if bank.output == 1 {
                        packed[..present].copy_from_slice(&w[start..start + present]);
                    } else {
                        for (o, packed) in packed[..present].iter_mut().enumerate() {
                            *packed = w[start + o * bank.output];
                        }
                    }
                    packed[present..].fill(T::zero());
                }
            }
        });
}

/// One block of pixels and range of channels.
struct Task<'a, T> {
    of: &'a Correlation,
    cut: &'a Cut,
    task: usize,
    x: &'a [T],
    packed: &'a [T],
    y: Shared<T>,
    slab: &'a mut [T],
}

impl<T: Real> Kernel<T> for Task<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let (of, cut) = (self.of, self.cut);
        let [row_blocks, column_blocks] = cut.blocks;
        // Neighbouring tasks share channels, hence weights.
        let (rest, column) = (self.task / column_blocks, self.task % column_blocks);
        let (rest, row) = (rest / row_blocks, rest % row_blocks);
        let (channel, image) = (rest / of.x.n, rest % of.x.n);
        let (row, column) = (row * cut.block[0], column * cut.block[1]);
        let rows = cut.block[0].min(of.pixels[0] - row);
        let columns = cut.block[1].min(of.pixels[1] - column);
        let channel = channel * cut.channels;
        let channel_end = (channel + cut.channels).min(of.channels);

        let image_len = of.x.pixels() * of.x.c;
        let input = &self.x[image * image_len..][..image_len];
        let top = (row * of.stride[0]) as isize + of.origin[0];
        let left = (column * of.stride[1]) as isize + of.origin[1];
        let (a, a_image_row) = if cut.slab == 0 {
            let first = (top as usize * of.x.w + left as usize) * of.x.c;
            (input[first..].as_ptr(), of.x.w * of.x.c)
        } else {
            let extent = [of.reach(0, rows), of.reach(1, columns)];
            fill_slab(self.slab, input, of.x, [top, left], extent, 0..of.x.c);
            (self.slab.as_ptr(), extent[1] * of.x.c)
        };

        let terms = of.terms();
        let inner = of.taps[1] * of.x.c;
        let mut first = channel;
        while first < channel_end {
            let width = (widest::<L>() * L::N).min(channel_end - first);
            let lanes = width.next_multiple_of(L::N);
            let walk = Walk {
                outer: of.taps[0],
                a_outer: a_image_row,
                b_outer: inner * lanes,
                inner,
                a_inner: 1,
                b_inner: lanes,
                a_row: of.stride[1] * of.x.c,
                c_row: of.y.column,
                accumulate: false,
            };
            let weights = self.packed[first * terms..].as_ptr();
            for i in 0..rows {
                let y = of.y.start
                    + image * of.y.image
                    + (row + i) * of.y.row
                    + column * of.y.column
                    + first;
                // SAFETY: the slab, or the part of the image, covers all taps of all `columns` pixels; the
                // packed weights hold `terms · lanes` elements for this block; no other task writes these
                // pixels' channels.
                unsafe {
                    let a = a.add(i * of.stride[0] * a_image_row);
                    strip::<L>(&walk, a, weights, self.y.at(y), columns, width);
                }
            }
            first += width;
        }
    }
}

/// Copies `extent` rows and columns from (`top`, `left`) on, of the given channels of one image, with zeros
/// outside of it, to the front of `slab`.
#[inline(always)]
pub(super) fn fill_slab<T: Real>(
    slab: &mut [T],
    image: &[T],
    shape: Shape,
    [top, left]: [isize; 2],
    extent: [usize; 2],
    channels: std::ops::Range<usize>,
) {
    let (depth, width) = (channels.len(), extent[1]);
    // Columns before, inside and behind the image.
    let before = (-left).clamp(0, width as isize) as usize;
    let end = (shape.w as isize - left).clamp(before as isize, width as isize) as usize;
    for (i, row) in slab[..extent[0] * width * depth]
        .chunks_exact_mut(width * depth)
        .enumerate()
    {
        let y = top + i as isize;
        if y < 0 || y >= shape.h as isize || before == end {
            row.fill(T::zero());
            continue;
        }
        row[..before * depth].fill(T::zero());
        row[end * depth..].fill(T::zero());
        let first = y as usize * shape.w + (left + before as isize) as usize;
        let inside = &mut row[before * depth..end * depth];
        let source = &image[first * shape.c..][..(end - before) * shape.c];
        if depth == shape.c {
            inside.copy_from_slice(source);
        } else {
            for (to, from) in inside
                .chunks_exact_mut(depth)
                .zip(source.chunks_exact(shape.c))
            {
                to.copy_from_slice(&from[channels.clone()]);
            }
        }
    }
}
