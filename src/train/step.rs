//! The two tapes of a run: a whole training step, and the network alone for evaluation.

use std::borrow::Cow;

use super::config::{Arm, Config, ModelKind, Stop};
use crate::device::cpu::{self, Element};
use crate::device::{Backend, Session};
use crate::error::Result;
use crate::features;
use crate::loss::{Loss, Prior, Targets, Terms, Tie};
use crate::nn::weights::{self, Part};
use crate::nn::{
    self, AttentionUNet, EfficientNet, Fold, Heads, Logits, Mode, Network, Start, UNet,
};
use crate::ops::concat::Concat;
use crate::ops::control;
use crate::ops::pointwise::{Add, Scale};
use crate::optim::{AdamW, Rule};
use crate::tape::{Kind, Options, Plan, Tape, Var};
use crate::tensor::{Real, Shape};

fn heads(config: &Config) -> Heads {
    Heads {
        mask: config.arm.segments(),
        malignancy: config.arm.classifies(),
    }
}

/// Records the network that `config` describes.
fn record(config: &Config, network: &mut Network<'_>, images: Var) -> Result<Logits> {
    let (widths, dropout) = (config.model.widths.clone(), config.model.dropout);
    match config.model.kind {
        ModelKind::Unet => UNet { widths, dropout }.record(network, images, heads(config)),
        ModelKind::EfficientnetB1 => AttentionUNet {
            encoder: EfficientNet::b1(),
            widths,
            dropout,
        }
        .record(network, images, heads(config)),
    }
}

fn images(config: &Config) -> Shape {
    Shape::new(config.batch, config.size, config.size, 1)
}

/// Forward, loss, backward and update of one batch, recorded.
#[derive(Clone, Debug)]
pub struct TrainingStep {
    /// The tape.
    pub tape: Tape,
    /// Input: N×S×S×1, intensities in [0, 1].
    pub images: Var,
    /// Inputs that the logits are compared with.
    pub targets: Targets,
    /// The loss.
    pub terms: Terms,
    /// Norm of the gradient before clipping, a scalar.
    pub norm: Var,
    /// The terms of the loss that there are, in their order, then the norm: what is read of a step.
    pub report: Var,
    /// Input and output, 0 at first: a step whose loss or gradient is not finite leaves a NaN here, and no step
    /// updates parameters, moments or averages while there is one. So the step can still be examined when others
    /// were queued behind it. Running statistics go on.
    pub halt: Var,
    /// The prior, if the run has one.
    pub prior: Option<Prior>,
    starts: Vec<(Var, Start)>,
}

impl TrainingStep {
    /// Records the step that `config` describes. A run that segments carries a `prior` to evaluate its
    /// masks with; it is learned in the consistency arm.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if the configuration was not validated.
    pub fn record(config: &Config, prior: bool) -> Result<Self> {
        let network = |network: &mut Network<'_>, images| record(config, network, images);
        Self::of(config, prior, network)
    }

