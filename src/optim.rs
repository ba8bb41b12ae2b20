//! The optimizer, recorded on the tape behind the gradients: clipping by global norm, AdamW, and the
//! moving average of the weights that is evaluated in the end.
//!
//! A gradient whose norm is not finite changes nothing: neither parameters nor moments nor averages.

use rayon::prelude::*;

use crate::device::cpu::Io;
use crate::error::{Error, Result};
use crate::ops::pointwise::Scale;
use crate::ops::{Kernel, Op, control};
use crate::tape::{Tape, Var};
use crate::tensor::{Real, Shape};

/// Elements of one piece of parallel work: a fixed size, so that results cannot depend on threads.
const PIECE: usize = 1 << 14;

/// `√Σ x²` over all elements of all inputs; the squares are summed in `f64`, piece by piece in a fixed
/// order.
#[derive(Clone, Copy, Debug)]
pub struct GlobalNorm;

impl<T: Real> Kernel<T> for GlobalNorm {
    fn run(&self, io: &mut Io<'_, T>) {
        // The arena is aligned to cache lines, so the scratch can hold doubles.
        let partials: &mut [f64] = bytemuck::cast_slice_mut(io.scratch());
        let mut used = 0;
        for i in 0..io.inputs() {
            let x = io.input(i);
            let partials = &mut partials[used..used + x.len().div_ceil(PIECE)];
            partials
                .par_iter_mut()
                .zip(x.par_chunks(PIECE))
                .for_each(|(sum, x)| *sum = sum_of_squares(x));
            used += partials.len();
        }
        let sum: f64 = partials[..used].iter().sum();
        io.output(0)[0] = T::of(sum.sqrt());
    }
}

fn sum_of_squares<T: Real>(x: &[T]) -> f64 {
    let mut lanes = [0.0; 8];
    let (whole, rest) = x.as_chunks::<8>();
    for x in whole {
        for (lane, x) in lanes.iter_mut().zip(x) {
            *lane += x.wide() * x.wide();
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|x| x.wide() * x.wide()).sum::<f64>()
}

impl Op for GlobalNorm {
    fn name(&self) -> &'static str {
        "global_norm"
    }
    fn outputs(&self, _: &[Shape]) -> Result<Vec<Shape>> {
        Ok(vec![Shape::SCALAR])
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        inputs.iter().map(|s| 2 * s.len() as u64).sum()
    }
    fn scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        // Two elements hold a double where elements are `f32`.
        2 * inputs
            .iter()
            .map(|s| s.len().div_ceil(PIECE))
            .sum::<usize>()
    }
}

/// What the optimizer does to one parameter beside following its gradient.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Rule {
    /// Weight decay applies: to weights, not to biases, norms and the prior.
    pub decay: bool,
    /// Negative elements are set to 0 after the update (projection).
    pub nonnegative: bool,
}

/// Adam with decoupled weight decay (Loshchilov, Hutter 2019), in PyTorch's order of operations:
///
/// ```text
/// g ← g · min(1, clip / ‖g‖)            ‖g‖ over all parameters
/// θ ← θ − η·λ·θ
/// m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²
/// θ ← θ − η/(1 − β₁ᵗ) · m / (√v/√(1 − β₂ᵗ) + ε)
/// ```
///
/// `t` and `η` come from the control vector. Inputs: norm (a scalar), control, one gradient per
/// parameter. Updates: all parameters, all `m`, all `v`.
#[derive(Clone, PartialEq, Debug)]
pub struct AdamW {
    /// Decay of the first moment, β₁.
    pub beta1: f64,
    /// Decay of the second moment, β₂.
    pub beta2: f64,
    /// ε.
    pub eps: f64,
    /// λ.
    pub weight_decay: f64,
    /// Largest norm of the gradient; `f64::INFINITY` leaves it as it is.
    pub clip: f64,
    /// One per parameter.
    pub rules: Vec<Rule>,
}

impl AdamW {
    /// Appends the update of `parameters`: the norm of `gradients`, which is returned, and the step,
    /// which is left out where the norm or the scalar `loss` is not finite, and whose moments become states named `adam.first.NAME` and `adam.second.NAME`. `rules` of `self`
    /// pair with `parameters`. `control` is the input described by [`control`].
    ///
    /// # Errors
    /// [`Error::Shape`] if there is not one rule, and one gradient of the right shape, for each
    /// parameter.
    pub fn record(
        self,
        tape: &mut Tape,
        control: Var,
        loss: Var,
        parameters: &[Var],
        gradients: &[Var],
    ) -> Result<Var> {
        // 0·loss adds nothing to the norm, or makes it NaN if the loss is not finite.
        let guard = tape.push(Scale { factor: 0.0 }, &[loss])?;
        let norm = tape.push(GlobalNorm, &[gradients, &[guard]].concat())?;
        let inputs = [&[norm, control], gradients].concat();
        let mut targets = parameters.to_vec();
        for moment in ["adam.first", "adam.second"] {
            for &parameter in parameters {
                targets.push(companion(tape, moment, parameter));
            }
        }
        tape.update(self, &inputs, &targets)?;
        Ok(norm)
    }
}

