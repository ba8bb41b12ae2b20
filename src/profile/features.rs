//! The block that ties mask and diagnosis together, forward and backward, from mask logits and malignancy
//! logits to the loss and back: fused as in training, and of one operation each.

use crate::error::Result;
use crate::loss::{Loss, Prior, Targets, Terms, Tie};
use crate::nn::Logits;
use crate::ops::control;
use crate::ops::losses::{BceWithLogits, SoftDice};
use crate::ops::moments::Moments;
use crate::ops::multitask_loss::{self, MultitaskLoss};
use crate::ops::perimeter::Perimeter;
use crate::ops::pointwise::{Scale, Sigmoid};
use crate::tape::{Tape, Var};
use crate::tensor::Shape;

/// κ, λ_cls and λ_con.
const KAPPA: f64 = 3.0;
const CLASSIFICATION: f64 = 0.2;
const CONSISTENCY: f64 = 1.0;

/// What both compositions start from.
struct Inputs {
    mask: Var,
    malignancy: Var,
    targets: Targets,
    prior: Prior,
}

impl Inputs {
    /// `masks` is N×H×W×1.
    fn record(tape: &mut Tape, masks: Shape) -> Self {
        let image = Shape::per_image(masks.n, 1);
        let mask = tape.input("logits", masks);
        let truth = tape.input("truth", masks);
        tape.narrow(mask);
        tape.narrow(truth);
        Self {
            mask,
            malignancy: tape.input("malignancy", image),
            targets: Targets {
                masks: truth,
                labels: tape.input("labels", image),
                weights: tape.input("weights", image),
                class_weights: tape.input("class_weights", image),
                control: tape.input("control", Shape::per_channel(control::LEN)),
            },
            prior: Prior::record(tape, true),
        }
    }

    /// Appends the gradients of `total`.
    fn differentiate(&self, mut tape: Tape, total: Var) -> Result<Block> {
        let wrt = [
            self.mask,
            self.malignancy,
            self.prior.weight,
            self.prior.bias,
        ];
        let gradients = tape.backward(total, &wrt)?.into_iter().flatten();
        let results: Vec<Var> = std::iter::once(total).chain(gradients).collect();
        results.iter().for_each(|&v| tape.keep(v));
        Ok(Block { tape, results })
    }
}

/// A recorded block.
#[derive(Clone, Debug)]
pub struct Block {
    /// Forward and backward.
    pub tape: Tape,
    /// The loss and its gradients with respect to mask logits, malignancy logits, the prior's weights and
    /// bias.
    pub results: Vec<Var>,
}

/// The loss of the consistency arm and its gradients, as [`Terms`] records them, for masks N×H×W×1.
///
/// # Errors
/// [`crate::Error::Shape`] if `masks` has channels.
pub fn fused(masks: Shape) -> Result<Block> {
    let mut tape = Tape::new();
    let inputs = Inputs::record(&mut tape, masks);
    let logits = Logits {
        mask: Some(inputs.mask),
        malignancy: Some(inputs.malignancy),
    };
    let loss = Loss {
        classification: CLASSIFICATION,
        kappa: KAPPA,
        tie: Some(Tie {
            weight: CONSISTENCY,
            prior: inputs.prior,
            stop_classifier: false,
            stop_mask: false,
            unweighted: false,
        }),
    };
    let terms = Terms::record(&mut tape, &loss, &logits, &inputs.targets)?;
    inputs.differentiate(tape, terms.total)
}

/// The same loss and gradients, composed of one operation for each thing that is computed.
///
/// # Errors
/// As [`fused`].
pub fn unfused(masks: Shape) -> Result<Block> {
    let mut tape = Tape::new();
    let inputs = Inputs::record(&mut tape, masks);
    let (z, targets) = (inputs.mask, inputs.targets);
    let t = &mut tape;
    let plain = t.push(Sigmoid, &[z])?;
    let sharp = t.push(Scale { factor: KAPPA }, &[z])?;
    let sharp = t.push(Sigmoid, &[sharp])?;
    let cross_entropy = t.push(BceWithLogits, &[z, targets.masks])?;
    let dice = t.push(SoftDice, &[plain, targets.masks])?;
    let moments = t.push(Moments, &[sharp])?;
    let perimeter = t.push(Perimeter, &[sharp])?;

    let prior = inputs.prior;
    let op = MultitaskLoss {
        mask: true,
        classification: Some(CLASSIFICATION),
        consistency: Some(multitask_loss::Tie {
            weight: CONSISTENCY,
            stop_classifier: false,
            stop_mask: false,
            unweighted: false,
        }),
    };
    let total = op.compose(
        t,
        &[
            cross_entropy,
            dice,
            moments,
            perimeter,
            targets.weights,
            inputs.malignancy,
            targets.labels,
            targets.class_weights,
            prior.weight,
            prior.bias,
            prior.mean,
            prior.sd,
            targets.control,
        ],
    )?[0];
    inputs.differentiate(tape, total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::Session;
    use crate::profile::fill;
    use crate::tape::{Kind, Plan};

    #[test]
    fn both_compute_the_same() {
        let masks = Shape::new(3, 33, 40, 1);
        let results = [fused(masks), unfused(masks)].map(|block| {
            let Block { tape, results } = block.unwrap();
            let plan = Plan::new(&tape, Default::default()).unwrap();
            let mut session = Session::<f64>::new(plan).unwrap();
            for kind in [Kind::Input, Kind::Parameter, Kind::State] {
                for var in tape.of_kind(kind) {
                    let values = fill(&tape.values()[var.index()]).into_iter();
                    session.write(var, &values.map(f64::from).collect::<Vec<_>>());
                }
            }
            session.run();
            let read = |&var: &Var| session.read(var).to_vec();
            results.iter().map(read).collect::<Vec<_>>()
        });
        let [fused, unfused] = &results;
        assert_eq!(fused.len(), 5);
        for (fused, unfused) in fused.iter().zip(unfused) {
            let largest = unfused.iter().fold(0.0f64, |m, x| m.max(x.abs()));
            assert!(largest > 0.0);
            for (a, b) in fused.iter().zip(unfused) {
                assert!((a - b).abs() <= 1e-9 * largest, "{a} and {b}");
            }
        }
    }
}
