//! Everything of the loss that follows the mask head, in one operation.
//!
//! With the values of [`super::mask_head`] and the malignancy's logits `l` of N images it computes
//!
//! ```text
//! total = cross-entropy + Dice + λ_cls·classification + λ_con·consistency
//! cross-entropy, Dice = Σwv / Σw                      weighted mean of what the mask head found
//! classification = Σw'·BCE(l, label) / Σw'            with weights w' of its own
//! consistency = r·Σ w·c·(σ(l) − φ)² / max(1, measurable lesions of positive weight)
//! ```
//!
//! with `c` the mask's confidence ([`MaskSums::confidence`]), which passes no gradient on, `φ` the prior of its
//! features ([`crate::features`]) and `r` the ramp of the [`control`] vector. Images of weight 0 count in
//! nothing, whatever they hold, and receive a gradient of exactly 0; so do moments and perimeters without
//! a measurable lesion.
//!
//! The total is a scalar, so its gradients are known up to one factor when it is: they are computed
//! along with it, and the backward of the loss itself, where that factor is 1, hands them out. On a GPU this is one launch in place of about 25,
//! none of which has more to do than wait for the one before. [`MultitaskLoss::compose`] records what it
//! stands for.

use super::consistency::Consistency;
use super::losses::{BceWithLogits, WeightedMean, inverse_weight, not_empty};
use super::pointwise::{Add, Scale, Sigmoid, StopGradient};
use super::shape_features::{ShapeFeatures, draw_sums};
use super::{Kernel, Op, control, prior};
use crate::device::cpu::Io;
use crate::device::gpu::launch::{Full, Grid, Launches, Pointer, Stored, kernel};
use crate::error::{Error, Result};
use crate::features::{self, MaskSums, Moments};
use crate::gradcheck::{Case, Sampler};
use crate::tape::{Backward, Tape, Var};
use crate::tensor::{Real, Shape};

/// Which terms there are, and their weights.
///
/// Inputs, in this order, those of absent terms left out:
///
/// | for | inputs |
/// |---|---|
/// | a mask | cross-entropy `N×1×1×1`, Dice loss `N×1×1×1`, moments `N×1×1×7`, perimeter `N×1×1×1`, weight `N×1×1×1` |
/// | classification | logit `N×1×1×1`, label `N×1×1×1`, weight `N×1×1×1` |
/// | consistency | the prior's weights `1×1×1×4`, bias, means `1×1×1×4` and standard deviations `1×1×1×4`; control |
///
/// Outputs: the total; the terms there are, scalars before their λ: cross-entropy, Dice loss,
/// classification, consistency; then gradients of the total, which only its backward reads: of cross-entropy
/// and Dice loss (one tensor for both), moments, perimeter; logit; the prior's weights, bias. Only the total
/// passes a gradient on.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct MultitaskLoss {
    /// Whether there is a mask.
    pub mask: bool,
    /// λ_cls, if there is a classification.
    pub classification: Option<f64>,
    /// The consistency term, which needs both.
    pub consistency: Option<Tie>,
}

/// How mask and classification are tied.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Tie {
    /// λ_con.
    pub weight: f64,
    /// No gradient of the consistency term into the logit.
    pub stop_classifier: bool,
    /// No gradient into moments and perimeter. The prior's weights still learn.
    pub stop_mask: bool,
    /// Let all measurable lesions count alike: `c = 1`.
    pub unweighted: bool,
}

/// Positions of the first input, term and gradient of each group.
struct Places {
    malignancy: usize,
    prior: usize,
    classification: usize,
    consistency: usize,
    gradients: usize,
    dmalignancy: usize,
    dprior: usize,
}

/// The cross-entropy of a logit `z` with a label `g`.
fn cross_entropy(z: f64, g: f64) -> f64 {
    let positive = if z < 0.0 { 0.0 } else { z };
    positive - z * g + (-z.abs()).exp().ln_1p()
}

