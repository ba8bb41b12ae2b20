//! Everything that determines a run, as it stands in `config.toml`.
//!
//! A configuration is a preset, overlaid by a file, overlaid by `key=value` settings; the result is
//! written into the run's folder in full, so that a run can be read and repeated without knowing
//! the defaults of the day.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::data::augment::AugmentConfig;
use crate::device::Backend;
use crate::device::gpu::Gpu;
use crate::error::{Error, Result};

/// Which heads are trained, and whether the consistency term ties them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Arm {
    /// The mask alone.
    Segmentation,
    /// The malignancy alone.
    Classification,
    /// Both, on a shared encoder.
    Multitask,
    /// Both, tied by `(p̂ − φ)²`.
    Consistency,
}

impl Arm {
    /// Whether a mask is predicted.
    pub fn segments(self) -> bool {
        self != Arm::Classification
    }

    /// Whether malignancy is predicted.
    pub fn classifies(self) -> bool {
        self != Arm::Segmentation
    }
}

/// A named set of defaults.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// A small U-Net on 64×64 images: seconds a run.
    Tiny,
    /// A U-Net of 16 to 256 channels on 128×128 images: minutes a run on two cores.
    Unet,
    /// EfficientNet-B1 encoder with an attention U-Net decoder on 256×256 images.
    EfficientnetB1,
}

/// An architecture.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ModelKind {
    /// [`crate::nn::UNet`].
    #[default]
    Unet,
    /// [`crate::nn::AttentionUNet`] on [`crate::nn::EfficientNet::b1`].
    EfficientnetB1,
}

/// Where training computes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// This machine's processor.
    Cpu,
    /// An NVIDIA GPU: the first, or the one whose number is in `ECHOGRAD_GPU`.
    Cuda,
    /// The GPU's kernels, run by an emulator on the processor, for tests: in builds with the feature
    /// `emulator`.
    Emulator,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Emulator => "emulator",
        })
    }
}

impl Device {
    /// The GPU or emulator that is meant; none for the processor.
    ///
    /// # Errors
    /// [`Error::Device`] if it is not there.
    pub fn open(self) -> Result<Option<Gpu>> {
        match self {
            Self::Cpu => Ok(None),
            Self::Cuda => Gpu::cuda().map(Some),
            Self::Emulator => Gpu::emulator().map(Some),
        }
    }
}

/// How activations are stored on GPUs. Parameters, their moments and averages, statistics and sums are f32 always,
/// and so is everything on the processor.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// As bf16, where the GPU has it: from compute capability 8.0 on.
    #[default]
    Bf16,
    /// As f32.
    F32,
}

/// How the learning rate changes over the steps.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Linear warm-up, then half a cosine down to the final rate.
    Cosine,
    /// Linear warm-up, then the same rate to the end.
    Constant,
}

/// Where the gradient of the consistency term is stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stop {
    /// Nowhere.
    None,
    /// At the classifier: only the mask and the prior follow it.
    Classifier,
    /// At the mask: only the classifier and the prior follow it.
    Mask,
}

/// A shape feature, [`crate::features`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Feature {
    /// How far from a disc.
    Irregularity,
    /// Taller than wide.
    Orientation,
    /// How far the outline exceeds the ellipse's.
    Margin,
    /// Oval to round.
    Roundness,
}

impl Feature {
    /// In the order of [`crate::features::ShapeFeatures::NAMES`].
    pub const ALL: [Self; 4] = [
        Self::Irregularity,
        Self::Orientation,
        Self::Margin,
        Self::Roundness,
    ];

    fn all() -> Vec<Self> {
        Self::ALL.to_vec()
    }
}

/// Where the prior's weights start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PriorStart {
    /// From a logistic fit to the training masks.
    Fitted,
    /// From a fit in which the four features share one weight.
    Equal,
}

