//! Layer normalisation (Ba, Kiros, Hinton 2016) over the channels of each pixel.

mod device;

use std::sync::Arc;

use rayon::prelude::*;

use super::norm;
use super::{Kernel, Op};
use crate::device::cpu::Io;
use crate::device::gpu::launch::Launches;
use crate::device::simd::{self, Lanes};
use crate::error::{Error, Result};
use crate::gradcheck::{Case, Sampler};
use crate::tape::{Backward, Var};
use crate::tensor::{Real, Shape};

/// Pixels of one piece of parallel work; fixed, as the pieces decide how sums are rounded.
const PIXELS: usize = 256;

/// `y = γ·x̂ + β` with `x̂ = (x − μ)/√(σ² + ε)`, mean and biased variance taken over the channels of each pixel.
/// Inputs `x` (N×H×W×C), `gamma`, `beta` (per channel).
///
/// Passes over memory: reads `x`, writes `y` (in place where `x` is not read again). The gradient reads `x` and
/// `dy` and writes `dx`, over `dy` where it can; it takes the statistics from `x` again, so that nothing else is
/// kept. With `g = γ·dy` and means over channels,
/// `dx = (g − mean(g) − x̂·mean(g·x̂))/√(σ² + ε)`, `dγ = Σ dy·x̂`, `dβ = Σ dy`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct LayerNorm {
    /// Added to the variance.
    pub eps: f64,
}

/// Mean and `1/√(σ² + ε)` of a pixel.
#[inline(always)]
fn statistics<L: Lanes>(x: &[L::Elem], eps: L::Elem) -> [L::Elem; 2] {
    let count = L::Elem::of(x.len() as f64);
    let (full, rest) = x.split_at(x.len() - x.len() % L::N);
    let mut sum = L::zero();
    for x in full.chunks_exact(L::N) {
        sum = sum + L::load(x);
    }
    let mean = (sum.reduce_sum() + rest.iter().copied().sum()) / count;
    let (mut squares, wide) = (L::zero(), L::splat(mean));
    for x in full.chunks_exact(L::N) {
        let d = L::load(x) - wide;
        squares = d.mul_add(d, squares);
    }
    let rest: L::Elem = rest.iter().map(|&x| (x - mean) * (x - mean)).sum();
    let var = (squares.reduce_sum() + rest) / count;
    [
        mean,
        num_traits::Float::recip(num_traits::Float::sqrt(var + eps)),
    ]
}

impl<T: Real> Kernel<T> for LayerNorm {
    fn run(&self, io: &mut Io<'_, T>) {
        let c = io.input_shape(0).c;
        let x = (!io.in_place()).then(|| io.input(0));
        let (gamma, beta) = (io.input(1), io.input(2));
        let y = io.output(0).par_chunks_mut(PIXELS * c);
        y.enumerate().for_each(|(i, y)| {
            simd::dispatch(Pixels {
                x: x.map(|x| &x[i * PIXELS * c..][..y.len()]),
                gamma,
                beta,
                eps: T::of(self.eps),
                y,
            });
        });
    }
}

/// One piece; where there is no `x`, `y` holds it.
struct Pixels<'a, T> {
    x: Option<&'a [T]>,
    gamma: &'a [T],
    beta: &'a [T],
    eps: T,
    y: &'a mut [T],
}

impl<T: Real> simd::Kernel<T> for Pixels<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let c = self.gamma.len();
        for (pixel, y) in self.y.chunks_exact_mut(c).enumerate() {
            let x = self.x.map(|x| &x[pixel * c..][..c]);
            let [mean, rstd] = statistics::<L>(x.unwrap_or(y), self.eps).map(L::splat);
            for channel in (0..c).step_by(L::N) {
                let x = L::load_first(&x.unwrap_or(y)[channel..]);
                let scale = L::load_first(&self.gamma[channel..]) * rstd;
                let beta = L::load_first(&self.beta[channel..]);
                let result = (x - mean).mul_add(scale, beta);
                result.store_first(&mut y[channel..]);
            }
        }
    }
}