/// `(σ(x), σ(−x))`, each to full relative accuracy.
fn sigmoid(x: f64) -> (f64, f64) {
    let e = (-x.abs()).exp();
    let large = 1.0 / (1.0 + e);
    if x < 0.0 {
        (e * large, large)
    } else {
        (large, e * large)
    }
}

impl MultitaskLoss {
    fn places(&self) -> Places {
        let count = |present: bool, count: usize| if present { count } else { 0 };
        let (mask, class, tie) = (
            self.mask,
            self.classification.is_some(),
            self.consistency.is_some(),
        );
        let malignancy = count(mask, 5);
        let prior = malignancy + count(class, 3);
        let classification = 1 + count(mask, 2);
        let consistency = classification + count(class, 1);
        let gradients = consistency + count(tie, 1);
        let dmalignancy = gradients + count(mask, 3);
        Places {
            malignancy,
            prior,
            classification,
            consistency,
            gradients,
            dmalignancy,
            dprior: dmalignancy + count(class, 1),
        }
    }

    /// Each differentiable input with the output that is its gradient.
    fn gradients(&self) -> impl Iterator<Item = (usize, usize)> {
        let at = self.places();
        let mask = [0, 0, 1, 2].into_iter().enumerate();
        let mask = mask.map(move |(i, o)| (i, at.gradients + o));
        let malignancy = (at.malignancy, at.dmalignancy);
        let prior = [0, 1].map(|k| (at.prior + k, at.dprior + k));
        mask.filter(|_| self.mask)
            .chain(self.classification.map(|_| malignancy))
            .chain(prior.into_iter().filter(|_| self.consistency.is_some()))
    }

    /// Records the same by one operation for each step of the mathematics, and returns the total and the terms.
    /// Tests hold [`MultitaskLoss`] to it; benchmarks compare the two.
    ///
    /// # Errors
    /// As [`Op::outputs`].
    pub fn compose(&self, tape: &mut Tape, inputs: &[Var]) -> Result<Vec<Var>> {
        let shapes: Vec<Shape> = inputs.iter().map(|&v| tape.shape(v)).collect();
        self.outputs(&shapes)?;
        let at = self.places();
        let (mut terms, mut parts) = (Vec::new(), Vec::new());
        if self.mask {
            for value in &inputs[..2] {
                terms.push(tape.push(WeightedMean, &[*value, inputs[4]])?);
            }
            parts.extend(&terms);
        }
        if let Some(factor) = self.classification {
            let [logit, label, weight] = std::array::from_fn(|k| inputs[at.malignancy + k]);
            let each = tape.push(BceWithLogits, &[logit, label])?;
            let mean = tape.push(WeightedMean, &[each, weight])?;
            terms.push(mean);
            parts.push(tape.push(Scale { factor }, &[mean])?);
        }
        if let Some(tie) = self.consistency {
            let (mut moments, mut perimeter) = (inputs[2], inputs[3]);
            if tie.stop_mask {
                moments = tape.push(StopGradient, &[moments])?;
                perimeter = tape.push(StopGradient, &[perimeter])?;
            }
            let shape = tape.push_all(ShapeFeatures, &[moments, perimeter])?;
            let [weight, bias, mean, sd, control] = std::array::from_fn(|k| inputs[at.prior + k]);
            let phi = tape.push(prior::Prior, &[shape[0], weight, bias, mean, sd])?;
            let p = tape.push(Sigmoid, &[inputs[at.malignancy]])?;
            let op = Consistency {
                stop_p: tie.stop_classifier,
                stop_phi: false,
            };
            let measurable = shape[1];
            let confidence = if tie.unweighted { measurable } else { shape[2] };
            let term = tape.push(op, &[p, phi, measurable, confidence, inputs[4], control])?;
            terms.push(term);
            let factor = tie.weight;
            parts.push(tape.push(Scale { factor }, &[term])?);
        }
        let (first, rest) = parts.split_first().expect("`outputs` wants a term");
        let total = rest
            .iter()
            .try_fold(*first, |sum, &part| tape.push(Add, &[sum, part]))?;
        Ok([&[total], &terms[..]].concat())
    }
}

