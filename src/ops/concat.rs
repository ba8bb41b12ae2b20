//! Joining tensors along channels.

use std::sync::Arc;

use rayon::prelude::*;

use super::pointwise::{extent, grid_of_moves, rows_of_piece};
use super::{Kernel, Op};
use crate::device::cpu::Io;
use crate::device::gpu::launch::{Full, Launches, kernel};
use crate::error::{Error, Result};
use crate::gradcheck::{Case, Sampler};
use crate::tape::{Backward, Var};
use crate::tensor::{Real, Shape};

/// The channels of the first input, then those of the second, and so on; two inputs or more, alike in
/// all but channels.
#[derive(Clone, Copy, Debug)]
pub struct Concat;

impl<T: Real> Kernel<T> for Concat {
    fn run(&self, io: &mut Io<'_, T>) {
        let (y, c) = (io.output(0), io.output_shape(0).c);
        let (io, rows) = (&*io, rows_of_piece(c));
        // All inputs of a piece before the next piece: every line of `y` goes to memory once.
        y.par_chunks_mut(rows * c)
            .enumerate()
            .for_each(|(piece, y)| {
                let mut start = 0;
                for i in 0..io.inputs() {
                    let width = io.input_shape(i).c;
                    let x = io.input(i)[piece * rows * width..].chunks_exact(width);
                    for (y, x) in y.chunks_exact_mut(c).zip(x) {
                        y[start..start + width].copy_from_slice(x);
                    }
                    start += width;
                }
            });
    }
}

/// Launches the kernel that puts each row of output 0 together from `parts`: of which input they are, the first
/// channel there, and how many.
fn join(at: &mut Launches<'_>, name: &'static str, parts: &[(usize, usize, usize)]) -> Result<()> {
    let (y, shape) = (at.output(0), at.output_shape(0));
    let size = if y.is_narrow() { 2 } else { 4 };
    // The largest unit of which everything is a multiple.
    let mut bits = (shape.c * size) | y.address() as usize | 16;
    for &(input, first, channels) in parts {
        let x = at.input(input);
        if x.is_narrow() != y.is_narrow() {
            let problem = "expected one storage type, found f32 and bf16";
            return Err(Error::device(name, problem));
        }
        let extents = at.input_shape(input).c | first | channels;
        bits |= (extents * size) | x.address() as usize;
    }
    let unit = 1 << bits.trailing_zeros();
    let units = |elements: usize| (elements * size / unit as usize) as u64;
    let (mut table, mut start) = (Vec::new(), 0);
    for &(input, first, channels) in parts {
        let address = at.input(input).address() + (first * size) as u64;
        table.extend([address, units(at.input_shape(input).c), units(start)]);
        start += channels;
    }
    let arguments = JoinRows {
        parts: at.constant(&table)?.into(),
        count: parts.len() as i32,
        y: y.address(),
        len: units(shape.len()),
        width: extent(name, units(shape.c) as usize)?,
        unit,
    };
    at.launch(grid_of_moves(units(shape.len()) as usize), &arguments)
}

kernel! {
    struct JoinRows = "join_rows" {
        parts: Full,
        count: i32,
        y: u64,
        len: u64,
        width: u32,
        unit: i32,
    }
}

impl Op for Concat {
    fn name(&self) -> &'static str {
        "concat"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        if inputs.len() < 2 {
            let problem = format!("expected two inputs or more, found {}", inputs.len());
            return Err(Error::shape(self.name(), problem));
        }
        let first = inputs[0];
        let fits = |s: &&Shape| (s.n, s.h, s.w) == (first.n, first.h, first.w);
        if let Some(other) = inputs.iter().find(|s| !fits(s)) {
            let problem = format!("{first} and {other} differ in more than channels");
            return Err(Error::shape(self.name(), problem));
        }
        let c = inputs.iter().map(|s| s.c).sum();
        Ok(vec![Shape { c, ..first }])
    }
    fn flops(&self, _: &[Shape], _: &[Shape]) -> u64 {
        0
    }
    fn rerun(&self, inputs: &[Var], _: &[Var]) -> Option<(Arc<dyn Op>, Vec<Var>)> {
        Some((Arc::new(*self), inputs.to_vec()))
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = at.gradient(0) else {
            return Ok(());
        };
        let mut start = 0;
        for i in 0..at.inputs() {
            let channels = at.shape(at.input(i)).c;
            if at.wants(i) {
                let gradient = at.push(SliceChannels { start, channels }, &[dy])?;
                at.set(i, gradient)?;
            }
            start += channels;
        }
        Ok(())
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let parts = (0..at.inputs()).map(|i| (i, 0, at.input_shape(i).c));
        let parts: Vec<_> = parts.collect();
        join(at, self.name(), &parts)
    }
}

