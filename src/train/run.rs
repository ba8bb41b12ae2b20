//! The training loop.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::checkpoint::{self, Checkpoint, Position};
use super::config::{Arm, Config, Feature, ModelKind, Precision, PriorStart};
use super::evaluate::{RESULTS, examine, make_folder, write};
use super::model::{CONFIG, LAST};
use super::saver::{self, Saver};
use super::step::TrainingStep;
use super::validation::Validation;
use super::{Model, Report, pretrained, schedule, select, stop};
use crate::data::device::Augmenter;
use crate::data::image::write_atomically;
use crate::data::loader::{self, Batch, Loader, LoaderConfig, Pool, Request, Target};
use crate::data::split::{self, Fold};
use crate::data::{self, Case, Example, Label, Source, hex};
use crate::device::simd::Level;
use crate::device::{Backend, Session};
use crate::error::{Error, Result};
use crate::features::{FitOptions, MaskSums, Prior, Start};
use crate::metrics::{DatasetMetrics, read_csv};
use crate::ops::control;

/// Name of the file that says what a run was made from.
pub const MANIFEST: &str = "manifest.json";
/// Name of the file with a row per epoch.
pub const METRICS: &str = "metrics.csv";
/// Name of the folder with the best network's metrics on the validation fold.
pub const VALIDATION: &str = "validation";

/// Batches prepared ahead of the step.
const AHEAD: usize = 3;

/// What to train.
#[derive(Clone, Copy, Debug)]
pub struct TrainArgs<'a> {
    /// The run's folder: new, empty, or with `resume` that of an earlier call.
    pub out: &'a Path,
    /// A configuration file.
    pub config: Option<&'a Path>,
    /// Keys and values that overlay it.
    pub settings: &'a [(String, String)],
    /// Go on where the run in `out` stopped.
    pub resume: bool,
}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Trained {
    /// Epochs done.
    pub epochs: u64,
    /// The epoch whose weights are kept as the best, counted from 1.
    pub best_epoch: u64,
    /// Its validation score at the network's resolution: Dice, in the classification arm AUC.
    pub best: f64,
    /// Metrics of the best weights on the validation fold, at original resolution.
    pub validation: DatasetMetrics,
}

/// `manifest.json`: what the run was made from.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// Program and version.
    pub program: String,
    /// Where it computes: `cpu`, or the GPU's name.
    pub device: String,
    /// Instruction set of the kernels: results have the same bits where this is equal.
    pub instruction_set: String,
    /// Seed of everything random.
    pub seed: u64,
    /// Name of the data set.
    pub dataset: String,
    /// SHA-256 over the hashes of all its images, in order.
    pub dataset_sha256: String,
    /// Cases by label: benign, malignant, normal.
    pub cases: [usize; 3],
    /// Images left out, and why.
    pub drops: Vec<data::Drop>,
    /// Images trained on.
    pub train: Vec<Sample>,
    /// Images that chose the model.
    pub validation: Vec<Sample>,
    /// The configuration.
    pub config: Config,
}

/// What a run learned from, or was judged by: an entry of a [`Manifest`].
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Sample {
    /// The image.
    #[serde(flatten)]
    pub image: Image,
    /// The diagnosis; this and the next absent in files of earlier versions.
    #[serde(default)]
    pub label: Option<Label>,
    /// SHA-256 of the mask's pixels at the image's size, a byte each, 0 or 255.
    #[serde(default)]
    pub mask_sha256: Option<String>,
}

/// An image by its name and its bytes.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Image {
    /// File name.
    pub image: String,
    /// SHA-256 of the file.
    pub sha256: String,
}

impl Manifest {
    /// Reads `manifest.json`.
    ///
    /// # Errors
    /// [`Error::File`] if it is missing or of another form.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::caused(path, "cannot be read", e))?;
        serde_json::from_slice(&bytes)
            .map_err(|e| Error::caused(path, "expected a run's manifest", e))
    }

    /// All that the run has seen, trained on first.
    pub fn samples(&self) -> impl Iterator<Item = &Sample> {
        self.train.iter().chain(&self.validation)
    }

    /// What the samples of `now` are otherwise, in words; `None` if nothing is.
    fn change(&self, now: &Self) -> Option<String> {
        let before: HashMap<&str, &Sample> = self
            .samples()
            .map(|sample| (sample.image.image.as_str(), sample))
            .collect();
        // What is not known cannot have changed.
        fn other<T: PartialEq>(before: &Option<T>, now: &Option<T>) -> bool {
            before.is_some() && before != now
        }
        let changed = now.samples().find_map(|now| {
            let before = before.get(now.image.image.as_str())?;
            let what = match () {
                () if before.image.sha256 != now.image.sha256 => "other bytes",
                () if other(&before.label, &now.label) => "another label",
                () if other(&before.mask_sha256, &now.mask_sha256) => "another mask",
                () => return None,
            };
            Some(format!("{} with {what}", now.image.image))
        });
        let names = |part: &[Sample]| -> Vec<String> {
            part.iter()
                .map(|sample| sample.image.image.clone())
                .collect()
        };
        let split = |of: &Self| (names(&of.train), names(&of.validation));
        changed.or_else(|| (split(self) != split(now)).then(|| "others".to_owned()))
    }
}