/// `Σwv` without the values of weight 0.
fn weighted_sum<T: Real>(v: &[T], w: &[T]) -> f64 {
    let terms = v.iter().zip(w).filter(|(_, w)| **w != T::zero());
    terms.map(|(v, w)| v.wide() * w.wide()).sum()
}

/// What the consistency term reads of the batch.
struct Lesions<'a, T> {
    moments: &'a [T],
    perimeters: &'a [T],
    weights: &'a [T],
    logits: &'a [T],
    prior: features::Prior,
    unweighted: bool,
    /// Ramp over the number of lesions.
    factor: f64,
}

/// The consistency of one lesion.
struct Lesion {
    sums: MaskSums,
    features: features::ShapeFeatures,
    term: f64,
    /// By `σ(l)`; by `φ` it is the negative.
    slope: f64,
    /// By the logit.
    dlogit: f64,
}

impl<'a, T: Real> Lesions<'a, T> {
    fn of(input: impl Fn(usize) -> &'a [T], at: &Places, unweighted: bool) -> Self {
        let [weight, bias, mean, sd, control] = std::array::from_fn(|k| input(at.prior + k));
        let array = |values: &[T]| std::array::from_fn(|k| values[k].wide());
        let mut lesions = Self {
            moments: input(2),
            perimeters: input(3),
            weights: input(4),
            logits: input(at.malignancy),
            prior: features::Prior {
                weights: array(weight),
                bias: bias[0].wide(),
                mean: array(mean),
                sd: array(sd),
            },
            unweighted,
            factor: 0.0,
        };
        let images = 0..lesions.weights.len();
        let count = images.filter(|&i| lesions.sums(i).is_some()).count();
        lesions.factor = control[control::RAMP].wide() / count.max(1) as f64;
        lesions
    }

    /// The sums of an image that counts.
    fn sums(&self, image: usize) -> Option<MaskSums> {
        let sums = MaskSums {
            moments: Moments::read(&self.moments[Moments::COUNT * image..]),
            perimeter: self.perimeters[image].wide(),
        };
        (self.weights[image] > T::zero() && sums.measurable()).then_some(sums)
    }

    fn get(&self, image: usize) -> Option<Lesion> {
        let sums = self.sums(image)?;
        let features = sums.features()?;
        let (p, q) = sigmoid(self.logits[image].wide());
        let confidence = if self.unweighted {
            1.0
        } else {
            sums.confidence()
        };
        let factor = self.factor * self.weights[image].wide() * confidence;
        let difference = p - self.prior.phi(&features);
        let slope = 2.0 * factor * difference;
        Some(Lesion {
            sums,
            features,
            term: factor * difference * difference,
            slope,
            dlogit: slope * p * q,
        })
    }
}

impl<T: Real> Kernel<T> for MultitaskLoss {
    fn run(&self, io: &mut Io<'_, T>) {
        self.compute(io, 0, 1.0);
    }
}

