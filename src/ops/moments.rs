//! The soft moments of each image's mask ([`crate::features::Moments`]).

use rayon::prelude::*;

use super::{Kernel, Op};
use crate::device::cpu::Io;
use crate::error::{Error, Result};
use crate::features;
use crate::gradcheck::{Case, Sampler};
use crate::tape::Backward;
use crate::tensor::{Real, Shape};

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
}

/// Refuses masks and logits of several channels.
pub(super) fn single_channel(op: &'static str, shape: Shape) -> Result<Shape> {
    if shape.c == 1 {
        Ok(shape)
    } else {
        let problem = format!("expected one channel, found {shape}");
        Err(Error::shape(op, problem))
    }
}

pub(super) fn case(s: &mut Sampler) -> Case {
    let shape = Shape::new(s.size(1, 3), s.extent(1, 9), s.extent(1, 9), 1);
    Case::new(format!("{shape}"), |t, v| Ok(vec![t.push(Moments, v)?])).with(
        "mask",
        shape,
        s.values(shape.len(), 0.01, 1.0),
    )
}