/// A row of `metrics.csv`. Losses are means over the epoch's images; what the arm lacks is empty.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Epoch {
    /// Its number, from 1.
    pub epoch: u64,
    /// Training steps done at its end.
    pub step: u64,
    /// The last step's learning rate.
    pub learning_rate: f64,
    /// The last step's ramp of the consistency term.
    pub ramp: f64,
    /// The loss.
    pub loss: f64,
    /// Cross-entropy of the mask.
    pub cross_entropy: Option<f64>,
    /// Soft Dice loss of the mask.
    pub dice_loss: Option<f64>,
    /// Cross-entropy of the malignancy, before its weight.
    pub classification: Option<f64>,
    /// Consistency with its ramp, before its weight.
    pub consistency: Option<f64>,
    /// Norm of the gradient before clipping.
    pub gradient_norm: f64,
    /// Mean Dice on the validation fold, at the network's resolution.
    pub val_dice: Option<f64>,
    /// AUC of the malignancy on the validation fold.
    pub val_auc: Option<f64>,
    /// The prior's weight of irregularity at the epoch's end; this and the next four absent where there is no
    /// prior, or in files of earlier versions.
    #[serde(default)]
    pub prior_irregularity: Option<f64>,
    /// The prior's weight of orientation.
    #[serde(default)]
    pub prior_orientation: Option<f64>,
    /// The prior's weight of margin.
    #[serde(default)]
    pub prior_margin: Option<f64>,
    /// The prior's weight of roundness.
    #[serde(default)]
    pub prior_roundness: Option<f64>,
    /// The prior's bias.
    #[serde(default)]
    pub prior_bias: Option<f64>,
    /// Time that validation took, part of the next; absent in files of earlier versions.
    #[serde(default)]
    pub validation_seconds: Option<f64>,
    /// Time since the epoch before was over, or the first began.
    pub seconds: f64,
}

/// Trains, and writes the run's folder.
///
/// # Errors
/// [`Error::Argument`] for a configuration or data that cannot be trained on, or an `out` that already
/// holds something; [`Error::Device`] for a device that is not there, too small, or fails; [`Error::File`] for
/// files that cannot be read or written; [`Error::NonFinite`] if the loss or the gradient stops being finite, the
/// last good checkpoint staying; and [`Error::Interrupted`], after saving the state in the middle of the epoch.
pub fn train(args: &TrainArgs<'_>, report: &dyn Report, interrupt: &AtomicBool) -> Result<Trained> {
    let config = configuration(args)?;
    let backend = config.backend(config.device)?;
    // What the device lacks should show before anything is read.
    let step = Step::new(&config, config.arm.segments(), &backend)?;
    if let Some(problem) = schedule::cut_short(&config) {
        report.line(&problem);
    }
    let data = Data::open(&config, report, interrupt)?;
    let mut run = Run::new(args.out, config, data, step, &backend, report)?;
    if args.resume {
        run.resume()?;
    } else {
        run.begin()?;
    }
    run.epochs(interrupt)?;
    run.finish(interrupt)
}

fn configuration(args: &TrainArgs<'_>) -> Result<Config> {
    let path = args.out.join(CONFIG);
    if args.resume {
        if !path.is_file() {
            let problem = "expected the folder of a run to resume, found no config.toml in it";
            return Err(Error::file(args.out, problem));
        }
        let own = Config::load(Some(&path), &[])?;
        let asked = match args.config {
            Some(file) => Config::load(Some(file), args.settings)?,
            None => own.clone().with(args.settings)?,
        };
        return match own.difference(&asked) {
            // Who prepares the batches does not show in them; another device is told of, and data that moved are held
            // against the manifest.
            None => Ok(Config {
                workers: asked.workers,
                device: asked.device,
                data: asked.data,
                ..own
            }),
            Some((key, ours, theirs)) => {
                let problem =
                    format!("expected {ours}, as the run to resume has it, found {theirs}");
                Err(Error::argument(key, problem))
            }
        };
    }
    let config = Config::load(args.config, args.settings)?;
    if path.exists() {
        let problem = "already holds a run: go on with it (--resume) or choose another folder";
        return Err(Error::file(args.out, problem));
    }
    new_or_empty(args.out)?;
    Ok(config)
}