impl MultitaskLoss {
    /// Computes everything from the inputs `first` and following, gradients times `dtotal`.
    fn compute<T: Real>(&self, io: &mut Io<'_, T>, first: usize, dtotal: f64) {
        let at = self.places();
        let (mut total, mut classification, mut consistency) = (0.0, 0.0, 0.0);
        let mut dmask = None;
        if self.mask {
            let weights = io.input(first + 4);
            let per_weight = inverse_weight(weights);
            for k in 0..2 {
                let mean = weighted_sum(io.input(first + k), weights) * per_weight;
                total += mean;
                io.output(1 + k)[0] = T::of(mean);
            }
            let dmean = io.output(at.gradients).iter_mut().zip(weights);
            dmean.for_each(|(d, w)| *d = T::of(w.wide() * per_weight * dtotal));
            let (dmoments, dperimeters) =
                (io.output(at.gradients + 1), io.output(at.gradients + 2));
            dmoments.fill(T::zero());
            dperimeters.fill(T::zero());
            dmask = Some((dmoments, dperimeters));
        }
        if let Some(factor) = self.classification {
            let [logits, labels, weights] =
                std::array::from_fn(|k| io.input(first + at.malignancy + k));
            let per_weight = inverse_weight(weights);
            let input = |i| io.input(first + i);
            let tie = self
                .consistency
                .map(|tie| (tie, Lesions::of(input, &at, tie.unweighted)));
            let (mut dweights, mut dbias) = ([0.0; 4], 0.0);
            for (image, d) in io.output(at.dmalignancy).iter_mut().enumerate() {
                let mut dlogit = 0.0;
                if weights[image] != T::zero() {
                    let w = weights[image].wide() * per_weight;
                    let (z, g) = (logits[image].wide(), labels[image].wide());
                    let (p, q) = sigmoid(z);
                    classification += w * cross_entropy(z, g);
                    dlogit = dtotal * factor * w * (p * (1.0 - g) - q * g);
                }
                if let Some((tie, lesions)) = &tie
                    && let Some(lesion) = lesions.get(image)
                {
                    consistency += lesion.term;
                    if !tie.stop_classifier {
                        dlogit += dtotal * tie.weight * lesion.dlogit;
                    }
                    let dphi = -dtotal * tie.weight * lesion.slope;
                    let (dfeatures, by_weights, by_bias) =
                        lesions.prior.backward(&lesion.features, dphi);
                    dweights = std::array::from_fn(|k| dweights[k] + by_weights[k]);
                    dbias += by_bias;
                    if let (false, Some((dmoments, dperimeters))) = (tie.stop_mask, &mut dmask) {
                        let dsums = lesion.sums.features_backward(&dfeatures);
                        dsums
                            .moments
                            .write(&mut dmoments[Moments::COUNT * image..][..Moments::COUNT]);
                        dperimeters[image] = T::of(dsums.perimeter);
                    }
                }
                *d = T::of(dlogit);
            }
            total += factor * classification;
            io.output(at.classification)[0] = T::of(classification);
            if let Some((tie, _)) = &tie {
                total += tie.weight * consistency;
                io.output(at.consistency)[0] = T::of(consistency);
                io.output(at.dprior).copy_from_slice(&dweights.map(T::of));
                io.output(at.dprior + 1)[0] = T::of(dbias);
            }
        }
        io.output(0)[0] = T::of(total);
    }
}

/// Threads of a block in `kernels/multitask_loss.cu`.
const THREADS: u32 = 256;

kernel! {
    struct MultitaskLossKernel = "multitask_loss" {
        dtotal: Full,
        cross_entropy: Full, dice: Full, moments: Full, perimeters: Full, weight: Full,
        malignancy: Stored, label: Full, class_weight: Full,
        prior_weight: Full, prior_bias: Full, prior_mean: Full, prior_sd: Full, control: Full,
        n: i32, by_classification: f64, by_consistency: f64, stop_p: i32, stop_mask: i32,
        unweighted: i32,
        total: Full, mean_cross_entropy: Full, mean_dice: Full, classification: Full,
        consistency: Full,
        dmean: Full, dmoments: Full, dperimeters: Full, dmalignancy: Stored,
        dweight: Full, dbias: Full,
    }
}

