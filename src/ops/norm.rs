//! What batch and group normalisation share: `y = a(u)`, `u = γ·x̂ + β`, `x̂ = (x − μ)/√(σ² + ε)`,
//! where `μ` and `σ²` are taken over the pixels of a segment and the channels of a group.
//!
//! With `g = dy·a′(u)`, `n` elements to a group and means over the group,
//!
//! ```text
//! dβ = Σ g    dγ = Σ g·x̂    dx = (γ·g − mean(γ·g) − x̂·mean(γ·g·x̂)) / √(σ² + ε)
//! ```
//!
//! (Ioffe & Szegedy 2015), without the two means where `μ` and `σ²` are constants. `u` is computed again
//! from `x`, so that nothing but `x` and the statistics is kept for the gradient.

use super::activation::Activation;
use super::rows::{Lanewise, Rows};
use super::{Cost, Kernel, Op};
use crate::device::cpu::Io;
use crate::device::simd::Lanes;
use crate::error::{Error, Result};
use crate::gradcheck::Sampler;
use crate::tape::{Backward, Var};
use crate::tensor::{Real, Shape};

/// Where mean and variance come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Statistics {
    /// Per channel over the batch.
    Batch,
    /// Per image and group of channels.
    Groups(usize),
    /// Per channel, not depending on `x`.
    Constant,
}

impl Statistics {
    fn rows(self, shape: Shape) -> Rows {
        match self {
            Self::Batch | Self::Constant => Rows::of_batch(shape),
            Self::Groups(_) => Rows::of_images(shape),
        }
    }

    /// Groups of channels in each segment.
    fn groups(self, shape: Shape) -> usize {
        match self {
            Self::Batch | Self::Constant => shape.c,
            Self::Groups(groups) => groups,
        }
    }

    /// Extent of mean and variance.
    pub(super) fn shape(self, x: Shape) -> Shape {
        match self {
            Self::Batch | Self::Constant => Shape::per_channel(x.c),
            Self::Groups(groups) => Shape::per_image(x.n, groups),
        }
    }
}

/// `y = a(γ·x̂ + β)`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Norm {
    pub statistics: Statistics,
    pub eps: f64,
    pub activation: Activation,
}

impl Norm {
    /// The shape rule for the inputs `x`, `gamma`, `beta` and any statistics that follow.
    pub fn check(&self, op: &'static str, inputs: &[Shape]) -> Result<()> {
        let x = inputs[0];
        let vector = Shape::per_channel(x.c);
        let expected = [x, vector, vector]
            .into_iter()
            .chain(std::iter::repeat(self.statistics.shape(x)));
        for ((name, &found), expected) in ["x", "gamma", "beta", "mean", "var"]
            .iter()
            .zip(inputs)
            .zip(expected)
        {
            if found != expected {
                return Err(Error::shape(
                    op,
                    format!("{name}: expected {expected}, found {found}"),
                ));
            }
        }
        Ok(())
    }

    /// Elements of working memory of [`Norm::run`].
    pub fn scratch(&self, x: Shape) -> usize {
        let rows = self.statistics.rows(x);
        let sums = match self.statistics {
            Statistics::Constant => 0,
            Statistics::Batch | Statistics::Groups(_) => rows.sums_len(3),
        };
        sums.max(rows.tables_len(3))
    }

    /// Takes the statistics of input 0 into outputs 1 and 2, then normalises.
    pub fn run<T: Real>(&self, io: &mut Io<'_, T>) {
        let (x, shape) = (io.input(0), io.input_shape(0));
        let rows = self.statistics.rows(shape);
        let (scratch, mean, var) = (io.scratch(), io.output(1), io.output(2));
        rows.deviations(x, scratch);
        let groups = self.statistics.groups(shape);
        let width = shape.c / groups;
        rows.moments(scratch, width, mean, var);
        self.normalise(io, scratch, mean, var);
    }

    /// Normalises input 0 (or what output 0 holds in its place) with the given statistics.
    pub fn normalise<T: Real>(&self, io: &mut Io<'_, T>, scratch: &mut [T], mean: &[T], var: &[T]) {
        let x = (!io.in_place()).then(|| io.input(0));
        let shape = io.input_shape(0);
        let (rows, groups) = (self.statistics.rows(shape), self.statistics.groups(shape));
        let (gamma, beta, y) = (io.input(1), io.input(2), io.output(0));
        let eps = T::of(self.eps);
        rows.tables(scratch, |s, c| {
            let g = s * groups + c * groups / shape.c;
            [mean[g], gamma[c] / (var[g] + eps).sqrt(), beta[c]]
        });
        rows.map(Normalised(self.activation), [x], scratch, y);
    }

