//! `echograd evaluate`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use super::metrics_table;
use super::progress::Console;
use crate::train::config::Device;
use crate::train::evaluate::{self, EvaluateArgs};

/// Test a trained network on a data set, without fine-tuning
///
/// Masks are compared at every image's original resolution, threshold 0.5. Images that the run was trained on are recognised by
/// their bytes and left out. With test_flip = true in RUN/config.toml every image is shown with its mirror image, and what is said of
/// both averaged. Several runs are averaged too, masks and probabilities before the threshold. Writes DIR/metrics.json,
/// per_image.csv (of several runs with how far they are apart: p_sd, mask_agreement) and images.csv, the SHA-256 of every image.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The run's folder; several, of one arm and size, are averaged
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<PathBuf>,
    /// Data set to test on
    #[arg(long, value_name = "NAME:PATH", visible_alias = "target")]
    data: String,
    /// Folder for the results
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Leave out all but one of images that are the same bytes
    #[arg(long)]
    drop_duplicates: bool,
    /// Where to compute
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    device: Device,
    /// Count images that a run was trained on too
    #[arg(long)]
    include_training: bool,
    /// Print metrics.json
    #[arg(long)]
    json: bool,
}

impl Args {
    /// Runs the command.
    ///
    /// # Errors
    /// As [`evaluate::evaluate`].
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let args = EvaluateArgs {
            runs: &self.runs,
            data: &self.data,
            out: &self.out,
            drop_duplicates: self.drop_duplicates,
            include_training: self.include_training,
            device: self.device,
        };
        let evaluated = evaluate::evaluate(&args, &Console::default(), super::interrupt()?)?;
        let name = &evaluated.rows[0].dataset;
        if self.json {
            let metrics = BTreeMap::from([(name, &evaluated.metrics)]);
            super::print_json(&metrics)?;
        } else {
            super::print(format_args!(
                "{}",
                metrics_table(&[(name.as_str(), &evaluated.metrics)])
            ))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
