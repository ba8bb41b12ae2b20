//! The weight gradient `dw[o, r, s, c] = Σ dy[n, i, j, o] · x[n, i·sh + r − ph, j·sw + s − pw, c]`.
//!
//! Work is cut into tasks: a chunk of the batch's pixels times a range of output channels times a range of input
//! channels. A task walks its chunk in blocks of pixels whose operands it copies to slabs that stay in cache, and
//! adds the products of each block to its part of the gradient. Wide layers make enough tasks with all pixels in
//! one chunk; narrow ones have several, whose partial gradients are added in order at the end.

use rayon::prelude::*;

use super::correlate::fill_slab;
use super::tile::{Walk, strip, widest};
use super::{Geometry, SLOTS, Shared, Slabs, aligned, pieces};
use crate::device::simd::{self, Kernel, Lanes, Level, MAX_LANES};
use crate::tensor::Real;

/// Tasks that chunks are made for; fixed, as the chunks decide how sums are rounded.
const TASKS: usize = 32;
/// Output channels of a task.
const OUTPUTS: usize = 64;
/// Least weights per output channel of a task, where there are more than twice as many: enough to pay for copying
/// the operands.
const WEIGHTS: usize = 576;
/// Output columns and pixels of a block: enough to pay for moving the sums between registers and memory.
const COLUMNS: usize = 64;
const PIXELS: usize = 256;
/// Elements of a partial gradient are added up in pieces of this size.
const PIECE: usize = 1 << 12;

/// How the gradient is cut into tasks.
#[derive(Clone, Copy)]
struct Cut {
    /// Output rows and columns of a block of pixels, and the number of blocks along each.
    block: [usize; 2],
    blocks: [usize; 2],
    /// Output and input channels of a task, and the number of ranges of each.
    channels: [usize; 2],
    ranges: [usize; 2],
    /// Chunks of pixels.
    chunks: usize,
    /// Elements of the slabs for `x` and `dy`.
    slabs: [usize; 2],
}

impl Cut {
    fn of(geometry: &Geometry) -> Self {
        let (w, y) = (geometry.w, geometry.output());
        let (columns, column_blocks) = pieces(y.w, if y.h == 1 { PIXELS } else { COLUMNS });
        let (rows, row_blocks) = pieces(y.h, PIXELS / columns);
        let outputs = OUTPUTS.min(w.n);
        let inputs = (WEIGHTS / (w.h * w.w)).next_multiple_of(4 * MAX_LANES);
        let inputs = if w.c > 2 * inputs { inputs } else { w.c };
        let ranges = [w.n.div_ceil(outputs), w.c.div_ceil(inputs)];
        let blocks = y.n * row_blocks * column_blocks;
        let reach = |axis: usize, count: usize| geometry.reach(axis, count);
        Self {
            block: [rows, columns],
            blocks: [row_blocks, column_blocks],
            channels: [outputs, inputs],
            ranges,
            chunks: TASKS.div_ceil(ranges[0] * ranges[1]).min(blocks),
            slabs: [
                // A vector at the end of the last pixel reads beyond it.
                (reach(0, rows) * reach(1, columns) * inputs + MAX_LANES)
                    .next_multiple_of(MAX_LANES),
                (rows * columns * outputs).next_multiple_of(MAX_LANES),
            ],
        }
    }

    fn tasks(&self) -> usize {
        self.chunks * self.ranges[0] * self.ranges[1]
    }

    fn slab(&self) -> usize {
        self.slabs[0] + self.slabs[1]
    }

    /// Elements of the partial gradients; with a single chunk the result itself is written.
    fn partials(&self, geometry: &Geometry) -> usize {
        if self.chunks > 1 {
            (self.chunks * geometry.w.len()).next_multiple_of(MAX_LANES)
        } else {
            0
        }
    }
}

/// Elements of scratch that [`run`] needs, with any lanes.
pub(super) fn scratch(geometry: &Geometry) -> usize {
    let cut = Cut::of(geometry);
    MAX_LANES + cut.partials(geometry) + cut.tasks().min(SLOTS) * cut.slab()
}

