//! Hand-derived gradients against finite differences.
//!
//! Every operation in [`crate::ops::registry`] describes random problems ([`Case`]). A check
//! replays one in `f64` and compares the recorded gradient of `Σ rᵢ·yᵢ` (random `r`) with the
//! five-point central difference, element by element, under the criterion
//! `|a − n| ≤ 1e-6 · max(|a|, |n|, 1e-3 · ‖gradient‖∞)`.

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::device::cpu::Session;
use crate::error::Result;
use crate::tape::{Options, Plan, Tape, Var};
use crate::tensor::Shape;

/// Relative tolerance between the recorded and the numeric derivative.
pub const TOLERANCE: f64 = 1e-6;
/// Derivatives below this share of the largest are compared with it.
pub const FLOOR: f64 = 1e-3;
/// Elements of one input that are perturbed at most; larger inputs are sampled.
const PROBES: usize = 48;

/// Draws the sizes and values of random problems.
pub struct Sampler {
    rng: ChaCha8Rng,
}

impl Sampler {
    /// The same seed draws the same problems.
    pub fn new(seed: u64) -> Self {
        Self {
            rng: ChaCha8Rng::seed_from_u64(seed),
        }
    }

    /// A size from `low` to `high`, both included; `low` itself (often 1) one time in four.
    pub fn size(&mut self, low: usize, high: usize) -> usize {
        if self.rng.random_range(0..4) == 0 {
            low
        } else {
            self.rng.random_range(low..=high)
        }
    }

    /// A small feature map: up to 3×7×7×5, sizes of 1 and odd sizes included.
    pub fn shape(&mut self) -> Shape {
        Shape::new(
            self.size(1, 3),
            self.size(1, 7),
            self.size(1, 7),
            self.size(1, 5),
        )
    }

    /// True with the given probability.
    pub fn chance(&mut self, probability: f64) -> bool {
        self.rng.random_bool(probability)
    }

    /// One number in `low..high`.
    pub fn uniform(&mut self, low: f64, high: f64) -> f64 {
        self.rng.random_range(low..high)
    }

    /// `len` numbers in `low..high`.
    pub fn values(&mut self, len: usize, low: f64, high: f64) -> Vec<f64> {
        (0..len).map(|_| self.uniform(low, high)).collect()
    }

    /// `len` numbers of both signs in `-high..high`, none closer to 0 than `gap`: for kinks at 0.
    pub fn values_off_zero(&mut self, len: usize, gap: f64, high: f64) -> Vec<f64> {
        let sign = |flip: bool| if flip { -1.0 } else { 1.0 };
        (0..len)
            .map(|_| sign(self.chance(0.5)) * self.uniform(gap, high))
            .collect()
    }

    /// A random generator for anything else.
    pub fn rng(&mut self) -> &mut impl Rng {
        &mut self.rng
    }
}

/// One input of a random problem.
#[derive(Clone, Debug)]
pub struct CaseInput {
    /// What it is called in failures.
    pub name: &'static str,
    /// Extent.
    pub shape: Shape,
    /// Elements in NHWC order.
    pub values: Vec<f64>,
    /// Whether its gradient is checked.
    pub differentiable: bool,
}

type Record = dyn Fn(&mut Tape, &[Var]) -> Result<Vec<Var>> + Send + Sync;

/// A random problem for one operation.
pub struct Case {
    /// The parameters drawn, for the message of a failure.
    pub description: String,
    /// Inputs in the order in which `record` takes them.
    pub inputs: Vec<CaseInput>,
    /// Step of the finite differences.
    pub step: f64,
    record: Box<Record>,
}

impl Case {
    /// A problem whose tape is recorded by `record` from one variable per input (added with
    /// [`Case::with`] and [`Case::with_constant`]), which returns the outputs to differentiate.
    pub fn new(
        description: impl Into<String>,
        record: impl Fn(&mut Tape, &[Var]) -> Result<Vec<Var>> + Send + Sync + 'static,
    ) -> Self {
        let description = description.into();
        Self {
            description,
            inputs: Vec::new(),
            step: 1e-5,
            record: Box::new(record),
        }
    }

