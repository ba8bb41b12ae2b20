//! Group normalisation (Wu & He 2018) with the activation that follows it.

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

/// Inputs `x` (N×H×W×C), `gamma`, `beta` (per channel); outputs `y = a(γ·x̂ + β)` with `x̂ = (x − μ)/√(σ² + ε)`,
/// and the mean `μ` and biased variance `σ²` of each image's groups of `C/groups` neighbouring channels
/// (N×1×1×groups).
///
/// Passes over memory: reads `x` twice, writes `y`. The gradient reads `x` and `dy` twice and writes `dx`,
/// over `dy` where it can. `μ` and `σ²` as outputs are not differentiable.
#[derive(Clone, Copy, Debug)]
pub struct GroupNorm {
    /// Number of groups; divides the number of channels.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f64,
    /// Applied to the result.
    pub activation: Activation,
}

impl GroupNorm {
    fn norm(&self) -> Norm {
        Norm {
            statistics: Statistics::Groups(self.groups),
            eps: self.eps,
            activation: self.activation,
        }
    }
}

impl<T: Real> Kernel<T> for GroupNorm {
    fn run(&self, io: &mut Io<'_, T>) {
        self.norm().run(io);
    }
}

impl Op for GroupNorm {
    fn name(&self) -> &'static str {
        "group_norm"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        let x = inputs[0];
        if self.groups == 0 || !x.c.is_multiple_of(self.groups) {
            return Err(Error::shape(
                self.name(),
                format!(
                    "cannot split the channels of {x} into {} groups",
                    self.groups
                ),
            ));
        }
        self.norm().check(self.name(), inputs)?;
        let statistics = self.norm().statistics.shape(x);
        Ok(vec![x, statistics, statistics])
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
        Some((
            Arc::new(Again(self.norm())),
            [inputs, &outputs[1..]].concat(),
        ))
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        norm::differentiable(self.name(), at)?;
        let (mean, var) = (at.output(1), at.output(2));
        self.norm().backward(at, mean, var)
    }
}

/// [`GroupNorm`]'s `y` again from kept statistics; inputs `x`, `gamma`, `beta`, `mean`, `var`.
#[derive(Clone, Copy, Debug)]
struct Again(Norm);

impl<T: Real> Kernel<T> for Again {
    fn run(&self, io: &mut Io<'_, T>) {
        let (mean, var) = (io.input(3), io.input(4));
        let scratch = io.scratch();
        self.0.normalise(io, scratch, mean, var);
    }
}

impl Op for Again {
    fn name(&self) -> &'static str {
        "group_normalize"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        self.0.check(self.name(), inputs)?;
        Ok(vec![inputs[0]])
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        self.0.flops(inputs[0])
    }
    fn scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        self.0.scratch(inputs[0])
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let (mean, var) = (at.input(3), at.input(4));
        self.0.launch_normalise(at, mean, var)
    }
}

pub(super) fn group_norm_case(s: &mut Sampler) -> Case {
    let mut shape = s.shape();
    let groups = s.size(1, 3);
    shape.c = groups * s.size(1, 3);
    // The gradient of a group of one element is zero but for rounding: there is nothing to compare.
    shape.w += usize::from(shape.pixels() * shape.c == groups);
    let count = shape.pixels() * shape.c / groups;
    let eps = if count < 12 {
        s.uniform(0.1, 1.0)
    } else {
        1e-3
    };
    let op = GroupNorm {
        groups,
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
