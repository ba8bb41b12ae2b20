//! How far the masks that a network predicts lie over the true ones, in pixels.

use rayon::prelude::*;

use super::losses::{Pieces, not_empty, warp_per_image};
use super::pointwise::same;
use super::{Kernel, Op};
use crate::device::cpu::Io;
use crate::device::gpu::launch::{Full, Launches, Stored, kernel};
use crate::error::Result;
use crate::gradcheck::{Case, Sampler};
use crate::tensor::{Real, Shape};

/// Of logits (input 0, N×H×W×1) and soft masks (input 1, likewise, in 0..=1) to N×1×1×2: the pixels that are in both, and
/// those in the one plus those in the other, whose quotient is half the Dice coefficient. In a mask are logits of at
/// least 0, and pixels that are at least half lesion. Counts are exact up to 2²⁴. Without a gradient.
#[derive(Clone, Copy, Debug)]
pub struct Overlap;

impl<T: Real> Kernel<T> for Overlap {
    fn run(&self, io: &mut Io<'_, T>) {
        let shape = io.input_shape(0);
        let pixels = shape.len() / shape.n;
        let logits = io.input(0).par_chunks_exact(pixels);
        let images = logits.zip(io.input(1).par_chunks_exact(pixels));
        let counts = io.output(0).par_chunks_exact_mut(2);
        counts.zip(images).for_each(|(counts, (logits, mask))| {
            let (mut both, mut either) = (0u32, 0u32);
            for (&z, &g) in logits.iter().zip(mask) {
                let (predicted, truth) = (z >= T::zero(), g >= T::of(0.5));
                both += u32::from(predicted && truth);
                either += u32::from(predicted) + u32::from(truth);
            }
            counts[0] = T::of(both.into());
            counts[1] = T::of(either.into());
        });
    }
}

impl Op for Overlap {
    fn name(&self) -> &'static str {
        "overlap"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        same(self.name(), inputs)?;
        not_empty(self.name(), inputs[0])?;
        Ok(vec![Shape::per_image(inputs[0].n, 2)])
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        4 * inputs[0].len() as u64
    }
    fn narrow(&self, _: usize, _: &[bool]) -> bool {
        false
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let shape = at.input_shape(0);
        let Pieces { len, pieces, grid } = Pieces::of(at, shape)?;
        let partial = at.scratch().into();
        let sums = OverlapSums {
            a: at.input(0).into(),
            b: at.input(1).into(),
            partial,
            len,
            pieces,
        };
        at.launch(grid, &sums)?;
        let arguments = OverlapKernel {
            partial,
            y: at.output(0).into(),
            pieces,
        };
        at.launch(warp_per_image(shape), &arguments)
    }
    fn device_scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        Pieces::bytes(inputs[0], 2)
    }
}

kernel! {
    struct OverlapSums = "overlap_sums" { a: Stored, b: Stored, partial: Full, len: i32, pieces: i32 }
}
kernel! {
    struct OverlapKernel = "overlap" { partial: Full, y: Full, pieces: i32 }
}

/// Logits and masks, none near their edges, which rounding would carry some over.
pub(super) fn case(s: &mut Sampler) -> Case {
    let shape = Shape::new(s.size(1, 3), s.extent(1, 9), s.extent(1, 9), 1);
    let logits = s.values_off_zero(shape.len(), 0.01, 3.0);
    let mask = s.values_off_zero(shape.len(), 0.01, 0.5);
    let mask = mask.into_iter().map(|g| 0.5 + g).collect();
    Case::new(format!("{shape}"), |t, v| Ok(vec![t.push(Overlap, v)?]))
        .with_constant("logits", shape, logits)
        .narrow()
        .with_constant("mask", shape, mask)
        .narrow()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::apply;

    #[test]
    fn edges_are_inside_and_nan_is_not() {
        let shape = Shape::new(2, 1, 3, 1);
        let logits = [0.0, -1e-9, 5.0, f32::NAN, -1.0, 1.0];
        let mask = [0.5, 1.0, 0.49, 1.0, 0.0, 1.0];
        let counts = apply(Overlap, &[(shape, &logits), (shape, &mask)]);
        assert_eq!(counts, [1.0, 4.0, 1.0, 3.0]);
    }
}