impl Op for LayerNorm {
    fn name(&self) -> &'static str {
        "layer_norm"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        let x = inputs[0];
        let vector = Shape::per_channel(x.c);
        for (name, &found) in ["gamma", "beta"].iter().zip(&inputs[1..]) {
            if found != vector {
                let problem = format!("{name}: expected {vector}, found {found}");
                return Err(Error::shape(self.name(), problem));
            }
        }
        Ok(vec![x])
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        8 * inputs[0].len() as u64
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        device::forward(at, self.eps)
    }
    fn in_place(&self) -> Option<usize> {
        Some(0)
    }
    fn rerun(&self, inputs: &[Var], _: &[Var]) -> Option<(Arc<dyn Op>, Vec<Var>)> {
        Some((Arc::new(*self), inputs.to_vec()))
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = at.gradient(0) else {
            return Ok(());
        };
        let gradient = LayerNormGradient { eps: self.eps };
        let gradients = at.push_all(gradient, &[dy, at.input(0), at.input(1)])?;
        (0..3).try_for_each(|i| at.set(i, gradients[i]))
    }
}

/// Gradient of [`LayerNorm`]; inputs `dy`, `x`, `gamma`, outputs `dx`, `dgamma`, `dbeta`.
#[derive(Clone, Copy, PartialEq, Debug)]
struct LayerNormGradient {
    eps: f64,
}

impl<T: Real> Kernel<T> for LayerNormGradient {
    fn run(&self, io: &mut Io<'_, T>) {
        let (x, gamma, c) = (io.input(1), io.input(2), io.input_shape(1).c);
        let dy = (!io.in_place()).then(|| io.input(0));
        let (dx, dgamma, dbeta) = (io.output(0), io.output(1), io.output(2));
        let pieces = dx.len().div_ceil(PIXELS * c);
        let partial = &mut io.scratch()[..2 * c * pieces];
        dx.par_chunks_mut(PIXELS * c)
            .zip(partial.par_chunks_exact_mut(2 * c))
            .enumerate()
            .for_each(|(i, (dx, sums))| {
                let at = i * PIXELS * c..i * PIXELS * c + dx.len();
                simd::dispatch(PixelsGradient {
                    dy: dy.map(|dy| &dy[at.clone()]),
                    x: &x[at],
                    gamma,
                    eps: T::of(self.eps),
                    dx,
                    sums,
                });
            });
        for (m, total) in [dgamma, dbeta].into_iter().enumerate() {
            for (channel, total) in total.iter_mut().enumerate() {
                let sums = partial[m * c + channel..].iter().step_by(2 * c);
                *total = T::of(sums.map(|sum| sum.wide()).sum());
            }
        }
    }
}

/// One piece; where there is no `dy`, `dx` holds it.
struct PixelsGradient<'a, T> {
    dy: Option<&'a [T]>,
    x: &'a [T],
    gamma: &'a [T],
    eps: T,
    dx: &'a mut [T],
    /// Of `dgamma`, then `dbeta`.
    sums: &'a mut [T],
}

impl<T: Real> simd::Kernel<T> for PixelsGradient<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let c = self.gamma.len();
        let count = T::of(c as f64);
        self.sums.fill(T::zero());
        let (dgamma, dbeta) = self.sums.split_at_mut(c);
        for (pixel, (x, dx)) in (self.x.chunks_exact(c))
            .zip(self.dx.chunks_exact_mut(c))
            .enumerate()
        {
            let dy = self.dy.map(|dy| &dy[pixel * c..][..c]);
            let [mean, rstd] = statistics::<L>(x, self.eps).map(L::splat);
            let (mut of_g, mut of_gx) = (L::zero(), L::zero());
            for channel in (0..c).step_by(L::N) {
                let dy = L::load_first(&dy.unwrap_or(dx)[channel..]);
                let x = (L::load_first(&x[channel..]) - mean) * rstd;
                let (dgamma, dbeta) = (&mut dgamma[channel..], &mut dbeta[channel..]);
                dy.mul_add(x, L::load_first(dgamma)).store_first(dgamma);
                (L::load_first(dbeta) + dy).store_first(dbeta);
                // Beyond the last channel `g` is zero.
                let g = L::load_first(&self.gamma[channel..]) * dy;
                of_g = of_g + g;
                of_gx = g.mul_add(x, of_gx);
            }
            let [of_g, of_gx] = [of_g, of_gx].map(|sum| L::splat(sum.reduce_sum() / count));
            for channel in (0..c).step_by(L::N) {
                let dy = L::load_first(&dy.unwrap_or(dx)[channel..]);
                let x = (L::load_first(&x[channel..]) - mean) * rstd;
                let g = L::load_first(&self.gamma[channel..]) * dy;
                let result = rstd * (g - x.mul_add(of_gx, of_g));
                result.store_first(&mut dx[channel..]);
            }
        }
    }
}

