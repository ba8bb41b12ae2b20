//! Trained networks, ready to look at images.

use std::borrow::Cow;
use std::collections::HashSet;
use std::path::Path;

use rayon::prelude::*;

use super::checkpoint::{Checkpoint, weights_prefix};
use super::config::{Config, Device};
use super::step::Evaluation;
use crate::data::letterbox::Letterbox;
use crate::device::{Backend, Session};
use crate::error::{Error, Result};
use crate::features::{MaskSums, Prior, ShapeFeatures};
use crate::metrics::classification::THRESHOLD;
use crate::metrics::statistics::{mean, sample_variance};
use crate::metrics::{Disagreement, Mask};
use crate::tape::Var;

/// Name of the configuration in a run's folder.
pub const CONFIG: &str = "config.toml";
/// Name of the best checkpoint in a run's folder.
pub const BEST: &str = "best.safetensors";
/// Name of the latest checkpoint in a run's folder.
pub const LAST: &str = "last.safetensors";

/// What a network says of one letterboxed image, or several together.
#[derive(Clone, PartialEq, Debug)]
pub struct Inference {
    /// Mask logits, S×S; absent if the arm does not segment.
    pub logits: Option<Vec<f32>>,
    /// Probability of malignancy; absent if the arm does not classify.
    pub p: Option<f64>,
    /// How far several networks are apart.
    pub disagreement: Disagreement,
}

impl Inference {
    /// The mean of what was said of one image: of the probabilities, pixel by pixel, and so of the probabilities at
    /// the image's resolution, which depend on these linearly. Of one alone it is that, bit for bit.
    fn mean(mut all: Vec<Self>) -> Self {
        if all.len() == 1 {
            return all.swap_remove(0);
        }
        let n = all.len() as f64;
        let together = |logits: &[&[f32]], pixel: usize| -> f32 {
            // Both from sums, since 1 − p would round a decided pixel to infinity.
            let sum = |sign: f64| -> f64 {
                let logits = logits.iter().map(|map| f64::from(map[pixel]));
                logits.map(|z| sigmoid(sign * z)).sum()
            };
            (sum(1.0) / sum(-1.0)).ln() as f32
        };
        let maps: Option<Vec<&[f32]>> = all.iter().map(|one| one.logits.as_deref()).collect();
        let logits = maps.map(|maps| {
            let pixels = maps.first().map_or(0, |map| map.len());
            (0..pixels).map(|pixel| together(&maps, pixel)).collect()
        });
        let p: Option<Vec<f64>> = all.iter().map(|one| one.p).collect();
        Self {
            logits,
            p: p.map(|p| p.iter().sum::<f64>() / n),
            disagreement: Disagreement::default(),
        }
    }
}

/// How far what several networks said of one image is apart.
fn disagreement(all: &[Inference]) -> Disagreement {
    if all.len() < 2 {
        return Disagreement::default();
    }
    let p: Vec<f64> = all.iter().filter_map(|one| one.p).collect();
    let inside = |one: &Inference| -> Option<Vec<bool>> {
        let logits = one.logits.as_ref()?;
        Some(logits.iter().map(|&z| z >= 0.0).collect())
    };
    let masks: Vec<Vec<bool>> = all.iter().filter_map(inside).collect();
    let mut pairs = Vec::new();
    for (i, a) in masks.iter().enumerate() {
        for b in &masks[..i] {
            let (mut both, mut areas) = (0u64, 0u64);
            for (&a, &b) in a.iter().zip(b) {
                both += u64::from(a && b);
                areas += u64::from(a) + u64::from(b);
            }
            // Without a pixel in either there is nothing to disagree about.
            pairs.push(match areas {
                0 => 1.0,
                areas => 2.0 * both as f64 / areas as f64,
            });
        }
    }
    Disagreement {
        p_sd: sample_variance(&p).map(f64::sqrt),
        mask_agreement: mean(&pairs),
    }
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
    /// How far the networks are apart.
    pub disagreement: Disagreement,
}

/// A network in evaluation with its weights, or an ensemble: networks of several runs, which are averaged.
pub struct Model {
    config: Config,
    /// Images that are shown at once.
    batch: usize,
    evaluation: Evaluation,
    members: Vec<Member>,
    /// What the networks are shown.
    shown: Vec<f32>,
}

/// The network of one run.
struct Member {
    session: Box<dyn Session<f32>>,
    prior: Option<Prior>,
}