impl Op for MultitaskLoss {
    fn name(&self) -> &'static str {
        "multitask_loss"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        let refuse = |problem| Err(Error::shape(self.name(), problem));
        let classes = self.classification.is_some();
        if !self.mask && !classes {
            return refuse("expected a mask or a classification, found neither".to_owned());
        }
        if self.consistency.is_some() && !(self.mask && classes) {
            return refuse("expected mask and classification to tie, found one".to_owned());
        }
        let n = inputs.first().map_or(0, |s| s.n);
        let image = Shape::per_image(n, 1);
        let (scalar, vector) = (Shape::SCALAR, Shape::per_channel(4));
        let moments = Shape::per_image(n, Moments::COUNT);
        let mut expected = Vec::new();
        if self.mask {
            expected.extend([image, image, moments, image, image]);
        }
        if classes {
            expected.extend([image; 3]);
        }
        if self.consistency.is_some() {
            let control = Shape::per_channel(control::LEN);
            expected.extend([vector, scalar, vector, vector, control]);
        }
        if inputs != expected {
            return refuse(format!("expected {expected:?}, found {inputs:?}"));
        }
        not_empty(self.name(), image)?;
        let at = self.places();
        let mut outputs = vec![scalar; at.gradients];
        if self.mask {
            outputs.extend([image, moments, image]);
        }
        if classes {
            outputs.push(image);
        }
        if self.consistency.is_some() {
            outputs.extend([vector, scalar]);
        }
        Ok(outputs)
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        let each = if self.consistency.is_some() { 350 } else { 30 };
        each * inputs[0].n as u64
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let Some(dtotal) = at.gradient(0) else {
            return Ok(());
        };
        let wanted: Vec<(usize, usize)> = self.gradients().filter(|&(i, _)| at.wants(i)).collect();
        if at.is_one(dtotal) {
            return wanted
                .into_iter()
                .try_for_each(|(i, o)| at.set(i, at.output(o)));
        }
        let inputs = [dtotal]
            .into_iter()
            .chain((0..at.inputs()).map(|i| at.input(i)));
        let inputs: Vec<Var> = inputs.collect();
        let again = at.push_all(MultitaskLossGradient { loss: *self }, &inputs)?;
        wanted
            .into_iter()
            .try_for_each(|(i, o)| at.set(i, again[o]))
    }
    fn narrow(&self, output: usize, inputs: &[bool]) -> bool {
        let at = self.places();
        self.classification.is_some() && output == at.dmalignancy && inputs[at.malignancy]
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        self.launch_from(at, 0)
    }
}

impl MultitaskLoss {
    /// Launches the kernel on the inputs `first` and following; input 0 is `dtotal` if it is not among them.
    fn launch_from(&self, at: &mut Launches<'_>, first: usize) -> Result<()> {
        let places = self.places();
        let (classes, tied) = (self.classification.is_some(), self.consistency.is_some());
        let tie = self.consistency.unwrap_or(Tie {
            weight: 0.0,
            stop_classifier: false,
            stop_mask: false,
            unweighted: false,
        });
        let input = |present: bool, i: usize| match present {
            true => at.input(first + i),
            false => Pointer::NULL,
        };
        let output = |present: bool, o: usize| match present {
            true => at.output(o),
            false => Pointer::NULL,
        };
        let (malignancy, prior) = (places.malignancy, places.prior);
        let arguments = MultitaskLossKernel {
            dtotal: match first {
                0 => Pointer::NULL,
                _ => at.input(0),
            }
            .into(),
            cross_entropy: input(self.mask, 0).into(),
            dice: input(self.mask, 1).into(),
            moments: input(self.mask, 2).into(),
            perimeters: input(self.mask, 3).into(),
            weight: input(self.mask, 4).into(),
            malignancy: input(classes, malignancy).into(),
            label: input(classes, malignancy + 1).into(),
            class_weight: input(classes, malignancy + 2).into(),
            prior_weight: input(tied, prior).into(),
            prior_bias: input(tied, prior + 1).into(),
            prior_mean: input(tied, prior + 2).into(),
            prior_sd: input(tied, prior + 3).into(),
            control: input(tied, prior + 4).into(),
            n: at.int(at.input_shape(first).n)?,
            by_classification: self.classification.unwrap_or(0.0),
            by_consistency: tie.weight,
            stop_p: i32::from(tie.stop_classifier),
            stop_mask: i32::from(tie.stop_mask),
            unweighted: i32::from(tie.unweighted),
            total: at.output(0).into(),
            mean_cross_entropy: output(self.mask, 1).into(),
            mean_dice: output(self.mask, 2).into(),
            classification: output(classes, places.classification).into(),
            consistency: output(tied, places.consistency).into(),
            dmean: output(self.mask, places.gradients).into(),
            dmoments: output(self.mask, places.gradients + 1).into(),
            dperimeters: output(self.mask, places.gradients + 2).into(),
            dmalignancy: output(classes, places.dmalignancy).into(),
            dweight: output(tied, places.dprior).into(),
            dbias: output(tied, places.dprior + 1).into(),
        };
        at.launch(Grid::new(1, THREADS), &arguments)
    }
}

