//! The soft perimeter of each image's mask ([`crate::features::perimeter()`]).

use rayon::prelude::*;

use super::moments::{Patches, columns, single_channel};
use super::{Kernel, Op};
use crate::device::cpu::Io;
use crate::device::gpu::launch::{Full, Grid, Launches, Stored, kernel};
use crate::error::Result;
use crate::features;
use crate::gradcheck::{Case, Sampler};
use crate::tape::Backward;
use crate::tensor::{Real, Shape};

/// Threads of a block in `kernels/features.cu`, and rows that a thread works on, forward and backward.
const THREADS: u32 = 128;
const ROWS: usize = 4;
const GRADIENT_ROWS: usize = 8;

/// Patches of the forward pass along the columns and rows of the padded frame: one more on each side.
fn frame(shape: Shape, columns: usize) -> (usize, usize) {
    ((shape.h + 2).div_ceil(ROWS), shape.w / columns + 2)
}

kernel! {
    struct PerimeterSums = "perimeter_sums" {
        masks: Stored, partial: Full, height: i32, width: i32, blocks: i32
    }
}
kernel! {
    struct PerimeterKernel = "perimeter" { partial: Full, perimeters: Full, blocks: i32 }
}
kernel! {
    struct PerimeterGradientKernel = "perimeter_gradient" {
        dperimeters: Full, masks: Stored, dmasks: Stored, height: i32, width: i32, blocks: i32
    }
}

/// Mask `N×H×W×1` to its perimeter in pixels, `N×1×1×1`.
#[derive(Clone, Copy, Debug)]
pub struct Perimeter;

impl<T: Real> Kernel<T> for Perimeter {
    fn run(&self, io: &mut Io<'_, T>) {
        let shape = io.input_shape(0);
        io.output(0)
            .par_iter_mut()
            .zip(io.input(0).par_chunks_exact(shape.pixels()))
            .for_each(|(out, mask)| *out = T::of(features::perimeter(mask, shape.w)));
    }
}

impl Op for Perimeter {
    fn name(&self) -> &'static str {
        "perimeter"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        let mask = single_channel(self.name(), inputs[0])?;
        Ok(vec![Shape::per_image(mask.n, 1)])
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        16 * inputs[0].len() as u64
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let Some(dperimeter) = at.gradient(0) else {
            return Ok(());
        };
        let gradient = at.push(PerimeterGradient, &[dperimeter, at.input(0)])?;
        at.set(0, gradient)
    }
    fn narrow(&self, _: usize, _: &[bool]) -> bool {
        false
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let (shape, mask, partial) = (at.input_shape(0), at.input(0), at.scratch().into());
        let patches = Patches::new(at, shape, frame(shape, columns(mask)), THREADS)?;
        let sums = PerimeterSums {
            masks: mask.into(),
            partial,
            height: patches.height,
            width: patches.width,
            blocks: patches.blocks,
        };
        at.launch(patches.grid, &sums)?;
        let perimeters = PerimeterKernel {
            partial,
            perimeters: at.output(0).into(),
            blocks: patches.blocks,
        };
        at.launch(Grid::new(shape.n, 32), &perimeters)
    }
    fn device_scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        // Patches of f32, of which there are more.
        let (down, across) = frame(inputs[0], 4);
        size_of::<f64>() * inputs[0].n * (down * across).div_ceil(THREADS as usize)
    }
}

/// Gradient of [`Perimeter`] with respect to the mask; inputs `dperimeter`, `mask`.
#[derive(Clone, Copy, Debug)]
pub struct PerimeterGradient;

impl<T: Real> Kernel<T> for PerimeterGradient {
    fn run(&self, io: &mut Io<'_, T>) {
        let shape = io.input_shape(1);
        io.output(0)
            .par_chunks_exact_mut(shape.pixels())
            .zip(io.input(0))
            .zip(io.input(1).par_chunks_exact(shape.pixels()))
            .for_each(|((dmask, grad), mask)| {
                dmask.fill(T::zero());
                features::perimeter_backward(mask, shape.w, grad.wide(), dmask);
            });
    }
}

impl Op for PerimeterGradient {
    fn name(&self) -> &'static str {
        "perimeter_gradient"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        Ok(vec![inputs[1]])
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        30 * inputs[1].len() as u64
    }
    fn narrow(&self, _: usize, inputs: &[bool]) -> bool {
        inputs[1]
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let (shape, mask) = (at.input_shape(1), at.input(1));
        let patches = (
            shape.h.div_ceil(GRADIENT_ROWS),
            shape.w.div_ceil(columns(mask)),
        );
        let patches = Patches::new(at, shape, patches, THREADS)?;
        let arguments = PerimeterGradientKernel {
            dperimeters: at.input(0).into(),
            masks: mask.into(),
            dmasks: at.output(0).into(),
            height: patches.height,
            width: patches.width,
            blocks: patches.blocks,
        };
        at.launch(patches.grid, &arguments)
    }
}

pub(super) fn case(s: &mut Sampler) -> Case {
    let shape = Shape::new(s.size(1, 3), s.extent(1, 9), s.extent(1, 9), 1);
    // One mask in four is nearly flat, where ε rules.
    let high = if s.chance(0.25) { 2e-3 } else { 1.0 };
    Case::new(format!("{shape}"), |t, v| Ok(vec![t.push(Perimeter, v)?]))
        .with("mask", shape, s.values(shape.len(), 0.0, high))
        .narrow()
}
