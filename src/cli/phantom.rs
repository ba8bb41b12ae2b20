//! `echograd phantom`.

use std::path::PathBuf;
use std::process::ExitCode;

use super::progress::Console;
use crate::data::phantom::{self, Site};
use crate::train::{Report as _, stop};

/// Make synthetic ultrasound images with lesions, masks and labels
///
/// Speckle images of layered breast tissue with lesions over the BI-RADS lexicon, in BUSI's layout directly
/// under the folder, so that --data busi:DIR reads them. The four sites differ as hospitals do: frequency, grain, gain,
/// dynamic range, artefacts.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The hospital: A, B, C or D; of several, e.g. A,B,C,D, each makes its share
    #[arg(long, required = true, value_name = "SITE", value_delimiter = ',')]
    site: Vec<Site>,
    /// Number of images; about one in seven shows no lesion
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    count: u32,
    /// Same seed, same images
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// New or empty folder to write to
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

impl Args {
    /// Runs the command.
    ///
    /// # Errors
    /// If the folder is not empty or cannot be written, or on Ctrl-C.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let (console, interrupt) = (Console::default(), super::interrupt()?);
        let done = |n: usize| {
            console.progress("phantoms", n as u64, self.count.into(), "");
            stop(interrupt)
        };
        let [benign, malignant, normal] =
            phantom::write(&self.site, self.count as usize, self.seed, &self.out, &done)?;
        drop(console);
        let sites: Vec<String> = self.site.iter().map(Site::to_string).collect();
        outln!(
            "{}: {} images of site{} {} ({benign} benign, {malignant} malignant, {normal} normal)",
            self.out.display(),
            self.count,
            if sites.len() == 1 { "" } else { "s" },
            sites.join(", ")
        );
        Ok(ExitCode::SUCCESS)
    }
}