/// Refuses a folder with files in it. Hidden ones may be what a killed run left of a file that it was writing.
pub(crate) fn new_or_empty(out: &Path) -> Result<()> {
    let hidden = |name: std::ffi::OsString| name.to_string_lossy().starts_with('.');
    let used = match std::fs::read_dir(out) {
        Ok(mut entries) => entries.any(|entry| entry.is_ok_and(|e| !hidden(e.file_name()))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => false,
        Err(e) => return Err(Error::caused(out, "cannot be read", e)),
    };
    if used {
        let problem = "expected a new or empty folder, found files in it";
        return Err(Error::file(out, problem));
    }
    Ok(())
}

/// The data of a run.
struct Data {
    source: Box<dyn Source>,
    drops: Vec<data::Drop>,
    fold: Fold,
    /// All cases, letterboxed, until the pools have those that are shown.
    examples: Vec<Example>,
    /// Weight of benign and of malignant images in the classification loss.
    class_weights: [f32; 2],
    /// Fitted to the training masks.
    prior: Option<Prior>,
}

impl Data {
    fn open(config: &Config, report: &dyn Report, interrupt: &AtomicBool) -> Result<Self> {
        let source = data::open(&config.data)?;
        let cases = source.cases();
        let (mut subset, drops) = select(&*source, config.drop_duplicates, report);
        subset.retain(|&i| cases[i].label.is_lesion());
        let (folds, fold) = (config.folds, config.fold);
        let fold = split::fold(cases, &subset, folds, fold, config.fold_seed)?;
        if fold.train.is_empty() || fold.validation.is_empty() {
            let problem = format!(
                "expected lesions to train and to validate on, found {} and {}",
                fold.train.len(),
                fold.validation.len()
            );
            return Err(Error::argument(&config.data, problem));
        }
        let malignant = |&&i: &&usize| cases[i].label == Label::Malignant;
        for part in [&fold.train, &fold.validation] {
            let count = part.iter().filter(malignant).count();
            if config.arm.classifies() && (count == 0 || count == part.len()) {
                let problem = format!(
                    "expected benign and malignant images to classify, found {count} malignant of {}",
                    part.len()
                );
                return Err(Error::argument(&config.data, problem));
            }
        }
        let total = cases.len() as u64;
        let read = std::sync::atomic::AtomicU64::new(0);
        let examples = data::load(&*source, config.size, &|| {
            let done = 1 + read.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            report.progress("reading images", done, total, "");
            stop(interrupt)
        })?;
        let prior = if config.arm.segments() {
            match fit(cases, &examples, &fold, config) {
                Ok(prior) => Some(prior),
                Err(error) if config.arm == Arm::Consistency => return Err(error),
                Err(error) => {
                    report.line(&format!("no prior: {error}"));
                    None
                }
            }
        } else {
            None
        };
        let class_weights = if config.loss.class_weights && config.arm.classifies() {
            let n = fold.train.len() as f32;
            let malignant = fold.train.iter().filter(malignant).count() as f32;
            [n / (2.0 * (n - malignant)), n / (2.0 * malignant)]
        } else {
            [1.0; 2]
        };
        Ok(Self {
            drops,
            fold,
            examples,
            class_weights,
            prior,
            source,
        })
    }

    /// # Errors
    /// [`Error::File`] for a mask that cannot be read.
    fn manifest(&self, config: &Config, device: &str) -> Result<Manifest> {
        let cases = self.source.cases();
        let mut hash = Sha256::new();
        cases.iter().for_each(|case| hash.update(&case.sha256));
        let sample = |&i: &usize| -> Result<Sample> {
            Ok(Sample {
                image: Image {
                    image: cases[i].image.clone(),
                    sha256: cases[i].sha256.clone(),
                },
                label: Some(cases[i].label),
                mask_sha256: Some(hex(&Sha256::digest(self.source.mask(i)?.pixels))),
            })
        };
        let samples = |part: &[usize]| -> Result<Vec<Sample>> {
            let samples: Vec<_> = part.par_iter().map(sample).collect();
            samples.into_iter().collect()
        };
        Ok(Manifest {
            program: format!("echograd {}", env!("CARGO_PKG_VERSION")),
            device: device.to_owned(),
            instruction_set: Level::current().name().into(),
            seed: config.seed,
            dataset: self.source.name().to_owned(),
            dataset_sha256: hex(&hash.finalize()),
            cases: Label::ALL.map(|l| cases.iter().filter(|case| case.label == l).count()),
            drops: self.drops.clone(),
            train: samples(&self.fold.train)?,
            validation: samples(&self.fold.validation)?,
            config: config.clone(),
        })
    }

    /// A part of the images, as the loader wants them.
    fn pool(&self, part: &[usize], size: usize) -> Result<Pool> {
        let mut pool = Pool::new(size);
        for &i in part {
            let malignant = self.source.cases()[i].label == Label::Malignant;
            let target = Target {
                label: f32::from(u8::from(malignant)),
                weight: 1.0,
            };
            pool.push(&self.examples[i].image, &self.examples[i].mask, target)?;
        }
        Ok(pool)
    }
}

/// The prior, fitted to the fold's training masks.
fn fit(cases: &[Case], examples: &[Example], fold: &Fold, config: &Config) -> Result<Prior> {
    let (mut rows, mut malignant) = (Vec::new(), Vec::new());
    for &i in &fold.train {
        let mut mask = vec![0.0f32; config.size * config.size];
        data::augment::unit(&examples[i].mask, &mut mask);
        if let Some(features) = MaskSums::of(&mask, config.size).features() {
            rows.push(features);
            malignant.push(cases[i].label == Label::Malignant);
        }
    }
    let options = FitOptions {
        start: match config.prior.start {
            PriorStart::Fitted => Start::Fitted,
            PriorStart::Equal => Start::Equal,
        },
        free_sign: config.prior.free_sign,
        left_out: Feature::ALL.map(|feature| !config.prior.features.contains(&feature)),
    };
    Prior::fit(&rows, &malignant, options)
}

/// The requests of one epoch. The last batch is filled up with the epoch's first images, whose weight
/// will be 0: batch statistics are then taken over as many images as ever, all of them real.
fn requests(seed: u64, epoch: u64, images: usize, batch: usize) -> Vec<Request> {
    let mut requests: Vec<_> = loader::epoch(seed, epoch, (0..images).collect(), batch).collect();
    let order: Vec<usize> = requests.iter().flat_map(|r| r.indices.clone()).collect();
    if let Some(last) = requests.last_mut() {
        let missing = batch - last.indices.len();
        last.indices.extend(order.iter().cycle().take(missing));
    }
    requests
}

/// A training step that was queued.
struct Queued {
    /// Counted from 1.
    number: u64,
    /// Images that count; the others fill the batch up.
    present: usize,
    /// Which images are shown.
    request: Request,
    /// They, if a loader made them; else a GPU makes them of the samples in its memory.
    batch: Option<Batch>,
}

/// Where the batches come from, in order.
enum Batches {
    Loader(Loader),
    Requests(Box<dyn Iterator<Item = Request>>),
}

impl Batches {
    fn next(&mut self) -> Result<(Request, Option<Batch>)> {
        const ENOUGH: &str = "as many batches as steps";
        Ok(match self {
            Self::Loader(loader) => {
                let batch = loader.next().expect(ENOUGH)?;
                let (epoch, indices) = (batch.epoch, batch.indices.clone());
                (Request { epoch, indices }, Some(batch))
            }
            Self::Requests(requests) => (requests.next().expect(ENOUGH), None),
        })
    }

    /// Takes back what is no longer needed.
    fn recycle(&mut self, batch: Option<Batch>) {
        if let (Self::Loader(loader), Some(batch)) = (self, batch) {
            loader.recycle(batch);
        }
    }
}

/// The training step and its memory.
struct Step {
    step: TrainingStep,
    session: Box<dyn Session<f32>>,
}

impl Step {
    fn new(config: &Config, prior: bool, backend: &Backend) -> Result<Self> {
        let step = TrainingStep::record(config, prior)?;
        let session = backend.session(&step.tape)?;
        Ok(Self { step, session })
    }
}

struct Run<'a> {
    out: &'a Path,
    report: &'a dyn Report,
    config: Config,
    data: Data,
    pool: Arc<Pool>,
    /// Makes the batches where a GPU trains; elsewhere a loader does.
    augmenter: Option<Augmenter>,
    device: String,
    step: TrainingStep,
    session: Box<dyn Session<f32>>,
    /// The latest step, whose results are not read yet.
    queued: Option<Queued>,
    validation: Validation,
    saver: Saver,
    position: Position,
    rows: Vec<Epoch>,
}

