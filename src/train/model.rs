//! A trained network, ready to look at images.

use std::borrow::Cow;
use std::path::Path;

use rayon::prelude::*;

use super::checkpoint::{Checkpoint, weights_prefix};
use super::config::{Config, Device};
use super::step::{Evaluation, TrainingStep};
use crate::data::letterbox::Letterbox;
use crate::device::{Backend, Session};
use crate::error::{Error, Result};
use crate::features::{MaskSums, Prior, ShapeFeatures};
use crate::metrics::Mask;
use crate::metrics::classification::THRESHOLD;
use crate::tape::{Kind, Var};
use crate::tensor::Shape;

/// Name of the configuration in a run's folder.
pub const CONFIG: &str = "config.toml";
/// Name of the best checkpoint in a run's folder.
pub const BEST: &str = "best.safetensors";
/// Name of the latest checkpoint in a run's folder.
pub const LAST: &str = "last.safetensors";

/// What the network says of one letterboxed image.
#[derive(Clone, PartialEq, Debug)]
pub struct Inference {
    /// Mask logits, S×S; absent if the arm does not segment.
    pub logits: Option<Vec<f32>>,
    /// Probability of malignancy; absent if the arm does not classify.
    pub p: Option<f64>,
}

/// What is found in one image.
#[derive(Clone, PartialEq, Debug)]
pub struct Finding {
    /// The lesion at the image's own resolution; absent if the arm does not segment.
    pub mask: Option<Mask>,
    /// Probability of malignancy; absent if the arm does not classify.
    pub p: Option<f64>,
    /// The prior of the soft mask; absent if no lesion is measurable or the run has no prior.
    pub phi: Option<f64>,
    /// The shape features of the soft mask, absent if no lesion is measurable.
    pub features: Option<ShapeFeatures>,
}

/// A network in evaluation with its weights.
pub struct Model {
    config: Config,
    /// Images that are shown at once.
    batch: usize,
    evaluation: Evaluation,
    session: Box<dyn Session<f32>>,
    /// What the network is shown.
    shown: Vec<f32>,
    prior: Option<Prior>,
}

impl Model {
    /// A network that is shown `batch` images at once, whose weights are still to be given
    /// ([`Model::copy_weights`]).
    ///
    /// # Errors
    /// As [`Evaluation::record`] and [`Evaluation::session`].
    pub fn new(config: Config, batch: usize, backend: &Backend) -> Result<Self> {
        let own = Config {
            batch,
            ..config.clone()
        };
        let evaluation = Evaluation::folded(&own)?;
        let session = evaluation.session(backend)?;
        Ok(Self {
            shown: vec![0.0; batch * config.size * config.size],
            config,
            batch,
            evaluation,
            session,
            prior: None,
        })
    }

    /// The best network of the run in folder `run`, wherever that was trained. It is shown the run's batch at once,
    /// but not more than `images`, since places without an image take as long as others.
    ///
    /// # Errors
    /// [`Error::File`] if the folder does not hold a run with a checkpoint, or they do not fit; as
    /// [`Config::backend`].
    pub fn open(run: &Path, device: Device, images: usize) -> Result<Self> {
        let config = Config::of_run(run)?;
        let backend = config.backend(device)?;
        let batch = config.batch.min(images).max(1);
        let mut model = Self::new(config, batch, &backend)?;
        let path = run.join(BEST);
        let checkpoint = Checkpoint::read(&path)?;
        let weight = |name: &str, shape| checkpoint.weight(&path, name, shape).map(Cow::Borrowed);
        model.evaluation.load(&mut *model.session, weight)?;
        model.prior = prior(|name| {
            let averaged = format!("{}{name}", weights_prefix(&checkpoint.config));
            let tensor = checkpoint.tensor(&averaged);
            let tensor = tensor.or_else(|| checkpoint.tensor(name))?;
            Some(tensor.data().to_vec())
        });
        Ok(model)
    }