    /// Records the gradient, given the values of `mean` and `var`.
    pub fn backward(self, at: &mut Backward<'_>, mean: Var, var: Var) -> Result<()> {
        let Some(dy) = at.gradient(0) else {
            return Ok(());
        };
        let (x, gamma, beta) = (at.input(0), at.input(1), at.input(2));
        let gradients = at.push_all(NormGradient(self), &[x, gamma, beta, mean, var, dy])?;
        (0..3).try_for_each(|i| at.set(i, gradients[i]))
    }

    pub fn flops(&self, x: Shape) -> u64 {
        let statistics = match self.statistics {
            Statistics::Constant => 0,
            Statistics::Batch | Statistics::Groups(_) => 5,
        };
        (statistics + 3 + self.activation.flops()) * x.len() as u64
    }
}

/// Refuses a gradient that reaches the statistics of a normalisation, its outputs 1 and 2.
pub(super) fn differentiable(op: &'static str, at: &Backward<'_>) -> Result<()> {
    match at.gradient(1).or(at.gradient(2)) {
        Some(_) => Err(Error::shape(op, "mean and var have no derivative")),
        None => Ok(()),
    }
}

#[derive(Clone, Copy)]
struct Normalised(Activation);

impl Lanewise<1, 3, 1> for Normalised {
    #[inline(always)]
    fn at<L: Lanes>(self, [x]: [L; 1], [mean, scale, beta]: [L; 3]) -> [L; 1] {
        [self.0.apply((x - mean).mul_add(scale, beta))]
    }
}

/// Gradient of the normalisations; inputs `x`, `gamma`, `beta`, `mean`, `var`, `dy`, outputs `dx`,
/// `dgamma`, `dbeta`. Two passes: `x` and `dy` are read for the sums, then read again to write `dx`.
#[derive(Clone, Copy, Debug)]
struct NormGradient(Norm);

impl<T: Real> Kernel<T> for NormGradient {
    fn run(&self, io: &mut Io<'_, T>) {
        let Norm {
            statistics,
            eps,
            activation,
        } = self.0;
        let shape = io.input_shape(0);
        let (rows, groups) = (statistics.rows(shape), statistics.groups(shape));
        let (x, gamma, beta) = (io.input(0), io.input(1), io.input(2));
        let (mean, var) = (io.input(3), io.input(4));
        let dy = (!io.in_place()).then(|| io.input(5));
        let (dx, dgamma, dbeta) = (io.output(0), io.output(1), io.output(2));
        let (tables, sums) = io.scratch().split_at_mut(rows.tables_len(5));

        let eps = T::of(eps);
        let group = |s: usize, c: usize| s * groups + c * groups / shape.c;
        let rstd = |s: usize, c: usize| (var[group(s, c)] + eps).sqrt().recip();
        rows.tables(tables, |s, c| {
            [mean[group(s, c)], gamma[c] * rstd(s, c), beta[c]]
        });
        rows.sum(
            GradientTerms(activation),
            [x, dy.unwrap_or(dx)],
            tables,
            sums,
        );

        // From Σ g and Σ g·(x − μ) of each segment to those of the batch, then to the means of each group.
        let at = |s, m, c| rows.total::<2>(s, m, c);
        for c in 0..shape.c {
            let segments = 0..rows.segments();
            dbeta[c] = segments.clone().map(|s| sums[at(s, 0, c)]).sum();
            dgamma[c] = segments.map(|s| sums[at(s, 1, c)] * rstd(s, c)).sum();
        }
        let width = shape.c / groups;
        let count = T::of((rows.pixels() * width) as f64);
        for (s, first) in
            (0..rows.segments()).flat_map(|s| (0..groups).map(move |g| (s, g * width)))
        {
            let channels = first..first + width;
            for m in 0..2 {
                let mean = match statistics {
                    Statistics::Constant => T::zero(),
                    _ => {
                        channels
                            .clone()
                            .map(|c| gamma[c] * sums[at(s, m, c)])
                            .sum::<T>()
                            / count
                    }
                };
                channels.clone().for_each(|c| sums[at(s, m, c)] = mean);
            }
        }

        rows.tables(tables, |s, c| {
            let rstd = rstd(s, c);
            [
                mean[group(s, c)],
                gamma[c] * rstd,
                beta[c],
                rstd.powi(3) * sums[at(s, 1, c)],
                rstd * sums[at(s, 0, c)],
            ]
        });
        rows.map(Gradient(activation), [Some(x), dy], tables, dx);
    }
}

#[derive(Clone, Copy)]
struct GradientTerms(Activation);

impl Lanewise<2, 3, 2> for GradientTerms {
    #[inline(always)]
    fn at<L: Lanes>(self, [x, dy]: [L; 2], [mean, scale, beta]: [L; 3]) -> [L; 2] {
        let d = x - mean;
        let g = self.0.gradient(d.mul_add(scale, beta), dy);
        [g, g * d]
    }
}