impl<'a> Run<'a> {
    fn new(
        out: &'a Path,
        config: Config,
        mut data: Data,
        step: Step,
        backend: &Backend,
        report: &'a dyn Report,
    ) -> Result<Self> {
        let fitted = data.prior.is_some();
        let Step { step, mut session } = match step.step.prior.is_some() == fitted {
            true => step,
            false => {
                // Its memory first.
                drop(step);
                Step::new(&config, fitted, backend)?
            }
        };
        let held_out = data.pool(&data.fold.validation, config.size)?;
        let validation = Validation::new(&config, backend, &step, &mut *session, held_out)?;
        let saver = Saver::new(out, &config, &step.tape, &mut *session)?;
        let pool = Arc::new(data.pool(&data.fold.train, config.size)?);
        // The pools have them now.
        data.examples = Vec::new();
        let mut augmenter = None;
        if let Backend::Gpu { gpu, narrow } = backend {
            let augment = Some(config.augment);
            let made = Augmenter::new(gpu, &*pool, config.batch, config.seed, augment)?;
            augmenter = Some(made);
            let stored = match (narrow, config.precision) {
                (true, _) => "bf16",
                (false, Precision::F32) => "f32",
                (false, Precision::Bf16) => "f32, for want of bf16",
            };
            report.line(&format!(
                "training on {}, activations in {stored}, {} MiB of its memory",
                backend.name(),
                gpu.allocated() >> 20
            ));
        }
        step.start(&mut *session, config.seed, data.prior.as_ref())?;
        // A checkpoint of its own holds everything; the run then needs no other's.
        if !config.init.is_empty() && !out.join(LAST).is_file() {
            let path = Path::new(&config.init);
            let efficientnet = config.model.kind == ModelKind::EfficientnetB1;
            let bytes = checkpoint::read(path)?;
            let foreign = pretrained::is_foreign(&bytes);
            if foreign && !efficientnet {
                let problem = "expected a checkpoint of echograd, found weights of another program, which only the \
                    model efficientnet-b1 starts from";
                return Err(Error::file(path, problem));
            }
            if foreign {
                pretrained::initialise(path, &bytes, &step.tape, &mut *session)?;
                let what = "holds an encoder's weights, the others are random";
                report.line(&format!("{} {what}", path.display()));
            } else {
                let checkpoint = Checkpoint::of(path, &bytes)?;
                let unmatched = checkpoint.initialise(path, &step.tape, &mut *session)?;
                let (missing, unused) = (unmatched.missing.join(", "), unmatched.unused.join(", "));
                if !missing.is_empty() {
                    report.line(&format!("{} lacks {missing}: random", path.display()));
                }
                if !unused.is_empty() {
                    report.line(&format!("{}: {unused} not used", path.display()));
                }
            }
            step.start_averages(&mut *session)?;
        }
        Ok(Self {
            out,
            report,
            pool,
            augmenter,
            validation,
            saver,
            device: backend.name(),
            config,
            data,
            step,
            session,
            queued: None,
            position: Position::default(),
            rows: Vec::new(),
        })
    }

