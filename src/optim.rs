//! The optimizer, recorded on the tape behind the gradients: clipping by global norm, AdamW, and the
//! moving average of the weights that is evaluated in the end.
//!
//! A gradient whose norm is not finite changes nothing: neither parameters nor moments nor averages.

use rayon::prelude::*;

use crate::device::cpu::Io;
use crate::device::gpu::launch::{Full, Grid, Launches, Pointer, kernel};
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

/// Elements of an entry in the tables of `kernels/optim.cu`, and threads of its blocks.
const NORM_CHUNK: usize = 8192;
const CHUNK: usize = 4096;
const THREADS: u32 = 256;

/// The pieces of at most `chunk` elements, as first element and number, of `len`.
fn chunks(len: usize, chunk: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..len.div_ceil(chunk)).map(move |i| (i * chunk, chunk.min(len - i * chunk)))
}

/// The address of element `first` of an f32 tensor.
fn address(op: &'static str, tensor: Pointer, first: usize) -> Result<u64> {
    if tensor.is_narrow() {
        return Err(Error::device(op, "expected f32, found bf16"));
    }
    Ok(tensor.address() + (first * size_of::<f32>()) as u64)
}

kernel! {
    struct GlobalNormKernel = "global_norm" { pieces: Full, partials: Full }
}

kernel! {
    struct GlobalNormFinish = "global_norm_finish" { partials: Full, norm: Full, count: i32 }
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
    fn narrow(&self, _: usize, _: &[bool]) -> bool {
        false
    }
    fn device_scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        let pieces = inputs.iter().map(|s| s.len().div_ceil(NORM_CHUNK));
        size_of::<f64>() * pieces.sum::<usize>()
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let mut table = Vec::new();
        for i in 0..at.inputs() {
            for (first, len) in chunks(at.input_shape(i).len(), NORM_CHUNK) {
                table.extend([address(self.name(), at.input(i), first)?, len as u64]);
            }
        }
        let count = table.len() / 2;
        let partials = at.scratch().into();
        let pieces = at.constant(&table)?.into();
        at.launch(
            Grid::new(count, THREADS),
            &GlobalNormKernel { pieces, partials },
        )?;
        let finish = GlobalNormFinish {
            partials,
            norm: at.output(0).into(),
            count: count as i32,
        };
        at.launch(Grid::new(1, THREADS), &finish)
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

/// Adam with decoupled weight decay (Loshchilov, Hutter 2019), in PyTorch's order of operations, and
/// exponential moving averages `a` of the parameters θ and of other values:
///
/// ```text
/// g ← g · min(1, clip / ‖g‖)            ‖g‖ over all parameters
/// θ ← θ − η·λ·θ
/// m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²
/// θ ← θ − η/(1 − β₁ᵗ) · m / (√v/√(1 − β₂ᵗ) + ε)
/// a ← a + (1 − d)(θ − a)
/// ```
///
/// `t`, `η` and `d` come from the control vector.
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
    /// which is left out where the norm or the scalar `loss` is not finite. The moments become states named
    /// `adam.first.NAME` and `adam.second.NAME`. `rules` of `self` pair with `parameters`. `control` is the
    /// input described by [`control`].
    ///
    /// With `statistics`, parameters and statistics (which change along with the weights they belong to, but
    /// have no gradient) are averaged into states named `ema.NAME`.
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
        statistics: Option<&[Var]>,
    ) -> Result<Var> {
        // 0·loss adds nothing to the norm, or makes it NaN if the loss is not finite.
        let guard = tape.push(Scale { factor: 0.0 }, &[loss])?;
        let norm = tape.push(GlobalNorm, &[gradients, &[guard]].concat())?;
        let inputs = [&[norm, control], gradients, statistics.unwrap_or_default()].concat();
        let mut targets = parameters.to_vec();
        for moment in ["adam.first", "adam.second"] {
            targets.extend(parameters.iter().map(|&p| companion(tape, moment, p)));
        }
        if let Some(statistics) = statistics {
            let averaged = parameters.iter().chain(statistics);
            targets.extend(averaged.map(|&v| companion(tape, "ema", v)));
        }
        let update = Update {
            adamw: self,
            average: statistics.is_some(),
        };
        tape.update(update, &inputs, &targets)?;
        Ok(norm)
    }
}

