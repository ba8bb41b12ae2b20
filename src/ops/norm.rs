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

mod device;

use super::activation::Activation;
use super::batch_norm::Normalize;
use super::rows::{Lanewise, Rows};
use super::{Cost, Kernel, Op};
use crate::device::cpu::Io;
use crate::device::gpu::launch::Launches;
use crate::device::simd::Lanes;
use crate::error::{Error, Result};
use crate::gradcheck::{Case, Sampler};
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

pub(super) use device::{FINISH_THREADS, Partials, THREADS, Walk, launch_running_statistics};

/// Refuses to take the statistics of a batch with a single value per channel.
pub(super) fn enough(op: &'static str, x: Shape) -> Result<()> {
    if x.rows() < 2 {
        return Err(Error::shape(
            op,
            format!("expected at least 2 values per channel, found 1 in {x}"),
        ));
    }
    Ok(())
}

/// Refuses a gradient that reaches the statistics of a batch, outputs 1 and 2.
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
    fn device_scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        self.0.gradient_scratch(inputs[0])
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        self.0.launch_gradient(at)
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
/// constant statistics only), such that no `u` comes close to the kink of ReLU, and not all `u` that pass it are
/// differences of almost equal numbers. `x` holds numbers of bf16, so that it stays what it is where it is stored
/// so.
pub(super) fn draw(s: &mut Sampler, norm: Norm, shape: Shape) -> [Vec<f64>; 5] {
    loop {
        let offset = s.uniform(-2.0, 2.0);
        let value = |s: &mut Sampler| {
            let x = s.uniform(offset - 2.0, offset + 2.0);
            half::bf16::from_f64(x).to_f64()
        };
        let groups = norm.statistics.shape(shape).len();
        let mut x: Vec<f64> = (0..shape.len()).map(|_| value(s)).collect();
        let gamma = s.values_off_zero(shape.c, 0.3, 1.5);
        let beta = s.values(shape.c, -1.0, 1.0);
        let mean = s.values(groups, offset - 1.0, offset + 1.0);
        let var = s.values(groups, 0.1, 2.0);
        let given = (norm.statistics == Statistics::Constant).then_some((&mean[..], &var[..]));
        if norm.activation != Activation::Relu {
            return [x, gamma, beta, mean, var];
        }
        loop {
            let [u, _, var_of_x] = reference(norm, shape, &x, &gamma, &beta, given);
            if !u.iter().any(|&u| u > 0.1) {
                break;
            }
            // What a step of the finite differences can move u by, with room to spare.
            let rstd = var_of_x
                .iter()
                .fold(0.0f64, |m, v| m.max((v + norm.eps).sqrt().recip()));
            let gap = 5.0 * STEP * rstd.max(1.0);
            let close = x.iter_mut().zip(&u).filter(|(_, u)| u.abs() < gap);
            if close.map(|(x, _)| *x = value(s)).count() == 0 {
                return [x, gamma, beta, mean, var];
            }
        }
    }
}