    fn begin(&mut self) -> Result<()> {
        let manifest = self.data.manifest(&self.config, &self.device)?;
        make_folder(self.out)?;
        // First: a folder with a configuration is one that can be resumed.
        write_atomically(&self.out.join(CONFIG), self.config.to_toml().as_bytes())?;
        self.write_manifest(&manifest)
    }

    fn write_manifest(&self, manifest: &Manifest) -> Result<()> {
        let path = self.out.join(MANIFEST);
        let mut json = serde_json::to_vec_pretty(manifest)
            .map_err(|e| Error::caused(&path, "cannot be written as JSON", e))?;
        json.push(b'\n');
        write_atomically(&path, &json)
    }

    /// Takes up the last checkpoint; a run that was stopped before its first one begins anew.
    fn resume(&mut self) -> Result<()> {
        let now = self.data.manifest(&self.config, &self.device)?;
        if !self.out.join(MANIFEST).is_file() {
            self.write_manifest(&now)?;
        }
        let manifest = Manifest::read(&self.out.join(MANIFEST))?;
        if let Some(change) = manifest.change(&now) {
            let problem = format!("expected the images that the run began with, found {change}");
            return Err(Error::argument(&self.config.data, problem));
        }
        if self.config.data != manifest.config.data {
            write_atomically(&self.out.join(CONFIG), self.config.to_toml().as_bytes())?;
        }
        for (how, now, begun) in [
            ("on", now.device, manifest.device),
            (
                "with instructions",
                now.instruction_set,
                manifest.instruction_set,
            ),
        ] {
            if now != begun {
                self.report.line(&format!(
                    "resumed {how} {now}, begun {how} {begun}: results may differ in their last bits"
                ));
            }
        }
        let path = self.out.join(LAST);
        if !path.is_file() {
            if is_finished(self.out) {
                let problem = "expected the checkpoint to go on from, found none: the run is finished, and studies \
                    and searches then keep the best one alone";
                return Err(Error::file(path, problem));
            }
            return Ok(());
        }
        let checkpoint = Checkpoint::read(&path)?;
        if let Some((key, expected, found)) = self.config.difference(&checkpoint.config) {
            let problem =
                format!("another run's checkpoint: {key}: expected {expected}, found {found}");
            return Err(Error::file(path, problem));
        }
        checkpoint.restore(&path, &self.step.tape, &mut *self.session)?;
        self.position = checkpoint.position;
        saver::mend(self.out, &self.position)?;
        let path = self.out.join(METRICS);
        if path.is_file() {
            self.rows = read_csv(&path)?;
            // A row may have been written just before the checkpoint that would have gone with it.
            let epoch = self.position.epoch;
            self.rows.retain(|row| row.epoch <= epoch);
        }
        Ok(())
    }