/// A state of the shape of `var`, named after it.
fn companion(tape: &mut Tape, prefix: &str, var: Var) -> Var {
    let (name, shape) = (tape.name(var).to_owned(), tape.shape(var));
    tape.scope(prefix, |tape| tape.state(&name, shape))
}

/// The step of [`AdamW`], in one pass over memory. Inputs: norm (a scalar), control, one gradient per
/// parameter, statistics. Updates: all parameters, all `m`, all `v` and, if there are averages, those of all
/// parameters and statistics.
#[derive(Clone, Debug)]
struct Update {
    adamw: AdamW,
    average: bool,
}

/// What is the same for all elements of a parameter.
#[derive(Clone, Copy)]
struct Settings<T> {
    clip: T,
    beta1: T,
    beta2: T,
    fresh1: T,
    fresh2: T,
    eps: T,
    size: T,
    correction: T,
    keep: T,
    lowest: T,
}

impl<T: Real> Settings<T> {
    /// The new value of a parameter, whose moments are updated.
    #[inline(always)]
    fn step(self, g: T, p: T, m: &mut T, v: &mut T) -> T {
        let g = g * self.clip;
        *m = self.beta1 * *m + self.fresh1 * g;
        *v = self.beta2 * *v + self.fresh2 * g * g;
        let denominator = v.sqrt() / self.correction + self.eps;
        (p * self.keep - self.size * *m / denominator).max(self.lowest)
    }
}

impl<T: Real> Kernel<T> for Update {
    fn run(&self, io: &mut Io<'_, T>) {
        let (norm, control) = (io.input(0)[0].wide(), io.input(1));
        if !norm.is_finite() {
            return;
        }
        let adamw = &self.adamw;
        let step = control[control::STEP].wide();
        let rate = control[control::LEARNING_RATE].wide();
        let fresh = T::one() - control[control::EMA_DECAY];
        let clip = if norm > adamw.clip {
            T::of(adamw.clip / norm)
        } else {
            T::one()
        };
        let count = adamw.rules.len();
        for (index, rule) in adamw.rules.iter().enumerate() {
            let settings = Settings {
                clip,
                beta1: T::of(adamw.beta1),
                beta2: T::of(adamw.beta2),
                fresh1: T::of(1.0 - adamw.beta1),
                fresh2: T::of(1.0 - adamw.beta2),
                eps: T::of(adamw.eps),
                size: T::of(rate / (1.0 - adamw.beta1.powf(step))),
                correction: T::of((1.0 - adamw.beta2.powf(step)).sqrt()),
                keep: T::of(if rule.decay {
                    1.0 - rate * adamw.weight_decay
                } else {
                    1.0
                }),
                lowest: if rule.nonnegative {
                    T::zero()
                } else {
                    T::neg_infinity()
                },
            };
            let gradient = io.input(2 + index).par_chunks(PIECE);
            let parameter = io.output(index).par_chunks_mut(PIECE);
            let first = io.output(count + index).par_chunks_mut(PIECE);
            let second = io.output(2 * count + index).par_chunks_mut(PIECE);
            let steps = parameter.zip(first).zip(second).zip(gradient);
            if self.average {
                let average = io.output(3 * count + index).par_chunks_mut(PIECE);
                steps.zip(average).for_each(
                    |((((parameter, first), second), gradient), average)| {
                        let moments = first.iter_mut().zip(second);
                        let elements = parameter.iter_mut().zip(moments).zip(gradient);
                        for (((p, (m, v)), &g), a) in elements.zip(average) {
                            *p = settings.step(g, *p, m, v);
                            *a += fresh * (*p - *a);
                        }
                    },
                );
            } else {
                steps.for_each(|(((parameter, first), second), gradient)| {
                    let moments = first.iter_mut().zip(second);
                    for ((p, (m, v)), &g) in parameter.iter_mut().zip(moments).zip(gradient) {
                        *p = settings.step(g, *p, m, v);
                    }
                });
            }
        }
        for index in count..io.inputs() - 2 {
            let statistic = io.input(2 + index);
            for (a, &x) in io.output(3 * count + index).iter_mut().zip(statistic) {
                *a += fresh * (x - *a);
            }
        }
    }
}