    /// Adds an input whose gradient is checked.
    pub fn with(mut self, name: &'static str, shape: Shape, values: Vec<f64>) -> Self {
        assert_eq!(values.len(), shape.len(), "{name} of {}", self.description);
        self.inputs.push(CaseInput {
            name,
            shape,
            values,
            differentiable: true,
        });
        self
    }

    /// Adds an input without a gradient.
    pub fn with_constant(mut self, name: &'static str, shape: Shape, values: Vec<f64>) -> Self {
        self = self.with(name, shape, values);
        self.inputs.last_mut().unwrap().differentiable = false;
        self
    }

    /// Records the forward steps: the tape, its inputs and its outputs.
    ///
    /// # Errors
    /// Whatever recording reports.
    pub fn record(&self) -> Result<(Tape, Vec<Var>, Vec<Var>)> {
        let mut tape = Tape::new();
        let inputs: Vec<Var> = self
            .inputs
            .iter()
            .map(|i| tape.input(i.name, i.shape))
            .collect();
        let outputs = (self.record)(&mut tape, &inputs)?;
        Ok((tape, inputs, outputs))
    }
}

/// A derivative that disagrees.
#[derive(Clone, Debug)]
pub struct Mismatch {
    /// The input.
    pub input: &'static str,
    /// Position of the element, NHWC order.
    pub element: usize,
    /// What the tape computed.
    pub analytic: f64,
    /// What the finite difference says.
    pub numeric: f64,
    /// Largest absolute derivative of that input.
    pub largest: f64,
}

/// Outcome of one case.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Derivatives compared.
    pub compared: usize,
    /// Largest `|a − n| / max(|a|, |n|, 1e-3·‖gradient‖∞)`, 0 where both vanish.
    pub worst: f64,
    /// The element where it occurred, if that is over [`TOLERANCE`].
    pub mismatch: Option<Mismatch>,
}

/// The gradient side of a case: a tape with its backward steps appended.
pub struct Differentiated {
    /// Forward and gradient steps.
    pub tape: Tape,
    /// One per input of the case.
    pub inputs: Vec<Var>,
    /// Random weights `r`, one per output.
    pub seeds: Vec<Var>,
    /// One per input; `None` where the outputs do not depend on it or it is constant.
    pub gradients: Vec<Option<Var>>,
}

/// Records a case and its gradient.
///
/// # Errors
/// Whatever recording reports.
pub fn differentiate(case: &Case) -> Result<Differentiated> {
    let (mut tape, inputs, outputs) = case.record()?;
    let seeds: Vec<Var> = outputs
        .iter()
        .map(|&y| tape.input("seed", tape.shape(y)))
        .collect();
    let wrt: Vec<Var> = inputs
        .iter()
        .zip(&case.inputs)
        .filter_map(|(&v, i)| i.differentiable.then_some(v))
        .collect();
    let pairs: Vec<(Var, Var)> = outputs.iter().copied().zip(seeds.iter().copied()).collect();
    let mut found = tape.backward_from(&pairs, &wrt)?.into_iter();
    let gradients: Vec<Option<Var>> = case
        .inputs
        .iter()
        .map(|i| {
            if i.differentiable {
                found.next().flatten()
            } else {
                None
            }
        })
        .collect();
    gradients.iter().flatten().for_each(|&g| tape.keep(g));
    Ok(Differentiated {
        tape,
        inputs,
        seeds,
        gradients,
    })
}

/// Checks one case; `seed` draws the weights `r` and the elements to perturb.
///
/// # Errors
/// Whatever recording or planning reports.
pub fn check(case: &Case, seed: u64) -> Result<Outcome> {
    check_gradient(case, &differentiate(case)?, seed)
}