    fn per_epoch(&self) -> u64 {
        self.data.fold.train.len().div_ceil(self.config.batch) as u64
    }

    /// What is saved beside the tensors; `best` says whether it is the best so far.
    fn state(&self, best: bool) -> saver::State {
        saver::State {
            position: self.position.clone(),
            rows: self.rows.clone(),
            best,
        }
    }

    /// Whether no epoch is left or early stopping says so.
    fn over(&self) -> bool {
        let patience = self.config.early_stopping.patience;
        let waited = self.position.epoch - self.position.best_epoch;
        self.position.epoch >= self.config.epochs || (patience > 0 && waited >= patience)
    }

    fn epochs(&mut self, interrupt: &AtomicBool) -> Result<()> {
        if self.over() {
            return Ok(());
        }
        let (seed, batch) = (self.config.seed, self.config.batch);
        let images = self.data.fold.train.len();
        let upcoming = (self.position.epoch..self.config.epochs)
            .flat_map(move |epoch| requests(seed, epoch, images, batch))
            .skip(self.position.step as usize);
        let mut batches = if self.augmenter.is_some() {
            Batches::Requests(Box::new(upcoming))
        } else {
            let loader = LoaderConfig {
                batch,
                workers: self.config.workers,
                ahead: AHEAD,
                seed,
                augment: Some(self.config.augment),
            };
            Batches::Loader(Loader::new(Arc::clone(&self.pool), loader, upcoming)?)
        };
        let mut started = Instant::now();
        while !self.over() {
            while self.position.step < self.per_epoch() {
                let (request, batch) = batches.next()?;
                let done = self.queue(request, batch)?;
                batches.recycle(done);
                self.position.step += 1;
                let done = self.position.epoch * self.per_epoch() + self.position.step;
                let total = self.config.epochs * self.per_epoch();
                let message = format!("epoch {}", self.position.epoch + 1);
                self.report.progress("training", done, total, &message);
                if stop(interrupt).is_err() {
                    self.settle()?;
                    let state = self.state(false);
                    self.saver.put_last(&mut *self.session, &state)?;
                    self.report.line(&format!(
                        "saved at {message}, step {}; --resume goes on from there",
                        self.position.step
                    ));
                    return Err(Error::Interrupted);
                }
            }
            batches.recycle(self.settle()?);
            started = self.end_epoch(started)?;
        }
        Ok(())
    }

    /// Queues one step; the batch of the step before is returned, whose results are read only then, so that a
    /// device never waits for its host.
    fn queue(&mut self, request: Request, batch: Option<Batch>) -> Result<Option<Batch>> {
        let Position { epoch, step, .. } = self.position;
        let images = self.data.fold.train.len() - step as usize * self.config.batch;
        let queued = Queued {
            number: epoch * self.per_epoch() + step + 1,
            present: images.min(self.config.batch),
            request,
            batch,
        };
        self.feed(&queued)?;
        self.session.replay()?;
        self.session.fetch(self.step.report)?;
        let done = self.settle();
        self.queued = Some(queued);
        done
    }

    /// Writes a step's inputs.
    fn feed(&mut self, step: &Queued) -> Result<()> {
        let values = schedule::control(&self.config, step.number, self.per_epoch());
        let weight = |i: usize| if i < step.present { 1.0 } else { 0.0 };
        let class = |label: f32| self.data.class_weights[usize::from(label > 0.5)];
        let label = |&index: &usize| self.pool.target(index).label;
        let labels: Vec<f32> = step.request.indices.iter().map(label).collect();
        let weights: Vec<f32> = (0..labels.len()).map(weight).collect();
        let classes = labels.iter().zip(&weights).map(|(&l, w)| w * class(l));
        let classes: Vec<f32> = classes.collect();
        let targets = &self.step.targets;
        let pictures = [self.step.images, targets.masks];
        if let Some(batch) = &step.batch {
            self.session.write(pictures[0], batch.images.data())?;
            self.session.write(pictures[1], batch.masks.data())?;
        } else if let (Some(augmenter), Some(session)) =
            (&mut self.augmenter, self.session.on_gpu())
        {
            augmenter.make(session, pictures, &step.request)?;
        }
        for (var, values) in [
            (targets.labels, &labels[..]),
            (targets.weights, &weights),
            (targets.class_weights, &classes),
            (targets.control, &values),
        ] {
            self.session.write(var, values)?;
        }
        Ok(())
    }