/// Computes the weight gradient.
pub(super) fn run<T: Real>(
    level: Level,
    geometry: &Geometry,
    x: &[T],
    dy: &[T],
    dw: &mut [T],
    scratch: &mut [T],
) {
    let cut = Cut::of(geometry);
    let (partials, slabs) = aligned(scratch).split_at_mut(cut.partials(geometry));
    let tasks = cut.tasks();
    let slabs = Slabs::new(slabs, tasks.min(SLOTS), cut.slab());
    let target = Shared(if cut.chunks > 1 {
        partials.as_mut_ptr()
    } else {
        dw.as_mut_ptr()
    });
    (0..tasks).into_par_iter().for_each(|task| {
        slabs.lend(|slab| {
            let cut = &cut;
            simd::dispatch_at(
                level,
                Task {
                    geometry,
                    cut,
                    task,
                    x,
                    dy,
                    target,
                    slab,
                },
            );
        });
    });
    if cut.chunks > 1 {
        let partials = &*partials;
        dw.par_chunks_mut(PIECE)
            .enumerate()
            .for_each(|(piece, dw)| {
                let part = |chunk: usize| &partials[chunk * geometry.w.len() + piece * PIECE..];
                dw.copy_from_slice(&part(0)[..dw.len()]);
                for chunk in 1..cut.chunks {
                    dw.iter_mut()
                        .zip(part(chunk))
                        .for_each(|(sum, &x)| *sum += x);
                }
            });
    }
}

/// One chunk of pixels and range of output and input channels.
struct Task<'a, T> {
    geometry: &'a Geometry,
    cut: &'a Cut,
    task: usize,
    x: &'a [T],
    dy: &'a [T],
    target: Shared<T>,
    slab: &'a mut [T],
}

impl<T: Real> Kernel<T> for Task<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let (geometry, cut) = (self.geometry, self.cut);
        let (x, w, y) = (geometry.x, geometry.w, geometry.output());
        let (chunk, range) = (
            self.task / (cut.ranges[0] * cut.ranges[1]),
            self.task % (cut.ranges[0] * cut.ranges[1]),
        );
        let output = range / cut.ranges[1] * cut.channels[0];
        let input = range % cut.ranges[1] * cut.channels[1];
        let outputs = cut.channels[0].min(w.n - output);
        let inputs = cut.channels[1].min(w.c - input);
        // The part of the gradient that is contiguous along (kernel column, input channel).
        let (spans, span) = if inputs == w.c {
            (1, w.w * w.c)
        } else {
            (w.w, inputs)
        };
        let (w_row, w_output) = (w.w * w.c, w.h * w.w * w.c);
        let target = chunk * w.len() + output * w_output + input;
        let width = widest::<L>() * L::N;
        let (x_slab, y_slab) = self.slab.split_at_mut(cut.slabs[0]);

        let blocks = y.n * cut.blocks[0] * cut.blocks[1];
        let first = chunk * blocks / cut.chunks;
        for block in first..(chunk + 1) * blocks / cut.chunks {
            let (rest, column) = (block / cut.blocks[1], block % cut.blocks[1]);
            let (image, row) = (rest / cut.blocks[0], rest % cut.blocks[0]);
            let (row, column) = (row * cut.block[0], column * cut.block[1]);
            let rows = cut.block[0].min(y.h - row);
            let columns = cut.block[1].min(y.w - column);
            let extent = [geometry.reach(0, rows), geometry.reach(1, columns)];
            let at = |axis: usize, i: usize| {
                (i * geometry.stride[axis]) as isize - geometry.padding[axis] as isize
            };
            fill_slab(
                x_slab,
                &self.x[image * x.pixels() * x.c..][..x.pixels() * x.c],
                x,
                [at(0, row), at(1, column)],
                extent,
                input..input + inputs,
            );
            fill_slab(
                y_slab,
                &self.dy[image * y.pixels() * y.c..][..y.pixels() * y.c],
                y,
                [row as isize, column as isize],
                [rows, columns],
                output..output + outputs,
            );
            let x_row = extent[1] * inputs;
            let walk = Walk {
                outer: rows,
                a_outer: columns * outputs,
                b_outer: geometry.stride[0] * x_row,
                inner: columns,
                a_inner: outputs,
                b_inner: geometry.stride[1] * inputs,
                a_row: 1,
                c_row: w_output,
                accumulate: block > first,
            };
            for r in 0..w.h {
                for s in 0..spans {
                    for offset in (0..span).step_by(width) {
                        // SAFETY: the slabs cover the block, and `x_slab` a vector more; no other task
                        // writes this chunk's part of the gradient.
                        unsafe {
                            let b = x_slab.as_ptr().add(r * x_row + s * inputs + offset);
                            let c = target + r * w_row + s * w.c + offset;
                            let columns = width.min(span - offset);
                            strip::<L>(
                                &walk,
                                y_slab.as_ptr(),
                                b,
                                self.target.at(c),
                                outputs,
                                columns,
                            );
                        }
                    }
                }
            }
        }
    }
}
