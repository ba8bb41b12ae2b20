//! `echograd study` and `echograd search`, which plan their runs by the same flags.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::overview::Overview;
use super::{SIZE_RANGE, metrics_table};
use crate::error::{Error, Result};
use crate::report::number::figure;
use crate::study::protocol::{ABLATIONS, ARMS, Method, Overlay, Protocol};
use crate::study::search::{self, CHOICE, GRID, SearchArgs};
use crate::study::{self, PAGE, StudyArgs};
use crate::train::config::{Device, Preset};

/// Flags that say what every run is like.
#[derive(clap::Args, Debug)]
struct Runs {
    /// Data set to train on; lesion images only
    #[arg(long, value_name = "NAME:PATH", required_unless_present = "resume")]
    source: Option<String>,
    /// Folds of the source, stratified by diagnosis, patients kept together [default: 5]
    #[arg(long, value_name = "K")]
    folds: Option<usize>,
    /// Runs of each fold, with seeds that count up from --seed [default: 1]
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u64).range(1..=1000))]
    seeds: Option<u64>,
    /// First seed [default: 0]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(super::SEED_RANGE))]
    seed: Option<u64>,
    /// Named defaults: tiny takes seconds a run, unet minutes on two cores, efficientnet-b1 far longer [default: unet]
    #[arg(long)]
    preset: Option<Preset>,
    /// TOML file of settings for all methods and, under [methods.NAME], for one; `search` writes such a file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// One setting for all methods, e.g. --set optimizer.ema=0; the keys are those of a run's config.toml
    #[arg(long, value_name = "KEY=VALUE", value_parser = super::key_value)]
    set: Vec<(String, String)>,
    /// Start every run from the weights of a checkpoint, or for efficientnet-b1 of a file from torchvision or timm
    #[arg(long, value_name = "FILE")]
    init: Option<PathBuf>,
    /// Times each image is seen [default: the preset's; tiny 20, others 50]
    #[arg(long, value_name = "N")]
    epochs: Option<u64>,
    /// Side of the square that images are letterboxed to, in pixels [default: the preset's; tiny 64, unet 128, efficientnet-b1 256]
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u16).range(SIZE_RANGE))]
    size: Option<u16>,
    /// Images per step [default: 16]
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Where to compute, with --resume from now on [default: cpu]
    #[arg(long)]
    device: Option<Device>,
    /// Leave out all but one of images that are the same bytes
    #[arg(long)]
    drop_duplicates: bool,
    /// Go on where the one in --out stopped
    #[arg(long)]
    resume: bool,
}

impl Runs {
    /// The flags given, as configuration keys; `--set` comes last and wins.
    fn settings(&self) -> Vec<(String, String)> {
        let given = [
            ("preset", self.preset.map(|v| super::name_of(&v))),
            ("init", self.init.as_ref().map(|p| p.display().to_string())),
            ("epochs", self.epochs.map(|v| v.to_string())),
            ("size", self.size.map(|v| v.to_string())),
            ("batch", self.batch.map(|v| v.to_string())),
            ("device", self.device.map(|v| super::name_of(&v))),
            (
                "drop_duplicates",
                self.drop_duplicates.then(|| "true".to_owned()),
            ),
        ];
        super::settings(given, &self.set)
    }

    /// The plan, if there is a source.
    fn plan(&self, targets: &[String], arms: &[String]) -> Result<Option<Protocol>> {
        let Some(source) = &self.source else {
            return Ok(None);
        };
        let settings = self.settings();
        let overlay = Overlay::read(self.config.as_deref(), &settings)?;
        let mut methods: Vec<Method> = Vec::new();
        for name in arms {
            if methods.iter().all(|method| method.name != *name) {
                methods.push(overlay.method(name)?);
            }
        }
        let first = self.seed.unwrap_or(0);
        let last = first.saturating_add(self.seeds.unwrap_or(1) - 1);
        if !super::SEED_RANGE.contains(&last) {
            let problem = format!(
                "expected seeds up to {}, found {last}",
                super::SEED_RANGE.end()
            );
            return Err(Error::argument("--seed", problem));
        }
        let folds = self.folds.unwrap_or(5);
        for method in &methods {
            crate::train::Config {
                folds,
                ..method.config.clone()
            }
            .validate()?;
        }
        Ok(Some(Protocol {
            source: source.clone(),
            targets: targets.to_vec(),
            folds,
            seeds: (first..=last).collect(),
            search: overlay.search().cloned(),
            methods,
        }))
    }