/// As [`check`] for a gradient recorded before (or deliberately broken since).
///
/// # Errors
/// Whatever planning reports.
pub fn check_gradient(case: &Case, d: &Differentiated, seed: u64) -> Result<Outcome> {
    let mut sampler = Sampler::new(seed);
    let weights: Vec<Vec<f64>> = d
        .seeds
        .iter()
        .map(|&s| sampler.values(d.tape.shape(s).len(), -1.0, 1.0))
        .collect();

    let mut backward = Session::<f64>::new(Plan::new(&d.tape, Options::default())?)?;
    for (&var, input) in d.inputs.iter().zip(&case.inputs) {
        backward.write(var, &input.values);
    }
    for (&seed, weights) in d.seeds.iter().zip(&weights) {
        backward.write(seed, weights);
    }
    backward.run();

    let (mut tape, inputs, outputs) = case.record()?;
    outputs.iter().for_each(|&y| tape.keep(y));
    let mut forward = Session::<f64>::new(Plan::new(&tape, Options::default())?)?;
    for (&var, input) in inputs.iter().zip(&case.inputs) {
        forward.write(var, &input.values);
    }

    let mut outcome = Outcome {
        compared: 0,
        worst: 0.0,
        mismatch: None,
    };
    for (index, input) in case
        .inputs
        .iter()
        .enumerate()
        .filter(|(_, i)| i.differentiable)
    {
        let zeros = vec![0.0; input.values.len()];
        let analytic = d.gradients[index].map_or(&zeros[..], |g| backward.read(g));
        let largest = analytic.iter().fold(0.0f64, |m, g| m.max(g.abs()));
        for element in probes(input.values.len(), &mut sampler) {
            let numeric = difference(
                &mut forward,
                inputs[index],
                &outputs,
                element,
                case.step,
                &weights,
            );
            let analytic = analytic[element];
            let scale = analytic.abs().max(numeric.abs()).max(FLOOR * largest);
            let error = (analytic - numeric).abs();
            let ratio = if error == 0.0 { 0.0 } else { error / scale };
            outcome.compared += 1;
            // A NaN counts as the worst mismatch there is.
            if ratio.is_nan() || ratio > outcome.worst {
                outcome.worst = if ratio.is_nan() { f64::INFINITY } else { ratio };
                outcome.mismatch = (outcome.worst > TOLERANCE).then_some(Mismatch {
                    input: input.name,
                    element,
                    analytic,
                    numeric,
                    largest,
                });
            }
        }
    }
    Ok(outcome)
}

/// The elements to perturb: all of a small input, else the corners and a random sample.
fn probes(len: usize, sampler: &mut Sampler) -> Vec<usize> {
    if len <= PROBES {
        return (0..len).collect();
    }
    let mut chosen = vec![0, len - 1];
    chosen.extend((2..PROBES).map(|_| sampler.rng.random_range(0..len)));
    chosen
}

/// Five-point central difference of `Σ r·y` with respect to one element. Outputs are subtracted one
/// by one before they are summed, so that those which do not move contribute no rounding noise.
fn difference(
    forward: &mut Session<f64>,
    input: Var,
    outputs: &[Var],
    element: usize,
    step: f64,
    weights: &[Vec<f64>],
) -> f64 {
    let centre = forward.read(input)[element];
    let mut at = |offset: f64| -> Vec<Vec<f64>> {
        forward.values_mut(input)[element] = centre + offset;
        forward.run();
        outputs.iter().map(|&y| forward.read(y).to_vec()).collect()
    };
    let (far_low, low, high, far_high) = (at(-2.0 * step), at(-step), at(step), at(2.0 * step));
    forward.values_mut(input)[element] = centre;
    let mut sum = 0.0;
    for (o, weights) in weights.iter().enumerate() {
        for (i, r) in weights.iter().enumerate() {
            let near = high[o][i] - low[o][i];
            let far = far_high[o][i] - far_low[o][i];
            sum += r * (8.0 * near - far);
        }
    }
    sum / (12.0 * step)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::registry;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn every_registered_gradient_agrees_with_finite_differences(seed in any::<u64>()) {
            for entry in registry() {
                let case = (entry.case)(&mut Sampler::new(seed));
                let outcome = check(&case, seed).unwrap();
                prop_assert!(
                    outcome.mismatch.is_none(),
                    "{} ({}): {:?}", entry.name, case.description, outcome.mismatch
                );
            }
        }
    }
}
