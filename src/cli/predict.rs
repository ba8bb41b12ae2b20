//! `echograd predict`.

use std::path::PathBuf;
use std::process::ExitCode;

use super::progress::Console;
use crate::metrics::Disagreement;
use crate::report::number::{figure, rounded};
use crate::train::config::Device;
use crate::train::predict::{self, PredictArgs};

/// Outline and classify the lesion in images of your own
///
/// Writes STEM_mask.png and STEM_overlay.png at the image's size for every image, and predictions.json with the probability of
/// malignancy p, the prior φ and the four shape features. Folders before the first file are further runs, averaged with the
/// first, masks and probabilities before the threshold; predictions.json then says too how far they are apart: p_sd and
/// mask_agreement. Research software: not for decisions about patients.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The run's folder
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// Image files (PNG, JPEG, BMP, TIFF), before them perhaps folders of further runs
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
        let folders = self.files.iter().take_while(|path| path.is_dir());
        let (others, files) = self.files.split_at(folders.count());
        let runs = [std::slice::from_ref(&self.run), others].concat();
        let args = PredictArgs {
            runs: &runs,
            files,
            out: &self.out,
            device: self.device,
        };
        let predictions = predict::predict(&args, &Console::default(), super::interrupt()?)?;
        if self.json {
            super::print_json(&predictions)?;
            return Ok(ExitCode::SUCCESS);
        }
        let several = runs.len() > 1;
        let apart = |[p, masks]: [&str; 2]| match several {
            true => format!(" {p:>7} {masks:>7}"),
            false => String::new(),
        };
        let head = apart(["p sd", "agree"]);
        outln!(
            "{:<40} {:>9} {:>7} {:>7}{head}",
            "image",
            "area px",
            "p",
            "phi"
        );
        for prediction in &predictions {
            let Disagreement {
                p_sd,
                mask_agreement,
            } = prediction.disagreement;
            outln!(
                "{:<40} {:>9} {:>7} {:>7}{}",
                prediction.image.display().to_string(),
                rounded(prediction.area_px.map(|area| area as f64), 0),
                figure(prediction.p),
                figure(prediction.phi),
                apart([&figure(p_sd), &figure(mask_agreement)])
            );
        }
        Ok(ExitCode::SUCCESS)
    }
}