/// A run's configuration.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Training data, `NAME:PATH`.
    pub data: String,
    /// Leave out all but one of identical images.
    pub drop_duplicates: bool,
    /// What is trained.
    pub arm: Arm,
    /// Where the defaults came from.
    pub preset: Preset,
    /// Where to compute.
    pub device: Device,
    /// How activations are stored on GPUs; the default where a file of an earlier version says nothing.
    #[serde(default)]
    pub precision: Precision,
    /// Seed of the weights, the order, the augmentation and dropout.
    pub seed: u64,
    /// Seed of the folds: apart from `seed`, so that runs of several seeds share their folds.
    pub fold_seed: u64,
    /// Number of folds.
    pub folds: usize,
    /// The fold held out for validation, from 0.
    pub fold: usize,
    /// Side of the letterboxed images, pixels.
    pub size: usize,
    /// Times each training image is seen.
    pub epochs: u64,
    /// Images per step.
    pub batch: usize,
    /// Threads that prepare batches.
    pub workers: usize,
    /// Average what the trained network says of an image and of its mirror image: left and right change places, never
    /// above and below, since depth has a meaning. For tests and predictions; epochs are chosen without it, so that
    /// runs which differ in nothing else have the same weights.
    #[serde(default)]
    pub test_flip: bool,
    /// Checkpoint whose weights the run starts from, or an encoder's weights ([`super::pretrained`]); empty for
    /// random weights.
    pub init: String,
    /// The network.
    pub model: ModelConfig,
    /// The loss.
    pub loss: LossConfig,
    /// The prior φ.
    pub prior: PriorConfig,
    /// The optimizer.
    pub optimizer: OptimizerConfig,
    /// Early stopping.
    pub early_stopping: EarlyStopping,
    /// Changes to training images.
    pub augment: AugmentConfig,
}

/// The network.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// The architecture; a U-Net where a file of an earlier version says nothing.
    #[serde(default)]
    pub kind: ModelKind,
    /// Channels of the U-Net's levels from full resolution to the bottleneck; of `efficientnet-b1`, those of the
    /// decoder's five levels, from full resolution to a sixteenth.
    pub widths: Vec<usize>,
    /// Share of the class head's inputs that are dropped in training.
    pub dropout: f64,
}

/// The loss `L_seg + classification·BCE + consistency·ramp·Σ cᵢ(p̂ᵢ − φᵢ)²/n`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossConfig {
    /// Weight of the classification loss.
    pub classification: f64,
    /// Weight of the consistency term after its ramp.
    pub consistency: f64,
    /// Epochs before the consistency term starts: early masks mean nothing.
    pub ramp_start: f64,
    /// Epochs over which the consistency term then rises from 0 to its full weight.
    pub ramp_epochs: f64,
    /// Sharpening κ of the mask whose features are taken, `σ(κz)`.
    pub kappa: f64,
    /// Weight benign and malignant images inversely to their number in the classification loss.
    pub class_weights: bool,
    /// Weight lesions in the consistency term by how decided their mask is.
    #[serde(default = "yes")]
    pub confidence: bool,
    /// Where the consistency term's gradient stops.
    pub stop_gradient: Stop,
}

/// What a file of an earlier version, which could not choose, did.
fn yes() -> bool {
    true
}

/// The prior φ.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PriorConfig {
    /// The features that count: the others have weight 0 and pass no gradient.
    #[serde(default = "Feature::all")]
    pub features: Vec<Feature>,
    /// Where the weights start.
    pub start: PriorStart,
    /// Let weights be negative.
    pub free_sign: bool,
    /// Keep weights and bias as they start.
    pub frozen: bool,
}

/// AdamW and its schedule.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerConfig {
    /// Largest learning rate.
    pub learning_rate: f64,
    /// How it changes.
    pub schedule: Schedule,
    /// Share of all steps over which it rises.
    pub warmup: f64,
    /// Final rate as a share of the largest (`cosine`).
    pub final_rate: f64,
    /// Decoupled decay of weights (not of biases, norms and the prior).
    pub weight_decay: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Largest norm of the gradient over all parameters; 0 for none.
    pub clip: f64,
    /// Decay of the moving average of weights that is evaluated; 0 evaluates the weights themselves.
    pub ema: f64,
}

