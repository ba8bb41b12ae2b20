//! Dropout (Srivastava et al. 2014), inverted: what stays is scaled up, so that evaluation needs no
//! operation at all.

use rayon::prelude::*;

use super::pointwise::{PIECE, grid};
use super::{Kernel, Op, control};
use crate::device::cpu::Io;
use crate::device::gpu::launch::{Full, Launches, Stored, kernel};
use crate::device::philox::Philox;
use crate::error::{Error, Result};
use crate::gradcheck::{Case, Sampler};
use crate::tape::Backward;
use crate::tensor::{Real, Shape};

/// `y = x / (1 − rate)` with probability `1 − rate`, else 0, independently for each element; inputs
/// `x` and the control vector, from which the number of the step is taken.
///
/// Element `i` stays if word `i mod 4` of the Philox block `⌊i/4⌋` under key `seed` and stream
/// `(layer, step)` is at least `rate·2³²`. The mask is not stored: the gradient, the same operation
/// applied to `dy`, draws it again.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    /// Probability of 0, in 0..1.
    pub rate: f64,
    /// Seed of the run.
    pub seed: u64,
    /// Tells the dropouts of one network apart.
    pub layer: u32,
}

impl<T: Real> Kernel<T> for Dropout {
    fn run(&self, io: &mut Io<'_, T>) {
        let y = io.output(0);
        let x = (!io.in_place()).then(|| io.input(0));
        let step = io.input(1)[control::STEP].wide() as u64;
        let philox = Philox::new(self.seed, u64::from(self.layer) << 32 | step);
        let threshold = threshold(self.rate);
        let scale = T::of(1.0 / (1.0 - self.rate));
        y.par_chunks_mut(PIECE).enumerate().for_each(|(i, y)| {
            if let Some(x) = x {
                y.copy_from_slice(&x[i * PIECE..][..y.len()]);
            }
            for (block, y) in y.chunks_mut(4).enumerate() {
                let words = philox.block((i * PIECE / 4 + block) as u64);
                for (y, word) in y.iter_mut().zip(words) {
                    *y = if word < threshold {
                        T::zero()
                    } else {
                        *y * scale
                    };
                }
            }
        });
    }
}

impl Op for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        check(self.name(), self.rate, inputs[1])?;
        Ok(vec![inputs[0]])
    }
    /// Not counting the integer arithmetic of the random numbers.
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        inputs[0].len() as u64
    }
    fn in_place(&self) -> Option<usize> {
        Some(0)
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = at.gradient(0) else {
            return Ok(());
        };
        let gradient = at.push(*self, &[dy, at.input(1)])?;
        at.set(0, gradient)
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let (y, len) = (at.output(0), at.output_shape(0).len());
        let arguments = DropoutKernel {
            x: at.input(0).into(),
            control: at.input(1).into(),
            y: y.into(),
            len: len as u64,
            seed: self.seed,
            layer: self.layer,
            threshold: threshold(self.rate),
            scale: (1.0 / (1.0 - self.rate)) as f32,
        };
        at.launch(grid(len, y), &arguments)
    }
}

kernel! {
    struct DropoutKernel = "dropout" {
        x: Stored,
        control: Full,
        y: Stored,
        len: u64,
        seed: u64,
        layer: u32,
        threshold: u32,
        scale: f32,
    }
}

/// The least random word of what is not dropped.
pub(super) fn threshold(rate: f64) -> u32 {
    (rate * 2f64.powi(32)) as u32
}

/// Refuses a rate outside of 0..1, and anything but a control vector as `control`.
pub(super) fn check(op: &'static str, rate: f64, control: Shape) -> Result<()> {
    if !(0.0..1.0).contains(&rate) {
        let problem = format!("expected a rate in 0..1, found {rate}");
        return Err(Error::shape(op, problem));
    }
    let expected = Shape::per_channel(control::LEN);
    if control != expected {
        let problem = format!("expected a control vector of {expected}, found {control}");
        return Err(Error::shape(op, problem));
    }
    Ok(())
}

pub(super) fn case(s: &mut Sampler) -> Case {
    let shape = s.shape();
    let op = Dropout {
        rate: s.uniform(0.0, 0.9),
        seed: s.size(0, 1 << 20) as u64,
        layer: s.size(0, 9) as u32,
    };
    let mut settings = vec![0.0; control::LEN];
    settings[control::STEP] = s.size(1, 1000) as f64;
    Case::new(format!("{op:?} {shape}"), move |t, v| {
        Ok(vec![t.push(op, v)?])
    })
    .with("x", shape, s.values(shape.len(), -2.0, 2.0))
    .narrow()
    .with_constant("control", Shape::per_channel(control::LEN), settings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::Session;
    use crate::tape::{Plan, Tape};

    /// What becomes of ones.
    fn drop_ones(op: Dropout, shape: Shape, step: u64) -> Vec<f32> {
        let mut tape = Tape::new();
        let x = tape.input("x", shape);
        let control = tape.input("control", Shape::per_channel(control::LEN));
        let y = tape.push(op, &[x, control]).unwrap();
        tape.keep(y);
        let mut session = Session::new(Plan::new(&tape, Default::default()).unwrap()).unwrap();
        session.values_mut(x).fill(1.0);
        session.values_mut(control)[control::STEP] = step as f32;
        session.run();
        session.read(y).to_vec()
    }

    const OP: Dropout = Dropout {
        rate: 0.3,
        seed: 11,
        layer: 2,
    };

    #[test]
    fn drops_its_share_and_scales_the_rest() {
        let shape = Shape::new(4, 61, 53, 7);
        let y = drop_ones(OP, shape, 1);
        let dropped = y.iter().filter(|&&y| y == 0.0).count() as f64;
        let n = shape.len() as f64;
        // Five standard deviations of a binomial count.
        let bound = 5.0 * (n * OP.rate * (1.0 - OP.rate)).sqrt();
        assert!((dropped - OP.rate * n).abs() < bound, "{dropped} of {n}");
        let kept = (1.0 / 0.7) as f32;
        assert!(y.iter().all(|&y| y == 0.0 || y == kept));
    }

    #[test]
    fn every_part_of_the_key_matters_and_nothing_else_does() {
        let shape = Shape::new(2, 9, 9, 5);
        let first = drop_ones(OP, shape, 1);
        assert_eq!(first, drop_ones(OP, shape, 1));
        assert_ne!(first, drop_ones(OP, shape, 2));
        assert_ne!(first, drop_ones(Dropout { seed: 12, ..OP }, shape, 1));
        assert_ne!(first, drop_ones(Dropout { layer: 3, ..OP }, shape, 1));
        // An element's fate depends on its position alone, not on how many follow.
        let longer = drop_ones(OP, Shape::new(4, 9, 9, 500), 1);
        assert_eq!(first, longer[..first.len()]);
    }

    #[test]
    fn rate_zero_is_the_identity() {
        let shape = Shape::new(1, 3, 3, 5);
        assert_eq!(drop_ones(Dropout { rate: 0.0, ..OP }, shape, 1), [1.0; 45]);
    }

    #[test]
    fn rates_outside_their_range_are_refused() {
        for rate in [-0.1, 1.0, f64::NAN] {
            let shapes = [Shape::SCALAR, Shape::per_channel(control::LEN)];
            let error = Dropout { rate, ..OP }.outputs(&shapes).unwrap_err();
            assert!(error.to_string().contains("rate"), "{error}");
        }
    }
}