/// A gradient check of a convolution with statistics, `y, mean, var` from `x` and `w`, and the normalisation that
/// takes them. A small `ε` would leave little gradient for `w`, on whose scale `x̂` does not depend.
pub(super) fn case_of_batch(
    s: &mut Sampler,
    op: impl Op + Copy + 'static,
    x: Shape,
    w: Shape,
) -> Case {
    let norm = Normalize {
        eps: s.uniform(0.1, 1.0),
        activation: [Activation::Identity, Activation::Silu][s.size(0, 1)],
        of_batch: true,
    };
    let vector = Shape::per_channel(w.n);
    let mut case = Case::new(format!("{x} ∗ {w}, {op:?}, {norm:?}"), move |t, v| {
        let y = t.push_all(op, &v[..2])?;
        Ok(vec![t.push(norm, &[y[0], v[2], v[3], y[1], y[2]])?])
    })
    .with("x", x, s.values(x.len(), -1.0, 1.0))
    .with("w", w, s.narrow_values(w.len(), -1.0, 1.0))
    .with("gamma", vector, s.values_off_zero(w.n, 0.3, 1.5))
    .with("beta", vector, s.values(w.n, -1.0, 1.0));
    case.step = STEP;
    case
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device::cpu::{Element, Session};
    use crate::ops::batch_norm::BatchNorm;
    use crate::ops::group_norm::GroupNorm;
    use crate::tape::{Plan, Tape};

    /// Outputs of the forward step and the gradients of `Σ y·dy`, `dy` being 1, 2, 3, 1, 2, 3, …
    fn replay<T: Element>(norm: Norm, shape: Shape, inputs: &[Vec<f64>]) -> Vec<Vec<T>> {
        let Norm {
            statistics,
            eps,
            activation,
        } = norm;
        let mut tape = Tape::new();
        let vector = Shape::per_channel(shape.c);
        let shapes = [shape, vector, vector, vector, vector];
        let vars: Vec<Var> = shapes[..inputs.len()]
            .iter()
            .map(|&s| tape.input("input", s))
            .collect();
        let outputs = match statistics {
            Statistics::Batch => tape.push_all(BatchNorm { eps, activation }, &vars),
            Statistics::Constant => {
                let of_batch = false;
                let op = Normalize {
                    eps,
                    activation,
                    of_batch,
                };
                tape.push_all(op, &vars)
            }
            Statistics::Groups(groups) => {
                let op = GroupNorm {
                    groups,
                    eps,
                    activation,
                };
                tape.push_all(op, &vars)
            }
        }
        .unwrap();
        let dy = tape.input("dy", shape);
        let gradients = tape.backward_from(&[(outputs[0], dy)], &vars[..3]).unwrap();
        let results: Vec<Var> = outputs
            .into_iter()
            .chain(gradients.into_iter().flatten())
            .collect();
        results.iter().for_each(|&v| tape.keep(v));
        let mut session = Session::<T>::new(Plan::new(&tape, Default::default()).unwrap()).unwrap();
        for (&var, values) in vars.iter().zip(inputs) {
            let values: Vec<T> = values.iter().map(|&v| T::of(v)).collect();
            session.write(var, &values);
        }
        let ramp: Vec<T> = (0..shape.len())
            .map(|i| T::of((i % 3 + 1) as f64))
            .collect();
        session.write(dy, &ramp);
        session.run();
        results.iter().map(|&v| session.read(v).to_vec()).collect()
    }

    fn activate(activation: Activation, u: f64) -> f64 {
        match activation {
            Activation::Identity => u,
            Activation::Relu => u.max(0.0),
            Activation::Silu => u / (1.0 + (-u).exp()),
        }
    }

    fn close(found: &[f64], expected: &[f64], tolerance: f64) {
        assert_eq!(found.len(), expected.len());
        for (i, (a, b)) in found.iter().zip(expected).enumerate() {
            assert!(
                (a - b).abs() <= tolerance * b.abs().max(1.0),
                "{i}: {a} for {b}"
            );
        }
    }

    fn wide<T: Real>(values: &[T]) -> Vec<f64> {
        values.iter().map(|v| v.wide()).collect()
    }

    /// Channels below, at and beyond the width of vectors, and enough pixels for several pieces.
    fn problems() -> impl Strategy<Value = (Norm, Shape)> {
        let channels = prop::sample::select(vec![1usize, 2, 3, 6, 16, 18, 33, 48, 130, 300]);
        let statistics = prop::sample::select(vec![
            Statistics::Batch,
            Statistics::Constant,
            Statistics::Groups(1),
            Statistics::Groups(2),
            Statistics::Groups(3),
        ]);
        let activation = prop::sample::select(vec![
            Activation::Identity,
            Activation::Relu,
            Activation::Silu,
        ]);
        let norm = (statistics, activation).prop_map(|(statistics, activation)| Norm {
            statistics,
            eps: 1e-3,
            activation,
        });
        (norm, channels, 1..4usize, 1..24usize, 2..24usize).prop_map(|(mut norm, c, n, h, w)| {
            if let Statistics::Groups(groups) = &mut norm.statistics
                && !c.is_multiple_of(*groups)
            {
                *groups = c;
            }
            (norm, Shape::new(n, h, w, c))
        })
    }

    #[test]
    fn a_nan_makes_the_statistics_of_its_channel_nan() {
        let norm = Norm {
            statistics: Statistics::Batch,
            eps: 1e-3,
            activation: Activation::Identity,
        };
        let shape = Shape::new(2, 2, 2, 3);
        let mut x = vec![1.0; shape.len()];
        x[4] = f64::NAN;
        let found = replay::<f64>(norm, shape, &[x, vec![1.0; 3], vec![0.0; 3]]);
        let [y, mean, var] = [0, 1, 2].map(|k| &found[k]);
        for c in 0..3 {
            let is_nan = [y[c], mean[c], var[c]].map(f64::is_nan);
            assert_eq!(is_nan, [c == 1; 3], "channel {c}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn outputs_follow_their_definition((norm, shape) in problems(), seed in any::<u64>()) {
            let mut s = Sampler::new(seed);
            let inputs = [
                s.values(shape.len(), -1.0, 3.0),
                s.values(shape.c, -1.5, 1.5),
                s.values(shape.c, -1.0, 1.0),
                s.values(shape.c, -1.0, 1.0),
                s.values(shape.c, 0.1, 2.0),
            ];
            let [x, gamma, beta, mean, var] = &inputs;
            let constant = norm.statistics == Statistics::Constant;
            let given = constant.then_some((&mean[..], &var[..]));
            let [u, mean, var] = reference(norm, shape, x, gamma, beta, given);
            let y: Vec<f64> = u.iter().map(|&u| activate(norm.activation, u)).collect();
            let found = replay::<f64>(norm, shape, &inputs[..if constant { 5 } else { 3 }]);
            close(&found[0], &y, 1e-12);
            if !constant {
                close(&found[1], &mean, 1e-13);
                close(&found[2], &var, 1e-12);
            }
            let single = replay::<f32>(norm, shape, &inputs[..if constant { 5 } else { 3 }]);
            for (f32s, f64s) in single.iter().zip(&found).take(if constant { 1 } else { 3 }) {
                close(&wide(f32s), f64s, 1e-4);
            }
        }

        #[test]
        fn threads_do_not_change_a_bit((norm, shape) in problems(), seed in any::<u64>()) {
            let mut s = Sampler::new(seed);
            let statistics = norm.statistics == Statistics::Constant;
            let mut inputs = vec![
                s.values(shape.len(), -1.0, 3.0),
                s.values(shape.c, -1.5, 1.5),
                s.values(shape.c, -1.0, 1.0),
            ];
            if statistics {
                inputs.extend([s.values(shape.c, -1.0, 1.0), s.values(shape.c, 0.1, 2.0)]);
            }
            let [one, two, three] = [1, 2, 3].map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| replay::<f32>(norm, shape, &inputs))
            });
            prop_assert!(one == two && one == three);
        }
    }

    #[test]
    fn a_mean_far_from_zero_costs_no_accuracy() {
        let shape = Shape::new(2, 40, 40, 24);
        let mut s = Sampler::new(7);
        // Numbers that f32 holds exactly, so that both references see the same problem.
        let x: Vec<f64> = s
            .values(shape.len(), -1.7, 1.7)
            .iter()
            .map(|v| f64::from((1e3 + v) as f32))
            .collect();
        let inputs = [x, vec![1.0; shape.c], vec![0.0; shape.c]];
        for statistics in [Statistics::Batch, Statistics::Groups(4)] {
            let norm = Norm {
                statistics,
                eps: 1e-5,
                activation: Activation::Identity,
            };
            let exact = replay::<f64>(norm, shape, &inputs);
            let single = replay::<f32>(norm, shape, &inputs);
            close(&wide(&single[1]), &exact[1], 1e-7);
            close(&wide(&single[2]), &exact[2], 1e-6);
            // The mean itself is rounded to a multiple of 6e-5.
            close(&wide(&single[0]), &exact[0], 1e-4);
            close(&wide(&single[3]), &exact[3], 1e-3);
        }
    }

    #[test]
    fn a_group_of_one_element_gives_beta_and_no_gradient() {
        let norm = Norm {
            statistics: Statistics::Groups(2),
            eps: 1e-3,
            activation: Activation::Identity,
        };
        let shape = Shape::new(3, 1, 1, 2);
        let inputs = [
            vec![5.0, -1.0, 2.0, 3.0, 0.5, 9.0],
            vec![2.0, 3.0],
            vec![0.25, -0.5],
        ];
        let found = replay::<f64>(norm, shape, &inputs);
        assert_eq!(found[0], [0.25, -0.5, 0.25, -0.5, 0.25, -0.5]);
        assert!(found[3].iter().all(|dx| dx.abs() < 1e-12));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let vector = Shape::per_channel(4);
        let batch = BatchNorm {
            eps: 1e-5,
            activation: Activation::Identity,
        };
        let groups = |groups| GroupNorm {
            groups,
            eps: 1e-5,
            activation: Activation::Identity,
        };
        let x = Shape::new(2, 3, 3, 4);
        assert!(batch.outputs(&[x, vector, vector]).is_ok());
        assert!(
            batch.outputs(&[vector, vector, vector]).is_err(),
            "one value per channel"
        );
        assert!(batch.outputs(&[x, Shape::per_channel(3), vector]).is_err());
        assert!(groups(2).outputs(&[x, vector, vector]).is_ok());
        assert!(groups(3).outputs(&[x, vector, vector]).is_err());
        assert!(groups(0).outputs(&[x, vector, vector]).is_err());

        let mut tape = Tape::new();
        let vars = [x, vector, vector].map(|s| tape.input("input", s));
        let mean = tape.push_all(batch, &vars).unwrap()[1];
        let seed = tape.input("seed", vector);
        assert!(tape.backward_from(&[(mean, seed)], &vars[..1]).is_err());
    }
}