/// When to stop before the last epoch.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EarlyStopping {
    /// Epochs without a better validation score after which training stops; 0 for never.
    pub patience: u64,
}

impl Config {
    /// The defaults of a preset.
    pub fn preset(preset: Preset) -> Self {
        let tiny = preset == Preset::Tiny;
        let efficientnet = preset == Preset::EfficientnetB1;
        Self {
            data: String::new(),
            drop_duplicates: false,
            arm: Arm::Consistency,
            preset,
            device: Device::Cpu,
            precision: Precision::default(),
            seed: 0,
            fold_seed: 0,
            folds: 5,
            fold: 0,
            size: match preset {
                Preset::Tiny => 64,
                Preset::Unet => 128,
                Preset::EfficientnetB1 => 256,
            },
            epochs: if tiny { 20 } else { 50 },
            batch: 16,
            workers: 1,
            test_flip: false,
            init: String::new(),
            model: ModelConfig {
                kind: if efficientnet {
                    ModelKind::EfficientnetB1
                } else {
                    ModelKind::Unet
                },
                widths: if tiny {
                    vec![8, 16, 32, 64]
                } else {
                    vec![16, 32, 64, 128, 256]
                },
                dropout: 0.2,
            },
            loss: LossConfig {
                classification: 0.2,
                consistency: 1.0,
                ramp_start: if tiny { 2.0 } else { 5.0 },
                ramp_epochs: if tiny { 4.0 } else { 10.0 },
                kappa: 3.0,
                class_weights: true,
                confidence: true,
                stop_gradient: Stop::None,
            },
            prior: PriorConfig {
                features: Feature::all(),
                start: PriorStart::Fitted,
                free_sign: false,
                frozen: false,
            },
            optimizer: OptimizerConfig {
                learning_rate: if efficientnet { 1e-3 } else { 2e-3 },
                schedule: Schedule::Cosine,
                warmup: 0.1,
                final_rate: 0.01,
                weight_decay: 0.01,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                clip: 1.0,
                ema: 0.98,
            },
            early_stopping: EarlyStopping { patience: 20 },
            augment: AugmentConfig::default(),
        }
    }

    /// That of the run in folder `run`.
    ///
    /// # Errors
    /// [`Error::File`] if there is none; else as [`Config::load`].
    pub fn of_run(run: &Path) -> Result<Self> {
        let path = run.join(super::model::CONFIG);
        if !path.is_file() {
            let problem = "expected the folder of a run, found no config.toml in it";
            return Err(Error::file(run, problem));
        }
        Self::load(Some(&path), &[])
    }

    /// A preset (`preset` in the settings or the file; `unet` otherwise), overlaid by `file`, overlaid
    /// by `settings`: pairs of a dotted key and a TOML value, where strings need no quotes.
    ///
    /// # Errors
    /// [`Error::File`] if the file cannot be read or is no TOML; [`Error::Argument`] naming the key if
    /// it is unknown (the nearest is suggested), or its value of the wrong kind or out of range.
    pub fn load(file: Option<&Path>, settings: &[(String, String)]) -> Result<Self> {
        let mut overlay = Vec::new();
        if let Some(path) = file {
            let text = std::fs::read_to_string(path)
                .map_err(|e| Error::caused(path, "cannot be read", e))?;
            let table: Table = text
                .parse()
                .map_err(|e: toml::de::Error| Error::caused(path, "expected TOML", e))?;
            flatten("", table, &mut overlay);
        }
        let text = |(key, text): &(String, String)| (key.clone(), Setting::Text(text.clone()));
        overlay.extend(settings.iter().map(text));
        let preset = overlay.iter().rfind(|(key, _)| key == "preset");
        let config = match preset {
            Some((_, Setting::Text(name)) | (_, Setting::Value(Value::String(name)))) => {
                let preset = Value::String(name.clone()).try_into();
                Self::preset(preset.map_err(|e| argument("preset", &e))?)
            }
            _ => Self::preset(Preset::Unet),
        };
        config.overlay(overlay)
    }

