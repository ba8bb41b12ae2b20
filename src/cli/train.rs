//! `echograd train`.

use std::path::PathBuf;
use std::process::ExitCode;

use super::progress::Console;
use super::{SIZE_RANGE, metrics_table};
use crate::train::config::{Arm, Device, Preset};
use crate::train::run::{self, TrainArgs};

/// Train a network on one fold of a data set
///
/// Writes RUN/config.toml (everything that determines the run), manifest.json (images, split, machine), metrics.csv (a row per
/// epoch), best.safetensors and last.safetensors, and the best network's results on the held-out fold in validation/. Ctrl-C
/// saves; --resume goes on bit for bit where a run stopped, however it stopped.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Data set to train on; lesion images only. Needed unless --config, --set or --resume names it
    #[arg(long, value_name = "NAME:PATH", visible_alias = "source", required_unless_present_any = ["config", "set", "resume"])]
    data: Option<String>,
    /// What to train [default: consistency]
    #[arg(long)]
    arm: Option<Arm>,
    /// Named defaults: tiny takes seconds, unet minutes on two cores, efficientnet-b1 far longer [default: unet]
    #[arg(long)]
    preset: Option<Preset>,
    /// TOML file that overlays the preset [default: none]; RUN/config.toml of any run is one
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Overlay one value, e.g. --set loss.consistency=0.3; see RUN/config.toml for the keys
    #[arg(long, value_name = "KEY=VALUE", value_parser = super::key_value)]
    set: Vec<(String, String)>,
    /// Start from the weights of a checkpoint; for efficientnet-b1 also of a safetensors file with the names of torchvision or timm [default: random weights]
    #[arg(long, value_name = "FILE")]
    init: Option<PathBuf>,
    /// Folds of the stratified split [default: 5]
    #[arg(long, value_name = "K")]
    folds: Option<usize>,
    /// The fold held out, from 0 [default: 0]
    #[arg(long, value_name = "I")]
    fold: Option<usize>,
    /// Times each image is seen [default: the preset's; tiny 20, others 50]
    #[arg(long, value_name = "N")]
    epochs: Option<u64>,
    /// Side of the square that images are letterboxed to, in pixels [default: the preset's; tiny 64, unet 128, efficientnet-b1 256]
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u16).range(SIZE_RANGE))]
    size: Option<u16>,
    /// Images per step [default: 16]
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Where to compute [default: cpu]
    #[arg(long)]
    device: Option<Device>,
    /// Same seed, same run [default: 0]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(super::SEED_RANGE))]
    seed: Option<u64>,
    /// Leave out all but one of images that are the same bytes
    #[arg(long)]
    drop_duplicates: bool,
    /// Go on where the run in --out stopped
    #[arg(long)]
    resume: bool,
    /// The run's folder
    #[arg(long, value_name = "RUN")]
    out: PathBuf,
    /// Print the results on the held-out fold as one JSON document
    #[arg(long)]
    json: bool,
}

impl Args {
    /// Runs the command.
    ///
    /// # Errors
    /// As [`run::train`].
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let args = TrainArgs {
            out: &self.out,
            config: self.config.as_deref(),
            settings: &self.settings(),
            resume: self.resume,
        };
        let trained = run::train(&args, &Console::default(), super::interrupt()?)?;
        if self.json {
            super::print_json(&trained.validation)?;
        } else {
            outln!(
                "{}: best of {} epochs is {} (validation score {:.4})",
                self.out.display(),
                trained.epochs,
                trained.best_epoch,
                trained.best
            );
            super::print(format_args!(
                "{}",
                metrics_table(&[("validation", &trained.validation)])
            ))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    /// The flags given, as configuration keys; `--set` comes last and wins.
    fn settings(&self) -> Vec<(String, String)> {
        let given = [
            ("data", self.data.clone()),
            ("arm", self.arm.map(|v| super::name_of(&v))),
            ("preset", self.preset.map(|v| super::name_of(&v))),
            ("init", self.init.as_ref().map(|p| p.display().to_string())),
            ("folds", self.folds.map(|v| v.to_string())),
            ("fold", self.fold.map(|v| v.to_string())),
            ("epochs", self.epochs.map(|v| v.to_string())),
            ("size", self.size.map(|v| v.to_string())),
            ("batch", self.batch.map(|v| v.to_string())),
            ("device", self.device.map(|v| super::name_of(&v))),
            ("seed", self.seed.map(|v| v.to_string())),
            (
                "drop_duplicates",
                self.drop_duplicates.then(|| "true".to_owned()),
            ),
        ];
        super::settings(given, &self.set)
    }
}