impl Op for LayerNormGradient {
    fn name(&self) -> &'static str {
        "layer_norm_gradient"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        Ok(vec![inputs[1], inputs[2], inputs[2]])
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        20 * inputs[1].len() as u64
    }
    fn in_place(&self) -> Option<usize> {
        Some(0)
    }
    fn scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        2 * inputs[1].c * inputs[1].rows().div_ceil(PIXELS)
    }
    /// `dx` is stored as `x`.
    fn narrow(&self, output: usize, inputs: &[bool]) -> bool {
        output == 0 && inputs[1]
    }
    fn device_scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        device::gradient_scratch(inputs[1])
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        device::gradient(at, self.eps)
    }
}

pub(super) fn case(s: &mut Sampler) -> Case {
    let mut shape = s.shape();
    // The gradient of a single channel is zero but for rounding: there is nothing to compare.
    shape.c += 1;
    // With few values the gradient is proportional to ε/(σ² + ε): it must not drown in rounding.
    let eps = if shape.c < 12 {
        s.uniform(0.1, 1.0)
    } else {
        1e-3
    };
    let op = LayerNorm { eps };
    let vector = Shape::per_channel(shape.c);
    let offset = s.uniform(-2.0, 2.0);
    Case::new(format!("{shape} {op:?}"), move |t, v| {
        Ok(vec![t.push(op, v)?])
    })
    .with(
        "x",
        shape,
        s.values(shape.len(), offset - 2.0, offset + 2.0),
    )
    .narrow()
    .with("gamma", vector, s.values_off_zero(shape.c, 0.3, 1.5))
    .with("beta", vector, s.values(shape.c, -1.0, 1.0))
    .with_step(norm::STEP)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ops::apply;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn pixels_are_normalised_by_themselves(
            n in 1..3usize, h in 1..20usize, w in 1..20usize,
            c in prop::sample::select(vec![1usize, 2, 7, 16, 33, 48, 130]), seed in any::<u64>()
        ) {
            let (shape, vector) = (Shape::new(n, h, w, c), Shape::per_channel(c));
            let mut s = Sampler::new(seed);
            let x = s.values(shape.len(), -1.0, 3.0);
            let (gamma, beta) = (s.values(c, -1.5, 1.5), s.values(c, -1.0, 1.0));
            let op = LayerNorm { eps: 1e-3 };
            let expected: Vec<f64> = x.chunks_exact(c).flat_map(|x| {
                let mean = x.iter().sum::<f64>() / c as f64;
                let var = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / c as f64;
                let scale = (var + 1e-3).sqrt().recip();
                let y = |i: usize| gamma[i] * (x[i] - mean) * scale + beta[i];
                (0..c).map(y).collect::<Vec<f64>>()
            }).collect();
            let found = apply(op, &[(shape, &x[..]), (vector, &gamma), (vector, &beta)]);
            let narrow = |v: &[f64]| v.iter().map(|&v| v as f32).collect::<Vec<f32>>();
            let inputs = [narrow(&x), narrow(&gamma), narrow(&beta)];
            let single = apply(op, &[(shape, &inputs[0][..]), (vector, &inputs[1]), (vector, &inputs[2])]);
            for ((found, single), expected) in found.iter().zip(&single).zip(&expected) {
                prop_assert!((found - expected).abs() < 1e-12);
                prop_assert!((f64::from(*single) - expected).abs() < 1e-4);
            }
        }
    }

    #[test]
    fn impossible_shapes_are_named() {
        let (x, vector) = (Shape::new(2, 3, 3, 4), Shape::per_channel(4));
        let op = LayerNorm { eps: 1e-5 };
        assert!(op.outputs(&[x, vector, vector]).is_ok());
        let error = op.outputs(&[x, vector, Shape::per_channel(3)]).unwrap_err();
        assert!(error.to_string().contains("beta"), "{error}");
    }
}