    /// This configuration with some settings changed.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn with(self, settings: &[(String, String)]) -> Result<Self> {
        let text = |(key, text): &(String, String)| (key.clone(), Setting::Text(text.clone()));
        self.overlay(settings.iter().map(text).collect())
    }

    fn overlay(self, overlay: Vec<(String, Setting)>) -> Result<Self> {
        let mut config = self;
        let mut table = config.table();
        for (key, setting) in overlay {
            let Some(place) = find(&mut table, &key) else {
                let nearest = nearest(&config.table(), &key);
                let problem = format!("unknown key, did you mean {nearest}?");
                return Err(Error::argument(key, problem));
            };
            *place = setting.resolve(place);
            // One key at a time, so that a value of the wrong kind is blamed on its key.
            config = table
                .clone()
                .try_into()
                .map_err(|e: toml::de::Error| argument(&key, &e))?;
        }
        config.validate()?;
        Ok(config)
    }

    pub(crate) fn table(&self) -> Table {
        Table::try_from(self).expect("a configuration is a TOML table")
    }

    /// Opens `device`, with activations stored as this configuration has them, or as f32 where the GPU has no bf16.
    ///
    /// # Errors
    /// [`Error::Device`] if it is not there, or its kernels cannot be had.
    pub fn backend(&self, device: Device) -> Result<Backend> {
        let Some(gpu) = device.open()? else {
            return Ok(Backend::Cpu);
        };
        gpu.ready()?;
        let narrow = self.precision == Precision::Bf16 && gpu.has_bf16();
        Ok(Backend::Gpu { gpu, narrow })
    }

    /// Every key and value, as [`Config::load`] takes them.
    pub fn settings(&self) -> Vec<(String, String)> {
        settings(self.table())
    }

    /// The text of `config.toml`.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a configuration is a TOML table")
    }

    /// The first key in which `self` and `other` differ, with both values; `workers` aside, which changes no
    /// result, `device`, on which a run may go on elsewhere, and `data`, which may have moved: what they hold is for
    /// manifests to say.
    pub fn difference(&self, other: &Self) -> Option<(String, String, String)> {
        self.first_difference(other, |key| !["workers", "device", "data"].contains(&key))
    }

    /// As [`Config::difference`], with what changes only tests aside: `None` if both train the same network.
    pub fn trains_otherwise(&self, other: &Self) -> Option<(String, String, String)> {
        self.first_difference(other, |key| {
            !["workers", "device", "data", "test_flip"].contains(&key)
        })
    }

    /// As [`Config::difference`], of the keys that decide what trained networks say of the same images: `None` if it
    /// can be averaged.
    pub fn says_otherwise(&self, other: &Self) -> Option<(String, String, String)> {
        let keys = [
            "arm",
            "size",
            "test_flip",
            "model.kind",
            "model.widths",
            "loss.kappa",
        ];
        self.first_difference(other, |key| keys.contains(&key))
    }

    fn first_difference(
        &self,
        other: &Self,
        counts: impl Fn(&str) -> bool,
    ) -> Option<(String, String, String)> {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        flatten("", self.table(), &mut ours);
        flatten("", other.table(), &mut theirs);
        ours.into_iter()
            .zip(theirs)
            .find_map(|((key, a), (_, b))| match (a, b) {
                (Setting::Value(a), Setting::Value(b)) if a != b && counts(&key) => {
                    Some((key, a.to_string(), b.to_string()))
                }
                _ => None,
            })
    }

    /// Checks every value against its range.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the key, its range and the value.
    pub fn validate(&self) -> Result<()> {
        let fail = |key: &str, expected: String, found: String| {
            let problem = format!("expected {expected}, found {found}");
            Err(Error::argument(key, problem))
        };
        let depth = self.model.widths.len();
        let (depths, stride) = match self.model.kind {
            ModelKind::Unet => (2..=7, 1 << depth.saturating_sub(1).min(10)),
            ModelKind::EfficientnetB1 => (5..=5, 32),
        };
        if !depths.contains(&depth) {
            let expected = match self.model.kind {
                ModelKind::Unet => "2 to 7 widths",
                ModelKind::EfficientnetB1 => "5 widths (for efficientnet-b1)",
            };
            return fail("model.widths", expected.into(), format!("{depth}"));
        }
        if let Some(width) = self.model.widths.iter().find(|w| !(1..=2048).contains(*w)) {
            return fail(
                "model.widths",
                "widths from 1 to 2048".into(),
                width.to_string(),
            );
        }
        // A bottleneck of one pixel would leave nothing to normalise over.
        let smallest = 16.max(2 * stride);
        if !(smallest..=1024).contains(&self.size) || !self.size.is_multiple_of(stride) {
            let levels = match self.model.kind {
                ModelKind::Unet => format!("{depth} levels"),
                ModelKind::EfficientnetB1 => "efficientnet-b1".into(),
            };
            let expected = format!("a multiple of {stride} (for {levels}) from {smallest} to 1024");
            return fail("size", expected, self.size.to_string());
        }
        for (key, value, low, high) in [
            ("epochs", self.epochs, 1, 100_000),
            ("batch", self.batch as u64, 1, 1024),
            ("workers", self.workers as u64, 1, 256),
            ("folds", self.folds as u64, 2, 1000),
            ("fold", self.fold as u64, 0, self.folds as u64 - 1),
            (
                "early_stopping.patience",
                self.early_stopping.patience,
                0,
                100_000,
            ),
        ] {
            if !(low..=high).contains(&value) {
                return fail(key, format!("{low} to {high}"), value.to_string());
            }
        }
        let features = &self.prior.features;
        let twice = |i: usize| features[..i].contains(&features[i]);
        if features.is_empty() || (0..features.len()).any(twice) {
            let expected = "at least one feature, none twice".into();
            return fail("prior.features", expected, format!("{features:?}"));
        }
        let (loss, optimizer) = (&self.loss, &self.optimizer);
        // Upper ends marked `below` are excluded.
        let below = |x: f64| x.next_down();
        for (key, value, low, high) in [
            ("model.dropout", self.model.dropout, 0.0, 0.95),
            ("loss.classification", loss.classification, 0.0, 100.0),
            ("loss.consistency", loss.consistency, 0.0, 100.0),
            ("loss.ramp_start", loss.ramp_start, 0.0, 1e5),
            ("loss.ramp_epochs", loss.ramp_epochs, 0.0, 1e5),
            ("loss.kappa", loss.kappa, 0.1, 100.0),
            ("optimizer.learning_rate", optimizer.learning_rate, 0.0, 1.0),
            ("optimizer.warmup", optimizer.warmup, 0.0, 1.0),
            ("optimizer.final_rate", optimizer.final_rate, 0.0, 1.0),
            ("optimizer.weight_decay", optimizer.weight_decay, 0.0, 1.0),
            ("optimizer.beta1", optimizer.beta1, 0.0, below(1.0)),
            ("optimizer.beta2", optimizer.beta2, 0.0, below(1.0)),
            ("optimizer.eps", optimizer.eps, 1e-16, 1.0),
            ("optimizer.clip", optimizer.clip, 0.0, 1e6),
            ("optimizer.ema", optimizer.ema, 0.0, below(1.0)),
        ] {
            if !(low..=high).contains(&value) {
                let expected = if high == below(1.0) {
                    format!("{low} to below 1")
                } else {
                    format!("{low} to {high}")
                };
                return fail(key, expected, value.to_string());
            }
        }
        self.augment.validate()
    }
}

