//! Batch normalisation (Ioffe & Szegedy 2015) with the activation that follows it.

use std::sync::Arc;

use super::activation::Activation;
use super::norm::{self, Norm, Statistics};
use super::{Cost, Kernel, Op};
use crate::device::cpu::Io;
use crate::device::gpu::launch::Launches;
use crate::error::{Error, Result};
use crate::gradcheck::{Case, Sampler};
use crate::tape::{Backward, Var};
use crate::tensor::{Real, Shape};

/// Training mode. Inputs `x` (N×H×W×C), `gamma`, `beta` (per channel); outputs `y = a(γ·x̂ + β)` with
/// `x̂ = (x − μ)/√(σ² + ε)`, and the batch's mean `μ` and biased variance `σ²`, both per channel.
///
/// Passes over memory: reads `x` twice, writes `y`. The gradient reads `x` and `dy` twice and writes
/// `dx`, over `dy` where it can; it takes everything else from `x`, so `y` need not be kept.
/// The gradient flows through `μ` and `σ²` into `x`, but these two outputs themselves are not
/// differentiable: they are there for [`RunningStatistics`].
#[derive(Clone, Copy, Debug)]
pub struct BatchNorm {
    /// Added to the variance.
    pub eps: f64,
    /// Applied to the result.
    pub activation: Activation,
}

impl BatchNorm {
    fn norm(&self) -> Norm {
        Norm {
            statistics: Statistics::Batch,
            eps: self.eps,
            activation: self.activation,
        }
    }
}

impl<T: Real> Kernel<T> for BatchNorm {
    fn run(&self, io: &mut Io<'_, T>) {
        self.norm().run(io);
    }
}

impl Op for BatchNorm {
    fn name(&self) -> &'static str {
        "batch_norm"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        self.norm().check(self.name(), inputs)?;
        let x = inputs[0];
        norm::enough(self.name(), x)?;
        Ok(vec![x, Shape::per_channel(x.c), Shape::per_channel(x.c)])
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        self.norm().flops(inputs[0])
    }
    fn cost(&self, inputs: &[Shape], outputs: &[Shape]) -> Cost {
        Cost {
            flops: self.flops(inputs, outputs),
            elements: 3 * inputs[0].len() as u64,
        }
    }
    fn scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        self.norm().scratch(inputs[0])
    }
    fn device_scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        self.norm().statistics_scratch(inputs[0])
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let (mean, var) = (at.output(1), at.output(2));
        self.norm().launch_statistics(at, mean, var)?;
        self.norm().launch_normalise(at, mean, var)
    }
    fn rerun(&self, inputs: &[Var], outputs: &[Var]) -> Option<(Arc<dyn Op>, Vec<Var>)> {
        let again = Normalize {
            eps: self.eps,
            activation: self.activation,
            of_batch: false,
        };
        Some((Arc::new(again), [inputs, &outputs[1..]].concat()))
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        norm::differentiable(self.name(), at)?;
        let (mean, var) = (at.output(1), at.output(2));
        self.norm().backward(at, mean, var)
    }
}

/// Normalisation with given statistics: evaluation mode, training mode behind a convolution that takes the
/// statistics of its result, and training mode's `y` again from kept statistics. Inputs `x` (N×H×W×C), `gamma`,
/// `beta`, `mean`, `var` (per channel); output `y = a(γ·(x − μ)/√(σ² + ε) + β)`.
///
/// `mean` and `var` have no gradient of their own. The gradient of `x` takes them for constants, or with
/// `of_batch` for what they are of `x`, as that of [`BatchNorm`] does.
/// Passes over memory: reads `x`, writes `y` (in place where `x` is not read again). The gradient reads `x`
/// and `dy` twice and writes `dx`.
#[derive(Clone, Copy, Debug)]
pub struct Normalize {
    /// Added to the variance.
    pub eps: f64,
    /// Applied to the result.
    pub activation: Activation,
    /// Whether `mean` and `var` are those of `x` over the batch; the caller sees to it that they are.
    pub of_batch: bool,
}

impl Normalize {
    fn norm(&self) -> Norm {
        Norm {
            statistics: Statistics::Constant,
            eps: self.eps,
            activation: self.activation,
        }
    }
}

impl<T: Real> Kernel<T> for Normalize {
    fn run(&self, io: &mut Io<'_, T>) {
        let (mean, var) = (io.input(3), io.input(4));
        let scratch = io.scratch();
        self.norm().normalise(io, scratch, mean, var);
    }
}

impl Op for Normalize {
    fn name(&self) -> &'static str {
        "normalize"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        self.norm().check(self.name(), inputs)?;
        Ok(vec![inputs[0]])
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        self.norm().flops(inputs[0])
    }
    fn in_place(&self) -> Option<usize> {
        Some(0)
    }
    fn scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        self.norm().scratch(inputs[0])
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let (mean, var) = (at.input(3), at.input(4));
        self.norm().launch_normalise(at, mean, var)
    }
    fn rerun(&self, inputs: &[Var], _: &[Var]) -> Option<(Arc<dyn Op>, Vec<Var>)> {
        Some((Arc::new(*self), inputs.to_vec()))
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let (mean, var) = (at.input(3), at.input(4));
        let statistics = if self.of_batch {
            Statistics::Batch
        } else {
            Statistics::Constant
        };
        Norm {
            statistics,
            ..self.norm()
        }
        .backward(at, mean, var)
    }
}