    /// Whether nothing but `--resume` was given, or where to go on.
    fn is_bare(&self) -> bool {
        let Self {
            folds, seeds, seed, ..
        } = self;
        let none = folds.is_none() && seeds.is_none() && seed.is_none();
        let settings = self.settings();
        let moved = settings.iter().all(|(key, _)| key == "device");
        none && self.config.is_none() && self.set.is_empty() && moved
    }

    /// Refuses flags without `--source`, unless there are none but `--resume`, `--out` and `--device`.
    fn whole_or_bare(&self, bare: bool, what: &str) -> Result<()> {
        if self.source.is_some() || bare {
            return Ok(());
        }
        let problem = format!(
            "expected the command that the {what} began with, or --out alone, perhaps with --device, found part of it"
        );
        Err(Error::argument("--resume", problem))
    }
}

/// Does consistency generalise? Train several methods on one data set, test them on others
///
/// Trains every method on the same folds of the source, with the same seeds and starting weights, chooses epochs on the
/// held-out parts, and tests on the targets without fine-tuning. Writes DIR/report.html, statistics.json, per_image.csv, normals.csv,
/// ensembles.csv, manifest.json, figures/ and all runs, of whose checkpoints the best stays. Ctrl-C saves; --resume goes on where
/// it stopped, with --out alone, with --device elsewhere, or with the same command, and repeats nothing that is finished; with
/// further --arms behind the old ones it adds them.
///
/// Methods are the arms segmentation, classification, multitask and consistency, and ablations of the last: stop-classifier,
/// stop-mask, no-confidence, no-sharpening, equal-weights, free-sign, frozen-prior, no-ramp, no-irregularity, no-orientation,
/// no-margin, no-roundness. A table [methods.NAME] in --config that sets `arm` makes another; one that differs from an earlier
/// method only by test_flip shares its networks.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    runs: Runs,
    /// Data sets to test on, never trained on
    #[arg(long, value_name = "NAME:PATH", num_args = 1.., required_unless_present = "resume")]
    target: Vec<String>,
    /// Methods, in the order of the report [default: segmentation,classification,multitask,consistency]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    arms: Vec<String>,
    /// All ablations of the consistency term too
    #[arg(long)]
    ablations: bool,
    /// The study's folder
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Print statistics.json
    #[arg(long)]
    json: bool,
}

impl Args {
    /// Runs the command.
    ///
    /// # Errors
    /// As [`study::study`].
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let mut arms = match self.arms.is_empty() {
            true => ARMS.map(|(name, _)| name.to_owned()).to_vec(),
            false => self.arms.clone(),
        };
        if self.ablations {
            arms.extend(ABLATIONS.iter().map(|ablation| ablation.name.to_owned()));
        }
        let bare = self.runs.is_bare()
            && self.target.is_empty()
            && self.arms.is_empty()
            && !self.ablations;
        self.runs.whole_or_bare(bare, "study")?;
        let plan = self.runs.plan(&self.target, &arms)?;
        let args = StudyArgs {
            plan: plan.as_ref(),
            out: &self.out,
            resume: self.runs.resume,
            device: self.runs.device,
        };
        let overview = Overview::default();
        let studied = study::study(&args, &overview, super::interrupt()?)?;
        drop(overview);
        if self.json {
            super::print_json(&studied.statistics)?;
        } else {
            for set in &studied.statistics.datasets {
                let arms = studied.statistics.arms.iter();
                let rows: Vec<_> = arms
                    .filter_map(|arm| Some((arm.as_str(), &set.arms.get(arm)?.metrics)))
                    .collect();
                outln!("{} ({})", set.dataset, set.role);
                super::print(format_args!("{}", metrics_table(&rows)))?;
            }
            outln!("report: {}", self.out.join(PAGE).display());
        }
        Ok(match studied.failed {
            true => ExitCode::FAILURE,
            false => ExitCode::SUCCESS,
        })
    }
}

