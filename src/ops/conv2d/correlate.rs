//! Correlation of a batch of images with a bank of kernels: the convolution, and its input gradient.
//!
//! Work is cut into tasks: a block of output pixels times a range of output channels. A task copies the input
//! it reads, with the zero padding in place, to a slab that stays in cache, so that the inner loops have no
//! borders to mind and no power-of-two strides to suffer from; then it runs [`strip`] for each block of
//! channels and row of pixels, on weights packed in the order of that walk.

use std::ops::Range;

use rayon::prelude::*;

use super::tile::{Walk, strip, widest};
use super::{SLOTS, Shared, Slabs, aligned, pieces};
use crate::device::simd::{self, Kernel, Lanes, Level, MAX_LANES};
use crate::ops::activation::Epilogue;
use crate::ops::statistics;
use crate::tensor::{Real, Shape};

/// Elements of a slab that are aimed at: with as many bytes of weights it fits a core's second-level cache.
const SLAB: usize = 1 << 16;
/// Most input channels of a pass.
const DEPTH: usize = 128;
/// Input channels whose weights are packed together.
const RUN: usize = 16;
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

/// What becomes of the sums while they are in cache.
pub(super) enum Then<'a, T> {
    Nothing,
    Epilogue(Epilogue<'a, T>),
    /// Those of [`statistics`] are taken, for every block and channel.
    Statistics(&'a mut [T]),
}

/// How a correlation is cut into tasks.
#[derive(Clone, Copy)]
struct Cut {
    /// Output rows and columns of a block of pixels, and the number of blocks along each.
    block: [usize; 2],
    blocks: [usize; 2],
    /// Output channels of a task.
    channels: usize,
    /// Input channels of a pass: so many that the weights of a block of output channels stay in cache.
    depth: usize,
    /// Whether the input can be read where it lies; else a slab of so many elements is needed.
    direct: bool,
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
        let (depth, passes) = pieces(self.x.c, DEPTH);
        // Blocks of pixels as square as they can be, for the least overlap.
        let edge = 2 * (SLAB / depth).isqrt() / self.stride[1];
        let (columns, column_blocks) = pieces(self.pixels[1], edge.clamp(8, 512));
        let row_len = self.reach(1, columns) * depth;
        let rows = (SLAB / row_len).saturating_sub(self.taps[0]) / self.stride[0] + 1;
        let (rows, row_blocks) = pieces(self.pixels[0], rows.min(BLOCK / columns));
        let inside = (0..2).all(|axis| {
            let extent = [self.x.h, self.x.w][axis] as isize;
            let end = self.origin[axis] + self.reach(axis, self.pixels[axis]) as isize;
            self.origin[axis] >= 0 && end <= extent
        });
        // The channels of a kernel row are read in one go, which passes leave contiguous only in a slab.
        let direct = inside && (passes == 1 || self.taps[1] == 1);
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
            depth,
            direct,
            slab: if direct {
                0
            } else {
                (self.reach(0, rows) * row_len).next_multiple_of(MAX_LANES)
            },
            tasks: blocks * channel_blocks,
        }
    }

    /// Elements of scratch that [`Correlation::run`] needs, with any lanes.
    pub fn scratch(&self) -> usize {
        if self.is_empty() || self.terms() == 0 {
            return 0;
        }
        let this = self.flattened();
        let cut = this.cut();
        MAX_LANES
            + this.terms() * this.channels.next_multiple_of(MAX_LANES)
            + cut.tasks.min(SLOTS) * cut.slab
    }

    /// Blocks of output pixels, each of which leaves sums of every channel.
    pub fn blocks(&self) -> usize {
        let this = self.flattened();
        this.x.n * this.cut().blocks.iter().product::<usize>()
    }

    /// Pixels of each block.
    pub fn pixels_of(&self) -> impl Fn(usize) -> usize + Sync {
        let this = self.flattened();
        let cut = this.cut();
        move |block| {
            let [rows, columns] = this.extent(&cut, block);
            rows.len() * columns.len()
        }
    }

    /// Rows and columns of output pixels of a block, which is numbered by image, row and column.
    fn extent(&self, cut: &Cut, block: usize) -> [Range<usize>; 2] {
        let [row_blocks, column_blocks] = cut.blocks;
        let at = [block / column_blocks % row_blocks, block % column_blocks];
        [0, 1].map(|axis| {
            let first = at[axis] * cut.block[axis];
            first..(first + cut.block[axis]).min(self.pixels[axis])
        })
    }

    /// Computes the correlation, and `then` what follows; where there is nothing to compute, nothing may follow.
    pub fn run<T: Real>(
        &self,
        level: Level,
        x: &[T],
        w: &[T],
        then: Then<'_, T>,
        y: &mut [T],
        scratch: &mut [T],
    ) {
        if self.is_empty() {
            return;
        }
        if self.terms() == 0 {
            return self.clear(y);
        }
        let this = self.flattened();
        let cut = this.cut();
        let (packed, slabs) =
            aligned(scratch).split_at_mut(this.terms() * this.channels.next_multiple_of(MAX_LANES));
        pack(&this, cut.depth, level, w, packed);
        let slabs = Slabs::new(slabs, cut.tasks.min(SLOTS), cut.slab);
        let (y, packed) = (Shared(y.as_mut_ptr()), &*packed);
        let (epilogue, sums) = match then {
            Then::Nothing => (None, None),
            Then::Epilogue(epilogue) => (Some(epilogue), None),
            Then::Statistics(sums) => {
                assert!(sums.len() >= self.blocks() * statistics::len(self.channels));
                (None, Some(Shared(sums.as_mut_ptr())))
            }
        };
        (0..cut.tasks).into_par_iter().for_each(|task| {
            slabs.lend(|slab| {
                let (of, cut) = (&this, &cut);
                simd::dispatch_at(
                    level,
                    Task {
                        of,
                        cut,
                        task,
                        x,
                        packed,
                        epilogue,
                        y,
                        sums,
                        slab,
                    },
                );
            });
        });
    }

    /// The output of a kernel without taps.
    fn clear<T: Real>(&self, y: &mut [T]) {
        y.par_chunks_mut(self.y.image).for_each(|y| {
            for i in 0..self.pixels[0] {
                for j in 0..self.pixels[1] {
                    let first = self.y.start + i * self.y.row + j * self.y.column;
                    y[first..first + self.channels].fill(T::zero());
                }
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

/// Copies weights to `[block of output channels][pass of input channels][row, column, input channel][lanes]`, a
/// block being as wide as a tile; missing channels of the last vector are zero.
fn pack<T: Real>(of: &Correlation, depth: usize, level: Level, w: &[T], packed: &mut [T]) {
    let (terms, bank) = (of.terms(), of.w);
    let (lanes, vectors) = simd::dispatch_at::<T, _>(level, Width);
    packed[..terms * of.channels.next_multiple_of(lanes)]
        .par_chunks_mut(terms * lanes * vectors)
        .enumerate()
        .for_each(|(block, mut packed)| {
            let width = packed.len() / terms;
            let first = block * lanes * vectors;
            let present = width.min(of.channels - first);
            for pass in (0..of.x.c).step_by(depth) {
                let depth = depth.min(of.x.c - pass);
                for tap in 0..of.taps[0] * of.taps[1] {
                    let (r, s) = ((tap / of.taps[1]) as isize, (tap % of.taps[1]) as isize);
                    let start = (bank.start + first * bank.output + pass * bank.input)
                        .wrapping_add_signed(r * bank.row + s * bank.column);
                    // By runs of input channels, which share cache lines in one order of the weights, as
                    // output channels do in the other.
                    for run in (0..depth).step_by(RUN) {
                        let run_len = RUN.min(depth - run);
                        let now = packed.split_off_mut(..run_len * width);
                        let now = now.expect("as many terms as the block holds");
                        for o in 0..present {
                            let start = start + run * bank.input + o * bank.output;
                            for (c, to) in now[o..].iter_mut().step_by(width).enumerate() {
                                *to = w[start + c * bank.input];
                            }
                        }
                        for now in now.chunks_exact_mut(width) {
                            now[present..].fill(T::zero());
                        }
                    }
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
    epilogue: Option<Epilogue<'a, T>>,
    y: Shared<T>,
    sums: Option<Shared<T>>,
    slab: &'a mut [T],
}

impl<T: Real> Kernel<T> for Task<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let (of, cut) = (self.of, self.cut);
        // Neighbouring tasks share channels, hence weights.
        let blocks = cut.blocks[0] * cut.blocks[1];
        let (channel, block) = (self.task / (blocks * of.x.n), self.task % (blocks * of.x.n));
        let image = block / blocks;
        let [rows, columns] = of.extent(cut, block);
        let (row, column) = (rows.start, columns.start);
        let (rows, columns) = (rows.len(), columns.len());
        let channel = channel * cut.channels;
        let channel_end = (channel + cut.channels).min(of.channels);

        let image_len = of.x.pixels() * of.x.c;
        let input = &self.x[image * image_len..][..image_len];
        let top = (row * of.stride[0]) as isize + of.origin[0];
        let left = (column * of.stride[1]) as isize + of.origin[1];
        let terms = of.terms();
        for pass in (0..of.x.c).step_by(cut.depth) {
            let depth = cut.depth.min(of.x.c - pass);
            let (a, a_pixel, a_image_row) = if cut.direct {
                let first = (top as usize * of.x.w + left as usize) * of.x.c + pass;
                (input[first..].as_ptr(), of.x.c, of.x.w * of.x.c)
            } else {
                let extent = [of.reach(0, rows), of.reach(1, columns)];
                fill_slab(
                    self.slab,
                    input,
                    of.x,
                    [top, left],
                    extent,
                    pass..pass + depth,
                );
                (self.slab.as_ptr(), depth, extent[1] * depth)
            };
            let inner = of.taps[1] * depth;
            let epilogue = self.epilogue.filter(|_| pass + depth == of.x.c);
            for first in (channel..channel_end).step_by(widest::<L>() * L::N) {
                let width = (widest::<L>() * L::N).min(channel_end - first);
                let lanes = width.next_multiple_of(L::N);
                let walk = Walk {
                    outer: of.taps[0],
                    a_outer: a_image_row,
                    b_outer: inner * lanes,
                    inner,
                    a_inner: 1,
                    b_inner: lanes,
                    a_row: of.stride[1] * a_pixel,
                    c_row: of.y.column,
                    accumulate: pass > 0,
                };
                let weights = first * terms + of.taps[0] * of.taps[1] * pass * lanes;
                let weights = self.packed[weights..].as_ptr();
                for i in 0..rows {
                    let y = of.y.start
                        + image * of.y.image
                        + (row + i) * of.y.row
                        + column * of.y.column
                        + first;
                    // SAFETY: the slab, or the part of the image, covers all taps of all `columns` pixels;
                    // the packed weights hold `outer · inner · lanes` elements for this pass; no other task
                    // writes these pixels' channels.
                    unsafe {
                        let a = a.add(i * of.stride[0] * a_image_row);
                        strip::<L>(&walk, a, weights, self.y.at(y), columns, width);
                        if let Some(epilogue) = &epilogue {
                            let channels = first..first + width;
                            epilogue.finish::<L>(self.y.at(y), columns, of.y.column, channels);
                        }
                    }
                }
            }
        }
        if let Some(sums) = self.sums {
            let written = statistics::Block {
                rows,
                columns,
                row: of.y.row,
                column: of.y.column,
            };
            let y =
                of.y.start + image * of.y.image + row * of.y.row + column * of.y.column + channel;
            let first = block * statistics::len(of.channels) + channel;
            // SAFETY: this task has written the block; no other takes sums of its channels there.
            unsafe {
                statistics::take::<L>(
                    written,
                    self.y.at(y),
                    channel_end - channel,
                    sums.at(first),
                    of.channels,
                );
            }
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
    channels: Range<usize>,
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