kernel! {
    struct AdamWKernel = "adamw" {
        chunks: Full,
        norm: Full,
        control: Full,
        step: i32,
        rate: i32,
        decay: i32,
        log_beta1: f64,
        log_beta2: f64,
        beta1: f32,
        beta2: f32,
        fresh1: f32,
        fresh2: f32,
        eps: f32,
        clip: f64,
        weight_decay: f64,
    }
}

impl Op for Update {
    fn name(&self) -> &'static str {
        "adamw"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        let control = Shape::per_channel(control::LEN);
        let count = self.adamw.rules.len();
        if inputs[1] != control || inputs.len() < 2 + count {
            let (found, inputs) = (inputs.len() - 2, inputs[1]);
            let problem = format!(
                "expected a control vector of {control} and {count} gradients, found {inputs} and {found}"
            );
            return Err(Error::shape(self.name(), problem));
        }
        let (gradients, averaged) = (&inputs[2..2 + count], &inputs[2..]);
        let averaged = if self.average { averaged } else { &[] };
        Ok([gradients, gradients, gradients, averaged].concat())
    }
    fn flops(&self, inputs: &[Shape], outputs: &[Shape]) -> u64 {
        let count = self.adamw.rules.len();
        let elements = |shapes: &[Shape]| shapes.iter().map(|s| s.len() as u64).sum::<u64>();
        14 * elements(&inputs[2..2 + count]) + 3 * elements(&outputs[3 * count..])
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let (adamw, count) = (&self.adamw, self.adamw.rules.len());
        let mut table = Vec::new();
        for index in 0..at.inputs() - 2 {
            let tensor = at.input(2 + index);
            let average = self.average.then(|| at.output(3 * count + index));
            for (first, len) in chunks(at.input_shape(2 + index).len(), CHUNK) {
                let address = |tensor| address(self.name(), tensor, first);
                let tensor = address(tensor)?;
                let tensors = if index < count {
                    let outputs = [0, 1, 2].map(|i| address(at.output(i * count + index)));
                    let [parameter, first, second] = outputs;
                    [tensor, parameter?, first?, second?]
                } else {
                    [0, tensor, 0, 0]
                };
                let rule = adamw.rules.get(index).copied().unwrap_or_default();
                let flags = u64::from(rule.decay) | u64::from(rule.nonnegative) << 1;
                table.extend(tensors);
                table.extend([average.map_or(Ok(0), address)?, len as u64 | flags << 32]);
            }
        }
        let arguments = AdamWKernel {
            chunks: at.constant(&table)?.into(),
            norm: at.input(0).into(),
            control: at.input(1).into(),
            step: control::STEP as i32,
            rate: control::LEARNING_RATE as i32,
            decay: control::EMA_DECAY as i32,
            log_beta1: adamw.beta1.ln(),
            log_beta2: adamw.beta2.ln(),
            beta1: adamw.beta1 as f32,
            beta2: adamw.beta2 as f32,
            fresh1: (1.0 - adamw.beta1) as f32,
            fresh2: (1.0 - adamw.beta2) as f32,
            eps: adamw.eps as f32,
            clip: adamw.clip,
            weight_decay: adamw.weight_decay,
        };
        at.launch(Grid::new(table.len() / 6, THREADS), &arguments)
    }
}