impl Model {
    /// A network that is shown `batch` images at once, whose weights are still to be given.
    fn new(config: Config, batch: usize, backend: &Backend) -> Result<Self> {
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
            members: vec![Member {
                session,
                prior: None,
            }],
        })
    }

    /// The best network of the run in folder `run`, wherever that was trained. It is shown the run's batch at once,
    /// but not more than `images`, since places without an image take as long as others.
    ///
    /// # Errors
    /// [`Error::File`] if the folder does not hold a run with a checkpoint, or they do not fit; as
    /// [`Config::backend`].
    pub fn open(run: &Path, device: Device, images: usize) -> Result<Self> {
        Self::ensemble(&[run], device, images)
    }

    /// The best networks of several runs, which are averaged: masks and probabilities before the threshold, and the
    /// priors of the averaged mask. Together they are shown a run's batch at once, so that they need no more memory
    /// for it than one does.
    ///
    /// # Errors
    /// As [`Model::open`]; [`Error::Argument`] without runs, or for one given twice; [`Error::File`] for a run that says
    /// other things of an image than the first does.
    pub fn ensemble(runs: &[impl AsRef<Path>], device: Device, images: usize) -> Result<Self> {
        let runs: Vec<&Path> = runs.iter().map(AsRef::as_ref).collect();
        let Some((&first, others)) = runs.split_first() else {
            return Err(Error::argument("RUN", "expected a run, found none"));
        };
        let config = Config::of_run(first)?;
        for other in others {
            if let Some((key, ours, theirs)) = config.says_otherwise(&Config::of_run(other)?) {
                let problem = format!(
                    "expected {key} = {ours}, as {} has it, to average the two, found {theirs}",
                    first.display()
                );
                return Err(Error::file(other, problem));
            }
        }
        distinct(&runs)?;
        let backend = config.backend(device)?;
        let batch = config.batch.min(images) / runs.len();
        let mut model = Self::new(config, batch.max(1), &backend)?;
        model.load(0, first)?;
        for (i, other) in others.iter().enumerate() {
            let session = model.evaluation.session(&backend)?;
            model.members.push(Member {
                session,
                prior: None,
            });
            model.load(1 + i, other)?;
        }
        Ok(model)
    }

    /// Gives a member its weights.
    fn load(&mut self, member: usize, run: &Path) -> Result<()> {
        let path = run.join(BEST);
        let checkpoint = Checkpoint::read(&path)?;
        let weight = |name: &str, shape| checkpoint.weight(&path, name, shape).map(Cow::Borrowed);
        let member = &mut self.members[member];
        self.evaluation.load(&mut *member.session, weight)?;
        member.prior = prior(|name| {
            let averaged = format!("{}{name}", weights_prefix(&checkpoint.config));
            let tensor = checkpoint.tensor(&averaged);
            let tensor = tensor.or_else(|| checkpoint.tensor(name))?;
            Some(tensor.data().to_vec())
        });
        Ok(())
    }

    /// What the run was asked to do; the first one's of an ensemble.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Shows up to a batch of letterboxed 8-bit images to the networks; with [`Config::test_flip`] their mirror images
    /// too. What is said of one image is averaged over both, and over the networks.
    ///
    /// # Errors
    /// As [`Session::read`].
    ///
    /// # Panics
    /// If there are more images than are shown at once, or one is not S×S.
    pub fn infer(&mut self, images: &[&[u8]]) -> Result<Vec<Inference>> {
        let size = self.config.size;
        assert!(images.len() <= self.batch, "too many images");
        // Of each image what each network said of it and of its mirror image.
        let mut said = vec![vec![Vec::new(); self.members.len()]; images.len()];
        let sides: &[bool] = match self.config.test_flip {
            false => &[false],
            true => &[false, true],
        };
        for &mirrored in sides {
            for (square, image) in self.shown.chunks_exact_mut(size * size).zip(images) {
                crate::data::augment::unit(image, square);
                if mirrored {
                    mirror(square, size);
                }
            }
            for (k, member) in self.members.iter_mut().enumerate() {
                let session = &mut *member.session;
                session.write(self.evaluation.images, &self.shown)?;
                session.replay()?;
                let inferences = read(&self.evaluation, session, images.len(), size)?;
                for (mut inference, said) in inferences.into_iter().zip(&mut said) {
                    if let Some(logits) = inference.logits.as_mut().filter(|_| mirrored) {
                        mirror(logits, size);
                    }
                    said[k].push(inference);
                }
            }
        }
        let together = |networks: Vec<Vec<Inference>>| {
            let all: Vec<Inference> = networks.into_iter().map(Inference::mean).collect();
            Inference {
                disagreement: disagreement(&all),
                ..Inference::mean(all)
            }
        };
        Ok(said.into_par_iter().map(together).collect())
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
            disagreement: inference.disagreement,
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
        finding.phi = finding.features.as_ref().and_then(|features| {
            let phi = |member: &Member| Some(member.prior.as_ref()?.phi(features));
            mean(&self.members.iter().filter_map(phi).collect::<Vec<_>>())
        });
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

/// Refuses folders of which two are the same, by whatever names.
///
/// # Errors
/// [`Error::Argument`] naming the second; [`Error::File`] for one that is not there.
pub(crate) fn distinct(runs: &[impl AsRef<Path>]) -> Result<()> {
    let mut places = HashSet::new();
    for run in runs.iter().map(AsRef::as_ref) {
        let place = run.canonicalize();
        if !places.insert(place.map_err(|e| Error::caused(run, "cannot be read", e))?) {
            let problem = "expected runs that differ, found this one twice";
            return Err(Error::argument(run.display().to_string(), problem));
        }
    }
    Ok(())
}

/// What a network that has run says of its first `images` images.
fn read(
    evaluation: &Evaluation,
    session: &dyn Session<f32>,
    images: usize,
    size: usize,
) -> Result<Vec<Inference>> {
    let values = |v: Option<Var>| v.map(|v| session.read(v)).transpose();
    let logits = evaluation.logits;
    let (masks, malignancies) = (values(logits.mask)?, values(logits.malignancy)?);
    let pixels = size * size;
    let one = |i: usize| Inference {
        logits: masks
            .as_ref()
            .map(|masks| masks[i * pixels..][..pixels].to_vec()),
        p: malignancies.as_ref().map(|l| sigmoid(f64::from(l[i]))),
        disagreement: Disagreement::default(),
    };
    Ok((0..images).map(one).collect())
}

/// Left and right of an S×S map change places.
fn mirror(map: &mut [f32], size: usize) {
    map.chunks_exact_mut(size).for_each(<[f32]>::reverse);
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

pub(super) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}