    /// As [`TrainingStep::record`], with a network of one's own in place of the configured one: it has the heads
    /// that the arm trains.
    ///
    /// # Errors
    /// As [`TrainingStep::record`]; those of `network`.
    pub fn of(
        config: &Config,
        prior: bool,
        network: impl FnOnce(&mut Network<'_>, Var) -> Result<Logits>,
    ) -> Result<Self> {
        let mut tape = Tape::new();
        let shape = images(config);
        let per_image = Shape::per_image(config.batch, 1);
        let images = tape.input("images", shape);
        let targets = Targets {
            masks: tape.input("masks", shape),
            labels: tape.input("labels", per_image),
            weights: tape.input("weights", per_image),
            class_weights: tape.input("class_weights", per_image),
            control: tape.input("control", Shape::per_channel(control::LEN)),
        };
        // The logits, stored as the images are, are compared with masks stored alike.
        tape.narrow(images);
        tape.narrow(targets.masks);
        let control = targets.control;
        let seed = config.seed;
        let mut recorder = Network::new(&mut tape, Mode::Train { control, seed });
        let logits = network(&mut recorder, images)?;
        recorder.move_statistics()?;
        let starts = recorder.starts().to_vec();

        let tied = config.arm == Arm::Consistency;
        let learned = tied && !config.prior.frozen;
        let prior = prior.then(|| Prior::record(&mut tape, learned));
        let tie = prior.filter(|_| tied).map(|prior| Tie {
            weight: config.loss.consistency,
            prior,
            stop_classifier: config.loss.stop_gradient == Stop::Classifier,
            stop_mask: config.loss.stop_gradient == Stop::Mask,
            unweighted: !config.loss.confidence,
        });
        let loss = Loss {
            classification: config.loss.classification,
            kappa: config.loss.kappa,
            tie,
        };
        let terms = tape.scope("loss", |tape| Terms::record(tape, &loss, &logits, &targets))?;

        let parameters: Vec<Var> = tape.of_kind(Kind::Parameter).collect();
        let gradients = tape.backward(terms.total, &parameters)?;
        // Every parameter recorded leads to the loss.
        let gradients: Vec<Var> = gradients.into_iter().flatten().collect();
        let rule = |&var: &Var| Rule {
            decay: decays(&starts, var),
            nonnegative: tape.name(var) == "prior.weight" && !config.prior.free_sign,
        };
        let optimizer = &config.optimizer;
        let adamw = AdamW {
            beta1: optimizer.beta1,
            beta2: optimizer.beta2,
            eps: optimizer.eps,
            weight_decay: optimizer.weight_decay,
            clip: if optimizer.clip > 0.0 {
                optimizer.clip
            } else {
                f64::INFINITY
            },
            rules: parameters.iter().map(rule).collect(),
        };
        let running = starts.iter().map(|&(var, _)| var);
        let mut statistics: Vec<Var> = running
            .filter(|v| tape.values()[v.index()].kind == Kind::State)
            .collect();
        statistics.sort_unstable();
        statistics.dedup();
        let halt = tape.input("halt", Shape::SCALAR);
        let guard = tape.push(Add, &[terms.total, halt])?;
        let norm = adamw.record(
            &mut tape,
            control,
            guard,
            &parameters,
            &gradients,
            (optimizer.ema > 0.0).then_some(&statistics[..]),
        )?;
        tape.keep(norm);
        tape.update(Scale { factor: 0.0 }, &[norm], &[halt])?;
        let reported = terms.each().into_iter().chain([Some(norm)]).flatten();
        let report = tape.push(Concat, &reported.collect::<Vec<_>>())?;
        tape.keep(report);
        Ok(Self {
            tape,
            images,
            targets,
            terms,
            norm,
            report,
            halt,
            prior,
            starts,
        })
    }

    /// Memory for the step on the processor, with its starting values ([`TrainingStep::start`]).
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if there is not enough memory.
    pub fn session<T: Element>(
        &self,
        seed: u64,
        prior: Option<&features::Prior>,
    ) -> Result<cpu::Session<T>> {
        let mut session = cpu::Session::new(Plan::new(&self.tape, Options::default())?)?;
        self.start(&mut session, seed, prior)?;
        Ok(session)
    }

    /// Writes the starting values: random weights keyed by `seed`, the fitted `prior`, averages that equal what
    /// they average. Moments start as zeros.
    ///
    /// # Errors
    /// As [`Session::write`].
    pub fn start<T: Real>(
        &self,
        session: &mut dyn Session<T>,
        seed: u64,
        prior: Option<&features::Prior>,
    ) -> Result<()> {
        nn::initialise(session, &self.starts, seed)?;
        if let (Some(place), Some(prior)) = (&self.prior, prior) {
            for (var, values) in place.values(prior) {
                session.write(var, &values)?;
            }
        }
        self.start_averages(session)
    }

    /// Sets the moving averages to what they average.
    ///
    /// # Errors
    /// As [`Session::read`] and [`Session::write`].
    pub fn start_averages<T: Real>(&self, session: &mut dyn Session<T>) -> Result<()> {
        for average in self.tape.of_kind(Kind::State) {
            let Some(name) = self.tape.name(average).strip_prefix("ema.") else {
                continue;
            };
            let source = [Kind::Parameter, Kind::State]
                .into_iter()
                .find_map(|kind| self.tape.find(kind, name))
                .expect("an average is named after what it averages");
            let values = session.read(source)?.into_owned();
            session.write(average, &values)?;
        }
        Ok(())
    }
}

/// Weights of convolutions and linear layers, which start at random, decay; norms, biases and the prior do not.
fn decays(starts: &[(Var, Start)], parameter: Var) -> bool {
    let start = starts.iter().find(|(var, _)| *var == parameter);
    start.is_some_and(|(_, start)| !matches!(start, Start::Constant(_)))
}

/// The network in evaluation, recorded.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// The tape.
    pub tape: Tape,
    /// Input: N×S×S×1, intensities in [0, 1].
    pub images: Var,
    /// Outputs, kept.
    pub logits: Logits,
    /// Parameters and states, and how they start.
    pub starts: Vec<(Var, Start)>,
    folds: Vec<Fold>,
}

impl Evaluation {
    /// Records the network that `config` describes, for batches of its size, in [`Mode::Evaluate`].
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if the configuration was not validated.
    pub fn record(config: &Config) -> Result<Self> {
        Self::record_in(Mode::Evaluate, config)
    }

    /// As [`Evaluation::record`] in [`Mode::Infer`]: the same numbers, but for rounding, in less time.
    ///
    /// # Errors
    /// As [`Evaluation::record`].
    pub fn folded(config: &Config) -> Result<Self> {
        Self::record_in(Mode::Infer, config)
    }

    fn record_in(mode: Mode, config: &Config) -> Result<Self> {
        let mut tape = Tape::new();
        let images = tape.input("images", images(config));
        tape.narrow(images);
        let mut network = Network::new(&mut tape, mode);
        let logits = record(config, &mut network, images)?;
        let (starts, folds) = (network.starts().to_vec(), network.folds().to_vec());
        let kept = [logits.mask, logits.malignancy];
        kept.into_iter().flatten().for_each(|v| tape.keep(v));
        Ok(Self {
            tape,
            images,
            logits,
            starts,
            folds,
        })
    }

    /// Memory for the network, its weights zero.
    ///
    /// # Errors
    /// As [`Backend::session`].
    pub fn session(&self, backend: &Backend) -> Result<Box<dyn Session<f32>>> {
        backend.session(&self.tape)
    }

    /// What its parameters and states are made of: [`weights::parts`].
    ///
    /// # Errors
    /// The first of `source`.
    pub fn parts<S>(&self, source: impl FnMut(&str, Shape) -> Result<S>) -> Result<Vec<Part<S>>> {
        weights::parts(&self.tape, &self.folds, source)
    }

    /// Writes the weights of `session`, which `source` gives by name and extent.
    ///
    /// # Errors
    /// The first of `source`; as [`Session::write`].
    pub fn load<'a>(
        &self,
        session: &mut dyn Session<f32>,
        source: impl FnMut(&str, Shape) -> Result<Cow<'a, [f32]>>,
    ) -> Result<()> {
        let mut parts = self.parts(source)?.into_iter();
        parts.try_for_each(|part| weights::load(session, part))
    }
}