#[derive(Clone, Copy)]
struct Gradient(Activation);

impl Lanewise<2, 5, 1> for Gradient {
    #[inline(always)]
    fn at<L: Lanes>(self, [x, dy]: [L; 2], [mean, scale, beta, of_gx, of_g]: [L; 5]) -> [L; 1] {
        let d = x - mean;
        let g = self.0.gradient(d.mul_add(scale, beta), dy);
        [g * scale - d.mul_add(of_gx, of_g)]
    }
}

impl Op for NormGradient {
    fn name(&self) -> &'static str {
        match self.0.statistics {
            Statistics::Batch => "batch_norm_gradient",
            Statistics::Groups(_) => "group_norm_gradient",
            Statistics::Constant => "normalize_gradient",
        }
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        Ok(inputs[..3].to_vec())
    }
    fn in_place(&self) -> Option<usize> {
        Some(5)
    }
    fn scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        let rows = self.0.statistics.rows(inputs[0]);
        rows.tables_len(5) + rows.sums_len(2)
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        // The activation's derivative costs about twice the activation, and is taken in both passes.
        (13 + 4 * self.0.activation.flops()) * inputs[0].len() as u64
    }
    fn cost(&self, inputs: &[Shape], outputs: &[Shape]) -> Cost {
        Cost {
            flops: self.flops(inputs, outputs),
            elements: 5 * inputs[0].len() as u64,
        }
    }
}

/// A random activation.
pub(super) fn activation(s: &mut Sampler) -> Activation {
    [Activation::Identity, Activation::Relu, Activation::Silu][s.size(0, 2)]
}

/// Step of the finite differences: longer than usual, as the gradient may be small against `y`.
pub(super) const STEP: f64 = 1e-4;

/// Draws the inputs of a gradient check: `x`, `gamma`, `beta`, `mean`, `var` (the last two used by
/// constant statistics only), such that no `u` comes close to the kink of ReLU.
pub(super) fn draw(s: &mut Sampler, norm: Norm, shape: Shape) -> [Vec<f64>; 5] {
    loop {
        let offset = s.uniform(-2.0, 2.0);
        let groups = norm.statistics.shape(shape).len();
        let drawn = [
            s.values(shape.len(), offset - 2.0, offset + 2.0),
            s.values_off_zero(shape.c, 0.3, 1.5),
            s.values(shape.c, -1.0, 1.0),
            s.values(groups, offset - 1.0, offset + 1.0),
            s.values(groups, 0.1, 2.0),
        ];
        let [x, gamma, beta, mean, var] = &drawn;
        let given = (norm.statistics == Statistics::Constant).then_some((&mean[..], &var[..]));
        let [mut u, _, var] = reference(norm, shape, x, gamma, beta, given);
        // What a step of the finite differences can move u by, with room to spare.
        let rstd = var
            .iter()
            .fold(0.0f64, |m, v| m.max((v + norm.eps).sqrt().recip()));
        u.retain(|u| u.abs() < 5.0 * STEP * rstd.max(1.0));
        if norm.activation != Activation::Relu || u.is_empty() {
            return drawn;
        }
    }
}

/// `u`, mean and variance by their definition.
pub(super) fn reference(
    norm: Norm,
    shape: Shape,
    x: &[f64],
    gamma: &[f64],
    beta: &[f64],
    given: Option<(&[f64], &[f64])>,
) -> [Vec<f64>; 3] {
    let groups = norm.statistics.groups(shape);
    let segments = norm.statistics.shape(shape).len() / groups;
    let group = |i: usize| {
        let segment = i / (shape.len() / segments);
        segment * groups + i % shape.c * groups / shape.c
    };
    let mean_of = |f: &dyn Fn(usize) -> f64| {
        let mut sums = vec![0.0; groups * segments];
        (0..x.len()).for_each(|i| sums[group(i)] += f(i));
        let count = (x.len() / sums.len()) as f64;
        sums.iter().map(|sum| sum / count).collect::<Vec<f64>>()
    };
    let (mean, var) = match given {
        Some((mean, var)) => (mean.to_vec(), var.to_vec()),
        None => {
            let mean = mean_of(&|i| x[i]);
            let var = mean_of(&|i| (x[i] - mean[group(i)]).powi(2));
            (mean, var)
        }
    };
    let u = (0..x.len())
        .map(|i| {
            let (g, c) = (group(i), i % shape.c);
            gamma[c] * (x[i] - mean[g]) / (var[g] + norm.eps).sqrt() + beta[c]
        })
        .collect();
    [u, mean, var]
}