/// A value for a key: from a file, with its type, or from the command line, as text.
enum Setting {
    Value(Value),
    Text(String),
}

impl Setting {
    /// The value to put in `place`, of the type of what is there wherever that loses nothing.
    fn resolve(self, place: &Value) -> Value {
        let value = match self {
            Setting::Value(value) => value,
            Setting::Text(text) if place.is_str() => Value::String(text),
            Setting::Text(text) => text.parse().unwrap_or(Value::String(text)),
        };
        match (value, place) {
            (Value::Integer(i), Value::Float(_)) => Value::Float(i as f64),
            (value, _) => value,
        }
    }
}

/// Dotted keys and values of a table, as [`Config::load`] takes them.
pub(crate) fn settings(table: Table) -> Vec<(String, String)> {
    let mut values = Vec::new();
    flatten("", table, &mut values);
    let text = |(key, setting)| match setting {
        Setting::Text(text) | Setting::Value(Value::String(text)) => (key, text),
        Setting::Value(value) => (key, value.to_string()),
    };
    values.into_iter().map(text).collect()
}

/// Dotted keys and values of a table, in its order.
fn flatten(prefix: &str, table: Table, out: &mut Vec<(String, Setting)>) {
    for (key, value) in table {
        let key = if prefix.is_empty() {
            key
        } else {
            format!("{prefix}.{key}")
        };
        match value {
            Value::Table(table) => flatten(&key, table, out),
            value => out.push((key, Setting::Value(value))),
        }
    }
}

