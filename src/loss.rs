//! What training minimises.
//!
//! With mask logits `z`, true mask `g`, malignancy logit `l`, `p̂ = σ(l)` and the prior `φ` of the mask
//! `m = σ(κz)` ([`crate::features`]):
//!
//! ```text
//! L = L_seg + λ_cls·BCE(l, malignant) + λ_con·r(t)·Σᵢ cᵢ·(p̂ᵢ − φᵢ)² / max(1, measurable lesions)
//! L_seg = BCE(z, g) + 1 − (2Σσ(z)g + 1)/(Σσ(z) + Σg + 1)       per image, then averaged
//! ```
//!
//! `cᵢ`, how decided the mask is, passes no gradient; `r(t)` is the ramp in the control vector. Which
//! terms there are depends on the heads that are trained ([`Terms::record`]). Images of weight 0, the
//! padding of a short batch, count in no term.

use crate::error::Result;
use crate::features;
use crate::nn::Logits;
use crate::ops::mask_head::MaskHead;
use crate::ops::multitask_loss::{self, MultitaskLoss};
use crate::tape::{Tape, Var};
use crate::tensor::{Real, Shape};

/// What the logits are compared with: inputs of the tape.
#[derive(Clone, Copy, Debug)]
pub struct Targets {
    /// N×H×W×1, soft masks in [0, 1].
    pub masks: Var,
    /// N×1×1×1, 1 for malignant.
    pub labels: Var,
    /// N×1×1×1, weight of each image.
    pub weights: Var,
    /// N×1×1×1, weight of each image in the classification loss.
    pub class_weights: Var,
    /// The control vector.
    pub control: Var,
}

/// The prior's values on a tape.
#[derive(Clone, Copy, Debug)]
pub struct Prior {
    /// `w`, 1×1×1×4.
    pub weight: Var,
    /// `b`, a scalar.
    pub bias: Var,
    /// `μ`, 1×1×1×4.
    pub mean: Var,
    /// `s`, 1×1×1×4.
    pub sd: Var,
}

impl Prior {
    /// Records `prior.weight` and `prior.bias`, parameters if `learned`, and the states `prior.mean`
    /// and `prior.sd`.
    pub fn record(tape: &mut Tape, learned: bool) -> Self {
        let vector = Shape::per_channel(4);
        tape.scope("prior", |tape| {
            let (weight, bias) = if learned {
                (
                    tape.parameter("weight", vector),
                    tape.parameter("bias", Shape::SCALAR),
                )
            } else {
                (
                    tape.state("weight", vector),
                    tape.state("bias", Shape::SCALAR),
                )
            };
            let (mean, sd) = (tape.state("mean", vector), tape.state("sd", vector));
            Self {
                weight,
                bias,
                mean,
                sd,
            }
        })
    }

    /// The prior's numbers paired with their place on the tape.
    pub fn values<T: Real>(&self, prior: &features::Prior) -> [(Var, Vec<T>); 4] {
        let of = |values: &[f64]| values.iter().map(|&v| T::of(v)).collect();
        [
            (self.weight, of(&prior.weights)),
            (self.bias, of(&[prior.bias])),
            (self.mean, of(&prior.mean)),
            (self.sd, of(&prior.sd)),
        ]
    }
}

/// The consistency term.
#[derive(Clone, Copy, Debug)]
pub struct Tie {
    /// λ_con.
    pub weight: f64,
    /// The prior.
    pub prior: Prior,
    /// No gradient into the classifier.
    pub stop_classifier: bool,
    /// No gradient into the mask. The prior's weights still learn.
    pub stop_mask: bool,
    /// Let all measurable lesions count alike: `cᵢ = 1`.
    pub unweighted: bool,
}

/// How the terms are combined.
#[derive(Clone, Copy, Debug)]
pub struct Loss {
    /// λ_cls.
    pub classification: f64,
    /// κ.
    pub kappa: f64,
    /// The consistency term, if there is one; it needs both heads.
    pub tie: Option<Tie>,
}

/// The loss and its terms, each a scalar that can be read after a replay, before their weights λ.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// `L`.
    pub total: Var,
    /// Cross-entropy of the mask.
    pub cross_entropy: Option<Var>,
    /// Soft Dice loss of the mask.
    pub dice: Option<Var>,
    /// Cross-entropy of the malignancy.
    pub classification: Option<Var>,
    /// Consistency, with its ramp.
    pub consistency: Option<Var>,
}

impl Terms {
    /// Records the terms that the logits present allow.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if logits and targets do not fit together, or there are no logits.
    pub fn record(
        tape: &mut Tape,
        loss: &Loss,
        logits: &Logits,
        targets: &Targets,
    ) -> Result<Self> {
        let mut inputs = Vec::new();
        if let Some(mask) = logits.mask {
            let head = MaskHead {
                sharpness: loss.kappa,
            };
            let head = tape.push_all(head, &[mask, targets.masks])?;
            inputs.extend([head[0], head[1], head[3], head[4], targets.weights]);
        }
        if let Some(malignancy) = logits.malignancy {
            inputs.extend([malignancy, targets.labels, targets.class_weights]);
        }
        let tie = loss
            .tie
            .filter(|_| logits.mask.is_some() && logits.malignancy.is_some());
        if let Some(Tie { prior, .. }) = tie {
            let Prior {
                weight,
                bias,
                mean,
                sd,
            } = prior;
            inputs.extend([weight, bias, mean, sd, targets.control]);
        }
        let op = MultitaskLoss {
            mask: logits.mask.is_some(),
            classification: logits.malignancy.map(|_| loss.classification),
            consistency: tie.map(|tie| multitask_loss::Tie {
                weight: tie.weight,
                stop_classifier: tie.stop_classifier,
                stop_mask: tie.stop_mask,
                unweighted: tie.unweighted,
            }),
        };
        let outputs = tape.push_all(op, &inputs)?;
        let (total, mut terms) = (outputs[0], outputs[1..].iter().copied());
        let mut term = |present: bool| if present { terms.next() } else { None };
        let terms = Self {
            total,
            cross_entropy: term(op.mask),
            dice: term(op.mask),
            classification: term(op.classification.is_some()),
            consistency: term(op.consistency.is_some()),
        };
        terms
            .each()
            .into_iter()
            .flatten()
            .for_each(|v| tape.keep(v));
        Ok(terms)
    }

    /// Total, cross-entropy, Dice, classification, consistency.
    pub fn each(&self) -> [Option<Var>; 5] {
        [
            Some(self.total),
            self.cross_entropy,
            self.dice,
            self.classification,
            self.consistency,
        ]
    }
}