/// Moves the running statistics of any number of layers towards those of a batch: for
/// [`crate::tape::Tape::update`], inputs each layer's `mean` and `var` of the batch, targets each layer's running mean
/// and variance (all per channel).
///
/// As in PyTorch, `momentum` is the weight of the new value, and the running variance is the unbiased one.
#[derive(Clone, Debug)]
pub struct RunningStatistics {
    /// Weight of the batch, in 0..=1.
    pub momentum: f64,
    /// For each layer, values per channel that the batch's statistics were taken over, N·H·W; at least 2.
    pub counts: Vec<usize>,
}

impl RunningStatistics {
    /// The factors of a layer's mean and variance.
    fn weights(&self, layer: usize) -> [f64; 2] {
        let count = self.counts[layer] as f64;
        [self.momentum, self.momentum * count / (count - 1.0)]
    }
}

impl<T: Real> Kernel<T> for RunningStatistics {
    fn run(&self, io: &mut Io<'_, T>) {
        let keep = T::of(1.0 - self.momentum);
        let weights = (0..self.counts.len()).flat_map(|layer| self.weights(layer));
        for (i, weight) in weights.enumerate() {
            let (new, running) = (io.input(i), io.output(i));
            let weight = T::of(weight);
            for (running, &new) in running.iter_mut().zip(new) {
                *running = keep * *running + weight * new;
            }
        }
    }
}

impl Op for RunningStatistics {
    fn name(&self) -> &'static str {
        "running_statistics"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        let alike = inputs.chunks(2).all(|pair| pair == [pair[0]; 2]);
        let few = self.counts.iter().any(|&count| count < 2);
        if few || !alike || inputs.len() != 2 * self.counts.len() {
            return Err(Error::shape(
                self.name(),
                format!(
                    "expected pairs of equal shapes over at least 2 values per channel, found {inputs:?} over {:?}",
                    self.counts
                ),
            ));
        }
        Ok(inputs.to_vec())
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        inputs.iter().map(|s| 3 * s.len() as u64).sum()
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let weights: Vec<[f64; 2]> = (0..self.counts.len()).map(|i| self.weights(i)).collect();
        norm::launch_running_statistics(at, 1.0 - self.momentum, &weights)
    }
}

pub(super) fn batch_norm_case(s: &mut Sampler) -> Case {
    let mut shape = s.shape();
    shape.w += usize::from(shape.rows() == 1);
    // With few values the gradient is proportional to ε/(σ² + ε): it must not drown in rounding.
    let eps = if shape.rows() < 12 {
        s.uniform(0.1, 1.0)
    } else {
        1e-3
    };
    let op = BatchNorm {
        eps,
        activation: norm::activation(s),
    };
    let [x, gamma, beta, ..] = norm::draw(s, op.norm(), shape);
    let mut case = Case::new(format!("{shape} {op:?}"), move |t, v| {
        Ok(vec![t.push_all(op, v)?[0]])
    })
    .with("x", shape, x)
    .narrow()
    .with("gamma", Shape::per_channel(shape.c), gamma)
    .with("beta", Shape::per_channel(shape.c), beta);
    case.step = norm::STEP;
    case
}

pub(super) fn normalize_case(s: &mut Sampler) -> Case {
    let shape = s.shape();
    let op = Normalize {
        eps: s.uniform(1e-3, 1.0),
        activation: norm::activation(s),
        of_batch: false,
    };
    let vector = Shape::per_channel(shape.c);
    let [x, gamma, beta, mean, var] = norm::draw(s, op.norm(), shape);
    let mut case = Case::new(format!("{shape} {op:?}"), move |t, v| {
        Ok(vec![t.push(op, v)?])
    })
    .with("x", shape, x)
    .narrow()
    .with("gamma", vector, gamma)
    .with("beta", vector, beta)
    .with_constant("mean", vector, mean)
    .with_constant("var", vector, var);
    case.step = norm::STEP;
    case
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::Session;
    use crate::tape::{Plan, Tape};

    #[test]
    fn running_statistics_move_by_momentum_and_are_unbiased() {
        let mut tape = Tape::new();
        let vector = Shape::per_channel(2);
        let new = [tape.input("mean", vector), tape.input("var", vector)];
        let running = [
            tape.state("running_mean", vector),
            tape.state("running_var", vector),
        ];
        let op = RunningStatistics {
            momentum: 0.25,
            counts: vec![5],
        };
        tape.update(op, &new, &running).unwrap();
        let mut session =
            Session::<f64>::new(Plan::new(&tape, Default::default()).unwrap()).unwrap();
        session.write(new[0], &[1.0, -2.0]);
        session.write(new[1], &[4.0, 8.0]);
        session.write(running[1], &[1.0, 1.0]);
        session.run();
        assert_eq!(session.read(running[0]), [0.25, -0.5]);
        assert_eq!(
            session.read(running[1]),
            [0.75 + 0.25 * 5.0, 0.75 + 0.25 * 10.0]
        );
        session.run();
        assert_eq!(session.read(running[0]), [0.4375, -0.875]);
    }
}