/// Choose weights of the loss and options of the prior on the source's folds alone
///
/// Tries the values of one key after the other, each with the best so far of the others, by Dice and AUC on the held-out
/// parts; no target is opened. Writes DIR/trials.csv and DIR/choice.toml, which `study --config` takes. Ctrl-C saves;
/// --resume goes on, with --out alone, with --device elsewhere, or with the same command.
#[derive(clap::Args, Debug)]
pub struct SearchCommand {
    #[command(flatten)]
    runs: Runs,
    /// Methods to choose for, each by itself [default: multitask,consistency]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    arms: Vec<String>,
    /// Values to try of one key, in place of the default grid [default: 8 keys of the loss and the prior]
    #[arg(long, value_name = "KEY=VALUE,...", value_parser = super::key_value)]
    grid: Vec<(String, String)>,
    /// The search's folder
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

impl SearchCommand {
    /// Runs the command.
    ///
    /// # Errors
    /// As [`search::search`].
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let arms = match self.arms.is_empty() {
            true => ["multitask", "consistency"].map(str::to_owned).to_vec(),
            false => self.arms.clone(),
        };
        let values = |text: &str| text.split(',').map(str::to_owned).collect::<Vec<_>>();
        let grid: Vec<(String, Vec<String>)> = match self.grid.is_empty() {
            true => GRID
                .iter()
                .map(|(key, values)| {
                    (
                        key.to_string(),
                        values.iter().map(|v| v.to_string()).collect(),
                    )
                })
                .collect(),
            false => self
                .grid
                .iter()
                .map(|(key, text)| (key.clone(), values(text)))
                .collect(),
        };
        let bare = self.runs.is_bare() && self.arms.is_empty() && self.grid.is_empty();
        self.runs.whole_or_bare(bare, "search")?;
        let plan = self.runs.plan(&[], &arms)?;
        let args = SearchArgs {
            plan: plan.as_ref(),
            grid: &grid,
            out: &self.out,
            resume: self.runs.resume,
            device: self.runs.device,
        };
        let overview = Overview::default();
        let searched = search::search(&args, &overview, super::interrupt()?)?;
        drop(overview);
        outln!(
            "{:<16}{:>6}  {:<28}{:>7}{:>7}{:>8}",
            "method",
            "trial",
            "setting",
            "Dice",
            "AUC",
            "score"
        );
        for trial in &searched.trials {
            let setting = match trial.key.as_str() {
                "" => "as given".to_owned(),
                key => format!("{key} = {}", trial.value),
            };
            outln!(
                "{:<16}{:>6}  {setting:<28}{:>7}{:>7}{:>8.4}{}",
                trial.arm,
                trial.trial,
                figure(trial.dice),
                figure(trial.auc),
                trial.score,
                if trial.best { " best" } else { "" }
            );
        }
        for method in &searched.methods {
            let trials = searched.trials.iter();
            let trials = trials.filter(|trial| trial.arm == method.name).count();
            outln!("{}: chosen of {trials}", method.name);
        }
        outln!("choice: {}", display(&self.out, CHOICE));
        Ok(ExitCode::SUCCESS)
    }
}

fn display(folder: &Path, file: &str) -> String {
    folder.join(file).display().to_string()
}