/// The same once more, for another gradient of the total than 1: input 0 is `dtotal`, a scalar, which
/// multiplies all gradients; inputs of the loss and outputs are as [`MultitaskLoss`]'s.
///
/// Scaling the gradients that are there would round them twice.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct MultitaskLossGradient {
    /// The loss.
    pub loss: MultitaskLoss,
}

impl<T: Real> Kernel<T> for MultitaskLossGradient {
    fn run(&self, io: &mut Io<'_, T>) {
        let dtotal = io.input(0)[0].wide();
        self.loss.compute(io, 1, dtotal);
    }
}

impl Op for MultitaskLossGradient {
    fn name(&self) -> &'static str {
        "multitask_loss_gradient"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        self.loss.outputs(&inputs[1..])
    }
    fn flops(&self, inputs: &[Shape], outputs: &[Shape]) -> u64 {
        self.loss.flops(&inputs[1..], outputs)
    }
    fn narrow(&self, output: usize, inputs: &[bool]) -> bool {
        self.loss.narrow(output, &inputs[1..])
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        self.loss.launch_from(at, 1)
    }
}

/// Moments are drawn as constants, since their finite differences see the confidence, which passes no gradient
/// on; nor is anything else stopped. Tests compare those gradients with the composition's.
pub(super) fn case(s: &mut Sampler) -> Case {
    let n = s.size(1, 5);
    let (mask, classes) = match s.size(0, 4) {
        0 => (true, false),
        1 => (false, true),
        _ => (true, true),
    };
    let op = MultitaskLoss {
        mask,
        classification: classes.then(|| s.uniform(0.3, 3.0)),
        consistency: (mask && classes && s.chance(0.8)).then(|| Tie {
            weight: s.uniform(1.0, 9.0),
            stop_classifier: false,
            stop_mask: false,
            unweighted: s.chance(0.3),
        }),
    };
    // Some images are padding, now and then all.
    let none = s.chance(0.1);
    let weights = |s: &mut Sampler| -> Vec<f64> {
        let weight = |_| match none || s.chance(0.2) {
            true => 0.0,
            false => s.uniform(0.5, 2.0),
        };
        (0..n).map(weight).collect()
    };
    let (image, vector) = (Shape::per_image(n, 1), Shape::per_channel(4));
    let mut case = Case::new(format!("{n} images, {op:?}"), move |t, v| {
        Ok(vec![t.push_all(op, v)?[0]])
    });
    if mask {
        let (moments, perimeters) = draw_sums(s, n);
        case = case
            .with("cross-entropy", image, s.values(n, 0.0, 2.0))
            .with("dice", image, s.values(n, 0.0, 1.0))
            .with_constant("moments", Shape::per_image(n, Moments::COUNT), moments)
            .with("perimeter", image, perimeters)
            .with_constant("weight", image, weights(s));
    }
    if classes {
        let labels = (0..n).map(|_| f64::from(u8::from(s.chance(0.5))));
        let labels = labels.collect();
        case = case
            .with("logit", image, s.values(n, -4.0, 4.0))
            .narrow()
            .with_constant("label", image, labels)
            .with_constant("class weight", image, weights(s));
    }
    if op.consistency.is_some() {
        case = case
            .with("prior's weights", vector, s.values(4, 0.0, 1.5))
            .with("prior's bias", Shape::SCALAR, s.values(1, -1.0, 1.0))
            .with_constant("means", vector, s.values(4, -0.3, 0.8))
            .with_constant("standard deviations", vector, s.values(4, 0.5, 1.0))
            .with_constant(
                "control",
                Shape::per_channel(control::LEN),
                s.values(control::LEN, 0.1, 1.0),
            );
    }
    // Long, since the perimeters are of the order of 100.
    case.with_step(1e-2)
}
