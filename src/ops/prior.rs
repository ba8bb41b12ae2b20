//! The malignancy prior of each image ([`crate::features::Prior`]).

use super::{Kernel, Op};
use crate::device::cpu::Io;
use crate::device::gpu::launch::{Full, Grid, Launches, kernel};
use crate::error::{Error, Result};
use crate::features::{self, ShapeFeatures};
use crate::gradcheck::{Case, Sampler};
use crate::tape::Backward;
use crate::tensor::{Real, Shape};

/// Features `N×1×1×4`, weights `1×1×1×4`, bias `1×1×1×1`, means and standard deviations `1×1×1×4` to
/// `φ = σ(b + Σₖ wₖ(fₖ − μₖ)/sₖ)`, `N×1×1×1`. Means and standard deviations pass no gradient on.
#[derive(Clone, Copy, Debug)]
pub struct Prior;

/// Threads of a block in `kernels/features.cu`.
const THREADS: u32 = 256;

kernel! {
    struct PriorKernel = "prior" {
        features: Full, weight: Full, bias: Full, mean: Full, sd: Full, phi: Full, n: i32
    }
}
kernel! {
    struct PriorGradientKernel = "prior_gradient" {
        dphi: Full, features: Full, weight: Full, bias: Full, mean: Full, sd: Full,
        dfeatures: Full, dweight: Full, dbias: Full, n: i32
    }
}

fn array<T: Real>(values: &[T]) -> [f64; 4] {
    std::array::from_fn(|k| values[k].wide())
}

/// The prior whose weights, bias, means and standard deviations are inputs `first` and following.
fn prior<T: Real>(io: &Io<'_, T>, first: usize) -> features::Prior {
    features::Prior {
        weights: array(io.input(first)),
        bias: io.input(first + 1)[0].wide(),
        mean: array(io.input(first + 2)),
        sd: array(io.input(first + 3)),
    }
}

impl<T: Real> Kernel<T> for Prior {
    fn run(&self, io: &mut Io<'_, T>) {
        let prior = prior(io, 1);
        let features = io
            .input(0)
            .chunks_exact(4)
            .map(|f| ShapeFeatures::from(array(f)));
        for (phi, features) in io.output(0).iter_mut().zip(features) {
            *phi = T::of(prior.phi(&features));
        }
    }
}

impl Op for Prior {
    fn name(&self) -> &'static str {
        "prior"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        let n = inputs[0].n;
        let vector = Shape::per_channel(4);
        let expected = [
            Shape::per_image(n, 4),
            vector,
            Shape::SCALAR,
            vector,
            vector,
        ];
        if inputs != expected {
            let problem = format!(
                "expected features, weights, bias, means and standard deviations {expected:?}, found {inputs:?}"
            );
            return Err(Error::shape(self.name(), problem));
        }
        Ok(vec![Shape::per_image(n, 1)])
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        20 * inputs[0].n as u64
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let Some(dphi) = at.gradient(0) else {
            return Ok(());
        };
        let inputs = [
            dphi,
            at.input(0),
            at.input(1),
            at.input(2),
            at.input(3),
            at.input(4),
        ];
        let gradients = at.push_all(PriorGradient, &inputs)?;
        for (i, gradient) in gradients.into_iter().enumerate() {
            at.set(i, gradient)?;
        }
        Ok(())
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let n = at.input_shape(0).n;
        let arguments = PriorKernel {
            features: at.input(0).into(),
            weight: at.input(1).into(),
            bias: at.input(2).into(),
            mean: at.input(3).into(),
            sd: at.input(4).into(),
            phi: at.output(0).into(),
            n: at.int(n)?,
        };
        at.launch(Grid::cover(n, THREADS), &arguments)
    }
}

/// Gradient of [`Prior`] with respect to features, weights and bias; inputs `dφ` and those of
/// [`Prior`].
#[derive(Clone, Copy, Debug)]
pub struct PriorGradient;

impl<T: Real> Kernel<T> for PriorGradient {
    fn run(&self, io: &mut Io<'_, T>) {
        let prior = prior(io, 2);
        let (mut dweights, mut dbias) = ([0.0; 4], 0.0);
        let images = io.input(0).iter().zip(io.input(1).chunks_exact(4));
        for (dfeatures, (dphi, features)) in io.output(0).chunks_exact_mut(4).zip(images) {
            let features = ShapeFeatures::from(array(features));
            let (by_features, by_weights, by_bias) = prior.backward(&features, dphi.wide());
            dfeatures.copy_from_slice(&by_features.to_array().map(T::of));
            dweights = std::array::from_fn(|k| dweights[k] + by_weights[k]);
            dbias += by_bias;
        }
        io.output(1).copy_from_slice(&dweights.map(T::of));
        io.output(2)[0] = T::of(dbias);
    }
}

impl Op for PriorGradient {
    fn name(&self) -> &'static str {
        "prior_gradient"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        Ok(inputs[1..4].to_vec())
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        40 * inputs[1].n as u64
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let arguments = PriorGradientKernel {
            dphi: at.input(0).into(),
            features: at.input(1).into(),
            weight: at.input(2).into(),
            bias: at.input(3).into(),
            mean: at.input(4).into(),
            sd: at.input(5).into(),
            dfeatures: at.output(0).into(),
            dweight: at.output(1).into(),
            dbias: at.output(2).into(),
            n: at.int(at.input_shape(0).n)?,
        };
        // One block, which adds what all images say of the weights.
        at.launch(Grid::new(1, THREADS), &arguments)
    }
}

pub(super) fn case(s: &mut Sampler) -> Case {
    let n = s.size(1, 5);
    let vector = Shape::per_channel(4);
    Case::new(format!("{n} images"), |t, v| Ok(vec![t.push(Prior, v)?]))
        .with(
            "features",
            Shape::per_image(n, 4),
            s.values(4 * n, -1.0, 1.0),
        )
        .with("weights", vector, s.values(4, -0.5, 1.5))
        .with("bias", Shape::SCALAR, s.values(1, -1.0, 1.0))
        .with_constant("means", vector, s.values(4, -0.3, 0.8))
        .with_constant("standard deviations", vector, s.values(4, 0.5, 1.0))
        // Long, since the slope is small where φ is near 1; hence no small standard deviations either.
        .with_step(2e-3)
}