/// A state of the shape of `var`, named after it.
fn companion(tape: &mut Tape, prefix: &str, var: Var) -> Var {
    let (name, shape) = (tape.name(var).to_owned(), tape.shape(var));
    tape.scope(prefix, |tape| tape.state(&name, shape))
}

impl<T: Real> Kernel<T> for AdamW {
    fn run(&self, io: &mut Io<'_, T>) {
        let (norm, control) = (io.input(0)[0].wide(), io.input(1));
        if !norm.is_finite() {
            return;
        }
        let step = control[control::STEP].wide();
        let rate = control[control::LEARNING_RATE].wide();
        let clip = if norm > self.clip {
            T::of(self.clip / norm)
        } else {
            T::one()
        };
        let (beta1, beta2, eps) = (T::of(self.beta1), T::of(self.beta2), T::of(self.eps));
        let (fresh1, fresh2) = (T::of(1.0 - self.beta1), T::of(1.0 - self.beta2));
        let size = T::of(rate / (1.0 - self.beta1.powf(step)));
        let correction = T::of((1.0 - self.beta2.powf(step)).sqrt());
        let count = self.rules.len();
        for (index, rule) in self.rules.iter().enumerate() {
            let keep = T::of(if rule.decay {
                1.0 - rate * self.weight_decay
            } else {
                1.0
            });
            let lowest = if rule.nonnegative {
                T::zero()
            } else {
                T::neg_infinity()
            };
            let gradient = io.input(2 + index);
            let parameter = io.output(index);
            let first = io.output(count + index);
            let second = io.output(2 * count + index);
            parameter
                .par_chunks_mut(PIECE)
                .zip(first.par_chunks_mut(PIECE))
                .zip(second.par_chunks_mut(PIECE))
                .zip(gradient.par_chunks(PIECE))
                .for_each(|(((parameter, first), second), gradient)| {
                    for (((p, m), v), &g) in
                        parameter.iter_mut().zip(first).zip(second).zip(gradient)
                    {
                        let g = g * clip;
                        *m = beta1 * *m + fresh1 * g;
                        *v = beta2 * *v + fresh2 * g * g;
                        let denominator = v.sqrt() / correction + eps;
                        *p = (*p * keep - size * *m / denominator).max(lowest);
                    }
                });
        }
    }
}

impl Op for AdamW {
    fn name(&self) -> &'static str {
        "adamw"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        check_control(self.name(), inputs)?;
        let gradients = &inputs[2..];
        if gradients.len() != self.rules.len() {
            return Err(Error::shape(
                self.name(),
                format!(
                    "expected {} gradients, found {}",
                    self.rules.len(),
                    gradients.len()
                ),
            ));
        }
        Ok(gradients.repeat(3))
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        inputs[2..].iter().map(|s| 14 * s.len() as u64).sum()
    }
}

/// Exponential moving averages: `a ← a + (1 − d)(x − a)`, `d` from the control vector. Inputs: norm,
/// control, then any number of `x`. Updates one `a` for each.
///
/// Running statistics are averaged along with the weights they belong to.
#[derive(Clone, Copy, Debug)]
pub struct Ema;

impl Ema {
    /// Appends the averaging of `values`; the averages become states named `ema.NAME`. `norm` is what
    /// [`AdamW::record`] returned.
    ///
    /// # Errors
    /// Never for values of the tape.
    pub fn record(tape: &mut Tape, control: Var, norm: Var, values: &[Var]) -> Result<()> {
        let inputs = [&[norm, control], values].concat();
        let targets: Vec<Var> = values.iter().map(|&v| companion(tape, "ema", v)).collect();
        tape.update(Ema, &inputs, &targets)
    }
}

impl<T: Real> Kernel<T> for Ema {
    fn run(&self, io: &mut Io<'_, T>) {
        if !io.input(0)[0].is_finite() {
            return;
        }
        let fresh = T::one() - io.input(1)[control::EMA_DECAY];
        for index in 0..io.outputs() {
            io.output(index)
                .par_chunks_mut(PIECE)
                .zip(io.input(2 + index).par_chunks(PIECE))
                .for_each(|(average, x)| {
                    for (a, &x) in average.iter_mut().zip(x) {
                        *a += fresh * (x - *a);
                    }
                });
        }
    }
}

impl Op for Ema {
    fn name(&self) -> &'static str {
        "ema"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        check_control(self.name(), inputs)?;
        Ok(inputs[2..].to_vec())
    }
    fn flops(&self, _: &[Shape], outputs: &[Shape]) -> u64 {
        outputs.iter().map(|s| 3 * s.len() as u64).sum()
    }
}

fn check_control(op: &'static str, inputs: &[Shape]) -> Result<()> {
    let expected = [Shape::SCALAR, Shape::per_channel(control::LEN)];
    if inputs.len() > 2 && inputs[..2] == expected {
        Ok(())
    } else {
        let problem = format!("expected norm, control and at least one value, found {inputs:?}");
        Err(Error::shape(op, problem))
    }
}