    /// What the run was asked to do.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Takes the weights as they stand in training: moving averages if there are any.
    ///
    /// # Errors
    /// [`Error::Shape`] naming the first weight that `step` lacks: it trains another network; else as
    /// [`Session::read`] and [`Session::write`].
    pub fn copy_weights(&mut self, step: &TrainingStep, training: &dyn Session<f32>) -> Result<()> {
        let prefix = weights_prefix(&self.config);
        let weight = |name: &str, shape: Shape| -> Result<Cow<'_, [f32]>> {
            let averaged = format!("{prefix}{name}");
            let mut kinds = [Kind::Parameter, Kind::State].into_iter();
            let var = kinds.find_map(|kind| step.tape.find(kind, &averaged));
            match var.filter(|&var| step.tape.shape(var) == shape) {
                Some(var) => training.read(var),
                None => Err(Error::shape(
                    "weights",
                    format!("expected {name}, {shape}, found none"),
                )),
            }
        };
        self.evaluation.load(&mut *self.session, weight)
    }

    /// Shows up to a batch of letterboxed 8-bit images to the network.
    ///
    /// # Errors
    /// As [`Session::read`].
    ///
    /// # Panics
    /// If there are more images than are shown at once, or one is not S×S.
    pub fn infer(&mut self, images: &[&[u8]]) -> Result<Vec<Inference>> {
        let pixels = self.config.size * self.config.size;
        assert!(images.len() <= self.batch, "too many images");
        for (row, image) in self.shown.chunks_exact_mut(pixels).zip(images) {
            crate::data::augment::unit(image, row);
        }
        self.session.write(self.evaluation.images, &self.shown)?;
        self.session.replay()?;
        let logits = self.evaluation.logits;
        let read = |v: Option<Var>| v.map(|v| self.session.read(v)).transpose();
        let (masks, malignancies) = (read(logits.mask)?, read(logits.malignancy)?);
        let one = |i: usize| Inference {
            logits: masks
                .as_ref()
                .map(|masks| masks[i * pixels..][..pixels].to_vec()),
            p: malignancies.as_ref().map(|l| sigmoid(f64::from(l[i]))),
        };
        Ok((0..images.len()).map(one).collect())
    }

    /// The lesion, its features and its prior, for an image that lies in the network's square as
    /// `letterbox` says. A pixel belongs to the lesion where its probability, brought back to the image's
    /// resolution, is at least one half.
    pub fn finding(&self, inference: &Inference, letterbox: &Letterbox) -> Finding {
        let mut finding = Finding {
            mask: None,
            p: inference.p,
            phi: None,
            features: None,
        };
        let Some(logits) = &inference.logits else {
            return finding;
        };
        let of = |sharpness: f64| -> Vec<f32> {
            let at = |&z: &f32| sigmoid(sharpness * f64::from(z)) as f32;
            logits.iter().map(at).collect()
        };
        let inside = |&p: &f32| f64::from(p) >= THRESHOLD;
        let pixels = letterbox.inverse(&of(1.0)).iter().map(inside).collect();
        let mask = Mask::new(letterbox.width, letterbox.height, pixels);
        finding.mask = Some(mask.expect("the letterbox knows the image's extent"));
        let sums = MaskSums::of(&of(self.config.loss.kappa), self.config.size);
        finding.features = sums.features();
        finding.phi = self
            .prior
            .as_ref()
            .zip(finding.features.as_ref())
            .map(|(prior, features)| prior.phi(features));
        finding
    }

    /// Shows all `images` to the network, batch after batch, and calls `done` with the number shown
    /// after each batch; the results of `each`, run in parallel, in the order of the images.
    ///
    /// # Errors
    /// The first of `load` and `each`, in the order of the images; as [`Model::infer`].
    pub fn map<R: Send>(
        &mut self,
        images: usize,
        load: impl Fn(usize) -> Result<Vec<u8>> + Sync,
        each: impl Fn(&Self, usize, Inference) -> Result<R> + Sync,
        mut done: impl FnMut(usize) -> Result<()>,
    ) -> Result<Vec<R>> {
        let mut results = Vec::with_capacity(images);
        for start in (0..images).step_by(self.batch) {
            let end = images.min(start + self.batch);
            let loaded: Vec<_> = (start..end).into_par_iter().map(&load).collect();
            let loaded = loaded.into_iter().collect::<Result<Vec<_>>>()?;
            let views: Vec<&[u8]> = loaded.iter().map(Vec::as_slice).collect();
            let inferences = self.infer(&views)?;
            let this = &*self;
            let found: Vec<_> = inferences
                .into_par_iter()
                .enumerate()
                .map(|(i, inference)| each(this, start + i, inference))
                .collect();
            for result in found {
                results.push(result?);
            }
            done(end)?;
        }
        Ok(results)
    }
}

/// The prior from its tensors by name; `None` if they are absent.
fn prior(tensor: impl Fn(&str) -> Option<Vec<f32>>) -> Option<Prior> {
    let vector = |name: &str| -> Option<[f64; 4]> {
        let values: [f32; 4] = tensor(name)?.try_into().ok()?;
        Some(values.map(f64::from))
    };
    Some(Prior {
        weights: vector("prior.weight")?,
        bias: f64::from(*tensor("prior.bias")?.first()?),
        mean: vector("prior.mean")?,
        sd: vector("prior.sd")?,
    })
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}