/// Some consecutive channels of a tensor: the gradient of one input of [`Concat`].
#[derive(Clone, Copy, Debug)]
pub struct SliceChannels {
    /// The first channel.
    pub start: usize,
    /// How many.
    pub channels: usize,
}

impl<T: Real> Kernel<T> for SliceChannels {
    fn run(&self, io: &mut Io<'_, T>) {
        let (x, c) = (io.input(0), io.input_shape(0).c);
        let rows = rows_of_piece(c);
        let y = io.output(0).par_chunks_mut(rows * self.channels);
        y.zip(x.par_chunks(rows * c)).for_each(|(y, x)| {
            let rows = y.chunks_exact_mut(self.channels).zip(x.chunks_exact(c));
            for (y, x) in rows {
                y.copy_from_slice(&x[self.start..][..self.channels]);
            }
        });
    }
}

impl Op for SliceChannels {
    fn name(&self) -> &'static str {
        "slice_channels"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        if self.start + self.channels > inputs[0].c {
            let (start, end) = (self.start, self.start + self.channels);
            let problem = format!("channels {start}..{end} of {}", inputs[0]);
            return Err(Error::shape(self.name(), problem));
        }
        Ok(vec![Shape {
            c: self.channels,
            ..inputs[0]
        }])
    }
    fn flops(&self, _: &[Shape], _: &[Shape]) -> u64 {
        0
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        join(at, self.name(), &[(0, self.start, self.channels)])
    }
}

pub(super) fn case(s: &mut Sampler) -> Case {
    let shape = s.shape();
    let inputs: Vec<Shape> = (0..s.size(2, 4))
        .map(|_| Shape {
            c: s.size(1, 4),
            ..shape
        })
        .collect();
    let case = Case::new(format!("{inputs:?}"), |t, v| Ok(vec![t.push(Concat, v)?]));
    let names = ["a", "b", "c", "d"];
    inputs.iter().zip(names).fold(case, |case, (&shape, name)| {
        case.with(name, shape, s.values(shape.len(), -2.0, 2.0))
            .narrow()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::apply;

    #[test]
    fn channels_stand_side_by_side_over_many_pieces_and_come_apart_again() {
        let shape = |c| Shape::new(2, 61, 67, c);
        let number =
            |part: usize, row: usize, channel| (part * 1000 + channel) as f32 + row as f32 * 1e4;
        let parts: Vec<(Shape, Vec<f32>)> = [3, 1, 5]
            .into_iter()
            .enumerate()
            .map(|(part, c)| {
                let values = (0..shape(c).len()).map(|i| number(part, i / c, i % c));
                (shape(c), values.collect())
            })
            .collect();
        let inputs: Vec<(Shape, &[f32])> = parts.iter().map(|p| (p.0, &p.1[..])).collect();
        let y = apply(Concat, &inputs);
        for (row, y) in y.chunks_exact(9).enumerate() {
            let expected = [
                (0, 0),
                (0, 1),
                (0, 2),
                (1, 0),
                (2, 0),
                (2, 1),
                (2, 2),
                (2, 3),
                (2, 4),
            ];
            assert_eq!(y, expected.map(|(part, c)| number(part, row, c)));
        }
        for ((start, channels), part) in [(0, 3), (3, 1), (4, 5)].into_iter().zip(&parts) {
            let slice = SliceChannels { start, channels };
            assert_eq!(apply(slice, &[(shape(9), &y)]), part.1);
        }
    }

    #[test]
    fn inputs_that_do_not_fit_are_named() {
        let a = Shape::new(1, 2, 3, 4);
        assert!(Concat.outputs(&[a]).is_err());
        let error = Concat.outputs(&[a, Shape::new(1, 2, 2, 4)]).unwrap_err();
        assert!(error.to_string().contains("1×2×2×4"), "{error}");
    }
}