    /// Adds the losses of the step whose results are still to be read, if there is one, to the epoch's sums, and
    /// returns its batch, if a loader made one.
    fn settle(&mut self) -> Result<Option<Batch>> {
        let Some(step) = self.queued.take() else {
            return Ok(None);
        };
        let report = self.session.fetched()?.expect("fetched behind the step");
        let (loss, norm) = (report[0], report[report.len() - 1]);
        if !(loss.is_finite() && norm.is_finite()) {
            return Err(self.examine(&step)?);
        }
        let terms = self.step.terms.each().map(|term| term.is_some());
        let sums = &mut self.position.sums;
        sums.resize(terms.len() + 1, 0.0);
        let mut values = report.iter();
        for (sum, present) in sums.iter_mut().zip(terms.into_iter().chain([true])) {
            let value = present.then(|| values.next()).flatten();
            *sum += step.present as f64 * f64::from(*value.unwrap_or(&0.0));
        }
        Ok(step.batch)
    }

    /// Where the first value of a step that is not finite came from. Neither that step nor those queued behind it
    /// changed the parameters ([`TrainingStep::halt`]), so it can be run again.
    fn examine(&mut self, step: &Queued) -> Result<Error> {
        self.session.write(self.step.halt, &[0.0])?;
        self.feed(step)?;
        let tensor = self.session.replay_checked()?;
        let cases = self.data.source.cases();
        let name = |&i: &usize| cases[self.data.fold.train[i]].image.clone();
        Ok(Error::NonFinite {
            step: step.number,
            tensor: tensor.unwrap_or_else(|| "an earlier step".to_owned()),
            images: step.request.indices.iter().map(name).collect(),
        })
    }

    /// Validates, and has a row of metrics and the checkpoints written. Returns when the epoch was over.
    fn end_epoch(&mut self, started: Instant) -> Result<Instant> {
        // What was queued is done, as the last step's results are read.
        let validating = Instant::now();
        let of_prior = self.step.prior.map(|prior| [prior.weight, prior.bias]);
        for var in of_prior.into_iter().flatten() {
            self.session.fetch(var)?;
        }
        let (dice, auc) = self.validation.run(&*self.session)?;
        let mut prior = Vec::new();
        while let Some(values) = self.session.fetched()? {
            prior.extend(values.into_iter().map(f64::from));
        }
        let ended = Instant::now();
        let images = self.data.fold.train.len() as f64;
        let sums = std::mem::take(&mut self.position.sums);
        let means: Vec<f64> = sums.iter().map(|sum| sum / images).collect();
        let terms = self.step.terms.each();
        let mean = |i: usize| terms[i].map(|_| means[i]);
        self.position.step = 0;
        self.position.epoch += 1;
        let epoch = self.position.epoch;
        let step = epoch * self.per_epoch();
        let values = schedule::control(&self.config, step, self.per_epoch());
        let score = if self.config.arm.segments() {
            dice
        } else {
            auc
        };
        let score = score.expect("the validation fold has what the arm is judged by");
        let better = self.position.best.is_none_or(|best| score > best);
        if better {
            self.position.best = Some(score);
            self.position.best_epoch = epoch;
        }
        let prior = |k: usize| prior.get(k).copied();
        let row = Epoch {
            epoch,
            step,
            learning_rate: f64::from(values[control::LEARNING_RATE]),
            ramp: f64::from(values[control::RAMP]),
            loss: means[0],
            cross_entropy: mean(1),
            dice_loss: mean(2),
            classification: mean(3),
            consistency: mean(4),
            gradient_norm: means[5],
            val_dice: dice,
            val_auc: auc,
            prior_irregularity: prior(0),
            prior_orientation: prior(1),
            prior_margin: prior(2),
            prior_roundness: prior(3),
            prior_bias: prior(4),
            validation_seconds: Some((ended - validating).as_secs_f64()),
            seconds: (ended - started).as_secs_f64(),
        };
        self.report.epoch(&row, self.config.epochs, better);
        self.rows.push(row);
        let state = self.state(better);
        match self.over() {
            true => self.saver.put_last(&mut *self.session, &state)?,
            false => self.saver.put(&mut *self.session, state)?,
        }
        Ok(ended)
    }