fn find<'a>(table: &'a mut Table, key: &str) -> Option<&'a mut Value> {
    match key.split_once('.') {
        Some((section, rest)) => find(table.get_mut(section)?.as_table_mut()?, rest),
        None => table.get_mut(key).filter(|value| !value.is_table()),
    }
}

/// The known key most like `key`; its last part counts too, for whoever forgot the section.
fn nearest(table: &Table, key: &str) -> String {
    let mut known = Vec::new();
    flatten("", table.clone(), &mut known);
    let distance = |candidate: &str| {
        let last = candidate.rsplit('.').next().unwrap_or(candidate);
        let whole = strsim::damerau_levenshtein(candidate, key);
        whole.min(strsim::damerau_levenshtein(last, key))
    };
    known
        .into_iter()
        .map(|(candidate, _)| candidate)
        .min_by_key(|candidate| distance(candidate))
        .unwrap_or_default()
}

fn argument(key: &str, error: &toml::de::Error) -> Error {
    let mut problem = error.message().trim().to_owned();
    if let Some(first) = problem.lines().next() {
        problem = first.to_owned();
    }
    Error::argument(key, problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(pairs: &[(&str, &str)]) -> Result<Config> {
        let pairs: Vec<_> = pairs
            .iter()
            .map(|(k, v)| (k.to_string(), v.to_string()))
            .collect();
        Config::load(None, &pairs)
    }

    fn message(pairs: &[(&str, &str)]) -> String {
        set(pairs).unwrap_err().to_string()
    }

    #[test]
    fn a_configuration_reads_back_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.toml");
        let config = set(&[
            ("preset", "tiny"),
            ("data", "busi:C:\\my data"),
            ("optimizer.clip", "2"),
            ("model.widths", "[4, 8]"),
            ("augment.p_flip", "0.25"),
        ])
        .unwrap();
        assert_eq!(config.optimizer.clip, 2.0);
        assert_eq!(config.model.widths, [4, 8]);
        std::fs::write(&path, config.to_toml()).unwrap();
        let again = Config::load(Some(&path), &[]).unwrap();
        assert_eq!(again, config);
        assert_eq!(Config::load(None, &config.settings()).unwrap(), config);
        assert!(again.difference(&config).is_none());
    }

    #[test]
    fn the_preset_lies_below_everything_wherever_it_is_named() {
        let config = set(&[("size", "32"), ("preset", "tiny")]).unwrap();
        assert_eq!((config.size, config.epochs), (32, 20));
    }

    #[test]
    fn an_unknown_key_names_its_nearest() {
        let text = message(&[("optimizer.learning_rat", "1")]);
        assert_eq!(
            text,
            "optimizer.learning_rat: unknown key, did you mean optimizer.learning_rate?"
        );
        assert!(message(&[("kapa", "1")]).ends_with("did you mean loss.kappa?"));
        assert!(message(&[("augment", "1")]).contains("unknown key"));
    }

    #[test]
    fn a_value_of_the_wrong_kind_or_out_of_range_names_its_key() {
        for (key, value, expected) in [
            ("epochs", "many", "epochs: invalid type"),
            ("epochs", "0", "epochs: expected 1 to 100000, found 0"),
            ("epochs", "-1", "epochs: invalid value"),
            (
                "arm",
                "both",
                "arm: unknown variant `both`, expected one of",
            ),
            ("preset", "resnet", "preset: unknown variant `resnet`"),
            (
                "model.kind",
                "efficientnet-b2",
                "model.kind: unknown variant `efficientnet-b2`",
            ),
            ("fold", "5", "fold: expected 0 to 4, found 5"),
            (
                "size",
                "100",
                "size: expected a multiple of 16 (for 5 levels)",
            ),
            (
                "optimizer.beta1",
                "1",
                "optimizer.beta1: expected 0 to below 1",
            ),
            ("optimizer.clip", "nan", "optimizer.clip: expected 0 to"),
            (
                "model.widths",
                "[1]",
                "model.widths: expected 2 to 7 widths",
            ),
            (
                "model.widths",
                "[0, 1]",
                "model.widths: expected widths from 1",
            ),
            ("augment.p_flip", "2", "augment.p_flip: expected 0 to 1"),
            (
                "prior.features",
                "[\"margin\", \"margin\"]",
                "prior.features: expected at least one feature, none twice",
            ),
            (
                "prior.features",
                "[\"size\"]",
                "prior.features: unknown variant `size`",
            ),
        ] {
            let text = message(&[(key, value)]);
            assert!(text.starts_with(expected), "{key}={value}: {text}");
        }
    }

    #[test]
    fn efficientnet_has_its_own_extents() {
        let preset = ("preset", "efficientnet-b1");
        let config = set(&[preset]).unwrap();
        assert_eq!(config.model.kind, ModelKind::EfficientnetB1);
        assert_eq!(config.size, 256);
        assert!(set(&[preset, ("size", "64")]).is_ok());
        for (key, value, expected) in [
            (
                "size",
                "48",
                "size: expected a multiple of 32 (for efficientnet-b1) from 64 to 1024, found 48",
            ),
            ("size", "32", "size: expected a multiple of 32"),
            (
                "model.widths",
                "[8, 16]",
                "model.widths: expected 5 widths (for efficientnet-b1), found 2",
            ),
        ] {
            let text = message(&[preset, (key, value)]);
            assert!(text.starts_with(expected), "{key}={value}: {text}");
        }
    }

    #[test]
    fn a_configuration_without_an_architecture_is_a_unet() {
        let mut table = set(&[]).unwrap().table();
        let model = table.get_mut("model").unwrap().as_table_mut().unwrap();
        assert!(model.remove("kind").is_some());
        let config: Config = table.try_into().unwrap();
        assert_eq!(config.model.kind, ModelKind::Unet);
    }

    #[test]
    fn a_file_that_is_no_toml_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bad.toml");
        std::fs::write(&path, "epochs = = 1").unwrap();
        let text = Config::load(Some(&path), &[]).unwrap_err().to_string();
        assert!(text.contains("bad.toml: expected TOML"), "{text}");
    }
}
