//! Hand-derived gradients against finite differences, and GPU kernels against the CPU.
//!
//! Every operation in [`crate::ops::registry`] describes random problems ([`Case`]). A check
//! replays one in `f64` and compares the recorded gradient of `Σ rᵢ·yᵢ` (random `r`) with the
//! five-point central difference, element by element, under the criterion
//! `|a − n| ≤ 1e-6 · max(|a|, |n|, 1e-3 · ‖gradient‖∞)`.
//!
//! [`check_on`] replays the same problem on a GPU or the emulator and compares every output and every
//! gradient with the CPU's in `f64`. What was checked against finite differences on the CPU is thereby
//! checked there too.

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::data::augment::{AugmentConfig, Augmenter};
use crate::data::device;
use crate::data::loader::{Pool, Request, Samples, Target};
use crate::device::cpu::{Element, Session};
use crate::device::gpu::{self, Gpu};
use crate::error::{Error, Result};
use crate::ops::pointwise::StopGradient;
use crate::ops::{Entry, control};
use crate::optim::{AdamW, Rule};
use crate::tape::{Kind, Options, Plan, Tape, Var};
use crate::tensor::Shape;

/// Relative tolerance between the recorded and the numeric derivative.
pub const TOLERANCE: f64 = 1e-6;
/// Derivatives below this share of the largest are compared with it.
pub const FLOOR: f64 = 1e-3;
/// Largest distance of a GPU's result from the CPU's in `f64`, as a share of the tensor's largest element:
/// sums in another order, and the approximate exponential and reciprocal of GPUs.
pub const DEVICE_TOLERANCE: f64 = 1e-5;
/// Most that a tensor's conditioning may add to that, as a share of its largest element.
const MOST_CONDITIONING: f64 = 1e-4;
/// What rounding to bf16 may add to that, as a share of the element itself.
pub const NARROW_TOLERANCE: f64 = 1.0 / 256.0;
/// On devices one case in as many is large.
const LARGE: u64 = 5;
/// Elements of one input that are perturbed at most; larger inputs are sampled.
const PROBES: usize = 48;

/// Draws the sizes and values of random problems.
pub struct Sampler {
    rng: ChaCha8Rng,
    scale: usize,
}

impl Sampler {
    /// The same seed draws the same problems.
    pub fn new(seed: u64) -> Self {
        Self {
            rng: ChaCha8Rng::seed_from_u64(seed),
            scale: 1,
        }
    }

    /// Draws tensors with extents up to twelve times as large, so that kernels split their work into
    /// several pieces.
    pub fn large(seed: u64) -> Self {
        Self {
            scale: 12,
            ..Self::new(seed)
        }
    }

    /// Whether this is [`Sampler::large`].
    pub fn is_large(&self) -> bool {
        self.scale > 1
    }

    /// The weights `r` and probes of a case, independent of what the case drew from the same seed.
    fn of_check(seed: u64) -> Self {
        let mut sampler = Self::new(seed);
        sampler.rng.set_stream(1);
        sampler
    }

    /// A size from `low` to `high`, both included; `low` itself (often 1) one time in four.
    pub fn size(&mut self, low: usize, high: usize) -> usize {
        if self.rng.random_range(0..4) == 0 {
            low
        } else {
            self.rng.random_range(low..=high)
        }
    }

    /// As [`Sampler::size`] for rows, columns or channels of data, of which [`Sampler::large`] draws more.
    pub fn extent(&mut self, low: usize, high: usize) -> usize {
        self.size(low, high * self.scale)
    }

