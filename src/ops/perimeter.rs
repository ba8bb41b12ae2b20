//! The soft perimeter of each image's mask ([`crate::features::perimeter()`]).

use rayon::prelude::*;

use super::moments::single_channel;
use super::{Kernel, Op};
use crate::device::cpu::Io;
use crate::error::Result;
use crate::features;
use crate::gradcheck::{Case, Sampler};
use crate::tape::Backward;
use crate::tensor::{Real, Shape};

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
}

pub(super) fn case(s: &mut Sampler) -> Case {
    let shape = Shape::new(s.size(1, 3), s.extent(1, 9), s.extent(1, 9), 1);
    // One mask in four is nearly flat, where ε rules.
    let high = if s.chance(0.25) { 2e-3 } else { 1.0 };
    Case::new(format!("{shape}"), |t, v| Ok(vec![t.push(Perimeter, v)?])).with(
        "mask",
        shape,
        s.values(shape.len(), 0.0, high),
    )
}