    /// The best weights on the validation fold, at original resolution.
    fn finish(self, interrupt: &AtomicBool) -> Result<Trained> {
        // Its memory first: another network's comes on top.
        drop((self.session, self.validation, self.saver));
        let mut model = Model::open(self.out, self.config.device, usize::MAX)?;
        let source = &*self.data.source;
        let subset = &self.data.fold.validation;
        let rows = examine(&mut model, source, subset, self.report, interrupt)?;
        let folder = self.out.join(VALIDATION);
        make_folder(&folder)?;
        Ok(Trained {
            epochs: self.position.epoch,
            best_epoch: self.position.best_epoch,
            best: self.position.best.unwrap_or_default(),
            validation: write(&folder, source.name(), source.cases(), &rows)?,
        })
    }
}

/// Whether the training of the run in that folder is over: its validation metrics are the last thing written.
pub(crate) fn is_finished(run: &Path) -> bool {
    run.join(VALIDATION).join(RESULTS).is_file()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_batch_is_filled_with_the_first_images_of_its_epoch() {
        let requests = requests(3, 7, 10, 4);
        assert!(
            requests
                .iter()
                .all(|r| r.indices.len() == 4 && r.epoch == 7)
        );
        let shown: Vec<usize> = requests.iter().flat_map(|r| r.indices.clone()).collect();
        let mut once = shown[..10].to_vec();
        once.sort_unstable();
        assert_eq!(once, (0..10).collect::<Vec<_>>());
        assert_eq!(shown[10..], shown[..2]);
    }

    #[test]
    fn fewer_images_than_a_batch_repeat_as_often_as_it_takes() {
        let requests = requests(0, 0, 2, 5);
        let [only] = &requests[..] else { panic!() };
        let [a, b, ..] = only.indices[..] else {
            panic!()
        };
        assert_eq!(only.indices, [a, b, a, b, a]);
    }

    /// What a GPU is asked for in an epoch. Nothing waits for all that is queued, and the number of weights does not
    /// show.
    #[cfg(echograd_emulator)]
    #[test]
    fn between_steps_little_goes_over_the_host() {
        use crate::data::phantom::{self, Site};
        use crate::device::gpu::Gpu;

        let folder = tempfile::tempdir().unwrap();
        let images = folder.path().join("images");
        phantom::write(&[Site::A], 40, 1, &images, &|_| Ok(())).unwrap();
        let data = format!("busi:{}", images.display());
        let epochs = 3;
        let settings = [
            ("preset", "tiny"),
            ("data", &data),
            ("size", "16"),
            ("batch", "2"),
            ("model.widths", "[3, 5]"),
            ("epochs", &epochs.to_string()),
            ("folds", "3"),
            ("early_stopping.patience", "0"),
        ];
        let owned = settings.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let config = Config::load(None, &owned).unwrap();
        let gpu = Gpu::emulator().unwrap();
        let backend = Backend::Gpu {
            gpu: gpu.clone(),
            narrow: true,
        };
        let no = AtomicBool::new(false);
        let out = folder.path().join("run");
        let step = Step::new(&config, true, &backend).unwrap();
        let data = Data::open(&config, &(), &no).unwrap();
        let mut run = Run::new(&out, config, data, step, &backend, &()).unwrap();
        run.begin().unwrap();
        let steps = epochs * run.per_epoch() as usize;
        let held_out = run.data.fold.validation.len();
        // Eight at once.
        let shown = epochs * held_out.div_ceil(8);
        assert!(held_out > 8 && steps > 2 * epochs);

        let before = gpu.traffic();
        run.epochs(&no).unwrap();
        let now = gpu.traffic();
        assert_eq!(now.replays - before.replays, steps + shown);
        // Augmentation; images shown, and the weights.
        let launches = steps + shown + epochs;
        assert_eq!(now.launches - before.launches, launches);
        // What augmentation draws and four small inputs; which images are shown.
        assert_eq!(now.writes - before.writes, 5 * steps + shown);
        // Losses; overlaps and malignancies, and the prior.
        let fetches = steps + 2 * shown + 2 * epochs;
        assert_eq!(now.fetches - before.fetches, fetches);
        // The state of an epoch, unless its checkpoint is skipped.
        let copies = now.copies - before.copies;
        assert!((1..=epochs).contains(&copies), "{copies}");
        let aside = now.reads_aside - before.reads_aside;
        assert!((1..=copies).contains(&aside), "{aside}");
        assert_eq!((now.reads, now.waits), (before.reads, before.waits));
    }
}