    /// A small feature map: up to 3×7×7×5, sizes of 1 and odd sizes included.
    pub fn shape(&mut self) -> Shape {
        Shape::new(
            self.size(1, 3),
            self.extent(1, 7),
            self.extent(1, 7),
            self.extent(1, 5),
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

    /// As [`Sampler::values`], of those that bf16 has: weights, which products in bf16 round.
    pub fn narrow_values(&mut self, len: usize, low: f64, high: f64) -> Vec<f64> {
        let values = self.values(len, low, high).into_iter();
        values.map(|x| half::bf16::from_f64(x).to_f64()).collect()
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
    /// Whether it is an activation, which GPUs may store as bf16.
    pub narrow: bool,
}

type Record = dyn Fn(&mut Tape, &[Var]) -> Result<Vec<Var>> + Send + Sync;

/// A random problem for one operation.
pub struct Case {
    /// The parameters drawn, for the message of a failure.
    pub description: String,
    /// Inputs in the order in which `record` takes them.
    pub inputs: Vec<CaseInput>,
    /// Step of the finite differences, 1e-5 unless the case says otherwise: long enough that the outputs'
    /// rounding, divided by it, stays below the tolerance; short enough for the outputs' curvature.
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

    /// Sets [`Case::step`].
    pub fn with_step(self, step: f64) -> Self {
        Self { step, ..self }
    }

    /// Adds an input whose gradient is checked.
    pub fn with(mut self, name: &'static str, shape: Shape, values: Vec<f64>) -> Self {
        assert_eq!(values.len(), shape.len(), "{name} of {}", self.description);
        self.inputs.push(CaseInput {
            name,
            shape,
            values,
            differentiable: true,
            narrow: false,
        });
        self
    }

    /// Says that the input added last is an activation, which GPUs may store as bf16.
    pub fn narrow(mut self) -> Self {
        self.inputs.last_mut().expect("an input was added").narrow = true;
        self
    }

    /// Adds an input without a gradient.
    pub fn with_constant(mut self, name: &'static str, shape: Shape, values: Vec<f64>) -> Self {
        self = self.with(name, shape, values);
        self.inputs.last_mut().unwrap().differentiable = false;
        self
    }

    /// Records the forward steps.
    ///
    /// # Errors
    /// Whatever recording reports.
    pub fn record(&self) -> Result<Recording> {
        let mut tape = Tape::new();
        let mut recording = |input: &CaseInput| {
            let written = tape.input(input.name, input.shape);
            if input.narrow {
                tape.narrow(written);
            }
            Ok((written, tape.push(StopGradient, &[written])?))
        };
        let (inputs, variables): (Vec<Var>, Vec<Var>) = (self.inputs.iter())
            .map(&mut recording)
            .collect::<Result<Vec<_>>>()?
            .into_iter()
            .unzip();
        let outputs = (self.record)(&mut tape, &variables)?;
        Ok(Recording {
            tape,
            inputs,
            variables,
            outputs,
        })
    }
}

/// The forward steps of a case.
pub struct Recording {
    /// The steps.
    pub tape: Tape,
    /// What the caller writes, one per input of the case.
    pub inputs: Vec<Var>,
    /// Copies of the inputs, which the operation reads: computed values, unlike inputs, may be
    /// overwritten in place.
    pub variables: Vec<Var>,
    /// What is differentiated.
    pub outputs: Vec<Var>,
}

/// A number that disagrees.
#[derive(Clone, Debug, Serialize)]
pub struct Mismatch {
    /// The input whose derivative it is, or `output`.
    pub input: &'static str,
    /// Position of the element, NHWC order.
    pub element: usize,
    /// What the tape computed.
    pub analytic: f64,
    /// What the finite difference says, or the CPU in `f64`.
    pub numeric: f64,
    /// Largest absolute value of that tensor.
    pub largest: f64,
}

/// Outcome of one case.
#[derive(Clone, Default, Debug)]
pub struct Outcome {
    /// Numbers compared.
    pub compared: usize,
    /// Largest error as a share of what the criterion measures it by, 0 where there is none.
    pub worst: f64,
    /// The element where it occurred, if that is over the tolerance.
    pub mismatch: Option<Mismatch>,
}

impl Outcome {
    /// Takes a tensor that a device `found` into account; it may be off by [`DEVICE_TOLERANCE`] of the largest
    /// element, by its [`conditioning`] given what `nudged` inputs make of it, and by `rounding` of each element
    /// itself.
    fn compare(
        &mut self,
        input: &'static str,
        found: &[f32],
        expected: &[f64],
        nudged: &[f64],
        rounding: f64,
    ) {
        let largest = expected.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        let conditioned = largest + conditioning(expected, nudged) / DEVICE_TOLERANCE;
        for (element, (&found, &numeric)) in found.iter().zip(expected).enumerate() {
            let analytic = f64::from(found);
            let scale = conditioned + rounding / DEVICE_TOLERANCE * numeric.abs();
            let error = (analytic - numeric).abs();
            self.add(error, scale, DEVICE_TOLERANCE, || Mismatch {
                input,
                element,
                analytic,
                numeric,
                largest,
            });
        }
    }

    /// Takes one comparison into account, whose error may be `tolerance` times `scale`.
    fn add(&mut self, error: f64, scale: f64, tolerance: f64, mismatch: impl FnOnce() -> Mismatch) {
        let ratio = if error == 0.0 { 0.0 } else { error / scale };
        self.compared += 1;
        // A NaN counts as the worst mismatch there is.
        if ratio.is_nan() || ratio > self.worst {
            self.worst = if ratio.is_nan() { f64::INFINITY } else { ratio };
            self.mismatch = (self.worst > tolerance).then(mismatch);
        }
    }
}

/// The gradient side of a case: a tape with its backward steps appended.
#[derive(Clone)]
pub struct Differentiated {
    /// Forward and gradient steps.
    pub tape: Tape,
    /// One per input of the case.
    pub inputs: Vec<Var>,
    /// The outputs that are differentiated, by their position in [`Recording::outputs`].
    pub selected: Vec<usize>,
    /// Those outputs.
    pub outputs: Vec<Var>,
    /// Random weights `r`, one tensor for each of them.
    pub seeds: Vec<Var>,
    /// One per input; `None` where the outputs do not depend on it or it is constant.
    pub gradients: Vec<Option<Var>>,
}

/// Records a case and the gradient of all its outputs with respect to all its inputs.
///
/// # Errors
/// Whatever recording reports.
pub fn differentiate(case: &Case) -> Result<Differentiated> {
    differentiate_part(case, None, None)
}

/// As [`differentiate`], for one output alone or one input alone: operations then record less.
///
/// # Errors
/// Whatever recording reports.
pub fn differentiate_part(
    case: &Case,
    output: Option<usize>,
    input: Option<usize>,
) -> Result<Differentiated> {
    let Recording {
        mut tape,
        inputs,
        variables,
        outputs,
    } = case.record()?;
    let selected: Vec<usize> = (0..outputs.len())
        .filter(|&o| output.is_none_or(|only| o == only))
        .collect();
    let outputs: Vec<Var> = selected.iter().map(|&o| outputs[o]).collect();
    let mut seeds = Vec::new();
    let mut pairs = Vec::new();
    for &y in &outputs {
        let seed = tape.input("seed", tape.shape(y));
        if tape.values()[y.index()].narrow {
            tape.narrow(seed);
        }
        seeds.push(seed);
        pairs.push((y, tape.push(StopGradient, &[seed])?));
    }
    let wanted = |i: usize| case.inputs[i].differentiable && input.is_none_or(|only| i == only);
    let wrt: Vec<usize> = (0..variables.len()).filter(|&i| wanted(i)).collect();
    let wrt_vars: Vec<Var> = wrt.iter().map(|&i| variables[i]).collect();
    let mut gradients = vec![None; variables.len()];
    for (i, gradient) in wrt.into_iter().zip(tape.backward_from(&pairs, &wrt_vars)?) {
        gradients[i] = gradient;
    }
    gradients.iter().flatten().for_each(|&g| tape.keep(g));
    Ok(Differentiated {
        tape,
        inputs,
        selected,
        outputs,
        seeds,
        gradients,
    })
}

/// A session with the inputs of `case` and the weights drawn from `seed` in place, ready to run.
///
/// # Errors
/// Whatever planning reports.
pub fn session<T: Element>(
    case: &Case,
    d: &Differentiated,
    seed: u64,
    options: Options,
) -> Result<Session<T>> {
    let mut session = Session::new(Plan::new(&d.tape, options)?)?;
    let mut sampler = Sampler::of_check(seed);
    let written = d
        .inputs
        .iter()
        .zip(case.inputs.iter().map(|i| i.values.clone()));
    let weights = d.seeds.iter().map(|seed| {
        let len = d.tape.shape(*seed).len();
        // Rounded, so that `f32` and `f64` differentiate the same sum.
        let weights = sampler.values(len, -1.0, 1.0);
        let rounded = weights.iter().map(|&r| f64::from(r as f32)).collect();
        (seed, rounded)
    });
    for (&var, values) in written.chain(weights) {
        let elements = session.values_mut(var).iter_mut().zip(values);
        elements.for_each(|(element, value)| *element = T::of(value));
    }
    Ok(session)
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
    let mut backward = session::<f64>(case, d, seed, Options::default())?;
    backward.run();
    let weights: Vec<&[f64]> = d.seeds.iter().map(|&s| backward.read(s)).collect();

    let Recording {
        mut tape,
        inputs,
        outputs,
        ..
    } = case.record()?;
    let outputs: Vec<Var> = d.selected.iter().map(|&o| outputs[o]).collect();
    outputs.iter().for_each(|&y| tape.keep(y));
    let mut forward = Session::<f64>::new(Plan::new(&tape, Options::default())?)?;
    for (&var, input) in inputs.iter().zip(&case.inputs) {
        forward.write(var, &input.values);
    }

    let mut sampler = Sampler::of_check(!seed);
    let mut outcome = Outcome::default();
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
            outcome.add(error, scale, TOLERANCE, || Mismatch {
                input: input.name,
                element,
                analytic,
                numeric,
                largest,
            });
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
    weights: &[&[f64]],
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

/// Replays one case on a GPU and compares all outputs and gradients with the CPU's in `f64` on the same
/// rounded inputs, activations stored as bf16 if `narrow`. A second replay, on the emulator in another
/// order of its threads, and a captured one must give the same bits.
///
/// # Errors
/// [`Error::NoKernel`] if an operation of the case has no kernel, [`Error::Device`] if a kernel did
/// something wrong or two replays differ; else as [`check`].
pub fn check_on(gpu: &Gpu, case: &Case, seed: u64, narrow: bool) -> Result<Outcome> {
    let mut d = differentiate(case)?;
    d.outputs.iter().for_each(|&y| d.tape.keep(y));
    let mut reference = session::<f64>(case, &d, seed, Options::default())?;
    let options = Options {
        gaps: true,
        ..Options::gpu(narrow)
    };
    let plan = Plan::new(&d.tape, options)?;
    let mut device = gpu::Session::new(gpu, plan)?;
    for &var in d.inputs.iter().chain(&d.seeds) {
        let stored_narrow = device.plan().slot(var).narrow;
        let values = reference.values_mut(var);
        let round = |x: f64| match stored_narrow {
            true => half::bf16::from_f64(x).to_f32(),
            false => x as f32,
        };
        let rounded: Vec<f32> = values.iter().map(|&x| round(x)).collect();
        let wide = rounded.iter().map(|&x| f64::from(x));
        values.iter_mut().zip(wide).for_each(|(v, x)| *v = x);
        device.write(var, &rounded)?;
    }
    reference.run();

    let gradients = case.inputs.iter().zip(&d.gradients);
    let gradients = gradients.filter_map(|(input, g)| Some((input.name, (*g)?)));
    let outputs = d.outputs.iter().map(|&y| ("output", y));
    let compared: Vec<(&'static str, Var)> = outputs.chain(gradients).collect();
    // Before each replay nothing of the last one is left, and none may write between the values.
    let mut replay = |run: &dyn Fn(&mut gpu::Session) -> Result<()>| -> Result<Vec<Vec<f32>>> {
        device.poison()?;
        run(&mut device)?;
        if !device.is_intact()? {
            let problem = format!("writes outside of its values ({})", case.description);
            return Err(Error::device("gradcheck", problem));
        }
        compared.iter().map(|&(_, var)| device.read(var)).collect()
    };
    gpu.reorder(seed);
    let found = replay(&|device| device.run())?;
    gpu.reorder(!seed);
    let again = replay(&|device| device.run())?;
    let replayed = replay(&|device| device.capture()?.replay())?;
    let bits = |x: &[Vec<f32>]| x.iter().flatten().map(|x| x.to_bits()).collect::<Vec<_>>();
    for (other, what) in [(again, "a second run"), (replayed, "a captured graph")] {
        if bits(&found) != bits(&other) {
            let problem = format!("{what} gave other bits ({})", case.description);
            return Err(Error::device("gradcheck", problem));
        }
    }

    let read = |session: &Session<f64>| -> Vec<Vec<f64>> {
        let each = compared.iter().map(|&(_, var)| session.read(var).to_vec());
        each.collect()
    };
    let expected = read(&reference);
    for (input, &var) in case.inputs.iter().zip(&d.inputs) {
        if input.differentiable {
            nudge(reference.values_mut(var));
        }
    }
    reference.run();
    let nudged = read(&reference);

    let mut outcome = Outcome::default();
    for (i, (&(input, var), found)) in compared.iter().zip(&found).enumerate() {
        let rounding = if device.plan().slot(var).narrow {
            NARROW_TOLERANCE
        } else {
            0.0
        };
        outcome.compare(input, found, &expected[i], &nudged[i], rounding);
    }
    Ok(outcome)
}

/// Moves each number up or down by half a unit in the last place of an `f32`, as rounding might have.
pub fn nudge(values: &mut [f64]) {
    for (i, value) in values.iter_mut().enumerate() {
        let up = i.wrapping_mul(0x9E37_79B9) >> 16 & 1 == 1;
        *value *= 1.0 + f64::from(f32::EPSILON) / if up { 2.0 } else { -2.0 };
    }
}

/// How far a tensor computed in `f32` can be from `expected`, since it would be `nudged` if its inputs had been
/// rounded otherwise: four times as far, for the roundings on the way, but never more than a ten-thousandth of its
/// largest element. It matters where a tensor is a difference of nearly equal sums, such as the gradient of a
/// single channel's factor.
pub fn conditioning(expected: &[f64], nudged: &[f64]) -> f64 {
    let moved = expected.iter().zip(nudged).map(|(x, y)| (x - y).abs());
    let largest = expected.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    (4.0 * moved.fold(0.0, f64::max)).min(MOST_CONDITIONING * largest)
}

/// A case that failed.
#[derive(Clone, Debug, Serialize)]
pub struct Failure {
    /// The seed that draws it.
    pub seed: u64,
    /// [`Case::description`].
    pub description: String,
    /// What was wrong.
    #[serde(flatten)]
    pub problem: Problem,
}

/// What was wrong with a case.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Problem {
    /// The worst number.
    Mismatch(Mismatch),
    /// What a device said of a kernel.
    Error(String),
}

/// Outcome of many cases of one operation.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The operation.
    pub op: &'static str,
    /// Cases drawn.
    pub cases: u64,
    /// Numbers compared.
    pub compared: usize,
    /// Largest error, as in [`Outcome::worst`].
    pub worst: f64,
    /// Cases that failed, in the order of their seeds.
    pub failures: Vec<Failure>,
}

impl Report {
    /// Of a check that is one case; what a device says of a kernel is a failure of it.
    fn of_one(
        op: &'static str,
        seed: u64,
        description: &str,
        outcome: Result<Outcome>,
    ) -> Result<Self> {
        let (outcome, problem) = match outcome {
            Ok(outcome) => {
                let problem = outcome.mismatch.clone().map(Problem::Mismatch);
                (outcome, problem)
            }
            Err(error @ Error::Device { .. }) => {
                (Outcome::default(), Some(Problem::Error(error.to_string())))
            }
            Err(other) => return Err(other),
        };
        let failure = problem.map(|problem| Failure {
            seed,
            description: description.into(),
            problem,
        });
        Ok(Self {
            op,
            cases: 1,
            compared: outcome.compared,
            worst: outcome.worst,
            failures: failure.into_iter().collect(),
        })
    }
}

/// Checks an operation on the cases that `seed`, `seed + 1`, … draw: against finite differences on the
/// CPU or, if there is a `gpu`, there against the CPU, in every storage that the GPU has.
///
/// # Errors
/// As [`check`] and [`check_on`].
pub fn check_operation(entry: &Entry, seed: u64, cases: u64, gpu: Option<&Gpu>) -> Result<Report> {
    let mut report = Report {
        op: entry.name,
        cases,
        compared: 0,
        worst: 0.0,
        failures: Vec::new(),
    };
    for seed in (0..cases).map(|i| seed.wrapping_add(i)) {
        // A kernel's last block, strip or chunk is another one than its first.
        let large = gpu.is_some() && seed % LARGE == LARGE - 1;
        let mut sampler = if large {
            Sampler::large(seed)
        } else {
            Sampler::new(seed)
        };
        let case = (entry.case)(&mut sampler);
        let activations = case.inputs.iter().any(|input| input.narrow);
        let storages: &[bool] = match gpu {
            Some(gpu) if gpu.has_bf16() && activations => &[false, true],
            _ => &[false],
        };
        for &narrow in storages {
            let outcome = match gpu {
                None => check(&case, seed),
                Some(gpu) => check_on(gpu, &case, seed, narrow),
            };
            let problem = match outcome {
                Ok(outcome) => {
                    report.compared += outcome.compared;
                    report.worst = report.worst.max(outcome.worst);
                    outcome.mismatch.map(Problem::Mismatch)
                }
                Err(error @ Error::Device { .. }) => Some(Problem::Error(error.to_string())),
                // A kernel that is there failed already: that counts.
                Err(Error::NoKernel { .. }) if !report.failures.is_empty() => None,
                Err(other) => return Err(other),
            };
            if let Some(problem) = problem {
                let storage = if narrow { ", bf16" } else { "" };
                report.failures.push(Failure {
                    seed,
                    description: format!("{}{storage}", case.description),
                    problem,
                });
            }
        }
    }
    Ok(report)
}

/// Checks the optimizer's kernels on a device: the parameters, moments and averages after several steps
/// that `seed` draws, one of which has an infinite gradient, against the CPU's in `f64`.
///
/// # Errors
/// As [`check_on`].
pub fn check_optimizer(gpu: &Gpu, seed: u64) -> Result<Report> {
    Report::of_one("adamw", seed, "five steps", optimizer(gpu, seed))
}

fn optimizer(gpu: &Gpu, seed: u64) -> Result<Outcome> {
    let mut sampler = Sampler::new(seed);
    let mut tape = Tape::new();
    let control = tape.input("control", Shape::per_channel(control::LEN));
    let loss = tape.input("loss", Shape::SCALAR);
    // One element, an odd number, and several chunks with a tail.
    let shapes = [1, 33, 20_003].map(Shape::per_channel);
    let parameters = shapes.map(|shape| tape.parameter(&format!("p{}", shape.c), shape));
    let gradients = shapes.map(|shape| tape.input("gradient", shape));
    let statistics = [tape.state("statistics", Shape::per_channel(77))];
    let adamw = AdamW {
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-8,
        weight_decay: 0.05,
        clip: 10.0,
        rules: (0..shapes.len())
            .map(|i| Rule {
                decay: i != 1,
                nonnegative: i == 1,
            })
            .collect(),
    };
    adamw.record(
        &mut tape,
        control,
        loss,
        &parameters,
        &gradients,
        Some(&statistics),
    )?;
    let mut cpu = Session::<f64>::new(Plan::new(&tape, Options::default())?)?;
    let mut device = gpu::Session::new(gpu, Plan::new(&tape, Options::gpu(true))?)?;
    let mut draw = |var: Var, size: f64| -> (Var, Vec<f32>) {
        let values = sampler.values(tape.shape(var).len(), -size, size);
        (var, values.into_iter().map(|x| x as f32).collect())
    };
    let starts = parameters.iter().chain(&statistics);
    let mut written: Vec<(Var, Vec<f32>)> = starts.map(|&var| draw(var, 1.0)).collect();
    for step in 1u8..=5 {
        written.push((control, vec![f32::from(step), 0.01, 0.0, 0.9]));
        written.push((loss, vec![0.5]));
        for gradient in gradients {
            // Norms below and above the limit.
            let (var, mut values) = draw(gradient, [0.01, 1.0][usize::from(step % 2)]);
            if step == 3 {
                values[0] = f32::INFINITY;
            }
            written.push((var, values));
        }
        for (var, values) in written.drain(..) {
            let wide: Vec<f64> = values.iter().map(|&x| x.into()).collect();
            cpu.write(var, &wide);
            device.write(var, &values)?;
        }
        cpu.run();
        device.run()?;
    }
    let mut outcome = Outcome::default();
    let persistent = [Kind::Parameter, Kind::State].map(|kind| tape.of_kind(kind));
    for var in persistent.into_iter().flatten() {
        let (found, expected) = (device.read(var)?, cpu.read(var));
        outcome.compare("output", &found, expected, expected, 0.0);
    }
    Ok(outcome)
}

/// Checks the kernel that makes batches on a device: images and masks under every kind of change, drawn from `seed`,
/// against the CPU's, from which no bit may differ.
///
/// # Errors
/// As [`check_on`].
pub fn check_augmentation(gpu: &Gpu, seed: u64) -> Result<Report> {
    Report::of_one("augment", seed, "a batch", augmentation(gpu, seed))
}

fn augmentation(gpu: &Gpu, seed: u64) -> Result<Outcome> {
    // Several tiles of the kernel, and partial ones.
    const SIZE: usize = 68;
    const PIXELS: usize = SIZE * SIZE;
    const BATCH: usize = 3;
    let mut sampler = Sampler::new(seed);
    let mut noise = || -> Vec<u8> {
        let mut plane = vec![0; PIXELS];
        sampler.rng.fill(&mut plane[..]);
        plane
    };
    let mut pool = Pool::new(SIZE);
    for _ in 0..4 {
        let target = Target {
            label: 0.0,
            weight: 1.0,
        };
        pool.push(&noise(), &noise(), target)?;
    }
    let config = AugmentConfig {
        p_affine: 1.0,
        p_elastic: 1.0,
        p_gamma: 1.0,
        p_contrast: 1.0,
        p_speckle: 1.0,
        p_blur: 1.0,
        p_depth_gain: 1.0,
        ..AugmentConfig::default()
    };
    let request = Request {
        epoch: seed % 1000,
        indices: vec![2, 0, 3],
    };
    let mut cpu = Augmenter::new(config, SIZE)?;
    let mut expected = [vec![0.0; BATCH * PIXELS], vec![0.0; BATCH * PIXELS]];
    let [images, masks] = &mut expected;
    let (mut image, mut mask) = (vec![0; PIXELS], vec![0; PIXELS]);
    let places = images
        .chunks_mut(PIXELS)
        .zip(masks.chunks_mut(PIXELS))
        .zip(&request.indices);
    for ((images, masks), &index) in places {
        pool.read(index, &mut image, &mut mask)?;
        let key = Augmenter::key(seed, request.epoch, index);
        cpu.apply(key, &image, &mask, images, masks);
    }
    let mut on_device = device::Augmenter::new(gpu, &pool, BATCH, seed, Some(config))?;
    let storages: &[bool] = if gpu.has_bf16() {
        &[false, true]
    } else {
        &[false]
    };
    let mut outcome = Outcome::default();
    for &narrow in storages {
        let mut tape = Tape::new();
        let vars =
            ["images", "masks"].map(|name| tape.input(name, Shape::new(BATCH, SIZE, SIZE, 1)));
        for var in vars {
            tape.keep(var);
            tape.narrow(var);
        }
        let mut session = gpu::Session::new(gpu, Plan::new(&tape, Options::gpu(narrow))?)?;
        on_device.make(&mut session, vars, &request)?;
        for (var, expected) in vars.into_iter().zip(&expected) {
            for (element, (&found, &made)) in session.read(var)?.iter().zip(expected).enumerate() {
                let made = match narrow {
                    true => half::bf16::from_f32(made).to_f32(),
                    false => made,
                };
                let (analytic, numeric) = (f64::from(found), f64::from(made));
                outcome.add((analytic - numeric).abs(), 1.0, 0.0, || Mismatch {
                    input: "output",
                    element,
                    analytic,
                    numeric,
                    largest: 1.0,
                });
            }
        }
    }
    Ok(outcome)
}

#[cfg(all(test, echograd_emulator))]
mod tests {
    use super::*;
    use crate::device::cpu::Io;
    use crate::device::gpu::launch::{Launches, Stored, kernel};
    use crate::ops::{Kernel, Op, pointwise};
    use crate::tensor::Real;

    /// Ones; on devices, one too many.
    #[derive(Debug)]
    struct Overrun;

    kernel! {
        struct Fill = "fill" { y: Stored, len: u64, value: f32 }
    }

    impl<T: Real> Kernel<T> for Overrun {
        fn run(&self, io: &mut Io<'_, T>) {
            io.output(0).fill(T::one());
        }
    }

    impl Op for Overrun {
        fn name(&self) -> &'static str {
            "overrun"
        }
        fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
            Ok(inputs.to_vec())
        }
        fn backward(&self, _: &mut crate::tape::Backward<'_>) -> Result<()> {
            Ok(())
        }
        fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
            let (y, len) = (at.output(0), at.output_shape(0).len() + 1);
            let arguments = Fill {
                y: y.into(),
                len: len as u64,
                value: 1.0,
            };
            at.launch(pointwise::grid(len, y), &arguments)
        }
    }

    #[test]
    fn writing_between_values_is_noticed() {
        // A multiple of the arena's alignment, so that the element behind belongs to somebody.
        let case = Case::new("one element too many", |t, v| Ok(vec![t.push(Overrun, v)?]));
        let case = case.with_constant("x", Shape::per_channel(64), vec![1.0; 64]);
        let gpu = Gpu::emulator().unwrap();
        let problem = check_on(&gpu, &case, 0, false).unwrap_err().to_string();
        assert!(
            problem.contains("writes outside of its values"),
            "{problem}"
        );
    }
}
