//! The soft moments of each image's mask ([`crate::features::Moments`]).

use rayon::prelude::*;

use super::losses::not_empty;
use super::{Kernel, Op};
use crate::device::cpu::Io;
use crate::device::gpu::launch::{Full, Grid, Launches, Pointer, Stored, kernel};
use crate::error::{Error, Result};
use crate::features;
use crate::gradcheck::{Case, Sampler};
use crate::tape::Backward;
use crate::tensor::{Real, Shape};

/// Threads of a block in `kernels/features.cu`, and rows that a thread works on.
const THREADS: u32 = 256;
const ROWS: usize = 4;

/// How a GPU's kernels cut images into patches, a thread each: some rows of as many columns as 16 bytes
/// hold.
#[derive(Clone, Copy)]
pub(super) struct Patches {
    /// Extent of an image.
    pub height: i32,
    pub width: i32,
    /// Blocks of an image, and of a batch.
    pub blocks: i32,
    pub grid: Grid,
}

impl Patches {
    /// Of `down` times `across` patches for each of `shape`'s images.
    pub fn new(
        at: &Launches<'_>,
        shape: Shape,
        (down, across): (usize, usize),
        threads: u32,
    ) -> Result<Self> {
        let blocks = (down * across).div_ceil(threads as usize);
        // Elements of the largest offset within an image.
        at.int(shape.pixels())?;
        Ok(Self {
            height: at.int(shape.h)?,
            width: at.int(shape.w)?,
            blocks: at.int(blocks)?,
            grid: Grid::new(shape.n * blocks, threads),
        })
    }

    fn of(at: &Launches<'_>, shape: Shape, mask: Pointer) -> Result<Self> {
        let patches = (shape.h.div_ceil(ROWS), shape.w.div_ceil(columns(mask)));
        Self::new(at, shape, patches, THREADS)
    }
}

/// Columns of a patch: elements of 16 bytes.
pub(super) fn columns(mask: Pointer) -> usize {
    if mask.is_narrow() { 8 } else { 4 }
}

kernel! {
    struct MomentsSums = "moments_sums" {
        masks: Stored, partial: Full, height: i32, width: i32, blocks: i32
    }
}
kernel! {
    struct MomentsKernel = "moments" { partial: Full, moments: Full, blocks: i32 }
}
kernel! {
    struct MomentsGradientKernel = "moments_gradient" {
        dmoments: Full, masks: Stored, moments: Full, dmasks: Stored,
        height: i32, width: i32, blocks: i32
    }
}

/// Mask `N×H×W×1` to its moments, `N×1×1×7` in the order of [`features::Moments`].
#[derive(Clone, Copy, Debug)]
pub struct Moments;

impl<T: Real> Kernel<T> for Moments {
    fn run(&self, io: &mut Io<'_, T>) {
        let shape = io.input_shape(0);
        io.output(0)
            .par_chunks_exact_mut(features::Moments::COUNT)
            .zip(io.input(0).par_chunks_exact(shape.pixels()))
            .for_each(|(out, mask)| {
                features::Moments::of(mask, shape.w).write(out);
            });
    }
}

impl Op for Moments {
    fn name(&self) -> &'static str {
        "moments"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        let mask = single_channel(self.name(), inputs[0])?;
        Ok(vec![Shape::per_image(mask.n, features::Moments::COUNT)])
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        8 * inputs[0].len() as u64
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let Some(dmoments) = at.gradient(0) else {
            return Ok(());
        };
        let gradient = at.push(MomentsGradient, &[dmoments, at.input(0), at.output(0)])?;
        at.set(0, gradient)
    }
    fn narrow(&self, _: usize, _: &[bool]) -> bool {
        false
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let (shape, mask, partial) = (at.input_shape(0), at.input(0), at.scratch().into());
        let patches = Patches::of(at, shape, mask)?;
        let sums = MomentsSums {
            masks: mask.into(),
            partial,
            height: patches.height,
            width: patches.width,
            blocks: patches.blocks,
        };
        at.launch(patches.grid, &sums)?;
        let moments = MomentsKernel {
            partial,
            moments: at.output(0).into(),
            blocks: patches.blocks,
        };
        at.launch(Grid::new(shape.n, 32), &moments)
    }
    fn device_scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        // Patches of f32, of which there are more.
        let patches = inputs[0].h.div_ceil(ROWS) * inputs[0].w.div_ceil(4);
        let blocks = inputs[0].n * patches.div_ceil(THREADS as usize);
        size_of::<f64>() * features::Moments::COUNT * blocks
    }
}

/// Gradient of [`Moments`] with respect to the mask; inputs `dmoments`, `mask`, `moments`.
#[derive(Clone, Copy, Debug)]
pub struct MomentsGradient;

impl<T: Real> Kernel<T> for MomentsGradient {
    fn run(&self, io: &mut Io<'_, T>) {
        let shape = io.input_shape(1);
        let count = features::Moments::COUNT;
        io.output(0)
            .par_chunks_exact_mut(shape.pixels())
            .zip(io.input(0).par_chunks_exact(count))
            .zip(io.input(1).par_chunks_exact(shape.pixels()))
            .zip(io.input(2).par_chunks_exact(count))
            .for_each(|(((dmask, grad), mask), moments)| {
                dmask.fill(T::zero());
                let (moments, grad) = (
                    features::Moments::read(moments),
                    features::Moments::read(grad),
                );
                moments.backward(&grad, mask, shape.w, dmask);
            });
    }
}

impl Op for MomentsGradient {
    fn name(&self) -> &'static str {
        "moments_gradient"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        Ok(vec![inputs[1]])
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        8 * inputs[1].len() as u64
    }
    fn narrow(&self, _: usize, inputs: &[bool]) -> bool {
        inputs[1]
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let patches = Patches::of(at, at.input_shape(1), at.input(1))?;
        let arguments = MomentsGradientKernel {
            dmoments: at.input(0).into(),
            masks: at.input(1).into(),
            moments: at.input(2).into(),
            dmasks: at.output(0).into(),
            height: patches.height,
            width: patches.width,
            blocks: patches.blocks,
        };
        at.launch(patches.grid, &arguments)
    }
}

/// Refuses masks and logits of several channels, or without pixels.
pub(super) fn single_channel(op: &'static str, shape: Shape) -> Result<Shape> {
    not_empty(op, shape)?;
    if shape.c == 1 {
        Ok(shape)
    } else {
        let problem = format!("expected one channel, found {shape}");
        Err(Error::shape(op, problem))
    }
}

pub(super) fn case(s: &mut Sampler) -> Case {
    let shape = Shape::new(s.size(1, 3), s.extent(1, 9), s.extent(1, 9), 1);
    Case::new(format!("{shape}"), |t, v| Ok(vec![t.push(Moments, v)?]))
        .with("mask", shape, s.values(shape.len(), 0.01, 1.0))
        .narrow()
}
