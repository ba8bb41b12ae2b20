//! `echograd predict`.

use std::path::PathBuf;
use std::process::ExitCode;

use super::progress::Console;
use crate::train::config::Device;
use crate::train::predict::{self, PredictArgs};

/// Outline and classify the lesion in images of your own
///
/// Writes STEM_mask.png and STEM_overlay.png at the image's size for every image, and predictions.json with the probability of
/// malignancy p, the prior φ and the four shape features. Research software: not for decisions about patients.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The run's folder
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// Image files (PNG, JPEG, BMP, TIFF)
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// Folder for the results
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Where to compute
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    device: Device,
    /// Print predictions.json
    #[arg(long)]
    json: bool,
}

impl Args {
    /// Runs the command.
    ///
    /// # Errors
    /// As [`predict::predict`].
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let args = PredictArgs {
            run: &self.run,
            files: &self.files,
            out: &self.out,
            device: self.device,
        };
        let predictions = predict::predict(&args, &Console::default(), super::interrupt()?)?;
        if self.json {
            super::print_json(&predictions)?;
            return Ok(ExitCode::SUCCESS);
        }
        outln!("{:<40} {:>9} {:>7} {:>7}", "image", "area px", "p", "phi");
        for prediction in &predictions {
            let figure = |value: Option<f64>| value.map_or("–".into(), |v| format!("{v:.3}"));
            let area = prediction
                .area_px
                .map_or("–".into(), |area| area.to_string());
            outln!(
                "{:<40} {area:>9} {:>7} {:>7}",
                prediction.image.display().to_string(),
                figure(prediction.p),
                figure(prediction.phi)
            );
        }
        Ok(ExitCode::SUCCESS)
    }
}
